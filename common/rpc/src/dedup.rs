//! Requests this process has seen, so that each runs once.
//!
//! ```text
//!            first time                    handler accepts, or returns
//! (unknown) ───────────► waiting ──────────────────────────────────► taken
//!     ▲                     │ comes again: its receipt joins,          │ comes again:
//!     │ to be tried again   │ settled when the first one is            │ settled at once
//!     └─────────────────────┘
//! ```
//!
//! The second receipt must wait for the first: acknowledged early, a crash
//! before the journal's commit would lose the request.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::transport::Receipt;

/// Ids remembered: more than can be in hand at once, as only those are delivered
/// again. (oslo.messaging remembers 16.)
const REMEMBERED: usize = 2048;
/// Longest unique id that is remembered, bytes; oslo's have 32.
const LONGEST_ID: usize = 255;

/// The receipts of one request, settled together.
#[derive(Debug, Default)]
pub(crate) struct Receipts(Mutex<Settlement>);

#[derive(Debug)]
enum Settlement {
    Open(Vec<Receipt>),
    Taken,
}

impl Default for Settlement {
    fn default() -> Self {
        Self::Open(Vec::new())
    }
}

impl Receipts {
    pub(crate) fn new(receipt: Receipt) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Settlement::Open(vec![receipt]))))
    }

    /// Acknowledges all of them, now and in future.
    pub(crate) fn take(&self) {
        let before = std::mem::replace(&mut *self.lock(), Settlement::Taken);
        if let Settlement::Open(receipts) = before {
            receipts.iter().for_each(Receipt::acknowledge);
        }
    }

    /// Has all of them come again; false if they were acknowledged before.
    fn requeue(&self) -> bool {
        let mut settlement = self.lock();
        let Settlement::Open(receipts) = &mut *settlement else {
            return false;
        };
        receipts.drain(..).for_each(|receipt| receipt.requeue());
        true
    }

    /// Whether they were acknowledged.
    pub(crate) fn are_taken(&self) -> bool {
        matches!(*self.lock(), Settlement::Taken)
    }

    /// One more delivery of the same request.
    fn join(&self, receipt: Receipt) {
        if let Settlement::Open(receipts) = &mut *self.lock() {
            receipts.push(receipt);
            return;
        }
        receipt.acknowledge();
    }

    fn lock(&self) -> MutexGuard<'_, Settlement> {
        // A list of receipts is never half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The memory of unique ids of one server.
#[derive(Debug, Default)]
pub(crate) struct Seen(Mutex<Memory>);

#[derive(Debug, Default)]
struct Memory {
    known: HashMap<Arc<str>, Known>,
    order: VecDeque<Arc<str>>,
}

#[derive(Debug)]
struct Known {
    /// None while it is on its way here once more.
    receipts: Option<Arc<Receipts>>,
    /// How often it was tried and is to be tried again.
    failures: u32,
}

impl Seen {
    /// Remembers a request. `None` if it is known already: then its receipt
    /// is in the hands of the first one and there is nothing to do.
    pub(crate) fn admit(&self, unique_id: Option<&str>, receipt: Receipt) -> Option<Arc<Receipts>> {
        // Whoever writes longer ones gets no help with redelivery: they are kept.
        let Some(unique_id) = unique_id.filter(|id| id.len() <= LONGEST_ID) else {
            return Some(Receipts::new(receipt));
        };
        let mut memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = memory.known.get_mut(unique_id) {
            let Some(first) = known.receipts.clone() else {
                let again = Receipts::new(receipt);
                known.receipts = Some(again.clone());
                return Some(again);
            };
            drop(memory);
            first.join(receipt);
            return None;
        }
        if memory.order.len() >= REMEMBERED
            && let Some(oldest) = memory.order.pop_front()
        {
            memory.known.remove(&oldest);
        }
        let receipts = Receipts::new(receipt);
        let id: Arc<str> = unique_id.into();
        let known = Known {
            receipts: Some(receipts.clone()),
            failures: 0,
        };
        memory.known.insert(id.clone(), known);
        memory.order.push_back(id);
        Some(receipts)
    }

    /// Counts one more try in vain; gives how many there were. None if nothing is
    /// known of the request.
    pub(crate) fn failed(&self, unique_id: Option<&str>) -> Option<u32> {
        let mut memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = memory.known.get_mut(unique_id?)?;
        known.failures += 1;
        Some(known.failures)
    }

    /// Has a request come again, and be run when it does; false if it was
    /// acknowledged before.
    pub(crate) fn requeue(&self, unique_id: Option<&str>, receipts: &Receipts) -> bool {
        if receipts.are_taken() {
            return false;
        }
        let mut memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = unique_id.and_then(|id| memory.known.get_mut(id)) {
            known.receipts = None;
        }
        drop(memory);
        receipts.requeue()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::{Settler, Verdict};

    #[derive(Default)]
    struct Log(Mutex<Vec<u64>>);
    impl Settler for Log {
        fn settle(&self, tag: u64, verdict: Verdict) {
            assert_eq!(verdict, Verdict::Taken);
            self.0.lock().unwrap().push(tag);
        }
    }

    #[test]
    fn a_redelivery_is_acknowledged_with_the_first_and_never_before() {
        let log = Arc::new(Log::default());
        let receipt = |tag| Receipt::new(log.clone(), tag);
        let seen = Seen::default();
        let first = seen.admit(Some("a"), receipt(1)).unwrap();
        assert!(seen.admit(Some("a"), receipt(2)).is_none());
        assert!(log.0.lock().unwrap().is_empty());
        first.take();
        assert_eq!(*log.0.lock().unwrap(), [1, 2]);
        assert!(seen.admit(Some("a"), receipt(3)).is_none());
        assert_eq!(*log.0.lock().unwrap(), [1, 2, 3]);
        first.take();
        assert_eq!(log.0.lock().unwrap().len(), 3);
    }

    #[test]
    fn requests_without_an_id_always_run_and_memory_is_bounded() {
        let log = Arc::new(Log::default());
        let seen = Seen::default();
        assert!(seen.admit(None, Receipt::new(log.clone(), 1)).is_some());
        assert!(seen.admit(None, Receipt::new(log.clone(), 2)).is_some());
        for tag in 0..REMEMBERED as u64 + 10 {
            let id = format!("id{tag}");
            assert!(
                seen.admit(Some(&id), Receipt::new(log.clone(), tag))
                    .is_some()
            );
        }
        let memory = seen.0.lock().unwrap();
        assert_eq!(memory.known.len(), REMEMBERED);
        assert_eq!(memory.order.len(), REMEMBERED);
    }
}
