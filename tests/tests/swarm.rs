//! The swarm in every test run: the same few hundred seeds each time, which pass.
//! `devstack/swarm` has others.

use std::sync::Mutex;

use drover_tests::swarm::{first_difference, plan::Plan, run, run_seeds};

/// Seeds of every run.
const SEEDS: u64 = 300;

#[test]
fn everything_at_once_harms_no_guest() {
    let failed = Mutex::new(Vec::new());
    run_seeds(0..SEEDS, &Plan::draw, &|seed, ran| {
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
        let plan = Plan::draw(seed);
        assert_eq!(first_difference(&plan), None, "{plan}");
    }
    let run = |seed| run(&Plan::draw(seed), false);
    let (first, second) = (run(1), run(2));
    assert!(first.things > 100, "something happened: {first:?}");
    assert_ne!(first.hash, second.hash);
}
