//! What breaks, and what depends on it: migrations that fail, QEMUs and
//! daemons that die, nodes that lose power.

use drover_model::{
    guest::{PowerState, Presence},
    ids::{HostName, InstanceId},
};
use tokio::time::Instant;

use super::{
    super::{Event, HypervisorError},
    journey::{Journey, Leg},
    node::{Domain, Libvirtd},
    script::{End, Fault},
    world::{World, pair},
};

impl World {
    /// Ends a migration that has not committed: the guest is the source's again.
    pub(super) fn fail(&mut self, id: InstanceId, error: HypervisorError, at: Instant) {
        let Some(journey) = self.journeys.get(&id) else {
            return;
        };
        let (from, to) = (journey.from.clone(), journey.to.clone());
        let (ran, leave_paused) = (journey.guest_ran, journey.leave_paused);
        if !journey.leave_incoming {
            self.remove_incoming(&to, id);
        }
        let source = self.domain(&from, id);
        let stands = source.is_some_and(|d| d.state == PowerState::Paused);
        let runs = source.is_some_and(Domain::runs);
        if leave_paused && runs {
            self.stop_vcpus(&from, id, at, PowerState::Paused);
        } else if ran && stands && !leave_paused {
            self.start_vcpus(&from, id, at);
        }
        self.end(id, Err(error));
    }

    /// The waiting QEMU at the destination dies.
    pub(super) fn remove_incoming(&mut self, to: &HostName, id: InstanceId) {
        let Some(domain) = self.domain_mut(to, id).filter(|d| d.incoming) else {
            return;
        };
        if domain.defined_before {
            domain.incoming = false;
            domain.state = PowerState::Shutdown;
        } else {
            self.node_mut(to).domains.remove(&id);
        }
        self.node(to).emit(Event::Guest(id));
    }

    pub(super) fn connection_died(&mut self, id: InstanceId, at: Instant) {
        let words = "operation failed: connection closed due to keepalive timeout";
        let error = HypervisorError::Failed(words.to_owned());
        if self.journeys.get(&id).is_some_and(Journey::is_committed) {
            self.end_unconfirmed(id, error);
        } else {
            self.fail(id, error, at);
        }
    }

    /// A script's fault happens to a migration.
    pub(super) fn apply(&mut self, id: InstanceId, fault: Fault, at: Instant) {
        let Some(journey) = self.journeys.get_mut(&id) else {
            return;
        };
        let ends = (journey.from.clone(), journey.to.clone());
        let host = |end: End| match end {
            End::Source => &ends.0,
            End::Destination => &ends.1,
        };
        match fault {
            Fault::Stall => journey.stalled = true,
            Fault::ReportLate(delay) => journey.report_late = delay,
            Fault::LeaveIncoming => journey.leave_incoming = true,
            Fault::LeavePaused => journey.leave_paused = true,
            Fault::LeaveStaleCopy => journey.leave_stale_copy = true,
            Fault::KeepDefinition => journey.keep_definition = true,
            Fault::LoseCaller => journey.tell(Err(lost())),
            // After the commit there is nothing left that could fail cleanly.
            Fault::Fail(_) if journey.is_committed() => {}
            Fault::Fail(words) => self.fail(id, HypervisorError::Failed(words), at),
            Fault::QemuDies(end) => self.qemu_dies(host(end), id, at),
            Fault::CutLink => {
                self.cut.insert(pair(&ends.0, &ends.1));
            }
            Fault::LibvirtdAway(end) => self.libvirtd_away(host(end)),
            Fault::LibvirtdDies(end) => self.libvirtd_dies(host(end), at),
            Fault::PowerOff(end) => self.power_off(host(end), at),
        }
    }

    /// A QEMU dies, and what depends on it.
    pub(super) fn qemu_dies(&mut self, host: &HostName, id: InstanceId, at: Instant) {
        let Some(journey) = self.journey_at(host, id) else {
            match self.presence(host, id) {
                Presence::Incoming => self.remove_incoming(host, id),
                here if here.is_active() => self.copy_dies(host, id, at),
                _ => {}
            }
            return;
        };
        let at_source = journey.from == *host;
        let to = journey.to.clone();
        let died = "operation failed: domain is no longer running";
        let error = HypervisorError::Failed(died.to_owned());
        match (&journey.leg, at_source) {
            // Its memory has left already.
            (Leg::Finish { .. }, true) => self.finished(id, at),
            (Leg::Finish { .. }, false) => self.guest_dies(host, id, at),
            (Leg::PostCopy { .. }, true) => {
                self.stop_vcpus(&to, id, at, PowerState::Paused);
                self.end_copy(host, id, at);
                self.ledger.ends(id);
                self.end(id, Err(error));
            }
            (Leg::PostCopy { .. }, false) => {
                let from = journey.from.clone();
                self.guest_dies(host, id, at);
                if let Some(half) = self.domain_mut(&from, id) {
                    half.lost_its_other_half = true;
                }
                self.end(id, Err(error));
            }
            (_, true) => {
                self.guest_dies(host, id, at);
                self.fail(id, error, at);
            }
            (_, false) => self.fail(
                id,
                HypervisorError::Failed(
                    "internal error: QEMU unexpectedly closed the monitor".to_owned(),
                ),
                at,
            ),
        }
    }

    /// A copy's QEMU dies, and the guest with it unless it is an old copy.
    fn copy_dies(&mut self, host: &HostName, id: InstanceId, at: Instant) {
        if self.domain(host, id).is_some_and(|d| d.left_by_script) {
            self.end_copy(host, id, at);
        } else {
            self.guest_dies(host, id, at);
        }
    }

    /// A guest is gone with its QEMU.
    fn guest_dies(&mut self, host: &HostName, id: InstanceId, at: Instant) {
        self.ledger.ends(id);
        self.end_copy(host, id, at);
        self.node(host).emit(Event::Guest(id));
    }

    /// A copy's QEMU ends; its definition stays if there is one.
    pub(super) fn end_copy(&mut self, host: &HostName, id: InstanceId, at: Instant) {
        self.stop_vcpus(host, id, at, PowerState::Shutdown);
        let Some(domain) = self.domain_mut(host, id) else {
            return;
        };
        domain.incoming = false;
        domain.whole = true;
        domain.left_by_script = false;
        domain.lost_its_other_half = false;
        domain.mirrors.clear();
        if let Some(next) = domain.next.take() {
            domain.guest = next;
        }
        if !domain.guest.persistent && !domain.defined_before {
            self.node_mut(host).domains.remove(&id);
        }
    }

    fn journeys_of(&self, host: &HostName) -> Vec<(InstanceId, bool)> {
        self.journeys
            .values()
            .filter(|j| j.from == *host || j.to == *host)
            .map(|j| (j.id, j.from == *host))
            .collect()
    }

    /// A libvirtd answers nobody any more.
    pub(super) fn libvirtd_away(&mut self, host: &HostName) {
        self.lose_callers(host);
        let node = self.node_mut(host);
        if node.libvirtd == Libvirtd::Up {
            node.libvirtd = Libvirtd::Away;
            node.emit(Event::Connection { up: false });
        }
    }

    fn lose_callers(&self, host: &HostName) {
        for journey in self.journeys.values().filter(|j| j.from == *host) {
            journey.tell(Err(lost()));
        }
    }

    /// A libvirtd dies, and with it what it was doing.
    pub(super) fn libvirtd_dies(&mut self, host: &HostName, at: Instant) {
        self.libvirtd_away(host);
        self.node_mut(host).libvirtd = Libvirtd::Dead;
        for (id, _) in self.journeys_of(host) {
            let Some(journey) = self.journeys.get(&id) else {
                continue;
            };
            let error = HypervisorError::Failed("Cannot recv data: End of file".to_owned());
            match journey.leg {
                // QEMU carries it on, and the daemons find it when they are back.
                Leg::PostCopy { .. } => {}
                Leg::Finish { .. } => self.end_unconfirmed(id, error),
                _ => self.fail(id, error, at),
            }
        }
    }

    /// A libvirtd answers again.
    pub(super) fn libvirtd_back(&mut self, host: &HostName) {
        let node = self.node_mut(host);
        if node.powered && node.libvirtd != Libvirtd::Up {
            node.libvirtd = Libvirtd::Up;
            node.emit(Event::Connection { up: true });
        }
    }

    /// A node loses power.
    pub(super) fn power_off(&mut self, host: &HostName, at: Instant) {
        self.libvirtd_away(host);
        for (id, is_source) in self.journeys_of(host) {
            self.journey_loses_power(id, is_source, at);
        }
        let node = self.node_mut(host);
        node.powered = false;
        node.libvirtd = Libvirtd::Dead;
        node.probe_ports.clear();
        node.doors.clear();
        node.inboxes.clear();
        let ids: Vec<InstanceId> = node.domains.keys().copied().collect();
        for id in ids {
            self.qemu_dies(host, id, at);
        }
    }

    fn journey_loses_power(&mut self, id: InstanceId, is_source: bool, at: Instant) {
        let Some(journey) = self.journeys.get(&id) else {
            return;
        };
        let to = journey.to.clone();
        let from = journey.from.clone();
        let error = HypervisorError::Failed("Cannot recv data: End of file".to_owned());
        match (&journey.leg, is_source) {
            (Leg::Finish { .. }, true) => {
                self.settle_destination(id);
                // Its definition is on its disk, and there when power is back.
                self.end_copy(&from, id, at);
                self.end(id, Err(lost()));
            }
            (Leg::Finish { .. }, false) => self.end_unconfirmed(id, error),
            (Leg::PostCopy { .. }, true) => self.qemu_dies(&from, id, at),
            (Leg::PostCopy { .. }, false) => self.qemu_dies(&to, id, at),
            (_, true) => self.qemu_dies(&from, id, at),
            (_, false) => self.fail(id, error, at),
        }
    }

    /// Power is back: definitions are there, and nothing runs but what libvirtd
    /// starts by itself.
    pub(super) fn power_on(&mut self, host: &HostName, at: Instant) {
        self.node_mut(host).powered = true;
        let domains = self.node(host).domains.iter();
        let wanted = domains.filter(|(_, d)| d.autostart).map(|(id, _)| *id);
        for id in wanted.collect::<Vec<_>>() {
            // One that does not start is off, as the real one leaves it.
            drop(self.start(host, id, at));
        }
        self.libvirtd_back(host);
    }
}

/// The caller's connection is gone; its migration is not.
fn lost() -> HypervisorError {
    HypervisorError::Lost("internal error: client socket is closed".to_owned())
}
