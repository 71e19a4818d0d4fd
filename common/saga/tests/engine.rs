//! What every saga can rely on, shown on a toy: whatever step fails, whatever
//! is repeated, and wherever the process dies, the world ends either whole or
//! as it was.

#![allow(clippy::unwrap_used)] // all of it is test

use std::{
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use drover_model::error::ErrorClass;
use drover_saga::{
    DriveError, Event, Journal, JournalError, Outcome, Patience, Saga, State, Step, StepError,
    drive, journal::replay,
};
use serde::{Deserialize, Serialize};

const STEPS: [&str; 5] = ["one", "two", "commit", "after", "last"];
const COMMIT: usize = 2;

#[derive(Clone, Default, Serialize, Deserialize)]
struct Data {
    learned: Vec<usize>,
}

/// The world that the toy changes, and the faults it is given.
#[derive(Default)]
struct World {
    /// How often each step has taken effect and was not undone.
    done: Mutex<[bool; 5]>,
    ran: Mutex<Vec<usize>>,
    fail: Option<(usize, ErrorClass)>,
    /// What the fault is from its second time on, if something else.
    later: Option<ErrorClass>,
    /// How often the fault strikes before it heals; 0 is for ever.
    heals_after: usize,
    struck: AtomicUsize,
    stop: tokio::sync::Notify,
}

impl World {
    fn failing(step: usize, class: ErrorClass) -> Self {
        Self {
            fail: Some((step, class)),
            ..Self::default()
        }
    }

    fn fault(&self, step: usize) -> Result<(), StepError> {
        let Some((at, class)) = self.fail else {
            return Ok(());
        };
        if at != step {
            return Ok(());
        }
        let struck = self.struck.fetch_add(1, Ordering::Relaxed) + 1;
        if self.heals_after > 0 && struck > self.heals_after {
            return Ok(());
        }
        let class = self.later.filter(|_| struck > 1).unwrap_or(class);
        Err(StepError::new(class, format!("fault at {}", STEPS[step])))
    }

    fn done(&self) -> [bool; 5] {
        *self.done.lock().unwrap()
    }
}

impl World {
    async fn run(&self, step: usize, data: &mut Data) -> Result<(), StepError> {
        tokio::time::sleep(Duration::from_millis(10)).await;
        self.ran.lock().unwrap().push(step);
        data.learned.push(step);
        // The effect happens, then the fault: the worst order.
        self.done.lock().unwrap()[step] = true;
        self.fault(step)
    }

    async fn undo(&self, step: usize) -> Result<(), StepError> {
        self.done.lock().unwrap()[step] = false;
        Ok(())
    }
}

const fn step<const N: usize>() -> Step<World> {
    Step {
        commits: N == COMMIT,
        is_whole: N == COMMIT,
        undo: |world, _| Box::pin(world.undo(N)),
        ..Step::new(STEPS[N], (), |world, data| Box::pin(world.run(N, data)))
    }
}

#[async_trait]
impl Saga for World {
    type Data = Data;
    type Note = ();

    const STEPS: &'static [Step<Self>] = &[
        step::<0>(),
        step::<1>(),
        step::<2>(),
        step::<3>(),
        step::<4>(),
    ];

    async fn interrupted(&self) -> StepError {
        self.stop.notified().await;
        StepError::new(ErrorClass::Refused, "stop")
    }
}

/// A journal that dies at its n-th write, before or after it is kept.
#[derive(Default)]
struct Paper {
    events: Mutex<Vec<Event>>,
    writes: AtomicUsize,
    dies_at: Option<(usize, bool)>,
}

impl Paper {
    fn dying_at(write: usize, kept: bool) -> Self {
        Self {
            dies_at: Some((write, kept)),
            ..Self::default()
        }
    }

    fn events(&self) -> Vec<Event> {
        self.events.lock().unwrap().clone()
    }
}

#[async_trait]
impl Journal for Paper {
    async fn load(&self) -> Result<Vec<Event>, JournalError> {
        Ok(self.events())
    }

    async fn append(&self, at: usize, events: &[Event]) -> Result<(), JournalError> {
        let write = self.writes.fetch_add(1, Ordering::Relaxed);
        let dies = self.dies_at.filter(|(n, _)| *n == write);
        let mut kept = self.events.lock().unwrap();
        assert_eq!(at, kept.len(), "nothing is written twice");
        if dies != Some((write, false)) {
            kept.extend_from_slice(events);
        }
        match dies {
            Some(_) => Err(JournalError::Unavailable("died".into())),
            None => Ok(()),
        }
    }
}

const QUICK: Patience = Patience {
    forward: Duration::from_secs(3),
    unknown: Duration::from_secs(3),
    after_commit: Duration::from_secs(3),
    max_pause: Duration::from_secs(1),
};

async fn run(world: &World, paper: &Paper) -> Result<Outcome, DriveError> {
    drive(world, paper, QUICK, Data::default()).await
}

const WHOLE: [bool; 5] = [true; 5];
const UNTOUCHED: [bool; 5] = [false; 5];

#[tokio::test(start_paused = true)]
async fn it_completes_and_each_step_ran_once() {
    let (world, paper) = (World::default(), Paper::default());
    assert_eq!(run(&world, &paper).await.unwrap(), Outcome::Completed);
    assert_eq!(
        (world.done(), world.ran.lock().unwrap().clone()),
        (WHOLE, vec![0, 1, 2, 3, 4])
    );
    let again = run(&world, &paper).await.unwrap();
    assert_eq!(
        again,
        Outcome::Completed,
        "driving what is done does nothing"
    );
    assert_eq!(world.ran.lock().unwrap().len(), 5);
}

#[tokio::test(start_paused = true)]
async fn before_the_commit_every_failure_is_undone() {
    for step in 0..=COMMIT {
        for class in [ErrorClass::Refused, ErrorClass::Retryable, ErrorClass::Bug] {
            let (world, paper) = (World::failing(step, class), Paper::default());
            let outcome = run(&world, &paper).await.unwrap();
            assert!(
                matches!(outcome, Outcome::RolledBack(_)),
                "{step} {class:?}"
            );
            assert_eq!(world.done(), UNTOUCHED, "{step} {class:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_refusal_ends_the_doubt() {
    for step in 0..=COMMIT {
        let lost = World::failing(step, ErrorClass::Lost);
        let later = Some(ErrorClass::Refused);
        let (world, paper) = (World { later, ..lost }, Paper::default());
        let outcome = run(&world, &paper).await.unwrap();
        assert!(matches!(outcome, Outcome::RolledBack(_)), "{step}");
        assert_eq!(world.done(), UNTOUCHED, "{step}");
    }
}

#[tokio::test(start_paused = true)]
async fn passing_trouble_passes() {
    for step in 0..STEPS.len() {
        for class in [ErrorClass::Retryable, ErrorClass::Lost] {
            let world = World {
                heals_after: 3,
                ..World::failing(step, class)
            };
            assert_eq!(
                run(&world, &Paper::default()).await.unwrap(),
                Outcome::Completed
            );
            assert_eq!(world.done(), WHOLE);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn after_the_commit_nothing_is_undone() {
    for step in COMMIT + 1..STEPS.len() {
        for class in [
            ErrorClass::Refused,
            ErrorClass::Retryable,
            ErrorClass::Lost,
            ErrorClass::Bug,
        ] {
            let (world, paper) = (World::failing(step, class), Paper::default());
            assert_eq!(
                run(&world, &paper).await.unwrap(),
                Outcome::Completed,
                "{step} {class:?}"
            );
            assert_eq!(world.done(), WHOLE);
            let put_off = |e: &Event| matches!(e, Event::PutOff { .. });
            assert_eq!(paper.events().iter().filter(|e| put_off(e)).count(), 1);
        }
    }
}

/// What passing trouble keeps from finding out is not known either.
#[tokio::test(start_paused = true)]
async fn not_knowing_is_stuck_and_never_undone() {
    for (step, later) in (0..=COMMIT).flat_map(|n| [(n, None), (n, Some(ErrorClass::Retryable))]) {
        let lost = World::failing(step, ErrorClass::Lost);
        let (world, paper) = (World { later, ..lost }, Paper::default());
        assert!(matches!(
            run(&world, &paper).await,
            Err(DriveError::Stuck(_))
        ));
        let mut expected = UNTOUCHED;
        expected[..=step].fill(true);
        assert_eq!(world.done(), expected, "nothing was taken back on a guess");
        let healed = World {
            done: Mutex::new(expected),
            ..World::default()
        };
        assert_eq!(
            run(&healed, &paper).await.unwrap(),
            Outcome::Completed,
            "resumed at {step}"
        );
        assert_eq!(healed.done(), WHOLE);
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_was_replaced_stops_and_leaves_all_as_it_is() {
    for step in 0..STEPS.len() {
        let (world, paper) = (World::failing(step, ErrorClass::Fenced), Paper::default());
        assert!(matches!(
            run(&world, &paper).await,
            Err(DriveError::Journal(JournalError::Fenced))
        ));
        let mut expected = UNTOUCHED;
        expected[..=step].fill(true);
        assert_eq!(world.done(), expected, "nothing is undone on that account");
        let last = paper.events().pop().unwrap();
        assert!(
            matches!(last, Event::Started { .. }),
            "nor written: {last:?}"
        );
        let successor = World {
            done: Mutex::new(expected),
            ..World::default()
        };
        assert_eq!(run(&successor, &paper).await.unwrap(), Outcome::Completed);
        assert_eq!(successor.done(), WHOLE);
    }
}

#[tokio::test(start_paused = true)]
async fn it_can_be_stopped_before_the_commit() {
    let (world, paper) = (World::default(), Paper::default());
    world.stop.notify_one();
    assert!(matches!(
        run(&world, &paper).await.unwrap(),
        Outcome::RolledBack(_)
    ));
    assert_eq!(world.done(), UNTOUCHED);
}

/// Wherever the process dies, with the last line kept or lost, the next life
/// ends it whole or as it was.
#[tokio::test(start_paused = true)]
async fn death_at_any_write_ends_whole_or_untouched() {
    let faults = (0..STEPS.len()).map(Some).chain([None]);
    for fault in faults {
        for write in 0..14 {
            for kept in [false, true] {
                let world = match fault {
                    Some(step) => World::failing(step, ErrorClass::Refused),
                    None => World::default(),
                };
                let paper = Paper::dying_at(write, kept);
                let first = run(&world, &paper).await;
                let outcome = match first {
                    Ok(outcome) => outcome,
                    Err(_) => run(&world, &paper).await.unwrap(),
                };
                let expected = match outcome {
                    Outcome::Completed => WHOLE,
                    Outcome::RolledBack(_) => UNTOUCHED,
                };
                assert_eq!(
                    world.done(),
                    expected,
                    "fault {fault:?} write {write} kept {kept}"
                );
                let fails_early = fault.is_some_and(|step| step <= COMMIT);
                assert_eq!(outcome == Outcome::Completed, !fails_early);
            }
        }
    }
}

#[test]
fn events_out_of_order_are_refused() {
    let started = |step: &str| Event::Started { step: step.into() };
    let succeeded = |step: &str| Event::Succeeded {
        step: step.into(),
        data: serde_json::to_value(Data::default()).unwrap(),
    };
    let error = StepError::new(ErrorClass::Refused, "x");
    let bad: [Vec<Event>; 6] = [
        // Nobody passes over the point of no return.
        vec![started("after")],
        vec![succeeded("one")],
        vec![started("one"), started("one")],
        vec![started("one"), succeeded("two")],
        vec![started("two"), started("one")],
        vec![
            started("one"),
            Event::PutOff {
                step: "one".into(),
                error,
            },
        ],
    ];
    for events in bad {
        let read = replay::<World>(&events);
        assert!(matches!(read, Err(JournalError::Illegal(_))), "{events:?}");
    }
    let (state, _) = replay::<World>(&[started("one"), succeeded("one")]).unwrap();
    assert_eq!(state, State::Ready(1));
}

#[test]
fn a_journal_of_another_version_is_gone_on_with_or_left_alone() {
    let started = |step: &str| Event::Started { step: step.into() };
    let undone = |step: &str| Event::Undone { step: step.into() };
    let succeeded = |step: &str, data: serde_json::Value| Event::Succeeded {
        step: step.into(),
        data,
    };
    let data = || serde_json::to_value(Data::default()).unwrap();
    let error = StepError::new(ErrorClass::Refused, "x");
    let failed = Event::Failed {
        step: "commit".into(),
        error: error.clone(),
    };
    // By one that did not know of step two, nor of the first after the commit.
    let fewer = [started("one"), succeeded("one", data()), started("commit")];
    let (state, _) = replay::<World>(&fewer).unwrap();
    assert_eq!(state, State::Running(COMMIT));
    let back = [&fewer[..], &[failed, undone("commit"), undone("one")]].concat();
    let (state, _) = replay::<World>(&back).unwrap();
    assert_eq!(state, State::Done(Outcome::RolledBack(error)));
    let on = [succeeded("commit", data()), started("last")];
    let (state, _) = replay::<World>(&[&fewer[..], &on].concat()).unwrap();
    assert_eq!(state, State::Running(4));
    // By one that knew of more.
    let odd = serde_json::json!({"learned": "by heart"});
    for more in [
        vec![started("none")],
        vec![
            started("one"),
            succeeded("one", data()),
            started("one-and-a-half"),
        ],
        vec![started("one"), succeeded("one", odd)],
    ] {
        let read = replay::<World>(&more);
        assert!(matches!(read, Err(JournalError::Newer(_))), "{more:?}");
    }
}
