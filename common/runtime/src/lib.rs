//! What every Drover process needs around its work: a configuration file, a
//! log, a signal to stop, a clock, and errors told whole.

pub mod blocking;
pub mod clock;
pub mod config;
pub mod error_chain;
pub mod logging;
pub mod shutdown;
