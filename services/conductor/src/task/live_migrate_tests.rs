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

fn verdict(source: Option<GuestLocation>, dest: Option<GuestLocation>) -> Verdict {
    judge(source.as_ref(), dest.as_ref())
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
    assert_eq!(
        verdict(at(Presence::Absent), at(Presence::Absent)),
        Verdict::Gone
    );
    assert_eq!(verdict(at(off), at(Presence::Absent)), Verdict::Gone);
    assert_eq!(
        verdict(at(paused), at(running)),
        Verdict::Moved,
        "a stale copy stands still"
    );
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
                assert!(!matches!(said, Verdict::Moved | Verdict::Gone), "{pair}");
            }
            if runs(dest) {
                assert!(!matches!(said, Verdict::Stayed | Verdict::Gone), "{pair}");
            }
            if source.is_none() || dest.is_none() {
                assert_ne!(said, Verdict::Gone, "{pair}");
            }
        }
    }
}
