//! `migrate_instance`, and what every request for a migration shares.

use drover_model::{
    api::conductor::{MigrateAnswer, MigrateInstance},
    migration::{Migration, Requester, Way},
};
use drover_rpc::{RemoteFailure, Request, RequestContext};

use super::{
    DroverEndpoint, failure,
    failure::{refused, store_failure},
};
use crate::admission::{Admission, Answer, Wanted};

impl DroverEndpoint {
    pub(super) async fn migrate_instance(
        &self,
        request: &Request,
        ask: &MigrateInstance,
    ) -> Result<MigrateAnswer, RemoteFailure> {
        let way = ask.way().map_err(|e| {
            RemoteFailure::value_error(format!("options of a {}: {e}", ask.migration_type))
        })?;
        let instead = match way {
            Way::Transfer(_) => Some("a project-transfer is asked for with transfer_instance"),
            Way::Evacuation(_) => Some("an evacuation is asked for with evacuate_node"),
            Way::Live(_) | Way::Cold(_) => None,
        };
        if let Some(words) = instead {
            return Err(RemoteFailure::value_error(words));
        }
        let wanted = Wanted {
            instance: self.instance(&ask.instance).await?,
            host: ask.host.clone(),
            way,
            consent: None,
            operation: None,
        };
        if ask.dry_run {
            let plan = self.admission().plan(&wanted).await;
            let plan = plan.map_err(|e| store_failure(&e))?;
            return Ok(MigrateAnswer::Plan { plan });
        }
        let migration = self.admit(request, wanted).await?;
        Ok(MigrateAnswer::Accepted {
            migration: Box::new(migration),
        })
    }

    /// Admits migrations.
    pub(crate) fn admission(&self) -> Admission<'_> {
        Admission {
            context: &self.context,
            runner: &self.runner,
        }
    }

    /// Puts a migration on the record and has it driven; acknowledges the
    /// request then (invariant 5).
    pub(crate) async fn admit(
        &self,
        request: &Request,
        wanted: Wanted,
    ) -> Result<Migration, RemoteFailure> {
        let admission = self.admission();
        let by = requester(request.context());
        let admitted = admission.admit(by, request.unique_id(), &wanted).await;
        match admitted.map_err(|e| store_failure(&e))? {
            Answer::Accepted(migration) => {
                request.accept().await;
                Ok(*migration)
            }
            Answer::Refused { checks, migration } => Err(refused(&checks, migration.as_deref())),
            Answer::OfferTaken(offer) => {
                Err(failure::offer_not_open(&offer, "somebody else was faster"))
            }
        }
    }
}

/// Who asks, by the request's context.
pub(super) fn requester(context: &RequestContext) -> Requester {
    let text = |value: Option<&str>| value.map(ToOwned::to_owned);
    Requester {
        request_id: text(context.request_id()),
        user_id: text(context.user_id()),
        project_id: text(context.project_id()),
    }
}
