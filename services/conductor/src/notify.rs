//! Publishes notifications that are committed, oldest first, and forgets each
//! once the broker has it. One that is published twice (after a crash in
//! between) keeps its `notification_id`.

use std::time::Duration;

use drover_rpc::{Notifier, Priority, RequestContext};
use drover_store::{Store, StoreError};
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// Pause after a failure, and longest time between two looks.
const PAUSE: Duration = Duration::from_secs(2);
/// Notifications read at once.
const BATCH: u32 = 50;

/// Publishes until told to stop.
pub async fn publish(store: Store, notifier: Notifier, stop: CancellationToken) {
    let mut changes = store.changes();
    loop {
        if let Err(error) = publish_all(&store, &notifier).await {
            warn!(error, "notifications are kept and tried again");
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = changes.recv() => {}
            () = tokio::time::sleep(PAUSE) => {}
        }
    }
}

async fn publish_all(store: &Store, notifier: &Notifier) -> Result<(), String> {
    loop {
        let batch = store
            .unpublished(BATCH)
            .await
            .map_err(|e: StoreError| e.to_string())?;
        if batch.is_empty() {
            return Ok(());
        }
        for n in batch {
            let request = n
                .payload
                .get("request_id")
                .and_then(|v| v.as_str())
                .unwrap_or("");
            let context = RequestContext::service(request);
            let mut payload = n.payload.clone();
            payload["notification_id"] = n.id.to_string().into();
            let priority = match n.priority.as_str() {
                "ERROR" => Priority::Error,
                "WARN" => Priority::Warn,
                _ => Priority::Info,
            };
            let sent = notifier
                .notify(&context, priority, &n.event_type, &payload)
                .await;
            sent.map_err(|e| e.to_string())?;
            store.published(n.id).await.map_err(|e| e.to_string())?;
        }
    }
}
