//! Migration orders against what libvirt is to be told.

use drover_model::{guest::Guest, migration::LiveOptions};

use super::*;

const ID: &str = "3e3fce45-4f53-4fa7-bb32-11f34168b82b";

fn guest_with(disks: &str, persistent: bool) -> Guest {
    let text = format!(
        "<domain type='kvm'><name>a</name><uuid>{ID}</uuid><memory>1024</memory><vcpu>1</vcpu>
         <os><type arch='x86_64' machine='pc'>hvm</type></os><devices>{disks}</devices></domain>"
    );
    let outside = Outside {
        power_state: drover_model::guest::PowerState::Running,
        persistent,
    };
    xml::guest(&text, outside).unwrap()
}

const FLAT: &str = "<disk type='file'><source file='/a'/><target dev='vda'/></disk>";
const CHAIN: &str = "<disk type='file'><source file='/b'/><backingStore type='file'>
    <format type='raw'/><source file='/base'/></backingStore><target dev='vdb'/></disk>";

fn spec(copied: &[&str]) -> MigrateSpec {
    MigrateSpec {
        instance: ID.parse().unwrap(),
        dest_libvirt_uri: "qemu+tcp://kvm2/system".to_owned(),
        dest_address: "100.100.100.12".to_owned(),
        copied_disks: copied.iter().map(|t| (*t).to_owned()).collect(),
        shared_disks: Vec::new(),
        initial_downtime_ms: None,
        options: LiveOptions::default(),
    }
}

fn has(order: &Order, flag: u32) -> bool {
    order.flags & flag != 0
}

fn texts(order: &Order, name: &CStr) -> Vec<String> {
    let of_name = order.params.iter().filter(|(n, _)| *n == name);
    of_name
        .filter_map(|(_, value)| match value {
            Param::Text(text) => Some(text.to_str().unwrap().to_owned()),
            _ => None,
        })
        .collect()
}

#[test]
fn definitions_move_with_guests_that_have_one() {
    let moves = sys::VIR_MIGRATE_PERSIST_DEST | sys::VIR_MIGRATE_UNDEFINE_SOURCE;
    let lasting = order(&spec(&[]), &guest_with(FLAT, true)).unwrap();
    assert_eq!(lasting.flags & moves, moves);
    let passing = order(&spec(&[]), &guest_with(FLAT, false)).unwrap();
    assert_eq!(passing.flags & moves, 0);
    for order in [lasting, passing] {
        assert!(has(&order, sys::VIR_MIGRATE_LIVE) && has(&order, sys::VIR_MIGRATE_PEER2PEER));
        assert!(!has(
            &order,
            sys::VIR_MIGRATE_UNSAFE | sys::VIR_MIGRATE_TUNNELLED
        ));
    }
}

#[test]
fn only_listed_disks_are_copied_and_chains_incrementally() {
    let guest = guest_with(&format!("{FLAT}{CHAIN}"), true);
    let copies = sys::VIR_MIGRATE_NON_SHARED_DISK | sys::VIR_MIGRATE_NON_SHARED_INC;
    let none = order(&spec(&[]), &guest).unwrap();
    assert!(!has(&none, copies), "libvirt would copy every disk");

    let flat = order(&spec(&["vda"]), &guest).unwrap();
    assert_eq!(flat.flags & copies, sys::VIR_MIGRATE_NON_SHARED_DISK);
    assert_eq!(texts(&flat, sys::VIR_MIGRATE_PARAM_MIGRATE_DISKS), ["vda"]);

    let both = order(&spec(&["vda", "vdb"]), &guest).unwrap();
    assert_eq!(both.flags & copies, sys::VIR_MIGRATE_NON_SHARED_INC);
    assert_eq!(
        texts(&both, sys::VIR_MIGRATE_PARAM_MIGRATE_DISKS),
        ["vda", "vdb"]
    );

    order(&spec(&["vdz"]), &guest).unwrap_err();
}

/// A disk in those words: its target is `vdX`, its file `/X`.
fn drive(letter: char, words: &str) -> String {
    format!("<disk type='file'><source file='/{letter}'/><target dev='vd{letter}'/>{words}</disk>")
}

/// What it is, its disks, those to be copied, those known to be the same, and whether
/// libvirt's own look is spared.
type Case<'a> = (&'a str, Vec<String>, &'a [&'a str], &'a [&'a str], bool);

#[test]
fn libvirts_own_look_is_spared_only_where_every_disk_has_earned_it() {
    let none = "<driver name='qemu' cache='none'/>";
    let back = "<driver name='qemu' cache='writeback'/>";
    let cases: [Case<'_>; 9] = [
        ("nothing to vouch for", vec![], &[], &[], false),
        ("the same file", vec![drive('a', none)], &[], &["vda"], true),
        (
            "cached by the host",
            vec![drive('a', back)],
            &[],
            &["vda"],
            false,
        ),
        (
            "cached by default",
            vec![drive('a', "")],
            &[],
            &["vda"],
            false,
        ),
        (
            "not known to be the same",
            vec![drive('a', none)],
            &[],
            &[],
            false,
        ),
        (
            "one of two is not known",
            vec![drive('a', none), drive('b', none)],
            &[],
            &["vda"],
            false,
        ),
        (
            "the other is copied",
            vec![drive('a', none), drive('b', back)],
            &["vdb"],
            &["vda"],
            true,
        ),
        (
            "the other is only read, which libvirt does not mind",
            vec![drive('a', none), drive('b', "<readonly/>")],
            &[],
            &["vda", "vdb"],
            true,
        ),
        (
            "only read",
            vec![drive('a', "<readonly/>")],
            &[],
            &["vda"],
            false,
        ),
    ];
    for (what, disks, copied, shared, expected) in cases {
        let mut spec = spec(copied);
        spec.shared_disks = shared.iter().map(|t| (*t).to_owned()).collect();
        let order = order(&spec, &guest_with(&disks.concat(), true)).unwrap();
        assert_eq!(has(&order, sys::VIR_MIGRATE_UNSAFE), expected, "{what}");
    }
}

#[test]
fn options_become_flags_and_parameters() {
    let mut wishes = spec(&[]);
    wishes.options = LiveOptions {
        post_copy: true,
        auto_converge: true,
        parallel_connections: Some(4),
        bandwidth_mib_s: Some(100),
        ..LiveOptions::default()
    };
    let order = order(&wishes, &guest_with(FLAT, true)).unwrap();
    for flag in [
        sys::VIR_MIGRATE_POSTCOPY,
        sys::VIR_MIGRATE_AUTO_CONVERGE,
        sys::VIR_MIGRATE_PARALLEL,
    ] {
        assert!(has(&order, flag));
    }
    for (name, value) in [
        (sys::VIR_MIGRATE_PARAM_BANDWIDTH, Param::ULong(100)),
        (sys::VIR_MIGRATE_PARAM_BANDWIDTH_POSTCOPY, Param::ULong(100)),
        (sys::VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS, Param::Int(4)),
    ] {
        assert!(order.params.contains(&(name, value)), "{name:?}");
    }
}

#[test]
fn a_destination_is_another_libvirtd_and_nothing_else() {
    for good in [
        "qemu+tcp://kvm2/system",
        "qemu+tls://[fd00::2]:16514/system",
    ] {
        assert_eq!(checked_uri(good).unwrap(), good);
    }
    for bad in [
        "qemu+ext://kvm2/system?command=/bin/true",
        "qemu+tcp://kvm2/system?command=/bin/true",
        "qemu+unix://kvm2/system",
        "qemu+tcp:///system",
        "qemu+tcp://kvm2/system#/system",
        "",
    ] {
        assert!(checked_uri(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn addresses_become_uris_and_nothing_else_does() {
    let uri = |address: &str| stream_uri(address);
    assert_eq!(uri("10.0.0.1").unwrap(), "tcp://10.0.0.1");
    assert_eq!(uri("fd00::1").unwrap(), "tcp://[fd00::1]");
    assert_eq!(uri("kvm-2.example.org").unwrap(), "tcp://kvm-2.example.org");
    for bad in [
        "",
        "a b",
        "host/path",
        "host:22",
        "exec:rm",
        "a\0b",
        "[::1]",
        "ä",
    ] {
        assert!(uri(bad).is_err(), "{bad:?}");
    }
    let mut nul = spec(&[]);
    nul.dest_libvirt_uri = "qemu+tcp://a\0b/system".to_owned();
    order(&nul, &guest_with(FLAT, true)).unwrap_err();
}
