//! Pure: what is shown of a transfer. Shown progress never runs backwards, and
//! a time of arrival is given only while it can be told.

use drover_model::migration::{Phase, Progress, Transfer};

use super::policy::{outruns, time_ms};
use crate::hypervisor::JobSample;

/// What a sample is shown with, apart from the sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Circumstances {
    /// Time since the transfer began, ms.
    pub elapsed_ms: u64,
    /// Downtime it may take, ms.
    pub allowed_downtime_ms: u64,
    /// Whether it is getting nearer to its end.
    pub converging: bool,
    /// Time left to get nearer to the end before it is given up, ms.
    pub patience_ms: Option<u64>,
    /// Why it takes long, when it does.
    pub note: Option<String>,
    /// The guest stands still for the switch-over.
    pub paused: bool,
}

/// The progress of one transfer as it is shown.
#[derive(Debug, Clone)]
pub struct Shown {
    progress: Progress,
    /// The guest's memory, bytes: what is still to come while disks are copied.
    memory_bytes: u64,
    disk_rate_bytes_s: u64,
}

impl Shown {
    /// Nothing has been sent of a guest with so much memory.
    pub fn new(memory_bytes: u64) -> Self {
        Self {
            progress: Progress::default(),
            memory_bytes,
            disk_rate_bytes_s: 0,
        }
    }

    /// What is shown now.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Takes a sample in.
    pub fn take_in(&mut self, sample: &JobSample, around: Circumstances) {
        let before = &self.progress;
        let elapsed_ms = before
            .elapsed_ms
            .max(around.elapsed_ms)
            .max(sample.elapsed_ms);
        let disk = forward(before.disk, sample.disk);
        let passed = elapsed_ms - before.elapsed_ms;
        let moved = disk.processed_bytes - before.disk.processed_bytes;
        if let Some(now) = moved.saturating_mul(1000).checked_div(passed) {
            self.disk_rate_bytes_s = smooth(self.disk_rate_bytes_s, now);
        }
        let phase = before.phase.max(phase(sample, around.paused));
        let rate_bytes_s = match phase {
            Phase::Disk => self.disk_rate_bytes_s,
            _ => sample.rate_bytes_s,
        };
        self.progress = Progress {
            phase,
            memory: forward(before.memory, sample.memory),
            disk,
            rate_bytes_s,
            dirty_rate_bytes_s: sample.dirty_rate_bytes_s,
            iteration: before.iteration.max(sample.iteration),
            expected_downtime_ms: expected_downtime_ms(sample),
            allowed_downtime_ms: Some(around.allowed_downtime_ms),
            eta_ms: self.eta_ms(sample, phase, &around),
            patience_ms: around.patience_ms,
            elapsed_ms,
            note: around.note,
        };
    }

    /// The guest was stopped to change sides. libvirt may answer nothing more until
    /// it is over.
    pub fn switch_over(&mut self) {
        self.progress.phase = self.progress.phase.max(Phase::SwitchOver);
        self.progress.eta_ms = None;
    }

    /// Says why nothing new is known.
    pub fn set_note(&mut self, note: String) {
        self.progress.note = Some(note);
        self.progress.eta_ms = None;
    }

    /// The last progress of a transfer that is over.
    pub fn end(mut self, elapsed_ms: u64, moved: bool) -> Progress {
        let progress = &mut self.progress;
        progress.elapsed_ms = progress.elapsed_ms.max(elapsed_ms);
        progress.eta_ms = None;
        progress.patience_ms = None;
        if moved {
            progress.phase = Phase::Finishing;
            progress.memory.remaining_bytes = 0;
            progress.disk.remaining_bytes = 0;
            progress.note = None;
        }
        self.progress
    }

    /// Time to the end, ms, at what the samples say. None while it would be a guess.
    fn eta_ms(&self, sample: &JobSample, phase: Phase, around: &Circumstances) -> Option<u64> {
        match phase {
            Phase::PostCopy | Phase::SwitchOver => {
                time_ms(sample.memory.remaining_bytes, sample.rate_bytes_s)
            }
            Phase::Memory => memory_eta_ms(sample, around),
            _ => {
                let memory = match sample.memory.total_bytes {
                    0 => self.memory_bytes,
                    _ => sample.memory.remaining_bytes,
                };
                let left = sample.disk.remaining_bytes.saturating_add(memory);
                time_ms(left, self.disk_rate_bytes_s)
            }
        }
    }
}

/// Pre-copy ends when what is left fits into the allowed downtime; until then
/// the guest writes anew part of what is sent.
fn memory_eta_ms(sample: &JobSample, around: &Circumstances) -> Option<u64> {
    let (link, dirty) = (sample.rate_bytes_s, sample.dirty_rate_bytes_s);
    let left = sample.memory.remaining_bytes;
    let fits = u128::from(link) * u128::from(around.allowed_downtime_ms) / 1000;
    let last = left.min(u64::try_from(fits).unwrap_or(u64::MAX));
    if last == left {
        return time_ms(left, link);
    }
    if !around.converging || outruns(sample) {
        return None;
    }
    let before = time_ms(left - last, link.saturating_sub(dirty))?;
    Some(before.saturating_add(time_ms(last, link)?))
}

/// How long the guest would stand still if it switched over now, ms.
fn expected_downtime_ms(sample: &JobSample) -> Option<u64> {
    if sample.post_copy {
        return None;
    }
    let left = sample.memory.remaining_bytes;
    sample
        .downtime_ms
        .or_else(|| match sample.memory.total_bytes {
            0 => None,
            _ => time_ms(left, sample.rate_bytes_s),
        })
}

fn phase(sample: &JobSample, paused: bool) -> Phase {
    let (memory, disk) = (sample.memory, sample.disk);
    // libvirt tells memory's total when its disks are across.
    let before_memory = (memory.total_bytes == 0 && disk.total_bytes > 0)
        || (memory.processed_bytes == 0 && disk.remaining_bytes > 0);
    if sample.post_copy {
        Phase::PostCopy
    } else if paused {
        Phase::SwitchOver
    } else if before_memory {
        Phase::Disk
    } else {
        Phase::Memory
    }
}

fn forward(before: Transfer, now: Transfer) -> Transfer {
    Transfer {
        total_bytes: before.total_bytes.max(now.total_bytes),
        processed_bytes: before.processed_bytes.max(now.processed_bytes),
        remaining_bytes: now.remaining_bytes,
    }
}

fn smooth(before: u64, now: u64) -> u64 {
    match before {
        0 => now,
        _ => before / 4 * 3 + now / 4,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn around(elapsed_ms: u64) -> Circumstances {
        Circumstances {
            elapsed_ms,
            allowed_downtime_ms: 300,
            converging: true,
            patience_ms: Some(1000),
            note: None,
            paused: false,
        }
    }

    fn memory(remaining: u64, rate: u64, dirty: u64) -> JobSample {
        JobSample {
            memory: Transfer {
                total_bytes: 1024 * MIB,
                processed_bytes: MIB,
                remaining_bytes: remaining * MIB,
            },
            rate_bytes_s: rate * MIB,
            dirty_rate_bytes_s: dirty * MIB,
            iteration: 2,
            ..JobSample::default()
        }
    }

    fn eta(sample: &JobSample) -> Option<u64> {
        let mut shown = Shown::new(1024 * MIB);
        shown.take_in(sample, around(1));
        shown.progress().eta_ms
    }

    #[test]
    fn the_eta_knows_that_the_guest_writes_on() {
        assert_eq!(eta(&memory(1030, 100, 0)), Some(10_300));
        // 1000 MiB drain at 50 MiB/s net, the last 30 MiB at full rate.
        assert_eq!(eta(&memory(1030, 100, 50)), Some(20_300));
        assert_eq!(eta(&memory(1030, 100, 96)), None, "does not converge");
        assert_eq!(eta(&memory(30, 100, 200)), Some(300), "fits the downtime");
        assert_eq!(eta(&memory(30, 0, 0)), None, "nothing is being sent");
    }

    #[test]
    fn while_disks_are_copied_memory_is_still_to_come() {
        let mut shown = Shown::new(100 * MIB);
        let mut sample = JobSample::default();
        sample.disk.total_bytes = 1000 * MIB;
        sample.disk.processed_bytes = 100 * MIB;
        sample.disk.remaining_bytes = 900 * MIB;
        shown.take_in(&sample, around(1000));
        assert_eq!(shown.progress().phase, Phase::Disk);
        assert_eq!(shown.progress().rate_bytes_s, 100 * MIB);
        assert_eq!(shown.progress().eta_ms, Some(10_000));
    }

    #[test]
    fn a_moved_guest_has_nothing_left_to_send() {
        let mut shown = Shown::new(0);
        shown.take_in(&memory(30, 100, 0), around(1));
        let last = shown.end(500, true);
        assert_eq!(last.phase, Phase::Finishing);
        assert_eq!(last.memory.remaining_bytes, 0);
        assert_eq!(last.elapsed_ms, 500);
    }

    fn any_transfer() -> impl Strategy<Value = Transfer> {
        (any::<u64>(), any::<u64>(), any::<u64>()).prop_map(|(total, processed, remaining)| {
            Transfer {
                total_bytes: total >> 14,
                processed_bytes: processed >> 14,
                remaining_bytes: remaining >> 14,
            }
        })
    }

    prop_compose! {
        fn any_sample()(memory in any_transfer(), disk in any_transfer(), rate in any::<u64>(),
            dirty in any::<u64>(), iteration in 0..9u64, post_copy: bool, elapsed in 0..1u64 << 40,
            downtime in proptest::option::of(0..10_000u64)) -> JobSample {
            JobSample {
                elapsed_ms: elapsed, memory, disk, rate_bytes_s: rate, dirty_rate_bytes_s: dirty,
                iteration, downtime_ms: downtime, post_copy, ..JobSample::default()
            }
        }
    }

    proptest! {
        /// Whatever a hypervisor says, what is shown never runs backwards.
        #[test]
        fn nothing_shown_runs_backwards(samples in proptest::collection::vec((any_sample(), any::<bool>()), 1..20)) {
            let mut shown = Shown::new(1 << 30);
            let mut before = shown.progress().clone();
            for (i, (sample, paused)) in samples.iter().enumerate() {
                shown.take_in(sample, Circumstances { paused: *paused, ..around(i as u64) });
                let now = shown.progress().clone();
                prop_assert!(now.phase >= before.phase);
                prop_assert!(now.memory.processed_bytes >= before.memory.processed_bytes);
                prop_assert!(now.disk.processed_bytes >= before.disk.processed_bytes);
                prop_assert!(now.memory.total_bytes >= before.memory.total_bytes);
                prop_assert!(now.elapsed_ms >= before.elapsed_ms);
                before = now;
            }
        }
    }
}
