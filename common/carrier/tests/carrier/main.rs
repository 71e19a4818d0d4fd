//! Transfers over real sockets, from and to real files.
#![allow(clippy::unwrap_used, reason = "these are tests")]

mod broken;
mod control;
mod order;
mod rig;
mod strangers;
mod whole;
