//! Exchanges and queues: their names and arguments, exactly as oslo.messaging's
//! driver declares them, because a peer whose declaration differs cannot start.

use std::sync::Arc;

use lapin::{
    Channel, ExchangeKind,
    options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable, ShortString},
};
use tracing::warn;

use super::connection::Link;
use crate::{
    envelope::unique_id,
    error::TransportError,
    settings::MessagingSettings,
    text::shown,
    transport::{Address, Subscription},
};

/// Longest name AMQP can carry, bytes.
const MAX_NAME: usize = 255;
/// The broker's code for "exists with other arguments".
const PRECONDITION_FAILED: u16 = 406;
/// The broker's code for "there is none".
const NOT_FOUND: u16 = 404;

/// Names and arguments under given settings.
pub(super) struct Topology {
    pub(super) settings: Arc<MessagingSettings>,
}

/// Where a message is published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) exchange: ShortString,
    pub(super) key: ShortString,
    /// What the publisher declares before its first message there.
    pub(super) declare: Option<Declare>,
}

/// What has to be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Declare {
    /// The control exchange.
    Control,
    /// A topic's fanout exchange.
    Fanout(String),
    /// The control exchange and a notification queue bound to it.
    Notification(String),
}

/// A queue to consume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct QueuePlan {
    pub(super) name: String,
    /// The exchange and key it is bound to; replies need none.
    binding: Option<(Declare, String)>,
    transient: bool,
    /// Whether it goes with its consumer.
    pub(super) own: bool,
}

impl Topology {
    pub(super) fn new(settings: Arc<MessagingSettings>) -> Self {
        Self { settings }
    }

    pub(super) fn route(&self, to: &Address) -> Result<Route, TransportError> {
        let control = self.settings.control_exchange.as_str();
        let (exchange, key, declare) = match to {
            Address::Topic { topic } => (control, topic.clone(), Some(Declare::Control)),
            Address::Server { .. } => (control, to.to_string(), Some(Declare::Control)),
            Address::Reply { queue } => ("", queue.clone(), None),
            Address::Notification { .. } => {
                let queue = to.to_string();
                (control, queue.clone(), Some(Declare::Notification(queue)))
            }
            Address::Fanout { topic } => {
                let exchange = fanout_exchange(topic);
                return Ok(Route {
                    exchange: name("topic", &exchange)?,
                    key: ShortString::default(),
                    declare: Some(Declare::Fanout(topic.clone())),
                });
            }
        };
        Ok(Route {
            exchange: ShortString::from(exchange),
            key: name("address", &key)?,
            declare,
        })
    }

    /// The queues of a subscription, in the order oslo declares them.
    pub(super) fn plan(&self, what: &Subscription) -> Result<Vec<QueuePlan>, TransportError> {
        let bound = |name: String, declare: Declare, key: &str| QueuePlan {
            binding: Some((declare, key.to_owned())),
            transient: false,
            own: false,
            name,
        };
        let plans = match what {
            Subscription::Server { topic, server } => {
                let direct = format!("{topic}.{server}");
                let fanout = format!("{topic}_fanout_{:032x}", unique_id());
                vec![
                    bound(topic.clone(), Declare::Control, topic),
                    bound(direct.clone(), Declare::Control, &direct),
                    QueuePlan {
                        transient: true,
                        own: true,
                        ..bound(fanout, Declare::Fanout(topic.clone()), topic)
                    },
                ]
            }
            Subscription::Replies { queue } => vec![QueuePlan {
                name: queue.clone(),
                binding: None,
                transient: true,
                own: false,
            }],
            Subscription::Notifications { topic, priority } => {
                let queue = format!("{topic}.{priority}");
                vec![bound(queue.clone(), Declare::Control, &queue)]
            }
        };
        for plan in &plans {
            name("queue", &plan.name)?;
        }
        Ok(plans)
    }

    /// Declares an exchange, and for notifications the queue too.
    pub(super) async fn declare(&self, link: &Link, what: &Declare) -> lapin::Result<()> {
        let mut desk = Desk::open(link).await?;
        self.declare_at(&mut desk, what).await
    }

    /// Declares and binds a subscription's queues.
    pub(super) async fn declare_queues(
        &self,
        link: &Link,
        plans: &[QueuePlan],
    ) -> lapin::Result<()> {
        let mut desk = Desk::open(link).await?;
        for plan in plans {
            if let Some((exchange, _)) = &plan.binding {
                self.declare_at(&mut desk, exchange).await?;
            }
            let (options, arguments) = self.queue_arguments(plan.transient);
            desk.queue(&plan.name, options, arguments).await?;
            if let Some((exchange, key)) = &plan.binding {
                let exchange = self.exchange_name(exchange);
                desk.bind(&plan.name, &exchange, key).await?;
            }
        }
        Ok(())
    }

    /// Consumers of a queue; none if there is no such queue.
    pub(super) async fn consumers(&self, link: &Link, queue: &str) -> lapin::Result<Option<u32>> {
        // The broker closes the channel on which a missing queue was asked for.
        let channel = link.connection.create_channel().await?;
        let options = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let declared = channel.queue_declare(queue.into(), options, FieldTable::default());
        match declared.await {
            Ok(queue) => Ok(Some(queue.consumer_count())),
            Err(error) if has_code(&error, NOT_FOUND) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn declare_at(&self, desk: &mut Desk<'_>, what: &Declare) -> lapin::Result<()> {
        let settings = &self.settings;
        let exchange = self.exchange_name(what);
        let (kind, options) = match what {
            Declare::Fanout(_) => (
                ExchangeKind::Fanout,
                ExchangeDeclareOptions {
                    durable: settings.rabbit_transient_quorum_queue,
                    auto_delete: true,
                    ..ExchangeDeclareOptions::default()
                },
            ),
            Declare::Control | Declare::Notification(_) => (
                ExchangeKind::Topic,
                ExchangeDeclareOptions {
                    durable: settings.amqp_durable_queues || settings.rabbit_quorum_queue,
                    auto_delete: settings.amqp_auto_delete,
                    ..ExchangeDeclareOptions::default()
                },
            ),
        };
        desk.exchange(&exchange, kind, options).await?;
        if let Declare::Notification(queue) = what {
            let (options, arguments) = self.queue_arguments(false);
            desk.queue(queue, options, arguments).await?;
            desk.bind(queue, &exchange, queue).await?;
        }
        Ok(())
    }

    fn exchange_name(&self, of: &Declare) -> String {
        match of {
            Declare::Fanout(topic) => fanout_exchange(topic),
            Declare::Control | Declare::Notification(_) => self.settings.control_exchange.clone(),
        }
    }

    fn queue_arguments(&self, transient: bool) -> (QueueDeclareOptions, FieldTable) {
        let settings = &self.settings;
        let quorum = match transient {
            true => settings.rabbit_transient_quorum_queue,
            false => settings.rabbit_quorum_queue,
        };
        let mut arguments = FieldTable::default();
        let mut limit = |name: &str, value: u32| {
            if value > 0 {
                let value = i32::try_from(value).unwrap_or(i32::MAX);
                arguments.insert(name.into(), AMQPValue::LongInt(value));
            }
        };
        if transient {
            limit(
                "x-expires",
                settings.transient_queues_ttl_s.saturating_mul(1000),
            );
        }
        if quorum {
            limit("x-delivery-limit", settings.rabbit_quorum_delivery_limit);
            limit(
                "x-max-in-memory-length",
                settings.rabbit_quorum_max_memory_length,
            );
            limit(
                "x-max-in-memory-bytes",
                settings.rabbit_quorum_max_memory_bytes,
            );
            arguments.insert(
                "x-queue-type".into(),
                AMQPValue::LongString("quorum".into()),
            );
        }
        let options = QueueDeclareOptions {
            durable: quorum || (!transient && settings.amqp_durable_queues),
            auto_delete: !transient && settings.amqp_auto_delete,
            ..QueueDeclareOptions::default()
        };
        (options, arguments)
    }
}

fn fanout_exchange(topic: &str) -> String {
    format!("{topic}_fanout")
}

/// A name as AMQP carries it.
fn name(what: &'static str, text: &str) -> Result<ShortString, TransportError> {
    let bad = |reason: String| TransportError::BadName { what, reason };
    if text.is_empty() {
        return Err(bad("it is empty".to_owned()));
    }
    if text.len() > MAX_NAME {
        return Err(bad(format!(
            "{} is longer than {MAX_NAME} bytes",
            shown(text)
        )));
    }
    Ok(ShortString::from(text))
}

/// Whether the broker closed the channel with that code.
pub(super) fn has_code(error: &lapin::Error, code: u16) -> bool {
    match error.kind() {
        lapin::ErrorKind::ProtocolError(error) => error.get_id() == code,
        _ => false,
    }
}

/// A channel for declarations alone: a refused one closes its channel, and must
/// not take messages under way with it.
struct Desk<'a> {
    link: &'a Link,
    channel: Channel,
}

impl<'a> Desk<'a> {
    async fn open(link: &'a Link) -> lapin::Result<Self> {
        let channel = link.connection.create_channel().await?;
        Ok(Self { link, channel })
    }

    async fn exchange(
        &mut self,
        exchange: &str,
        kind: ExchangeKind,
        options: ExchangeDeclareOptions,
    ) -> lapin::Result<()> {
        let declare = |channel: Channel, options| {
            let kind = kind.clone();
            async move {
                channel
                    .exchange_declare(exchange.into(), kind, options, FieldTable::default())
                    .await
            }
        };
        match declare(self.channel.clone(), options).await {
            Err(error) if has_code(&error, PRECONDITION_FAILED) => {
                self.as_it_is("exchange", exchange, &error).await?;
                let passive = ExchangeDeclareOptions {
                    passive: true,
                    ..options
                };
                declare(self.channel.clone(), passive).await
            }
            outcome => outcome,
        }
    }

    async fn queue(
        &mut self,
        queue: &str,
        options: QueueDeclareOptions,
        arguments: FieldTable,
    ) -> lapin::Result<()> {
        let declare = |channel: Channel, options| {
            let arguments = arguments.clone();
            async move {
                let declared = channel.queue_declare(queue.into(), options, arguments);
                declared.await.map(|_| ())
            }
        };
        match declare(self.channel.clone(), options).await {
            Err(error) if has_code(&error, PRECONDITION_FAILED) => {
                self.as_it_is("queue", queue, &error).await?;
                let passive = QueueDeclareOptions {
                    passive: true,
                    ..options
                };
                declare(self.channel.clone(), passive).await
            }
            outcome => outcome,
        }
    }

    async fn bind(&self, queue: &str, exchange: &str, key: &str) -> lapin::Result<()> {
        self.channel
            .queue_bind(
                queue.into(),
                exchange.into(),
                key.into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            )
            .await
    }

    /// Somebody declared it differently. Using it as it is serves better than
    /// not starting, but the operator has to know.
    async fn as_it_is(
        &mut self,
        what: &str,
        name: &str,
        error: &lapin::Error,
    ) -> lapin::Result<()> {
        warn!(
            "{what} {} exists with other properties and is used as it is ({}); make durable, auto-delete and quorum settings equal everywhere, or delete it",
            shown(name),
            shown(&error.to_string()),
        );
        self.channel = self.link.connection.create_channel().await?;
        Ok(())
    }
}
