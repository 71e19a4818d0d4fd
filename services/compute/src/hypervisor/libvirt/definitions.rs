//! Definitions taken whole, kept elsewhere, and given back. Everything here blocks.

use drover_model::{ids::InstanceId, migration::Flavor};
use virt::{connect::Connect, domain::Domain, domain_snapshot::DomainSnapshot, sys};

use super::{
    errors::{self, CallResult},
    guests, lifecycle,
    xml::{self, flavor},
};
use crate::hypervisor::{Definition, HypervisorError};

/// Snapshots of one guest that are carried; libvirt itself has no bound.
const MOST_SNAPSHOTS: usize = 1000;

/// Definition and internal snapshots, secrets included.
pub(super) fn take(connect: &Connect, id: InstanceId) -> CallResult<Option<Definition>> {
    let Some(domain) = guests::find(connect, id)? else {
        return Ok(None);
    };
    let flags = sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE;
    let Some(text) = errors::absent_is_none(domain.xml_desc(flags))? else {
        return Ok(None);
    };
    let mut definition = Definition {
        domain: text,
        snapshots: Vec::new(),
        current_snapshot: None,
    };
    for snapshot in in_order(&domain)? {
        if snapshot.is_current(0)? {
            definition.current_snapshot = Some(snapshot.name()?);
        }
        let text = snapshot.xml_desc(sys::VIR_DOMAIN_SNAPSHOT_XML_SECURE)?;
        definition.snapshots.push(text);
    }
    Ok(Some(definition))
}

/// Snapshots, parents before children.
pub(super) fn in_order(domain: &Domain) -> CallResult<Vec<DomainSnapshot>> {
    let snapshots = domain.list_all_snapshots(sys::VIR_DOMAIN_SNAPSHOT_LIST_TOPOLOGICAL)?;
    if snapshots.len() > MOST_SNAPSHOTS {
        let words = format!("it has more than {MOST_SNAPSHOTS} snapshots");
        return Err(HypervisorError::Failed(words).into());
    }
    Ok(snapshots)
}

/// Defines a domain and its snapshots.
pub(super) fn give(
    connect: &Connect,
    definition: &Definition,
    size: Option<Flavor>,
) -> CallResult<()> {
    let sized = match size {
        Some(size) => flavor::apply(&definition.domain, size),
        None => xml::parse(&definition.domain, "domain").map(|_| definition.domain.clone()),
    };
    let text = sized.map_err(HypervisorError::from)?;
    let id = xml::domain_id(&text).map_err(HypervisorError::from)?;
    if let Some(domain) = guests::find(connect, id)? {
        if domain.is_active()? {
            return Err(HypervisorError::WrongState("the guest is active here".to_owned()).into());
        }
        // It would come back with the definition, and on the disks, that it was saved with.
        if domain.has_managed_save(0)? {
            let words = format!(
                "{}: start the guest, or discard that ('virsh managedsave-remove')",
                guests::SAVED
            );
            return Err(HypervisorError::WrongState(words).into());
        }
        // libvirt takes a definition of another name for another domain's.
        let name = xml::domain_name(&text).map_err(HypervisorError::from)?;
        if domain.name()? != name {
            domain.rename(&name, 0)?;
        }
    }
    let domain = connect.define_domain_xml_flags(&text, 0)?;
    for text in &definition.snapshots {
        // Takes the place of one of that name.
        domain.create_snapshot_xml(text, sys::VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE)?;
    }
    if let Some(name) = &definition.current_snapshot {
        let current = Domain::lookup_snapshot_by_name(&domain, name, 0)?;
        let text = current.xml_desc(sys::VIR_DOMAIN_SNAPSHOT_XML_SECURE)?;
        let flags =
            sys::VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE | sys::VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT;
        domain.create_snapshot_xml(&text, flags)?;
    }
    Ok(())
}

/// Removes a definition and what libvirt keeps of its snapshots; the state of an emulated
/// TPM as [`lifecycle::remove_definition`] says.
pub(super) fn withdraw(
    connect: &Connect,
    id: InstanceId,
    expendable: Option<&[String]>,
) -> CallResult<()> {
    let Some(domain) = lifecycle::shut_off(connect, id)? else {
        return Ok(());
    };
    let snapshots = sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA;
    lifecycle::remove_definition(&domain, snapshots, expendable)
}
