//! What a node's drains took away, so that it can come back.

use std::collections::HashMap;

use drover_model::{
    api::conductor::ListOperations,
    ids::{HostName, InstanceId},
    operation::{ItemState, Operation, RestoreOptions, Returning, Task},
};

use crate::{app::Context, plan::World};

/// Operations of a node that are looked at.
const LOOKED_AT: u32 = 50;

/// Guests that left a node.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Those that are still where they were put, in the order in which they left.
    pub guests: Vec<InstanceId>,
    /// About the others, in words.
    pub notes: Vec<String>,
}

/// What left a node since it was last restored whole.
///
/// # Errors
/// The record cannot be read.
pub async fn left(
    context: &Context,
    options: &RestoreOptions,
    world: &World,
) -> drover_store::Result<Left> {
    let filter = ListOperations {
        host: Some(options.host.clone()),
        limit: Some(LOOKED_AT),
        ..ListOperations::default()
    };
    let operations = context.store.operations(&filter).await?;
    Ok(still_there(&options.host, &operations, world))
}

/// `newest_first` are the operations of one node. A drain that was cancelled, or
/// that left something, may have been followed by another: both count.
fn still_there(home: &HostName, newest_first: &[Operation], world: &World) -> Left {
    let since = newest_first.iter().take_while(|o| !restored_whole(o));
    let mut drains: Vec<&Operation> = since.filter(|o| matches!(o.task, Task::Drain(_))).collect();
    drains.reverse();
    let mut order = Vec::new();
    let mut put_on = HashMap::<InstanceId, &HostName>::new();
    for item in drains.iter().flat_map(|o| &o.items) {
        if let ItemState::Moved { host, .. } = &item.state
            && put_on.insert(item.planned.instance, host).is_none()
        {
            order.push((item.planned.instance, &item.planned.name));
        }
    }
    let now: HashMap<_, _> = world.guests.iter().map(|g| (g.id, &g.host)).collect();
    let mut left = Left::default();
    for (id, name) in order {
        match now.get(&id) {
            Some(host) if put_on.get(&id) == Some(host) => left.guests.push(id),
            Some(host) if *host == home => {}
            Some(host) => left
                .notes
                .push(format!("{name} was moved to {host} since: left there")),
            None => left.notes.push(format!("{name} is no more")),
        }
    }
    left
}

fn restored_whole(operation: &Operation) -> bool {
    let all = |o: &RestoreOptions| o.returning == Returning::All;
    operation.status == drover_model::operation::OperationStatus::Completed
        && matches!(&operation.task, Task::Restore(o) if all(o))
}
