//! The compute agent: one per node, the only thing that speaks libvirt. It takes
//! stock of its node, reports, and carries out the steps that a conductor asks
//! for. It decides nothing about where guests go.
//!
//! A guided tour, in the order in which a request passes through:
//!
//! | what | where |
//! |---|---|
//! | the agent put together | [`app`], settings in [`config`] |
//! | requests: decode, act, answer | `api`; Nova's two methods in `api::nova` |
//! | the steps, one actor per migration | [`migration`] (state diagram there) |
//! | what must survive `kill -9` | [`journal`] |
//! | everything asked of libvirt | [`hypervisor`]: a trait, libvirt, and a fake |
//! | whether it is its node's agent; its heartbeat | `standing` |
//! | what the agent says by itself | `report`, by way of `conductor` |
//! | a node that was away | `returning`: it asks before anything runs; `autostart` |
//!
//! What holds everywhere: a step is journalled before it acts, done once however
//! often it is asked for, and touches nothing that its migration did not make.
//! Every task ends with the agent; every queue has a bound; timers are tokio's
//! and the wall clock is handed in, so tests run in virtual time.

mod api;
pub mod app;
mod autostart;
mod conductor;
pub mod config;
mod faults;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod hypervisor;
pub mod journal;
pub mod migration;
mod node;
mod report;
mod returning;
mod standing;

pub use node::{AgentSettings, Clock};
