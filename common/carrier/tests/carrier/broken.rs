//! Connections break, processes end, bytes are damaged: it still arrives, and
//! nothing is sent twice that need not be.

use std::{
    fs,
    net::TcpListener,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use crate::rig::{CHECK, DATA, Fate, MIB, Proxy, Rig, eventually, is_kind, localhost, make, open};
use drover_carrier::{Control, Progress, SendError, SendSpec, send};

const CUTS: usize = 12;

#[test]
fn a_connection_cut_anywhere_goes_on_where_it_was() {
    let mut random = fastrand::Rng::with_seed(11);
    let rig = Rig::new(2);
    let mut extents = vec![(64 * MIB, 10 * MIB)];
    extents.extend((0..300).map(|_| (random.u64(0..60 * MIB), random.u64(1..60_000))));
    make(&rig.from(0), 80 * MIB, &extents);
    make(&rig.from(1), 2 * MIB, &[(5, MIB)]);
    let (cuts, random) = (Arc::new(AtomicUsize::new(0)), Mutex::new(random));
    let counted = Arc::clone(&cuts);
    let proxy = Proxy::new(rig.port, move |_, frame| {
        let mut random = random.lock().unwrap();
        if counted.load(SeqCst) < CUTS && random.u8(0..32) == 0 {
            counted.fetch_add(1, SeqCst);
            return Fate::Cut(random.usize(0..=frame.len()));
        }
        Fate::Pass
    });
    let control = Arc::new(Control::new());
    let spec = SendSpec {
        port: proxy.port,
        ..rig.spec()
    };
    let sending = rig.spawn(spec, &control);
    let mut last = Progress::default();
    while !sending.is_finished() {
        let now = control.progress();
        assert!(
            now.done_bytes >= last.done_bytes
                && now.total_bytes >= last.total_bytes
                && now.reconnects >= last.reconnects,
            "{last:?} {now:?}"
        );
        last = now;
        thread::sleep(Duration::from_millis(1));
    }
    let summary = sending.join().unwrap().unwrap();
    rig.assert_same();
    assert_eq!(cuts.load(SeqCst), CUTS);
    assert!(summary.reconnects as usize > CUTS / 2, "{summary:?}");
    assert_eq!(control.progress().done_bytes, summary.total_bytes);
}

#[test]
fn a_silent_link_is_noticed() {
    let rig = Rig::new(1);
    make(&rig.from(0), 8 * MIB, &[(0, 8 * MIB)]);
    let proxy = Proxy::new(rig.port, |number, frame| {
        match number == 0 && is_kind(frame, DATA) && frame[10] == 0x40 {
            true => Fate::Stall,
            false => Fate::Pass,
        }
    });
    // The fifth MiB never arrives: its offset is 0x400000.
    let summary = rig.send_through(&proxy).unwrap();
    rig.assert_same();
    assert_eq!(summary.reconnects, 1);
}

#[test]
fn without_progress_it_is_given_up() {
    let rig = Rig::new(1);
    make(&rig.from(0), MIB, &[(0, MIB)]);
    let mut spec = rig.spec();
    spec.progress_timeout = Duration::from_millis(400);
    let proxy = Proxy::new(rig.port, |_, _| Fate::Cut(0));
    for port in [proxy.port, nobody()] {
        spec.port = port;
        let begun = Instant::now();
        let error = send(&spec, &Control::new()).unwrap_err();
        assert!(matches!(error, SendError::Stalled { .. }), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(3));
    }
}

/// A port on which nobody listens.
fn nobody() -> u16 {
    let listener = TcpListener::bind(localhost()).unwrap();
    listener.local_addr().unwrap().port()
}

#[test]
fn a_sender_that_was_restarted_sends_only_the_rest() {
    let rig = Rig::new(1);
    make(&rig.from(0), 24 * MIB, &[(0, 16 * MIB)]);
    let control = Arc::new(Control::new());
    control.set_limit(Some(30 * MIB));
    let sending = rig.spawn(rig.spec(), &control);
    eventually("half is done", || control.progress().done_bytes >= 8 * MIB);
    control.cancel();
    let error = sending.join().unwrap().unwrap_err();
    assert!(matches!(error, SendError::Cancelled), "{error}");
    let done = control.progress().done_bytes;
    let summary = rig.resume().unwrap();
    rig.assert_same();
    assert!(summary.reused_bytes >= done, "{summary:?}");
    assert_eq!(summary.sent_bytes, 16 * MIB - summary.reused_bytes);
}

#[test]
fn a_receiver_that_was_restarted_keeps_what_it_has() {
    let mut rig = Rig::new(1);
    make(&rig.from(0), 40 * MIB, &[(0, 32 * MIB)]);
    let control = Arc::new(Control::new());
    control.set_limit(Some(30 * MIB));
    let sending = rig.spawn(rig.spec(), &control);
    eventually("half is done", || control.progress().done_bytes >= 16 * MIB);
    rig.receiver = None;
    let done = control.progress().done_bytes;
    rig.start();
    control.set_limit(None);
    let summary = sending.join().unwrap().unwrap();
    rig.assert_same();
    assert!(summary.reconnects >= 1);
    assert!(summary.reused_bytes + MIB >= done, "{summary:?} {done}");
    // At most what was on its way went twice: less than sockets hold, which is less
    // than was done.
    assert!(summary.sent_bytes < 32 * MIB + done, "{summary:?} {done}");
}

#[test]
fn what_a_restarted_receiver_has_lost_is_sent_again() {
    let mut rig = Rig::new(1);
    make(&rig.from(0), 24 * MIB, &[(0, 16 * MIB)]);
    let control = Arc::new(Control::new());
    control.set_limit(Some(30 * MIB));
    let sending = rig.spawn(rig.spec(), &control);
    eventually("half is done", || control.progress().done_bytes >= 8 * MIB);
    rig.receiver = None;
    // As after a loss of power.
    let target = open(&rig.to(0));
    target.set_len(2 * MIB).unwrap();
    rig.start();
    control.set_limit(None);
    let summary = sending.join().unwrap().unwrap();
    rig.assert_same();
    assert_eq!(summary.reused_bytes, 2 * MIB);
}

#[test]
fn a_file_replaced_under_the_receiver_is_an_error() {
    let rig = Rig::new(1);
    make(&rig.from(0), 8 * MIB, &[(0, 8 * MIB)]);
    let target = rig.to(0);
    let proxy = Proxy::new(rig.port, move |number, frame| {
        if number == 0 && is_kind(frame, DATA) && frame[10] == 0x40 {
            fs::remove_file(&target).unwrap();
            return Fate::Cut(9);
        }
        Fate::Pass
    });
    let error = rig.send_through(&proxy).unwrap_err();
    let SendError::Destination { file: 0, reason } = &error else {
        panic!("{error}");
    };
    assert!(reason.contains("replaced"), "{reason}");
}

#[test]
fn a_flipped_bit_is_sent_again() {
    let rig = Rig::new(1);
    make(&rig.from(0), 8 * MIB, &[(0, 8 * MIB)]);
    let flips = AtomicUsize::new(0);
    let proxy = Proxy::new(rig.port, move |_, frame| {
        if is_kind(frame, DATA) && flips.fetch_add(1, SeqCst).is_multiple_of(3) {
            frame[32 + 12345] ^= 4;
        }
        Fate::Pass
    });
    let summary = rig.send_through(&proxy).unwrap();
    rig.assert_same();
    assert_eq!(summary.reconnects, 0);
    assert!(summary.sent_bytes > 8 * MIB);
}

#[test]
fn always_flipped_is_corrupt() {
    let rig = Rig::new(1);
    make(&rig.from(0), 4 * MIB, &[(MIB, MIB)]);
    let proxy = Proxy::new(rig.port, |_, frame| {
        if is_kind(frame, DATA) {
            frame[32] ^= 1;
        }
        Fate::Pass
    });
    let error = rig.send_through(&proxy).unwrap_err();
    let expected = MIB;
    assert!(
        matches!(error, SendError::Corrupt { file: 0, offset } if offset == expected),
        "{error}"
    );
}

#[test]
fn a_damaged_head_never_writes_elsewhere() {
    let rig = Rig::new(1);
    make(&rig.from(0), 8 * MIB, &[(0, 4 * MIB)]);
    let proxy = Proxy::new(rig.port, |number, frame| {
        if number < 3 && is_kind(frame, DATA) && frame[10] == 0x20 {
            frame[10] ^= 0x40;
        }
        Fate::Pass
    });
    let summary = rig.send_through(&proxy).unwrap();
    rig.assert_same();
    assert!(summary.reconnects >= 3);
}

#[test]
fn a_first_attempt_asks_nothing_a_resumed_one_does() {
    let rig = Rig::new(1);
    make(&rig.from(0), 4 * MIB, &[(0, 4 * MIB)]);
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    let proxy = Proxy::new(rig.port, move |_, frame| {
        if is_kind(frame, CHECK) {
            counted.fetch_add(1, SeqCst);
        }
        Fate::Pass
    });
    // Nothing is there yet, so there is nothing to ask about.
    let mut spec = rig.spec();
    (spec.port, spec.resume) = (proxy.port, true);
    send(&spec, &Control::new()).unwrap();
    assert_eq!(asked.load(SeqCst), 0);
    send(&spec, &Control::new()).unwrap();
    assert_eq!(asked.load(SeqCst), 4);
}
