//! What a transfer is judged by: each check has a case that makes it fail, and
//! it alone; and what is planned.

use drover_model::{
    api::compute::{FileFact, LocationFact, SharedFile, TransferFacts, TransferPlan},
    guest::{BackingImage, GuestFile, GuestFileKind, Nic},
    ids::MigrationId,
    migration::{ProjectTransfer, TransferOptions},
    project::{Limit, Location, NetworkPlace, Project, ProjectUsage, Quota, StoragePlace},
};

use super::{
    tests::{codes, disk, guest, host, instance},
    transfer::*,
    *,
};

const GIVERS: &str = "/projects/alpha";
const RECEIVERS: &str = "/projects/beta";
const MAC: &str = "52:54:00:00:00:01";

fn bridge(name: &str) -> NicAttachment {
    NicAttachment::Bridge {
        bridge: name.to_owned(),
    }
}

/// A project with one network, `lan`, and one directory.
fn project(id: &str) -> Project {
    let mut project = Project::new(id.parse().unwrap());
    project.networks.insert(
        "lan".to_owned(),
        vec![NetworkPlace::new(Vec::new(), bridge(&format!("br-{id}")))],
    );
    project.storage = vec![StoragePlace::new(
        Vec::new(),
        Location::Directory {
            path: format!("/projects/{id}"),
        },
    )];
    project
}

/// A guest of alpha's: one NIC on its network, one disk in its directory.
fn alphas() -> Guest {
    let mut guest = guest();
    guest.project = "alpha".to_owned();
    guest.nics = vec![Nic {
        mac: MAC.to_owned(),
        attachment: bridge("br-alpha"),
        port: None,
    }];
    guest.disks = vec![disk("vda", &format!("{GIVERS}/vm1.qcow2"))];
    guest
}

fn location_fact(directory: &str) -> LocationFact {
    LocationFact {
        location: Location::Directory {
            path: directory.to_owned(),
        },
        directory: Ok(directory.to_owned()),
        file_system: "8:1".to_owned(),
        free_bytes: 100 << 30,
        taken: Vec::new(),
    }
}

/// Everything that a case may change.
struct Case {
    giver: Option<Project>,
    receiver: Project,
    options: TransferOptions,
    facts: TransferFacts,
}

impl Case {
    fn guests(&mut self, change: impl Fn(&mut Guest)) {
        let guests = [&mut self.facts.guest, &mut self.facts.lasting];
        guests.into_iter().flatten().for_each(change);
    }

    fn judge(&self) -> Judged {
        let here = host("kvm1");
        judge(
            Hands {
                migration: MigrationId(uuid::Uuid::from_u128(7)),
                host: &here,
                giver: self.giver.as_ref(),
                receiver: &self.receiver,
                options: &self.options,
            },
            &self.facts,
        )
    }
}

fn case() -> Case {
    Case {
        giver: Some(project("alpha")),
        receiver: project("beta"),
        options: TransferOptions::default(),
        facts: TransferFacts {
            guest: Some(alphas()),
            lasting: Some(alphas()),
            networks: vec![bridge("br-beta")],
            locations: vec![location_fact(GIVERS), location_fact(RECEIVERS)],
            files: vec![FileFact {
                path: format!("{GIVERS}/vm1.qcow2"),
                exists: true,
                directory_exists: true,
                file_system: "8:1".to_owned(),
                free_bytes: 100 << 30,
                length_bytes: 1 << 30,
                in_use: true,
            }],
            shared: Vec::new(),
        },
    }
}

fn judged(change: impl FnOnce(&mut Case)) -> Judged {
    let mut case = case();
    change(&mut case);
    case.judge()
}

fn failing(change: impl FnOnce(&mut Case)) -> Vec<CheckCode> {
    let judged = judged(change);
    assert_eq!(judged.plan.is_none(), !judged.failures.is_empty());
    codes(&judged.failures)
}

fn planned(change: impl FnOnce(&mut Case)) -> TransferPlan {
    let judged = judged(change);
    assert_eq!(judged.failures, []);
    judged.plan.unwrap()
}

#[test]
fn nic_and_disk_become_the_receivers() {
    let plan = planned(|_| {});
    assert_eq!(plan.mode, TransferMode::Live);
    assert_eq!(plan.project.as_str(), "beta");
    let [nic] = plan.nics.as_slice() else {
        panic!("{plan:?}");
    };
    assert_eq!(
        (&nic.from, &nic.to),
        (&bridge("br-alpha"), &bridge("br-beta"))
    );
    assert_eq!(nic.new_mac, None);
    let [disk] = plan.disks.as_slice() else {
        panic!("{plan:?}");
    };
    assert_eq!(disk.from, format!("{GIVERS}/vm1.qcow2"));
    assert_eq!(disk.to, format!("{RECEIVERS}/vm1.qcow2"));
    assert!(!disk.flatten);
}

#[test]
fn a_guest_that_is_off_stays_off() {
    let off = |case: &mut Case| case.guests(|g| g.power_state = PowerState::Shutdown);
    assert_eq!(planned(off).mode, TransferMode::Cold);
}

#[test]
fn the_same_input_gives_the_same_plan() {
    let cold = |case: &mut Case| {
        case.options.mode = TransferMode::Cold;
        case.options.new_mac = true;
        case.options.name = Some("web".to_owned());
    };
    let plan = planned(cold);
    assert_eq!(plan, planned(cold));
    let new = plan.nics[0].new_mac.clone().unwrap();
    assert!(new.starts_with("52:54:00:") && new != MAC, "{new}");
    assert_eq!(plan.name.as_deref(), Some("web"));
}

#[test]
fn networks_are_mapped_by_what_they_are_called() {
    for old in ["lan", "br-alpha", MAC, "52:54:00:00:00:01"] {
        let plan = planned(|case| {
            let places = case.receiver.networks.remove("lan").unwrap();
            case.receiver.networks.insert("inside".to_owned(), places);
            let new = "inside".to_owned();
            case.options.networks.insert(old.to_owned(), new);
        });
        assert_eq!(plan.nics[0].to, bridge("br-beta"), "{old}");
    }
}

#[test]
fn a_network_of_both_is_left_alone() {
    let shared = planned(|case| {
        case.guests(|g| g.nics[0].attachment = bridge("br-beta"));
    });
    assert_eq!(shared.nics, []);
}

#[test]
fn networks_that_cannot_be_had_are_named() {
    // None of that name.
    let unnamed = |case: &mut Case| {
        let places = case.receiver.networks.remove("lan").unwrap();
        case.receiver.networks.insert("inside".to_owned(), places);
    };
    assert_eq!(failing(unnamed), [CheckCode::Network]);
    let wrong = |case: &mut Case| {
        let networks = &mut case.options.networks;
        networks.insert("lan".to_owned(), "elsewhere".to_owned());
    };
    assert_eq!(failing(wrong), [CheckCode::Network]);
    assert_eq!(
        failing(|case| case.facts.networks.clear()),
        [CheckCode::Network]
    );
    let unused = |case: &mut Case| {
        let networks = &mut case.options.networks;
        networks.insert("wan".to_owned(), "lan".to_owned());
    };
    assert_eq!(failing(unused), [CheckCode::Options]);
    // Not on this node.
    let elsewhere = |case: &mut Case| {
        let places = case.receiver.networks.get_mut("lan").unwrap();
        places[0].nodes = vec![host("kvm2")];
    };
    assert_eq!(failing(elsewhere), [CheckCode::Network]);
    let other = |case: &mut Case| {
        let kind = "vhostuser".to_owned();
        case.guests(|g| {
            g.nics[0].attachment = NicAttachment::Other { kind: kind.clone() };
        });
    };
    assert_eq!(failing(other), [CheckCode::Network]);
    let changed = |case: &mut Case| {
        case.facts.lasting.as_mut().unwrap().nics[0].attachment = bridge("br-other");
    };
    assert_eq!(failing(changed), [CheckCode::Network]);
}

#[test]
fn macvtap_is_replugged_only_while_the_guest_is_off() {
    let direct = |case: &mut Case| {
        case.options
            .networks
            .insert(MAC.to_owned(), "lan".to_owned());
        case.guests(|g| {
            g.nics[0].attachment = NicAttachment::Direct {
                device: "eth1".to_owned(),
            };
        });
    };
    // The mapping comes to nothing with it.
    let codes = failing(direct);
    assert!(codes.contains(&CheckCode::Network), "{codes:?}");
    let plan = planned(|case| {
        direct(case);
        case.options.mode = TransferMode::Cold;
    });
    assert_eq!(plan.nics[0].to, bridge("br-beta"));
}

#[test]
fn what_belongs_to_the_giver_is_named_one_by_one() {
    for (kind, code) in [
        (ImmovableKind::HostDevice, CheckCode::HostDevice),
        (ImmovableKind::MediatedDevice, CheckCode::MediatedDevice),
        (ImmovableKind::Filesystem, CheckCode::Filesystem),
        (ImmovableKind::Interface, CheckCode::ImmovableDevice),
        (ImmovableKind::Disk, CheckCode::DiskNotCopyable),
    ] {
        let what = "PCI 0000:3b:00.1".to_owned();
        let thing = Immovable { kind, what };
        let has = |case: &mut Case| case.guests(|g| g.immovable.push(thing.clone()));
        assert_eq!(failing(has), [code]);
    }
    let nvram = |case: &mut Case| {
        case.facts.lasting.as_mut().unwrap().files = vec![GuestFile {
            path: format!("{GIVERS}/vars.fd"),
            kind: GuestFileKind::Nvram,
            allocated_bytes: 1,
        }];
    };
    assert_eq!(failing(nvram), [CheckCode::ImmovableDevice]);
    let snapshots = |case: &mut Case| case.guests(|g| g.snapshots.push("s1".to_owned()));
    assert_eq!(failing(snapshots), [CheckCode::Snapshots]);
    let busy = |case: &mut Case| case.guests(|g| g.active_job = Some("backup".to_owned()));
    assert_eq!(failing(busy), [CheckCode::InstanceJob]);
    let transient = |case: &mut Case| case.guests(|g| g.persistent = false);
    assert_eq!(failing(transient), [CheckCode::InstanceState]);
    let gone = |case: &mut Case| case.facts.guest = None;
    assert_eq!(failing(gone), [CheckCode::InstanceMissing]);
}

#[test]
fn a_disk_has_one_owner() {
    let shared = |case: &mut Case| {
        case.facts.shared.push(SharedFile {
            path: format!("{GIVERS}/vm1.qcow2"),
            domain: "vm2".to_owned(),
        });
        // Leaving it where it is makes it no more the receiver's.
        case.options.keep_disk = true;
    };
    assert_eq!(failing(shared), [CheckCode::DiskInUse]);
}

#[test]
fn disks_that_cannot_move_are_named_or_left() {
    let sources = [
        DiskSource::Block {
            path: "/dev/vg/lv".to_owned(),
        },
        DiskSource::Network {
            protocol: "rbd".to_owned(),
            name: "pool/x".to_owned(),
        },
    ];
    for source in sources {
        let set = |case: &mut Case| case.guests(|g| g.disks[0].source = source.clone());
        assert_eq!(failing(set), [CheckCode::DiskNotCopyable]);
        let kept = planned(|case| {
            set(case);
            case.options.keep_disk = true;
        });
        assert_eq!(kept.disks, []);
    }
    let read_only = |case: &mut Case| case.guests(|g| g.disks[0].read_only = true);
    assert_eq!(failing(read_only), [CheckCode::DiskNotCopyable]);
    let shareable = |case: &mut Case| case.guests(|g| g.disks[0].shareable = true);
    assert_eq!(failing(shareable), [CheckCode::DiskNotCopyable]);
    let strange = |case: &mut Case| case.guests(|g| g.disks[0].format = "vmdk".to_owned());
    assert_eq!(failing(strange), [CheckCode::DiskNotCopyable]);
}

#[test]
fn storage_must_be_there_and_have_room() {
    let none = |case: &mut Case| case.receiver.storage.clear();
    assert_eq!(failing(none), [CheckCode::Storage]);
    let broken = |case: &mut Case| {
        case.facts.locations[1].directory = Err("no such directory".to_owned());
    };
    assert_eq!(failing(broken), [CheckCode::Storage]);
    let taken = |case: &mut Case| {
        case.facts.locations[1].taken.push("vm1.qcow2".to_owned());
    };
    assert_eq!(failing(taken), [CheckCode::DiskExists]);
    let full = |case: &mut Case| case.facts.locations[1].free_bytes = 0;
    assert_eq!(failing(full), [CheckCode::DiskSpace]);
    // Only renamed, it takes no room; on another file system it does.
    let cold = |case: &mut Case| {
        full(case);
        case.options.mode = TransferMode::Cold;
    };
    assert_eq!(planned(cold).disks.len(), 1);
    let far = |case: &mut Case| {
        cold(case);
        case.facts.locations[1].file_system = "8:2".to_owned();
    };
    assert_eq!(failing(far), [CheckCode::DiskSpace]);
}

#[test]
fn a_project_without_storage_leaves_disks_that_are_nobodys() {
    let plan = planned(|case| {
        case.giver = None;
        case.receiver.storage.clear();
        case.options
            .networks
            .insert(MAC.to_owned(), "lan".to_owned());
    });
    assert_eq!(plan.disks, []);
}

#[test]
fn an_image_below_that_is_the_givers_is_taken_along() {
    let below = |directory: &str| BackingImage {
        path: format!("{directory}/base.qcow2"),
        format: "qcow2".to_owned(),
        allocated_bytes: 5,
    };
    let own = planned(|case| case.guests(|g| g.disks[0].backing = vec![below(GIVERS)]));
    assert!(own.disks[0].flatten);
    let common = planned(|case| case.guests(|g| g.disks[0].backing = vec![below("/images")]));
    assert!(!common.disks[0].flatten);
    assert_eq!(own.disks[0].data_bytes, common.disks[0].data_bytes + 5);
}

#[test]
fn a_running_guest_keeps_name_and_mac() {
    let renamed = |case: &mut Case| case.options.name = Some("web".to_owned());
    assert_eq!(failing(renamed), [CheckCode::Options]);
    let new_mac = |case: &mut Case| case.options.new_mac = true;
    assert_eq!(failing(new_mac), [CheckCode::Options]);
}

#[test]
fn what_the_record_says_of_the_receiver() {
    let mut row = instance();
    row.project = "alpha".to_owned();
    let transfer = |to: &str| ProjectTransfer {
        project: to.parse().unwrap(),
        options: TransferOptions::default(),
    };
    let beta = project("beta");
    let of = |to: &str, project: Option<&Project>, others: &[InstanceRow]| {
        codes(&receiver(&row, &transfer(to), project, others))
    };
    assert_eq!(of("beta", Some(&beta), std::slice::from_ref(&row)), []);
    assert_eq!(of("beta", None, &[]), [CheckCode::UnknownProject]);
    let closed = Project {
        enabled: false,
        ..beta.clone()
    };
    assert_eq!(of("beta", Some(&closed), &[]), [CheckCode::ProjectDisabled]);
    let alpha = project("alpha");
    assert_eq!(of("alpha", Some(&alpha), &[]), [CheckCode::SameProject]);
    let mut namesake = row.clone();
    namesake.id = drover_model::ids::InstanceId(uuid::Uuid::from_u128(99));
    namesake.project = "beta".to_owned();
    namesake.host = host("kvm2");
    assert_eq!(of("beta", Some(&beta), &[namesake]), [CheckCode::NameTaken]);
}

#[test]
fn each_resource_of_a_quota_is_told() {
    let quota_of = Quota {
        instances: Limit::AtMost(0),
        memory_mb: Limit::AtMost(1),
        ..Quota::default()
    };
    let wanted = usage_of(&instance());
    let short = quota_of.shortfalls(&ProjectUsage::default(), &wanted);
    let failures = quota(&"beta".parse().unwrap(), &short);
    assert_eq!(codes(&failures), [CheckCode::Quota, CheckCode::Quota]);
    assert!(failures[1].remedy.contains("--memory-mib"), "{failures:?}");
}

#[test]
fn what_a_port_has_of_its_own_is_not_kept() {
    let tagged = |case: &mut Case| {
        case.guests(|g| g.nics[0].port = Some("VLAN 7".to_owned()));
    };
    assert_eq!(failing(tagged), [CheckCode::Network]);
    // On the same bridge for both, it is written anew all the same.
    let plan = planned(|case| {
        tagged(case);
        case.options.mode = TransferMode::Cold;
        case.guests(|g| g.nics[0].attachment = bridge("br-beta"));
    });
    assert_eq!(plan.nics.len(), 1);
    assert_eq!(plan.nics[0].to, bridge("br-beta"));
}

#[test]
fn a_nic_is_in_both_definitions() {
    let only_now = |case: &mut Case| case.facts.lasting.as_mut().unwrap().nics.clear();
    assert_eq!(failing(only_now), [CheckCode::Network]);
}

#[test]
fn a_directory_within_anothers_is_told_apart() {
    let within = |case: &mut Case| {
        case.receiver.storage[0].location = Location::Directory {
            path: "/projects".to_owned(),
        };
        case.facts.locations[1] = location_fact("/projects");
    };
    // The giver's lies within the receiver's: what is in there is the giver's.
    assert_eq!(planned(within).disks[0].to, "/projects/vm1.qcow2");
}
