//! Everything on a broker in memory and on hypervisors that are none: in virtual time
//! but for what works on a real database. One program, so that all of Drover is linked
//! once, and no core waits for the slowest test of each.

mod boots;
mod cold_deaths;
mod conductors;
mod content;
mod evacuation_deaths;
mod fuzz;
mod leases;
mod mounts;
mod nodes;
mod operations;
mod redundant;
mod simulation;
mod transfer_deaths;
