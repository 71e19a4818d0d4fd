//! Nodes that fell silent, without being asked: each is looked at from all sides,
//! and is taken for dead if everything agrees, or for one whose *agent is lost*,
//! which waits for people and is said loudly.
//!
//! Dead ones are evacuated if the settings say so: never without a fencing agent,
//! never while they are closed (somebody works on them), and not beyond the
//! limits. What was seen has to have agreed for half of the delay without a break:
//! a libvirtd that restarts beside a stopped agent is not a node's end. Of each
//! an operation is begun as if somebody had asked for it; it takes the evidence
//! anew before anything is done.

use std::{collections::BTreeMap, time::Duration};

use drover_model::{
    api::conductor::ListOperations,
    check::{CheckCode, CheckFailure, Side},
    evidence::AgentLost,
    ids::HostName,
    migration::Requester,
    operation::{EvacuateOptions, Evidence, Operation, OperationStatus, Task},
};
use drover_store::{
    StoreError,
    fencing::{FenceLimits, Fenced},
    instances::InstanceRow,
    nodes::NodeRow,
    outbox::Notification,
};
use futures_util::{FutureExt, StreamExt, stream};
use serde_json::json;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{begin::Answer, evacuation, evidence::not_claimed, runner::OperationRunner};
use crate::{app::Context, clock::goes_on_after};

/// Time between two looks.
const LOOK: Duration = Duration::from_secs(5);
/// The same at a node that has been silent for longer than [`LONG_MS`].
const SELDOM: Duration = Duration::from_secs(60);
/// See there.
const LONG_MS: u64 = 600_000;
/// Nodes looked at at once.
const AT_ONCE: usize = 8;
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
    /// Nodes within an hour.
    pub limits: FenceLimits,
}

impl AutoEvacuate {
    /// How long the evidence has to agree, ms.
    fn agreed_for_ms(&self) -> u64 {
        self.delay_ms / 2
    }
}

/// A silent node, as it was seen last.
#[derive(Debug)]
struct Suspect {
    looked: Instant,
    /// Since when everything agrees that it is dead.
    agreed_since: Option<Instant>,
}

/// What was seen of one just now.
struct Found {
    node: NodeRow,
    evidence: Evidence,
    failures: Vec<CheckFailure>,
    /// For how long everything has agreed that it is dead, ms; none if it does not.
    agreed_ms: Option<u64>,
}

/// What [`decide`] looks at beside a node itself.
struct Seen<'a> {
    /// Evacuations, under way and over.
    evacuations: &'a [Operation],
    /// Nodes with a fencing agent on which guests ran.
    worth: &'a [HostName],
    /// Fences of the last hour.
    fenced: &'a Fenced,
}

/// What is to be done about a silent node.
#[derive(Debug, PartialEq)]
enum Act {
    /// It is evacuated now.
    Evacuate,
    /// Its agent is lost, and these are the reasons.
    Lost(Vec<CheckFailure>),
    /// It is down, and nothing is done about it, or not yet.
    Nothing,
}

fn decide(found: &Found, seen: &Seen<'_>, settings: AutoEvacuate) -> Act {
    let host = &found.node.report.host;
    // That there is no fencing agent says nothing of life.
    let doubts = found
        .failures
        .iter()
        .filter(|f| f.code != CheckCode::NotFenced);
    let doubts: Vec<_> = doubts.cloned().collect();
    if !doubts.is_empty() {
        return Act::Lost(doubts);
    }
    if !seen.worth.contains(host) || tried(found, seen.evacuations) {
        return Act::Nothing;
    }
    if !found.node.enabled {
        return Act::Lost(vec![closed(&found.node)]);
    }
    let agreed = found
        .agreed_ms
        .is_some_and(|ms| ms >= settings.agreed_for_ms());
    let down_ms = found.evidence.silent_ms.min(found.evidence.listening_ms);
    let wanted_ms = found
        .evidence
        .down_after_ms
        .saturating_add(settings.delay_ms);
    if !agreed || down_ms < wanted_ms {
        return Act::Nothing;
    }
    match seen.fenced.refusal(host, settings.limits) {
        Some(refusal) => Act::Lost(vec![not_claimed(host, &refusal)]),
        None => Act::Evacuate,
    }
}

/// Once for each time that it went down: what failed is looked at by people. An
/// attempt that ended before anything was done, as it was not dead after all, does
/// not count.
fn tried(found: &Found, evacuations: &[Operation]) -> bool {
    use CheckCode as C;
    let doubt = |f: &CheckFailure| {
        let doubts = [
            C::HostAlive,
            C::NoEvidence,
            C::TooManyLost,
            C::FenceLimit,
            C::HostUp,
        ];
        doubts.contains(&f.code)
    };
    evacuations.iter().any(|o| {
        let same = o.task.host() == Some(&found.node.report.host);
        let was_cut = o.evidence.as_ref().is_some_and(|e| e.cut_at_ms.is_some());
        let came_to_nothing = o.status == OperationStatus::Failed
            && !was_cut
            && !o.refusals.is_empty()
            && o.refusals.iter().all(doubt);
        let known = o.evidence.as_ref().and_then(|e| e.life);
        let since = match (known, found.evidence.life) {
            (Some(known), Some(life)) => known >= life,
            _ => o.created_at_ms >= found.node.heard_at_ms,
        };
        let since = since || !o.status.is_final();
        same && since && !came_to_nothing
    })
}

fn closed(node: &NodeRow) -> CheckFailure {
    let host = &node.report.host;
    let why = node.disabled_reason.as_deref().unwrap_or("no reason given");
    CheckFailure {
        code: CheckCode::HostDisabled,
        side: Side::Source,
        message: format!(
            "{host} is closed ({why}): somebody may be at work on it, and its power is not cut without being asked"
        ),
        remedy: format!("if it is dead, 'drover node evacuate {host}'"),
    }
}

/// Looks until told to stop.
pub async fn watch(operations: OperationRunner, stop: CancellationToken) {
    let mut watch = Watch {
        operations,
        suspects: BTreeMap::new(),
    };
    while goes_on_after(LOOK, &stop).await {
        if let Err(error) = watch.look().await {
            warn!(%error, "silent nodes could not be looked at; tried again soon");
        }
    }
}

struct Watch {
    operations: OperationRunner,
    suspects: BTreeMap<HostName, Suspect>,
}

impl Watch {
    fn context(&self) -> &Context {
        &self.operations.context
    }

    async fn look(&mut self) -> Result<(), StoreError> {
        let live = self.context().liveness();
        let nodes = self.context().store.nodes().await?;
        let is_silent = |n: &NodeRow| live.silent_ms(n) > live.down_after_ms;
        self.forget(|host| nodes.iter().any(|n| n.report.host == *host && is_silent(n)))
            .await?;
        // To a conductor that was away every node seems silent.
        if self.context().store.hearing().listened_ms() <= live.down_after_ms {
            self.suspects.clear();
            return Ok(());
        }
        let due = |n: &NodeRow| {
            let pause = if live.silent_ms(n) > LONG_MS {
                SELDOM
            } else {
                LOOK
            };
            let last = self.suspects.get(&n.report.host);
            last.is_none_or(|last| last.looked.elapsed() >= pause)
        };
        let silent: Vec<_> = nodes
            .into_iter()
            .filter(|n| is_silent(n) && due(n))
            .collect();
        if silent.is_empty() {
            return Ok(());
        }
        let found = self.examine(silent).await?;
        self.act(found).await
    }

    /// Nodes that are heard of again, or are no more.
    async fn forget(&mut self, is_silent: impl Fn(&HostName) -> bool) -> Result<(), StoreError> {
        self.suspects.retain(|host, _| is_silent(host));
        let store = &self.context().store;
        for host in store.agents_lost().await? {
            if !is_silent(&host) && store.clear_agent_lost(&host).await? {
                info!(%host, "it is heard of again");
            }
        }
        Ok(())
    }

    async fn examine(&mut self, silent: Vec<NodeRow>) -> Result<Vec<Found>, StoreError> {
        let context = self.context().clone();
        let asking: Vec<_> = silent
            .into_iter()
            .map(|node| examine(&context, node).boxed())
            .collect();
        let answers: Vec<_> = stream::iter(asking).buffered(AT_ONCE).collect().await;
        let mut all = Vec::new();
        for answer in answers {
            let (node, evidence, failures) = answer?;
            let now = Instant::now();
            let host = node.report.host.clone();
            let last = self.suspects.get(&host);
            let since = last.and_then(|s| s.agreed_since).unwrap_or(now);
            let agreed_since = failures.is_empty().then_some(since);
            let suspect = Suspect {
                looked: now,
                agreed_since,
            };
            self.suspects.insert(host, suspect);
            let passed =
                |since: Instant| u64::try_from((now - since).as_millis()).unwrap_or(u64::MAX);
            all.push(Found {
                node,
                evidence,
                failures,
                agreed_ms: agreed_since.map(passed),
            });
        }
        Ok(all)
    }

    async fn act(&self, found: Vec<Found>) -> Result<(), StoreError> {
        let context = self.context();
        let store = &context.store;
        let settings = context.auto_evacuate;
        let is_on = settings.is_on && store.is_switched_on(SWITCH).await?;
        let worth = if is_on {
            self.worth(&found).await?
        } else {
            Vec::new()
        };
        let evacuations = store
            .operations(&ListOperations {
                kind: Some("evacuate".to_owned()),
                limit: Some(MOST_OPERATIONS),
                ..ListOperations::default()
            })
            .await?;
        let fenced = store.fenced(context.clock.now_ms()).await?;
        let seen = Seen {
            evacuations: &evacuations,
            worth: &worth,
            fenced: &fenced,
        };
        let under_way = evacuations.iter().filter(|o| !o.status.is_final()).count();
        let mut free = settings.max_nodes.saturating_sub(under_way);
        for one in found {
            let host = &one.node.report.host;
            match decide(&one, &seen, settings) {
                Act::Lost(reasons) => self.lost(&one, reasons).await?,
                act => {
                    if store.clear_agent_lost(host).await? {
                        warn!(%host, "everything agrees now that it is dead");
                    }
                    if act == Act::Evacuate && free > 0 {
                        free -= 1;
                        self.evacuate(host).await?;
                    }
                }
            }
        }
        Ok(())
    }

    async fn worth(&self, found: &[Found]) -> Result<Vec<HostName>, StoreError> {
        let context = self.context();
        let mut worth = Vec::new();
        for host in found.iter().map(|f| &f.node.report.host) {
            let guests = context.store.instances(Some(host), None).await?;
            // One that another node has too, running, is no reason: that may be the same
            // machine under another name.
            let runs_there = |g: &InstanceRow| g.power_state.is_active() && g.other.is_none();
            if context.fences.has(host) && guests.iter().any(runs_there) {
                worth.push(host.clone());
            }
        }
        Ok(worth)
    }

    /// Says so, loudly if it is news. What an operator declared down is known.
    async fn lost(&self, found: &Found, reasons: Vec<CheckFailure>) -> Result<(), StoreError> {
        if found.node.forced_down {
            return Ok(());
        }
        let host = &found.node.report.host;
        let lost = AgentLost {
            since_ms: found.evidence.at_ms,
            reasons,
            evidence: found.evidence.clone(),
        };
        let payload = json!({
            "host": host,
            "reasons": lost.reasons.clone(),
            "evidence": lost.evidence.clone(),
        });
        let told = Notification::new("node.agent_lost", "ERROR", payload);
        let store = &self.context().store;
        if store.set_agent_lost(host, &lost, &told).await? {
            let reasons = drover_model::check::texts(&lost.reasons);
            error!(
                %host, reasons, evidence = ?lost.evidence,
                "its agent is lost: its power is not cut, its guests stay, and it waits for people"
            );
        }
        Ok(())
    }

    async fn evacuate(&self, host: &HostName) -> Result<(), StoreError> {
        warn!(%host, "everything agrees that it is dead: it is evacuated without being asked");
        let requester = Requester {
            user_id: Some("conductor".to_owned()),
            ..Requester::default()
        };
        let task = Task::Evacuate(unasked(host));
        if let Answer::Refused(failures) = self.operations.begin(task, requester, None).await? {
            warn!(?failures, "it was refused");
        }
        Ok(())
    }
}

fn unasked(host: &HostName) -> EvacuateOptions {
    EvacuateOptions {
        automatic: true,
        ..EvacuateOptions::new(host.clone())
    }
}

async fn examine(
    context: &Context,
    node: NodeRow,
) -> Result<(NodeRow, Evidence, Vec<CheckFailure>), StoreError> {
    let options = unasked(&node.report.host);
    let (evidence, failures) =
        evacuation::inspect(context, &options, &Requester::default()).await?;
    Ok((node, evidence, failures))
}

#[cfg(test)]
#[path = "auto_evacuate_tests.rs"]
mod tests;
