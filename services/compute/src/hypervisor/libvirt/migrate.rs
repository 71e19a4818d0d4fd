//! Moving a guest away, peer to peer.
//!
//! A migration has a thread and a connection of its own, for as long as it
//! takes. Nobody who stops waiting stops it.
//!
//! **Which copy of a disk.** A full copy writes everything the guest sees into
//! the destination's top image and is right whatever lies under it. An
//! incremental one writes only what the source's top image holds itself, and is
//! right only over the same backing. `create_disk` makes an image over the same
//! backing as the source's, so a chain is copied incrementally (it stays as thin
//! as it was); without a chain both are the same and the full copy is asked for.

use std::{
    ffi::{CStr, CString},
    net::IpAddr,
    sync::Arc,
};

use drover_model::guest::{Disk, Guest};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use virt::{connect::Connect, domain::Domain, sys};

use super::{
    connection::Link,
    errors::{self, CallError, CallResult},
    ffi::{self, Param},
    guests, standing,
    xml::{self, Outside},
};
use crate::hypervisor::{HypervisorError, MigrateSpec, Result};

/// Migrations one node sends at once; admission is the conductor's, this only
/// bounds threads and libvirtd's workers.
const AT_ONCE: usize = 64;

/// What libvirt is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Order {
    dest_uri: CString,
    flags: u32,
    params: Vec<(&'static CStr, Param)>,
}

/// The order that carries out `spec` for a guest as it is now.
///
/// # Errors
/// `Failed` if something in the spec cannot be given to libvirt or names no
/// disk of the guest.
pub(super) fn order(spec: &MigrateSpec, guest: &Guest) -> Result<Order> {
    let text = |what, text: &str| {
        errors::without_nul(what, text)?;
        CString::new(text).map_err(|e| HypervisorError::Bug(e.to_string()))
    };
    let mut params = vec![(
        sys::VIR_MIGRATE_PARAM_URI,
        Param::Text(text("address", &stream_uri(&spec.dest_address)?)?),
    )];
    if spec.dest_address.parse::<IpAddr>().is_ok() {
        // QEMU's unguarded ports open on the migration network alone.
        let address = Param::Text(text("address", &spec.dest_address)?);
        params.push((sys::VIR_MIGRATE_PARAM_LISTEN_ADDRESS, address));
    }
    for target in &spec.copied_disks {
        if !guest.disks.iter().any(|disk| disk.target == *target) {
            return Err(HypervisorError::Failed(format!(
                "the guest has no disk {target:?}"
            )));
        }
        let target = Param::Text(text("disk", target)?);
        params.push((sys::VIR_MIGRATE_PARAM_MIGRATE_DISKS, target));
    }
    if let Some(mib_s) = spec.options.bandwidth_mib_s {
        params.push((sys::VIR_MIGRATE_PARAM_BANDWIDTH, Param::ULong(mib_s)));
        if spec.options.post_copy {
            params.push((
                sys::VIR_MIGRATE_PARAM_BANDWIDTH_POSTCOPY,
                Param::ULong(mib_s),
            ));
        }
    }
    if let Some(streams) = spec.options.parallel_connections {
        let streams = i32::try_from(streams)
            .map_err(|_| HypervisorError::Failed(format!("{streams} parallel connections")))?;
        params.push((
            sys::VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS,
            Param::Int(streams),
        ));
    }
    Ok(Order {
        dest_uri: text("libvirt URI", checked_uri(&spec.dest_libvirt_uri)?)?,
        flags: flags(spec, guest),
        params,
    })
}

fn flags(spec: &MigrateSpec, guest: &Guest) -> u32 {
    let mut flags = sys::VIR_MIGRATE_LIVE | sys::VIR_MIGRATE_PEER2PEER;
    let mut add = |wanted: bool, flag: u32| {
        if wanted {
            flags |= flag;
        }
    };
    // A guest without a lasting definition has none to move.
    add(
        guest.persistent,
        sys::VIR_MIGRATE_PERSIST_DEST | sys::VIR_MIGRATE_UNDEFINE_SOURCE,
    );
    let copied = |target: &String| spec.copied_disks.contains(target);
    let over_backing = guest
        .disks
        .iter()
        .any(|disk| copied(&disk.target) && !disk.backing.is_empty());
    let copies = !spec.copied_disks.is_empty();
    add(copies && over_backing, sys::VIR_MIGRATE_NON_SHARED_INC);
    add(copies && !over_backing, sys::VIR_MIGRATE_NON_SHARED_DISK);
    add(takes_our_word(spec, guest), sys::VIR_MIGRATE_UNSAFE);
    add(spec.options.post_copy, sys::VIR_MIGRATE_POSTCOPY);
    add(spec.options.auto_converge, sys::VIR_MIGRATE_AUTO_CONVERGE);
    add(
        spec.options.parallel_connections.is_some(),
        sys::VIR_MIGRATE_PARALLEL,
    );
    flags
}

/// Whether libvirt is told not to look for itself (`VIR_MIGRATE_UNSAFE`). The flag
/// is for the whole guest: there must be disks that libvirt may refuse, and every
/// one of them must be known to be the same file on both nodes, not cached by
/// either. It never refuses what is only read or is copied.
fn takes_our_word(spec: &MigrateSpec, guest: &Guest) -> bool {
    let is_doubted = |disk: &&Disk| {
        disk.local_path().is_some() && !disk.read_only && !spec.copied_disks.contains(&disk.target)
    };
    let has_earned_it =
        |disk: &Disk| spec.shared_disks.contains(&disk.target) && disk.is_coherent_when_shared();
    let doubted: Vec<&Disk> = guest.disks.iter().filter(is_doubted).collect();
    !doubted.is_empty() && doubted.into_iter().all(has_earned_it)
}

/// A libvirt URI that leads to another node and nowhere else. Some transports
/// and parameters have libvirtd run programs.
fn checked_uri(uri: &str) -> Result<&str> {
    let schemes = ["qemu+tcp://", "qemu+tls://", "qemu+ssh://"];
    let rest = schemes.iter().find_map(|scheme| uri.strip_prefix(scheme));
    let legal = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
    match rest.and_then(|rest| rest.strip_suffix("/system")) {
        Some(host) if !host.is_empty() && host.chars().all(legal) => Ok(uri),
        _ => Err(HypervisorError::Failed(format!(
            "{uri:?} is not qemu+tcp://HOST/system, nor that with tls or ssh"
        ))),
    }
}

/// `tcp://ADDRESS`: libvirt adds the port.
fn stream_uri(address: &str) -> Result<String> {
    match address.parse::<IpAddr>() {
        Ok(IpAddr::V6(v6)) => return Ok(format!("tcp://[{v6}]")),
        Ok(IpAddr::V4(v4)) => return Ok(format!("tcp://{v4}")),
        Err(_) => {}
    }
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    if address.is_empty() || address.len() > 253 || !address.chars().all(legal) {
        return Err(HypervisorError::Failed(format!(
            "{address:?} is neither an address nor a host name"
        )));
    }
    Ok(format!("tcp://{address}"))
}

/// Carries out migrations.
#[derive(Debug)]
pub(super) struct Mover {
    link: Arc<Link>,
    free: Arc<Semaphore>,
}

impl Mover {
    /// Over that link.
    pub(super) fn new(link: Arc<Link>) -> Self {
        Self {
            link,
            free: Arc::new(Semaphore::new(AT_ONCE)),
        }
    }

    /// Moves a guest; returns when libvirt is done with it.
    pub(super) async fn migrate(&self, spec: MigrateSpec) -> Result<()> {
        // Fails at once if libvirt is away.
        drop(self.link.session().await?);
        let busy = |_| HypervisorError::WrongState(format!("{AT_ONCE} migrations run already"));
        let permit = self.free.clone().try_acquire_owned().map_err(busy)?;
        let (sender, receiver) = oneshot::channel();
        let link = self.link.clone();
        std::thread::Builder::new()
            .name("libvirt-migrate".to_owned())
            .spawn(move || {
                let _ = sender.send(carry_out(&link, &spec, permit));
            })
            .map_err(|e| HypervisorError::Failed(format!("no thread for a migration: {e}")))?;
        let died = |_| HypervisorError::Lost("the migration's thread died".to_owned());
        receiver.await.map_err(died)?
    }
}

fn carry_out(link: &Link, spec: &MigrateSpec, _permit: OwnedSemaphorePermit) -> Result<()> {
    let connect = link
        .open()
        .map_err(|error| link.unreachable(error.message()))?;
    match send(&connect, spec) {
        Ok(()) => Ok(()),
        Err(CallError::Decided(error)) => Err(error),
        Err(CallError::Virt(error)) if connect.is_alive().unwrap_or(false) => {
            Err(errors::classify(&error, Some(spec.instance)))
        }
        // What libvirtd did after it broke is anyone's guess.
        Err(CallError::Virt(error)) => Err(HypervisorError::Lost(error.message().to_owned())),
    }
}

fn send(connect: &Connect, spec: &MigrateSpec) -> CallResult<()> {
    let domain = guests::get(connect, spec.instance)?;
    let outside = Outside {
        power_state: standing::power_state(standing::presence(&domain)?),
        persistent: domain.is_persistent()?,
    };
    let guest = xml::guest(&domain.xml_desc(0)?, outside).map_err(HypervisorError::from)?;
    let order = order(spec, &guest)?;
    let before = set_initial_downtime(&domain, spec.initial_downtime_ms)?;
    let result = ffi::migrate(&domain, &order.dest_uri, &order.params, order.flags);
    if let (Err(_), Some(before)) = (&result, before) {
        // The guest may be left here; so should its setting. Best effort.
        let _ = domain.migrate_set_max_downtime(before, 0);
    }
    Ok(result?)
}

/// Sets the downtime before the start, as the first rounds over a small guest's
/// memory would end before anybody could. Returns what it was.
fn set_initial_downtime(domain: &Domain, wanted: Option<u64>) -> CallResult<Option<u64>> {
    let Some(wanted) = wanted else {
        return Ok(None);
    };
    let before = ffi::max_downtime_ms(domain)?;
    domain.migrate_set_max_downtime(wanted, 0)?;
    Ok(Some(before))
}

#[cfg(test)]
mod tests;
