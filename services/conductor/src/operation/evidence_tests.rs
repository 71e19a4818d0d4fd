//! What is judged of a node that may be dead, as tables: what is known, and what
//! it comes to. [`oracle`] says the same by rules of its own, for every
//! combination there is.

use drover_model::{
    ids::HostName,
    migration::Requester,
    operation::{Control, Reach},
};

use super::*;
use crate::tests_support::node_row;

#[path = "evidence_oracle_tests.rs"]
mod oracle;

fn options(confirmed_off: bool, despite_many_lost: bool) -> EvacuateOptions {
    EvacuateOptions {
        confirmed_off,
        despite_many_lost,
        ..EvacuateOptions::new("kvm1".parse().unwrap())
    }
}

fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

/// A witness that reaches a third node, and not the one in question.
fn unreached(from: &str) -> Reach {
    Reach {
        from: host(from),
        libvirt: Err("timed out".into()),
        answered: true,
        refused: false,
        controls: vec![Control {
            host: host("kvm9"),
            reached: Ok(()),
        }],
        at_ms: 1000,
    }
}

/// A node that is silent and unreached, without a fence.
fn silent() -> Evidence {
    Evidence {
        at_ms: 1000,
        conductor: "ctl".into(),
        listening_ms: 600_000,
        endpoint: None,
        agent_started_ms: 1,
        heard_at_ms: 1,
        life: None,
        silent_ms: 60_000,
        down_after_ms: 30_000,
        forced_down: false,
        queue_consumers: Ok(0),
        reach: vec![unreached("kvm2"), unreached("kvm3")],
        agent: Some(Err("no answer".into())),
        fence: FenceAnswer::NotConfigured,
        cut_at_ms: None,
        confirmed_by: None,
        nodes_expected: 3,
        nodes_silent: 1,
    }
}

fn off() -> FenceAnswer {
    FenceAnswer::Off {
        agent: "fence_test".into(),
        at_ms: 2000,
    }
}

fn on() -> FenceAnswer {
    FenceAnswer::On {
        agent: "fence_test".into(),
    }
}

fn failed() -> FenceAnswer {
    FenceAnswer::Failed {
        agent: "fence_test".into(),
        message: "exit code 1".into(),
    }
}

fn with(change: impl FnOnce(&mut Evidence)) -> Evidence {
    let mut evidence = silent();
    change(&mut evidence);
    evidence
}

fn codes(failures: &[CheckFailure]) -> Vec<CheckCode> {
    failures.iter().map(|f| f.code).collect()
}

fn despite(signs: &[LifeSign]) -> EvacuateOptions {
    EvacuateOptions {
        despite: signs.to_vec(),
        ..options(false, false)
    }
}

#[test]
fn what_forbids_it_before_anything_is_done() {
    use CheckCode as C;
    let many = |silent, expected| {
        with(|e| {
            e.fence = on();
            (e.nodes_silent, e.nodes_expected) = (silent, expected);
        })
    };
    let heard = |forced_down| {
        with(|e| {
            e.fence = on();
            e.silent_ms = 30_000;
            e.forced_down = forced_down;
        })
    };
    let reached = || with(|e| e.reach[1].libvirt = Ok(()));
    let plain = options(false, false);
    let sure = options(true, false);
    let table: Vec<(&str, EvacuateOptions, Evidence, Vec<C>)> = vec![
        (
            "silence alone is no proof",
            plain.clone(),
            silent(),
            vec![C::NotFenced],
        ),
        ("an operator answers for it", sure.clone(), silent(), vec![]),
        (
            "a fence will decide",
            plain.clone(),
            with(|e| e.fence = on()),
            vec![],
        ),
        (
            "one that tells no status as well",
            plain.clone(),
            with(|e| e.fence = failed()),
            vec![],
        ),
        ("not down", plain.clone(), heard(false), vec![C::HostUp]),
        (
            "not down, whatever the operator says",
            sure.clone(),
            heard(false),
            vec![C::HostUp],
        ),
        ("declared down", plain.clone(), heard(true), vec![]),
        ("one of two", plain.clone(), many(1, 2), vec![]),
        ("two of four", plain.clone(), many(2, 4), vec![]),
        (
            "two of three",
            plain.clone(),
            many(2, 3),
            vec![C::TooManyLost],
        ),
        (
            "two of two",
            plain.clone(),
            many(2, 2),
            vec![C::TooManyLost],
        ),
        (
            "the operator is sure and wrong",
            sure.clone(),
            reached(),
            vec![C::HostAlive],
        ),
        (
            "a reached one without a fence",
            plain.clone(),
            reached(),
            vec![C::NotFenced],
        ),
        (
            "a fence does not put off what is reached",
            plain.clone(),
            with(|e| {
                e.fence = on();
                e.reach[0].libvirt = Ok(());
            }),
            vec![C::HostAlive],
        ),
        (
            "unless that is overruled by its name",
            despite(&[LifeSign::LibvirtReachable]),
            with(|e| {
                e.fence = on();
                e.reach[0].libvirt = Ok(());
            }),
            vec![],
        ),
        (
            "every sign has its own",
            despite(&[LifeSign::LibvirtReachable]),
            with(|e| {
                e.fence = on();
                e.reach[0].libvirt = Ok(());
                e.reach[1].refused = true;
                e.agent = Some(Ok(()));
            }),
            vec![C::HostAlive, C::HostAlive],
        ),
        (
            "and only what is there is overruled",
            despite(&[LifeSign::AgentAnswers]),
            with(|e| e.fence = on()),
            vec![C::Options],
        ),
        (
            "after the power was cut it has gone",
            despite(&[LifeSign::AgentAnswers]),
            with(|e| {
                e.fence = off();
                e.cut_at_ms = Some(2000);
            }),
            vec![],
        ),
        (
            "nobody overrules life where nothing can end it",
            EvacuateOptions {
                confirmed_off: true,
                ..despite(&[LifeSign::LibvirtReachable])
            },
            reached(),
            vec![C::HostAlive],
        ),
        (
            "its agent answers",
            sure.clone(),
            with(|e| e.agent = Some(Ok(()))),
            vec![C::HostAlive],
        ),
        (
            "a broker keeps consumers for a while",
            sure.clone(),
            with(|e| e.queue_consumers = Ok(1)),
            vec![],
        ),
    ];
    for (what, options, evidence, expected) in table {
        assert_eq!(codes(&judge(&options, &evidence)), expected, "{what}");
    }
    assert_eq!(judge(&options(false, true), &many(3, 3)), []);
}

#[test]
fn unattended_everything_has_to_agree() {
    use CheckCode as C;
    let dead = |change: fn(&mut Evidence)| {
        with(|e| {
            e.fence = on();
            change(e);
        })
    };
    let lonely = |e: &mut Evidence| e.reach.iter_mut().for_each(|r| r.controls.clear());
    let table: Vec<(&str, Evidence, Vec<C>)> = vec![
        ("everything agrees", dead(|_| {}), vec![]),
        ("it has no power", dead(|e| e.fence = off()), vec![]),
        ("no fence", silent(), vec![C::NotFenced]),
        (
            "its agent answers",
            dead(|e| e.agent = Some(Ok(()))),
            vec![C::HostAlive],
        ),
        (
            "its agent was not asked",
            dead(|e| e.agent = None),
            vec![C::NoEvidence],
        ),
        (
            "one witness reaches it",
            dead(|e| e.reach[1].libvirt = Ok(())),
            vec![C::HostAlive],
        ),
        (
            "even one whose silence would not count",
            dead(|e| {
                e.reach[1].libvirt = Ok(());
                e.reach[1].controls.clear();
            }),
            vec![C::HostAlive],
        ),
        (
            "the machine refuses",
            dead(|e| e.reach[0].refused = true),
            vec![C::HostAlive],
        ),
        (
            "nobody could be asked",
            dead(|e| e.reach.clear()),
            vec![C::NoEvidence],
        ),
        (
            "nobody answered",
            dead(|e| e.reach.iter_mut().for_each(|r| r.answered = false)),
            vec![C::NoEvidence],
        ),
        (
            "those who answer reach nobody",
            dead(lonely),
            vec![C::NoEvidence],
        ),
        (
            "one of them suffices",
            dead(|e| e.reach[0].controls.clear()),
            vec![],
        ),
        (
            "the conductor has just started",
            dead(|e| e.listening_ms = e.down_after_ms),
            vec![C::NoEvidence],
        ),
        (
            "it was heard of",
            dead(|e| e.silent_ms = 30_000),
            vec![C::HostUp],
        ),
        (
            "though it is declared down",
            dead(|e| {
                e.silent_ms = 30_000;
                e.forced_down = true;
            }),
            vec![C::HostUp],
        ),
        (
            "many are lost",
            dead(|e| e.nodes_silent = 2),
            vec![C::TooManyLost],
        ),
        (
            "a dead one's consumers are kept for a while",
            dead(|e| e.queue_consumers = Ok(1)),
            vec![],
        ),
    ];
    let sure = EvacuateOptions {
        automatic: true,
        despite: LifeSign::ALL.to_vec(),
        ..options(true, true)
    };
    let plain = EvacuateOptions {
        automatic: true,
        ..options(false, false)
    };
    for (what, evidence, expected) in table {
        assert_eq!(codes(&judge(&plain, &evidence)), expected, "{what}");
        let overruled = codes(&judge(&sure, &evidence));
        assert_eq!(overruled, expected, "nobody is there to overrule: {what}");
    }
}

#[test]
fn what_the_answers_come_to() {
    use CheckCode as C;
    let fenced = |fence| with(|e| e.fence = fence);
    let by_fence = Ok("fence");
    let by_operator = Ok("operator");
    let refused = |code: C| Err(vec![code]);
    let table = [
        ("the fence says off", false, fenced(off()), by_fence.clone()),
        (
            "that counts for more than the operator",
            true,
            fenced(off()),
            by_fence,
        ),
        (
            "the fence failed",
            false,
            fenced(failed()),
            refused(C::NotFenced),
        ),
        (
            "the operator answers instead",
            true,
            fenced(failed()),
            by_operator.clone(),
        ),
        (
            "it could not be put off",
            false,
            fenced(on()),
            refused(C::NotFenced),
        ),
        (
            "the operator is contradicted",
            true,
            fenced(on()),
            refused(C::HostAlive),
        ),
        (
            "nobody says anything",
            false,
            silent(),
            refused(C::NotFenced),
        ),
        ("the operator alone", true, silent(), by_operator),
        (
            "a fence for the wrong machine",
            false,
            with(|e| {
                e.fence = off();
                e.reach[0].libvirt = Ok(());
            }),
            refused(C::HostAlive),
        ),
        (
            "the operator is wrong",
            true,
            with(|e| {
                e.fence = failed();
                e.agent = Some(Ok(()));
            }),
            refused(C::HostAlive),
        ),
    ];
    for (what, confirmed, mut evidence, expected) in table {
        evidence.confirmed_by = confirmed.then(|| Requester {
            user_id: Some("ann".into()),
            ..Requester::default()
        });
        let found = verdict(&options(confirmed, false), &evidence);
        let found = found.map(|proof| match proof {
            ProofOfDeath::Fence { agent, at_ms, .. } => {
                assert_eq!((agent.as_str(), at_ms), ("fence_test", 2000));
                "fence"
            }
            ProofOfDeath::Operator { user, at_ms, .. } => {
                assert_eq!((user.as_deref(), at_ms), (Some("ann"), 1000));
                "operator"
            }
        });
        assert_eq!(found.map_err(|f| codes(&f)), expected, "{what}");
    }
}

#[test]
fn nodes_that_should_be_up_are_counted() {
    let live = Liveness {
        down_after_ms: 30_000,
        now_ms: 100_000,
    };
    let host = host("kvm1");
    let mut nodes = vec![
        node_row("kvm1", 10_000),
        node_row("kvm2", 99_000),
        node_row("kvm3", 10_000),
    ];
    assert_eq!(count(&nodes, &host, live), (3, 2));
    nodes[2].enabled = false;
    assert_eq!(count(&nodes, &host, live), (2, 1), "one off for repair");
    nodes[2].enabled = true;
    nodes[2].forced_down = true;
    assert_eq!(count(&nodes, &host, live), (2, 1), "one known to be down");
    nodes[0].heard_at_ms = 99_999;
    nodes[0].forced_down = true;
    nodes[0].enabled = false;
    assert_eq!(
        count(&nodes, &host, live),
        (2, 1),
        "the node itself always counts"
    );
}
