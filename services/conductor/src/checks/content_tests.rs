//! Kinds of files × what both nodes see × ways of moving.

use drover_model::{
    content::{BoundAddress, ReadFile},
    guest::{BackingImage, Disk},
    migration::{ColdOptions, LiveOptions},
};

use super::{
    super::tests::{codes, disk, guest, host},
    *,
};

const PATH: &str = "/images/file";

/// What a file is to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    ReadOnly,
    Shareable,
    BaseOfCopied,
    DeepBase,
    BaseOfReadOnly,
    Kernel,
}

const KINDS: [Kind; 6] = [
    Kind::ReadOnly,
    Kind::Shareable,
    Kind::BaseOfCopied,
    Kind::DeepBase,
    Kind::BaseOfReadOnly,
    Kind::Kernel,
];

/// A guest with that one file besides its own disk.
fn with(kind: Kind) -> Guest {
    let image = |path: &str| BackingImage {
        path: path.into(),
        format: "raw".into(),
        allocated_bytes: 0,
    };
    let plain = |target: &str, path: &str| Disk {
        backing: vec![],
        ..disk(target, path)
    };
    let own = plain("vda", "/images/vm1.qcow2");
    let mut guest = guest();
    guest.disks = vec![own.clone()];
    match kind {
        Kind::ReadOnly => guest.disks.push(Disk {
            read_only: true,
            ..plain("sda", PATH)
        }),
        Kind::Shareable => guest.disks.push(Disk {
            shareable: true,
            ..plain("sda", PATH)
        }),
        Kind::BaseOfCopied => guest.disks[0].backing = vec![image(PATH)],
        Kind::DeepBase => guest.disks[0].backing = vec![image("/images/mid"), image(PATH)],
        Kind::BaseOfReadOnly => guest.disks.push(Disk {
            read_only: true,
            backing: vec![image(PATH)],
            ..plain("sda", "/images/mid")
        }),
        Kind::Kernel => {
            guest.reads = vec![ReadFile {
                path: PATH.into(),
                what: "the kernel".into(),
            }]
        }
    }
    guest
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Move {
    Live,
    Cold,
    Evacuation,
}

/// What is at the path on both nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Case {
    SameByMark,
    MarkedAndAnotherNumber,
    Equal,
    OtherSize,
    OtherDigest,
    Missing,
    Unreadable,
    Unknown,
    StillRead,
    ReadingFailed,
}

const CASES: [Case; 10] = [
    Case::SameByMark,
    Case::MarkedAndAnotherNumber,
    Case::Equal,
    Case::OtherSize,
    Case::OtherDigest,
    Case::Missing,
    Case::Unreadable,
    Case::Unknown,
    Case::StillRead,
    Case::ReadingFailed,
];

fn known(sha256: &str) -> Digest {
    Digest::Known {
        sha256: sha256.into(),
    }
}

fn file(path: &str, inode: u64, length_bytes: u64, marked: bool, digest: Digest) -> FileContent {
    FileContent {
        path: path.into(),
        seen: Seen::File {
            length_bytes,
            inode,
            stamp: format!("{inode}:{length_bytes}"),
            marked,
            digest,
        },
    }
}

/// Both nodes' answers. What else the guest uses is equal.
fn told(case: Case) -> (Vec<FileContent>, Vec<FileContent>) {
    let plain = |inode, length, digest| file(PATH, inode, length, false, digest);
    let (here, there) = match case {
        Case::SameByMark => (
            plain(7, 10, Digest::Unasked),
            Some(file(PATH, 7, 10, true, Digest::Unasked)),
        ),
        Case::MarkedAndAnotherNumber => (
            plain(7, 10, known("a")),
            Some(file(PATH, 8, 10, true, known("b"))),
        ),
        Case::Equal => (plain(7, 10, known("a")), Some(plain(8, 10, known("a")))),
        Case::OtherSize => (
            plain(7, 10, Digest::Unasked),
            Some(plain(8, 11, Digest::Unasked)),
        ),
        Case::OtherDigest => (plain(7, 10, known("a")), Some(plain(8, 10, known("b")))),
        Case::Missing => (
            plain(7, 10, known("a")),
            Some(FileContent {
                path: PATH.into(),
                seen: Seen::Missing,
            }),
        ),
        Case::Unreadable => (
            plain(7, 10, known("a")),
            Some(FileContent {
                path: PATH.into(),
                seen: Seen::Unreadable {
                    error: "Permission denied".into(),
                },
            }),
        ),
        Case::Unknown => (plain(7, 10, known("a")), None),
        Case::StillRead => (
            plain(7, 10, known("a")),
            Some(plain(8, 10, Digest::Working { done_bytes: 5 })),
        ),
        Case::ReadingFailed => (
            plain(7, 10, known("a")),
            Some(plain(
                8,
                10,
                Digest::Failed {
                    error: "Input/output error".into(),
                },
            )),
        ),
    };
    let mid = file("/images/mid", 1, 5, false, known("m"));
    let dest = there.into_iter().chain([mid.clone()]).collect();
    (vec![here, mid], dest)
}

fn judge<T>(kind: Kind, case: Case, way: Move, look: impl FnOnce(Both<'_>) -> T) -> T {
    let (guest, (source, dest)) = (with(kind), told(case));
    let is_carried = matches!(kind, Kind::BaseOfCopied | Kind::DeepBase) && way == Move::Cold;
    let brought = is_carried.then(|| PATH.to_owned());
    look(Both {
        guest: &guest,
        source: (&host("kvm1"), &source),
        dest: (&host("kvm2"), &dest),
        brought: brought.as_slice(),
        source_is_dead: way == Move::Evacuation,
    })
}

/// What is to be said: nothing, or one thing.
fn expected(kind: Kind, case: Case, way: Move) -> Option<CheckCode> {
    use CheckCode as C;
    if kind == Kind::Shareable && way == Move::Evacuation {
        // Judged by its storage, with the other disks that are written.
        return None;
    }
    let is_brought = matches!(kind, Kind::BaseOfCopied | Kind::DeepBase) && way == Move::Cold;
    match case {
        Case::SameByMark => None,
        // Of a dead node its storage tells, number and all.
        Case::MarkedAndAnotherNumber if way == Move::Evacuation => None,
        Case::Missing if is_brought => None,
        Case::Missing => Some(match kind {
            Kind::ReadOnly | Kind::Shareable => C::DiskNotCopyable,
            Kind::BaseOfCopied | Kind::DeepBase | Kind::BaseOfReadOnly => C::BackingImage,
            Kind::Kernel => C::FileContent,
        }),
        Case::Unreadable | Case::Unknown => Some(C::FileContent),
        _ if kind == Kind::Shareable => Some(C::DiskNotShared),
        Case::Equal => None,
        Case::MarkedAndAnotherNumber
        | Case::OtherSize
        | Case::OtherDigest
        | Case::StillRead
        | Case::ReadingFailed => Some(C::FileContent),
    }
}

#[test]
fn every_kind_of_file_is_the_same_or_equal_or_refused() {
    for kind in KINDS {
        for case in CASES {
            for way in [Move::Live, Move::Cold, Move::Evacuation] {
                let found = judge(kind, case, way, |both| codes(&both.failures()));
                let wanted: Vec<_> = expected(kind, case, way).into_iter().collect();
                assert_eq!(found, wanted, "{kind:?}, {case:?}, {way:?}");
            }
        }
    }
}

#[test]
fn a_refusal_names_what_was_seen_where_and_what_to_do() {
    let words = |case| {
        let failures = judge(Kind::BaseOfCopied, case, Move::Live, |b| b.failures());
        failures[0].clone()
    };
    let digests = words(Case::OtherDigest);
    assert_eq!(
        digests.message,
        "/images/file is another file on kvm2, and is base image of disk vda of the guest: \
         SHA-256 a on kvm1, SHA-256 b on kvm2"
    );
    assert!(
        digests.remedy.contains("copy it from kvm1"),
        "{}",
        digests.remedy
    );
    let sizes = words(Case::OtherSize).message;
    assert!(
        sizes.ends_with("10 bytes on kvm1, 11 bytes on kvm2"),
        "{sizes}"
    );
    let unknown = words(Case::Unknown);
    assert!(
        unknown
            .message
            .contains("the agent on kvm2 is of a version")
    );
    assert!(unknown.remedy.contains("drover-compute on kvm2"));
    let unread = words(Case::StillRead).message;
    assert!(
        unread.contains("all read on kvm1, 0 MiB on kvm2"),
        "{unread}"
    );
}

#[test]
fn only_what_digests_decide_is_read() {
    for kind in KINDS {
        for case in CASES {
            let undecided = judge(kind, case, Move::Live, |both| both.undecided());
            let wanted = case == Case::StillRead && kind != Kind::Shareable;
            assert_eq!(!undecided.is_empty(), wanted, "{kind:?}, {case:?}");
        }
    }
    let plan = judge(Kind::Kernel, Case::StillRead, Move::Live, |both| {
        both.known_failures()
    });
    assert_eq!(plan, [], "a plan waits for nothing");
}

#[test]
fn what_was_compared_has_to_stay_as_it_was() {
    let checked = judge(Kind::DeepBase, Case::Equal, Move::Live, |both| {
        both.checked()
    });
    let stamps = |files: &[CheckedFile]| -> Vec<_> {
        let of = |f: &CheckedFile| (f.path.clone(), f.stamp.clone());
        files.iter().map(of).collect()
    };
    let mid = ("/images/mid".to_owned(), Some("1:5".to_owned()));
    let on = |stamp: &str| (PATH.to_owned(), Some(stamp.to_owned()));
    assert_eq!(stamps(&checked.source), [mid.clone(), on("7:10")]);
    assert_eq!(stamps(&checked.dest), [mid, on("8:10")]);
    let same = judge(Kind::Kernel, Case::SameByMark, Move::Live, |both| {
        both.checked()
    });
    assert_eq!(
        stamps(&same.dest),
        [(PATH.to_owned(), None)],
        "as others write it"
    );
}

#[test]
fn what_a_dead_node_never_told_is_not_believed_equal() {
    let guest = with(Kind::ReadOnly);
    let there = |marked| vec![file(PATH, 8, 10, marked, known("a"))];
    let told = |source: Vec<FileContent>, marked| {
        let dest = there(marked);
        let both = Both {
            guest: &guest,
            source: (&host("kvm1"), &source),
            dest: (&host("kvm2"), &dest),
            brought: &[],
            source_is_dead: true,
        };
        assert_eq!(
            both.undecided(),
            Vec::<String>::new(),
            "nobody can be asked"
        );
        codes(&both.failures())
    };
    let half = || vec![file(PATH, 7, 10, false, Digest::Working { done_bytes: 5 })];
    assert_eq!(told(vec![], false), [CheckCode::FileContent]);
    assert_eq!(told(half(), false), [CheckCode::FileContent]);
    assert_eq!(
        told(vec![], true),
        [],
        "its storage shows that it is the same"
    );
}

#[test]
fn a_path_may_lead_to_two_files_in_one_directory() {
    let mut source = super::super::tests::source_facts();
    let mut dest = super::super::tests::destination_facts();
    let path = "/images/vm1.qcow2";
    source.contents = vec![file(path, 7, 10, false, Digest::Unasked)];
    for (inode, shared) in [(7, true), (8, false)] {
        dest.disks[0].shared = true;
        dest.contents = vec![file(path, inode, 10, true, Digest::Unasked)];
        unshare_other_files(&guest(), &source, &mut dest);
        assert_eq!(dest.disks[0].shared, shared);
    }
    dest.contents[0].seen = Seen::Unreadable {
        error: "its data are in another file".to_owned(),
    };
    dest.disks[0].shared = true;
    unshare_other_files(&guest(), &source, &mut dest);
    assert!(!dest.disks[0].shared, "what is in it is not known");
    dest.contents.clear();
    dest.disks[0].shared = true;
    unshare_other_files(&guest(), &source, &mut dest);
    assert!(
        dest.disks[0].shared,
        "an agent that does not say is believed"
    );
}

#[test]
fn an_address_that_is_not_there_is_named() {
    let fact = |error: Option<&str>| AddressFact {
        bound: BoundAddress {
            address: "100.100.100.11".into(),
            port: Some(5901),
            udp: false,
            what: "its VNC display".into(),
        },
        error: error.map(str::to_owned),
    };
    assert_eq!(addresses(&[fact(None)], &host("kvm2")), []);
    let failures = addresses(&[fact(Some("no interface has it"))], &host("kvm2"));
    assert_eq!(codes(&failures), [CheckCode::BoundAddress]);
    assert_eq!(
        failures[0].message,
        "its VNC display is bound to 100.100.100.11 port 5901, which QEMU on kvm2 could not have: \
         no interface has it"
    );
    for way in [
        Way::Live(LiveOptions::default()),
        Way::Cold(ColdOptions::default()),
    ] {
        let mut facts = super::super::tests::destination_facts();
        facts.addresses = vec![fact(Some("no interface has it"))];
        let inventory = super::super::tests::inventory();
        let found = super::super::destination(&guest(), &inventory, &facts, &host("kvm2"), &way);
        assert!(codes(&found).contains(&CheckCode::BoundAddress), "{way:?}");
    }
}
