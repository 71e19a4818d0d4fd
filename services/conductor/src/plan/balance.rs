//! Which guests leave the most loaded nodes, and where to.

use drover_model::operation::OperationPlan;

use super::{Costs, Examinations, World};

/// What balance there is to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Goal {
    /// Largest spread that is left: the most loaded node's load less the mean,
    /// percent points.
    pub threshold_percent: u32,
    /// A guest that moved is left alone for so long, ms.
    pub cool_down_ms: u64,
    /// No target is loaded more than this by it, percent.
    pub target_limit_percent: u32,
    /// Moves at the most.
    pub max_moves: usize,
}

/// The moves, in order, each with the spread after it.
pub fn plan(_: &World, _: &Goal, _: &Examinations, _: Costs) -> OperationPlan {
    OperationPlan::default()
}
