//! Listens to what is said in a cloud: keeps one sample of each kind, and the names of
//! the events.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use drover_model::api::{COMPUTE_TOPIC, NAMESPACE};
use drover_rpc::{
    RpcStats, Transport, TransportError,
    transport::{Address, Listening, Outgoing, Sink, Subscription},
};
use serde_json::{Map, Value};
use tokio::time::Instant;

/// One sample of each request and answer: `agent get_status answer` and so on.
pub type Samples = BTreeMap<String, Value>;

/// See the module. Clones keep into the same place.
#[derive(Clone, Default)]
pub struct Tap(Arc<Mutex<Heard>>);

#[derive(Default)]
struct Heard {
    samples: Samples,
    asked: HashMap<String, String>,
    notified: Vec<String>,
}

impl Tap {
    /// What was heard.
    pub fn samples(&self) -> Samples {
        self.0
            .lock()
            .expect("nobody panics with it")
            .samples
            .clone()
    }

    /// The notifications that were sent, in order.
    pub fn notified(&self) -> Vec<String> {
        let heard = self.0.lock().expect("nobody panics with it");
        heard.notified.clone()
    }

    /// A transport that is listened to.
    pub fn over(&self, below: Arc<dyn Transport>) -> Arc<dyn Transport> {
        let tap = self.clone();
        Arc::new(Tapped { below, tap })
    }

    fn hear(&self, to: &Address, body: &[u8]) {
        let envelope: Option<Value> = serde_json::from_slice(body).ok();
        let text =
            envelope.and_then(|envelope| Some(envelope["oslo.message"].as_str()?.to_owned()));
        let message: Option<Map<String, Value>> =
            text.and_then(|text| serde_json::from_str(&text).ok());
        let Some(message) = message else {
            return;
        };
        let mut heard = self.0.lock().expect("nobody panics with it");
        if let Some(event) = message.get("event_type").and_then(Value::as_str) {
            heard.notified.push(event.to_owned());
            return;
        }
        let id = message.get("_msg_id").and_then(Value::as_str);
        if let Some(method) = message.get("method").and_then(Value::as_str) {
            if message.get("namespace").and_then(Value::as_str) != Some(NAMESPACE) {
                return;
            }
            let of_agent = matches!(to, Address::Server { topic, .. } if topic == COMPUTE_TOPIC);
            let whom = if of_agent { "agent" } else { "conductor" };
            let asked = format!("{whom} {method}");
            if let Some(id) = id {
                heard.asked.insert(id.to_owned(), asked.clone());
            }
            let args = message.get("args").cloned().unwrap_or_default();
            heard.keep(format!("{asked} request"), args);
            return;
        }
        let asked = id.and_then(|id| heard.asked.get(id).cloned());
        let result = message.get("result").filter(|result| !result.is_null());
        if let (Some(asked), Some(result)) = (asked, result.cloned()) {
            heard.keep(format!("{asked} answer"), result);
        }
    }
}

impl Heard {
    /// The one that says most.
    fn keep(&mut self, name: String, value: Value) {
        /// Beyond it one only says the same more often, bytes.
        const ENOUGH: usize = 6000;
        let length = |value: &Value| value.to_string().len();
        let before = self.samples.get(&name).map_or(0, length);
        let after = length(&value);
        if before == 0 || (after > before && after <= ENOUGH) {
            self.samples.insert(name, value);
        }
    }
}

struct Tapped {
    below: Arc<dyn Transport>,
    tap: Tap,
}

#[async_trait]
impl Transport for Tapped {
    async fn send(
        &self,
        to: &Address,
        message: &Outgoing,
        deadline: Instant,
    ) -> Result<(), TransportError> {
        self.tap.hear(to, &message.body);
        self.below.send(to, message, deadline).await
    }

    fn listen(&self, what: Subscription, sink: Sink) -> Result<Box<dyn Listening>, TransportError> {
        self.below.listen(what, sink)
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
