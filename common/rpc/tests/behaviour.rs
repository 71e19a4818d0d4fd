//! What servers and clients promise, on the transport in memory and a paused clock.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use drover_rpc::{
    CallOptions, Endpoint, ErrorClass, MessagingSettings, RemoteFailure, Request, RequestContext,
    RpcClient, RpcError, RpcServer, Target, Transport,
    memory::{Faults, MemoryBroker},
    transport::{Address, Subscription},
};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

/// Counts runs by unique id, and how many run at once.
#[derive(Default)]
struct Log {
    runs: Mutex<HashMap<String, usize>>,
    running: AtomicUsize,
    most: AtomicUsize,
}

impl Log {
    fn count(&self, id: String) {
        let mut runs = self.runs.lock().expect("no holder panics");
        *runs.entry(id).or_default() += 1;
    }
}

struct Worker(Arc<Log>);

#[async_trait]
impl Endpoint for Worker {
    fn methods(&self) -> &[&str] {
        &[
            "echo",
            "sleep",
            "accept_and_sleep",
            "panic",
            "typed",
            "stumble",
        ]
    }

    async fn handle(&self, request: Request) -> Result<Value, RemoteFailure> {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Typed {
            disks: Vec<Disk>,
        }
        #[derive(serde::Deserialize)]
        struct Disk {
            size_gb: u32,
        }
        let id = request.unique_id().unwrap_or_default().to_owned();
        self.0.count(id.clone());
        let now = self.0.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.most.fetch_max(now, Ordering::SeqCst);
        let outcome = match request.method() {
            "panic" => panic!("on\npurpose"),
            // Trouble that passes after so many tries.
            "stumble" => {
                let tries = self.0.runs.lock().expect("no holder panics")[&id];
                let times = request.args_map()?["times"].as_u64().unwrap_or_default();
                match tries as u64 > times {
                    true => Ok(Value::Null),
                    false => Err(RemoteFailure::runtime_error("the database failed").passing()),
                }
            }
            "typed" => request.args::<Typed>().map(|typed| {
                typed
                    .disks
                    .iter()
                    .map(|disk| disk.size_gb)
                    .sum::<u32>()
                    .into()
            }),
            method => {
                if method == "accept_and_sleep" {
                    request.accept().await;
                }
                let args = request.args_map()?;
                let seconds = args.get("seconds").and_then(Value::as_f64);
                sleep(Duration::from_secs_f64(seconds.unwrap_or_default())).await;
                Ok(args.into())
            }
        };
        self.0.running.fetch_sub(1, Ordering::SeqCst);
        outcome
    }
}

struct Rig {
    broker: MemoryBroker,
    settings: MessagingSettings,
    client: RpcClient,
    caller: Arc<dyn Transport>,
    log: Arc<Log>,
}

fn rig(settings: MessagingSettings) -> Rig {
    seeded_rig(0, settings)
}

fn seeded_rig(seed: u64, settings: MessagingSettings) -> Rig {
    let broker = MemoryBroker::new(seed, Faults::default());
    let caller = broker.transport("caller");
    Rig {
        client: RpcClient::new(caller.clone(), &settings),
        broker,
        settings,
        caller,
        log: Arc::default(),
    }
}

fn target() -> Target {
    Target::topic("work").version("1.0")
}

impl Rig {
    async fn server(&self, node: &str) -> (RpcServer, Arc<dyn Transport>) {
        let transport = self.broker.transport(node);
        let server = RpcServer::builder(transport.clone(), &self.settings, "work", node)
            .endpoint(Worker(self.log.clone()))
            .start();
        (server.await.expect("the names are right"), transport)
    }

    async fn call(&self, method: &str, args: Value) -> Result<Value, RpcError> {
        self.call_with(method, args, CallOptions::default()).await
    }

    async fn call_with(
        &self,
        method: &str,
        args: Value,
        options: CallOptions,
    ) -> Result<Value, RpcError> {
        let context = RequestContext::new();
        self.client
            .call_with(&target(), &context, method, &args, options)
            .await
    }

    async fn cast(&self, method: &str, args: Value) {
        let context = RequestContext::new();
        let sent = self.client.cast(&target(), &context, method, &args).await;
        sent.expect("the broker is there");
    }

    fn runs(&self) -> Vec<usize> {
        let runs = self.log.runs.lock().expect("no holder panics");
        runs.values().copied().collect()
    }
}

fn seconds(timeout: u64) -> CallOptions {
    CallOptions {
        timeout: Some(Duration::from_secs(timeout)),
        ..CallOptions::default()
    }
}

#[tokio::test(start_paused = true)]
async fn a_panicking_handler_answers_and_serves_on() {
    let rig = rig(MessagingSettings::default());
    let (server, transport) = rig.server("a").await;
    let error = rig.call("panic", json!({})).await.unwrap_err();
    assert_eq!(error.failure().unwrap().class, "RuntimeError");
    assert_eq!(transport.stats().snapshot().handler_panics, 1);
    assert_eq!(
        rig.call("echo", json!({"a": 1})).await.unwrap(),
        json!({"a": 1})
    );
    server.stop(Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn wrong_arguments_are_refused_with_their_place() {
    let rig = rig(MessagingSettings::default());
    let _server = rig.server("a").await;
    let good = rig.call("typed", json!({"disks": [{"size_gb": 2}, {"size_gb": 3}]}));
    assert_eq!(good.await.unwrap(), json!(5));
    for (args, place) in [
        (
            json!({"disks": [{"size_gb": 1}, {"size_gb": "two"}]}),
            "disks[1].size_gb",
        ),
        (json!({"disks": [], "more": 1}), "more"),
        (json!({}), "disks"),
        (json!({"disks": [{"size_gb": -1}]}), "disks[0].size_gb"),
    ] {
        let error = rig.call("typed", args).await.unwrap_err();
        let failure = error.failure().unwrap();
        assert_eq!(failure.class, "TypeError");
        assert!(failure.message.contains(place), "{failure}");
    }
}

#[tokio::test(start_paused = true)]
async fn arguments_that_are_no_object_are_not_sent() {
    let rig = rig(MessagingSettings::default());
    let error = rig.call("echo", json!([1])).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Bug);
    let context = RequestContext::new();
    let all = target().fanout();
    let outcome: Result<Value, _> = rig.client.call(&all, &context, "echo", &json!({})).await;
    assert_eq!(outcome.unwrap_err().class(), ErrorClass::Bug);
}

#[tokio::test(start_paused = true)]
async fn handlers_that_run_are_bounded_even_when_all_accepted_early() {
    let rig = Arc::new(rig(MessagingSettings {
        max_running_requests: 3,
        ..MessagingSettings::default()
    }));
    let (server, _) = rig.server("a").await;
    for _ in 0..20 {
        rig.cast("accept_and_sleep", json!({"seconds": 1})).await;
    }
    sleep(Duration::from_secs(30)).await;
    assert_eq!(rig.log.most.load(Ordering::SeqCst), 3);
    assert_eq!(rig.runs(), vec![1; 20]);
    server.stop(Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn a_request_whose_caller_gave_up_while_it_waited_is_not_run() {
    let rig = rig(MessagingSettings {
        max_running_requests: 1,
        ..MessagingSettings::default()
    });
    let (_server, transport) = rig.server("a").await;
    rig.cast("sleep", json!({"seconds": 5})).await;
    let error = rig
        .call_with("echo", json!({}), seconds(2))
        .await
        .unwrap_err();
    assert_eq!(error.class(), ErrorClass::Lost);
    sleep(Duration::from_secs(10)).await;
    assert_eq!(transport.stats().snapshot().requests_expired, 1);
    assert_eq!(rig.runs().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn calls_that_wait_are_bounded() {
    let rig = Arc::new(rig(MessagingSettings {
        max_waiting_calls: 2,
        ..MessagingSettings::default()
    }));
    let _server = rig.server("a").await;
    let waiting: Vec<_> = (0..2)
        .map(|_| {
            let rig = rig.clone();
            tokio::spawn(async move { rig.call("sleep", json!({"seconds": 1})).await })
        })
        .collect();
    sleep(Duration::from_millis(100)).await;
    let error = rig.call("echo", json!({})).await.unwrap_err();
    assert!(matches!(error, RpcError::TooManyCalls { limit: 2, .. }));
    for call in waiting {
        call.await.unwrap().unwrap();
    }
    assert_eq!(rig.client.in_flight(), 0);
    rig.call("echo", json!({})).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_monitored_call_ends_when_its_server_falls_silent() {
    let rig = Arc::new(rig(MessagingSettings::default()));
    let _server = rig.server("a").await;
    let options = CallOptions {
        timeout: Some(Duration::from_secs(600)),
        monitor_timeout: Some(Duration::from_secs(4)),
        mandatory: false,
    };
    let long = rig
        .call_with("sleep", json!({"seconds": 60}), options)
        .await;
    assert_eq!(long.unwrap(), json!({"seconds": 60}));
    let started = Instant::now();
    let calling = rig.clone();
    let call = tokio::spawn(async move {
        calling
            .call_with("sleep", json!({"seconds": 60}), options)
            .await
    });
    sleep(Duration::from_secs(10)).await;
    rig.broker.cut("a");
    let error = call.await.unwrap().unwrap_err();
    assert!(matches!(error, RpcError::PeerSilent { .. }), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(16));
}

#[tokio::test(start_paused = true)]
async fn what_a_cut_off_server_had_not_accepted_runs_elsewhere() {
    let rig = rig(MessagingSettings::default());
    let (_a, _) = rig.server("a").await;
    rig.cast("sleep", json!({"seconds": 60})).await;
    rig.cast("accept_and_sleep", json!({"seconds": 60})).await;
    sleep(Duration::from_secs(1)).await;
    let (_b, _) = rig.server("b").await;
    rig.broker.cut("a");
    sleep(Duration::from_secs(1)).await;
    let mut runs = rig.runs();
    runs.sort_unstable();
    assert_eq!(runs, [1, 2], "the accepted one stays, the other goes to b");
}

#[tokio::test(start_paused = true)]
async fn a_reply_reaches_a_caller_that_was_cut_off_meanwhile() {
    let rig = Arc::new(rig(MessagingSettings::default()));
    let _server = rig.server("a").await;
    let calling = rig.clone();
    let call = tokio::spawn(async move {
        calling
            .call("accept_and_sleep", json!({"seconds": 5}))
            .await
    });
    sleep(Duration::from_secs(1)).await;
    rig.broker.cut("caller");
    sleep(Duration::from_secs(10)).await;
    rig.broker.heal("caller");
    assert!(call.await.unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_is_cut_off_is_told_and_may_ask_again() {
    let rig = rig(MessagingSettings::default());
    let _server = rig.server("a").await;
    rig.call("echo", json!({})).await.unwrap();
    rig.broker.cut("caller");
    let error = rig.call("echo", json!({})).await.unwrap_err();
    assert!(matches!(error, RpcError::NotSent { .. }));
    assert_eq!(error.class(), ErrorClass::Retryable);
    rig.broker.heal("caller");
    rig.call("echo", json!({})).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn whatever_is_lost_doubled_or_overtaken_each_request_runs_once() {
    for seed in 0..10 {
        let rig = Arc::new(seeded_rig(seed, MessagingSettings::default()));
        let (server, transport) = rig.server("a").await;
        rig.call("echo", json!({})).await.unwrap(); // the reply queue is there
        rig.broker.set_faults(Faults {
            delay_min: Duration::from_millis(1),
            delay_max: Duration::from_millis(500),
            loss: 0.1,
            duplication: 0.3,
            reordering: 0.5,
        });
        let calls: Vec<_> = (0..50)
            .map(|n| {
                let rig = rig.clone();
                tokio::spawn(
                    async move { rig.call_with("echo", json!({"n": n}), seconds(60)).await },
                )
            })
            .collect();
        for (n, call) in calls.into_iter().enumerate() {
            match call.await.unwrap() {
                Ok(value) => assert_eq!(value, json!({"n": n})),
                Err(error) => assert_eq!(error.class(), ErrorClass::Lost, "{error:?}"),
            }
        }
        assert!(rig.runs().iter().all(|runs| *runs == 1), "{:?}", rig.runs());
        assert!(transport.stats().snapshot().duplicates_dropped > 0);
        assert_eq!(rig.client.in_flight(), 0);
        server.stop(Duration::from_secs(5)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn stopping_lets_running_requests_finish_and_leaves_the_rest() {
    let rig = Arc::new(rig(MessagingSettings::default()));
    let (server, _) = rig.server("a").await;
    let calling = rig.clone();
    let call = tokio::spawn(async move { calling.call("sleep", json!({"seconds": 3})).await });
    sleep(Duration::from_secs(1)).await;
    server.stop(Duration::from_secs(30)).await;
    assert!(call.await.unwrap().is_ok());
    rig.cast("echo", json!({})).await;
    let topic = "work".to_owned();
    assert_eq!(rig.broker.queued(&Address::Topic { topic }), 1);
    let (_b, _) = rig.server("b").await;
    sleep(Duration::from_secs(1)).await;
    assert_eq!(rig.runs().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn junk_is_counted_answered_where_possible_and_never_comes_again() {
    let rig = rig(MessagingSettings {
        max_message_bytes: 10_000,
        ..MessagingSettings::default()
    });
    let (_server, transport) = rig.server("a").await;
    let replies = Arc::new(Mutex::new(Vec::new()));
    let log = replies.clone();
    let _listening = rig
        .caller
        .listen(
            Subscription::Replies {
                queue: "reply_x".to_owned(),
            },
            Arc::new(move |message| {
                log.lock()
                    .unwrap()
                    .push(String::from_utf8(message.body).unwrap());
            }),
        )
        .unwrap();
    let topic = Address::Topic {
        topic: "work".to_owned(),
    };
    let json_type = Some("application/json");
    let inject = |body: &str| rig.broker.inject(&topic, body, json_type);
    inject("{nope");
    inject("\n\u{1b}[31mERROR forged");
    inject(&format!(r#"{{"method": "{}"}}"#, "x".repeat(20_000)));
    inject(r#"{"method": "echo", "args": {}, "_msg_id": "a"}"#);
    rig.broker.inject(&topic, "{}", Some("text/plain"));
    rig.broker.inject(&topic, "{}", None);
    for answered in [
        r#"{"method": "echo", "args": {"x": NaN}, "_msg_id": "1", "_reply_q": "reply_x"}"#,
        r#"{"method": "echo", "args": {"x": [-Infinity, "NaN"]}, "_msg_id": "2", "_reply_q": "reply_x"}"#,
        r#"{"method": "echo", "args": {"x": "\ud800"}, "_msg_id": "3", "_reply_q": "reply_x"}"#,
        r#"{"method": "typed", "args": {"disks": [{"size_gb": 1180591620717411303424}]}, "_msg_id": "4", "_reply_q": "reply_x"}"#,
        r#"{"method": 7, "args": {}, "_msg_id": "5", "_reply_q": "reply_x"}"#,
        r#"{"method": "echo", "args": [], "_msg_id": "6", "_reply_q": "reply_x"}"#,
        r#"{"method": "echo", "args": {"x": NaN}, "_msg_id": "a", "_msg_id": "6b", "_reply_q": "reply_x"}"#,
        r#"{"method": "echo", "_context_x": "\udc00", "_msg_id": "7", "_reply_q": "reply_x"}"#,
    ] {
        inject(answered);
    }
    let deep = format!(
        r#"{{"method": "echo", "args": {{"x": {}{}}}, "_msg_id": "8", "_reply_q": "reply_x"}}"#,
        "[".repeat(2000),
        "]".repeat(2000)
    );
    inject(&deep);
    let sender = r#""_msg_id": "9", "_reply_q": "reply_x""#;
    inject(&format!(
        r#"{{"method": "{}", {sender}}}"#,
        "x".repeat(20_000)
    ));
    inject(&format!(
        r#"{{"oslo.version": "2.0", "oslo.message": {{"method": "echo", {sender}}}}}"#
    ));
    sleep(Duration::from_secs(5)).await;
    let seen = transport.stats().snapshot();
    assert_eq!(seen.messages_oversized, 2, "{seen:?}");
    assert_eq!(seen.messages_unsupported, 2, "{seen:?}");
    assert_eq!(seen.requests_unanswerable, 1, "{seen:?}");
    assert_eq!(seen.handler_panics, 0);
    let replies = replies.lock().unwrap().clone();
    assert_eq!(replies.len(), 11, "{replies:?}");
    assert!(
        replies.iter().all(|reply| reply.contains("Error")),
        "{replies:?}"
    );
    assert_eq!(rig.broker.queued(&topic), 0);
    rig.call("echo", json!({"still": "here"})).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_missing_reply_queue_is_tried_again_until_it_is_there() {
    let rig = rig(MessagingSettings::default());
    let _server = rig.server("a").await;
    let topic = Address::Topic {
        topic: "work".to_owned(),
    };
    let request = r#"{"method": "echo", "args": {}, "_msg_id": "1", "_reply_q": "reply_late"}"#;
    rig.broker.inject(&topic, request, Some("application/json"));
    sleep(Duration::from_secs(10)).await;
    let (sent, mut received) = tokio::sync::mpsc::channel(1);
    let sink = move |message: drover_rpc::transport::Incoming| sent.try_send(message.body).unwrap();
    let queue = "reply_late".to_owned();
    let _listening = rig
        .caller
        .listen(Subscription::Replies { queue }, Arc::new(sink))
        .unwrap();
    assert!(received.recv().await.is_some());
}

#[tokio::test(start_paused = true)]
async fn a_queue_tells_its_consumers() {
    let rig = rig(MessagingSettings::default());
    let count = async |server: &str| {
        let asked = rig.client.consumers("work", server, Duration::from_secs(5));
        asked.await
    };
    assert_eq!(count("a").await, Ok(None), "nobody has made the queue");
    let (server, _) = rig.server("a").await;
    assert_eq!(count("a").await, Ok(Some(1)));
    assert_eq!(count("b").await, Ok(None), "of another there is none");
    rig.broker.cut("a");
    assert_eq!(
        count("a").await,
        Ok(Some(0)),
        "the queue outlives its consumer"
    );
    rig.broker.heal("a");
    assert_eq!(count("a").await, Ok(Some(1)));
    server.stop(Duration::from_secs(5)).await;
    assert_eq!(count("a").await, Ok(Some(0)));
    rig.broker.cut("caller");
    count("a")
        .await
        .expect_err("whoever is cut off cannot tell");
}

#[tokio::test(start_paused = true)]
async fn a_cast_that_meets_passing_trouble_comes_again_until_it_is_done() {
    let rig = rig(MessagingSettings::default());
    let (_server, transport) = rig.server("a").await;
    rig.cast("stumble", json!({"times": 4})).await;
    sleep(Duration::from_secs(1)).await;
    assert!(rig.runs()[0] < 4, "it is not hammered");
    sleep(Duration::from_secs(60)).await;
    assert_eq!(rig.runs(), [5]);
    let seen = transport.stats().snapshot();
    assert_eq!((seen.casts_requeued, seen.casts_lost), (4, 0), "{seen:?}");
    assert_eq!(seen.requests_succeeded, 1);
}

#[tokio::test(start_paused = true)]
async fn a_cast_that_never_succeeds_is_given_up_and_does_not_hold_up_others() {
    let rig = rig(MessagingSettings::default());
    let (_server, transport) = rig.server("a").await;
    rig.cast("stumble", json!({"times": 1000})).await;
    sleep(Duration::from_secs(2)).await;
    rig.call("echo", json!({})).await.unwrap();
    sleep(Duration::from_secs(3600)).await;
    let seen = transport.stats().snapshot();
    assert_eq!((seen.casts_requeued, seen.casts_lost), (9, 1), "{seen:?}");
    let topic = "work".to_owned();
    assert_eq!(rig.broker.queued(&Address::Topic { topic }), 0);
}

#[tokio::test(start_paused = true)]
async fn a_cast_that_is_tried_again_survives_its_server() {
    let rig = rig(MessagingSettings::default());
    let (_a, _) = rig.server("a").await;
    rig.cast("stumble", json!({"times": 3})).await;
    sleep(Duration::from_secs(1)).await;
    rig.broker.cut("a");
    let (_b, _) = rig.server("b").await;
    sleep(Duration::from_secs(60)).await;
    assert_eq!(rig.runs(), [4]);
}

#[tokio::test(start_paused = true)]
async fn a_call_is_told_of_passing_trouble_at_once() {
    let rig = rig(MessagingSettings::default());
    let _server = rig.server("a").await;
    let error = rig.call("stumble", json!({"times": 1})).await.unwrap_err();
    assert_eq!(error.failure().unwrap().class, "RuntimeError");
    sleep(Duration::from_secs(60)).await;
    assert_eq!(rig.runs(), [1]);
}

#[tokio::test(start_paused = true)]
async fn what_waited_too_long_in_its_queue_is_not_served() {
    let rig = rig(MessagingSettings::default());
    let (server, _) = rig.server("a").await;
    server.stop(Duration::from_secs(1)).await;
    let (context, lasts) = (RequestContext::new(), Some(Duration::from_secs(30)));
    let (target, none) = (target(), json!({}));
    let sent = rig
        .client
        .cast_within(&target, &context, "echo", &none, lasts);
    sent.await.unwrap();
    // A call lasts no longer than its caller bears silence.
    let options = CallOptions {
        timeout: Some(Duration::from_secs(600)),
        monitor_timeout: Some(Duration::from_secs(20)),
        mandatory: false,
    };
    let error = rig.call_with("echo", json!({}), options).await.unwrap_err();
    assert!(matches!(error, RpcError::PeerSilent { .. }), "{error:?}");
    sleep(Duration::from_secs(30)).await;
    let _server = rig.server("b").await;
    sleep(Duration::from_secs(5)).await;
    assert_eq!(rig.runs(), [0; 0], "neither was served");
}
