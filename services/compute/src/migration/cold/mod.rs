//! Cold migrations on this node: the guest is off while it moves, and its files
//! go from agent to agent.
//!
//! ```text
//!  source       resize_instance(pre-copy, stop, copy) ─► Leaving ─► set aside ─┬─ confirm_resize ──────► (nothing left)
//!                 journal first ┘   ▲ restart             │                    │
//!                                   └──── asked again     └────────────────────┴─ finish_revert_resize ► (nothing left,
//!                                                                                  the guest as it was)
//!  destination  prep_resize ─► Coming ─► finish_resize ─► (guest here) ─┬─ confirm_at_destination ─► (nothing left)
//!                 journal first ┘  ▲ restart                            └─ revert_resize, then
//!                                                                          rollback_resize ────────► (nothing left)
//! ```
//!
//! * [`source`] and [`destination`]: the steps. [`files`]: names and lists. [`memory`]: a
//!   source that has lost its journal. [`sent`]: whether a guest is still as it was sent.
//!
//! A guest is started only with the conductor's word that it runs nowhere else
//! (invariant 1). What is set aside is renamed and has no definition, so that
//! nothing starts it by mistake.

mod destination;
pub(super) mod files;
mod memory;
mod sent;
mod source;

pub(super) use source::Leaving;
