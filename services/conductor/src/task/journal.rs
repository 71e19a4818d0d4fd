//! From journal to record: what each event of a saga makes of the migration's
//! record, and whom it tells. Committed together with the event (see
//! [`drover_store::sagas`]), so the record never says what the journal does not.

use async_trait::async_trait;
use drover_model::migration::{
    Decision, EndReason, IllegalTransition, Migration, MigrationStatus as S, Phase, StepTiming,
};
use drover_saga::{Event, Journal, JournalError, Saga, StepError};
use drover_store::{Store, migrations::Lease, outbox::Notification};
use serde_json::{Value, json};

use super::live_migrate::{Data, LiveMigrate, Step};
use crate::clock::Clock;

/// The journal of one live migration.
pub struct LiveJournal {
    /// The record.
    pub store: Store,
    /// The time.
    pub clock: Clock,
    /// Whose saga, and by what right.
    pub lease: Lease,
}

#[async_trait]
impl Journal for LiveJournal {
    async fn load(&self) -> Result<Vec<Event>, JournalError> {
        let events = self.store.saga_events(self.lease).await;
        events.map_err(|e| JournalError::Unavailable(e.to_string()))
    }

    async fn append(&self, at: usize, events: &[Event]) -> Result<(), JournalError> {
        let now_ms = self.clock.now_ms();
        let project = |migration: &mut Migration| {
            let mut told = Vec::new();
            for event in events {
                told.extend(project(migration, event, now_ms)?);
            }
            Ok(told)
        };
        let appended = self
            .store
            .append_saga_events(self.lease, at, events, now_ms, project);
        appended.await?;
        for event in events {
            if let Event::PutOff { step, .. } = event {
                let kept = self.store.put_off(self.lease, step, now_ms).await;
                kept.map_err(|e| JournalError::Unavailable(e.to_string()))?;
            }
        }
        Ok(())
    }
}

/// What an event makes of the record; what it tells.
fn project(
    m: &mut Migration,
    event: &Event,
    now_ms: u64,
) -> Result<Vec<Notification>, IllegalTransition> {
    m.updated_at_ms = now_ms;
    event.step().clone_into(&mut m.step);
    let mut told = Vec::new();
    match event {
        Event::Started { step } => {
            m.step_started_at_ms = now_ms;
            if let Some(status) = status_during(step) {
                m.become_status(status)?;
            }
            m.progress.phase = m.progress.phase.max(phase_during(step));
            told.extend(event_on_start(step));
        }
        Event::Succeeded { step, data } => {
            timing(m, step, now_ms);
            if let Ok(data) = serde_json::from_value::<Data>(data.clone()) {
                learn(m, step, &data, now_ms);
            }
            told.extend(event_on_success(step));
            finish_if_last(m, step, now_ms)?;
        }
        Event::PutOff { step, error } => {
            timing(m, step, now_ms);
            m.warnings.push(format!(
                "{step} was put off and is tried again later: {error}"
            ));
            finish_if_last(m, step, now_ms)?;
        }
        Event::Failed { step, error } => {
            timing(m, step, now_ms);
            m.end_reason = Some(end_reason(error));
            told.push(("instance.live_migration_rollback.start", "INFO"));
        }
        Event::Undone { step } if step == first_step() => {
            let status = match m.end_reason {
                Some(EndReason::Aborted) => S::Cancelled,
                _ => S::Failed,
            };
            end(m, status, now_ms)?;
            told.push(("instance.live_migration_rollback.end", "INFO"));
            if status == S::Failed {
                told.push(("compute_task.migrate_server.error", "ERROR"));
            } else {
                told.push(("instance.live_migration_abort.end", "INFO"));
            }
        }
        Event::Undone { .. } => {}
        Event::Stuck { error, .. } => {
            m.become_status(S::Stuck)?;
            decide(m, now_ms, format!("stuck: {error}"));
        }
        Event::Resumed { step } => {
            m.become_status(status_during(step).unwrap_or(S::Running))?;
            decide(m, now_ms, format!("{step} is tried again"));
        }
    }
    if m.status == S::Completed {
        told.push(("instance.live_migration_post.end", "INFO"));
    }
    Ok(told
        .into_iter()
        .map(|(event, priority)| notification(m, event, priority))
        .collect())
}

fn first_step() -> &'static str {
    LiveMigrate::name(LiveMigrate::STEPS[0])
}

fn is_last(step: &str) -> bool {
    LiveMigrate::STEPS
        .last()
        .is_some_and(|s| LiveMigrate::name(*s) == step)
}

fn step_of(name: &str) -> Option<Step> {
    LiveMigrate::STEPS
        .iter()
        .copied()
        .find(|s| LiveMigrate::name(*s) == name)
}

fn status_during(step: &str) -> Option<S> {
    match step_of(step)? {
        Step::Place => Some(S::Accepted),
        Step::Prepare => Some(S::Preparing),
        Step::Transfer => Some(S::Running),
        Step::Settle | Step::Tidy => None,
    }
}

fn phase_during(step: &str) -> Phase {
    match step_of(step) {
        Some(Step::Place) => Phase::Checking,
        Some(Step::Prepare) => Phase::Preparing,
        Some(Step::Settle | Step::Tidy) => Phase::Finishing,
        Some(Step::Transfer) | None => Phase::Waiting,
    }
}

fn event_on_start(step: &str) -> Option<(&'static str, &'static str)> {
    match step_of(step)? {
        Step::Prepare => Some(("instance.live_migration_pre.start", "INFO")),
        Step::Settle => Some(("instance.live_migration_post.start", "INFO")),
        Step::Place | Step::Transfer | Step::Tidy => None,
    }
}

fn event_on_success(step: &str) -> Option<(&'static str, &'static str)> {
    match step_of(step)? {
        Step::Prepare => Some(("instance.live_migration_pre.end", "INFO")),
        Step::Settle => Some(("instance.live_migration_post_dest.end", "INFO")),
        Step::Place | Step::Transfer | Step::Tidy => None,
    }
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
    if step_of(step) == Some(Step::Place) && m.status == S::Accepted {
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

fn finish_if_last(m: &mut Migration, step: &str, now_ms: u64) -> Result<(), IllegalTransition> {
    if is_last(step) {
        end(m, S::Completed, now_ms)?;
    }
    Ok(())
}

fn end(m: &mut Migration, status: S, now_ms: u64) -> Result<(), IllegalTransition> {
    m.become_status(status)?;
    m.finished_at_ms = Some(now_ms);
    m.progress.phase = Phase::Done;
    m.progress.eta_ms = None;
    m.progress.note = None;
    m.deadline_at_ms = None;
    Ok(())
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
        "migration_id": m.id,
        "migration_uuid": m.uuid,
        "migration_type": m.migration_type,
        "status": m.status,
        "source_host": m.source_host,
        "dest_host": m.dest_host,
        "reason": m.end_reason.as_ref().map(ToString::to_string),
        "downtime_ms": m.downtime_ms,
        "request_id": m.requester.request_id,
    })
}
