//! The fake's half of a move of a guest that is off.

use async_trait::async_trait;
use drover_model::{api::compute::FileFact, guest::Guest, ids::InstanceId, migration::Flavor};
use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    super::{ColdDriver, Definition, Incoming, Overlay, Result, SendError, SendSpec, Sent},
    FakeDriver,
    carriage::{Course, Step},
    definitions, inbox, leave,
    script::{Call, Effect},
    take_effect,
};

impl FakeDriver {
    /// Carries files on, step by step: the agent's own work, which ends with it.
    async fn carry(
        &self,
        spec: SendSpec,
        shown: &watch::Sender<Sent>,
    ) -> std::result::Result<Sent, SendError> {
        inbox::check_token(&spec.token)?;
        let begin = |world: &mut _, now| Course::begin(world, &self.host, spec, now);
        let mut course = self.fabric.with(begin)?;
        loop {
            let step = self.fabric.with(|world, now| course.step(world, now));
            let sent = course.sent();
            shown.send_replace(sent);
            match step? {
                Step::Wait(time) => sleep(time).await,
                Step::Done => return Ok(sent),
            }
        }
    }
}

#[async_trait]
impl ColdDriver for FakeDriver {
    async fn lasting_guest(&self, id: InstanceId) -> Result<Option<Guest>> {
        self.call(Call::LastingGuest, |world, host, _| {
            Ok(world.describe_lasting(host, id))
        })
        .await
    }

    async fn shut_down(&self, id: InstanceId) -> Result<()> {
        self.call(Call::ShutDown, |world, host, now| {
            world.shut_down(host, id, now)
        })
        .await
    }

    async fn stop(&self, id: InstanceId) -> Result<()> {
        self.call(Call::Stop, |world, host, now| world.stop(host, id, now))
            .await
    }

    async fn start(&self, id: InstanceId) -> Result<()> {
        self.call(Call::Start, |world, host, now| world.start(host, id, now))
            .await
    }

    async fn definition(&self, id: InstanceId) -> Result<Option<Definition>> {
        self.call(Call::Definition, |world, host, _| {
            world.definition(host, id)
        })
        .await
    }

    async fn is_going_off(&self, id: InstanceId) -> Result<bool> {
        self.call(Call::IsGoingOff, |world, host, now| {
            world.is_going_off(host, id, now)
        })
        .await
    }

    fn fingerprint(&self, definition: &Definition) -> Result<String> {
        Ok(definitions::fingerprint(definition))
    }

    async fn define(&self, definition: &Definition, flavor: Option<Flavor>) -> Result<()> {
        self.call(Call::Define, |world, host, _| {
            world.define(host, definition, flavor)
        })
        .await
    }

    async fn withdraw(&self, id: InstanceId) -> Result<()> {
        self.call(Call::Withdraw, |world, host, _| {
            world.undefine(host, id, None)
        })
        .await
    }

    async fn withdraw_with_tpm(&self, id: InstanceId, files: &[String]) -> Result<()> {
        self.call(Call::Withdraw, |world, host, _| {
            world.undefine(host, id, Some(files))
        })
        .await
    }

    async fn freeze_disks(&self, id: InstanceId, overlays: &[Overlay]) -> Result<()> {
        self.call(Call::FreezeDisks, |world, host, now| {
            world.freeze_disks(host, id, overlays, now)
        })
        .await
    }

    async fn thaw_disks(&self, id: InstanceId, overlays: &[Overlay]) -> Result<()> {
        self.call(Call::ThawDisks, |world, host, now| {
            world.thaw_disks(host, id, overlays, now)
        })
        .await
    }

    async fn merge_overlay(&self, overlay: &Overlay) -> Result<()> {
        self.call(Call::MergeOverlay, |world, host, _| {
            world.merge_overlay(host, overlay)
        })
        .await
    }

    async fn file_facts(&self, paths: &[String]) -> Result<Vec<FileFact>> {
        self.call(Call::FileFacts, |world, host, _| {
            let paths = paths.iter();
            Ok(paths.map(|path| world.file_fact(host, path)).collect())
        })
        .await
    }

    async fn reserve_file(&self, path: &str, with_directory: bool) -> Result<()> {
        self.call(Call::ReserveFile, |world, host, _| {
            world.reserve_file(host, path, with_directory)
        })
        .await
    }

    async fn rename_file(&self, from: &str, to: &str) -> Result<()> {
        self.call(Call::RenameFile, |world, host, _| {
            world.rename_file(host, from, to)
        })
        .await
    }

    async fn flush_file(&self, path: &str) -> Result<()> {
        self.call(Call::FlushFile, |world, host, _| {
            world.flush_file(host, path)
        })
        .await
    }

    fn disk_port(&self) -> std::result::Result<u16, String> {
        self.fabric.with(|world, _| {
            match take_effect(world, &self.host, Call::DiskPort) {
                Some(Effect::Refuse(error)) => return Err(error.to_string()),
                Some(Effect::Forget(error)) => {
                    let opened = world.open_door(&self.host, &self.process);
                    return opened.and(Err(error.to_string()));
                }
                _ => {}
            }
            world.open_door(&self.host, &self.process)
        })
    }

    async fn receive(&self, key: Uuid, token: &str, files: &[Incoming]) -> Result<()> {
        self.call(Call::Receive, |world, host, _| {
            world.receive(host, &self.process, key, token, files)
        })
        .await
    }

    async fn stop_receiving(&self, key: Uuid) {
        let stopped = self.call(Call::StopReceiving, |world, host, _| {
            world.stop_receiving(host, &self.process, key);
            Ok(())
        });
        // The contract has no way to tell.
        let _ = stopped.await;
    }

    async fn send(
        &self,
        spec: SendSpec,
        shown: watch::Sender<Sent>,
        cancel: CancellationToken,
    ) -> std::result::Result<Sent, SendError> {
        let sending = async {
            let effect = self.enter(Call::Send).await?;
            leave(effect, self.carry(spec, &shown).await).await
        };
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(SendError::Cancelled),
            sent = sending => sent,
        }
    }
}
