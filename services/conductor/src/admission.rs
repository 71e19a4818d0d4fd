//! Admission: from what is wanted to a migration on the record, or to a refusal.
//!
//! The record alone decides whether a move is admitted; everything that only
//! the nodes can tell is the first step of the saga, so that the caller has its
//! answer at once and the checks survive the conductor. A request that is
//! refused gets the nodes' failures too (invariant 8), and leaves a record.

use std::borrow::Cow;

use drover_model::{
    api::conductor::{Offer, Plan, PlannedDisk},
    check::{CheckCode, CheckFailure, Side},
    ids::{HostName, MigrationId, OperationId},
    migration::{Consent, EndReason, Migration, MigrationStatus, ProjectTransfer, Requester, Way},
};
use drover_store::{Store, StoreError, instances::InstanceRow, migrations::Admitted};
use tracing::info;

use crate::{
    app::Context,
    checks,
    comparing::Patience,
    placement,
    survey::{Chosen, Examined, Survey},
    task::runner::Runner,
    transfer_survey::TransferSurvey,
};

/// A migration that somebody wants, whoever asked in whatever words.
#[derive(Debug, Clone)]
pub struct Wanted {
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

/// What came of wanting it.
#[derive(Debug)]
pub enum Answer {
    /// It is on the record, and driven; or it was already, by the same request.
    Accepted(Box<Migration>),
    /// Checks said no.
    Refused {
        /// Every one that did.
        checks: Vec<CheckFailure>,
        /// The refusal's own record.
        migration: Option<Box<Migration>>,
    },
    /// The offer that it comes of can no longer be accepted.
    OfferTaken(Box<Offer>),
}

/// What came of one try.
enum Tried {
    /// This is the answer.
    Answered(Answer),
    /// The instance is no longer as it was looked at.
    Changed(Option<Box<InstanceRow>>),
}

/// Looks at an instance that is moved about while it is looked at.
const MOST_LOOKS: usize = 5;

/// Admits migrations.
pub struct Admission<'a> {
    /// The record and the agents.
    pub context: &'a Context,
    /// Who drives what is admitted.
    pub runner: &'a Runner,
}

impl Admission<'_> {
    /// Puts a migration on the record and has it driven. With the same unique id
    /// it is the same migration, or the same refusal, however often it is asked
    /// for.
    ///
    /// # Errors
    /// The record cannot be read or written.
    pub async fn admit(
        &self,
        requester: Requester,
        unique_id: Option<&str>,
        wanted: &Wanted,
    ) -> drover_store::Result<Answer> {
        let mut wanted = Cow::Borrowed(wanted);
        for _ in 0..MOST_LOOKS {
            match self.try_admit(&requester, unique_id, &wanted).await? {
                Tried::Answered(answer) => return Ok(answer),
                // What was found of it is void: it is looked at where it is now. What an
                // operation, or another owner, wants of it may be something else there.
                Tried::Changed(Some(now))
                    if wanted.operation.is_none() && now.project == wanted.instance.project =>
                {
                    wanted.to_mut().instance = *now;
                }
                Tried::Changed(Some(_)) => break,
                Tried::Changed(None) => {
                    let id = wanted.instance.id;
                    return Err(StoreError::NotFound(format!("instance '{id}'")));
                }
            }
        }
        let id = wanted.instance.id;
        Err(StoreError::Conflict(format!("instance {id}")))
    }

    async fn try_admit(
        &self,
        requester: &Requester,
        unique_id: Option<&str>,
        wanted: &Wanted,
    ) -> drover_store::Result<Tried> {
        let now_ms = self.context.clock.now_ms();
        let migration = new_record(wanted, requester.clone(), self.runner.owner(), now_ms);
        let failures = self.failures(wanted).await?;
        if !failures.is_empty() {
            let refused = self.refuse(unique_id, wanted, migration, failures).await?;
            return Ok(Tried::Answered(refused));
        }
        let store = &self.context.store;
        let (seen, term) = (Some(&wanted.instance), self.runner.term());
        let answer = match store
            .admit(&migration, seen, unique_id, term.recorded)
            .await?
        {
            Admitted::New(m) => {
                info!(
                    migration = m.id, instance = %m.instance_uuid, from = %m.source_host,
                    to = m.dest_host.as_ref().map(HostName::as_str), "accepted"
                );
                self.runner.spawn(Store::first_lease(m.uuid), term);
                Answer::Accepted(m)
            }
            Admitted::Repeated(m) => repeated(m),
            Admitted::Busy(active) => {
                let busy = checks::request(&wanted.instance, &wanted.way, Some(&active));
                self.refuse(unique_id, wanted, migration, busy).await?
            }
            Admitted::OfferTaken(offer) => Answer::OfferTaken(offer),
            Admitted::Changed(now) => return Ok(Tried::Changed(now)),
        };
        Ok(Tried::Answered(answer))
    }

    /// What stands against the request itself. A migration that only a newer conductor
    /// understands has the instance as any other.
    async fn request(&self, wanted: &Wanted) -> drover_store::Result<Vec<CheckFailure>> {
        let instance = &wanted.instance;
        let (active, newer) = match self.context.store.active_migration(instance.id).await {
            Ok(active) => (active, None),
            Err(error @ StoreError::Newer { .. }) => (None, Some(checks::of_newer(&error))),
            Err(error) => return Err(error),
        };
        let mut failures = checks::request(instance, &wanted.way, active.as_ref());
        failures.extend(newer);
        Ok(failures)
    }

    /// What the record says against it.
    async fn failures(&self, wanted: &Wanted) -> drover_store::Result<Vec<CheckFailure>> {
        let store = &self.context.store;
        let live = self.context.liveness();
        let instance = &wanted.instance;
        let mut failures = self.request(wanted).await?;
        if let Way::Transfer(transfer) = &wanted.way {
            failures.extend(self.survey(instance, transfer).record().await?);
            failures.extend(self.now(wanted, failures.is_empty()).await?);
            return Ok(failures);
        }
        // The node of an evacuated guest is dead: the operation has the proof.
        if !matches!(wanted.way, Way::Evacuation(_)) {
            let row = store.known_node(&instance.host).await?;
            failures.extend(checks::node(
                &instance.host,
                row.as_ref(),
                Side::Source,
                live,
            ));
        }
        if let Some(host) = &wanted.host {
            failures.extend(checks::same_host(&instance.host, host));
            let row = store.known_node(host).await?;
            failures.extend(checks::node(host, row.as_ref(), Side::Destination, live));
        }
        failures.extend(self.now(wanted, failures.is_empty()).await?);
        Ok(failures)
    }

    /// What its node's last report says against it, and says still when it is
    /// asked now, if it is worth asking.
    async fn now(&self, wanted: &Wanted, ask: bool) -> drover_store::Result<Vec<CheckFailure>> {
        let Some(recorded) = checks::recorded(&wanted.instance, &wanted.way) else {
            return Ok(Vec::new());
        };
        match &wanted.way {
            Way::Evacuation(_) => Ok(vec![recorded]),
            _ if !ask => Ok(Vec::new()),
            Way::Transfer(transfer) => {
                let examined = self.survey(&wanted.instance, transfer).examine().await?;
                Ok(examined.failures)
            }
            Way::Live(_) | Way::Cold(_) => Ok(self.moves(wanted).source().await?.1),
        }
    }

    fn moves<'a>(&'a self, wanted: &'a Wanted) -> Survey<'a> {
        Survey {
            store: &self.context.store,
            agents: &self.context.agents,
            live: self.context.liveness(),
            migration: MigrationId::generate(),
            instance: &wanted.instance,
            way: &wanted.way,
            patience: Patience::Brief,
        }
    }

    /// Adds what the nodes have against it, keeps the refusal on record.
    async fn refuse(
        &self,
        unique_id: Option<&str>,
        wanted: &Wanted,
        mut migration: Migration,
        failures: Vec<CheckFailure>,
    ) -> drover_store::Result<Answer> {
        // Asking the nodes about a guest that is just being moved would disturb;
        // an operation has asked them for its plan, and tries another.
        let busy = failures.iter().any(|f| f.code == CheckCode::InstanceBusy);
        let checks = match busy || wanted.operation.is_some() {
            true => failures,
            false => reasons(failures, self.plan(wanted).await?.failures),
        };
        migration.status = MigrationStatus::Failed;
        migration.finished_at_ms = Some(migration.created_at_ms);
        migration.end_reason = Some(EndReason::Refused {
            checks: checks.clone(),
        });
        let term = self.runner.term().recorded;
        let store = &self.context.store;
        let admitted = store.admit(&migration, None, unique_id, term).await?;
        Ok(match admitted {
            // What it is busy with is, perhaps, what this request began before.
            Admitted::Repeated(m) => repeated(m),
            Admitted::New(m) | Admitted::Busy(m) => {
                info!(migration = m.id, instance = %m.instance_uuid, "refused");
                Answer::Refused {
                    checks,
                    migration: Some(m),
                }
            }
            // Nothing is taken by what is refused, nor compared.
            Admitted::OfferTaken(_) | Admitted::Changed(_) => Answer::Refused {
                checks,
                migration: None,
            },
        })
    }

    /// Every check, and what would be done.
    pub async fn plan(&self, wanted: &Wanted) -> drover_store::Result<Plan> {
        if let Way::Transfer(transfer) = &wanted.way {
            return self.plan_transfer(wanted, transfer).await;
        }
        let survey = self.moves(wanted);
        let mut failures = self.request(wanted).await?;
        let (hosts, mut tried) = survey.candidates(wanted.host.as_ref()).await?;
        let mut chosen = None;
        let mut source = None;
        for host in hosts {
            let examined = survey.examine(&host).await?;
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
            None => failures.extend(survey.source().await?.1),
        }
        if wanted.host.is_some() {
            failures.extend(tried.into_iter().flat_map(|(_, f)| f));
        } else if chosen.is_none() {
            failures.extend(placement::nowhere(&tried));
        }
        Ok(plan_of(wanted, chosen.as_ref(), checks::once(failures)))
    }

    /// Every check of a transfer, and what would be done.
    async fn plan_transfer(
        &self,
        wanted: &Wanted,
        transfer: &ProjectTransfer,
    ) -> drover_store::Result<Plan> {
        let instance = &wanted.instance;
        let mut failures = self.request(wanted).await?;
        let examined = self.survey(instance, transfer).examine().await?;
        failures.extend(examined.failures);
        let disks = examined.plan.map_or(Vec::new(), |plan| plan.disks);
        Ok(Plan {
            instance_uuid: instance.id,
            instance_name: instance.name.clone(),
            source_host: instance.host.clone(),
            dest_host: Some(instance.host.clone()),
            failures,
            copied_disks: disks
                .into_iter()
                .map(|disk| PlannedDisk {
                    target: disk.target,
                    allocated_bytes: disk.data_bytes,
                })
                .collect(),
            memory_mib: 0,
            decisions: examined.words,
        })
    }

    fn survey<'a>(
        &'a self,
        instance: &'a InstanceRow,
        transfer: &'a ProjectTransfer,
    ) -> TransferSurvey<'a> {
        TransferSurvey {
            store: &self.context.store,
            agents: &self.context.agents,
            live: self.context.liveness(),
            migration: MigrationId::generate(),
            instance,
            transfer,
        }
    }
}

/// The answer to what was asked for before: a refusal is answered with the same
/// refusal again.
fn repeated(m: Box<Migration>) -> Answer {
    match &m.end_reason {
        Some(EndReason::Refused { checks }) if m.step.is_empty() => Answer::Refused {
            checks: checks.clone(),
            migration: Some(m),
        },
        _ => Answer::Accepted(m),
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

/// Why it is refused: what is found when everything is asked. What stood against it
/// first may have passed meanwhile; nobody is refused without a reason.
fn reasons(first: Vec<CheckFailure>, found: Vec<CheckFailure>) -> Vec<CheckFailure> {
    match found.is_empty() {
        true => first,
        false => found,
    }
}

fn new_record(wanted: &Wanted, requester: Requester, owner: &str, now_ms: u64) -> Migration {
    let instance = &wanted.instance;
    Migration {
        instance_name: instance.name.clone(),
        project_id: instance.project.clone(),
        dest_host: wanted.host.clone(),
        dest_requested: wanted.host.is_some(),
        owner: owner.to_owned(),
        requester,
        consent: wanted.consent.clone(),
        operation: wanted.operation,
        ..Migration::new(
            instance.id,
            instance.host.clone(),
            wanted.way.clone(),
            now_ms,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_passed_since_is_still_the_reason() {
        let why = |code, message: &str| {
            vec![CheckFailure {
                code,
                side: Side::Destination,
                message: message.to_owned(),
                remedy: String::new(),
            }]
        };
        let (down, full) = (
            why(CheckCode::HostDown, "kvm2 is down"),
            why(CheckCode::HostDisabled, "kvm2 is disabled"),
        );
        assert_eq!(reasons(down.clone(), Vec::new()), down);
        assert_eq!(reasons(down, full.clone()), full);
    }
}
