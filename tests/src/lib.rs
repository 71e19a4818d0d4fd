//! What the tests that cross crates share.

pub mod cloud;
pub mod contract;
pub mod devstack;
pub mod dialect;
pub mod fuzz;
pub mod swarm;
pub mod tap;
pub mod torture;
