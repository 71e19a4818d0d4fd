//! One migration on its way through time: which phase, how far, and at which
//! boundary something has to happen. What then happens to the nodes is
//! [`super::world`]'s.
//!
//! ```text
//! setup ─► disk ─► memory ─┬─► switch-over ────────────────► finish ─► (end)
//!                          └─► switch-over ─► post-copy ─►┘
//! ```
//! The end of switch-over is the commit: before it the guest belongs to the
//! source, after it to the destination.

use std::time::Duration;

use drover_model::{
    ids::{HostName, InstanceId},
    migration::Transfer,
};
use tokio::{sync::watch, time::Instant};

use super::{
    super::{JobSample, MigrateSpec, Result},
    script::{At, Fault, MigrationScript},
    transfer::{DEFAULT_DOWNTIME_MS, MemoryLoad, Precopy, bytes_in, time_for},
};

/// Connecting and starting the destination's QEMU.
const SETUP: Duration = Duration::from_millis(200);
/// Sending the devices' state while the guest stands.
const DEVICE_STATE: Duration = Duration::from_millis(20);
/// Telling the source, and tidying it.
const FINISH: Duration = Duration::from_millis(50);
/// How long two libvirtds that do not hear each other wait (libvirt: 5 s × 6).
const KEEPALIVE: Duration = Duration::from_secs(30);

/// How `migrate` ended, once it has, and how much later its caller hears of it.
pub(super) type Outcome = Option<(Result<()>, Duration)>;

/// Where it stands.
#[derive(Debug)]
pub(super) enum Leg {
    /// The destination gets ready.
    Setup { left: Duration },
    /// Disks are copied.
    Disk,
    /// Memory is copied while the guest runs.
    Memory,
    /// The guest stands.
    SwitchOver {
        left: Duration,
        then_post_copy: bool,
    },
    /// The guest runs on the destination, memory follows.
    PostCopy { total: u64, left: u64 },
    /// The guest runs on the destination; the source is to learn of it.
    Finish { left: Duration },
}

/// Something has to happen to the world.
#[derive(Debug)]
pub(super) enum Boundary {
    /// A script's moment has come.
    Scripted(Fault),
    /// The destination waits.
    Ready,
    /// The disks are copied.
    DisksCopied,
    /// A round over memory ended; the last one, if what is left is small enough.
    Round { last: bool },
    /// The guest is to go on at the destination.
    Commit,
    /// Post-copy has all memory.
    Whole,
    /// The source knows.
    Finished,
    /// The two nodes have not heard each other for too long.
    ConnectionDied,
}

/// A migration.
#[derive(Debug)]
pub(super) struct Journey {
    pub(super) id: InstanceId,
    pub(super) from: HostName,
    pub(super) to: HostName,
    pub(super) spec: MigrateSpec,
    pub(super) leg: Leg,
    pub(super) precopy: Precopy,
    pub(super) disk: Transfer,
    pub(super) scripts: Vec<MigrationScript>,
    /// Whether the guest ran when it began, and so has to run when it is over.
    pub(super) guest_ran: bool,
    /// When the guest was stopped, if it is.
    pub(super) stopped_at: Option<Instant>,
    pub(super) downtime: Option<Duration>,
    pub(super) stalled: bool,
    pub(super) report_late: Duration,
    pub(super) leave_incoming: bool,
    pub(super) leave_paused: bool,
    pub(super) leave_stale_copy: bool,
    pub(super) keep_definition: bool,
    /// Where its caller waits.
    pub(super) outcome: watch::Sender<Outcome>,
    started: Instant,
    settled: Instant,
    cut_since: Option<Instant>,
    rate: u64,
}

impl Journey {
    pub(super) fn new(
        spec: MigrateSpec,
        (from, to): (HostName, HostName),
        load: MemoryLoad,
        disk_bytes: u64,
        now: Instant,
    ) -> Self {
        let downtime_ms = spec.initial_downtime_ms.unwrap_or(DEFAULT_DOWNTIME_MS);
        Self {
            id: spec.instance,
            from,
            to,
            leg: Leg::Setup { left: SETUP },
            precopy: Precopy::new(load, spec.options.auto_converge, downtime_ms),
            disk: Transfer {
                total_bytes: disk_bytes,
                processed_bytes: 0,
                remaining_bytes: disk_bytes,
            },
            spec,
            scripts: Vec::new(),
            guest_ran: false,
            stopped_at: None,
            downtime: None,
            stalled: false,
            report_late: Duration::ZERO,
            leave_incoming: false,
            leave_paused: false,
            leave_stale_copy: false,
            keep_definition: false,
            outcome: watch::Sender::new(None),
            started: now,
            settled: now,
            cut_since: None,
            rate: 0,
        }
    }

    /// Up to when it has been carried forward.
    pub(super) fn settled(&self) -> Instant {
        self.settled
    }

    /// Whether the guest belongs to the destination already.
    pub(super) fn is_committed(&self) -> bool {
        matches!(self.leg, Leg::PostCopy { .. } | Leg::Finish { .. })
    }

    /// Whether the guest runs on the destination, and its memory follows.
    pub(super) fn is_post_copy(&self) -> bool {
        matches!(self.leg, Leg::PostCopy { .. })
    }

    /// Carries it on to `now`, but not past a boundary. `rate` is what the road
    /// carries, bytes per second; none while it is cut.
    pub(super) fn advance(&mut self, now: Instant, rate: Option<u64>) -> Option<Boundary> {
        let Some(rate) = rate.filter(|_| !self.stalled) else {
            return self.stand(now, rate.is_none());
        };
        self.cut_since = None;
        self.rate = rate;
        loop {
            if let Some(fault) = self.take_due_script() {
                return Some(Boundary::Scripted(fault));
            }
            let time = now - self.settled;
            let (used, boundary) = self.go(time, rate);
            self.settled += used;
            if boundary.is_some() {
                return boundary;
            }
            if used == time {
                return self.take_due_script().map(Boundary::Scripted);
            }
        }
    }

    /// Nothing moves.
    fn stand(&mut self, now: Instant, cut: bool) -> Option<Boundary> {
        let since = *self.cut_since.get_or_insert(self.settled);
        self.settled = now;
        self.rate = 0;
        if !cut {
            self.cut_since = None;
            return None;
        }
        // Post-copy cannot go back: it waits for the link to be mended.
        let waits = matches!(self.leg, Leg::PostCopy { .. });
        (!waits && now - since >= KEEPALIVE).then_some(Boundary::ConnectionDied)
    }

    fn go(&mut self, time: Duration, rate: u64) -> (Duration, Option<Boundary>) {
        let stop_at = self.next_script_bytes();
        match &mut self.leg {
            Leg::Setup { left } => wait(left, time, Boundary::Ready),
            Leg::SwitchOver { left, .. } => wait(left, time, Boundary::Commit),
            Leg::Finish { left } => wait(left, time, Boundary::Finished),
            Leg::Disk => {
                let left = self.disk.remaining_bytes;
                let goal = match stop_at {
                    Some(at) if at > self.disk.processed_bytes => at - self.disk.processed_bytes,
                    _ => left,
                };
                let (used, sent) = send(goal.min(left), time, rate);
                self.disk.processed_bytes += sent;
                self.disk.remaining_bytes -= sent;
                let done = self.disk.remaining_bytes == 0;
                (used, done.then_some(Boundary::DisksCopied))
            }
            Leg::Memory => {
                let stretch = self.precopy.advance(time, rate, stop_at);
                let last = self.precopy.is_ready(rate);
                let boundary = stretch.round_ended.then_some(Boundary::Round { last });
                (stretch.used, boundary)
            }
            Leg::PostCopy { total, left } => {
                let sent_before = *total - *left;
                let goal = match stop_at {
                    Some(at) if at > sent_before => at - sent_before,
                    _ => *left,
                };
                let (used, sent) = send(goal.min(*left), time, rate);
                *left -= sent;
                let done = *left == 0;
                self.precopy.sent_besides(sent);
                (used, done.then_some(Boundary::Whole))
            }
        }
    }

    /// Time until [`Self::advance`] has a boundary to report, if things stay as
    /// they are; none if nothing will happen by itself.
    pub(super) fn until_boundary(&self, rate: Option<u64>) -> Option<Duration> {
        let Some(rate) = rate else {
            let stood = self.cut_since.map_or(Duration::ZERO, |t| self.settled - t);
            let waits = matches!(self.leg, Leg::PostCopy { .. });
            return (!waits).then(|| KEEPALIVE.saturating_sub(stood));
        };
        if self.stalled {
            return None;
        }
        let stop_at = self.next_script_bytes();
        let bytes = |left: u64, sent: u64| match stop_at {
            Some(at) if at > sent => time_for(left.min(at - sent), rate),
            _ => time_for(left, rate),
        };
        Some(match &self.leg {
            Leg::Setup { left } | Leg::SwitchOver { left, .. } | Leg::Finish { left } => *left,
            Leg::Disk => bytes(self.disk.remaining_bytes, self.disk.processed_bytes),
            Leg::Memory => self.precopy.until_boundary(rate, stop_at),
            Leg::PostCopy { total, left } => bytes(*left, *total - *left),
        })
    }

    /// Bytes sent in this leg at which the next script's moment comes.
    fn next_script_bytes(&self) -> Option<u64> {
        self.scripts
            .iter()
            .filter_map(|s| self.bytes_of(s.at))
            .min()
    }

    fn bytes_of(&self, at: At) -> Option<u64> {
        match (at, &self.leg) {
            (At::Disk(percent), Leg::Disk) => Some(part(self.disk.total_bytes, percent)),
            (At::Memory(percent), Leg::Memory) if self.precopy.iteration() == 1 => {
                Some(part(self.precopy.total_bytes(), percent))
            }
            (At::PostCopy(percent), Leg::PostCopy { total, .. }) => Some(part(*total, percent)),
            _ => None,
        }
    }

    fn is_due(&self, at: At) -> bool {
        match (at, &self.leg) {
            (At::Start, Leg::Disk | Leg::Memory)
            | (At::SwitchOver, Leg::SwitchOver { .. })
            | (At::Finish, Leg::Finish { .. }) => true,
            (At::Disk(_), Leg::Disk) => self.bytes_of(at) <= Some(self.disk.processed_bytes),
            // A round that is over has passed every part of it.
            (At::Memory(_), Leg::Memory) => self
                .bytes_of(at)
                .is_none_or(|b| b <= self.precopy.processed_bytes()),
            (At::Round(n), Leg::Memory) => self.precopy.iteration() >= n,
            (At::PostCopy(_), Leg::PostCopy { total, left }) => {
                self.bytes_of(at) <= Some(*total - *left)
            }
            _ => false,
        }
    }

    fn take_due_script(&mut self) -> Option<Fault> {
        let due = self.scripts.iter().position(|s| self.is_due(s.at))?;
        Some(self.scripts.remove(due).fault)
    }

    /// The guest stands from `self.settled` on; what is left of it follows.
    pub(super) fn enter_switch_over(&mut self, rate: u64, then_post_copy: bool) {
        let rest = if then_post_copy {
            0
        } else {
            self.precopy.take_rest()
        };
        self.precopy.sent_besides(rest);
        self.leg = Leg::SwitchOver {
            left: DEVICE_STATE + time_for(rest, rate),
            then_post_copy,
        };
    }

    /// The guest goes on at the destination.
    pub(super) fn enter_commit(&mut self, then_post_copy: bool) {
        self.leg = if then_post_copy {
            let rest = self.precopy.take_rest();
            Leg::PostCopy {
                total: rest,
                left: rest,
            }
        } else {
            Leg::Finish { left: FINISH }
        };
    }

    /// All memory is there.
    pub(super) fn enter_finish(&mut self) {
        self.leg = Leg::Finish { left: FINISH };
    }

    /// What libvirt would say of it at the source.
    pub(super) fn sample(&self) -> JobSample {
        let memory_began = !matches!(self.leg, Leg::Setup { .. } | Leg::Disk);
        let remaining_bytes = match self.leg {
            Leg::PostCopy { left, .. } => left,
            _ => self.precopy.remaining_bytes(),
        };
        let memory = Transfer {
            total_bytes: self.precopy.total_bytes(),
            processed_bytes: self.precopy.processed_bytes(),
            remaining_bytes,
        };
        let expected = self.precopy.expected_downtime_ms(self.rate.max(1));
        JobSample {
            elapsed_ms: millis(self.settled - self.started),
            // As libvirt does it: nothing is known of memory until disks are there.
            memory: if memory_began {
                memory
            } else {
                Transfer::default()
            },
            disk: self.disk,
            rate_bytes_s: if memory_began { self.rate } else { 0 },
            dirty_rate_bytes_s: self.precopy.measured_dirty_bytes_s(),
            iteration: if memory_began {
                self.precopy.iteration()
            } else {
                0
            },
            downtime_ms: match self.downtime {
                Some(measured) => Some(millis(measured)),
                None if memory_began && self.rate > 0 => Some(expected),
                None => None,
            },
            post_copy: self.is_post_copy(),
            post_copy_failed: false,
            throttle_percent: self.precopy.throttle_percent().filter(|_| memory_began),
        }
    }

    /// What libvirt would say of it at the destination while it comes in.
    pub(super) fn sample_incoming(&self) -> JobSample {
        JobSample {
            elapsed_ms: millis(self.settled - self.started),
            ..JobSample::default()
        }
    }

    /// The caller hears of its end; the first thing it is told stands.
    pub(super) fn tell(&self, result: Result<()>) {
        self.outcome.send_if_modified(|outcome| {
            let first = outcome.is_none();
            if first {
                *outcome = Some((result, self.report_late));
            }
            first
        });
    }
}

fn wait(left: &mut Duration, time: Duration, then: Boundary) -> (Duration, Option<Boundary>) {
    let used = time.min(*left);
    *left -= used;
    (used, left.is_zero().then_some(then))
}

fn send(bytes: u64, time: Duration, rate: u64) -> (Duration, u64) {
    let whole = time_for(bytes, rate);
    if time >= whole {
        (whole, bytes)
    } else {
        (time, bytes_in(rate, time).min(bytes))
    }
}

fn part(total: u64, percent: u8) -> u64 {
    total / 100 * u64::from(percent.min(100))
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
