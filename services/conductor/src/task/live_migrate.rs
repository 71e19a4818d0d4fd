//! Live migration as a saga.
//!
//! | step | does | undo |
//! |---|---|---|
//! | `place` | checks both nodes, chooses a destination, claims room there | give the claim back |
//! | `prepare` | destination: creates the disks to be copied | destination: removes what it created |
//! | `transfer` | source: libvirt sends disks and memory, the guest switches over | source: forgets the job |
//! | — | *point of no return: the guest was seen on the destination* | |
//! | `settle` | record and claim follow the guest; destination: confirms and tidies | |
//! | `tidy` | source: removes the disks that were copied away | |
//!
//! Why in this order: the claim comes before anything is made on the
//! destination, so that two guests never prepare for the same room. The disks
//! are made before the transfer because libvirt copies into what is there. The
//! record follows the guest before the source is tidied, so that no moment
//! exists in which the record names a node whose disks are gone.
//!
//! `transfer` never fails on a guess (invariants 2 and 3). Whatever the source
//! says of the job's end, both nodes are asked where the guest is; while that
//! cannot be told the step is *lost*, not failed, and nothing is undone.

use std::{collections::BTreeMap, time::Duration};

use async_trait::async_trait;
use drover_model::{
    api::compute::{
        CleanUp, GuestLocation, JobState, LiveMigration, Outcome, PostLiveMigration,
        PreLiveMigration, StepRef,
    },
    error::ErrorClass,
    guest::{PowerState, Presence},
    ids::HostName,
    migration::{EndReason, Migration},
};
use drover_saga::{Saga, StepError};
use drover_store::{StoreError, migrations::Lease};
use serde::{Deserialize, Serialize};
use tokio::{sync::broadcast::error::RecvError, time::timeout};
use tracing::{info, warn};

use crate::{
    agent_client::AgentError,
    app::Context,
    checks, placement,
    survey::{Chosen, Survey},
};

/// How long the source may be silent about a transfer before it is asked.
const ASK_AFTER: Duration = Duration::from_secs(3);
/// Pause between two looks for a guest that changes sides right now.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// How long to look before the step counts as lost.
const LOOK_FOR: Duration = Duration::from_secs(60);

/// The steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Check, choose, claim.
    Place,
    /// Make the destination ready.
    Prepare,
    /// Move the guest.
    Transfer,
    /// Have record and destination follow.
    Settle,
    /// Tidy the source.
    Tidy,
}

/// What the steps learn.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Data {
    /// Where to, and what of.
    pub chosen: Option<Chosen>,
    /// Measured downtime, ms.
    pub downtime_ms: Option<u64>,
    /// What was decided, by step.
    pub decisions: BTreeMap<String, Vec<String>>,
    /// What went wrong without harm, by step.
    pub warnings: BTreeMap<String, Vec<String>>,
}

impl Data {
    fn decide(&mut self, step: Step, text: impl Into<String>) {
        let list = self.decisions.entry(LiveMigrate::name(step).to_owned());
        list.or_default().push(text.into());
    }

    fn chosen(&self) -> Result<&Chosen, StepError> {
        let missing = || StepError::new(ErrorClass::Bug, "no destination was journalled");
        self.chosen.as_ref().ok_or_else(missing)
    }
}

/// One live migration under way.
pub struct LiveMigrate {
    context: Context,
    lease: Lease,
    migration: Migration,
}

#[async_trait]
impl Saga for LiveMigrate {
    type Step = Step;
    type Data = Data;

    const STEPS: &'static [Step] = &[
        Step::Place,
        Step::Prepare,
        Step::Transfer,
        Step::Settle,
        Step::Tidy,
    ];
    const COMMIT: Step = Step::Transfer;

    fn name(step: Step) -> &'static str {
        match step {
            Step::Place => "place",
            Step::Prepare => "prepare",
            Step::Transfer => "transfer",
            Step::Settle => "settle",
            Step::Tidy => "tidy",
        }
    }

    async fn run(&self, step: Step, data: &mut Data) -> Result<(), StepError> {
        match step {
            Step::Place => self.place(data).await,
            Step::Prepare => self.prepare(data).await,
            Step::Transfer => self.transfer(data).await,
            Step::Settle => self.settle(data).await,
            Step::Tidy => self.tidy(data).await,
        }
    }

    async fn undo(&self, step: Step, data: &Data) -> Result<(), StepError> {
        match step {
            Step::Place => {
                let released = self.context.store.release_claim(self.migration.uuid).await;
                released.map_err(|e| store_error(&e))
            }
            Step::Prepare => self.undo_prepare(data).await,
            Step::Transfer => {
                let source = &self.migration.source_host;
                let forgotten = self
                    .context
                    .agents
                    .rollback_at_source(source, self.step())
                    .await;
                forgotten.map_err(agent_error)
            }
            Step::Settle | Step::Tidy => Ok(()),
        }
    }

    async fn interrupted(&self) -> StepError {
        loop {
            let mut changes = self.context.store.changes();
            match self.record().await {
                Ok(m) if m.abort_requested => return aborted(),
                // Another conductor may have taken the request: look now and then.
                _ => {
                    let _ = timeout(ASK_AFTER, self.changed(&mut changes)).await;
                }
            }
        }
    }

    fn interruptible(step: Step) -> bool {
        // The transfer hands an abort on to libvirt and sees what comes of it.
        step != Step::Transfer
    }
}

impl LiveMigrate {
    /// The saga of a migration on the record.
    pub fn new(context: Context, lease: Lease, migration: Migration) -> Self {
        Self {
            context,
            lease,
            migration,
        }
    }

    fn step(&self) -> StepRef {
        StepRef {
            migration: self.migration.uuid,
            instance: self.migration.instance_uuid,
        }
    }

    async fn record(&self) -> Result<Migration, StoreError> {
        self.context.store.migration(self.lease.migration).await
    }

    /// Resolves when this migration's record may have changed.
    async fn changed(
        &self,
        changes: &mut tokio::sync::broadcast::Receiver<drover_model::ids::MigrationId>,
    ) {
        loop {
            match changes.recv().await {
                Ok(id) if id != self.lease.migration => {}
                Ok(_) | Err(RecvError::Lagged(_)) => return,
                // The store is going away, and this task with it.
                Err(RecvError::Closed) => std::future::pending().await,
            }
        }
    }

    // ---- place

    async fn place(&self, data: &mut Data) -> Result<(), StepError> {
        let store = &self.context.store;
        let uuid = self.migration.instance_uuid.to_string();
        let instance = store
            .find_instance(&uuid)
            .await
            .map_err(|e| store_error(&e))?;
        let survey = Survey {
            store,
            agents: &self.context.agents,
            live: self.context.liveness(),
            migration: self.migration.uuid,
            instance: &instance,
            options: &self.migration.options,
        };
        let mut refused = checks::request(&instance, &self.migration.options, None);
        let named = self
            .migration
            .dest_host
            .as_ref()
            .filter(|_| self.migration.dest_requested);
        let (hosts, unfit) = survey
            .candidates(named)
            .await
            .map_err(|e| store_error(&e))?;
        let mut tried = unfit;
        for host in hosts {
            let examined = survey.examine(&host).await.map_err(|e| store_error(&e))?;
            if refused.is_empty()
                && let Some(chosen) = examined.passed()
            {
                match self.claim(chosen).await? {
                    Ok(()) => {
                        self.note_choice(data, chosen, &tried);
                        data.chosen = Some(chosen.clone());
                        return Ok(());
                    }
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
        Err(self.refusal(refused, tried).await)
    }

    async fn claim(
        &self,
        chosen: &Chosen,
    ) -> Result<Result<(), Vec<drover_model::check::CheckFailure>>, StepError> {
        let claimed =
            self.context
                .store
                .claim(self.migration.uuid, &chosen.host, chosen.resources());
        let claimed = claimed.await.map_err(|e| store_error(&e))?;
        Ok(claimed.map_err(|short| checks::room(&short, &chosen.host)))
    }

    fn note_choice(&self, data: &mut Data, chosen: &Chosen, tried: &[crate::survey::Verdict]) {
        if !self.migration.dest_requested {
            data.decide(
                Step::Place,
                format!(
                    "chose {}: the most room of those that can take it",
                    chosen.host
                ),
            );
        }
        for (host, failures) in tried {
            let why: Vec<String> = failures.iter().map(ToString::to_string).collect();
            data.decide(
                Step::Place,
                format!("passed over {host}: {}", why.join("; ")),
            );
        }
        let text = match (
            chosen.copied_disks.as_slice(),
            chosen.shared_disks.as_slice(),
        ) {
            ([], []) => "no disk to move".to_owned(),
            ([], shared) => format!(
                "disks are shared by both nodes, nothing to copy: {}",
                shared.join(", ")
            ),
            (copied, []) => format!("disks are not shared and are copied: {}", copied.join(", ")),
            (copied, shared) => {
                format!(
                    "copies {}, which is not shared; {} is",
                    copied.join(", "),
                    shared.join(", ")
                )
            }
        };
        data.decide(Step::Place, text);
    }

    async fn refusal(
        &self,
        mut checks: Vec<drover_model::check::CheckFailure>,
        tried: Vec<crate::survey::Verdict>,
    ) -> StepError {
        if self.migration.dest_requested {
            checks.extend(tried.into_iter().flat_map(|(_, failures)| failures));
        } else if checks.is_empty() {
            checks = placement::nowhere(&tried);
        }
        ended(EndReason::Refused { checks })
    }

    // ---- prepare

    async fn prepare(&self, data: &mut Data) -> Result<(), StepError> {
        let chosen = data.chosen()?;
        let ask = PreLiveMigration {
            migration: self.migration.uuid,
            guest: chosen.guest.clone(),
            copied_disks: chosen.copied_disks.clone(),
        };
        let prepared = self.context.agents.prepare(&chosen.host, &ask).await;
        prepared.map_err(|e| match e.class {
            // The agent keeps book of what it created, so a doubtful end of
            // preparing can be asked again or taken back like any other.
            ErrorClass::Lost => StepError::new(ErrorClass::Retryable, e.message),
            _ => agent_error(e),
        })
    }

    async fn undo_prepare(&self, data: &Data) -> Result<(), StepError> {
        let Some(chosen) = &data.chosen else {
            return Ok(());
        };
        // Both nodes are asked before anything is removed (invariant 3).
        let source = self.locate(&self.migration.source_host).await?;
        let dest = self.locate(&chosen.host).await?;
        if dest.presence.is_active() && !source.presence.is_active() {
            return Err(lost(format!(
                "the guest runs on {}: its destination is not taken back",
                chosen.host
            )));
        }
        let undone = self
            .context
            .agents
            .rollback_at_destination(&chosen.host, self.step())
            .await;
        let cleaned = undone.map_err(agent_error)?;
        match cleaned.warnings.as_slice() {
            [] => Ok(()),
            warnings => Err(StepError::new(ErrorClass::Retryable, warnings.join("; "))),
        }
    }

    // ---- transfer

    async fn transfer(&self, data: &mut Data) -> Result<(), StepError> {
        let chosen = data.chosen()?.clone();
        let outcome = self.watch(&chosen).await?;
        info!(migration = %self.migration.uuid, ?outcome, "the transfer ended");
        if let Outcome::Moved { downtime_ms, .. } = &outcome {
            data.downtime_ms = *downtime_ms;
        }
        self.verdict(&chosen, outcome).await
    }

    /// Has the source start, or finds it started, and waits for the end.
    async fn watch(&self, chosen: &Chosen) -> Result<Outcome, StepError> {
        let agents = &self.context.agents;
        let source = &self.migration.source_host;
        let mut changes = self.context.store.changes();
        if let Some(outcome) = self.outcome().await? {
            return Ok(outcome);
        }
        let ask = LiveMigration {
            migration: self.migration.uuid,
            instance: self.migration.instance_uuid,
            dest_host: chosen.host.clone(),
            destination: chosen.endpoint.clone(),
            copied_disks: chosen.copied_disks.clone(),
            shared_disks: chosen.shared_disks.clone(),
            options: self.migration.options.clone(),
        };
        match agents.start(source, &ask).await {
            Ok(JobState::Ended { outcome, .. }) => return Ok(outcome),
            Ok(_) => {}
            Err(e) if e.class == ErrorClass::Refused => {
                return Ok(Outcome::Failed { message: e.message });
            }
            Err(e) => return Err(lost(e.message)),
        }
        let mut asked = Asked::default();
        loop {
            self.pass_on_wishes(&mut asked).await;
            let silent = tokio::select! {
                () = self.changed(&mut changes) => false,
                () = tokio::time::sleep(ASK_AFTER) => true,
            };
            if let Some(outcome) = self.outcome().await? {
                return Ok(outcome);
            }
            if silent {
                match agents.job(source, self.step()).await {
                    Ok(JobState::Ended { outcome, .. }) => return Ok(outcome),
                    Ok(JobState::Running { .. }) => {}
                    // Where the guest is will tell what became of it.
                    Ok(JobState::Unknown) => {
                        let message = format!("{source} no longer knows of this migration");
                        return Ok(Outcome::Failed { message });
                    }
                    Err(e) => return Err(lost(e.message)),
                }
            }
        }
    }

    async fn outcome(&self) -> Result<Option<Outcome>, StepError> {
        let outcome = self.context.store.outcome(self.lease.migration).await;
        outcome.map_err(|e| lost(e.to_string()))
    }

    /// Hands on an abort or a force-complete, each once it was taken.
    async fn pass_on_wishes(&self, asked: &mut Asked) {
        let Ok(record) = self.record().await else {
            return;
        };
        let source = &self.migration.source_host;
        if record.abort_requested && !asked.abort {
            asked.abort = taken(
                "abort",
                self.context.agents.abort(source, self.step()).await,
            );
        }
        if record.force_complete_requested && !asked.force {
            let forced = self
                .context
                .agents
                .force_complete(source, self.step())
                .await;
            asked.force = taken("force-complete", forced);
        }
    }

    /// Where the guest is, whatever was said of the job.
    async fn verdict(&self, chosen: &Chosen, outcome: Outcome) -> Result<(), StepError> {
        let source_host = &self.migration.source_host;
        let began = tokio::time::Instant::now();
        loop {
            let dest = self.locate(&chosen.host).await;
            let source = self.locate(source_host).await;
            match judge(source.as_ref().ok(), dest.as_ref().ok()) {
                Verdict::Moved => return Ok(()),
                Verdict::Stayed => return Err(ended(reason(outcome, source_host))),
                Verdict::Gone => {
                    return Err(ended(EndReason::Failed {
                        message: format!(
                            "the guest stopped during the migration: {}",
                            said(source_host, &chosen.host, &source, &dest)
                        ),
                    }));
                }
                Verdict::InBetween if began.elapsed() < LOOK_FOR => {
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                Verdict::InBetween | Verdict::Unknown => {
                    return Err(lost(format!(
                        "where the guest is cannot be told: {}",
                        said(source_host, &chosen.host, &source, &dest)
                    )));
                }
            }
        }
    }

    async fn locate(&self, host: &HostName) -> Result<GuestLocation, StepError> {
        self.context
            .agents
            .locate(host, self.step())
            .await
            .map_err(agent_error)
    }

    // ---- settle and tidy

    async fn settle(&self, data: &mut Data) -> Result<(), StepError> {
        let host = data.chosen()?.host.clone();
        let now_ms = self.context.clock.now_ms();
        let id = self.migration.instance_uuid;
        let settled = self
            .context
            .store
            .settle(self.migration.uuid, id, &host, now_ms)
            .await;
        settled.map_err(|e| store_error(&e))?;
        let cleaned = self
            .context
            .agents
            .post_at_destination(&host, self.step())
            .await;
        let cleaned = cleaned.map_err(agent_error)?;
        data.downtime_ms = cleaned.downtime_ms.or(data.downtime_ms);
        warn_of(data, Step::Settle, cleaned.warnings);
        Ok(())
    }

    async fn tidy(&self, data: &mut Data) -> Result<(), StepError> {
        let source = &self.migration.source_host;
        let dest = &data.chosen()?.host;
        let cleaned = self.tidy_source(dest).await.map_err(agent_error)?;
        if !cleaned.removed.is_empty() {
            data.decide(
                Step::Tidy,
                format!("removed from {source}: {}", cleaned.removed.join(", ")),
            );
        }
        warn_of(data, Step::Tidy, cleaned.warnings);
        Ok(())
    }

    /// Does a tidying step again that was put off; says what remains amiss.
    pub async fn tidy_again(&self, step: &str, dest: &HostName) -> Result<(), AgentError> {
        let agents = &self.context.agents;
        if step == Self::name(Step::Settle) {
            agents.post_at_destination(dest, self.step()).await?;
        } else {
            self.tidy_source(dest).await?;
        }
        Ok(())
    }

    /// Asks the destination first, as the source may have to give up a copy
    /// that its libvirt left (invariant 3). Without an answer it keeps that.
    async fn tidy_source(&self, dest: &HostName) -> Result<CleanUp, AgentError> {
        let agents = &self.context.agents;
        let seen = agents.locate(dest, self.step()).await;
        let runs = seen.is_ok_and(|l| l.presence == Presence::Present(PowerState::Running));
        let ask = PostLiveMigration {
            migration: self.migration.uuid,
            instance: self.migration.instance_uuid,
            runs_on: runs.then(|| dest.clone()),
        };
        agents
            .post_at_source(&self.migration.source_host, &ask)
            .await
    }
}

/// Which wishes the source has taken.
#[derive(Default)]
struct Asked {
    abort: bool,
    force: bool,
}

/// Whether a wish need not be repeated.
fn taken(what: &str, result: Result<(), AgentError>) -> bool {
    match result {
        Ok(()) => true,
        Err(error) => {
            warn!(%error, "the source did not take the {what}");
            error.class == ErrorClass::Refused
        }
    }
}

/// Where a guest is after a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// On the destination.
    Moved,
    /// On the source, and only there.
    Stayed,
    /// On neither, both having answered.
    Gone,
    /// libvirt is still at it.
    InBetween,
    /// Nobody can say.
    Unknown,
}

/// Judges what the nodes say; `None` is a node that did not answer. A guest
/// that *runs* on the destination has switched over: QEMU lets it run there
/// only once the source's copy stands still for good.
fn judge(source: Option<&GuestLocation>, dest: Option<&GuestLocation>) -> Verdict {
    let runs = |l: &&GuestLocation| l.presence == Presence::Present(PowerState::Running);
    let active = |l: Option<&GuestLocation>| l.is_some_and(|l| l.presence.is_active());
    let migrating = |l: Option<&GuestLocation>| l.is_some_and(|l| l.migrating);
    let source_runs = source.filter(runs).is_some();
    match (source, dest) {
        _ if migrating(source) => Verdict::InBetween,
        (_, Some(d)) if runs(&d) && !source_runs => Verdict::Moved,
        (Some(_), Some(_)) if active(dest) && !active(source) => Verdict::Moved,
        (Some(_), None) if source_runs => Verdict::Stayed,
        (Some(_), Some(_)) if active(source) && !active(dest) => Verdict::Stayed,
        (Some(_), Some(d)) if !active(source) && !active(dest) => match d.presence {
            Presence::Incoming => Verdict::InBetween,
            _ => Verdict::Gone,
        },
        _ => Verdict::Unknown,
    }
}

fn said(
    source: &HostName,
    dest: &HostName,
    at_source: &Result<GuestLocation, StepError>,
    at_dest: &Result<GuestLocation, StepError>,
) -> String {
    let one = |host: &HostName, said: &Result<GuestLocation, StepError>| match said {
        Ok(l) => format!("{host} says {:?}", l.presence),
        Err(e) => format!("{host} does not say ({e})"),
    };
    format!("{}, {}", one(source, at_source), one(dest, at_dest))
}

fn reason(outcome: Outcome, source: &HostName) -> EndReason {
    match outcome {
        Outcome::Moved { .. } => EndReason::Failed {
            message: format!("libvirt reported success, and the guest still runs on {source}"),
        },
        Outcome::Failed { message } => EndReason::Failed { message },
        Outcome::Aborted => EndReason::Aborted,
        Outcome::Stalled { message } => EndReason::Stalled { message },
    }
}

fn ended(reason: EndReason) -> StepError {
    let detail = serde_json::to_value(&reason).unwrap_or_default();
    StepError::new(ErrorClass::Refused, reason.to_string()).with_detail(detail)
}

fn aborted() -> StepError {
    ended(EndReason::Aborted)
}

fn lost(message: impl Into<String>) -> StepError {
    StepError::new(ErrorClass::Lost, message)
}

fn agent_error(error: AgentError) -> StepError {
    StepError::new(error.class, error.message)
}

fn store_error(error: &StoreError) -> StepError {
    let class = match error.class() {
        ErrorClass::Refused => ErrorClass::Refused,
        _ => ErrorClass::Retryable,
    };
    StepError::new(class, error.to_string())
}

fn warn_of(data: &mut Data, step: Step, warnings: Vec<String>) {
    if !warnings.is_empty() {
        data.warnings
            .insert(LiveMigrate::name(step).to_owned(), warnings);
    }
}

#[cfg(test)]
#[path = "live_migrate_tests.rs"]
mod tests;
