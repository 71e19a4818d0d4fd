//! A broker in this process, for tests and simulation: queues, shared
//! consumption, prefetch, acknowledgements, redelivery and expiry as the real
//! one has them, and faults from a seed that the real one has rarely.
//!
//! All waiting is on tokio's clock, so a paused clock runs it in no time; on a
//! single-threaded runtime the same seed gives the same run.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout_at},
};

use crate::{
    error::TransportError,
    stats::RpcStats,
    transport::{
        Address, CONTENT_TYPE_JSON, Incoming, Listening, Outgoing, Receipt, Settler, Sink,
        Subscription, Transport, Verdict,
    },
};

/// Messages a queue holds before it drops its oldest.
const MAX_QUEUED: usize = 100_000;
/// Unacknowledged messages a consumer holds.
const PREFETCH: usize = 64;

/// What goes wrong, and how often (0.0 never, 1.0 always).
#[derive(Debug, Clone)]
pub struct Faults {
    /// Shortest time a message takes.
    pub delay_min: Duration,
    /// Longest time a message takes.
    pub delay_max: Duration,
    /// A message is taken and never delivered.
    pub loss: f64,
    /// A message is delivered twice.
    pub duplication: f64,
    /// A message overtakes others in its queue.
    pub reordering: f64,
}

impl Default for Faults {
    /// A perfect broker.
    fn default() -> Self {
        Self {
            delay_min: Duration::ZERO,
            delay_max: Duration::ZERO,
            loss: 0.0,
            duplication: 0.0,
            reordering: 0.0,
        }
    }
}

/// The broker. Clones are the same one.
#[derive(Clone)]
pub struct MemoryBroker(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Counts changes of who is cut off, for those who wait.
    changes: watch::Sender<u64>,
}

struct State {
    faults: Faults,
    random: fastrand::Rng,
    queues: BTreeMap<String, Queue>,
    fanouts: HashMap<String, Vec<String>>,
    cut: HashSet<String>,
    next_id: u64,
}

#[derive(Default)]
struct Queue {
    messages: VecDeque<Message>,
    consumers: Vec<Consumer>,
    turn: usize,
}

#[derive(Clone)]
struct Message {
    body: Arc<Vec<u8>>,
    content_type: Option<String>,
    expiration: Option<Duration>,
    expires: Option<Instant>,
    due: Instant,
    redelivered: bool,
}

struct Consumer {
    id: u64,
    node: String,
    sink: Sink,
    unsettled: BTreeMap<u64, Message>,
}

impl Default for MemoryBroker {
    fn default() -> Self {
        Self::new(0, Faults::default())
    }
}

impl MemoryBroker {
    /// A broker whose faults follow from the seed.
    pub fn new(seed: u64, faults: Faults) -> Self {
        Self(Arc::new(Shared {
            state: Mutex::new(State {
                faults,
                random: fastrand::Rng::with_seed(seed),
                queues: BTreeMap::new(),
                fanouts: HashMap::new(),
                cut: HashSet::new(),
                next_id: 0,
            }),
            changes: watch::Sender::new(0),
        }))
    }

    /// The broker as seen from a node. The name is what [`Self::cut`] takes.
    pub fn transport(&self, node: impl Into<String>) -> Arc<dyn Transport> {
        Arc::new(MemoryTransport {
            shared: self.0.clone(),
            node: node.into(),
            stats: Arc::default(),
            closed: watch::Sender::new(false),
        })
    }

    /// Other faults from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.0.lock().faults = faults;
    }

    /// Cuts a node off: its sends wait, nothing reaches it, and what it had not
    /// settled goes to others, or to itself again later.
    pub fn cut(&self, node: &str) {
        let mut state = self.0.lock();
        state.cut.insert(node.to_owned());
        for queue in state.queues.values_mut() {
            queue.requeue(|consumer| consumer.node == node);
        }
        drop(state);
        self.0.changed();
    }

    /// Ends [`Self::cut`].
    pub fn heal(&self, node: &str) {
        self.0.lock().cut.remove(node);
        self.0.changed();
    }

    /// Messages waiting at an address, delivered and unsettled ones not counted.
    pub fn queued(&self, address: &Address) -> usize {
        let state = self.0.lock();
        let names = state.route(address);
        names
            .iter()
            .filter_map(|name| state.queues.get(name))
            .map(|queue| queue.messages.len())
            .sum()
    }

    /// Puts a raw message in, without faults, as some other program might.
    pub fn inject(&self, to: &Address, body: impl Into<Vec<u8>>, content_type: Option<&str>) {
        let message = Message {
            body: Arc::new(body.into()),
            content_type: content_type.map(str::to_owned),
            expiration: None,
            expires: None,
            due: Instant::now(),
            redelivered: false,
        };
        let names = self.0.lock().route(to);
        for name in &names {
            if let Some(queue) = self.0.lock().queues.get_mut(name) {
                queue.push(message.clone(), None);
            }
            self.0.pump(name);
        }
    }
}

impl Queue {
    fn push(&mut self, message: Message, at: Option<usize>) {
        if self.messages.len() >= MAX_QUEUED {
            self.messages.pop_front();
        }
        let at = at.unwrap_or(self.messages.len()).min(self.messages.len());
        self.messages.insert(at, message);
    }

    /// Puts what those consumers had not settled back to the front.
    fn requeue(&mut self, which: impl Fn(&Consumer) -> bool) {
        for consumer in self.consumers.iter_mut().filter(|c| which(c)) {
            for (_, mut message) in std::mem::take(&mut consumer.unsettled).into_iter().rev() {
                message.redelivered = true;
                message.due = Instant::now();
                self.messages.push_front(message);
            }
        }
    }
}

impl State {
    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn route(&self, to: &Address) -> Vec<String> {
        let name = match to {
            Address::Fanout { topic } => {
                return self.fanouts.get(topic).cloned().unwrap_or_default();
            }
            Address::Topic { .. }
            | Address::Server { .. }
            | Address::Reply { .. }
            | Address::Notification { .. } => to.to_string(),
        };
        match self.queues.contains_key(&name) {
            true => vec![name],
            false => Vec::new(),
        }
    }

    /// What becomes of a message: when its copies are due.
    fn fate(&mut self) -> Vec<Instant> {
        let chance = |random: &mut fastrand::Rng, p: f64| p > 0.0 && random.f64() < p;
        let faults = self.faults.clone();
        if chance(&mut self.random, faults.loss) {
            return Vec::new();
        }
        let copies = 1 + usize::from(chance(&mut self.random, faults.duplication));
        let spread = faults.delay_max.saturating_sub(faults.delay_min);
        (0..copies)
            .map(|_| Instant::now() + faults.delay_min + spread.mul_f64(self.random.f64()))
            .collect()
    }

    /// Where in a queue of that length a message lands, if not at the end.
    fn overtakes(&mut self, queued: usize) -> Option<usize> {
        let reordering = self.faults.reordering;
        (reordering > 0.0 && self.random.f64() < reordering).then(|| self.random.usize(0..=queued))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(self: &Arc<Self>) {
        self.changes.send_modify(|count| *count += 1);
        let names: Vec<String> = self.lock().queues.keys().cloned().collect();
        for name in names {
            self.pump(&name);
        }
    }

    /// Delivers what is due and has a consumer. Sinks run outside the lock:
    /// they may settle.
    fn pump(self: &Arc<Self>, name: &str) {
        while let Some((sink, incoming)) = self.next_delivery(name) {
            sink(incoming);
        }
    }

    fn next_delivery(self: &Arc<Self>, name: &str) -> Option<(Sink, Incoming)> {
        let mut state = self.lock();
        let state = &mut *state;
        let tag = state.id();
        let queue = state.queues.get_mut(name)?;
        let now = Instant::now();
        while queue.messages.front()?.expires.is_some_and(|at| at <= now) {
            queue.messages.pop_front();
        }
        let due = queue.messages.front()?.due;
        if due > now {
            let (shared, name) = (self.clone(), name.to_owned());
            tokio::spawn(async move {
                sleep_until(due).await;
                shared.pump(&name);
            });
            return None;
        }
        let count = queue.consumers.len();
        let chosen = (0..count).map(|n| (queue.turn + n) % count).find(|&n| {
            let consumer = &queue.consumers[n];
            consumer.unsettled.len() < PREFETCH && !state.cut.contains(&consumer.node)
        })?;
        queue.turn = chosen + 1;
        let message = queue.messages.pop_front()?;
        let consumer = &mut queue.consumers[chosen];
        consumer.unsettled.insert(tag, message.clone());
        let receipt = Receipt::new(
            Arc::new(Place {
                shared: self.clone(),
                queue: name.to_owned(),
                consumer: consumer.id,
            }),
            tag,
        );
        let incoming = Incoming {
            body: message.body.to_vec(),
            content_type: message.content_type,
            compression: None,
            expiration: message.expiration,
            redelivered: message.redelivered,
            receipt,
        };
        Some((consumer.sink.clone(), incoming))
    }
}

/// One consumer's place at one queue.
struct Place {
    shared: Arc<Shared>,
    queue: String,
    consumer: u64,
}

impl Settler for Place {
    fn settle(&self, tag: u64, verdict: Verdict) {
        if let Some(queue) = self.shared.lock().queues.get_mut(&self.queue)
            && let Some(consumer) = queue.consumers.iter_mut().find(|c| c.id == self.consumer)
            && let Some(mut message) = consumer.unsettled.remove(&tag)
            && verdict == Verdict::Requeued
        {
            message.redelivered = true;
            queue.messages.push_front(message);
        }
        // Not from here: a sink that is called while somebody settles could need
        // a lock which that one holds.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let (shared, queue) = (self.shared.clone(), self.queue.clone());
            runtime.spawn(async move { shared.pump(&queue) });
        }
    }
}

struct MemoryTransport {
    shared: Arc<Shared>,
    node: String,
    stats: Arc<RpcStats>,
    closed: watch::Sender<bool>,
}

impl MemoryTransport {
    /// Waits out a partition.
    async fn connected(&self, deadline: Instant) -> Result<(), TransportError> {
        let started = Instant::now();
        let mut changes = self.shared.changes.subscribe();
        let mut closed = self.closed.subscribe();
        let reached = changes.wait_for(|_| !self.shared.lock().cut.contains(&self.node));
        tokio::select! {
            biased;
            _ = closed.wait_for(|closed| *closed) => Err(TransportError::Closed),
            outcome = timeout_at(deadline, reached) => match outcome {
                Ok(_) => Ok(()),
                Err(_) => Err(TransportError::Unavailable {
                    broker: "memory".to_owned(),
                    waited_ms: started.elapsed().as_millis() as u64,
                    reason: format!("{} is cut off", self.node),
                }),
            }
        }
    }

    fn place(&self, to: &Address, message: &Outgoing) -> Result<Vec<String>, TransportError> {
        let mut state = self.shared.lock();
        if let Address::Notification { .. } = to {
            state.queues.entry(to.to_string()).or_default();
        }
        let names = state.route(to);
        if names.is_empty() && message.mandatory {
            return Err(TransportError::NoRoute {
                address: to.to_string(),
            });
        }
        for name in &names {
            for (copy, due) in state.fate().into_iter().enumerate() {
                let queued = state.queues.get(name).map_or(0, |q| q.messages.len());
                let at = state.overtakes(queued);
                let message = Message {
                    body: message.body.clone(),
                    content_type: Some(CONTENT_TYPE_JSON.to_owned()),
                    expiration: message.expiration,
                    expires: message.expiration.map(|wait| Instant::now() + wait),
                    due,
                    redelivered: copy > 0,
                };
                if let Some(queue) = state.queues.get_mut(name) {
                    queue.push(message, at);
                }
            }
        }
        Ok(names)
    }
}

#[async_trait]
impl Transport for MemoryTransport {
    async fn send(
        &self,
        to: &Address,
        message: &Outgoing,
        deadline: Instant,
    ) -> Result<(), TransportError> {
        self.connected(deadline).await?;
        for name in self.place(to, message)? {
            self.shared.pump(&name);
        }
        Ok(())
    }

    fn listen(&self, what: Subscription, sink: Sink) -> Result<Box<dyn Listening>, TransportError> {
        if *self.closed.borrow() {
            return Err(TransportError::Closed);
        }
        let mut state = self.shared.lock();
        let id = state.id();
        let (names, own) = match what {
            Subscription::Server { topic, server } => {
                let fanout = format!("{topic}_fanout_{id}");
                let queues = state.fanouts.entry(topic.clone()).or_default();
                queues.push(fanout.clone());
                let direct = format!("{topic}.{server}");
                (vec![topic, direct, fanout.clone()], Some(fanout))
            }
            Subscription::Replies { queue } => (vec![queue.clone()], Some(queue)),
            Subscription::Notifications { topic, priority } => {
                (vec![format!("{topic}.{priority}")], None)
            }
        };
        for name in &names {
            let queue = state.queues.entry(name.clone()).or_default();
            queue.consumers.push(Consumer {
                id,
                node: self.node.clone(),
                sink: sink.clone(),
                unsettled: BTreeMap::new(),
            });
        }
        drop(state);
        for name in &names {
            self.shared.pump(name);
        }
        Ok(Box::new(MemoryListening {
            shared: self.shared.clone(),
            id,
            names,
            own,
        }))
    }

    async fn consumers(
        &self,
        topic: &str,
        server: &str,
        deadline: Instant,
    ) -> Result<Option<u32>, TransportError> {
        self.connected(deadline).await?;
        let address = Address::Server {
            topic: topic.to_owned(),
            server: server.to_owned(),
        };
        let state = self.shared.lock();
        let Some(queue) = state.queues.get(&address.to_string()) else {
            return Ok(None);
        };
        let reached = queue.consumers.iter();
        let count = reached.filter(|c| !state.cut.contains(&c.node)).count();
        Ok(Some(u32::try_from(count).unwrap_or(u32::MAX)))
    }

    fn stats(&self) -> &Arc<RpcStats> {
        &self.stats
    }

    async fn close(&self) {
        self.closed.send_replace(true);
    }
}

/// Dropped, it is a consumer that died: what it had not settled goes to others.
struct MemoryListening {
    shared: Arc<Shared>,
    id: u64,
    names: Vec<String>,
    own: Option<String>,
}

#[async_trait]
impl Listening for MemoryListening {
    async fn ready(&self) {}

    async fn pause(&self) {
        // A consumer whose node is nowhere gets nothing more and can still settle.
        let mut state = self.shared.lock();
        state.cut.insert(PAUSED.to_owned());
        for name in &self.names {
            if let Some(queue) = state.queues.get_mut(name) {
                for consumer in queue.consumers.iter_mut().filter(|c| c.id == self.id) {
                    consumer.node = PAUSED.to_owned();
                }
            }
        }
    }

    async fn close(&self) {
        self.leave();
    }
}

/// The node of consumers that are paused; always cut off.
const PAUSED: &str = "(paused)";

impl MemoryListening {
    fn leave(&self) {
        // What a consumer's sink holds may itself listen here: it is dropped when
        // the lock is free again.
        let (mut gone, mut emptied) = (Vec::new(), None);
        let mut state = self.shared.lock();
        for name in &self.names {
            if let Some(queue) = state.queues.get_mut(name) {
                queue.requeue(|consumer| consumer.id == self.id);
                gone.extend(
                    queue
                        .consumers
                        .extract_if(.., |consumer| consumer.id == self.id),
                );
            }
        }
        if let Some(own) = &self.own {
            emptied = state.queues.remove(own);
            for queues in state.fanouts.values_mut() {
                queues.retain(|queue| queue != own);
            }
        }
        drop(state);
        drop((gone, emptied));
        for name in &self.names {
            self.shared.pump(name);
        }
    }
}

impl Drop for MemoryListening {
    fn drop(&mut self) {
        self.leave();
    }
}
