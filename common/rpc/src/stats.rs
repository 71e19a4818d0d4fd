//! Counters of everything that passes or fails to, for logs and `doctor`.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Live counters; one set per transport, shared by all that use it.
        #[derive(Debug, Default)]
        pub struct RpcStats {
            $($(#[$doc])* pub $name: Counter,)*
        }

        /// The counters' values at one moment.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
        pub struct RpcStatsSnapshot {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl RpcStats {
            /// The values now (each read by itself, so sums may be off by one in flight).
            pub fn snapshot(&self) -> RpcStatsSnapshot {
                RpcStatsSnapshot { $($name: self.$name.get(),)* }
            }
        }
    };
}

counters! {
    /// Requests that were well-formed and not duplicates.
    requests_received,
    /// Handlers that returned a result.
    requests_succeeded,
    /// Handlers that returned a failure, and requests answered with one before a handler.
    requests_failed,
    /// Handlers that panicked (answered as a failure too).
    handler_panics,
    /// Requests recognised by their unique id and not run again.
    duplicates_dropped,
    /// Requests whose caller had given up before a handler was free.
    requests_expired,
    /// Casts that met passing trouble and were put back into their queue.
    casts_requeued,
    /// Casts given up after passing trouble that did not pass; not done.
    casts_lost,
    /// Requests that want a reply and say not where to; not run.
    requests_unanswerable,
    /// Messages that could not be read and were rejected.
    messages_undecodable,
    /// Messages of a content type or compression that is not ours, rejected.
    messages_unsupported,
    /// Messages larger than allowed, rejected.
    messages_oversized,
    /// Replies taken by the broker (heartbeats not counted).
    replies_sent,
    /// Replies given up because the caller's queue is gone or the broker is.
    replies_dropped,
    /// Call-monitor heartbeats sent.
    heartbeats_sent,
    /// Calls started.
    calls_started,
    /// Calls that brought a result.
    calls_succeeded,
    /// Calls answered by a failure.
    calls_failed,
    /// Calls that ended without an answer in time.
    calls_timed_out,
    /// Calls and casts that could not be sent.
    sends_failed,
    /// Casts sent.
    casts_sent,
    /// Replies nobody waits for any more.
    replies_late,
    /// Notifications sent.
    notifications_sent,
    /// Notifications that could not be sent.
    notifications_failed,
    /// Connections to the broker made.
    connections_made,
    /// Connections to the broker lost.
    connections_lost,
    /// Times a consumer had to be set up again on a living connection.
    consumers_rebuilt,
}

/// One monotonic counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
