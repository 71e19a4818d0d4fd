//! Where a guest is after a transfer: every pair of answers has one verdict,
//! and none of them guesses.

use drover_model::guest::{PowerState as P, Presence};

use super::*;

fn all() -> Vec<Option<GuestLocation>> {
    let presences = [
        Presence::Absent,
        Presence::Incoming,
        Presence::Present(P::Running),
        Presence::Present(P::Paused),
        Presence::Present(P::Shutdown),
        Presence::Present(P::Crashed),
        Presence::Present(P::Suspended),
    ];
    let known = presences.into_iter().flat_map(|presence| {
        [false, true].map(|migrating| {
            Some(GuestLocation {
                migrating,
                ..GuestLocation::seen(presence)
            })
        })
    });
    std::iter::once(None).chain(known).collect()
}

fn at(presence: Presence) -> Option<GuestLocation> {
    Some(GuestLocation::seen(presence))
}

fn told_verdict(
    source: Option<GuestLocation>,
    dest: Option<GuestLocation>,
    told: ToldBy,
) -> Verdict {
    judge(source.as_ref(), dest.as_ref(), told)
}

fn verdict(source: Option<GuestLocation>, dest: Option<GuestLocation>) -> Verdict {
    told_verdict(source, dest, ToldBy::default())
}

#[test]
fn the_plain_cases() {
    let (running, paused) = (Presence::Present(P::Running), Presence::Present(P::Paused));
    let off = Presence::Present(P::Shutdown);
    assert_eq!(verdict(at(Presence::Absent), at(running)), Verdict::Moved);
    assert_eq!(
        verdict(at(Presence::Absent), at(paused)),
        Verdict::Moved,
        "it was paused before"
    );
    assert_eq!(verdict(at(running), at(Presence::Absent)), Verdict::Stayed);
    assert_eq!(verdict(at(paused), at(Presence::Absent)), Verdict::Stayed);
    assert_eq!(
        verdict(at(running), at(Presence::Incoming)),
        Verdict::Stayed
    );
    assert_eq!(verdict(at(off), at(Presence::Absent)), Verdict::Stopped);
    assert_eq!(
        verdict(at(paused), at(running)),
        Verdict::Moved,
        "a stale copy stands still"
    );
}

#[test]
fn a_guest_that_arrived_has_moved_whatever_became_of_it() {
    let (absent, off) = (Presence::Absent, Presence::Present(P::Shutdown));
    let (paused, running) = (Presence::Present(P::Paused), Presence::Present(P::Running));
    let moved = ToldBy {
        moved_away: true,
        ran_there: false,
    };
    let ran = ToldBy {
        moved_away: false,
        ran_there: true,
    };
    for told in [moved, ran] {
        for dest in [off, Presence::Present(P::Crashed), paused, running, absent] {
            let said = told_verdict(at(absent), at(dest), told);
            assert_eq!(said, Verdict::Moved, "{dest:?} {told:?}");
        }
        let stale = told_verdict(at(paused), at(off), told);
        assert_eq!(stale, Verdict::Moved, "what libvirt left stands still");
        let back = told_verdict(at(running), at(off), told);
        assert_eq!(back, Verdict::Stayed, "somebody brought it back");
        let nowhere = told_verdict(at(off), at(absent), told);
        assert_eq!(nowhere, Verdict::Unknown);
        let nowhere = told_verdict(at(paused), at(absent), told);
        assert_eq!(nowhere, Verdict::Unknown);
    }
    assert_eq!(verdict(at(absent), at(off)), Verdict::Moved);
    assert_eq!(verdict(at(off), at(off)), Verdict::Moved);
    assert_eq!(verdict(at(paused), at(off)), Verdict::Unknown);
}

#[test]
fn a_post_copy_whose_destination_died_is_over() {
    let half = |presence| GuestLocation {
        migrating: true,
        post_copy: true,
        ..GuestLocation::seen(presence)
    };
    let (paused, running) = (Presence::Present(P::Paused), Presence::Present(P::Running));
    for off in [P::Shutdown, P::Crashed].map(Presence::Present) {
        assert_eq!(verdict(Some(half(paused)), at(off)), Verdict::Moved);
        let moves = GuestLocation {
            post_copy: false,
            ..half(paused)
        };
        assert_eq!(verdict(Some(moves), at(off)), Verdict::InBetween);
        assert_eq!(verdict(Some(half(running)), at(off)), Verdict::InBetween);
    }
    let comes_in = GuestLocation {
        migrating: true,
        ..GuestLocation::seen(running)
    };
    let both = verdict(Some(half(paused)), Some(comes_in));
    assert_eq!(both, Verdict::InBetween, "the other half is there");
    let again = verdict(Some(half(paused)), at(running));
    assert_eq!(again, Verdict::Moved, "somebody has started it again there");
    for dest in [paused, Presence::Incoming, Presence::Absent] {
        assert_eq!(
            verdict(Some(half(paused)), at(dest)),
            Verdict::InBetween,
            "the other half may be there: {dest}"
        );
    }
    assert_eq!(verdict(Some(half(paused)), None), Verdict::InBetween);
}

#[test]
fn that_neither_node_has_it_proves_nothing() {
    let absent = at(Presence::Absent);
    assert_eq!(verdict(absent, absent), Verdict::Unknown);
}

#[test]
fn a_silent_node_is_not_an_absent_guest() {
    let (running, paused) = (Presence::Present(P::Running), Presence::Present(P::Paused));
    assert_eq!(verdict(None, None), Verdict::Unknown);
    assert_eq!(verdict(at(Presence::Absent), None), Verdict::Unknown);
    assert_eq!(verdict(None, at(Presence::Absent)), Verdict::Unknown);
    assert_eq!(
        verdict(at(paused), None),
        Verdict::Unknown,
        "it may run on the silent side"
    );
    assert_eq!(
        verdict(None, at(running)),
        Verdict::Moved,
        "libvirt's own hand-over is proof"
    );
    assert_eq!(verdict(at(running), None), Verdict::Stayed, "it runs here");
}

#[test]
fn no_pair_of_answers_contradicts_what_is_seen_to_run() {
    let runs =
        |l: Option<GuestLocation>| l.is_some_and(|l| l.presence == Presence::Present(P::Running));
    for source in all() {
        for dest in all() {
            let said = verdict(source, dest);
            let pair = format!("{source:?} {dest:?} -> {said:?}");
            if runs(source) && runs(dest) {
                assert!(
                    matches!(said, Verdict::Unknown | Verdict::InBetween),
                    "{pair}"
                );
            }
            if runs(source) {
                assert!(!matches!(said, Verdict::Moved | Verdict::Stopped), "{pair}");
            }
            if runs(dest) {
                assert!(
                    !matches!(said, Verdict::Stayed | Verdict::Stopped),
                    "{pair}"
                );
            }
            if source.is_none() || dest.is_none() {
                assert_ne!(said, Verdict::Stopped, "{pair}");
            }
        }
    }
}
