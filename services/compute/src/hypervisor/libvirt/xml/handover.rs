//! The definition of a guest that is off as it is to be in other hands.

use drover_model::api::compute::{DiskMove, NicMove, TransferPlan};
use xmltree::{Element, XMLNode};

use super::{
    Result, XmlError, attribute, descend, element_text,
    owner::{self, Owner},
    parse,
    rewire::{self, set},
};

/// The definition with all that the plan changes, and nothing else changed.
///
/// # Errors
/// `Malformed` if it has no such NIC, or not that disk.
pub(in super::super) fn transferred(xml: &str, plan: &TransferPlan) -> Result<String> {
    let mut domain = parse(xml, "domain")?;
    owner::give(
        &mut domain,
        Owner {
            id: plan.project.as_str(),
            name: &plan.project_name,
        },
    );
    for (name, value) in [("name", &plan.name), ("title", &plan.title)] {
        if let Some(value) = value {
            set_text(&mut domain, name, value);
        }
    }
    let devices = domain.get_mut_child("devices");
    let devices = devices.ok_or(XmlError::Missing("<devices>"))?;
    for nic in &plan.nics {
        plug(devices, nic)?;
    }
    for disk in &plan.disks {
        let found = find_disk(devices, &disk.target)?;
        *found = at_new_place(found, disk)?;
    }
    element_text(&domain)
}

fn set_text(domain: &mut Element, name: &str, value: &str) {
    if domain.get_child(name).is_none() {
        domain.children.push(XMLNode::Element(Element::new(name)));
    }
    if let Some(element) = domain.get_mut_child(name) {
        element.children = vec![XMLNode::Text(value.to_owned())];
    }
}

fn plug(devices: &mut Element, nic: &NicMove) -> Result<()> {
    let mut interfaces = devices
        .children
        .iter_mut()
        .filter_map(XMLNode::as_mut_element);
    let is_it = |e: &Element| {
        let mac = rewire::mac(e).is_some_and(|mac| rewire::is_same_mac(mac, &nic.mac));
        e.name == "interface" && mac
    };
    let found = interfaces.find(|e| is_it(e));
    let found = found.ok_or_else(|| XmlError::Malformed(format!("there is no NIC {}", nic.mac)))?;
    *found = rewire::plugged(found, &nic.to)?;
    if let (Some(new), Some(mac)) = (&nic.new_mac, found.get_mut_child("mac")) {
        set(mac, "address", new);
    }
    Ok(())
}

fn find_disk<'a>(devices: &'a mut Element, target: &str) -> Result<&'a mut Element> {
    let mut elements = devices
        .children
        .iter_mut()
        .filter_map(XMLNode::as_mut_element);
    let found = elements.find(|e| is_disk(e, target));
    found.ok_or_else(|| XmlError::Malformed(format!("there is no disk {target}")))
}

fn is_disk(element: &Element, target: &str) -> bool {
    let name = descend(element, &["target"]).and_then(|t| attribute(t, "dev"));
    element.name == "disk" && name == Some(target)
}

/// The disk of that name in a `<domain>`.
pub(in super::super) fn disk<'a>(domain: &'a Element, target: &str) -> Option<&'a Element> {
    let devices = domain.get_child("devices")?;
    super::children(devices, "disk").find(|e| is_disk(e, target))
}

/// The file a `<disk>` is in.
pub(in super::super) fn file(disk: &Element) -> Option<&str> {
    attribute(disk.get_child("source")?, "file")
}

/// The file that a `<disk>` is being copied to, and whether the copy is whole.
pub(in super::super) fn mirror(disk: &Element) -> Option<(&str, bool)> {
    let mirror = disk.get_child("mirror")?;
    let source = mirror.get_child("source");
    let file = source.and_then(|s| attribute(s, "file"));
    let file = file.or_else(|| attribute(mirror, "file"))?;
    Some((file, attribute(mirror, "ready") == Some("yes")))
}

/// A lasting definition's `<disk>` in its new file.
pub(in super::super) fn at_new_place(disk: &Element, to: &DiskMove) -> Result<Element> {
    let mut moved = disk.clone();
    let other = || {
        let words = format!("disk {} is not in {}", to.target, to.from);
        XmlError::Malformed(words)
    };
    if !matches!(file(disk), Some(path) if path == to.from || path == to.to) {
        return Err(other());
    }
    let source = moved.get_mut_child("source").ok_or_else(other)?;
    set(source, "file", &to.to);
    if to.flatten {
        // It names images that are no longer below this one.
        drop(moved.take_child("backingStore"));
    }
    Ok(moved)
}

/// The `<disk>` that a copy is made to.
pub(in super::super) fn copy_target(disk: &DiskMove) -> Result<String> {
    let mut element = Element::new("disk");
    set(&mut element, "type", "file");
    for (name, attribute, value) in [
        ("driver", "type", &disk.format),
        ("source", "file", &disk.to),
    ] {
        let mut child = Element::new(name);
        set(&mut child, attribute, value);
        element.children.push(XMLNode::Element(child));
    }
    element_text(&element)
}

/// Type and directory of a storage pool.
pub(in super::super) fn pool(xml: &str) -> Result<(String, Option<String>)> {
    let pool = parse(xml, "pool")?;
    let kind = super::owned(&pool, "type").ok_or(XmlError::Missing("type"))?;
    let path = pool
        .get_child("target")
        .and_then(|target| super::text(target, "path"));
    Ok((kind, path))
}

#[cfg(test)]
mod tests;
