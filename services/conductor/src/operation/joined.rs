//! A question about a node that many have at the same time, asked once for all who wait.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use drover_model::ids::HostName;
use tokio::sync::Mutex as TurnMutex;

/// Answers to one question, by node. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Joined<T>(Arc<Mutex<BTreeMap<HostName, Arc<Asked<T>>>>>);

/// Of one node.
#[derive(Debug)]
struct Asked<T> {
    /// How often it has begun to be asked.
    begun: AtomicU64,
    /// The last answer, and to which asking; held while it is asked.
    last: TurnMutex<Option<(u64, T)>>,
}

impl<T> Default for Joined<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T> Default for Asked<T> {
    fn default() -> Self {
        Self {
            begun: AtomicU64::new(0),
            last: TurnMutex::new(None),
        }
    }
}

impl<T: Clone> Joined<T> {
    /// An answer that was asked for after this was called: one serves all who wait for
    /// it by then, and nobody who comes later.
    pub(super) async fn ask(&self, host: &HostName, asking: impl Future<Output = T>) -> T {
        let asked = {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            all.entry(host.clone()).or_default().clone()
        };
        let before = asked.begun.load(Ordering::SeqCst);
        let mut last = asked.last.lock().await;
        match &*last {
            Some((asking, answer)) if *asking > before => return answer.clone(),
            _ => {}
        }
        let number = asked.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let answer = asking.await;
        *last = Some((number, answer.clone()));
        answer
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::future::join_all;
    use tokio::time::sleep;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_waits_shares_an_answer_and_who_comes_later_does_not() {
        let (joined, asked) = (Joined::default(), AtomicU64::new(0));
        let host: HostName = "kvm1".parse().unwrap();
        let ask = async || {
            let asking = async {
                sleep(Duration::from_secs(1)).await;
                asked.fetch_add(1, Ordering::SeqCst) + 1
            };
            joined.ask(&host, asking).await
        };
        let late = async || {
            sleep(Duration::from_millis(500)).await;
            ask().await
        };
        let all = join_all((0..100).map(|_| late()));
        let (first, others) = tokio::join!(ask(), all);
        assert_eq!(first, 1);
        assert!(others.iter().all(|answer| *answer == 2), "{others:?}");
        assert_eq!(ask().await, 3);
    }
}
