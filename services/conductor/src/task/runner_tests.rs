//! What a runner drives, and what it takes up.

use drover_store::Store;

use super::*;
use crate::tests_support::{context, migration};

async fn runner() -> Runner {
    Runner::new(context().await, "ctl", 30, 1, Patience::default())
}

async fn admitted(runner: &Runner) -> Lease {
    let (store, m) = (&runner.context.store, migration());
    let term = runner.term().recorded;
    store.admit(&m, None, None, term).await.unwrap();
    Store::first_lease(m.uuid)
}

async fn until(runner: &Runner, lease: Lease, want: impl Fn(&Migration) -> bool) -> Migration {
    let store = &runner.context.store;
    let mut changes = store.changes();
    let wanted = async {
        loop {
            let m = store.migration(lease.migration).await.unwrap();
            if want(&m) {
                return m;
            }
            let _ = timeout(Duration::from_secs(1), changes.recv()).await;
        }
    };
    let wanted = timeout(Duration::from_secs(60), wanted).await;
    wanted.expect("what is wanted comes within a minute")
}

#[tokio::test(start_paused = true)]
async fn a_saga_that_panics_is_stuck_with_its_reason_and_goes_on_when_resumed() {
    let runner = runner().await;
    let lease = admitted(&runner).await;
    let panics = async { panic!("on purpose") };
    runner.supervise(lease, runner.term(), panics);
    let m = until(&runner, lease, |m| m.status == MigrationStatus::Stuck).await;
    let why = &m.decisions.last().unwrap().text;
    assert!(why.contains("on purpose"), "{why}");
    while runner.driven() > 0 {
        tokio::task::yield_now().await;
    }
    // Its instance is on no record: whoever takes it up finds out and undoes it.
    runner.resume(lease.migration).await.unwrap();
    let m = until(&runner, lease, |m| m.status.is_final()).await;
    assert_eq!(m.status, MigrationStatus::Failed, "{m:#?}");
}

#[tokio::test(start_paused = true)]
async fn what_is_owned_and_not_driven_is_taken_up_once() {
    let runner = runner().await;
    let lease = admitted(&runner).await;
    runner.take_up().await.unwrap();
    assert_eq!(runner.driven.leases(), [Lease { epoch: 2, ..lease }]);
    // Driven, it is left alone; and by its older lease it is not driven.
    runner.take_up().await.unwrap();
    runner.spawn(lease, runner.term());
    let epochs = runner.driven.leases();
    assert!(epochs.is_empty() || epochs == [Lease { epoch: 2, ..lease }]);
    until(&runner, lease, |m| m.status.is_final()).await;
}
