//! What a cold migration is judged by: each check has a case that makes it fail,
//! and it alone; and what is carried.

use drover_model::{
    api::compute::{FileFact, FileRole as Role},
    guest::{GuestFile, GuestFileKind, Immovable},
    ids::MigrationId,
    migration::{ColdOptions, Flavor},
};

use super::{
    tests::{
        codes, destination_facts, disk, disk_fact, guest, host, instance, inventory, source_facts,
    },
    *,
};

const BASE: &str = "/images/base.qcow2";

fn cold() -> Way {
    Way::Cold(ColdOptions::default())
}

fn fact(path: &str, exists: bool) -> FileFact {
    FileFact {
        path: path.into(),
        exists,
        directory_exists: true,
        file_system: "/images".into(),
        free_bytes: 10 << 30,
        length_bytes: 1 << 30,
        in_use: false,
    }
}

/// A destination that has the base image.
fn facts() -> DestinationFacts {
    DestinationFacts {
        files: vec![fact(BASE, true)],
        ..destination_facts()
    }
}

fn at_destination(change: impl FnOnce(&mut Guest, &mut DestinationFacts)) -> Vec<CheckCode> {
    let (mut guest, mut facts) = (guest(), facts());
    change(&mut guest, &mut facts);
    codes(&destination(
        &guest,
        &inventory(),
        &facts,
        &host("kvm2"),
        &cold(),
    ))
}

fn at_source(change: impl FnOnce(&mut Guest)) -> Vec<CheckCode> {
    let mut facts = source_facts();
    change(facts.guest.as_mut().unwrap());
    codes(&source(&facts, &host("kvm1"), &cold()))
}

#[test]
fn states_that_move_cold() {
    let of = |state, options: ColdOptions| {
        let mut row = instance();
        row.power_state = state;
        let way = Way::Cold(options);
        let mut failures = request(&row, &way, None);
        failures.extend(recorded(&row, &way));
        codes(&failures)
    };
    use PowerState as P;
    for state in [P::Running, P::Shutdown, P::Crashed] {
        assert_eq!(of(state, ColdOptions::default()), [], "{state:?}");
    }
    for state in [P::Paused, P::Suspended] {
        assert_eq!(
            of(state, ColdOptions::default()),
            [CheckCode::InstanceState]
        );
        let force = ColdOptions {
            force_stop_after_s: Some(0),
            ..ColdOptions::default()
        };
        assert_eq!(of(state, force), [], "{state:?}");
    }
    let nothing = ColdOptions {
        flavor: Some(Flavor {
            vcpus: 0,
            memory_mb: 64,
        }),
        ..ColdOptions::default()
    };
    assert_eq!(of(P::Running, nothing), [CheckCode::Options]);
    let finished = Migration {
        status: MigrationStatus::Finished,
        ..crate::tests_support::migration()
    };
    let busy = request(&instance(), &cold(), Some(&finished));
    assert!(
        busy[0].remedy.contains("instance confirm"),
        "{}",
        busy[0].remedy
    );
}

#[test]
fn the_source_refuses() {
    assert_eq!(at_source(|_| {}), []);
    assert_eq!(
        at_source(|g| g.persistent = false),
        [CheckCode::InstanceState]
    );
    let job = Some("backup".to_owned());
    assert_eq!(at_source(|g| g.active_job = job), [CheckCode::InstanceJob]);
    let inside = |g: &mut Guest| g.snapshots = vec!["s1".into()];
    assert_eq!(at_source(inside), [], "internal snapshots are in the disks");
    let outside = |g: &mut Guest| g.external_snapshots = vec!["s1".into()];
    assert_eq!(at_source(outside), [CheckCode::Snapshots]);
    let device = |kind| {
        let what = "it".to_owned();
        at_source(|g| g.immovable = vec![Immovable { kind, what }])
    };
    assert_eq!(
        device(ImmovableKind::EmulatedTpm),
        [],
        "its state is in files"
    );
    assert_eq!(device(ImmovableKind::Tpm), [CheckCode::ImmovableDevice]);
    assert_eq!(device(ImmovableKind::Disk), [CheckCode::DiskNotCopyable]);
    assert_eq!(device(ImmovableKind::HostDevice), [CheckCode::HostDevice]);
}

/// libvirt before 8.9 removes the state with the definition.
#[test]
fn a_tpm_that_a_node_could_not_keep_stays() {
    let older = |has: &mut drover_model::node::Inventory| has.libvirt_version = 8_008_000;
    let sides = |is_lost: bool| {
        let (mut from, mut to) = (source_facts(), facts());
        older(&mut from.inventory);
        older(&mut to.inventory);
        let guest = from.guest.as_mut().unwrap();
        guest.tpm_goes_with_definition = is_lost;
        let there = destination(guest, &inventory(), &to, &host("kvm2"), &cold());
        [source(&from, &host("kvm1"), &cold()), there]
    };
    assert_eq!(sides(false), [[], []], "its definition says that it lasts");
    let [here, there] = sides(true);
    for (failures, on) in [(here, "kvm1"), (there, "kvm2")] {
        assert_eq!(codes(&failures), [CheckCode::ImmovableDevice]);
        assert!(failures[0].message.contains(on), "{failures:?}");
        assert!(failures[0].remedy.contains("persistent_state"));
    }
    let newer = at_source(|guest| guest.tpm_goes_with_definition = true);
    assert_eq!(newer, [], "libvirt 9.0 keeps it");
}

#[test]
fn the_destination_refuses() {
    use CheckCode as C;
    assert_eq!(at_destination(|_, _| {}), []);
    let older = |_: &mut Guest, f: &mut DestinationFacts| f.inventory.hypervisor_version -= 1;
    assert_eq!(
        at_destination(older),
        [],
        "a guest that starts anew does not mind"
    );
    let other =
        |_: &mut Guest, f: &mut DestinationFacts| f.inventory.hypervisor_type = "Xen".into();
    assert_eq!(at_destination(other), [C::HypervisorType]);
    assert_eq!(
        at_destination(|_, f| f.machine_supported = false),
        [C::MachineType]
    );
    assert_eq!(
        at_destination(|_, f| f.networks[0].present = false),
        [C::Network]
    );
    assert_eq!(
        at_destination(|_, f| f.disks[0].exists = true),
        [C::DiskExists]
    );
    let nowhere = |_: &mut Guest, f: &mut DestinationFacts| f.disks[0].directory_exists = false;
    assert_eq!(at_destination(nowhere), [C::DiskDirectory]);
    assert_eq!(
        at_destination(|_, f| f.disks[0].free_bytes = 1),
        [C::DiskSpace]
    );
    let closed = |_: &mut Guest, f: &mut DestinationFacts| f.disk_port = Err("taken".into());
    assert_eq!(at_destination(closed), [C::MigrationPortUnreachable]);
    let no_libvirt = |_: &mut Guest, f: &mut DestinationFacts| f.reach_source = Err("no".into());
    assert_eq!(
        at_destination(no_libvirt),
        [],
        "libvirts need not reach each other"
    );
}

#[test]
fn a_base_image_that_is_missing_is_carried_and_needs_room() {
    let missing = |f: &mut DestinationFacts| f.files = vec![fact(BASE, false)];
    assert_eq!(at_destination(|_, f| missing(f)), []);
    let large = |g: &mut Guest, f: &mut DestinationFacts| {
        g.disks[0].backing[0].allocated_bytes = 20 << 30;
        missing(f);
    };
    assert_eq!(at_destination(large), [CheckCode::DiskSpace]);
    let present = |g: &mut Guest, _: &mut DestinationFacts| {
        g.disks[0].backing[0].allocated_bytes = 20 << 30;
    };
    assert_eq!(at_destination(present), [], "what is there needs no room");
    let nowhere = |_: &mut Guest, f: &mut DestinationFacts| {
        missing(f);
        f.files[0].directory_exists = false;
    };
    assert_eq!(at_destination(nowhere), [CheckCode::DiskDirectory]);
    let anothers = |_: &mut Guest, f: &mut DestinationFacts| {
        missing(f);
        f.files[0].in_use = true;
    };
    assert_eq!(at_destination(anothers), [CheckCode::DiskExists]);
}

#[test]
fn a_block_device_has_to_be_there_large_and_free() {
    let block = |change: fn(&mut DestinationFacts)| {
        at_destination(|g, f| {
            let path = "/dev/vg/vm1".to_owned();
            g.disks[0].backing.clear();
            g.disks[0].source = DiskSource::Block { path: path.clone() };
            f.disks[0].exists = true;
            f.files = vec![fact(&path, true)];
            change(f);
        })
    };
    assert_eq!(block(|_| {}), []);
    assert_eq!(
        block(|f| f.files[0].length_bytes = 1),
        [CheckCode::DiskNotCopyable]
    );
    assert_eq!(
        block(|f| f.files[0].in_use = true),
        [CheckCode::DiskNotCopyable]
    );
    assert_eq!(
        block(|f| {
            f.disks[0].exists = false;
            f.files[0].exists = false;
        }),
        [CheckCode::DiskNotCopyable]
    );
}

#[test]
fn what_a_live_guest_writes_beside_its_disks_is_no_other_guests() {
    let path = "/nvram/vm1.fd";
    for in_use in [false, true] {
        let mut guest = guest();
        guest.files = vec![GuestFile {
            path: path.into(),
            kind: GuestFileKind::Nvram,
            allocated_bytes: 1,
        }];
        let mut there = facts();
        there.files.push(FileFact {
            in_use,
            ..fact(path, true)
        });
        let live = Way::Live(drover_model::migration::LiveOptions::default());
        let failures = destination(&guest, &inventory(), &there, &host("kvm2"), &live);
        let expected = in_use.then_some(CheckCode::DiskExists);
        assert_eq!(codes(&failures), Vec::from_iter(expected), "{failures:?}");
    }
}

#[test]
fn the_way_for_disks_is_tried() {
    let facts = PathFacts {
        libvirt: Err("closed".into()),
        migration_port: Err("closed".into()),
        disk_port: Ok(()),
    };
    let (a, b) = (host("kvm1"), host("kvm2"));
    assert_eq!(
        codes(&path(&facts, &a, &b, &cold())),
        [],
        "only the disks' port matters"
    );
    let facts = PathFacts {
        disk_port: Err("closed".into()),
        ..facts
    };
    let codes = codes(&path(&facts, &a, &b, &cold()));
    assert_eq!(codes, [CheckCode::MigrationPortUnreachable]);
}

#[test]
fn everything_of_the_guest_is_carried_once_and_what_lies_under_it_first() {
    let mut guest = guest();
    guest.disks.push(disk("vdb", "/images/data.qcow2"));
    guest.disks.push(disk("vdc", "/shared/vm1.qcow2"));
    let file = |path: &str, kind| GuestFile {
        path: path.into(),
        kind,
        allocated_bytes: 1,
    };
    guest.files = vec![
        file("/nvram/vm1.fd", GuestFileKind::Nvram),
        file("/swtpm/x/tpm2-00.permall", GuestFileKind::Tpm),
    ];
    let mut facts = facts();
    let seen = |target: &str, shared| DiskFact {
        target: target.into(),
        shared,
        ..disk_fact()
    };
    facts.disks = vec![seen("vda", false), seen("vdb", false), seen("vdc", true)];
    let carried = cold::carried(&guest, &facts);
    let found: Vec<_> = carried
        .iter()
        .map(|f| (f.path.as_str(), f.role, f.present))
        .collect();
    assert_eq!(
        found,
        [
            (BASE, Role::Backing, true),
            ("/images/vm1.qcow2", Role::Disk, false),
            ("/images/data.qcow2", Role::Disk, false),
            ("/nvram/vm1.fd", Role::Nvram, false),
            ("/swtpm/x/tpm2-00.permall", Role::Tpm, false),
        ]
    );
    let deltas = cold::deltas(&guest, &carried, MigrationId::generate());
    let over: Vec<_> = deltas
        .iter()
        .map(|d| d.over.as_ref().unwrap().image.as_str())
        .collect();
    assert_eq!(over, ["/images/vm1.qcow2", "/images/data.qcow2"]);
}
