//! `<disk>`: drives, where their bytes are, and what lies under them.

use std::net::IpAddr;

use drover_model::guest::{BackingImage, Disk, DiskSource, Immovable, ImmovableKind};
use xmltree::Element;

use super::{attribute, children, descend, owned};

/// Backing images followed below one disk; libvirt itself stops at 200.
const DEEPEST_CHAIN: usize = 200;

/// The drives of a domain.
#[derive(Debug, Default)]
pub(super) struct Drives {
    /// Each drive.
    pub(super) disks: Vec<Disk>,
    /// Drives that cannot be carried, and why.
    pub(super) immovable: Vec<Immovable>,
    /// A block job that runs on one of them, in words.
    pub(super) block_job: Option<String>,
    /// Further local files in use (targets of block jobs).
    pub(super) other_paths: Vec<String>,
}

/// Reads all `<disk>` of `<devices>`.
pub(super) fn read(devices: &Element) -> Drives {
    let mut drives = Drives::default();
    for element in children(devices, "disk") {
        let disk = disk(element);
        let reasons = obstacles(element, &disk);
        drives.immovable.extend(reasons.map(|what| Immovable {
            kind: ImmovableKind::Disk,
            what: format!("{}: {what}", disk.target),
        }));
        if let Some(mirror) = element.get_child("mirror") {
            let job = attribute(mirror, "job").unwrap_or("copy");
            drives.block_job = Some(format!("block job ({job}) on {}", disk.target));
            drives.other_paths.extend(local_file(mirror));
        }
        drives.disks.push(disk);
    }
    drives
}

fn disk(element: &Element) -> Disk {
    let driver = element.get_child("driver");
    let from_driver = |name| driver.and_then(|d| owned(d, name));
    let target = element.get_child("target");
    Disk {
        target: target.and_then(|t| owned(t, "dev")).unwrap_or_default(),
        device: owned(element, "device").unwrap_or_else(|| "disk".to_owned()),
        source: source(element),
        format: from_driver("type").unwrap_or_else(|| "raw".to_owned()),
        cache: from_driver("cache").filter(|c| c != "default"),
        read_only: element.get_child("readonly").is_some(),
        shareable: element.get_child("shareable").is_some(),
        virtual_bytes: 0,
        allocated_bytes: 0,
        backing: backing(element),
    }
}

fn source(element: &Element) -> DiskSource {
    let kind = attribute(element, "type").unwrap_or("file");
    let Some(source) = element.get_child("source") else {
        return DiskSource::Empty;
    };
    let other = |kind: &str| DiskSource::Other {
        kind: kind.to_owned(),
    };
    let path = |name| owned(source, name).filter(|p| p.starts_with('/'));
    match kind {
        "file" if attribute(source, "fdgroup").is_some() => other("file descriptor"),
        "file" if attribute(source, "file").is_none() => DiskSource::Empty,
        "file" => {
            path("file").map_or_else(|| other("relative path"), |path| DiskSource::File { path })
        }
        "block" if attribute(source, "dev").is_none() => DiskSource::Empty,
        "block" => {
            path("dev").map_or_else(|| other("relative path"), |path| DiskSource::Block { path })
        }
        "network" => DiskSource::Network {
            protocol: owned(source, "protocol").unwrap_or_default(),
            name: owned(source, "name").unwrap_or_default(),
        },
        kind => other(kind),
    }
}

/// The chain as the live definition spells it out; an inactive one mostly does
/// not, and images are never probed for it.
fn backing(element: &Element) -> Vec<BackingImage> {
    let mut chain = Vec::new();
    let mut next = element.get_child("backingStore");
    while let Some(store) = next {
        if let (Some(path), Some(format)) = (
            local_file(store),
            descend(store, &["format"]).and_then(|f| owned(f, "type")),
        ) {
            chain.push(BackingImage {
                path,
                format,
                allocated_bytes: 0,
            });
        }
        if chain.len() >= DEEPEST_CHAIN {
            break;
        }
        next = store.get_child("backingStore");
    }
    chain
}

/// Targets of drives whose definition says where the chain under them ends, be it at
/// once: libvirt then takes the images that it names, and not those of the headers.
pub(super) fn ended_chains(devices: &Element) -> Vec<String> {
    let ended = children(devices, "disk").filter(|disk| {
        let mut store = disk.get_child("backingStore");
        for _ in 0..=DEEPEST_CHAIN {
            match store {
                Some(image) if image.get_child("source").is_some() => {
                    store = image.get_child("backingStore");
                }
                end => return end.is_some(),
            }
        }
        false
    });
    ended.map(|element| disk(element).target).collect()
}

fn local_file(store: &Element) -> Option<String> {
    let source = store.get_child("source")?;
    owned(source, "file").or_else(|| owned(source, "dev"))
}

/// Why a drive cannot be carried, if there is a reason.
fn obstacles(element: &Element, disk: &Disk) -> impl Iterator<Item = String> {
    let source = element.get_child("source");
    let is_local = disk.local_path().is_some();
    let encrypted = element.get_child("encryption").is_some()
        || source.is_some_and(|s| s.get_child("encryption").is_some());
    let reasons = [
        match (&disk.source, source) {
            (DiskSource::Other { kind }, Some(s)) => Some(describe_other(kind, s)),
            _ => None,
        },
        (is_local && encrypted).then(|| "encrypted with a secret of this node".to_owned()),
        element
            .get_child("transient")
            .map(|_| "its changes are thrown away when the guest stops (transient)".to_owned()),
        (is_local && has_remote_backing(element))
            .then(|| "a local image over one that is not a local file".to_owned()),
        own_address(&disk.source, source)
            .map(|at| format!("on the network at {at}, which is another store on each node")),
    ];
    reasons.into_iter().flatten()
}

/// Where a network drive leads that every node takes for itself.
fn own_address(disk: &DiskSource, source: Option<&Element>) -> Option<String> {
    let DiskSource::Network { protocol, .. } = disk else {
        return None;
    };
    let mut hosts = children(source?, "host").peekable();
    if hosts.peek().is_none() && protocol == "nbd" {
        return Some("no address".to_owned());
    }
    hosts.find_map(|host| {
        let name = attribute(host, "name").unwrap_or_default();
        let socket = attribute(host, "socket");
        let plain = name.trim_matches(['[', ']']);
        let is_own = match plain.parse::<IpAddr>() {
            Ok(ip) => ip.is_loopback() || ip.is_unspecified(),
            Err(_) => plain.split('.').next() == Some("localhost"),
        };
        match socket {
            Some(socket) => Some(format!("the socket {socket}")),
            None => is_own.then(|| name.to_owned()),
        }
    })
}

fn describe_other(kind: &str, source: &Element) -> String {
    let at = ["pool", "dir", "path", "dev", "volume"]
        .iter()
        .filter_map(|name| attribute(source, name));
    let at: Vec<&str> = at.collect();
    if at.is_empty() {
        format!("of type {kind}")
    } else {
        format!("of type {kind} ({})", at.join("/"))
    }
}

fn has_remote_backing(element: &Element) -> bool {
    let mut next = element.get_child("backingStore");
    for _ in 0..=DEEPEST_CHAIN {
        let Some(store) = next else { return false };
        if store.get_child("source").is_some() && local_file(store).is_none() {
            return true;
        }
        next = store.get_child("backingStore");
    }
    false
}
