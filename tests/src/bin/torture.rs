//! Tortures a devstack: `torture [--cases N] [--seed S] [--from K]`. See
//! `drover_tests::torture` and `devstack/torture`.

use std::{process::ExitCode, time::Instant};

use drover_store::scratch::postgresql_url;
use drover_tests::{
    devstack::Devstack,
    torture::{Asked, run},
};

fn main() -> ExitCode {
    let asked = match asked(std::env::args().skip(1)) {
        Ok(asked) => asked,
        Err(words) => {
            eprintln!("torture: {words}; see devstack/torture --help");
            return ExitCode::from(2);
        }
    };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let database = runtime.block_on(postgresql_url());
    let Some((devstack, database)) = Devstack::take_three().zip(database) else {
        return ExitCode::from(2);
    };
    let began = Instant::now();
    let ran = match run(&devstack, &database, asked) {
        Ok(ran) => ran,
        Err(words) => {
            eprintln!("torture: {words}");
            return ExitCode::FAILURE;
        }
    };
    let took = began.elapsed().as_secs_f64();
    #[allow(clippy::cast_precision_loss)] // Not so many.
    let each = took / ran.cases.max(1) as f64;
    let (cases, failed) = (ran.cases, ran.failed.len());
    println!("{cases} cases, {failed} failed; {took:.0} s, {each:.1} s a case");
    match failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn asked(mut words: impl Iterator<Item = String>) -> Result<Asked, String> {
    let mut asked = Asked {
        seed: 1,
        from: 0,
        cases: 10,
    };
    while let Some(word) = words.next() {
        let mut number = || {
            let text = words.next().unwrap_or_default();
            let number = text.parse::<u64>();
            number.map_err(|_| format!("{word} wants a number, not '{text}'"))
        };
        match word.as_str() {
            "--seed" => asked.seed = number()?,
            "--from" => asked.from = number()?,
            "--cases" => asked.cases = number()?,
            _ => return Err(format!("unknown argument '{word}'")),
        }
    }
    Ok(asked)
}
