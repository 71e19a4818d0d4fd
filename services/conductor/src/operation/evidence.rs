//! Whether a node is dead enough for its guests to start elsewhere (invariant
//! 1), and whether its power may be cut for that (invariant 14). Pure: judges
//! what [`super::evacuation`] collected.
//!
//! Before the fencing agent is told to cut the power, [`judge`] says what
//! forbids even that; afterwards [`verdict`] says what the agent's answer and
//! the operator's word come to. Silence alone proves nothing: a node that is
//! cut off runs its guests on, and one whose agent has died is well.
//!
//! Unattended, everything that can be asked has to agree. An operator may
//! overrule what is seen, by naming it; nobody overrules a sign of life that is
//! there after the power was cut.

use drover_model::{
    check::{CheckCode, CheckFailure, Side},
    ids::HostName,
    migration::ProofOfDeath,
    operation::{EvacuateOptions, Evidence, FenceAnswer, LifeSign},
};
use drover_store::{fencing::FenceRefusal, nodes::NodeRow};

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
    match options.automatic {
        true => failures.extend(unattended(&options.host, evidence)),
        false => failures.extend(asked_for(options, evidence)),
    }
    failures
}

/// What is missing before a node's power may be cut without anybody having asked.
fn unattended(host: &HostName, evidence: &Evidence) -> Vec<CheckFailure> {
    let mut failures = Vec::new();
    let missing = |message: String| {
        fail(
            CheckCode::NoEvidence,
            message,
            format!("see what {host} does; if it is dead, 'drover node evacuate {host}'"),
        )
    };
    for (_, seen) in evidence.life_signs() {
        failures.push(fail(
            CheckCode::HostAlive,
            format!("{host} is not dead: {seen}"),
            format!("see what is wrong with drover-compute on {host}, and start it again"),
        ));
    }
    if !evidence.has_listened() {
        let (s, down_s) = (evidence.listening_ms / 1000, evidence.down_after_ms / 1000);
        failures.push(missing(format!(
            "this conductor has listened for {s} s without a break, and a silence counts from {down_s} s on"
        )));
    }
    if evidence.agent.is_none() {
        failures.push(missing(format!("the agent of {host} was not asked")));
    }
    if evidence.witnesses() == 0 {
        failures.push(missing(format!(
            "no other node can say that {host} is gone: one that answers and reaches a third is needed"
        )));
    }
    if evidence.fence == FenceAnswer::NotConfigured {
        failures.push(no_fence(host));
    }
    failures
}

/// What an operator has to say in addition.
fn asked_for(options: &EvacuateOptions, evidence: &Evidence) -> Vec<CheckFailure> {
    let host = &options.host;
    let mut failures = Vec::new();
    let signs = evidence.life_signs();
    // After the power was cut, what was overruled has gone, as it should.
    let absent = |sign: &&LifeSign| !signs.iter().any(|(seen, _)| seen == *sign);
    if evidence.cut_at_ms.is_none() {
        let absent = options.despite.iter().filter(absent);
        failures.extend(absent.map(|sign| not_seen(host, *sign)));
    }
    // Where there is an agent, it can put a node off that is on.
    if evidence.fence == FenceAnswer::NotConfigured {
        match options.confirmed_off {
            true => failures.extend(alive(host, evidence)),
            false => failures.push(no_fence(host)),
        }
        return failures;
    }
    failures.extend(nobody_answers(options, evidence));
    let told = signs
        .iter()
        .filter(|(sign, _)| !options.despite.contains(sign));
    failures.extend(told.map(|(sign, seen)| {
        fail(
            CheckCode::HostAlive,
            format!("{host} shows life: {seen}"),
            format!(
                "empty it with 'drover node drain {host}' once its agent runs; to cut its power all the same, and end its guests, add --despite {sign}"
            ),
        )
    }));
    failures
}

/// Before the power is cut: nodes that are up were asked, and none of them answered.
fn nobody_answers(options: &EvacuateOptions, evidence: &Evidence) -> Option<CheckFailure> {
    let host = &options.host;
    let is_off = evidence.fence.is_off() || evidence.cut_at_ms.is_some();
    let mute = !evidence.reach.is_empty() && evidence.reach.iter().all(|reach| !reach.answered);
    let unknown = mute && !is_off && !options.despite_many_lost;
    unknown.then(|| {
        let asked: Vec<_> = evidence.reach.iter().map(|r| r.from.as_str()).collect();
        fail(
            CheckCode::TooManyLost,
            format!(
                "whether {host} lives cannot be told: {} did not answer when asked to reach it",
                asked.join(", ")
            ),
            "look at the network and the broker, and ask again; to cut its power all the same, say \
             --despite-many-lost"
                .to_owned(),
        )
    })
}

fn not_seen(host: &HostName, sign: LifeSign) -> CheckFailure {
    CheckFailure {
        side: Side::Request,
        ..fail(
            CheckCode::Options,
            format!("{sign} is to be overruled, and is not seen of {host}"),
            format!(
                "look at the evidence with 'drover node evacuate {host} --dry-run', and name what is there"
            ),
        )
    }
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
                life: evidence.life,
            }),
        };
    }
    let confirmed = options.confirmed_off && !options.automatic;
    let failure = match (&evidence.fence, confirmed) {
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
            life: evidence.life,
        }),
    }
}

/// Why a node's power is not cut now although its evidence allows it.
pub fn not_claimed(host: &HostName, refusal: &FenceRefusal) -> CheckFailure {
    let people = format!("see why nodes die; if {host} is dead, 'drover node evacuate {host}'");
    match refusal {
        FenceRefusal::Cloud(n) => fail(
            CheckCode::FenceLimit,
            format!("{n} nodes were fenced within the last hour: no more are without being asked"),
            people,
        ),
        FenceRefusal::Node(n) => fail(
            CheckCode::FenceLimit,
            format!(
                "{host} was fenced {n} times within the last hour: not again without being asked"
            ),
            people,
        ),
        FenceRefusal::Heard => fail(
            CheckCode::HostAlive,
            format!("{host} was heard of while its power was about to be cut"),
            format!("see what it runs, with 'drover node show {host}'"),
        ),
        FenceRefusal::UnderWay { conductor, .. } => fail(
            CheckCode::HostBusy,
            format!("conductor {conductor} may be cutting the power of {host} just now"),
            "wait for it, and ask again".to_owned(),
        ),
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

/// Declared down by an operator, a node counts as down although it was just heard
/// of; not for what nobody asked for.
fn up(options: &EvacuateOptions, evidence: &Evidence) -> Option<CheckFailure> {
    let host = &options.host;
    let declared = evidence.forced_down && !options.automatic;
    let is_up = evidence.silent_ms <= evidence.down_after_ms && !declared;
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
    let overruled = options.despite_many_lost && !options.automatic;
    (many && !overruled).then(|| {
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

/// What shows that a node runs, whatever was said of it.
fn alive(host: &HostName, evidence: &Evidence) -> Option<CheckFailure> {
    let sign = match &evidence.fence {
        FenceAnswer::On { agent } => format!("{agent} says that it has power"),
        _ => evidence.life_signs().into_iter().next()?.1,
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
