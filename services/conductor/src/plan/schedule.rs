//! What of an operation may begin now: limits of nodes, cluster and operation;
//! the next destination for what came to nothing; and the end.

use drover_model::{
    ids::{HostName, InstanceId},
    migration::Migration,
    operation::{ItemState, MoveWay, Operation, OperationStatus, Tried, Verdict},
};

use super::{Costs, Examinations, World};

/// Most moves at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Live moves that may be made ready beyond those that send: destinations are
    /// prepared in parallel while few send.
    pub ahead: u32,
    /// From one node.
    pub outbound: u32,
    /// To one node.
    pub inbound: u32,
    /// In all.
    pub cluster: u32,
    /// Of an operation whose caller did not say.
    pub per_operation: u32,
}

/// Something to do about an operation.
#[derive(Debug, Clone, PartialEq)]
pub enum Act {
    /// Have a guest moved. Done again after a crash it is the same move, by
    /// operation, guest and attempt.
    Start {
        /// Which.
        instance: InstanceId,
        /// How.
        way: MoveWay,
        /// Where to.
        to: HostName,
        /// Counts this guest's attempts, from 0.
        attempt: usize,
    },
    /// Write down where a guest stands.
    Note {
        /// Which.
        instance: InstanceId,
        /// Where it stands now.
        state: ItemState,
        /// What came to nothing meanwhile.
        tried: Option<Tried>,
        /// What is tried next, if that is another.
        verdict: Option<Verdict>,
    },
    /// Call a migration back.
    Abort(drover_model::ids::MigrationId),
    /// It is over.
    End(OperationStatus),
}

/// What is to be done now. `own` are the operation's migrations, `active` all
/// unfinished ones of the cluster.
pub fn next(
    _: &Operation,
    _: &World,
    _own: &[Migration],
    _active: &[Migration],
    _: &Examinations,
    _: (Limits, Costs),
) -> Vec<Act> {
    Vec::new()
}
