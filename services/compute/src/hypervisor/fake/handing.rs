//! What a guest that changes hands is plugged into, whose it is, and where on
//! its node there is room for it.
//!
//! Of a fake domain that has two descriptions, of the running guest and of the
//! lasting one, both change at once.

use std::time::Duration;

use drover_model::{
    api::compute::{DiskMove, LocationFact, NicMove, SharedFile, TransferPlan},
    guest::{DiskSource, Guest, Nic},
    ids::{HostName, InstanceId},
    project::Location,
};
use serde::{Deserialize, Serialize};

use super::{
    super::{Definition, Event, HypervisorError, Result, Standing},
    files::uses,
    node::Domain,
    world::World,
};

/// For how long a NIC's link is down when it is plugged into something else.
const LINK_CUT: Duration = Duration::from_millis(30);

/// What a [`Standing`] of a fake guest holds.
#[derive(Debug, Serialize, Deserialize)]
struct Belonging {
    project: String,
    nics: Vec<Nic>,
}

fn wrong_state<T>(words: impl Into<String>) -> Result<T> {
    Err(HypervisorError::WrongState(words.into()))
}

fn failed<T>(words: impl Into<String>) -> Result<T> {
    Err(HypervisorError::Failed(words.into()))
}

impl World {
    /// A guest that is active on this node, and nobody's but this node's.
    pub(super) fn active(&self, host: &HostName, id: InstanceId) -> Result<&Domain> {
        let Some(domain) = self.domain(host, id) else {
            return Err(HypervisorError::NoSuchGuest(id));
        };
        if !domain.presence().is_active() {
            return wrong_state("domain is not running");
        }
        if self.journey_at(host, id).is_some() {
            return wrong_state("domain is being migrated");
        }
        Ok(domain)
    }

    // ---- networks and project ------------------------------------------------------

    pub(super) fn standing(&self, host: &HostName, id: InstanceId) -> Result<Standing> {
        let guest = &self.active(host, id)?.guest;
        if !guest.persistent {
            return wrong_state("domain is transient");
        }
        let belonging = Belonging {
            project: guest.project.clone(),
            nics: guest.nics.clone(),
        };
        let text = serde_json::to_string(&belonging);
        let live = text.map_err(|e| HypervisorError::Bug(e.to_string()))?;
        Ok(Standing {
            lasting: live.clone(),
            live,
        })
    }

    /// NIC by NIC: one that cannot be plugged in leaves those before it changed.
    pub(super) fn hand_over(
        &mut self,
        host: &HostName,
        id: InstanceId,
        plan: &TransferPlan,
    ) -> Result<Duration> {
        self.active(host, id)?;
        let mut cut = Duration::ZERO;
        for nic in &plan.nics {
            if self.replug(host, id, nic)? {
                cut = LINK_CUT;
            }
        }
        let guests = self.domain_mut(host, id).into_iter();
        for guest in guests.flat_map(Domain::both_mut) {
            plan.project.as_str().clone_into(&mut guest.project);
        }
        self.node(host).emit(Event::Guest(id));
        Ok(cut)
    }

    /// Plugs a NIC into something else; false if it is already.
    fn replug(&mut self, host: &HostName, id: InstanceId, change: &NicMove) -> Result<bool> {
        let is_here = self.node(host).spec.has_attachment(&change.to);
        let nics = self.domain_mut(host, id).map(|d| &mut d.guest.nics);
        let nic = nics.into_iter().flatten().find(|n| n.mac == change.mac);
        let Some(nic) = nic else {
            let mac = &change.mac;
            return failed(format!("no device found on {mac}"));
        };
        if nic.attachment == change.to {
            return Ok(false);
        }
        if !is_here {
            let (mac, to) = (&change.mac, &change.to);
            return failed(format!("cannot plug {mac} into {to:?}: No such device"));
        }
        nic.attachment = change.to.clone();
        let next = self.domain_mut(host, id).and_then(|d| d.next.as_mut());
        let nics = next.into_iter().flat_map(|next| &mut next.nics);
        for nic in nics.filter(|nic| nic.mac == change.mac) {
            nic.attachment = change.to.clone();
        }
        Ok(true)
    }

    pub(super) fn hand_back(
        &mut self,
        host: &HostName,
        id: InstanceId,
        before: &Standing,
    ) -> Result<()> {
        let belonging: Belonging = serde_json::from_str(&before.lasting)
            .map_err(|e| HypervisorError::Bug(format!("malformed standing: {e}")))?;
        let Some(domain) = self.domain_mut(host, id) else {
            return Err(HypervisorError::NoSuchGuest(id));
        };
        for guest in domain.both_mut() {
            guest.project.clone_from(&belonging.project);
            guest.nics.clone_from(&belonging.nics);
        }
        self.node(host).emit(Event::Guest(id));
        Ok(())
    }

    // ---- room ----------------------------------------------------------------------

    pub(super) fn location_fact(
        &self,
        host: &HostName,
        location: &Location,
        names: &[String],
    ) -> LocationFact {
        let directory = self.directory_for(host, location);
        let found = directory.as_ref().ok();
        let volume = found.and_then(|directory| self.storage.volume_at(host, directory));
        let is_there = |name: &&String| {
            let path = found.map(|directory| format!("{directory}/{name}"));
            path.is_some_and(|path| self.storage.file(host, &path).is_some())
        };
        LocationFact {
            location: location.clone(),
            file_system: volume.map_or_else(String::new, |v| v.name.clone()),
            free_bytes: volume.map_or(0, |v| v.free_bytes()),
            taken: names.iter().filter(is_there).cloned().collect(),
            directory,
        }
    }

    /// The directory that a location is on a node; or why there is none, in words.
    fn directory_for(
        &self,
        host: &HostName,
        location: &Location,
    ) -> std::result::Result<String, String> {
        let directory = match location {
            Location::Directory { path } => path,
            Location::Pool { pool } => {
                let pools = &self.node(host).spec.pools;
                let unknown = || format!("no storage pool with matching name '{pool}'");
                pools.get(pool).ok_or_else(unknown)?
            }
        };
        match self.storage.has_directory(host, directory) {
            true => Ok(directory.clone()),
            false => Err(format!("{directory}: No such file or directory")),
        }
    }

    pub(super) fn other_users(
        &self,
        host: &HostName,
        id: InstanceId,
        paths: &[String],
    ) -> Vec<SharedFile> {
        let domains = self.node(host).domains.values();
        let others = domains.filter(|d| d.guest.id != id);
        let shared = others.flat_map(|other| {
            let is_used = move |path: &&String| other.both().any(|guest| uses(guest, path));
            let used = paths.iter().filter(is_used);
            used.map(|path| SharedFile {
                path: path.clone(),
                domain: other.guest.name.clone(),
            })
        });
        shared.collect()
    }
}

// ---- definitions ---------------------------------------------------------------------

/// A definition as it is to be for the receiver; its snapshots stay.
pub(super) fn transferred(definition: &Definition, plan: &TransferPlan) -> Result<Definition> {
    let mut guest: Guest = serde_json::from_str(&definition.domain)
        .map_err(|e| HypervisorError::Failed(format!("malformed definition: {e}")))?;
    for change in &plan.nics {
        let nic = guest.nics.iter_mut().find(|nic| nic.mac == change.mac);
        let Some(nic) = nic else {
            return failed(format!("it has no interface {}", change.mac));
        };
        nic.attachment = change.to.clone();
        if let Some(mac) = &change.new_mac {
            nic.mac.clone_from(mac);
        }
    }
    for change in &plan.disks {
        moved(&mut guest, change)?;
    }
    plan.project.as_str().clone_into(&mut guest.project);
    if let Some(name) = &plan.name {
        guest.name.clone_from(name);
    }
    let domain = serde_json::to_string(&guest);
    Ok(Definition {
        domain: domain.map_err(|e| HypervisorError::Bug(e.to_string()))?,
        ..definition.clone()
    })
}

fn moved(guest: &mut Guest, change: &DiskMove) -> Result<()> {
    let of_target = guest.disks.iter_mut().find(|d| d.target == change.target);
    let disk = of_target.filter(|d| d.local_path() == Some(&change.from));
    let Some(disk) = disk else {
        return failed(format!("its disk {} is not {}", change.target, change.from));
    };
    let path = change.to.clone();
    disk.source = DiskSource::File { path };
    if change.flatten {
        disk.backing.clear();
    }
    Ok(())
}
