//! Each check has a case that makes it fail, and it alone.

use drover_model::{
    guest::{BackingImage, DiskSource, Immovable, Nic},
    ids::InstanceId,
    node::{AllocationPolicy, Endpoint, NodeReport},
};
use drover_store::{claims::Shortfall, hearing::AgentState};
use uuid::Uuid;

use super::*;

const LIVE: Liveness = Liveness {
    down_after_ms: 30_000,
    now_ms: 1_000_000,
};

pub(super) fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

pub(super) fn inventory() -> Inventory {
    Inventory {
        hypervisor_type: "QEMU".into(),
        hypervisor_version: 7_002_000,
        libvirt_version: 9_000_000,
        arch: "x86_64".into(),
        cpu_model: "qemu64".into(),
        kvm: false,
        vcpus: 2,
        memory_mib: 4096,
        disk_bytes: 100 << 30,
        disk_free_bytes: 50 << 30,
    }
}

pub(super) fn disk(target: &str, path: &str) -> Disk {
    Disk {
        target: target.into(),
        device: "disk".into(),
        source: DiskSource::File { path: path.into() },
        format: "qcow2".into(),
        cache: Some("none".into()),
        read_only: false,
        shareable: false,
        virtual_bytes: 1 << 30,
        allocated_bytes: 1 << 20,
        backing: vec![BackingImage {
            path: "/images/base.qcow2".into(),
            format: "qcow2".into(),
            allocated_bytes: 0,
        }],
    }
}

pub(super) fn guest() -> Guest {
    Guest {
        id: InstanceId(Uuid::from_u128(7)),
        name: "vm1".into(),
        project: "demo".into(),
        generation: 0,
        power_state: PowerState::Running,
        persistent: true,
        vcpus: 1,
        memory_mib: 128,
        virt_type: "qemu".into(),
        arch: "x86_64".into(),
        machine: "pc-q35-7.2".into(),
        emulator: "/usr/bin/qemu-system-x86_64".into(),
        cpu_xml: None,
        disks: vec![disk("vda", "/images/vm1.qcow2")],
        nics: vec![Nic {
            mac: "52:54:00:00:00:01".into(),
            attachment: NicAttachment::Bridge {
                bridge: "br0".into(),
            },
            port: None,
        }],
        immovable: vec![],
        files: vec![],
        reads: vec![],
        bound: vec![],
        external_snapshots: vec![],
        images_with_snapshots: vec![],
        tpm_goes_with_definition: false,
        snapshots: vec![],
        active_job: None,
    }
}

pub(super) fn source_facts() -> SourceFacts {
    SourceFacts {
        guest: Some(guest()),
        marks: vec![],
        inventory: inventory(),
        contents: vec![],
    }
}

pub(super) fn disk_fact() -> DiskFact {
    DiskFact {
        target: "vda".into(),
        shared: false,
        exists: false,
        directory_exists: true,
        file_system: "/images".into(),
        free_bytes: 10 << 30,
        missing_backing: vec![],
    }
}

pub(super) fn destination_facts() -> DestinationFacts {
    DestinationFacts {
        inventory: inventory(),
        emulator_present: true,
        machine_supported: true,
        virt_type_supported: true,
        cpu: CpuVerdict::Compatible,
        networks: vec![NetworkFact {
            mac: "52:54:00:00:00:01".into(),
            attachment: NicAttachment::Bridge {
                bridge: "br0".into(),
            },
            present: true,
        }],
        same_uuid: Presence::Absent,
        same_name: None,
        disks: vec![disk_fact()],
        files: vec![],
        contents: vec![],
        addresses: vec![],
        disk_port: Ok(49215),
        reach_source: Ok(()),
        probe_port: Ok(49152),
    }
}

pub(super) fn instance() -> InstanceRow {
    InstanceRow {
        id: guest().id,
        name: "vm1".into(),
        project: "demo".into(),
        host: host("kvm1"),
        power_state: PowerState::Running,
        vcpus: 1,
        memory_mib: 128,
        disk_bytes: 1 << 20,
        generation: 0,
        changed_at_ms: 0,
        missing_since_ms: None,
        missing_reports: 0,
        node_is_new: false,
        unreadable: None,
        other: None,
        awaited: Vec::new(),
    }
}

fn node_row(name: &str) -> NodeRow {
    NodeRow {
        report: NodeReport {
            host: host(name),
            agent_version: "0.1.0".into(),
            agent_started_ms: 1,
            incarnation: 0,
            sequence: 1,
            clock_ms: 1_000_000,
            endpoint: Endpoint {
                address: "192.0.2.1".into(),
                libvirt_uri: "qemu+tcp://192.0.2.1/system".into(),
                libvirt_port: 16509,
            },
            policy: AllocationPolicy::default(),
            hypervisor: HypervisorReport::Up {
                inventory: inventory(),
                instances: vec![],
            },
        },
        heard_at_ms: 999_000,
        enabled: true,
        disabled_reason: None,
        forced_down: false,
        silent_ms: None,
        agent: AgentState::default(),
    }
}

pub(super) fn codes(failures: &[CheckFailure]) -> Vec<CheckCode> {
    for failure in failures {
        assert!(
            !failure.message.is_empty() && !failure.remedy.is_empty(),
            "{failure:?}"
        );
    }
    failures.iter().map(|f| f.code).collect()
}

#[test]
fn a_sound_move_passes() {
    assert!(request(&instance(), &Way::default(), None).is_empty());
    assert!(
        node(
            &host("kvm2"),
            Some(&node_row("kvm2")),
            Side::Destination,
            LIVE
        )
        .is_empty()
    );
    assert!(same_host(&host("kvm1"), &host("kvm2")).is_none());
    assert!(source(&source_facts(), &host("kvm1"), &Way::default()).is_empty());
    assert_eq!(at_destination(|_, _, _| {}), []);
    let reached = PathFacts {
        libvirt: Ok(()),
        migration_port: Ok(()),
        disk_port: Ok(()),
    };
    assert!(path(&reached, &host("kvm1"), &host("kvm2"), &Way::default()).is_empty());
}

#[test]
fn the_record_refuses() {
    let of = |change: fn(&mut InstanceRow, &mut LiveOptions)| {
        let (mut row, mut options) = (instance(), LiveOptions::default());
        change(&mut row, &mut options);
        codes(&request(&row, &Way::Live(options), None))
    };
    assert_eq!(
        of(|r, _| r.unreadable = Some("its XML".into())),
        [CheckCode::InstanceUnreadable]
    );
    assert_eq!(of(|_, o| o.max_downtime_ms = Some(0)), [CheckCode::Options]);
    let both = of(|_, o| {
        o.post_copy = true;
        o.parallel_connections = Some(4);
    });
    assert_eq!(both, [CheckCode::Options]);
    let busy = request(
        &instance(),
        &Way::default(),
        Some(&crate::tests_support::migration()),
    );
    assert_eq!(codes(&busy), [CheckCode::InstanceBusy]);
}

#[test]
fn a_node_refuses() {
    let of = |side, change: fn(&mut NodeRow)| {
        let mut row = node_row("kvm2");
        change(&mut row);
        codes(&node(&host("kvm2"), Some(&row), side, LIVE))
    };
    assert_eq!(
        codes(&node(&host("x"), None, Side::Destination, LIVE)),
        [CheckCode::UnknownHost]
    );
    assert_eq!(
        of(Side::Source, |r| r.heard_at_ms = 0),
        [CheckCode::HostDown]
    );
    let closed = |r: &mut NodeRow| r.enabled = false;
    assert_eq!(of(Side::Destination, closed), [CheckCode::HostDisabled]);
    assert_eq!(of(Side::Source, closed), [], "a closed node may be left");
    let down = |r: &mut NodeRow| {
        r.report.hypervisor = HypervisorReport::Down {
            reason: "refused".into(),
        };
    };
    assert_eq!(of(Side::Destination, down), [CheckCode::LibvirtDown]);
    let same = same_host(&host("kvm1"), &host("kvm1"));
    assert_eq!(same.map(|f| f.code), Some(CheckCode::SameHost));
}

#[test]
fn the_source_refuses() {
    let of = |change: fn(&mut Guest)| {
        let mut facts = source_facts();
        change(facts.guest.as_mut().unwrap());
        codes(&source(&facts, &host("kvm1"), &Way::default()))
    };
    let gone = SourceFacts {
        guest: None,
        ..source_facts()
    };
    assert_eq!(
        codes(&source(&gone, &host("kvm1"), &Way::default())),
        [CheckCode::InstanceMissing]
    );
    assert_eq!(
        of(|g| g.power_state = PowerState::Shutdown),
        [CheckCode::InstanceState]
    );
    assert_eq!(
        of(|g| g.active_job = Some("backup".into())),
        [CheckCode::InstanceJob]
    );
    assert_eq!(
        of(|g| g.snapshots = vec!["s1".into()]),
        [CheckCode::Snapshots]
    );
    let mut unmarked = source_facts();
    unmarked.marks = vec![drover_model::api::compute::Mark {
        directory: "/images".into(),
        path: None,
        content: String::new(),
        error: Some("read-only file system".into()),
    }];
    assert_eq!(
        codes(&source(&unmarked, &host("kvm1"), &Way::default())),
        [CheckCode::DiskDirectory]
    );
}

#[test]
fn what_cannot_move_is_named_one_by_one() {
    let kinds = [
        (ImmovableKind::HostDevice, CheckCode::HostDevice),
        (ImmovableKind::MediatedDevice, CheckCode::MediatedDevice),
        (ImmovableKind::Filesystem, CheckCode::Filesystem),
        (ImmovableKind::Disk, CheckCode::DiskNotCopyable),
        (ImmovableKind::Tpm, CheckCode::ImmovableDevice),
        (ImmovableKind::Nvdimm, CheckCode::ImmovableDevice),
        (ImmovableKind::LaunchSecurity, CheckCode::ImmovableDevice),
        (ImmovableKind::Interface, CheckCode::ImmovableDevice),
        (ImmovableKind::CharacterDevice, CheckCode::ImmovableDevice),
    ];
    let mut facts = source_facts();
    facts.guest.as_mut().unwrap().immovable = kinds
        .iter()
        .enumerate()
        .map(|(i, (kind, _))| Immovable {
            kind: *kind,
            what: format!("device-{i}"),
        })
        .collect();
    let failures = source(&facts, &host("kvm1"), &Way::default());
    assert_eq!(codes(&failures), kinds.map(|(_, code)| code));
    for (i, failure) in failures.iter().enumerate() {
        assert!(
            failure.message.contains(&format!("device-{i}")),
            "{failure}"
        );
    }
}

fn at_destination(
    change: impl FnOnce(&mut Guest, &mut DestinationFacts, &mut LiveOptions),
) -> Vec<CheckCode> {
    let (mut guest, mut facts, mut options) =
        (guest(), destination_facts(), LiveOptions::default());
    change(&mut guest, &mut facts, &mut options);
    codes(&destination(
        &guest,
        &inventory(),
        &facts,
        &host("kvm2"),
        &Way::Live(options),
    ))
}

#[test]
fn the_destination_refuses() {
    use CheckCode as C;
    assert_eq!(
        at_destination(|_, f, _| f.inventory.hypervisor_type = "Xen".into()),
        [C::HypervisorType]
    );
    assert_eq!(
        at_destination(|_, f, _| f.inventory.hypervisor_version -= 1),
        [C::HypervisorVersion]
    );
    assert_eq!(
        at_destination(|_, f, _| f.inventory.libvirt_version -= 1),
        [C::HypervisorVersion]
    );
    assert_eq!(
        at_destination(|_, f, _| f.inventory.libvirt_version += 1),
        []
    );
    assert_eq!(
        at_destination(|_, f, _| f.inventory.arch = "aarch64".into()),
        [C::Architecture]
    );
    assert_eq!(
        at_destination(|_, f, _| f.virt_type_supported = false),
        [C::VirtType]
    );
    assert_eq!(
        at_destination(|_, f, _| f.emulator_present = false),
        [C::Emulator]
    );
    assert_eq!(
        at_destination(|_, f, _| f.machine_supported = false),
        [C::MachineType]
    );
    let lacks = CpuVerdict::Incompatible {
        detail: "avx2".into(),
    };
    assert_eq!(at_destination(|_, f, _| f.cpu = lacks), [C::Cpu]);
    let unknown = CpuVerdict::Unknown {
        detail: "emulated".into(),
    };
    assert_eq!(at_destination(|_, f, _| f.cpu = unknown), []);
    assert_eq!(
        at_destination(|_, f, _| f.networks[0].present = false),
        [C::Network]
    );
    let off = Presence::Present(PowerState::Shutdown);
    assert_eq!(at_destination(|_, f, _| f.same_uuid = off), [C::UuidTaken]);
    let other = Some(InstanceId(Uuid::from_u128(8)));
    assert_eq!(
        at_destination(|_, f, _| f.same_name = other),
        [C::NameTaken]
    );
    assert_eq!(
        at_destination(|_, f, _| f.reach_source = Err("refused".into())),
        [C::LibvirtUnreachable]
    );
    assert_eq!(
        at_destination(|_, f, _| f.probe_port = Err("none".into())),
        [C::MigrationPortUnreachable]
    );
}

#[test]
fn disks_refuse() {
    use CheckCode as C;
    let forbid = |_: &mut Guest, _: &mut DestinationFacts, o: &mut LiveOptions| {
        o.block_migration = BlockMigration::No;
    };
    assert_eq!(at_destination(forbid), [C::DiskNotShared]);
    assert_eq!(
        at_destination(|_, f, _| f.disks[0].exists = true),
        [C::DiskExists]
    );
    assert_eq!(
        at_destination(|_, f, _| f.disks[0].directory_exists = false),
        [C::DiskDirectory]
    );
    let nowhere = |_: &mut Guest, f: &mut DestinationFacts, _: &mut LiveOptions| {
        f.disks[0].directory_exists = false;
        f.disks[0].free_bytes = 0;
    };
    assert_eq!(
        at_destination(nowhere),
        [C::DiskDirectory],
        "its room is not missed as well"
    );
    assert_eq!(
        at_destination(|_, f, _| f.disks[0].free_bytes = 1),
        [C::DiskSpace]
    );
    let demand = |_: &mut Guest, f: &mut DestinationFacts, o: &mut LiveOptions| {
        f.disks[0].shared = true;
        o.block_migration = BlockMigration::Yes;
    };
    assert_eq!(at_destination(demand), [C::DiskShared]);
    let cached = |g: &mut Guest, f: &mut DestinationFacts, _: &mut LiveOptions| {
        f.disks[0].shared = true;
        g.disks[0].cache = Some("writeback".into());
    };
    assert_eq!(at_destination(cached), [C::DiskCache]);
    // Of which libvirt knows nothing: made by qemu-img.
    let holding = |shared: bool| {
        at_destination(|g, f, _| {
            let path = g.disks[0].local_path().map(str::to_owned);
            g.images_with_snapshots = path.into_iter().collect();
            f.disks[0].shared = shared;
        })
    };
    assert_eq!(holding(false), [C::Snapshots]);
    assert_eq!(holding(true), [], "nothing of it is left behind");
    let odd = |g: &mut Guest, _: &mut DestinationFacts, _: &mut LiveOptions| {
        g.disks[0].source = DiskSource::Other {
            kind: "vhostuser".into(),
        };
    };
    assert_eq!(at_destination(odd), [C::DiskNotCopyable]);
    let block = |g: &mut Guest, _: &mut DestinationFacts, _: &mut LiveOptions| {
        g.disks[0].source = DiskSource::Block {
            path: "/dev/vg/vm1".into(),
        };
    };
    assert_eq!(at_destination(block), [C::DiskNotCopyable]);
}

#[test]
fn disks_on_one_file_system_share_its_room() {
    let two = |g: &mut Guest, f: &mut DestinationFacts, _: &mut LiveOptions| {
        g.disks.push(disk("vdb", "/images/vm1b.qcow2"));
        f.disks.push(DiskFact {
            target: "vdb".into(),
            ..disk_fact()
        });
        for fact in &mut f.disks {
            fact.free_bytes = (3 << 20) / 2;
        }
    };
    assert_eq!(at_destination(two), [CheckCode::DiskSpace]);
}

#[test]
fn the_way_refuses() {
    let of = |libvirt, migration_port| {
        let facts = PathFacts {
            libvirt,
            migration_port,
            disk_port: Ok(()),
        };
        codes(&path(&facts, &host("kvm1"), &host("kvm2"), &Way::default()))
    };
    assert_eq!(of(Err("x".into()), Ok(())), [CheckCode::LibvirtUnreachable]);
    assert_eq!(
        of(Ok(()), Err("x".into())),
        [CheckCode::MigrationPortUnreachable]
    );
}

#[test]
fn room_refuses_each_resource() {
    let short = |kind| Shortfall {
        kind,
        wanted: 2,
        used: 3,
        usable: 4,
    };
    let all = [
        claims::Kind::Vcpus,
        claims::Kind::Memory,
        claims::Kind::Disk,
    ]
    .map(short);
    let expected = [CheckCode::Vcpus, CheckCode::Memory, CheckCode::DiskSpace];
    assert_eq!(codes(&room(&all, &host("kvm2"))), expected);
}

#[test]
fn all_failures_come_together() {
    let many = at_destination(|g, f, _| {
        f.inventory.libvirt_version = 1;
        f.machine_supported = false;
        f.networks[0].present = false;
        f.same_name = Some(InstanceId(Uuid::from_u128(8)));
        f.disks[0].exists = true;
        g.disks[0].allocated_bytes = 20 << 30;
        f.reach_source = Err("refused".into());
    });
    use CheckCode as C;
    let expected = [
        C::HypervisorVersion,
        C::MachineType,
        C::Network,
        C::NameTaken,
        C::DiskExists,
        C::DiskSpace,
        C::LibvirtUnreachable,
    ];
    assert_eq!(many, expected);
}
