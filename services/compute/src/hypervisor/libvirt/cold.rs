//! What a guest needs that moves while it is off. Definitions go through
//! libvirt, files through the carrier, whose threads live as long as a transfer.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use drover_carrier::{self as carrier, Control, Mode, Outgoing, Receiver, Token};
use drover_model::{api::compute::FileFact, guest::Guest, ids::InstanceId, migration::Flavor};
use tokio::{sync::watch, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    LibvirtDriver, LibvirtSettings,
    blocking::Effect,
    capabilities, definitions, guests, lifecycle,
    overlays::{self, Thaw},
    rebuild,
    storage::{chain::Places, files},
    xml::notes,
};
use crate::hypervisor::{
    ColdDriver, Definition, HypervisorError, Incoming, Overlay, Result, SendError, SendSpec, Sent,
};

/// Time between two looks at a disk that is merged under a running guest.
const MERGE_LOOK: Duration = Duration::from_millis(100);
/// How long merging one disk of a guest that is off may take.
const LONGEST_MERGE: Duration = Duration::from_secs(3600);
/// Time between two looks at how far sending is.
const LOOK: Duration = Duration::from_millis(200);

/// The door through which files come in: opened when it is first asked for, and
/// tried again if that failed.
#[derive(Debug)]
pub(super) struct Door {
    address: String,
    port: u16,
    open: Mutex<Option<Arc<Receiver>>>,
}

impl Door {
    pub(super) fn new(settings: &LibvirtSettings) -> Self {
        Self {
            address: settings.probe_listen_address.clone(),
            port: settings.disk_port,
            open: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Receiver>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn receiver(&self) -> std::result::Result<Arc<Receiver>, String> {
        let mut open = self.lock();
        if let Some(receiver) = &*open {
            return Ok(receiver.clone());
        }
        let (address, port) = (&self.address, self.port);
        let words =
            |e: &dyn std::fmt::Display| format!("{address} port {port} cannot be opened: {e}");
        let ip = address.parse().map_err(|e| words(&e))?;
        let receiver =
            Receiver::listen(std::net::SocketAddr::new(ip, port)).map_err(|e| words(&e))?;
        Ok(open.insert(Arc::new(receiver)).clone())
    }
}

fn token(text: &str) -> Result<Token> {
    text.parse()
        .map_err(|_| HypervisorError::Failed("the token for disks is malformed".to_owned()))
}

impl LibvirtDriver {
    /// Where the node keeps images.
    pub(super) fn places(&self) -> Places {
        let own = std::iter::once(&self.settings.instances_path);
        Places(
            own.chain(&self.settings.image_paths)
                .map(PathBuf::from)
                .collect(),
        )
    }
}

#[async_trait]
impl ColdDriver for LibvirtDriver {
    async fn lasting_guest(&self, id: InstanceId) -> Result<Option<Guest>> {
        let read = move |connect: &_| guests::lasting(connect, id);
        let Some(mut found) = self.calls.guest(Effect::Read, id, read).await? else {
            return Ok(None);
        };
        // What follows waits for its storage, which has to answer first.
        self.measured(found.guest_mut()).await?;
        let places = self.places();
        let look = move || Ok(guests::with_files(found, &places));
        self.calls.files(Effect::Read, look).await.map(Some)
    }

    async fn shut_down(&self, id: InstanceId) -> Result<()> {
        let act = move |connect: &_| lifecycle::shut_down(connect, id);
        self.calls.guest(Effect::Change, id, act).await
    }

    async fn stop(&self, id: InstanceId) -> Result<()> {
        let act = move |connect: &_| lifecycle::stop(connect, id);
        self.calls.guest(Effect::Change, id, act).await
    }

    async fn start(&self, id: InstanceId) -> Result<()> {
        let act = move |connect: &_| lifecycle::start(connect, id);
        self.calls.guest(Effect::Change, id, act).await
    }

    async fn is_going_off(&self, id: InstanceId) -> Result<bool> {
        let look = move |connect: &_| lifecycle::is_going_off(connect, id);
        self.calls.guest(Effect::Read, id, look).await
    }

    async fn definition(&self, id: InstanceId) -> Result<Option<Definition>> {
        let take = move |connect: &_| definitions::take(connect, id);
        self.calls.guest(Effect::Read, id, take).await
    }

    fn fingerprint(&self, definition: &Definition) -> Result<String> {
        let said = notes::without_autostart(&definition.domain)?;
        Ok(rebuild::fingerprint(&said, &definition.snapshots))
    }

    async fn define(&self, definition: &Definition, flavor: Option<Flavor>) -> Result<()> {
        let definition = definition.clone();
        let give = move |connect: &_| definitions::give(connect, &definition, flavor);
        self.calls.node(give).await
    }

    async fn withdraw(&self, id: InstanceId) -> Result<()> {
        let act = move |connect: &_| definitions::withdraw(connect, id, None);
        self.calls.guest(Effect::Change, id, act).await
    }

    async fn withdraw_with_tpm(&self, id: InstanceId, files: &[String]) -> Result<()> {
        let files = files.to_vec();
        let act = move |connect: &_| definitions::withdraw(connect, id, Some(&files));
        self.calls.guest(Effect::Change, id, act).await
    }

    async fn freeze_disks(&self, id: InstanceId, wanted: &[Overlay]) -> Result<()> {
        let wanted = wanted.to_vec();
        let act = move |connect: &_| overlays::freeze(connect, id, &wanted);
        self.calls.guest(Effect::Change, id, act).await
    }

    async fn thaw_disks(&self, id: InstanceId, frozen: &[Overlay]) -> Result<()> {
        loop {
            let todo = frozen.to_vec();
            let act = move |connect: &_| overlays::thaw(connect, id, &todo);
            match self.calls.guest(Effect::Change, id, act).await? {
                Thaw::Done => break,
                Thaw::Merging => tokio::time::sleep(MERGE_LOOK).await,
            }
        }
        Ok(())
    }

    async fn merge_overlay(&self, overlay: &Overlay) -> Result<()> {
        overlays::merge(overlay, &self.settings.qemu_img, LONGEST_MERGE).await
    }

    async fn file_facts(&self, paths: &[String]) -> Result<Vec<FileFact>> {
        let used = self.storage_in_use().await?;
        let paths = paths.to_vec();
        let look = move || {
            let silent: Vec<bool> = paths.iter().map(|path| used.is_silent(path)).collect();
            let used = used.paths();
            let facts = paths.iter().zip(silent).map(|(path, is_silent)| {
                let mut fact = files::fact(path, &used)?;
                fact.in_use |= is_silent;
                Ok(fact)
            });
            facts.collect()
        };
        self.calls.files(Effect::Read, look).await
    }

    async fn reserve_file(&self, path: &str, with_directory: bool) -> Result<()> {
        let host = self.calls.node(capabilities::of_host).await?;
        let path = path.to_owned();
        let make = move || files::reserve(&path, with_directory, host.qemu_owner);
        self.calls.files(Effect::Change, make).await
    }

    async fn rename_file(&self, from: &str, to: &str) -> Result<()> {
        let used = self.storage_in_use().await?;
        let (from, to) = (from.to_owned(), to.to_owned());
        let act = move || files::rename(&from, &to, &used.all_paths(&from)?);
        self.calls.files(Effect::Change, act).await
    }

    async fn flush_file(&self, path: &str) -> Result<()> {
        files::flush(path).await
    }

    fn disk_port(&self) -> std::result::Result<u16, String> {
        self.door.receiver().map(|receiver| receiver.port())
    }

    async fn receive(&self, key: Uuid, secret: &str, files: &[Incoming]) -> Result<()> {
        let receiver = self.door.receiver().map_err(HypervisorError::Failed)?;
        let (token, files) = (token(secret)?, files.to_vec());
        let expect = move || {
            let files = files.iter().map(|file| carrier::Incoming {
                path: files::opened_as(&file.path),
                mode: match file.present {
                    true => Mode::Compare,
                    false => Mode::Fresh,
                },
            });
            let expected = receiver.expect(key, &token, files.collect());
            expected.map_err(|e| HypervisorError::Failed(e.to_string()))
        };
        let expected = tokio::task::spawn_blocking(expect).await;
        expected.unwrap_or_else(|e| Err(HypervisorError::Bug(e.to_string())))
    }

    async fn stop_receiving(&self, key: Uuid) {
        let Some(receiver) = self.door.lock().clone() else {
            return;
        };
        if let Err(e) = tokio::task::spawn_blocking(move || receiver.forget(key)).await {
            tracing::error!(error = %e, "taking in files could not be ended");
        }
    }

    async fn send(
        &self,
        spec: SendSpec,
        shown: watch::Sender<Sent>,
        cancel: CancellationToken,
    ) -> std::result::Result<Sent, SendError> {
        let control = Arc::new(Control::default());
        control.set_limit(spec.bandwidth_bytes_s);
        // However this future ends, the thread does not outlive it for long.
        let _ends_with_us = CancelOnDrop(control.clone());
        let paths = spec.files;
        let spec = carrier::SendSpec {
            address: spec.address,
            port: spec.port,
            migration: spec.key,
            token: token(&spec.token)?,
            files: Vec::new(),
            resume: spec.resume,
            progress_timeout: spec.progress_timeout,
        };
        let its = control.clone();
        let named = paths.clone();
        let mut sending = tokio::task::spawn_blocking(move || {
            let files = named.iter().map(|path| Outgoing {
                path: files::opened_as(path),
            });
            let files = files.collect();
            carrier::send(&carrier::SendSpec { files, ..spec }, &its)
        });
        let mut tick = tokio::time::interval(LOOK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let ended = loop {
            tokio::select! {
                ended = &mut sending => break ended,
                () = cancel.cancelled() => {
                    control.cancel();
                    break sending.await;
                }
                _ = tick.tick() => { shown.send_replace(seen(&control)); }
            }
        };
        let last = seen(&control);
        shown.send_replace(last);
        match ended {
            Ok(Ok(_)) => Ok(last),
            Ok(Err(carrier::SendError::Cancelled)) => Err(SendError::Cancelled),
            Ok(Err(error @ carrier::SendError::Stalled { .. })) => {
                Err(SendError::Stalled(error.to_string()))
            }
            Ok(Err(error)) => Err(SendError::Failed(in_words(&error, &paths))),
            Err(died) => Err(SendError::Failed(format!("sending died: {died}"))),
        }
    }
}

/// The carrier numbers files; people want their names.
fn in_words(error: &carrier::SendError, paths: &[String]) -> String {
    use carrier::SendError as E;
    let file = match error {
        E::Destination { file, .. } | E::Differs { file } | E::Corrupt { file, .. } => *file,
        _ => return error.to_string(),
    };
    let path = paths.get(file).map_or("?", String::as_str);
    match error {
        E::Destination { reason, .. } => format!("{path} at the destination: {reason}"),
        E::Differs { .. } => format!(
            "{path} is on both nodes, and not the same: remove or replace the destination's"
        ),
        _ => format!("{path}: {error}"),
    }
}

struct CancelOnDrop(Arc<Control>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

fn seen(control: &Control) -> Sent {
    let progress = control.progress();
    Sent {
        total_bytes: progress.total_bytes,
        done_bytes: progress.done_bytes,
        reused_bytes: progress.reused_bytes,
        reconnects: progress.reconnects,
    }
}
