//! The swarm in every test run: the same few hundred seeds each time, which pass.
//! `devstack/swarm` has others.

use std::sync::Mutex;

use drover_tests::swarm::{plan::Plan, run_seeds};

/// Seeds of every run.
const SEEDS: u64 = 8;

fn draw(seed: u64) -> Plan {
    Plan::draw(seed, false)
}

#[test]
fn everything_at_once_harms_no_guest() {
    let failed = Mutex::new(Vec::new());
    run_seeds(0..SEEDS, &draw, &|seed, ran| {
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
