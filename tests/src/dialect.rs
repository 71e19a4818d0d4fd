//! A Drover of another version, for tests: this build's own code behind a transport
//! that speaks as a later one would. What it sends has an option, values of enums,
//! fields of reports and answers, and a step more; what comes to it is understood. So
//! two of them are as of old among themselves, and whatever one of them says to a
//! process of this build is read by the code as it is.
//!
//! Nothing is added to what is asked in a version that does not have it: which one
//! that is, the code under test decides.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use drover_model::{
    api::{OLDEST, SPEAKS, compute::method as step, conductor::method},
    version::{RpcVersion, VersionRange},
};
use drover_rpc::{
    RpcStats, Transport, TransportError,
    transport::{Address, Incoming, Listening, Outgoing, Sink, Subscription},
};
use serde_json::{Map, Value, json};
use tokio::time::Instant;

/// Of which version a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dialect {
    /// This build's.
    #[default]
    Now,
    /// The next one's, which speaks with this one's.
    Next,
    /// The next one's, which does not heed what its peers understand.
    Careless,
    /// This build's, in other versions of RPC.
    Speaking(VersionRange),
    /// This build's, which says of its versions what makes no sense.
    Garbled,
}

/// The version in which the option and the step are.
const SINCE: RpcVersion = RpcVersion::new(1, 2);

impl Dialect {
    /// Versions of RPC that it speaks.
    pub fn speaks(self) -> VersionRange {
        match self {
            Self::Now | Self::Garbled => SPEAKS,
            Self::Next | Self::Careless => VersionRange::new(OLDEST, SINCE),
            Self::Speaking(range) => range,
        }
    }

    /// A transport as such a process has it.
    pub fn over(self, transport: Arc<dyn Transport>) -> Arc<dyn Transport> {
        match self {
            Self::Now | Self::Speaking(_) => transport,
            Self::Next | Self::Careless | Self::Garbled => Arc::new(Translating {
                below: transport,
                dialect: self,
                asked: Asked::default(),
            }),
        }
    }
}

/// What was asked by messages that wait for an answer.
#[derive(Clone, Default)]
struct Asked(Arc<Mutex<HashMap<String, String>>>);

impl Asked {
    fn note(&self, message: &Map<String, Value>) {
        let text = |key: &str| message.get(key)?.as_str().map(str::to_owned);
        if let (Some(id), Some(method)) = (text("_msg_id"), text("method")) {
            self.0
                .lock()
                .expect("nobody panics with it")
                .insert(id, method);
        }
    }

    fn method(&self, message: &Map<String, Value>) -> Option<String> {
        let id = message.get("_msg_id")?.as_str()?;
        self.0
            .lock()
            .expect("nobody panics with it")
            .get(id)
            .cloned()
    }
}

struct Translating {
    below: Arc<dyn Transport>,
    dialect: Dialect,
    asked: Asked,
}

#[async_trait]
impl Transport for Translating {
    async fn send(
        &self,
        to: &Address,
        message: &Outgoing,
        deadline: Instant,
    ) -> Result<(), TransportError> {
        let Some(mut inner) = opened(&message.body) else {
            return self.below.send(to, message, deadline).await;
        };
        if self.dialect == Dialect::Garbled {
            if let Some(speaks) = inner
                .get_mut("args")
                .and_then(|args| args.get_mut("speaks"))
            {
                *speaks = json!({"soup": [1, "2.x"]});
            }
            let garbled = with_body(message, inner);
            return self.below.send(to, &garbled, deadline).await;
        }
        self.asked.note(&inner);
        let newest = inner.get("version").and_then(Value::as_str);
        let newest = newest.and_then(|text| text.parse::<RpcVersion>().ok());
        let careless = self.dialect == Dialect::Careless;
        let knows = careless || newest.is_some_and(|version| version >= SINCE);
        // The step more: what is made ready is first warmed.
        if knows && inner.get("method") == Some(&json!(step::PRE_LIVE_MIGRATION)) {
            let mut warm = inner.clone();
            warm.insert("method".to_owned(), json!(WARM));
            for key in ["_msg_id", "_reply_q", "_unique_id"] {
                warm.remove(key);
            }
            let warm = with_body(message, warm);
            self.below.send(to, &warm, deadline).await?;
        }
        let method = inner.get("method").and_then(Value::as_str);
        match method.map(str::to_owned) {
            Some(method) => add_to_request(&mut inner, &method, knows),
            None => {
                let method = self.asked.method(&inner);
                if let (Some(method), Some(result)) = (method, inner.get_mut("result")) {
                    add_to_answer(result, &method);
                }
            }
        }
        self.below
            .send(to, &with_body(message, inner), deadline)
            .await
    }

    fn listen(&self, what: Subscription, sink: Sink) -> Result<Box<dyn Listening>, TransportError> {
        if self.dialect == Dialect::Garbled {
            return self.below.listen(what, sink);
        }
        let asked = self.asked.clone();
        let understanding: Sink = Arc::new(move |mut message: Incoming| {
            if let Some(mut inner) = opened(&message.body) {
                asked.note(&inner);
                if inner.get("method") == Some(&json!(WARM)) {
                    // Done at once; nobody waits for an answer.
                    return message.receipt.acknowledge();
                }
                let mut inner_value = Value::Object(std::mem::take(&mut inner));
                understand(&mut inner_value);
                message.body = closed(&inner_value);
            }
            sink(message);
        });
        self.below.listen(what, understanding)
    }

    async fn consumers(
        &self,
        topic: &str,
        server: &str,
        deadline: Instant,
    ) -> Result<Option<u32>, TransportError> {
        self.below.consumers(topic, server, deadline).await
    }

    fn stats(&self) -> &Arc<RpcStats> {
        self.below.stats()
    }

    async fn close(&self) {
        self.below.close().await;
    }
}

/// The method of the step more.
pub const WARM: &str = "warm_destination";
/// The option more.
pub const OPTION: &str = "hasten";
/// A field more, of reports, answers and whatever else.
const FIELD: &str = "shade";
/// A phase more, and which of today's it is a part of.
const PHASE: (&str, &str) = ("mirroring", "disk");
/// A kind of network more, which only guests on this bridge have.
pub const NOVEL_BRIDGE: &str = "br-novel";
/// A power state more, and which of today's it is a kind of.
pub const STATE: (&str, &str) = ("dozing", "paused");

fn opened(body: &[u8]) -> Option<Map<String, Value>> {
    let envelope: Value = serde_json::from_slice(body).ok()?;
    let inner = envelope.get("oslo.message")?.as_str()?;
    serde_json::from_str(inner).ok()
}

fn closed(inner: &Value) -> Vec<u8> {
    let envelope = json!({"oslo.version": "2.0", "oslo.message": inner.to_string()});
    envelope.to_string().into_bytes()
}

fn with_body(message: &Outgoing, inner: Map<String, Value>) -> Outgoing {
    Outgoing {
        body: Arc::new(closed(&Value::Object(inner))),
        ..message.clone()
    }
}

fn add_to_request(inner: &mut Map<String, Value>, called: &str, knows: bool) {
    let Some(args) = inner.get_mut("args") else {
        return;
    };
    let of_agent = [
        method::REGISTER_AGENT,
        method::HEARTBEAT,
        method::REPORT_STATE,
        method::MIGRATION_PROGRESS,
    ];
    if of_agent.contains(&called) {
        add(args);
    }
    let asks_an_agent = [
        step::CHECK_SOURCE,
        step::CHECK_DESTINATION,
        step::PRE_LIVE_MIGRATION,
        step::LIVE_MIGRATION,
        step::PREP_RESIZE,
        step::RESIZE_INSTANCE,
        step::FINISH_RESIZE,
        step::PREP_REBUILD,
    ];
    if asks_an_agent.contains(&called) {
        args[FIELD] = json!("blue");
    }
    if knows && let Some(options) = args.get_mut("options") {
        options[OPTION] = json!(true);
    }
}

fn add_to_answer(result: &mut Value, called: &str) {
    match result {
        // A step that answers nothing yet says something.
        Value::Null if called != method::EVACUATED_REMOVED => *result = json!({FIELD: "blue"}),
        other => add(other),
    }
}

/// Fields and values more, wherever there is a place for them.
fn add(value: &mut Value) {
    each(value, &mut |object| {
        // Lists of what is asked about by name stay what they are.
        object.insert(FIELD.to_owned(), json!("blue"));
        replace(object, "phase", PHASE.1, PHASE.0);
        replace(object, "power_state", STATE.1, STATE.0);
        if object.get("bridge") == Some(&json!(NOVEL_BRIDGE)) {
            replace(object, "type", "bridge", "vdpa");
        }
    });
}

fn understand(value: &mut Value) {
    each(value, &mut |object| {
        object.remove(FIELD);
        replace(object, "phase", PHASE.0, PHASE.1);
        replace(object, "power_state", STATE.0, STATE.1);
        replace(object, "type", "vdpa", "bridge");
        if let Some(options) = object.get_mut("options").and_then(Value::as_object_mut) {
            options.remove(OPTION);
        }
    });
}

fn replace(object: &mut Map<String, Value>, key: &str, from: &str, to: &str) {
    if object.get(key) == Some(&json!(from)) {
        object.insert(key.to_owned(), json!(to));
    }
}

/// Every object in a value that has fields of its own, outermost last. What is tagged
/// by its only key is no such one.
fn each(value: &mut Value, change: &mut impl FnMut(&mut Map<String, Value>)) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(|value| each(value, change)),
        Value::Object(object) => {
            // Counters have names for keys, and are told apart by nobody.
            let fields = object.iter_mut().filter(|(key, _)| *key != "counters");
            fields.for_each(|(_, value)| each(value, change));
            let tagged = ["Ok", "Err", "present"];
            let is_tag =
                object.len() == 1 && object.keys().all(|key| tagged.contains(&key.as_str()));
            if !is_tag {
                change(object);
            }
        }
        _ => {}
    }
}
