//! Drover's vocabulary, in the field's words and Nova's spellings.
//!
//! Read in this order: [`ids`] and [`error`], then what there is ([`guest`],
//! [`node`], [`project`]), what is done with it ([`migration`], [`operation`], [`check`]), what is kept of
//! other versions ([`unknown`]), in which version two of them speak ([`version`]), and last
//! [`api`], the shapes in which conductor, agents and frontends say it to each
//! other. No I/O and no clock live here; the rules that need neither do.

pub mod api;
pub mod check;
pub mod content;
pub mod error;
pub mod evidence;
pub mod guest;
pub mod ids;
pub mod migration;
pub mod node;
pub mod operation;
pub mod project;
pub mod unknown;
pub mod version;

/// XML namespace of Drover's element in a domain's `<metadata>`.
pub const METADATA_NAMESPACE: &str = "https://drover.dev/xmlns/instance/1";
/// Project of an adopted instance whose metadata names none.
pub const DEFAULT_PROJECT: &str = "default";
