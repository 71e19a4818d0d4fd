//! The checks (invariant 8): pure functions from what was asked and what both
//! nodes found to every reason why it cannot be done. None of them stops at
//! the first failure; none of them asks anybody anything.
//!
//! [`request`] judges what the record alone can tell, [`source`] what the
//! source found, [`destination`] what a candidate found, [`path`] the way
//! between them. What a cold migration's disks need is in [`cold`], what starting
//! the guest of a dead node elsewhere needs in [`evacuation`], whether files that are
//! used there and not copied are the right ones in [`content`], all of a transfer to
//! another project in [`transfer`].

pub mod cold;
pub mod content;
pub mod evacuation;
pub mod transfer;

use drover_model::{
    api::compute::{CpuVerdict, DestinationFacts, DiskFact, NetworkFact, PathFacts, SourceFacts},
    check::{CheckCode, CheckFailure, Side},
    error::ErrorClass,
    guest::{
        Disk, DiskSource, Guest, Immovable, ImmovableKind, NicAttachment, PowerState, Presence,
    },
    ids::HostName,
    migration::{BlockMigration, LiveOptions, Migration, MigrationStatus, TransferMode, Way},
    node::{HypervisorReport, Inventory},
};
use drover_store::{StoreError, claims, instances::InstanceRow, nodes::NodeRow};

use crate::agent_client::AgentError;

/// How long without a report makes a node *down*, and the time now.
#[derive(Debug, Clone, Copy)]
pub struct Liveness {
    /// Longest silence, ms.
    pub down_after_ms: u64,
    /// Now, by the conductor's clock, milliseconds since 1970.
    pub now_ms: u64,
}

impl Liveness {
    /// Whether a node was heard from recently, and nobody declared it down.
    pub fn is_up(&self, node: &NodeRow) -> bool {
        self.silent_ms(node) <= self.down_after_ms && !node.forced_down
    }

    /// For how long a node has not been heard from, ms: as who listens measured
    /// it, and by the clock only if nobody listens in this process.
    pub fn silent_ms(&self, node: &NodeRow) -> u64 {
        let by_clock = || self.now_ms.saturating_sub(node.heard_at_ms);
        node.silent_ms.unwrap_or_else(by_clock)
    }
}

fn fail(
    code: CheckCode,
    side: Side,
    message: impl Into<String>,
    remedy: impl Into<String>,
) -> CheckFailure {
    CheckFailure {
        code,
        side,
        message: message.into(),
        remedy: remedy.into(),
    }
}

/// What the record alone can say about moving an instance, apart from what its
/// node says of its state.
pub fn request(instance: &InstanceRow, way: &Way, active: Option<&Migration>) -> Vec<CheckFailure> {
    let mut failures: Vec<CheckFailure> = way
        .problems()
        .into_iter()
        .map(|p| {
            fail(
                CheckCode::Options,
                Side::Request,
                p,
                "give a value within the bounds",
            )
        })
        .collect();
    if let Way::Live(options) = way
        && options.post_copy
        && options.parallel_connections.is_some()
    {
        failures.push(fail(
            CheckCode::Options,
            Side::Request,
            "post-copy and parallel streams exclude each other in this QEMU",
            "choose one of them",
        ));
    }
    failures.extend(active.map(busy));
    failures.extend(two_copies(instance));
    // Of a dead node's guest the definition is kept that was read before.
    if !matches!(way, Way::Evacuation(_)) {
        failures.extend(instance.unreadable.as_deref().map(|reason| {
            fail(
                CheckCode::InstanceUnreadable,
                Side::Instance,
                format!("it cannot be read on {}: {reason}", instance.host),
                format!("mend it on {}; the next report tells", instance.host),
            )
        }));
    }
    failures
}

/// Whether a copy of it is active elsewhere: then nothing is done with it.
pub fn two_copies(instance: &InstanceRow) -> Option<CheckFailure> {
    let other = instance.other_copy()?;
    let (here, there) = (&instance.host, &other.host);
    let message = match other.both_run {
        true => format!("two copies of it run, on {here} and on {there}"),
        false => format!("it is on the record on {here}, and a copy is active on {there}"),
    };
    Some(fail(
        CheckCode::TwoCopies,
        Side::Instance,
        message,
        "look with 'virsh list --all' on both, and stop the one that is not to run",
    ))
}

/// What its node's last report says against it. It may be old: where the node can
/// be asked now, what it says then counts.
pub fn recorded(instance: &InstanceRow, way: &Way) -> Option<CheckFailure> {
    if instance.missing_since_ms.is_none() {
        return state(instance.power_state, way);
    }
    if instance.is_lost() {
        return Some(lost(instance));
    }
    Some(fail(
        CheckCode::InstanceMissing,
        Side::Instance,
        format!("{} no longer lists it", instance.host),
        "look with 'virsh list --all' whether it was undefined or moved by hand",
    ))
}

/// What became of an instance whose node was installed anew, and what to do.
pub fn lost(instance: &InstanceRow) -> CheckFailure {
    let (host, id) = (&instance.host, instance.id);
    fail(
        CheckCode::InstanceMissing,
        Side::Instance,
        format!("{host} was installed anew, and does not have it"),
        format!(
            "define it on a node that has its disks, with what 'drover instance definition {id}' \
             prints; if it is gone for good: 'drover instance forget {id}'"
        ),
    )
}

fn busy(m: &Migration) -> CheckFailure {
    let name = &m.instance_name;
    let remedy = match m.status {
        MigrationStatus::Finished => format!(
            "end it with 'drover instance confirm {name}' or 'drover instance revert {name}'"
        ),
        _ => format!(
            "wait for it, or end it with 'drover migration abort {}'",
            m.id
        ),
    };
    fail(
        CheckCode::InstanceBusy,
        Side::Instance,
        format!(
            "migration {} ({}) of it is {} since before",
            m.id,
            m.way.migration_type(),
            m.status
        ),
        remedy,
    )
}

/// Whether its state allows this kind of move.
pub fn state(state: PowerState, way: &Way) -> Option<CheckFailure> {
    use PowerState as P;
    let no = |message: String, remedy: &str| {
        let message = message.to_lowercase();
        Some(fail(
            CheckCode::InstanceState,
            Side::Instance,
            message,
            remedy,
        ))
    };
    if let P::Other(word) = state {
        return Some(fail(
            CheckCode::Version,
            Side::Instance,
            format!(
                "its state '{}' is not known to this Drover ({})",
                word.as_str(),
                env!("CARGO_PKG_VERSION")
            ),
            "upgrade drover-conductor to the version of its node's agent",
        ));
    }
    match (way, state) {
        (Way::Live(_), P::Running | P::Paused) => None,
        (Way::Live(_), _) => no(
            format!("it is {state}; only a running or paused instance moves live"),
            "start it first, or move it cold",
        ),
        (Way::Transfer(transfer), _) => match transfer.options.mode {
            TransferMode::Cold => cold_state(state, transfer.options.force_stop_after_s),
            TransferMode::Live if state == P::Suspended => no(
                format!("it is {state}, and would not notice a new network"),
                "wake it first, or transfer it with --cold",
            ),
            TransferMode::Live => None,
        },
        (Way::Cold(options), _) => cold_state(state, options.force_stop_after_s),
        // Whatever its node said of it last, it runs there no more.
        (Way::Evacuation(_), _) => None,
    }
}

/// Whether a guest in that state can be had off.
fn cold_state(state: PowerState, force_stop_after_s: Option<u64>) -> Option<CheckFailure> {
    let obeys = !matches!(state, PowerState::Paused | PowerState::Suspended);
    (!obeys && force_stop_after_s.is_none()).then(|| {
        let message = format!("it is {state} and could not obey a request to shut down");
        fail(
            CheckCode::InstanceState,
            Side::Instance,
            message.to_lowercase(),
            "let it run on first, or allow it to be stopped hard",
        )
    })
}

/// What the record can say about a node as source or destination.
pub fn node(
    host: &HostName,
    row: Option<&NodeRow>,
    side: Side,
    live: Liveness,
) -> Vec<CheckFailure> {
    let Some(row) = row else {
        return vec![fail(
            CheckCode::UnknownHost,
            side,
            format!("no node called {host} has ever reported"),
            "see 'drover node list' for those that have",
        )];
    };
    let mut failures = Vec::new();
    let silent_ms = live.silent_ms(row);
    if row.forced_down {
        failures.push(fail(
            CheckCode::HostDown,
            side,
            format!("{host} was declared down by an operator"),
            format!("when it is well again, 'drover node force-down {host} --unset'"),
        ));
    } else if !live.is_up(row) {
        failures.push(fail(
            CheckCode::HostDown,
            side,
            format!(
                "{host} was last heard from {} s ago; after {} s it counts as down",
                silent_ms / 1000,
                live.down_after_ms / 1000
            ),
            format!("see whether drover-compute runs on {host} and reaches the broker"),
        ));
    }
    if let Some(mismatch) = &row.agent.mismatch {
        let (message, remedy) = (mismatch.message.clone(), mismatch.remedy.clone());
        failures.push(fail(CheckCode::Version, side, message, remedy));
    }
    if let HypervisorReport::Down { reason } = &row.report.hypervisor {
        failures.push(fail(
            CheckCode::LibvirtDown,
            side,
            format!("libvirt on {host} does not answer: {reason}"),
            format!("start libvirtd on {host}"),
        ));
    }
    if side == Side::Destination && !row.enabled {
        let reason = row.disabled_reason.as_deref().unwrap_or("no reason given");
        failures.push(fail(
            CheckCode::HostDisabled,
            side,
            format!("{host} is closed for new instances: {reason}"),
            format!("choose another node, or 'drover node enable {host}'"),
        ));
    }
    failures
}

/// The same without what stands in it twice: record and node may say the same.
pub fn once(failures: Vec<CheckFailure>) -> Vec<CheckFailure> {
    let mut seen: Vec<CheckFailure> = Vec::with_capacity(failures.len());
    for failure in failures {
        if !seen.contains(&failure) {
            seen.push(failure);
        }
    }
    seen
}

/// Source and destination must differ.
pub fn same_host(source: &HostName, dest: &HostName) -> Option<CheckFailure> {
    (source == dest).then(|| {
        fail(
            CheckCode::SameHost,
            Side::Request,
            format!("it runs on {source} already"),
            "name another node, or none to have one chosen",
        )
    })
}

/// The instance is under a migration that only a newer conductor understands.
pub fn of_newer(error: &StoreError) -> CheckFailure {
    fail(
        CheckCode::InstanceBusy,
        Side::Instance,
        format!("it is under a migration of a newer Drover: {error}"),
        "upgrade this conductor, or have a newer one end it",
    )
}

/// A node that does not answer a check, not so that it can be understood, or with the
/// word that another migration has the guest there.
pub fn unanswered(host: &HostName, side: Side, error: &AgentError) -> CheckFailure {
    if let Some(mismatch) = &error.mismatch {
        let (message, remedy) = (mismatch.message.clone(), mismatch.remedy.clone());
        return fail(CheckCode::Version, side, message, remedy);
    }
    if error.busy {
        return fail(
            CheckCode::InstanceBusy,
            side,
            error.message.clone(),
            format!("wait until that migration is ended, or tidied up after, on {host}"),
        );
    }
    let why = &error.message;
    let (message, remedy) = match error.class {
        ErrorClass::Refused => (
            format!("the agent on {host} cannot tell: {why}"),
            format!("mend that on {host}, and ask again"),
        ),
        _ => (
            format!("the agent on {host} did not answer: {why}"),
            format!("see whether drover-compute runs on {host} and reaches the broker and libvirt"),
        ),
    };
    fail(CheckCode::HostDown, side, message, remedy)
}

/// What the source found out about its guest.
pub fn source(facts: &SourceFacts, host: &HostName, way: &Way) -> Vec<CheckFailure> {
    let Some(guest) = &facts.guest else {
        return vec![fail(
            CheckCode::InstanceMissing,
            Side::Source,
            format!("libvirt on {host} has no such domain"),
            "it was moved or undefined by hand; the record follows with the next report",
        )];
    };
    let mut failures = Vec::new();
    failures.extend(state(guest.power_state, way));
    let is_cold = matches!(way, Way::Cold(_));
    if is_cold && !guest.persistent {
        failures.push(fail(
            CheckCode::InstanceState,
            Side::Instance,
            "its definition is transient and would be gone once it is off",
            "define it with 'virsh define'",
        ));
    }
    if let Some(job) = &guest.active_job {
        failures.push(fail(
            CheckCode::InstanceJob,
            Side::Source,
            format!("libvirt is busy with it: {job}"),
            "wait for that job, or end it with 'virsh domjobabort' or 'virsh blockjob --abort'",
        ));
    }
    let stays = |device: &&Immovable| !(is_cold && cold::can_leave(device.kind));
    failures.extend(guest.immovable.iter().filter(stays).map(|device| {
        fail(
            immovable_code(device.kind),
            Side::Instance,
            match device.kind {
                ImmovableKind::Disk => format!("disk {}: it cannot leave {host}", device.what),
                _ => format!("{} cannot leave {host}", device.what),
            },
            match device.kind {
                ImmovableKind::Disk => "mend that, move its data to another disk, or detach it",
                _ => "detach it first",
            },
        )
    }));
    // Internal ones are in the disks, and go with them if the guest is off.
    let blocking = match is_cold {
        true => &guest.external_snapshots,
        false => &guest.snapshots,
    };
    if !blocking.is_empty() {
        failures.push(fail(
            CheckCode::Snapshots,
            Side::Instance,
            format!(
                "libvirt keeps {} snapshot(s) of it, which do not move: {}",
                blocking.len(),
                blocking.join(", ")
            ),
            "delete them with 'virsh snapshot-delete'",
        ));
    }
    failures.extend(marks(facts, guest, is_cold));
    if is_cold {
        failures.extend(cold::tpm_state(guest, &facts.inventory, Side::Source, host));
    }
    failures
}

/// Directories of disks that are written and whose sharing cannot be tested: whether
/// to copy them cannot be told. Beside a block device nothing can be left; of a guest
/// that is off its bytes are compared instead.
fn marks<'a>(
    facts: &'a SourceFacts,
    guest: &'a Guest,
    is_cold: bool,
) -> impl Iterator<Item = CheckFailure> + 'a {
    let holds_files = move |directory: &str| {
        let written = guest.disks.iter().filter(|disk| !disk.read_only);
        let paths = written.filter_map(|disk| match &disk.source {
            DiskSource::File { path } => path.rsplit_once('/'),
            DiskSource::Block { path } if !is_cold => path.rsplit_once('/'),
            _ => None,
        });
        let mut directories = paths.map(|(directory, _)| directory);
        directories.any(|d| d == directory.trim_end_matches('/'))
    };
    facts.marks.iter().filter_map(move |mark| {
        let error = mark.error.as_ref()?;
        if !holds_files(&mark.directory) {
            return None;
        }
        Some(fail(
            CheckCode::DiskDirectory,
            Side::Source,
            format!(
                "whether {} is shared cannot be tested: {error}",
                mark.directory
            ),
            "make the directory writable for the agent",
        ))
    })
}

fn immovable_code(kind: ImmovableKind) -> CheckCode {
    match kind {
        ImmovableKind::HostDevice => CheckCode::HostDevice,
        ImmovableKind::MediatedDevice => CheckCode::MediatedDevice,
        ImmovableKind::Filesystem => CheckCode::Filesystem,
        ImmovableKind::Disk => CheckCode::DiskNotCopyable,
        ImmovableKind::Tpm
        | ImmovableKind::EmulatedTpm
        | ImmovableKind::Nvdimm
        | ImmovableKind::LaunchSecurity
        | ImmovableKind::Interface
        | ImmovableKind::CharacterDevice => CheckCode::ImmovableDevice,
    }
}

/// What a destination found out about a guest to come.
pub fn destination(
    guest: &Guest,
    source: &Inventory,
    facts: &DestinationFacts,
    host: &HostName,
    way: &Way,
) -> Vec<CheckFailure> {
    let mut failures = Vec::new();
    failures.extend(hypervisor_type(source, &facts.inventory, host));
    if let Way::Live(_) = way {
        failures.extend(versions(source, &facts.inventory, host));
    }
    failures.extend(machine(guest, facts, host));
    failures.extend(
        facts
            .networks
            .iter()
            .filter(|n| !n.present)
            .map(|n| network(n, host)),
    );
    failures.extend(names(guest, facts, host));
    failures.extend(content::addresses(&facts.addresses, host));
    match way {
        Way::Cold(_) => failures.extend(cold::destination(guest, facts, host)),
        // It has no destination.
        Way::Transfer(_) => {}
        // What it needs of one is judged apart.
        Way::Evacuation(_) => {}
        Way::Live(options) => {
            failures.extend(disks(guest, &facts.disks, options, host));
            failures.extend(written_beside(guest, facts, host));
            failures.extend(ports(facts, host));
        }
    }
    failures
}

/// What the destination says of libvirt's way from and to it.
fn ports(facts: &DestinationFacts, host: &HostName) -> Vec<CheckFailure> {
    let mut failures = Vec::new();
    if let Err(error) = &facts.reach_source {
        failures.push(fail(
            CheckCode::LibvirtUnreachable,
            Side::Path,
            format!("{host} cannot reach the source's libvirt: {error}"),
            "open the port between the nodes, and see that libvirtd listens on the migration network",
        ));
    }
    if let Err(error) = &facts.probe_port {
        failures.push(fail(
            CheckCode::MigrationPortUnreachable,
            Side::Destination,
            format!("{host} can open none of its migration ports: {error}"),
            "free a port of the range, or widen it",
        ));
    }
    failures
}

fn hypervisor_type(source: &Inventory, dest: &Inventory, host: &HostName) -> Option<CheckFailure> {
    let (here, there) = (&source.hypervisor_type, &dest.hypervisor_type);
    (here != there).then(|| {
        fail(
            CheckCode::HypervisorType,
            Side::Destination,
            format!("the source runs {here}, {host} runs {there}"),
            "choose a node with the same hypervisor",
        )
    })
}

/// A guest's memory and devices are read only by what is as new as their writer.
fn versions(source: &Inventory, dest: &Inventory, host: &HostName) -> Vec<CheckFailure> {
    let order = [
        (
            "hypervisor",
            source.hypervisor_version,
            dest.hypervisor_version,
        ),
        ("libvirt", source.libvirt_version, dest.libvirt_version),
    ];
    let older = order.into_iter().filter(|(_, here, there)| here > there);
    let failures = older.map(|(what, here, there)| {
        fail(
            CheckCode::HypervisorVersion,
            Side::Destination,
            format!(
                "the source has {what} {}, {host} has the older {}",
                version(here),
                version(there)
            ),
            "upgrade the destination first, or choose a node that is as new",
        )
    });
    failures.collect()
}

/// libvirt's version number as people write it.
pub fn version(number: u64) -> String {
    format!(
        "{}.{}.{}",
        number / 1_000_000,
        number / 1000 % 1000,
        number % 1000
    )
}

fn machine(guest: &Guest, facts: &DestinationFacts, host: &HostName) -> Vec<CheckFailure> {
    let mut failures = Vec::new();
    let mut add = |code, message: String, remedy: &str| {
        failures.push(fail(code, Side::Destination, message, remedy));
    };
    if facts.inventory.arch != guest.arch {
        add(
            CheckCode::Architecture,
            format!(
                "the guest is {}, {host} is {}",
                guest.arch, facts.inventory.arch
            ),
            "choose a node of the guest's architecture",
        );
    }
    if !facts.virt_type_supported {
        add(
            CheckCode::VirtType,
            format!("{host} cannot run guests of type '{}'", guest.virt_type),
            "load KVM there, or choose another node",
        );
    }
    if !facts.emulator_present {
        add(
            CheckCode::Emulator,
            format!("{host} has no emulator {}", guest.emulator),
            "install the same QEMU package there",
        );
    } else if !facts.machine_supported {
        add(
            CheckCode::MachineType,
            format!(
                "QEMU on {host} does not know machine type {}",
                guest.machine
            ),
            "upgrade QEMU there, or choose another node",
        );
    }
    if let CpuVerdict::Incompatible { detail } = &facts.cpu {
        add(
            CheckCode::Cpu,
            format!("the CPU of {host} lacks what the guest uses: {detail}"),
            "choose a node with the same or a newer CPU, or give the guest a baseline model",
        );
    }
    failures
}

fn network(fact: &NetworkFact, host: &HostName) -> CheckFailure {
    let (what, remedy) = match &fact.attachment {
        NicAttachment::Bridge { bridge } => (
            format!("bridge {bridge}"),
            format!("make the bridge on {host} and connect it to the same network"),
        ),
        NicAttachment::Network { network } => (
            format!("active libvirt network {network}"),
            format!("define it there and 'virsh net-start {network}'"),
        ),
        NicAttachment::Direct { device } => (
            format!("interface {device}"),
            "choose a node that has it".to_owned(),
        ),
        NicAttachment::User => (
            "user-mode network".to_owned(),
            "upgrade QEMU there".to_owned(),
        ),
        NicAttachment::Other { kind } => (
            format!("network of type {kind}"),
            "plug the NIC into a bridge or a libvirt network".to_owned(),
        ),
    };
    fail(
        CheckCode::Network,
        Side::Destination,
        format!(
            "{host} has no {what}, which NIC {} is plugged into",
            fact.mac
        ),
        remedy,
    )
}

fn names(guest: &Guest, facts: &DestinationFacts, host: &HostName) -> Vec<CheckFailure> {
    let mut failures = Vec::new();
    if facts.same_uuid != Presence::Absent {
        failures.push(fail(
            CheckCode::UuidTaken,
            Side::Destination,
            format!("{host} already has a domain with UUID {}", guest.id),
            "see with 'virsh dominfo' what it is; undefine it if it is a left-over",
        ));
    }
    if let Some(other) = facts.same_name {
        failures.push(fail(
            CheckCode::NameTaken,
            Side::Destination,
            format!(
                "{host} already has another domain called '{}' ({other})",
                guest.name
            ),
            "rename one of them with 'virsh domrename'",
        ));
    }
    failures
}

fn disks(
    guest: &Guest,
    facts: &[DiskFact],
    options: &LiveOptions,
    host: &HostName,
) -> Vec<CheckFailure> {
    let mut failures = Vec::new();
    for disk in &guest.disks {
        failures.extend(unmovable_kind(disk));
        let fact = facts.iter().find(|f| f.target == disk.target);
        if let (Some(path), Some(fact)) = (disk.local_path(), fact) {
            // Those of which libvirt knows are named already.
            let holds_others =
                guest.snapshots.is_empty() && guest.images_with_snapshots.iter().any(|p| p == path);
            if holds_others && !fact.shared && disk.is_copied_when_local() {
                failures.push(snapshots_inside(&disk.target, path));
            }
            failures.extend(local_disk(disk, path, fact, options, host));
        }
    }
    failures.extend(disk_space(guest, facts, host));
    failures
}

/// Firmware variables and a TPM's state are written where the guest arrives, over
/// whatever lies there: another guest's are not.
fn written_beside(guest: &Guest, facts: &DestinationFacts, host: &HostName) -> Vec<CheckFailure> {
    let used = guest.files.iter().filter(|file| {
        let mut there = facts.files.iter();
        there.any(|fact| fact.path == file.path && fact.in_use)
    });
    let refused = used.map(|file| {
        fail(
            CheckCode::DiskExists,
            Side::Destination,
            format!(
                "another guest of {host} uses {}, which this one would write",
                file.path
            ),
            "give one of them another file",
        )
    });
    refused.collect()
}

fn unmovable_kind(disk: &Disk) -> Option<CheckFailure> {
    let DiskSource::Other { kind } = &disk.source else {
        return None;
    };
    Some(fail(
        CheckCode::DiskNotCopyable,
        Side::Instance,
        format!(
            "disk {} is of type {kind}, which cannot be moved",
            disk.target
        ),
        "move its data to an image file or a network disk",
    ))
}

/// A block device is not made: it has to be there.
fn device(disk: &Disk, path: &str, fact: &DiskFact, host: &HostName) -> Option<CheckFailure> {
    (!fact.exists).then(|| {
        fail(
            CheckCode::DiskNotCopyable,
            Side::Destination,
            format!(
                "disk {} is block device {path}, and {host} has no such device",
                disk.target
            ),
            "make a device of that path and at least its size there",
        )
    })
}

/// What a guest sees of its disk is copied, and no more.
fn snapshots_inside(target: &str, path: &str) -> CheckFailure {
    fail(
        CheckCode::Snapshots,
        Side::Instance,
        format!(
            "disk {target} ({path}) holds snapshots inside, which would be left behind and removed"
        ),
        "migrate it cold, or delete them ('qemu-img snapshot -l' lists them)",
    )
}

/// Where a disk is to be copied to there has to be a directory, and no file.
fn place_of_copy(
    what: &str,
    path: &str,
    (exists, directory_exists): (bool, bool),
    host: &HostName,
) -> Vec<CheckFailure> {
    let mut failures = Vec::new();
    if !directory_exists {
        failures.push(fail(
            CheckCode::DiskDirectory,
            Side::Destination,
            format!("{host} has no directory for {what} ({path})"),
            "make the directory there",
        ));
    }
    if exists {
        failures.push(fail(
            CheckCode::DiskExists,
            Side::Destination,
            format!("{host} already has a file {path}, where {what} would be copied to"),
            "see whether it is a left-over; move it away",
        ));
    }
    failures
}

fn local_disk(
    disk: &Disk,
    path: &str,
    fact: &DiskFact,
    options: &LiveOptions,
    host: &HostName,
) -> Vec<CheckFailure> {
    let mut failures = Vec::new();
    let target = &disk.target;
    let mut add = |code, side, message: String, remedy: &str| {
        failures.push(fail(code, side, message, remedy));
    };
    if fact.shared {
        if options.block_migration == BlockMigration::Yes && disk.is_copied_when_local() {
            add(
                CheckCode::DiskShared,
                Side::Request,
                format!("copying was demanded, and disk {target} ({path}) is shared by both nodes"),
                "leave block migration on auto",
            );
        }
        if !disk.is_coherent_when_shared() {
            let cache = disk.cache.as_deref().unwrap_or("default");
            add(
                CheckCode::DiskCache,
                Side::Instance,
                format!(
                    "shared disk {target} has cache mode '{cache}': the nodes could see different bytes"
                ),
                "set its driver's cache to 'none' or 'directsync'",
            );
        }
        return failures;
    }
    if !disk.is_copied_when_local() {
        return failures;
    }
    if options.block_migration == BlockMigration::No {
        add(
            CheckCode::DiskNotShared,
            Side::Path,
            format!("copying was forbidden, and disk {target} ({path}) is not shared with {host}"),
            "leave block migration on auto, or choose a node that shares the storage",
        );
    }
    if matches!(disk.source, DiskSource::Block { .. }) {
        failures.extend(device(disk, path, fact, host));
        return failures;
    }
    let there = (fact.exists, fact.directory_exists);
    failures.extend(place_of_copy(&format!("disk {target}"), path, there, host));
    failures
}

/// Room for everything that is copied, per file system: disks that lie on one
/// share its room.
fn disk_space(guest: &Guest, facts: &[DiskFact], host: &HostName) -> Vec<CheckFailure> {
    let files = copied(guest, facts).into_iter().filter_map(|disk| {
        let fact = facts.iter().find(|f| f.target == disk.target)?;
        let is_device = matches!(disk.source, DiskSource::Block { .. });
        let place = (fact.file_system.as_str(), fact.free_bytes);
        // A directory that is not there is named apart.
        let is_made = !is_device && fact.directory_exists;
        is_made.then_some((place, disk.allocated_bytes))
    });
    space(files, host)
}

/// Room for files, each with its file system, that one's free bytes, and its own.
fn space<'a>(
    files: impl Iterator<Item = ((&'a str, u64), u64)>,
    host: &HostName,
) -> Vec<CheckFailure> {
    let mut wanted: Vec<(&str, u64, u64)> = Vec::new();
    for ((file_system, free), bytes) in files {
        match wanted.iter_mut().find(|(fs, ..)| *fs == file_system) {
            Some((_, sum, _)) => *sum = sum.saturating_add(bytes),
            None => wanted.push((file_system, bytes, free)),
        }
    }
    wanted
        .into_iter()
        .filter(|(_, bytes, free)| bytes > free)
        .map(|(fs, bytes, free)| {
            fail(
                CheckCode::DiskSpace,
                Side::Destination,
                format!(
                    "the disks need {} MiB on {host}, {} MiB are free on {fs}",
                    bytes >> 20,
                    free >> 20
                ),
                "make room there, or choose another node",
            )
        })
        .collect()
}

/// The disks whose bytes a migration must carry.
pub fn copied<'a>(guest: &'a Guest, facts: &[DiskFact]) -> Vec<&'a Disk> {
    let is_shared = |d: &Disk| facts.iter().any(|f| f.target == d.target && f.shared);
    let copied = guest
        .disks
        .iter()
        .filter(|d| d.is_copied_when_local() && !is_shared(d));
    copied.collect()
}

/// The writable disks that both nodes were seen to share.
pub fn shared<'a>(guest: &'a Guest, facts: &[DiskFact]) -> Vec<&'a Disk> {
    let is_shared = |d: &Disk| facts.iter().any(|f| f.target == d.target && f.shared);
    let shared = guest
        .disks
        .iter()
        .filter(|d| d.local_path().is_some() && is_shared(d));
    shared.collect()
}

/// The way from source to destination.
pub fn path(facts: &PathFacts, source: &HostName, dest: &HostName, way: &Way) -> Vec<CheckFailure> {
    let mut failures = Vec::new();
    if matches!(way, Way::Cold(_)) {
        failures.extend(cold::path(facts, source, dest));
        return failures;
    }
    if let Err(error) = &facts.libvirt {
        failures.push(fail(
            CheckCode::LibvirtUnreachable,
            Side::Path,
            format!("{source} cannot reach libvirt on {dest}: {error}"),
            "open the port between the nodes, and see that libvirtd listens on the migration network",
        ));
    }
    if let Err(error) = &facts.migration_port {
        failures.push(fail(
            CheckCode::MigrationPortUnreachable,
            Side::Path,
            format!("{source} cannot reach a migration port of {dest}: {error}"),
            "open the migration ports between the nodes (migration_port_min to migration_port_max of [compute], 49152 to 49215 by default)",
        ));
    }
    failures
}

/// Room for the guest itself, counting claims under way.
pub fn room(short: &[claims::Shortfall], host: &HostName) -> Vec<CheckFailure> {
    let one = |s: &claims::Shortfall| {
        let (code, unit, scale) = match s.kind {
            claims::Kind::Vcpus => (CheckCode::Vcpus, "vCPUs", 0),
            claims::Kind::Memory => (CheckCode::Memory, "MiB of memory", 0),
            claims::Kind::Disk => (CheckCode::DiskSpace, "MiB of disk", 20),
        };
        let shown = |amount: u64| amount >> scale;
        fail(
            code,
            Side::Destination,
            format!(
                "it needs {} {unit}; of {} on {host}, {} are used or promised",
                shown(s.wanted),
                shown(s.usable),
                shown(s.used)
            ),
            "choose another node, or make room there",
        )
    };
    short.iter().map(one).collect()
}

#[cfg(test)]
#[path = "checks/cold_tests.rs"]
mod cold_tests;
#[cfg(test)]
#[path = "checks/evacuation_tests.rs"]
mod evacuation_tests;
#[cfg(test)]
#[path = "checks_tests.rs"]
mod tests;
#[cfg(test)]
#[path = "checks/transfer_tests.rs"]
mod transfer_tests;
