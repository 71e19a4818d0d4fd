//! The connection to libvirt, kept for ever.
//!
//! ```text
//!               first answer
//! connecting ─┬──────────────► up ──► lost: closed, or no sign of life
//!             │                ▲            │
//!             └─► away ────────┘◄───────────┘
//!        pause with backoff and jitter, then again
//! ```
//!
//! Every change is one line in the log and one [`Event::Connection`]. While
//! libvirt is away calls fail at once; only before the very first answer do
//! they wait for it.
//!
//! **One call at a time on a connection.** Up to libvirt 10.3 two threads that
//! call on one connection can leave a callback behind that writes into a stack
//! frame long gone (CVE-2024-4418), and the process dies. So a session has one
//! connection that only listens, and a few more, each lent to one call at a time.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use tokio::{
    sync::{broadcast, oneshot, watch},
    time::timeout,
};
use virt::{
    connect::Connect,
    error::{Error, ErrorNumber},
};

use super::{
    errors,
    ffi::{self, Callbacks, Lost},
    settings::LibvirtSettings,
};
use crate::hypervisor::{Event, HypervisorError, Result};

/// How many events a slow receiver may lag behind.
const EVENT_ROOM: usize = 1024;

/// libvirtd as it was found: a connection that listens, and some for calls.
#[derive(Debug)]
pub(super) struct Session {
    listener: Option<Connect>,
    callbacks: Option<Callbacks>,
    lost: Arc<Lost>,
    idle: Mutex<Vec<Connect>>,
}

impl Session {
    /// A connection for one call, an idle one or a new one. Blocks.
    pub(super) fn borrow(&self, link: &Link) -> std::result::Result<Connect, Error> {
        loop {
            let idle = self.idle().pop();
            let Some(connect) = idle else {
                return link.open();
            };
            if connect.is_alive().unwrap_or(false) {
                return Ok(connect);
            }
        }
    }

    /// Takes a connection back that is still alive.
    pub(super) fn give_back(&self, connect: Connect) {
        self.idle().push(connect);
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Connect>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Session {
    /// Closing talks to libvirtd, so it has a thread to wait in.
    fn drop(&mut self) {
        let (listener, callbacks) = (self.listener.take(), self.callbacks.take());
        let idle = std::mem::take(&mut *self.idle());
        let close = move || {
            if let (Some(listener), Some(callbacks)) = (&listener, &callbacks) {
                ffi::stop_listening(listener, callbacks);
            }
            drop((listener, idle));
        };
        if let Err(error) = std::thread::Builder::new()
            .name("libvirt-close".to_owned())
            .spawn(close)
        {
            tracing::warn!(%error, "no thread to close a connection to libvirt in");
        }
    }
}

#[derive(Debug, Clone)]
enum State {
    Connecting,
    Up(Arc<Session>),
    Away(String),
}

/// The way to libvirt.
#[derive(Debug)]
pub(super) struct Link {
    uri: String,
    settings: LibvirtSettings,
    state: watch::Sender<State>,
    events: broadcast::Sender<Event>,
}

impl Link {
    /// Starts to connect and keeps at it until the last reference is dropped.
    /// Needs a tokio runtime around it.
    pub(super) fn start(settings: LibvirtSettings) -> Arc<Self> {
        let link = Arc::new(Self {
            uri: settings.libvirt_uri.clone(),
            settings,
            state: watch::Sender::new(State::Connecting),
            events: broadcast::Sender::new(EVENT_ROOM),
        });
        tokio::spawn(Keeper::new(&link).run());
        link
    }

    /// What happens from now on.
    pub(super) fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// The connection, if it is up; waits only before the first answer.
    ///
    /// # Errors
    /// `Unreachable` with the cause.
    pub(super) async fn session(&self) -> Result<Arc<Session>> {
        let mut state = self.state.subscribe();
        loop {
            match &*state.borrow_and_update() {
                State::Up(session) => return Ok(session.clone()),
                State::Away(cause) => return Err(self.unreachable(cause)),
                State::Connecting => {}
            }
            if state.changed().await.is_err() {
                return Err(self.unreachable("the driver has ended"));
            }
        }
    }

    /// The error for a libvirt that does not answer.
    pub(super) fn unreachable(&self, cause: &str) -> HypervisorError {
        HypervisorError::Unreachable {
            uri: self.uri.clone(),
            message: cause.to_owned(),
        }
    }

    /// Says that a call found this session dead.
    pub(super) fn report_dead(session: &Session) {
        session.lost.bell.notify_one();
    }

    /// Opens a connection for calls. Blocks.
    pub(super) fn open(&self) -> std::result::Result<Connect, Error> {
        open_kept_alive(&self.settings)
    }

    fn set(&self, state: State) {
        let up = matches!(state, State::Up(_));
        self.state.send_replace(state);
        let _ = self.events.send(Event::Connection { up });
    }
}

fn open_kept_alive(settings: &LibvirtSettings) -> std::result::Result<Connect, Error> {
    let connect = Connect::open(Some(&settings.libvirt_uri))?;
    let interval = i32::try_from(settings.keepalive_interval_s).unwrap_or(i32::MAX);
    match connect.set_keep_alive(interval, settings.keepalive_count) {
        // Drivers without a daemon have nothing to keep alive.
        Err(error) if !errors::is(&error, ErrorNumber::NoSupport) => Err(error),
        _ => Ok(connect),
    }
}

fn open_session(
    settings: &LibvirtSettings,
    events: &broadcast::Sender<Event>,
) -> std::result::Result<Session, Error> {
    let listener = open_kept_alive(settings)?;
    let lost = Arc::new(Lost::default());
    let callbacks = ffi::listen(&listener, events, &lost)?;
    Ok(Session {
        listener: Some(listener),
        callbacks: Some(callbacks),
        lost,
        idle: Mutex::default(),
    })
}

type Opened = std::result::Result<Session, Error>;

/// The task that keeps a [`Link`] up.
struct Keeper {
    link: Weak<Link>,
    settings: LibvirtSettings,
    events: broadcast::Sender<Event>,
    /// An attempt that a hung libvirtd has not answered yet; there is never a
    /// second one beside it.
    pending: Option<oneshot::Receiver<Opened>>,
    pause: Duration,
}

impl Keeper {
    fn new(link: &Arc<Link>) -> Self {
        Self {
            link: Arc::downgrade(link),
            settings: link.settings.clone(),
            events: link.events.clone(),
            pending: None,
            pause: Duration::from_millis(link.settings.reconnect_min_ms),
        }
    }

    async fn run(mut self) {
        loop {
            match self.open().await {
                Ok(session) => {
                    self.pause = Duration::from_millis(self.settings.reconnect_min_ms);
                    if !self.hold(Arc::new(session)).await {
                        return;
                    }
                }
                Err(cause) => {
                    if !self.away(&cause) {
                        return;
                    }
                }
            }
            tokio::time::sleep(self.next_pause()).await;
        }
    }

    /// Opens a connection, or says why not.
    async fn open(&mut self) -> std::result::Result<Session, String> {
        let mut pending = match self.pending.take() {
            Some(pending) => pending,
            None => self.begin_open()?,
        };
        let limit = Duration::from_secs(self.settings.call_timeout_s);
        match timeout(limit, &mut pending).await {
            Ok(Ok(Ok(session))) => Ok(session),
            Ok(Ok(Err(error))) => Err(error.message().to_owned()),
            Ok(Err(_)) => Err("the thread that opened the connection died".to_owned()),
            Err(_) => {
                self.pending = Some(pending);
                Err(format!(
                    "it accepts no connection within {} s",
                    limit.as_secs()
                ))
            }
        }
    }

    fn begin_open(&self) -> std::result::Result<oneshot::Receiver<Opened>, String> {
        let (sender, receiver) = oneshot::channel();
        let (settings, events) = (self.settings.clone(), self.events.clone());
        std::thread::Builder::new()
            .name("libvirt-open".to_owned())
            .spawn(move || drop(sender.send(open_session(&settings, &events))))
            .map(|_| receiver)
            .map_err(|e| format!("no thread to open a connection in: {e}"))
    }

    /// Announces the session and waits for its end. False if nobody needs it any more.
    async fn hold(&self, session: Arc<Session>) -> bool {
        let lost = session.lost.clone();
        {
            let Some(link) = self.link.upgrade() else {
                return false;
            };
            tracing::info!(uri = %self.settings.libvirt_uri, "connected to libvirt");
            link.set(State::Up(session));
        }
        loop {
            let ring = timeout(Duration::from_secs(1), lost.bell.notified()).await;
            if ring.is_ok() {
                return self.away(lost.reason());
            }
            if self.link.strong_count() == 0 {
                return false;
            }
        }
    }

    /// Announces that libvirt is away, once. False if nobody needs it any more.
    fn away(&self, cause: &str) -> bool {
        let Some(link) = self.link.upgrade() else {
            return false;
        };
        let uri = &self.settings.libvirt_uri;
        let known = matches!(*link.state.borrow(), State::Away(_));
        if known {
            tracing::debug!(%uri, cause, "libvirt is still away");
            link.state.send_replace(State::Away(cause.to_owned()));
        } else {
            tracing::warn!(
                %uri,
                cause,
                "libvirt does not answer; its guests run on, but nothing can be done with them. \
                 Check that libvirtd runs; the connection is tried again by itself"
            );
            link.set(State::Away(cause.to_owned()));
        }
        true
    }

    /// The pause before the next attempt: doubling, up to half of it random, so
    /// that a farm's agents do not come all at once.
    fn next_pause(&mut self) -> Duration {
        let pause = self.pause;
        let longest = Duration::from_millis(self.settings.reconnect_max_ms);
        self.pause = (pause * 2).min(longest);
        pause.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}
