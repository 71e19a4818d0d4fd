//! Who has no business here, or does not keep to the rules, is dropped.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use crate::rig::{CHECK, DATA, HASH, MIB, OPEN, REFUSED, Raw, Rig, hash, head, make};
use drover_carrier::{Control, SendError, SendSpec, Token, send};
use uuid::Uuid;

#[test]
fn only_who_is_expected_is_let_in() {
    let rig = Rig::new(1);
    make(&rig.from(0), MIB, &[(0, MIB)]);
    let unknown = SendSpec {
        migration: Uuid::new_v4(),
        ..rig.spec()
    };
    let wrong = SendSpec {
        token: Token::generate(),
        ..rig.spec()
    };
    let mut fewer = rig.spec();
    fewer.files.clear();
    for spec in [unknown, wrong, fewer] {
        let error = send(&spec, &Control::new()).unwrap_err();
        assert!(matches!(error, SendError::Refused(_)), "{error}");
    }
    assert!(!rig.to(0).exists());
}

#[test]
fn a_refusal_is_short_and_then_it_hangs_up() {
    let rig = Rig::new(1);
    let mut raw = Raw::hello(&rig, rig.migration, &Token::generate());
    let (kind, text) = raw.hear().unwrap();
    assert_eq!(kind, REFUSED);
    assert!(text.len() < 100);
    assert_eq!(raw.hear(), None);
    // Another version is told so.
    let mut raw = Raw::connect(&rig);
    let mut hello = b"DRVC\x02".to_vec();
    hello.resize(72, 0);
    raw.0.write_all(&hello).unwrap();
    let (kind, text) = raw.hear().unwrap();
    assert_eq!(kind, REFUSED);
    assert!(String::from_utf8(text).unwrap().contains("version"));
}

/// Says something after the file was opened, and is dropped for it.
fn dropped(what: &str, say: impl FnOnce(&mut Raw)) {
    let rig = Rig::new(1);
    let mut raw = Raw::opened(&rig, 4096);
    say(&mut raw);
    assert_eq!(raw.hear(), None, "{what}");
    assert_eq!(fs::read(rig.to(0)).unwrap(), [0; 4096], "{what}");
    // And nobody else is the worse for it.
    let mut raw = Raw::opened(&rig, 4096);
    raw.say(DATA, 0, 4094, 2, b"ok");
    assert_eq!(raw.hear(), Some((HASH, hash(b"ok"))), "{what}");
}

#[test]
fn who_breaks_the_protocol_is_dropped() {
    dropped("junk", |raw| raw.0.write_all(&[0x5a; 4096]).unwrap());
    dropped("a chunk too long", |raw| {
        let len = 1024 * 1024 + 1;
        raw.0
            .write_all(&head(DATA, 0, len, 0, u64::from(len)))
            .unwrap();
    });
    dropped("a very long frame", |raw| {
        raw.0.write_all(&head(CHECK, 0, u32::MAX, 0, 1)).unwrap();
    });
    dropped("beyond the end", |raw| raw.say(DATA, 0, 4095, 2, b"no"));
    dropped("far beyond", |raw| raw.say(DATA, 0, u64::MAX, 2, b"no"));
    dropped("a check beyond", |raw| raw.say(CHECK, 0, 1, 4096, b""));
    dropped("zeros beyond", |raw| raw.say(4, 0, 4096, 1, b""));
    dropped("another length at the end", |raw| {
        raw.say(5, 0, 0, 4095, b"")
    });
    dropped("a range that is not the body's", |raw| {
        raw.say(DATA, 0, 0, 3, b"no")
    });
    dropped("no such file", |raw| raw.say(DATA, 1, 0, 2, b"no"));
    dropped("opened no such file", |raw| raw.say(OPEN, 7, 0, 2, b""));
    dropped("opened twice", |raw| raw.say(OPEN, 0, 0, 4096, b""));
    dropped("what a receiver says", |raw| {
        raw.say(HASH, 0, 0, 1, &[0; 16])
    });
    dropped("an unknown kind", |raw| raw.say(200, 0, 0, 0, b""));
}

#[test]
fn an_impossible_length_is_not_even_tried() {
    let rig = Rig::new(1);
    let mut raw = Raw::welcome(&rig);
    raw.say(OPEN, 0, 0, u64::MAX, b"");
    assert_eq!(raw.hear(), None);
    assert!(!rig.to(0).exists());
}

#[test]
fn junk_instead_of_a_hello_and_silence_are_dropped() {
    let rig = Rig::new(1);
    let mut junk = TcpStream::connect(("127.0.0.1", rig.port)).unwrap();
    let mut silent = TcpStream::connect(("127.0.0.1", rig.port)).unwrap();
    let mut silent_later = Raw::welcome(&rig);
    junk.write_all(&[b'x'; 100]).unwrap();
    for stream in [&mut junk, &mut silent] {
        stream
            .set_read_timeout(Some(Duration::from_secs(8)))
            .unwrap();
        // Perhaps a refusal, then the end; reset, if not all was read.
        match stream.read_to_end(&mut Vec::new()) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }
    assert_eq!(silent_later.hear(), None);
}

#[test]
fn there_is_room_for_so_many() {
    let rig = Rig::new(1);
    let held: Vec<_> = (0..64).map(|_| Raw::connect(&rig)).collect();
    let mut stream = TcpStream::connect(("127.0.0.1", rig.port)).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(2)))
        .unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0, "one too many");
    drop(held);
    // A sender comes again until there is room.
    make(&rig.from(0), MIB, &[(0, MIB)]);
    rig.send().unwrap();
    rig.assert_same();
}
