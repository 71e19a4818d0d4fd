//! The conductor: admits requests, checks both nodes, chooses destinations,
//! runs every operation as a journalled saga, keeps the record.
//!
//! The way of a request: [`api`] decodes it, [`admission`] admits it, the record is
//! committed, the request acknowledged, and [`task::runner`] drives the saga in
//! [`task`], which asks agents through [`agent_client`]. What decides is pure:
//! [`checks`], [`placement`], [`plan`]. What is done with whole nodes is in
//! [`operation`]; which nodes live, [`ear`] hears; what a newer
//! Drover wrote is [`left_alone`]. [`app`] puts it all together.

pub mod admission;
pub mod agent_client;
pub mod api;
pub mod app;
pub mod checks;
pub mod clock;
pub mod comparing;
pub mod config;
pub mod ear;
pub mod leases;
pub mod left_alone;
pub mod notify;
pub mod operation;
pub mod placement;
pub mod plan;
pub mod retention;
pub mod survey;
pub mod task;
pub mod transfer_survey;

#[cfg(test)]
mod tests_support;
