//! Listening: a channel with its queues declared, bound and consumed, rebuilt
//! whenever anything of it is gone.
//!
//! ```text
//! waiting for a connection ─► declaring ─► consuming ─► (paused) ─► closed
//!            ▲                    │            │
//!            └──── any failure, a queue deleted, the connection lost
//! ```
//!
//! Verdicts on deliveries are collected and written together: one
//! acknowledgement covers every delivery up to the first that is still open.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use futures_util::{FutureExt, StreamExt, stream};
use lapin::{
    Channel,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions,
        BasicRejectOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
};
use tokio::{
    sync::{Notify, watch},
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};

use super::{
    connection::{Keeper, Link},
    topology::{QueuePlan, Topology},
};
use crate::{
    stats::RpcStats,
    text::shown,
    transport::{Incoming, Listening, Receipt, Settler, Sink, Verdict},
};

/// Pause before a consumer is set up again: a broker that keeps refusing is not hammered.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How long closing may take, with a broker that does not answer.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// What its owner wants of a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Wish {
    Consume,
    Pause,
    Close,
}

/// How far a listener is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    SettingUp,
    Consuming,
    Paused,
    Closed,
}

/// A subscription on the broker.
pub(super) struct AmqpListening {
    wish: watch::Sender<Wish>,
    stage: watch::Receiver<Stage>,
    _task: AbortOnDropHandle<()>,
}

impl AmqpListening {
    pub(super) fn start(
        keeper: Keeper,
        topology: Arc<Topology>,
        plans: Vec<QueuePlan>,
        sink: Sink,
        stats: Arc<RpcStats>,
    ) -> Self {
        let (wish, wishes) = watch::channel(Wish::Consume);
        let (stages, stage) = watch::channel(Stage::SettingUp);
        let listener = Listener {
            keeper,
            topology,
            plans,
            sink,
            stats,
            wishes,
            stage: stages,
        };
        Self {
            wish,
            stage,
            _task: AbortOnDropHandle::new(tokio::spawn(listener.run())),
        }
    }

    async fn reach(&self, wish: Wish, stages: &[Stage]) {
        self.wish.send_replace(wish);
        let mut stage = self.stage.clone();
        // An error means that the task has ended.
        let _ = stage.wait_for(|stage| stages.contains(stage)).await;
    }
}

#[async_trait]
impl Listening for AmqpListening {
    async fn ready(&self) {
        let mut stage = self.stage.clone();
        let _ = stage.wait_for(|stage| *stage != Stage::SettingUp).await;
    }

    async fn pause(&self) {
        self.reach(Wish::Pause, &[Stage::Paused, Stage::Closed])
            .await;
    }

    async fn close(&self) {
        self.reach(Wish::Close, &[Stage::Closed]).await;
    }
}

struct Listener {
    keeper: Keeper,
    topology: Arc<Topology>,
    plans: Vec<QueuePlan>,
    sink: Sink,
    stats: Arc<RpcStats>,
    wishes: watch::Receiver<Wish>,
    stage: watch::Sender<Stage>,
}

/// How a session on one channel ended.
enum End {
    /// As wished.
    Closed,
    /// Something is gone.
    Lost(String),
}

impl Listener {
    async fn run(mut self) {
        let mut pause = FIRST_PAUSE;
        let mut trouble = false;
        loop {
            let Some(link) = self.next_link().await else {
                break;
            };
            let outcome = self.session(&link, trouble).await;
            let consumed = *self.stage.borrow() == Stage::Consuming;
            let reason = match outcome {
                Ok(End::Closed) => break,
                Ok(End::Lost(reason)) => reason,
                Err(error) => error.to_string(),
            };
            if *self.wishes.borrow() != Wish::Consume {
                break;
            }
            if consumed {
                (pause, trouble) = (FIRST_PAUSE, false);
            }
            if link.is_alive() {
                self.stats.consumers_rebuilt.add();
                let queues: Vec<&str> = self.plans.iter().map(|p| p.name.as_str()).collect();
                // Said once, not with every attempt.
                match trouble {
                    false => {
                        warn!(?queues, reason = %shown(&reason), "cannot listen; setting up again");
                    }
                    true => debug!(?queues, %reason, "still cannot listen"),
                }
                trouble = true;
            }
            sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        self.stage.send_replace(Stage::Closed);
    }

    /// A connection to work on; `None` when there is no work any more.
    async fn next_link(&mut self) -> Option<Arc<Link>> {
        let mut wishes = self.wishes.clone();
        tokio::select! {
            biased;
            _ = wishes.wait_for(|wish| *wish != Wish::Consume) => None,
            link = self.keeper.link() => link,
        }
    }

    /// Sets up and consumes until something ends it.
    async fn session(&mut self, link: &Link, again: bool) -> lapin::Result<End> {
        self.topology.declare_queues(link, &self.plans).await?;
        let channel = link.connection.create_channel().await?;
        let prefetch = self.topology.settings.prefetch_count;
        if prefetch > 0 {
            channel
                .basic_qos(prefetch, BasicQosOptions::default())
                .await?;
        }
        let desk = Arc::new(VerdictDesk::default());
        let mut consumers = stream::SelectAll::new();
        for (number, plan) in self.plans.iter().enumerate() {
            let tag = (number + 1).to_string();
            let consumer = channel
                .basic_consume(
                    plan.name.as_str().into(),
                    tag.into(),
                    BasicConsumeOptions::default(),
                    FieldTable::default(),
                )
                .await?;
            let name = plan.name.clone();
            let end = stream::once(async move { Arrival::Ended(name) });
            consumers.push(consumer.map(Arrival::from).chain(end).boxed());
        }
        if again {
            info!(queue = %self.plans[0].name, "listening again");
        }
        self.stage.send_replace(Stage::Consuming);
        let mut session = Session {
            channel,
            desk,
            link,
            ledger: Ledger::default(),
        };
        match self.consume(&mut session, consumers).await? {
            Some(reason) => Ok(End::Lost(reason)),
            None => Ok(self.wind_down(session).await),
        }
    }

    /// Passes messages on and writes verdicts. `None` when the owner wants it to stop.
    async fn consume(
        &mut self,
        session: &mut Session<'_>,
        mut consumers: stream::SelectAll<stream::BoxStream<'static, Arrival>>,
    ) -> lapin::Result<Option<String>> {
        loop {
            let mut arrival = tokio::select! {
                biased;
                arrival = consumers.next() => arrival,
                () = session.desk.filled.notified() => {
                    session.write_verdicts()?;
                    continue;
                }
                _ = self.wishes.changed() => {
                    if *self.wishes.borrow() == Wish::Consume {
                        continue;
                    }
                    return Ok(None);
                }
                () = session.link.gone() => return Ok(Some("connection lost".to_owned())),
            };
            // All that is there already, then one round of verdicts.
            loop {
                match arrival {
                    Some(Arrival::Message(delivery)) => {
                        session.ledger.arrived(delivery.delivery_tag);
                        (self.sink)(incoming(*delivery, &session.desk));
                    }
                    Some(Arrival::Failed(error)) => return Err(error),
                    Some(Arrival::Ended(queue)) => {
                        return Ok(Some(format!("queue {} is gone", shown(&queue))));
                    }
                    None => return Ok(Some("all queues are gone".to_owned())),
                }
                match consumers.next().now_or_never() {
                    Some(next) => arrival = next,
                    None => break,
                }
            }
            session.write_verdicts()?;
        }
    }

    /// Stops deliveries, keeps writing verdicts until the owner closes, tidies up.
    async fn wind_down(&mut self, mut session: Session<'_>) -> End {
        for number in 1..=self.plans.len() {
            let options = BasicCancelOptions { nowait: true };
            let cancelled = session
                .channel
                .basic_cancel(number.to_string().as_str().into(), options);
            // A failure means that the channel is gone, and the consumer with it.
            let _ = timeout(CLOSE_LIMIT, cancelled).await;
        }
        self.stage.send_replace(Stage::Paused);
        loop {
            if session.write_verdicts().is_err() {
                return End::Closed;
            }
            if *self.wishes.borrow_and_update() == Wish::Close {
                break;
            }
            tokio::select! {
                () = session.desk.filled.notified() => {}
                changed = self.wishes.changed() => {
                    if changed.is_err() {
                        break;
                    }
                }
                () = session.link.gone() => return End::Closed,
            }
        }
        let tidy = async {
            for plan in self.plans.iter().filter(|plan| plan.own) {
                let options = QueueDeleteOptions::default();
                let _ = session
                    .channel
                    .queue_delete(plan.name.as_str().into(), options)
                    .await;
            }
            // Closing waits for an answer, so everything written before has arrived.
            let _ = session.channel.close(200, "OK".into()).await;
        };
        if timeout(CLOSE_LIMIT, tidy).await.is_err() {
            debug!("the broker did not answer to closing in time");
        }
        End::Closed
    }
}

/// What a consumer's stream brings.
enum Arrival {
    Message(Box<Delivery>),
    Failed(lapin::Error),
    /// The broker cancelled the consumer: its queue is gone.
    Ended(String),
}

impl From<lapin::Result<Delivery>> for Arrival {
    fn from(delivery: lapin::Result<Delivery>) -> Self {
        match delivery {
            Ok(delivery) => Self::Message(Box::new(delivery)),
            Err(error) => Self::Failed(error),
        }
    }
}

fn incoming(delivery: Delivery, desk: &Arc<VerdictDesk>) -> Incoming {
    let properties = &delivery.properties;
    let compression = properties.headers().as_ref().and_then(|headers| {
        match headers.inner().get("compression") {
            Some(AMQPValue::LongString(text)) => Some(text.to_string()),
            Some(_) => Some("(not a text)".to_owned()),
            None => None,
        }
    });
    let expiration = properties.expiration().as_ref();
    Incoming {
        content_type: properties
            .content_type()
            .as_ref()
            .map(|text| text.as_str().to_owned()),
        compression,
        expiration: expiration
            .and_then(|text| text.as_str().parse().ok())
            .map(Duration::from_millis),
        redelivered: delivery.redelivered,
        receipt: Receipt::new(desk.clone(), delivery.delivery_tag),
        body: delivery.data,
    }
}

struct Session<'a> {
    channel: Channel,
    desk: Arc<VerdictDesk>,
    link: &'a Link,
    ledger: Ledger,
}

impl Session<'_> {
    /// Hands what was decided to the library, which writes it when it can.
    /// Nothing is waited for: a verdict that does not arrive is a redelivery.
    fn write_verdicts(&mut self) -> lapin::Result<()> {
        for (tag, verdict) in self.desk.take() {
            if self.ledger.settle(tag, verdict) && verdict != Verdict::Taken {
                let requeue = verdict == Verdict::Requeued;
                let options = BasicRejectOptions { requeue };
                written(self.channel.basic_reject(tag, options))?;
            }
        }
        let channel = &self.channel;
        self.ledger.acknowledgements(|tag, multiple| {
            written(channel.basic_ack(tag, BasicAckOptions { multiple }))
        })
    }
}

/// The library queues a frame when its future is first polled; what follows is
/// only news of the socket.
fn written(frame: impl Future<Output = lapin::Result<()>>) -> lapin::Result<()> {
    frame.now_or_never().unwrap_or(Ok(()))
}

/// Where verdicts are left, from any task.
#[derive(Default)]
struct VerdictDesk {
    verdicts: Mutex<Vec<(u64, Verdict)>>,
    filled: Notify,
}

impl VerdictDesk {
    fn take(&self) -> Vec<(u64, Verdict)> {
        let mut verdicts = self.verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *verdicts)
    }
}

impl Settler for VerdictDesk {
    fn settle(&self, tag: u64, verdict: Verdict) {
        let mut verdicts = self.verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        verdicts.push((tag, verdict));
        if verdicts.len() == 1 {
            self.filled.notify_one();
        }
    }
}

/// What became of the deliveries of one channel, from the oldest open one on.
#[derive(Debug, Default)]
struct Ledger {
    /// Tag of the first entry; tags count from 1 on every channel.
    first: u64,
    entries: VecDeque<Entry>,
    /// Taken and not yet acknowledged, in order of arrival of the verdict.
    fresh: Vec<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    Open,
    /// To be acknowledged.
    Taken,
    /// Acknowledged, requeued or rejected already.
    Done,
}

impl Ledger {
    fn arrived(&mut self, tag: u64) {
        if self.entries.is_empty() && self.first == 0 {
            self.first = 1;
        }
        // Deliveries of several queues may be seen in another order than numbered.
        while self.first + (self.entries.len() as u64) <= tag {
            self.entries.push_back(Entry::Open);
        }
    }

    /// Notes a verdict; false if there was one already.
    fn settle(&mut self, tag: u64, verdict: Verdict) -> bool {
        let entry = tag
            .checked_sub(self.first)
            .and_then(|at| self.entries.get_mut(at as usize));
        match entry {
            Some(entry @ Entry::Open) => {
                *entry = match verdict {
                    Verdict::Taken => {
                        self.fresh.push(tag);
                        Entry::Taken
                    }
                    Verdict::Requeued | Verdict::Rejected => Entry::Done,
                };
                true
            }
            _ => false,
        }
    }

    /// The fewest acknowledgements for what was taken: one for all deliveries
    /// before the first open one, one each for those after it.
    fn acknowledgements<E>(
        &mut self,
        mut acknowledge: impl FnMut(u64, bool) -> Result<(), E>,
    ) -> Result<(), E> {
        let (mut last, mut count) = (None, 0);
        while let Some(entry) = self.entries.front().filter(|entry| **entry != Entry::Open) {
            if *entry == Entry::Taken {
                last = Some(self.first);
                count += 1;
            }
            self.entries.pop_front();
            self.first += 1;
        }
        if let Some(tag) = last {
            acknowledge(tag, count > 1)?;
        }
        for tag in std::mem::take(&mut self.fresh) {
            let beyond = tag.checked_sub(self.first);
            if let Some(entry) = beyond.and_then(|at| self.entries.get_mut(at as usize)) {
                *entry = Entry::Done;
                acknowledge(tag, false)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acknowledged(ledger: &mut Ledger) -> Vec<(u64, bool)> {
        let mut all = Vec::new();
        let outcome: Result<(), ()> = ledger.acknowledgements(|tag, multiple| {
            all.push((tag, multiple));
            Ok(())
        });
        outcome.unwrap();
        all
    }

    #[test]
    fn one_acknowledgement_covers_all_before_the_first_open_delivery() {
        let mut ledger = Ledger::default();
        (1..=6).for_each(|tag| ledger.arrived(tag));
        for tag in [2, 1, 3, 5] {
            assert!(ledger.settle(tag, Verdict::Taken));
        }
        assert_eq!(acknowledged(&mut ledger), [(3, true), (5, false)]);
        assert!(!ledger.settle(5, Verdict::Taken), "settled twice");
        assert!(ledger.settle(4, Verdict::Taken));
        assert_eq!(acknowledged(&mut ledger), [(4, false)]);
        assert!(ledger.settle(6, Verdict::Taken));
        assert_eq!(acknowledged(&mut ledger), [(6, false)]);
        assert_eq!(acknowledged(&mut ledger), []);
    }

    #[test]
    fn a_rejected_delivery_is_never_acknowledged_by_its_own_tag() {
        let mut ledger = Ledger::default();
        ledger.arrived(3); // 1 and 2 have not been seen yet
        assert!(ledger.settle(3, Verdict::Rejected));
        ledger.arrived(1);
        ledger.arrived(2);
        assert!(ledger.settle(1, Verdict::Taken));
        assert!(ledger.settle(2, Verdict::Taken));
        assert_eq!(acknowledged(&mut ledger), [(2, true)]);
        ledger.arrived(4);
        assert!(ledger.settle(4, Verdict::Taken));
        assert_eq!(acknowledged(&mut ledger), [(4, false)]);
    }

    #[test]
    fn verdicts_on_unknown_tags_are_ignored() {
        let mut ledger = Ledger::default();
        assert!(!ledger.settle(7, Verdict::Taken));
        ledger.arrived(1);
        assert!(!ledger.settle(0, Verdict::Taken));
        assert!(!ledger.settle(2, Verdict::Taken));
        assert_eq!(acknowledged(&mut ledger), []);
    }
}
