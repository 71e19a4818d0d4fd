//! The source's steps: what is given away, how it is sent, and what is tidied
//! here afterwards.

use drover_model::{
    api::{
        compute::{
            CheckPath, CheckSource, CleanUp, Ended, JobState, Known, KnownDisk, LiveMigration,
            PathFacts, PostLiveMigration, SourceFacts, StepRef,
        },
        fault::Fault,
    },
    error::ErrorClass,
    guest::{Disk, Guest, PowerState, Presence},
};
use tracing::{info, warn};

use super::{
    actor::{Actor, Stage},
    contents::{are_all_checked, are_as_checked, no_disk_is_new, used_paths},
    destroy::{self, Redundant},
    look::fingerprint,
    orders::Order,
    past::Finished,
    sending::{MonitorDied, Sending, job_of, spec},
    shared::has_moved,
    steps::Reply,
};
use crate::{
    faults::hypervisor as fault,
    hypervisor::Job,
    journal::{CopiedDisk, Record, SourceRecord},
    node::Counters,
};

/// Refuses if the guest got a disk since it was looked at.
fn no_disk_is_unaccounted_for(step: &LiveMigration, guest: &Guest) -> Result<(), Fault> {
    if let Some(known) = &step.disks {
        no_disk_is_new(known, &KnownDisk::of(guest))?;
    }
    let known =
        |target: &String| step.copied_disks.contains(target) || step.shared_disks.contains(target);
    let mut own = guest.disks.iter().filter(|d| d.is_copied_when_local());
    match own.find(|d| !known(&d.target)) {
        None => Ok(()),
        Some(disk) => Err(Fault::refused(format!(
            "the guest got disk {} since it was looked at: ask again",
            disk.target
        ))),
    }
}

impl Actor {
    /// What is to be given away. Leaves marks beside the disks.
    pub(super) async fn check_source(&mut self, step: CheckSource) -> Result<SourceFacts, Fault> {
        self.registry.could_have(self.step(step.instance)).await?;
        let hypervisor = self.node.hypervisor.clone();
        let look = async {
            match step.lasting {
                true => hypervisor.lasting_guest(step.instance).await,
                false => hypervisor.guest(step.instance).await,
            }
        };
        let asked = tokio::try_join!(look, hypervisor.inventory());
        let (guest, inventory) = asked.map_err(fault)?;
        let (marks, contents) = match &guest {
            Some(guest) => {
                let marks = self.leave_marks(guest).await.map_err(fault)?;
                let contents = hypervisor.contents(&used_paths(guest), &marks).await;
                (marks, contents.map_err(fault)?)
            }
            None => (Vec::new(), Vec::new()),
        };
        Ok(SourceFacts {
            contents,
            guest,
            marks,
            inventory,
        })
    }

    /// Whether the destination can be reached. The marks have served.
    pub(super) async fn check_path(&mut self, step: CheckPath) -> Result<PathFacts, Fault> {
        self.registry.could_have(self.step(step.instance)).await?;
        let hypervisor = self.node.hypervisor.clone();
        let there = &step.destination;
        let probe = async {
            match step.probe_port {
                Some(port) => Ok(hypervisor.reach(&there.address, port).await?),
                None => Err("the destination opened no port to try".to_owned()),
            }
        };
        let disks = async {
            match step.disk_port {
                Some(port) => Ok(hypervisor.reach(&there.address, port).await?),
                None => Ok::<_, String>(()),
            }
        };
        let libvirt = hypervisor.reach(&there.address, there.libvirt_port);
        let (libvirt, migration_port, disk_port, ()) =
            tokio::join!(libvirt, probe, disks, self.remove_marks());
        Ok(PathFacts {
            libvirt: libvirt.map_err(String::from),
            migration_port,
            disk_port,
        })
    }

    /// Starts sending, once; asked again, says how it goes.
    pub(super) async fn live_migration(&mut self, step: LiveMigration) -> Result<JobState, Fault> {
        match &self.stage {
            Stage::Idle => {}
            Stage::Arriving(_) => {
                return Err(Fault::refused("this node is the migration's destination"));
            }
            Stage::Leaving(_)
            | Stage::Coming(_)
            | Stage::Transferring(_)
            | Stage::Rebuilding(_) => return Err(not_live()),
            Stage::Sending(_) | Stage::Ended(_) => {
                return self.get_job(self.step(step.instance)).await;
            }
        }
        if let Some(finished) = self.registry.finished(self.migration).await?
            && finished.how != Ended::NeverBegun
        {
            let over = Fault::refused("this migration is over here");
            return finished.job.ok_or(over);
        }
        self.may_begin(self.step(step.instance)).await?;
        let problems = step.options.problems();
        if !problems.is_empty() {
            return Err(Fault::refused(problems.join("; ")));
        }
        let reference = self.step(step.instance);
        self.registry.hold(reference).await?;
        let begun = self.begin(step).await;
        if begun.is_err() {
            self.registry.release(reference);
        }
        begun
    }

    async fn begin(&mut self, step: LiveMigration) -> Result<JobState, Fault> {
        let instance = step.instance;
        // Before the guest is looked at: whatever changes from now on is noticed.
        let lasting = fingerprint(&*self.node.hypervisor, instance).await;
        let lasting = lasting.map_err(fault)?;
        let guest = self.node.hypervisor.guest(instance).await.map_err(fault)?;
        let missing = || Fault::refused(format!("there is no instance {instance} on this node"));
        let guest = guest.ok_or_else(missing)?;
        let attaches = step.attach;
        if attaches {
            self.is_being_sent(&guest).await?;
        }
        if let Some(checked) = step.checked.as_ref().filter(|_| !attaches) {
            are_as_checked(&*self.node.hypervisor, checked).await?;
            are_all_checked(&guest, checked, |_| false)?;
            no_disk_is_unaccounted_for(&step, &guest)?;
            if let Some(tie) = guest.immovable.first() {
                let words = format!("{} came since it was looked at: ask again", tie.what);
                return Err(Fault::refused(words));
            }
        }
        let record = self.plan(step, &guest, lasting)?;
        let spec = (!attaches).then(|| spec(&self.node, &record));
        let entry = Record::Source(Box::new(record.clone()));
        self.write_down(&entry).await?;
        let counters = &self.node.counters;
        let (what, count) = match attaches {
            true => (
                "the guest is being sent already",
                &counters.transfers_attached,
            ),
            false => ("sending the guest", &counters.transfers_started),
        };
        info!(migration = %self.migration, %instance, name = %guest.name,
            to = %record.request.dest_host, "{what}");
        Counters::add(count);
        let sending = Sending::watch(&self.node, self.migration, record, spec);
        let job = sending.job();
        self.stage = Stage::Sending(sending);
        Ok(job)
    }

    /// libvirt sends it, and nobody here watches that: the journal was lost.
    async fn is_being_sent(&self, guest: &Guest) -> Result<(), Fault> {
        let job = self.node.hypervisor.job(guest.id).await.map_err(fault)?;
        match job {
            Job::Migration(_) if guest.power_state.is_active() => Ok(()),
            _ => Err(Fault::refused("libvirt no longer sends the guest")),
        }
    }

    /// What is to be done, if it fits the guest as it is now.
    fn plan(
        &self,
        request: LiveMigration,
        guest: &Guest,
        lasting: Option<String>,
    ) -> Result<SourceRecord, Fault> {
        if !guest.power_state.is_active() {
            let state = guest.power_state;
            return Err(Fault::refused(format!("the guest is not running: {state}")));
        }
        if let Some(job) = guest.active_job.as_ref().filter(|_| !request.attach) {
            return Err(Fault::refused(format!(
                "libvirt is busy with the guest: {job}"
            )));
        }
        let copied = request.copied_disks.iter();
        let disks = copied
            .map(|target| copied_disk(guest, target))
            .collect::<Result<_, _>>()?;
        Ok(SourceRecord {
            disks,
            memory_bytes: guest.memory_mib << 20,
            was_running: guest.power_state == PowerState::Running,
            paused_by_force_complete: false,
            generation: guest.generation,
            started_at_ms: self.node.now_ms(),
            lasting: lasting.filter(|_| guest.persistent),
            decisions: Vec::new(),
            ended: None,
            request,
        })
    }

    /// Where the transfer stands.
    pub(super) async fn get_job(&self, step: StepRef) -> Result<JobState, Fault> {
        self.same_instance(step)?;
        Ok(match &self.stage {
            Stage::Sending(sending) => sending.job(),
            Stage::Ended(record) => job_of(record),
            _ => {
                let finished = self.registry.finished(self.migration).await?;
                finished.and_then(|f| f.job).unwrap_or(JobState::Unknown)
            }
        })
    }

    pub(super) async fn abort(&mut self, step: StepRef, to: Reply<()>) {
        self.order(step, Order::Abort, to).await;
    }

    pub(super) async fn force_complete(&mut self, step: StepRef, to: Reply<()>) {
        self.order(step, Order::ForceComplete, to).await;
    }

    /// Passes an order on to the monitor, which answers it itself. Of a transfer
    /// that is over, the outcome is the answer.
    async fn order(&self, step: StepRef, order: impl FnOnce(Reply<()>) -> Order, to: Reply<()>) {
        if let Err(other) = self.same_instance(step) {
            drop(to.send(Err(other)));
            return;
        }
        match &self.stage {
            Stage::Sending(sending) if !sending.is_over() => sending.give(order(to)),
            Stage::Sending(_) | Stage::Ended(_) => drop(to.send(Ok(()))),
            _ => {
                let unknown = || Fault::refused("this node sends nothing for this migration");
                let finished = self.registry.finished(self.migration).await;
                let answer = finished.and_then(|finished| {
                    let known = finished.is_some_and(|f| f.job.is_some());
                    known.then_some(()).ok_or_else(unknown)
                });
                drop(to.send(answer));
            }
        }
    }

    /// The monitor died: the guest is watched by another, as after a restart.
    pub(super) fn watch_again(&mut self) {
        if let Stage::Sending(sending) = &self.stage {
            warn!(migration = %self.migration, "the transfer's monitor died; watching anew");
            let record = (*sending.record).clone();
            self.stage = Stage::Sending(Sending::watch(&self.node, self.migration, record, None));
        }
    }

    /// The monitor is done: its findings go into the journal.
    pub(super) async fn sent(&mut self, record: Box<SourceRecord>) {
        let entry = Record::Source(record.clone());
        if let Err(e) = self
            .node
            .journal
            .migrations
            .store(self.migration, &entry)
            .await
        {
            // A restart would look at the guest and find the same.
            warn!(migration = %self.migration, error = %e, "the outcome is not in the journal");
        }
        self.stage = Stage::Ended(record);
    }

    /// Tidies the source after the guest has moved, by evidence of its copy there:
    /// what libvirt left of the domain, and the disks that were copied.
    pub(super) async fn post_live_migration(
        &mut self,
        ask: PostLiveMigration,
    ) -> Result<CleanUp, Fault> {
        let step = self.step(ask.instance);
        let Some(record) = self.ended(step).await? else {
            return self.post_unknown(&ask).await;
        };
        let presence = self.node.hypervisor.presence(step.instance).await;
        let presence = presence.map_err(fault)?;
        let disks = record.disks.iter().map(|disk| disk.path.as_str());
        let own = &self.node.settings.host;
        let proof = Redundant::by(ask.survivor.as_ref(), own, record.generation, disks);
        let runs_there = proof.as_ref().is_ok_and(Redundant::runs);
        let mut clean_up = CleanUp::default();
        let mut how = Ended::Left;
        match presence {
            Presence::Absent if record.disks.is_empty() => {}
            // Somebody brought it back, and it is on these disks: where libvirt said that it
            // moved, nothing was left of it.
            Presence::Present(state)
                if !runs_there
                    && (state == PowerState::Running
                        || !state.is_active() && has_moved(&job_of(&record))) =>
            {
                how = Ended::MadeWay;
                clean_up.kept = vec![format!(
                    "the guest is here again ({state}): nothing is removed"
                )];
            }
            _ => {
                let proof = proof?;
                self.remove_what_moved(step, presence, &record, &proof)
                    .await?;
                for disk in &record.disks {
                    let removed = destroy::remove(&self.node, &disk.path, &proof).await;
                    self.note_removed(&disk.path, removed, &mut clean_up)?;
                }
            }
        }
        self.remove_marks().await;
        self.finish_source(step, how, &record, clean_up).await
    }

    /// Nothing is known here of the migration any more, or it was done with before. What
    /// libvirt left of a guest that runs where it moved to, it says itself.
    async fn post_unknown(&self, ask: &PostLiveMigration) -> Result<CleanUp, Fault> {
        let remembered = self.remembered().await?;
        let hypervisor = &self.node.hypervisor;
        let here = hypervisor.guest(ask.instance).await.map_err(fault)?;
        let Some(here) = here.filter(|guest| guest.power_state == PowerState::Paused) else {
            return Ok(remembered);
        };
        let (survivor, own) = (ask.survivor.as_ref(), &self.node.settings.host);
        let Ok(proof) = Redundant::by(survivor, own, here.generation, []) else {
            return Ok(remembered);
        };
        if proof.runs() {
            match destroy::discard_outgoing(&self.node, ask.instance, &proof).await {
                Ok(()) => {}
                Err(error) if error.class() == ErrorClass::Refused => {
                    warn!(migration = %self.migration, instance = %ask.instance, %error,
                        "a guest that runs elsewhere is paused here: left alone");
                }
                Err(error) => return Err(fault(error)),
            }
        }
        Ok(remembered)
    }

    /// What libvirt left of the domain.
    async fn remove_what_moved(
        &self,
        step: StepRef,
        presence: Presence,
        record: &SourceRecord,
        proof: &Redundant,
    ) -> Result<(), Fault> {
        // Where libvirt said that it moved, nothing was left of it: what stands still here
        // has been brought since, and is newer than one that is off there.
        let may_be_left = proof.runs() || (proof.is_off() && !has_moved(&job_of(record)));
        let removed = match presence {
            Presence::Absent => Ok(()),
            Presence::Present(state) if !state.is_active() => {
                destroy::undefine(&self.node, step.instance, proof).await
            }
            Presence::Present(PowerState::Paused) if may_be_left => {
                destroy::discard_outgoing(&self.node, step.instance, proof).await
            }
            // Its disks may be the only ones.
            Presence::Present(_) | Presence::Incoming => {
                return Err(Fault::refused(format!(
                    "the guest is still on the source ({presence}): nothing is removed"
                )));
            }
        };
        removed.map_err(fault)
    }

    /// Forgets a transfer that did not happen; the guest stays and runs on.
    pub(super) async fn rollback_at_source(&mut self, step: StepRef) -> Result<(), Fault> {
        self.remove_marks().await;
        let Some(record) = self.ended(step).await? else {
            if self.registry.known(self.migration) == Known::Lost {
                warn!(migration = %self.migration, instance = %step.instance,
                    "it was sent from here, and the journal of that is gone: a guest that \
                     force-complete had paused stays paused");
                return Ok(());
            }
            return self.never_begun(step).await.map(drop);
        };
        if record.paused_by_force_complete && record.was_running {
            let hypervisor = &self.node.hypervisor;
            let presence = hypervisor.presence(step.instance).await.map_err(fault)?;
            if presence == Presence::Present(PowerState::Paused) {
                info!(migration = %self.migration, instance = %step.instance,
                    "resuming the guest that force-complete had paused");
                hypervisor.resume(step.instance).await.map_err(fault)?;
            }
        }
        self.finish_source(step, Ended::Stayed, &record, CleanUp::default())
            .await?;
        Ok(())
    }

    /// The record of a transfer that is over; none if there was none here.
    ///
    /// # Errors
    /// Retryable while the transfer runs.
    async fn ended(&mut self, step: StepRef) -> Result<Option<Box<SourceRecord>>, Fault> {
        self.same_instance(step)?;
        if let Stage::Sending(sending) = &mut self.stage {
            if !sending.is_over() {
                return Err(Fault::not_now("the transfer is still running"));
            }
            match sending.over().await {
                Ok(record) => self.sent(record).await,
                Err(MonitorDied) => self.watch_again(),
            }
        }
        match &self.stage {
            Stage::Ended(record) => Ok(Some(record.clone())),
            Stage::Arriving(_) => Err(Fault::refused("this node is the migration's destination")),
            Stage::Sending(_) => Err(Fault::not_now("the transfer is being looked for")),
            Stage::Leaving(_)
            | Stage::Coming(_)
            | Stage::Transferring(_)
            | Stage::Rebuilding(_) => Err(not_live()),
            Stage::Idle => Ok(None),
        }
    }

    async fn finish_source(
        &mut self,
        step: StepRef,
        how: Ended,
        record: &SourceRecord,
        clean_up: CleanUp,
    ) -> Result<CleanUp, Fault> {
        let job = Some(job_of(record));
        let finished = Finished {
            how,
            job,
            clean_up: clean_up.clone(),
        };
        self.forget(step, finished).await?;
        Ok(clean_up)
    }
}

fn not_live() -> Fault {
    Fault::refused("the migration is a cold one")
}

/// A disk that may be copied, and so removed here afterwards.
fn copied_disk(guest: &Guest, target: &str) -> Result<CopiedDisk, Fault> {
    let disk = guest.disks.iter().find(|disk| disk.target == target);
    let path = disk
        .filter(|d| d.is_copied_when_local())
        .and_then(Disk::local_path);
    let path = path.ok_or_else(|| {
        Fault::refused(format!(
            "{target} is no disk of the guest that could be copied"
        ))
    })?;
    Ok(CopiedDisk {
        target: target.to_owned(),
        path: path.to_owned(),
    })
}
