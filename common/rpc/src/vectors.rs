//! The captured messages of a real oslo.messaging against this crate, in both
//! directions: theirs are read, ours have the same shape, and both sides of a
//! conversation behave as Python's were seen to.

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use serde_json::{Map, Value, json};
use tokio::time::{Instant, sleep};

use crate::{
    BUILTINS_MODULE, Endpoint, MessagingSettings, RemoteFailure, Request, RequestContext,
    RpcServer,
    client::{Answer, Trouble, Waiting},
    envelope::{
        NotificationHead, ReplyIn, ReplyWanted, RequestIn, RequestOut, Version,
        encode_notification, encode_reply,
    },
    memory::MemoryBroker,
    transport::{Address, Incoming, Receipt, Settler, Subscription, Verdict},
    version::is_compatible,
};

fn directory() -> &'static Path {
    Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/wire-vectors"
    ))
}

fn load(file: &str) -> Value {
    let text = std::fs::read_to_string(directory().join(file)).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn all(kind: &str) -> Vec<(String, Value)> {
    let index = load("INDEX.json");
    let files = index.as_array().unwrap().iter();
    let chosen: Vec<_> = files
        .filter(|entry| entry["kind"] == kind)
        .map(|entry| entry["file"].as_str().unwrap().to_owned())
        .map(|file| (file.clone(), load(&file)))
        .collect();
    assert!(!chosen.is_empty(), "no vectors of kind {kind}");
    chosen
}

fn body(vector: &Value) -> Option<&str> {
    vector["body"].as_str()
}

/// An encoded body, opened generically.
fn opened(body: &[u8]) -> Value {
    let envelope: Map<String, Value> = serde_json::from_slice(body).unwrap();
    assert_eq!(envelope.len(), 2);
    assert_eq!(envelope["oslo.version"], "2.0");
    serde_json::from_str(envelope["oslo.message"].as_str().unwrap()).unwrap()
}

fn without(message: &Value, keys: &[&str]) -> Value {
    let mut message = message.clone();
    for key in keys {
        message.as_object_mut().unwrap().remove(*key);
    }
    message
}

fn id(text: &str) -> u128 {
    u128::from_str_radix(text, 16).unwrap()
}

#[test]
fn captured_requests_are_read_and_written_alike() {
    for (file, vector) in all("request") {
        let Some(body) = body(&vector) else { continue };
        let expected = &vector["decoded"]["message"];
        let request = RequestIn::decode(body.as_bytes()).unwrap();
        assert_eq!(request.method, expected["method"], "{file}");
        let args: Value = serde_json::from_str(request.args.as_ref().unwrap().get()).unwrap();
        assert_eq!(args, expected["args"], "{file}");
        assert_eq!(request.namespace.as_deref(), expected["namespace"].as_str());
        let version = match &request.version {
            Version::Absent => None,
            Version::Null => panic!("{file}: no captured version is null"),
            Version::Text(text) => Some(text.as_str()),
        };
        assert_eq!(version, expected["version"].as_str(), "{file}");
        let again = RequestOut {
            method: request.method.as_str().unwrap(),
            args: &args,
            namespace: request.namespace.as_deref(),
            version,
            reply: request.msg_id.as_ref().map(|msg_id| ReplyWanted {
                msg_id: id(msg_id),
                queue: request.reply_q.as_deref().unwrap(),
                monitor_s: request.monitor_s.as_f64(),
            }),
            unique_id: id(request.unique_id.as_ref().unwrap()),
            context: &request.context,
        };
        let again = opened(&again.encode().unwrap());
        assert_eq!(again, *expected, "{file}");
    }
}

#[test]
fn captured_replies_are_read_and_written_alike() {
    for (file, vector) in all("reply").into_iter().chain(all("heartbeat")) {
        let Some(body) = body(&vector) else { continue };
        let expected = &vector["decoded"]["message"];
        let reply = ReplyIn::decode(body.as_bytes()).unwrap();
        let msg_id = reply.msg_id.clone().unwrap();
        assert_eq!(msg_id, expected["_msg_id"].as_str().unwrap());
        assert_eq!(reply.ending, expected["ending"] == true, "{file}");
        let result: Value = reply
            .result
            .map_or(Value::Null, |raw| serde_json::from_str(raw.get()).unwrap());
        assert_eq!(result, expected["result"], "{file}");
        let failure = expected["failure"].as_str().inspect(|text| {
            let failure = RemoteFailure::from_wire(text).unwrap();
            let ours: Value = serde_json::from_str(&failure.to_wire()).unwrap();
            assert_eq!(ours, serde_json::from_str::<Value>(text).unwrap(), "{file}");
        });
        let again = opened(&encode_reply(&msg_id, &result, failure, reply.ending));
        let again = without(&again, &["_unique_id"]);
        assert_eq!(again, without(expected, &["_unique_id"]), "{file}");
    }
}

#[test]
fn notifications_have_the_captured_shape() {
    for (file, vector) in all("notification") {
        let expected = &vector["decoded"]["message"];
        if vector["decoded"]["envelope_version"].is_null() {
            continue; // the older driver's form, which is not sent
        }
        let text = |key: &str| expected[key].as_str().unwrap();
        let context: Map<String, Value> = expected
            .as_object()
            .unwrap()
            .iter()
            .filter_map(|(key, value)| {
                let key = key.strip_prefix("_context_")?;
                Some((key.to_owned(), value.clone()))
            })
            .collect();
        let head = NotificationHead {
            message_id: text("message_id"),
            publisher_id: text("publisher_id"),
            event_type: text("event_type"),
            priority: text("priority"),
            timestamp: text("timestamp"),
        };
        let context = RequestContext::from(context);
        let again = encode_notification(&head, &expected["payload"], &context).unwrap();
        let again = without(&opened(&again), &["_unique_id"]);
        assert_eq!(again, without(expected, &["_unique_id"]), "{file}");
    }
}

#[test]
fn versions_compare_as_in_the_table() {
    for row in load("version_compat_table.json")["rows"]
        .as_array()
        .unwrap()
    {
        let implemented = row[0].as_str().unwrap_or("1.0");
        let Some(requested) = row[1].as_str() else {
            continue; // null is decided by the dispatcher, see the raw requests
        };
        match (is_compatible(implemented, requested), &row[2]) {
            (Ok(compatible), Value::Bool(expected)) => assert_eq!(compatible, *expected, "{row}"),
            (Err(failure), Value::String(expected)) => {
                assert_eq!(failure.module, BUILTINS_MODULE);
                assert_eq!(format!("raises {}", failure.class), *expected, "{row}");
            }
            (outcome, _) => panic!("{row}: {outcome:?}"),
        }
    }
}

#[test]
fn urls_mean_what_they_mean_to_oslo() {
    for (url, seen) in load("transport_url.json")["cases"].as_object().unwrap() {
        let (settings, broker) = MessagingSettings::with_url(url.as_str())
            .resolved()
            .unwrap();
        assert_eq!(broker.vhost, seen["vhost"][0].as_str().unwrap(), "{url}");
        assert_eq!(Value::from(settings.heartbeat_s), seen["tune"][0], "{url}");
        let login = format!("{:?}", broker.login).to_uppercase();
        assert_eq!(login, seen["mech"][0].as_str().unwrap(), "{url}");
    }
}

#[test]
fn pythons_json_never_breaks_a_reader() {
    for (name, text) in load("json_quirks.json")["values"].as_object().unwrap() {
        let inner = format!(
            r#"{{"method": "m", "args": {{"x": {}}}, "_msg_id": "a", "_reply_q": "q"}}"#,
            text.as_str().unwrap()
        );
        let body = json!({"oslo.version": "2.0", "oslo.message": inner}).to_string();
        match RequestIn::decode(body.as_bytes()) {
            // What cannot be taken is at least answered.
            Err(unreadable) => {
                assert!(
                    ["nan", "inf", "byt_nonutf"].contains(&name.as_str()),
                    "{name}"
                );
                if name != "byt_nonutf" {
                    assert_eq!(unreadable.answer_to.unwrap().queue, "q");
                }
            }
            Ok(request) => assert_eq!(request.method, "m", "{name}"),
        }
    }
}

// ---- a Python server's replies, to a caller -------------------------------

struct Ignore;
impl Settler for Ignore {
    fn settle(&self, _tag: u64, _verdict: Verdict) {}
}

fn incoming(vector: &Value) -> Incoming {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    Incoming {
        body: body(vector).unwrap_or_default().as_bytes().to_vec(),
        content_type: text(&vector["properties"]["content_type"]),
        compression: text(&vector["headers"]["compression"]),
        expiration: None,
        redelivered: false,
        receipt: Receipt::new(Arc::new(Ignore), 1),
    }
}

/// What the caller gets from these replies, in order.
async fn answer(vectors: &[Value]) -> Answer {
    let waiting = Waiting::new(Arc::default(), &MessagingSettings::default());
    let expect = &vectors[0]["expect"]["python_client"];
    // The caller waits under its own id; a reply may carry another one.
    let own = expect["args"]
        .as_str()
        .and_then(|text| text.split("message ID ").nth(1))
        .map(|text| &text[..32]);
    let theirs = vectors[0]["decoded"]["message"]["_msg_id"].as_str();
    let call = waiting.register(id(own.or(theirs).unwrap()), "m").unwrap();
    for vector in vectors {
        waiting.receive(incoming(vector));
    }
    let deadline = Instant::now() + Duration::from_secs(1);
    call.wait(async { Ok(()) }, deadline, None).await
}

#[tokio::test(start_paused = true)]
async fn raw_replies_mean_to_us_what_they_meant_to_python() {
    let mut vectors = all("raw-reply");
    vectors.sort_by(|(a, _), (b, _)| a.cmp(b));
    while !vectors.is_empty() {
        let case = vectors[0].0.split("_part").next().unwrap().to_owned();
        let case = case.trim_end_matches(".json").to_owned();
        let count = vectors[0].1["expect"]["parts_in_order"]
            .as_u64()
            .unwrap_or(1) as usize;
        let same = |(file, _): &(String, Value)| file.starts_with(&format!("{case}_part"));
        let count = if same(&vectors[0]) { count } else { 1 };
        let parts: Vec<Value> = vectors.drain(..count).map(|(_, vector)| vector).collect();
        let got = answer(&parts).await;
        check_answer(&case, &parts[0]["expect"]["python_client"], got);
    }
}

fn check_answer(case: &str, expected: &Value, got: Answer) {
    let raised = expected["raised"].as_str().unwrap_or_default();
    match got {
        Ok(result) => {
            // Python trips over a missing key and over heartbeats it did not ask for; we do not.
            let forgiven = raised == "builtins.KeyError";
            assert!(raised.is_empty() || forgiven, "{case}: {raised} expected");
            let result = result.map_or(Value::Null, |raw| serde_json::from_str(raw.get()).unwrap());
            if !forgiven && !expected["returned"].is_string() {
                assert_eq!(result, expected["returned"], "{case}");
            }
        }
        Err(Trouble::Failure(failure)) => {
            let class = expected["exc_type"].as_str().or(raised.rsplit('.').next());
            let class = class.unwrap().trim_end_matches("_Remote");
            let forgiven = ["TypeError"].contains(&class) || failure.class == "X";
            // A failure that is an object and no text is read all the same.
            let object = raised == "json.decoder.JSONDecodeError";
            assert!(
                failure.class == class || forgiven || object,
                "{case}: {failure}"
            );
        }
        Err(Trouble::Silence(None)) => {
            let silent = raised.ends_with("MessagingTimeout") || case.ends_with("hb_then_result");
            assert!(silent, "{case}: no answer seen");
        }
        Err(Trouble::BadReply(reason)) => assert!(
            raised.ends_with("JSONDecodeError") || raised == "builtins.AttributeError",
            "{case}: {reason}"
        ),
        Err(other) => panic!("{case}: {other:?}"),
    }
}

// ---- a Python client's requests, to a server ------------------------------

struct Conductor;

#[async_trait]
impl Endpoint for Conductor {
    fn version(&self) -> &str {
        "3.0"
    }
    fn methods(&self) -> &[&str] {
        &["echo", "ret_value", "ret_none", "slow", "_private"]
    }
    async fn handle(&self, request: Request) -> Result<Value, RemoteFailure> {
        let args = request.args_map()?;
        Ok(match request.method() {
            "ret_none" => Value::Null,
            "ret_value" => args["value"].clone(),
            "slow" => {
                sleep(Duration::from_secs_f64(args["seconds"].as_f64().unwrap())).await;
                "done".into()
            }
            _ => json!({ "args": args }),
        })
    }
}

struct ComputeTask;

#[async_trait]
impl Endpoint for ComputeTask {
    fn namespace(&self) -> Option<&str> {
        Some("compute_task")
    }
    fn version(&self) -> &str {
        "1.25"
    }
    fn methods(&self) -> &[&str] {
        &["migrate_server"]
    }
    async fn handle(&self, request: Request) -> Result<Value, RemoteFailure> {
        Ok(json!({"ns": request.namespace(), "args": request.args_map()?}))
    }
}

/// The replies a server gives to one request.
async fn replies(vector: &Value) -> Vec<Value> {
    let broker = MemoryBroker::default();
    let transport = broker.transport("here");
    let settings = MessagingSettings::default();
    let _server = RpcServer::builder(transport.clone(), &settings, "conductor", "h")
        .endpoint(Conductor)
        .endpoint(ComputeTask)
        .start()
        .await
        .unwrap();
    let replies = Arc::new(Mutex::new(Vec::new()));
    let queue = vector["decoded"]["message"]["_reply_q"].as_str();
    let queue = queue.unwrap_or("nowhere").to_owned();
    let log = replies.clone();
    let sink = move |message: Incoming| {
        log.lock().unwrap().push(opened(&message.body));
        message.receipt.acknowledge();
    };
    let _replies = transport
        .listen(Subscription::Replies { queue }, Arc::new(sink))
        .unwrap();
    let topic = "conductor".to_owned();
    let content_type = vector["properties"]["content_type"].as_str();
    broker.inject(
        &Address::Topic { topic },
        body(vector).unwrap(),
        content_type,
    );
    sleep(Duration::from_secs(5)).await;
    let seen = replies.lock().unwrap();
    seen.clone()
}

#[tokio::test(start_paused = true)]
async fn raw_requests_are_answered_as_python_answered_them() {
    // These say what a server does that has seen the same id before.
    let history = [
        "rawreq_uid_dup_immediate.json",
        "rawreq_mandatory_no_queue.json",
    ];
    for (file, vector) in all("raw-request") {
        if history.contains(&file.as_str()) {
            continue;
        }
        let mut expected = vector["expect"]["oslo_server"]["replies"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        if file.contains("fanout") {
            expected.truncate(1); // two servers there, one here
        }
        let got = replies(&vector).await;
        assert_eq!(got.len(), expected.len(), "{file}: {got:?}");
        for (got, expected) in got.iter().zip(&expected) {
            assert_eq!(got["ending"], expected["ending"], "{file}");
            assert_eq!(got["_msg_id"], expected["_msg_id"], "{file}");
            let failure: Value = got["failure"]
                .as_str()
                .map_or(Value::Null, |text| serde_json::from_str(text).unwrap());
            for key in ["class", "module", "message", "args", "kwargs"] {
                assert_eq!(failure[key], expected["failure"][key], "{file}: {key}");
            }
            match &expected["result"] {
                Value::Object(result) => {
                    assert_eq!(got["result"]["args"], result["args"], "{file}")
                }
                result => assert_eq!(got["result"], *result, "{file}"),
            }
        }
    }
}

#[test]
fn nova_requests_are_read_whole() {
    let mut seen = 0;
    for entry in std::fs::read_dir(directory()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if !name.starts_with("nova_") {
            continue;
        }
        let vector = load(&name);
        let Some(body) = body(&vector) else { continue };
        let request = RequestIn::decode(body.as_bytes()).unwrap();
        assert_eq!(
            request.method, vector["decoded"]["message"]["method"],
            "{name}"
        );
        assert!(!request.context.is_empty(), "{name}");
        seen += 1;
    }
    assert!(seen > 0, "no request of Nova's among the vectors");
}
