//! Sending, confirmed by the broker.
//!
//! Messages are pipelined on one channel: many wait for their confirms at once.
//! A message that was not confirmed when its channel or connection went is sent
//! again until its deadline; it may then arrive twice, with the same unique id,
//! by which a server recognises it.
//!
//! Mandatory requests have a channel of their own, one at a time: the broker's
//! "no such queue" names no message, so only then is it clear whose it is.
//! Mandatory replies stay on the fast one, and a return that belongs to another
//! reply is tried again on that reply's behalf.

use std::{
    collections::HashSet,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use lapin::{
    BasicProperties, Channel, Confirmation,
    message::BasicReturnMessage,
    options::{BasicPublishOptions, ConfirmSelectOptions},
    types::{FieldTable, ShortString},
};
use tokio::{
    sync::{Mutex as AsyncMutex, Semaphore},
    time::{Instant, sleep, timeout_at},
};
use tracing::{debug, warn};

use super::{
    connection::{Keeper, Link, Trouble},
    topology::{Declare, Route, Topology, has_code},
};
use crate::{
    error::TransportError,
    stats::RpcStats,
    text::shown,
    transport::{Address, CONTENT_TYPE_JSON, Outgoing},
};

/// Messages that may wait for their confirms at once.
const MAX_UNCONFIRMED: usize = 1024;
/// Returned replies that may be tried again on others' behalf at once.
const MAX_STRAYS: usize = 64;
const STRAY_PAUSE: Duration = Duration::from_millis(250);
/// Pause before a message is sent again.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// Refusals of one message before its sender is told.
const MAX_REFUSALS: usize = 3;
const NOT_FOUND: u16 = 404;

/// Cheap to clone; clones are the same one.
#[derive(Clone)]
pub(super) struct Publisher(Arc<Inner>);

struct Inner {
    keeper: Keeper,
    topology: Arc<Topology>,
    broker: String,
    stats: Arc<RpcStats>,
    properties: BasicProperties,
    unconfirmed: Semaphore,
    strays: Arc<Semaphore>,
    pipelined: Lane,
    one_by_one: Lane,
    turn: AsyncMutex<()>,
}

/// A channel in confirm mode, made anew when it is gone.
#[derive(Default)]
struct Lane {
    current: Mutex<Option<Arc<Outlet>>>,
    opening: AsyncMutex<()>,
}

struct Outlet {
    link: Arc<Link>,
    channel: Channel,
    /// The library numbers a message and queues it in two steps; in between no
    /// other may come, or each would get the other's confirm.
    order: Mutex<()>,
    declared: Mutex<HashSet<String>>,
}

/// Why one attempt failed.
enum Failed {
    /// Channel or connection are gone: try on the next one.
    Lost(String),
    /// The broker said no to this message.
    Refused(String),
    NoRoute,
    Closed,
}

impl From<lapin::Error> for Failed {
    fn from(error: lapin::Error) -> Self {
        match error.kind() {
            lapin::ErrorKind::ProtocolError(_) => Self::Refused(error.to_string()),
            _ => Self::Lost(error.to_string()),
        }
    }
}

impl Publisher {
    pub(super) fn new(
        keeper: Keeper,
        topology: Arc<Topology>,
        broker: String,
        stats: Arc<RpcStats>,
    ) -> Self {
        Self(Arc::new(Inner {
            keeper,
            topology,
            broker,
            stats,
            properties: BasicProperties::default()
                .with_content_type(CONTENT_TYPE_JSON.into())
                .with_content_encoding("utf-8".into())
                .with_headers(FieldTable::default())
                .with_delivery_mode(2)
                .with_priority(0),
            unconfirmed: Semaphore::new(MAX_UNCONFIRMED),
            strays: Arc::new(Semaphore::new(MAX_STRAYS)),
            pipelined: Lane::default(),
            one_by_one: Lane::default(),
            turn: AsyncMutex::new(()),
        }))
    }

    pub(super) fn keeper(&self) -> &Keeper {
        &self.0.keeper
    }

    /// Sends, again if need be, until confirmed or the deadline.
    pub(super) async fn send(
        &self,
        to: &Address,
        message: &Outgoing,
        deadline: Instant,
    ) -> Result<(), TransportError> {
        let route = self.0.topology.route(to)?;
        let started = Instant::now();
        match timeout_at(deadline, self.until_taken(to, &route, message)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(self.0.too_late(started)),
        }
    }

    async fn until_taken(
        &self,
        to: &Address,
        route: &Route,
        message: &Outgoing,
    ) -> Result<(), TransportError> {
        // Never closed, so always granted in the end.
        let _place = self.0.unconfirmed.acquire().await;
        let mut refusals = 0;
        let began = Instant::now();
        loop {
            let failed = match self.attempt(to, route, message, began).await {
                Ok(()) => return Ok(()),
                Err(failed) => failed,
            };
            match failed {
                Failed::Closed => return Err(TransportError::Closed),
                Failed::NoRoute => {
                    return Err(TransportError::NoRoute {
                        address: shown(&to.to_string()),
                    });
                }
                Failed::Refused(reason) => {
                    refusals += 1;
                    if refusals >= MAX_REFUSALS {
                        return Err(TransportError::Refused {
                            reason: shown(&reason),
                        });
                    }
                    debug!(%reason, "message refused, sent again");
                }
                Failed::Lost(reason) => debug!(%reason, "message not confirmed, sent again"),
            }
            sleep(RETRY_PAUSE).await;
        }
    }

    async fn attempt(
        &self,
        to: &Address,
        route: &Route,
        message: &Outgoing,
        began: Instant,
    ) -> Result<(), Failed> {
        let is_reply = matches!(to, Address::Reply { .. });
        if message.mandatory && !is_reply {
            let _turn = self.0.turn.lock().await;
            let outlet = self.0.outlet(&self.0.one_by_one).await?;
            let confirmed = self.0.publish(&outlet, route, message, began).await?;
            return match confirmed {
                Some(_) => Err(Failed::NoRoute),
                None => Ok(()),
            };
        }
        let outlet = self.0.outlet(&self.0.pipelined).await?;
        match self.0.publish(&outlet, route, message, began).await? {
            Some(returned) if returned.data == *message.body => Err(Failed::NoRoute),
            Some(returned) => {
                self.retry_stray(returned);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// A reply whose sender took its confirm for a success.
    fn retry_stray(&self, returned: Box<BasicReturnMessage>) {
        let Ok(place) = self.0.strays.clone().try_acquire_owned() else {
            self.0.stats.replies_dropped.add();
            return;
        };
        let publisher = self.clone();
        tokio::spawn(async move {
            let address = Address::Reply {
                queue: returned.routing_key.as_str().to_owned(),
            };
            let message = Outgoing {
                body: Arc::new(returned.delivery.data),
                expiration: None,
                mandatory: true,
            };
            let retry = Duration::from_secs(publisher.0.topology.settings.reply_retry_s);
            let give_up = Instant::now() + retry;
            while Instant::now() < give_up {
                sleep(STRAY_PAUSE).await;
                // Boxed: sending may itself find a stray.
                let sent = Box::pin(publisher.send(&address, &message, give_up)).await;
                if !matches!(sent, Err(TransportError::NoRoute { .. })) {
                    return;
                }
            }
            publisher.0.stats.replies_dropped.add();
            drop(place);
        });
    }
}

impl Inner {
    fn too_late(&self, started: Instant) -> TransportError {
        let waited_ms = started.elapsed().as_millis() as u64;
        let (broker, reason) = match self.keeper.trouble() {
            Trouble::Closed => return TransportError::Closed,
            Trouble::Blocked(reason) => {
                return TransportError::Blocked {
                    reason: shown(&reason),
                };
            }
            Trouble::Away(reason) => (self.broker.clone(), reason),
        };
        TransportError::Unavailable {
            broker,
            waited_ms,
            reason,
        }
    }

    /// The lane's channel, opened if there is none that lives.
    async fn outlet(&self, lane: &Lane) -> Result<Arc<Outlet>, Failed> {
        if let Some(outlet) = lane.living() {
            return Ok(outlet);
        }
        let _opening = lane.opening.lock().await;
        if let Some(outlet) = lane.living() {
            return Ok(outlet);
        }
        let link = self.keeper.link().await.ok_or(Failed::Closed)?;
        let channel = link.connection.create_channel().await?;
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        let outlet = Arc::new(Outlet {
            link,
            channel,
            order: Mutex::default(),
            declared: Mutex::default(),
        });
        *lane.lock() = Some(outlet.clone());
        Ok(outlet)
    }

    /// Publishes and waits for the confirm; gives the message that came back, if one did.
    async fn publish(
        &self,
        outlet: &Arc<Outlet>,
        route: &Route,
        message: &Outgoing,
        began: Instant,
    ) -> Result<Option<Box<BasicReturnMessage>>, Failed> {
        self.ensure(outlet, route).await?;
        outlet.unblocked().await?;
        let properties = match message.expiration {
            Some(lasts) => self
                .properties
                .clone()
                .with_expiration(ShortString::from(remaining(lasts, began).to_string())),
            None => self.properties.clone(),
        };
        match Publishing::start(outlet, route, message, properties).await? {
            Confirmation::Ack(None) | Confirmation::NotRequested => Ok(None),
            Confirmation::Ack(Some(returned)) => Ok(Some(Box::new(returned))),
            Confirmation::Nack(_) => Err(Failed::Refused("not confirmed (nack)".to_owned())),
        }
    }

    /// Declares what the route needs, once a channel.
    async fn ensure(&self, outlet: &Outlet, route: &Route) -> Result<(), Failed> {
        let Some(declare) = &route.declare else {
            return Ok(());
        };
        let key = match declare {
            Declare::Control | Declare::Fanout(_) => route.exchange.as_str(),
            Declare::Notification(queue) => queue,
        };
        if outlet.declared().contains(key) {
            return Ok(());
        }
        self.topology.declare(&outlet.link, declare).await?;
        let mut declared = outlet.declared();
        if declared.len() >= MAX_UNCONFIRMED {
            declared.clear();
        }
        declared.insert(key.to_owned());
        Ok(())
    }
}

/// How long a message may wait in its queue, ms, that has waited here for seconds.
fn remaining(lasts: Duration, began: Instant) -> u128 {
    let waited = Duration::from_secs(began.elapsed().as_secs());
    lasts.saturating_sub(waited).as_millis()
}

impl Lane {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<Outlet>>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn living(&self) -> Option<Arc<Outlet>> {
        let mut current = self.lock();
        match &*current {
            Some(outlet) if outlet.link.is_alive() && outlet.channel.status().connected() => {
                Some(outlet.clone())
            }
            _ => {
                *current = None;
                None
            }
        }
    }
}

impl Outlet {
    fn declared(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.declared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the broker blocks us: nothing would be written, and what is
    /// written into the library cannot be taken back.
    async fn unblocked(&self) -> Result<(), Failed> {
        if self.link.blocked.borrow().is_none() {
            return Ok(());
        }
        let mut blocked = self.link.blocked.subscribe();
        tokio::select! {
            _ = blocked.wait_for(Option::is_none) => Ok(()),
            () = self.link.gone() => Err(Failed::Lost("lost while blocked".to_owned())),
        }
    }
}

type Confirm = Pin<Box<dyn Future<Output = lapin::Result<Confirmation>> + Send>>;

/// A message under way. The library keeps a record of every confirm nobody
/// waited for, so one whose sender leaves is waited for in its place.
struct Publishing {
    confirm: Option<Confirm>,
    outlet: Arc<Outlet>,
    queued: bool,
}

impl Publishing {
    fn start(
        outlet: &Arc<Outlet>,
        route: &Route,
        message: &Outgoing,
        properties: BasicProperties,
    ) -> Self {
        let channel = outlet.channel.clone();
        let (exchange, key) = (route.exchange.clone(), route.key.clone());
        let body = message.body.clone();
        let options = BasicPublishOptions {
            mandatory: message.mandatory,
            immediate: false,
        };
        let confirm = async move {
            channel
                .basic_publish(exchange, key, options, &body, properties)
                .await?
                .await
        };
        Self {
            confirm: Some(Box::pin(confirm)),
            outlet: outlet.clone(),
            queued: false,
        }
    }
}

impl Future for Publishing {
    type Output = lapin::Result<Confirmation>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let Some(confirm) = &mut this.confirm else {
            return Poll::Pending; // polled after its end, which async code does not do
        };
        let polled = if this.queued {
            confirm.as_mut().poll(cx)
        } else {
            this.queued = true;
            let _order = this
                .outlet
                .order
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            confirm.as_mut().poll(cx)
        };
        if let Poll::Ready(outcome) = &polled {
            this.confirm = None;
            if let Err(error) = outcome
                && has_code(error, NOT_FOUND)
            {
                warn!(error = %shown(&error.to_string()), "an exchange is gone; declared again");
            }
        }
        polled
    }
}

impl Drop for Publishing {
    fn drop(&mut self) {
        if let Some(confirm) = self.confirm.take()
            && self.queued
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(confirm);
        }
    }
}
