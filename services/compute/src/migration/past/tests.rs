//! What is remembered of migrations, and for how long.

use drover_model::ids::InstanceId;
use uuid::Uuid;

use super::*;
use crate::journal::StateDisk;

fn past(dir: &tempfile::TempDir) -> Past {
    let journal = Journal::open(dir.path(), &StateDisk::default()).unwrap();
    journal.seen.load().unwrap();
    Past::new(journal).remembering(8, 1_000_000)
}

fn step(n: u128) -> StepRef {
    StepRef {
        migration: MigrationId(Uuid::from_u128(n)),
        instance: InstanceId(Uuid::from_u128(n)),
    }
}

fn files(dir: &tempfile::TempDir) -> usize {
    std::fs::read_dir(dir.path().join("seen")).unwrap().count()
}

#[tokio::test]
async fn what_is_over_does_not_gather_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    for n in 1..40 {
        // Opened again each time: what is on disk is bounded, not what is in memory.
        let past = past(&dir);
        past.enter(step(n), 1, n.try_into().unwrap()).await.unwrap();
        let finished = Finished::with(Ended::TakenBack);
        past.ended(step(n), finished, n.try_into().unwrap())
            .await
            .unwrap();
    }
    assert_eq!(files(&dir), 8);
    let past = past(&dir);
    assert_eq!(past.known(step(1).migration), Known::Nothing);
    let how = Ended::TakenBack;
    assert_eq!(past.known(step(39).migration), Known::Ended { how });
    // What is very old goes too, when something new is written.
    past.enter(step(100), 1, 2_000_000).await.unwrap();
    assert_eq!(files(&dir), 1);
}

#[tokio::test]
async fn one_that_was_taken_back_unbegun_may_begin_by_a_later_word_alone() {
    let dir = tempfile::tempdir().unwrap();
    let past = past(&dir);
    let never = || Finished::with(Ended::NeverBegun);
    past.enter(step(1), 1, 1).await.unwrap();
    past.ended(step(1), never(), 1).await.unwrap();
    past.may_begin(step(1), 1).await.unwrap_err();
    past.enter(step(1), 2, 1).await.unwrap();
    past.may_begin(step(1), 1).await.unwrap();
    assert_eq!(past.known(step(1).migration), Known::Nothing);
    for how in [Ended::Left, Ended::Arrived, Ended::Stayed, Ended::TakenBack] {
        let finished = Finished::with(how);
        past.ended(step(2), finished, 1).await.unwrap();
        past.enter(step(2), 9, 1).await.unwrap();
        let again = past.may_begin(step(2), 1).await.unwrap_err();
        assert!(again.message.contains("over"), "{how:?}: {again}");
    }
}
