//! The transport on RabbitMQ. The only module that knows the AMQP library.
//!
//! The library's own recovery is off: it resumes silently, gives up for good
//! after some attempts and cannot redo everything. Instead there is one way
//! back from every failure: a [`connection::Keeper`] makes connections for ever,
//! the [`publisher`] and each [`consumer`] rebuild all they need on a new one.
//!
//! Publishing and consuming have connections of their own: a broker that blocks
//! publishers would otherwise hold back acknowledgements too.

mod connection;
mod consumer;
#[cfg(test)]
mod on_broker;
mod publisher;
mod topology;

use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use tokio::time::{Instant, timeout_at};

use self::{
    connection::{Keeper, Outage},
    consumer::AmqpListening,
    publisher::Publisher,
    topology::Topology,
};
use crate::{
    error::TransportError,
    settings::{Broker, MessagingSettings, SettingsError},
    stats::RpcStats,
    text::shown,
    transport::{Address, Listening, Outgoing, Sink, Subscription, Transport},
};

/// RabbitMQ, through every loss of it.
pub struct AmqpTransport {
    settings: Arc<MessagingSettings>,
    broker: Arc<Broker>,
    topology: Arc<Topology>,
    outage: Arc<Outage>,
    stats: Arc<RpcStats>,
    publisher: OnceLock<Publisher>,
    consuming: OnceLock<Keeper>,
}

impl AmqpTransport {
    /// A transport on the broker the settings name. Connects with the first use;
    /// a broker that is not there is waited for.
    ///
    /// # Errors
    /// When the settings cannot work, whatever the broker says.
    pub fn new(settings: &MessagingSettings) -> Result<Arc<Self>, SettingsError> {
        let (settings, broker) = settings.resolved()?;
        let settings = Arc::new(settings);
        Ok(Arc::new(Self {
            topology: Arc::new(Topology::new(settings.clone())),
            outage: Arc::new(Outage::new(&broker)),
            broker: Arc::new(broker),
            settings,
            stats: Arc::default(),
            publisher: OnceLock::new(),
            consuming: OnceLock::new(),
        }))
    }

    fn keeper(&self, purpose: &'static str) -> Keeper {
        Keeper::start(
            purpose,
            self.broker.clone(),
            self.settings.clone(),
            self.outage.clone(),
            self.stats.clone(),
        )
    }

    fn publisher(&self) -> &Publisher {
        self.publisher.get_or_init(|| {
            Publisher::new(
                self.keeper("publish"),
                self.topology.clone(),
                self.broker.to_string(),
                self.stats.clone(),
            )
        })
    }

    fn consuming(&self) -> &Keeper {
        self.consuming.get_or_init(|| self.keeper("consume"))
    }

    async fn count_consumers(&self, queue: &str) -> Result<Option<u32>, TransportError> {
        let keeper = self.publisher().keeper();
        let link = keeper.link().await.ok_or(TransportError::Closed)?;
        let counted = self.topology.consumers(&link, queue).await;
        counted.map_err(|error| TransportError::Refused {
            reason: shown(&error.to_string()),
        })
    }
}

#[async_trait]
impl Transport for AmqpTransport {
    async fn send(
        &self,
        to: &Address,
        message: &Outgoing,
        deadline: Instant,
    ) -> Result<(), TransportError> {
        self.publisher().send(to, message, deadline).await
    }

    fn listen(&self, what: Subscription, sink: Sink) -> Result<Box<dyn Listening>, TransportError> {
        let plan = self.topology.plan(&what)?;
        Ok(Box::new(AmqpListening::start(
            self.consuming().clone(),
            self.topology.clone(),
            plan,
            sink,
            self.stats.clone(),
        )))
    }

    async fn consumers(
        &self,
        topic: &str,
        server: &str,
        deadline: Instant,
    ) -> Result<Option<u32>, TransportError> {
        let address = Address::Server {
            topic: topic.to_owned(),
            server: server.to_owned(),
        };
        let started = Instant::now();
        let queue = self.topology.route(&address)?.key;
        match timeout_at(deadline, self.count_consumers(queue.as_str())).await {
            Ok(counted) => counted,
            Err(_) => Err(TransportError::Unavailable {
                broker: self.broker.to_string(),
                waited_ms: started.elapsed().as_millis() as u64,
                reason: "no word on a queue came".to_owned(),
            }),
        }
    }

    fn stats(&self) -> &Arc<RpcStats> {
        &self.stats
    }

    async fn close(&self) {
        if let Some(publisher) = self.publisher.get() {
            publisher.keeper().close().await;
        }
        if let Some(consuming) = self.consuming.get() {
            consuming.close().await;
        }
    }
}
