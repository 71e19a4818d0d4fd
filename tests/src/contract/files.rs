//! Points about files: disks that are made and removed, marks that prove what
//! is shared.

use anyhow::{Context, Result, bail, ensure};
use drover_compute::hypervisor::{self, DestinationQuestion, Hypervisor, HypervisorError};
use drover_model::{
    api::compute::Mark,
    content::{BoundAddress, Digest, FileContent, Seen},
    error::ErrorClass,
    guest::{Disk, DiskSource, Guest},
    ids::MigrationId,
};

use super::{Place, Stage, Wish, assert_class, assert_wrong_state, nobody};

const DISK_BYTES: u64 = 16 << 20;

/// A disk of 16 MiB there.
pub fn disk_at(path: &str, format: &str) -> Disk {
    Disk {
        target: "vda".to_owned(),
        device: "disk".to_owned(),
        source: DiskSource::File {
            path: path.to_owned(),
        },
        format: format.to_owned(),
        cache: Some("none".to_owned()),
        read_only: false,
        shareable: false,
        virtual_bytes: DISK_BYTES,
        allocated_bytes: 0,
        backing: Vec::new(),
    }
}

/// Makes a disk as a destination does, which holds its place first.
///
/// # Errors
/// The driver's.
pub async fn make_disk(driver: &dyn Hypervisor, disk: &Disk) -> hypervisor::Result<()> {
    let path = disk.local_path().unwrap_or_default().to_owned();
    driver.reserve_file(&path, false).await?;
    let inode = inode_of(driver, path).await?;
    driver.create_disk(disk, inode).await
}

async fn inode_of(driver: &dyn Hypervisor, path: String) -> hypervisor::Result<u64> {
    let seen = driver.contents(&[path], &[]).await?;
    match seen.first().map(|file| &file.seen) {
        Some(Seen::File { inode, .. }) => Ok(*inode),
        other => Err(HypervisorError::Bug(format!("it was just made: {other:?}"))),
    }
}

fn fresh_path(stage: &dyn Stage) -> String {
    format!("{}/{}.img", stage.shared_directory(), nobody())
}

/// A disk is made, and removed, and removing it again is no error.
///
/// # Errors
/// The point is broken.
pub async fn a_disk_is_made_and_removed(stage: &dyn Stage) -> Result<()> {
    let a = stage.a();
    for format in ["qcow2", "raw"] {
        let path = fresh_path(stage);
        make_disk(&*a, &disk_at(&path, format)).await?;
        ensure!(
            stage.fingerprint(&path).await?.is_some(),
            "no {format} file"
        );
        a.remove_disk(&path).await?;
        ensure!(stage.fingerprint(&path).await?.is_none(), "{format} left");
        a.remove_disk(&path).await.context("the second time")?;
    }
    Ok(())
}

/// A file that is there is not overwritten, not even by the same disk.
///
/// # Errors
/// The point is broken.
pub async fn no_disk_is_made_over_a_file(stage: &dyn Stage) -> Result<()> {
    let path = fresh_path(stage);
    stage.write(&path, "precious").await?;
    let before = stage.fingerprint(&path).await?;
    let result = make_disk(&*stage.a(), &disk_at(&path, "qcow2")).await;
    assert_exists("over a file", result)?;
    ensure!(stage.fingerprint(&path).await? == before, "it was changed");
    let path = fresh_path(stage);
    let disk = disk_at(&path, "qcow2");
    make_disk(&*stage.a(), &disk).await?;
    let before = stage.fingerprint(&path).await?;
    let result = make_disk(&*stage.a(), &disk).await;
    assert_exists("over a disk", result)?;
    ensure!(stage.fingerprint(&path).await? == before, "it was changed");
    let inode = inode_of(&*stage.a(), path.clone()).await?;
    let result = stage.a().create_disk(&disk, inode ^ 1).await;
    assert_exists("over a file that was not reserved", result)?;
    ensure!(stage.fingerprint(&path).await? == before, "it was changed");
    let again = stage.a().create_disk(&disk, inode).await;
    again.context("in what a former attempt has left")
}

/// A place that was reserved is left alone once somebody has written to it.
///
/// # Errors
/// The point is broken.
pub async fn no_disk_is_made_in_what_somebody_wrote(stage: &dyn Stage) -> Result<()> {
    let (a, path) = (stage.a(), fresh_path(stage));
    a.reserve_file(&path, false).await?;
    let inode = inode_of(&*a, path.clone()).await?;
    stage.change(&path).await?;
    let before = stage.fingerprint(&path).await?;
    for format in ["qcow2", "raw"] {
        let result = a.create_disk(&disk_at(&path, format), inode).await;
        assert_exists("in what somebody wrote", result)?;
        ensure!(stage.fingerprint(&path).await? == before, "it was changed");
    }
    Ok(())
}

/// The same of one that a guest uses, running or not.
///
/// # Errors
/// The point is broken.
pub async fn no_disk_is_made_in_what_a_guest_uses(stage: &dyn Stage) -> Result<()> {
    use drover_model::guest::PowerState::{Running, Shutdown};
    for state in [Running, Shutdown] {
        let wish = Wish {
            state,
            ..Wish::disk(Place::Shared)
        };
        let (a, id) = (stage.a(), stage.guest(wish).await?);
        let guest = a.guest(id).await?.context("the guest is on a")?;
        let disk = guest.disks.first().context("it has a disk")?;
        let path = disk.local_path().context("its disk is a file")?.to_owned();
        let inode = inode_of(&*a, path.clone()).await?;
        let before = stage.fingerprint(&path).await?;
        assert_wrong_state("create_disk", a.create_disk(disk, inode).await)?;
        let is_same = stage.fingerprint(&path).await? == before;
        ensure!(is_same || state == Running, "it was changed");
    }
    Ok(())
}

fn assert_exists(what: &str, result: hypervisor::Result<()>) -> Result<()> {
    let there = matches!(result, Err(HypervisorError::Exists(_)));
    ensure!(there, "{what}: Exists expected, got {result:?}");
    Ok(())
}

/// Without its directory a disk is not made.
///
/// # Errors
/// The point is broken.
pub async fn no_disk_is_made_without_a_directory(stage: &dyn Stage) -> Result<()> {
    let path = format!("{}/none/disk.qcow2", stage.shared_directory());
    let result = make_disk(&*stage.a(), &disk_at(&path, "qcow2")).await;
    assert_class("create_disk", ErrorClass::Refused, result)?;
    ensure!(stage.fingerprint(&path).await?.is_none(), "it was made");
    Ok(())
}

/// A disk that a guest uses, running or not, is not removed.
///
/// # Errors
/// The point is broken.
pub async fn no_disk_in_use_is_removed(stage: &dyn Stage) -> Result<()> {
    use drover_model::guest::PowerState::{Running, Shutdown};
    for state in [Running, Shutdown] {
        let wish = Wish {
            state,
            ..Wish::disk(Place::Shared)
        };
        let id = stage.guest(wish).await?;
        let guest = stage.a().guest(id).await?.context("the guest is on a")?;
        let path = guest.disks[0].local_path().context("its disk is a file")?;
        let result = stage.a().remove_disk(path).await;
        assert_class("remove_disk", ErrorClass::Refused, result)?;
        ensure!(stage.fingerprint(path).await?.is_some(), "{state:?}: gone");
    }
    Ok(())
}

/// A mark that is left twice is one; the other node sees it where the
/// directory is shared; it is removed, and removing it again is no error.
///
/// # Errors
/// The point is broken.
pub async fn a_mark_proves_a_shared_directory(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::disk(Place::Shared)).await?;
    let (a, migration) = (stage.a(), MigrationId::generate());
    let guest = a.guest(id).await?.context("the guest is on a")?;
    let marks = a.leave_marks(migration, &guest.disks).await?;
    let again = a.leave_marks(migration, &guest.disks).await?;
    ensure!(marks == again, "left twice: {marks:?} {again:?}");
    ensure!(marks.len() == 1, "one directory, {} marks", marks.len());
    ensure!(marks[0].error.is_none(), "{:?}", marks[0].error);
    let path = marks[0].path.clone().context("it has no path")?;
    ensure!(stage.fingerprint(&path).await?.is_some(), "no file");
    ensure!(is_shared(stage, &guest, &marks).await?, "b does not see it");
    let other = Mark {
        content: "another's".to_owned(),
        ..marks[0].clone()
    };
    ensure!(
        !is_shared(stage, &guest, &[other]).await?,
        "b sees another's"
    );
    for attempt in ["once", "twice"] {
        let removed = a.remove_marks(&marks).await;
        removed.with_context(|| format!("removed {attempt}"))?;
        ensure!(stage.fingerprint(&path).await?.is_none(), "{attempt}");
    }
    ensure!(!is_shared(stage, &guest, &marks).await?, "b sees it still");
    Ok(())
}

/// Two migrations' marks are two.
///
/// # Errors
/// The point is broken.
pub async fn marks_belong_to_their_migration(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::disk(Place::Shared)).await?;
    let a = stage.a();
    let guest = a.guest(id).await?.context("the guest is on a")?;
    let first = a.leave_marks(MigrationId::generate(), &guest.disks).await?;
    let second = a.leave_marks(MigrationId::generate(), &guest.disks).await?;
    a.remove_marks(&first).await?;
    ensure!(
        is_shared(stage, &guest, &second).await?,
        "the second is gone"
    );
    a.remove_marks(&second).await?;
    Ok(())
}

/// A directory that each node has for itself is not shared. (Where both drivers
/// see one file system there is none.)
///
/// # Errors
/// The point is broken.
pub async fn a_mark_in_a_local_directory_proves_nothing(stage: &dyn Stage) -> Result<()> {
    let Some(directory) = stage.local_directory() else {
        return unwritable_marks_say_why(stage).await;
    };
    let a = stage.a();
    let id = stage.guest(Wish::disk(Place::Local)).await?;
    let guest = a.guest(id).await?.context("the guest is on a")?;
    let marks = a.leave_marks(MigrationId::generate(), &guest.disks).await?;
    ensure!(marks[0].directory == directory, "{marks:?}");
    ensure!(!is_shared(stage, &guest, &marks).await?, "b sees it");
    a.remove_marks(&marks).await?;
    unwritable_marks_say_why(stage).await
}

async fn unwritable_marks_say_why(stage: &dyn Stage) -> Result<()> {
    let nowhere = format!("{}/none/disk.qcow2", stage.shared_directory());
    let disks = [disk_at(&nowhere, "qcow2")];
    let marks = stage
        .a()
        .leave_marks(MigrationId::generate(), &disks)
        .await?;
    let mark = marks.first().context("no mark at all")?;
    ensure!(mark.path.is_none() && mark.error.is_some(), "{mark:?}");
    stage.a().remove_marks(&marks).await?;
    Ok(())
}

async fn is_shared(stage: &dyn Stage, guest: &Guest, marks: &[Mark]) -> Result<bool> {
    let question = DestinationQuestion { guest, marks };
    let answer = stage.b().answer_destination(question).await?;
    let disk = answer.disks.first().context("nothing about its disk")?;
    Ok(disk.shared)
}

/// What is in a file is told: whether the other node's mark lies beside it, how
/// long it is, its digest, which follows it; and that it is missing, or is none.
///
/// # Errors
/// The point is broken.
pub async fn contents_are_told_apart(stage: &dyn Stage) -> Result<()> {
    let (a, b) = (stage.a(), stage.b());
    let at = |name: &str| format!("{}/content-{name}.img", stage.shared_directory());
    let (one, other, none) = (at("one"), at("other"), at("none"));
    stage.write(&one, "the bytes of a base image").await?;
    stage.write(&other, "the bytes of some image!!").await?;
    let paths = [one.clone(), other.clone(), none];

    let marks = a
        .leave_marks(MigrationId::generate(), &[disk_at(&one, "raw")])
        .await?;
    for (marks, expected) in [(&marks[..], true), (&[], false)] {
        let found = b.contents(&paths, marks).await?;
        ensure!(found.len() == 3, "{found:?}");
        ensure!(is_marked(&found[0])? == expected, "{found:?}");
        ensure!(found[2].seen == Seen::Missing, "{found:?}");
    }
    a.remove_marks(&marks).await?;

    let on_a = sums(&*a, &paths[..2]).await?;
    let on_b = sums(&*b, &paths[..2]).await?;
    ensure!(on_a == on_b, "the same files: {on_a:?} {on_b:?}");
    ensure!(on_a[0].0 == on_a[1].0, "as long: {on_a:?}");
    ensure!(on_a[0].2 != on_a[1].2, "other bytes: {on_a:?}");
    stage.change(&one).await?;
    let changed = sums(&*b, &paths[..1]).await?;
    ensure!(changed[0].1 != on_b[0].1, "its stamp is what it was");
    ensure!(changed[0].2 != on_b[0].2, "its digest is what it was");
    Ok(())
}

fn is_marked(file: &FileContent) -> Result<bool> {
    match &file.seen {
        Seen::File { marked, .. } => Ok(*marked),
        other => bail!("{}: {other:?}", file.path),
    }
}

/// Length, stamp and digest of files, once they are read.
async fn sums(driver: &dyn Hypervisor, paths: &[String]) -> Result<Vec<(u64, String, String)>> {
    super::until("the files are read", async || {
        let found = driver.digests(paths).await?;
        if found.iter().any(FileContent::is_working) {
            return Ok(None);
        }
        let known = found.iter().map(|file| match &file.seen {
            Seen::File {
                length_bytes,
                stamp,
                digest: Digest::Known { sha256 },
                ..
            } => Ok((*length_bytes, stamp.clone(), sha256.clone())),
            other => bail!("{}: {other:?}", file.path),
        });
        known.collect::<Result<Vec<_>>>().map(Some)
    })
    .await
}

/// An address that the node has can be bound to, another cannot.
///
/// # Errors
/// The point is broken.
pub async fn a_guest_is_bound_to_what_is_there(stage: &dyn Stage) -> Result<()> {
    let bound = ["127.0.0.1", "192.0.2.1"].map(|address| BoundAddress {
        address: address.to_owned(),
        port: None,
        udp: false,
        what: "its display".to_owned(),
    });
    for driver in [stage.a(), stage.b()] {
        let facts = driver.addresses(&bound).await?;
        let errors: Vec<bool> = facts.iter().map(|f| f.error.is_some()).collect();
        ensure!(errors == [false, true], "{facts:?}");
    }
    Ok(())
}
