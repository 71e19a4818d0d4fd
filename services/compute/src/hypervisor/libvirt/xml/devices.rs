//! Network interfaces, and everything that ties a guest to its node.

use drover_model::guest::{Immovable, ImmovableKind, Nic, NicAttachment};
use xmltree::Element;

use super::{attribute, children, descend, owned, text};

/// The network interfaces of `<devices>`.
pub(super) fn nics(devices: &Element) -> Vec<Nic> {
    children(devices, "interface")
        .map(|interface| Nic {
            mac: mac(interface),
            attachment: attachment(interface),
            port: port(interface),
        })
        .collect()
}

/// What sets its port apart from others of the same network.
fn port(interface: &Element) -> Option<String> {
    let tag = descend(interface, &["vlan", "tag"]).and_then(|t| attribute(t, "id"));
    let source = interface.get_child("source");
    let group = source.and_then(|s| attribute(s, "portgroup"));
    let profile = interface.get_child("virtualport");
    tag.map(|id| format!("VLAN {id}"))
        .or_else(|| group.map(|name| format!("port group {name}")))
        .or_else(|| profile.map(|_| "a port profile".to_owned()))
}

fn mac(interface: &Element) -> String {
    let mac = interface.get_child("mac");
    mac.and_then(|m| attribute(m, "address"))
        .unwrap_or_default()
        .to_ascii_lowercase()
}

fn attachment(interface: &Element) -> NicAttachment {
    let kind = attribute(interface, "type").unwrap_or_default();
    let source = interface.get_child("source");
    let from_source = |name| source.and_then(|s| owned(s, name));
    // A running one on a libvirt network has the type of what that came down to.
    let of_network = from_source("network").filter(|_| matches!(kind, "bridge" | "direct"));
    if let Some(network) = of_network {
        return NicAttachment::Network { network };
    }
    let known = match kind {
        "bridge" => from_source("bridge").map(|bridge| NicAttachment::Bridge { bridge }),
        "network" => from_source("network").map(|network| NicAttachment::Network { network }),
        "direct" => from_source("dev").map(|device| NicAttachment::Direct { device }),
        "user" => Some(NicAttachment::User),
        _ => None,
    };
    known.unwrap_or_else(|| NicAttachment::Other {
        kind: kind.to_owned(),
    })
}

/// Every device and setting but drives that cannot leave the node.
pub(super) fn immovable(domain: &Element, devices: &Element) -> Vec<Immovable> {
    let mut found = Vec::new();
    found.extend(children(devices, "hostdev").filter_map(host_device));
    found.extend(children(devices, "interface").filter_map(host_interface));
    found.extend(children(devices, "filesystem").map(filesystem));
    found.extend(children(devices, "tpm").map(tpm));
    found.extend(children(devices, "memory").filter_map(memory_device));
    found.extend(children(devices, "shmem").filter_map(shared_memory));
    found.extend(children(devices, "smartcard").filter_map(smartcard));
    found.extend(children(devices, "input").filter_map(host_input));
    for kind in ["serial", "parallel", "console", "channel", "redirdev"] {
        found.extend(children(devices, kind).filter_map(character_device));
    }
    found.extend(domain.get_child("launchSecurity").map(launch_security));
    found.extend(qemu_arguments(domain));
    found
}

fn is(kind: ImmovableKind, what: String) -> Immovable {
    Immovable { kind, what }
}

/// libvirt unplugs a transient half of a team by itself before it migrates.
fn leaves_by_itself(device: &Element) -> bool {
    let teaming = device.get_child("teaming");
    teaming.and_then(|t| attribute(t, "type")) == Some("transient")
}

fn host_device(device: &Element) -> Option<Immovable> {
    if leaves_by_itself(device) {
        return None;
    }
    let source = device.get_child("source");
    let address = source.and_then(|s| s.get_child("address"));
    let kind = attribute(device, "type").unwrap_or("device");
    if kind == "mdev" {
        let uuid = address.and_then(|a| attribute(a, "uuid")).unwrap_or("?");
        let what = format!("mediated device {uuid}");
        return Some(is(ImmovableKind::MediatedDevice, what));
    }
    let what = match kind {
        "pci" => format!("PCI {}", pci(address)),
        "usb" => format!("USB {}", usb(source)),
        "scsi" => format!("SCSI {}", scsi(source)),
        other => format!("{other} {}", first_text(source)),
    };
    Some(is(ImmovableKind::HostDevice, what.trim_end().to_owned()))
}

/// `0000:3b:00.1`, as lspci writes it.
fn pci(address: Option<&Element>) -> String {
    let part = |name, width| {
        let text = address.and_then(|a| attribute(a, name)).unwrap_or("0");
        let digits = text.trim_start_matches("0x");
        format!("{digits:0>width$}")
    };
    format!(
        "{}:{}:{}.{}",
        part("domain", 4),
        part("bus", 2),
        part("slot", 2),
        part("function", 1)
    )
}

/// `1d6b:0002`, as lsusb writes it, else bus and device.
fn usb(source: Option<&Element>) -> String {
    let id = |child| {
        let element = source.and_then(|s| s.get_child(child));
        element.and_then(|e| attribute(e, "id"))
    };
    if let (Some(vendor), Some(product)) = (id("vendor"), id("product")) {
        let plain = |text: &str| text.trim_start_matches("0x").to_owned();
        return format!("{}:{}", plain(vendor), plain(product));
    }
    let address = source.and_then(|s| s.get_child("address"));
    let part = |name| address.and_then(|a| attribute(a, name)).unwrap_or("?");
    format!("bus {} device {}", part("bus"), part("device"))
}

fn scsi(source: Option<&Element>) -> String {
    let adapter = source.and_then(|s| s.get_child("adapter"));
    let address = source.and_then(|s| s.get_child("address"));
    let name = adapter.or(source).and_then(|a| attribute(a, "name"));
    let part = |name| address.and_then(|a| attribute(a, name)).unwrap_or("?");
    let (bus, target, unit) = (part("bus"), part("target"), part("unit"));
    format!("{} {bus}:{target}:{unit}", name.unwrap_or("?"))
}

/// The first text in a capabilities device's source (`<block>/dev/sdf</block>`).
fn first_text(source: Option<&Element>) -> String {
    let names = ["block", "char", "interface"];
    let child = |s: &Element| names.iter().find_map(|name| text(s, name));
    let attributes = |s: &Element| s.attributes.values().next().cloned();
    source
        .and_then(|s| child(s).or_else(|| attributes(s)))
        .unwrap_or_default()
}

fn host_interface(interface: &Element) -> Option<Immovable> {
    let kind = attribute(interface, "type")?;
    if !matches!(kind, "hostdev" | "vdpa") || leaves_by_itself(interface) {
        return None;
    }
    let source = interface.get_child("source");
    let device = source.and_then(|s| owned(s, "dev"));
    let address = source.and_then(|s| s.get_child("address"));
    let on = device.unwrap_or_else(|| format!("PCI {}", pci(address)));
    let what = format!("{} ({kind} {on})", mac(interface));
    Some(is(ImmovableKind::Interface, what))
}

fn filesystem(element: &Element) -> Immovable {
    let driver = element.get_child("driver");
    let kind = driver.and_then(|d| attribute(d, "type")).unwrap_or("9p");
    let at = |child, names: [&str; 3]| {
        let element = element.get_child(child);
        let found = |e: &Element| names.iter().find_map(|n| owned(e, n));
        element.and_then(found).unwrap_or_else(|| "?".to_owned())
    };
    let from = at("source", ["dir", "socket", "file"]);
    let tag = at("target", ["dir", "dir", "dir"]);
    is(ImmovableKind::Filesystem, format!("{tag} ({kind}, {from})"))
}

/// Whether the state of an emulated TPM is to last no longer than the definition, as it is
/// unless that says otherwise.
pub(super) fn has_tpm_of_its_definition(devices: &Element) -> bool {
    children(devices, "tpm").any(|tpm| {
        tpm.get_child("backend").is_some_and(|backend| {
            attribute(backend, "type") == Some("emulator")
                && attribute(backend, "persistent_state") != Some("yes")
        })
    })
}

fn tpm(element: &Element) -> Immovable {
    let backend = element.get_child("backend");
    let kind = backend.and_then(|b| attribute(b, "type")).unwrap_or("?");
    let device = backend
        .and_then(|b| b.get_child("device"))
        .and_then(|d| attribute(d, "path"));
    let what = match device {
        Some(path) => format!("TPM {kind} {path}"),
        None => format!("TPM {kind}"),
    };
    match kind {
        "emulator" => is(ImmovableKind::EmulatedTpm, what),
        _ => is(ImmovableKind::Tpm, what),
    }
}

fn memory_device(element: &Element) -> Option<Immovable> {
    let model = attribute(element, "model")?;
    if !matches!(model, "nvdimm" | "virtio-pmem" | "sgx-epc") {
        return None;
    }
    let path = element.get_child("source").and_then(|s| text(s, "path"));
    let what = format!("{model} {}", path.unwrap_or_default());
    Some(is(ImmovableKind::Nvdimm, what.trim_end().to_owned()))
}

/// A peer's share of memory belongs to the node's other guests.
fn shared_memory(element: &Element) -> Option<Immovable> {
    if attribute(element, "role") == Some("master") {
        return None;
    }
    let name = attribute(element, "name").unwrap_or("?");
    Some(is(
        ImmovableKind::HostDevice,
        format!("shared memory {name}"),
    ))
}

fn smartcard(element: &Element) -> Option<Immovable> {
    let mode = attribute(element, "mode")?;
    mode.starts_with("host")
        .then(|| is(ImmovableKind::HostDevice, format!("smart card ({mode})")))
}

/// A keyboard, mouse or the like of the host.
fn host_input(element: &Element) -> Option<Immovable> {
    let kind = attribute(element, "type")?;
    if !matches!(kind, "passthrough" | "evdev") {
        return None;
    }
    let source = element.get_child("source");
    let path = source.and_then(|s| attribute(s, "evdev").or_else(|| attribute(s, "dev")));
    let what = format!("input {}", path.unwrap_or("?"));
    Some(is(ImmovableKind::HostDevice, what))
}

fn character_device(element: &Element) -> Option<Immovable> {
    let kind = attribute(element, "type")?;
    if !matches!(kind, "dev" | "pipe") {
        return None;
    }
    let path = element
        .get_child("source")
        .and_then(|s| attribute(s, "path"));
    let what = format!("{} on {kind} {}", element.name, path.unwrap_or("?"));
    Some(is(ImmovableKind::CharacterDevice, what))
}

/// Arguments that go to QEMU past libvirt and name files of the node.
fn qemu_arguments(domain: &Element) -> Option<Immovable> {
    let lines = children(domain, "commandline");
    let arguments = lines.flat_map(|line| children(line, "arg"));
    let mut values = arguments.filter_map(|argument| attribute(argument, "value"));
    let named = values.find(|value| value.contains('/'))?;
    let what = format!("what an argument for QEMU names ({named})");
    Some(is(ImmovableKind::HostDevice, what))
}

fn launch_security(element: &Element) -> Immovable {
    let kind = attribute(element, "type").unwrap_or("?");
    let policy = descend(element, &["policy"]).and_then(|p| p.get_text());
    let what = match policy {
        Some(policy) => format!("{kind}, policy {}", policy.trim()),
        None => kind.to_owned(),
    };
    is(ImmovableKind::LaunchSecurity, what)
}
