//! What the tests that cross crates share.

pub mod cloud;
pub mod contract;
pub mod devstack;
pub mod fuzz;
pub mod swarm;
pub mod torture;
