//! Operations on nodes: asked for, followed, called off.

use drover_model::{
    api::conductor::{OperationAnswer, OperationView},
    migration::Phase,
    operation::{ItemState, OperationPlan, OperationStatus},
};

use super::*;

const DRAIN: &str = "node drain kvm1 --reason disks";

fn begun(operation: Operation) -> Act {
    let operation = Box::new(operation);
    answer(&OperationAnswer::Accepted { operation })
}

fn first_step() -> Operation {
    samples::planning(&samples::emptying())
}

fn planned(failures: Vec<CheckFailure>) -> OperationAnswer {
    OperationAnswer::Plan {
        plan: Box::new(samples::operation_plan()),
        failures,
        evidence: None,
    }
}

fn end(status: OperationStatus) -> OperationView {
    samples::view(samples::ended(samples::drain(), status))
}

/// A drain that is accepted and then ends so.
async fn draining(last: OperationView) -> Stage {
    Stage::with([
        ("drain_node", begun(first_step())),
        ("wait_operation", answer(&samples::drain_view())),
        ("wait_operation", answer(&last)),
    ])
    .await
}

#[tokio::test(start_paused = true)]
async fn a_drain_is_followed_to_its_end_guest_by_guest() {
    let stage = draining(samples::view(samples::drained())).await;
    let began = Instant::now();
    assert_eq!(stage.run(DRAIN).await, Exit::Done);
    assert!(
        began.elapsed() < Duration::from_millis(50),
        "{:?}",
        began.elapsed()
    );
    let expected = "\
draining kvm1: planning  0:00
draining kvm1: 1 of 4 moved, 1 moving, 1 waits, 1 stays, 1 failed  0:12
   0:12  vm1  moved to kvm2, downtime 212 ms
   0:12  vm2  kvm1 -> kvm2  memory (migration 7), 61 %, disk 0.6/1 GiB, memory 64/128 MiB, 90 MiB/s, dirty 4 MiB/s, ETA 1.5 s, expected downtime 120 ms of 300 ms allowed
   0:12  vm3  waits: kvm2 takes 1 guest at a time
   0:12  vm4  failed, on kvm1: QEMU on kvm3 died
   0:12  vm5  stays on kvm1: it has the host's device 0000:01:00.0
   0:21  vm2  moved to kvm3, downtime 14.3 s
kvm1 is drained: 2 guests moved in 21.5 s, longest downtime 14.3 s
to be confirmed, or taken back with `drover instance revert`:
  `drover instance confirm vm2`: kvm1 removes its copy
to bring them back: `drover node restore kvm1`
";
    assert_eq!(stage.tape.out(), expected, "\n{}", stage.tape.out());
    let request = &stage.asked("drain_node")[0];
    assert_eq!(
        (
            &request["host"],
            &request["mode"],
            &request["reason"],
            &request["dry_run"]
        ),
        (
            &json!("kvm1"),
            &json!("live"),
            &json!("disks"),
            &json!(false)
        )
    );
    let waited = &stage.asked("wait_operation")[0];
    assert_eq!(
        (
            &waited["operation"],
            &waited["seen_version"],
            &waited["timeout_ms"]
        ),
        (&json!(samples::OPERATION), &json!(1), &json!(1000))
    );
    assert_eq!(stage.tape.err(), "");
}

#[tokio::test(start_paused = true)]
async fn how_an_operation_ends_is_how_the_command_ends() {
    let mut refused = end(OperationStatus::Failed);
    refused.operation.failure = Some("kvm1 is not proven to be off".to_owned());
    refused.operation.refusals = vec![samples::device()];
    let mut failed = refused.clone();
    failed.operation.refusals.clear();
    let cases = [
        (
            end(OperationStatus::Incomplete),
            Exit::Failed,
            "kvm1 is not drained: 1 moved, 2 stay:",
        ),
        (
            end(OperationStatus::Cancelled),
            Exit::Failed,
            "the drain of kvm1 is cancelled",
        ),
        (refused, Exit::Refused, "host_device (instance): it has"),
        (
            failed,
            Exit::Failed,
            "the drain of kvm1 failed: kvm1 is not proven to be off",
        ),
    ];
    for (last, exit, told) in cases {
        let stage = draining(last).await;
        assert_eq!(stage.run(DRAIN).await, exit, "{told}");
        assert!(stage.tape.out().contains(told), "{}", stage.tape.out());
    }
}

#[tokio::test(start_paused = true)]
async fn a_planned_drain_changes_nothing_and_ends_as_the_real_one_would() {
    let stage = Stage::with([
        ("drain_node", answer(&planned(Vec::new()))),
        ("drain_node", answer(&planned(vec![samples::device()]))),
        ("drain_node", answer(&planned(Vec::new()))),
    ])
    .await;
    let line = format!("{DRAIN} --dry-run");
    assert_eq!(stage.run(&line).await, Exit::Done);
    let last = stage.last_line();
    assert_eq!(last, "the drain of kvm1 would be accepted");
    assert_eq!(stage.run(&line).await, Exit::Refused);
    assert!(
        stage
            .last_line()
            .ends_with("would be refused: 1 check failed")
    );
    let before = stage.tape.out().len();
    assert_eq!(stage.run(&format!("{line} --json")).await, Exit::Done);
    let told: OperationAnswer = serde_json::from_str(&stage.tape.out()[before..]).unwrap();
    assert_eq!(told, planned(Vec::new()));
    let asked = stage.asked("drain_node");
    assert!(asked.iter().all(|args| args["dry_run"] == true));
    assert!(stage.asked("wait_operation").is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_does_not_wait_is_told_the_number() {
    let stage = Stage::with([
        ("drain_node", begun(first_step())),
        ("restore_node", begun(first_step())),
        ("balance_nodes", begun(first_step())),
    ])
    .await;
    for line in [
        "node drain kvm1",
        "node restore kvm1 --none",
        "node balance",
    ] {
        assert_eq!(stage.run(&format!("{line} --no-wait")).await, Exit::Done);
    }
    assert_eq!(stage.tape.out(), "4\n4\n4\n");
    assert_eq!(stage.asked("restore_node")[0]["returning"], "none");
    assert!(stage.asked("wait_operation").is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_evacuation_names_instances_by_their_uuids() {
    let seen = json!({"evidence": samples::evidence(), "failures": []});
    let stage = Stage::with([
        ("get_instance", answer(&samples::instance("demo-1"))),
        ("get_evidence", Act::Answer(seen)),
        ("evacuate_node", begun(first_step())),
    ])
    .await;
    let line = "node evacuate kvm1 --only demo-1 --i-confirm-host-is-off --no-wait";
    assert_eq!(stage.run(line).await, Exit::Done);
    let request = &stage.asked("evacuate_node")[0];
    assert_eq!(request["only"], json!([samples::INSTANCE]));
    assert_eq!(request["confirmed_off"], true);
    let err = stage.tape.err();
    assert!(err.starts_with("evidence\n"), "it is shown first: {err}");
}

#[tokio::test(start_paused = true)]
async fn what_shows_life_is_told_and_nothing_is_asked_for() {
    let seen = json!({"evidence": samples::evidence(), "failures": samples::checks()});
    let stage = Stage::with([("get_evidence", Act::Answer(seen))]).await;
    let line = "node evacuate kvm1 --despite agent-answers";
    assert_eq!(stage.run(line).await, Exit::Refused);
    let err = stage.tape.err();
    assert!(err.contains("signs of life  libvirt-reachable\n"), "{err}");
    assert!(err.contains("what to do: free memory on kvm2\n"), "{err}");
    assert!(
        err.contains("kvm1 is not evacuated: nothing was done\n"),
        "{err}"
    );
    assert_eq!(
        stage.asked("get_evidence")[0]["despite"],
        json!(["agent-answers"])
    );
    assert!(stage.asked("evacuate_node").is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_refusal_names_what_was_asked_for() {
    let refusal = RemoteFailure::nova("MigrationPreCheckError", "x")
        .with_kwarg("checks", json!([samples::device()]));
    let unserved = RemoteFailure::builtin("KeyError", "an older conductor");
    let stage = Stage::with([
        ("get_evidence", Act::Fail(unserved)),
        ("evacuate_node", Act::Fail(refusal)),
    ])
    .await;
    assert_eq!(stage.run("node evacuate kvm1").await, Exit::Refused);
    let err = stage.tape.err();
    assert!(
        err.starts_with("drover: the evacuation is refused: 1 check failed\n"),
        "{err}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_is_told_as_uncertain_and_not_asked_again() {
    let stage = Stage::with([("drain_node", Act::Keep)]).await;
    assert_eq!(stage.run(DRAIN).await, Exit::TimedOut);
    let err = stage.tape.err();
    assert!(
        err.contains("the drain of kvm1 may or may not have begun"),
        "{err}"
    );
    assert!(
        err.contains("`drover operation list --active --host kvm1`"),
        "{err}"
    );
    assert_eq!(stage.asked("drain_node").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_interrupt_or_the_end_of_patience_calls_nothing_off() {
    let mut stage = Stage::with([("drain_node", begun(first_step()))]).await;
    stage.interrupt_after = Some(Duration::from_secs(2));
    assert_eq!(stage.run(DRAIN).await, Exit::Interrupted);
    let expected = "\
drover: interrupted: the drain of kvm1 goes on
  to watch it:    `drover operation watch 4`
  to call it off: `drover operation cancel 4`
";
    assert_eq!(stage.tape.err(), expected);
    assert!(stage.asked("cancel_operation").is_empty());

    let stage = Stage::with([("drain_node", begun(first_step()))]).await;
    assert_eq!(
        stage.run(&format!("{DRAIN} --timeout 3")).await,
        Exit::TimedOut
    );
    assert!(
        stage
            .tape
            .err()
            .contains("not over in time: the drain of kvm1 goes on")
    );
    assert!(stage.asked("cancel_operation").is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_conductor_that_is_away_for_a_while_ends_nothing() {
    let stage = Stage::with([
        ("drain_node", begun(first_step())),
        ("wait_operation", Act::Keep),
        ("wait_operation", answer(&samples::view(samples::drained()))),
    ])
    .await;
    assert_eq!(stage.run(DRAIN).await, Exit::Done);
    let err = stage.tape.err();
    assert_eq!(
        err.matches("the drain of kvm1 goes on without it").count(),
        1,
        "{err}"
    );

    let stage = Stage::with([("drain_node", begun(first_step()))]).await;
    assert_eq!(stage.run(DRAIN).await, Exit::TimedOut);
    assert!(
        stage.tape.err().contains("`drover operation watch 4`"),
        "{}",
        stage.tape.err()
    );
}

#[tokio::test(start_paused = true)]
async fn records_that_come_late_are_not_shown_and_none_is_asked_for_in_a_hurry() {
    let mut late = samples::drain_view();
    late.operation.version = 3;
    let stage = Stage::with([
        ("get_operation", answer(&samples::drain_view())),
        ("wait_operation", answer(&late)),
        ("wait_operation", answer(&samples::drain_view())),
        ("wait_operation", answer(&samples::view(samples::drained()))),
    ])
    .await;
    let began = Instant::now();
    assert_eq!(stage.run("operation watch 4").await, Exit::Done);
    assert!(
        began.elapsed() >= Duration::from_millis(1000),
        "it does not spin"
    );
    assert_eq!(stage.tape.out().matches("vm2  kvm1 -> kvm2").count(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_migration_that_goes_on_is_seen_though_its_operation_stands() {
    let mut switching = samples::drain_view();
    switching.migrations[0].version += 1;
    switching.migrations[0].progress.phase = Phase::SwitchOver;
    let views = [
        samples::drain_view(),
        switching,
        samples::view(samples::drained()),
    ];
    let waits = || {
        views[1..]
            .iter()
            .map(|view| ("wait_operation", answer(view)))
    };
    let first = || std::iter::once(("get_operation", answer(&views[0])));
    let stage = Stage::with(first().chain(waits())).await;
    assert_eq!(stage.run("operation watch 4").await, Exit::Done);
    assert!(
        stage.tape.out().contains("vm2  kvm1 -> kvm2  switch-over"),
        "{}",
        stage.tape.out()
    );

    let stage = Stage::with(first().chain(waits())).await;
    assert_eq!(stage.run("operation watch 4 --json").await, Exit::Done);
    let out = stage.tape.out();
    let told = out
        .lines()
        .map(|line| serde_json::from_str::<OperationView>(line).unwrap());
    assert_eq!(told.collect::<Vec<_>>(), views);
}

#[tokio::test(start_paused = true)]
async fn calling_off_is_done_when_nothing_moves_any_more() {
    let mut cancelling = samples::drain_view();
    cancelling.operation.status = OperationStatus::Cancelling;
    let cases = [
        (end(OperationStatus::Cancelled), Exit::Done),
        (samples::view(samples::drained()), Exit::Failed),
    ];
    for (last, exit) in cases {
        let stage = Stage::with([
            ("cancel_operation", answer(&cancelling)),
            ("wait_operation", answer(&last)),
        ])
        .await;
        assert_eq!(stage.run("operation cancel 4").await, exit);
        assert_eq!(stage.asked("cancel_operation"), [json!({"operation": "4"})]);
    }
    let stage = Stage::with([("cancel_operation", answer(&cancelling))]).await;
    assert_eq!(stage.run("operation cancel 4 --no-wait").await, Exit::Done);
    assert_eq!(stage.tape.out(), "4\n");
}

#[tokio::test(start_paused = true)]
async fn what_calling_off_would_do_is_told() {
    let stage = Stage::with([
        ("get_operation", answer(&samples::drain_view())),
        ("get_operation", answer(&samples::view(samples::drained()))),
    ])
    .await;
    let line = "operation cancel 4 --dry-run";
    assert_eq!(stage.run(line).await, Exit::Done);
    assert_eq!(
        stage.tape.out(),
        "the drain of kvm1 (running) would be called off: of its guests, 1 would not begin and 1 \
         would be called back; those that have moved stay where they are\n"
    );
    assert_eq!(stage.run(line).await, Exit::Refused);
    assert!(stage.tape.err().contains("the drain of kvm1 is completed"));
    assert!(stage.asked("cancel_operation").is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_operation_that_is_not_there_is_one_line_and_what_to_do() {
    let unknown = RemoteFailure::nova("OperationNotFound", "There is no operation 9.");
    let stage = Stage::with([("get_operation", Act::Fail(unknown))]).await;
    assert_eq!(stage.run("operation show 9").await, Exit::Failed);
    assert!(
        stage.tape.err().contains("`drover operation list`"),
        "{}",
        stage.tape.err()
    );
}

#[tokio::test(start_paused = true)]
async fn nodes_tell_whether_they_are_drained() {
    let mut closed = samples::node("kvm1");
    closed.enabled = false;
    let nodes = [closed.clone(), samples::node("kvm2")];
    let stage = Stage::with([
        ("list_nodes", answer(&nodes)),
        ("list_operations", answer(&[samples::drained()])),
        ("get_node", answer(&closed)),
        ("list_operations", answer(&[samples::drain()])),
        ("list_nodes", answer(&nodes)),
    ])
    .await;
    assert_eq!(stage.run("node list").await, Exit::Done);
    assert!(
        stage.tape.out().contains("disabled  drained (4)"),
        "{}",
        stage.tape.out()
    );
    assert_eq!(stage.run("node show kvm1").await, Exit::Done);
    assert!(
        stage.tape.out().contains("\noperation     draining (4)\n"),
        "{}",
        stage.tape.out()
    );
    let asked = stage.asked("list_operations");
    assert_eq!(
        (&asked[0]["active"], &asked[1]["host"]),
        (&json!(false), &json!("kvm1"))
    );
    assert_eq!(stage.run("node list --json").await, Exit::Done);
    assert_eq!(
        stage.asked("list_operations").len(),
        2,
        "JSON tells nodes alone"
    );
}

#[tokio::test(start_paused = true)]
async fn nodes_are_told_though_their_operations_are_not() {
    let refusal = RemoteFailure::builtin("KeyError", "x");
    let stage = Stage::with([
        ("list_nodes", answer(&[samples::node("kvm1")])),
        ("list_operations", Act::Fail(refusal)),
    ])
    .await;
    assert_eq!(stage.run("node list").await, Exit::Done);
    assert!(
        stage.tape.out().contains("\nkvm1  up     enabled"),
        "{}",
        stage.tape.out()
    );
}

#[tokio::test(start_paused = true)]
async fn a_node_is_declared_down_and_up_again() {
    let mut down = samples::node("kvm1");
    (down.forced_down, down.up) = (true, false);
    let stage = Stage::with([
        ("get_node", answer(&samples::node("kvm1"))),
        ("force_down_node", answer(&down)),
        ("force_down_node", answer(&samples::node("kvm1"))),
    ])
    .await;
    assert_eq!(
        stage.run("node force-down kvm1 --dry-run").await,
        Exit::Done
    );
    assert_eq!(
        stage.tape.out(),
        "kvm1 would be declared down; it is up now\n"
    );
    assert!(stage.asked("force_down_node").is_empty());
    assert_eq!(stage.run("node force-down kvm1").await, Exit::Done);
    assert!(stage.tape.out().contains("`drover node evacuate kvm1`"));
    assert_eq!(stage.run("node force-down kvm1 --unset").await, Exit::Done);
    assert_eq!(stage.last_line(), "kvm1 is up");
    let said = |forced_down| json!({"host": "kvm1", "forced_down": forced_down});
    assert_eq!(stage.asked("force_down_node"), [said(true), said(false)]);
}

#[tokio::test(start_paused = true)]
async fn a_scrapped_node_is_forgotten() {
    let node = samples::node("kvm1");
    let stage = Stage::with([
        ("get_node", answer(&node)),
        ("forget_node", answer(&())),
        ("get_node", answer(&node)),
        ("forget_node", answer(&())),
        ("get_node", answer(&node)),
        ("forget_node", answer(&())),
    ])
    .await;
    let told = stage.run("node forget kvm1 --dry-run").await;
    assert_eq!(
        (told, stage.last_line().as_str()),
        (Exit::Done, "kvm1 would be forgotten")
    );
    assert_eq!(stage.run("node forget kvm1").await, Exit::Done);
    assert_eq!(stage.last_line(), "kvm1 is forgotten");
    let said = |dry_run| json!({"host": "kvm1", "dry_run": dry_run});
    let despite = stage.run("node forget kvm1 --despite-lost-guests").await;
    assert_eq!(despite, Exit::Done);
    let overruled = json!({"host": "kvm1", "dry_run": false, "despite_lost_guests": true});
    assert_eq!(
        stage.asked("forget_node"),
        [said(true), said(false), overruled]
    );
}

#[tokio::test(start_paused = true)]
async fn a_lost_instance_is_forgotten() {
    let instance = samples::instance("vm1");
    let stage = Stage::with([
        ("get_instance", answer(&instance)),
        ("forget_instance", answer(&())),
        ("get_instance", answer(&instance)),
        ("forget_instance", answer(&())),
    ])
    .await;
    let mut said = Vec::new();
    for (line, told) in [
        ("instance forget vm1 --dry-run", "vm1 would be forgotten"),
        ("instance forget vm1", "vm1 is forgotten"),
    ] {
        assert_eq!(stage.run(line).await, Exit::Done);
        assert_eq!(stage.last_line(), told);
        said.push(json!({"instance": instance.uuid, "dry_run": line.ends_with("run")}));
    }
    assert_eq!(stage.asked("forget_instance"), said);
}

#[tokio::test(start_paused = true)]
async fn automation_is_shown_and_switched() {
    let stage = Stage::with([
        ("set_automation", answer(&automation("on", "shadow"))),
        ("set_automation", answer(&automation("on", "shadow"))),
        ("set_automation", answer(&automation("paused", "shadow"))),
    ])
    .await;
    assert_eq!(stage.run("node automation").await, Exit::Done);
    let shown = "evacuate  on\nbalance   shadow: it only logs what it would do\n";
    assert_eq!(stage.tape.out(), shown);
    let line = "node automation --evacuate off";
    assert_eq!(stage.run(&format!("{line} --dry-run")).await, Exit::Done);
    assert!(
        stage
            .tape
            .out()
            .contains("evacuate  on; it would be switched off\n")
    );
    assert_eq!(stage.run(line).await, Exit::Done);
    assert!(stage.tape.out().contains("evacuate  paused: asked for by"));
    let asked = |evacuate: Value| json!({"evacuate": evacuate, "balance": null});
    let expected = [asked(Value::Null), asked(Value::Null), asked(json!(false))];
    assert_eq!(stage.asked("set_automation"), expected);
}

#[tokio::test(start_paused = true)]
async fn a_plan_without_guests_and_a_drain_of_nothing_say_so() {
    let plan = Box::new(OperationPlan::default());
    let empty = OperationAnswer::Plan {
        plan,
        failures: Vec::new(),
        evidence: None,
    };
    let mut nothing = samples::drained();
    nothing.items.clear();
    let stage = Stage::with([
        ("drain_node", answer(&empty)),
        ("drain_node", begun(nothing)),
    ])
    .await;
    assert_eq!(stage.run(&format!("{DRAIN} --dry-run")).await, Exit::Done);
    let expected = "no guest is to move\nthe drain of kvm1 would be accepted\n";
    assert_eq!(stage.tape.out(), expected);
    assert_eq!(stage.run(DRAIN).await, Exit::Done);
    assert!(
        stage
            .tape
            .out()
            .contains("kvm1 is drained: 0 guests moved in 21.5 s\n")
    );
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_waits_for_something_else_says_so_once() {
    let mut other = samples::drain();
    other.version = 6;
    other.items[2].state = ItemState::Waiting {
        why: "4 guests of the cluster are on their way".to_owned(),
    };
    let mut same = other.clone();
    same.version = 7;
    let stage = Stage::with([
        ("get_operation", answer(&samples::view(samples::drain()))),
        ("wait_operation", answer(&samples::view(other))),
        ("wait_operation", answer(&samples::view(same))),
        ("wait_operation", answer(&samples::view(samples::drained()))),
    ])
    .await;
    assert_eq!(stage.run("operation watch 4").await, Exit::Done);
    let out = stage.tape.out();
    assert_eq!(out.matches("vm3  waits").count(), 2, "{out}");
}
