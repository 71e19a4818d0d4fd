//! Every operation that Drover runs, and what runs them.
//!
//! * [`live_migrate`]: a running guest to another node.
//!
//! [`journal`] turns their events into the record and the notifications;
//! [`runner`] drives them, finds them again after a restart, and keeps hold.

pub mod journal;
pub mod live_migrate;
pub mod runner;
