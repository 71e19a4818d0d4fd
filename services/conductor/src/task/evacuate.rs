//! Starting the guest of a dead node elsewhere, as a saga. The operation that it
//! is part of has proven that the node is off (invariant 1).
//!
//! `start` never fails on a guess: the destination is asked where the guest is,
//! and while it does not say, the step is *lost* and nothing is undone. The dead
//! node's own copy is given up by its agent when it returns, after it has asked.

use std::time::Duration;

use drover_model::{
    api::compute::{PostRebuild, Rebuild, RebuildInstance},
    check::CheckFailure,
    error::ErrorClass,
    guest::{PowerState, Presence},
    ids::HostName,
    migration::{EndReason, Evacuation, Migration, MigrationStatus as S},
};
use drover_saga::StepError;
use drover_store::{definitions::DefinitionRow, instances::InstanceRow, nodes::NodeRow};
use tokio::time::Instant;

use super::{
    job::{Data, Job, agent_error, all_clean, ended, in_doubt, lost, repeatable, store_error},
    journal::{Recorded, Told},
    proof::NeverRan,
    steps::steps,
};
use crate::{
    checks::{
        self,
        evacuation::{doubt, last_digest},
    },
    comparing::Patience,
    operation::evacuation::{examine_destination, still_dead},
    survey::{Chosen, Survey},
};

/// Pause between two looks for a guest that is being started.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// How long to look before the step counts as lost.
const LOOK_FOR: Duration = Duration::from_secs(30);

/// One evacuation under way.
pub struct Evacuate {
    job: Job,
    wanted: Evacuation,
}

steps! { Evacuate |it, data| until { it.job.interrupted() }
    // Looks at proof and definition again, chooses a destination, claims room there.
    PLACE = "place" [Accepted, Checking]
        tells "instance.evacuate" then "instance.rebuild_scheduled"
        { it.place(data) }
        undo { it.job.release_claim() };
    // Destination: defines the guest with its next generation. One that cannot have it says so
    // while nothing runs.
    PREPARE = "prepare" [PreMigrating, Preparing]
        tells "instance.rebuild.start"
        { it.prepare(data) }
        undo { it.undo_prepare(data) };
    // Right before it the dead node is looked at once more: one that was heard of since the
    // proof may run the guest itself. The point of no return: the guest was seen to run. It is
    // undone with `prepare`. Short, and its end has to be seen; trouble with the record says
    // nothing of the guest.
    START = "start" [_, SwitchOver, commits, is_whole]
        { async { it.start(data).await.map_err(in_doubt) } };
    // Record and claim follow the guest, with its generation; the destination forgets the
    // evacuation.
    SETTLE = "settle" [Done, Finishing]
        { it.settle(data) };
}

impl Recorded for Evacuate {
    fn told_at_failure() -> Told {
        Told::error("instance.rebuild.error")
    }

    fn told_at_end(status: S) -> Vec<Told> {
        match status {
            S::Completed => vec![Told::info("instance.rebuild.end")],
            S::Failed => vec![Told::error("compute_task.rebuild_server.error")],
            _ => Vec::new(),
        }
    }

    fn status_after(_: &Migration) -> S {
        S::Completed
    }
}

impl Evacuate {
    /// The saga of an evacuation on the record.
    pub(super) fn new(job: Job, wanted: Evacuation) -> Self {
        Self { job, wanted }
    }

    // ---- place

    async fn place(&self, data: &mut Data) -> Result<(), StepError> {
        let store = self.job.store();
        let id = self.job.migration.instance_uuid;
        let instance = store.find_instance(&id.to_string()).await;
        let instance = instance.map_err(|e| store_error(&e))?;
        let kept = store.kept_definition(id).await;
        let kept = kept.map_err(|e| store_error(&e))?;
        let (node, refused, doubt) = self.source(&instance, kept.as_ref()).await?;
        let (Some(node), Some(kept)) = (node, kept.filter(|_| refused.is_empty())) else {
            return Err(ended(EndReason::Refused { checks: refused }));
        };
        let (chosen, why) = self.choose(&instance, &kept).await?;
        for text in why {
            data.decide("place", text);
        }
        let age_s = self.now_ms().saturating_sub(kept.taken_at_ms) / 1000;
        data.decide(
            "place",
            format!("defined as {} told it {age_s} s ago", kept.host),
        );
        if let Some(text) = doubt {
            data.decide("place", text);
        }
        let generation = store.give_generation(self.job.lease, id).await;
        data.generation = generation.map_err(|e| store_error(&e))?;
        data.stopped_at_ms = Some(node.heard_at_ms);
        data.chosen = Some(chosen);
        Ok(())
    }

    fn now_ms(&self) -> u64 {
        self.job.context.clock.now_ms()
    }

    /// Every check on the dead node and the instance, and what is in doubt.
    async fn source(
        &self,
        instance: &InstanceRow,
        kept: Option<&DefinitionRow>,
    ) -> Result<(Option<NodeRow>, Vec<CheckFailure>, Option<String>), StepError> {
        let host = self.job.source();
        let dead = still_dead(&self.job.context, host, &self.wanted.proof).await;
        let (node, alive) = dead.map_err(|e| store_error(&e))?;
        let mut refused = checks::request(instance, &self.job.migration.way, None);
        refused.extend(checks::recorded(instance, &self.job.migration.way));
        refused.extend(alive);
        let digest = node
            .as_ref()
            .and_then(|node| last_digest(node, instance, kept));
        refused.extend(checks::evacuation::definition(host, kept, digest));
        let doubt = kept.and_then(|kept| doubt(kept, digest));
        Ok((node, refused, doubt))
    }

    /// The first node that can have the guest, and has room for it.
    async fn choose(
        &self,
        instance: &InstanceRow,
        kept: &DefinitionRow,
    ) -> Result<(Chosen, Vec<String>), StepError> {
        let m = &self.job.migration;
        let survey = Survey {
            store: self.job.store(),
            agents: self.job.agents(),
            live: self.job.context.liveness(),
            migration: m.uuid,
            instance,
            way: &m.way,
            patience: Patience::WhileRead,
        };
        let named = m.dest_host.as_ref().filter(|_| m.dest_requested);
        let candidates = survey.candidates(named).await;
        let (hosts, mut tried) = candidates.map_err(|e| store_error(&e))?;
        let allowed = |host: &HostName| {
            named.is_some() || self.wanted.to.is_empty() || self.wanted.to.contains(host)
        };
        tried.retain(|(host, _)| allowed(host));
        for host in hosts.into_iter().filter(allowed) {
            match self.try_host(instance, kept, &host).await? {
                Ok(chosen) => {
                    let why = self.job.why(&chosen, &tried);
                    return Ok((chosen, why));
                }
                Err(failures) => tried.push((host, failures)),
            }
        }
        Err(self.job.refusal(Vec::new(), tried))
    }

    async fn try_host(
        &self,
        instance: &InstanceRow,
        kept: &DefinitionRow,
        host: &HostName,
    ) -> Result<Result<Chosen, Vec<CheckFailure>>, StepError> {
        let m = &self.job.migration;
        let of = (&kept.kept, self.job.source());
        let (context, agents) = (&self.job.context, self.job.agents());
        let examined = examine_destination(context, agents, m.uuid, of, host).await;
        let (row, failures, checked) = examined.map_err(|e| store_error(&e))?;
        let Some(row) = row.filter(|_| failures.is_empty()) else {
            return Ok(Err(failures));
        };
        let chosen = Chosen {
            host: host.clone(),
            endpoint: row.report.endpoint,
            guest: kept.kept.guest.clone(),
            copied_disks: Vec::new(),
            shared_disks: Vec::new(),
            files: Vec::new(),
            claim: (instance.vcpus.into(), instance.memory_mib, 0),
            checked_at_source: Vec::new(),
            checked,
        };
        let claimed = self.job.claim(&chosen).await?;
        Ok(claimed.map(|()| chosen))
    }

    // ---- prepare

    async fn prepare(&self, data: &Data) -> Result<(), StepError> {
        let id = self.job.migration.instance_uuid;
        let kept = self.job.store().kept_definition(id).await;
        let kept = kept.map_err(|e| store_error(&e))?;
        let gone = || StepError::new(ErrorClass::Refused, "its definition is no longer kept");
        let ask = RebuildInstance {
            migration: self.job.migration.uuid,
            instance: id,
            domain: kept.ok_or_else(gone)?.kept.domain,
            generation: data.generation,
            checked: data.chosen()?.checked.clone(),
        };
        let host = &data.chosen()?.host;
        let prepared = self.job.agents().act(host, &ask).await;
        prepared.map_err(repeatable)
    }

    async fn undo_prepare(&self, data: &Data) -> Result<(), StepError> {
        let Some(chosen) = &data.chosen else {
            return Ok(());
        };
        let taken_back = self.take_back_or_leave(&chosen.host).await;
        let step = PREPARE;
        self.job.or_put_off(&chosen.host, step, taken_back).await
    }

    /// A guest that was started there, and is off again, stays: nothing of it is lost by
    /// that, and the next generation is above its own.
    async fn take_back_or_leave(&self, host: &HostName) -> Result<(), StepError> {
        let Err(error) = self.take_back(host).await else {
            return Ok(());
        };
        let there = self.job.look_at(host).await?;
        if !there.is_present() || there.is_active() || !there.copy().known.ran_here {
            return Err(error);
        }
        let mut left = self.forget(host).await?;
        left.push(error.message);
        self.job.note_kept(left).await
    }

    /// Takes the definition back where the guest was never started.
    async fn take_back(&self, host: &HostName) -> Result<(), StepError> {
        let home = self.job.look_at(host).await?;
        let proof = NeverRan::there(&home)
            .map_err(|why| lost(format!("{why}: its definition is not taken back")))?;
        let agents = self.job.agents();
        let undone = agents.rollback_rebuild(host, self.job.step(), &proof);
        all_clean(undone.await.map_err(agent_error)?)
    }

    // ---- start

    async fn start(&self, data: &mut Data) -> Result<(), StepError> {
        let host = data.chosen()?.host.clone();
        // A conductor that died may have had it started: it is looked for first.
        let mut there = self.look(&host).await?;
        let mut answer = Ok(());
        if !there.is_active() {
            self.still_dead().await?;
            if let Some(why) = self.job.on_third_node(&host).await? {
                return Err(failed(why));
            }
            if let Some(third) = self.job.active_on_any(&host).await? {
                return Err(failed(format!(
                    "{third} has the guest active: it is started nowhere else"
                )));
            }
            match self
                .job
                .agents()
                .act(&host, &Rebuild(self.job.step()))
                .await
            {
                Ok(location) => there = location.presence,
                Err(error) => {
                    answer = Err(error);
                    there = self.look(&host).await?;
                }
            }
        }
        let began = Instant::now();
        loop {
            match (there, &answer) {
                (Presence::Present(PowerState::Running), _) => break,
                (there, _) if there.is_active() => {
                    if began.elapsed() >= LOOK_FOR {
                        let words = format!("it is on {host}, and does not run: {there}");
                        data.warn(START, vec![words]);
                        break;
                    }
                }
                (_, Err(e)) if matches!(e.class, ErrorClass::Refused | ErrorClass::Bug) => {
                    return Err(failed(e.message.clone()));
                }
                // It ran there: with its generation it is the only one that may.
                (Presence::Present(_), Ok(())) => {
                    let words = format!("it was started on {host}, and is off again: {there}");
                    data.warn(START, vec![words]);
                    break;
                }
                (there, Ok(())) => {
                    return Err(lost(format!(
                        "it was started on {host}, and is not there any more: {there}"
                    )));
                }
                (_, Err(e)) if began.elapsed() >= LOOK_FOR => return Err(lost(e.message.clone())),
                (_, Err(_)) => {}
            }
            tokio::time::sleep(LOOK_AGAIN).await;
            there = self.look(&host).await?;
        }
        let off_since_ms = data.stopped_at_ms;
        data.downtime_ms = off_since_ms.map(|at| self.now_ms().saturating_sub(at));
        Ok(())
    }

    /// Where the guest is; not to be told is to have lost it, unless its new home is
    /// proven dead: then it runs there no more, and lost nothing but its memory.
    async fn look(&self, host: &HostName) -> Result<Presence, StepError> {
        let error = match self.job.locate(host).await {
            Ok(located) => return Ok(located.presence),
            Err(error) => error,
        };
        let dead = self.job.is_dead(host).await;
        Err(match dead.map_err(|error| lost(error.message))? {
            Some(dead) => failed(format!("{dead}: it does not run there")),
            None => lost(format!("whether it runs on {host}: {error}")),
        })
    }

    async fn still_dead(&self) -> Result<(), StepError> {
        let host = self.job.source();
        let dead = still_dead(&self.job.context, host, &self.wanted.proof).await;
        match dead.map_err(|e| lost(e.to_string()))? {
            (_, None) => Ok(()),
            (_, Some(failure)) => Err(ended(EndReason::Refused {
                checks: vec![failure],
            })),
        }
    }

    // ---- settle

    async fn settle(&self, data: &mut Data) -> Result<(), StepError> {
        let host = data.chosen()?.host.clone();
        let m = &self.job.migration;
        let generation = data.generation;
        let store = self.job.store();
        let rebuilt = store.rebuilt(
            self.job.lease,
            m.instance_uuid,
            &host,
            generation,
            self.now_ms(),
        );
        rebuilt.await.map_err(|e| store_error(&e))?;
        self.job.context.definitions.moved(m.instance_uuid, &host);
        let warnings = self.forget(&host).await?;
        data.warn(SETTLE, warnings);
        Ok(())
    }

    async fn forget(&self, host: &HostName) -> Result<Vec<String>, StepError> {
        let cleaned = self
            .job
            .agents()
            .act(host, &PostRebuild(self.job.step()))
            .await;
        Ok(cleaned.map_err(agent_error)?.warnings)
    }

    /// Does again what was put off.
    pub(super) async fn tidy_again(
        &self,
        step: &str,
        host: &HostName,
        data: &Data,
    ) -> Result<(), StepError> {
        if step == PREPARE {
            return self.take_back_or_leave(host).await;
        }
        let (m, now_ms) = (&self.job.migration, self.now_ms());
        let store = self.job.store();
        let settled = store.rebuilt_late(m, host, data.generation, now_ms).await;
        settled.map_err(|e| store_error(&e))?;
        self.forget(host).await.map(drop)
    }
}

fn failed(message: String) -> StepError {
    ended(EndReason::Failed { message })
}
