//! The checks of an evacuation: whether its node is still dead, whether a guest
//! can be defined from what its node told last, and whether another node sees
//! its disks.

use drover_model::{
    api::compute::{DiskFact, EvacuationFacts, KeptDefinition},
    check::{CheckCode, CheckFailure, Side},
    guest::{Disk, Immovable},
    ids::HostName,
    migration::ProofOfDeath,
    node::HypervisorReport,
    operation::FenceAnswer,
};
use drover_store::{
    definitions::DefinitionRow,
    instances::InstanceRow,
    nodes::{NodeRow, ReportPlace},
};

use super::{
    Liveness, cold, content, fail, immovable_code, machine, names, network, unmovable_kind,
};

/// The node that guests leave without its doing: it must be dead still. One that
/// was heard of after the proof was given has come back, and the proof is void.
pub fn evacuated_node(
    host: &HostName,
    row: Option<&NodeRow>,
    proof: &ProofOfDeath,
    live: Liveness,
) -> Option<CheckFailure> {
    let Some(row) = row else {
        return Some(fail(
            CheckCode::UnknownHost,
            Side::Source,
            format!("no node called {host} has ever reported"),
            "see 'drover node list' for those that have",
        ));
    };
    let heard_since = match (proof.life(), row.agent.life) {
        (Some(before), Some(now)) => now > before,
        _ => row.heard_at_ms > proof.at_ms(),
    };
    let back = live.is_up(row) || heard_since;
    back.then(|| {
        fail(
            CheckCode::HostAlive,
            Side::Source,
            format!("{host} was heard of since it was proven off"),
            format!(
                "see what it runs; empty it with 'drover node drain {host}', or evacuate it anew"
            ),
        )
    })
}

/// The node was off, and its fencing agent says that it is on. One that does not
/// say takes nothing from the proof.
pub fn has_power(host: &HostName, status: &FenceAnswer) -> Option<CheckFailure> {
    let FenceAnswer::On { agent } = status else {
        return None;
    };
    Some(fail(
        CheckCode::HostAlive,
        Side::Source,
        format!("{host} has power again, says {agent}: it may start its guests itself"),
        format!("see what it runs; if it is to stay off, switch it off and evacuate {host} anew"),
    ))
}

/// The digest of a guest's definition as its node told it last, if it did: its last report
/// may be older than what is kept, and than the move that brought the guest there.
pub fn last_digest<'a>(
    node: &'a NodeRow,
    instance: &InstanceRow,
    kept: Option<&'a DefinitionRow>,
) -> Option<&'a str> {
    let last = ReportPlace::from(&node.report);
    if let Some(kept) = kept.filter(|kept| kept.after == Some(last)) {
        return Some(kept.kept.digest.as_str()).filter(|digest| !digest.is_empty());
    }
    let HypervisorReport::Up { instances, .. } = &node.report.hypervisor else {
        return None;
    };
    let host = &node.report.host;
    if *host != instance.host || instance.awaited.contains(host) {
        return None;
    }
    let mut listed = instances.iter().filter(|seen| !seen.incoming);
    let seen = listed.find(|seen| seen.id == instance.id)?;
    seen.definition_digest.as_deref()
}

/// Whether a guest may have been changed since what is kept of it was told, in words.
pub fn doubt(kept: &DefinitionRow, last_digest: Option<&str>) -> Option<String> {
    let is_compared = last_digest.is_some() && !kept.kept.digest.is_empty();
    (!is_compared).then(|| {
        let host = &kept.host;
        format!("whether its definition was changed since {host} told it is not known")
    })
}

/// What stands in the way of starting a guest from what its node told of it, given the
/// digest in its node's last report.
pub fn definition(
    host: &HostName,
    kept: Option<&DefinitionRow>,
    last_digest: Option<&str>,
) -> Vec<CheckFailure> {
    let Some(row) = kept else {
        return vec![fail(
            CheckCode::NoDefinition,
            Side::Instance,
            format!("{host} never told how it is defined"),
            "define it by hand on a node that has its disks, once its own is off for good",
        )];
    };
    let mut failures: Vec<_> = outdated(host, row, last_digest).into_iter().collect();
    if row.kept.has_secrets {
        failures.push(fail(
            CheckCode::DefinitionSecret,
            Side::Instance,
            "its display has a password, which is told to nobody",
            "define and start it by hand, once its own node is off for good",
        ));
    }
    let guest = &row.kept.guest;
    let stays = |device: &&Immovable| !cold::can_leave(device.kind);
    failures.extend(guest.immovable.iter().filter(stays).map(|device| {
        fail(
            immovable_code(device.kind),
            Side::Instance,
            format!("{} is {host}'s own", device.what),
            "start it by hand without that, or mend its node",
        )
    }));
    failures.extend(guest.disks.iter().filter_map(unmovable_kind));
    failures
}

/// What is kept of a guest is not how it was in the end. One that is kept with files
/// still unread has no digest, and is not known to be.
fn outdated(
    host: &HostName,
    row: &DefinitionRow,
    last_digest: Option<&str>,
) -> Option<CheckFailure> {
    let told = row.kept.digest.as_str();
    let is_another = !told.is_empty() && last_digest.is_some_and(|last| last != told);
    let (message, remedy) = match (row.host == *host, is_another) {
        (false, _) => (
            format!("its definition is from {}, where it was before", row.host),
            "define it by hand on a node that has its disks, once its own is off for good"
                .to_owned(),
        ),
        (true, true) => (
            format!("it, or a file that it uses, was changed on {host} after it was told how"),
            format!(
                "once {host} is off for good, define it by hand on a node that has its disks: as it \
                 is in /etc/libvirt/qemu on {host}'s disk, or as 'drover instance definition {}' \
                 prints it, if what was changed does not matter",
                row.kept.instance
            ),
        ),
        (true, false) => return None,
    };
    Some(fail(
        CheckCode::NoDefinition,
        Side::Instance,
        message,
        remedy,
    ))
}

/// What a node that may be a guest's new home stands in the way with. Files that are
/// only read are judged apart ([`content`]).
pub fn destination(
    kept: &KeptDefinition,
    facts: &EvacuationFacts,
    host: &HostName,
) -> Vec<CheckFailure> {
    let guest = &kept.guest;
    let seen = &facts.destination;
    let mut failures = machine(guest, seen, host);
    let missing = seen.networks.iter().filter(|n| !n.present);
    failures.extend(missing.map(|n| network(n, host)));
    failures.extend(names(guest, seen, host));
    for disk in &guest.disks {
        failures.extend(not_shared(disk, fact_of(disk, facts), host));
    }
    failures.extend(content::addresses(&seen.addresses, host));
    failures.extend(facts.foreign_files.iter().map(|file| {
        fail(
            CheckCode::DiskNotShared,
            Side::Destination,
            format!("{host} does not see the same file: {file}"),
            "choose a node that shares the storage",
        )
    }));
    failures
}

fn fact_of<'a>(disk: &Disk, facts: &'a EvacuationFacts) -> Option<&'a DiskFact> {
    let mut facts = facts.destination.disks.iter();
    facts.find(|f| f.target == disk.target)
}

/// Whether a disk must be the very same file on both nodes. One that cannot be
/// written may be a copy of equal content.
fn must_be_shared(disk: &Disk) -> bool {
    disk.local_path().is_some() && !disk.read_only
}

fn not_shared(disk: &Disk, fact: Option<&DiskFact>, host: &HostName) -> Option<CheckFailure> {
    let path = disk.local_path()?;
    let shared = fact.is_some_and(|f| f.shared);
    (must_be_shared(disk) && !shared).then(|| {
        fail(
            CheckCode::DiskNotShared,
            Side::Destination,
            format!("disk {} ({path}) is not shared with {host}", disk.target),
            "choose a node that shares the storage",
        )
    })
}

/// Disks that no node which answered shares: they are lost with theirs, or wait
/// for it, and nothing is made in their stead.
pub fn alone(
    kept: &KeptDefinition,
    answers: &[EvacuationFacts],
    host: &HostName,
) -> Vec<CheckFailure> {
    if answers.is_empty() {
        return Vec::new();
    }
    let nowhere = |disk: &&Disk| {
        let shared = |facts: &EvacuationFacts| fact_of(disk, facts).is_some_and(|f| f.shared);
        must_be_shared(disk) && !answers.iter().any(shared)
    };
    let disks = kept.guest.disks.iter().filter(nowhere);
    disks
        .filter_map(|disk| {
            let path = disk.local_path()?;
            let told = kept.identities.iter().find(|i| i.path == path);
            let why = told
                .and_then(|i| i.error.as_ref())
                .map_or(String::new(), |e| format!(" (it could not be marked: {e})"));
            Some(fail(
                CheckCode::DiskNotShared,
                Side::Instance,
                format!(
                    "its disk {} ({path}) is on {host} alone{why}: not rebuilt",
                    disk.target
                ),
                "mend the node, or restore the disk from a backup and define the guest by hand",
            ))
        })
        .collect()
}
