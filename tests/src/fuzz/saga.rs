//! The journal of a saga, as it is read from the record.

use async_trait::async_trait;
use drover_saga::{Event, Saga, State, Step, StepError, journal};
use serde_json::Value;

struct Steps;

const fn step(name: &'static str) -> Step<Steps> {
    Step::new(name, (), |_, _| Box::pin(async { Ok(()) }))
}

#[async_trait]
impl Saga for Steps {
    type Data = Value;
    type Note = ();

    const STEPS: &'static [Step<Self>] = &[
        step("prepare"),
        Step {
            commits: true,
            ..step("move")
        },
        step("settle"),
        step("tidy"),
    ];

    async fn interrupted(&self) -> StepError {
        std::future::pending().await
    }
}

/// Events read and written again are the same, and a journal that makes sense does so
/// at each of its events: one that is over has none after it.
pub(super) fn saga(data: &[u8]) {
    let Ok(events) = serde_json::from_slice::<Vec<Event>>(data) else {
        return;
    };
    let text = serde_json::to_string(&events).expect("what was read can be written");
    let again: Vec<Event> = serde_json::from_str(&text).expect("what was written is read");
    assert_eq!(again, events);
    let Ok((state, data)) = journal::replay::<Steps>(&events) else {
        return;
    };
    let succeeded = |event: &&Event| matches!(event, Event::Succeeded { .. });
    assert_eq!(data.is_some(), events.iter().any(|event| succeeded(&event)));
    let position = state.step_position();
    assert!(position.is_none_or(|at| at < Steps::STEPS.len()));
    for end in 0..events.len() {
        let before = journal::replay::<Steps>(&events[..end]);
        let (before, _) = before.expect("a part of what makes sense makes sense");
        assert!(
            !matches!(before, State::Done(_)),
            "nothing comes after the end"
        );
    }
}
