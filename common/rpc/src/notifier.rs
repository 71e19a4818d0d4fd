//! Telling whoever is interested what has happened.
//!
//! oslo's `messagingv2` notifications: published to one queue per topic and
//! priority, declared by the publisher, so that they wait until somebody reads.

use std::{sync::Arc, time::Duration};

use serde::Serialize;
use tokio::time::Instant;

use crate::{
    context::RequestContext,
    envelope::{NotificationHead, encode_notification},
    error::{RpcError, TransportError},
    settings::MessagingSettings,
    transport::{Address, Outgoing, Transport},
};

/// How much a notification matters; also part of its queue's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // the names say all
pub enum Priority {
    Audit,
    Debug,
    Info,
    Warn,
    Error,
    Critical,
    Sample,
}

impl Priority {
    /// As in the queue's name.
    pub fn lower(self) -> &'static str {
        match self {
            Self::Audit => "audit",
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
            Self::Critical => "critical",
            Self::Sample => "sample",
        }
    }
}

/// Publishes notifications in one publisher's name.
#[derive(Clone)]
pub struct Notifier {
    transport: Arc<dyn Transport>,
    publisher_id: String,
    topics: Vec<String>,
    publish_timeout: Duration,
    now_ms: WallClock,
}

/// Milliseconds since 1970, for the notifications' timestamps.
type WallClock = Arc<dyn Fn() -> u64 + Send + Sync>;

impl Notifier {
    /// A notifier for `publisher_id`, such as `conductor.ctl` or `compute.kvm1`, by
    /// whose wall clock, in milliseconds since 1970, it says when something was told.
    pub fn new(
        transport: Arc<dyn Transport>,
        settings: &MessagingSettings,
        publisher_id: impl Into<String>,
        now_ms: impl Fn() -> u64 + Send + Sync + 'static,
    ) -> Self {
        Self {
            transport,
            publisher_id: publisher_id.into(),
            topics: settings.notification_topics.clone(),
            publish_timeout: settings.publish_timeout(),
            now_ms: Arc::new(now_ms),
        }
    }

    /// Publishes one event to every topic, under one message id, which it returns.
    /// The context's token and catalog are left out.
    ///
    /// # Errors
    /// [`RpcError::BadArguments`] for a payload that cannot be sent,
    /// [`RpcError::NotSent`] when a topic could not be reached.
    pub async fn notify<P: Serialize + Sync + ?Sized>(
        &self,
        context: &RequestContext,
        priority: Priority,
        event_type: &str,
        payload: &P,
    ) -> Result<String, RpcError> {
        let message_id = uuid::Uuid::new_v4().to_string();
        let outcome = self
            .publish(context, priority, event_type, payload, &message_id)
            .await;
        let stats = self.transport.stats();
        match &outcome {
            Ok(()) => stats.notifications_sent.add(),
            Err(_) => stats.notifications_failed.add(),
        }
        outcome.map(|()| message_id)
    }

    async fn publish<P: Serialize + Sync + ?Sized>(
        &self,
        context: &RequestContext,
        priority: Priority,
        event_type: &str,
        payload: &P,
        message_id: &str,
    ) -> Result<(), RpcError> {
        let head = NotificationHead {
            message_id,
            publisher_id: &self.publisher_id,
            event_type,
            priority: &priority.lower().to_ascii_uppercase(),
            timestamp: &timestamp((self.now_ms)()),
        };
        let context = context.redacted();
        for topic in &self.topics {
            let body = encode_notification(&head, payload, &context).map_err(|reason| {
                RpcError::BadArguments {
                    method: event_type.to_owned(),
                    reason,
                }
            })?;
            let address = Address::Notification {
                topic: topic.clone(),
                priority: priority.lower(),
            };
            let message = Outgoing {
                body: Arc::new(body),
                ..Outgoing::default()
            };
            let deadline = Instant::now() + self.publish_timeout;
            let sent = self.transport.send(&address, &message, deadline).await;
            sent.map_err(|source: TransportError| RpcError::NotSent {
                method: event_type.to_owned(),
                target_name: address.to_string(),
                source,
            })?;
        }
        Ok(())
    }
}

/// UTC as Python prints it: `2026-11-23 06:36:38.924331`.
fn timestamp(at_ms: u64) -> String {
    let time = i64::try_from(at_ms).map(jiff::Timestamp::from_millisecond);
    let time = time.map(Result::unwrap_or_default).unwrap_or_default();
    time.strftime("%Y-%m-%d %H:%M:%S.%6f").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_pythons() {
        assert_eq!(timestamp(1_795_415_798_924), "2026-11-23 06:36:38.924000");
        assert_eq!(timestamp(0), "1970-01-01 00:00:00.000000");
    }
}
