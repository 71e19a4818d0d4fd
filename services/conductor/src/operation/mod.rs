//! Operations on nodes: planned by [`crate::plan`], journalled, carried out as
//! migrations of their own.
//!
//! The way of one: [`begin`] admits it, [`runner`] has it planned ([`look`] reads
//! the world and asks the nodes) and then, whenever anything changes, [`drive`]
//! has [`crate::plan::schedule`] say what may begin. What that makes of the record
//! is in [`record`]. An evacuation needs evidence first ([`evacuation`], judged in
//! [`evidence`]); [`origin`] knows what a restored node gets back; [`load`] and [`balancer`] see
//! to balance without being asked.

pub mod active;
pub mod auto_evacuate;
pub mod balancer;
pub mod begin;
pub mod definitions;
mod drive;
pub mod evacuation;
pub mod evidence;
pub mod fence;
mod joined;
pub mod load;
pub mod look;
pub mod origin;
pub mod record;
pub mod runner;
pub mod ways;
