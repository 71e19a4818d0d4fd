//! Tidying that sagas put off: a disk to be removed from a node that was down.
//!
//! It is done in a task of its own, a few at once, so that nothing waits for a node
//! that does not answer. Whoever does it has the lease of its migration, with a new
//! epoch: two conductors do not do the same, and nobody who goes on with the
//! migration is disturbed. What fails is tried again ever more seldom, and what
//! waits longest comes first: many that fail for ever do not starve others.

use std::time::Duration;

use drover_model::{
    ids::HostName,
    migration::{Ending, Migration, Way},
};
use drover_runtime::error_chain::Chain;
use drover_saga::{Event, StepError};
use drover_store::{StoreError, sagas::PutOff};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    cold_migrate::ColdMigrate,
    confirm::Confirm,
    evacuate::Evacuate,
    job::{Data, Job, Slot, lost, store_error},
    live_migrate::LiveMigrate,
    revert::Revert,
    runner::{PASS, Runner, key_of},
    transfer::Transfer,
};
use crate::clock::goes_on_after;

/// Migrations that are tidied up after at once.
const AT_ONCE: usize = 8;
/// Put-off steps looked at in one pass.
const LOOKED_AT: u32 = 200;
/// When a step is looked at again whose node is down.
const LOOK_AGAIN: Duration = Duration::from_secs(15);
/// Pause after the first failure of a step; it doubles with each.
const FIRST_PAUSE: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1800);

impl Runner {
    /// Has put-off tidying done, until told to stop.
    pub async fn keep_tidying(&self, stop: CancellationToken) {
        while goes_on_after(PASS, &stop).await {
            if let Err(error) = self.tidy().await {
                warn!(error = %Chain(&error), "put-off tidying was not looked at; tried again soon");
            }
        }
    }

    async fn tidy(&self) -> Result<(), StoreError> {
        let store = &self.context.store;
        let term = self.term().recorded;
        let due = store.put_off_steps(self.owner(), term, LOOKED_AT).await?;
        for step in due {
            if self.tidied.len() >= AT_ONCE {
                return Ok(());
            }
            if let Err(error) = self.tidy_one(step.clone()).await {
                warn!(
                    migration = %step.lease.migration, step = step.step, error = %Chain(&error),
                    "tidying is put off again"
                );
                self.put_off_again(&step, true).await?;
            }
        }
        Ok(())
    }

    /// Begins to tidy up, if its node is up and nobody else does.
    async fn tidy_one(&self, step: PutOff) -> Result<(), StoreError> {
        let busy =
            |lease: &drover_store::migrations::Lease| lease.migration == step.lease.migration;
        if self.tidied.leases().iter().any(busy) {
            return Ok(());
        }
        let store = &self.context.store;
        // A step of a newer conductor is not done by another of the same name.
        if !self.understands(step.lease.migration).await? {
            return self.put_off_again(&step, false).await;
        }
        let m = store.migration(step.lease.migration).await?;
        for host in asked(&m, &step) {
            if !self.is_up(host).await? {
                return self.put_off_again(&step, false).await;
            }
        }
        let term = self.term();
        let taken = store.take_over(step.lease, self.owner(), term.recorded);
        let Some(lease) = taken.await? else {
            return Ok(());
        };
        let (runner, step) = (self.clone(), PutOff { lease, ..step });
        self.tidied.begin(lease, term, async move {
            let job = runner.job(lease, m, Slot::default());
            let uuid = lease.migration;
            match runner.tidy_up(job, &step).await {
                Ok(()) => info!(migration = %uuid, step = step.step, "tidied up"),
                Err(error) => {
                    warn!(migration = %uuid, step = step.step, attempts = step.attempts, %error, "tidying is put off again");
                    if let Err(error) = runner.put_off_again(&step, true).await {
                        warn!(migration = %uuid, error = %Chain(&error), "the record cannot be written");
                    }
                }
            }
        });
        Ok(())
    }

    async fn tidy_up(&self, job: Job, step: &PutOff) -> Result<(), StepError> {
        tidy_again(job, &step.step).await?;
        let said = format!("{} was put off, and is done now", step.step);
        let tidied = self.context.store.tidied(step.lease, &step.step, &said);
        tidied.await.map_err(|e| store_error(&e))
    }

    async fn put_off_again(&self, step: &PutOff, failed: bool) -> Result<(), StoreError> {
        let pause = match failed {
            true => pause_after(step.attempts),
            false => LOOK_AGAIN,
        };
        let pause_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
        let due_at_ms = self.context.clock.now_ms().saturating_add(pause_ms);
        let store = &self.context.store;
        store
            .put_off_again(step.lease.migration, &step.step, (due_at_ms, failed))
            .await
    }
}

/// The nodes without which a step cannot be done; the record alone needs none.
fn asked<'a>(m: &'a Migration, step: &PutOff) -> Vec<&'a HostName> {
    let source = Some(&m.source_host);
    let dest = m.dest_host.as_ref();
    let [one, other] = match (m.ending, &m.way, step.step.as_str()) {
        // It says first of all where the guest is, which must not wait.
        (None, Way::Live(_) | Way::Evacuation(_), "settle") if step.attempts == 0 => [None, None],
        (None | Some(Ending::Confirm), Way::Cold(_), "settle")
        | (None, Way::Transfer(_), "settle")
        | (Some(Ending::Revert), _, "settle" | "revert_settle") => [None, None],
        (None, Way::Live(_), "prepare") => [source, dest],
        (None, Way::Live(_), "transfer" | "tidy") | (None, Way::Transfer(_), _) => [source, None],
        (Some(Ending::Confirm), ..) => [source, None],
        (None | Some(Ending::Revert), ..) => [dest, None],
    };
    one.into_iter().chain(other).collect()
}

/// Does a step again that was put off.
async fn tidy_again(job: Job, step: &str) -> Result<(), StepError> {
    let m = &job.migration;
    // What its steps had learned by then; it tells of the move even after an ending.
    let events = job.store().saga_events(&key_of(m)).await;
    let data = learned(&events.map_err(|e| store_error(&e))?);
    let (ending, way) = (m.ending, m.way.clone());
    let dest = m.dest_host.clone();
    let dest = &dest.ok_or_else(|| lost("no destination is on the record"))?;
    match (ending, way) {
        // Of the move: nothing is kept for a way back any more.
        (Some(Ending::Confirm), Way::Cold(_)) if step == "settle" => {
            job.settle_late(job.source(), dest, None, None).await
        }
        (Some(Ending::Confirm), _) => Confirm::new(job).confirm_source().await,
        (Some(Ending::Revert), _) => Revert::new(job).tidy_again(step, dest, &data).await,
        (None, Way::Live(options)) => LiveMigrate::new(job, options).tidy_again(step, dest).await,
        (None, Way::Cold(options)) => {
            let cold = ColdMigrate::new(job, options);
            cold.tidy_again(step, dest, &data).await
        }
        (None, Way::Transfer(wanted)) => Transfer::new(job, wanted).tidy_again(step, &data).await,
        (None, Way::Evacuation(wanted)) => {
            let evacuate = Evacuate::new(job, wanted);
            evacuate.tidy_again(step, dest, &data).await
        }
    }
}

/// What the steps of a saga have learned.
fn learned(events: &[Event]) -> Data {
    let last = events.iter().rev().find_map(|event| match event {
        Event::Succeeded { data, .. } => serde_json::from_value(data.clone()).ok(),
        _ => None,
    });
    last.unwrap_or_default()
}

fn pause_after(attempts: u32) -> Duration {
    let doubled = FIRST_PAUSE.saturating_mul(1_u32.checked_shl(attempts).unwrap_or(u32::MAX));
    doubled.min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use drover_model::{
        ids::InstanceId,
        migration::{ColdOptions, LiveOptions},
    };
    use drover_store::Store;

    use super::*;

    fn asked_of(way: Way, ending: Option<Ending>, step: &str, attempts: u32) -> String {
        let instance = InstanceId(uuid::Uuid::from_u128(1));
        let mut m = Migration::new(instance, "from".parse().unwrap(), way, 1);
        m.dest_host = Some("to".parse().unwrap());
        m.ending = ending;
        let step = PutOff {
            lease: Store::first_lease(m.uuid),
            step: step.to_owned(),
            attempts,
        };
        let hosts: Vec<_> = asked(&m, &step).iter().map(|host| host.as_str()).collect();
        hosts.join(" ")
    }

    #[test]
    fn a_step_waits_for_the_nodes_that_it_asks_and_the_record_for_none() {
        let live = || Way::Live(LiveOptions::default());
        let cold = || Way::Cold(ColdOptions::default());
        assert_eq!(asked_of(live(), None, "prepare", 0), "from to");
        assert_eq!(asked_of(live(), None, "transfer", 0), "from");
        assert_eq!(asked_of(live(), None, "tidy", 0), "from");
        assert_eq!(asked_of(live(), None, "settle", 0), "", "the record first");
        assert_eq!(asked_of(live(), None, "settle", 1), "to");
        assert_eq!(asked_of(cold(), None, "prepare", 0), "to");
        assert_eq!(asked_of(cold(), None, "settle", 3), "");
        let confirm = Some(Ending::Confirm);
        assert_eq!(asked_of(cold(), confirm, "settle", 3), "");
        assert_eq!(asked_of(cold(), confirm, "confirm_source", 0), "from");
        let revert = Some(Ending::Revert);
        assert_eq!(asked_of(cold(), revert, "revert_settle", 3), "");
        assert_eq!(asked_of(cold(), revert, "revert_tidy", 0), "to");
    }

    #[test]
    fn pauses_double_up_to_the_longest() {
        assert_eq!(pause_after(0), Duration::from_secs(10));
        assert_eq!(pause_after(3), Duration::from_secs(80));
        for attempts in [10, 31, 32, 1000, u32::MAX] {
            assert_eq!(pause_after(attempts), LONGEST_PAUSE);
        }
    }
}
