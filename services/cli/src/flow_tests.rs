//! Whole commands against a scripted conductor, over the in-memory transport:
//! what is asked, what is told, how it ends, whatever is answered or lost.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use drover_model::{
    api::{NAMESPACE, conductor::MigrateAnswer},
    check::{CheckCode, CheckFailure, Side},
    migration::{EndReason, Migration, MigrationStatus},
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
            "abort_migration",
            "force_complete_migration",
            "resume_migration",
            "get_migration",
            "wait_migration",
            "list_migrations",
            "get_instance",
            "list_instances",
            "get_node",
            "list_nodes",
            "set_node",
            "get_status",
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
        err.contains("drover migration list --instance demo-1 --active"),
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

#[tokio::test(start_paused = true)]
async fn the_doctor_finds_nothing_where_all_is_well() {
    let nodes = [samples::node("kvm1"), samples::node("kvm2")];
    let mut stage = Stage::with([
        ("get_status", Act::Answer(status())),
        ("get_status", Act::Answer(status())),
        ("list_nodes", answer(&nodes)),
        ("list_migrations", answer(&[samples::running(first())])),
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
