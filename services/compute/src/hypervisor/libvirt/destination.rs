//! What this node knows about a guest that may come.

use std::{
    ffi::CString,
    io::ErrorKind,
    net::{TcpListener, UdpSocket},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use drover_model::{
    api::compute::{CpuVerdict, DiskFact, Mark, NetworkFact},
    content::{AddressFact, BoundAddress},
    guest::{Disk, Guest, NicAttachment, Presence},
    ids::InstanceId,
};
use virt::{
    connect::Connect,
    error::{Error, ErrorNumber},
    network::Network,
};

use super::{
    capabilities,
    errors::{self, CallResult},
    ffi::{self, CpuQuestion},
    guests, standing,
    storage::{self, marks},
    xml,
};
use crate::hypervisor::{HypervisorError, Result};

/// libvirt's share of the answer.
#[derive(Debug)]
pub(super) struct LibvirtFacts {
    pub(super) machine_supported: bool,
    pub(super) virt_type_supported: bool,
    pub(super) cpu: CpuVerdict,
    pub(super) networks: Vec<NetworkFact>,
    pub(super) same_uuid: Presence,
    pub(super) same_name: Option<InstanceId>,
}

/// The file system's share.
#[derive(Debug)]
pub(super) struct FileFacts {
    pub(super) emulator_present: bool,
    pub(super) disks: Vec<DiskFact>,
}

/// Refuses descriptions that could not be handed to libvirt whole.
pub(super) fn check(guest: &Guest) -> Result<()> {
    let networks = guest.nics.iter().filter_map(|nic| match &nic.attachment {
        NicAttachment::Network { network } => Some(network.as_str()),
        _ => None,
    });
    let texts = [
        &guest.name,
        &guest.emulator,
        &guest.arch,
        &guest.machine,
        &guest.virt_type,
    ];
    for text in texts.into_iter().map(String::as_str).chain(networks) {
        errors::without_nul("the guest's description", text)?;
    }
    Ok(())
}

/// Asks libvirt. The guest must have passed [`check`].
pub(super) fn ask_libvirt(connect: &Connect, guest: &Guest) -> CallResult<LibvirtFacts> {
    let supports = |machine, virt_type| {
        let (emulator, arch) = (Some(guest.emulator.as_str()), Some(guest.arch.as_str()));
        supported(connect.domain_capabilities(emulator, arch, machine, virt_type, 0))
    };
    let machine_supported = supports(Some(&guest.machine), None)?;
    let offered = capabilities::of_host(connect)?.offers(&guest.arch, &guest.virt_type);
    let virt_type_supported = offered && supports(None, Some(&guest.virt_type))?;
    let cpu = if machine_supported && virt_type_supported {
        cpu_verdict(connect, guest)?
    } else {
        CpuVerdict::Unknown {
            detail: "the emulator cannot run the guest at all".to_owned(),
        }
    };
    Ok(LibvirtFacts {
        machine_supported,
        virt_type_supported,
        cpu,
        networks: networks(connect, guest)?,
        same_uuid: same_uuid(connect, guest.id)?,
        same_name: same_name(connect, guest)?,
    })
}

/// libvirt answers with capabilities or says that there are none such; trouble
/// on the way is neither.
fn supported(answer: std::result::Result<String, Error>) -> std::result::Result<bool, Error> {
    let no = [
        ErrorNumber::InvalidArg,
        ErrorNumber::ConfigUnsupported,
        ErrorNumber::OperationUnsupported,
        ErrorNumber::InternalError,
        ErrorNumber::SystemError,
    ];
    match answer {
        Ok(_) => Ok(true),
        Err(error)
            if error
                .domain()
                .is_known_and(|d| d != virt::error::ErrorDomain::Rpc)
                && no.iter().any(|number| errors::is(&error, *number)) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn same_uuid(connect: &Connect, id: InstanceId) -> CallResult<Presence> {
    let Some(domain) = guests::find(connect, id)? else {
        return Ok(Presence::Absent);
    };
    let presence = errors::absent_is_none(standing::presence(&domain))?;
    Ok(presence.unwrap_or(Presence::Absent))
}

fn same_name(connect: &Connect, guest: &Guest) -> CallResult<Option<InstanceId>> {
    let found = errors::absent_is_none(connect.lookup_domain_by_name(&guest.name))?;
    let id = found.map(|domain| domain.uuid()).transpose()?;
    Ok(id.map(InstanceId).filter(|id| *id != guest.id))
}

fn cpu_verdict(connect: &Connect, guest: &Guest) -> CallResult<CpuVerdict> {
    let unknown = |detail: String| Ok(CpuVerdict::Unknown { detail });
    if guest.virt_type != "kvm" {
        return unknown(format!(
            "the guest's CPU is emulated ({}): nothing of the host's is used",
            guest.virt_type
        ));
    }
    let Some(cpu) = &guest.cpu_xml else {
        return unknown("the guest's definition names no CPU".to_owned());
    };
    // Parsed and written anew: what libvirt gets is one <cpu> and nothing else.
    let cpu = xml::parse(cpu, "cpu").and_then(|element| xml::element_text(&element));
    let cpu = cpu.map_err(HypervisorError::from)?;
    let text = |text: &str| {
        CString::new(text).map_err(|e| HypervisorError::Failed(format!("guest's description: {e}")))
    };
    let (emulator, arch) = (text(&guest.emulator)?, text(&guest.arch)?);
    let (machine, virt_type, cpu_xml) = (text(&guest.machine)?, text("kvm")?, text(&cpu)?);
    let answer = ffi::compare_cpu(
        connect,
        CpuQuestion {
            emulator: &emulator,
            arch: &arch,
            machine: &machine,
            virt_type: &virt_type,
            cpu_xml: &cpu_xml,
        },
    );
    match answer {
        Ok(true) => Ok(CpuVerdict::Compatible),
        Ok(false) => Ok(CpuVerdict::Incompatible {
            detail: "libvirt says that the CPU cannot be provided".to_owned(),
        }),
        Err(error) if errors::is(&error, ErrorNumber::CpuIncompatible) => {
            Ok(CpuVerdict::Incompatible {
                detail: error.message().to_owned(),
            })
        }
        Err(error) if connect.is_alive()? => unknown(error.message().to_owned()),
        Err(error) => Err(error.into()),
    }
}

fn networks(connect: &Connect, guest: &Guest) -> CallResult<Vec<NetworkFact>> {
    let mut facts = Vec::new();
    for nic in &guest.nics {
        facts.push(NetworkFact {
            mac: nic.mac.clone(),
            attachment: nic.attachment.clone(),
            present: is_present(connect, &nic.attachment)?,
        });
    }
    Ok(facts)
}

/// Whether a NIC could be plugged into that here.
pub(super) fn is_present(connect: &Connect, attachment: &NicAttachment) -> CallResult<bool> {
    Ok(match attachment {
        NicAttachment::Bridge { bridge } => interface_is_up(bridge)?,
        NicAttachment::Direct { device } => interface_is_up(device)?,
        NicAttachment::Network { network } => is_active_network(connect, network)?,
        NicAttachment::User => true,
        // Nothing is needed for a NIC that is plugged into nothing; how any
        // other kind is wired up here cannot be told.
        NicAttachment::Other { kind } => kind == "null",
    })
}

fn interface_is_up(name: &str) -> Result<bool> {
    let failed = |e| HypervisorError::Failed(format!("network interfaces cannot be read: {e}"));
    ffi::interface_is_up(name).map_err(failed)
}

fn is_active_network(connect: &Connect, name: &str) -> CallResult<bool> {
    match connect.lookup_network_by_name(name) {
        Ok(network) => Ok(Network::is_active(&network)?),
        // No such network, or a libvirt without any.
        Err(error)
            if errors::is(&error, ErrorNumber::NoNetwork)
                || errors::is(&error, ErrorNumber::NoSupport) =>
        {
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

/// Asks the file system.
pub(super) fn ask_files(guest: &Guest, marks: &[Mark]) -> Result<FileFacts> {
    let mut disks = Vec::new();
    for disk in &guest.disks {
        if let Some(path) = disk.local_path() {
            disks.push(disk_fact(disk, path, marks)?);
        }
    }
    Ok(FileFacts {
        emulator_present: is_executable(&guest.emulator),
        disks,
    })
}

fn is_executable(path: &str) -> bool {
    let Ok(path) = storage::checked(path) else {
        return false;
    };
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

fn disk_fact(disk: &Disk, path: &str, marks: &[Mark]) -> Result<DiskFact> {
    let path = storage::checked(path)?;
    let directory = storage::directory(&path);
    let place = std::fs::metadata(directory).ok().filter(|m| m.is_dir());
    let room = place.as_ref().and_then(|_| ffi::room(directory).ok());
    let missing = disk
        .backing
        .iter()
        .filter(|image| !exists(Path::new(&image.path)));
    Ok(DiskFact {
        target: disk.target.clone(),
        shared: marks::is_beside(&path, marks),
        exists: exists(&path),
        directory_exists: place.is_some(),
        file_system: place.map(|m| storage::file_system(&m)).unwrap_or_default(),
        free_bytes: room.map_or(0, |room| room.free_bytes),
        missing_backing: missing.map(|image| image.path.clone()).collect(),
    })
}

/// Whether anything is there; what cannot be looked at counts as being there.
fn exists(path: &Path) -> bool {
    match std::fs::symlink_metadata(path) {
        Ok(_) => true,
        Err(error) => !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory),
    }
}

/// Whether a guest could be bound to an address here.
pub(super) fn address_fact(bound: &BoundAddress) -> AddressFact {
    let port = bound.port.unwrap_or(0);
    let tried = match bound.udp {
        true => UdpSocket::bind((bound.address.as_str(), port)).map(drop),
        false => TcpListener::bind((bound.address.as_str(), port)).map(drop),
    };
    AddressFact {
        bound: bound.clone(),
        error: tried.err().map(|error| match error.kind() {
            ErrorKind::AddrNotAvailable => "no interface has it".to_owned(),
            ErrorKind::AddrInUse => "another program has the port".to_owned(),
            _ => error.to_string(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_there_or_is_not() {
        let error = |address: &str, port, udp| {
            let bound = BoundAddress {
                address: address.to_owned(),
                port,
                udp,
                what: "a console".to_owned(),
            };
            address_fact(&bound).error
        };
        for address in ["127.0.0.1", "0.0.0.0"] {
            assert_eq!(error(address, None, false), None, "{address}");
            assert_eq!(error(address, None, true), None, "{address}");
        }
        // Of a network for documentation, which nobody has.
        assert!(error("192.0.2.1", None, false).is_some_and(|e| e.contains("no interface")));
        assert!(error("192.0.2.1", None, true).is_some());
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        assert!(error("127.0.0.1", Some(port), false).is_some_and(|e| e.contains("port")));
    }
}
