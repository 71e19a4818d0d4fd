//! Runs the swarm: `swarm [--seeds N] [--from S]`, or one seed with `--seed S
//! [--trace] [--least] [--twice]`. See `drover_tests::swarm`.

use std::{
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use drover_tests::swarm::{first_difference, least, plan::Plan, run, run_seeds};

fn main() -> ExitCode {
    match asked(std::env::args().skip(1)) {
        Ok(Asked::One {
            plan, twice: true, ..
        }) => two(&plan),
        Ok(Asked::One {
            plan, trace, least, ..
        }) => one(&plan, trace, least),
        Ok(Asked::Many { from, seeds }) => many(from, seeds),
        Err(words) => {
            eprintln!("swarm: {words}; see devstack/swarm --help");
            ExitCode::from(2)
        }
    }
}

enum Asked {
    One {
        plan: Plan,
        trace: bool,
        least: bool,
        twice: bool,
    },
    Many {
        from: u64,
        seeds: u64,
    },
}

fn asked(mut words: impl Iterator<Item = String>) -> Result<Asked, String> {
    let (mut seed, mut from, mut seeds) = (None, 0, 1000);
    let (mut trace, mut least, mut twice) = (false, false, false);
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
            "--trace" => trace = true,
            "--least" => least = true,
            "--twice" => twice = true,
            _ => return Err(format!("unknown argument '{word}'")),
        }
    }
    Ok(match seed {
        Some(seed) => Asked::One {
            plan: Plan::draw(seed),
            trace,
            least,
            twice,
        },
        None => Asked::Many { from, seeds },
    })
}

fn one(plan: &Plan, aloud: bool, smaller: bool) -> ExitCode {
    let plan = if smaller { least(plan) } else { plan.clone() };
    print!("{plan}");
    let ran = run(&plan, aloud);
    println!("{ran:#?}");
    match ran.broken.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

fn two(plan: &Plan) -> ExitCode {
    match first_difference(plan) {
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
    let began = Instant::now();
    let (failed, virtual_ms) = (AtomicU64::new(0), AtomicU64::new(0));
    run_seeds(from..from + seeds, &Plan::draw, &|seed, ran| {
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
