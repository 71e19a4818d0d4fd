//! What the steps of every saga share: the migration they are of, the way to
//! its agents and its record, and the classes of what can go wrong.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use drover_model::{
    api::{
        compute::{
            CleanUp, ColdMemory, GuestLocation, Inbox, Locate, LookAtCopy, Outcome, SetAside,
            StepRef, TransferPlan,
        },
        conductor::ListMigrations,
    },
    check::{self, CheckFailure},
    error::ErrorClass,
    guest::{PowerState, Presence},
    ids::HostName,
    migration::{EndReason, Migration, ProofOfDeath},
    unknown::Unknown,
};
use drover_saga::StepError;
use drover_store::{Store, StoreError, claims::Resources, migrations::Lease, nodes::NodeRow};
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{OwnedSemaphorePermit, broadcast},
    time::timeout,
};
use tracing::warn;

use super::proof::Seen;
use crate::{
    agent_client::{AgentClient, AgentError},
    app::Context,
    checks,
    comparing::Patience,
    operation::evacuation::proven_dead,
    placement,
    survey::{Chosen, Survey, Verdict},
};

/// How long an agent may be silent about its work before it is asked.
pub(super) const ASK_AFTER: Duration = Duration::from_secs(3);

/// What steps learn and later ones need; journalled with each success.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Data {
    /// Where to, and what of.
    pub chosen: Option<Chosen>,
    /// The guest's definition before anything happened to it, while its source might
    /// lose it (cold).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Where the destination takes files (cold).
    pub inbox: Option<Inbox>,
    /// Whether the source was set aside, so that the destination may have the guest (cold).
    pub handed_over: bool,
    /// Whether somebody has brought it back by hand, so that nothing is done to it (revert).
    pub taken_back: bool,
    /// Whether its destination was dead, so that it has the guest still (revert).
    pub without_dest: bool,
    /// What changes about a guest that changes hands.
    pub transfer: Option<TransferPlan>,
    /// Generation that it has from now on (evacuation).
    pub generation: u64,
    /// Whether it ran when it was looked at.
    pub ran: bool,
    /// The state in which it was seen where it is now (cold).
    pub arrived: Option<PowerState>,
    /// When the guest was off, milliseconds since 1970 (cold, evacuation).
    pub stopped_at_ms: Option<u64>,
    /// Measured downtime, ms.
    pub downtime_ms: Option<u64>,
    /// What was decided, by step.
    pub decisions: BTreeMap<String, Vec<String>>,
    /// What went wrong without harm, by step.
    pub warnings: BTreeMap<String, Vec<String>>,
    /// What a newer version keeps here.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl Data {
    pub(super) fn decide(&mut self, step: &str, text: impl Into<String>) {
        let list = self.decisions.entry(step.to_owned()).or_default();
        list.push(text.into());
    }

    pub(super) fn warn(&mut self, step: &str, warnings: Vec<String>) {
        if !warnings.is_empty() {
            self.warnings.insert(step.to_owned(), warnings);
        }
    }

    pub(super) fn transfer(&self) -> Result<&TransferPlan, StepError> {
        let missing = || StepError::new(ErrorClass::Bug, "no plan was journalled");
        self.transfer.as_ref().ok_or_else(missing)
    }

    pub(super) fn chosen(&self) -> Result<&Chosen, StepError> {
        let missing = || StepError::new(ErrorClass::Bug, "no destination was journalled");
        self.chosen.as_ref().ok_or_else(missing)
    }
}

/// A place among those that are made ready at once; or none, where none is needed.
/// Clones are the same one.
#[derive(Clone, Default)]
pub(super) struct Slot(Arc<Mutex<Option<OwnedSemaphorePermit>>>);

impl Slot {
    pub(super) fn of(permit: Option<OwnedSemaphorePermit>) -> Self {
        Self(Arc::new(Mutex::new(permit)))
    }

    /// Gives it to whoever waits for one.
    pub(super) fn give_back(&self) {
        // A permit is never half there.
        let permit = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(permit);
    }
}

/// One migration under way.
pub(super) struct Job {
    pub(super) context: Context,
    /// The way to agents, under the lease.
    pub(super) agents: AgentClient,
    pub(super) lease: Lease,
    pub(super) migration: Migration,
    pub(super) slot: Slot,
}

impl Job {
    pub(super) fn agents(&self) -> &AgentClient {
        &self.agents
    }

    pub(super) fn store(&self) -> &Store {
        &self.context.store
    }

    pub(super) fn source(&self) -> &HostName {
        &self.migration.source_host
    }

    pub(super) fn step(&self) -> StepRef {
        StepRef {
            migration: self.migration.uuid,
            instance: self.migration.instance_uuid,
        }
    }

    pub(super) async fn record(&self) -> Result<Migration, StoreError> {
        self.store().migration(self.lease.migration).await
    }

    /// Resolves when this migration's record may have changed.
    pub(super) async fn changed(
        &self,
        changes: &mut broadcast::Receiver<drover_model::ids::MigrationId>,
    ) {
        loop {
            match changes.recv().await {
                Ok(id) if id != self.lease.migration => {}
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => return,
                // The store is going away, and this task with it.
                Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
            }
        }
    }

    /// Resolves when somebody asks for an abort.
    pub(super) async fn interrupted(&self) -> StepError {
        loop {
            let mut changes = self.store().changes();
            match self.record().await {
                Ok(m) if m.abort_requested => return ended(EndReason::Aborted),
                // Another conductor may have taken the request: look now and then.
                _ => {
                    let _ = timeout(ASK_AFTER, self.changed(&mut changes)).await;
                }
            }
        }
    }

    pub(super) async fn locate(&self, host: &HostName) -> Result<GuestLocation, StepError> {
        let located = self.agents().ask(host, &Locate(self.step())).await;
        located.map_err(agent_error)
    }

    /// Whether a node has the guest: on one that is proven dead it does not run.
    pub(super) async fn presence_unless_dead(
        &self,
        host: &HostName,
    ) -> Result<Presence, StepError> {
        match self.locate(host).await {
            Ok(there) => Ok(there.presence),
            Err(_) if self.is_dead(host).await?.is_some() => Ok(Presence::Absent),
            Err(error) => Err(error),
        }
    }

    // ---- proving

    /// What a node sees of its copy now.
    pub(super) async fn look_at(&self, host: &HostName) -> Result<Seen, StepError> {
        let at_ms = self.context.clock.now_ms();
        let seen = self.agents().ask(host, &LookAtCopy(self.step())).await;
        let seen = seen.map_err(agent_error)?;
        Ok(Seen::new(self.migration.uuid, host.clone(), at_ms, seen))
    }

    /// Where the guest is: there, or on the node that the record names by now.
    pub(super) async fn look_for_it(
        &self,
        first: &HostName,
        but_not_on: &HostName,
    ) -> Result<Seen, StepError> {
        let seen = self.look_at(first).await?;
        if seen.is_present() || seen.copy().is_kept_aside() {
            return Ok(seen);
        }
        let id = self.migration.instance_uuid.to_string();
        let home = match self.store().find_instance(&id).await {
            Ok(row) => row.host,
            Err(StoreError::NotFound(_)) => return Ok(seen),
            Err(error) => return Err(store_error(&error)),
        };
        match home == *first || home == *but_not_on {
            true => Ok(seen),
            false => self.look_at(&home).await,
        }
    }

    /// Whether the guest has been moved since, or given to another project.
    pub(super) async fn has_moved_on(&self) -> Result<bool, StepError> {
        let own = &self.migration;
        let (all, instance) = (ListMigrations::default(), Some(own.instance_uuid));
        let since = self.store().migrations(&all, instance).await;
        let since = since.map_err(|e| store_error(&e))?;
        Ok(since.iter().any(|m| m.id > own.id && m.status.has_moved()))
    }

    /// Which node but the source and that one has the guest: somebody may have moved it
    /// on, which the record need not know yet. None if every one says that it is not
    /// there, or is proven dead.
    ///
    /// # Errors
    /// In words, who does not say.
    pub(super) async fn elsewhere(
        &self,
        than: &HostName,
    ) -> Result<Option<(HostName, Presence)>, String> {
        let nodes = self.others(than).await.map_err(|e| e.to_string())?;
        let others: Vec<_> = nodes.into_iter().map(|node| node.report.host).collect();
        let asked = join_all(others.iter().map(|host| self.locate(host))).await;
        let mut silent = None;
        for (host, answer) in others.into_iter().zip(asked) {
            match answer {
                Ok(found) if found.presence == Presence::Absent => {}
                Ok(found) => return Ok(Some((host, found.presence))),
                Err(_) if self.is_dead(&host).await.is_ok_and(|dead| dead.is_some()) => {}
                Err(error) => silent = Some((host, error)),
            }
        }
        match silent {
            None => Ok(None),
            Some((host, error)) => Err(format!("{host} does not say whether it is there: {error}")),
        }
    }

    /// The nodes but the source and that one.
    async fn others(&self, than: &HostName) -> drover_store::Result<Vec<NodeRow>> {
        let mut nodes = self.store().nodes().await?;
        nodes.retain(|node| node.report.host != *than && node.report.host != *self.source());
        Ok(nodes)
    }

    /// Which of the other nodes that are up has the guest of a dead source active.
    pub(super) async fn active_on_any(
        &self,
        than: &HostName,
    ) -> Result<Option<HostName>, StepError> {
        let (context, step) = (&self.context, self.step());
        let found = context.active.active(context, self.source(), step).await;
        let found = found.map_err(|e| store_error(&e))?;
        Ok(found.into_iter().find(|host| host != than))
    }

    /// Makes sure that no node but the source and that one has the guest.
    ///
    /// # Errors
    /// In words, who has it or does not say.
    pub(super) async fn is_on_no_other_node(&self, than: &HostName) -> Result<(), String> {
        let why = match self.elsewhere(than).await {
            Ok(None) => return Ok(()),
            Ok(Some((host, presence))) => format!("{host} has it ({presence})"),
            Err(why) => why,
        };
        Err(format!("it is not on {than} any more, and {why}"))
    }

    /// Which third node somebody has brought the guest to, as far as the record knows, in
    /// words. On one that is proven dead, or was forgotten, it does not run.
    ///
    /// # Errors
    /// `Lost`: the node on which it was seen does not say.
    pub(super) async fn on_third_node(&self, dest: &HostName) -> Result<Option<String>, StepError> {
        let id = self.migration.instance_uuid.to_string();
        let row = match self.store().find_instance(&id).await {
            Ok(row) => row,
            Err(StoreError::NotFound(_)) => return Ok(None),
            Err(error) => return Err(store_error(&error)),
        };
        let other = row.other.as_ref().map(|other| &other.host);
        let named = std::iter::once(&row.host).chain(other);
        for third in named.filter(|host| *host != dest && *host != self.source()) {
            match self.locate(third).await {
                Ok(found) if found.presence == Presence::Absent => {}
                Ok(found) => {
                    return Ok(Some(format!(
                        "somebody has brought the guest to {third} ({}): it is started nowhere \
                         else",
                        found.presence
                    )));
                }
                Err(error) if !self.is_gone(third).await? => {
                    return Err(lost(format!(
                        "the guest was seen on {third}, which does not say now: {error}"
                    )));
                }
                Err(_) => {}
            }
        }
        Ok(None)
    }

    /// What was left for good goes on the record.
    pub(super) async fn note_kept(&self, kept: Vec<String>) -> Result<(), StepError> {
        if kept.is_empty() {
            return Ok(());
        }
        let noted = self
            .store()
            .update_migration(self.lease.migration, |m| {
                let new = kept.iter().filter(|text| !m.warnings.contains(text));
                let new: Vec<String> = new.cloned().collect();
                let changes = !new.is_empty();
                m.warnings.extend(new);
                changes
            })
            .await;
        noted.map(drop).map_err(|e| store_error(&e))
    }

    /// A clean-up is done only without warnings; what it left for good is on the record.
    pub(super) async fn cleaned(
        &self,
        cleaned: Result<CleanUp, AgentError>,
    ) -> Result<(), StepError> {
        let cleaned = cleaned.map_err(agent_error)?;
        self.note_kept(cleaned.kept.clone()).await?;
        all_clean(cleaned)
    }

    // ---- setting aside

    /// Has the source of a cold migration keep its copy so that nothing starts it.
    pub(super) async fn set_aside(&self, memory: Option<ColdMemory>) -> Result<(), AgentError> {
        let ask = SetAside {
            migration: self.migration.uuid,
            instance: self.migration.instance_uuid,
            memory,
        };
        self.agents().act(self.source(), &ask).await.map(drop)
    }

    // ---- undoing

    /// Nobody shows a copy that would stay: what was made there is kept, and looked
    /// at again later. The guest need not wait for that.
    pub(super) async fn put_off(
        &self,
        host: &HostName,
        step: &str,
        why: &str,
    ) -> Result<(), StepError> {
        warn!(%host, why, "not taken back for now");
        let now_ms = self.context.clock.now_ms();
        let put_off = self.store().put_off(self.lease, step, now_ms).await;
        put_off.map_err(|e| store_error(&e))?;
        self.note_kept(vec![why.to_owned()]).await
    }

    /// What proves that a node is off, in words. Its guest runs there no more, and
    /// nobody there will say so.
    pub(super) async fn is_dead(&self, host: &HostName) -> Result<Option<String>, StepError> {
        let proof = proven_dead(&self.context, host).await;
        let proof = proof.map_err(|e| store_error(&e))?;
        Ok(proof.map(|proof| match proof {
            ProofOfDeath::Fence { agent, .. } => format!("{host} is off, says {agent}"),
            ProofOfDeath::Operator { .. } => format!("{host} is off, by an operator's word"),
        }))
    }

    /// Whether a node's agent was heard of lately.
    pub(super) async fn agent_is_up(&self, host: &HostName) -> Result<bool, StepError> {
        let node = self.store().node(host).await;
        let node = node.map_err(|e| store_error(&e))?;
        Ok(self.context.liveness().is_up(&node))
    }

    /// Whether a node is proven dead, or on the record no more.
    pub(super) async fn is_gone(&self, host: &HostName) -> Result<bool, StepError> {
        let known = self.store().known_node(host).await;
        let is_known = known.map_err(|e| store_error(&e))?.is_some();
        Ok(!is_known || self.is_dead(host).await?.is_some())
    }

    /// How a destination was taken back. One that died has nothing running: what was
    /// made there goes when it is up again, and the guest need not wait for that.
    pub(super) async fn or_put_off(
        &self,
        host: &HostName,
        step: &str,
        taken_back: Result<(), StepError>,
    ) -> Result<(), StepError> {
        let Err(error) = taken_back else {
            return Ok(());
        };
        if self.agent_is_up(host).await? {
            return Err(error);
        }
        let why = format!("taken back when its node is up again: {error}");
        self.put_off(host, step, &why).await
    }

    // ---- settling

    /// What a settling that was put off would have made of the record, unless the
    /// guest has been moved on since.
    pub(super) async fn settle_late(
        &self,
        took: &HostName,
        host: &HostName,
        state: Option<PowerState>,
        keep: Option<(&HostName, Resources)>,
    ) -> Result<(), StepError> {
        let now_ms = self.context.clock.now_ms();
        let m = &self.migration;
        let settled = self.store().settle_late(m, took, host, state, keep, now_ms);
        settled.await.map_err(|e| store_error(&e))
    }

    // ---- placing

    /// Checks both nodes, chooses a destination and claims room there; says what
    /// was decided.
    pub(super) async fn place(&self) -> Result<(Chosen, Vec<String>), StepError> {
        let uuid = self.migration.instance_uuid.to_string();
        let instance = self.store().find_instance(&uuid).await;
        let instance = instance.map_err(|e| store_error(&e))?;
        if instance.host != *self.source() {
            return Err(ended(EndReason::Failed {
                message: format!(
                    "the guest is on {} now, no longer on {}",
                    instance.host,
                    self.source()
                ),
            }));
        }
        let survey = Survey {
            store: self.store(),
            agents: self.agents(),
            live: self.context.liveness(),
            migration: self.migration.uuid,
            instance: &instance,
            way: &self.migration.way,
            patience: Patience::WhileRead,
        };
        let mut refused = checks::request(&instance, &self.migration.way, None);
        let named = self
            .migration
            .dest_host
            .as_ref()
            .filter(|_| self.migration.dest_requested);
        let candidates = survey.candidates(named).await;
        let (hosts, mut tried) = candidates.map_err(|e| store_error(&e))?;
        for host in hosts {
            let examined = survey.examine(&host).await.map_err(|e| store_error(&e))?;
            if refused.is_empty()
                && let Some(chosen) = examined.passed()
            {
                match self.claim(chosen).await? {
                    Ok(()) => return Ok((chosen.clone(), self.why(chosen, &tried))),
                    Err(short) => tried.push((host, short)),
                }
                continue;
            }
            tried.push((host, examined.destination));
            if !examined.source.is_empty() {
                // No destination mends what is wrong with the guest.
                refused.extend(examined.source);
                break;
            }
        }
        Err(self.refusal(refused, tried))
    }

    pub(super) async fn claim(
        &self,
        chosen: &Chosen,
    ) -> Result<Result<(), Vec<CheckFailure>>, StepError> {
        let (lease, host) = (self.lease, &chosen.host);
        let claimed = self.store().claim(lease, host, chosen.resources()).await;
        let claimed = claimed.map_err(|e| store_error(&e))?;
        Ok(claimed.map_err(|short| checks::room(&short, host)))
    }

    pub(super) fn why(&self, chosen: &Chosen, tried: &[Verdict]) -> Vec<String> {
        let mut texts = Vec::new();
        if !self.migration.dest_requested {
            texts.push(format!(
                "chose {}: the most room of those that can take it",
                chosen.host
            ));
        }
        for (host, failures) in tried {
            let why = check::texts(failures);
            texts.push(format!("passed over {host}: {why}"));
        }
        texts
    }

    pub(super) fn refusal(&self, mut checks: Vec<CheckFailure>, tried: Vec<Verdict>) -> StepError {
        if self.migration.dest_requested {
            checks.extend(tried.into_iter().flat_map(|(_, failures)| failures));
        } else if checks.is_empty() {
            checks = placement::nowhere(&tried);
        }
        let checks = checks::once(checks);
        ended(EndReason::Refused { checks })
    }

    pub(super) async fn release_claim(&self) -> Result<(), StepError> {
        let released = self.store().release_claim(self.lease).await;
        released.map_err(|e| store_error(&e))
    }
}

/// A step ends the migration for this reason.
pub(super) fn ended(reason: EndReason) -> StepError {
    let detail = serde_json::to_value(&reason).unwrap_or_default();
    StepError::new(ErrorClass::Refused, reason.to_string()).with_detail(detail)
}

/// For how long the guest was off or cut off, where that is known; else why its
/// agent did not do it.
pub(super) fn moved(outcome: Outcome) -> Result<Option<u64>, EndReason> {
    match outcome {
        Outcome::Moved { downtime_ms, .. } => Ok(downtime_ms),
        Outcome::Failed { message } => Err(EndReason::Failed { message }),
        Outcome::Aborted => Err(EndReason::Aborted),
        Outcome::Stalled { message, of_guest } => Err(EndReason::Stalled { message, of_guest }),
        Outcome::Gone => Err(EndReason::Failed {
            message: "it was gone from its source, and nobody saw it move".to_owned(),
        }),
        Outcome::Other(what) => Err(EndReason::Failed {
            message: format!("it ended as only a newer conductor understands: {what}"),
        }),
    }
}

/// Nobody knows what happened.
pub(super) fn lost(message: impl Into<String>) -> StepError {
    StepError::new(ErrorClass::Lost, message)
}

/// What an agent did not do.
pub(super) fn agent_error(error: AgentError) -> StepError {
    StepError::new(error.class, error.message)
}

/// The same, where a doubtful end can be asked again or taken back like any
/// other: the agent keeps book of what it does.
pub(super) fn repeatable(error: AgentError) -> StepError {
    match error.class {
        ErrorClass::Lost => StepError::new(ErrorClass::Retryable, error.message),
        _ => agent_error(error),
    }
}

/// Work on an agent goes on without the conductor: an agent that does not
/// answer is waited for, and nothing undone meanwhile.
pub(super) fn patient(error: AgentError) -> StepError {
    match error.class {
        ErrorClass::Retryable => lost(error.message),
        _ => agent_error(error),
    }
}

/// A question that was not answered.
pub(super) fn in_doubt(error: StepError) -> StepError {
    match error.class {
        ErrorClass::Retryable => lost(error.message),
        _ => error,
    }
}

/// A clean-up is done only without warnings.
pub(super) fn all_clean(cleaned: CleanUp) -> Result<(), StepError> {
    match cleaned.warnings.as_slice() {
        [] => Ok(()),
        warnings => Err(StepError::new(ErrorClass::Retryable, warnings.join("; "))),
    }
}

/// Trouble with the record.
pub(super) fn store_error(error: &StoreError) -> StepError {
    let class = match error.class() {
        ErrorClass::Refused => ErrorClass::Refused,
        _ => ErrorClass::Retryable,
    };
    StepError::new(class, error.to_string())
}
