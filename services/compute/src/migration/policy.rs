//! Pure judgement over a running transfer: samples in, decisions out. No clock,
//! no I/O; [`super::monitor`] asks and carries out.
//!
//! What counts is **net progress** towards the end (invariant 10), in three
//! kinds, because bytes sent prove nothing for a guest that writes as fast:
//!
//! * disks: fewer bytes left than ever before;
//! * first pass over memory: likewise;
//! * later rounds: a round that began with less to send than any before it.
//!   Within a round the remainder swings between that and nothing, so it is the
//!   rounds' peaks that are compared, never single samples.
//!
//! A round without net progress is *barren*. Barren rounds raise the allowed
//! downtime step by step up to the guest's budget, then lead to post-copy where
//! that is allowed. A transfer is given up when nothing got nearer to the end
//! for the progress timeout *and* either rounds prove barren or nothing at all
//! was sent: one long round over a slow link is no stall.

use super::words::{duration, rate};
use crate::hypervisor::JobSample;

/// Downtime that QEMU allows a migration that nobody tells otherwise, ms.
pub const QEMU_DEFAULT_DOWNTIME_MS: u64 = 300;
/// From the starting downtime to the budget in so many steps.
const DOWNTIME_STEPS: u64 = 4;
/// Barren rounds before post-copy is chosen.
const BARREN_BEFORE_POST_COPY: u32 = 3;
/// Barren rounds before a stall may be called one.
const BARREN_BEFORE_STALL: u32 = 3;
/// A round is progress if it began with at most this share of the best before.
const NET_PROGRESS: (u64, u64) = (95, 100);
/// Less than this nearer to the end is measuring noise, bytes.
const NOISE_BYTES: u64 = 64 << 10;

/// What a transfer may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Downtime it may take at the most, ms.
    pub max_downtime_ms: u64,
    /// No progress for so long is a stall, ms.
    pub progress_timeout_ms: u64,
    /// Whether it may switch to post-copy.
    pub post_copy: bool,
}

impl Limits {
    /// Downtime it begins with, ms: what QEMU would allow anyway (a guest that
    /// converges is no slower than without Drover), or the budget if that is less.
    pub fn start_downtime_ms(&self) -> u64 {
        self.max_downtime_ms.min(QEMU_DEFAULT_DOWNTIME_MS)
    }
}

/// Something to be done about a transfer, and why, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Allow a longer switch-over.
    RaiseDowntime {
        /// How long, ms.
        to_ms: u64,
        /// Why.
        why: String,
    },
    /// Let the guest run on the destination before its memory is there.
    SwitchToPostCopy {
        /// Why.
        why: String,
    },
    /// Stop: it will not end.
    GiveUp {
        /// Why.
        why: String,
        /// Whether it lies with the guest, and not with the link or who is at its end.
        of_guest: bool,
    },
}

/// What a sample leads to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Judgement {
    /// What to do, if anything.
    pub decision: Option<Decision>,
    /// Why it takes long, when it does.
    pub note: Option<String>,
    /// Whether it is getting nearer to its end.
    pub converging: bool,
}

/// What is remembered of a transfer between samples.
#[derive(Debug, Clone)]
pub struct Policy {
    limits: Limits,
    downtime_ms: u64,
    post_copy_asked: bool,
    given_up: bool,
    /// Last time something got nearer to the end, ms.
    progress_at_ms: u64,
    /// Last time any byte was sent, ms.
    sent_at_ms: u64,
    sent_bytes: u64,
    disk_low: u64,
    memory_low: u64,
    throttle_percent: u64,
    round: Round,
    best_peak: u64,
    barren: u32,
}

/// A round over memory that is going on.
#[derive(Debug, Clone, Copy, Default)]
struct Round {
    number: u64,
    peak: u64,
}

impl Policy {
    /// A transfer that begins (or is found running) at `now_ms`. Times are of
    /// any clock that only goes forward.
    pub fn new(limits: Limits, now_ms: u64) -> Self {
        Self {
            limits,
            downtime_ms: limits.start_downtime_ms(),
            post_copy_asked: false,
            given_up: false,
            progress_at_ms: now_ms,
            sent_at_ms: now_ms,
            sent_bytes: 0,
            disk_low: u64::MAX,
            memory_low: u64::MAX,
            throttle_percent: 0,
            round: Round::default(),
            best_peak: u64::MAX,
            barren: 0,
        }
    }

    /// A transfer that somebody else began. What downtime it was allowed is not
    /// known, so it is taken for allowed all of it.
    pub fn attached(limits: Limits, now_ms: u64) -> Self {
        Self {
            downtime_ms: limits.max_downtime_ms,
            ..Self::new(limits, now_ms)
        }
    }

    /// Downtime it may take now, ms.
    pub fn allowed_downtime_ms(&self) -> u64 {
        self.downtime_ms
    }

    /// How long it may bring nothing, ms.
    pub fn progress_timeout_ms(&self) -> u64 {
        self.limits.progress_timeout_ms
    }

    /// Time left to get nearer to the end before it is given up, ms; none where
    /// it cannot be given up any more.
    pub fn patience_ms(&self, now_ms: u64, sample: &JobSample) -> Option<u64> {
        let idle = now_ms.saturating_sub(self.progress_at_ms);
        (!sample.post_copy).then(|| self.limits.progress_timeout_ms.saturating_sub(idle))
    }

    /// What to make of a sample taken at `now_ms`.
    pub fn judge(&mut self, now_ms: u64, sample: &JobSample) -> Judgement {
        let round_ended = self.take_in(now_ms, sample);
        let decision = self.decide(now_ms, sample, round_ended);
        if let Some(decision) = &decision {
            self.note_decision(now_ms, decision);
        }
        Judgement {
            decision,
            note: self.note(now_ms, sample),
            converging: self.barren < 2,
        }
    }

    /// Updates what is remembered; says whether a round over memory ended.
    fn take_in(&mut self, now_ms: u64, sample: &JobSample) -> bool {
        let sent = sample
            .memory
            .processed_bytes
            .saturating_add(sample.disk.processed_bytes);
        if sent > self.sent_bytes {
            self.sent_bytes = sent;
            self.sent_at_ms = now_ms;
        }
        let mut nearer = lowers(
            &mut self.disk_low,
            sample.disk.total_bytes,
            sample.disk.remaining_bytes,
        );
        if sample.iteration <= 1 || sample.post_copy {
            let memory = sample.memory;
            nearer |= lowers(
                &mut self.memory_low,
                memory.total_bytes,
                memory.remaining_bytes,
            );
        }
        // More throttling is a new chance; it ends at 99 percent.
        if let Some(throttle) = sample
            .throttle_percent
            .filter(|t| *t > self.throttle_percent)
        {
            self.throttle_percent = throttle;
            nearer = true;
        }
        let round_ended = self.follow_round(sample, &mut nearer);
        if nearer {
            self.progress_at_ms = now_ms;
        }
        round_ended
    }

    fn follow_round(&mut self, sample: &JobSample, nearer: &mut bool) -> bool {
        if sample.iteration == self.round.number {
            self.round.peak = self.round.peak.max(sample.memory.remaining_bytes);
            return false;
        }
        let ended = std::mem::replace(
            &mut self.round,
            Round {
                number: sample.iteration,
                peak: sample.memory.remaining_bytes,
            },
        );
        // The first pass sends everything and is judged by its own low; samples
        // too far apart may skip rounds, and then the one seen stands for them.
        if ended.number < 2 || sample.post_copy {
            return false;
        }
        if ended.peak <= share(self.best_peak) {
            self.best_peak = ended.peak;
            self.barren = 0;
            *nearer = true;
        } else {
            self.barren = self.barren.saturating_add(1);
        }
        true
    }

    fn decide(&self, now_ms: u64, sample: &JobSample, round_ended: bool) -> Option<Decision> {
        // After the switch the guest is committed: there is nothing to decide.
        if sample.post_copy || self.given_up {
            return None;
        }
        let silent = now_ms.saturating_sub(self.sent_at_ms);
        if silent >= self.limits.progress_timeout_ms {
            // Not to be ended by post-copy: over a link that carries nothing the guest
            // would be lost.
            return Some(Decision::GiveUp {
                why: format!("nothing was sent for {}", duration(silent)),
                of_guest: false,
            });
        }
        if let Some(why) = self.stalled(now_ms, sample) {
            return Some(self.last_resort(sample, why));
        }
        if !round_ended || self.barren == 0 || self.post_copy_asked {
            return None;
        }
        if self.downtime_ms < self.limits.max_downtime_ms {
            return Some(self.raise(sample));
        }
        (self.limits.post_copy && self.barren >= BARREN_BEFORE_POST_COPY).then(|| {
            let why = format!(
                "{} rounds brought it no nearer: {}",
                self.barren,
                race(sample)
            );
            Decision::SwitchToPostCopy { why }
        })
    }

    fn raise(&self, sample: &JobSample) -> Decision {
        let max = self.limits.max_downtime_ms;
        let step = ((max - self.limits.start_downtime_ms()) / DOWNTIME_STEPS).max(1);
        // What a switch-over would have needed, and a tenth more for luck. Samples
        // may miss a round's peak, so less than is allowed proves nothing.
        let needed = time_ms(self.round.peak, sample.rate_bytes_s)
            .max(sample.downtime_ms)
            .filter(|needed| *needed > self.downtime_ms);
        let enough = needed.map_or(0, |n| n.saturating_add(n / 10));
        let to_ms = enough.max(self.downtime_ms + step).min(max);
        let need = needed.map(|n| format!("; a switch-over would take {n} ms now"));
        let why = format!("{}{}", race(sample), need.unwrap_or_default());
        Decision::RaiseDowntime { to_ms, why }
    }

    /// Why this transfer gets no nearer to its end, if it does not.
    fn stalled(&self, now_ms: u64, sample: &JobSample) -> Option<String> {
        let timeout = self.limits.progress_timeout_ms;
        let idle = now_ms.saturating_sub(self.progress_at_ms);
        if idle < timeout {
            return None;
        }
        if sample.iteration < 2 {
            let what = if sample.memory.total_bytes == 0 {
                "its disks"
            } else {
                "it"
            };
            let idle = duration(idle);
            return Some(format!(
                "{what} got no nearer to the end for {idle}: the guest writes as fast as the link carries"
            ));
        }
        (self.barren >= BARREN_BEFORE_STALL).then(|| {
            let (barren, idle) = (self.barren, duration(idle));
            format!(
                "{barren} rounds in {idle} brought it no nearer: {}",
                race(sample)
            )
        })
    }

    /// A stall ends in post-copy if that is allowed and memory is being sent.
    fn last_resort(&self, sample: &JobSample, why: String) -> Decision {
        let possible = self.limits.post_copy && !self.post_copy_asked;
        if possible && sample.memory.processed_bytes > 0 {
            Decision::SwitchToPostCopy { why }
        } else {
            Decision::GiveUp {
                why,
                of_guest: true,
            }
        }
    }

    fn note_decision(&mut self, now_ms: u64, decision: &Decision) {
        match decision {
            Decision::RaiseDowntime { to_ms, .. } => self.downtime_ms = *to_ms,
            Decision::SwitchToPostCopy { .. } => self.post_copy_asked = true,
            Decision::GiveUp { .. } => self.given_up = true,
        }
        // Each is done a bounded number of times, so no stall hides behind them.
        self.progress_at_ms = now_ms;
        self.sent_at_ms = now_ms;
    }

    fn note(&self, now_ms: u64, sample: &JobSample) -> Option<String> {
        if sample.post_copy {
            let silent = now_ms.saturating_sub(self.sent_at_ms);
            let stuck = silent >= self.limits.progress_timeout_ms;
            return stuck.then(|| {
                format!(
                    "nothing was sent for {}; after the switch it cannot be given up",
                    duration(silent)
                )
            });
        }
        if self.barren > 0 || (sample.iteration >= 2 && outruns(sample)) {
            let throttled = sample.throttle_percent.filter(|t| *t > 0);
            let slowed = throttled.map_or(String::new(), |t| format!("; slowed by {t} %"));
            return Some(format!("{}{slowed}", race(sample)));
        }
        // Half-way to giving up is the time to say so.
        let idle = now_ms.saturating_sub(self.progress_at_ms);
        (idle >= self.limits.progress_timeout_ms / 2)
            .then(|| format!("no nearer to the end for {}", duration(idle)))
    }
}

/// Whether the guest writes memory about as fast as the link carries it.
pub fn outruns(sample: &JobSample) -> bool {
    sample.rate_bytes_s > 0 && sample.dirty_rate_bytes_s >= sample.rate_bytes_s / 100 * 95
}

/// Time to send so much at a rate, ms; none if nothing is being sent.
pub fn time_ms(bytes: u64, rate_bytes_s: u64) -> Option<u64> {
    let ms = u128::from(bytes) * 1000;
    let ms = ms.checked_div(u128::from(rate_bytes_s))?;
    Some(u64::try_from(ms).unwrap_or(u64::MAX))
}

fn race(sample: &JobSample) -> String {
    let link = rate(sample.rate_bytes_s);
    match sample.dirty_rate_bytes_s {
        0 => format!("the guest dirties memory as fast as the link carries it ({link})"),
        dirty => format!("the guest dirties {}, the link carries {link}", rate(dirty)),
    }
}

/// Whether `remaining` is a new low; a kind that has not begun has none.
fn lowers(low: &mut u64, total: u64, remaining: u64) -> bool {
    let lower = total > 0 && remaining.saturating_add(NOISE_BYTES) <= *low;
    if lower {
        *low = remaining;
    }
    lower
}

fn share(bytes: u64) -> u64 {
    bytes / NET_PROGRESS.1 * NET_PROGRESS.0
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
