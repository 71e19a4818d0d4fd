//! How long memory takes to move: the arithmetic of pre-copy, free of clocks
//! and of the world.
//!
//! Pre-copy sends all memory once, then again what the guest wrote meanwhile,
//! round by round, until what is left fits into the allowed downtime. It
//! converges when the guest writes more slowly than the road carries.

use std::time::Duration;

/// Downtime QEMU allows a migration that nobody told otherwise, ms.
pub const DEFAULT_DOWNTIME_MS: u64 = 300;
/// First step of auto-converge, percent (QEMU's default).
const THROTTLE_FIRST: u64 = 20;
/// Each further step, percent (QEMU's default).
const THROTTLE_STEP: u64 = 10;
/// Where auto-converge ends, percent (QEMU's default).
const THROTTLE_MAX: u64 = 99;
/// Rounds in a row that must have gone badly before it throttles harder.
const BAD_ROUNDS: u32 = 2;

/// How a guest treats its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryLoad {
    /// All of it, bytes.
    pub total_bytes: u64,
    /// How fast the guest writes anew while it is not throttled, bytes per second.
    pub dirty_bytes_s: u64,
    /// What it writes to at all, bytes: a round cannot leave more behind.
    pub working_set_bytes: u64,
}

/// Bytes that a road of `rate` bytes per second carries in that time.
pub fn bytes_in(rate: u64, time: Duration) -> u64 {
    let bytes = u128::from(rate) * time.as_nanos() / 1_000_000_000;
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// Time that so many bytes take, rounded up, so that after it they are over.
pub fn time_for(bytes: u64, rate: u64) -> Duration {
    let nanos = (u128::from(bytes) * 1_000_000_000).div_ceil(u128::from(rate.max(1)));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// What a stretch of pre-copy came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// Time it took; less than was offered if it met a boundary.
    pub used: Duration,
    /// A round ended.
    pub round_ended: bool,
}

/// A pre-copy on its way.
#[derive(Debug, Clone)]
pub struct Precopy {
    load: MemoryLoad,
    auto_converge: bool,
    allowed_downtime_ms: u64,
    iteration: u64,
    round_bytes: u64,
    round_left: u64,
    round_time: Duration,
    dirtied: u64,
    processed: u64,
    measured_dirty_bytes_s: u64,
    throttle: u64,
    bad_rounds: u32,
    guest_stands: bool,
}

impl Precopy {
    /// A pre-copy that has not sent anything yet.
    pub fn new(load: MemoryLoad, auto_converge: bool, allowed_downtime_ms: u64) -> Self {
        Self {
            load,
            auto_converge,
            allowed_downtime_ms: allowed_downtime_ms.max(1),
            iteration: 1,
            round_bytes: load.total_bytes,
            round_left: load.total_bytes,
            round_time: Duration::ZERO,
            dirtied: 0,
            processed: 0,
            measured_dirty_bytes_s: 0,
            throttle: 0,
            bad_rounds: 0,
            guest_stands: false,
        }
    }

    /// Goes on for `time` at `rate` bytes per second, but not past the end of
    /// the round, nor past `stop_at` bytes sent in all.
    pub fn advance(&mut self, time: Duration, rate: u64, stop_at: Option<u64>) -> Stretch {
        let goal = self.goal(stop_at);
        let used = time.min(time_for(goal, rate));
        let sent = if used == time_for(goal, rate) {
            goal
        } else {
            bytes_in(rate, used).min(goal)
        };
        self.round_left -= sent;
        self.processed += sent;
        self.round_time += used;
        self.dirtied = (self.dirtied + bytes_in(self.dirty_bytes_s(), used))
            .min(self.load.working_set_bytes.min(self.load.total_bytes));
        let round_ended = self.round_left == 0;
        if round_ended {
            self.end_round();
        }
        Stretch { used, round_ended }
    }

    /// Time until [`Self::advance`] meets its next boundary.
    pub fn until_boundary(&self, rate: u64, stop_at: Option<u64>) -> Duration {
        time_for(self.goal(stop_at), rate)
    }

    fn goal(&self, stop_at: Option<u64>) -> u64 {
        match stop_at {
            Some(total) if total > self.processed => self.round_left.min(total - self.processed),
            _ => self.round_left,
        }
    }

    fn end_round(&mut self) {
        let nanos = self.round_time.as_nanos().max(1);
        let measured = u128::from(self.dirtied) * 1_000_000_000 / nanos;
        self.measured_dirty_bytes_s = u64::try_from(measured).unwrap_or(u64::MAX);
        self.judge_round();
        self.iteration += 1;
        self.round_bytes = self.dirtied;
        self.round_left = self.dirtied;
        self.round_time = Duration::ZERO;
        self.dirtied = 0;
    }

    /// Auto-converge, as QEMU does it: a round that leaves more than half of
    /// what it sent is bad, and two bad ones in a row slow the guest.
    fn judge_round(&mut self) {
        if self.dirtied.saturating_mul(2) <= self.round_bytes {
            self.bad_rounds = 0;
            return;
        }
        self.bad_rounds += 1;
        if self.auto_converge && self.bad_rounds >= BAD_ROUNDS {
            self.bad_rounds = 0;
            self.throttle = match self.throttle {
                0 => THROTTLE_FIRST,
                now => (now + THROTTLE_STEP).min(THROTTLE_MAX),
            };
        }
    }

    /// Whether what is left can be sent within the allowed downtime. To be
    /// asked at the end of a round, when it is known what is left.
    pub fn is_ready(&self, rate: u64) -> bool {
        self.remaining_bytes() == 0 || self.expected_downtime_ms(rate) <= self.allowed_downtime_ms
    }

    /// How long the guest would stand if it switched now, ms.
    pub fn expected_downtime_ms(&self, rate: u64) -> u64 {
        u64::try_from(time_for(self.round_left, rate).as_millis()).unwrap_or(u64::MAX)
    }

    /// How fast the guest writes, as it is throttled now, bytes per second.
    fn dirty_bytes_s(&self) -> u64 {
        if self.guest_stands {
            return 0;
        }
        self.load.dirty_bytes_s * (100 - self.throttle) / 100
    }

    /// Allows another downtime, ms.
    pub fn allow_downtime_ms(&mut self, downtime_ms: u64) {
        self.allowed_downtime_ms = downtime_ms.max(1);
    }

    /// The guest stands still from now on and writes nothing.
    pub fn stop_guest(&mut self) {
        self.guest_stands = true;
    }

    /// Counts what was sent outside the rounds (at switch-over, in post-copy).
    pub fn sent_besides(&mut self, bytes: u64) {
        self.processed += bytes;
    }

    /// Leaves what was not sent, or was written since, to post-copy, bytes.
    pub fn take_rest(&mut self) -> u64 {
        let rest = (self.round_left + self.dirtied).min(self.load.total_bytes);
        self.round_left = 0;
        self.dirtied = 0;
        rest
    }

    /// All memory, bytes.
    pub fn total_bytes(&self) -> u64 {
        self.load.total_bytes
    }

    /// Sent so far, what was sent twice counted twice, bytes.
    pub fn processed_bytes(&self) -> u64 {
        self.processed
    }

    /// Known to be left, bytes.
    pub fn remaining_bytes(&self) -> u64 {
        self.round_left
    }

    /// Which round runs, from 1.
    pub fn iteration(&self) -> u64 {
        self.iteration
    }

    /// The guest's writing as the last round measured it, bytes per second; 0
    /// before the first has ended.
    pub fn measured_dirty_bytes_s(&self) -> u64 {
        self.measured_dirty_bytes_s
    }

    /// How much the guest is slowed, percent; none without auto-converge.
    pub fn throttle_percent(&self) -> Option<u64> {
        self.auto_converge.then_some(self.throttle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn load(total_mib: u64, dirty_mib_s: u64) -> MemoryLoad {
        MemoryLoad {
            total_bytes: total_mib * MIB,
            dirty_bytes_s: dirty_mib_s * MIB,
            working_set_bytes: total_mib * MIB,
        }
    }

    /// Runs whole rounds until it is ready, at most `most`; time, if it got there.
    fn run(precopy: &mut Precopy, rate: u64, most: usize) -> Option<Duration> {
        let mut time = Duration::ZERO;
        for _ in 0..most {
            time += precopy.advance(Duration::MAX, rate, None).used;
            if precopy.is_ready(rate) {
                return Some(time);
            }
        }
        None
    }

    #[test]
    fn an_idle_guest_needs_one_round() {
        let mut precopy = Precopy::new(load(1000, 0), false, 300);
        assert_eq!(
            run(&mut precopy, 100 * MIB, 1),
            Some(Duration::from_secs(10))
        );
        assert_eq!(precopy.processed_bytes(), 1000 * MIB);
        assert_eq!(precopy.remaining_bytes(), 0);
    }

    #[test]
    fn rounds_shrink_by_dirty_rate_over_rate() {
        let mut precopy = Precopy::new(load(1000, 50), false, 1);
        let rate = 100 * MIB;
        precopy.advance(Duration::MAX, rate, None);
        assert_eq!(precopy.remaining_bytes(), 500 * MIB);
        assert_eq!(precopy.measured_dirty_bytes_s(), 50 * MIB);
        assert_eq!(precopy.expected_downtime_ms(rate), 5000);
        precopy.advance(Duration::MAX, rate, None);
        assert_eq!(precopy.remaining_bytes(), 250 * MIB);
        assert_eq!(precopy.iteration(), 3);
        assert!(run(&mut precopy, rate, 20).is_some());
    }

    #[test]
    fn a_guest_that_writes_faster_than_the_road_never_ends() {
        let mut precopy = Precopy::new(load(1000, 120), false, 300);
        assert_eq!(run(&mut precopy, 100 * MIB, 1000), None);
        assert_eq!(
            precopy.remaining_bytes(),
            1000 * MIB,
            "bounded by its memory"
        );
    }

    #[test]
    fn a_longer_downtime_lets_it_end() {
        let mut precopy = Precopy::new(load(1000, 120), false, 300);
        assert_eq!(run(&mut precopy, 100 * MIB, 10), None);
        precopy.allow_downtime_ms(10_000);
        assert!(run(&mut precopy, 100 * MIB, 1).is_some());
    }

    #[test]
    fn a_small_working_set_is_all_that_is_sent_again() {
        let mut few = load(1000, 500);
        few.working_set_bytes = 20 * MIB;
        let mut precopy = Precopy::new(few, false, 300);
        assert!(run(&mut precopy, 100 * MIB, 1).is_some());
        assert_eq!(precopy.remaining_bytes(), 20 * MIB);
    }

    #[test]
    fn auto_converge_slows_a_guest_until_it_fits() {
        let mut precopy = Precopy::new(load(1000, 120), true, 300);
        assert_eq!(precopy.throttle_percent(), Some(0));
        run(&mut precopy, 100 * MIB, 2);
        assert_eq!(precopy.throttle_percent(), Some(20));
        assert!(run(&mut precopy, 100 * MIB, 100).is_some());
        assert!(precopy.throttle_percent() <= Some(99));
    }

    #[test]
    fn a_guest_that_stands_writes_nothing() {
        let mut precopy = Precopy::new(load(1000, 200), false, 1);
        precopy.advance(Duration::from_secs(1), 100 * MIB, None);
        precopy.stop_guest();
        assert!(run(&mut precopy, 100 * MIB, 2).is_some());
        assert_eq!(
            precopy.processed_bytes(),
            1200 * MIB,
            "all, and the first second's"
        );
    }

    #[test]
    fn stretches_add_up_to_the_whole() {
        let rate = 100 * MIB;
        let mut whole = Precopy::new(load(1000, 50), false, 300);
        whole.advance(Duration::from_secs(4), rate, None);
        let mut parts = Precopy::new(load(1000, 50), false, 300);
        for _ in 0..400 {
            parts.advance(Duration::from_millis(10), rate, None);
        }
        assert_eq!(parts.remaining_bytes(), whole.remaining_bytes());
        assert_eq!(parts.take_rest(), whole.take_rest());
    }

    #[test]
    fn it_stops_where_it_was_told() {
        let mut precopy = Precopy::new(load(1000, 50), false, 300);
        let stretch = precopy.advance(Duration::MAX, 100 * MIB, Some(300 * MIB));
        assert_eq!(stretch.used, Duration::from_secs(3));
        assert!(!stretch.round_ended);
        assert_eq!(precopy.processed_bytes(), 300 * MIB);
        let stretch = precopy.advance(Duration::MAX, 100 * MIB, Some(300 * MIB));
        assert!(stretch.round_ended, "a boundary behind it holds nothing up");
    }

    #[test]
    fn post_copy_takes_what_is_left_and_what_was_rewritten() {
        let mut precopy = Precopy::new(load(1000, 50), false, 300);
        precopy.advance(Duration::from_secs(2), 100 * MIB, None);
        assert_eq!(precopy.take_rest(), 900 * MIB);
        assert_eq!(precopy.remaining_bytes(), 0);
    }
}
