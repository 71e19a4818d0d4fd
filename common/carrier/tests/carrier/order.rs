//! Writing and reading back go on at the same time; what is said about them
//! stays in order.

use std::fs;

use crate::rig::{CHECK, DATA, DIFFERS, HASH, KIB, MIB, Raw, Rig, ZERO, ZEROED, hash, make};
use drover_carrier::Mode;

#[test]
fn answers_come_in_the_order_of_the_questions() {
    let rig = Rig::new(1);
    let len = 12 * MIB;
    let mut raw = Raw::opened(&rig, len);
    let (mut wanted, mut holds) = (Vec::new(), vec![0; usize::try_from(len).unwrap()]);
    let mut random = fastrand::Rng::with_seed(5);
    for at in (0..len).step_by(1 << 20) {
        // Large and small ones, some so small that they are passed on together.
        let size = [MIB, 300 * KIB, 4 * KIB, 1][random.usize(0..4)];
        let body: Vec<u8> = (0..size).map(|_| random.u8(1..)).collect();
        raw.say(DATA, 0, at, size, &body);
        wanted.push((HASH, hash(&body)));
        raw.say(CHECK, 0, at, 1, &[]);
        wanted.push((HASH, hash(&body[..1])));
        let from = usize::try_from(at).unwrap();
        holds[from..from + body.len()].copy_from_slice(&body);
        raw.say(ZERO, 0, at + size, MIB - size, &[]);
        wanted.push((ZEROED, Vec::new()));
    }
    for answer in wanted {
        assert_eq!(raw.hear(), Some(answer));
    }
    assert!(fs::read(rig.to(0)).unwrap() == holds);
}

#[test]
fn what_came_before_a_failure_is_answered_and_nothing_after() {
    let rig = Rig::with_mode(1, Mode::Compare);
    make(&rig.to(0), 8 * MIB, &[(0, 8 * MIB)]);
    let before = fs::read(rig.to(0)).unwrap();
    let mut raw = Raw::opened(&rig, 8 * MIB);
    for at in 0..4 {
        raw.say(CHECK, 0, at * MIB, MIB, &[]);
    }
    // It has data there, and must not be written.
    raw.say(ZERO, 0, 4 * MIB, MIB, &[]);
    raw.say(CHECK, 0, 5 * MIB, MIB, &[]);
    for chunk in before.chunks(1 << 20).take(4) {
        assert_eq!(raw.hear(), Some((HASH, hash(chunk))));
    }
    assert_eq!(raw.hear().unwrap().0, DIFFERS);
    assert_eq!(raw.hear(), None);
    assert!(fs::read(rig.to(0)).unwrap() == before);
}
