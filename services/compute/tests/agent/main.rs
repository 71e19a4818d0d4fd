//! Whole agents over fake hypervisors, messaging in memory and virtual time:
//! every step, twice; death in every phase; every way a transfer can end.

#![allow(clippy::unwrap_used)] // all of it is test

mod destination;
mod harness;
mod listener;
mod memory;
mod nova;
mod rebuild;
mod reports;
mod restart;
mod returning;
mod source;
mod transfer;
