//! Silence as a conductor that listens measures it.

use drover_model::api::conductor::Identity;

use super::*;

const LOOK: Duration = Duration::from_secs(2);

fn host() -> HostName {
    "kvm1".parse().unwrap()
}

fn row(incarnation: u64, beat: u64) -> AgentRow {
    AgentRow {
        host: host(),
        incarnation,
        identity: Identity::default(),
        gone: false,
        beat,
        agent_version: String::new(),
        speaks: Spoken::Unsaid,
        clock_offset_ms: 0,
        silent_ms: 0,
        refusals: 0,
        refusal: None,
    }
}

fn life(incarnation: u64, beat: u64) -> Life {
    Life { incarnation, beat }
}

fn beat(incarnation: u64, sequence: u64, clock_ms: u64) -> Heartbeat {
    Heartbeat {
        host: host(),
        incarnation,
        sequence,
        agent_version: String::new(),
        clock_ms,
        speaks: Spoken::Unsaid,
    }
}

/// Listens for that many seconds, looking every two.
async fn listen(hearing: &Hearing, seconds: u64) {
    for _ in 0..seconds / 2 {
        hearing.is_certain(LOOK * 3);
        tokio::time::sleep(LOOK).await;
    }
    hearing.is_certain(LOOK * 3);
}

fn silent_s(hearing: &Hearing) -> u64 {
    hearing.silent_ms(&host()).unwrap() / 1000
}

#[tokio::test(start_paused = true)]
async fn silence_is_time_in_which_one_listened() {
    let hearing = Hearing::default();
    assert_eq!(hearing.silent_ms(&host()), None, "nobody listens");
    hearing.begin(SPEAKS, &[row(1, 4)]);
    listen(&hearing, 20).await;
    assert_eq!(silent_s(&hearing), 20);
    // Paused, cut off, or without its record for an hour.
    tokio::time::sleep(Duration::from_secs(3600)).await;
    listen(&hearing, 4).await;
    assert_eq!(silent_s(&hearing), 30, "six seconds of the hour, and four");
    assert_eq!(hearing.silent_for(&host(), 30_000), None);
    assert_eq!(hearing.silent_for(&host(), 29_999), Some(life(1, 4)));
    // Another conductor heard it.
    hearing.take_in(&[row(1, 5)]);
    assert_eq!(silent_s(&hearing), 0);
}

#[tokio::test(start_paused = true)]
async fn a_conductor_that_starts_goes_on_with_the_silence_on_the_record() {
    let hearing = Hearing::default();
    let dead = AgentRow {
        silent_ms: 95_000,
        ..row(3, 7)
    };
    hearing.begin(SPEAKS, &[dead]);
    assert_eq!(silent_s(&hearing), 95);
    listen(&hearing, 10).await;
    assert_eq!(hearing.silences(), [(host(), life(3, 7), 105_000)]);
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_jumps_is_shown_and_changes_nothing() {
    let hearing = Hearing::default();
    hearing.begin(SPEAKS, &[row(1, 0)]);
    listen(&hearing, 10).await;
    let word = hearing.beat(&beat(1, 1, 36_000_000 + 500), 500);
    assert_eq!(word, Some(Word::Taken));
    assert_eq!(silent_s(&hearing), 0);
    let state = hearing.state(&host());
    assert_eq!(state.clock_offset_ms, Some(36_000_000));
    listen(&hearing, 6).await;
    let back = hearing.beat(&beat(1, 2, 500), 36_000_500);
    assert_eq!(back, Some(Word::Taken), "whatever either clock says");
    assert_eq!(silent_s(&hearing), 0);
    let twice = hearing.beat(&beat(1, 2, 500), 500);
    assert!(matches!(twice, Some(Word::Stale { .. })));
    assert_eq!(hearing.fresh().len(), 1, "the last of each");
}

#[tokio::test(start_paused = true)]
async fn what_another_incarnation_says_is_no_sign_of_life() {
    let hearing = Hearing::default();
    hearing.begin(SPEAKS, &[row(2, 0)]);
    listen(&hearing, 10).await;
    assert_eq!(hearing.beat(&beat(1, 99, 0), 0), None);
    assert_eq!(silent_s(&hearing), 10);
    hearing.learn(&row(3, 0));
    assert_eq!(silent_s(&hearing), 0, "a new one was let in");
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_shown_for_a_while() {
    let hearing = Hearing::default();
    hearing.begin(SPEAKS, &[row(1, 0)]);
    let refused = AgentRow {
        refusals: 1,
        refusal: Some("twins".into()),
        ..row(1, 0)
    };
    hearing.take_in(std::slice::from_ref(&refused));
    assert_eq!(hearing.state(&host()).refusal, Some("twins".into()));
    assert!(hearing.is_to_be_said(&host()));
    assert!(!hearing.is_to_be_said(&host()));
    tokio::time::sleep(Duration::from_secs(61)).await;
    hearing.take_in(&[refused]);
    assert_eq!(hearing.state(&host()).refusal, None);
    assert!(hearing.is_to_be_said(&host()));
}
