//! The seam under RPC: opaque bodies to and from addresses.
//!
//! Two implementations: [`crate::amqp`] on RabbitMQ and [`crate::memory`] in
//! this process. Everything above this line works the same on both.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::time::Instant;

use crate::{error::TransportError, stats::RpcStats};

/// The content type of every message of ours.
pub const CONTENT_TYPE_JSON: &str = "application/json";

/// Where a message goes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// The queue all servers of a topic share.
    Topic {
        /// The topic.
        topic: String,
    },
    /// The queue of one server of a topic.
    Server {
        /// The topic.
        topic: String,
        /// The server's name, for agents its host name.
        server: String,
    },
    /// Every server of a topic.
    Fanout {
        /// The topic.
        topic: String,
    },
    /// A caller's reply queue.
    Reply {
        /// The queue's name.
        queue: String,
    },
    /// The queue of a notification topic and priority.
    Notification {
        /// The topic, such as `notifications`.
        topic: String,
        /// The priority in lower case, such as `info`.
        priority: &'static str,
    },
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Topic { topic } => f.write_str(topic),
            Self::Server { topic, server } => write!(f, "{topic}.{server}"),
            Self::Fanout { topic } => write!(f, "{topic} (all)"),
            Self::Reply { queue } => f.write_str(queue),
            Self::Notification { topic, priority } => write!(f, "{topic}.{priority}"),
        }
    }
}

/// A message on its way out.
#[derive(Debug, Clone, Default)]
pub struct Outgoing {
    /// The body, JSON text; shared, because it may have to be sent again.
    pub body: Arc<Vec<u8>>,
    /// How long it may wait in a queue; `None` is for ever.
    pub expiration: Option<Duration>,
    /// Whether a missing queue is an error ([`TransportError::NoRoute`]).
    pub mandatory: bool,
}

/// A message that came in.
#[derive(Debug)]
pub struct Incoming {
    /// The body as it came.
    pub body: Vec<u8>,
    /// The content type as it came.
    pub content_type: Option<String>,
    /// The `compression` header, if there was one.
    pub compression: Option<String>,
    /// How long the sender let it wait in the queue.
    pub expiration: Option<Duration>,
    /// Whether it was delivered before, here or elsewhere.
    pub redelivered: bool,
    /// Settles it.
    pub receipt: Receipt,
}

/// Settles one delivery. Dropped unsettled, the message comes again after the
/// connection that brought it is gone.
#[derive(Clone)]
pub struct Receipt {
    settler: Arc<dyn Settler>,
    tag: u64,
}

impl Receipt {
    pub(crate) fn new(settler: Arc<dyn Settler>, tag: u64) -> Self {
        Self { settler, tag }
    }

    /// The message is taken. Acknowledging twice, or after the connection is gone, does nothing.
    pub fn acknowledge(&self) {
        self.settler.settle(self.tag, Verdict::Taken);
    }

    /// The message is to come again, here or elsewhere.
    pub fn requeue(&self) {
        self.settler.settle(self.tag, Verdict::Requeued);
    }

    /// The message is unusable and must not come again.
    pub fn reject(&self) {
        self.settler.settle(self.tag, Verdict::Rejected);
    }
}

impl fmt::Debug for Receipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Receipt({})", self.tag)
    }
}

/// What becomes of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Taken,
    Requeued,
    Rejected,
}

/// Takes verdicts; must not block.
pub(crate) trait Settler: Send + Sync {
    fn settle(&self, tag: u64, verdict: Verdict);
}

/// What to listen to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subscription {
    /// Everything addressed to a server: topic, topic and server, fanout.
    Server {
        /// The topic.
        topic: String,
        /// The server's name.
        server: String,
    },
    /// One reply queue.
    Replies {
        /// The queue's name.
        queue: String,
    },
    /// One notification queue.
    Notifications {
        /// The topic, such as `notifications`.
        topic: String,
        /// The priority in lower case.
        priority: &'static str,
    },
}

/// Where incoming messages go. Called on the transport's task: it must be quick
/// and must not block; what takes time is spawned. What is in flight is bounded
/// by the prefetch count.
pub type Sink = Arc<dyn Fn(Incoming) + Send + Sync>;

/// A subscription that is being kept up.
#[async_trait]
pub trait Listening: Send + Sync {
    /// Waits until the first set-up has succeeded. For ever, if the broker is away.
    async fn ready(&self);
    /// Takes no more messages; what came can still be settled.
    async fn pause(&self);
    /// Gives up: settles what is pending and removes queues that are only ours.
    async fn close(&self);
}

/// Carries messages. Failures of connections are its own business: it sets up
/// everything again by itself, and every send ends at its deadline at the latest.
#[async_trait]
pub trait Transport: Send + Sync + 'static {
    /// Sends, and waits until the broker has taken the message.
    ///
    /// # Errors
    /// When that did not happen before the deadline; see [`TransportError`].
    async fn send(
        &self,
        to: &Address,
        message: &Outgoing,
        deadline: Instant,
    ) -> Result<(), TransportError>;

    /// Begins to listen, and keeps listening through every loss until closed or dropped.
    ///
    /// # Errors
    /// Only for names that cannot be used, or when the transport is closed.
    fn listen(&self, what: Subscription, sink: Sink) -> Result<Box<dyn Listening>, TransportError>;

    /// How many consumers the queue of one server of a topic has by the broker's
    /// word; none if there is no such queue. A broker counts one that lost its
    /// power until its heartbeats are missed.
    ///
    /// # Errors
    /// The broker did not say before the deadline.
    async fn consumers(
        &self,
        topic: &str,
        server: &str,
        deadline: Instant,
    ) -> Result<Option<u32>, TransportError>;

    /// The counters of this transport and of everything on it.
    fn stats(&self) -> &Arc<RpcStats>;

    /// Closes all connections. Later sends fail with [`TransportError::Closed`].
    async fn close(&self);
}
