//! Metadata and title of an active guest, for its new owner and back.
//! Everything here blocks.

use drover_model::api::compute::TransferPlan;
use virt::{domain::Domain, sys};
use xmltree::Element;

use super::Side;
use crate::hypervisor::{
    HypervisorError,
    libvirt::{
        errors::CallResult,
        xml::owner::{self, Change, Owner},
    },
};

/// Writes the plan's project, and its title if there is one.
pub(super) fn give(domain: &Domain, side: Side, plan: &TransferPlan) -> CallResult<()> {
    let definition = side.read(domain)?;
    let owner = Owner {
        id: plan.project.as_str(),
        name: &plan.project_name,
    };
    let changes = owner::changes(&definition, owner).map_err(HypervisorError::from)?;
    write(domain, side, &changes)?;
    match &plan.title {
        Some(title) => write_title(domain, side, &definition, Some(title)),
        None => Ok(()),
    }
}

/// Has them say what they said.
pub(super) fn restore(domain: &Domain, side: Side, before: &Element) -> CallResult<()> {
    let definition = side.read(domain)?;
    let changes = owner::differences(&definition, before).map_err(HypervisorError::from)?;
    write(domain, side, &changes)?;
    let title = owner::title(before);
    write_title(domain, side, &definition, title.as_deref())
}

fn write(domain: &Domain, side: Side, changes: &[Change]) -> CallResult<()> {
    for change in changes {
        domain.set_metadata(
            kind(sys::VIR_DOMAIN_METADATA_ELEMENT),
            change.content.as_deref(),
            change.content.as_ref().map(|_| change.prefix.as_str()),
            Some(&change.namespace),
            side.affects(),
        )?;
    }
    Ok(())
}

fn write_title(domain: &Domain, side: Side, now: &Element, title: Option<&str>) -> CallResult<()> {
    if owner::title(now).as_deref() == title {
        return Ok(());
    }
    let kind = kind(sys::VIR_DOMAIN_METADATA_TITLE);
    Ok(domain.set_metadata(kind, title, None, None, side.affects())?)
}

fn kind(kind: sys::virDomainMetadataType) -> i32 {
    kind.cast_signed()
}
