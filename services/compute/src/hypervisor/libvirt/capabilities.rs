//! What the node can run, from libvirt's capabilities: pure readers, and the
//! inventory made of them.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use drover_model::node::Inventory;
use virt::connect::Connect;
use xmltree::Element;

use super::{
    errors::CallResult,
    ffi::{self, Room},
    xml::{self, XmlError},
};
use crate::hypervisor::{HypervisorError, Result};

/// The part of the host's capabilities that Drover uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Capabilities {
    /// The host's architecture.
    pub(super) arch: String,
    /// CPU model in libvirt's words; empty if it knows none.
    pub(super) cpu_model: String,
    /// Whether libvirt found KVM usable for guests of the host's architecture.
    pub(super) kvm: bool,
    /// Architectures of guests, each with a virt type it can have.
    guests: BTreeSet<(String, String)>,
    /// Whom QEMU's processes run as: user and group id.
    pub(super) qemu_owner: Option<(u32, u32)>,
}

impl Capabilities {
    /// Whether guests of that architecture can have that virt type. (Domain
    /// capabilities would not do: libvirt gives them for types it cannot run.)
    pub(super) fn offers(&self, arch: &str, virt_type: &str) -> bool {
        let wanted = (arch.to_owned(), virt_type.to_owned());
        self.guests.contains(&wanted)
    }
}

/// Reads a `<capabilities>` document.
pub(super) fn read(text: &str) -> std::result::Result<Capabilities, XmlError> {
    let root = xml::parse(text, "capabilities")?;
    let host = root.get_child("host").ok_or(XmlError::Missing("<host>"))?;
    let cpu = host.get_child("cpu").ok_or(XmlError::Missing("<cpu>"))?;
    let arch = xml::text(cpu, "arch").ok_or(XmlError::Missing("<arch>"))?;
    let guests = guest_types(&root);
    Ok(Capabilities {
        cpu_model: xml::text(cpu, "model").unwrap_or_default(),
        kvm: guests.contains(&(arch.clone(), "kvm".to_owned())),
        guests,
        qemu_owner: qemu_owner(host),
        arch,
    })
}

fn guest_types(root: &Element) -> BTreeSet<(String, String)> {
    let arches = xml::children(root, "guest").filter_map(|guest| guest.get_child("arch"));
    arches
        .flat_map(|arch| xml::children(arch, "domain").map(move |domain| (arch, domain)))
        .filter_map(|(arch, domain)| Some((xml::owned(arch, "name")?, xml::owned(domain, "type")?)))
        .collect()
}

/// From `<baselabel type='kvm'>+64055:+64055</baselabel>` of the DAC model.
fn qemu_owner(host: &Element) -> Option<(u32, u32)> {
    let dac = xml::children(host, "secmodel")
        .find(|model| xml::text(model, "model").as_deref() == Some("dac"))?;
    let label = dac.get_child("baselabel")?.get_text()?.trim().to_owned();
    let (user, group) = label.split_once(':')?;
    let number = |text: &str| text.trim_start_matches('+').parse().ok();
    Some((number(user)?, number(group)?))
}

/// What libvirt says of the node; the disk's figures are added by the caller.
pub(super) fn inventory(connect: &Connect) -> CallResult<Inventory> {
    let capabilities = of_host(connect)?;
    let node = connect.node_info()?;
    Ok(Inventory {
        hypervisor_type: connect.driver_type()?,
        hypervisor_version: connect.hyp_version()?.into(),
        libvirt_version: connect.lib_version()?.into(),
        cpu_model: if capabilities.cpu_model.is_empty() {
            capabilities.arch.clone()
        } else {
            capabilities.cpu_model
        },
        arch: capabilities.arch,
        kvm: capabilities.kvm,
        vcpus: node.cpus,
        memory_mib: node.memory / 1024,
        disk_bytes: 0,
        disk_free_bytes: 0,
    })
}

/// The host's capabilities, asked now.
pub(super) fn of_host(connect: &Connect) -> CallResult<Capabilities> {
    Ok(read(&connect.capabilities()?).map_err(HypervisorError::from)?)
}

/// Room where instances are kept; a directory not yet made counts as its parent.
pub(super) fn instances_room(path: &Path) -> Result<Room> {
    let mut at = PathBuf::from(path);
    loop {
        match ffi::room(&at) {
            Ok(room) => return Ok(room),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && at.pop() => {}
            Err(error) => {
                let place = at.display();
                return Err(HypervisorError::Failed(format!(
                    "size of the file system of {place}: {error}"
                )));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "<capabilities><host><uuid>00000000-0000-0000-0000-000000000001</uuid>
      <cpu><arch>x86_64</arch><model>EPYC-Rome</model><vendor>AMD</vendor></cpu>
      <secmodel><model>none</model><doi>0</doi></secmodel>
      <secmodel><model>dac</model><doi>0</doi>
        <baselabel type='kvm'>+64055:+108</baselabel>
        <baselabel type='qemu'>+64055:+108</baselabel></secmodel></host>
      <guest><os_type>hvm</os_type><arch name='i686'><domain type='qemu'/><domain type='kvm'/></arch></guest>
      <guest><os_type>hvm</os_type><arch name='x86_64'><domain type='qemu'/>KVM</arch></guest>
      </capabilities>";

    #[test]
    fn capabilities_are_read() {
        let with_kvm = TEXT.replace("KVM", "<domain type='kvm'/>");
        let read_back = read(&with_kvm).unwrap();
        assert_eq!(read_back.arch, "x86_64");
        assert_eq!(read_back.cpu_model, "EPYC-Rome");
        assert_eq!(read_back.qemu_owner, Some((64055, 108)));
        assert!(read_back.kvm && read_back.offers("i686", "qemu"));
        assert!(!read_back.offers("x86_64", "xen") && !read_back.offers("arm", "kvm"));
        assert!(
            !read(&TEXT.replace("KVM", "")).unwrap().kvm,
            "i686 does not count"
        );
    }

    #[test]
    fn nonsense_is_an_error() {
        assert!(read("").is_err());
        assert!(read("<domain/>").is_err());
        assert!(read("<capabilities/>").is_err());
    }

    #[test]
    fn a_missing_directory_counts_as_its_parent() {
        let room = instances_room(Path::new("/nonexistent/a/b")).unwrap();
        assert!(room.total_bytes > 0);
    }
}
