//! Work under a lease, and what becomes of it when the lease ends.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use drover_store::Store;
use tokio::time::{advance, sleep};

use super::*;

const LEASE_MS: u64 = 30_000;

fn term() -> Term {
    Term::new(&Clock::from_fn(|| 0), LEASE_MS)
}

fn lease(epoch: i64) -> Lease {
    let migration = "00000000-0000-0000-0000-000000000001".parse().unwrap();
    Lease { migration, epoch }
}

/// Work that counts how often it is polled, once a second.
fn counting(count: &Arc<AtomicU32>) -> impl Future<Output = ()> + Send + 'static {
    let count = count.clone();
    async move {
        loop {
            count.fetch_add(1, Ordering::SeqCst);
            sleep(Duration::from_secs(1)).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_stood_still_longer_than_its_lease_does_nothing_more() {
    let (driven, count) = (Driven::<Lease>::default(), Arc::default());
    driven.begin(lease(1), term(), counting(&count));
    sleep(Duration::from_millis(1500)).await;
    assert_eq!(count.load(Ordering::SeqCst), 2);
    // All of the process stands still: nothing is polled, and then everything is.
    advance(Duration::from_millis(LEASE_MS)).await;
    sleep(Duration::from_secs(5)).await;
    assert_eq!(count.load(Ordering::SeqCst), 2, "it went on");
    assert!(driven.is_empty(), "it is free to be taken up again");
}

#[tokio::test(start_paused = true)]
async fn work_goes_on_while_its_lease_is_renewed_and_ends_when_it_is_another_s() {
    let (driven, count) = (Driven::<Lease>::default(), Arc::default());
    driven.begin(lease(1), term(), counting(&count));
    for _ in 0..10 {
        sleep(Duration::from_secs(20)).await;
        let asked = driven.leases();
        driven.renewed(&asked, &asked, term());
    }
    assert!(count.load(Ordering::SeqCst) >= 200);
    driven.renewed(&[lease(1)], &[], term());
    assert!(driven.is_empty());
    let before = count.load(Ordering::SeqCst);
    sleep(Duration::from_secs(5)).await;
    assert_eq!(count.load(Ordering::SeqCst), before);
}

#[tokio::test(start_paused = true)]
async fn a_newer_lease_ends_older_work_and_an_older_one_ends_nothing() {
    let driven = Driven::<Lease>::default();
    let (old, new): (Arc<AtomicU32>, Arc<AtomicU32>) = Default::default();
    driven.begin(lease(2), term(), counting(&old));
    driven.begin(lease(3), term(), counting(&new));
    driven.begin(lease(2), term(), counting(&old));
    sleep(Duration::from_millis(2500)).await;
    assert!(old.load(Ordering::SeqCst) <= 1);
    assert_eq!(new.load(Ordering::SeqCst), 3);
    assert_eq!(driven.leases(), [lease(3)]);
    // Nor does what was renewed in the meantime, under its old lease, end it.
    driven.renewed(&[lease(2)], &[], term());
    assert_eq!(driven.len(), 1);
}

#[tokio::test]
async fn work_that_panics_is_driven_no_more() {
    let driven = Driven::<Lease>::default();
    let first = Store::first_lease(lease(1).migration);
    driven.begin(first, term(), async { panic!("on purpose") });
    while !driven.is_empty() {
        tokio::task::yield_now().await;
    }
}
