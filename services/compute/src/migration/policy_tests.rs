//! What the policy decides, over series of samples.

use drover_model::migration::Transfer;
use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;
const TICK_MS: u64 = 500;

fn limits(post_copy: bool) -> Limits {
    Limits {
        max_downtime_ms: 500,
        progress_timeout_ms: 150_000,
        post_copy,
    }
}

/// QEMU's pre-copy as it is: rounds over what was written during the last one.
struct Guest {
    memory: u64,
    link: u64,
    dirty: u64,
    left: u64,
    dirtied: u64,
    sample: JobSample,
}

impl Guest {
    /// A guest of so many MiB that writes and sends so many MiB/s.
    fn new(memory: u64, link: u64, dirty: u64) -> Self {
        let sample = JobSample {
            rate_bytes_s: link * MIB,
            dirty_rate_bytes_s: dirty * MIB,
            iteration: 1,
            ..JobSample::default()
        };
        let (memory, link, dirty) = (memory * MIB, link * MIB, dirty * MIB);
        Self {
            memory,
            link,
            dirty,
            left: memory,
            dirtied: 0,
            sample,
        }
    }

    /// Lets it run for a tick; none once what is left fits into the downtime.
    fn tick(&mut self, downtime_ms: u64) -> Option<JobSample> {
        const SLICE_MS: u64 = 10;
        for _ in 0..TICK_MS / SLICE_MS {
            let sent = (self.link / 1000 * SLICE_MS).min(self.left);
            self.left -= sent;
            self.sample.memory.processed_bytes += sent;
            self.dirtied = (self.dirtied + self.dirty / 1000 * SLICE_MS).min(self.memory);
            if self.left == 0 {
                if self.dirtied <= self.link / 1000 * downtime_ms {
                    return None;
                }
                self.left = std::mem::take(&mut self.dirtied);
                self.sample.iteration += 1;
            }
        }
        self.sample.memory.total_bytes = self.memory;
        self.sample.memory.remaining_bytes = self.left;
        Some(self.sample.clone())
    }
}

/// Runs a guest under a policy until it has moved or was decided to the end.
/// Gives the time it took and what was decided.
fn run(guest: &mut Guest, limits: Limits) -> (u64, Vec<Decision>) {
    let mut policy = Policy::new(limits, 0);
    let mut decisions = Vec::new();
    for tick in 1..200_000 {
        let now = tick * TICK_MS;
        let Some(sample) = guest.tick(policy.allowed_downtime_ms()) else {
            return (now, decisions);
        };
        let Some(decision) = policy.judge(now, &sample).decision else {
            continue;
        };
        let last = !matches!(decision, Decision::RaiseDowntime { .. });
        decisions.push(decision);
        if last {
            return (now, decisions);
        }
    }
    panic!("neither moved nor given up: {decisions:?}");
}

#[test]
fn a_guest_that_converges_is_left_alone() {
    let (_, decisions) = run(&mut Guest::new(4096, 1000, 200), limits(true));
    assert_eq!(decisions, vec![]);
}

#[test]
fn one_that_needs_a_little_more_downtime_gets_it() {
    // A round never shrinks below 380 ms worth of dirtied memory.
    let mut guest = Guest::new(1024, 200, 0);
    guest.dirty = 2000 * MIB;
    guest.memory = 76 * MIB;
    let (_, decisions) = run(&mut guest, limits(true));
    let Some(Decision::RaiseDowntime { to_ms, .. }) = decisions.last() else {
        panic!("{decisions:?}")
    };
    assert!((380..=500).contains(to_ms), "{decisions:?}");
}

#[test]
fn one_that_never_converges_is_given_up_and_told_why() {
    let (at_ms, decisions) = run(&mut Guest::new(2048, 180, 210), limits(false));
    let (last, before) = decisions.split_last().unwrap();
    assert!(
        matches!(
            before.last(),
            Some(Decision::RaiseDowntime { to_ms: 500, .. })
        ),
        "{before:?}"
    );
    let Decision::GiveUp {
        why,
        of_guest: true,
    } = last
    else {
        panic!("{last:?}")
    };
    assert!(
        why.contains("the guest dirties 210 MiB/s, the link carries 180 MiB/s"),
        "{why}"
    );
    assert!(at_ms >= 150_000);
}

#[test]
fn or_switched_to_post_copy_if_that_is_allowed() {
    let (at_ms, decisions) = run(&mut Guest::new(2048, 180, 210), limits(true));
    assert!(
        matches!(decisions.last(), Some(Decision::SwitchToPostCopy { .. })),
        "{decisions:?}"
    );
    assert!(at_ms < 150_000, "long before it counts as stalled: {at_ms}");
}

#[test]
fn a_slow_link_is_no_stall() {
    // A first pass of three hours, and then rounds of more than the timeout each.
    let (at_ms, decisions) = run(&mut Guest::new(100 * 1024, 10, 5), limits(true));
    assert_eq!(decisions, vec![]);
    assert!(at_ms > 3 * 3_600_000);
}

#[test]
fn a_dead_link_is_one() {
    let mut guest = Guest::new(1024, 100, 0);
    let mut policy = Policy::new(limits(false), 0);
    let sample = guest.tick(300).unwrap();
    assert_eq!(policy.judge(500, &sample).decision, None);
    assert_eq!(policy.judge(150_000, &sample).decision, None);
    assert!(
        policy.judge(76_000, &sample).note.is_some(),
        "said at half time"
    );
    let Some(Decision::GiveUp {
        why,
        of_guest: false,
    }) = policy.judge(150_500, &sample).decision
    else {
        panic!("must be given up")
    };
    assert_eq!(why, "nothing was sent for 150 s");
    assert_eq!(
        policy.judge(900_000, &sample).decision,
        None,
        "once is enough"
    );
}

#[test]
fn disks_that_are_written_as_fast_as_they_are_copied_are_a_stall() {
    let mut policy = Policy::new(limits(true), 0);
    for tick in 0u64.. {
        let disk = Transfer {
            total_bytes: 1 << 30,
            processed_bytes: tick << 24,
            remaining_bytes: 1 << 29,
        };
        let sample = JobSample {
            disk,
            ..JobSample::default()
        };
        if let Some(decision) = policy.judge(tick * TICK_MS, &sample).decision {
            let Decision::GiveUp {
                why,
                of_guest: true,
            } = decision
            else {
                panic!("{decision:?}")
            };
            assert!(why.starts_with("its disks got no nearer"), "{why}");
            return;
        }
        assert!(tick * TICK_MS <= 150_000);
    }
}

#[test]
fn oscillation_is_no_progress() {
    // The remainder swings to nearly nothing in every round, however often.
    let mut guest = Guest::new(256, 200, 400);
    let (_, decisions) = run(&mut guest, limits(false));
    assert!(
        matches!(decisions.last(), Some(Decision::GiveUp { .. })),
        "{decisions:?}"
    );
}

prop_compose! {
    fn any_sample()(total in 0..1u64 << 40, processed in 0..1u64 << 40, remaining in 0..1u64 << 40,
        disk in 0..1u64 << 40, rate: u64, dirty: u64, iteration in 0..50u64,
        post_copy in proptest::bool::weighted(0.1), throttle in proptest::option::of(0..100u64)) -> JobSample {
        JobSample {
            memory: Transfer { total_bytes: total, processed_bytes: processed, remaining_bytes: remaining },
            disk: Transfer { total_bytes: disk, processed_bytes: disk / 2, remaining_bytes: disk / 2 },
            rate_bytes_s: rate, dirty_rate_bytes_s: dirty, iteration, post_copy,
            throttle_percent: throttle, ..JobSample::default()
        }
    }
}

proptest! {
    /// Whatever is seen: downtime only rises and stays within the budget, and
    /// nothing is decided twice, after the end, or after the switch.
    #[test]
    fn decisions_keep_their_bounds(
        samples in proptest::collection::vec((any_sample(), 0..200_000u64), 1..200),
        max_downtime_ms in 1..2_000u64,
        post_copy: bool,
    ) {
        let limits = Limits { max_downtime_ms, progress_timeout_ms: 150_000, post_copy };
        let mut policy = Policy::new(limits, 0);
        let (mut now, mut switched, mut given_up) = (0, false, false);
        for (sample, passed) in samples {
            now += passed;
            let before = policy.allowed_downtime_ms();
            let judgement = policy.judge(now, &sample);
            if let Some(decision) = judgement.decision {
                prop_assert!(!sample.post_copy && !given_up);
                match decision {
                    Decision::RaiseDowntime { to_ms, .. } => {
                        prop_assert!(to_ms > before && to_ms <= max_downtime_ms && !switched);
                    }
                    Decision::SwitchToPostCopy { .. } => {
                        prop_assert!(post_copy && !switched);
                        switched = true;
                    }
                    Decision::GiveUp { .. } => given_up = true,
                }
            }
            prop_assert!(policy.allowed_downtime_ms() >= before);
        }
    }

    /// A transfer that stands still is given up after the timeout and not
    /// before, whatever was seen of it.
    #[test]
    fn standing_still_ends(samples in proptest::collection::vec(any_sample(), 1..30), post_copy: bool) {
        let mut policy = Policy::new(limits(post_copy), 0);
        let mut now = 0;
        for sample in &samples {
            now += TICK_MS;
            policy.judge(now, sample);
        }
        let mut last = samples.last().cloned().unwrap_or_default();
        last.post_copy = false;
        let mut ended = policy.given_up;
        // At the most a switch to post-copy that does not come stands between.
        for _ in 0..2 * 150_000 / TICK_MS + 2 {
            now += TICK_MS;
            ended |= matches!(policy.judge(now, &last).decision, Some(Decision::GiveUp { .. }));
        }
        prop_assert!(ended);
    }
}
