//! Points about guests that are shut down, started, and defined elsewhere.

use anyhow::{Context, Result, ensure};
use drover_compute::hypervisor::{Event, Overlay};
use drover_model::{
    error::ErrorClass,
    guest::{
        PowerState::{self, Paused, Running, Shutdown},
        Presence,
    },
    ids::InstanceId,
    migration::Flavor,
};

use super::{
    MEMORY_MIB, Place, REDEFINED_VCPUS, Stage, Wish, assert_class, assert_no_such_guest,
    assert_wrong_state, moving, nobody, until,
};

/// A guest in that state, with a disk that both nodes see.
fn on_disk(state: PowerState) -> Wish {
    Wish {
        state,
        ..Wish::disk(Place::Shared)
    }
}

async fn assert_is(stage: &dyn Stage, id: InstanceId, state: PowerState) -> Result<()> {
    let found = stage.a().presence(id).await?;
    ensure!(
        found == Presence::Present(state),
        "{state:?} expected, it is {found:?}"
    );
    Ok(())
}

// ---- power ---------------------------------------------------------------------------

/// A guest whose system obeys is off after a while, and says so.
///
/// # Errors
/// The point is broken.
pub async fn shut_down_is_obeyed(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::obedient()).await?;
    let mut events = stage.a().events();
    stage.a().shut_down(id).await?;
    until("the guest is off", async || {
        let off = Presence::Present(Shutdown);
        Ok((stage.a().presence(id).await? == off).then_some(()))
    })
    .await?;
    moving::announced("of the guest", &mut events, &[Event::Guest(id)]).await
}

/// Only what runs can be asked to shut down.
///
/// # Errors
/// The point is broken.
pub async fn shut_down_of_what_does_not_run_is_wrong_state(stage: &dyn Stage) -> Result<()> {
    for state in [Paused, Shutdown] {
        let id = stage.guest(Wish::state(state)).await?;
        assert_wrong_state("shut_down", stage.a().shut_down(id).await)?;
        assert_is(stage, id, state).await?;
    }
    assert_no_such_guest("shut_down", stage.a().shut_down(nobody()).await)
}

/// A guest that is stopped is off when the call returns, and stopping it again
/// is no error.
///
/// # Errors
/// The point is broken.
pub async fn stop_is_at_once_and_repeatable(stage: &dyn Stage) -> Result<()> {
    for state in [Running, Paused, Shutdown] {
        let id = stage.guest(Wish::state(state)).await?;
        for attempt in ["once", "twice"] {
            let stopped = stage.a().stop(id).await;
            stopped.with_context(|| format!("{state:?}, stopped {attempt}"))?;
            assert_is(stage, id, Shutdown).await?;
        }
    }
    assert_no_such_guest("stop", stage.a().stop(nobody()).await)
}

/// A guest that is started runs, on the disk it left; starting it again is no
/// error, nor of one that is paused, which stays so.
///
/// # Errors
/// The point is broken.
pub async fn start_is_repeatable(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(on_disk(Running)).await?;
    stage.a().stop(id).await?;
    for attempt in ["once", "twice"] {
        let started = stage.a().start(id).await;
        started.with_context(|| format!("started {attempt}"))?;
        assert_is(stage, id, Running).await?;
    }
    let paused = stage.guest(Wish::state(Paused)).await?;
    stage.a().start(paused).await.context("a paused one")?;
    assert_is(stage, paused, Paused).await?;
    assert_no_such_guest("start", stage.a().start(nobody()).await)
}

/// What is in shutdown to nobody is not said to be.
///
/// # Errors
/// The point is broken.
pub async fn only_what_is_in_shutdown_goes_off(stage: &dyn Stage) -> Result<()> {
    for state in [Running, Paused, Shutdown] {
        let id = stage.guest(Wish::state(state)).await?;
        ensure!(!stage.a().is_going_off(id).await?, "{state:?}");
    }
    assert_no_such_guest("is_going_off", stage.a().is_going_off(nobody()).await)
}

// ---- what lasts ----------------------------------------------------------------------

/// The lasting guest is the guest, whatever its state.
///
/// # Errors
/// The point is broken.
pub async fn the_lasting_guest_is_the_guest(stage: &dyn Stage) -> Result<()> {
    let a = stage.a();
    for state in [Running, Paused, Shutdown] {
        let id = stage.guest(on_disk(state)).await?;
        let now = a.guest(id).await?.context("guest() does not know it")?;
        let lasting = a.lasting_guest(id).await?;
        let lasting = lasting.context("lasting_guest() does not know it")?;
        ensure!(lasting.power_state == state, "{lasting:?}");
        ensure!(lasting.immovable.is_empty(), "{:?}", lasting.immovable);
        let told = |g: &drover_model::guest::Guest| {
            (g.id, g.name.clone(), g.vcpus, g.memory_mib, g.persistent)
        };
        ensure!(told(&lasting) == told(&now), "{lasting:?} {now:?}");
        ensure!(lasting.disks.len() == 1, "{:?}", lasting.disks);
        let (disk, other) = (&lasting.disks[0], &now.disks[0]);
        ensure!(
            disk.local_path() == other.local_path(),
            "{disk:?} {other:?}"
        );
        ensure!(
            disk.virtual_bytes == other.virtual_bytes,
            "{disk:?} {other:?}"
        );
    }
    ensure!(a.lasting_guest(nobody()).await?.is_none(), "of nobody");
    ensure!(a.definition(nobody()).await?.is_none(), "of nobody");
    Ok(())
}

async fn fingerprint(stage: &dyn Stage, id: InstanceId) -> Result<String> {
    let definition = stage.a().definition(id).await?;
    let definition = definition.context("it has no definition")?;
    Ok(stage.a().fingerprint(&definition)?)
}

/// Who defines an active guest anew changes what lasts of it, which shows, and not
/// what runs. That it is to be started at boot is no such change.
///
/// # Errors
/// The point is broken.
pub async fn a_guest_that_is_defined_anew_is_told_apart(stage: &dyn Stage) -> Result<()> {
    let (a, id) = (stage.a(), stage.guest(on_disk(Running)).await?);
    let before = fingerprint(stage, id).await?;
    stage.set_autostart(id).await?;
    a.take_over_autostart(id).await?;
    ensure!(fingerprint(stage, id).await? == before, "by Drover's note");
    stage.redefine(id).await?;
    ensure!(fingerprint(stage, id).await? != before, "nothing shows");
    let now = a.guest(id).await?.context("it is gone")?;
    let lasting = a.lasting_guest(id).await?.context("it is gone")?;
    let vcpus = (now.vcpus, lasting.vcpus);
    ensure!(vcpus == (1, REDEFINED_VCPUS), "{vcpus:?}");
    assert_is(stage, id, Running).await
}

/// A definition that is taken away takes nothing else with it, and comes back
/// as it was.
///
/// # Errors
/// The point is broken.
pub async fn a_definition_goes_away_and_comes_back(stage: &dyn Stage) -> Result<()> {
    let (a, id) = (stage.a(), stage.guest(on_disk(Shutdown)).await?);
    let before = a.lasting_guest(id).await?.context("the guest is on a")?;
    let path = before.disks[0].local_path().context("its disk is a file")?;
    let disk = stage.fingerprint(path).await?;
    let definition = a.definition(id).await?.context("it has no definition")?;
    for attempt in ["once", "twice"] {
        let withdrawn = a.withdraw(id).await;
        withdrawn.with_context(|| format!("withdrawn {attempt}"))?;
        ensure!(a.presence(id).await? == Presence::Absent, "{attempt}");
    }
    ensure!(
        stage.fingerprint(path).await? == disk,
        "its disk was touched"
    );
    for attempt in ["once", "twice"] {
        let defined = a.define(&definition, None).await;
        defined.with_context(|| format!("defined {attempt}"))?;
        assert_is(stage, id, Shutdown).await?;
    }
    let after = a.lasting_guest(id).await?;
    ensure!(after.as_ref() == Some(&before), "{after:?} {before:?}");
    let again = a.definition(id).await?;
    ensure!(again == Some(definition), "it is defined otherwise");
    Ok(())
}

/// A definition is changed to the size that was asked for, and back.
///
/// # Errors
/// The point is broken.
pub async fn define_with_a_flavor_changes_the_size(stage: &dyn Stage) -> Result<()> {
    let (a, id) = (stage.a(), stage.guest(on_disk(Shutdown)).await?);
    let definition = a.definition(id).await?.context("it has no definition")?;
    let flavor = Flavor {
        vcpus: 2,
        memory_mb: MEMORY_MIB + 64,
    };
    a.define(&definition, Some(flavor)).await?;
    let resized = a.lasting_guest(id).await?.context("it is gone")?;
    let size = (resized.vcpus, resized.memory_mib);
    ensure!(size == (flavor.vcpus, flavor.memory_mb), "{size:?}");
    a.start(id).await.context("of the new size")?;
    let running = a.guest(id).await?.context("it is gone")?;
    let size = (running.vcpus, running.memory_mib);
    ensure!(
        size == (flavor.vcpus, flavor.memory_mb),
        "it runs: {size:?}"
    );
    a.stop(id).await?;
    a.define(&definition, None).await?;
    let back = a.lasting_guest(id).await?.context("it is gone")?;
    ensure!((back.vcpus, back.memory_mib) == (1, MEMORY_MIB), "{back:?}");
    Ok(())
}

/// A guest that is active keeps its definition.
///
/// # Errors
/// The point is broken.
pub async fn define_over_an_active_guest_is_refused(stage: &dyn Stage) -> Result<()> {
    let a = stage.a();
    for state in [Running, Paused] {
        let id = stage.guest(Wish::state(state)).await?;
        let definition = a.definition(id).await?.context("it has no definition")?;
        assert_wrong_state("define", a.define(&definition, None).await)?;
        assert_is(stage, id, state).await?;
    }
    Ok(())
}

/// What is withdrawn is off, and nothing else.
///
/// # Errors
/// The point is broken.
pub async fn withdraw_takes_what_is_off_and_nothing_else(stage: &dyn Stage) -> Result<()> {
    let a = stage.a();
    for state in [Running, Paused] {
        let id = stage.guest(Wish::state(state)).await?;
        assert_wrong_state("withdraw", a.withdraw(id).await)?;
        assert_is(stage, id, state).await?;
    }
    a.withdraw(nobody()).await.context("of nobody")
}

/// What was defined here can be defined and started there.
///
/// # Errors
/// The point is broken.
pub async fn a_definition_starts_on_the_other_node(stage: &dyn Stage) -> Result<()> {
    let (a, b) = (stage.a(), stage.b());
    let id = stage.guest(on_disk(Running)).await?;
    a.stop(id).await?;
    let before = a.lasting_guest(id).await?.context("the guest is on a")?;
    let definition = a.definition(id).await?.context("it has no definition")?;
    a.withdraw(id).await?;
    b.define(&definition, None).await?;
    let there = b.lasting_guest(id).await?;
    ensure!(there.as_ref() == Some(&before), "{there:?} {before:?}");
    b.start(id).await?;
    let running = Presence::Present(Running);
    ensure!(b.presence(id).await? == running, "it does not run on b");
    ensure!(a.presence(id).await? == Presence::Absent, "a has it still");
    Ok(())
}

// ---- frozen disks --------------------------------------------------------------------

/// A running guest on a disk, and the overlay that it may get.
async fn with_overlay(stage: &dyn Stage) -> Result<(InstanceId, Overlay)> {
    let id = stage.guest(on_disk(Running)).await?;
    let image = disk_of(stage, id).await?;
    let overlay = Overlay {
        target: "vda".to_owned(),
        path: format!("{image}.delta"),
        image,
        format: "qcow2".to_owned(),
    };
    Ok((id, overlay))
}

/// The file that a guest of a uses now.
async fn disk_of(stage: &dyn Stage, id: InstanceId) -> Result<String> {
    let guest = stage.a().guest(id).await?.context("the guest is on a")?;
    let path = guest.disks[0].local_path().context("its disk is a file")?;
    Ok(path.to_owned())
}

/// A frozen disk's guest runs on over its image, and on it again afterwards.
///
/// # Errors
/// The point is broken.
pub async fn a_disk_is_frozen_and_thawed(stage: &dyn Stage) -> Result<()> {
    let (a, (id, overlay)) = (stage.a(), with_overlay(stage).await?);
    let overlays = [overlay.clone()];
    a.thaw_disks(id, &overlays).await.context("never frozen")?;
    for attempt in ["once", "twice"] {
        let frozen = a.freeze_disks(id, &overlays).await;
        frozen.with_context(|| format!("frozen {attempt}"))?;
        ensure!(disk_of(stage, id).await? == overlay.path, "{attempt}");
        assert_is(stage, id, Running).await?;
    }
    for path in [&overlay.path, &overlay.image] {
        let removed = a.remove_disk(path).await;
        ensure!(removed.is_err(), "{path} was removed under the guest");
    }
    for attempt in ["once", "twice"] {
        let thawed = a.thaw_disks(id, &overlays).await;
        thawed.with_context(|| format!("thawed {attempt}"))?;
        ensure!(disk_of(stage, id).await? == overlay.image, "{attempt}");
        assert_is(stage, id, Running).await?;
    }
    a.remove_disk(&overlay.path).await?;
    a.stop(id).await?;
    a.start(id).await.context("on its own image")?;
    assert_is(stage, id, Running).await
}

/// An overlay is merged where no guest runs, and as often as one likes.
///
/// # Errors
/// The point is broken.
pub async fn an_overlay_is_merged_once_its_guest_is_off(stage: &dyn Stage) -> Result<()> {
    let (a, (id, overlay)) = (stage.a(), with_overlay(stage).await?);
    // Before it is defined otherwise: where its own image is its disk.
    let definition = a.definition(id).await?.context("it has no definition")?;
    let early = a.merge_overlay(&overlay).await;
    assert_class("merge_overlay", ErrorClass::Refused, early)?;
    a.freeze_disks(id, std::slice::from_ref(&overlay)).await?;
    a.stop(id).await?;
    for attempt in ["once", "twice"] {
        let merged = a.merge_overlay(&overlay).await;
        merged.with_context(|| format!("merged {attempt}"))?;
    }
    a.define(&definition, None).await?;
    a.remove_disk(&overlay.path).await?;
    a.start(id).await.context("on its own image")?;
    ensure!(disk_of(stage, id).await? == overlay.image, "another disk");
    assert_is(stage, id, Running).await
}

/// Nothing is frozen of a guest that is not there, nor a disk that is another.
///
/// # Errors
/// The point is broken.
pub async fn only_the_disk_that_was_meant_is_frozen(stage: &dyn Stage) -> Result<()> {
    let (a, (id, overlay)) = (stage.a(), with_overlay(stage).await?);
    let other = Overlay {
        image: format!("{}.other", overlay.image),
        ..overlay.clone()
    };
    assert_wrong_state("freeze_disks", a.freeze_disks(id, &[other]).await)?;
    let now = disk_of(stage, id).await?;
    ensure!(now == overlay.image, "it uses {now}");
    let frozen = a.freeze_disks(nobody(), &[overlay]).await;
    assert_no_such_guest("freeze_disks", frozen)
}
