//! Whole commands against a scripted conductor, over the in-memory transport:
//! what is asked, what is told, how it ends, whatever is answered or lost.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use drover_model::{
    api::{
        NAMESPACE,
        conductor::{Automation, MigrateAnswer, OfferMade, OfferState, ProjectView},
    },
    check::{CheckCode, CheckFailure, Side},
    migration::{EndReason, Ending, Migration, MigrationStatus, TransferMode},
    operation::Operation,
    project::{Limit, Project},
};
use drover_rpc::{
    Endpoint, MessagingSettings, RemoteFailure, Request, RpcServer, memory::MemoryBroker,
};
use drover_runtime::clock::now_ms;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::*;
use crate::{
    render::screen::Manner,
    samples::{self, Tape},
};

/// What the far end does when it is asked.
enum Act {
    Answer(Value),
    Fail(RemoteFailure),
    Keep,
}

fn answer(value: &impl Serialize) -> Act {
    Act::Answer(serde_json::to_value(value).unwrap())
}

fn accepted(m: &Migration) -> Act {
    let migration = Box::new(m.clone());
    answer(&MigrateAnswer::Accepted { migration })
}

/// Acts in turn, each for the method it names; after the last it keeps silent.
#[derive(Default)]
struct Script {
    acts: Mutex<VecDeque<(&'static str, Act)>>,
    asked: Mutex<Vec<(String, Value)>>,
}

#[async_trait]
impl Endpoint for Script {
    fn namespace(&self) -> Option<&str> {
        Some(NAMESPACE)
    }

    fn methods(&self) -> &[&str] {
        &[
            "migrate_instance",
            "transfer_instance",
            "offer_transfer",
            "accept_transfer",
            "withdraw_transfer",
            "get_transfer",
            "list_transfers",
            "create_project",
            "set_project",
            "get_project",
            "list_projects",
            "abort_migration",
            "force_complete_migration",
            "confirm_migration",
            "revert_migration",
            "resume_migration",
            "get_migration",
            "wait_migration",
            "list_migrations",
            "get_instance",
            "forget_instance",
            "list_instances",
            "get_node",
            "list_nodes",
            "set_node",
            "get_status",
            "force_down_node",
            "forget_node",
            "drain_node",
            "restore_node",
            "evacuate_node",
            "get_evidence",
            "balance_nodes",
            "get_operation",
            "wait_operation",
            "list_operations",
            "cancel_operation",
            "set_automation",
        ]
    }

    async fn handle(&self, request: Request) -> Result<Value, RemoteFailure> {
        let args = Value::Object(request.args_map()?);
        self.asked
            .lock()
            .unwrap()
            .push((request.method().to_owned(), args));
        let act = {
            let mut acts = self.acts.lock().unwrap();
            let place = acts
                .iter()
                .position(|(method, _)| *method == request.method());
            place.and_then(|place| acts.remove(place))
        };
        match act {
            Some((_, Act::Answer(value))) => Ok(value),
            Some((_, Act::Fail(failure))) => Err(failure),
            Some((_, Act::Keep)) | None => std::future::pending().await,
        }
    }
}

/// A command with everything around it.
struct Stage {
    broker: MemoryBroker,
    script: Arc<Script>,
    servers: Vec<RpcServer>,
    tape: Tape,
    interrupt_after: Option<Duration>,
    /// What the operator types, where one sits.
    typed: Option<&'static str>,
    /// What comes on standard input, where nobody sits.
    piped: Option<&'static str>,
}

impl Stage {
    /// Nobody there.
    fn empty() -> Self {
        Self {
            broker: MemoryBroker::default(),
            script: Arc::default(),
            servers: Vec::new(),
            tape: Tape::default(),
            interrupt_after: None,
            typed: None,
            piped: None,
        }
    }

    /// A conductor that acts so.
    async fn with(acts: impl IntoIterator<Item = (&'static str, Act)>) -> Self {
        let mut stage = Self::empty();
        stage.script.acts.lock().unwrap().extend(acts);
        let script = stage.script.clone();
        stage.serve("conductor", "ctl", script).await;
        stage
    }

    async fn serve(&mut self, topic: &str, server: &str, script: Arc<Script>) {
        let settings = MessagingSettings::default();
        let transport = self.broker.transport(server);
        let server = RpcServer::builder(transport, &settings, topic, server);
        let server = server.shared_endpoint(script).start().await.unwrap();
        self.servers.push(server);
    }

    async fn run(&self, line: &str) -> Exit {
        let words = std::iter::once("drover").chain(line.split_whitespace());
        let cli = Cli::try_parse_from(words).unwrap();
        let manner = if cli.global.json {
            Manner::Json
        } else {
            Manner::Plain
        };
        let transport = self.broker.transport("cli");
        let after = self.interrupt_after;
        let mut session = Session {
            client: Client::new(transport, &MessagingSettings::default(), "memory"),
            screen: self.tape.screen(manner),
            interrupt: Box::pin(async move {
                match after {
                    Some(after) => tokio::time::sleep(after).await,
                    None => std::future::pending().await,
                }
            }),
            answers: self
                .typed
                .map(|text| Box::new(text.as_bytes()) as Box<dyn io::BufRead + Send>),
            input: self
                .piped
                .map(|text| Box::new(text.as_bytes()) as Box<dyn io::BufRead + Send>),
        };
        let ended = dispatch(&mut session, cli.noun, "a file".to_owned()).await;
        ended.unwrap_or_else(|trouble| {
            session.screen.trouble(&trouble);
            trouble.exit
        })
    }

    fn asked(&self, method: &str) -> Vec<Value> {
        let asked = self.script.asked.lock().unwrap();
        let of_it = asked.iter().filter(|(name, _)| name == method);
        of_it.map(|(_, args)| args.clone()).collect()
    }

    fn last_line(&self) -> String {
        self.tape
            .out()
            .lines()
            .last()
            .unwrap_or_default()
            .to_owned()
    }
}

fn version(mut m: Migration, version: u64) -> Migration {
    m.version = version;
    m
}

fn first() -> Migration {
    samples::migration()
}

fn done() -> Migration {
    version(samples::completed(first()), 9)
}

fn ended(status: MigrationStatus, reason: Option<EndReason>) -> Migration {
    let mut m = version(samples::running(first()), 9);
    m.status = status;
    m.end_reason = reason;
    m
}

fn check() -> CheckFailure {
    CheckFailure {
        code: CheckCode::Network,
        side: Side::Destination,
        message: "bridge br1 is missing on kvm2".to_owned(),
        remedy: "create it".to_owned(),
    }
}

const MIGRATE: &str = "instance migrate demo-1 --live --to kvm2";

#[tokio::test(start_paused = true)]
async fn a_migration_is_followed_to_its_end_without_a_pause() {
    let stage = Stage::with([
        ("migrate_instance", accepted(&first())),
        (
            "wait_migration",
            answer(&version(samples::running(first()), 5)),
        ),
        ("wait_migration", answer(&done())),
    ])
    .await;
    let began = Instant::now();
    assert_eq!(stage.run(MIGRATE).await, Exit::Done);
    assert!(
        began.elapsed() < Duration::from_millis(50),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(
        stage.last_line(),
        "completed: demo-1 is on kvm2; downtime 212 ms, total 2.1 s"
    );
    let seen: Vec<Value> = stage
        .asked("wait_migration")
        .iter()
        .map(|args| args["seen_version"].clone())
        .collect();
    assert_eq!(seen, [1, 5], "a record that jumps ahead is taken as it is");
    let request = &stage.asked("migrate_instance")[0];
    assert_eq!(request["host"], "kvm2");
    assert_eq!(request["type"], "live-migration");
    assert_eq!(stage.tape.err(), "");
}

#[tokio::test(start_paused = true)]
async fn no_wait_prints_the_id_and_goes() {
    let stage = Stage::with([("migrate_instance", accepted(&first()))]).await;
    assert_eq!(stage.run(&format!("{MIGRATE} --no-wait")).await, Exit::Done);
    assert_eq!(stage.tape.out(), "7\n");
    assert!(stage.asked("wait_migration").is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_refusal_ends_with_3_and_lists_the_checks() {
    let refusal = || {
        RemoteFailure::nova("MigrationPreCheckError", "Migration pre-check error: x")
            .with_kwarg("checks", json!([check()]))
    };
    let stage = Stage::with([
        ("migrate_instance", Act::Fail(refusal())),
        ("migrate_instance", Act::Fail(refusal())),
    ])
    .await;
    assert_eq!(stage.run(MIGRATE).await, Exit::Refused);
    assert_eq!(
        stage.tape.err(),
        "drover: the migration is refused: 1 check failed\n  \
         network (destination): bridge br1 is missing on kvm2\n      \
         what to do: create it\n"
    );
    assert_eq!(stage.run(&format!("{MIGRATE} --json")).await, Exit::Refused);
    let told: Value = serde_json::from_str(&stage.tape.out()).unwrap();
    assert_eq!(told["error"]["checks"][0]["code"], "network");
    assert_eq!(told["error"]["code"], 3);
}

#[tokio::test(start_paused = true)]
async fn the_record_s_end_is_the_command_s_end() {
    let failed = EndReason::Failed {
        message: "QEMU died".to_owned(),
    };
    let refused = EndReason::Refused {
        checks: vec![check()],
    };
    let cases = [
        (
            MigrationStatus::Failed,
            Some(failed),
            Exit::Failed,
            "QEMU died",
        ),
        (
            MigrationStatus::Failed,
            Some(refused),
            Exit::Refused,
            "bridge br1",
        ),
        (
            MigrationStatus::Cancelled,
            Some(EndReason::Aborted),
            Exit::Failed,
            "stays on kvm1",
        ),
        (
            MigrationStatus::Stuck,
            None,
            Exit::Failed,
            "drover migration resume 7",
        ),
    ];
    for (status, reason, exit, told) in cases {
        let stage = Stage::with([
            ("migrate_instance", accepted(&first())),
            ("wait_migration", answer(&ended(status, reason))),
        ])
        .await;
        assert_eq!(stage.run(MIGRATE).await, exit, "{status}");
        assert!(stage.tape.out().contains(told), "{}", stage.tape.out());
    }
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_shows_the_plan_and_ends_as_the_real_one_would() {
    let mut bad = samples::plan();
    bad.failures = vec![check()];
    let plan = |plan| answer(&MigrateAnswer::Plan { plan });
    let stage = Stage::with([
        ("migrate_instance", plan(samples::plan())),
        ("migrate_instance", plan(bad)),
    ])
    .await;
    let line = format!("{MIGRATE} --dry-run");
    assert_eq!(stage.run(&line).await, Exit::Done);
    assert!(stage.tape.out().contains("would be accepted"));
    assert_eq!(stage.run(&line).await, Exit::Refused);
    assert!(stage.tape.out().contains("what to do: create it"));
    assert!(
        stage
            .asked("migrate_instance")
            .iter()
            .all(|args| args["dry_run"] == true)
    );
}

#[tokio::test(start_paused = true)]
async fn options_that_cannot_be_are_usage_and_nothing_is_asked() {
    let stage = Stage::with([]).await;
    assert_eq!(
        stage.run(&format!("{MIGRATE} --parallel 1")).await,
        Exit::Usage
    );
    assert!(
        stage.tape.err().contains("parallel_connections is 1"),
        "{}",
        stage.tape.err()
    );
    assert!(stage.asked("migrate_instance").is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_to_migrate_is_told_as_uncertain_and_not_asked_again() {
    let stage = Stage::with([("migrate_instance", Act::Keep)]).await;
    assert_eq!(stage.run(MIGRATE).await, Exit::TimedOut);
    let err = stage.tape.err();
    assert!(err.contains("may or may not have begun"), "{err}");
    assert!(
        err.contains("`drover migration list --instance demo-1`"),
        "{err}"
    );
    assert_eq!(stage.asked("migrate_instance").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn nobody_there_ends_with_4_at_once() {
    let stage = Stage::empty();
    let began = Instant::now();
    assert_eq!(stage.run("node list").await, Exit::TimedOut);
    assert!(began.elapsed() < Duration::from_secs(1));
    let err = stage.tape.err();
    assert!(
        err.contains("nobody listens at conductor on the broker memory"),
        "{err}"
    );
    assert!(err.contains("start drover-conductor"), "{err}");
}

#[tokio::test(start_paused = true)]
async fn an_answer_lost_while_waiting_is_asked_for_again() {
    let stage = Stage::with([
        ("migrate_instance", accepted(&first())),
        ("wait_migration", Act::Keep),
        ("wait_migration", answer(&done())),
    ])
    .await;
    assert_eq!(stage.run(MIGRATE).await, Exit::Done);
    let err = stage.tape.err();
    assert_eq!(
        err.matches("the migration goes on without it").count(),
        1,
        "{err}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_conductor_that_stays_away_is_given_up_and_the_migration_is_not() {
    let stage = Stage::with([("migrate_instance", accepted(&first()))]).await;
    assert_eq!(stage.run(MIGRATE).await, Exit::TimedOut);
    let err = stage.tape.err();
    assert_eq!(err.matches("still asking").count(), 1, "{err}");
    assert!(err.contains("drover migration watch 7"), "{err}");
}

#[tokio::test(start_paused = true)]
async fn patience_ends_the_wait_and_nothing_else() {
    let stage = Stage::with([("migrate_instance", accepted(&first()))]).await;
    let began = Instant::now();
    assert_eq!(
        stage.run(&format!("{MIGRATE} --timeout 5")).await,
        Exit::TimedOut
    );
    assert!(
        (5..6).contains(&began.elapsed().as_secs()),
        "{:?}",
        began.elapsed()
    );
    let err = stage.tape.err();
    assert!(
        err.contains("not over in time: the migration of demo-1 goes on"),
        "{err}"
    );
    assert!(stage.asked("abort_migration").is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_interrupt_ends_the_wait_and_aborts_nothing() {
    let mut stage = Stage::with([("migrate_instance", accepted(&first()))]).await;
    stage.interrupt_after = Some(Duration::from_secs(2));
    assert_eq!(stage.run(MIGRATE).await, Exit::Interrupted);
    let err = stage.tape.err();
    assert!(
        err.contains("interrupted: the migration of demo-1 goes on"),
        "{err}"
    );
    assert!(err.contains("drover migration watch 7") && err.contains("drover migration abort 7"));
    assert!(stage.asked("abort_migration").is_empty());

    let mut stage = Stage::with([("migrate_instance", Act::Keep)]).await;
    stage.interrupt_after = Some(Duration::from_secs(2));
    assert_eq!(stage.run(MIGRATE).await, Exit::Interrupted);
    assert!(stage.tape.err().contains("may or may not have begun"));
}

#[tokio::test(start_paused = true)]
async fn a_record_that_goes_back_or_stands_still_disturbs_nothing() {
    let stage = Stage::with([
        ("migrate_instance", accepted(&version(first(), 8))),
        ("wait_migration", answer(&version(first(), 8))),
        ("wait_migration", answer(&version(first(), 3))),
        (
            "wait_migration",
            answer(&version(samples::completed(first()), 3)),
        ),
    ])
    .await;
    let began = Instant::now();
    assert_eq!(stage.run(MIGRATE).await, Exit::Done);
    assert!(
        began.elapsed() >= Duration::from_millis(500),
        "it does not spin"
    );
    assert_eq!(stage.asked("wait_migration").len(), 3);
}

#[tokio::test(start_paused = true)]
async fn watching_as_json_is_one_record_a_line() {
    let stage = Stage::with([
        ("get_migration", answer(&first())),
        ("wait_migration", answer(&samples::running(first()))),
        ("wait_migration", answer(&done())),
    ])
    .await;
    assert_eq!(stage.run("migration watch 7 --json").await, Exit::Done);
    let out = stage.tape.out();
    let records: Vec<Migration> = out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(records, [first(), samples::running(first()), done()]);
}

#[tokio::test(start_paused = true)]
async fn migrating_as_json_is_the_last_record_alone() {
    let stage = Stage::with([
        ("migrate_instance", accepted(&first())),
        ("wait_migration", answer(&done())),
    ])
    .await;
    assert_eq!(stage.run(&format!("{MIGRATE} --json")).await, Exit::Done);
    let record: Migration = serde_json::from_str(&stage.tape.out()).unwrap();
    assert_eq!(record, done());
}

#[tokio::test(start_paused = true)]
async fn an_abort_is_done_when_the_guest_stays() {
    let cancelled = ended(MigrationStatus::Cancelled, Some(EndReason::Aborted));
    for (end, exit) in [(cancelled, Exit::Done), (done(), Exit::Failed)] {
        let stage = Stage::with([
            ("abort_migration", answer(&samples::running(first()))),
            ("wait_migration", answer(&end)),
        ])
        .await;
        assert_eq!(stage.run("migration abort 7").await, exit);
    }
    let stage = Stage::with([("get_migration", answer(&done()))]).await;
    assert_eq!(
        stage.run("migration abort 7 --dry-run").await,
        Exit::Refused
    );
    assert!(
        stage
            .tape
            .err()
            .contains("migration 7 of demo-1 is completed")
    );
    assert!(stage.asked("abort_migration").is_empty());
}

#[tokio::test(start_paused = true)]
async fn resuming_waits_for_what_was_stuck_to_move() {
    let stuck = version(ended(MigrationStatus::Stuck, None), 4);
    let stage = Stage::with([
        ("resume_migration", answer(&stuck)),
        ("wait_migration", answer(&done())),
    ])
    .await;
    assert_eq!(stage.run("migration resume 7").await, Exit::Done);
    let again = Stage::with([
        ("resume_migration", answer(&stuck)),
        ("wait_migration", answer(&version(stuck.clone(), 6))),
    ])
    .await;
    assert_eq!(again.run("migration resume 7").await, Exit::Failed);
}

#[tokio::test(start_paused = true)]
async fn what_the_conductor_does_not_know_is_one_line_and_what_to_do() {
    let unknown = RemoteFailure::nova("InstanceNotFound", "There is no instance 'x\x1b[2J'.");
    let stage = Stage::with([("get_instance", Act::Fail(unknown))]).await;
    assert_eq!(stage.run("instance show x").await, Exit::Failed);
    assert_eq!(
        stage.tape.err(),
        "drover: There is no instance 'x[2J'.\n  \
         what to do: `drover instance list` shows what there is\n"
    );
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_on_a_node_changes_nothing() {
    let stage = Stage::with([("get_node", answer(&samples::node("kvm1")))]).await;
    assert_eq!(stage.run("node disable kvm1 --dry-run").await, Exit::Done);
    assert_eq!(
        stage.tape.out(),
        "kvm1 would be disabled; it is enabled now\n"
    );
    assert!(stage.asked("set_node").is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_disabled_node_is_told_with_its_reason() {
    let mut node = samples::node("kvm1");
    node.enabled = false;
    node.disabled_reason = Some("disks".to_owned());
    let stage = Stage::with([("set_node", answer(&node))]).await;
    assert_eq!(
        stage.run("node disable kvm1 --reason disks").await,
        Exit::Done
    );
    assert_eq!(
        stage.tape.out(),
        "kvm1 is disabled (disks); 2 instances stay on it\n"
    );
    assert_eq!(stage.asked("set_node")[0]["reason"], "disks");
}

const COLD: &str = "instance migrate demo-1 --cold";

#[tokio::test(start_paused = true)]
async fn a_cold_migration_is_followed_until_it_rests() {
    let stage = Stage::with([
        ("migrate_instance", accepted(&samples::cold())),
        ("wait_migration", answer(&samples::stopping())),
        ("wait_migration", answer(&samples::copying())),
        ("wait_migration", answer(&samples::finished())),
    ])
    .await;
    let line = format!("{COLD} --pre-copy --force-stop-after 2m --to kvm2");
    assert_eq!(stage.run(&line).await, Exit::Done);
    let out = stage.tape.out();
    assert!(
        out.contains("migrating (stopping), waiting for the guest"),
        "{out}"
    );
    assert!(
        out.contains("migrating (disk), 63 %, disk 0.6/1 GiB, 90 MiB/s, ETA 4.1 s"),
        "{out}"
    );
    assert!(
        out.contains("finished: demo-1 is on kvm2; it was off for 14.3 s, total 21.5 s"),
        "{out}"
    );
    assert!(out.contains("`drover instance confirm demo-1`"), "{out}");
    let request = &stage.asked("migrate_instance")[0];
    assert_eq!(request["type"], "migration");
    let options = &request["options"];
    assert_eq!(
        (&options["pre_copy"], &options["force_stop_after_s"]),
        (&json!(true), &json!(120))
    );
    assert_eq!(options["flavor"], Value::Null);
    assert_eq!(stage.tape.err(), "");
    assert_eq!(stage.asked("wait_migration").len(), 3);
}

#[tokio::test(start_paused = true)]
async fn of_a_new_size_what_is_not_named_stays() {
    let record = || ("get_instance", answer(&samples::instance("demo-1")));
    let begun = || ("migrate_instance", accepted(&samples::cold()));
    let stage = Stage::with([record(), record(), begun(), begun(), begun()]).await;
    for (size, flavor) in [
        ("--vcpus 2", json!({"vcpus": 2, "memory_mb": 128})),
        ("--memory-mib 512", json!({"vcpus": 1, "memory_mb": 512})),
        (
            "--vcpus 3 --memory-mib 64",
            json!({"vcpus": 3, "memory_mb": 64}),
        ),
    ] {
        let line = format!("{COLD} --no-wait {size}");
        assert_eq!(stage.run(&line).await, Exit::Done);
        let asked = stage.asked("migrate_instance");
        assert_eq!(asked.last().unwrap()["options"]["flavor"], flavor);
    }
    assert_eq!(stage.asked("get_instance").len(), 2);
    assert_eq!(
        stage.run(&format!("{COLD} --progress-timeout 1")).await,
        Exit::Usage
    );
}

/// A conductor that has a finished migration among others.
async fn settling(acts: impl IntoIterator<Item = (&'static str, Act)>) -> Stage {
    let refused = ended(MigrationStatus::Failed, None);
    let all = [refused, samples::finished(), done()];
    Stage::with(std::iter::once(("list_migrations", answer(&all))).chain(acts)).await
}

fn settled(status: MigrationStatus, ending: Ending, version: u64) -> Migration {
    let mut m = samples::finished();
    (m.status, m.ending, m.version) = (status, Some(ending), version);
    m
}

#[tokio::test(start_paused = true)]
async fn confirming_goes_on_until_the_copy_is_gone() {
    use MigrationStatus::{Confirmed, Confirming, Finished};
    let steps = || {
        [
            // What is about to be confirmed may still be finished.
            (
                "confirm_migration",
                answer(&settled(Finished, Ending::Confirm, 9)),
            ),
            (
                "wait_migration",
                answer(&settled(Confirming, Ending::Confirm, 10)),
            ),
            (
                "wait_migration",
                answer(&settled(Confirmed, Ending::Confirm, 11)),
            ),
        ]
    };
    let stage = settling(steps()).await;
    assert_eq!(stage.run("instance confirm demo-1").await, Exit::Done);
    assert_eq!(
        stage.last_line(),
        "confirmed: demo-1 is on kvm2; kvm1 has removed its copy"
    );
    assert_eq!(stage.asked("list_migrations")[0]["instance"], "demo-1");
    assert_eq!(
        stage.asked("confirm_migration"),
        [json!({"migration": samples::MIGRATION})]
    );

    let stage = settling(steps()).await;
    assert_eq!(
        stage.run("instance confirm demo-1 --json").await,
        Exit::Done
    );
    let record: Migration = serde_json::from_str(&stage.tape.out()).unwrap();
    assert_eq!(record, settled(Confirmed, Ending::Confirm, 11));

    let stage = settling(steps()).await;
    assert_eq!(
        stage.run("instance confirm demo-1 --no-wait").await,
        Exit::Done
    );
    assert_eq!(stage.tape.out(), "7\n");
}

#[tokio::test(start_paused = true)]
async fn a_settlement_that_comes_to_nothing_is_a_failure_with_its_reason() {
    let mut back = version(samples::finished(), 11);
    back.warnings = vec!["it stays finished: kvm1 is away".to_owned()];
    let stage = settling([
        (
            "revert_migration",
            answer(&settled(MigrationStatus::Reverting, Ending::Revert, 10)),
        ),
        ("wait_migration", answer(&back)),
    ])
    .await;
    assert_eq!(
        stage.run("instance revert demo-1 --yes").await,
        Exit::Failed
    );
    let err = stage.tape.err();
    assert!(
        err.contains("that did not succeed: it stays finished: kvm1 is away"),
        "{err}"
    );
    assert!(
        stage.tape.out().contains("kvm1 keeps its copy"),
        "{}",
        stage.tape.out()
    );
}

#[tokio::test(start_paused = true)]
async fn patience_with_a_settlement_tells_what_goes_on() {
    let reverting = settled(MigrationStatus::Reverting, Ending::Revert, 10);
    let stage = settling([("revert_migration", answer(&reverting))]).await;
    assert_eq!(
        stage.run("instance revert demo-1 --yes --timeout 5").await,
        Exit::TimedOut
    );
    let err = stage.tape.err();
    assert!(
        err.contains("not over in time: reverting the migration of demo-1 goes on"),
        "{err}"
    );
    assert!(!err.contains("abort"), "{err}");
}

#[tokio::test(start_paused = true)]
async fn nothing_that_was_written_is_lost_unasked() {
    let stage = settling([]).await;
    for line in ["instance revert demo-1", "instance revert demo-1 --json"] {
        assert_eq!(stage.run(line).await, Exit::Usage);
    }
    let err = stage.tape.err();
    assert!(
        err.contains("--yes") && err.contains("--keep-changes"),
        "{err}"
    );
    let told: Value = serde_json::from_str(&stage.tape.out()).unwrap();
    assert_eq!(
        (&told["error"]["exit"], &told["error"]["code"]),
        (&json!("usage"), &json!(2))
    );
    assert!(stage.script.asked.lock().unwrap().is_empty());

    for no in ["n\n", "\n", "", "yeah\n"] {
        let mut stage = settling([]).await;
        stage.typed = Some(no);
        assert_eq!(stage.run("instance revert demo-1").await, Exit::Failed);
        let err = stage.tape.err();
        assert!(
            err.starts_with(
                "what demo-1 wrote on kvm2 since 2026-11-23 18:47:12Z is lost, unless its disks \
                 are shared; its disks go back to what they were on kvm1. Go on? [y/N] "
            ),
            "{err}"
        );
        assert!(err.contains("not reverted: nothing was done"), "{err}");
        assert!(stage.asked("revert_migration").is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn reverting_goes_on_until_the_guest_is_back() {
    use MigrationStatus::{Reverted, Reverting};
    for (line, typed) in [
        ("instance revert demo-1", Some("y\n")),
        ("instance revert demo-1", Some("Yes\n")),
        ("instance revert demo-1 --yes", None),
    ] {
        let mut stage = settling([
            (
                "revert_migration",
                answer(&settled(Reverting, Ending::Revert, 10)),
            ),
            (
                "wait_migration",
                answer(&settled(Reverted, Ending::Revert, 11)),
            ),
        ])
        .await;
        stage.typed = typed;
        assert_eq!(stage.run(line).await, Exit::Done);
        assert_eq!(stage.last_line(), "reverted: demo-1 is on kvm1 again");
        assert_eq!(
            stage.asked("revert_migration"),
            [json!({"migration": samples::MIGRATION, "keep_changes": false})]
        );
        assert_eq!(stage.tape.err().contains("[y/N]"), typed.is_some());
    }
}

#[tokio::test(start_paused = true)]
async fn with_the_changes_kept_the_way_back_is_followed() {
    let back = |mut m: Migration| {
        (m.id, m.uuid) = (8, "01997777-0000-7000-8000-0000000000ef".parse().unwrap());
        (m.source_host, m.dest_host) = (samples::host("kvm2"), Some(samples::host("kvm1")));
        m
    };
    let stage = settling([
        ("revert_migration", answer(&back(samples::cold()))),
        ("wait_migration", answer(&back(samples::copying()))),
        ("wait_migration", answer(&back(samples::finished()))),
    ])
    .await;
    assert_eq!(
        stage.run("instance revert demo-1 --keep-changes").await,
        Exit::Done
    );
    assert_eq!(stage.asked("revert_migration")[0]["keep_changes"], true);
    let waited = stage.asked("wait_migration");
    assert_eq!(
        waited[0]["migration"],
        "01997777-0000-7000-8000-0000000000ef"
    );
    assert!(
        stage
            .tape
            .out()
            .contains("finished: demo-1 is on kvm1; it was off for")
    );
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_settles_nothing_and_asks_nothing() {
    for (line, told) in [
        (
            "confirm demo-1",
            "would be confirmed: kvm1 would remove its copy",
        ),
        (
            "revert demo-1",
            "what it wrote since 2026-11-23 18:47:12Z would be lost, unless",
        ),
        (
            "revert demo-1 --keep-changes",
            "migrated back cold from kvm2 to kvm1",
        ),
    ] {
        let stage = settling([]).await;
        assert_eq!(
            stage.run(&format!("instance {line} --dry-run")).await,
            Exit::Done
        );
        let out = stage.tape.out();
        assert!(
            out.starts_with("migration 7 of demo-1 (finished) would be"),
            "{out}"
        );
        assert!(out.contains(told), "{out}");
        assert_eq!(stage.script.asked.lock().unwrap().len(), 1);
    }
    let stage = settling([]).await;
    assert_eq!(
        stage.run("instance revert demo-1 --dry-run --json").await,
        Exit::Done
    );
    let record: Migration = serde_json::from_str(&stage.tape.out()).unwrap();
    assert_eq!(record, samples::finished());
}

#[tokio::test(start_paused = true)]
async fn where_there_is_nothing_to_settle_the_migrations_are_told() {
    let confirming = settled(MigrationStatus::Confirming, Ending::Confirm, 10);
    let stuck = ended(MigrationStatus::Stuck, None);
    let many: Vec<Migration> = (0..7).map(|_| done()).collect();
    let cases = [
        (
            vec![],
            "drover: nothing to confirm: demo-1 was never migrated\n",
        ),
        (
            vec![confirming, done()],
            "drover: nothing to confirm: no migration of demo-1 is finished; there are \
             7 (cold, confirming), 7 (live, completed)\n  \
             what to do: `drover migration watch 7` follows it\n",
        ),
        (
            vec![stuck],
            "drover: nothing to confirm: no migration of demo-1 is finished; there are \
             7 (live, stuck)\n  \
             what to do: `drover migration show 7`, mend it, `drover migration resume 7`\n",
        ),
        (
            many,
            "drover: nothing to confirm: no migration of demo-1 is finished; there are \
             7 (live, completed), 7 (live, completed), 7 (live, completed), 7 (live, completed), \
             7 (live, completed), and 2 older\n",
        ),
    ];
    for (all, told) in cases {
        let stage = Stage::with([("list_migrations", answer(&all))]).await;
        assert_eq!(stage.run("instance confirm demo-1").await, Exit::Refused);
        assert_eq!(stage.tape.err(), told);
        assert!(stage.asked("confirm_migration").is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_to_a_settlement_is_told_as_uncertain() {
    let stage = settling([("revert_migration", Act::Keep)]).await;
    assert_eq!(
        stage.run("instance revert demo-1 --yes").await,
        Exit::TimedOut
    );
    let err = stage.tape.err();
    assert!(err.contains("reverting may or may not have begun"), "{err}");
    assert!(
        err.contains("`drover migration list --instance demo-1`"),
        "{err}"
    );
}

#[tokio::test(start_paused = true)]
async fn an_onlooker_s_exit_code_tells_how_it_ended() {
    use MigrationStatus::{Confirmed, Confirming, Reverted, Reverting};
    let (confirm, revert) = (Ending::Confirm, Ending::Revert);
    for (before, after, exit) in [
        (
            settled(Confirming, confirm, 10),
            settled(Confirmed, confirm, 11),
            Exit::Done,
        ),
        (
            settled(Reverting, revert, 10),
            settled(Reverted, revert, 11),
            Exit::Done,
        ),
        (
            samples::copying(),
            settled(Reverted, revert, 11),
            Exit::Failed,
        ),
    ] {
        let stage = Stage::with([
            ("get_migration", answer(&before)),
            ("wait_migration", answer(&after)),
        ])
        .await;
        assert_eq!(stage.run("migration watch 7").await, exit);
    }
    let stage = Stage::with([("get_migration", answer(&samples::finished()))]).await;
    assert_eq!(stage.run("migration watch 7").await, Exit::Done);
    assert!(stage.asked("wait_migration").is_empty(), "it rests");
}

#[tokio::test(start_paused = true)]
async fn a_cold_one_is_aborted_before_it_finished_and_not_after() {
    let mut cancelled = version(samples::copying(), 9);
    cancelled.status = MigrationStatus::Cancelled;
    cancelled.end_reason = Some(EndReason::Aborted);
    let stage = Stage::with([
        ("abort_migration", answer(&samples::copying())),
        ("wait_migration", answer(&cancelled)),
        ("get_migration", answer(&samples::finished())),
        ("get_migration", answer(&samples::copying())),
    ])
    .await;
    assert_eq!(stage.run("migration abort 7").await, Exit::Done);
    assert_eq!(
        stage.run("migration abort 7 --dry-run").await,
        Exit::Refused
    );
    assert_eq!(
        stage.run("migration force-complete 7 --dry-run").await,
        Exit::Refused
    );
}

#[tokio::test(start_paused = true)]
async fn what_is_resumed_ends_well_when_what_it_was_about_is_done() {
    use MigrationStatus::{Reverted, Stuck};
    let stuck = settled(Stuck, Ending::Revert, 10);
    let reverted = settled(Reverted, Ending::Revert, 11);
    let as_before = version(samples::finished(), 11);
    for (end, exit) in [(reverted, Exit::Done), (as_before, Exit::Failed)] {
        let stage = Stage::with([
            ("resume_migration", answer(&stuck)),
            ("wait_migration", answer(&end)),
        ])
        .await;
        assert_eq!(stage.run("migration resume 7").await, exit);
    }
    let on_its_way = version(samples::copying(), 10);
    let stage = Stage::with([
        ("resume_migration", answer(&on_its_way)),
        ("wait_migration", answer(&version(samples::finished(), 11))),
    ])
    .await;
    assert_eq!(stage.run("migration resume 7").await, Exit::Done);
}

const TRANSFER: &str = "instance transfer demo-1 --project blue --live";
const ACCEPT: &str = "transfer accept 0199 --project blue --live";

fn given() -> Migration {
    samples::handover(TransferMode::Live)
}

fn taken() -> Migration {
    version(samples::handed_over(given()), 9)
}

#[tokio::test(start_paused = true)]
async fn a_transfer_is_followed_to_its_end() {
    let stage = Stage::with([
        ("transfer_instance", accepted(&given())),
        ("wait_migration", answer(&samples::moving(given()))),
        ("wait_migration", answer(&taken())),
    ])
    .await;
    let line = format!("{TRANSFER} --network br0=lan --title T");
    assert_eq!(stage.run(&line).await, Exit::Done);
    let out = stage.tape.out();
    assert!(
        out.contains("demo-1  default -> blue on kvm1  running (disk)"),
        "{out}"
    );
    assert_eq!(
        stage.last_line(),
        "completed: demo-1 is in project blue; network cut 34 ms, total 2.1 s"
    );
    let request = &stage.asked("transfer_instance")[0];
    assert_eq!(
        (&request["instance"], &request["project"]),
        (&json!("demo-1"), &json!("blue"))
    );
    assert_eq!(request["options"]["mode"], "live");
    assert_eq!(request["options"]["networks"], json!({"br0": "lan"}));
    assert_eq!(request["dry_run"], false);
}

#[tokio::test(start_paused = true)]
async fn a_transfer_that_cannot_be_is_usage_and_nothing_is_asked() {
    let stage = Stage::with([]).await;
    assert_eq!(
        stage.run(&format!("{TRANSFER} --name new")).await,
        Exit::Usage
    );
    let err = stage.tape.err();
    assert!(err.contains("libvirt renames no running domain"), "{err}");
    assert!(err.contains("`drover instance transfer --help`"), "{err}");
    let line = format!("{ACCEPT} --new-mac --key k");
    assert_eq!(stage.run(&line).await, Exit::Usage);
    let line = "project create blue --network lan=bridge:a --network lan=bridge:b";
    assert_eq!(stage.run(line).await, Exit::Usage);
    assert_eq!(stage.run("project set blue").await, Exit::Usage);
    assert!(stage.script.asked.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_of_a_transfer_shows_its_plan() {
    let mut good = samples::plan();
    (good.dest_host, good.memory_mib) = (Some(good.source_host.clone()), 0);
    let mut bad = good.clone();
    bad.failures = vec![check()];
    let plan = |plan| answer(&MigrateAnswer::Plan { plan });
    let stage = Stage::with([
        ("transfer_instance", plan(good)),
        ("accept_transfer", plan(bad)),
    ])
    .await;
    assert_eq!(
        stage.run(&format!("{TRANSFER} --dry-run")).await,
        Exit::Done
    );
    let out = stage.tape.out();
    assert!(
        out.contains("would be transferred to blue on kvm1"),
        "{out}"
    );
    let line = format!("{ACCEPT} --key k --dry-run");
    assert_eq!(stage.run(&line).await, Exit::Refused);
    assert_eq!(stage.asked("transfer_instance")[0]["dry_run"], true);
    assert_eq!(stage.asked("accept_transfer")[0]["dry_run"], true);
}

#[tokio::test(start_paused = true)]
async fn a_refused_transfer_lists_its_checks() {
    let refusal = RemoteFailure::nova("MigrationPreCheckError", "x");
    let refusal = refusal.with_kwarg("checks", json!([check()]));
    let stage = Stage::with([("transfer_instance", Act::Fail(refusal))]).await;
    assert_eq!(stage.run(TRANSFER).await, Exit::Refused);
    let err = stage.tape.err();
    assert!(
        err.starts_with("drover: the transfer is refused: 1 check failed\n"),
        "{err}"
    );
}

#[tokio::test(start_paused = true)]
async fn patience_with_a_transfer_tells_what_goes_on() {
    let stage = Stage::with([("transfer_instance", accepted(&given()))]).await;
    assert_eq!(
        stage.run(&format!("{TRANSFER} --timeout 5")).await,
        Exit::TimedOut
    );
    let err = stage.tape.err();
    assert!(
        err.contains("not over in time: the transfer of demo-1 goes on"),
        "{err}"
    );
    let stage = Stage::with([("accept_transfer", Act::Keep)]).await;
    assert_eq!(
        stage.run(&format!("{ACCEPT} --key k")).await,
        Exit::TimedOut
    );
    let err = stage.tape.err();
    assert!(err.contains("may or may not have begun"), "{err}");
    assert!(err.contains("`drover transfer show 0199`"), "{err}");
}

#[tokio::test(start_paused = true)]
async fn a_running_transfer_is_not_forced_to_complete() {
    let running = samples::moving(given());
    let stage = Stage::with([
        ("get_migration", answer(&running)),
        ("get_migration", answer(&running)),
    ])
    .await;
    let line = "migration force-complete 7 --dry-run";
    assert_eq!(stage.run(line).await, Exit::Refused);
    assert_eq!(stage.run("migration abort 7 --dry-run").await, Exit::Done);
}

#[tokio::test(start_paused = true)]
async fn an_offer_is_told_with_its_key() {
    let made = OfferMade {
        offer: samples::offer(),
        key: "correct-horse".to_owned(),
    };
    let stage = Stage::with([
        ("offer_transfer", answer(&made)),
        ("offer_transfer", answer(&made)),
    ])
    .await;
    let line = "transfer offer demo-1 --project blue --expires 1d";
    assert_eq!(stage.run(line).await, Exit::Done);
    let expected = "\
offer     01997777-0000-7000-8000-00000000feed
instance  demo-1 (11111111-2222-4333-8444-555555555555)
from      default
to        blue
until     2026-11-24 18:46:51Z
key       correct-horse

The key is shown this once and kept nowhere. With it the receiver takes the instance:
  `drover transfer accept 01997777-0000-7000-8000-00000000feed --project blue --live` (or --cold)
";
    assert_eq!(stage.tape.out(), expected);
    assert_eq!(
        stage.asked("offer_transfer")[0],
        json!({"instance": "demo-1", "project": "blue", "expires_in_s": 86400})
    );
    let json = Stage::with([("offer_transfer", answer(&made))]).await;
    assert_eq!(json.run("transfer offer demo-1 --json").await, Exit::Done);
    let told: OfferMade = serde_json::from_str(&json.tape.out()).unwrap();
    assert_eq!(told, made);
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_to_an_offer_tells_what_to_do() {
    let stage = Stage::with([("offer_transfer", Act::Keep)]).await;
    assert_eq!(stage.run("transfer offer demo-1").await, Exit::TimedOut);
    let err = stage.tape.err();
    assert!(err.contains("the offer may have been made"), "{err}");
    assert!(err.contains("`drover transfer withdraw`"), "{err}");
}

#[tokio::test(start_paused = true)]
async fn the_key_is_taken_from_wherever_it_is_given() {
    for (option, typed, piped) in [
        (" --key secret", None, None),
        (" --key secret", None, Some("other\n")),
        ("", Some("secret\n"), None),
        ("", None, Some("secret\nmore\n")),
        ("", None, Some(" secret")),
    ] {
        let mut stage = Stage::with([("accept_transfer", accepted(&given()))]).await;
        (stage.typed, stage.piped) = (typed, piped);
        let line = format!("{ACCEPT} --no-wait{option}");
        assert_eq!(stage.run(&line).await, Exit::Done);
        assert_eq!(stage.tape.out(), "7\n");
        let request = &stage.asked("accept_transfer")[0];
        assert_eq!(
            (&request["key"], &request["offer"], &request["project"]),
            (&json!("secret"), &json!("0199"), &json!("blue"))
        );
        let asked = stage.tape.err().contains("key of the offer: ");
        assert_eq!(asked, typed.is_some());
    }
}

#[tokio::test(start_paused = true)]
async fn without_a_key_nothing_is_asked() {
    for (typed, piped, told) in [
        (None, None, "no terminal to ask for it on"),
        (Some("\n"), None, "no key was given"),
        (None, Some(""), "no key was given"),
    ] {
        let mut stage = Stage::with([]).await;
        (stage.typed, stage.piped) = (typed, piped);
        assert_eq!(stage.run(ACCEPT).await, Exit::Usage);
        let err = stage.tape.err();
        assert!(err.contains(told), "{err}");
        assert!(stage.script.asked.lock().unwrap().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn a_wrong_key_is_a_refusal() {
    let wrong = RemoteFailure::nova("WrongKey", "That is not the key; 4 tries are left.");
    let stage = Stage::with([("accept_transfer", Act::Fail(wrong))]).await;
    let line = format!("{ACCEPT} --key k");
    assert_eq!(stage.run(&line).await, Exit::Refused);
    let err = stage.tape.err();
    assert!(
        err.starts_with("drover: That is not the key; 4 tries are left.\n"),
        "{err}"
    );
    assert_eq!(stage.asked("accept_transfer").len(), 1, "tries are few");
}

#[tokio::test(start_paused = true)]
async fn offers_are_listed_shown_and_withdrawn() {
    let mut withdrawn = samples::offer();
    withdrawn.state = OfferState::Withdrawn;
    let stage = Stage::with([
        ("list_transfers", answer(&[samples::offer()])),
        ("get_transfer", answer(&samples::offer())),
        ("withdraw_transfer", answer(&withdrawn)),
    ])
    .await;
    let line = "transfer list --project blue --all";
    assert_eq!(stage.run(line).await, Exit::Done);
    assert_eq!(
        stage.asked("list_transfers")[0],
        json!({"project": "blue", "all": true})
    );
    assert_eq!(stage.run("transfer show 0199").await, Exit::Done);
    assert!(
        stage
            .tape
            .out()
            .contains("offered     2026-11-23 18:46:51Z by user ann")
    );
    assert_eq!(stage.run("transfer withdraw 0199").await, Exit::Done);
    assert_eq!(
        stage.last_line(),
        "offer 01997777-0000-7000-8000-00000000feed of demo-1 is withdrawn"
    );
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_of_an_offer_changes_nothing() {
    let mut over = samples::offer();
    over.state = OfferState::Expired;
    let stage = Stage::with([
        ("get_instance", answer(&samples::instance("demo-1"))),
        ("get_project", answer(&samples::project("blue"))),
        ("get_transfer", answer(&samples::offer())),
        ("get_transfer", answer(&over)),
    ])
    .await;
    let line = "transfer offer demo-1 --project blue --dry-run";
    assert_eq!(stage.run(line).await, Exit::Done);
    assert_eq!(
        stage.tape.out(),
        "demo-1 (11111111-2222-4333-8444-555555555555) of project default would be offered to \
         project blue\n"
    );
    let line = "transfer withdraw 0199 --dry-run";
    assert_eq!(stage.run(line).await, Exit::Done);
    assert!(
        stage
            .last_line()
            .ends_with("is open; it would be withdrawn")
    );
    assert_eq!(stage.run(line).await, Exit::Refused);
    let err = stage.tape.err();
    assert!(err.contains("is expired: it cannot be withdrawn"), "{err}");
    assert!(stage.asked("offer_transfer").is_empty());
    assert!(stage.asked("withdraw_transfer").is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_project_is_made_and_changed() {
    let view = samples::project("blue");
    let stage = Stage::with([
        ("create_project", answer(&view)),
        ("set_project", answer(&view)),
        ("list_projects", answer(&[&view])),
    ])
    .await;
    let line = "project create blue --vcpus 4 --network lan=bridge:br-blue@kvm1";
    assert_eq!(stage.run(line).await, Exit::Done);
    assert!(stage.tape.out().contains("instances  2+1/10"));
    let asked: Project = serde_json::from_value(stage.asked("create_project")[0].clone()).unwrap();
    assert_eq!((asked.id.as_str(), asked.enabled), ("blue", true));
    assert_eq!(asked.networks["lan"][0].nodes, [samples::host("kvm1")]);
    let line = "project set Blue --disable --remove-network lan --memory-mib unlimited";
    assert_eq!(stage.run(line).await, Exit::Done);
    let asked = &stage.asked("set_project")[0];
    assert_eq!(asked["project"], "Blue");
    let change = &asked["change"];
    assert_eq!(
        (
            &change["enabled"],
            &change["networks"],
            &change["memory_mb"]
        ),
        (&json!(false), &json!({"lan": []}), &json!(-1))
    );
    assert_eq!(change["vcpus"], Value::Null, "what is not said stays");
    assert_eq!(stage.run("project list").await, Exit::Done);
}

fn unknown_project() -> Act {
    Act::Fail(RemoteFailure::nova(
        "ProjectNotFound",
        "There is no project.",
    ))
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_shows_the_project_as_it_would_be() {
    let view = || answer(&samples::project("blue"));
    let mut named = samples::project("old");
    named.created = false;
    let named = || answer(&named);
    let stage = Stage::with([
        ("get_project", view()),
        ("get_project", view()),
        ("get_project", named()),
        ("get_project", unknown_project()),
        ("get_project", named()),
        ("get_project", view()),
    ])
    .await;
    let line = "project set blue --vcpus 8 --remove-network wan --dry-run --json";
    assert_eq!(stage.run(line).await, Exit::Done);
    let told: ProjectView = serde_json::from_str(&stage.tape.out()).unwrap();
    let mut expected = samples::project("blue");
    expected.project.quota.vcpus = Limit::AtMost(8);
    expected.project.networks.remove("wan");
    assert_eq!(told, expected);

    let told = async |line: &str| {
        let before = stage.tape.out().len();
        let exit = stage.run(line).await;
        (exit, stage.tape.out()[before..].to_owned())
    };
    let (exit, out) = told("project set blue --enable --dry-run").await;
    assert_eq!(exit, Exit::Done);
    assert!(
        out.starts_with("it would be left as it is:\n\nid "),
        "{out}"
    );
    let (exit, _) = told("project set old --enable --dry-run").await;
    assert_eq!(exit, Exit::Failed, "nobody has made it");

    let (exit, out) = told("project create new --vcpus 3 --dry-run").await;
    assert_eq!(exit, Exit::Done);
    assert!(out.starts_with("it would be created:\n"), "{out}");
    assert!(out.contains("\nvcpus      0/3\n"), "{out}");
    let (exit, out) = told("project create old --vcpus 9 --dry-run").await;
    assert_eq!(exit, Exit::Done);
    assert!(out.contains("\nvcpus      3+1/9\n"), "it has some: {out}");
    let (exit, _) = told("project create blue --dry-run").await;
    assert_eq!(exit, Exit::Failed);
    let err = stage.tape.err();
    assert!(err.contains("there is a project blue already"), "{err}");
    for method in ["create_project", "set_project"] {
        assert!(stage.asked(method).is_empty());
    }
}

fn status() -> Value {
    let mut status = samples::conductor();
    status.clock_ms = now_ms();
    serde_json::to_value(status).unwrap()
}

fn agent(host: &str) -> Value {
    json!({
        "host": host, "version": env!("CARGO_PKG_VERSION"), "clock_ms": now_ms(),
        "libvirt": {"Ok": samples::inventory()}, "migrations": [], "counters": {},
    })
}

fn automation(evacuate: &str, balance: &str) -> Automation {
    Automation {
        evacuate: evacuate.to_owned(),
        balance: balance.to_owned(),
    }
}

#[tokio::test(start_paused = true)]
async fn the_doctor_finds_nothing_where_all_is_well() {
    let nodes = [samples::node("kvm1"), samples::node("kvm2")];
    let mut drain = samples::drain();
    drain.updated_at_ms = now_ms();
    let mut stage = Stage::with([
        ("get_status", Act::Answer(status())),
        ("get_status", Act::Answer(status())),
        ("list_nodes", answer(&nodes)),
        ("list_migrations", answer(&[samples::running(first())])),
        (
            "list_instances",
            answer(&Vec::<drover_model::api::conductor::Instance>::new()),
        ),
        ("list_operations", answer(&[drain])),
        ("set_automation", answer(&automation("on", "off"))),
    ])
    .await;
    for host in ["kvm1", "kvm2"] {
        let script = Arc::new(Script::default());
        let act = ("get_status", Act::Answer(agent(host)));
        script.acts.lock().unwrap().push_back(act);
        stage.serve("compute", host, script).await;
    }
    assert_eq!(
        stage.run("doctor").await,
        Exit::Done,
        "{}",
        stage.tape.out()
    );
    assert_eq!(stage.last_line(), "all is well");
}

#[tokio::test(start_paused = true)]
async fn the_doctor_names_what_is_wrong_and_asks_all_agents_at_once() {
    let nodes: Vec<_> = (0..20).map(|n| samples::node(&format!("kvm{n}"))).collect();
    let mut stage = Stage::with([
        ("get_status", Act::Answer(status())),
        ("get_status", Act::Answer(status())),
        ("list_nodes", answer(&nodes)),
        (
            "list_migrations",
            answer(&[ended(MigrationStatus::Stuck, None)]),
        ),
        (
            "list_instances",
            answer(&Vec::<drover_model::api::conductor::Instance>::new()),
        ),
        ("list_operations", answer(&Vec::<Operation>::new())),
        ("set_automation", answer(&automation("paused", "off"))),
    ])
    .await;
    for node in &nodes[1..] {
        stage
            .serve("compute", node.host.as_str(), Arc::default())
            .await;
    }
    let began = Instant::now();
    assert_eq!(
        stage.run("doctor --json --agent-timeout 3").await,
        Exit::Failed
    );
    assert!(
        began.elapsed() < Duration::from_secs(8),
        "{:?}",
        began.elapsed()
    );
    let told: Value = serde_json::from_str(&stage.tape.out()).unwrap();
    assert_eq!(told["healthy"], false);
    let findings = told["findings"].as_array().unwrap();
    let failed = |subject: &str, check: &str| {
        findings.iter().any(|f| {
            (f["subject"] == subject && f["check"] == check)
                && (f["level"] == "fail" && f["remedy"].is_string())
        })
    };
    assert!(
        failed("kvm0", "agent") && failed("kvm19", "agent"),
        "{told:#}"
    );
    assert!(failed("migrations", "stuck"), "{told:#}");
}

#[tokio::test(start_paused = true)]
async fn the_doctor_tells_a_missing_conductor_from_a_missing_file() {
    let stage = Stage::empty();
    assert_eq!(stage.run("doctor").await, Exit::Failed);
    let out = stage.tape.out();
    assert!(out.contains("ok    broker"), "{out}");
    assert!(out.contains("FAIL  conductor"), "{out}");

    let tape = Tape::default();
    let trouble = Trouble::usage("cannot read the configuration file /x");
    let args = args::DoctorArgs { agent_timeout: 3 };
    let mut screen = tape.screen(Manner::Plain);
    let exit = doctor::run(&mut screen, Err(trouble), args).await.unwrap();
    assert_eq!(exit, Exit::Failed);
    assert!(
        tape.out()
            .starts_with("FAIL  config  readable  cannot read"),
        "{}",
        tape.out()
    );
}

#[path = "flow_operation_tests.rs"]
mod operations;
