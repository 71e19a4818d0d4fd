//! The XML reader against written definitions.

use drover_model::guest::{BackingImage, Disk, DiskSource, ImmovableKind as Kind, NicAttachment};

use super::*;

const RUNNING: Outside = Outside {
    power_state: PowerState::Running,
    persistent: true,
};

/// A guest as `virsh dumpxml` shows it while it runs, with metadata and devices to fill in.
fn domain(metadata: &str, devices: &str) -> String {
    format!(
        "<domain type='kvm' id='7'>
  <name>web &amp; db</name>
  <uuid>3e3fce45-4f53-4fa7-bb32-11f34168b82b</uuid>
  <metadata>{metadata}</metadata>
  <memory unit='KiB'>2097153</memory>
  <currentMemory unit='KiB'>1048576</currentMemory>
  <vcpu placement='static' current='2'>4</vcpu>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <boot dev='hd'/>
  </os>
  <cpu mode='custom' match='exact' check='full'>
    <model fallback='forbid'>EPYC-Rome</model>
    <feature policy='require' name='x2apic'/>
  </cpu>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    {devices}
  </devices>
</domain>"
    )
}

fn read(metadata: &str, devices: &str) -> Guest {
    guest(&domain(metadata, devices), RUNNING).unwrap()
}

fn immovable(devices: &str) -> Vec<(Kind, String)> {
    let found = read("", devices).immovable;
    found.into_iter().map(|i| (i.kind, i.what)).collect()
}

fn one_disk(xml: &str) -> Disk {
    let mut disks = read("", xml).disks;
    assert_eq!(disks.len(), 1);
    disks.remove(0)
}

#[test]
fn the_basics_are_read() {
    let guest = read("", "");
    assert_eq!(guest.id.to_string(), "3e3fce45-4f53-4fa7-bb32-11f34168b82b");
    assert_eq!(guest.name, "web & db");
    assert_eq!((guest.vcpus, guest.memory_mib), (2, 2049));
    assert_eq!(guest.virt_type, "kvm");
    assert_eq!(
        (guest.arch.as_str(), guest.machine.as_str()),
        ("x86_64", "pc-q35-7.2")
    );
    assert_eq!(guest.emulator, "/usr/bin/qemu-system-x86_64");
    assert_eq!(
        (guest.project.as_str(), guest.generation),
        (DEFAULT_PROJECT, 0)
    );
    let cpu = guest.cpu_xml.unwrap();
    assert!(
        cpu.starts_with("<cpu ") && cpu.contains("EPYC-Rome"),
        "{cpu}"
    );
    assert!(parse(&cpu, "cpu").is_ok());
}

#[test]
fn memory_comes_in_many_units() {
    let with = |memory: &str| {
        let text = domain("", "").replace("<memory unit='KiB'>2097153</memory>", memory);
        guest(&text, RUNNING).map(|g| g.memory_mib)
    };
    assert_eq!(with("<memory unit='GiB'>3</memory>"), Ok(3072));
    assert_eq!(with("<memory unit='MB'>1</memory>"), Ok(1));
    assert_eq!(with("<memory>1024</memory>"), Ok(1));
    assert_eq!(with("<memory unit='b'>1048577</memory>"), Ok(2));
    for bad in [
        "",
        "<memory/>",
        "<memory unit='parsec'>1</memory>",
        "<memory unit='TiB'>18446744073709551615</memory>",
        "<memory>-1</memory>",
    ] {
        assert!(with(bad).is_err(), "{bad}");
    }
}

#[test]
fn drovers_metadata_comes_before_novas() {
    let ours = format!(
        "<drover:instance xmlns:drover='{METADATA_NAMESPACE}'>
           <drover:project>blue</drover:project><drover:generation>3</drover:generation>
         </drover:instance>"
    );
    let nova = "<nova:instance xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'>
        <nova:name>x</nova:name>
        <nova:owner><nova:user uuid='u'>admin</nova:user>
          <nova:project uuid='9a8b7c'>demo</nova:project></nova:owner></nova:instance>";
    let owner_of = |metadata: &str| {
        let guest = read(metadata, "");
        (guest.project, guest.generation)
    };
    assert_eq!(owner_of(&ours), ("blue".to_owned(), 3));
    assert_eq!(owner_of(nova), ("9a8b7c".to_owned(), 0));
    assert_eq!(owner_of(&format!("{nova}{ours}")), ("blue".to_owned(), 3));
    assert_eq!(owner_of(&format!("{ours}{nova}")), ("blue".to_owned(), 3));
    let foreign =
        "<x:instance xmlns:x='https://example.org/'><x:project>evil</x:project></x:instance>";
    assert_eq!(owner_of(foreign), (DEFAULT_PROJECT.to_owned(), 0));
    assert_eq!(
        owner_of("<instance><project>evil</project></instance>").0,
        DEFAULT_PROJECT
    );
    let bare = format!("<drover:instance xmlns:drover='{METADATA_NAMESPACE}'/>");
    assert_eq!(owner_of(&format!("{bare}{nova}")), ("9a8b7c".to_owned(), 0));
    let long = format!(
        "<drover:instance xmlns:drover='{METADATA_NAMESPACE}'><drover:project>{}</drover:project></drover:instance>",
        "x".repeat(300)
    );
    assert_eq!(owner_of(&long).0, DEFAULT_PROJECT);
}

#[test]
fn a_live_chain_is_read_nearest_first() {
    let disk = one_disk(
        "<disk type='file' device='disk'>
           <driver name='qemu' type='qcow2' cache='none' discard='unmap'/>
           <source file='/var/lib/libvirt/images/top.qcow2' index='1'/>
           <backingStore type='file' index='3'>
             <format type='qcow2'/><source file='/srv/middle.qcow2'/>
             <backingStore type='block' index='4'>
               <format type='raw'/><source dev='/dev/vg/base'/><backingStore/>
             </backingStore>
           </backingStore>
           <target dev='vda' bus='virtio'/><alias name='virtio-disk0'/>
         </disk>",
    );
    assert_eq!(disk.target, "vda");
    assert_eq!(disk.local_path(), Some("/var/lib/libvirt/images/top.qcow2"));
    assert_eq!(
        (disk.format.as_str(), disk.cache.as_deref()),
        ("qcow2", Some("none"))
    );
    let image = |path: &str, format: &str| BackingImage {
        path: path.to_owned(),
        format: format.to_owned(),
        allocated_bytes: 0,
    };
    assert_eq!(
        disk.backing,
        [
            image("/srv/middle.qcow2", "qcow2"),
            image("/dev/vg/base", "raw")
        ]
    );
    assert!(disk.is_copied_when_local());
}

#[test]
fn other_drives_are_what_they_are() {
    let cdrom = one_disk(
        "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>
         <target dev='sda' bus='sata'/><readonly/></disk>",
    );
    assert_eq!(
        (cdrom.device.as_str(), &cdrom.source),
        ("cdrom", &DiskSource::Empty)
    );
    assert!(cdrom.read_only);

    let rbd = one_disk(
        "<disk type='network' device='disk'><driver name='qemu' type='raw' cache='default'/>
         <source protocol='rbd' name='vms/a'><host name='10.0.0.1' port='6789'/></source>
         <target dev='vdb'/><shareable/></disk>",
    );
    let network = DiskSource::Network {
        protocol: "rbd".to_owned(),
        name: "vms/a".to_owned(),
    };
    assert_eq!(
        (rbd.source, rbd.shareable, rbd.cache),
        (network, true, None)
    );

    let block = one_disk(
        "<disk type='block' device='lun'><source dev='/dev/sdx'/><target dev='sdb'/></disk>",
    );
    assert_eq!(
        (block.device.as_str(), block.format.as_str()),
        ("lun", "raw")
    );
    assert_eq!(block.local_path(), Some("/dev/sdx"));

    let relative =
        one_disk("<disk type='file'><source file='../../etc/passwd'/><target dev='vda'/></disk>");
    assert!(matches!(relative.source, DiskSource::Other { .. }));
}

#[test]
fn drives_that_cannot_be_carried_say_why() {
    let cases = [
        (
            "<disk type='nvme'><source type='pci'/><target dev='vda'/></disk>",
            "nvme",
        ),
        (
            "<disk type='volume'><source pool='p' volume='v'/><target dev='vda'/></disk>",
            "volume (p/v)",
        ),
        (
            "<disk type='file'><source file='/a'><encryption format='luks'/></source><target dev='vda'/></disk>",
            "encrypted",
        ),
        (
            "<disk type='file'><source file='/a'/><target dev='vda'/><transient/></disk>",
            "transient",
        ),
        (
            "<disk type='file'><source file='/a'/><backingStore type='network'><format type='raw'/>
             <source protocol='rbd' name='x'/></backingStore><target dev='vda'/></disk>",
            "not a local file",
        ),
        (
            "<disk type='network'><source protocol='nbd' name='e'><host name='127.0.0.1' port='1'/>
             </source><target dev='vda'/></disk>",
            "at 127.0.0.1",
        ),
        (
            "<disk type='network'><source protocol='nbd' name='e'><host name='[::1]' port='1'/>
             </source><target dev='vda'/></disk>",
            "at [::1]",
        ),
        (
            "<disk type='network'><source protocol='rbd' name='p/i'><host name='ceph1'/>
             <host name='localhost.localdomain'/></source><target dev='vda'/></disk>",
            "at localhost.localdomain",
        ),
        (
            "<disk type='network'><source protocol='nbd'><host transport='unix' socket='/run/n'/>
             </source><target dev='vda'/></disk>",
            "at the socket /run/n",
        ),
    ];
    for (xml, word) in cases {
        let found = immovable(xml);
        assert_eq!(found.len(), 1, "{xml}");
        assert_eq!(found[0].0, Kind::Disk);
        assert!(found[0].1.starts_with("vda: "), "{found:?}");
        assert!(found[0].1.contains(word), "{found:?}");
    }
    assert!(
        immovable("<disk type='file'><source file='/a'/><target dev='vda'/></disk>").is_empty()
    );
    let remote = "<disk type='network'><source protocol='nbd'><host name='store' port='1'/>
                  </source><target dev='vda'/></disk>";
    assert_eq!(immovable(remote), []);
}

#[test]
fn arguments_for_qemu_tie_a_guest_to_files_of_its_node() {
    let with = |value: &str| {
        let line = format!(
            "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
             <qemu:arg value='-global'/><qemu:arg value='{value}'/></qemu:commandline><devices>"
        );
        let xml = domain("", "").replace("<devices>", &line);
        guest(&xml, RUNNING).unwrap().immovable
    };
    assert_eq!(with("PIIX4_PM.disable_s3=1"), []);
    let found = with("name=opt/x,file=/etc/machine-id");
    assert!(found[0].what.contains("/etc/machine-id"), "{found:?}");
}

#[test]
fn a_chain_that_is_spelled_to_its_end_is_told_apart() {
    let image = |below: &str| {
        format!(
            "<backingStore type='file'><format type='raw'/><source file='/b'/>{below}</backingStore>"
        )
    };
    let ended = |chain: &str| {
        let disk =
            format!("<disk type='file'><source file='/a'/>{chain}<target dev='vda'/></disk>");
        ended_chains(&domain("", &disk)).unwrap() == ["vda"]
    };
    assert!(!ended("") && !ended(&image("")));
    assert!(ended("<backingStore/>") && ended(&image("<backingStore/>")));
}

#[test]
fn every_path_of_what_cannot_be_read_is_found() {
    let disks = "<disk type='file'><source file='/a &amp; b'/><target dev='vda'/></disk>
                 <disk type='file'><source file=\"/it&#x27;s\"/><target dev='vdb'/></disk>";
    let found = perhaps_paths(&domain("<deep>", disks));
    for path in ["/a & b", "/it's"] {
        assert!(found.iter().any(|found| found == path), "{found:?}");
    }
}

#[test]
fn a_block_job_is_a_job_and_its_target_is_in_use() {
    let xml = domain(
        "",
        "<disk type='file'><source file='/a'/>
           <backingStore type='file'><format type='raw'/><source file='/base'/></backingStore>
           <mirror type='file' file='/copy' format='raw' job='copy'>
             <format type='raw'/><source file='/copy'/></mirror>
           <target dev='vda'/></disk>",
    );
    let guest = guest(&xml, RUNNING).unwrap();
    assert_eq!(guest.active_job.as_deref(), Some("block job (copy) on vda"));
    let mut paths = storage(&xml).unwrap().paths;
    paths.sort();
    assert_eq!(paths, ["/a", "/base", "/copy"]);
}

#[test]
fn interfaces_and_what_they_are_plugged_into() {
    let guest = read(
        "",
        "<interface type='bridge'><mac address='52:54:00:AB:CD:01'/><source bridge='br0'/></interface>
         <interface type='network'><mac address='52:54:00:00:00:02'/>
           <source network='default' portid='x' bridge='virbr0'/></interface>
         <interface type='bridge'><mac address='52:54:00:00:00:06'/>
           <source network='lan' portid='x' bridge='br1'/></interface>
         <interface type='direct'><mac address='52:54:00:00:00:03'/><source dev='eth1' mode='bridge'/></interface>
         <interface type='user'><mac address='52:54:00:00:00:04'/></interface>
         <interface type='vhostuser'><mac address='52:54:00:00:00:05'/></interface>
         <interface type='bridge'/>",
    );
    assert!(guest.immovable.is_empty());
    let attachments: Vec<NicAttachment> = guest.nics.iter().map(|n| n.attachment.clone()).collect();
    let other = |kind: &str| NicAttachment::Other {
        kind: kind.to_owned(),
    };
    assert_eq!(
        attachments,
        [
            NicAttachment::Bridge {
                bridge: "br0".to_owned()
            },
            NicAttachment::Network {
                network: "default".to_owned()
            },
            NicAttachment::Network {
                network: "lan".to_owned()
            },
            NicAttachment::Direct {
                device: "eth1".to_owned()
            },
            NicAttachment::User,
            other("vhostuser"),
            other("bridge"),
        ]
    );
    assert_eq!(guest.nics[0].mac, "52:54:00:ab:cd:01");
}

#[test]
fn what_ties_a_guest_to_its_node_is_named_one_by_one() {
    let found = immovable(
        "<hostdev mode='subsystem' type='pci' managed='yes'><source>
           <address domain='0x0000' bus='0x3b' slot='0x00' function='0x1'/></source></hostdev>
         <hostdev mode='subsystem' type='pci'><teaming type='transient' persistent='ua-b'/></hostdev>
         <hostdev mode='subsystem' type='usb'><source><vendor id='0x1d6b'/><product id='0x0002'/></source></hostdev>
         <hostdev mode='subsystem' type='mdev' model='vfio-pci'><source>
           <address uuid='c2177883-f1bb-47f0-914d-32a22e3a8804'/></source></hostdev>
         <hostdev mode='subsystem' type='scsi'><source><adapter name='scsi_host0'/>
           <address bus='0' target='0' unit='3'/></source></hostdev>
         <hostdev mode='capabilities' type='storage'><source><block>/dev/sdf1</block></source></hostdev>
         <interface type='hostdev'><mac address='52:54:00:00:00:09'/><source>
           <address type='pci' domain='0x0000' bus='0x00' slot='0x07' function='0x0'/></source></interface>
         <interface type='vdpa'><mac address='52:54:00:00:00:0a'/><source dev='/dev/vhost-vdpa-0'/></interface>
         <filesystem type='mount'><driver type='virtiofs'/><source dir='/srv/share'/><target dir='share'/></filesystem>
         <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
         <tpm model='tpm-tis'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>
         <memory model='nvdimm'><source><path>/tmp/nvdimm</path></source></memory>
         <memory model='dimm'/>
         <shmem name='peer' role='peer'/><shmem name='own' role='master'/>
         <smartcard mode='host'/>
         <serial type='dev'><source path='/dev/ttyS1'/></serial>
         <serial type='pty'><source path='/dev/pts/3'/></serial>
         <channel type='unix'><source mode='bind' path='/x'/></channel>
         <channel type='pipe'><source path='/tmp/p'/></channel>",
    );
    let expected = [
        (Kind::HostDevice, "PCI 0000:3b:00.1"),
        (Kind::HostDevice, "USB 1d6b:0002"),
        (
            Kind::MediatedDevice,
            "mediated device c2177883-f1bb-47f0-914d-32a22e3a8804",
        ),
        (Kind::HostDevice, "SCSI scsi_host0 0:0:3"),
        (Kind::HostDevice, "storage /dev/sdf1"),
        (
            Kind::Interface,
            "52:54:00:00:00:09 (hostdev PCI 0000:00:07.0)",
        ),
        (
            Kind::Interface,
            "52:54:00:00:00:0a (vdpa /dev/vhost-vdpa-0)",
        ),
        (Kind::Filesystem, "share (virtiofs, /srv/share)"),
        (Kind::EmulatedTpm, "TPM emulator"),
        (Kind::Tpm, "TPM passthrough /dev/tpm0"),
        (Kind::Nvdimm, "nvdimm /tmp/nvdimm"),
        (Kind::HostDevice, "shared memory peer"),
        (Kind::HostDevice, "smart card (host)"),
        (Kind::CharacterDevice, "serial on dev /dev/ttyS1"),
        (Kind::CharacterDevice, "channel on pipe /tmp/p"),
    ];
    let found: Vec<(Kind, &str)> = found.iter().map(|(k, w)| (*k, w.as_str())).collect();
    assert_eq!(found, expected);
}

#[test]
fn launch_security_is_found_outside_the_devices() {
    let xml = domain("", "").replace(
        "<devices>",
        "<launchSecurity type='sev'><policy>0x0003</policy></launchSecurity><devices>",
    );
    let guest = guest(&xml, RUNNING).unwrap();
    assert_eq!(guest.immovable[0].kind, Kind::LaunchSecurity);
    assert_eq!(guest.immovable[0].what, "sev, policy 0x0003");
}

#[test]
fn malformed_definitions_are_errors() {
    let whole = domain("", "");
    for missing in ["name", "uuid", "memory", "vcpu", "os"] {
        let start = whole.find(&format!("<{missing}")).unwrap();
        let tag = format!("</{missing}>");
        let end = whole.find(&tag).unwrap() + tag.len();
        let text = format!("{}{}", &whole[..start], &whole[end..]);
        let error = guest(&text, RUNNING).unwrap_err();
        assert!(matches!(error, XmlError::Missing(_)), "{missing}: {error}");
    }
    for bad in [
        "",
        "<domain>",
        "<network/>",
        "no xml",
        "<domain type='kvm'/>",
    ] {
        assert!(guest(bad, RUNNING).is_err(), "{bad}");
    }
}

#[test]
fn every_torn_definition_is_an_error_and_never_a_panic() {
    let whole = domain(
        "",
        "<disk type='file'><source file='/a'/><target dev='vda'/></disk>",
    );
    for end in (0..whole.len()).filter(|i| whole.is_char_boundary(*i)) {
        assert!(guest(&whole[..end], RUNNING).is_err(), "{end}");
    }
}

#[test]
fn attributes_of_other_namespaces_are_kept_apart() {
    let note = "<app:note xmlns:app=\"urn:app\" app:file=\"1\" file=\"2\" xml:lang=\"en\" />";
    let read = parse(&domain(note, ""), "domain").unwrap();
    let written = element_text(&read).unwrap();
    assert!(written.contains(note), "{written}");
    assert_eq!(parse(&written, "domain").unwrap(), read);
}

#[test]
fn what_is_nested_without_end_is_refused() {
    let nested = |depth| format!("{}{}", "<cpu>".repeat(depth), "</cpu>".repeat(depth));
    assert!(parse(&nested(tree::DEEPEST), "cpu").is_ok());
    assert!(parse(&nested(tree::DEEPEST + 1), "cpu").is_err());
    assert!(parse(&nested(100_000), "cpu").is_err());
    // What looks like an end and is none does not hide it.
    for hidden in ["<cpu><!--</cpu>-->", "<cpu><![CDATA[</cpu>]]>"] {
        let text = format!("{}{}", hidden.repeat(1000), "</cpu>".repeat(1000));
        assert!(parse(&text, "cpu").is_err(), "{hidden}");
    }
    let flat = format!("<cpu>{}</cpu>", "<a b='>'/><c></c>".repeat(1000));
    assert!(parse(&flat, "cpu").is_ok());
}

#[test]
fn every_file_that_a_definition_names_is_read() {
    let text = domain(
        "",
        "<interface type='bridge'><source bridge='b'/><rom file='/rom'/></interface>
         <hostdev mode='subsystem' type='pci'><source/><rom bar='on' file='/vbios'/></hostdev>",
    );
    let text = text.replace(
        "<boot dev='hd'/>",
        "<loader readonly='yes' type='pflash'>/code.fd</loader>
         <nvram template='/vars.fd'>/nvram/own.fd</nvram>
         <kernel>/vmlinuz</kernel><initrd>/initrd</initrd><dtb>/board.dtb</dtb>
         <acpi><table type='slic'>/slic</table></acpi>",
    );
    let text = text.replace(
        "<devices>",
        "<sysinfo type='fwcfg'><entry name='opt/a' file='/fwcfg'/>
         <entry name='opt/b'>in here</entry></sysinfo><devices>",
    );
    let found = guest(&text, RUNNING).unwrap();
    let paths: Vec<_> = found.reads.iter().map(|f| f.path.as_str()).collect();
    let expected = [
        "/vmlinuz",
        "/initrd",
        "/board.dtb",
        "/code.fd",
        "/vars.fd",
        "/slic",
        "/fwcfg",
        "/rom",
        "/vbios",
    ];
    assert_eq!(paths, expected, "and not its own variables");
    assert_eq!(found.uses().len(), expected.len());
    assert_eq!(read("", "").reads, []);
}

#[test]
fn addresses_are_read_wherever_something_listens() {
    let bound = |devices: &str| -> Vec<(String, Option<u16>, bool)> {
        let found = read("", devices).bound.into_iter();
        found.map(|b| (b.address, b.port, b.udp)).collect()
    };
    let there = |port, udp| vec![("192.0.2.1".to_owned(), port, udp)];
    for device in [
        "<graphics type='vnc' port='5900' autoport='yes' listen='192.0.2.1'>
         <listen type='address' address='192.0.2.1'/></graphics>",
        "<graphics type='spice' autoport='yes' listen='192.0.2.1'/>",
    ] {
        assert_eq!(bound(device), there(None, false), "{device}");
    }
    let fixed = "<graphics type='vnc' port='5905' autoport='no' listen='192.0.2.1'/>";
    assert_eq!(bound(fixed), there(Some(5905), false));
    for name in ["serial", "console", "parallel", "channel"] {
        let device = format!(
            "<{name} type='tcp'><source mode='bind' host='192.0.2.1' service='4555'/>
             <protocol type='telnet'/></{name}>"
        );
        assert_eq!(bound(&device), there(Some(4555), false), "{name}");
    }
    let udp = "<serial type='udp'><source mode='bind' host='192.0.2.1' service='2'/>
               <source mode='connect' host='203.0.113.9' service='3'/></serial>";
    assert_eq!(bound(udp), there(Some(2), true));
    for device in [
        "<rng model='virtio'><backend model='egd' type='tcp'>
         <source mode='bind' host='192.0.2.1' service='8'/></backend></rng>",
        "<redirdev bus='usb' type='tcp'><source mode='bind' host='192.0.2.1' service='8'/></redirdev>",
        "<smartcard mode='passthrough' type='tcp'>
         <source mode='bind' host='192.0.2.1' service='8'/></smartcard>",
        "<interface type='server'><source address='192.0.2.1' port='8'/></interface>",
    ] {
        assert_eq!(bound(device), there(Some(8), false), "{device}");
    }
    let nic = "<interface type='udp'><source address='203.0.113.9' port='1'>
               <local address='192.0.2.1' port='9'/></source></interface>";
    assert_eq!(bound(nic), there(Some(9), true));
    for everywhere in [
        "<graphics type='vnc' autoport='yes' listen='127.0.0.1'/>",
        "<graphics type='vnc' autoport='yes' listen='0.0.0.0'/>",
        "<graphics type='vnc' autoport='yes'><listen type='address' address='::'/></graphics>",
        "<graphics type='vnc'><listen type='socket' socket='/s'/></graphics>",
        "<graphics type='vnc' autoport='yes'>
         <listen type='network' address='192.0.2.1' network='default'/></graphics>",
        "<serial type='tcp'><source mode='connect' host='192.0.2.1' service='1'/></serial>",
        "<serial type='unix'><source mode='bind' path='/s'/></serial>",
        "<serial type='pty'/>",
    ] {
        assert_eq!(bound(everywhere), [], "{everywhere}");
    }
}

#[test]
fn an_input_device_of_the_host_stays() {
    for device in [
        "<input type='passthrough' bus='virtio'><source evdev='/dev/input/event1'/></input>",
        "<input type='evdev'><source dev='/dev/input/event1'/></input>",
    ] {
        let expected = (Kind::HostDevice, "input /dev/input/event1".to_owned());
        assert_eq!(immovable(device), [expected]);
    }
    assert_eq!(immovable("<input type='tablet' bus='usb'/>"), []);
}

#[test]
fn a_tpm_whose_state_an_older_libvirt_removes_is_known() {
    let with = |backend: &str| {
        loses_its_tpm(&format!(
            "<domain><devices><tpm model='tpm-crb'>{backend}</tpm></devices></domain>"
        ))
    };
    assert!(with("<backend type='emulator' version='2.0'/>").unwrap());
    assert!(with("<backend type='emulator' persistent_state='no'/>").unwrap());
    assert!(!with("<backend type='emulator' persistent_state='yes'/>").unwrap());
    assert!(!with("<backend type='passthrough'><device path='/dev/tpm0'/></backend>").unwrap());
    assert!(!loses_its_tpm("<domain/>").unwrap());
}
