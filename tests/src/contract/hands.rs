//! Points about guests that change hands on their node: NICs, project, and the
//! place of their disks.

use anyhow::{Context, Result, bail, ensure};
use drover_compute::hypervisor::{Hypervisor, HypervisorError, Job, Mirror};
use drover_model::{
    api::compute::{DiskMove, NicMove, TransferPlan},
    error::ErrorClass,
    guest::{
        Guest, NicAttachment,
        PowerState::{self, Running, Shutdown},
        Presence,
    },
    ids::InstanceId,
    migration::TransferMode,
    project::Location,
};

use super::{
    Place, Stage, Wish, assert_class, assert_no_such_guest, assert_wrong_state, nobody, until,
};

/// Data on a disk that is copied so slowly that it can be watched, MiB.
const MUCH_MIB: usize = 12;
/// A limit at which that lasts for seconds.
const SLOWLY: Option<u64> = Some(1 << 20);
const RECEIVER: &str = "contract-receiver";

/// A guest in that state with a disk and a NIC.
fn owned(state: PowerState) -> Wish {
    Wish {
        state,
        nic: true,
        ..Wish::disk(Place::Shared)
    }
}

/// A guest as it runs and as it lasts.
async fn both(a: &dyn Hypervisor, id: InstanceId) -> Result<[Guest; 2]> {
    let now = a.guest(id).await?.context("guest() does not know it")?;
    let lasting = a.lasting_guest(id).await?;
    Ok([now, lasting.context("lasting_guest() does not know it")?])
}

fn path_of(guest: &Guest) -> Result<String> {
    let disk = guest.disks.first().context("it has no disk")?;
    Ok(disk.local_path().context("its disk is no file")?.to_owned())
}

async fn assert_on(a: &dyn Hypervisor, id: InstanceId, path: &str) -> Result<()> {
    for guest in both(a, id).await? {
        let uses = path_of(&guest)?;
        ensure!(uses == path, "{path} expected, it uses {uses}");
    }
    Ok(())
}

async fn assert_is(a: &dyn Hypervisor, id: InstanceId, state: PowerState) -> Result<()> {
    let found = a.presence(id).await?;
    let wanted = Presence::Present(state);
    ensure!(found == wanted, "{state:?} expected, it is {found:?}");
    Ok(())
}

/// A guest's disk to another directory.
async fn into(a: &dyn Hypervisor, id: InstanceId, directory: &str) -> Result<DiskMove> {
    let [_, guest] = both(a, id).await?;
    let disk = guest.disks.first().context("it has no disk")?;
    Ok(DiskMove {
        target: disk.target.clone(),
        from: path_of(&guest)?,
        to: format!("{directory}/{id}.{}", disk.format),
        format: disk.format.clone(),
        backing: disk.backing.clone(),
        flatten: false,
        data_bytes: disk.allocated_bytes,
    })
}

/// All NICs of a guest to another network, the rest as it says.
async fn plan(
    a: &dyn Hypervisor,
    id: InstanceId,
    to: &NicAttachment,
    mode: TransferMode,
) -> Result<TransferPlan> {
    let [_, guest] = both(a, id).await?;
    ensure!(!guest.nics.is_empty(), "it has no NIC");
    let nics = guest.nics.into_iter().map(|nic| NicMove {
        mac: nic.mac,
        from: nic.attachment,
        to: to.clone(),
        new_mac: None,
    });
    Ok(TransferPlan {
        mode,
        project: RECEIVER.parse()?,
        project_name: "Receiver of the contract".to_owned(),
        nics: nics.collect(),
        disks: Vec::new(),
        name: None,
        title: Some("Handed over".to_owned()),
    })
}

/// Project and networks of the guest are the receiver's, as it runs and as it lasts.
async fn assert_receivers(
    a: &dyn Hypervisor,
    id: InstanceId,
    network: &NicAttachment,
) -> Result<()> {
    for guest in both(a, id).await? {
        ensure!(guest.project == RECEIVER, "it is {}'s", guest.project);
        let mut nics = guest.nics.iter();
        let plugged = nics.all(|nic| nic.attachment == *network);
        ensure!(plugged, "{network:?} expected: {:?}", guest.nics);
    }
    Ok(())
}

async fn until_ready(a: &dyn Hypervisor, id: InstanceId, disk: &DiskMove) -> Result<()> {
    until("the copy is ready", async || {
        match a.mirror_disk(id, disk, None).await? {
            Mirror::Ready => Ok(Some(())),
            Mirror::Copying { .. } => Ok(None),
            Mirror::Moved => bail!("nobody asked for it to be moved"),
        }
    })
    .await
}

fn assert_exists<T: std::fmt::Debug>(result: drover_compute::hypervisor::Result<T>) -> Result<()> {
    let there = matches!(result, Err(HypervisorError::Exists(_)));
    ensure!(there, "Exists expected, got {result:?}");
    Ok(())
}

// ---- what is there -------------------------------------------------------------------

/// Networks that are here are told from those that are not.
///
/// # Errors
/// The point is broken.
pub async fn networks_are_told_apart(stage: &dyn Stage) -> Result<()> {
    let (bridge, network) = ("br-none".to_owned(), "contract-none".to_owned());
    let here = stage.network_in_sight();
    let asked = [
        NicAttachment::Bridge { bridge },
        here.clone(),
        NicAttachment::Network { network },
    ];
    let found = stage.a().networks_present(&asked).await?;
    ensure!(found == [here], "{found:?}");
    let none = stage.a().networks_present(&[]).await?;
    ensure!(none.is_empty(), "{none:?}");
    Ok(())
}

/// A location is told with its room and with what has one of the names there;
/// why there is none is said in words.
///
/// # Errors
/// The point is broken.
pub async fn locations_are_told(stage: &dyn Stage) -> Result<()> {
    let receiver = stage.receiver().await?;
    let first = receiver.directories.first().context("no directory")?;
    stage.write(&format!("{first}/taken.img"), "x").await?;
    stage.write(&format!("{first}/other.img"), "x").await?;
    let directory = |path: &str| Location::Directory {
        path: path.to_owned(),
    };
    let pool = |pool: &str| Location::Pool {
        pool: pool.to_owned(),
    };
    let asked = [
        directory(&format!("{first}/none")),
        pool(&receiver.pool),
        directory(first),
        pool("contract-none"),
    ];
    let names = ["free.img".to_owned(), "taken.img".to_owned()];
    let facts = stage.a().location_facts(&asked, &names).await?;
    let told = facts.iter().map(|fact| &fact.location);
    ensure!(told.eq(asked.iter()), "another order: {facts:?}");
    let [missing, by_pool, by_path, unknown] = &facts[..] else {
        bail!("{} facts", facts.len());
    };
    for none in [missing, unknown] {
        let words = none.directory.as_ref().err();
        let said = words.is_some_and(|words| !words.is_empty());
        ensure!(said && none.taken.is_empty(), "{none:?}");
    }
    for fact in [by_pool, by_path] {
        ensure!(fact.directory.as_ref() == Ok(first), "{fact:?}");
        ensure!(fact.free_bytes > 0, "{fact:?}");
        ensure!(fact.taken == ["taken.img"], "{fact:?}");
    }
    ensure!(by_pool.file_system == by_path.file_system, "{facts:?}");
    Ok(())
}

/// A file of another domain is told, whether that runs or not.
///
/// # Errors
/// The point is broken.
pub async fn other_users_of_a_file_are_named(stage: &dyn Stage) -> Result<()> {
    let (a, id) = (stage.a(), stage.guest(owned(Running)).await?);
    let own = path_of(&both(&*a, id).await?[0])?;
    for state in [Running, Shutdown] {
        let other = stage.guest(owned(state)).await?;
        let [other, _] = both(&*a, other).await?;
        let theirs = path_of(&other)?;
        let asked = [own.clone(), theirs.clone()];
        let shared = a.other_users(id, &asked).await?;
        ensure!(shared.len() == 1, "{state:?}: {shared:?}");
        ensure!(shared[0].path == theirs, "{shared:?}");
        ensure!(shared[0].domain == other.name, "{shared:?}");
    }
    Ok(())
}

// ---- NICs and project ----------------------------------------------------------------

/// A guest that is handed over is the receiver's, twice as once, and is what it
/// was when it is handed back.
///
/// # Errors
/// The point is broken.
pub async fn a_running_guest_is_handed_over_and_back(stage: &dyn Stage) -> Result<()> {
    let (a, id) = (stage.a(), stage.guest(owned(Running)).await?);
    let network = stage.receiver().await?.bridge;
    let before = both(&*a, id).await?;
    let standing = a.standing(id).await?;
    let plan = plan(&*a, id, &network, TransferMode::Live).await?;
    for attempt in ["once", "twice"] {
        let handed = a.hand_over(id, &plan).await;
        handed.with_context(|| format!("handed over {attempt}"))?;
        assert_receivers(&*a, id, &network).await.context(attempt)?;
        assert_is(&*a, id, Running).await?;
    }
    for attempt in ["once", "twice"] {
        let back = a.hand_back(id, &standing).await;
        back.with_context(|| format!("handed back {attempt}"))?;
        let after = both(&*a, id).await?;
        ensure!(after == before, "{attempt}: {after:?} {before:?}");
    }
    Ok(())
}

/// What was handed over is still after the guest's next start.
///
/// # Errors
/// The point is broken.
pub async fn handing_over_lasts(stage: &dyn Stage) -> Result<()> {
    let (a, id) = (stage.a(), stage.guest(owned(Running)).await?);
    let network = stage.receiver().await?.bridge;
    let plan = plan(&*a, id, &network, TransferMode::Live).await?;
    a.hand_over(id, &plan).await?;
    a.stop(id).await?;
    a.start(id).await?;
    assert_receivers(&*a, id, &network).await
}

/// Handing back what was not handed over changes nothing.
///
/// # Errors
/// The point is broken.
pub async fn handing_back_after_nothing_is_no_error(stage: &dyn Stage) -> Result<()> {
    let (a, id) = (stage.a(), stage.guest(owned(Running)).await?);
    let before = both(&*a, id).await?;
    let standing = a.standing(id).await?;
    a.hand_back(id, &standing).await?;
    let after = both(&*a, id).await?;
    ensure!(after == before, "{after:?} {before:?}");
    Ok(())
}

/// A network that is not there is plugged into nothing, and what was done
/// before that showed is taken back.
///
/// # Errors
/// The point is broken.
pub async fn a_failed_handing_over_is_taken_back(stage: &dyn Stage) -> Result<()> {
    let (a, id) = (stage.a(), stage.guest(owned(Running)).await?);
    let before = both(&*a, id).await?;
    let standing = a.standing(id).await?;
    let bridge = "br-none".to_owned();
    let nowhere = NicAttachment::Bridge { bridge };
    let plan = plan(&*a, id, &nowhere, TransferMode::Live).await?;
    let handed = a.hand_over(id, &plan).await;
    assert_class("hand_over", ErrorClass::Refused, handed)?;
    a.hand_back(id, &standing).await?;
    let after = both(&*a, id).await?;
    ensure!(after == before, "{after:?} {before:?}");
    Ok(())
}

/// A guest that is off has no live part to change; one that is not there is not.
///
/// # Errors
/// The point is broken.
pub async fn only_an_active_guest_is_handed_over(stage: &dyn Stage) -> Result<()> {
    let (a, id) = (stage.a(), stage.guest(owned(Shutdown)).await?);
    let before = both(&*a, id).await?;
    let receiver = stage.receiver().await?;
    let disk = into(&*a, id, &receiver.directories[0]).await?;
    let plan = plan(&*a, id, &receiver.bridge, TransferMode::Live).await?;
    assert_wrong_state("standing", a.standing(id).await)?;
    assert_wrong_state("hand_over", a.hand_over(id, &plan).await)?;
    let mirrored = a.mirror_disk(id, &disk, None).await;
    assert_wrong_state("mirror_disk", mirrored)?;
    assert_wrong_state("pivot_disk", a.pivot_disk(id, &disk).await)?;
    let after = both(&*a, id).await?;
    ensure!(after == before, "{after:?} {before:?}");
    ensure!(
        stage.fingerprint(&disk.to).await?.is_none(),
        "a file was made"
    );
    assert_no_such_guest("standing", a.standing(nobody()).await)?;
    assert_no_such_guest("hand_over", a.hand_over(nobody(), &plan).await)?;
    let mirrored = a.mirror_disk(nobody(), &disk, None).await;
    assert_no_such_guest("mirror_disk", mirrored)
}

// ---- disks of running guests ---------------------------------------------------------

/// A disk is copied under its running guest, which goes on with the copy and
/// starts from it; the old file is nobody's then.
///
/// # Errors
/// The point is broken.
pub async fn a_disk_moves_under_its_guest(stage: &dyn Stage) -> Result<()> {
    let a = stage.a();
    for directory in stage.receiver().await?.directories {
        let id = stage.guest(owned(Running)).await?;
        let disk = into(&*a, id, &directory).await?;
        until_ready(&*a, id, &disk).await?;
        assert_on(&*a, id, &disk.from).await.context("not yet")?;
        for attempt in ["once", "twice"] {
            let pivoted = a.pivot_disk(id, &disk).await;
            pivoted.with_context(|| format!("pivoted {attempt}"))?;
            assert_on(&*a, id, &disk.to).await.context(attempt)?;
            let mirror = a.mirror_disk(id, &disk, None).await?;
            ensure!(mirror == Mirror::Moved, "{attempt}: {mirror:?}");
        }
        assert_is(&*a, id, Running).await?;
        ensure!(a.job(id).await? == Job::None, "a job is left");
        let same = stage.same_disk(&disk.from, &disk.to).await?;
        ensure!(same, "the copy is another disk");
        a.abandon_mirror(id, &disk).await.context("too late")?;
        assert_on(&*a, id, &disk.to).await.context("too late")?;
        a.remove_disk(&disk.from).await.context("the old file")?;
        a.stop(id).await?;
        a.start(id).await.context("from the copy")?;
        assert_on(&*a, id, &disk.to).await?;
        assert_is(&*a, id, Running).await?;
    }
    Ok(())
}

/// A disk that moved moves back, once the file that it left is gone.
///
/// # Errors
/// The point is broken.
pub async fn a_disk_moves_back(stage: &dyn Stage) -> Result<()> {
    let (a, id) = (stage.a(), stage.guest(owned(Running)).await?);
    let directory = stage.receiver().await?.directories.remove(0);
    let before = both(&*a, id).await?;
    let disk = into(&*a, id, &directory).await?;
    until_ready(&*a, id, &disk).await?;
    a.pivot_disk(id, &disk).await?;
    let back = disk.reversed();
    assert_exists(a.mirror_disk(id, &back, None).await).context("the old file")?;
    a.remove_disk(&disk.from).await?;
    until_ready(&*a, id, &back).await?;
    a.pivot_disk(id, &back).await?;
    assert_on(&*a, id, &disk.from).await?;
    let same = stage.same_disk(&disk.from, &disk.to).await?;
    ensure!(same, "the copy is another disk");
    a.remove_disk(&disk.to).await.context("the new file")?;
    a.stop(id).await?;
    a.start(id).await.context("from its old place")?;
    for (after, before) in both(&*a, id).await?.iter().zip(&before) {
        ensure!(path_of(after)? == path_of(before)?, "{after:?}");
        ensure!(after.disks[0].format == before.disks[0].format, "{after:?}");
        ensure!(after.nics == before.nics, "{after:?}");
    }
    Ok(())
}

/// A copy that is given up leaves the guest on its old file, and a new file that
/// is nobody's.
///
/// # Errors
/// The point is broken.
pub async fn an_abandoned_copy_changes_nothing(stage: &dyn Stage) -> Result<()> {
    let (a, id) = (stage.a(), stage.guest(owned(Running)).await?);
    let directory = stage.receiver().await?.directories.remove(0);
    let disk = into(&*a, id, &directory).await?;
    let before = both(&*a, id).await?;
    a.abandon_mirror(id, &disk).await.context("never begun")?;
    until_ready(&*a, id, &disk).await?;
    for attempt in ["once", "twice"] {
        let abandoned = a.abandon_mirror(id, &disk).await;
        abandoned.with_context(|| format!("abandoned {attempt}"))?;
        assert_on(&*a, id, &disk.from).await.context(attempt)?;
    }
    ensure!(a.job(id).await? == Job::None, "a job is left");
    ensure!(
        stage.fingerprint(&disk.to).await?.is_some(),
        "the new file is the caller's to remove"
    );
    assert_wrong_state("pivot_disk", a.pivot_disk(id, &disk).await)?;
    assert_exists(a.mirror_disk(id, &disk, None).await)?;
    a.remove_disk(&disk.to).await.context("the new file")?;
    let after = both(&*a, id).await?;
    for (after, before) in after.iter().zip(&before) {
        ensure!(
            after.disks[0].backing == before.disks[0].backing,
            "{after:?}"
        );
        ensure!(after.active_job.is_none(), "{after:?}");
    }
    a.stop(id).await?;
    a.start(id).await.context("from its old file")?;
    assert_is(&*a, id, Running).await
}

/// Nothing that is there already is taken for a copy, nor written to.
///
/// # Errors
/// The point is broken.
pub async fn no_copy_is_made_over_a_file(stage: &dyn Stage) -> Result<()> {
    let (a, id) = (stage.a(), stage.guest(owned(Running)).await?);
    for directory in stage.receiver().await?.directories {
        let disk = into(&*a, id, &directory).await?;
        stage.write(&disk.to, "precious").await?;
        let before = stage.fingerprint(&disk.to).await?;
        assert_exists(a.mirror_disk(id, &disk, None).await)?;
        assert_wrong_state("pivot_disk", a.pivot_disk(id, &disk).await)?;
        let after = stage.fingerprint(&disk.to).await?;
        ensure!(after == before, "it was changed");
        assert_on(&*a, id, &disk.from).await?;
    }
    Ok(())
}

/// A guest does not go on with a copy that is not whole; progress is told.
///
/// # Errors
/// The point is broken.
pub async fn only_a_whole_copy_is_gone_on_with(stage: &dyn Stage) -> Result<()> {
    let wish = Wish {
        data_mib: MUCH_MIB,
        ..owned(Running)
    };
    let (a, id) = (stage.a(), stage.guest(wish).await?);
    let directory = stage.receiver().await?.directories.remove(0);
    let disk = into(&*a, id, &directory).await?;
    assert_wrong_state("pivot_disk", a.pivot_disk(id, &disk).await)?;
    let begun = a.mirror_disk(id, &disk, SLOWLY).await?;
    ensure!(matches!(begun, Mirror::Copying { .. }), "{begun:?}");
    assert_wrong_state("pivot_disk", a.pivot_disk(id, &disk).await)?;
    assert_on(&*a, id, &disk.from).await?;
    let least = (MUCH_MIB as u64) << 20;
    until("half of it is copied", async || {
        match a.mirror_disk(id, &disk, SLOWLY).await? {
            Mirror::Copying {
                done_bytes,
                total_bytes,
            } => {
                ensure!(done_bytes <= total_bytes, "{done_bytes} of {total_bytes}");
                // Half of the data, whatever else the total counts.
                Ok((done_bytes >= least / 2).then_some(()))
            }
            other => bail!("at a limit it is {other:?} already"),
        }
    })
    .await?;
    a.abandon_mirror(id, &disk).await?;
    a.remove_disk(&disk.to).await?;
    assert_on(&*a, id, &disk.from).await
}

/// A guest whose disk is being copied says so, and goes nowhere.
///
/// # Errors
/// The point is broken.
pub async fn while_a_disk_is_copied_its_guest_stays(stage: &dyn Stage) -> Result<()> {
    let (a, id) = (stage.a(), stage.guest(owned(Running)).await?);
    let directory = stage.receiver().await?.directories.remove(0);
    let way = stage.way(id).await?;
    let disk = into(&*a, id, &directory).await?;
    until_ready(&*a, id, &disk).await?;
    let [now, _] = both(&*a, id).await?;
    let told = now.active_job.as_ref();
    ensure!(told.is_some_and(|j| j.contains("copy")), "{told:?}");
    let moved = a.migrate(way).await;
    assert_class("migrate", ErrorClass::Refused, moved)?;
    super::assert_stayed(stage, id).await?;
    let mirror = a.mirror_disk(id, &disk, None).await?;
    ensure!(mirror == Mirror::Ready, "the copy was ended: {mirror:?}");
    a.abandon_mirror(id, &disk).await?;
    a.remove_disk(&disk.to).await?;
    let [now, _] = both(&*a, id).await?;
    ensure!(now.active_job.is_none(), "{:?}", now.active_job);
    Ok(())
}

// ---- guests that are off -------------------------------------------------------------

/// A guest that is off has its disk at another place too, and starts from there
/// for the receiver; the old file is nobody's then.
///
/// # Errors
/// The point is broken.
pub async fn a_placed_disk_starts_for_the_receiver(stage: &dyn Stage) -> Result<()> {
    for directory in stage.receiver().await?.directories {
        transfer_off(stage, &directory, None).await?;
    }
    Ok(())
}

/// A guest that is off gets another name, and its NIC another address, with all
/// the rest.
///
/// # Errors
/// The point is broken.
pub async fn a_guest_gets_another_name(stage: &dyn Stage) -> Result<()> {
    let directory = stage.receiver().await?.directories.remove(0);
    let name = format!("contract-{}", nobody());
    transfer_off(stage, &directory, Some(name)).await
}

async fn transfer_off(stage: &dyn Stage, directory: &str, name: Option<String>) -> Result<()> {
    let (a, id) = (stage.a(), stage.guest(owned(Running)).await?);
    let network = stage.receiver().await?.bridge;
    a.stop(id).await?;
    let before = both(&*a, id).await?;
    let old = a.definition(id).await?.context("it has no definition")?;
    let disk = into(&*a, id, directory).await?;
    for attempt in ["once", "twice"] {
        let placed = a.place_disk(&disk, None).await;
        placed.with_context(|| format!("placed {attempt}"))?;
        let same = stage.same_disk(&disk.from, &disk.to).await?;
        ensure!(same, "placed {attempt}, it is another disk");
    }
    let after = both(&*a, id).await?;
    ensure!(after == before, "placing changed it: {after:?} {before:?}");
    let mut plan = plan(&*a, id, &network, TransferMode::Cold).await?;
    plan.disks.push(disk.clone());
    if name.is_some() {
        plan.nics[0].new_mac = Some("52:54:00:c0:ff:ee".to_owned());
        plan.name.clone_from(&name);
    }
    let new = a.transferred(&old, &plan)?;
    if name.is_some() {
        a.withdraw(id).await?;
    }
    a.define(&new, None).await?;
    a.remove_disk(&disk.from).await.context("the old file")?;
    a.start(id).await.context("for the receiver")?;
    assert_is(&*a, id, Running).await?;
    assert_on(&*a, id, &disk.to).await?;
    assert_receivers(&*a, id, &network).await?;
    for (after, before) in both(&*a, id).await?.iter().zip(&before) {
        ensure!(after.name == *name.as_ref().unwrap_or(&before.name));
        let mac = plan.nics[0].new_mac.as_ref();
        let mac = mac.unwrap_or(&before.nics[0].mac);
        ensure!(after.nics[0].mac == *mac, "{:?}", after.nics);
        ensure!(after.vcpus == before.vcpus, "{after:?}");
    }
    Ok(())
}

/// The way back of a guest that is off: what was written at the new place is at
/// the old one again.
///
/// # Errors
/// The point is broken.
pub async fn a_placed_disk_goes_back(stage: &dyn Stage) -> Result<()> {
    let a = stage.a();
    for directory in stage.receiver().await?.directories {
        let id = stage.guest(owned(Shutdown)).await?;
        let network = stage.receiver().await?.bridge;
        let before = both(&*a, id).await?;
        let old = a.definition(id).await?.context("it has no definition")?;
        let disk = into(&*a, id, &directory).await?;
        a.place_disk(&disk, None).await?;
        let mut plan = plan(&*a, id, &network, TransferMode::Cold).await?;
        plan.disks.push(disk.clone());
        a.define(&a.transferred(&old, &plan)?, None).await?;
        a.start(id).await?;
        a.stop(id).await?;
        let back = disk.reversed();
        for attempt in ["once", "twice"] {
            let placed = a.place_disk(&back, None).await;
            placed.with_context(|| format!("placed back {attempt}"))?;
        }
        a.define(&old, None).await?;
        a.remove_disk(&disk.to).await.context("the new file")?;
        let [now, lasting] = both(&*a, id).await?;
        ensure!(lasting.nics == before[1].nics, "{lasting:?}");
        ensure!(lasting.project == before[1].project, "{lasting:?}");
        ensure!(path_of(&now)? == disk.from, "{now:?}");
        a.start(id).await.context("from its old place")?;
        assert_is(&*a, id, Running).await?;
    }
    Ok(())
}

/// What is not there is not placed, and nothing is left of trying.
///
/// # Errors
/// The point is broken.
pub async fn nothing_is_placed_from_nowhere(stage: &dyn Stage) -> Result<()> {
    let (a, id) = (stage.a(), stage.guest(owned(Shutdown)).await?);
    for directory in stage.receiver().await?.directories {
        let disk = into(&*a, id, &directory).await?;
        let missing = DiskMove {
            from: format!("{}.none", disk.from),
            ..disk.clone()
        };
        let placed = a.place_disk(&missing, None).await;
        assert_class("place_disk", ErrorClass::Refused, placed)?;
        let left = stage.fingerprint(&disk.to).await?;
        ensure!(left.is_none(), "{left:?}");
        let nowhere = DiskMove {
            to: format!("{directory}/none/disk.qcow2"),
            ..disk
        };
        let placed = a.place_disk(&nowhere, None).await;
        assert_class("place_disk", ErrorClass::Refused, placed)?;
    }
    Ok(())
}
