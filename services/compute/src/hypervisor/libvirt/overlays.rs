//! Disks frozen while their guest runs, so that they can be copied: an external
//! snapshot, which libvirt is not to remember, and its way back. Everything here
//! but [`merge`] blocks.

use std::{ffi::CString, path::Path, process::Stdio, time::Duration};

use drover_model::ids::InstanceId;
use tokio::process::Command;
use virt::{connect::Connect, domain::Domain, sys};
use xmltree::{Element, XMLNode};

use super::{
    errors::{self, CallResult},
    ffi, guests,
    storage::{self, chain},
    xml,
};
use crate::hypervisor::{HypervisorError, Overlay, Result};

/// How far a thaw is.
pub(super) enum Thaw {
    /// A disk's overlay is being merged.
    Merging,
    /// Every disk is on its own image again.
    Done,
}

/// Has writes go to overlays from now on. What is frozen already stays so.
pub(super) fn freeze(connect: &Connect, id: InstanceId, overlays: &[Overlay]) -> CallResult<()> {
    let domain = guests::get(connect, id)?;
    let sources = sources(&domain)?;
    let source_of = |target: &str| sources.iter().find(|(t, _)| t == target).map(|(_, s)| s);
    let todo = |o: &&Overlay| source_of(&o.target) != Some(&o.path);
    let overlays: Vec<&Overlay> = overlays.iter().filter(todo).collect();
    if overlays.is_empty() {
        return Ok(());
    }
    if let Some(other) = overlays
        .iter()
        .find(|o| source_of(&o.target) != Some(&o.image))
    {
        let words = format!("disk {} is no longer {}", other.target, other.image);
        return Err(HypervisorError::WrongState(words).into());
    }
    let text = snapshot(&overlays, sources.iter().map(|(target, _)| target.as_str()));
    let text = xml::element_text(&text).map_err(HypervisorError::from)?;
    let flags = sys::VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        | sys::VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        | sys::VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC;
    domain.create_snapshot_xml(&text, flags)?;
    Ok(())
}

/// Targets and local files of the disks of the running guest.
fn sources(domain: &Domain) -> CallResult<Vec<(String, String)>> {
    let text = domain.xml_desc(0)?;
    let disks = xml::disk_files(&text).map_err(HypervisorError::from)?;
    Ok(disks)
}

/// A snapshot of these disks and of none of the others.
fn snapshot<'a>(overlays: &[&Overlay], all: impl Iterator<Item = &'a str>) -> Element {
    let element = |name: &str, attributes: &[(&str, &str)]| {
        let mut element = Element::new(name);
        for (name, value) in attributes {
            let (name, value) = ((*name).to_owned(), (*value).to_owned());
            element.attributes.insert(name, value);
        }
        element
    };
    let mut disks = Element::new("disks");
    for target in all {
        let overlay = overlays.iter().find(|o| o.target == target);
        let mode = if overlay.is_some() { "external" } else { "no" };
        let mut disk = element("disk", &[("name", target), ("snapshot", mode)]);
        if let Some(overlay) = overlay {
            let inside = [
                element("driver", &[("type", "qcow2")]),
                element("source", &[("file", &overlay.path)]),
            ];
            disk.children.extend(inside.map(XMLNode::Element));
        }
        disks.children.push(XMLNode::Element(disk));
    }
    let mut snapshot = Element::new("domainsnapshot");
    snapshot.children.push(XMLNode::Element(disks));
    snapshot
}

/// Goes one step on the way back of a running guest; asked until it is done.
pub(super) fn thaw(connect: &Connect, id: InstanceId, overlays: &[Overlay]) -> CallResult<Thaw> {
    let domain = guests::get(connect, id)?;
    let sources = sources(&domain)?;
    for overlay in overlays {
        let on_overlay = sources
            .iter()
            .any(|(t, s)| *t == overlay.target && *s == overlay.path);
        if !on_overlay {
            continue;
        }
        holds_no_snapshots(overlay)?;
        let disk = text(&overlay.target)?;
        match ffi::block_job(&domain, &disk)? {
            // libvirt gives 0 of 0 until QEMU has told it anything.
            Some((done, all)) if all > 0 && done == all => {
                match ffi::block_pivot(&domain, &disk) {
                    // Not quite ready: the last writes are on their way.
                    Err(e) if errors::is(&e, virt::error::ErrorNumber::BlockCopyActive) => {}
                    pivoted => pivoted?,
                }
            }
            Some(_) => {}
            None => ffi::block_commit(&domain, &disk, &text(&overlay.image)?)?,
        }
        return Ok(Thaw::Merging);
    }
    Ok(Thaw::Done)
}

/// A merge takes along what the guest sees, and no snapshot that somebody made of it
/// meanwhile.
fn holds_no_snapshots(overlay: &Overlay) -> Result<()> {
    let sizes = storage::sizes::measure(Path::new(&overlay.path), "qcow2");
    let sizes = sizes.map_err(|e| HypervisorError::Failed(format!("{}: {e}", overlay.path)))?;
    match sizes.snapshots {
        0 => Ok(()),
        number => Err(HypervisorError::WrongState(format!(
            "{} holds {number} snapshot(s), made since the disk was made to stand still: they \
             would be lost; delete them ('virsh snapshot-delete', 'qemu-img snapshot -d')",
            overlay.path
        ))),
    }
}

/// A disk's name or path as C takes it.
pub(super) fn text(text: &str) -> std::result::Result<CString, HypervisorError> {
    CString::new(text).map_err(|e| HypervisorError::Failed(format!("a disk's name: {e}")))
}

/// Merges an overlay into its image, where nobody has them open.
pub(super) async fn merge(overlay: &Overlay, qemu_img: &str, limit: Duration) -> Result<()> {
    let path = storage::checked(&overlay.path)?;
    if storage::files::is_absent(&path) {
        let words = format!("{} is not here", overlay.path);
        return Err(HypervisorError::Failed(words));
    }
    holds_no_snapshots(overlay)?;
    // It came from another node: it may lead to its own image and nowhere else.
    let below = chain::below(&overlay.path, "qcow2", &chain::Places(vec!["/".into()]));
    let below = below.map_err(HypervisorError::Failed)?;
    let is_own = |image: &drover_model::guest::BackingImage| {
        image.path == overlay.image && image.format == overlay.format
    };
    if !below.first().is_some_and(is_own) {
        let words = format!("{} does not lie over {}", overlay.path, overlay.image);
        return Err(HypervisorError::Failed(words));
    }
    let mut command = Command::new(qemu_img);
    // -d: it is not emptied, so that a merge which broke off is done again. What is
    // merged is flushed once, at the end.
    command.args(["commit", "-q", "-d", "-t", "unsafe", "-f", "qcow2"]);
    command
        .arg(&path)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command.stderr(Stdio::piped()).kill_on_drop(true);
    let failure = |words: String| HypervisorError::Failed(format!("{qemu_img} commit: {words}"));
    let output = tokio::time::timeout(limit, command.output())
        .await
        .map_err(|_| failure(format!("not done after {} s", limit.as_secs())))?
        .map_err(|e| failure(e.to_string()))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        return Err(failure(words.trim().chars().take(500).collect()));
    }
    storage::files::flush(&overlay.image).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_names_every_disk_and_escapes_what_it_names() {
        let overlay = Overlay {
            target: "vda".to_owned(),
            path: "/images/a<b>&'c'.delta".to_owned(),
            image: "/images/a".to_owned(),
            format: "raw".to_owned(),
        };
        let text = xml::element_text(&snapshot(&[&overlay], ["vda", "vdb"].into_iter())).unwrap();
        let read = xml::parse(&text, "domainsnapshot").unwrap();
        let disks: Vec<_> = xml::children(read.get_child("disks").unwrap(), "disk").collect();
        assert_eq!(xml::attribute(disks[0], "snapshot"), Some("external"));
        let source = disks[0].get_child("source").unwrap();
        assert_eq!(xml::attribute(source, "file"), Some(overlay.path.as_str()));
        assert_eq!(xml::attribute(disks[1], "snapshot"), Some("no"));
    }
}
