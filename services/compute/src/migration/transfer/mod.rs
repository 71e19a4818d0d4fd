//! Transfers to another project: the guest stays on this node and changes hands,
//! running (live) or off meanwhile (cold).
//!
//! ```text
//!  check ─► prep_transfer ─► Transferring ─► stop ─► copy ─► hand over ─┬─ post_transfer ─────────► (nothing left)
//!              journal first ┘   ▲ restart    cold    │          │      │
//!                                └── asked again ◄────┴──────────┘      └─ take back, then
//!                                                                          rollback_transfer ────► (nothing left,
//!                                                                                  the guest as it was)
//! ```
//!
//! * [`steps`]: the steps. [`work`]: the parts that take long, beside the actor.
//!
//! Every part looks at what is there and does the rest, so it may be cut short
//! anywhere and asked for again. The old disks stay until `post_transfer`; what
//! was where before is in the journal until the end.

mod steps;
mod work;

pub(super) use steps::Transferring;
pub(super) use work::Task;
