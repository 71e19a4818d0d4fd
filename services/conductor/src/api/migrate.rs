//! Admission: from a request to a migration on the record, or to a refusal.
//!
//! The record alone decides whether a request is admitted; everything that
//! only the nodes can tell is the first step of the saga, so that the caller
//! has its answer at once and the checks survive the conductor. A request that
//! is refused gets the nodes' failures too (invariant 8), and leaves a record.

use drover_model::{
    api::conductor::{MigrateAnswer, MigrateInstance, Plan, PlannedDisk},
    check::{CheckFailure, Side},
    ids::{HostName, MigrationId, OperationId},
    migration::{Consent, EndReason, Migration, MigrationStatus, Progress, Requester, Way},
};
use drover_rpc::{RemoteFailure, Request, RequestContext};
use drover_store::{Store, instances::InstanceRow, migrations::Admitted};
use tracing::info;

use super::{
    DroverEndpoint, failure,
    failure::{refused, store_failure},
};
use crate::{
    checks, placement,
    survey::{Chosen, Examined, Survey},
};

/// A migration that somebody wants, whoever asked in whatever words.
pub(crate) struct Wanted {
    /// What is to move.
    pub instance: InstanceRow,
    /// Where to, if the caller says.
    pub host: Option<HostName>,
    /// How.
    pub way: Way,
    /// Of a transfer to another project, who agreed to it.
    pub consent: Option<Consent>,
    /// The operation it is part of.
    pub operation: Option<OperationId>,
}

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
            let plan = self.plan(&wanted).await?;
            return Ok(MigrateAnswer::Plan { plan });
        }
        let migration = self.admit(request, wanted).await?;
        Ok(MigrateAnswer::Accepted {
            migration: Box::new(migration),
        })
    }

    /// Puts a migration on the record and has it driven; acknowledges the
    /// request in between (invariant 5).
    pub(crate) async fn admit(
        &self,
        request: &Request,
        wanted: Wanted,
    ) -> Result<Migration, RemoteFailure> {
        let now_ms = self.context.clock.now_ms();
        let migration = new_record(&wanted, request.context(), self.runner.owner(), now_ms);
        let failures = self.admission_failures(&wanted).await?;
        if !failures.is_empty() {
            return Err(self.refuse(request, &wanted, migration, failures).await);
        }
        let store = &self.context.store;
        let until = self.runner.lease_until_ms();
        let admitted = store.admit(&migration, request.unique_id(), until).await;
        match admitted.map_err(|e| store_failure(&e))? {
            Admitted::New(m) => {
                request.accept().await;
                info!(
                    migration = m.id, instance = %m.instance_uuid, from = %m.source_host,
                    to = m.dest_host.as_ref().map(HostName::as_str), "accepted"
                );
                self.runner.spawn(Store::first_lease(m.uuid));
                Ok(*m)
            }
            Admitted::Repeated(m) => match m.end_reason {
                // A refusal is answered with the same refusal again.
                Some(EndReason::Refused { ref checks }) if m.step.is_empty() => {
                    Err(refused(checks, Some(&m)))
                }
                _ => Ok(*m),
            },
            Admitted::Busy(active) => {
                let busy = checks::request(&wanted.instance, &wanted.way, Some(&active));
                Err(self.refuse(request, &wanted, migration, busy).await)
            }
            Admitted::OfferTaken(offer) => {
                Err(failure::offer_not_open(&offer, "somebody else was faster"))
            }
        }
    }

    /// What the record says against a request.
    async fn admission_failures(
        &self,
        wanted: &Wanted,
    ) -> Result<Vec<CheckFailure>, RemoteFailure> {
        let store = &self.context.store;
        let live = self.context.liveness();
        let active = self
            .active_of(std::slice::from_ref(&wanted.instance))
            .await?;
        let active = active
            .iter()
            .find(|m| m.instance_uuid == wanted.instance.id);
        let mut failures = checks::request(&wanted.instance, &wanted.way, active);
        if let Way::Transfer(transfer) = &wanted.way {
            let record = self.survey(&wanted.instance, transfer).record().await;
            failures.extend(record.map_err(|e| store_failure(&e))?);
            return Ok(failures);
        }
        let row = found(store.node(&wanted.instance.host).await)?;
        failures.extend(checks::node(
            &wanted.instance.host,
            row.as_ref(),
            Side::Source,
            live,
        ));
        if let Some(host) = &wanted.host {
            failures.extend(checks::same_host(&wanted.instance.host, host));
            let row = found(store.node(host).await)?;
            failures.extend(checks::node(host, row.as_ref(), Side::Destination, live));
        }
        Ok(failures)
    }

    /// Adds what the nodes have against it, keeps the refusal on record.
    async fn refuse(
        &self,
        request: &Request,
        wanted: &Wanted,
        mut migration: Migration,
        failures: Vec<CheckFailure>,
    ) -> RemoteFailure {
        let mut checks = failures;
        // Asking the nodes about a guest that is just being moved would disturb.
        let busy = checks
            .iter()
            .any(|f| f.code == drover_model::check::CheckCode::InstanceBusy);
        if !busy {
            match self.plan(wanted).await {
                Ok(plan) => checks = plan.failures,
                Err(failure) => return failure,
            }
        }
        migration.status = MigrationStatus::Failed;
        migration.finished_at_ms = Some(migration.created_at_ms);
        migration.end_reason = Some(EndReason::Refused {
            checks: checks.clone(),
        });
        let kept = self
            .context
            .store
            .admit(&migration, request.unique_id(), 0)
            .await;
        match kept {
            Ok(Admitted::New(m) | Admitted::Repeated(m) | Admitted::Busy(m)) => {
                info!(migration = m.id, instance = %m.instance_uuid, "refused");
                refused(&checks, Some(&m))
            }
            // Nothing is taken by what is refused.
            Ok(Admitted::OfferTaken(_)) => refused(&checks, None),
            Err(error) => store_failure(&error),
        }
    }

    /// Every check, and what would be done.
    pub(super) async fn plan(&self, wanted: &Wanted) -> Result<Plan, RemoteFailure> {
        if let Way::Transfer(transfer) = &wanted.way {
            return self.plan_transfer(wanted, transfer).await;
        }
        let store = &self.context.store;
        let survey = Survey {
            store,
            agents: &self.context.agents,
            live: self.context.liveness(),
            migration: MigrationId::generate(),
            instance: &wanted.instance,
            way: &wanted.way,
        };
        let active = self
            .active_of(std::slice::from_ref(&wanted.instance))
            .await?;
        let active = active
            .iter()
            .find(|m| m.instance_uuid == wanted.instance.id);
        let mut failures = checks::request(&wanted.instance, &wanted.way, active);
        let candidates = survey.candidates(wanted.host.as_ref()).await;
        let (hosts, mut tried) = candidates.map_err(|e| store_failure(&e))?;
        let mut chosen = None;
        let mut source = None;
        for host in hosts {
            let examined = survey.examine(&host).await.map_err(|e| store_failure(&e))?;
            let Examined {
                source: at_source,
                destination,
                chosen: found,
            } = examined;
            let ends = destination.is_empty() || !at_source.is_empty();
            source = Some(at_source);
            if destination.is_empty() {
                chosen = found;
            } else {
                tried.push((host, destination));
            }
            if ends {
                break;
            }
        }
        match source {
            Some(at_source) => failures.extend(at_source),
            // No destination was examined: the source still has its say.
            None => failures.extend(survey.source().await.map_err(|e| store_failure(&e))?.1),
        }
        if wanted.host.is_some() {
            failures.extend(tried.into_iter().flat_map(|(_, f)| f));
        } else if chosen.is_none() {
            failures.extend(placement::nowhere(&tried));
        }
        Ok(plan_of(wanted, chosen.as_ref(), failures))
    }
}

fn plan_of(wanted: &Wanted, chosen: Option<&Chosen>, failures: Vec<CheckFailure>) -> Plan {
    let copied = chosen.map_or(Vec::new(), |c| {
        if let Way::Cold(_) = wanted.way {
            return carried(c);
        }
        let disks = c
            .guest
            .disks
            .iter()
            .filter(|d| c.copied_disks.contains(&d.target));
        disks
            .map(|d| PlannedDisk {
                target: d.target.clone(),
                allocated_bytes: d.allocated_bytes,
            })
            .collect()
    });
    let mut decisions = Vec::new();
    if let (Some(c), None) = (chosen, &wanted.host) {
        decisions.push(format!(
            "chose {}: the most room of those that can take it",
            c.host
        ));
    }
    Plan {
        instance_uuid: wanted.instance.id,
        instance_name: wanted.instance.name.clone(),
        source_host: wanted.instance.host.clone(),
        dest_host: chosen
            .map(|c| c.host.clone())
            .or_else(|| wanted.host.clone()),
        failures,
        copied_disks: copied,
        memory_mib: match wanted.way {
            Way::Live(_) => wanted.instance.memory_mib,
            Way::Cold(_) | Way::Transfer(_) | Way::Evacuation(_) => 0,
        },
        decisions,
    }
}

fn carried(chosen: &Chosen) -> Vec<PlannedDisk> {
    let files = chosen.files.iter().filter(|file| !file.present);
    let planned = files.map(|file| PlannedDisk {
        target: file.path.clone(),
        allocated_bytes: file.data_bytes,
    });
    planned.collect()
}

fn new_record(wanted: &Wanted, context: &RequestContext, owner: &str, now_ms: u64) -> Migration {
    Migration {
        id: 0,
        uuid: MigrationId::generate(),
        instance_uuid: wanted.instance.id,
        instance_name: wanted.instance.name.clone(),
        project_id: wanted.instance.project.clone(),
        way: wanted.way.clone(),
        status: MigrationStatus::Accepted,
        source_host: wanted.instance.host.clone(),
        dest_host: wanted.host.clone(),
        dest_requested: wanted.host.is_some(),
        step: String::new(),
        step_started_at_ms: now_ms,
        attempt: 1,
        owner: owner.to_owned(),
        requester: requester(context),
        consent: wanted.consent.clone(),
        operation: wanted.operation,
        abort_requested: false,
        force_complete_requested: false,
        ending: None,
        ending_attempt: 0,
        end_reason: None,
        warnings: Vec::new(),
        decisions: Vec::new(),
        timings: Vec::new(),
        progress: Progress::default(),
        downtime_ms: None,
        created_at_ms: now_ms,
        updated_at_ms: now_ms,
        finished_at_ms: None,
        deadline_at_ms: None,
        version: 0,
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

fn found(
    node: drover_store::Result<drover_store::nodes::NodeRow>,
) -> Result<Option<drover_store::nodes::NodeRow>, RemoteFailure> {
    match node {
        Ok(row) => Ok(Some(row)),
        Err(drover_store::StoreError::NotFound(_)) => Ok(None),
        Err(error) => Err(store_failure(&error)),
    }
}
