//! Points about a hypervisor that does not answer: unknown is not absent.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use drover_compute::hypervisor::{Definition, DestinationQuestion, Event};
use drover_model::{
    error::ErrorClass::{Lost, Retryable},
    guest::{Guest, PowerState, Presence},
    ids::InstanceId,
};
use tokio::{sync::broadcast::Receiver, time::timeout};

use super::{Stage, Wish, assert_class, end_of, files, moving, set_off_and_watch};

/// The longest a call may take to find out that nobody answers.
const SOON: Duration = Duration::from_secs(30);

async fn connection(events: &mut Receiver<Event>, up: bool) -> Result<()> {
    moving::announced("of the connection", events, &[Event::Connection { up }]).await
}

/// While it is away every call is an error that may be retried, never an empty
/// answer; and it is announced.
///
/// # Errors
/// The point is broken.
pub async fn away_is_an_error_and_never_an_empty_answer(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::default()).await?;
    let guest = stage.a().guest(id).await?.context("the guest is on a")?;
    let definition = stage.a().definition(id).await?;
    let definition = definition.context("it has no definition")?;
    let mut events = stage.a().events();
    stage.cut_off_a().await?;
    connection(&mut events, false).await?;
    let asked = async {
        looks_fail(stage, &guest).await?;
        acts_fail(stage, id, &definition).await
    };
    timeout(SOON, asked).await.context("calls hang")??;
    stage.reconnect_a().await
}

async fn looks_fail(stage: &dyn Stage, guest: &Guest) -> Result<()> {
    let (a, id) = (stage.a(), guest.id);
    assert_class("inventory", Retryable, a.inventory().await)?;
    assert_class("guests", Retryable, a.guests().await)?;
    assert_class("guest", Retryable, a.guest(id).await)?;
    assert_class("presence", Retryable, a.presence(id).await)?;
    assert_class("job", Retryable, a.job(id).await)?;
    assert_class("completed_job", Retryable, a.completed_job(id).await)?;
    assert_class("lasting_guest", Retryable, a.lasting_guest(id).await)?;
    assert_class("definition", Retryable, a.definition(id).await)?;
    let question = DestinationQuestion { guest, marks: &[] };
    let answer = a.answer_destination(question).await;
    assert_class("answer_destination", Retryable, answer)
}

async fn acts_fail(stage: &dyn Stage, id: InstanceId, definition: &Definition) -> Result<()> {
    let a = stage.a();
    let unused = format!("{}/unused", stage.shared_directory());
    stage.write(&unused, "may be a guest's").await?;
    assert_class("remove_disk", Retryable, a.remove_disk(&unused).await)?;
    let disk = files::disk_at(&format!("{unused}-either"), "qcow2");
    assert_class(
        "reserve_file",
        Retryable,
        files::make_disk(&*a, &disk).await,
    )?;
    let to = format!("{unused}-kept");
    assert_class("rename_file", Retryable, a.rename_file(&unused, &to).await)?;
    let left = stage.fingerprint(&unused).await?;
    ensure!(
        left.is_some(),
        "a file was removed or renamed without asking who uses it"
    );
    assert_class("shut_down", Retryable, a.shut_down(id).await)?;
    assert_class("stop", Retryable, a.stop(id).await)?;
    assert_class("start", Retryable, a.start(id).await)?;
    assert_class("withdraw", Retryable, a.withdraw(id).await)?;
    assert_class("define", Retryable, a.define(definition, None).await)?;
    let spec = stage.way(id).await?;
    assert_class("migrate", Retryable, a.migrate(spec).await)?;
    assert_class("abort", Retryable, a.abort(id).await)?;
    assert_class("start_post_copy", Retryable, a.start_post_copy(id).await)?;
    let paused = a.pause_for_switch_over(id).await;
    assert_class("pause_for_switch_over", Retryable, paused)?;
    assert_class("resume", Retryable, a.resume(id).await)?;
    let set = a.set_max_downtime_ms(id, 500).await;
    assert_class("set_max_downtime_ms", Retryable, set)?;
    assert_class("discard_incoming", Retryable, a.discard_incoming(id).await)?;
    assert_class("discard_outgoing", Retryable, a.discard_outgoing(id).await)?;
    assert_class("discard_half", Retryable, a.discard_half(id).await)?;
    assert_class("undefine", Retryable, a.undefine(id).await)
}

/// When it is back everything works, without a new driver.
///
/// # Errors
/// The point is broken.
pub async fn back_again_everything_works(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::default()).await?;
    let mut events = stage.a().events();
    stage.cut_off_a().await?;
    connection(&mut events, false).await?;
    assert_class("guests", Retryable, stage.a().guests().await)?;
    stage.reconnect_a().await?;
    connection(&mut events, true).await?;
    let all = stage.a().guests().await?;
    ensure!(all.iter().any(|r| r.id == id), "the guest is not listed");
    let running = Presence::Present(PowerState::Running);
    ensure!(stage.a().presence(id).await? == running, "it does not run");
    let spec = stage.way(id).await?;
    end_of(super::set_off(stage, spec)).await??;
    super::assert_moved(stage, id).await
}

/// A caller that loses the hypervisor in the middle is told that nobody knows;
/// the migration goes on.
///
/// # Errors
/// The point is broken.
pub async fn lost_in_the_middle_is_not_failed(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::default()).await?;
    let mut spec = stage.way(id).await?;
    spec.options.bandwidth_mib_s = Some(8);
    let underway = set_off_and_watch(stage, spec).await?;
    let mut events = stage.a().events();
    stage.cut_off_a().await?;
    connection(&mut events, false).await?;
    assert_class("migrate", Lost, end_of(underway).await?)?;
    stage.reconnect_a().await?;
    connection(&mut events, true).await?;
    moving::arrives(stage, id).await
}
