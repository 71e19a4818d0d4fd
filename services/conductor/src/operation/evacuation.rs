//! What an evacuation needs before a guest may start elsewhere (invariant 1):
//! evidence, a fence that says *off*, and definitions.

use drover_model::{
    check::CheckFailure,
    migration::{ProofOfDeath, Requester},
    operation::{EvacuateOptions, Evidence},
};

use crate::{app::Context, plan::Examinations};

/// What is known of a node without doing anything to it, and everything that
/// stands in the way of evacuating it.
///
/// # Errors
/// The record cannot be read.
pub async fn inspect(
    _: &Context,
    _: &EvacuateOptions,
    _: &Requester,
) -> drover_store::Result<(Evidence, Vec<CheckFailure>)> {
    Err(drover_store::StoreError::Invalid("not built".to_owned()))
}

/// Makes sure that the node is off, by its fencing agent or by the operator's
/// word; else says why nothing may start elsewhere. Safe to repeat.
///
/// # Errors
/// The record cannot be read.
pub async fn prove(
    _: &Context,
    _: &EvacuateOptions,
    _: &Requester,
) -> drover_store::Result<(Evidence, Result<ProofOfDeath, Vec<CheckFailure>>)> {
    Err(drover_store::StoreError::Invalid("not built".to_owned()))
}

/// What the other nodes say to each guest of the node: which of them cannot have
/// it, and why (its disks are not reached there, …).
///
/// # Errors
/// The record cannot be read.
pub async fn examine(_: &Context, _: &EvacuateOptions) -> drover_store::Result<Examinations> {
    Err(drover_store::StoreError::Invalid("not built".to_owned()))
}
