//! Domain XML read into the model. Pure: text in, [`Guest`] or a typed error out.
//! Sizes of disks are not in the XML and stay 0 here.

mod bound;
mod devices;
mod disks;
pub(super) mod flavor;
#[cfg(feature = "fuzzing")]
pub(super) mod fuzzing;
pub(super) mod handover;
pub(super) mod notes;
pub(super) mod owner;
mod reads;
pub(super) mod rewire;
#[cfg(test)]
mod tests;
mod tree;

use drover_model::{
    DEFAULT_PROJECT, METADATA_NAMESPACE,
    guest::{Guest, PowerState},
    ids::InstanceId,
};
use xmltree::{Element, EmitterConfig, XMLNode};

use crate::hypervisor::HypervisorError;

/// Nova's namespace in domain metadata, up to its version.
const NOVA_NAMESPACE: &str = "http://openstack.org/xmlns/libvirt/nova/";
/// Longest project id taken from metadata, characters.
const LONGEST_PROJECT: usize = 255;

/// Why a definition could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum XmlError {
    /// No XML, or not of the expected kind.
    #[error("libvirt's XML cannot be read: {0}")]
    Malformed(String),
    /// Something that every definition has is missing or makes no sense.
    #[error("libvirt's domain XML has no usable {0}")]
    Missing(&'static str),
}

impl From<XmlError> for HypervisorError {
    fn from(error: XmlError) -> Self {
        Self::Failed(error.to_string())
    }
}

type Result<T> = std::result::Result<T, XmlError>;

/// What only libvirt's calls tell about a domain.
#[derive(Debug, Clone, Copy)]
pub(super) struct Outside {
    /// State now.
    pub(super) power_state: PowerState,
    /// Whether the definition outlives the process.
    pub(super) persistent: bool,
}

/// Parses a document whose root is called `name`.
pub(super) fn parse(xml: &str, name: &str) -> Result<Element> {
    let root = tree::read(xml)?;
    if root.name == name {
        Ok(root)
    } else {
        let found = root.name;
        Err(XmlError::Malformed(format!(
            "it is <{found}>, not <{name}>"
        )))
    }
}

/// The guest that a `<domain>` describes.
pub(super) fn guest(xml: &str, outside: Outside) -> Result<Guest> {
    let domain = parse(xml, "domain")?;
    let empty = Element::new("devices");
    let devices = domain.get_child("devices").unwrap_or(&empty);
    let os_type = descend(&domain, &["os", "type"]).ok_or(XmlError::Missing("<os><type>"))?;
    let (project, generation) = owner(&domain);
    let disks = disks::read(devices);
    let mut immovable = disks.immovable;
    immovable.extend(devices::immovable(&domain, devices));
    Ok(Guest {
        id: uuid(&domain)?,
        name: text(&domain, "name").ok_or(XmlError::Missing("<name>"))?,
        project,
        generation,
        power_state: outside.power_state,
        persistent: outside.persistent,
        vcpus: vcpus(&domain)?,
        memory_mib: memory_mib(&domain)?,
        virt_type: owned(&domain, "type").ok_or(XmlError::Missing("type"))?,
        arch: owned(os_type, "arch").ok_or(XmlError::Missing("architecture"))?,
        machine: owned(os_type, "machine").unwrap_or_default(),
        emulator: text(devices, "emulator").unwrap_or_default(),
        cpu_xml: domain.get_child("cpu").map(element_text).transpose()?,
        disks: disks.disks,
        nics: devices::nics(devices),
        immovable,
        files: Vec::new(),
        reads: reads::read(&domain, devices),
        bound: bound::read(devices),
        snapshots: Vec::new(),
        external_snapshots: Vec::new(),
        images_with_snapshots: Vec::new(),
        tpm_goes_with_definition: devices::has_tpm_of_its_definition(devices),
        active_job: disks.block_job,
    })
}

/// Whose definition it is.
pub(super) fn domain_id(xml: &str) -> Result<InstanceId> {
    uuid(&parse(xml, "domain")?)
}

/// The domain's name.
pub(super) fn domain_name(xml: &str) -> Result<String> {
    let domain = parse(xml, "domain")?;
    text(&domain, "name").ok_or(XmlError::Missing("<name>"))
}

/// Path of the file with the firmware's variables, if the guest has one.
pub(super) fn nvram(xml: &str) -> Result<Option<String>> {
    let domain = parse(xml, "domain")?;
    let nvram = descend(&domain, &["os", "nvram"]);
    let written = nvram
        .and_then(|e| e.get_text())
        .map(|t| t.trim().to_owned());
    let from_source = || nvram?.get_child("source").and_then(|s| owned(s, "file"));
    Ok(written.filter(|path| !path.is_empty()).or_else(from_source))
}

/// Whether a libvirt that cannot keep the state of an emulated TPM removes any with the
/// definition.
pub(super) fn loses_its_tpm(xml: &str) -> Result<bool> {
    let domain = parse(xml, "domain")?;
    let devices = domain.get_child("devices");
    Ok(devices.is_some_and(devices::has_tpm_of_its_definition))
}

/// Whether a snapshot's description names files beside the disks' own images.
pub(super) fn is_external_snapshot(xml: &str) -> Result<bool> {
    let snapshot = parse(xml, "domainsnapshot")?;
    let external = |e: &Element| attribute(e, "snapshot") == Some("external");
    let memory = snapshot.get_child("memory").is_some_and(external);
    let disks = snapshot.get_child("disks");
    Ok(memory || disks.is_some_and(|d| children(d, "disk").any(external)))
}

/// Targets and files of the drives whose bytes are in local files.
pub(super) fn disk_files(xml: &str) -> Result<Vec<(String, String)>> {
    let domain = parse(xml, "domain")?;
    let Some(devices) = domain.get_child("devices") else {
        return Ok(Vec::new());
    };
    let disks = disks::read(devices).disks.into_iter();
    let files = disks.filter_map(|disk| {
        let path = disk.local_path()?.to_owned();
        Some((disk.target, path))
    });
    Ok(files.collect())
}

/// What a definition's drives use on its node.
#[derive(Debug, Default)]
pub(super) struct Storage {
    /// Paths of all files and block devices, backing images included.
    pub(super) paths: Vec<String>,
    /// The drives' own images, with their formats.
    pub(super) tops: Vec<(String, String)>,
}

/// Reads it.
pub(super) fn storage(xml: &str) -> Result<Storage> {
    let domain = parse(xml, "domain")?;
    let Some(devices) = domain.get_child("devices") else {
        return Ok(Storage::default());
    };
    let read = disks::read(devices);
    let mut storage = Storage {
        paths: read.other_paths,
        tops: Vec::new(),
    };
    for disk in read.disks {
        if let Some(path) = disk.local_path() {
            storage.paths.push(path.to_owned());
            storage.tops.push((path.to_owned(), disk.format.clone()));
        }
        let below = disk.backing.into_iter().map(|image| image.path);
        storage.paths.extend(below);
    }
    storage.paths.extend(nvram(xml)?);
    Ok(storage)
}

/// What could be a path in a text that cannot be read: more than is one, and every one
/// that a definition names.
pub(super) fn perhaps_paths(xml: &str) -> Vec<String> {
    let pieces = xml.split(['"', '\'', '<', '>']).map(str::trim);
    let absolute = pieces.filter(|piece| piece.starts_with('/'));
    absolute.map(tree::unescaped).collect()
}

/// Targets of drives whose definition spells the chain under them to its end.
pub(super) fn ended_chains(xml: &str) -> Result<Vec<String>> {
    let domain = parse(xml, "domain")?;
    let devices = domain.get_child("devices");
    Ok(devices.map(disks::ended_chains).unwrap_or_default())
}

/// An element as a document of its own.
pub(super) fn element_text(element: &Element) -> Result<String> {
    let mut bytes = Vec::new();
    let config = EmitterConfig::new().write_document_declaration(false);
    element
        .write_with_config(&mut bytes, config)
        .map_err(|e| XmlError::Malformed(e.to_string()))?;
    String::from_utf8(bytes).map_err(|e| XmlError::Malformed(e.to_string()))
}

/// Children called `name`.
pub(super) fn children<'a>(
    parent: &'a Element,
    name: &'a str,
) -> impl Iterator<Item = &'a Element> {
    let elements = parent.children.iter().filter_map(XMLNode::as_element);
    elements.filter(move |e| e.name == name)
}

/// The element at the end of a path of names.
pub(super) fn descend<'a>(root: &'a Element, path: &[&str]) -> Option<&'a Element> {
    path.iter()
        .try_fold(root, |element, name| element.get_child(*name))
}

/// An attribute.
pub(super) fn attribute<'a>(element: &'a Element, name: &str) -> Option<&'a str> {
    element.attributes.get(name).map(String::as_str)
}

/// An attribute, as a value of its own.
pub(super) fn owned(element: &Element, name: &str) -> Option<String> {
    attribute(element, name).map(str::to_owned)
}

/// Trimmed text of the child called `name`, if it has any.
pub(super) fn text(parent: &Element, name: &str) -> Option<String> {
    let text = parent.get_child(name)?.get_text()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

fn uuid(domain: &Element) -> Result<InstanceId> {
    let text = text(domain, "uuid").ok_or(XmlError::Missing("<uuid>"))?;
    text.parse().map_err(|_| XmlError::Missing("<uuid>"))
}

/// vCPUs that are plugged in now.
fn vcpus(domain: &Element) -> Result<u32> {
    let element = domain.get_child("vcpu");
    let current = element.and_then(|e| owned(e, "current"));
    let text = current.or_else(|| text(domain, "vcpu"));
    text.and_then(|t| t.parse().ok())
        .ok_or(XmlError::Missing("<vcpu>"))
}

/// Memory in MiB, rounded up.
fn memory_mib(domain: &Element) -> Result<u64> {
    let missing = XmlError::Missing("<memory>");
    let number: u64 = text(domain, "memory")
        .and_then(|t| t.parse().ok())
        .ok_or(missing.clone())?;
    let unit = domain
        .get_child("memory")
        .and_then(|e| attribute(e, "unit"));
    let bytes_per_unit: u64 = match unit.unwrap_or("KiB") {
        "b" | "bytes" => 1,
        "KB" => 1_000,
        "k" | "KiB" => 1 << 10,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "TB" => 1_000_000_000_000,
        "T" | "TiB" => 1 << 40,
        _ => return Err(missing),
    };
    let bytes = number.checked_mul(bytes_per_unit).ok_or(missing)?;
    Ok(bytes.div_ceil(1 << 20))
}

/// Project and generation: Drover's own element, else Nova's, else the default.
fn owner(domain: &Element) -> (String, u64) {
    let default = || (DEFAULT_PROJECT.to_owned(), 0);
    let Some(metadata) = domain.get_child("metadata") else {
        return default();
    };
    let in_namespace =
        |e: &&Element, wanted: &dyn Fn(&str) -> bool| e.namespace.as_deref().is_some_and(wanted);
    let instances = children(metadata, "instance");
    let ours: Option<&Element> = instances
        .filter(|e| in_namespace(e, &|n| n == METADATA_NAMESPACE))
        .last();
    let generation = ours
        .and_then(|e| text(e, "generation"))
        .and_then(|t| t.parse().ok())
        .unwrap_or(0);
    if let Some(project) = ours
        .and_then(|e| text(e, "project"))
        .filter(|p| is_project(p))
    {
        return (project, generation);
    }
    let nova = children(metadata, "instance")
        .find(|e| in_namespace(e, &|n| n.starts_with(NOVA_NAMESPACE)))
        .and_then(|e| descend(e, &["owner", "project"]))
        .and_then(|e| owned(e, "uuid"))
        .filter(|p| is_project(p));
    (nova.unwrap_or_else(|| default().0), generation)
}

fn is_project(text: &str) -> bool {
    !text.is_empty()
        && text.chars().count() <= LONGEST_PROJECT
        && !text.chars().any(char::is_control)
}
