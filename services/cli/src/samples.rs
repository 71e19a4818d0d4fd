//! Values for tests, made whole so that a test says only what matters to it.

mod operation;

use std::{
    io::Write,
    sync::{Arc, Mutex},
};

use drover_model::{
    api::conductor::{
        ConductorStatus, Instance, Node, Offer, OfferState, Plan, PlannedDisk, ProjectView,
    },
    check::{CheckCode, CheckFailure, Side},
    guest::{NicAttachment, PowerState},
    ids::HostName,
    migration::{
        ColdOptions, Consent, Decision, Migration, MigrationStatus, Phase, Progress,
        ProjectTransfer, Requester, StepTiming, Transfer, TransferMode, TransferOptions, Way,
    },
    node::{AllocationPolicy, Endpoint, HypervisorReport, Inventory, NodeReport},
    project::{Limit, Location, NetworkPlace, Project, ProjectUsage, Quota, StoragePlace},
};

pub(crate) use self::operation::*;
use crate::render::screen::{Manner, Screen};

/// Monday, in the evening.
pub(crate) const T0: u64 = 1_795_459_611_000;
/// UUID of the instance.
pub(crate) const INSTANCE: &str = "11111111-2222-4333-8444-555555555555";
/// UUID of the migration.
pub(crate) const MIGRATION: &str = "01997777-0000-7000-8000-00000000abcd";

/// UUID of the offer.
pub(crate) const OFFER: &str = "01997777-0000-7000-8000-00000000feed";

const MIB: u64 = 1 << 20;

/// A host name.
pub(crate) fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

/// What a node has.
pub(crate) fn inventory() -> Inventory {
    Inventory {
        hypervisor_type: "QEMU".to_owned(),
        hypervisor_version: 7_002_000,
        libvirt_version: 9_000_000,
        arch: "x86_64".to_owned(),
        cpu_model: "EPYC-Rome".to_owned(),
        kvm: true,
        vcpus: 4,
        memory_mib: 8192,
        disk_bytes: 100 << 30,
        disk_free_bytes: 80 << 30,
    }
}

/// A node that is well.
pub(crate) fn node(name: &str) -> Node {
    Node {
        host: host(name),
        enabled: true,
        disabled_reason: None,
        up: true,
        forced_down: false,
        heard_at_ms: T0,
        report_age_ms: 1200,
        clock_offset_ms: 3,
        incarnation: 1,
        refusal: None,
        speaks: drover_model::api::SPEAKS.into(),
        version_mismatch: None,
        vcpus_used: 2,
        memory_used_mib: 256,
        disk_claimed_bytes: 0,
        vcpus_usable: 16,
        memory_usable_mib: 7680,
        instances: Some(2),
        agent_lost: None,
        report: NodeReport {
            host: host(name),
            agent_version: "0.1.0".to_owned(),
            agent_started_ms: T0,
            incarnation: 0,
            sequence: 9,
            clock_ms: T0,
            endpoint: Endpoint {
                address: "100.100.100.11".to_owned(),
                libvirt_uri: "qemu+tcp://kvm1/system".to_owned(),
                libvirt_port: 16509,
            },
            policy: AllocationPolicy::default(),
            hypervisor: HypervisorReport::Up {
                inventory: inventory(),
                instances: Vec::new(),
            },
        },
    }
}

/// An instance that runs.
pub(crate) fn instance(name: &str) -> Instance {
    Instance {
        uuid: INSTANCE.parse().unwrap(),
        name: name.to_owned(),
        project_id: "default".to_owned(),
        host: host("kvm1"),
        power_state: PowerState::Running,
        vm_state: "active".to_owned(),
        task_state: None,
        vcpus: 1,
        memory_mb: 128,
        disk_bytes: 1 << 30,
        generation: 0,
        migration: None,
        seen_at_ms: T0,
        unreadable: None,
        other_copy: None,
        lost: None,
    }
}

/// A migration that was accepted.
pub(crate) fn migration() -> Migration {
    Migration {
        id: 7,
        uuid: MIGRATION.parse().unwrap(),
        instance_name: "demo-1".to_owned(),
        project_id: "default".to_owned(),
        dest_host: Some(host("kvm2")),
        dest_requested: true,
        step: "check".to_owned(),
        owner: "ctl".to_owned(),
        version: 1,
        ..Migration::new(INSTANCE.parse().unwrap(), host("kvm1"), Way::default(), T0)
    }
}

/// It, in the midst of its memory.
pub(crate) fn running(mut m: Migration) -> Migration {
    m.status = MigrationStatus::Running;
    m.step = "transfer".to_owned();
    m.updated_at_ms = T0 + 1000;
    m.version += 1;
    m.progress = Progress {
        phase: Phase::Memory,
        memory: sent(64 * MIB, 128 * MIB),
        disk: sent(650 * MIB, 1024 * MIB),
        rate_bytes_s: 90 * MIB,
        dirty_rate_bytes_s: 4 * MIB,
        iteration: 2,
        expected_downtime_ms: Some(120),
        allowed_downtime_ms: Some(300),
        eta_ms: Some(1500),
        patience_ms: Some(120_000),
        elapsed_ms: 800,
        note: None,
    };
    m
}

/// It, at its good end.
pub(crate) fn completed(m: Migration) -> Migration {
    let mut m = running(m);
    m.status = MigrationStatus::Completed;
    m.progress.phase = Phase::Done;
    m.progress.memory = sent(128 * MIB, 128 * MIB);
    m.progress.disk = sent(1024 * MIB, 1024 * MIB);
    m.downtime_ms = Some(212);
    m.updated_at_ms = T0 + 2149;
    m.finished_at_ms = Some(T0 + 2149);
    m.version += 1;
    m.timings = vec![
        StepTiming {
            step: "check".to_owned(),
            duration_ms: 120,
        },
        StepTiming {
            step: "transfer".to_owned(),
            duration_ms: 1800,
        },
    ];
    m.decisions = vec![Decision {
        at_ms: T0 + 100,
        text: "vda is copied: kvm2 does not see its directory".to_owned(),
    }];
    m
}

/// A cold migration that was accepted.
pub(crate) fn cold() -> Migration {
    Migration {
        way: Way::Cold(ColdOptions::default()),
        ..migration()
    }
}

/// A cold one, waiting for its guest to shut down.
pub(crate) fn stopping() -> Migration {
    let mut m = cold();
    m.status = MigrationStatus::Migrating;
    m.step = "stop".to_owned();
    m.updated_at_ms = T0 + 9000;
    m.version = 3;
    m.progress.phase = Phase::Stopping;
    m.progress.note = Some("waiting for the guest to shut down: 7 s".to_owned());
    m
}

/// A cold one whose disks are on their way.
pub(crate) fn copying() -> Migration {
    let mut m = stopping();
    m.step = "copy".to_owned();
    m.version = 4;
    m.progress = Progress {
        phase: Phase::Disk,
        disk: sent(650 * MIB, 1024 * MIB),
        rate_bytes_s: 90 * MIB,
        eta_ms: Some(4100),
        ..Progress::default()
    };
    m
}

/// A cold one that waits to be confirmed or reverted.
pub(crate) fn finished() -> Migration {
    let mut m = copying();
    m.status = MigrationStatus::Finished;
    m.step = "start".to_owned();
    m.version = 9;
    m.progress.phase = Phase::Done;
    m.progress.disk = sent(1024 * MIB, 1024 * MIB);
    m.downtime_ms = Some(14_300);
    m.progress.rate_bytes_s = 0;
    m.progress.eta_ms = None;
    m.updated_at_ms = T0 + 21_500;
    m.finished_at_ms = Some(T0 + 21_500);
    m.timings = [("stop", 8000), ("copy", 5200)]
        .map(|(step, duration_ms)| StepTiming {
            step: step.to_owned(),
            duration_ms,
        })
        .to_vec();
    m.decisions = vec![Decision {
        at_ms: T0 + 100,
        text: "vda is copied: kvm2 does not see its directory".to_owned(),
    }];
    m
}

/// Somebody.
pub(crate) fn user(name: &str) -> Requester {
    Requester {
        user_id: Some(name.to_owned()),
        ..Requester::default()
    }
}

/// A transfer to the project blue that was offered and accepted.
pub(crate) fn handover(mode: TransferMode) -> Migration {
    let options = TransferOptions {
        mode,
        ..TransferOptions::default()
    };
    Migration {
        way: Way::Transfer(ProjectTransfer {
            project: "blue".parse().unwrap(),
            options,
        }),
        dest_host: Some(host("kvm1")),
        requester: user("bob"),
        consent: Some(Consent {
            offer: Some(OFFER.parse().unwrap()),
            offered_by: user("ann"),
            offered_at_ms: T0 - 60_000,
            accepted_by: user("bob"),
            accepted_at_ms: T0,
        }),
        ..migration()
    }
}

/// It, with its disks on their way.
pub(crate) fn moving(mut m: Migration) -> Migration {
    m.status = MigrationStatus::Running;
    m.step = "disks".to_owned();
    m.updated_at_ms = T0 + 1000;
    m.version += 1;
    m.progress = Progress {
        phase: Phase::Disk,
        disk: sent(650 * MIB, 1024 * MIB),
        rate_bytes_s: 90 * MIB,
        ..Progress::default()
    };
    m
}

/// It, done: the guest is blue's.
pub(crate) fn handed_over(m: Migration) -> Migration {
    let mut m = moving(m);
    m.status = MigrationStatus::Completed;
    m.progress.phase = Phase::Done;
    m.progress.disk = sent(1024 * MIB, 1024 * MIB);
    m.downtime_ms = Some(34);
    m.updated_at_ms = T0 + 2149;
    m.finished_at_ms = Some(T0 + 2149);
    m.version += 1;
    m.decisions = vec![Decision {
        at_ms: T0 + 100,
        text: "lan (br0) becomes blue's lan (br-blue)".to_owned(),
    }];
    m
}

/// An offer to the project blue.
pub(crate) fn offer() -> Offer {
    Offer {
        id: OFFER.parse().unwrap(),
        instance_uuid: INSTANCE.parse().unwrap(),
        instance_name: "demo-1".to_owned(),
        from_project: "default".to_owned(),
        to_project: Some("blue".parse().unwrap()),
        state: OfferState::Open,
        offered_by: user("ann"),
        created_at_ms: T0,
        expires_at_ms: T0 + 86_400_000,
        wrong_keys: 0,
        migration: None,
    }
}

/// A project that has something, and soon more.
pub(crate) fn project(id: &str) -> ProjectView {
    let bridge = |name: &str, nodes| {
        NetworkPlace::new(
            nodes,
            NicAttachment::Bridge {
                bridge: name.to_owned(),
            },
        )
    };
    let elsewhere = NetworkPlace::new(
        Vec::new(),
        NicAttachment::Network {
            network: "blue".to_owned(),
        },
    );
    let storage = |name, location| StoragePlace::new(vec![host(name)], location);
    let lan = vec![
        bridge("br-blue", vec![host("kvm1"), host("kvm2")]),
        elsewhere,
    ];
    let path = "/srv/blue".to_owned();
    let pool = "blue".to_owned();
    let project = Project {
        name: "Blue team".to_owned(),
        quota: Quota {
            instances: Limit::AtMost(10),
            vcpus: Limit::Unlimited,
            memory_mb: Limit::AtMost(4096),
            disk_gb: Limit::AtMost(50),
            ..Default::default()
        },
        networks: [
            ("lan".to_owned(), lan),
            ("wan".to_owned(), vec![bridge("br-wan", Vec::new())]),
        ]
        .into(),
        storage: vec![
            storage("kvm1", Location::Directory { path }),
            storage("kvm2", Location::Pool { pool }),
        ],
        ..Project::new(id.parse().unwrap())
    };
    let usage = |instances, vcpus, memory_mb, disk_bytes| ProjectUsage {
        instances,
        vcpus,
        memory_mb,
        disk_bytes,
    };
    ProjectView {
        project,
        created: true,
        usage: usage(2, 3, 512, 12 << 30),
        promised: usage(1, 1, 128, 1 << 30),
    }
}

/// So much of so much.
pub(crate) fn sent(moved: u64, total: u64) -> Transfer {
    Transfer {
        total_bytes: total,
        processed_bytes: moved,
        remaining_bytes: total - moved,
    }
}

/// A plan that could be carried out.
pub(crate) fn plan() -> Plan {
    Plan {
        instance_uuid: INSTANCE.parse().unwrap(),
        instance_name: "demo-1".to_owned(),
        source_host: host("kvm1"),
        dest_host: Some(host("kvm2")),
        failures: Vec::new(),
        copied_disks: vec![PlannedDisk {
            target: "vda".to_owned(),
            allocated_bytes: 600 * MIB,
        }],
        memory_mib: 128,
        decisions: vec!["kvm2 has the most room".to_owned()],
    }
}

/// Two failed checks, one of them with a message that would steer a terminal.
pub(crate) fn checks() -> Vec<CheckFailure> {
    let check = |code, message: &str, remedy: &str| CheckFailure {
        code,
        side: Side::Destination,
        message: message.to_owned(),
        remedy: remedy.to_owned(),
    };
    let memory = "kvm2 has 64 MiB left, 128 MiB needed";
    vec![
        check(CheckCode::Memory, memory, "free memory on kvm2"),
        check(CheckCode::Network, "bridge br1\x1b[2J is missing", ""),
    ]
}

/// A conductor that is well.
pub(crate) fn conductor() -> ConductorStatus {
    ConductorStatus {
        conductor: "ctl".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        clock_ms: T0,
        database: "sqlite".to_owned(),
        migrations_owned: 0,
        counters: std::collections::BTreeMap::new(),
        service_down_time_s: 60,
        speaks: drover_model::api::SPEAKS.into(),
        left_alone: Vec::new(),
    }
}

/// Catches what is written to a screen.
#[derive(Clone, Default)]
pub(crate) struct Tape {
    out: Reel,
    err: Reel,
}

#[derive(Clone, Default)]
struct Reel(Arc<Mutex<Vec<u8>>>);

impl Write for Reel {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Tape {
    /// A screen that writes here.
    pub(crate) fn screen(&self, manner: Manner) -> Screen {
        Screen::new(
            Box::new(self.out.clone()),
            Box::new(self.err.clone()),
            manner,
        )
    }

    /// What stands on standard output so far.
    pub(crate) fn out(&self) -> String {
        String::from_utf8(self.out.0.lock().unwrap().clone()).unwrap()
    }

    /// What stands on standard error so far.
    pub(crate) fn err(&self) -> String {
        String::from_utf8(self.err.0.lock().unwrap().clone()).unwrap()
    }
}
