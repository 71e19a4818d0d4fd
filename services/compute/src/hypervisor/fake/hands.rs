//! Guests that change hands, as [`FakeDriver`]s do it: what there is to it is in
//! [`super::handing`] (networks, project, definitions) and [`super::mirrors`] (disks).

use std::time::Duration;

use async_trait::async_trait;
use drover_model::{
    api::compute::{DiskMove, LocationFact, SharedFile, TransferPlan},
    guest::NicAttachment,
    ids::InstanceId,
    project::Location,
};
use tokio::time::sleep;

use super::{FakeDriver, handing, leave, script::Call};
use crate::hypervisor::{Definition, Mirror, Result, Standing, TransferDriver};

impl FakeDriver {
    /// Copies a disk: the agent's own work, which ends with it.
    async fn place(&self, disk: &DiskMove, bandwidth_bytes_s: Option<u64>) -> Result<()> {
        let time = self
            .fabric
            .with(|world, _| world.begin_placing(&self.host, disk, bandwidth_bytes_s))?;
        sleep(time).await;
        self.fabric
            .with(|world, _| world.finish_placing(&self.host, disk))
    }
}

#[async_trait]
impl TransferDriver for FakeDriver {
    async fn networks_present(&self, networks: &[NicAttachment]) -> Result<Vec<NicAttachment>> {
        self.call(Call::NetworksPresent, |world, host, _| {
            let spec = &world.node(host).spec;
            let here = networks.iter().filter(|n| spec.has_attachment(n));
            Ok(here.cloned().collect())
        })
        .await
    }

    async fn location_facts(
        &self,
        locations: &[Location],
        names: &[String],
    ) -> Result<Vec<LocationFact>> {
        self.call(Call::LocationFacts, |world, host, _| {
            let facts = locations.iter();
            Ok(facts
                .map(|location| world.location_fact(host, location, names))
                .collect())
        })
        .await
    }

    async fn other_users(&self, id: InstanceId, paths: &[String]) -> Result<Vec<SharedFile>> {
        self.call(Call::OtherUsers, |world, host, _| {
            Ok(world.other_users(host, id, paths))
        })
        .await
    }

    async fn standing(&self, id: InstanceId) -> Result<Standing> {
        self.call(Call::Standing, |world, host, _| world.standing(host, id))
            .await
    }

    async fn hand_over(&self, id: InstanceId, plan: &TransferPlan) -> Result<Duration> {
        self.call(Call::HandOver, |world, host, _| {
            world.hand_over(host, id, plan)
        })
        .await
    }

    async fn hand_back(&self, id: InstanceId, before: &Standing) -> Result<()> {
        self.call(Call::HandBack, |world, host, _| {
            world.hand_back(host, id, before)
        })
        .await
    }

    async fn mirror_disk(
        &self,
        id: InstanceId,
        disk: &DiskMove,
        bandwidth_bytes_s: Option<u64>,
    ) -> Result<Mirror> {
        self.call(Call::MirrorDisk, |world, host, now| {
            world.mirror_disk(host, id, disk, bandwidth_bytes_s, now)
        })
        .await
    }

    async fn pivot_disk(&self, id: InstanceId, disk: &DiskMove) -> Result<()> {
        self.call(Call::PivotDisk, |world, host, now| {
            world.pivot_disk(host, id, disk, now)
        })
        .await
    }

    async fn abandon_mirror(&self, id: InstanceId, disk: &DiskMove) -> Result<()> {
        self.call(Call::AbandonMirror, |world, host, _| {
            world.abandon_mirror(host, id, disk)
        })
        .await
    }

    async fn place_disk(&self, disk: &DiskMove, bandwidth_bytes_s: Option<u64>) -> Result<()> {
        let effect = self.enter(Call::PlaceDisk).await?;
        leave(effect, self.place(disk, bandwidth_bytes_s).await).await
    }

    async fn is_placed(&self, disk: &DiskMove) -> Result<bool> {
        self.fabric.with(|world, _| {
            let content = |path| {
                world
                    .storage
                    .file(&self.host, path)
                    .map(|f| f.content.clone())
            };
            let old = content(&disk.from);
            Ok(old.is_some() && old == content(&disk.to))
        })
    }

    fn transferred(&self, definition: &Definition, plan: &TransferPlan) -> Result<Definition> {
        handing::transferred(definition, plan)
    }
}
