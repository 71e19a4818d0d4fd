//! Evacuation without being asked: off unless the settings say otherwise, never
//! without a fencing agent, and never when so many nodes are lost that the
//! conductor may be the one that is cut off.
//!
//! A look every few seconds: [`due`] says which nodes are down for long enough,
//! and of each an operation is begun as if somebody had asked for it. What then
//! proves the node dead, or does not, is the operation's business.

use std::time::Duration;

use drover_model::{
    api::conductor::ListOperations,
    ids::HostName,
    migration::Requester,
    operation::{EvacuateOptions, Operation, Task},
};
use drover_store::{StoreError, nodes::NodeRow};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    begin::Answer,
    evidence::{count, too_many},
    runner::OperationRunner,
};
use crate::{checks::Liveness, clock::goes_on_after};

/// Time between two looks.
const LOOK: Duration = Duration::from_secs(5);
/// Name of the switch that stops it for a maintenance window.
pub const SWITCH: &str = "evacuate";
/// Operations of the past that are looked at.
const MOST_OPERATIONS: u32 = 1000;

/// Whether and when dead nodes are evacuated without being asked.
#[derive(Debug, Clone, Copy)]
pub struct AutoEvacuate {
    /// Whether at all.
    pub is_on: bool,
    /// How long a node has to be down before, ms.
    pub delay_ms: u64,
    /// Nodes at one time.
    pub max_nodes: usize,
}

/// What [`due`] looks at.
struct Seen<'a> {
    nodes: &'a [NodeRow],
    /// Evacuations, under way and over.
    evacuations: &'a [Operation],
    /// Nodes with a fencing agent on which guests ran.
    worth: &'a [HostName],
}

/// Nodes whose evacuation is to begin now.
fn due(seen: &Seen<'_>, settings: AutoEvacuate, live: Liveness) -> Vec<HostName> {
    let active = |o: &&Operation| !o.status.is_final();
    let under_way = seen.evacuations.iter().filter(active).count();
    let free = settings.max_nodes.saturating_sub(under_way);
    let dead = seen.nodes.iter().filter(|node| {
        let host = &node.report.host;
        let silent_ms = live.silent_ms(node);
        let (expected, lost) = count(seen.nodes, host, live);
        // Once for each time that it went down: what failed is looked at by people.
        let tried = seen.evacuations.iter().any(|o| {
            let same = o.task.host() == Some(host);
            same && (o.created_at_ms >= node.heard_at_ms || !o.status.is_final())
        });
        silent_ms >= live.down_after_ms.saturating_add(settings.delay_ms)
            && seen.worth.contains(host)
            && !tried
            && !too_many(lost, expected)
    });
    dead.map(|n| n.report.host.clone()).take(free).collect()
}

/// Looks until told to stop.
pub async fn watch(operations: OperationRunner, stop: CancellationToken) {
    let settings = operations.context.auto_evacuate;
    if !settings.is_on {
        return;
    }
    let began = Instant::now();
    // To a conductor that was away every node seems silent.
    let first = Duration::from_millis(
        operations
            .context
            .down_after_ms
            .saturating_add(settings.delay_ms),
    );
    while goes_on_after(LOOK, &stop).await {
        if began.elapsed() < first {
            continue;
        }
        if let Err(error) = look(&operations, settings).await {
            warn!(%error, "dead nodes could not be looked for; tried again soon");
        }
    }
}

async fn look(operations: &OperationRunner, settings: AutoEvacuate) -> Result<(), StoreError> {
    let context = &operations.context;
    let store = &context.store;
    if !store.is_switched_on(SWITCH).await? {
        return Ok(());
    }
    let nodes = store.nodes().await?;
    let live = context.liveness();
    let mut worth = Vec::new();
    for node in nodes.iter().filter(|n| !live.is_up(n)) {
        let host = &node.report.host;
        let guests = store.instances(Some(host), None).await?;
        if context.fences.has(host) && guests.iter().any(|g| g.power_state.is_active()) {
            worth.push(host.clone());
        }
    }
    if worth.is_empty() {
        return Ok(());
    }
    let evacuations = store
        .operations(&ListOperations {
            kind: Some("evacuate".to_owned()),
            limit: Some(MOST_OPERATIONS),
            ..ListOperations::default()
        })
        .await?;
    let seen = Seen {
        nodes: &nodes,
        evacuations: &evacuations,
        worth: &worth,
    };
    for host in due(&seen, settings, live) {
        info!(%host, "is down, and is evacuated without being asked");
        let options = EvacuateOptions::new(host);
        let requester = Requester {
            user_id: Some("conductor".to_owned()),
            ..Requester::default()
        };
        let begun = operations.begin(Task::Evacuate(options), requester, None);
        if let Answer::Refused(failures) = begun.await? {
            warn!(?failures, "it was refused");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use drover_model::{ids::OperationId, operation::OperationStatus};

    use super::*;
    use crate::tests_support::node_row;

    const LIVE: Liveness = Liveness {
        down_after_ms: 30_000,
        now_ms: 1_000_000,
    };
    const SETTINGS: AutoEvacuate = AutoEvacuate {
        is_on: true,
        delay_ms: 120_000,
        max_nodes: 1,
    };

    fn host(name: &str) -> HostName {
        name.parse().unwrap()
    }

    fn evacuation(name: &str, created_at_ms: u64, status: OperationStatus) -> Operation {
        serde_json::from_value(serde_json::json!({
            "id": 1, "uuid": OperationId::generate(), "kind": "evacuate",
            "options": {"host": name}, "status": status, "cancel_requested": false,
            "items": [], "nodes": [], "expected_ms": 0, "decisions": [], "owner": "ctl",
            "attempt": 1, "requester": {}, "created_at_ms": created_at_ms,
            "updated_at_ms": created_at_ms, "finished_at_ms": null, "version": 1,
        }))
        .unwrap()
    }

    fn found(nodes: &[NodeRow], evacuations: &[Operation], worth: &[&str]) -> Vec<String> {
        let worth: Vec<_> = worth.iter().map(|name| host(name)).collect();
        let seen = Seen {
            nodes,
            evacuations,
            worth: &worth,
        };
        let due = due(&seen, SETTINGS, LIVE);
        due.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn only_a_node_that_is_down_for_long_and_alone_is_evacuated_once() {
        use OperationStatus as S;
        let up = |name: &str| node_row(name, 999_000);
        let since = |name: &str, ms: u64| node_row(name, 1_000_000 - ms);
        let all = ["kvm1", "kvm2", "kvm3", "kvm4"];
        let one = [since("kvm1", 150_000), up("kvm2"), up("kvm3"), up("kvm4")];
        assert_eq!(found(&one, &[], &all), ["kvm1"]);
        let early = [since("kvm1", 149_999), up("kvm2"), up("kvm3")];
        assert!(found(&early, &[], &all).is_empty(), "not for long enough");
        assert!(
            found(&one, &[], &["kvm2"]).is_empty(),
            "no fence, or no guest"
        );
        let before = evacuation("kvm1", 800_000, S::Incomplete);
        assert_eq!(found(&one, &[before], &all), ["kvm1"], "of another time");
        let after = evacuation("kvm1", 900_000, S::Failed);
        assert!(found(&one, &[after], &all).is_empty(), "once is enough");
        let other = evacuation("kvm9", 900_000, S::Running);
        assert!(found(&one, &[other], &all).is_empty(), "one at a time");
        let two = [
            since("kvm1", 200_000),
            since("kvm2", 200_000),
            up("kvm3"),
            up("kvm4"),
        ];
        assert_eq!(found(&two, &[], &all), ["kvm1"]);
        let three = [since("kvm1", 200_000), since("kvm2", 200_000), up("kvm3")];
        assert!(found(&three, &[], &all).is_empty(), "too many are lost");
    }
}
