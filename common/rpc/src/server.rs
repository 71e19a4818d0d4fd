//! Serving a topic.
//!
//! ```text
//! transport ─► decode ─► known? ─► wait for a place ─► dispatch ─► handler ─► reply
//!                │         │            │                             │         │
//!              reject   drop, its     expired?                     accept()   tried again
//!              or answer receipt      drop                         or return  while the
//!                        joins                                     = ack      queue is missing
//! ```
//!
//! Of a cast that meets passing trouble nobody would know: it is put back into its
//! queue after a pause, for this server or another, and given up, loudly, after
//! [`MAX_TRIES`]. A call is answered with the trouble, and its caller may call again.
//!
//! Bounds: unacknowledged requests by the transport's prefetch count, running
//! handlers by `max_running_requests`, replies under way by [`MAX_REPLIES`].

use std::{
    panic::AssertUnwindSafe,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::FutureExt;
use serde_json::Value;
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep},
};
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::{
    dedup::{Receipts, Seen},
    dispatch::{self, Endpoint, Ping},
    envelope::{AnswerTo, RequestIn, Unreadable, Version, encode_reply},
    error::TransportError,
    failure::RemoteFailure,
    request::Request,
    settings::MessagingSettings,
    stats::RpcStats,
    text::shown,
    transport::{
        Address, CONTENT_TYPE_JSON, Incoming, Listening, Outgoing, Receipt, Subscription, Transport,
    },
};

/// Replies that may be under way at once; beyond it, handlers wait with theirs.
const MAX_REPLIES: usize = 1024;
/// Pause between attempts to reach a reply queue that is missing; a caller that
/// has just lost its broker declares its queue again within seconds.
const REPLY_RETRY_PAUSE: Duration = Duration::from_millis(250);
/// Reply queues remembered as gone, and for how long.
const MAX_GONE: usize = 200;
const GONE_FOR: Duration = Duration::from_secs(60);
/// Tries of a cast that meets passing trouble, each time, before it is given up.
const MAX_TRIES: u32 = 10;
/// Pause before the second try; it doubles with each.
const FIRST_TRY_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_TRY_PAUSE: Duration = Duration::from_secs(30);
/// UUIDs of a lost cast's arguments that are logged.
const MAX_NAMED: usize = 4;

/// Puts a server together.
pub struct RpcServerBuilder {
    transport: Arc<dyn Transport>,
    topic: String,
    server: String,
    endpoints: Vec<Arc<dyn Endpoint>>,
    limits: Limits,
}

struct Limits {
    max_running: usize,
    max_message_bytes: usize,
    reply_retry: Duration,
    publish_timeout: Duration,
}

impl RpcServerBuilder {
    /// Adds an interface. The first one that fits a request answers it.
    #[must_use]
    pub fn endpoint(mut self, endpoint: impl Endpoint) -> Self {
        self.endpoints.push(Arc::new(endpoint));
        self
    }

    /// Adds an interface that is shared with others.
    #[must_use]
    pub fn shared_endpoint(mut self, endpoint: Arc<dyn Endpoint>) -> Self {
        self.endpoints.push(endpoint);
        self
    }

    /// Answers oslo.messaging's `oslo_rpc_server_ping` (version 1.0, null namespace).
    #[must_use]
    pub fn ping(self) -> Self {
        self.endpoint(Ping)
    }

    /// How many handlers may run at once, instead of the setting.
    #[must_use]
    pub fn max_running(mut self, handlers: usize) -> Self {
        self.limits.max_running = handlers.max(1);
        self
    }

    /// Begins to serve; returns when the queues are there and consumed. Waits
    /// for the broker as long as it takes.
    ///
    /// # Errors
    /// When topic or server cannot be names, or the transport is closed.
    pub async fn start(self) -> Result<RpcServer, TransportError> {
        let stats = self.transport.stats().clone();
        let core = Arc::new(Core {
            running: Semaphore::new(self.limits.max_running),
            replies: Arc::new(Semaphore::new(MAX_REPLIES)),
            transport: self.transport.clone(),
            endpoints: self.endpoints,
            limits: self.limits,
            seen: Seen::default(),
            gone: Mutex::default(),
            tasks: TaskTracker::new(),
            stats,
        });
        let sink = {
            let core = core.clone();
            Arc::new(move |message| core.clone().receive(message))
        };
        let what = Subscription::Server {
            topic: self.topic,
            server: self.server,
        };
        let listening = self.transport.listen(what, sink)?;
        listening.ready().await;
        Ok(RpcServer { core, listening })
    }
}

/// A server at work. Dropped, it stops at once; [`RpcServer::stop`] is gentler.
pub struct RpcServer {
    core: Arc<Core>,
    listening: Box<dyn Listening>,
}

impl RpcServer {
    /// A server of `topic` named `server` (for agents: the host name).
    pub fn builder(
        transport: Arc<dyn Transport>,
        settings: &MessagingSettings,
        topic: impl Into<String>,
        server: impl Into<String>,
    ) -> RpcServerBuilder {
        RpcServerBuilder {
            transport,
            topic: topic.into(),
            server: server.into(),
            endpoints: Vec::new(),
            limits: Limits {
                max_running: settings.max_running_requests.max(1),
                max_message_bytes: settings.max_message_bytes,
                reply_retry: Duration::from_secs(settings.reply_retry_s),
                publish_timeout: settings.publish_timeout(),
            },
        }
    }

    /// Requests being handled now, waiting ones and unsent replies included.
    pub fn in_flight(&self) -> usize {
        self.core.tasks.len()
    }

    /// Takes no more requests, lets the running ones finish and their replies go
    /// out for at most `grace`, then removes what is only this server's. What
    /// was not acknowledged by then goes to another server.
    pub async fn stop(self, grace: Duration) {
        self.listening.pause().await;
        self.core.tasks.close();
        if tokio::time::timeout(grace, self.core.tasks.wait())
            .await
            .is_err()
        {
            warn!(
                requests = self.core.tasks.len(),
                "stopping with requests still running"
            );
        }
        self.listening.close().await;
    }
}

struct Core {
    transport: Arc<dyn Transport>,
    endpoints: Vec<Arc<dyn Endpoint>>,
    limits: Limits,
    running: Semaphore,
    replies: Arc<Semaphore>,
    seen: Seen,
    /// Reply queues found gone, with the moment they may be tried again.
    gone: Mutex<Vec<(String, Instant)>>,
    tasks: TaskTracker,
    stats: Arc<RpcStats>,
}

impl Core {
    /// The sink: everything that needs no waiting, then a task of its own.
    fn receive(self: Arc<Self>, message: Incoming) {
        let arrived = Instant::now();
        if message.body.len() > self.limits.max_message_bytes {
            return self.refuse_oversized(message);
        }
        if !self.is_ours(&message) {
            message.receipt.reject();
            return;
        }
        let request = match RequestIn::decode(&message.body) {
            Ok(request) => request,
            Err(unreadable) => return self.refuse(unreadable, message.receipt),
        };
        let Some(receipts) = self
            .seen
            .admit(request.unique_id.as_deref(), message.receipt)
        else {
            self.stats.duplicates_dropped.add();
            debug!(unique_id = ?request.unique_id, "request came again, not run again");
            return;
        };
        self.stats.requests_received.add();
        let answer_to = request.answer_to();
        if request.msg_id.is_some() && answer_to.is_none() {
            self.stats.requests_unanswerable.add();
            warn!(method = %shown_value(&request.method), "request wants a reply and says not where to; not run");
            receipts.take();
            return;
        }
        let expires = message.expiration.map(|wait| arrived + wait);
        let core = self.clone();
        self.tasks.spawn(async move {
            core.run(request, receipts, answer_to, expires, message.redelivered)
                .await;
        });
    }

    /// Whether the message is of the kind this wire carries, counted and logged if not.
    fn is_ours(&self, message: &Incoming) -> bool {
        if message.content_type.as_deref() != Some(CONTENT_TYPE_JSON) {
            self.stats.messages_unsupported.add();
            let content_type = shown(message.content_type.as_deref().unwrap_or("(none)"));
            warn!(%content_type, "message is not application/json, rejected");
            return false;
        }
        if let Some(compression) = &message.compression {
            self.stats.messages_unsupported.add();
            warn!(compression = %shown(compression), "message is compressed, rejected; unset kombu_compression at the sender");
            return false;
        }
        true
    }

    /// A message that is too large: its sender is told, if finding out who that
    /// is costs no more than reading a message or two would.
    fn refuse_oversized(self: Arc<Self>, message: Incoming) {
        self.stats.messages_oversized.add();
        let (size, limit) = (message.body.len(), self.limits.max_message_bytes);
        warn!(size, limit, "message is too large; see max_message_bytes");
        let answer_to = (size / 4 <= limit)
            .then(|| AnswerTo::find(&message.body))
            .flatten();
        let reason = format!("it has {size} bytes, and {limit} are allowed");
        let unreadable = Unreadable { reason, answer_to };
        self.refuse(unreadable, message.receipt);
    }

    /// A message that cannot be read: told to its sender if the sender is known.
    fn refuse(self: Arc<Self>, unreadable: Unreadable, receipt: Receipt) {
        self.stats.messages_undecodable.add();
        let reason = shown(&unreadable.reason);
        let Some(answer_to) = unreadable.answer_to.filter(|to| !to.queue.is_empty()) else {
            warn!(%reason, "message cannot be read, rejected");
            receipt.reject();
            return;
        };
        warn!(%reason, reply_queue = %shown(&answer_to.queue), "request cannot be read, refused");
        self.stats.requests_failed.add();
        let failure = RemoteFailure::value_error(format!("the request cannot be read: {reason}"));
        let core = self.clone();
        self.tasks.spawn(async move {
            // Prefetch bounds those that wait for a place.
            let _place = core.replies.clone().acquire_owned().await;
            receipt.acknowledge();
            core.reply(answer_to, Err(failure)).await;
        });
    }

    async fn run(
        self: Arc<Self>,
        request: RequestIn,
        receipts: Arc<Receipts>,
        answer_to: Option<AnswerTo>,
        expires: Option<Instant>,
        redelivered: bool,
    ) {
        // The semaphore is never closed; without a place nothing may run.
        let Ok(place) = self.running.acquire().await else {
            return;
        };
        if expires.is_some_and(|at| at <= Instant::now()) {
            self.stats.requests_expired.add();
            receipts.take();
            return;
        }
        let cast = answer_to
            .is_none()
            .then(|| Cast::of(&request, redelivered, expires));
        let outcome = self
            .answer(request, &receipts, answer_to.as_ref(), redelivered)
            .await;
        match &outcome {
            Ok(_) => self.stats.requests_succeeded.add(),
            Err(_) => self.stats.requests_failed.add(),
        }
        if let (Some(cast), Err(failure)) = (&cast, &outcome) {
            drop(place);
            return self.cast_failed(cast, &receipts, failure).await;
        }
        receipts.take();
        let Some(answer_to) = answer_to else {
            return;
        };
        // The reply has a bound of its own, so that a slow caller's queue does
        // not keep handlers from running.
        let _reply_place = self.replies.clone().acquire_owned().await;
        drop(place);
        self.reply(answer_to, outcome).await;
    }

    /// Has a failed cast tried again if that may help, else says what is lost.
    async fn cast_failed(&self, cast: &Cast, receipts: &Receipts, failure: &RemoteFailure) {
        let unique_id = cast.unique_id.as_deref();
        let failure_text = shown(&failure.to_string());
        if !failure.is_passing {
            receipts.take();
            warn!(method = %cast.method, ?unique_id, failure = %failure_text, "a cast failed");
            return;
        }
        let tries = match self.seen.failed(unique_id) {
            Some(tries) => tries,
            // One that cannot be recognised is tried twice: the broker says that it was.
            None if cast.redelivered => MAX_TRIES,
            None => 1,
        };
        let pause = FIRST_TRY_PAUSE.saturating_mul(1 << (tries - 1).min(10));
        let pause = pause.min(LONGEST_TRY_PAUSE);
        let in_time = cast.expires.is_none_or(|at| at > Instant::now() + pause);
        if tries < MAX_TRIES && in_time && !receipts.are_taken() {
            warn!(method = %cast.method, ?unique_id, tries, failure = %failure_text, "a cast met passing trouble; tried again");
            sleep(pause).await;
            if self.seen.requeue(unique_id, receipts) {
                self.stats.casts_requeued.add();
                return;
            }
        }
        receipts.take();
        self.stats.casts_lost.add();
        tracing::error!(
            method = %cast.method, ?unique_id, about = ?cast.about, tries, failure = %failure_text,
            "a cast is given up, and its sender does not know: what it asked for is not done"
        );
    }

    /// Runs the handler, heartbeats beside it if the caller monitors the call.
    async fn answer(
        &self,
        request: RequestIn,
        receipts: &Arc<Receipts>,
        answer_to: Option<&AnswerTo>,
        redelivered: bool,
    ) -> Result<Value, RemoteFailure> {
        let (endpoint, method) = dispatch::find(&self.endpoints, &request)?;
        let monitor_s = monitor_seconds(&request.monitor_s);
        let request = Request {
            method,
            namespace: request.namespace,
            version: match request.version {
                Version::Text(version) => Some(version),
                Version::Absent | Version::Null => None,
            },
            args: request.args,
            context: request.context,
            unique_id: request.unique_id,
            monitor_s,
            wants_reply: answer_to.is_some(),
            redelivered,
            receipts: receipts.clone(),
        };
        let method = request.method.clone();
        let handler = AssertUnwindSafe(async { endpoint.handle(request).await }).catch_unwind();
        let caught = match (answer_to, heartbeat_interval(monitor_s)) {
            (Some(answer_to), Some(interval)) => {
                let heartbeats = pin!(self.heartbeats(answer_to, interval));
                tokio::select! {
                    biased;
                    caught = handler => caught,
                    () = heartbeats => unreachable!("heartbeats go on until dropped"),
                }
            }
            _ => handler.await,
        };
        caught.unwrap_or_else(|panic| {
            self.stats.handler_panics.add();
            let what = shown(panic_text(panic.as_ref()));
            tracing::error!(%method, %what, "handler panicked");
            Err(RemoteFailure::runtime_error(format!(
                "internal error in {method}"
            )))
        })
    }

    async fn heartbeats(&self, answer_to: &AnswerTo, interval: Duration) {
        let address = Address::Reply {
            queue: answer_to.queue.clone(),
        };
        loop {
            sleep(interval).await;
            let beat = Outgoing {
                body: Arc::new(encode_reply(&answer_to.msg_id, &Value::Null, None, false)),
                expiration: None,
                mandatory: true,
            };
            match self
                .transport
                .send(&address, &beat, Instant::now() + interval)
                .await
            {
                Ok(()) => self.stats.heartbeats_sent.add(),
                Err(error) => debug!(%error, "heartbeat not sent"),
            }
        }
    }

    async fn reply(&self, to: AnswerTo, outcome: Result<Value, RemoteFailure>) {
        if self.is_gone(&to.queue) {
            self.stats.replies_dropped.add();
            return;
        }
        let failure = outcome.as_ref().err().map(RemoteFailure::to_wire);
        let message = Outgoing {
            body: Arc::new(encode_reply(
                &to.msg_id,
                outcome.as_ref().unwrap_or(&Value::Null),
                failure.as_deref(),
                true,
            )),
            expiration: None,
            mandatory: true,
        };
        let address = Address::Reply { queue: to.queue };
        let give_up = Instant::now() + self.limits.reply_retry;
        loop {
            let now = Instant::now();
            let deadline = give_up.max(now + self.limits.publish_timeout);
            match self.transport.send(&address, &message, deadline).await {
                Ok(()) => return self.stats.replies_sent.add(),
                Err(TransportError::NoRoute { .. }) if Instant::now() < give_up => {
                    sleep(REPLY_RETRY_PAUSE).await;
                }
                Err(error) => {
                    self.stats.replies_dropped.add();
                    warn!(%error, "reply dropped");
                    if let (TransportError::NoRoute { .. }, Address::Reply { queue }) =
                        (error, address)
                    {
                        self.remember_gone(queue);
                    }
                    return;
                }
            }
        }
    }

    fn is_gone(&self, queue: &str) -> bool {
        let mut gone = self.gone.lock().unwrap_or_else(PoisonError::into_inner);
        if gone.is_empty() {
            return false;
        }
        let now = Instant::now();
        gone.retain(|(_, until)| *until > now);
        gone.iter().any(|(name, _)| name == queue)
    }

    fn remember_gone(&self, queue: String) {
        let mut gone = self.gone.lock().unwrap_or_else(PoisonError::into_inner);
        if gone.len() >= MAX_GONE {
            gone.remove(0);
        }
        gone.push((queue, Instant::now() + GONE_FOR));
    }
}

/// What is remembered of a cast while it runs, should it fail.
struct Cast {
    method: String,
    unique_id: Option<String>,
    /// The UUIDs among its arguments; the rest may hold what no log should.
    about: Vec<String>,
    redelivered: bool,
    expires: Option<Instant>,
}

impl Cast {
    fn of(request: &RequestIn, redelivered: bool, expires: Option<Instant>) -> Self {
        let args = request.args.as_ref().map_or("{}", |raw| raw.get());
        Self {
            method: shown_value(&request.method),
            unique_id: request.unique_id.clone(),
            about: uuids(args).take(MAX_NAMED).collect(),
            redelivered,
            expires,
        }
    }
}

/// The UUIDs that a JSON text has as its texts.
fn uuids(json: &str) -> impl Iterator<Item = String> {
    let texts = json.split('"').filter(|text| text.len() == 36);
    texts.filter_map(|text| Some(uuid::Uuid::parse_str(text).ok()?.to_string()))
}

/// `_timeout` as Python's `int()` reads numbers and texts; junk is none.
fn monitor_seconds(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse::<i64>().ok().map(|whole| whole as f64),
        _ => None,
    }
}

/// Half of the whole seconds; below one second none, as oslo does it.
fn heartbeat_interval(monitor_s: Option<f64>) -> Option<Duration> {
    let interval = monitor_s?.trunc() / 2.0;
    // A day is beyond any call; it keeps nonsense out of the arithmetic.
    (1.0..=86_400.0)
        .contains(&interval)
        .then(|| Duration::from_secs_f64(interval))
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no text)")
}

fn shown_value(value: &Value) -> String {
    shown(value.as_str().unwrap_or("(no name)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_cast_is_named_by_its_uuids_and_nothing_else() {
        let id = "6f1f3a36-6b3e-4a7e-9f0a-1d9a4b7d0001";
        let args = format!(r#"{{"instance":{{"uuid":"{id}"}},"key":"secret","n":36}}"#);
        assert_eq!(uuids(&args).collect::<Vec<_>>(), [id]);
    }

    #[test]
    fn heartbeat_intervals_are_oslos() {
        let interval = |json: &str| {
            let value = serde_json::from_str(json).unwrap();
            heartbeat_interval(monitor_seconds(&value)).map(|i| i.as_secs_f64())
        };
        assert_eq!(interval("1"), None);
        assert_eq!(interval("2"), Some(1.0));
        assert_eq!(interval("3.9"), Some(1.5));
        assert_eq!(interval("\"2\""), Some(1.0));
        assert_eq!(interval("\"junk\""), None);
        assert_eq!(interval("null"), None);
        assert_eq!(interval("-4"), None);
        assert_eq!(interval("1e300"), None);
        assert_eq!(interval("[2]"), None);
    }
}
