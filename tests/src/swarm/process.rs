//! A process of the swarm: what it can do to the world goes through here, so that
//! it can be stopped at any moment and go on later, or never.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use drover_rpc::{
    RpcStats, TransportError,
    transport::{Address, Incoming, Listening, Outgoing, Sink, Subscription, Transport},
};
use tokio::{sync::watch, time::Instant};

use super::trace::Trace;

/// Wall clocks begin here, milliseconds since 1970.
const EPOCH_MS: u64 = 1_800_000_000_000;

/// A wall clock that can be wrong.
#[derive(Clone)]
pub(super) struct WallClock {
    began: Instant,
    ahead_ms: Arc<AtomicI64>,
}

impl WallClock {
    /// One that is right.
    pub(super) fn new(began: Instant) -> Self {
        Self {
            began,
            ahead_ms: Arc::default(),
        }
    }

    /// It is so far ahead of the right time from now on.
    pub(super) fn set_ahead(&self, ms: i64) {
        self.ahead_ms.store(ms, Ordering::Relaxed);
    }

    /// What it shows.
    pub(super) fn now_ms(&self) -> u64 {
        let elapsed = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        (EPOCH_MS + elapsed).saturating_add_signed(self.ahead_ms.load(Ordering::Relaxed))
    }
}

/// What somebody listens with, until it is taken away.
type Hearing = Arc<Mutex<Option<Arc<dyn Listening>>>>;

#[derive(Default)]
struct Mail {
    /// What came while the process stood still.
    held: VecDeque<(Sink, Incoming)>,
    /// Where it listens.
    ears: Vec<Hearing>,
}

/// One life of a process. Dropped, it is dead: nothing of it does anything more.
pub(super) struct Life {
    still: watch::Sender<bool>,
    mail: Arc<Mutex<Mail>>,
}

impl Life {
    /// It begins.
    pub(super) fn new() -> Self {
        Self {
            still: watch::Sender::new(false),
            mail: Arc::default(),
        }
    }

    /// Whether it stands still, for what it holds.
    pub(super) fn still(&self) -> watch::Receiver<bool> {
        self.still.subscribe()
    }

    /// Its way to the broker.
    pub(super) fn transport(
        &self,
        name: &str,
        inner: Arc<dyn Transport>,
        trace: &Trace,
    ) -> Arc<dyn Transport> {
        Arc::new(Held {
            name: name.to_owned(),
            inner,
            still: self.still(),
            mail: self.mail.clone(),
            trace: trace.clone(),
        })
    }

    /// It stands still from now on: nothing that it does reaches anybody.
    pub(super) fn freeze(&self) {
        self.still.send_replace(true);
    }

    /// It goes on, as if no time had passed.
    pub(super) fn thaw(&self) {
        self.still.send_replace(false);
        loop {
            let next = lock(&self.mail).held.pop_front();
            match next {
                Some((sink, incoming)) => sink(incoming),
                None => return,
            }
        }
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        let mut mail = lock(&self.mail);
        let (held, ears) = (
            std::mem::take(&mut mail.held),
            std::mem::take(&mut mail.ears),
        );
        drop(mail);
        drop(held);
        for ear in ears {
            drop(ear.lock().unwrap_or_else(PoisonError::into_inner).take());
        }
    }
}

fn lock(mail: &Mutex<Mail>) -> MutexGuard<'_, Mail> {
    mail.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits while a process stands still; for ever if it is dead.
async fn goes_on(still: &watch::Receiver<bool>) {
    if still.clone().wait_for(|still| !still).await.is_err() {
        std::future::pending::<()>().await;
    }
}

struct Held {
    name: String,
    inner: Arc<dyn Transport>,
    still: watch::Receiver<bool>,
    mail: Arc<Mutex<Mail>>,
    trace: Trace,
}

#[async_trait]
impl Transport for Held {
    async fn send(
        &self,
        to: &Address,
        message: &Outgoing,
        deadline: Instant,
    ) -> Result<(), TransportError> {
        goes_on(&self.still).await;
        self.trace.sent(&self.name, to, &message.body);
        self.inner.send(to, message, deadline).await
    }

    fn listen(&self, what: Subscription, sink: Sink) -> Result<Box<dyn Listening>, TransportError> {
        let (still, mail) = (self.still.clone(), self.mail.clone());
        let held: Sink = Arc::new(move |incoming| {
            if *still.borrow() {
                lock(&mail).held.push_back((sink.clone(), incoming));
            } else if still.has_changed().is_ok() {
                sink(incoming);
            }
        });
        let inner = Arc::from(self.inner.listen(what, held)?);
        let ear = Arc::new(Mutex::new(Some(inner)));
        lock(&self.mail).ears.push(ear.clone());
        Ok(Box::new(Ear(ear)))
    }

    async fn consumers(
        &self,
        topic: &str,
        server: &str,
        deadline: Instant,
    ) -> Result<Option<u32>, TransportError> {
        goes_on(&self.still).await;
        self.inner.consumers(topic, server, deadline).await
    }

    fn stats(&self) -> &Arc<RpcStats> {
        self.inner.stats()
    }

    async fn close(&self) {
        self.inner.close().await;
    }
}

/// What a process listens with; gone with its life.
struct Ear(Hearing);

impl Ear {
    fn inner(&self) -> Option<Arc<dyn Listening>> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

#[async_trait]
impl Listening for Ear {
    async fn ready(&self) {
        if let Some(inner) = self.inner() {
            inner.ready().await;
        }
    }

    async fn pause(&self) {
        if let Some(inner) = self.inner() {
            inner.pause().await;
        }
    }

    async fn close(&self) {
        if let Some(inner) = self.inner() {
            inner.close().await;
        }
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        drop(self.0.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// A span of virtual time in seconds.
pub(super) fn seconds(s: u64) -> Duration {
    Duration::from_secs(s)
}
