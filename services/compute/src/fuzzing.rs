//! What holds of what a node reads, whatever it is: bodies of fuzz targets
//! (`tests/fuzz`). A property that does not hold is a panic.

pub use crate::{
    hypervisor::libvirt::fuzzing::{domain, qcow2},
    journal::fuzzing::journal,
};
