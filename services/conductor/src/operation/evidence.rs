//! Whether a node is dead enough for its guests to start elsewhere (invariant
//! 1). Pure: judges what [`super::evacuation`] collected.
//!
//! Before the fencing agent is asked to cut the power, [`judge`] says what
//! forbids even that; afterwards [`verdict`] says what the agent's answer and
//! the operator's word come to. Silence alone proves nothing: a node that is
//! cut off runs its guests on.

use drover_model::{
    check::{CheckCode, CheckFailure, Side},
    ids::HostName,
    migration::ProofOfDeath,
    operation::{EvacuateOptions, Evidence, FenceAnswer},
};
use drover_store::nodes::NodeRow;

use crate::checks::Liveness;

/// How many nodes should be up, and how many of them are silent: those that are
/// open and that nobody declared down, and the node itself. One that is closed
/// may be off for repair and says nothing about the conductor's own link.
pub fn count(nodes: &[NodeRow], host: &HostName, live: Liveness) -> (u32, u32) {
    let counts = |n: &&NodeRow| n.report.host == *host || (n.enabled && !n.forced_down);
    let silent = |n: &&NodeRow| {
        let age_ms = live.silent_ms(n);
        // Declared down, it counts as lost although it was just heard of.
        age_ms > live.down_after_ms || n.report.host == *host
    };
    let expected = nodes.iter().filter(counts);
    let lost = expected.clone().filter(silent);
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    (number(expected.count()), number(lost.count()))
}

/// What forbids an evacuation before anything is done to the node.
pub fn judge(options: &EvacuateOptions, evidence: &Evidence) -> Vec<CheckFailure> {
    let mut failures = Vec::new();
    failures.extend(up(options, evidence));
    failures.extend(many_lost(options, evidence));
    // Where there is an agent, its answer decides, and can put a node off that
    // is on.
    if evidence.fence == FenceAnswer::NotConfigured {
        match options.confirmed_off {
            true => failures.extend(alive(&options.host, evidence)),
            false => failures.push(no_fence(&options.host)),
        }
    }
    failures
}

/// What the fencing agent's answer to *off*, and the operator's word, come to.
///
/// # Errors
/// Nothing proves that the node is off.
pub fn verdict(
    options: &EvacuateOptions,
    evidence: &Evidence,
) -> Result<ProofOfDeath, Vec<CheckFailure>> {
    let host = &options.host;
    if let FenceAnswer::Off { agent, at_ms } = &evidence.fence {
        // An agent that cut another machine's power says *off* as well.
        return match alive(host, evidence) {
            Some(failure) => Err(vec![failure]),
            None => Ok(ProofOfDeath::Fence {
                agent: agent.clone(),
                at_ms: *at_ms,
            }),
        };
    }
    let failure = match (&evidence.fence, options.confirmed_off) {
        (_, true) => alive(host, evidence),
        (FenceAnswer::NotConfigured, false) => Some(no_fence(host)),
        (fence, false) => Some(not_off(host, fence)),
    };
    match failure {
        Some(failure) => Err(vec![failure]),
        None => Ok(ProofOfDeath::Operator {
            user: evidence
                .confirmed_by
                .as_ref()
                .and_then(|who| who.user_id.clone()),
            at_ms: evidence.at_ms,
        }),
    }
}

fn fail(code: CheckCode, message: String, remedy: String) -> CheckFailure {
    CheckFailure {
        code,
        side: Side::Source,
        message,
        remedy,
    }
}

fn up(options: &EvacuateOptions, evidence: &Evidence) -> Option<CheckFailure> {
    let host = &options.host;
    let is_up = evidence.silent_ms <= evidence.down_after_ms && !evidence.forced_down;
    is_up.then(|| {
        fail(
            CheckCode::HostUp,
            format!(
                "{host} is not down: it was heard of {} s ago",
                evidence.silent_ms / 1000
            ),
            format!(
                "empty it with 'drover node drain {host}'; if it is dead all the same, 'drover node force-down {host}' first"
            ),
        )
    })
}

/// Whether so many of the nodes that should be up are silent that the conductor
/// may be the one that is cut off: more than half, and not one alone.
pub fn too_many(silent: u32, expected: u32) -> bool {
    silent > 1 && u64::from(silent) * 2 > u64::from(expected)
}

fn many_lost(options: &EvacuateOptions, evidence: &Evidence) -> Option<CheckFailure> {
    let (silent, expected) = (evidence.nodes_silent, evidence.nodes_expected);
    let many = too_many(silent, expected);
    (many && !options.despite_many_lost).then(|| {
        fail(
            CheckCode::TooManyLost,
            format!("{silent} of {expected} nodes are silent: it is probably this conductor that is cut off"),
            "look at the network and the broker; if the nodes are really lost, say so with --despite-many-lost".to_owned(),
        )
    })
}

fn no_fence(host: &HostName) -> CheckFailure {
    fail(
        CheckCode::NotFenced,
        format!(
            "nothing proves that {host} is off: it has no fencing agent, and silence is no proof"
        ),
        format!(
            "set [fence.{host}] in the conductor's configuration; or switch it off yourself, and say --i-confirm-host-is-off"
        ),
    )
}

fn not_off(host: &HostName, fence: &FenceAnswer) -> CheckFailure {
    let said = match fence {
        FenceAnswer::On { agent } => format!("{agent} says that it is on"),
        FenceAnswer::Failed { agent, message } => format!("{agent} failed: {message}"),
        FenceAnswer::Off { .. } | FenceAnswer::NotConfigured => "nobody says so".to_owned(),
    };
    fail(
        CheckCode::NotFenced,
        format!("{host} is not known to be off: {said}"),
        format!(
            "see what is wrong with [fence.{host}]; or switch it off yourself, and say --i-confirm-host-is-off"
        ),
    )
}

/// What shows that a node runs, whatever was said of it. Consumers of its queue
/// do not: a broker keeps those of a dead node for a while.
fn alive(host: &HostName, evidence: &Evidence) -> Option<CheckFailure> {
    let reached = evidence.reach.iter().find(|r| r.libvirt.is_ok());
    let sign = match (&evidence.fence, &evidence.agent, reached) {
        (FenceAnswer::On { agent }, ..) => format!("{agent} says that it has power"),
        (_, Some(Ok(())), _) => "its agent answers".to_owned(),
        (.., Some(reach)) => format!("{} reaches its libvirtd", reach.from),
        _ => return None,
    };
    Some(fail(
        CheckCode::HostAlive,
        format!("{host} is not off: {sign}"),
        format!(
            "switch off the right machine, and see that [fence.{host}], if there is one, is about it"
        ),
    ))
}

#[cfg(test)]
#[path = "evidence_tests.rs"]
mod tests;
