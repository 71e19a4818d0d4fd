//! Steering and watching a transfer from another thread.

use std::{
    sync::{
        Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{
    protocol::CHUNK,
    sync::{locked, wait},
};

/// Smallest chunk under a limit, bytes.
const LEAST_CHUNK: u64 = 64 * 1024;
/// How many chunks a second a limit should leave, so that it does not come in bursts.
const CHUNKS_A_SECOND: u64 = 10;

/// Cancels, limits and watches one call of [`send`](crate::send()).
#[derive(Debug, Default)]
pub struct Control {
    cancelled: AtomicBool,
    gate: Mutex<()>,
    changed: Condvar,
    /// Bytes a second; zero is no limit.
    limit: AtomicU64,
    total: AtomicU64,
    done: AtomicU64,
    reused: AtomicU64,
    sent: AtomicU64,
    reconnects: AtomicU64,
}

/// How far a transfer is. No number ever runs backwards.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes of data in all files; zero until they were looked through.
    pub total_bytes: u64,
    /// Of these, how many are verified at the destination.
    pub done_bytes: u64,
    /// Of these, how many were there already and did not travel.
    pub reused_bytes: u64,
    /// How often the connection had to be made again.
    pub reconnects: u64,
}

impl Control {
    /// One that does not limit.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends the transfer, within 200 ms. Cannot be taken back.
    pub fn cancel(&self) {
        self.cancelled.store(true, Relaxed);
        drop(locked(&self.gate));
        self.changed.notify_all();
    }

    /// Whether it was cancelled.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Relaxed)
    }

    /// Limits the bandwidth, bytes a second, from now on. None and zero: no limit.
    pub fn set_limit(&self, limit: Option<u64>) {
        self.limit.store(limit.unwrap_or(0), Relaxed);
        drop(locked(&self.gate));
        self.changed.notify_all();
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        // In this order: what is done is never seen before what it is part of.
        let reused_bytes = self.reused.load(Relaxed);
        let done_bytes = self.done.load(Relaxed).max(reused_bytes);
        Progress {
            total_bytes: self.total.load(Relaxed).max(done_bytes),
            done_bytes,
            reused_bytes,
            reconnects: self.reconnects.load(Relaxed),
        }
    }

    /// Sleeps, less if something was changed meanwhile.
    pub(crate) fn sleep(&self, time: Duration) {
        let gate = locked(&self.gate);
        if !self.is_cancelled() {
            drop(wait(&self.changed, gate, time));
        }
    }

    pub(crate) fn begin(&self, total: u64) {
        self.total.fetch_max(total, Relaxed);
    }

    /// So much is verified now. Less than before is not shown.
    pub(crate) fn advance(&self, done: u64, reused: u64) {
        self.done.fetch_max(done, Relaxed);
        self.reused.fetch_max(reused, Relaxed);
    }

    pub(crate) fn count_sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Relaxed)
    }

    pub(crate) fn count_reconnect(&self) {
        self.reconnects.fetch_add(1, Relaxed);
    }

    /// How large chunks should be under the limit.
    pub(crate) fn chunk(&self) -> u64 {
        match self.limit.load(Relaxed) {
            0 => CHUNK as u64,
            limit => (limit / CHUNKS_A_SECOND)
                .clamp(LEAST_CHUNK, CHUNK as u64)
                .next_power_of_two(),
        }
    }
}

/// A bucket of tokens that may go into debt by one chunk, and is paid off at the
/// rate of the limit.
pub(crate) struct Bucket {
    debt: u64,
    since: Instant,
}

impl Bucket {
    pub(crate) fn new() -> Self {
        Self {
            debt: 0,
            since: Instant::now(),
        }
    }

    /// Lends so many bytes, or says how long to wait before asking again.
    pub(crate) fn take(&mut self, bytes: u64, control: &Control) -> Result<(), Duration> {
        let now = Instant::now();
        let limit = control.limit.load(Relaxed);
        if limit == 0 {
            (self.debt, self.since) = (0, now);
            return Ok(());
        }
        let earned = now.duration_since(self.since).as_secs_f64() * limit as f64;
        // Rounded down and with it the time, or small payments would be lost.
        let paid = earned as u64;
        if paid > 0 {
            self.debt = self.debt.saturating_sub(paid);
            self.since = now;
        }
        if self.debt == 0 {
            self.debt = bytes;
            return Ok(());
        }
        Err(Duration::from_secs_f64(self.debt as f64 / limit as f64))
    }
}
