//! Definitions of guests that are off, taken and given back: a guest's
//! description as JSON. What its disks ought to hold is not in it, but in the
//! guest's [`super::node::Nature`], which no node can change.

use std::collections::BTreeMap;

use drover_model::{
    guest::{Guest, PowerState},
    ids::{HostName, InstanceId},
    migration::Flavor,
};
use sha2::{Digest, Sha256};

use super::{
    super::{Definition, Event, HypervisorError, Result},
    node::{CpuTime, Domain, Memory},
    transfer::MemoryLoad,
    world::World,
};

const MIB: u64 = 1 << 20;

/// Another for each definition; of what is noted about a guest it says nothing.
pub(super) fn fingerprint(definition: &Definition) -> String {
    let text = format!("{} {:?}", definition.domain, definition.snapshots);
    format!("{:x}", Sha256::digest(text))
}

impl World {
    pub(super) fn definition(&self, host: &HostName, id: InstanceId) -> Result<Option<Definition>> {
        let Some(domain) = self.domain(host, id) else {
            return Ok(None);
        };
        let guest = Guest {
            power_state: PowerState::Shutdown,
            active_job: None,
            ..domain.lasting().clone()
        };
        let domain = serde_json::to_string(&guest);
        Ok(Some(Definition {
            domain: domain.map_err(|e| HypervisorError::Bug(e.to_string()))?,
            current_snapshot: guest.snapshots.last().cloned(),
            snapshots: guest.snapshots,
        }))
    }

    pub(super) fn define(
        &mut self,
        host: &HostName,
        definition: &Definition,
        flavor: Option<Flavor>,
    ) -> Result<()> {
        let guest: Guest = serde_json::from_str(&definition.domain)
            .map_err(|e| HypervisorError::Failed(format!("malformed definition: {e}")))?;
        let mut guest = Guest {
            power_state: PowerState::Shutdown,
            persistent: true,
            snapshots: definition.snapshots.clone(),
            ..guest
        };
        if let Some(flavor) = flavor {
            guest.vcpus = flavor.vcpus;
            guest.memory_mib = flavor.memory_mb;
        }
        let id = guest.id;
        let here = self.presence(host, id);
        if here.has_qemu() {
            let words = "the guest is active here".to_owned();
            return Err(HypervisorError::WrongState(words));
        }
        self.check_name(host, &guest)?;
        let mut domain = self.defined(guest);
        domain.autostart = self.domain(host, id).is_some_and(|d| d.autostart);
        self.node_mut(host).domains.insert(id, domain);
        self.node(host).emit(Event::Guest(id));
        Ok(())
    }

    /// Somebody defines a guest anew: one that is active is so from its next start on.
    pub(super) fn redefine(
        &mut self,
        host: &HostName,
        id: InstanceId,
        change: impl FnOnce(&mut Guest),
    ) {
        let domain = self.domain_mut(host, id);
        let domain = domain.expect("a test changes guests where they are");
        let mut lasting = domain.lasting().clone();
        change(&mut lasting);
        match domain.presence().is_active() {
            true => domain.next = Some(lasting),
            false => domain.guest = lasting,
        }
        self.node(host).emit(Event::Guest(id));
    }

    fn defined(&self, guest: Guest) -> Domain {
        let nature = self.natures.get(&guest.id);
        let total_bytes = guest.memory_mib * MIB;
        let load = match nature {
            Some(nature) => MemoryLoad {
                total_bytes,
                working_set_bytes: nature.habits.load.working_set_bytes.min(total_bytes),
                ..nature.habits.load
            },
            None => MemoryLoad {
                total_bytes,
                dirty_bytes_s: 0,
                working_set_bytes: total_bytes,
            },
        };
        Domain {
            guest,
            next: None,
            state: PowerState::Shutdown,
            incoming: false,
            defined_before: false,
            whole: true,
            load,
            memory: Memory::at(std::time::Duration::ZERO),
            tokens: nature.map(|n| n.tokens.clone()).unwrap_or_default(),
            completed: None,
            other_job: None,
            mirrors: BTreeMap::new(),
            left_by_script: false,
            lost_its_other_half: false,
            goes_off_at: None,
            autostart: false,
            cpu: CpuTime::default(),
        }
    }
}
