//! What an instance needs of libvirt that changes hands on its node: NICs are
//! re-plugged, metadata rewritten, disks mirrored to other files.

use std::time::Duration;

use async_trait::async_trait;
use drover_model::{
    api::compute::{DiskMove, LocationFact, SharedFile, TransferPlan},
    guest::NicAttachment,
    ids::InstanceId,
    project::Location,
};

use super::LibvirtDriver;
use crate::hypervisor::{Definition, HypervisorError, Mirror, Result, Standing, TransferDriver};

fn not_yet<T>() -> Result<T> {
    Err(HypervisorError::Bug("not built yet".to_owned()))
}

#[async_trait]
impl TransferDriver for LibvirtDriver {
    async fn networks_present(&self, _networks: &[NicAttachment]) -> Result<Vec<NicAttachment>> {
        not_yet()
    }

    async fn location_facts(
        &self,
        _locations: &[Location],
        _names: &[String],
    ) -> Result<Vec<LocationFact>> {
        not_yet()
    }

    async fn other_users(&self, _id: InstanceId, _paths: &[String]) -> Result<Vec<SharedFile>> {
        not_yet()
    }

    async fn standing(&self, _id: InstanceId) -> Result<Standing> {
        not_yet()
    }

    async fn hand_over(&self, _id: InstanceId, _plan: &TransferPlan) -> Result<Duration> {
        not_yet()
    }

    async fn hand_back(&self, _id: InstanceId, _before: &Standing) -> Result<()> {
        not_yet()
    }

    async fn mirror_disk(
        &self,
        _id: InstanceId,
        _disk: &DiskMove,
        _bandwidth_bytes_s: Option<u64>,
    ) -> Result<Mirror> {
        not_yet()
    }

    async fn pivot_disk(&self, _id: InstanceId, _disk: &DiskMove) -> Result<()> {
        not_yet()
    }

    async fn abandon_mirror(&self, _id: InstanceId, _disk: &DiskMove) -> Result<()> {
        not_yet()
    }

    async fn place_disk(&self, _disk: &DiskMove, _bandwidth_bytes_s: Option<u64>) -> Result<()> {
        not_yet()
    }

    fn transferred(&self, _definition: &Definition, _plan: &TransferPlan) -> Result<Definition> {
        not_yet()
    }
}
