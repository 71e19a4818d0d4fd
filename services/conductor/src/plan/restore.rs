//! What comes back to a node that was drained.

use drover_model::{
    ids::InstanceId,
    operation::{OperationPlan, RestoreOptions},
};

use super::{Costs, Examinations, World};

/// A verdict for every guest that its last drain took away (`left`, in its order).
pub fn plan(
    _: &World,
    _: &RestoreOptions,
    _left: &[InstanceId],
    _: &Examinations,
    _: Costs,
) -> OperationPlan {
    OperationPlan::default()
}
