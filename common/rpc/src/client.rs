//! Calling other services.
//!
//! One reply queue per client (and its clones), made with the first call and
//! kept, under the same name, through every loss of the broker.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, value::RawValue};
use tokio::{
    sync::{Notify, OnceCell, oneshot},
    time::{Instant, sleep_until},
};
use tracing::{debug, warn};

use crate::{
    context::RequestContext,
    envelope::{ReplyIn, ReplyWanted, RequestOut, unique_id},
    error::{RpcError, TransportError},
    failure::RemoteFailure,
    settings::MessagingSettings,
    stats::RpcStats,
    target::Target,
    text::shown,
    transport::{CONTENT_TYPE_JSON, Incoming, Listening, Outgoing, Subscription, Transport},
};

/// How one call differs from the settings.
#[derive(Debug, Clone, Copy, Default)]
pub struct CallOptions {
    /// How long to wait for the answer; `None` is the setting.
    pub timeout: Option<Duration>,
    /// Whole seconds: the peer sends heartbeats while it works, and the call
    /// fails when none came for this long. For long work with a long `timeout`.
    /// A request that nobody took up for so long is not taken up later: its
    /// caller has given up by then.
    pub monitor_timeout: Option<Duration>,
    /// Fail at once when nobody listens, instead of waiting for the timeout.
    pub mandatory: bool,
}

/// A client; clones share its reply queue.
#[derive(Clone)]
pub struct RpcClient {
    inner: Arc<Inner>,
}

struct Inner {
    transport: Arc<dyn Transport>,
    reply_queue: String,
    listening: OnceCell<Box<dyn Listening>>,
    waiting: Arc<Waiting>,
    response_timeout: Duration,
    publish_timeout: Duration,
}

impl RpcClient {
    /// A client on a transport. One per process is enough.
    pub fn new(transport: Arc<dyn Transport>, settings: &MessagingSettings) -> Self {
        let stats = transport.stats().clone();
        let waiting = Arc::new(Waiting::new(stats, settings));
        Self {
            inner: Arc::new(Inner {
                transport,
                reply_queue: format!("reply_{:032x}", unique_id()),
                listening: OnceCell::new(),
                waiting,
                response_timeout: settings.response_timeout(),
                publish_timeout: settings.publish_timeout(),
            }),
        }
    }

    /// Calls a method and waits for its result, as long as the settings say.
    ///
    /// # Errors
    /// See [`RpcError`]; its class says what may be done.
    pub async fn call<A, R>(
        &self,
        target: &Target,
        context: &RequestContext,
        method: &str,
        args: &A,
    ) -> Result<R, RpcError>
    where
        A: Serialize + Sync + ?Sized,
        R: DeserializeOwned,
    {
        self.call_with(target, context, method, args, CallOptions::default())
            .await
    }

    /// Calls a method with options of one's own.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub async fn call_with<A, R>(
        &self,
        target: &Target,
        context: &RequestContext,
        method: &str,
        args: &A,
        options: CallOptions,
    ) -> Result<R, RpcError>
    where
        A: Serialize + Sync + ?Sized,
        R: DeserializeOwned,
    {
        let stats = self.inner.transport.stats();
        stats.calls_started.add();
        let outcome = self.exchange(target, context, method, args, options).await;
        let outcome = outcome.and_then(|result| read_result(result, target, method));
        match &outcome {
            Ok(_) => stats.calls_succeeded.add(),
            Err(RpcError::Timeout { .. } | RpcError::PeerSilent { .. }) => {
                stats.calls_timed_out.add();
            }
            Err(RpcError::NotSent { .. }) => stats.sends_failed.add(),
            Err(_) => stats.calls_failed.add(),
        }
        outcome
    }

    /// Asks for something to be done and does not wait for it to be done, only
    /// for the broker to take the request. With a fanout target, asks everybody.
    ///
    /// # Errors
    /// [`RpcError::NotSent`] or [`RpcError::BadArguments`].
    pub async fn cast<A>(
        &self,
        target: &Target,
        context: &RequestContext,
        method: &str,
        args: &A,
    ) -> Result<(), RpcError>
    where
        A: Serialize + Sync + ?Sized,
    {
        self.cast_within(target, context, method, args, None).await
    }

    /// The same, of what is worth nothing when it was not read after so long: it is
    /// read then no more.
    ///
    /// # Errors
    /// As [`Self::cast`].
    pub async fn cast_within<A>(
        &self,
        target: &Target,
        context: &RequestContext,
        method: &str,
        args: &A,
        expiration: Option<Duration>,
    ) -> Result<(), RpcError>
    where
        A: Serialize + Sync + ?Sized,
    {
        let body = RequestOut {
            method,
            args,
            namespace: target.namespace_name(),
            version: target.version_text(),
            reply: None,
            unique_id: unique_id(),
            context,
        }
        .encode()
        .map_err(|reason| bad_arguments(method, reason))?;
        let message = Outgoing {
            body: Arc::new(body),
            expiration,
            mandatory: false,
        };
        let patience = expiration.map_or(self.inner.publish_timeout, |wait| {
            wait.min(self.inner.publish_timeout)
        });
        let deadline = Instant::now() + patience;
        let stats = self.inner.transport.stats();
        let address = target.address();
        let sent = self.inner.transport.send(&address, &message, deadline);
        sent.await.map_err(|source| {
            stats.sends_failed.add();
            not_sent(method, target, source)
        })?;
        stats.casts_sent.add();
        Ok(())
    }

    /// How many consumers a server's queue has, as the broker says; none if there
    /// is no such queue.
    ///
    /// # Errors
    /// The broker did not say in time.
    pub async fn consumers(
        &self,
        topic: &str,
        server: &str,
        timeout: Duration,
    ) -> Result<Option<u32>, TransportError> {
        let deadline = Instant::now() + timeout;
        let counting = self.inner.transport.consumers(topic, server, deadline);
        counting.await
    }

    /// Calls that wait for an answer now.
    pub fn in_flight(&self) -> usize {
        self.inner.waiting.lock().len()
    }

    /// Stops listening for replies. Calls still waiting run into their timeouts.
    pub async fn close(&self) {
        if let Some(listening) = self.inner.listening.get() {
            listening.close().await;
        }
    }

    async fn exchange<A: Serialize + Sync + ?Sized>(
        &self,
        target: &Target,
        context: &RequestContext,
        method: &str,
        args: &A,
        options: CallOptions,
    ) -> Result<Option<Box<RawValue>>, RpcError> {
        if target.is_fanout() {
            let reason = "a call goes to one server; use cast for all of them".to_owned();
            return Err(bad_arguments(method, reason));
        }
        let timeout = options.timeout.unwrap_or(self.inner.response_timeout);
        let started = Instant::now();
        let deadline = started + timeout;
        let msg_id = unique_id();
        let message = Outgoing {
            body: Arc::new(self.encode_call(target, context, method, args, msg_id, &options)?),
            expiration: Some(options.monitor_timeout.map_or(timeout, |m| m.min(timeout))),
            mandatory: options.mandatory,
        };
        let send_by = deadline.min(started + self.inner.publish_timeout);
        self.listen_for_replies(send_by)
            .await
            .map_err(|source| not_sent(method, target, source))?;
        let call = self.inner.waiting.register(msg_id, method)?;
        let address = target.address();
        let send = self.inner.transport.send(&address, &message, send_by);
        call.wait(send, deadline, options.monitor_timeout)
            .await
            .map_err(|trouble| {
                let waited = started.elapsed();
                trouble.into_error(method, target, msg_id, waited)
            })
    }

    fn encode_call<A: Serialize + ?Sized>(
        &self,
        target: &Target,
        context: &RequestContext,
        method: &str,
        args: &A,
        msg_id: u128,
        options: &CallOptions,
    ) -> Result<Vec<u8>, RpcError> {
        RequestOut {
            method,
            args,
            namespace: target.namespace_name(),
            version: target.version_text(),
            reply: Some(ReplyWanted {
                msg_id,
                queue: &self.inner.reply_queue,
                monitor_s: options.monitor_timeout.map(|time| time.as_secs_f64()),
            }),
            unique_id: unique_id(),
            context,
        }
        .encode()
        .map_err(|reason| bad_arguments(method, reason))
    }

    /// The first call waits for its reply queue: a reply sent before the queue
    /// is there would be lost to a server that does not try again.
    async fn listen_for_replies(&self, deadline: Instant) -> Result<(), TransportError> {
        if self.inner.listening.initialized() {
            return Ok(());
        }
        let set_up = self.inner.listening.get_or_try_init(|| async {
            let waiting = self.inner.waiting.clone();
            let listening = self.inner.transport.listen(
                Subscription::Replies {
                    queue: self.inner.reply_queue.clone(),
                },
                Arc::new(move |message| waiting.receive(message)),
            )?;
            listening.ready().await;
            Ok(listening)
        });
        let started = Instant::now();
        match tokio::time::timeout_at(deadline, set_up).await {
            Ok(set_up) => set_up.map(|_| ()),
            Err(_) => Err(TransportError::Unavailable {
                broker: "the broker".to_owned(),
                waited_ms: started.elapsed().as_millis() as u64,
                reason: "the reply queue could not be set up".to_owned(),
            }),
        }
    }
}

/// The calls of a client that wait for their answers.
pub(crate) struct Waiting {
    calls: Mutex<HashMap<u128, Caller>>,
    stats: Arc<RpcStats>,
    max_waiting: usize,
    max_message_bytes: usize,
}

struct Caller {
    answer: oneshot::Sender<Answer>,
    heard: Arc<Notify>,
    /// A result that came ahead of its ending, as old servers send it.
    part: Option<Box<RawValue>>,
}

pub(crate) type Answer = Result<Option<Box<RawValue>>, Trouble>;

impl Waiting {
    pub(crate) fn new(stats: Arc<RpcStats>, settings: &MessagingSettings) -> Self {
        Self {
            calls: Mutex::default(),
            stats,
            max_waiting: settings.max_waiting_calls,
            max_message_bytes: settings.max_message_bytes,
        }
    }

    /// Makes room for one answer.
    pub(crate) fn register(&self, msg_id: u128, method: &str) -> Result<Call<'_>, RpcError> {
        let (answer, answered) = oneshot::channel();
        let heard = Arc::new(Notify::new());
        let mut calls = self.lock();
        if calls.len() >= self.max_waiting {
            return Err(RpcError::TooManyCalls {
                method: method.to_owned(),
                limit: self.max_waiting,
            });
        }
        let caller = Caller {
            answer,
            heard: heard.clone(),
            part: None,
        };
        calls.insert(msg_id, caller);
        drop(calls);
        Ok(Call {
            waiting: self,
            msg_id,
            answered,
            heard,
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u128, Caller>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sink of the reply queue.
    pub(crate) fn receive(&self, message: Incoming) {
        message.receipt.acknowledge();
        if message.content_type.as_deref() != Some(CONTENT_TYPE_JSON)
            || message.compression.is_some()
        {
            self.stats.messages_unsupported.add();
            warn!("reply is not plain application/json, dropped");
            return;
        }
        if message.body.len() > self.max_message_bytes {
            self.stats.messages_oversized.add();
            warn!(size = message.body.len(), "reply is too large, dropped");
            return;
        }
        match ReplyIn::decode(&message.body) {
            Ok(reply) => self.take(reply),
            Err(unreadable) => {
                self.stats.messages_undecodable.add();
                let reason = shown(&unreadable.reason);
                warn!(%reason, "reply cannot be read");
                let msg_id = unreadable.answer_to.map(|to| to.msg_id);
                if let Some(caller) = self.remove(msg_id.as_deref()) {
                    let _ = caller.answer.send(Err(Trouble::BadReply(reason)));
                }
            }
        }
    }

    fn take(&self, reply: ReplyIn) {
        let failure = match reply.failure {
            None | Some(Value::Null) => None,
            Some(Value::String(text)) if text.is_empty() => None,
            Some(Value::String(text)) => Some(RemoteFailure::from_wire(&text)),
            Some(other) => Some(RemoteFailure::from_wire(&other.to_string())),
        };
        if !reply.ending && failure.is_none() {
            self.hear(reply.msg_id.as_deref(), reply.result);
            return;
        }
        let Some(caller) = self.remove(reply.msg_id.as_deref()) else {
            self.stats.replies_late.add();
            debug!(msg_id = ?reply.msg_id.as_deref().map(shown), "nobody waits for this reply");
            return;
        };
        let answer = match failure {
            None => Ok(reply
                .result
                .filter(|raw| raw.get() != "null")
                .or(caller.part)),
            Some(Ok(failure)) => Err(Trouble::Failure(failure)),
            Some(Err(reason)) => Err(Trouble::BadReply(shown(&reason))),
        };
        // The caller may have given up this instant.
        let _ = caller.answer.send(answer);
    }

    /// A heartbeat, or the first half of a two-part reply.
    fn hear(&self, msg_id: Option<&str>, result: Option<Box<RawValue>>) {
        let mut calls = self.lock();
        let Some(caller) = parse_id(msg_id).and_then(|id| calls.get_mut(&id)) else {
            return;
        };
        if let Some(result) = result.filter(|raw| raw.get() != "null") {
            caller.part = Some(result);
        }
        caller.heard.notify_one();
    }

    fn remove(&self, msg_id: Option<&str>) -> Option<Caller> {
        self.lock().remove(&parse_id(msg_id)?)
    }
}

fn parse_id(text: Option<&str>) -> Option<u128> {
    let text = text.filter(|text| text.len() == 32)?;
    u128::from_str_radix(text, 16).ok()
}

/// A registered call; leaves the register however it ends.
pub(crate) struct Call<'a> {
    waiting: &'a Waiting,
    msg_id: u128,
    answered: oneshot::Receiver<Answer>,
    heard: Arc<Notify>,
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.waiting.lock().remove(&self.msg_id);
    }
}

impl Call<'_> {
    /// Sends and waits. Once the broker has taken the request the call waits on
    /// through a lost connection: the answer can still come after it is back.
    pub(crate) async fn wait(
        mut self,
        send: impl Future<Output = Result<(), TransportError>>,
        deadline: Instant,
        monitor: Option<Duration>,
    ) -> Answer {
        let mut send = std::pin::pin!(send);
        let mut sent = false;
        let until = |now: Instant| monitor.map_or(deadline, |silence| deadline.min(now + silence));
        let mut timer = std::pin::pin!(sleep_until(until(Instant::now())));
        loop {
            tokio::select! {
                biased;
                answer = &mut self.answered => {
                    return answer.unwrap_or(Err(Trouble::Silence(None)));
                }
                outcome = &mut send, if !sent => {
                    outcome.map_err(Trouble::NotSent)?;
                    sent = true;
                    if monitor.is_some() {
                        timer.as_mut().reset(until(Instant::now()));
                    }
                }
                () = self.heard.notified(), if monitor.is_some() => {
                    timer.as_mut().reset(until(Instant::now()));
                }
                () = &mut timer => {
                    let over = Instant::now() >= deadline;
                    return Err(Trouble::Silence(monitor.filter(|_| !over)));
                }
            }
        }
    }
}

/// Why a call has no result, before it is dressed as an error.
#[derive(Debug)]
pub(crate) enum Trouble {
    NotSent(TransportError),
    /// No answer: in all the time, or no heartbeat for so long.
    Silence(Option<Duration>),
    Failure(RemoteFailure),
    BadReply(String),
}

impl Trouble {
    fn into_error(self, method: &str, target: &Target, msg_id: u128, waited: Duration) -> RpcError {
        let target_name = target.to_string();
        let msg_id = format!("{msg_id:032x}");
        let method = method.to_owned();
        match self {
            Self::NotSent(source) => RpcError::NotSent {
                method,
                target_name,
                source,
            },
            Self::Silence(None) => RpcError::Timeout {
                method,
                target_name,
                msg_id,
                waited,
            },
            Self::Silence(Some(silence)) => RpcError::PeerSilent {
                method,
                target_name,
                msg_id,
                silence,
            },
            Self::Failure(failure) => RpcError::Remote {
                method,
                target_name,
                failure,
            },
            Self::BadReply(reason) => RpcError::BadReply {
                method,
                target_name,
                reason,
            },
        }
    }
}

fn read_result<R: DeserializeOwned>(
    result: Option<Box<RawValue>>,
    target: &Target,
    method: &str,
) -> Result<R, RpcError> {
    let text = result.as_ref().map_or("null", |raw| raw.get());
    serde_json::from_str(text).map_err(|error| RpcError::BadReply {
        method: method.to_owned(),
        target_name: target.to_string(),
        reason: shown(&error.to_string()),
    })
}

fn bad_arguments(method: &str, reason: String) -> RpcError {
    RpcError::BadArguments {
        method: method.to_owned(),
        reason,
    }
}

fn not_sent(method: &str, target: &Target, source: TransportError) -> RpcError {
    RpcError::NotSent {
        method: method.to_owned(),
        target_name: target.to_string(),
        source,
    }
}
