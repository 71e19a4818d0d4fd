//! Runs the swarm: `swarm [--seeds N] [--from S]`, or one seed with `--seed S
//! [--trace] [--whole] [--least] [--twice] [--sum]`. See `drover_tests::swarm`.

use std::{
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use drover_tests::swarm::{Heed, Ran, first_difference, least, plan::Plan, run, run_seeds};

fn main() -> ExitCode {
    match asked(std::env::args().skip(1)) {
        Ok(Asked::One(seed, How::Sum)) => sum(seed),
        Ok(Asked::One(seed, How::Twice)) => two(seed),
        Ok(Asked::One(seed, How::Told { heed, least })) => one(seed, heed, least),
        Ok(Asked::Many { from, seeds }) => many(from, seeds),
        Err(words) => {
            eprintln!("swarm: {words}; see devstack/swarm --help");
            ExitCode::from(2)
        }
    }
}

enum Asked {
    One(u64, How),
    Many { from: u64, seeds: u64 },
}

enum How {
    /// In a line, for another program.
    Sum,
    /// Whether it is the same again.
    Twice,
    /// In words.
    Told { heed: Heed, least: bool },
}

fn asked(mut words: impl Iterator<Item = String>) -> Result<Asked, String> {
    let (mut seed, mut from, mut seeds) = (None, 0, 1000);
    let (mut heed, mut least) = (Heed::Sum, false);
    let mut how = None;
    while let Some(word) = words.next() {
        let mut number = || {
            let text = words.next().unwrap_or_default();
            let number = text.parse::<u64>();
            number.map_err(|_| format!("{word} wants a number, not '{text}'"))
        };
        match word.as_str() {
            "--seed" => seed = Some(number()?),
            "--from" => from = number()?,
            "--seeds" => seeds = number()?,
            "--trace" => heed = Heed::Gist,
            "--whole" => heed = Heed::Whole,
            "--least" => least = true,
            "--twice" => how = Some(How::Twice),
            "--sum" => how = Some(How::Sum),
            _ => return Err(format!("unknown argument '{word}'")),
        }
    }
    Ok(match seed {
        Some(seed) => Asked::One(seed, how.unwrap_or(How::Told { heed, least })),
        None => Asked::Many { from, seeds },
    })
}

fn sum(seed: u64) -> ExitCode {
    let ran = run(&Plan::draw(seed), Heed::Sum);
    let line = serde_json::to_string(&ran).expect("it is plain data");
    println!("{line}");
    success_of(&ran)
}

fn one(seed: u64, heed: Heed, smaller: bool) -> ExitCode {
    let drawn = Plan::draw(seed);
    let plan = if smaller { least(&drawn) } else { drawn };
    print!("{plan}");
    let ran = run(&plan, heed);
    println!("{ran:#?}");
    success_of(&ran)
}

fn success_of(ran: &Ran) -> ExitCode {
    match ran.broken.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

fn two(seed: u64) -> ExitCode {
    let own = std::env::current_exe().expect("this program has a path");
    match first_difference(&own, seed) {
        None => {
            println!("the same twice");
            ExitCode::SUCCESS
        }
        Some([one, other]) => {
            println!("once:  {one}\nagain: {other}");
            ExitCode::FAILURE
        }
    }
}

fn many(from: u64, seeds: u64) -> ExitCode {
    let own = std::env::current_exe().expect("this program has a path");
    let began = Instant::now();
    let (failed, virtual_ms) = (AtomicU64::new(0), AtomicU64::new(0));
    run_seeds(&own, from..from + seeds, &|seed, ran| {
        virtual_ms.fetch_add(ran.virtual_ms, Ordering::Relaxed);
        if !ran.broken.is_empty() {
            failed.fetch_add(1, Ordering::Relaxed);
            println!("seed {seed}: {}", ran.broken.join("; "));
        }
    });
    let (failed, took) = (failed.into_inner(), began.elapsed().as_secs_f64());
    let hours = virtual_ms.into_inner() / 3_600_000;
    let rate = seeds as f64 / took;
    println!(
        "{seeds} seeds, {failed} failed; {took:.1} s, {rate:.1} a second; {hours} h of virtual time"
    );
    match failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}
