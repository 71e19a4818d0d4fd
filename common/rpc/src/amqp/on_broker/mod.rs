//! Against a real RabbitMQ, through a wire that can be cut: every failure has to
//! end in an answer or a clear error, and nothing may run twice.

mod support;

use std::time::{Duration, Instant};

use crate::{
    AmqpTransport, CallOptions, ErrorClass, MessagingSettings, Notifier, Priority, RequestContext,
    RpcClient, RpcError, RpcServer, Target, TransportError,
};
use lapin::{
    BasicProperties, ExchangeKind,
    options::{
        BasicGetOptions, BasicPublishOptions, ExchangeDeclareOptions, ExchangeDeleteOptions,
        QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
};
use serde_json::{Value, json};
use support::{Rig, Wire, Worker, soon};

macro_rules! rig {
    () => {
        match Rig::new().await {
            Some(rig) => rig,
            None => return,
        }
    };
}

async fn cast(client: &RpcClient, target: &Target) -> Result<(), RpcError> {
    client.cast(target, &context(), "echo", &json!({})).await
}

fn context() -> RequestContext {
    RequestContext::new().with("request_id", "req-1")
}

#[tokio::test]
async fn a_call_is_answered_with_result_or_failure() {
    let rig = rig!();
    let worker = Worker::default();
    let server = rig.server(&worker).await;
    let client = rig.client();
    let big = "x".repeat(300_000);
    let args = json!({"text": "ünï ☃ 😀 \u{1}\"\\", "big": big});
    let echo: Value = client
        .call(&rig.target(), &context(), "echo", &args)
        .await
        .unwrap();
    assert_eq!(echo, args);
    assert_eq!(
        worker.seen.lock().unwrap()[0].context.request_id(),
        Some("req-1")
    );
    let direct = rig.target().server("host");
    let echo: Value = client
        .call(&direct, &context(), "echo", &json!({}))
        .await
        .unwrap();
    assert_eq!(echo, json!({}));
    for method in ["fail", "panic", "nonsense"] {
        let outcome: Result<Value, RpcError> = client
            .call(&rig.target(), &context(), method, &json!({}))
            .await;
        let error = outcome.unwrap_err();
        let failure = error.failure().unwrap();
        let expected = match method {
            "fail" => "MigrationPreCheckError",
            "panic" => "RuntimeError",
            _ => "NoSuchMethod",
        };
        assert_eq!(failure.class, expected);
    }
    let counted = client_stats(&server, &client);
    assert_eq!(counted, 0, "nothing is left in flight");
    client.close().await;
    server.stop(Duration::from_secs(5)).await;
}

fn client_stats(server: &RpcServer, client: &RpcClient) -> usize {
    server.in_flight().saturating_sub(1) + client.in_flight()
}

#[tokio::test]
async fn a_fanout_reaches_every_server_of_the_topic() {
    let rig = rig!();
    let (one, other) = (Worker::default(), Worker::default());
    let first = rig.server(&one).await;
    let second = rig.server(&other).await;
    rig.client()
        .cast(&rig.target().fanout(), &context(), "echo", &json!({}))
        .await
        .unwrap();
    one.has_seen("echo", 1).await;
    other.has_seen("echo", 1).await;
    first.stop(Duration::from_secs(5)).await;
    second.stop(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn the_properties_are_those_of_oslo() {
    let rig = rig!();
    let (_connection, channel) = rig.channel().await;
    let exchange = ExchangeDeclareOptions {
        auto_delete: true,
        ..Default::default()
    };
    let (name, none) = (rig.topic.as_str(), FieldTable::default);
    channel
        .exchange_declare(name.into(), ExchangeKind::Topic, exchange, none())
        .await
        .unwrap();
    let queue = QueueDeclareOptions {
        auto_delete: true,
        ..Default::default()
    };
    channel
        .queue_declare(name.into(), queue, none())
        .await
        .unwrap();
    channel
        .queue_bind(
            name.into(),
            name.into(),
            name.into(),
            QueueBindOptions::default(),
            none(),
        )
        .await
        .unwrap();
    let options = CallOptions {
        timeout: Some(Duration::from_millis(2500)),
        ..CallOptions::default()
    };
    let client = rig.client();
    let target = rig.target();
    let args = json!({});
    let call = tokio::spawn(async move {
        let outcome: Result<Value, RpcError> = client
            .call_with(&target, &context(), "echo", &args, options)
            .await;
        outcome.unwrap_err()
    });
    let message = soon(async {
        loop {
            let got = channel.basic_get(name.into(), BasicGetOptions { no_ack: true });
            if let Some(message) = got.await.unwrap() {
                return message;
            }
        }
    })
    .await;
    let expected = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_content_encoding("utf-8".into())
        .with_headers(FieldTable::default())
        .with_delivery_mode(2)
        .with_priority(0)
        .with_expiration("2500".into());
    assert_eq!(message.properties, expected);
    assert_eq!(message.exchange.as_str(), name);
    // Nobody answers: the call ends at its timeout, not knowing.
    assert_eq!(call.await.unwrap().class(), ErrorClass::Lost);
}

#[tokio::test]
async fn a_missing_broker_is_waited_for() {
    let mut rig = rig!();
    rig.settings.publish_timeout_s = 1;
    rig.proxy.set(Wire::Cut);
    let client = rig.client();
    let outcome: Result<Value, RpcError> = client
        .call(&rig.target(), &context(), "echo", &json!({}))
        .await;
    let error = outcome.unwrap_err();
    assert!(matches!(error, RpcError::NotSent { .. }), "{error:?}");
    assert_eq!(error.class(), ErrorClass::Retryable);
    let error = cast(&client, &rig.target()).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Retryable);
    let worker = Worker::default();
    let mut starting = Box::pin(rig.server(&worker));
    let early = tokio::time::timeout(Duration::from_millis(500), &mut starting).await;
    assert!(early.is_err(), "started without a broker");
    rig.proxy.set(Wire::Up);
    let server = soon(starting).await;
    rig.call_until_answered(&client).await;
    server.stop(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_call_outlives_a_lost_connection_and_runs_once() {
    let mut rig = rig!();
    rig.settings.amqp_auto_delete = false; // the queue has to survive its consumer
    let worker = Worker::default();
    let transport = rig.transport();
    let server = rig.server_on(transport.clone(), &worker).await;
    let client = rig.client();
    for method in ["hold", "accept_and_hold"] {
        let (caller, target) = (client.clone(), rig.target());
        let call = tokio::spawn(async move {
            let answer: Result<Value, RpcError> = caller
                .call(&target, &context(), method, &json!({"a": 1}))
                .await;
            answer
        });
        worker.has_seen(method, 1).await;
        let made = transport.stats().snapshot().connections_made;
        rig.proxy.set(Wire::Cut);
        rig.proxy.set(Wire::Up);
        if method == "hold" {
            // The unacknowledged request comes again to the handler that still runs.
            soon(async {
                while transport.stats().snapshot().duplicates_dropped == 0 {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            })
            .await;
        }
        worker.go.notify_one();
        assert_eq!(soon(call).await.unwrap().unwrap(), json!({"a": 1}));
        assert_eq!(worker.count(method), 1, "{method} ran once");
        soon(async {
            while transport.stats().snapshot().connections_made == made {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        // Answered means that the server is there again, and its queues.
        rig.call_until_answered(&client).await;
    }
    server.stop(Duration::from_secs(5)).await;
    delete_queues(&rig).await;
}

async fn delete_queues(rig: &Rig) {
    let (_connection, channel) = rig.channel().await;
    for queue in [rig.topic.clone(), format!("{}.host", rig.topic)] {
        let options = QueueDeleteOptions::default();
        channel
            .queue_delete(queue.as_str().into(), options)
            .await
            .unwrap();
    }
    let options = ExchangeDeleteOptions::default();
    channel
        .exchange_delete(rig.topic.as_str().into(), options)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_cast_made_while_the_broker_is_away_arrives_once_it_is_back() {
    let rig = rig!();
    let worker = Worker::default();
    // The server's own wire stays up.
    let mut direct = rig.settings.clone();
    direct.url = rig.url.as_str().into();
    let transport = AmqpTransport::new(&direct).unwrap();
    let server = rig.server_on(transport, &worker).await;
    let client = rig.client();
    let cast = |args| {
        let (client, target) = (client.clone(), rig.target());
        tokio::spawn(async move { client.cast(&target, &context(), "echo", &args).await })
    };
    cast(json!({"n": 1})).await.unwrap().unwrap();
    worker.has_seen("echo", 1).await;
    rig.proxy.set(Wire::Cut);
    let waiting = cast(json!({"n": 2}));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!waiting.is_finished());
    rig.proxy.set(Wire::Up);
    soon(waiting).await.unwrap().unwrap();
    worker.has_seen("echo", 2).await;
    server.stop(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_deleted_queue_is_made_again() {
    let rig = rig!();
    let worker = Worker::default();
    let server = rig.server(&worker).await;
    let client = rig.client();
    rig.call_until_answered(&client).await;
    let (_connection, channel) = rig.channel().await;
    channel
        .queue_delete(rig.topic.as_str().into(), QueueDeleteOptions::default())
        .await
        .unwrap();
    rig.call_until_answered(&client).await;
    server.stop(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_deleted_exchange_is_declared_again_by_the_publisher() {
    let rig = rig!();
    let client = rig.client();
    let fanout = rig.target().fanout();
    client
        .cast(&fanout, &context(), "echo", &json!({}))
        .await
        .unwrap();
    let (_connection, channel) = rig.channel().await;
    let exchange = format!("{}_fanout", rig.topic);
    channel
        .exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default())
        .await
        .unwrap();
    client
        .cast(&fanout, &context(), "echo", &json!({}))
        .await
        .unwrap();
    channel
        .exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_request_that_was_not_accepted_goes_to_another_server_when_one_dies() {
    let mut rig = rig!();
    rig.settings.amqp_auto_delete = false;
    let (first, second) = (Worker::default(), Worker::default());
    let dying = rig.server(&first).await;
    let client = rig.client();
    for method in ["accept_and_hold", "hold"] {
        client
            .cast(&rig.target(), &context(), method, &json!({}))
            .await
            .unwrap();
        first.has_seen(method, 1).await;
    }
    let survivor = rig.server(&second).await;
    drop(dying); // no farewell: as if the process were killed
    second.has_seen("hold", 1).await;
    let seen = second.seen.lock().unwrap().clone();
    assert_eq!(
        seen.len(),
        1,
        "the accepted one stayed where it was: {seen:?}"
    );
    assert!(seen[0].redelivered);
    second.go.notify_one();
    survivor.stop(Duration::from_secs(5)).await;
    delete_queues(&rig).await;
}

#[tokio::test]
async fn nobody_there_is_an_error_at_once_if_asked_for() {
    let rig = rig!();
    let options = CallOptions {
        mandatory: true,
        ..CallOptions::default()
    };
    let before = Instant::now();
    let outcome: Result<Value, RpcError> = rig
        .client()
        .call_with(&rig.target(), &context(), "echo", &json!({}), options)
        .await;
    let error = outcome.unwrap_err();
    let source = match &error {
        RpcError::NotSent { source, .. } => source,
        other => panic!("{other:?}"),
    };
    assert!(matches!(source, TransportError::NoRoute { .. }));
    assert!(before.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn poison_is_thrown_away_and_service_goes_on() {
    let rig = rig!();
    let worker = Worker::default();
    let transport = rig.transport();
    let server = rig.server_on(transport.clone(), &worker).await;
    let client = rig.client();
    let (_connection, channel) = rig.channel().await;
    let deep = format!(
        r#"{{"method": "echo", "args": {}1{}}}"#,
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    let bodies: [(&str, &str); 8] = [
        ("application/json", "{nope"),
        ("application/json", "[]"),
        ("application/json", ""),
        ("application/json", "\u{0}\u{1b}[31m\nERROR forged line"),
        ("text/plain", "{}"),
        ("application/json; charset=utf-8", "{}"),
        (
            "application/json",
            r#"{"oslo.version": "3.0", "oslo.message": "{}"}"#,
        ),
        ("application/json", &deep),
    ];
    for (content_type, body) in bodies {
        channel
            .basic_publish(
                rig.topic.as_str().into(),
                rig.topic.as_str().into(),
                BasicPublishOptions::default(),
                body.as_bytes(),
                BasicProperties::default().with_content_type(content_type.into()),
            )
            .await
            .unwrap();
    }
    rig.call_until_answered(&client).await;
    soon(async {
        loop {
            let seen = transport.stats().snapshot();
            if seen.messages_undecodable == 5 && seen.messages_unsupported == 2 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    server.stop(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn properties_larger_than_a_frame_do_not_come_for_ever() {
    let rig = rig!();
    let worker = Worker::default();
    let server = rig.server(&worker).await;
    let client = rig.client();
    let (_connection, channel) = rig.channel().await;
    let mut headers = FieldTable::default();
    let long = AMQPValue::LongString("x".repeat(60_000).into());
    headers.insert("x-long".into(), long);
    let properties = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_headers(headers);
    channel
        .basic_publish(
            rig.topic.as_str().into(),
            rig.topic.as_str().into(),
            BasicPublishOptions::default(),
            b"{}",
            properties,
        )
        .await
        .unwrap();
    rig.call_until_answered(&client).await;
    server.stop(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_silent_host_is_passed_over_for_the_next() {
    let mut rig = rig!();
    rig.proxy.set(Wire::Silent);
    let rest = rig.url.split_once("://").unwrap().1;
    let (user, rest) = rest.rsplit_once('@').unwrap();
    let silent = rig.proxy.address;
    rig.settings.url = format!("rabbit://{user}@{silent},{user}@{rest}").into();
    rig.settings.connect_timeout_s = 1;
    rig.settings.publish_timeout_s = 20;
    let worker = Worker::default();
    let server = rig.server(&worker).await;
    rig.call_until_answered(&rig.client()).await;
    server.stop(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_wrong_password_is_named_and_never_shown() {
    let mut rig = rig!();
    let address = rig.proxy.address;
    rig.settings.url = format!("rabbit://nobody:verysecret@{address}/").into();
    rig.settings.publish_timeout_s = 3;
    let outcome = cast(&rig.client(), &rig.target()).await;
    let RpcError::NotSent { source, .. } = outcome.unwrap_err() else {
        panic!("sent with a wrong password");
    };
    let text = source.to_string();
    assert!(text.contains("ACCESS"), "{text}");
    assert!(!text.contains("verysecret"), "{text}");
}

#[tokio::test]
async fn queues_declared_differently_are_used_as_they_are() {
    let rig = rig!();
    let (_connection, channel) = rig.channel().await;
    let durable = QueueDeclareOptions {
        durable: true,
        ..Default::default()
    };
    let none = FieldTable::default;
    channel
        .queue_declare(rig.topic.as_str().into(), durable, none())
        .await
        .unwrap();
    let exchange = ExchangeDeclareOptions {
        durable: true,
        ..Default::default()
    };
    let name = rig.topic.as_str();
    channel
        .exchange_declare(name.into(), ExchangeKind::Topic, exchange, none())
        .await
        .unwrap();
    let worker = Worker::default();
    let server = rig.server(&worker).await;
    rig.call_until_answered(&rig.client()).await;
    server.stop(Duration::from_secs(5)).await;
    let options = QueueDeleteOptions::default;
    channel.queue_delete(name.into(), options()).await.unwrap();
    let options = ExchangeDeleteOptions::default;
    channel
        .exchange_delete(name.into(), options())
        .await
        .unwrap();
}

#[tokio::test]
async fn durable_and_quorum_queues_serve_as_well() {
    for (durable, quorum, transient) in [(true, false, false), (true, true, true)] {
        let mut rig = rig!();
        rig.settings.amqp_auto_delete = false;
        rig.settings.amqp_durable_queues = durable;
        rig.settings.rabbit_quorum_queue = quorum;
        rig.settings.rabbit_quorum_delivery_limit = 5;
        rig.settings.rabbit_transient_quorum_queue = transient;
        let worker = Worker::default();
        let server = rig.server(&worker).await;
        let client = rig.client();
        rig.call_until_answered(&client).await;
        client
            .cast(&rig.target().fanout(), &context(), "echo", &json!({}))
            .await
            .unwrap();
        worker.has_seen("echo", 2).await;
        server.stop(Duration::from_secs(5)).await;
        delete_queues(&rig).await;
    }
}

#[tokio::test]
async fn a_notification_waits_for_its_reader() {
    let rig = rig!();
    let mut settings: MessagingSettings = rig.settings.clone();
    settings.notification_topics = vec![format!("{}-n", rig.topic)];
    let transport = AmqpTransport::new(&settings).unwrap();
    let notifier = Notifier::new(transport, &settings, "conductor.ctl", || 1_795_415_798_924);
    let id = notifier
        .notify(
            &context(),
            Priority::Info,
            "instance.test",
            &json!({"n": 1}),
        )
        .await
        .unwrap();
    let (_connection, channel) = rig.channel().await;
    let queue = format!("{}-n.info", rig.topic);
    let got = channel.basic_get(queue.as_str().into(), BasicGetOptions { no_ack: true });
    let message = got.await.unwrap().unwrap();
    let envelope: Value = serde_json::from_slice(&message.data).unwrap();
    let inner: Value = serde_json::from_str(envelope["oslo.message"].as_str().unwrap()).unwrap();
    assert_eq!(inner["message_id"], id);
    assert_eq!(inner["priority"], "INFO");
    assert_eq!(inner["timestamp"], "2026-11-23 06:36:38.924000");
    assert_eq!(inner["_context_request_id"], "req-1");
    channel
        .queue_delete(queue.as_str().into(), QueueDeleteOptions::default())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_caller_that_is_gone_does_not_hold_a_server_up() {
    let mut rig = rig!();
    rig.settings.reply_retry_s = 1;
    let worker = Worker::default();
    let transport = rig.transport();
    let server = rig.server_on(transport.clone(), &worker).await;
    let (_connection, channel) = rig.channel().await;
    let request = |n: u32| {
        json!({"method": "echo", "args": {}, "version": "1.0", "_unique_id": format!("{n}"),
               "_msg_id": format!("{n:032x}"), "_reply_q": "reply_nowhere"})
        .to_string()
    };
    let publish = |n| {
        let (channel, name, body) = (channel.clone(), rig.topic.clone(), request(n));
        async move {
            let properties =
                BasicProperties::default().with_content_type("application/json".into());
            let options = BasicPublishOptions::default();
            let (name, body) = (name.as_str(), body.as_bytes());
            let sent = channel.basic_publish(name.into(), name.into(), options, body, properties);
            sent.await.unwrap();
        }
    };
    publish(1).await;
    let dropped = || transport.stats().snapshot().replies_dropped;
    soon(async {
        while dropped() < 1 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    // Known to be gone: dropped without another try.
    let before = Instant::now();
    publish(2).await;
    soon(async {
        while dropped() < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert!(before.elapsed() < Duration::from_millis(900));
    server.stop(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_closed_transport_says_so() {
    let rig = rig!();
    let transport = rig.transport();
    let client = RpcClient::new(transport.clone(), &rig.settings);
    let target = Target::topic(&rig.topic).fanout();
    client
        .cast(&target, &context(), "echo", &json!({}))
        .await
        .unwrap();
    soon(transport.close()).await;
    let outcome = soon(cast(&client, &target)).await;
    let RpcError::NotSent { source, .. } = outcome.unwrap_err() else {
        panic!("sent on a closed transport");
    };
    assert_eq!(source, TransportError::Closed);
}

#[tokio::test]
async fn a_queue_tells_its_consumers() {
    let rig = rig!();
    let client = rig.client();
    let count = async || {
        let asked = client.consumers(&rig.topic, "host", Duration::from_secs(10));
        asked.await.unwrap()
    };
    assert_eq!(count().await, None, "nobody has made the queue");
    // What was asked for in vain closed its own channel and no other.
    let worker = Worker::default();
    let server = rig.server(&worker).await;
    rig.call_until_answered(&client).await;
    assert_eq!(count().await, Some(1));
    server.stop(Duration::from_secs(5)).await;
    let left = soon(async {
        loop {
            match count().await {
                Some(1) => tokio::time::sleep(Duration::from_millis(50)).await,
                other => break other,
            }
        }
    });
    assert!(matches!(left.await, None | Some(0)));
    client.close().await;
}

#[tokio::test]
async fn a_cast_that_meets_passing_trouble_comes_again_until_it_is_done() {
    let rig = rig!();
    let worker = Worker::default();
    let transport = rig.transport();
    let server = rig.server_on(transport.clone(), &worker).await;
    let client = rig.client();
    let (target, args) = (rig.target(), json!({}));
    client
        .cast(&target, &context(), "stumble", &args)
        .await
        .unwrap();
    worker.has_seen("stumble", 3).await;
    let tries: Vec<bool> = {
        let seen = worker.seen.lock().unwrap();
        seen.iter().map(|seen| seen.redelivered).collect()
    };
    assert_eq!(tries, [false, true, true]);
    soon(async {
        while transport.stats().snapshot().requests_succeeded < 1 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let seen = transport.stats().snapshot();
    assert_eq!((seen.casts_requeued, seen.casts_lost), (2, 0), "{seen:?}");
    server.stop(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn what_waited_too_long_in_its_queue_is_not_served() {
    let mut rig = rig!();
    rig.settings.amqp_auto_delete = false; // the queue has to survive its consumer
    let worker = Worker::default();
    rig.server(&worker).await.stop(Duration::from_secs(5)).await;
    let client = rig.client();
    let target = rig.target();
    let short = Some(Duration::from_millis(300));
    client
        .cast_within(&target, &context(), "fail", &json!({}), short)
        .await
        .unwrap();
    cast(&client, &target).await.unwrap();
    tokio::time::sleep(Duration::from_millis(600)).await;
    let server = rig.server(&worker).await;
    worker.has_seen("echo", 1).await;
    assert_eq!(worker.count("fail"), 0, "it was old");
    server.stop(Duration::from_secs(5)).await;
    let (_connection, channel) = rig.channel().await;
    for queue in [rig.topic.clone(), format!("{}.host", rig.topic)] {
        let gone = channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default());
        gone.await.unwrap();
    }
}
