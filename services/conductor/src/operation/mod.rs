//! Operations on nodes: planned by [`crate::plan`], journalled, carried out as
//! migrations of their own.
//!
//! The way of one: [`crate::api`] admits it, [`runner`] has it planned
//! ([`look`] reads the world and asks the nodes), and then, whenever anything
//! changes, has [`crate::plan::schedule`] say what may begin. An evacuation needs
//! [`evidence`] and a [`fence`] first.

pub mod auto_evacuate;
pub mod definitions;
pub mod evacuation;
pub mod evidence;
pub mod fence;
