//! What makes a proof, and what does not.

use drover_model::{
    api::compute::{AsideSeen, CopyHistory, FileSeen},
    guest::PowerState as P,
};

use super::*;

const RUNNING: Presence = Presence::Present(P::Running);
const OFF: Presence = Presence::Present(P::Shutdown);
const ABSENT: Presence = Presence::Absent;

fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

fn file(there: bool) -> FileSeen {
    FileSeen {
        path: "/disk".to_owned(),
        exists: there,
        length_bytes: u64::from(there),
    }
}

fn seen(name: &str, presence: Presence) -> Seen {
    let files = match presence {
        Presence::Present(_) => vec![file(true)],
        _ => Vec::new(),
    };
    let copy = CopySeen {
        presence,
        migrating: false,
        generation: Some(0),
        files,
        aside: None,
        known: CopyHistory::default(),
    };
    let migration = MigrationId(uuid::Uuid::from_u128(1));
    Seen::new(migration, host(name), 7, copy)
}

fn with(mut seen: Seen, change: impl FnOnce(&mut CopySeen)) -> Seen {
    change(&mut seen.copy);
    seen
}

fn aside(complete: bool, there: bool) -> Seen {
    with(seen("kvm1", ABSENT), |copy| {
        copy.aside = Some(AsideSeen {
            complete,
            defined: true,
            files: vec![file(there)],
            taken: Vec::new(),
        });
    })
}

fn is_redundant(judged: &TakeBack) -> bool {
    matches!(judged, TakeBack::Redundant(_))
}

fn live(source: &Seen, dest: &Seen) -> TakeBack {
    live_destination(source, source, dest, false)
}

#[test]
fn a_live_destination_is_taken_back_only_where_the_guest_never_was() {
    for state in [RUNNING, OFF, Presence::Present(P::Paused)] {
        for there in [ABSENT, Presence::Incoming] {
            let judged = live(&seen("kvm1", state), &seen("kvm2", there));
            assert!(is_redundant(&judged), "{judged:?}");
        }
        for there in [OFF, RUNNING, Presence::Present(P::Crashed)] {
            let judged = live(&seen("kvm1", state), &seen("kvm2", there));
            assert!(matches!(judged, TakeBack::Stays(_)), "{state:?} {judged:?}");
        }
    }
    let ran = with(seen("kvm2", ABSENT), |c| c.known.ran_here = true);
    assert!(matches!(
        live(&seen("kvm1", RUNNING), &ran),
        TakeBack::Stays(_)
    ));
    let gave = with(seen("kvm1", RUNNING), |c| c.known.moved_away = true);
    assert!(matches!(
        live(&gave, &seen("kvm2", ABSENT)),
        TakeBack::Stays(_)
    ));
}

#[test]
fn a_source_without_its_guest_or_a_disk_proves_nothing() {
    let lost = with(seen("kvm1", OFF), |c| c.files = vec![file(false)]);
    let moving = with(seen("kvm1", RUNNING), |c| c.migrating = true);
    for source in [seen("kvm1", ABSENT), lost, moving] {
        let judged = live(&source, &seen("kvm2", ABSENT));
        assert!(matches!(judged, TakeBack::Unproven(_)), "{judged:?}");
    }
    // It moved on since.
    let elsewhere = seen("kvm3", RUNNING);
    let judged = live_destination(
        &seen("kvm1", ABSENT),
        &elsewhere,
        &seen("kvm2", ABSENT),
        true,
    );
    assert!(is_redundant(&judged));
    let itself = seen("kvm2", OFF);
    let judged = live_destination(&seen("kvm1", ABSENT), &itself, &seen("kvm2", ABSENT), true);
    assert!(
        !is_redundant(&judged),
        "a copy does not prove itself redundant"
    );
}

#[test]
fn a_cold_destination_goes_while_the_source_keeps_all_of_it() {
    let dest = seen("kvm2", OFF);
    assert!(is_redundant(&cold_destination(
        &seen("kvm1", OFF),
        &dest,
        false
    )));
    assert!(is_redundant(&cold_destination(
        &aside(true, true),
        &dest,
        false
    )));
    for source in [aside(false, true), aside(true, false), seen("kvm1", ABSENT)] {
        let judged = cold_destination(&source, &dest, false);
        assert!(matches!(judged, TakeBack::Unproven(_)), "{judged:?}");
    }
    let ran = with(seen("kvm2", OFF), |c| c.known.ran_here = true);
    for dest in [seen("kvm2", RUNNING), ran] {
        let judged = cold_destination(&aside(true, true), &dest, false);
        assert!(matches!(judged, TakeBack::Stays(_)), "{judged:?}");
    }
}

#[test]
fn the_way_back_is_what_the_source_has_aside_whole() {
    assert!(way_back(&aside(true, true)).is_ok());
    let words = way_back(&aside(true, false)).unwrap_err();
    assert!(words.contains("lacks /disk"), "{words}");
    assert!(way_back(&aside(false, true)).is_err());
    let words = way_back(&seen("kvm1", ABSENT)).unwrap_err();
    assert!(words.contains("keeps nothing aside"), "{words}");
}

#[test]
fn nobody_goes_back_to_a_place_that_is_taken() {
    for presence in [OFF, RUNNING, Presence::Incoming] {
        let again = with(aside(true, true), |copy| copy.presence = presence);
        let words = way_back(&again).unwrap_err();
        assert!(words.contains("to kvm1 again"), "{words}");
    }
    let taken = with(aside(true, true), |copy| {
        let aside = copy.aside.as_mut().unwrap();
        aside.taken = vec!["/disk".to_owned()];
    });
    let words = way_back(&taken).unwrap_err();
    assert!(words.contains("/disk"), "{words}");
}

#[test]
fn a_guest_that_was_brought_back_is_there_alone() {
    let whole = with(aside(true, true), |copy| copy.presence = OFF);
    for source in [whole, seen("kvm1", OFF), seen("kvm1", RUNNING)] {
        assert!(brought_back(&source, &seen("kvm2", ABSENT)).is_ok());
        let words = may_confirm(Some(&source), &seen("kvm2", ABSENT)).unwrap_err();
        assert!(words.contains("ask for revert"), "{words}");
        for there in [OFF, RUNNING, Presence::Incoming] {
            let there = seen("kvm2", there);
            for words in [
                brought_back(&source, &there).unwrap_err(),
                may_confirm(Some(&source), &there).unwrap_err(),
            ] {
                assert!(words.contains("undefine the one"), "{words}");
            }
        }
    }
    // Its own agent is bringing it back.
    let half = with(aside(false, true), |copy| copy.presence = OFF);
    assert!(brought_back(&half, &seen("kvm2", ABSENT)).is_err());
}

#[test]
fn after_a_revert_absent_is_not_success() {
    let dest = seen("kvm2", ABSENT);
    assert!(is_redundant(&reverted(&seen("kvm1", OFF), &dest)));
    for source in [seen("kvm1", ABSENT), aside(true, true)] {
        assert!(!is_redundant(&reverted(&source, &dest)));
    }
    let again = reverted(&seen("kvm1", OFF), &seen("kvm2", OFF));
    assert!(matches!(again, TakeBack::Stays(_)));
}

#[test]
fn a_source_gives_up_what_is_whole_elsewhere() {
    let source = host("kvm1");
    for dest in [seen("kvm2", RUNNING), seen("kvm2", OFF)] {
        let proof = kept_aside(&source, &dest, false).unwrap();
        assert_eq!(proof.survivor().seen_at_ms, 7);
        assert!(live_source(&source, &dest).is_ok());
        assert!(may_confirm(Some(&aside(true, true)), &dest).is_ok());
    }
    let lost = with(seen("kvm2", RUNNING), |c| c.files = vec![file(false)]);
    let other = with(seen("kvm2", RUNNING), |c| c.files[0].path = "/other".into());
    assert!(may_confirm(Some(&aside(true, true)), &other).is_err());
    for dest in [seen("kvm2", ABSENT), seen("kvm1", RUNNING), lost] {
        assert!(kept_aside(&source, &dest, false).is_err(), "{dest:?}");
        assert!(live_source(&source, &dest).is_err(), "{dest:?}");
    }
}

#[test]
fn an_evacuations_definition_goes_only_if_it_was_never_started() {
    assert!(NeverRan::there(&seen("kvm2", OFF)).is_ok());
    assert!(NeverRan::there(&seen("kvm2", RUNNING)).is_err());
    let ran = with(seen("kvm2", OFF), |c| c.known.ran_here = true);
    assert!(NeverRan::there(&ran).is_err());
}
