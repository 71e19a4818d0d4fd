//! Points about a guest's files as such: reserved, renamed, and carried from
//! node to node.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use drover_compute::hypervisor::{
    HypervisorError, Incoming, SendError, SendSpec, Sent, fake::CancellationToken,
};
use drover_model::{error::ErrorClass, guest::PowerState};
use tokio::{sync::watch, task::JoinHandle, time::timeout};
use uuid::Uuid;

use super::{Place, Stage, Wish, assert_class, nobody, until};

const TOKEN: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
/// Bytes of a file that takes a while.
const BYTES: usize = 6 << 20;
/// Under which it takes six seconds.
const NARROW_BYTES_S: u64 = 1 << 20;
/// So much of it that a part can be used again.
const REUSED_BYTES: u64 = 5 << 19;
/// How long nothing may get through.
const PATIENCE: Duration = Duration::from_secs(8);
/// What counts as soon.
const SOON: Duration = Duration::from_secs(2);

fn fresh_path(stage: &dyn Stage) -> String {
    format!("{}/{}.img", stage.shared_directory(), nobody())
}

/// A file on a with something in it.
async fn source(stage: &dyn Stage, bytes: usize) -> Result<String> {
    let path = fresh_path(stage);
    let text: String = (0..bytes / 8).map(|i| format!("{i:08}")).collect();
    stage.write(&path, &text).await?;
    Ok(path)
}

/// An empty file on b, for the bytes of another.
async fn reserved(stage: &dyn Stage) -> Result<String> {
    let path = fresh_path(stage);
    stage.b().reserve_file(&path, false).await?;
    Ok(path)
}

fn incoming(path: &str, present: bool) -> Incoming {
    Incoming {
        path: path.to_owned(),
        present,
    }
}

/// Has b take that in, and says how a sends.
async fn opened(stage: &dyn Stage, from: &[&str], to: &[Incoming]) -> Result<SendSpec> {
    let key = Uuid::new_v4();
    stage.b().receive(key, TOKEN, to).await?;
    let port = stage.b().disk_port().map_err(anyhow::Error::msg)?;
    Ok(SendSpec {
        key,
        token: TOKEN.to_owned(),
        address: stage.probe_address(),
        port,
        files: from.iter().map(|path| (*path).to_owned()).collect(),
        resume: false,
        bandwidth_bytes_s: None,
        progress_timeout: PATIENCE,
    })
}

struct Sending {
    task: JoinHandle<std::result::Result<Sent, SendError>>,
    view: watch::Receiver<Sent>,
    cancel: CancellationToken,
}

fn set_off(stage: &dyn Stage, spec: SendSpec) -> Sending {
    let (shown, view) = watch::channel(Sent::default());
    let (a, cancel) = (stage.a(), CancellationToken::new());
    let its = cancel.clone();
    let task = tokio::spawn(async move { a.send(spec, shown, its).await });
    Sending { task, view, cancel }
}

impl Sending {
    async fn end(self) -> Result<std::result::Result<Sent, SendError>> {
        timeout(super::PATIENCE, self.task)
            .await
            .context("sending does not end")?
            .context("the task that sends died")
    }

    async fn under_way(&self) -> Result<()> {
        self.past(1).await
    }

    async fn past(&self, bytes: u64) -> Result<()> {
        until("bytes are there", async || {
            ensure!(!self.task.is_finished(), "sending ended at once");
            Ok((self.view.borrow().done_bytes >= bytes).then_some(()))
        })
        .await
    }
}

async fn send(stage: &dyn Stage, spec: SendSpec) -> Result<std::result::Result<Sent, SendError>> {
    set_off(stage, spec).end().await
}

fn assert_failed<T: std::fmt::Debug>(
    what: &str,
    result: std::result::Result<T, SendError>,
) -> Result<()> {
    match result {
        Err(SendError::Failed(_)) => Ok(()),
        other => bail!("{what}: Failed expected, got {other:?}"),
    }
}

// ---- files as such -------------------------------------------------------------------

/// A file is reserved where nothing is, with its directory if told so.
///
/// # Errors
/// The point is broken.
pub async fn a_file_is_reserved_once(stage: &dyn Stage) -> Result<()> {
    let (a, path) = (stage.a(), fresh_path(stage));
    a.reserve_file(&path, false).await?;
    let before = stage.fingerprint(&path).await?;
    ensure!(before.is_some(), "there is no file");
    for with_directory in [false, true] {
        let again = a.reserve_file(&path, with_directory).await;
        let there = matches!(again, Err(HypervisorError::Exists(_)));
        ensure!(there, "Exists expected, got {again:?}");
    }
    ensure!(stage.fingerprint(&path).await? == before, "it was changed");
    let deep = format!("{path}.d/deeper/file");
    let refused = a.reserve_file(&deep, false).await;
    assert_class("without its directory", ErrorClass::Refused, refused)?;
    a.reserve_file(&deep, true).await?;
    ensure!(stage.fingerprint(&deep).await?.is_some(), "no {deep}");
    Ok(())
}

/// A file gets another name, once, and never that of another.
///
/// # Errors
/// The point is broken.
pub async fn a_file_is_renamed_over_nothing_and_once(stage: &dyn Stage) -> Result<()> {
    let (a, from) = (stage.a(), source(stage, 64).await?);
    let other = source(stage, 128).await?;
    let before = (
        stage.fingerprint(&from).await?,
        stage.fingerprint(&other).await?,
    );
    let over = a.rename_file(&from, &other).await;
    let there = matches!(over, Err(HypervisorError::Exists(_)));
    ensure!(there, "over another: Exists expected, got {over:?}");
    let after = (
        stage.fingerprint(&from).await?,
        stage.fingerprint(&other).await?,
    );
    ensure!(before == after, "one was changed");
    let elsewhere = format!("{}/elsewhere/file", stage.shared_directory());
    let away = a.rename_file(&from, &elsewhere).await;
    assert_class("to another directory", ErrorClass::Refused, away)?;
    let to = format!("{from}.kept");
    for attempt in ["once", "twice"] {
        let renamed = a.rename_file(&from, &to).await;
        renamed.with_context(|| format!("renamed {attempt}"))?;
        ensure!(stage.fingerprint(&from).await?.is_none(), "{attempt}");
        ensure!(stage.same(&to, &to).await?, "{attempt}: it is gone");
    }
    let nothing = a.rename_file(&fresh_path(stage), &fresh_path(stage)).await;
    assert_class("of nothing", ErrorClass::Refused, nothing)
}

/// A file that a guest uses, running or not, keeps its name.
///
/// # Errors
/// The point is broken.
pub async fn a_file_in_use_is_not_renamed(stage: &dyn Stage) -> Result<()> {
    for state in [PowerState::Running, PowerState::Shutdown] {
        let wish = Wish {
            state,
            ..Wish::disk(Place::Shared)
        };
        let id = stage.guest(wish).await?;
        let guest = stage.a().guest(id).await?.context("the guest is on a")?;
        let path = guest.disks[0].local_path().context("its disk is a file")?;
        let to = format!("{path}.kept");
        let refused = stage.a().rename_file(path, &to).await;
        assert_class("rename_file", ErrorClass::Refused, refused)?;
        ensure!(stage.fingerprint(path).await?.is_some(), "{state:?}: gone");
        ensure!(stage.fingerprint(&to).await?.is_none(), "{state:?}: a copy");
        if state == PowerState::Shutdown {
            stage.a().withdraw(id).await?;
            stage.a().rename_file(path, &to).await.context("unused")?;
            stage.a().rename_file(&to, path).await.context("and back")?;
        }
    }
    Ok(())
}

/// Facts say what is there, how much room there is, and who uses it.
///
/// # Errors
/// The point is broken.
pub async fn facts_say_what_is_there(stage: &dyn Stage) -> Result<()> {
    let id = stage.guest(Wish::disk(Place::Shared)).await?;
    let guest = stage.a().guest(id).await?.context("the guest is on a")?;
    let disk = guest.disks[0].local_path().context("its disk is a file")?;
    let free = source(stage, 64).await?;
    let absent = fresh_path(stage);
    let nowhere = format!("{}/none/file", stage.shared_directory());
    let paths = [disk, &free, &absent, &nowhere].map(str::to_owned);
    let facts = stage.a().file_facts(&paths).await?;
    let names: Vec<&str> = facts.iter().map(|f| f.path.as_str()).collect();
    ensure!(names == paths, "{names:?}");
    let seen: Vec<_> = facts
        .iter()
        .map(|f| (f.exists, f.directory_exists, f.in_use))
        .collect();
    let expected = [
        (true, true, true),
        (true, true, false),
        (false, true, false),
        (false, false, false),
    ];
    ensure!(seen == expected, "{facts:?}");
    ensure!(facts[0].length_bytes > 0, "{:?}", facts[0]);
    ensure!(facts[2].free_bytes > 0, "{:?}", facts[2]);
    ensure!(!facts[2].file_system.is_empty(), "{:?}", facts[2]);
    ensure!(facts[0].file_system == facts[2].file_system, "{facts:?}");
    let there = stage.b().file_facts(&paths).await?;
    ensure!(there[1].exists && !there[0].in_use, "on b: {there:?}");
    Ok(())
}

/// A file is flushed, and one that is not there is not.
///
/// # Errors
/// The point is broken.
pub async fn a_file_is_flushed(stage: &dyn Stage) -> Result<()> {
    let path = source(stage, 64).await?;
    for _ in 0..2 {
        stage.a().flush_file(&path).await?;
    }
    let absent = stage.a().flush_file(&fresh_path(stage)).await;
    assert_class("of nothing", ErrorClass::Refused, absent)
}

// ---- carrying ------------------------------------------------------------------------

/// What is sent is there, byte for byte, a disk and another file; and the port
/// can be reached.
///
/// # Errors
/// The point is broken.
pub async fn files_are_sent_and_verified(stage: &dyn Stage) -> Result<()> {
    let wish = Wish {
        state: PowerState::Shutdown,
        ..Wish::disk(Place::Shared)
    };
    let id = stage.guest(wish).await?;
    let guest = stage.a().guest(id).await?.context("the guest is on a")?;
    let disk = guest.disks[0].local_path().context("its disk is a file")?;
    let from = [disk.to_owned(), source(stage, BYTES).await?];
    let to = [reserved(stage).await?, reserved(stage).await?];
    let files = [incoming(&to[0], false), incoming(&to[1], false)];
    let spec = opened(stage, &[&from[0], &from[1]], &files).await?;
    let reached = stage.a().reach(&spec.address, spec.port).await;
    ensure!(reached.is_ok(), "the port for disks: {reached:?}");
    let key = spec.key;
    let sending = set_off(stage, spec);
    let view = sending.view.clone();
    let sent = sending.end().await??;
    ensure!(sent == *view.borrow(), "{sent:?} is not what was shown");
    ensure!(sent.done_bytes == sent.total_bytes, "{sent:?}");
    ensure!(sent.total_bytes >= BYTES as u64, "{sent:?}");
    ensure!((sent.reused_bytes, sent.reconnects) == (0, 0), "{sent:?}");
    for (from, to) in from.iter().zip(&to) {
        ensure!(stage.same(from, to).await?, "{to} differs");
    }
    stage.b().stop_receiving(key).await;
    stage.b().stop_receiving(key).await;
    Ok(())
}

/// Asked again with the same, b goes on; with anything else it refuses.
///
/// # Errors
/// The point is broken.
pub async fn what_is_expected_is_expected_once(stage: &dyn Stage) -> Result<()> {
    let from = source(stage, 64).await?;
    let files = [incoming(&reserved(stage).await?, false)];
    let spec = opened(stage, &[&from], &files).await?;
    let b = stage.b();
    b.receive(spec.key, TOKEN, &files).await.context("again")?;
    let other = [incoming(&fresh_path(stage), false)];
    let otherwise = b.receive(spec.key, TOKEN, &other).await;
    assert_class("other files", ErrorClass::Refused, otherwise)?;
    let otherwise = b.receive(spec.key, &TOKEN.replace('0', "1"), &files).await;
    assert_class("another token", ErrorClass::Refused, otherwise)?;
    let malformed = b.receive(Uuid::new_v4(), "secret", &files).await;
    assert_class("no token", ErrorClass::Refused, malformed)?;
    send(stage, spec).await??;
    Ok(())
}

/// Who has not the token gets nowhere, and is told soon.
///
/// # Errors
/// The point is broken.
pub async fn sending_with_a_wrong_token_ends(stage: &dyn Stage) -> Result<()> {
    let from = source(stage, BYTES).await?;
    let to = reserved(stage).await?;
    let before = stage.fingerprint(&to).await?;
    let spec = opened(stage, &[&from], &[incoming(&to, false)]).await?;
    let wrong = [
        SendSpec {
            token: TOKEN.replace('0', "1"),
            ..spec.clone()
        },
        SendSpec {
            key: Uuid::new_v4(),
            ..spec
        },
    ];
    for spec in wrong {
        // It may be one that was restarted just now, and is not told yet.
        let ended = timeout(SOON * 3, send(stage, spec)).await;
        assert_failed("a stranger", ended.context("it is not told")??)?;
    }
    ensure!(stage.fingerprint(&to).await? == before, "it wrote");
    Ok(())
}

/// A destination that does not answer is waited for, as long as was said.
///
/// # Errors
/// The point is broken.
pub async fn sending_to_nobody_stalls(stage: &dyn Stage) -> Result<()> {
    let from = source(stage, 64).await?;
    let files = [incoming(&reserved(stage).await?, false)];
    let spec = SendSpec {
        port: 1,
        progress_timeout: Duration::from_secs(2),
        ..opened(stage, &[&from], &files).await?
    };
    match send(stage, spec).await? {
        Err(SendError::Stalled(_)) => Ok(()),
        other => bail!("Stalled expected, got {other:?}"),
    }
}

/// What is not there is not sent.
///
/// # Errors
/// The point is broken.
pub async fn sending_what_is_not_there_fails(stage: &dyn Stage) -> Result<()> {
    let files = [incoming(&reserved(stage).await?, false)];
    let spec = opened(stage, &[&fresh_path(stage)], &files).await?;
    assert_failed("of nothing", send(stage, spec).await?)
}

/// Sending that is cancelled, or dropped, ends soon; what was sent is used when
/// it is taken up again.
///
/// # Errors
/// The point is broken.
pub async fn cancelled_sending_ends_soon_and_resumes(stage: &dyn Stage) -> Result<()> {
    let from = source(stage, BYTES).await?;
    let to = reserved(stage).await?;
    let spec = opened(stage, &[&from], &[incoming(&to, false)]).await?;
    let slow = SendSpec {
        bandwidth_bytes_s: Some(NARROW_BYTES_S),
        resume: true,
        ..spec.clone()
    };
    let sending = set_off(stage, slow.clone());
    // More than one piece: less than a whole one is sent again.
    sending.past(REUSED_BYTES).await?;
    sending.cancel.cancel();
    let ended = timeout(SOON, sending.end()).await;
    match ended.context("it goes on")?? {
        Err(SendError::Cancelled) => {}
        other => bail!("Cancelled expected, got {other:?}"),
    }
    let dropped = set_off(stage, slow);
    dropped.under_way().await?;
    dropped.task.abort();
    drop(dropped);
    let again = SendSpec {
        resume: true,
        ..spec
    };
    let sent = send(stage, again).await??;
    ensure!(sent.reused_bytes > 0, "nothing was reused: {sent:?}");
    ensure!(sent.reused_bytes < sent.total_bytes, "{sent:?}");
    ensure!(stage.same(&from, &to).await?, "{to} differs");
    Ok(())
}

/// A file that is there is compared: the same is not sent, another is told, and
/// neither is written.
///
/// # Errors
/// The point is broken.
pub async fn a_present_file_that_differs_is_told(stage: &dyn Stage) -> Result<()> {
    let from = source(stage, BYTES).await?;
    let same = source(stage, BYTES).await?;
    let other = fresh_path(stage);
    let text: String = (0..BYTES / 8).map(|i| format!("{:08}", i / 9)).collect();
    stage.write(&other, &text).await?;
    let before = (
        stage.fingerprint(&same).await?,
        stage.fingerprint(&other).await?,
    );
    let spec = opened(stage, &[&from], &[incoming(&same, true)]).await?;
    let sent = send(stage, spec).await??;
    ensure!(sent.done_bytes == sent.total_bytes, "{sent:?}");
    ensure!(
        sent.reused_bytes == sent.total_bytes,
        "it was sent: {sent:?}"
    );
    for path in [&other, &source(stage, 64).await?] {
        let spec = opened(stage, &[&from], &[incoming(path, true)]).await?;
        assert_failed("another", send(stage, spec).await?)?;
    }
    let spec = opened(stage, &[&from], &[incoming(&fresh_path(stage), true)]).await?;
    assert_failed("one that is gone", send(stage, spec).await?)?;
    let after = (
        stage.fingerprint(&same).await?,
        stage.fingerprint(&other).await?,
    );
    ensure!(before == after, "one was written");
    Ok(())
}

/// When b takes in no more, nothing is written any more, whoever sends.
///
/// # Errors
/// The point is broken.
pub async fn nothing_is_written_once_receiving_has_stopped(stage: &dyn Stage) -> Result<()> {
    let from = source(stage, BYTES).await?;
    let to = reserved(stage).await?;
    let spec = SendSpec {
        bandwidth_bytes_s: Some(NARROW_BYTES_S),
        progress_timeout: Duration::from_secs(2),
        ..opened(stage, &[&from], &[incoming(&to, false)]).await?
    };
    let key = spec.key;
    let sending = set_off(stage, spec);
    sending.under_way().await?;
    stage.b().stop_receiving(key).await;
    let stands = stage.fingerprint(&to).await?;
    match sending.end().await? {
        Err(SendError::Stalled(_)) => {}
        other => bail!("Stalled expected, got {other:?}"),
    }
    ensure!(stage.fingerprint(&to).await? == stands, "it was written");
    Ok(())
}

/// A file that is written while it is sent is told: what is there is no copy.
///
/// # Errors
/// The point is broken.
pub async fn a_source_that_changes_is_told(stage: &dyn Stage) -> Result<()> {
    let from = source(stage, BYTES).await?;
    let to = reserved(stage).await?;
    let spec = SendSpec {
        bandwidth_bytes_s: Some(NARROW_BYTES_S),
        ..opened(stage, &[&from], &[incoming(&to, false)]).await?
    };
    let sending = set_off(stage, spec);
    sending.under_way().await?;
    stage.change(&from).await?;
    assert_failed("a source that changes", sending.end().await?)
}
