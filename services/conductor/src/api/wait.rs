//! `wait_migration`: answers when the record has changed since the caller saw
//! it, so that nobody has to poll.

use std::time::Duration;

use drover_model::{
    api::conductor::{MigrationRef, WaitMigration},
    migration::Migration,
};
use drover_rpc::RemoteFailure;
use tokio::time::{Instant, timeout_at};

use super::{DroverEndpoint, failure::store_failure};

/// Longest wait, whatever the caller asks for.
pub(super) const LONGEST: Duration = Duration::from_secs(30);
/// How often the record is read in case another conductor changed it.
pub(super) const LOOK: Duration = Duration::from_millis(1000);
/// Waits at once; more are answered soon with what is there.
pub(super) const MAX_WAITS: usize = 512;
/// How long one wait too many lasts.
pub(super) const SHORT: Duration = Duration::from_millis(500);

impl DroverEndpoint {
    pub(super) async fn wait(&self, ask: &WaitMigration) -> Result<Migration, RemoteFailure> {
        let store = &self.context.store;
        let slot = self.waits.try_acquire();
        let longest = if slot.is_ok() { LONGEST } else { SHORT };
        let deadline = Instant::now() + Duration::from_millis(ask.timeout_ms).min(longest);
        let mut changes = store.changes();
        let reference = MigrationRef {
            migration: ask.migration.clone(),
        };
        let mut migration = self.find(&reference).await?;
        while migration.version <= ask.seen_version && Instant::now() < deadline {
            let id = migration.uuid;
            let changed = async {
                // Lagging behind is as good as a change: look.
                while matches!(changes.recv().await, Ok(other) if other != id) {}
            };
            let until = deadline.min(Instant::now() + LOOK);
            let _ = timeout_at(until, changed).await;
            migration = store.migration(id).await.map_err(|e| store_failure(&e))?;
        }
        Ok(migration)
    }
}
