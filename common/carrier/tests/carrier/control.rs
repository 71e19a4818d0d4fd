//! Steering a transfer, from both sides.

use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::rig::{DATA, Fate, HASH, MIB, Proxy, Raw, Rig, eventually, hash, is_kind, make};
use drover_carrier::{Control, ExpectError, SendError, Token, send};
use uuid::Uuid;

/// Whether this process has the file open.
fn is_open(path: &Path) -> bool {
    let open = fs::read_dir("/proc/self/fd").unwrap();
    open.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .any(|target| target == path)
}

#[test]
fn cancelled_it_ends_at_once() {
    let rig = Rig::new(1);
    make(&rig.from(0), 8 * MIB, &[(0, 8 * MIB)]);
    // Stuck in each way in which it can be.
    let stalled = Proxy::new(rig.port, |_, frame| match is_kind(frame, DATA) {
        true => Fate::Stall,
        false => Fate::Pass,
    });
    let mute = Proxy::new(rig.port, |_, _| Fate::Stall);
    for (port, limit) in [
        (stalled.port, None),
        (mute.port, None),
        (1, None),
        (rig.port, Some(1)),
    ] {
        let control = Arc::new(Control::new());
        control.set_limit(limit);
        let mut spec = rig.spec();
        spec.port = port;
        let sending = rig.spawn(spec, &control);
        eventually("looked through", || control.progress().total_bytes > 0);
        std::thread::sleep(Duration::from_millis(100));
        let begun = Instant::now();
        control.cancel();
        let error = sending.join().unwrap().unwrap_err();
        assert!(matches!(error, SendError::Cancelled), "{error}");
        assert!(
            begun.elapsed() < Duration::from_millis(400),
            "{port}: {:?}",
            begun.elapsed()
        );
    }
    let control = Control::new();
    control.cancel();
    assert!(matches!(
        send(&rig.spec(), &control),
        Err(SendError::Cancelled)
    ));
}

#[test]
fn a_limit_is_kept_and_can_be_lifted() {
    let rig = Rig::new(1);
    make(&rig.from(0), 24 * MIB, &[(0, 24 * MIB)]);
    let control = Arc::new(Control::new());
    control.set_limit(Some(10 * MIB));
    let begun = Instant::now();
    let sending = rig.spawn(rig.spec(), &control);
    eventually("8 MiB", || control.progress().done_bytes >= 8 * MIB);
    let took = begun.elapsed().as_secs_f64();
    assert!(
        (0.5..1.6).contains(&took),
        "8 MiB at 10 MiB/s took {took} s"
    );
    control.set_limit(None);
    sending.join().unwrap().unwrap();
    let took = begun.elapsed().as_secs_f64();
    assert!(took < 2.2, "lifting the limit had no effect: {took} s");
    rig.assert_same();
}

#[test]
fn a_limit_is_no_lack_of_progress() {
    let rig = Rig::new(1);
    make(&rig.from(0), MIB / 2, &[(0, MIB / 2)]);
    let control = Arc::new(Control::new());
    control.set_limit(Some(MIB / 8));
    let mut spec = rig.spec();
    // A busy disk may take longer than nothing to store it all in the end.
    spec.progress_timeout = Duration::from_secs(2);
    rig.spawn(spec, &control).join().unwrap().unwrap();
    rig.assert_same();
}

#[test]
fn forgotten_nothing_writes_any_more() {
    let rig = Rig::new(1);
    make(&rig.from(0), 64 * MIB, &[(0, 64 * MIB)]);
    let control = Arc::new(Control::new());
    control.set_limit(Some(100 * MIB));
    let sending = rig.spawn(rig.spec(), &control);
    eventually("some is there", || control.progress().done_bytes >= 4 * MIB);
    assert!(is_open(&rig.to(0)));
    rig.receiver().forget(rig.migration);
    assert!(!is_open(&rig.to(0)), "somebody can still write");
    // And it is not let in again.
    let error = rig.send().unwrap_err();
    assert!(matches!(error, SendError::Refused(_)), "{error}");
    control.cancel();
    let error = sending.join().unwrap().unwrap_err();
    assert!(matches!(error, SendError::Cancelled), "{error}");
    // Once more has no effect; expected again it goes on.
    rig.receiver().forget(rig.migration);
    rig.receiver()
        .expect(rig.migration, &rig.token, rig.incoming())
        .unwrap();
    assert!(rig.resume().unwrap().reused_bytes >= 4 * MIB);
    rig.assert_same();
}

#[test]
fn a_dropped_receiver_leaves_nothing_behind() {
    let mut rig = Rig::new(1);
    make(&rig.from(0), 64 * MIB, &[(0, 64 * MIB)]);
    let control = Arc::new(Control::new());
    control.set_limit(Some(100 * MIB));
    let sending = rig.spawn(rig.spec(), &control);
    eventually("some is there", || control.progress().done_bytes >= 4 * MIB);
    rig.receiver = None;
    assert!(!is_open(&rig.to(0)));
    control.cancel();
    assert!(sending.join().unwrap().is_err());
}

#[test]
fn a_newer_connection_takes_the_place_of_the_older() {
    let rig = Rig::new(1);
    let mut older = Raw::opened(&rig, 4096);
    older.say(DATA, 0, 0, 4, b"old!");
    assert_eq!(older.hear(), Some((HASH, hash(b"old!"))));
    let mut newer = Raw::opened(&rig, 4096);
    older.say(DATA, 0, 0, 4, b"bad!");
    assert_eq!(older.hear(), None);
    newer.say(DATA, 0, 4, 4, b"new!");
    assert_eq!(newer.hear(), Some((HASH, hash(b"new!"))));
    assert_eq!(fs::read(rig.to(0)).unwrap()[..8], *b"old!new!");
}

#[test]
fn expecting_the_same_again_changes_nothing() {
    let rig = Rig::new(1);
    let expect = |token: &Token, files| rig.receiver().expect(rig.migration, token, files);
    let mut connected = Raw::opened(&rig, 4096);
    expect(&rig.token, rig.incoming()).unwrap();
    connected.say(DATA, 0, 0, 2, b"ok");
    assert_eq!(connected.hear(), Some((HASH, hash(b"ok"))));
    let conflict = Err(ExpectError::Conflict(rig.migration));
    assert_eq!(expect(&Token::generate(), rig.incoming()), conflict);
    assert_eq!(expect(&rig.token, Vec::new()), conflict);
    let twice = [rig.incoming(), rig.incoming()].concat();
    let twice = rig.receiver().expect(Uuid::new_v4(), &rig.token, twice);
    assert_eq!(twice, Err(ExpectError::Twice(rig.to(0))));
}
