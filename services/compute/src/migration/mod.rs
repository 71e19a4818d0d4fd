//! Migrations on this node: one actor per migration, through which every step
//! for it goes, in order; so a step that is asked for twice at once is done once.
//!
//! ```text
//!  source       check ─► Marked ─┬─ path checked, or 60 s ─► (nothing left)
//!                                ▼
//!               live_migration ─► Sending ─► Ended ─┬─ post_live_migration ────► (nothing left)
//!                 journal first ┘   ▲ restart       └─ rollback_at_source ─────► (nothing left)
//!
//!  destination  pre_live_migration ─► Arriving ─┬─ post_at_destination ────────► (nothing left)
//!                    journal first ┘  ▲ restart └─ rollback_at_destination ────► (nothing left)
//! ```
//!
//! * [`registry`]: which actors there are, and which migration has which instance;
//!   [`past`]: what was seen of migrations, and how they ended.
//! * [`actor`]: the mailbox; [`source`] and [`destination`]: the steps; [`marks`].
//! * [`sending`]: a transfer under way; [`monitor`]: the task beside it, with its
//!   [`orders`] and its [`voice`]; what it decides by is pure: [`policy`],
//!   [`progress`], [`outcome`].
//! * [`cold`]: the same for guests that are off while they move. [`transfer`]: for
//!   guests that stay and change hands. [`work`]: what takes long in either.
//! * [`rebuild`]: guests of dead nodes, which come from what was kept of them.
//! * [`destroy`]: everything that removes, withdraws, renames away or stops hard, and
//!   the evidence that it takes. [`look`]: what this node sees of its copy, which is
//!   evidence for another.

mod actor;
mod cold;
mod contents;
mod destination;
pub(crate) mod destroy;
mod look;
mod marks;
mod monitor;
mod orders;
pub mod outcome;
mod past;
pub mod policy;
pub mod progress;
mod rebuild;
mod registry;
mod sending;
mod shared;
mod source;
pub(crate) mod steps;
mod transfer;
mod voice;
mod waiting;
pub mod words;
mod work;

pub(crate) use registry::Registry;
