//! Addresses of its node to which a guest's QEMU is bound: displays, and character
//! devices that listen. One that the other node lacks makes QEMU fail there.

use std::net::IpAddr;

use drover_model::content::BoundAddress;
use xmltree::{Element, XMLNode};

use super::{attribute, children, owned};

/// All of them but those that every node has; the same once.
pub(super) fn read(devices: &Element) -> Vec<BoundAddress> {
    let mut found: Vec<BoundAddress> = Vec::new();
    let elements = devices.children.iter().filter_map(XMLNode::as_element);
    for bound in elements.flat_map(of_device) {
        if !bound.is_everywhere() && !found.contains(&bound.0) {
            found.push(bound.0);
        }
    }
    found
}

struct Bound(BoundAddress);

impl Bound {
    /// Whether every node has it, and nothing about its port is fixed.
    fn is_everywhere(&self) -> bool {
        let address = self.0.address.trim_matches(['[', ']']);
        let usual = match address.parse::<IpAddr>() {
            Ok(ip) => ip.is_unspecified() || ip.is_loopback(),
            Err(_) => address == "localhost",
        };
        usual && self.0.port.is_none()
    }
}

fn of_device(device: &Element) -> Vec<Bound> {
    if device.name == "graphics" {
        return of_display(device);
    }
    if device.name == "interface" {
        return of_socket_interface(device).into_iter().collect();
    }
    let what = match device.name.as_str() {
        "rng" => "its source of random numbers".to_owned(),
        "redirdev" => "a redirected USB device".to_owned(),
        "smartcard" => "its smart card".to_owned(),
        name => format!("a {name}"),
    };
    // A generator of random numbers has its socket one level further in.
    let holders = std::iter::once(device).chain(children(device, "backend"));
    let bound = holders.flat_map(|holder| {
        let udp = attribute(holder, "type") == Some("udp");
        children(holder, "source").filter_map(move |source| of_source(source, udp))
    });
    bound
        .map(|(address, port, udp)| {
            let what = what.clone();
            Bound(BoundAddress {
                address,
                port,
                udp,
                what,
            })
        })
        .collect()
}

fn of_source(source: &Element, udp: bool) -> Option<(String, Option<u16>, bool)> {
    let is_bound = attribute(source, "mode") == Some("bind");
    let address = owned(source, "host").filter(|_| is_bound)?;
    let port = attribute(source, "service").and_then(|port| port.parse().ok());
    Some((address, port.filter(|port| *port != 0), udp))
}

/// A display listens where its `<listen>` elements say, else where its attribute
/// does. A port that libvirt chooses is chosen anew on each node, and so is the
/// address of a libvirt network.
fn of_display(display: &Element) -> Vec<Bound> {
    let kind = attribute(display, "type").unwrap_or("display");
    let fixed = attribute(display, "autoport") == Some("no");
    let number = |name| attribute(display, name).and_then(|port| port.parse::<u16>().ok());
    let ports: Vec<u16> = ["port", "tlsPort"]
        .into_iter()
        .filter_map(number)
        .filter(|port| fixed && *port != 0)
        .collect();
    let listens: Vec<&Element> = children(display, "listen").collect();
    let addresses: Vec<String> = match listens.is_empty() {
        true => owned(display, "listen").into_iter().collect(),
        false => listens
            .into_iter()
            .filter(|listen| attribute(listen, "type") == Some("address"))
            .filter_map(|listen| owned(listen, "address"))
            .collect(),
    };
    let what = format!("its {} display", kind.to_uppercase());
    let bound = |address: &String, port| {
        Bound(BoundAddress {
            address: address.clone(),
            port,
            udp: false,
            what: what.clone(),
        })
    };
    addresses
        .iter()
        .flat_map(|address| match ports.as_slice() {
            [] => vec![bound(address, None)],
            ports => ports.iter().map(|p| bound(address, Some(*p))).collect(),
        })
        .collect()
}

/// A NIC whose network is a socket of QEMU's.
fn of_socket_interface(interface: &Element) -> Option<Bound> {
    let source = interface.get_child("source")?;
    let (at, udp) = match attribute(interface, "type")? {
        "server" => (source, false),
        "udp" => (source.get_child("local")?, true),
        _ => return None,
    };
    let port = attribute(at, "port").and_then(|port| port.parse().ok());
    Some(Bound(BoundAddress {
        address: owned(at, "address")?,
        port,
        udp,
        what: "a NIC".to_owned(),
    }))
}
