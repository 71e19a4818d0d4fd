//! What callers do to guests and migrations, each act carried out at one
//! moment, with libvirt's rules for what it refuses.

use std::{collections::BTreeMap, time::Duration};

use drover_model::{
    guest::{Guest, PowerState, Presence},
    ids::{HostName, InstanceId},
};
use tokio::time::Instant;

use super::{
    super::{Event, HypervisorError, Job, JobSample, Result},
    answers::TPM_STATE,
    journey::{Journey, Leg},
    node::{CpuTime, Domain, Manner, Memory, Nature},
    world::World,
};

fn wrong_state<T>(words: impl Into<String>) -> Result<T> {
    Err(HypervisorError::WrongState(words.into()))
}

impl World {
    pub(super) fn job(&self, host: &HostName, id: InstanceId) -> Result<Job> {
        let Some(domain) = self.domain(host, id) else {
            return Err(HypervisorError::NoSuchGuest(id));
        };
        Ok(match self.journey_at(host, id) {
            Some(journey) if journey.from == *host => Job::Migration(journey.sample()),
            Some(journey) => Job::Migration(journey.sample_incoming()),
            // libvirt keeps the job, for a recovery.
            None if domain.lost_its_other_half => Job::Migration(JobSample {
                post_copy: true,
                post_copy_failed: true,
                ..JobSample::default()
            }),
            None => domain.job_besides().map_or(Job::None, Job::Other),
        })
    }

    pub(super) fn completed_job(
        &self,
        host: &HostName,
        id: InstanceId,
    ) -> Result<Option<JobSample>> {
        match self.domain(host, id) {
            Some(domain) => Ok(domain.completed.clone()),
            None => Err(HypervisorError::NoSuchGuest(id)),
        }
    }

    /// The migration that leaves this node with that guest.
    fn outgoing(&self, host: &HostName, id: InstanceId) -> Result<&Journey> {
        if self.domain(host, id).is_none() {
            return Err(HypervisorError::NoSuchGuest(id));
        }
        match self.journeys.get(&id).filter(|j| j.from == *host) {
            Some(journey) => Ok(journey),
            None => wrong_state("domain is not being migrated"),
        }
    }

    /// The same, if it can still be turned round.
    fn revocable(&self, host: &HostName, id: InstanceId) -> Result<&Journey> {
        let journey = self.outgoing(host, id)?;
        let leaving = matches!(
            journey.leg,
            Leg::SwitchOver {
                then_post_copy: true,
                ..
            }
        );
        if journey.is_committed() || leaving {
            return wrong_state("the guest is the destination's already");
        }
        Ok(journey)
    }

    pub(super) fn abort(&mut self, host: &HostName, id: InstanceId, now: Instant) -> Result<()> {
        self.revocable(host, id)?;
        let words = "operation aborted: migration out job: canceled by client";
        self.fail(id, HypervisorError::Aborted(words.to_owned()), now);
        Ok(())
    }

    pub(super) fn sever(&mut self, host: &HostName, id: InstanceId, now: Instant) -> Result<()> {
        if self.revocable(host, id).is_ok() {
            let words = "unable to write to socket: Broken pipe";
            self.fail(id, HypervisorError::Failed(words.to_owned()), now);
        }
        Ok(())
    }

    pub(super) fn start_post_copy(
        &mut self,
        host: &HostName,
        id: InstanceId,
        now: Instant,
    ) -> Result<()> {
        let journey = self.outgoing(host, id)?;
        if !journey.spec.options.post_copy {
            return wrong_state("migration was not started with post-copy allowed");
        }
        match journey.leg {
            Leg::Memory => {
                self.switch_over(id, now, 1, true);
                Ok(())
            }
            Leg::PostCopy { .. }
            | Leg::SwitchOver {
                then_post_copy: true,
                ..
            } => Ok(()),
            _ => wrong_state("memory is not being copied"),
        }
    }

    pub(super) fn pause_for_switch_over(
        &mut self,
        host: &HostName,
        id: InstanceId,
        now: Instant,
    ) -> Result<()> {
        self.revocable(host, id)?;
        if let Some(journey) = self.journeys.get_mut(&id) {
            journey.spec.options.bandwidth_mib_s = None;
        }
        self.stop_for_journey(id, now);
        Ok(())
    }

    pub(super) fn resume(&mut self, host: &HostName, id: InstanceId, now: Instant) -> Result<()> {
        let Some(domain) = self.domain(host, id) else {
            return Err(HypervisorError::NoSuchGuest(id));
        };
        match domain.presence() {
            _ if self.journey_at(host, id).is_some() => wrong_state("domain is being migrated"),
            Presence::Present(PowerState::Running) => Ok(()),
            Presence::Present(PowerState::Paused) if domain.whole => {
                self.start_vcpus(host, id, now);
                Ok(())
            }
            Presence::Present(PowerState::Paused) => {
                wrong_state("domain lost its memory in post-copy")
            }
            Presence::Incoming => wrong_state("domain waits for a migration"),
            _ => wrong_state("domain is not paused"),
        }
    }

    pub(super) fn set_max_downtime(
        &mut self,
        host: &HostName,
        id: InstanceId,
        downtime_ms: u64,
    ) -> Result<()> {
        self.revocable(host, id)?;
        if let Some(journey) = self.journeys.get_mut(&id) {
            journey.precopy.allow_downtime_ms(downtime_ms);
        }
        Ok(())
    }

    pub(super) fn discard_incoming(
        &mut self,
        host: &HostName,
        id: InstanceId,
        now: Instant,
    ) -> Result<()> {
        match self.presence(host, id) {
            Presence::Absent => return Ok(()),
            Presence::Incoming => {}
            Presence::Present(_) => return wrong_state("domain is not waiting for a migration"),
        }
        // The migration that was to arrive fails with its QEMU.
        self.qemu_dies(host, id, now);
        self.remove_incoming(host, id);
        self.node_mut(host).domains.remove(&id);
        Ok(())
    }

    pub(super) fn discard_outgoing(
        &mut self,
        host: &HostName,
        id: InstanceId,
        now: Instant,
    ) -> Result<()> {
        let Some(domain) = self.domain(host, id) else {
            return Ok(());
        };
        let stands_still = domain.presence() == Presence::Present(PowerState::Paused);
        if !domain.left_by_script || !stands_still || self.journey_at(host, id).is_some() {
            return wrong_state("domain was not left by a migration");
        }
        self.end_and_undefine(host, id, now);
        Ok(())
    }

    pub(super) fn discard_half(
        &mut self,
        host: &HostName,
        id: InstanceId,
        now: Instant,
    ) -> Result<()> {
        let Some(domain) = self.domain(host, id) else {
            return Ok(());
        };
        let is_journeys = self
            .journey_at(host, id)
            .is_some_and(|journey| journey.from == *host && journey.is_post_copy());
        match domain.lost_its_other_half || is_journeys {
            true => self.end_and_undefine(host, id, now),
            false => return wrong_state("domain is no half of a post-copy"),
        }
        Ok(())
    }

    fn end_and_undefine(&mut self, host: &HostName, id: InstanceId, now: Instant) {
        self.end_copy(host, id, now);
        self.node_mut(host).domains.remove(&id);
        self.node(host).emit(Event::Guest(id));
    }

    /// Removes a definition; where libvirt cannot keep the state of an emulated TPM, that
    /// as well, if it is in no other files than these.
    pub(super) fn undefine(
        &mut self,
        host: &HostName,
        id: InstanceId,
        expendable: Option<&[String]>,
    ) -> Result<()> {
        match self.presence(host, id) {
            Presence::Absent => Ok(()),
            Presence::Present(PowerState::Shutdown | PowerState::Crashed) => {
                if self.loses_its_tpm(host, id) {
                    self.remove_tpm_state(host, id, expendable)?;
                }
                self.node_mut(host).domains.remove(&id);
                self.node(host).emit(Event::Guest(id));
                Ok(())
            }
            _ => wrong_state("domain is active"),
        }
    }

    fn loses_its_tpm(&self, host: &HostName, id: InstanceId) -> bool {
        let domain = self.domain(host, id);
        !self.inventory(host).keeps_tpm_state()
            && domain.is_some_and(|domain| domain.guest.tpm_goes_with_definition)
    }

    fn remove_tpm_state(
        &mut self,
        host: &HostName,
        id: InstanceId,
        expendable: Option<&[String]>,
    ) -> Result<()> {
        let state = self.storage.paths_under(host, &format!("{TPM_STATE}/{id}"));
        let is_expendable = |path| expendable.is_some_and(|files| files.contains(path));
        if expendable.is_none() || !state.iter().all(is_expendable) {
            return wrong_state("this libvirt would remove the state of its emulated TPM");
        }
        for path in state {
            self.storage.remove(host, &path);
        }
        Ok(())
    }

    /// Puts a new guest on a node, with the files of its drives.
    pub(super) fn add_guest(
        &mut self,
        host: &HostName,
        guest: Guest,
        manner: Manner,
        now: Instant,
    ) {
        let id = guest.id;
        let state = guest.power_state;
        let tokens = self.make_disks(host, &guest);
        let Manner {
            habits,
            notes,
            autostart,
        } = manner;
        self.make_reads(host, &guest);
        let nature = Nature {
            habits,
            notes,
            tokens: tokens.clone(),
            file_tokens: self.make_files(host, &guest),
            reads: self.read_contents(host, &guest),
        };
        self.natures.insert(id, nature);
        let counter = Duration::ZERO;
        self.ledger.born(id, state.is_active(), counter);
        let domain = Domain {
            guest,
            next: None,
            state: PowerState::Paused,
            incoming: false,
            defined_before: false,
            whole: true,
            load: habits.load,
            memory: Memory::at(counter),
            tokens,
            completed: None,
            other_job: None,
            mirrors: BTreeMap::new(),
            left_by_script: false,
            lost_its_other_half: false,
            goes_off_at: None,
            autostart,
            cpu: CpuTime::default(),
        };
        self.node_mut(host).domains.insert(id, domain);
        if state == PowerState::Running {
            self.start_vcpus(host, id, now);
        } else if let Some(domain) = self.domain_mut(host, id) {
            domain.state = state;
        }
    }
}
