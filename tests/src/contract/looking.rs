//! Points about looking: what a driver says of its node and its guests.

use anyhow::{Context, Result, ensure};
use drover_compute::hypervisor::{DestinationAnswer, DestinationQuestion, Hypervisor, Job};
use drover_model::{
    guest::{Guest, Nic, NicAttachment, PowerState, Presence},
    ids::InstanceId,
};

use super::{
    MEMORY_MIB, Place, Stage, Wish, assert_class, assert_no_such_guest, assert_wrong_state, nobody,
};
use drover_model::error::ErrorClass;

/// The inventory is that of a node on which guests can run.
///
/// # Errors
/// The point is broken.
pub async fn inventory_is_sane(stage: &dyn Stage) -> Result<()> {
    for driver in [stage.a(), stage.b()] {
        let inventory = driver.inventory().await?;
        ensure!(inventory.hypervisor_type == "QEMU", "{inventory:?}");
        ensure!(inventory.hypervisor_version >= 1_000_000, "{inventory:?}");
        ensure!(inventory.libvirt_version >= 1_000_000, "{inventory:?}");
        ensure!(!inventory.arch.is_empty(), "{inventory:?}");
        ensure!(!inventory.cpu_model.is_empty(), "{inventory:?}");
        ensure!(inventory.vcpus >= 1, "{inventory:?}");
        ensure!(inventory.memory_mib >= MEMORY_MIB, "{inventory:?}");
        ensure!(inventory.disk_bytes > 0, "{inventory:?}");
        ensure!(
            inventory.disk_free_bytes <= inventory.disk_bytes,
            "{inventory:?}"
        );
    }
    Ok(())
}

/// `guests`, `guest` and `presence` say the same of a running guest.
///
/// # Errors
/// The point is broken.
pub async fn views_agree_on_a_running_guest(stage: &dyn Stage) -> Result<()> {
    views_agree(stage, PowerState::Running).await
}

/// The same of a paused one.
///
/// # Errors
/// The point is broken.
pub async fn views_agree_on_a_paused_guest(stage: &dyn Stage) -> Result<()> {
    views_agree(stage, PowerState::Paused).await
}

/// The same of one that is shut off.
///
/// # Errors
/// The point is broken.
pub async fn views_agree_on_a_shut_off_guest(stage: &dyn Stage) -> Result<()> {
    views_agree(stage, PowerState::Shutdown).await
}

async fn views_agree(stage: &dyn Stage, state: PowerState) -> Result<()> {
    let wish = Wish {
        disk: Some(Place::Shared),
        ..Wish::state(state)
    };
    let id = stage.guest(wish).await?;
    let a = stage.a();
    let guest = a.guest(id).await?.context("guest() does not know it")?;
    let all = a.guests().await?;
    let report = all.iter().find(|r| r.id == id);
    let report = report.context("guests() does not list it")?;
    ensure!(
        a.presence(id).await? == Presence::Present(state),
        "presence"
    );
    ensure!(
        guest.power_state == state,
        "guest(): {:?}",
        guest.power_state
    );
    ensure!(
        report.power_state == state,
        "guests(): {:?}",
        report.power_state
    );
    ensure!(guest.id == id && guest.persistent, "guest(): {guest:?}");
    ensure!(
        guest.active_job.is_none(),
        "guest(): {:?}",
        guest.active_job
    );
    ensure!(!report.incoming, "guests(): {report:?}");
    ensure!(
        report.migration.is_none(),
        "the agent's knowledge: {report:?}"
    );
    ensure!(
        guest.memory_mib == MEMORY_MIB,
        "guest(): {} MiB",
        guest.memory_mib
    );
    let same = (
        report.memory_mib,
        report.vcpus,
        &report.name,
        &report.project,
    ) == (guest.memory_mib, guest.vcpus, &guest.name, &guest.project);
    ensure!(same, "guests() and guest() differ: {report:?} {guest:?}");
    let disk = guest.disks.first().context("its disk is missing")?;
    ensure!(disk.target == "vda" && disk.virtual_bytes > 0, "{disk:?}");
    ensure!(
        report.disk_bytes == disk.virtual_bytes,
        "{report:?} {disk:?}"
    );
    absent(stage.b(), id).await
}

async fn absent(driver: std::sync::Arc<dyn Hypervisor>, id: InstanceId) -> Result<()> {
    ensure!(driver.presence(id).await? == Presence::Absent, "presence");
    ensure!(driver.guest(id).await?.is_none(), "guest() knows it");
    let all = driver.guests().await?;
    ensure!(all.iter().all(|r| r.id != id), "guests() lists it");
    Ok(())
}

/// A guest that is nowhere is absent to every question, and nothing can be
/// done to it.
///
/// # Errors
/// The point is broken.
pub async fn an_unknown_guest_is_absent(stage: &dyn Stage) -> Result<()> {
    let (a, id) = (stage.a(), nobody());
    absent(a.clone(), id).await?;
    assert_no_such_guest("job", a.job(id).await)?;
    assert_no_such_guest("completed_job", a.completed_job(id).await)?;
    assert_no_such_guest("abort", a.abort(id).await)?;
    assert_no_such_guest("start_post_copy", a.start_post_copy(id).await)?;
    assert_no_such_guest("pause_for_switch_over", a.pause_for_switch_over(id).await)?;
    assert_no_such_guest("resume", a.resume(id).await)?;
    assert_no_such_guest("set_max_downtime_ms", a.set_max_downtime_ms(id, 500).await)
}

/// A guest without a job has none, and there is nothing to steer.
///
/// # Errors
/// The point is broken.
pub async fn without_a_job_there_is_nothing_to_steer(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::default()).await?;
    let a = stage.a();
    ensure!(a.job(id).await? == Job::None, "job");
    ensure!(a.completed_job(id).await?.is_none(), "completed_job");
    assert_wrong_state("abort", a.abort(id).await)?;
    assert_wrong_state("start_post_copy", a.start_post_copy(id).await)?;
    assert_wrong_state("pause_for_switch_over", a.pause_for_switch_over(id).await)?;
    assert_wrong_state("set_max_downtime_ms", a.set_max_downtime_ms(id, 500).await)?;
    let running = Presence::Present(PowerState::Running);
    ensure!(a.presence(id).await? == running, "it no longer runs");
    Ok(())
}

/// A paused guest runs again when it is resumed; a running one stays as it is.
///
/// # Errors
/// The point is broken.
pub async fn resume_lets_a_paused_guest_run(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::state(PowerState::Paused)).await?;
    let a = stage.a();
    let running = Presence::Present(PowerState::Running);
    for attempt in ["once", "twice"] {
        a.resume(id)
            .await
            .with_context(|| format!("resumed {attempt}"))?;
        ensure!(a.presence(id).await? == running, "resumed {attempt}");
    }
    Ok(())
}

/// A guest that is shut off is not started by it.
///
/// # Errors
/// The point is broken.
pub async fn resume_starts_nothing(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::state(PowerState::Shutdown)).await?;
    assert_wrong_state("resume", stage.a().resume(id).await)?;
    let off = Presence::Present(PowerState::Shutdown);
    ensure!(stage.a().presence(id).await? == off, "it was started");
    Ok(())
}

/// A definition is removed when its guest is off, and only then.
///
/// # Errors
/// The point is broken.
pub async fn undefine_takes_what_is_off_and_nothing_else(stage: &dyn Stage) -> Result<()> {
    let a = stage.a();
    for state in [PowerState::Running, PowerState::Paused] {
        let id = stage.guest(Wish::state(state)).await?;
        assert_wrong_state("undefine", a.undefine(id).await)?;
        ensure!(
            a.presence(id).await? == Presence::Present(state),
            "{state:?}"
        );
    }
    let id = stage.guest(Wish::state(PowerState::Shutdown)).await?;
    a.undefine(id).await?;
    absent(a.clone(), id).await?;
    a.undefine(id).await.context("the second time")
}

/// Only a guest that waits for a migration, or was left by one, is discarded.
///
/// # Errors
/// The point is broken.
pub async fn discarding_takes_nothing_else(stage: &dyn Stage) -> Result<()> {
    let a = stage.a();
    for state in [
        PowerState::Running,
        PowerState::Paused,
        PowerState::Shutdown,
    ] {
        let id = stage.guest(Wish::state(state)).await?;
        assert_wrong_state("discard_incoming", a.discard_incoming(id).await)?;
        assert_wrong_state("discard_outgoing", a.discard_outgoing(id).await)?;
        assert_wrong_state("discard_half", a.discard_half(id).await)?;
        ensure!(
            a.presence(id).await? == Presence::Present(state),
            "{state:?}"
        );
    }
    a.discard_outgoing(nobody()).await.context("of nobody")?;
    a.discard_half(nobody()).await.context("of nobody")?;
    a.discard_incoming(nobody()).await.context("of nobody")
}

async fn ask(driver: &dyn Hypervisor, guest: &Guest) -> Result<DestinationAnswer> {
    let question = DestinationQuestion { guest, marks: &[] };
    Ok(driver.answer_destination(question).await?)
}

/// A destination that fits says so.
///
/// # Errors
/// The point is broken.
pub async fn a_fit_destination_says_so(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::disk(Place::Shared)).await?;
    let guest = stage.a().guest(id).await?.context("the guest is on a")?;
    let answer = ask(&*stage.b(), &guest).await?;
    ensure!(answer.emulator_present, "{answer:?}");
    ensure!(answer.machine_supported, "{answer:?}");
    ensure!(answer.virt_type_supported, "{answer:?}");
    ensure!(answer.same_uuid == Presence::Absent, "{answer:?}");
    ensure!(answer.same_name.is_none(), "{answer:?}");
    let disk = answer.disks.first().context("nothing about its disk")?;
    ensure!(disk.target == "vda" && disk.exists, "{disk:?}");
    ensure!(disk.directory_exists && disk.free_bytes > 0, "{disk:?}");
    ensure!(disk.missing_backing.is_empty(), "{disk:?}");
    ensure!(!disk.shared, "nobody left a mark: {disk:?}");
    Ok(())
}

/// A destination that does not fit says where.
///
/// # Errors
/// The point is broken.
pub async fn an_unfit_destination_says_where(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::disk(Place::Shared)).await?;
    let plain = stage.a().guest(id).await?.context("the guest is on a")?;
    let b = stage.b();
    let with = |change: &dyn Fn(&mut Guest)| {
        let mut guest = plain.clone();
        change(&mut guest);
        guest
    };
    let guest = with(&|g| g.emulator = "/usr/bin/qemu-system-none".to_owned());
    ensure!(!ask(&*b, &guest).await?.emulator_present, "emulator");
    let guest = with(&|g| g.machine = "pc-none-0.0".to_owned());
    ensure!(!ask(&*b, &guest).await?.machine_supported, "machine");
    let guest = with(&|g| g.virt_type = "xen".to_owned());
    ensure!(!ask(&*b, &guest).await?.virt_type_supported, "virt type");
    let guest = with(&|g| {
        let bridge = "br-none".to_owned();
        let mac = "52:54:00:00:00:09".to_owned();
        let attachment = NicAttachment::Bridge { bridge };
        let port = None;
        g.nics = vec![Nic {
            mac,
            attachment,
            port,
        }];
    });
    let networks = ask(&*b, &guest).await?.networks;
    ensure!(networks.len() == 1 && !networks[0].present, "{networks:?}");
    let guest = with(&|g| set_path(g, "/nonexistent/disk.qcow2"));
    let disks = ask(&*b, &guest).await?.disks;
    let disk = disks.first().context("nothing about its disk")?;
    ensure!(!disk.exists && !disk.directory_exists, "{disk:?}");
    Ok(())
}

fn set_path(guest: &mut Guest, path: &str) {
    for disk in &mut guest.disks {
        disk.source = drover_model::guest::DiskSource::File {
            path: path.to_owned(),
        };
    }
}

/// A node that has the guest, or another of its name, says so.
///
/// # Errors
/// The point is broken.
pub async fn taken_names_are_told(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::state(PowerState::Paused)).await?;
    let a = stage.a();
    let guest = a.guest(id).await?.context("the guest is on a")?;
    let answer = ask(&*a, &guest).await?;
    let paused = Presence::Present(PowerState::Paused);
    ensure!(answer.same_uuid == paused, "{:?}", answer.same_uuid);
    ensure!(answer.same_name.is_none(), "itself is no other: {answer:?}");
    let other = Guest {
        id: nobody(),
        ..guest
    };
    let answer = ask(&*a, &other).await?;
    ensure!(
        answer.same_uuid == Presence::Absent,
        "{:?}",
        answer.same_uuid
    );
    ensure!(answer.same_name == Some(id), "{:?}", answer.same_name);
    Ok(())
}

/// A guest that is off cannot be migrated live, nor one that is not there.
///
/// # Errors
/// The point is broken.
pub async fn only_an_active_guest_migrates(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::state(PowerState::Shutdown)).await?;
    let mut spec = stage.way(id).await?;
    assert_wrong_state("a guest that is off", stage.a().migrate(spec.clone()).await)?;
    spec.instance = nobody();
    assert_no_such_guest("nobody", stage.a().migrate(spec).await)?;
    let off = Presence::Present(PowerState::Shutdown);
    ensure!(
        stage.a().presence(id).await? == off,
        "its definition is gone"
    );
    Ok(())
}

/// A destination that cannot be reached refuses, and the guest runs on.
///
/// # Errors
/// The point is broken.
pub async fn an_unreachable_destination_harms_nobody(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::default()).await?;
    let mut spec = stage.way(id).await?;
    spec.dest_libvirt_uri = "qemu+tcp://nowhere.invalid/system".to_owned();
    let result = stage.a().migrate(spec).await;
    assert_class("migrate", ErrorClass::Refused, result)?;
    ensure!(stage.a().job(id).await? == Job::None, "a job is left");
    super::assert_stayed(stage, id).await
}

/// A probe port can be reached while it is open, and no other.
///
/// # Errors
/// The point is broken.
pub async fn a_probe_port_is_reached(stage: &dyn Stage) -> Result<()> {
    let open = stage.b().open_probe_port().await;
    let port = open.map_err(anyhow::Error::msg)?;
    let address = stage.probe_address();
    let reached = stage.a().reach(&address, port).await;
    ensure!(reached.is_ok(), "the open port {port}: {reached:?}");
    let closed = stage.a().reach(&address, 1).await;
    ensure!(closed.is_err(), "port 1 is open");
    Ok(())
}
