//! Points about steering a migration: abort it, force it, break it.

use anyhow::{Context, Result, bail, ensure};
use drover_compute::hypervisor::{HypervisorError, Job};
use drover_model::{
    error::ErrorClass,
    guest::{PowerState, Presence},
    ids::InstanceId,
};

use super::{
    Place, Stage, Underway, Wish, assert_class, assert_moved, assert_stayed, assert_wrong_state,
    end_of, sample_of, set_off_and_watch, set_off_slowly, until,
};

/// An abort leaves the guest on a, nothing on b, and says so to the caller.
///
/// # Errors
/// The point is broken.
pub async fn an_abort_leaves_everything_as_it_was(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::busy()).await?;
    let underway = set_off_slowly(stage, id).await?;
    stage.a().abort(id).await?;
    match end_of(underway).await? {
        Err(HypervisorError::Aborted(_)) => {}
        other => bail!("migrate: Aborted expected, got {other:?}"),
    }
    assert_stayed(stage, id).await?;
    ensure!(stage.a().job(id).await? == Job::None, "a job is left");
    assert_wrong_state("abort of nothing", stage.a().abort(id).await)
}

/// What was aborted can be tried again.
///
/// # Errors
/// The point is broken.
pub async fn after_an_abort_it_can_move(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::disk(Place::Shared)).await?;
    let underway = set_off_slowly(stage, id).await?;
    stage.a().abort(id).await?;
    assert_class("migrate", ErrorClass::Refused, end_of(underway).await?)?;
    assert_stayed(stage, id).await?;
    let spec = stage.way(id).await?;
    end_of(super::set_off(stage, spec)).await??;
    assert_moved(stage, id).await
}

/// Post-copy lets the guest run on b at once, and cannot be turned back.
///
/// # Errors
/// The point is broken.
pub async fn post_copy_moves_the_guest_at_once(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::busy()).await?;
    let underway = in_post_copy(stage, id).await?;
    assert_class("abort", ErrorClass::Refused, stage.a().abort(id).await)?;
    end_of(underway).await??;
    assert_moved(stage, id).await
}

/// Sets a guest off and waits until it is one half here and one half there.
async fn in_post_copy(stage: &dyn Stage, id: InstanceId) -> Result<Underway> {
    let mut spec = stage.way(id).await?;
    spec.options.bandwidth_mib_s = Some(super::NARROW_MIB_S);
    spec.options.post_copy = true;
    let underway = set_off_and_watch(stage, spec).await?;
    stage.a().start_post_copy(id).await?;
    until("the guest has changed sides", async || {
        // The job, and the guest, may be gone from a already.
        let job = stage.a().job(id).await;
        let post_copy = job.map(|job| sample_of(job).is_some_and(|s| s.post_copy));
        Ok(post_copy.unwrap_or(true).then_some(()))
    })
    .await?;
    Ok(underway)
}

/// Of a guest whose QEMU on b ends in post-copy a half stands still on a, for ever
/// under libvirt's job. It can be discarded, and nothing else.
///
/// # Errors
/// The point is broken.
pub async fn half_a_guest_stands_still_until_it_is_discarded(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::busy()).await?;
    let underway = in_post_copy(stage, id).await?;
    let (a, b) = (stage.a(), stage.b());
    let running = Presence::Present(PowerState::Running);
    until("it runs on b", async || {
        Ok((b.presence(id).await? == running).then_some(()))
    })
    .await?;
    b.stop(id).await?;
    end_of(underway).await?.expect_err("its other half is gone");
    let off = Presence::Present(PowerState::Shutdown);
    ensure!(b.presence(id).await? == off, "on b");
    let paused = Presence::Present(PowerState::Paused);
    ensure!(a.presence(id).await? == paused, "on a");
    let sample = sample_of(a.job(id).await?).context("its job is gone")?;
    ensure!(sample.post_copy, "{sample:?}");
    assert_wrong_state("resume", a.resume(id).await)?;
    assert_wrong_state("discard_outgoing", a.discard_outgoing(id).await)?;
    a.discard_half(id).await?;
    ensure!(a.presence(id).await? == Presence::Absent, "on a, discarded");
    Ok(())
}

/// A migration that was not started for it is not switched to post-copy.
///
/// # Errors
/// The point is broken.
pub async fn post_copy_must_have_been_allowed(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::busy()).await?;
    let underway = set_off_slowly(stage, id).await?;
    assert_wrong_state("start_post_copy", stage.a().start_post_copy(id).await)?;
    ensure!(!underway.is_finished(), "the migration was disturbed");
    stage.a().abort(id).await?;
    assert_class("migrate", ErrorClass::Refused, end_of(underway).await?)?;
    assert_stayed(stage, id).await
}

/// A guest that is paused for it goes at once, and runs again on b.
///
/// # Errors
/// The point is broken.
pub async fn a_pause_ends_a_migration_that_would_not_end(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::busy()).await?;
    let mut spec = stage.way(id).await?;
    spec.options.bandwidth_mib_s = Some(16);
    spec.initial_downtime_ms = Some(1);
    let underway = set_off_and_watch(stage, spec).await?;
    stage.a().pause_for_switch_over(id).await?;
    end_of(underway).await??;
    assert_moved(stage, id).await
}

/// A guest that was paused for a migration which then is aborted can be made
/// to run on.
///
/// # Errors
/// The point is broken.
pub async fn after_pause_and_abort_it_runs_on(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::busy()).await?;
    let underway = set_off_slowly(stage, id).await?;
    stage.a().pause_for_switch_over(id).await?;
    let paused = Presence::Present(PowerState::Paused);
    ensure!(stage.a().presence(id).await? == paused, "it was not paused");
    stage.a().abort(id).await?;
    assert_class("migrate", ErrorClass::Refused, end_of(underway).await?)?;
    stage.a().resume(id).await?;
    assert_stayed(stage, id).await
}

/// A destination that gives up what it waits for leaves the guest on a.
///
/// # Errors
/// The point is broken.
pub async fn a_discarded_destination_leaves_the_guest(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::busy()).await?;
    let underway = set_off_slowly(stage, id).await?;
    stage.b().discard_incoming(id).await?;
    assert_class("migrate", ErrorClass::Refused, end_of(underway).await?)?;
    assert_stayed(stage, id).await?;
    stage.b().discard_incoming(id).await?;
    Ok(())
}
