//! Publishes notifications that are committed, oldest first, and forgets each
//! once the broker has it. One that is published twice (after a crash in
//! between) keeps its `notification_id`. One that the broker refuses, or that
//! cannot be written, steps aside for the others, and is given up in the end; while
//! there is no broker all of them wait.

use std::time::Duration;

use drover_rpc::{ErrorClass, Notifier, Priority, RequestContext, RpcError};
use drover_runtime::error_chain::Chain;
use drover_store::{Store, StoreError, outbox::Notification};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use crate::clock::Clock;

/// Pause after a failure, and longest time between two looks.
const PAUSE: Duration = Duration::from_secs(2);
/// Notifications read at once.
const BATCH: u32 = 50;
/// How long a notification that was refused rests.
const REST_MS: u64 = 600_000;
/// Refusals after which a notification is given up: those of a day.
const MOST_REFUSALS: u32 = 144;

/// Publishes until told to stop.
pub async fn publish(store: Store, clock: Clock, notifier: Notifier, stop: CancellationToken) {
    let mut changes = store.changes();
    let outbox = Outbox {
        store,
        clock,
        notifier,
    };
    loop {
        match outbox.publish_all().await {
            Ok(()) => {}
            Err(NotNow::Broker(error)) => {
                warn!(error = %Chain(&error), "notifications are kept and tried again");
            }
            Err(NotNow::Record(error)) => {
                warn!(error = %Chain(&error), "notifications are kept and tried again");
            }
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = changes.recv() => {}
            () = tokio::time::sleep(PAUSE) => {}
        }
    }
}

/// Why nothing more is published now.
enum NotNow {
    Broker(RpcError),
    Record(StoreError),
}

impl From<StoreError> for NotNow {
    fn from(error: StoreError) -> Self {
        Self::Record(error)
    }
}

struct Outbox {
    store: Store,
    clock: Clock,
    notifier: Notifier,
}

impl Outbox {
    async fn publish_all(&self) -> Result<(), NotNow> {
        loop {
            let batch = self.store.unpublished(BATCH, self.clock.now_ms()).await?;
            if batch.is_empty() {
                return Ok(());
            }
            for n in batch {
                match self.send(&n).await {
                    Ok(_) => self.store.published(n.id).await?,
                    Err(error) if error.class() == ErrorClass::Retryable => {
                        return Err(NotNow::Broker(error));
                    }
                    Err(error) => self.put_aside(&n, &error).await?,
                }
            }
        }
    }

    async fn send(&self, n: &Notification) -> Result<String, RpcError> {
        let request = n.payload.get("request_id").and_then(|v| v.as_str());
        let context = RequestContext::service(request.unwrap_or(""));
        let mut payload = n.payload.clone();
        if let Some(fields) = payload.as_object_mut() {
            fields.insert("notification_id".to_owned(), n.id.to_string().into());
        }
        let priority = match n.priority.as_str() {
            "ERROR" => Priority::Error,
            "WARN" => Priority::Warn,
            _ => Priority::Info,
        };
        let notified = self
            .notifier
            .notify(&context, priority, &n.event_type, &payload);
        notified.await
    }

    async fn put_aside(&self, n: &Notification, refusal: &RpcError) -> Result<(), StoreError> {
        let (id, event_type) = (n.id, &n.event_type);
        let rests_until_ms = self.clock.now_ms() + REST_MS;
        if self.store.refused(id, rests_until_ms).await? < MOST_REFUSALS {
            warn!(%id, event_type, error = %Chain(refusal), "a notification cannot be sent; tried again later");
            return Ok(());
        }
        error!(%id, event_type, error = %Chain(refusal), "a notification cannot be sent, and is given up");
        self.store.published(id).await
    }
}
