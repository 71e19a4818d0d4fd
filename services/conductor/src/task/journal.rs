//! From journal to record: what each event of a saga makes of the migration's
//! record, and whom it tells. Committed together with the event (see
//! [`drover_store::sagas`]), so the record never says what the journal does not.

use std::marker::PhantomData;

use async_trait::async_trait;
use drover_model::migration::{
    Decision, EndReason, IllegalTransition, Migration, MigrationStatus as S, Phase, StepTiming, Way,
};
use drover_saga::{Event, Journal, JournalError, Saga, StepError};
use drover_store::{Store, StoreError, migrations::Lease, outbox::Notification, sagas::SagaKey};
use serde_json::{Value, json};

use super::{job::Data, steps::Shown};
use crate::clock::Clock;

/// What a saga's events mean for the migration's record, and whom they tell.
pub trait Recorded: Saga<Data = Data, Note = Shown> {
    /// What is told when it fails, and undoing begins.
    fn told_at_failure() -> Told;
    /// What is told at the end, by the status then.
    fn told_at_end(status: S) -> Vec<Told>;
    /// Status when all steps are done.
    fn status_after(m: &Migration) -> S;
    /// Status when all is undone.
    fn status_undone(m: &Migration) -> S {
        match m.end_reason {
            Some(EndReason::Aborted) => S::Cancelled,
            _ => S::Failed,
        }
    }
    /// What else changes on the record at the end.
    fn at_end(_: &mut Migration) {}
}

/// An event that is told, and how loudly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Told {
    event_type: &'static str,
    priority: &'static str,
}

impl Told {
    /// To those who follow.
    pub const fn info(event_type: &'static str) -> Self {
        let priority = "INFO";
        Self {
            event_type,
            priority,
        }
    }

    /// To those who mend.
    pub const fn error(event_type: &'static str) -> Self {
        let priority = "ERROR";
        Self {
            event_type,
            priority,
        }
    }
}

/// The journal of one saga of a migration.
pub struct RecordJournal<G> {
    /// The record.
    pub store: Store,
    /// The time.
    pub clock: Clock,
    /// By what right it is written.
    pub lease: Lease,
    /// Whose.
    pub saga: SagaKey,
    /// Which kind.
    pub kind: PhantomData<fn() -> G>,
}

#[async_trait]
impl<G: Recorded> Journal for RecordJournal<G> {
    async fn load(&self) -> Result<Vec<Event>, JournalError> {
        let events = self.store.saga_events(&self.saga).await;
        events.map_err(|e| match e {
            StoreError::Newer { .. } => JournalError::Newer(e.to_string()),
            e => JournalError::Unavailable(e.to_string()),
        })
    }

    async fn append(&self, at: usize, events: &[Event]) -> Result<(), JournalError> {
        let now_ms = self.clock.now_ms();
        let project = |migration: &mut Migration| {
            let mut told = Vec::new();
            for event in events {
                told.extend(project::<G>(migration, event, now_ms)?);
            }
            Ok(told)
        };
        let by = (self.lease, &self.saga);
        let appended = self
            .store
            .append_saga_events(by, at, events, now_ms, project);
        appended.await.map(drop)
    }
}

/// What an event makes of the record; what it tells.
fn project<G: Recorded>(
    m: &mut Migration,
    event: &Event,
    now_ms: u64,
) -> Result<Vec<Notification>, IllegalTransition> {
    m.updated_at_ms = now_ms;
    event.step().clone_into(&mut m.step);
    let step = step_of::<G>(event.step());
    let mut told = Vec::new();
    match event {
        Event::Started { .. } => {
            m.step_started_at_ms = now_ms;
            if let Some(status) = step.and_then(|step| step.status) {
                m.become_status(status)?;
            }
            let phase = step.map_or(Phase::Waiting, |step| step.phase);
            m.progress.phase = m.progress.phase.max(phase);
            told.extend(step.and_then(|step| step.at_start));
        }
        Event::Succeeded { step: name, data } => {
            timing(m, name, now_ms);
            if let Ok(data) = serde_json::from_value::<Data>(data.clone()) {
                learn(m, name, &data, now_ms);
            }
            told.extend(step.and_then(|step| step.at_success));
            told.extend(end_if_last::<G>(m, name, now_ms)?);
        }
        Event::PutOff { step: name, error } => {
            timing(m, name, now_ms);
            m.warnings.push(format!(
                "{name} was put off and is tried again later: {error}"
            ));
            told.extend(end_if_last::<G>(m, name, now_ms)?);
        }
        Event::Failed { step: name, error } => {
            timing(m, name, now_ms);
            m.end_reason = Some(end_reason(error));
            told.push(G::told_at_failure());
        }
        Event::Undone { step: name } if name == G::STEPS[0].name => {
            told.extend(end::<G>(m, G::status_undone(m), now_ms)?);
        }
        Event::Undone { .. } => {}
        Event::Stuck { error, .. } => {
            m.become_status(S::Stuck)?;
            decide(m, now_ms, format!("stuck: {error}"));
        }
        Event::Resumed { step: name } => {
            m.become_status(status_at::<G>(name))?;
            decide(m, now_ms, format!("{name} is tried again"));
        }
    }
    let tell = |t: Told| notification(m, t.event_type, t.priority);
    Ok(told.into_iter().map(tell).collect())
}

/// Has a migration stuck of which its saga does not know it; whether that is news.
pub(super) fn be_stuck(m: &mut Migration, why: &str, now_ms: u64) -> bool {
    if m.become_status(S::Stuck).is_err() {
        return false;
    }
    m.updated_at_ms = now_ms;
    let text = format!("stuck: {why}");
    // Tried again it says the same again.
    if m.decisions.last().is_none_or(|last| last.text != text) {
        decide(m, now_ms, text);
    }
    true
}

/// Has it go on where its journal stands; whether it was stuck.
pub(super) fn go_on<G: Recorded>(m: &mut Migration, events: &[Event], now_ms: u64) -> bool {
    if m.status != S::Stuck {
        return false;
    }
    let step = events.last().map_or(G::STEPS[0].name, Event::step);
    let went_on = m.become_status(status_at::<G>(step)).is_ok();
    m.updated_at_ms = now_ms;
    decide(m, now_ms, format!("{step} is tried again"));
    went_on
}

fn step_of<G: Recorded>(name: &str) -> Option<&'static Shown> {
    let step = G::STEPS.iter().find(|step| step.name == name);
    step.map(|step| &step.note)
}

/// The status that a step has, or the last before it that has one.
fn status_at<G: Recorded>(name: &str) -> S {
    let up_to = G::STEPS.iter().position(|step| step.name == name);
    let steps = G::STEPS.iter().take(up_to.map_or(0, |at| at + 1)).rev();
    let mut statuses = steps.filter_map(|step| step.note.status);
    statuses.next().unwrap_or(S::Accepted)
}

/// Takes over what a step learned.
fn learn(m: &mut Migration, step: &str, data: &Data, now_ms: u64) {
    if let Some(chosen) = &data.chosen {
        m.dest_host = Some(chosen.host.clone());
    }
    if let Some(downtime_ms) = data.downtime_ms {
        m.downtime_ms = Some(downtime_ms);
    }
    for text in data.decisions.get(step).into_iter().flatten() {
        decide(m, now_ms, text.clone());
    }
    m.warnings
        .extend(data.warnings.get(step).into_iter().flatten().cloned());
    if m.status == S::Accepted && (data.chosen.is_some() || data.transfer.is_some()) {
        // From accepted to queued cannot fail.
        let _ = m.become_status(S::Queued);
    }
}

fn decide(m: &mut Migration, at_ms: u64, text: String) {
    /// Decisions kept of one migration; a resumed one could gather them for ever.
    const MAX_DECISIONS: usize = 200;
    if m.decisions.len() < MAX_DECISIONS {
        m.decisions.push(Decision { at_ms, text });
    }
}

fn timing(m: &mut Migration, step: &str, now_ms: u64) {
    m.timings.push(StepTiming {
        step: step.to_owned(),
        duration_ms: now_ms.saturating_sub(m.step_started_at_ms),
    });
}

fn end_if_last<G: Recorded>(
    m: &mut Migration,
    step: &str,
    now_ms: u64,
) -> Result<Vec<Told>, IllegalTransition> {
    let is_last = G::STEPS.last().is_some_and(|last| last.name == step);
    match is_last {
        true => end::<G>(m, G::status_after(m), now_ms),
        false => Ok(Vec::new()),
    }
}

fn end<G: Recorded>(
    m: &mut Migration,
    status: S,
    now_ms: u64,
) -> Result<Vec<Told>, IllegalTransition> {
    m.become_status(status)?;
    // The move's own end; confirming does not make it longer.
    m.finished_at_ms.get_or_insert(now_ms);
    m.progress.phase = Phase::Done;
    m.progress.eta_ms = None;
    m.progress.note = None;
    m.deadline_at_ms = None;
    G::at_end(m);
    Ok(G::told_at_end(status))
}

/// The reason a step gave for its failure, in its own form or in words.
fn end_reason(error: &StepError) -> EndReason {
    serde_json::from_value(error.detail.clone()).unwrap_or_else(|_| EndReason::Failed {
        message: error.message.clone(),
    })
}

/// A notification about a migration.
pub fn notification(m: &Migration, event_type: &str, priority: &str) -> Notification {
    Notification::new(event_type, priority, payload(m))
}

fn payload(m: &Migration) -> Value {
    json!({
        "instance_uuid": m.instance_uuid,
        "instance_name": m.instance_name,
        "project_id": m.project_id,
        "dest_project_id": match &m.way {
            Way::Transfer(transfer) => Some(&transfer.project),
            Way::Live(_) | Way::Cold(_) | Way::Evacuation(_) => None,
        },
        "consent": m.consent,
        "migration_id": m.id,
        "migration_uuid": m.uuid,
        "migration_type": m.way.migration_type(),
        "status": m.status,
        "source_host": m.source_host,
        "dest_host": m.dest_host,
        "reason": m.end_reason.as_ref().map(ToString::to_string),
        "downtime_ms": m.downtime_ms,
        "request_id": m.requester.request_id,
    })
}
