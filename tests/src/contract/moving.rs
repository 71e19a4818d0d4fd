//! Points about moving: a migration that nobody disturbs.

use anyhow::{Context, Result, ensure};
use drover_compute::hypervisor::{Event, Job, JobSample};
use drover_model::{
    guest::{PowerState, Presence},
    ids::InstanceId,
    migration::Transfer,
};
use tokio::{
    sync::broadcast::Receiver,
    time::{Instant, timeout_at},
};

use super::{
    Place, Stage, Wish, assert_moved, assert_wrong_state, end_of, sample_of, set_off,
    set_off_and_watch, set_off_slowly, until,
};

/// A guest without disks moves, whole and persistent.
///
/// # Errors
/// The point is broken.
pub async fn migrate_moves_a_guest(stage: &dyn Stage) -> Result<()> {
    moves(stage, Wish::default()).await
}

/// A guest moves with its disk on a directory that both nodes share.
///
/// # Errors
/// The point is broken.
pub async fn migrate_moves_a_guest_on_a_shared_disk(stage: &dyn Stage) -> Result<()> {
    moves(stage, Wish::disk(Place::Shared)).await
}

/// A guest moves and takes its local disk along.
///
/// # Errors
/// The point is broken.
pub async fn migrate_copies_a_local_disk(stage: &dyn Stage) -> Result<()> {
    moves(stage, Wish::disk(Place::Local)).await
}

async fn moves(stage: &dyn Stage, wish: Wish) -> Result<()> {
    let id = stage.guest(wish).await?;
    let before = stage.a().guest(id).await?.context("the guest is on a")?;
    let spec = stage.way(id).await?;
    end_of(set_off(stage, spec)).await??;
    assert_moved(stage, id).await?;
    let after = stage.b().guest(id).await?.context("the guest is on b")?;
    ensure!(after.persistent, "it is gone when it stops");
    ensure!(after.active_job.is_none(), "{:?}", after.active_job);
    let same = (&after.name, &after.project, after.memory_mib, after.vcpus)
        == (
            &before.name,
            &before.project,
            before.memory_mib,
            before.vcpus,
        );
    ensure!(same, "it changed on the way: {before:?} {after:?}");
    ensure!(after.machine == before.machine, "{}", after.machine);
    let paths = |g: &drover_model::guest::Guest| {
        let disks = g.disks.iter();
        disks
            .map(|d| d.local_path().map(str::to_owned))
            .collect::<Vec<_>>()
    };
    ensure!(paths(&after) == paths(&before), "its disks lie elsewhere");
    ensure!(stage.a().guest(id).await?.is_none(), "a still defines it");
    Ok(())
}

/// A paused guest moves and stays paused.
///
/// # Errors
/// The point is broken.
pub async fn a_paused_guest_moves_paused(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::state(PowerState::Paused)).await?;
    let spec = stage.way(id).await?;
    end_of(set_off(stage, spec)).await??;
    let (on_a, on_b) = (stage.a().presence(id).await?, stage.b().presence(id).await?);
    ensure!(on_a == Presence::Absent, "on a it is {on_a:?}");
    let paused = Presence::Present(PowerState::Paused);
    ensure!(on_b == paused, "on b it is {on_b:?}");
    stage.verify(id).await
}

/// The job is none, then a migration whose totals never run backwards, then none.
///
/// # Errors
/// The point is broken.
pub async fn job_tells_how_far_it_is(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::disk(Place::Local)).await?;
    let a = stage.a();
    ensure!(
        a.job(id).await? == Job::None,
        "there is a job before there is one"
    );
    let mut spec = stage.way(id).await?;
    spec.options.bandwidth_mib_s = Some(8);
    let underway = set_off(stage, spec);
    let mut samples: Vec<JobSample> = Vec::new();
    while !underway.is_finished() {
        // Between the end of the job and of the call the guest has left a.
        if let Ok(Job::Migration(sample)) = a.job(id).await {
            samples.push(sample);
        }
        tokio::task::yield_now().await;
    }
    end_of(underway).await??;
    ensure!(stage.b().job(id).await? == Job::None, "a job is left on b");
    let sent = samples.iter().any(|s| s.memory.processed_bytes > 0);
    ensure!(sent, "no sample of {} saw memory", samples.len());
    for pair in samples.windows(2) {
        ensure!(
            goes_on(&pair[0], &pair[1]),
            "{:?}, then {:?}",
            pair[0],
            pair[1]
        );
    }
    samples.iter().try_for_each(is_sane)
}

fn goes_on(earlier: &JobSample, later: &JobSample) -> bool {
    earlier.elapsed_ms <= later.elapsed_ms
        && earlier.iteration <= later.iteration
        && earlier.memory.processed_bytes <= later.memory.processed_bytes
        && earlier.memory.total_bytes <= later.memory.total_bytes
        && earlier.disk.processed_bytes <= later.disk.processed_bytes
        && earlier.disk.total_bytes <= later.disk.total_bytes
}

fn is_sane(sample: &JobSample) -> Result<()> {
    let within = |t: &Transfer| t.remaining_bytes <= t.total_bytes;
    ensure!(within(&sample.memory) && within(&sample.disk), "{sample:?}");
    ensure!(!sample.post_copy, "nobody asked for post-copy: {sample:?}");
    Ok(())
}

/// While it comes, the destination has a guest that waits, and the source one
/// that runs and has a job.
///
/// # Errors
/// The point is broken.
pub async fn the_destination_waits_while_the_source_runs(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::busy()).await?;
    let underway = set_off_slowly(stage, id).await?;
    let (a, b) = (stage.a(), stage.b());
    ensure!(b.presence(id).await? == Presence::Incoming, "presence on b");
    let all = b.guests().await?;
    let report = all.iter().find(|r| r.id == id);
    let report = report.context("guests() of b does not list it")?;
    ensure!(report.incoming, "guests() of b: {report:?}");
    let running = Presence::Present(PowerState::Running);
    ensure!(a.presence(id).await? == running, "presence on a");
    let guest = a.guest(id).await?.context("guest() of a")?;
    ensure!(guest.active_job.is_some(), "guest() of a tells of no job");
    assert_wrong_state("resume on b", b.resume(id).await)?;
    assert_wrong_state("undefine on b", b.undefine(id).await)?;
    assert_wrong_state("undefine on a", a.undefine(id).await)?;
    assert_wrong_state("abort on b", b.abort(id).await)?;
    assert_wrong_state("discard on a", a.discard_incoming(id).await)?;
    assert_wrong_state("discard outgoing on a", a.discard_outgoing(id).await)?;
    assert_wrong_state("discard outgoing on b", b.discard_outgoing(id).await)?;
    assert_wrong_state("discard half on a", a.discard_half(id).await)?;
    assert_wrong_state("discard half on b", b.discard_half(id).await)?;
    ensure!(!underway.is_finished(), "the migration was disturbed");
    a.abort(id).await?;
    end_of(underway).await?.expect_err("it was aborted");
    Ok(())
}

/// Afterwards the destination tells how long the guest stood still.
///
/// # Errors
/// The point is broken.
pub async fn the_destination_tells_the_downtime(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::default()).await?;
    let spec = stage.way(id).await?;
    end_of(set_off(stage, spec)).await??;
    for attempt in ["first", "second"] {
        let sample = stage.b().completed_job(id).await?;
        let sample = sample.with_context(|| format!("no statistics, {attempt} time"))?;
        let downtime = sample.downtime_ms.context("no downtime")?;
        ensure!(downtime <= 60_000, "{downtime} ms");
        ensure!(sample.memory.total_bytes > 0, "{sample:?}");
        ensure!(sample.elapsed_ms > 0, "{sample:?}");
    }
    Ok(())
}

/// Both nodes announce that something happened to the guest.
///
/// # Errors
/// The point is broken.
pub async fn a_move_is_announced(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::default()).await?;
    let (mut on_a, mut on_b) = (stage.a().events(), stage.b().events());
    let mut spec = stage.way(id).await?;
    spec.options.bandwidth_mib_s = Some(16);
    end_of(set_off(stage, spec)).await??;
    let of_a_move = [
        Event::Guest(id),
        Event::MigrationIteration(id),
        Event::SwitchOver(id),
        Event::JobCompleted(id),
    ];
    announced("on a", &mut on_a, &of_a_move).await?;
    announced("on b", &mut on_b, &[Event::Guest(id)]).await
}

/// Waits until all these events were seen, in whatever order.
///
/// # Errors
/// One does not come.
pub async fn announced(side: &str, events: &mut Receiver<Event>, wanted: &[Event]) -> Result<()> {
    let mut missing = wanted.to_vec();
    let deadline = Instant::now() + super::PATIENCE;
    while !missing.is_empty() {
        let event = timeout_at(deadline, events.recv()).await;
        let event = event.with_context(|| format!("never announced {side}: {missing:?}"))??;
        missing.retain(|wanted| *wanted != event);
    }
    Ok(())
}

/// A second migration of a guest is refused, and the first goes on.
///
/// # Errors
/// The point is broken.
pub async fn a_second_migration_is_refused(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::busy()).await?;
    let first = set_off_slowly(stage, id).await?;
    let again = stage.way(id).await?;
    assert_wrong_state("the second", stage.a().migrate(again).await)?;
    ensure!(!first.is_finished(), "the first was disturbed");
    let job = sample_of(stage.a().job(id).await?);
    ensure!(job.is_some(), "the first has no job any more");
    stage.a().set_max_downtime_ms(id, 60_000).await?;
    end_of(first).await??;
    assert_moved(stage, id).await
}

/// A guest that writes too fast goes when it may stand still for longer.
///
/// # Errors
/// The point is broken.
pub async fn a_longer_downtime_lets_a_busy_guest_go(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::busy()).await?;
    let mut spec = stage.way(id).await?;
    spec.options.bandwidth_mib_s = Some(16);
    spec.initial_downtime_ms = Some(1);
    let underway = set_off_and_watch(stage, spec).await?;
    until("it has gone round and round", async || {
        ensure!(!underway.is_finished(), "it converged");
        let sample = sample_of(stage.a().job(id).await?);
        Ok(sample.filter(|s| s.iteration >= 3 && s.dirty_rate_bytes_s > 0))
    })
    .await?;
    stage.a().set_max_downtime_ms(id, 10_000).await?;
    end_of(underway).await??;
    assert_moved(stage, id).await
}

/// A migration goes on when the one who asked for it is gone.
///
/// # Errors
/// The point is broken.
pub async fn a_migration_outlives_its_caller(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::default()).await?;
    let mut spec = stage.way(id).await?;
    spec.options.bandwidth_mib_s = Some(8);
    let underway = set_off_and_watch(stage, spec).await?;
    underway.abort();
    arrives(stage, id).await
}

/// Waits for a guest that somebody else set off.
///
/// # Errors
/// It does not arrive.
pub async fn arrives(stage: &dyn Stage, id: InstanceId) -> Result<()> {
    let running = Presence::Present(PowerState::Running);
    until("the guest runs on b, and a has nothing of it", async || {
        let here = stage.b().presence(id).await? == running;
        Ok((here && stage.a().presence(id).await? == Presence::Absent).then_some(()))
    })
    .await?;
    assert_moved(stage, id).await
}
