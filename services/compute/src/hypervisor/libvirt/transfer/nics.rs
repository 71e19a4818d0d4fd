//! NICs of an active guest plugged into something else, and back. Everything
//! here blocks.

use std::time::{Duration, Instant};

use drover_model::api::compute::NicMove;
use virt::domain::Domain;
use xmltree::Element;

use super::Side;
use crate::hypervisor::{
    HypervisorError,
    libvirt::{
        errors::CallResult,
        xml::{self, owner::is_same, rewire},
    },
};

/// Plugs each into its new place, in both definitions. Says for how long the
/// longest was cut.
pub(super) fn plug(domain: &Domain, nics: &[NicMove]) -> CallResult<Duration> {
    let lasting = Side::Lasting.read(domain)?;
    let live = Side::Live.read(domain)?;
    let mut longest = Duration::ZERO;
    for nic in nics {
        let last = find(&lasting, &nic.mac)?;
        let now = find(&live, &nic.mac)?;
        let wanted = rewire::plugged(last, &nic.to).map_err(HypervisorError::from)?;
        let cut = plug_live(domain, now, nic, rewire::is_down(last))?;
        longest = longest.max(cut);
        update(domain, Side::Lasting, last, &wanted)?;
    }
    Ok(longest)
}

fn find<'a>(definition: &'a Element, mac: &str) -> CallResult<&'a Element> {
    let found = rewire::interface(definition, mac);
    let missing = || HypervisorError::Failed(format!("the guest has no NIC {mac}"));
    Ok(found.ok_or_else(missing)?)
}

/// `down_at_start` is how its link is after the guest's next start.
fn plug_live(
    domain: &Domain,
    now: &Element,
    nic: &NicMove,
    down_at_start: bool,
) -> CallResult<Duration> {
    let now = rewire::without_traces(now);
    let wanted = rewire::plugged(&now, &nic.to).map_err(HypervisorError::from)?;
    let is_there = is_same(&sorted(&now), &sorted(&wanted));
    // An earlier call may have died with the link down: that is no wish of anybody.
    let stays_down = rewire::is_down(&now) && (!is_there || down_at_start);
    match (is_there, stays_down) {
        (true, true) => Ok(Duration::ZERO),
        (true, false) => {
            update(domain, Side::Live, &now, &rewire::up(&now))?;
            Ok(Duration::ZERO)
        }
        (false, true) => {
            update(domain, Side::Live, &now, &wanted)?;
            Ok(Duration::ZERO)
        }
        (false, false) => replug(domain, &wanted),
    }
}

/// Has the guest see its link go down and, elsewhere, up.
fn replug(domain: &Domain, wanted: &Element) -> CallResult<Duration> {
    let begun = Instant::now();
    send(domain, Side::Live, &rewire::down(wanted))?;
    send(domain, Side::Live, wanted)?;
    Ok(begun.elapsed())
}

/// Has every NIC be plugged in as it was.
pub(super) fn restore(domain: &Domain, side: Side, before: &Element) -> CallResult<()> {
    let definition = side.read(domain)?;
    for was in rewire::interfaces(before) {
        let mac = rewire::mac(was).unwrap_or_default();
        let Some(now) = rewire::interface(&definition, mac) else {
            continue;
        };
        match side {
            Side::Lasting => update(domain, side, now, was)?,
            Side::Live => {
                let (now, was) = (rewire::without_traces(now), rewire::without_traces(was));
                let moved = !is_same(&sorted(&rewire::up(&now)), &sorted(&rewire::up(&was)));
                if moved && !rewire::is_down(&was) {
                    replug(domain, &was)?;
                } else {
                    update(domain, side, &now, &was)?;
                }
            }
        }
    }
    Ok(())
}

fn update(domain: &Domain, side: Side, now: &Element, wanted: &Element) -> CallResult<()> {
    if is_same(&sorted(now), &sorted(wanted)) {
        return Ok(());
    }
    send(domain, side, wanted)
}

fn send(domain: &Domain, side: Side, interface: &Element) -> CallResult<()> {
    let text = xml::element_text(interface).map_err(HypervisorError::from)?;
    Ok(domain.update_device_flags(&text, side.affects())?)
}

/// In one order: of an interface's children it says nothing.
fn sorted(interface: &Element) -> Element {
    let mut sorted = interface.clone();
    let name = |node: &xmltree::XMLNode| node.as_element().map(|e| e.name.clone());
    sorted.children.sort_by_key(name);
    sorted
}
