//! The parts of a transfer that take long: copying disks, handing the guest
//! over, taking it back. Each looks at what is there and does the rest; what
//! libvirt does not answer is asked again from the beginning.

use std::time::Duration;

use drover_model::{
    api::compute::{DiskMove, Outcome, TransferPart},
    error::ErrorClass,
    guest::{Guest, PowerState, Presence},
    migration::{Phase, TransferMode},
};
use tokio::time::{Instant, sleep};

use super::super::{
    destroy::{self, OtherFiles},
    work::{AWAY, IN_SHUTDOWN, LONGEST_AWAY, Worker, done, failed, millis},
};
use crate::{
    hypervisor::{HypervisorError, Mirror},
    journal::TransferRecord,
};

/// Time between two looks at disks that are being copied.
const LOOK: Duration = Duration::from_millis(100);
/// How long after it was last asked a guest that still runs may go off.
const SECOND_THOUGHTS: Duration = Duration::from_secs(5);

/// A part, and what it is of.
pub(in super::super) struct Task {
    pub(super) part: TransferPart,
    pub(super) record: Box<TransferRecord>,
}

/// How an attempt ended; an error of libvirt's may pass.
type Attempt = Result<Outcome, HypervisorError>;

impl Worker {
    /// Does a part, over again while libvirt is away.
    pub(in super::super) async fn transfer(&mut self, task: Task) -> Outcome {
        self.progress.phase = match task.part {
            TransferPart::Copy => Phase::Disk,
            _ => Phase::Finishing,
        };
        if task.part == TransferPart::HandOver {
            // They were copied before.
            let disks = task.record.plan.disks.iter();
            let bytes = disks.map(|disk| disk.data_bytes).sum();
            self.progress.disk.total_bytes = bytes;
            self.progress.disk.processed_bytes = bytes;
        }
        let mut away_since: Option<Instant> = None;
        loop {
            let began = Instant::now();
            let error = match self.attempt(&task).await {
                Ok(outcome) => return outcome,
                Err(error) => error,
            };
            if !matches!(error.class(), ErrorClass::Retryable | ErrorClass::Lost) {
                return failed(&error.to_string());
            }
            if began.elapsed() > LONGEST_AWAY {
                away_since = None;
            }
            // Half of it may be done: only libvirt can tell, however long that takes.
            let may_give_up = task.part == TransferPart::Copy;
            if may_give_up && away_since.get_or_insert(began).elapsed() >= LONGEST_AWAY {
                return failed(&error.to_string());
            }
            self.progress.note = Some(format!("waiting for this node's libvirt: {error}"));
            self.voice.show(&self.progress);
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Outcome::Aborted,
                () = sleep(AWAY) => self.progress.note = None,
            }
        }
    }

    async fn attempt(&mut self, task: &Task) -> Attempt {
        let record = &task.record;
        match (task.part, record.plan.mode) {
            (TransferPart::Copy, TransferMode::Live) => self.mirror_all(record).await,
            (TransferPart::Copy, TransferMode::Cold) => self.place_all(record).await,
            (TransferPart::HandOver, TransferMode::Live) => self.hand_over_live(record).await,
            (TransferPart::HandOver, TransferMode::Cold) => self.hand_over_cold(record).await,
            (TransferPart::TakeBack, _) => self.take_back(record).await,
            (TransferPart::Stop, _) => Ok(failed("stopping is not done here")),
        }
    }

    // ---- copying

    /// Has every disk of a running guest copied, and followed by its copy.
    async fn mirror_all(&mut self, record: &TransferRecord) -> Attempt {
        let moves: Vec<&DiskMove> = record.plan.disks.iter().collect();
        self.mirror(record, &moves).await
    }

    async fn mirror(&mut self, record: &TransferRecord, moves: &[&DiskMove]) -> Attempt {
        let timeout_s = record.options.progress_timeout_s;
        let timeout =
            Duration::from_secs(timeout_s.unwrap_or(self.node.settings.progress_timeout_s));
        let (mut best, mut since) = (0, Instant::now());
        let mut begun = Vec::new();
        loop {
            let (mut ready, mut so_far, mut in_all) = (true, 0_u64, 0_u64);
            for disk in moves {
                let mirror = match begun.contains(&&disk.target) {
                    false => self.mirror_one(record, disk).await?,
                    true => self.mirror_on(record, disk).await?,
                };
                begun.push(&disk.target);
                match mirror {
                    Mirror::Copying {
                        done_bytes,
                        total_bytes,
                    } => {
                        ready = false;
                        so_far = so_far.saturating_add(done_bytes);
                        in_all = in_all.saturating_add(total_bytes.max(disk.data_bytes));
                    }
                    Mirror::Ready | Mirror::Moved => {
                        so_far = so_far.saturating_add(disk.data_bytes);
                        in_all = in_all.saturating_add(disk.data_bytes);
                    }
                }
            }
            self.show_bytes(so_far, in_all);
            if ready {
                return Ok(done());
            }
            if so_far > best {
                (best, since) = (so_far, Instant::now());
            }
            if since.elapsed() >= timeout {
                let message = format!(
                    "no byte of its disks was copied for {} s",
                    timeout.as_secs()
                );
                return Ok(Outcome::Stalled {
                    message,
                    of_guest: false,
                });
            }
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Ok(Outcome::Aborted),
                () = sleep(LOOK) => {}
            }
        }
    }

    /// A copy that was seen under way and is no longer has failed.
    async fn mirror_on(
        &self,
        record: &TransferRecord,
        disk: &DiskMove,
    ) -> Result<Mirror, HypervisorError> {
        let limit = bandwidth(record);
        let hypervisor = &self.node.hypervisor;
        let mirror = hypervisor.mirror_disk(self.instance, disk, limit).await;
        mirror.map_err(|error| match error {
            HypervisorError::Exists(path) => HypervisorError::Failed(format!(
                "copying {} to {path} broke off: is there room, and what does libvirt's log say?",
                disk.target
            )),
            other => other,
        })
    }

    /// What an attempt that broke off left there is the transfer's own.
    async fn mirror_one(
        &self,
        record: &TransferRecord,
        disk: &DiskMove,
    ) -> Result<Mirror, HypervisorError> {
        let hypervisor = &self.node.hypervisor;
        let limit = bandwidth(record);
        match hypervisor.mirror_disk(self.instance, disk, limit).await {
            Err(HypervisorError::Exists(_)) => {
                hypervisor.abandon_mirror(self.instance, disk).await?;
                self.remove_new_one(record, disk).await?;
                hypervisor.mirror_disk(self.instance, disk, limit).await
            }
            other => other,
        }
    }

    /// Puts every disk of a guest that is off at its new place too.
    async fn place_all(&mut self, record: &TransferRecord) -> Attempt {
        let presence = self.node.hypervisor.presence(self.instance).await?;
        if !is_off(presence) {
            let words = format!("the guest is not off on this node ({presence})");
            return Ok(failed(&words));
        }
        let in_all = record.plan.disks.iter().map(|d| d.data_bytes).sum();
        let mut so_far = 0_u64;
        for disk in &record.plan.disks {
            let (node, cancel) = (self.node.clone(), self.cancel.clone());
            tokio::select! {
                biased;
                () = cancel.cancelled() => return Ok(Outcome::Aborted),
                placed = node.hypervisor.place_disk(disk, bandwidth(record)) => placed?,
            }
            so_far = so_far.saturating_add(disk.data_bytes);
            self.show_bytes(so_far, in_all);
        }
        Ok(done())
    }

    // ---- handing over

    /// Networks and metadata first: what can still be refused is cheap to undo.
    /// The disks last: the guest writes to the new ones from then on.
    async fn hand_over_live(&mut self, record: &TransferRecord) -> Attempt {
        let node = self.node.clone();
        let hypervisor = &node.hypervisor;
        let presence = hypervisor.presence(self.instance).await?;
        if !presence.is_active() {
            let lasting = hypervisor.lasting_guest(self.instance).await?;
            return Ok(match lasting {
                // It went off by itself when all was done.
                Some(guest) if is_receivers(&guest, record) => done(),
                _ => failed("the guest went off while it changed hands"),
            });
        }
        for disk in &record.plan.disks {
            if let Mirror::Copying { .. } = self.mirror_one(record, disk).await? {
                return Ok(failed(&format!("the copy of {} broke off", disk.target)));
            }
        }
        let cut = hypervisor.hand_over(self.instance, &record.plan).await?;
        for disk in &record.plan.disks {
            hypervisor.pivot_disk(self.instance, disk).await?;
        }
        Ok(Outcome::Moved {
            downtime_ms: Some(millis(cut)),
            total_ms: None,
        })
    }

    /// Defines the guest as the receiver's and starts it if it ran.
    async fn hand_over_cold(&mut self, record: &TransferRecord) -> Attempt {
        let node = self.node.clone();
        let hypervisor = &node.hypervisor;
        let presence = hypervisor.presence(self.instance).await?;
        if presence.is_active() {
            let lasting = hypervisor.lasting_guest(self.instance).await?;
            return Ok(match lasting {
                Some(guest) if is_receivers(&guest, record) => done(),
                _ => failed("the guest runs: it cannot change hands"),
            });
        }
        if !is_off(presence) {
            let words = format!("the guest is no longer on this node ({presence})");
            return Ok(failed(&words));
        }
        let lasting = hypervisor.lasting_guest(self.instance).await?;
        if !lasting.is_some_and(|guest| is_receivers(&guest, record)) {
            for disk in &record.plan.disks {
                // Somebody may have started the guest since its disks were copied.
                if !hypervisor.is_placed(disk).await? {
                    hypervisor.place_disk(disk, bandwidth(record)).await?;
                }
            }
            let definition = hypervisor.transferred(&record.definition, &record.plan)?;
            hypervisor.define(&definition, None).await?;
        }
        if !record.was_running {
            return Ok(done());
        }
        match hypervisor.start(self.instance).await {
            Ok(()) => Ok(done()),
            // Whatever was said, whether it runs decides (invariant 9).
            Err(error) => match hypervisor.presence(self.instance).await? {
                presence if presence.is_active() => Ok(done()),
                _ => Err(error),
            },
        }
    }

    // ---- taking back

    /// Makes everything be as it was.
    async fn take_back(&mut self, record: &TransferRecord) -> Attempt {
        let presence = self.node.hypervisor.presence(self.instance).await?;
        if presence == Presence::Absent {
            // Somebody took it away: nothing is left to give back. What it may
            // have written to last is not removed.
            if !record.begun.contains(&TransferPart::HandOver) {
                self.remove_new(record).await?;
            }
            self.voice
                .decided("the guest is no longer defined on this node".to_owned());
            return Ok(done());
        }
        if presence.is_active() {
            match record.plan.mode {
                TransferMode::Live => self.take_back_live(record).await?,
                TransferMode::Cold => return self.take_back_from_running(record).await,
            }
        } else {
            self.take_back_off(record, presence).await?;
        }
        self.remove_new(record).await?;
        Ok(done())
    }

    async fn take_back_live(&mut self, record: &TransferRecord) -> Result<(), HypervisorError> {
        let node = self.node.clone();
        let hypervisor = &node.hypervisor;
        if let Some(standing) = &record.standing
            && record.begun.contains(&TransferPart::HandOver)
        {
            hypervisor.hand_back(self.instance, standing).await?;
        }
        for disk in &record.plan.disks {
            let running = hypervisor.guest(self.instance).await?;
            if running.and_then(|g| path_of(&g, &disk.target)).as_ref() != Some(&disk.to) {
                hypervisor.abandon_mirror(self.instance, disk).await?;
                continue;
            }
            let lasting = hypervisor.lasting_guest(self.instance).await?;
            if lasting.and_then(|g| path_of(&g, &disk.target)).as_ref() == Some(&disk.from) {
                // The pivot was cut short: what lasts is the new file, too.
                hypervisor.pivot_disk(self.instance, disk).await?;
            }
            // The old file has not what the guest wrote since: it is made anew.
            let back = disk.reversed();
            if self.mirror(record, &[&back]).await? != done() {
                let words = format!("{} was not copied back", disk.target);
                return Err(HypervisorError::Failed(words));
            }
            hypervisor.pivot_disk(self.instance, &back).await?;
        }
        Ok(())
    }

    /// A guest that was asked to shut down and still runs may yet obey.
    async fn take_back_from_running(&mut self, record: &TransferRecord) -> Attempt {
        let node = self.node.clone();
        let hypervisor = &node.hypervisor;
        if record.begun.contains(&TransferPart::HandOver) {
            let lasting = hypervisor.lasting_guest(self.instance).await?;
            if lasting.is_some_and(|guest| is_receivers(&guest, record)) {
                return Ok(failed(
                    "the guest runs as the receiver's: it is not stopped",
                ));
            }
        }
        let until = Instant::now() + SECOND_THOUGHTS;
        while record.begun.contains(&TransferPart::Stop) {
            let is_going_off = hypervisor.is_going_off(self.instance).await?;
            let presence = hypervisor.presence(self.instance).await?;
            if !presence.is_active() {
                self.take_back_off(record, presence).await?;
                break;
            }
            let runs = presence == Presence::Present(PowerState::Running);
            match Instant::now() < until {
                true if is_going_off || runs => sleep(LOOK).await,
                false if is_going_off => return Ok(failed(IN_SHUTDOWN)),
                _ => break,
            }
        }
        self.remove_new(record).await?;
        Ok(done())
    }

    async fn take_back_off(
        &mut self,
        record: &TransferRecord,
        presence: Presence,
    ) -> Result<(), HypervisorError> {
        let node = self.node.clone();
        let hypervisor = &node.hypervisor;
        let handed = record.begun.contains(&TransferPart::HandOver);
        if !is_off(presence) {
            let words = format!("the guest is not off on this node ({presence})");
            return Err(HypervisorError::WrongState(words));
        }
        if handed {
            let lasting = hypervisor.lasting_guest(self.instance).await?;
            for disk in &record.plan.disks {
                let path = lasting.as_ref().and_then(|g| path_of(g, &disk.target));
                let back = disk.reversed();
                // It may have run on it.
                if path.as_deref() == Some(&disk.to) && !hypervisor.is_placed(&back).await? {
                    hypervisor.place_disk(&back, bandwidth(record)).await?;
                }
            }
            hypervisor.define(&record.definition, None).await?;
        }
        let was_stopped = record.begun.contains(&TransferPart::Stop);
        if record.was_running && was_stopped {
            hypervisor.start(self.instance).await?;
        }
        Ok(())
    }

    /// What the transfer made goes, if the guest is seen to be on its old disks.
    async fn remove_new(&mut self, record: &TransferRecord) -> Result<(), HypervisorError> {
        for disk in &record.plan.disks {
            self.remove_new_one(record, disk).await?;
        }
        Ok(())
    }

    async fn remove_new_one(
        &self,
        record: &TransferRecord,
        disk: &DiskMove,
    ) -> Result<(), HypervisorError> {
        let hypervisor = &self.node.hypervisor;
        let paths = [disk.to.clone(), disk.from.clone()];
        let (now, lasting, facts) = tokio::try_join!(
            hypervisor.guest(self.instance),
            hypervisor.lasting_guest(self.instance),
            hypervisor.file_facts(&paths)
        )?;
        let exists = |path: &str| facts.iter().any(|fact| fact.path == path && fact.exists);
        if !exists(&disk.to) {
            return Ok(());
        }
        let guests: Vec<Guest> = now.into_iter().chain(lasting).collect();
        let pair = [(&*disk.to, &*disk.from)];
        let on_new = |guest: &Guest| guest.disks.iter().any(|d| d.local_path() == Some(&disk.to));
        // It may be on others than its old disks from its next start on.
        let never_on_new =
            !record.begun.contains(&TransferPart::HandOver) && !guests.iter().any(on_new);
        let proof = match guests.is_empty() || never_on_new {
            false => OtherFiles::used(&guests, pair, exists),
            true => OtherFiles::never_handed_over(record, pair, exists),
        };
        match proof.covers(&disk.to) {
            true => destroy::remove(&self.node, &disk.to, &proof).await,
            false => Err(HypervisorError::Failed(format!(
                "{} is left: the guest was not seen to be on {}",
                disk.to, disk.from
            ))),
        }
    }
}

pub(super) fn is_off(presence: Presence) -> bool {
    matches!(presence, Presence::Present(state) if !state.is_active())
}

fn bandwidth(record: &TransferRecord) -> Option<u64> {
    let mib_s = record.options.bandwidth_mib_s?;
    Some(mib_s.saturating_mul(1 << 20))
}

/// The local file of a guest's disk.
fn path_of(guest: &Guest, target: &str) -> Option<String> {
    let disk = guest.disks.iter().find(|disk| disk.target == target)?;
    disk.local_path().map(str::to_owned)
}

/// Whether a guest's lasting definition is the receiver's in all.
fn is_receivers(guest: &Guest, record: &TransferRecord) -> bool {
    let plan = &record.plan;
    let disks = plan.disks.iter();
    let mut there = disks.map(|d| path_of(guest, &d.target).as_deref() == Some(&d.to));
    guest.project == plan.project.as_str() && there.all(|there| there)
}
