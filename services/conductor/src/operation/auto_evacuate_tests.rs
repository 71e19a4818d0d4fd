//! What is done about silent nodes without being asked.

use drover_model::{ids::OperationId, operation::FenceAnswer};

use super::*;
use crate::tests_support::node_row;

const SETTINGS: AutoEvacuate = AutoEvacuate {
    is_on: true,
    delay_ms: 120_000,
    max_nodes: 1,
    limits: FenceLimits { cloud: 2, node: 2 },
};

fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

fn failure(code: CheckCode) -> CheckFailure {
    CheckFailure {
        code,
        side: Side::Source,
        message: String::new(),
        remedy: String::new(),
    }
}

fn evidence(silent_ms: u64) -> Evidence {
    Evidence {
        at_ms: 1_000_000,
        conductor: "ctl".into(),
        listening_ms: 3_600_000,
        endpoint: None,
        agent_started_ms: 1,
        heard_at_ms: 1_000_000 - silent_ms,
        life: None,
        silent_ms,
        down_after_ms: 30_000,
        forced_down: false,
        queue_consumers: Ok(0),
        reach: Vec::new(),
        agent: None,
        fence: FenceAnswer::NotConfigured,
        cut_at_ms: None,
        confirmed_by: None,
        nodes_expected: 3,
        nodes_silent: 1,
    }
}

/// kvm1, dead for so long, everything agreeing for as long as it may.
fn dead(silent_ms: u64) -> Found {
    Found {
        node: node_row("kvm1", 1_000_000 - silent_ms),
        evidence: evidence(silent_ms),
        failures: Vec::new(),
        agreed_ms: Some(silent_ms.saturating_sub(30_000)),
    }
}

fn evacuation(created_at_ms: u64, status: OperationStatus) -> Operation {
    serde_json::from_value(serde_json::json!({
        "id": 1, "uuid": OperationId::generate(), "kind": "evacuate",
        "options": {"host": "kvm1"}, "status": status, "cancel_requested": false,
        "items": [], "nodes": [], "expected_ms": 0, "decisions": [], "owner": "ctl",
        "attempt": 1, "requester": {}, "created_at_ms": created_at_ms,
        "updated_at_ms": created_at_ms, "finished_at_ms": null, "version": 1,
    }))
    .unwrap()
}

fn refused(code: CheckCode) -> Operation {
    Operation {
        refusals: vec![failure(code)],
        ..evacuation(900_000, OperationStatus::Failed)
    }
}

fn decided(found: &Found, evacuations: &[Operation], worth: &[&str]) -> Act {
    let worth: Vec<_> = worth.iter().map(|name| host(name)).collect();
    let seen = Seen {
        evacuations,
        worth: &worth,
        fenced: &Fenced::default(),
    };
    decide(found, &seen, SETTINGS)
}

#[test]
fn only_a_node_that_is_dead_for_long_is_evacuated_and_once() {
    use OperationStatus as S;
    let all = ["kvm1", "kvm2"];
    let one = dead(150_000);
    assert_eq!(decided(&one, &[], &all), Act::Evacuate);
    assert_eq!(
        decided(&dead(149_999), &[], &all),
        Act::Nothing,
        "too early"
    );
    assert_eq!(
        decided(&one, &[], &["kvm2"]),
        Act::Nothing,
        "no fence, or no guest"
    );
    let before = evacuation(800_000, S::Incomplete);
    assert_eq!(
        decided(&one, &[before], &all),
        Act::Evacuate,
        "of another time"
    );
    let after = evacuation(900_000, S::Failed);
    assert_eq!(
        decided(&one, &[after], &all),
        Act::Nothing,
        "once is enough"
    );
    let running = evacuation(800_000, S::Running);
    assert_eq!(decided(&one, &[running], &all), Act::Nothing);
}

#[test]
fn what_agrees_has_to_agree_for_a_while_and_to_be_heard_by_this_conductor() {
    let shortly = Found {
        agreed_ms: Some(59_999),
        ..dead(900_000)
    };
    assert_eq!(decided(&shortly, &[], &["kvm1"]), Act::Nothing);
    let mut new_here = dead(900_000);
    new_here.evidence.listening_ms = 149_999;
    assert_eq!(decided(&new_here, &[], &["kvm1"]), Act::Nothing);
    new_here.evidence.listening_ms = 150_000;
    assert_eq!(decided(&new_here, &[], &["kvm1"]), Act::Evacuate);
}

#[test]
fn what_may_live_is_lost_and_what_has_no_fence_is_only_down() {
    let doubt = Found {
        failures: vec![failure(CheckCode::HostAlive), failure(CheckCode::NotFenced)],
        agreed_ms: None,
        ..dead(900_000)
    };
    let lost = Act::Lost(vec![failure(CheckCode::HostAlive)]);
    assert_eq!(decided(&doubt, &[], &[]), lost);
    let without = Found {
        failures: vec![failure(CheckCode::NotFenced)],
        agreed_ms: None,
        ..dead(900_000)
    };
    assert_eq!(decided(&without, &[], &[]), Act::Nothing);
}

#[test]
fn a_closed_node_waits_for_people() {
    let mut closed = dead(900_000);
    closed.node.enabled = false;
    let Act::Lost(reasons) = decided(&closed, &[], &["kvm1"]) else {
        panic!("it is not left alone");
    };
    assert_eq!(reasons[0].code, CheckCode::HostDisabled);
    assert_eq!(
        decided(&closed, &[], &[]),
        Act::Nothing,
        "nothing would be done"
    );
}

#[test]
fn an_attempt_that_found_life_before_anything_was_done_does_not_count() {
    let worth = ["kvm1"];
    let alive = refused(CheckCode::HostAlive);
    assert_eq!(
        decided(&dead(150_000), std::slice::from_ref(&alive), &worth),
        Act::Evacuate
    );
    let cut = Operation {
        evidence: Some(Evidence {
            cut_at_ms: Some(1),
            ..evidence(150_000)
        }),
        ..alive
    };
    assert_eq!(
        decided(&dead(150_000), &[cut], &worth),
        Act::Nothing,
        "of the wrong machine"
    );
    let fence = refused(CheckCode::NotFenced);
    assert_eq!(decided(&dead(150_000), &[fence], &worth), Act::Nothing);
}
