//! `<interface>` plugged into something else. Whatever says how it was plugged
//! in before goes; what the guest sees of it stays.

use drover_model::guest::NicAttachment;
use xmltree::{Element, XMLNode};

use super::{Result, XmlError, attribute, children};

/// What belongs to the place where an interface is plugged in, not to the guest:
/// names of the host's devices, switch ports, filters, addresses of user-mode
/// networks.
const OF_ITS_PLACE: [&str; 10] = [
    "source",
    "target",
    "virtualport",
    "vlan",
    "filterref",
    "portForward",
    "ip",
    "route",
    "script",
    "downscript",
];

/// The interface of that MAC address in a `<domain>`.
pub(in super::super) fn interface<'a>(domain: &'a Element, mac: &str) -> Option<&'a Element> {
    let devices = domain.get_child("devices")?;
    children(devices, "interface").find(|i| self::mac(i).is_some_and(|m| is_same_mac(m, mac)))
}

/// All of them.
pub(in super::super) fn interfaces(domain: &Element) -> impl Iterator<Item = &Element> {
    let devices = domain.get_child("devices").into_iter();
    devices.flat_map(|devices| children(devices, "interface"))
}

/// The interface's MAC address as it is written.
pub(in super::super) fn mac(interface: &Element) -> Option<&str> {
    attribute(interface.get_child("mac")?, "address")
}

pub(super) fn is_same_mac(one: &str, other: &str) -> bool {
    one.eq_ignore_ascii_case(other)
}

/// The interface plugged into `to`. One that is there already stays as it is.
///
/// # Errors
/// `Malformed` if that is neither a bridge nor a libvirt network.
pub(in super::super) fn plugged(interface: &Element, to: &NicAttachment) -> Result<Element> {
    let (kind, name) = match to {
        NicAttachment::Bridge { bridge } => ("bridge", bridge),
        NicAttachment::Network { network } => ("network", network),
        _ => {
            let words = "a NIC can be plugged into a bridge or a libvirt network only";
            return Err(XmlError::Malformed(words.to_owned()));
        }
    };
    let mut plugged = interface.clone();
    let is_of_its_place = |node: &XMLNode| {
        let element = node.as_element();
        element.is_some_and(|e| OF_ITS_PLACE.contains(&e.name.as_str()) || is_passt(e))
    };
    plugged.children.retain(|node| !is_of_its_place(node));
    set(&mut plugged, "type", kind);
    let mut source = Element::new("source");
    set(&mut source, kind, name);
    plugged.children.push(XMLNode::Element(source));
    Ok(plugged)
}

/// A user-mode network of its own kind.
fn is_passt(element: &Element) -> bool {
    element.name == "backend" && attribute(element, "type").is_some()
}

/// Whether its link was taken down.
pub(in super::super) fn is_down(interface: &Element) -> bool {
    let link = interface.get_child("link");
    link.and_then(|l| attribute(l, "state")) == Some("down")
}

/// The interface with its link down.
pub(in super::super) fn down(interface: &Element) -> Element {
    let mut down = interface.clone();
    if down.get_child("link").is_none() {
        down.children.push(XMLNode::Element(Element::new("link")));
    }
    if let Some(link) = down.get_mut_child("link") {
        set(link, "state", "down");
    }
    down
}

/// The interface with its link up.
pub(in super::super) fn up(interface: &Element) -> Element {
    let mut up = interface.clone();
    drop(up.take_child("link"));
    up
}

/// A running guest's interface as libvirt takes it back: without the names and
/// ports that it made up for it, which it keeps or makes anew.
pub(in super::super) fn without_traces(interface: &Element) -> Element {
    let mut bare = interface.clone();
    drop(bare.take_child("target"));
    let Some(source) = bare.get_mut_child("source") else {
        return bare;
    };
    if attribute(source, "network").is_some() {
        // What the network came down to, libvirt decides anew.
        source
            .attributes
            .retain(|name, _| matches!(name.as_str(), "network" | "portgroup"));
        set(&mut bare, "type", "network");
    }
    bare
}

pub(super) fn set(element: &mut Element, name: &str, value: &str) {
    element.attributes.insert(name.to_owned(), value.to_owned());
}
