//! With a real oslo.messaging at the other end: an unmodified Python client
//! calls a Drover server, and a Drover client an unmodified Python server. Last,
//! a Python frontend with Nova's arguments has the conductor move a real guest.
//!
//! Needs a broker (`DROVER_TEST_AMQP_URL`), the last one a devstack, and Python, into whose virtualenv
//! (`DROVER_TEST_VENV`, or one below `target/`) oslo.messaging is installed.
//! Without a broker the tests say so and are skipped, unless
//! `DROVER_REQUIRE_REAL=1`.

use std::{path::Path, process::Stdio, sync::Arc, time::Duration};

use async_trait::async_trait;
use drover_rpc::{
    AmqpTransport, CallOptions, Endpoint, ErrorClass, MessagingSettings, NOVA_MODULE,
    RemoteFailure, Request, RequestContext, RpcClient, RpcError, RpcServer, Target, Transport,
};
use drover_tests::devstack::Devstack;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    sync::mpsc,
    time::{Instant, sleep, timeout},
};

/// Longer than anything here takes, on a busy machine too.
const LIMIT: Duration = Duration::from_secs(60);

/// One test's corner of the broker.
struct Rig {
    url: String,
    settings: MessagingSettings,
    transport: Arc<dyn Transport>,
    topic: String,
}

impl Rig {
    fn new() -> Option<Self> {
        let url = match std::env::var("DROVER_TEST_AMQP_URL") {
            Ok(url) if !url.is_empty() => url,
            _ if std::env::var("DROVER_REQUIRE_REAL").as_deref() == Ok("1") => {
                panic!("DROVER_REQUIRE_REAL=1, and DROVER_TEST_AMQP_URL names no broker")
            }
            _ => {
                eprintln!("SKIPPED: needs a real broker, set DROVER_TEST_AMQP_URL");
                return None;
            }
        };
        let name = format!("drover-interop-{:016x}", fastrand::u64(..));
        let settings = MessagingSettings {
            control_exchange: name.clone(),
            ..MessagingSettings::with_url(url.as_str())
        };
        let transport = AmqpTransport::new(&settings).expect("DROVER_TEST_AMQP_URL is usable");
        Some(Self {
            url,
            settings,
            transport,
            topic: name,
        })
    }

    /// A Python peer in a role, once it is ready.
    async fn python(&self, role: &[&str]) -> Peer {
        let exchange = self.settings.control_exchange.as_str();
        Peer::start(&[&[self.url.as_str(), exchange], role].concat()).await
    }
}

/// A Python process that answers a line with a line.
struct Peer {
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    _process: Child,
}

impl Peer {
    async fn start(args: &[&str]) -> Self {
        let mut process = Command::new(python().await)
            .args(["-W", "ignore"])
            .arg(directory().join("peer.py"))
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the virtualenv has a Python");
        let output = process.stdout.take().expect("its output is a pipe");
        let mut peer = Self {
            input: process.stdin.take().expect("its input is a pipe"),
            output: BufReader::new(output).lines(),
            _process: process,
        };
        assert_eq!(peer.line().await, "READY");
        peer
    }

    async fn line(&mut self) -> String {
        timeout(LIMIT, self.output.next_line())
            .await
            .expect("the Python peer answers in time")
            .expect("its output is text")
            .expect("the Python peer is alive")
    }

    /// Has the client do something and gives what came of it.
    async fn ask(&mut self, order: Value) -> Value {
        let order = format!("{order}\n");
        let sent = self.input.write_all(order.as_bytes()).await;
        sent.expect("the Python peer is alive");
        serde_json::from_str(&self.line().await).expect("an outcome is JSON")
    }
}

fn directory() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/interop"))
}

async fn python() -> String {
    let venv = std::env::var("DROVER_TEST_VENV").unwrap_or_else(|_| {
        let beside = directory().join("../../target/oslo-venv");
        beside.to_string_lossy().into_owned()
    });
    let made = Command::new(directory().join("venv.sh")).arg(venv).output();
    let made = made.await.expect("there is a shell");
    let trouble = String::from_utf8_lossy(&made.stderr).into_owned();
    assert!(made.status.success(), "no virtualenv: {trouble}");
    String::from_utf8_lossy(&made.stdout).trim().to_owned()
}

/// What a Drover service looks like to Python.
struct Service {
    casts: mpsc::Sender<Value>,
}

#[async_trait]
impl Endpoint for Service {
    fn namespace(&self) -> Option<&str> {
        Some("compute_task")
    }

    fn version(&self) -> &str {
        "1.25"
    }

    fn methods(&self) -> &[&str] {
        &["echo", "nothing", "precheck", "typed", "slow", "note"]
    }

    async fn handle(&self, request: Request) -> Result<Value, RemoteFailure> {
        #[derive(serde::Deserialize)]
        struct Typed {
            count: u32,
        }
        request.accept().await;
        let args = request.args_map()?;
        match request.method() {
            "nothing" => return Ok(Value::Null),
            "precheck" => {
                let text = "Migration pre-check error: no room on kvm2";
                let failure = RemoteFailure::nova("MigrationPreCheckError", text);
                return Err(failure.with_kwarg("reason", "no room on kvm2"));
            }
            "typed" => return Ok(request.args::<Typed>()?.count.into()),
            "slow" => sleep(Duration::from_secs(3)).await,
            "note" => {
                let sent = self.casts.send(args.into()).await;
                sent.expect("the test waits for it");
                return Ok(Value::Null);
            }
            _ => {}
        }
        Ok(json!({"args": args, "user": request.context().user_id()}))
    }
}

#[tokio::test]
async fn a_python_client_calls_a_drover_server() {
    let Some(rig) = Rig::new() else { return };
    let (casts, mut noted) = mpsc::channel(4);
    let server = RpcServer::builder(rig.transport.clone(), &rig.settings, &rig.topic, "ctl")
        .endpoint(Service { casts })
        .ping()
        .start()
        .await
        .expect("the names are right");
    let mut python = rig.python(&["client"]).await;
    let order = |op: &str, method: &str, args: Value| {
        json!({"op": op, "topic": rig.topic, "namespace": "compute_task", "version": "1.20",
               "method": method, "args": args, "context": {"user_id": "u-1", "roles": ["admin"]}})
    };

    // Results.
    let args = json!({"text": "ünï ☃ 😀", "list": [1, 2.5, null, true]});
    let got = python.ask(order("call", "echo", args.clone())).await;
    assert_eq!(got["returned"], json!({"args": args, "user": "u-1"}));
    let got = python.ask(order("call", "nothing", json!({}))).await;
    assert_eq!(got, json!({"returned": null}));

    // Nova's exception is raised as its own class.
    let got = python.ask(order("call", "precheck", json!({}))).await;
    let class = "nova.exception_Remote.MigrationPreCheckError_Remote";
    assert_eq!(got["raised"], class, "{got}");
    let bases = got["bases"].as_array().expect("bases");
    assert!(bases.contains(&json!("nova.exception.MigrationPreCheckError")));
    assert_eq!(got["kwargs"]["reason"], "no room on kvm2");

    // Wrong arguments, methods and versions are answered as Python answers them.
    let got = python
        .ask(order("call", "typed", json!({"count": "many"})))
        .await;
    assert_eq!(got["raised"], "builtins.TypeError", "{got}");
    let text = got["text"].as_str().expect("a text");
    assert!(text.contains("count"), "says where: {text}");
    let got = python.ask(order("call", "nonsense", json!({}))).await;
    assert_eq!(got["exc_type"], "NoSuchMethod", "{got}");
    let mut newer = order("call", "echo", json!({}));
    newer["version"] = json!("1.26");
    assert_eq!(python.ask(newer).await["exc_type"], "UnsupportedVersion");
    let ping = json!({"op": "call", "topic": rig.topic, "method": "oslo_rpc_server_ping"});
    assert_eq!(python.ask(ping).await["returned"], "pong");

    // A monitored call outlasts its monitor's patience thanks to heartbeats.
    let mut slow = order("call", "slow", json!({}));
    slow["timeout"] = json!(20);
    slow["monitor"] = json!(2);
    let got = python.ask(slow).await;
    assert!(got["returned"].is_object(), "{got}");
    assert!(rig.transport.stats().snapshot().heartbeats_sent >= 2);

    // Casts to the topic, to the server and to all.
    for (op, server) in [("cast", None), ("cast", Some("ctl")), ("fanout", None)] {
        let mut note = order(op, "note", json!({"op": op, "server": server}));
        note["server"] = json!(server);
        assert_eq!(python.ask(note).await, json!({"returned": null}));
        let arrived = timeout(LIMIT, noted.recv())
            .await
            .expect("the cast arrives");
        assert_eq!(arrived, Some(json!({"op": op, "server": server})));
    }
    server.stop(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_drover_client_calls_a_python_server() {
    let Some(rig) = Rig::new() else { return };
    let _python = rig.python(&["server", &rig.topic, "kvm1"]).await;
    let client = RpcClient::new(rig.transport.clone(), &rig.settings);
    let target = Target::topic(&rig.topic).server("kvm1").version("1.2");
    let context = RequestContext::new()
        .with("user_id", "u-1")
        .with("roles", json!(["admin"]));
    let call = async |method: &str, args: Value, options: CallOptions| -> Result<Value, RpcError> {
        client
            .call_with(&target, &context, method, &args, options)
            .await
    };
    let plain = CallOptions::default();

    // Results.
    let args = json!({"text": "ünï ☃ 😀", "big": "x".repeat(200_000)});
    let echo = call("echo", args.clone(), plain).await.expect("an echo");
    assert_eq!(echo["args"], args);
    assert_eq!(
        echo["context"],
        json!({"user_id": "u-1", "roles": ["admin"]})
    );
    let nothing = call("nothing", json!({}), plain).await.expect("nothing");
    assert_eq!(nothing, Value::Null);

    // Failures, Python's own and Nova's.
    let failed = async |method: &str, args: Value| {
        let error = call(method, args, plain).await.expect_err("it fails");
        error.failure().expect("the peer's exception").clone()
    };
    let failure = failed("precheck", json!({"reason": "no"})).await;
    assert!(failure.is(NOVA_MODULE, "MigrationPreCheckError"));
    assert_eq!(failure.kwargs["reason"], "no");
    assert!(!failure.traceback.is_empty());
    let failure = failed("value_error", json!({})).await;
    assert_eq!(failure.args, [json!("bad value"), json!(42)]);
    assert_eq!(failed("nonsense", json!({})).await.class, "NoSuchMethod");
    assert_eq!(failed("precheck", json!({})).await.class, "TypeError");

    // Timeouts and monitored calls.
    let impatient = CallOptions {
        timeout: Some(Duration::from_millis(300)),
        ..plain
    };
    let late = call("slow", json!({"seconds": 1.0}), impatient).await;
    assert_eq!(late.expect_err("too late").class(), ErrorClass::Lost);
    let monitored = CallOptions {
        timeout: Some(Duration::from_secs(20)),
        monitor_timeout: Some(Duration::from_secs(2)),
        ..plain
    };
    let done = call("slow", json!({"seconds": 3.5}), monitored).await;
    assert_eq!(done.expect("heartbeats keep it"), "done");

    // Namespaces, casts and fanout.
    let task = Target::topic(&rig.topic)
        .namespace("compute_task")
        .version("1.20");
    let answer: Value = client
        .call(&task, &context, "migrate_server", &json!({"live": true}))
        .await
        .expect("an answer");
    assert_eq!(answer, json!({"live": true}));
    for target in [&target, &Target::topic(&rig.topic).fanout().version("1.2")] {
        let args = json!({"what": target.to_string()});
        let sent = client.cast(target, &context, "note", &args).await;
        sent.expect("the broker takes it");
    }
    let give_up = Instant::now() + LIMIT;
    loop {
        let notes = call("notes", json!({}), plain).await.expect("the notes");
        if notes.as_array().is_some_and(|notes| notes.len() == 2) {
            break;
        }
        assert!(Instant::now() < give_up, "only {notes} arrived");
        sleep(Duration::from_millis(20)).await;
    }
    client.close().await;
}

/// A request as Nova's own RPC class put it on the wire.
fn captured(name: &str) -> Value {
    let path = directory().join(format!("../wire-vectors/{name}.json"));
    let text = std::fs::read_to_string(path).expect("the captured message is there");
    let whole: Value = serde_json::from_str(&text).expect("JSON");
    whole["decoded"]["message"].clone()
}

#[tokio::test]
async fn a_python_frontend_has_the_conductor_move_a_guest() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest("vm24");
    let uuid = guest.uuid();
    let mut python = frontend().await;
    let order = |method: &str, args: Value| {
        json!({"op": "call", "topic": "conductor", "namespace": "drover", "version": "1.0",
               "method": method, "args": args, "context": {"user_id": "u-1", "roles": ["admin"]}})
    };

    // A result.
    let found = python
        .ask(order("get_instance", json!({"instance": "vm24"})))
        .await;
    assert_eq!(found["returned"]["uuid"], uuid.as_str(), "{found}");
    assert_eq!(found["returned"]["host"], "kvm1", "{found}");

    // Nova's exceptions are raised as its own classes, with every check in them.
    let unknown = json!({"instance": "nobody", "dry_run": true});
    let refused = python.ask(order("migrate_instance", unknown)).await;
    let class = "nova.exception_Remote.InstanceNotFound_Remote";
    assert_eq!(refused["raised"], class, "{refused}");
    let nowhere = json!({"instance": uuid, "host": "kvm1"});
    let refused = python.ask(order("migrate_instance", nowhere)).await;
    let class = "nova.exception_Remote.UnableToMigrateToSelf_Remote";
    assert_eq!(refused["raised"], class, "{refused}");
    assert_eq!(refused["kwargs"]["checks"][0]["code"], "same_host");

    // A cast as Nova's frontends send it; the guest moves.
    let nova = captured("nova_live_migrate_instance");
    let mut args = nova["args"].clone();
    args["instance"]["nova_object.data"]["uuid"] = json!(uuid);
    args["scheduler_hint"]["host"] = json!("kvm2");
    let cast = json!({"op": "cast", "topic": "conductor", "namespace": nova["namespace"],
                      "version": nova["version"], "method": nova["method"], "args": args,
                      "context": {"request_id": "req-interop", "user_id": "u-1"}});
    assert_eq!(python.ask(cast).await, json!({"returned": null}));
    let ended = followed(&mut python, order, &uuid).await;
    assert_eq!(ended["status"], "completed", "{ended:#}");
    assert_eq!(ended["requester"]["request_id"], "req-interop");
    assert_eq!(guest.node(), "kvm2");
}

/// A frontend in Python, on the devstack's broker.
async fn frontend() -> Peer {
    let url = std::env::var("DROVER_TEST_AMQP_URL").expect("a devstack has a broker");
    let exchange = MessagingSettings::with_url(url.as_str()).control_exchange;
    Peer::start(&[&url, &exchange, "client"]).await
}

/// What Nova's own RPC class sends, about our guest.
fn as_nova(
    name: &str,
    op: &str,
    topic: &str,
    server: Option<&str>,
    change: impl Fn(&mut Value),
) -> Value {
    let nova = captured(name);
    let mut args = nova["args"].clone();
    change(&mut args);
    json!({"op": op, "topic": topic, "server": server, "namespace": nova["namespace"],
           "version": nova["version"], "method": nova["method"], "args": args,
           "context": {"request_id": "req-interop", "user_id": "u-1"}})
}

#[tokio::test]
async fn a_python_frontend_resizes_confirms_and_reverts() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest("vm25");
    let uuid = guest.uuid();
    let mut python = frontend().await;
    let order = |method: &str, args: Value| {
        json!({"op": "call", "topic": "conductor", "namespace": "drover", "version": "1.0",
               "method": method, "args": args, "context": {"roles": ["admin"]}})
    };
    let size = |host: &str| {
        let info = devstack.ok("on", &[host, "virsh", "dominfo", "vm25"]);
        let of = |name: &str| {
            let line = info.lines().find(|line| line.starts_with(name))?;
            line.split(':')
                .nth(1)?
                .split_whitespace()
                .next()?
                .parse::<u64>()
                .ok()
        };
        (of("CPU(s)"), of("Max memory"))
    };
    let (small, large) = ((Some(1), Some(128 << 10)), (Some(2), Some(160 << 10)));

    // A cast with a changed flavor: a resize.
    let cast = as_nova("nova_migrate_server", "cast", "conductor", None, |args| {
        args["instance"]["nova_object.data"]["uuid"] = json!(uuid);
        args["scheduler_hint"]["host"] = json!("kvm2");
        args["flavor"]["nova_object.data"]["vcpus"] = json!(2);
        args["flavor"]["nova_object.data"]["memory_mb"] = json!(160);
    });
    assert_eq!(python.ask(cast).await, json!({"returned": null}));
    let moved = followed(&mut python, order, &uuid).await;
    assert_eq!(moved["status"], "finished", "{moved:#}");
    assert_eq!(moved["migration_type"], "migration", "{moved:#}");
    assert_eq!(size("kvm2"), large);

    // What is meant has to be the one that waits.
    let about = |id: &Value| {
        let (uuid, id) = (uuid.clone(), id.clone());
        move |args: &mut Value| {
            args["instance"]["nova_object.data"]["uuid"] = json!(uuid);
            args["migration"]["nova_object.data"]["uuid"] = json!(null);
            args["migration"]["nova_object.data"]["id"] = id.clone();
        }
    };
    let stale = as_nova(
        "nova_revert_resize",
        "call",
        "compute",
        Some("kvm2"),
        about(&json!(0)),
    );
    let refused = python.ask(stale).await;
    let class = "oslo_messaging.rpc.client.RemoteError";
    assert_eq!(refused["raised"], class, "{refused}");
    assert_eq!(
        refused["exc_type"], "MigrationNotFoundByStatus",
        "{refused}"
    );

    // Back, with the size it had.
    let revert = as_nova(
        "nova_revert_resize",
        "cast",
        "compute",
        Some("kvm2"),
        about(&moved["id"]),
    );
    assert_eq!(python.ask(revert).await, json!({"returned": null}));
    let reverted = until_status(&mut python, order, &moved, "reverted").await;
    assert_eq!(reverted["status"], "reverted", "{reverted:#}");
    assert_eq!((guest.node().as_str(), size("kvm1")), ("kvm1", small));

    // A call without a clean shutdown, the same flavor: a move; then confirmed.
    let call = as_nova("nova_migrate_server", "call", "conductor", None, |args| {
        args["instance"]["nova_object.data"]["uuid"] = json!(uuid);
        args["scheduler_hint"]["host"] = json!("kvm2");
        args["clean_shutdown"] = json!(false);
    });
    assert_eq!(python.ask(call).await, json!({"returned": null}));
    let moved = followed(&mut python, order, &uuid).await;
    assert_eq!(moved["status"], "finished", "{moved:#}");
    assert_eq!(size("kvm2"), small);
    let confirm = as_nova(
        "nova_confirm_resize",
        "call",
        "compute",
        Some("kvm1"),
        about(&moved["id"]),
    );
    assert_eq!(python.ask(confirm).await, json!({"returned": null}));
    let confirmed = until_status(&mut python, order, &moved, "confirmed").await;
    assert_eq!(confirmed["status"], "confirmed", "{confirmed:#}");
    guest.assert_only_on("kvm2", "running");

    // The same method moves live.
    let live = as_nova("nova_migrate_server", "call", "conductor", None, |args| {
        args["instance"]["nova_object.data"]["uuid"] = json!(uuid);
        args["scheduler_hint"]["host"] = json!("kvm1");
        args["live"] = json!(true);
    });
    assert_eq!(python.ask(live).await, json!({"returned": null}));
    let moved = followed(&mut python, order, &uuid).await;
    assert_eq!(moved["status"], "completed", "{moved:#}");
    assert_eq!(moved["migration_type"], "live-migration", "{moved:#}");
}

#[tokio::test]
async fn a_python_frontend_has_a_guest_of_a_dead_node_started_elsewhere() {
    let Some(devstack) = Devstack::take_three() else {
        return;
    };
    devstack.ok("fences", &["on"]);
    let party = devstack.party("kvm3", &[("shared17", &[]), ("shared18", &[])]);
    let (guest, other) = (party.get("shared17"), party.get("shared18"));
    devstack.until_kept("kvm3", &["shared17", "shared18"]);
    let shown = devstack.json(&["instance", "show", "shared17"]);
    let (uuid, before) = (shown["uuid"].clone(), guest.generation_on("kvm3"));
    let mut python = frontend().await;
    let rebuild = |op: &str, recreate: bool| {
        as_nova("nova_rebuild_instance", op, "conductor", None, |args| {
            args["instance"]["nova_object.data"]["uuid"] = json!(uuid);
            args["recreate"] = json!(recreate);
            args["host"] = json!("kvm2");
        })
    };
    let refused = python.ask(rebuild("call", false)).await;
    assert!(refused["raised"].is_string(), "{refused}");

    devstack.ok("power", &["kvm3", "off"]);
    devstack.json(&["node", "force-down", "kvm3"]);
    assert_eq!(
        python.ask(rebuild("cast", true)).await,
        json!({"returned": null})
    );
    let give_up = Instant::now() + LIMIT;
    let mut operation = Value::Null;
    while operation["finished_at_ms"].is_null() {
        assert!(Instant::now() < give_up, "it never ends: {operation:#}");
        let newest = devstack.json(&["operation", "list", "--limit", "1"])[0].take();
        // Of a cast nobody hears when it has arrived.
        if newest["requester"]["request_id"] == "req-interop" {
            operation = newest;
        }
    }
    assert_eq!(operation["status"], "completed", "{operation:#}");
    assert_eq!(operation["evidence"]["fence"]["fence"], "off");
    assert_eq!(operation["items"].as_array().map(Vec::len), Some(1));
    guest.until_up();
    assert_eq!(guest.node(), "kvm2");
    assert!(guest.generation_on("kvm2") > before);

    devstack.ok("power", &["kvm3", "on"]);
    devstack.json(&["node", "force-down", "kvm3", "--unset"]);
    devstack.until("kvm3 gives it up", || guest.state_on("kvm3").is_none());
    guest.assert_only_on("kvm2", "running");
    other.assert_only_on("kvm3", "shut off");
}

/// The record once it has a status.
async fn until_status(
    python: &mut Peer,
    order: impl Fn(&str, Value) -> Value,
    migration: &Value,
    status: &str,
) -> Value {
    let give_up = Instant::now() + LIMIT;
    let mut record = migration.clone();
    while record["status"] != status {
        assert!(Instant::now() < give_up, "it is never {status}: {record:#}");
        let wait = json!({"migration": record["uuid"], "seen_version": record["version"],
                          "timeout_ms": 5_000});
        record = python.ask(order("wait_migration", wait)).await["returned"].take();
    }
    record
}

/// The record, at its end, of the instance's migration that was not refused.
async fn followed(
    python: &mut Peer,
    order: impl Fn(&str, Value) -> Value,
    instance: &str,
) -> Value {
    let give_up = Instant::now() + LIMIT;
    let mut record = Value::Null;
    while record["finished_at_ms"].is_null() {
        assert!(Instant::now() < give_up, "it never ends: {record:#}");
        let ask = match record["uuid"].as_str() {
            Some(uuid) => {
                let wait = json!({"migration": uuid, "seen_version": record["version"], "timeout_ms": 10_000});
                order("wait_migration", wait)
            }
            None => order("list_migrations", json!({"instance": instance, "limit": 1})),
        };
        let mut answer = python.ask(ask).await["returned"].take();
        let newest = answer.get_mut(0).map(Value::take).unwrap_or(answer);
        // The refusal from before is on record too.
        if newest["requester"]["request_id"] == "req-interop" {
            record = newest;
        }
    }
    record
}
