//! Files arrive as they are: bytes, length, holes.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use crate::rig::{DATA, Fate, KIB, MIB, Proxy, Rig, assert_same, fill, flip, is_kind, make, open};
use drover_carrier::{Control, Mode, SendError, data_bytes, send};

#[test]
fn sparse_files_of_all_sizes_arrive() {
    let rig = Rig::new(6);
    make(
        &rig.from(0),
        64 * MIB,
        &[(0, 3 * MIB), (40 * MIB + 4096, MIB)],
    );
    make(&rig.from(1), 0, &[]);
    make(&rig.from(2), 1, &[(0, 1)]);
    make(&rig.from(3), 3 * MIB + 17, &[(0, 3 * MIB + 17)]);
    make(&rig.from(4), 100 * MIB, &[]);
    make(&rig.from(5), 5 * MIB + 5, &[(2 * MIB + 5, 3 * MIB)]);
    let summary = rig.send().unwrap();
    rig.assert_same();
    let data: u64 = (0..6).map(|file| data_bytes(rig.from(file)).unwrap()).sum();
    assert_eq!(summary.total_bytes, data);
    assert_eq!(summary.reused_bytes, 0);
    assert!(summary.sent_bytes <= data);
    assert_eq!(fs::metadata(rig.to(4)).unwrap().blocks(), 0);
}

#[test]
fn many_small_extents_arrive_and_do_not_grow() {
    fastrand::seed(7);
    let rig = Rig::new(3);
    for file in 0..3 {
        let extents: Vec<_> = (0..400)
            .map(|_| (fastrand::u64(0..64 * MIB), fastrand::u64(1..40 * KIB)))
            .collect();
        make(&rig.from(file), 64 * MIB + 40 * KIB + 3, &extents);
    }
    let summary = rig.send().unwrap();
    rig.assert_same();
    assert!(summary.sent_bytes <= summary.total_bytes);
}

#[test]
fn zeros_that_are_data_do_not_travel() {
    let rig = Rig::new(1);
    let file = File::create(rig.from(0)).unwrap();
    file.write_all_at(&vec![0; 8 << 20], 0).unwrap();
    fill(&file, 5 * MIB + 100, 200);
    file.sync_all().unwrap();
    let control = Control::new();
    let summary = send(&rig.spec(), &control).unwrap();
    rig.assert_same();
    assert_eq!(summary.total_bytes, 8 * MIB);
    assert_eq!(summary.sent_bytes, 64 * KIB);
    assert_eq!(control.progress().done_bytes, 8 * MIB);
    assert!(fs::metadata(rig.to(0)).unwrap().blocks() < 1024);
}

#[test]
fn what_the_destination_held_before_is_gone() {
    let rig = Rig::new(2);
    make(&rig.from(0), 20 * MIB + 100, &[(7 * MIB, MIB)]);
    make(&rig.to(0), 30 * MIB, &[(0, 30 * MIB)]);
    make(&rig.from(1), 20 * MIB + 100, &[(7 * MIB, MIB)]);
    make(&rig.to(1), 3 * MIB, &[(0, 3 * MIB)]);
    rig.send().unwrap();
    rig.assert_same();
}

#[test]
fn on_resume_holes_are_made_where_the_source_has_them() {
    let rig = Rig::new(1);
    make(
        &rig.from(0),
        20 * MIB,
        &[(2 * MIB, 2 * MIB), (10 * MIB, MIB)],
    );
    rig.send().unwrap();
    let target = open(&rig.to(0));
    fill(&target, 5 * MIB, MIB + 3);
    fill(&target, 10 * MIB + 7, 5);
    let summary = rig.resume().unwrap();
    rig.assert_same();
    assert_eq!(summary.sent_bytes, MIB);
    assert_eq!(summary.reused_bytes, 2 * MIB);
}

#[test]
fn a_second_sender_sends_only_what_differs() {
    let rig = Rig::new(2);
    make(&rig.from(0), 20 * MIB, &[(0, 10 * MIB)]);
    make(&rig.from(1), 70 * KIB, &[(0, 70 * KIB)]);
    rig.send().unwrap();
    assert_eq!(rig.resume().unwrap().sent_bytes, 0);
    flip(&rig.from(0), 3 * MIB + 9);
    let summary = rig.resume().unwrap();
    rig.assert_same();
    assert_eq!(summary.sent_bytes, MIB);
    assert_eq!(summary.reused_bytes, summary.total_bytes - MIB);
}

#[test]
fn an_image_that_is_there_is_compared_and_never_written() {
    let rig = Rig::with_mode(1, Mode::Compare);
    make(&rig.from(0), 20 * MIB, &[(MIB, 10 * MIB)]);
    fs::copy(rig.from(0), rig.to(0)).unwrap();
    let summary = rig.send().unwrap();
    assert_eq!((summary.sent_bytes, summary.reused_bytes), (0, 10 * MIB));

    let differs = |what: &str| {
        let held = fs::read(rig.to(0)).ok();
        let error = rig.send().unwrap_err();
        assert!(
            matches!(error, SendError::Differs { file: 0 }),
            "{what}: {error}"
        );
        assert!(fs::read(rig.to(0)).ok() == held, "{what}: was written");
    };
    flip(&rig.to(0), 5 * MIB + 1);
    differs("in its data");
    fs::copy(rig.from(0), rig.to(0)).unwrap();
    flip(&rig.to(0), 15 * MIB);
    differs("where the source has a hole");
    fs::copy(rig.from(0), rig.to(0)).unwrap();
    open(&rig.to(0)).set_len(20 * MIB - 1).unwrap();
    differs("shorter");
    open(&rig.to(0)).set_len(20 * MIB + 1).unwrap();
    differs("longer");
    fs::remove_file(rig.to(0)).unwrap();
    let error = rig.send().unwrap_err();
    assert!(
        matches!(error, SendError::Destination { file: 0, .. }),
        "{error}"
    );
    assert!(!rig.to(0).exists());
}

#[test]
fn links_and_what_is_no_file_are_not_touched() {
    let rig = Rig::new(1);
    make(&rig.from(0), MIB, &[(0, MIB)]);
    let other = rig.dir.path().join("other");
    fs::write(&other, "precious").unwrap();
    symlink(&other, rig.to(0)).unwrap();
    let error = rig.send().unwrap_err();
    assert!(
        matches!(error, SendError::Destination { file: 0, .. }),
        "{error}"
    );
    assert_eq!(fs::read(&other).unwrap(), b"precious");
    fs::remove_file(rig.to(0)).unwrap();
    fs::create_dir(rig.to(0)).unwrap();
    let error = rig.send().unwrap_err();
    assert!(
        matches!(error, SendError::Destination { file: 0, .. }),
        "{error}"
    );

    fs::remove_file(rig.from(0)).unwrap();
    symlink(&other, rig.from(0)).unwrap();
    let error = rig.send().unwrap_err();
    assert!(matches!(error, SendError::Source { .. }), "{error}");
}

#[test]
fn a_source_that_changes_meanwhile_is_no_success() {
    let rig = Rig::new(1);
    make(&rig.from(0), 4 * MIB, &[(0, 4 * MIB)]);
    let source = rig.from(0);
    let proxy = Proxy::new(rig.port, move |_, frame| {
        if is_kind(frame, DATA) {
            flip(&source, 3);
        }
        Fate::Pass
    });
    let error = rig.send_through(&proxy).unwrap_err();
    assert!(matches!(error, SendError::Source { .. }), "{error}");
}

/// A file system of 4 MiB; nothing without the right to mount.
struct Mount(PathBuf);

impl Mount {
    fn new(at: &Path) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=4m", "none"]).arg(at);
        let mounted = mount.output().is_ok_and(|output| output.status.success());
        mounted.then(|| Self(at.to_owned()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_is_told_in_words() {
    let rig = Rig::new(1);
    let small = rig.dir.path().join("small");
    let Some(_mount) = Mount::new(&small) else {
        eprintln!("skipped: may not mount");
        return;
    };
    make(&rig.from(0), 16 * MIB, &[(0, 16 * MIB)]);
    let migration = uuid::Uuid::new_v4();
    let incoming = drover_carrier::Incoming {
        path: small.join("disk"),
        mode: Mode::Fresh,
    };
    let expected = rig.receiver().expect(migration, &rig.token, vec![incoming]);
    expected.unwrap();
    let spec = drover_carrier::SendSpec {
        migration,
        ..rig.spec()
    };
    let error = send(&spec, &Control::new()).unwrap_err();
    let SendError::Destination { file: 0, reason } = &error else {
        panic!("{error}");
    };
    assert!(reason.contains("No space left"), "{reason}");
    rig.receiver().forget(migration);
}

/// A loop device over a file; nothing without the right to make one.
struct Loop(String);

impl Loop {
    fn new(over: &Path) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["-f", "--show"])
            .arg(over)
            .output();
        let output = output.ok().filter(|output| output.status.success())?;
        Some(Self(
            String::from_utf8(output.stdout).unwrap().trim().to_owned(),
        ))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn devices_are_read_and_written_whole() {
    let rig = Rig::new(1);
    make(&rig.from(0), 24 * MIB, &[(MIB, 3 * MIB), (20 * MIB, MIB)]);
    let held = rig.dir.path().join("held");
    make(&held, 32 * MIB, &[(0, 32 * MIB)]);
    let Some(device) = Loop::new(&held) else {
        eprintln!("skipped: no loop devices");
        return;
    };
    let migration = uuid::Uuid::new_v4();
    let mut incoming = rig.incoming();
    incoming[0].path = device.0.clone().into();
    rig.receiver()
        .expect(migration, &rig.token, incoming)
        .unwrap();
    let mut spec = rig.spec();
    spec.migration = migration;
    send(&spec, &Control::new()).unwrap();
    let (from, to) = (fs::read(rig.from(0)).unwrap(), fs::read(&device.0).unwrap());
    assert!(
        from == to[..from.len()],
        "the device is not what the file is"
    );
    // And resumed, it all is there.
    spec.resume = true;
    assert_eq!(send(&spec, &Control::new()).unwrap().sent_bytes, 0);

    // Back into a file, of its own length.
    let mut spec = rig.spec();
    spec.files[0].path = device.0.clone().into();
    send(&spec, &Control::new()).unwrap();
    assert!(fs::read(rig.to(0)).unwrap() == to);

    // What does not fit is refused before anything is written.
    make(&rig.from(0), 33 * MIB, &[]);
    let mut spec = rig.spec();
    spec.migration = migration;
    let error = send(&spec, &Control::new()).unwrap_err();
    assert!(matches!(error, SendError::Destination { .. }), "{error}");
    rig.receiver().forget(migration);
    assert_same(&held, &held);
}
