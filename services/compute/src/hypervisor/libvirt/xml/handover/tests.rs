//! Definitions handed over, against written ones.

use drover_model::{
    METADATA_NAMESPACE,
    guest::{DiskSource, NicAttachment, PowerState},
    migration::TransferMode,
};

use super::*;
use crate::hypervisor::libvirt::xml::{
    Outside, children, guest,
    owner::{changes, differences, is_same},
};

const NOVA: &str = "<nova:instance xmlns:nova=\"http://openstack.org/xmlns/libvirt/nova/1.1\">\
    <nova:name>web</nova:name><nova:ports><nova:port uuid=\"g\"/></nova:ports><nova:owner><nova:user uuid=\"u\">n</nova:user>\
    <nova:project uuid=\"p\">demo</nova:project></nova:owner></nova:instance>";
const OTHER: &str = "<app:note xmlns:app=\"urn:app\" kind=\"k\">kept &amp; whole</app:note>";
const RECEIVER: Owner<'static> = Owner {
    id: "p2",
    name: "Second <& last>",
};

fn domain(metadata: &str) -> String {
    format!(
        "<domain type='kvm'><name>vm</name><uuid>3e3fce45-4f53-4fa7-bb32-11f34168b82b</uuid>\
         <metadata>{metadata}</metadata><title>of the giver</title>\
         <memory unit='MiB'>64</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='pc'>hvm</type></os><devices>\
         <disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none'/>\
           <source file='/old/a.qcow2'/><backingStore type='file'><format type='raw'/>\
           <source file='/old/base'/><backingStore/></backingStore><target dev='vda'/></disk>\
         <disk type='file' device='disk'><driver name='qemu' type='raw'/>\
           <source file='/old/b.raw'/><target dev='vdb'/></disk>\
         <interface type='bridge'><mac address='52:54:00:AA:00:01'/>\
           <source bridge='br-giver'/><target dev='tap-giver'/><vlan><tag id='7'/></vlan>\
           <virtualport type='openvswitch'/><filterref filter='giver'/><model type='virtio'/>\
           <bandwidth><inbound average='1'/></bandwidth></interface>\
         <interface type='user'><mac address='52:54:00:aa:00:02'/><backend type='passt'/>\
           <ip family='ipv4' address='10.0.0.1'/><portForward proto='tcp'/><model type='e1000'/>\
         </interface></devices></domain>"
    )
}

fn drovers(inside: &str) -> String {
    format!("<drover:instance xmlns:drover='{METADATA_NAMESPACE}'>{inside}</drover:instance>")
}

fn bridge(name: &str) -> NicAttachment {
    NicAttachment::Bridge {
        bridge: name.to_owned(),
    }
}

fn network(name: &str) -> NicAttachment {
    NicAttachment::Network {
        network: name.to_owned(),
    }
}

fn nic(mac: &str, to: NicAttachment, new_mac: Option<&str>) -> NicMove {
    NicMove {
        mac: mac.to_owned(),
        from: NicAttachment::User,
        to,
        new_mac: new_mac.map(str::to_owned),
    }
}

fn disk_move(flatten: bool) -> DiskMove {
    DiskMove {
        target: "vda".to_owned(),
        from: "/old/a.qcow2".to_owned(),
        to: "/new/a&b.qcow2".to_owned(),
        format: "qcow2".to_owned(),
        backing: Vec::new(),
        flatten,
        data_bytes: 0,
    }
}

fn plan() -> TransferPlan {
    TransferPlan {
        mode: TransferMode::Cold,
        project: RECEIVER.id.parse().unwrap(),
        project_name: RECEIVER.name.to_owned(),
        nics: Vec::new(),
        disks: Vec::new(),
        name: None,
        title: None,
    }
}

fn read(xml: &str) -> drover_model::guest::Guest {
    let outside = Outside {
        power_state: PowerState::Shutdown,
        persistent: true,
    };
    guest(xml, outside).unwrap()
}

#[test]
fn a_definition_becomes_the_receivers_and_nothing_of_the_givers_wiring_stays() {
    let old =
        drovers("<drover:project>p1</drover:project><drover:generation>3</drover:generation>");
    let plan = TransferPlan {
        nics: vec![
            nic(
                "52:54:00:aa:00:01",
                bridge("br-two"),
                Some("52:54:00:bb:00:01"),
            ),
            nic("52:54:00:AA:00:02", network("lan"), None),
        ],
        disks: vec![disk_move(false)],
        name: Some("vm-two".to_owned()),
        title: Some("a <new> title".to_owned()),
        ..plan()
    };
    let text = transferred(&domain(&format!("{old}{NOVA}{OTHER}")), &plan).unwrap();
    let now = read(&text);
    assert_eq!((now.name.as_str(), now.project.as_str()), ("vm-two", "p2"));
    assert_eq!(now.generation, 3);
    let nics: Vec<_> = now
        .nics
        .iter()
        .map(|n| (n.mac.as_str(), &n.attachment))
        .collect();
    assert_eq!(
        nics,
        [
            ("52:54:00:bb:00:01", &bridge("br-two")),
            ("52:54:00:aa:00:02", &network("lan"))
        ]
    );
    let path = plan.disks[0].to.clone();
    assert_eq!(now.disks[0].source, DiskSource::File { path });
    assert_eq!(now.disks[0].backing.len(), 1, "what lies below stays said");
    assert_eq!(now.disks[1].local_path(), Some("/old/b.raw"));
    let root = parse(&text, "domain").unwrap();
    assert_eq!(owner::title(&root).as_deref(), Some("a <new> title"));
    for gone in [
        "giver",
        "vlan",
        "virtualport",
        "filterref",
        "tap-",
        "passt",
        "portForward",
        "10.0.0.1",
        "nova:user",
        "nova:port",
        "demo",
        ">p1<",
    ] {
        assert!(!text.contains(gone), "{gone} in {text}");
    }
    for kept in [
        "e1000",
        "<inbound average=\"1\"",
        "cache=\"none\"",
        "nova:name",
        OTHER,
    ] {
        assert!(text.contains(kept), "{kept} not in {text}");
    }
    let instances: Vec<_> = children(root.get_child("metadata").unwrap(), "instance").collect();
    let novas = descend(instances[1], &["owner", "project"]).unwrap();
    assert_eq!(attribute(novas, "uuid"), Some(RECEIVER.id));
    assert_eq!(novas.get_text().unwrap(), RECEIVER.name);
}

#[test]
fn what_is_not_in_the_plan_stays() {
    let old = drovers("<drover:project>p2</drover:project>");
    let before = domain(&old);
    let same = |after: &str| {
        let (before, after) = (parse(&before, "domain"), parse(after, "domain"));
        is_same(&before.unwrap(), &after.unwrap())
    };
    assert!(same(&transferred(&before, &plan()).unwrap()));
    let flat = TransferPlan {
        disks: vec![disk_move(true)],
        ..plan()
    };
    let flat = transferred(&before, &flat).unwrap();
    assert!(!same(&flat));
    assert_eq!(read(&flat).disks[0].backing, [], "nothing is below it now");
}

#[test]
fn what_is_not_there_is_an_error() {
    let missing_nic = TransferPlan {
        nics: vec![nic("52:54:00:aa:00:09", bridge("b"), None)],
        ..plan()
    };
    let not_pluggable = TransferPlan {
        nics: vec![nic("52:54:00:aa:00:01", NicAttachment::User, None)],
        ..plan()
    };
    let disk = |change: &dyn Fn(&mut DiskMove)| {
        let mut disk = disk_move(false);
        change(&mut disk);
        TransferPlan {
            disks: vec![disk],
            ..plan()
        }
    };
    for plan in [
        missing_nic,
        not_pluggable,
        disk(&|d| d.target = "vdz".to_owned()),
        disk(&|d| d.from = "/elsewhere".to_owned()),
    ] {
        assert!(transferred(&domain(""), &plan).is_err(), "{plan:?}");
    }
}

#[test]
fn metadata_changes_once_and_goes_back() {
    let old =
        drovers("<drover:project>p1</drover:project><drover:generation>3</drover:generation>");
    for before in [
        domain(""),
        domain(&format!("{NOVA}{OTHER}")),
        domain(&format!("{old}{OTHER}{NOVA}")),
        domain("").replace("<metadata></metadata>", ""),
    ] {
        let before = parse(&before, "domain").unwrap();
        let mut after = before.clone();
        owner::give(&mut after, RECEIVER);
        let there = changes(&before, RECEIVER).unwrap();
        assert_eq!(
            there.len(),
            1 + usize::from(text_of(&before).contains("nova"))
        );
        for change in &there {
            let content = change.content.as_ref().unwrap();
            assert!(content.starts_with("<instance>"), "{content}");
            assert!(
                !content.contains("drover:") && !content.contains("nova:"),
                "{content}"
            );
            assert!(content.contains("p2"), "{content}");
        }
        assert_eq!(changes(&after, RECEIVER).unwrap(), []);
        let back = differences(&after, &before).unwrap();
        assert_eq!(back.len(), there.len());
        let had_ours = text_of(&before).contains(METADATA_NAMESPACE);
        let ours = back.iter().find(|c| c.namespace == METADATA_NAMESPACE);
        assert_eq!(
            ours.unwrap().content.is_some(),
            had_ours,
            "made by us: taken away"
        );
    }
}

fn text_of(element: &Element) -> String {
    element_text(element).unwrap()
}

#[test]
fn a_running_interface_is_given_back_without_what_libvirt_made_up() {
    let live = "<domain><devices><interface type='network'><mac address='52:54:00:aa:00:01'/>\
        <source network='lan' portid='9d1f' bridge='virbr0'/><target dev='vnet3'/>\
        <link state='up'/><alias name='net0'/></interface></devices></domain>";
    let by_bridge = live.replace("type='network'", "type='bridge'");
    for live in [live, by_bridge.as_str()] {
        let live = parse(live, "domain").unwrap();
        let interface = rewire::interface(&live, "52:54:00:AA:00:01").unwrap();
        let bare = text_of(&rewire::without_traces(interface));
        assert!(!bare.contains("portid") && !bare.contains("virbr0") && !bare.contains("vnet3"));
        assert!(
            bare.contains("type=\"network\"")
                && bare.contains("network=\"lan\"")
                && bare.contains("net0"),
            "{bare}"
        );
        let down = rewire::down(interface);
        assert!(rewire::is_down(&down) && !rewire::is_down(interface));
        assert!(!rewire::is_down(&rewire::up(&down)));
        assert!(rewire::interface(&live, "52:54:00:aa:00:02").is_none());
    }
}

#[test]
fn a_mirror_is_read_as_libvirt_shows_it() {
    let disk = |inside: &str| {
        let text = format!(
            "<domain><devices><disk type='file'><source file='/old/a.qcow2'/>{inside}\
             <target dev='vda'/></disk></devices></domain>"
        );
        parse(&text, "domain").unwrap()
    };
    let mirror = |inside: &str| {
        let domain = disk(inside);
        let found = super::mirror(super::disk(&domain, "vda").unwrap());
        found.map(|(file, ready)| (file.to_owned(), ready))
    };
    assert_eq!(mirror(""), None);
    let begun =
        "<mirror type='file' file='/n' format='qcow2' job='copy'><source file='/n'/></mirror>";
    assert_eq!(mirror(begun), Some(("/n".to_owned(), false)));
    let whole = begun.replace("job='copy'", "job='copy' ready='yes'");
    assert_eq!(mirror(&whole), Some(("/n".to_owned(), true)));
    let target = copy_target(&disk_move(false)).unwrap();
    let target = parse(&target, "disk").unwrap();
    assert_eq!(file(&target), Some("/new/a&b.qcow2"));
}
