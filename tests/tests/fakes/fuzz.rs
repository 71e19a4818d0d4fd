//! Each fuzz target, for a moment, by chance: what `devstack/fuzz` does for as long
//! as one likes.

use drover_tests::fuzz::{TARGETS, short};

/// Inputs of each target beside its corpus.
const INPUTS: usize = 2000;

fn run(name: &str) {
    let (name, target) = TARGETS.iter().find(|(n, _)| *n == name).expect("a target");
    short::run(name, *target, 1, INPUTS);
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            run(stringify!($name));
        })*

        #[test]
        fn all_are_run() {
            let names: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
            assert_eq!(names, [$(stringify!($name)),*]);
        }
    };
}

targets!(envelope reply report domain qcow2 frames journal configuration);
