//! For how long this conductor has heard nodes without a break. What it did not
//! hear while it was away, cut off or stopped proves nothing about a node, and
//! neither does a silence that a clock made by jumping.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{app::Context, clock::goes_on_after};

/// Time between two looks.
const LOOK: Duration = Duration::from_secs(2);
/// A look that comes so late means that this process stood still.
const STOOD_STILL: Duration = Duration::from_secs(10);
/// A wall clock that went so much further than time did was set.
const CLOCK_JUMP_MS: u64 = 2_000;

/// Since when this conductor hears. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Hearing(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    since: Instant,
    looked: Instant,
    wall_ms: u64,
    jumped_ms: u64,
}

/// Why what was heard before no longer counts.
#[derive(Debug, PartialEq, Eq)]
enum Break {
    StoodStill,
    ClockSet,
    Deaf,
}

impl Hearing {
    /// From now on.
    pub fn new(now_ms: u64) -> Self {
        let now = Instant::now();
        Self(Arc::new(Mutex::new(State {
            since: now,
            looked: now,
            wall_ms: now_ms,
            jumped_ms: 0,
        })))
    }

    /// For how long, ms.
    pub fn listening_ms(&self) -> u64 {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if now - state.looked >= STOOD_STILL {
            return 0;
        }
        ms(now - state.since)
    }

    /// How far the wall clock was set forward since this conductor started, ms.
    pub fn jumped_ms(&self) -> u64 {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.jumped_ms
    }

    /// Takes in a look: the wall clock, and whether there are nodes and none was
    /// heard of.
    fn look(&self, wall_ms: u64, is_deaf: bool) -> Option<Break> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let passed = now - state.looked;
        let expected_ms = state.wall_ms.saturating_add(ms(passed));
        let broken = if is_deaf {
            Some(Break::Deaf)
        } else if passed >= STOOD_STILL {
            Some(Break::StoodStill)
        } else if wall_ms.abs_diff(expected_ms) > CLOCK_JUMP_MS {
            Some(Break::ClockSet)
        } else {
            None
        };
        if broken.is_some() {
            state.since = now;
        }
        if broken == Some(Break::ClockSet) || is_deaf {
            let ahead_ms = wall_ms.saturating_sub(expected_ms);
            state.jumped_ms = state.jumped_ms.saturating_add(ahead_ms);
        }
        (state.looked, state.wall_ms) = (now, wall_ms);
        broken
    }
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Looks until told to stop.
pub async fn keep(context: Context, stop: CancellationToken) {
    let mut was_deaf = false;
    while goes_on_after(LOOK, &stop).await {
        let nodes = match context.store.nodes().await {
            Ok(nodes) => nodes,
            Err(error) => {
                warn!(%error, "nodes could not be read; tried again soon");
                continue;
            }
        };
        let live = context.liveness();
        let heard = |n: &drover_store::nodes::NodeRow| {
            live.now_ms.saturating_sub(n.heard_at_ms) <= live.down_after_ms
        };
        let is_deaf = !nodes.is_empty() && !nodes.iter().any(heard);
        match context.hearing.look(live.now_ms, is_deaf) {
            Some(Break::Deaf) if !was_deaf => {
                warn!("no node is heard of: this conductor may be the one that is cut off");
            }
            Some(Break::StoodStill) => {
                warn!("this conductor stood still: silence of before proves nothing");
            }
            Some(Break::ClockSet) => {
                warn!("this machine's clock was set: silence of before proves nothing");
            }
            Some(Break::Deaf) | None => {}
        }
        was_deaf = is_deaf;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn only_what_was_heard_without_a_break_counts() {
        let hearing = Hearing::new(1_000_000);
        let pass = |n: u32| tokio::time::advance(SECOND * n);
        pass(2).await;
        assert_eq!(hearing.look(1_002_000, false), None);
        assert_eq!(hearing.listening_ms(), 2000);
        pass(2).await;
        assert_eq!(hearing.look(1_004_000, true), Some(Break::Deaf));
        assert_eq!(hearing.listening_ms(), 0);
        pass(2).await;
        assert_eq!(hearing.look(8_000_000, false), Some(Break::ClockSet));
        pass(2).await;
        assert_eq!(hearing.look(8_002_500, false), None, "clocks are corrected");
        assert_eq!(hearing.listening_ms(), 2000);
        pass(2).await;
        assert_eq!(hearing.look(1_000_000, false), Some(Break::ClockSet));
        pass(10).await;
        assert_eq!(hearing.listening_ms(), 0, "it has not looked since");
        assert_eq!(hearing.look(1_010_000, false), Some(Break::StoodStill));
        pass(1).await;
        assert_eq!(hearing.listening_ms(), 1000);
    }
}
