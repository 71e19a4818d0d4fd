//! What an instance needs of libvirt that changes hands on its node: NICs are
//! re-plugged, metadata rewritten, disks mirrored to other files.

mod mirror;
mod nics;
mod owner;
mod place;
mod stray;

use std::time::Duration;

use async_trait::async_trait;
use drover_model::{
    api::compute::{DiskMove, LocationFact, SharedFile, TransferPlan},
    guest::NicAttachment,
    ids::InstanceId,
    project::Location,
};
use virt::{connect::Connect, domain::Domain, sys};
use xmltree::Element;

use super::{
    LibvirtDriver, blocking::Effect, destination, errors::CallResult, guests, storage, xml,
    xml::handover,
};
use crate::hypervisor::{Definition, HypervisorError, Mirror, Result, Standing, TransferDriver};

/// One of an active guest's two definitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    /// Of the running guest.
    Live,
    /// After its next start.
    Lasting,
}

impl Side {
    const BOTH: [Self; 2] = [Self::Live, Self::Lasting];

    /// What a call affects that is to change this one alone.
    fn affects(self) -> sys::virDomainModificationImpact {
        match self {
            Self::Live => sys::VIR_DOMAIN_AFFECT_LIVE,
            Self::Lasting => sys::VIR_DOMAIN_AFFECT_CONFIG,
        }
    }

    /// The definition as text; it names nothing secret.
    fn text(self, domain: &Domain) -> CallResult<String> {
        let flags = match self {
            Self::Live => 0,
            Self::Lasting => sys::VIR_DOMAIN_XML_INACTIVE,
        };
        Ok(domain.xml_desc(flags)?)
    }

    /// The definition.
    fn read(self, domain: &Domain) -> CallResult<Element> {
        Ok(parsed(&self.text(domain)?)?)
    }
}

fn parsed(text: &str) -> Result<Element> {
    Ok(xml::parse(text, "domain")?)
}

fn wrong(words: impl Into<String>) -> HypervisorError {
    HypervisorError::WrongState(words.into())
}

/// The guest's domain, which must be active and outlive its process.
fn active(connect: &Connect, id: InstanceId) -> CallResult<Domain> {
    let domain = guests::get(connect, id)?;
    if !domain.is_active()? {
        return Err(wrong("the guest is off").into());
    }
    if !domain.is_persistent()? {
        return Err(wrong("the guest has no lasting definition").into());
    }
    Ok(domain)
}

fn standing(connect: &Connect, id: InstanceId) -> CallResult<Standing> {
    let domain = active(connect, id)?;
    Ok(Standing {
        live: Side::Live.text(&domain)?,
        lasting: Side::Lasting.text(&domain)?,
    })
}

fn hand_over(connect: &Connect, id: InstanceId, plan: &TransferPlan) -> CallResult<Duration> {
    let domain = active(connect, id)?;
    let longest = nics::plug(&domain, &plan.nics)?;
    for side in Side::BOTH {
        owner::give(&domain, side, plan)?;
    }
    Ok(longest)
}

fn hand_back(connect: &Connect, id: InstanceId, before: &Standing) -> CallResult<()> {
    let domain = active(connect, id)?;
    for (side, text) in [(Side::Live, &before.live), (Side::Lasting, &before.lasting)] {
        let before = parsed(text)?;
        nics::restore(&domain, side, &before)?;
        owner::restore(&domain, side, &before)?;
    }
    Ok(())
}

#[async_trait]
impl TransferDriver for LibvirtDriver {
    async fn networks_present(&self, networks: &[NicAttachment]) -> Result<Vec<NicAttachment>> {
        let networks = networks.to_vec();
        let ask = move |connect: &_| {
            let mut present = Vec::new();
            for network in networks {
                if destination::is_present(connect, &network)? {
                    present.push(network);
                }
            }
            Ok(present)
        };
        self.calls.node(ask).await
    }

    async fn location_facts(
        &self,
        locations: &[Location],
        names: &[String],
    ) -> Result<Vec<LocationFact>> {
        let (locations, names) = (locations.to_vec(), names.to_vec());
        let find = move |connect: &_| place::directories(connect, locations);
        let found = self.calls.node(find).await?;
        let look = move || Ok(place::facts(found, &names));
        self.calls.files(Effect::Read, look).await
    }

    async fn other_users(&self, id: InstanceId, paths: &[String]) -> Result<Vec<SharedFile>> {
        let used = self.storage_in_use().await?;
        let paths = paths.to_vec();
        let look = move || Ok(place::other_users(id, &paths, used));
        self.calls.files(Effect::Read, look).await
    }

    async fn standing(&self, id: InstanceId) -> Result<Standing> {
        let read = move |connect: &_| standing(connect, id);
        self.calls.guest(Effect::Read, id, read).await
    }

    async fn hand_over(&self, id: InstanceId, plan: &TransferPlan) -> Result<Duration> {
        let plan = plan.clone();
        let act = move |connect: &_| hand_over(connect, id, &plan);
        self.calls.guest(Effect::Change, id, act).await
    }

    async fn hand_back(&self, id: InstanceId, before: &Standing) -> Result<()> {
        let before = before.clone();
        let act = move |connect: &_| hand_back(connect, id, &before);
        self.calls.guest(Effect::Change, id, act).await
    }

    async fn mirror_disk(
        &self,
        id: InstanceId,
        disk: &DiskMove,
        bandwidth_bytes_s: Option<u64>,
    ) -> Result<Mirror> {
        let disk = disk.clone();
        let act = move |connect: &_| mirror::go_on(connect, id, &disk, bandwidth_bytes_s);
        self.calls.guest(Effect::Change, id, act).await
    }

    async fn pivot_disk(&self, id: InstanceId, disk: &DiskMove) -> Result<()> {
        let disk = disk.clone();
        let act = move |connect: &_| mirror::pivot(connect, id, &disk);
        self.calls.guest(Effect::Change, id, act).await
    }

    async fn abandon_mirror(&self, id: InstanceId, disk: &DiskMove) -> Result<()> {
        let disk = disk.clone();
        let act = move |connect: &_| mirror::abandon(connect, id, &disk);
        self.calls.guest(Effect::Change, id, act).await
    }

    async fn place_disk(&self, disk: &DiskMove, bandwidth_bytes_s: Option<u64>) -> Result<()> {
        place::disk(self, disk, bandwidth_bytes_s).await
    }

    async fn is_placed(&self, disk: &DiskMove) -> Result<bool> {
        let disk = disk.clone();
        let look = move || storage::place::is_placed(&disk);
        self.calls.files(Effect::Read, look).await
    }

    fn transferred(&self, definition: &Definition, plan: &TransferPlan) -> Result<Definition> {
        if !definition.snapshots.is_empty() {
            let words = "a guest with snapshots cannot change hands: each holds its old definition";
            return Err(HypervisorError::Failed(words.to_owned()));
        }
        Ok(Definition {
            domain: handover::transferred(&definition.domain, plan)?,
            snapshots: Vec::new(),
            current_snapshot: None,
        })
    }
}
