//! Fuzzing: what must hold of everything that comes from outside, whatever bytes
//! come. A property that does not hold is a panic.
//!
//! The targets are here and, where they need what is private to a crate, in its
//! `fuzzing` module. `devstack/fuzz` runs them under libFuzzer (`tests/fuzz`), which
//! looks for inputs that take new ways through the code; `tests/tests/fakes/fuzz.rs` runs
//! each briefly in every test run, by chance alone ([`short`]).

mod configuration;
mod report;
mod saga;
pub mod short;

pub use configuration::configuration;
pub use drover_carrier::fuzzing::frames;
pub use drover_compute::fuzzing::{domain, qcow2};
pub use drover_rpc::fuzzing::{envelope, reply};
pub use report::report;

/// Something that must hold of any bytes.
pub type Target = fn(&[u8]);

/// All of them, by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("envelope", envelope),
    ("reply", reply),
    ("report", report),
    ("domain", domain),
    ("qcow2", qcow2),
    ("frames", frames),
    ("journal", journal),
    ("configuration", configuration),
];

/// Both journals: an agent's file, or, after an `s`, the events of a saga.
pub fn journal(data: &[u8]) {
    match data.split_first() {
        Some((b's', events)) => saga::saga(events),
        _ => drover_compute::fuzzing::journal(data),
    }
}
