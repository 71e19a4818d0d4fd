//! Points about what is kept of guests for the day on which their node is dead.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use drover_compute::hypervisor::Hypervisor;
use drover_model::{
    api::compute::KeptDefinition,
    guest::{
        PowerState::{self, Running, Shutdown},
        Presence,
    },
    ids::InstanceId,
    migration::Flavor,
    node::InstanceReport,
};

use tokio::time::timeout;

use super::{
    MEMORY_MIB, Place, Stage, Wish, assert_no_such_guest, assert_wrong_state, nobody, until,
};

async fn report(driver: Arc<dyn Hypervisor>, id: InstanceId) -> Result<InstanceReport> {
    let all = driver.guests().await?;
    let own = all.into_iter().find(|report| report.id == id);
    own.context("guests() does not list it")
}

async fn digest(stage: &dyn Stage, id: InstanceId) -> Result<String> {
    let digest = report(stage.a(), id).await?.definition_digest;
    digest.context("the report has no digest")
}

fn on_disk(state: PowerState, place: Place) -> Wish {
    Wish {
        state,
        ..Wish::disk(place)
    }
}

/// What its dead node told, and nothing of it there any more.
async fn lost(stage: &dyn Stage, id: InstanceId) -> Result<KeptDefinition> {
    let kept = stage.a().kept_definition(id).await?;
    stage.a().stop(id).await?;
    stage.a().withdraw(id).await?;
    Ok(kept)
}

/// Reports tell what an active guest used, which grows; of one that is off nothing.
///
/// # Errors
/// The point is broken.
pub async fn usage_grows_while_a_guest_is_active(stage: &dyn Stage) -> Result<()> {
    let wish = Wish {
        dirty_mib_s: 20,
        ..on_disk(Running, Place::Shared)
    };
    let id = stage.guest(wish).await?;
    let first = until("its usage is known", async || {
        Ok(report(stage.a(), id).await?.usage)
    });
    let first = first.await?;
    ensure!(first.memory_rss_mib > 0, "{first:?}");
    until("it used more CPU time", async || {
        let next = report(stage.a(), id).await?.usage;
        Ok(next.filter(|next| next.cpu_time_ns > first.cpu_time_ns))
    })
    .await?;
    stage.a().stop(id).await?;
    let off = report(stage.a(), id).await?.usage;
    ensure!(off.is_none(), "it is off and uses {off:?}");
    Ok(())
}

/// Wishes in its metadata are in its report.
///
/// # Errors
/// The point is broken.
pub async fn wishes_are_told(stage: &dyn Stage) -> Result<()> {
    let wish = Wish {
        priority: 7,
        group: Some("web"),
        ..on_disk(Shutdown, Place::Shared)
    };
    let id = stage.guest(wish).await?;
    let wishes = report(stage.a(), id).await?.wishes;
    ensure!(
        wishes.priority == 7 && wishes.anti_affinity == ["web"],
        "{wishes:?}"
    );
    let plain = stage.guest(Wish::state(Shutdown)).await?;
    let wishes = report(stage.a(), plain).await?.wishes;
    ensure!(wishes == Default::default(), "{wishes:?}");
    Ok(())
}

/// The digest is the same while the guest is started and stopped, the same in
/// what is kept, and another when its definition is.
///
/// # Errors
/// The point is broken.
pub async fn a_digest_changes_with_the_definition_alone(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(on_disk(Shutdown, Place::Shared)).await?;
    let off = digest(stage, id).await?;
    stage.a().start(id).await?;
    ensure!(digest(stage, id).await? == off, "it changed with the start");
    let kept = stage.a().kept_definition(id).await?;
    ensure!(kept.digest == off, "what is kept has another");
    stage.a().stop(id).await?;
    ensure!(digest(stage, id).await? == off, "it changed with the stop");
    let definition = stage.a().definition(id).await?.context("definition")?;
    let larger = Flavor {
        vcpus: 2,
        memory_mb: MEMORY_MIB * 2,
    };
    stage.a().define(&definition, Some(larger)).await?;
    ensure!(
        digest(stage, id).await? != off,
        "the definition changed and the digest did not"
    );
    Ok(())
}

/// A kept definition starts on another node, of a higher generation, and the
/// guest finds its disk.
///
/// # Errors
/// The point is broken.
pub async fn a_kept_definition_starts_elsewhere(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(on_disk(Running, Place::Shared)).await?;
    let kept = lost(stage, id).await?;
    ensure!(kept.instance == id && kept.guest.id == id, "{kept:?}");
    ensure!(!kept.has_secrets, "it has no password");
    let generation = kept.guest.generation + 1;
    let b = stage.b();
    b.define_rebuilt(id, &kept.domain, generation).await?;
    let off = b.presence(id).await?;
    ensure!(off == Presence::Present(Shutdown), "defined it is {off:?}");
    b.start(id).await?;
    let guest = b.guest(id).await?.context("it is on b")?;
    ensure!(guest.power_state == Running, "{guest:?}");
    ensure!(guest.generation == generation, "{guest:?}");
    ensure!(guest.project == kept.guest.project, "{guest:?}");
    let told = report(b, id).await?;
    ensure!(told.generation == generation, "{told:?}");
    stage.verify(id).await
}

/// Defined twice it is defined once; what is here of another generation stays.
///
/// # Errors
/// The point is broken.
pub async fn a_guest_is_rebuilt_once(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(on_disk(Running, Place::Shared)).await?;
    let (a, b) = (stage.a(), stage.b());
    let kept = a.kept_definition(id).await?;
    let over = a.define_rebuilt(id, &kept.domain, 1).await;
    assert_wrong_state("over the guest itself", over)?;
    let generation = a.guest(id).await?.context("it is on a")?.generation;
    ensure!(generation == 0, "it was redefined: generation {generation}");
    b.define_rebuilt(id, &kept.domain, 1).await?;
    b.define_rebuilt(id, &kept.domain, 1).await?;
    let other = b.define_rebuilt(id, &kept.domain, 2).await;
    assert_wrong_state("over another generation", other)?;
    b.withdraw(id).await?;
    ensure!(b.presence(id).await? == Presence::Absent, "withdrawn");
    ensure!(a.presence(id).await? == Presence::Present(Running), "on a");
    let other = b.define_rebuilt(nobody(), &kept.domain, 1).await;
    ensure!(other.is_err(), "a definition went by another's name");
    assert_no_such_guest("kept", a.kept_definition(nobody()).await)
}

/// A disk on a directory that both nodes have is the same on both.
///
/// # Errors
/// The point is broken.
pub async fn a_shared_disk_is_the_same_elsewhere(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(on_disk(Shutdown, Place::Shared)).await?;
    let kept = stage.a().kept_definition(id).await?;
    ensure!(kept.identities.len() == 1, "{:?}", kept.identities);
    let again = stage.a().kept_definition(id).await?;
    ensure!(again == kept, "asked twice it is another");
    let facts = stage.b().storage_facts(&kept.identities).await?;
    ensure!(facts.len() == 1 && facts[0].same.is_ok(), "{facts:?}");
    let mut forged = kept.identities.clone();
    forged[0].identity = Some("another:1".to_owned());
    let forged = stage.b().storage_facts(&forged).await?;
    ensure!(forged[0].same.is_err(), "{forged:?}");
    Ok(())
}

/// A disk on a directory of its node is not, not even where a file of its name is.
/// (Where the drivers see such a directory.)
///
/// # Errors
/// The point is broken.
pub async fn a_local_disk_is_not_the_same_elsewhere(stage: &dyn Stage) -> Result<()> {
    if stage.local_directory().is_none() {
        return Ok(());
    }
    let id = stage.guest(on_disk(Shutdown, Place::Local)).await?;
    let kept = stage.a().kept_definition(id).await?;
    let own = stage.a().storage_facts(&kept.identities).await?;
    ensure!(own.iter().all(|fact| fact.same.is_ok()), "on a: {own:?}");
    let facts = stage.b().storage_facts(&kept.identities).await?;
    ensure!(facts.iter().all(|f| f.same.is_err()), "on b: {facts:?}");
    // Makes an empty file of its name on b.
    stage.way(id).await?;
    let facts = stage.b().storage_facts(&kept.identities).await?;
    ensure!(facts.iter().all(|f| f.same.is_err()), "on b: {facts:?}");
    Ok(())
}

/// A busy guest's dirty rate is measured, or said to be unknown.
///
/// # Errors
/// The point is broken.
pub async fn a_dirty_rate_is_measured(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::busy()).await?;
    let a = stage.a();
    let measured = timeout(Duration::from_secs(30), a.dirty_rate(id));
    let rate = measured.await.context("it takes for ever")??;
    ensure!(
        rate.is_none_or(|mib_s| (1..4096).contains(&mib_s)),
        "{rate:?} MiB/s"
    );
    stage.a().stop(id).await?;
    assert_wrong_state(
        "dirty_rate of one that is off",
        stage.a().dirty_rate(id).await,
    )?;
    assert_no_such_guest("dirty_rate", stage.a().dirty_rate(nobody()).await)
}

/// The wish to be started at boot moves from the hypervisor into the metadata.
///
/// # Errors
/// The point is broken.
pub async fn autostart_is_taken_over(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(on_disk(Running, Place::Shared)).await?;
    let a = stage.a();
    a.take_over_autostart(id).await?;
    ensure!(!report(a.clone(), id).await?.autostart, "nobody wished it");
    stage.set_autostart(id).await?;
    ensure!(a.unguarded_autostarts().await?.contains(&id), "its flag");
    ensure!(report(a.clone(), id).await?.autostart, "told by the flag");
    for _ in 0..2 {
        a.take_over_autostart(id).await?;
        let left = a.unguarded_autostarts().await?;
        ensure!(!left.contains(&id), "libvirt would still start it");
        let told = report(a.clone(), id).await?;
        ensure!(told.autostart, "the wish is lost");
        ensure!(
            told.generation == 0 && told.project == "default",
            "{told:?}"
        );
    }
    a.stop(id).await?;
    ensure!(report(a, id).await?.autostart, "the wish does not last");
    Ok(())
}
