//! One connection, kept for ever.
//!
//! ```text
//!             ┌──────────── pause with backoff ◄───────────┐
//!             ▼                                            │ failed
//! start ─► connecting (each host in turn) ──► up ──────────┤ lost
//!             │                                │           │
//!             └──────────────► closed ◄────────┘        connecting
//! ```
//!
//! Everybody who needs the connection watches the state; nobody else makes one.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt;
use lapin::{
    Connection, ConnectionProperties, Event,
    uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo, SASLMechanism},
};
use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{error, info, warn};

use crate::{
    settings::{Broker, BrokerHost, Login, MessagingSettings},
    stats::RpcStats,
    text::shown,
};

/// First pause after a failure; doubles up to the setting.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// How often a connection's state is looked at besides its events.
const LOOK: Duration = Duration::from_secs(2);
/// Attempts that hang (a host takes the connection and says nothing) and cannot
/// be taken back; no more than these are left behind at a time.
const MAX_HANGING: usize = 8;
/// Largest frame agreed upon. The library keeps two buffers of 32 frames for
/// each connection, resident as soon as so much went through them: at the broker's
/// 128 KiB that is 8 MiB. Nearly every message fits into one frame of this size;
/// larger bodies take more.
const FRAME_MAX_BYTES: u32 = 8 << 10;
/// The broker's own default. It hands a message's properties on in one frame,
/// as they came, whatever was agreed upon; a connection that such a frame
/// breaks is made again with room for it, or the message would come for ever.
const LARGE_FRAME_MAX_BYTES: u32 = 128 << 10;
/// A connection that ends sooner may have been broken by what it was sent.
const BRIEF: Duration = Duration::from_secs(10);

/// A living connection.
pub(super) struct Link {
    pub(super) connection: Connection,
    /// The broker's reason, while it blocks publishers.
    pub(super) blocked: watch::Sender<Option<String>>,
    broken: CancellationToken,
}

impl Link {
    /// Says that the connection is of no use any more.
    pub(super) fn give_up(&self) {
        self.broken.cancel();
    }

    /// Ends when the connection is known to be gone.
    pub(super) async fn gone(&self) {
        self.broken.cancelled().await;
    }

    pub(super) fn is_alive(&self) -> bool {
        !self.broken.is_cancelled() && self.connection.status().connected()
    }
}

#[derive(Clone)]
enum State {
    Connecting(String),
    Up(Arc<Link>),
    Closed,
}

/// Keeps one connection up. Clones are the same one.
#[derive(Clone)]
pub(super) struct Keeper {
    state: watch::Receiver<State>,
    closing: CancellationToken,
    _task: Arc<AbortOnDropHandle<()>>,
}

impl Keeper {
    pub(super) fn start(
        purpose: &'static str,
        broker: Arc<Broker>,
        settings: Arc<MessagingSettings>,
        outage: Arc<Outage>,
        stats: Arc<RpcStats>,
    ) -> Self {
        let (publish, state) = watch::channel(State::Connecting("not connected yet".to_owned()));
        let closing = CancellationToken::new();
        let work = Work {
            purpose,
            broker,
            settings,
            outage,
            stats,
            state: publish,
            hanging: Arc::new(Semaphore::new(MAX_HANGING)),
        };
        let end = closing.clone();
        let task = tokio::spawn(async move {
            let state = work.state.clone();
            end.run_until_cancelled(work.run()).await;
            let last = state.send_replace(State::Closed);
            if let State::Up(link) = last {
                link.give_up();
                // The broker needs no reason; it may be gone already.
                let _ = timeout(
                    Duration::from_secs(2),
                    link.connection.close(200, "OK".into()),
                )
                .await;
            }
        });
        Self {
            state,
            closing,
            _task: Arc::new(AbortOnDropHandle::new(task)),
        }
    }

    /// The connection, when there is one. `None` once closed.
    pub(super) async fn link(&self) -> Option<Arc<Link>> {
        if let State::Up(link) = &*self.state.borrow()
            && link.is_alive()
        {
            return Some(link.clone());
        }
        let mut state = self.state.clone();
        let reached = state
            .wait_for(|state| match state {
                State::Up(link) => link.is_alive(),
                State::Closed => true,
                State::Connecting(_) => false,
            })
            .await
            .ok()?;
        match &*reached {
            State::Up(link) => Some(link.clone()),
            _ => None,
        }
    }

    /// Why there is no connection, or why it takes nothing.
    pub(super) fn trouble(&self) -> Trouble {
        match &*self.state.borrow() {
            State::Connecting(reason) => Trouble::Away(reason.clone()),
            State::Closed => Trouble::Closed,
            State::Up(link) => match &*link.blocked.borrow() {
                Some(reason) => Trouble::Blocked(reason.clone()),
                None => Trouble::Away("no confirmation came".to_owned()),
            },
        }
    }

    pub(super) async fn close(&self) {
        self.closing.cancel();
        let mut state = self.state.clone();
        // An error here means that the task is gone, which is closed too.
        let _ = state.wait_for(|state| matches!(state, State::Closed)).await;
    }
}

/// What keeps a message from being taken.
pub(super) enum Trouble {
    Away(String),
    Blocked(String),
    Closed,
}

struct Work {
    purpose: &'static str,
    broker: Arc<Broker>,
    settings: Arc<MessagingSettings>,
    outage: Arc<Outage>,
    stats: Arc<RpcStats>,
    state: watch::Sender<State>,
    hanging: Arc<Semaphore>,
}

impl Work {
    async fn run(self) {
        let mut hosts = self.broker.hosts.clone();
        // Peers of one configuration spread over the hosts.
        fastrand::shuffle(&mut hosts);
        let mut frame_max = FRAME_MAX_BYTES;
        loop {
            let mut waiting = self.outage.waiting();
            let link = self.connect(&mut hosts, frame_max, &mut waiting).await;
            let began = Instant::now();
            waiting.over();
            self.stats.connections_made.add();
            self.state.send_replace(State::Up(link.clone()));
            let reason = watch_over(&link).await;
            link.give_up();
            self.stats.connections_lost.add();
            info!(purpose = self.purpose, reason = %shown(&reason), "connection to the message broker lost");
            self.state.send_replace(State::Connecting(reason));
            frame_max = match began.elapsed() < BRIEF {
                true => LARGE_FRAME_MAX_BYTES,
                false => FRAME_MAX_BYTES,
            };
        }
    }

    /// Tries the hosts in turn until one takes the connection.
    async fn connect(
        &self,
        hosts: &mut [BrokerHost],
        frame_max: u32,
        waiting: &mut Waiting,
    ) -> Arc<Link> {
        let longest = Duration::from_secs(self.settings.reconnect_max_s);
        let mut pause = FIRST_PAUSE;
        loop {
            for _ in 0..hosts.len() {
                match self.attempt(&hosts[0], frame_max).await {
                    Ok(connection) => {
                        return Arc::new(Link {
                            connection,
                            blocked: watch::Sender::new(None),
                            broken: CancellationToken::new(),
                        });
                    }
                    Err(reason) => {
                        let reason = format!("{}: {}", hosts[0], shown(&reason));
                        waiting.failed(&reason);
                        self.state.send_replace(State::Connecting(reason));
                        hosts.rotate_left(1);
                    }
                }
            }
            // Half to all of the pause: services that lost the same broker do
            // not come back in one wave.
            sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            pause = (pause * 2).min(longest);
        }
    }

    /// One attempt at one host. The library cannot abandon a handshake, so one
    /// that takes too long is left to end by itself, and is closed if it succeeds.
    async fn attempt(&self, host: &BrokerHost, frame_max: u32) -> Result<Connection, String> {
        let limit = Duration::from_secs(self.settings.connect_timeout_s);
        let Ok(Ok(place)) = timeout(limit, self.hanging.clone().acquire_owned()).await else {
            return Err("takes connections and says nothing".to_owned());
        };
        let uri = self.uri(host, limit, frame_max);
        let name = connection_name(self.purpose);
        let attempt = tokio::spawn(async move {
            let options = ConnectionProperties::default().with_connection_name(name.into());
            let outcome = Connection::connect_uri(uri, options).await;
            drop(place);
            outcome
        });
        match timeout(limit, attempt).await {
            Ok(Ok(Ok(connection))) => Ok(connection),
            Ok(Ok(Err(error))) => Err(error.to_string()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {} s", limit.as_secs())),
        }
    }

    fn uri(&self, host: &BrokerHost, limit: Duration, frame_max: u32) -> AMQPUri {
        AMQPUri {
            scheme: AMQPScheme::AMQP,
            authority: AMQPAuthority {
                userinfo: AMQPUserInfo {
                    username: host.user.clone(),
                    password: host.password.clone(),
                },
                host: host.host.clone(),
                port: host.port,
            },
            vhost: self.broker.vhost.clone(),
            query: AMQPQueryString {
                frame_max: Some(frame_max),
                heartbeat: Some(self.settings.heartbeat_s),
                connection_timeout: Some(limit.as_millis() as u64),
                auth_mechanism: Some(match self.broker.login {
                    Login::AmqPlain => SASLMechanism::AMQPlain,
                    Login::Plain => SASLMechanism::Plain,
                }),
                ..AMQPQueryString::default()
            },
        }
    }
}

/// Waits for the end of a connection and notes when it is blocked.
async fn watch_over(link: &Link) -> String {
    let mut events = std::pin::pin!(link.connection.events_listener());
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            () = link.gone() => return "given up".to_owned(),
            () = sleep(LOOK) => Some(Event::Connected),
        };
        match event {
            Some(Event::ConnectionBlocked(reason)) => {
                warn!(reason = %shown(&reason), "the message broker blocks publishers; free its memory or disk");
                link.blocked.send_replace(Some(reason));
            }
            Some(Event::ConnectionUnblocked) => {
                info!("the message broker takes messages again");
                link.blocked.send_replace(None);
            }
            Some(Event::Error(error)) if !link.connection.status().connected() => {
                return error.to_string();
            }
            None => return "closed".to_owned(),
            Some(_) if !link.connection.status().connected() => return "closed".to_owned(),
            Some(_) => {}
        }
    }
}

/// `program:pid:purpose`, as operators see it in the broker's list.
fn connection_name(purpose: &str) -> String {
    let program = std::env::current_exe().ok();
    let program = program
        .as_deref()
        .and_then(|path| path.file_name())
        .map_or("drover".into(), |name| name.to_string_lossy());
    format!("{program}:{}:{purpose}", std::process::id())
}

/// Says once that the broker is away, and once that it is back, however many
/// connections a process has.
pub(super) struct Outage {
    broker: String,
    waiting: AtomicUsize,
}

impl Outage {
    pub(super) fn new(broker: &Broker) -> Self {
        Self {
            broker: broker.to_string(),
            waiting: AtomicUsize::new(0),
        }
    }

    fn waiting(self: &Arc<Self>) -> Waiting {
        Waiting {
            outage: self.clone(),
            failed: false,
        }
    }
}

/// One connection's part in an outage.
struct Waiting {
    outage: Arc<Outage>,
    failed: bool,
}

impl Waiting {
    fn failed(&mut self, reason: &str) {
        if std::mem::replace(&mut self.failed, true) {
            return;
        }
        if self.outage.waiting.fetch_add(1, Ordering::SeqCst) == 0 {
            error!(
                broker = %self.outage.broker,
                reason,
                "no message broker; trying again until there is one: start RabbitMQ there, or correct url in [messaging]"
            );
        }
    }

    fn over(&mut self) {
        if std::mem::replace(&mut self.failed, false)
            && self.outage.waiting.fetch_sub(1, Ordering::SeqCst) == 1
        {
            info!(broker = %self.outage.broker, "connected to the message broker again");
        }
    }
}

impl Drop for Waiting {
    /// Given up: there is nothing good to tell.
    fn drop(&mut self) {
        if self.failed {
            self.outage.waiting.fetch_sub(1, Ordering::SeqCst);
        }
    }
}
