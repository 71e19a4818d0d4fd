//! What ends a cold migration that is finished: confirm or revert.
//!
//! The wish goes onto the record and the saga is driven by whoever has its
//! lease, so that the answer comes at once and survives the conductor. Asked
//! twice, it is one wish.

use std::time::Duration;

use drover_model::{
    api::conductor::RevertMigration,
    migration::{ColdOptions, Ending, Migration, MigrationStatus, Way},
};
use drover_rpc::{RemoteFailure, Request};
use drover_store::StoreError;
use tokio::time::timeout;
use tracing::info;

use super::{
    DroverEndpoint,
    failure::{refused, store_failure, wrong_state},
};
use crate::{admission::Wanted, checks};

/// How long confirming may take before a move back is not begun.
const CONFIRMED_WITHIN: Duration = Duration::from_secs(120);

impl DroverEndpoint {
    /// Has a finished migration confirmed or reverted.
    pub(crate) async fn end_with(
        &self,
        reference: &str,
        ending: Ending,
    ) -> Result<Migration, RemoteFailure> {
        let found = self.context.store.find_migration(reference).await;
        let found = found.map_err(|e| store_failure(&e))?;
        self.runs_once(&found).await?;
        match self.runner.end_with(found.uuid, ending).await {
            Ok(Some(migration)) => Ok(migration),
            Ok(None) => {
                let now = self.context.store.migration(found.uuid).await;
                let now = now.map_err(|e| store_failure(&e))?;
                let what = match ending {
                    Ending::Confirm => "confirm",
                    Ending::Revert => "revert",
                };
                Err(wrong_state(&now, what))
            }
            Err(error) => Err(store_failure(&error)),
        }
    }

    /// Refuses to touch a guest of which a copy is active elsewhere.
    async fn runs_once(&self, migration: &Migration) -> Result<(), RemoteFailure> {
        let uuid = migration.instance_uuid.to_string();
        let instance = match self.context.store.find_instance(&uuid).await {
            Err(StoreError::NotFound(_)) => return Ok(()),
            found => found.map_err(|e| store_failure(&e))?,
        };
        match checks::two_copies(&instance) {
            Some(failure) => Err(refused(&[failure], None)),
            None => Ok(()),
        }
    }

    pub(super) async fn revert(&self, request: &Request) -> Result<Migration, RemoteFailure> {
        let ask: RevertMigration = request.args()?;
        if !ask.keep_changes {
            return self.end_with(&ask.migration, Ending::Revert).await;
        }
        let confirmed = self.end_with(&ask.migration, Ending::Confirm).await?;
        // A long wait holds no unacknowledged message.
        request.accept().await;
        let confirmed = timeout(CONFIRMED_WITHIN, self.confirmed(confirmed)).await;
        let confirmed = confirmed.map_err(|_| {
            RemoteFailure::runtime_error(
                "confirming takes long: once it is confirmed, migrate the instance back".to_owned(),
            )
        })??;
        info!(
            migration = confirmed.id,
            "confirmed, to be migrated back with its changes"
        );
        let instance = self.instance(&confirmed.instance_uuid.to_string()).await?;
        let options = match &confirmed.way {
            Way::Cold(options) => options.clone(),
            Way::Live(_) | Way::Transfer(_) | Way::Evacuation(_) => ColdOptions::default(),
        };
        let wanted = Wanted {
            instance,
            host: Some(confirmed.source_host.clone()),
            way: Way::Cold(ColdOptions {
                flavor: None,
                ..options
            }),
            consent: None,
            operation: None,
        };
        self.admit(request, wanted).await
    }

    async fn confirmed(&self, mut migration: Migration) -> Result<Migration, RemoteFailure> {
        loop {
            let mut changes = self.context.store.changes();
            let found = self.context.store.migration(migration.uuid).await;
            migration = found.map_err(|e| store_failure(&e))?;
            match migration.status {
                MigrationStatus::Confirmed => return Ok(migration),
                MigrationStatus::Confirming => {}
                _ => return Err(wrong_state(&migration, "move back with its changes")),
            }
            // Lagging only means to look again.
            let _ = timeout(Duration::from_secs(1), changes.recv()).await;
        }
    }
}
