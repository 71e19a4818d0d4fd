//! The swarm in every test run: the same few hundred seeds each time, which pass.
//! `devstack/swarm` has others.

use std::{path::Path, sync::Mutex};

use drover_tests::swarm::{Heed, first_difference, plan::Plan, run, run_seeds};

/// Seeds of every run.
const SEEDS: u64 = 300;

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_swarm"))
}

#[test]
fn everything_at_once_harms_no_guest() {
    let failed = Mutex::new(Vec::new());
    run_seeds(program(), 0..SEEDS, &|seed, ran| {
        if !ran.broken.is_empty() {
            failed.lock().unwrap().push((seed, ran.broken.clone()));
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(
        failed.is_empty(),
        "look closer with devstack/swarm --seed S --least --trace: {failed:#?}"
    );
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in 0..3 {
        assert_eq!(first_difference(program(), seed), None, "seed {seed}");
    }
    let run = |seed| run(&Plan::draw(seed), Heed::Sum);
    let (first, second) = (run(1), run(2));
    assert!(first.things > 100, "something happened: {first:?}");
    assert_ne!(first.hash, second.hash);
}
