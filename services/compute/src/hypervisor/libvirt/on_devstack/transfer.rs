//! Guests that change hands on their node. What the driver does to files it does
//! on storage that node and machine see alike.

use drover_model::{
    api::compute::{DiskMove, NicMove, TransferPlan},
    guest::{BackingImage, Guest, NicAttachment},
    migration::TransferMode,
    project::Location,
};

use super::*;
use crate::hypervisor::{ColdDriver, Definition, Mirror, TransferDriver};

const GIVERS: &str = "br-guests";
const RECEIVERS: &str = "br-real-two";
const RECEIVERS_NETWORK: &str = "real-two";
const MAC: &str = "52:54:00:0a:77:01";
const METADATA: &str = "<drover:instance xmlns:drover='https://drover.dev/xmlns/instance/1'>\
    <drover:project>giver</drover:project><drover:generation>2</drover:generation></drover:instance>\
    <nova:instance xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'><nova:name>n</nova:name>\
    <nova:owner><nova:user uuid='u'>who</nova:user><nova:project uuid='giver'>Giver</nova:project>\
    </nova:owner></nova:instance>";

/// A guest with a NIC and a disk over a base that it names by its place.
struct Owned<'a> {
    stack: &'a Stack,
    id: InstanceId,
    place: PathBuf,
    driver: Arc<LibvirtDriver>,
}

impl<'a> Owned<'a> {
    fn new(stack: &'a Stack) -> Self {
        let id = InstanceId(Uuid::new_v4());
        let place = stack.shared.join(format!("real-{id}"));
        for name in ["giver", "receiver"] {
            std::fs::create_dir_all(place.join(name)).unwrap();
        }
        let mut noise = vec![0_u8; 16 << 20];
        fastrand::fill(&mut noise);
        std::fs::write(place.join("giver/base"), noise).unwrap();
        let top = place.join("giver/disk");
        random_image(&top, &["-F", "raw", "-b", "base"]);
        let driver = stack.driver(FROM);
        let owned = Self {
            stack,
            id,
            place,
            driver,
        };
        owned.define(&format!(
            "<domain type='qemu'><name>real-{id}</name><uuid>{id}</uuid><title>before</title>
             <metadata>{METADATA}</metadata><memory unit='MiB'>32</memory><vcpu>1</vcpu>
             <os><type arch='x86_64' machine='pc'>hvm</type></os>
             <devices><disk type='file' device='disk'>
               <driver name='qemu' type='qcow2' cache='none'/><source file='{}'/>
               <target dev='vda' bus='virtio'/></disk>
             <interface type='bridge'><mac address='{MAC}'/><source bridge='{GIVERS}'/>
               <model type='virtio'/></interface></devices></domain>",
            top.display()
        ));
        owned
    }

    fn running(stack: &'a Stack) -> Self {
        let owned = Self::new(stack);
        owned.virsh(&["start"]);
        owned
    }

    fn define(&self, xml: &str) {
        let file = self.place.join("domain.xml");
        std::fs::write(&file, xml).unwrap();
        self.stack.virsh(FROM, &["define", &file.to_string_lossy()]);
    }

    /// A command for this domain.
    fn virsh(&self, command: &[&str]) -> String {
        let id = self.id.to_string();
        let (name, rest) = command.split_first().unwrap();
        self.stack
            .virsh(FROM, &[&[*name, id.as_str()], rest].concat())
    }

    fn at(&self, name: &str) -> String {
        self.place.join(name).display().to_string()
    }

    fn disk(&self) -> DiskMove {
        DiskMove {
            target: "vda".to_owned(),
            from: self.at("giver/disk"),
            to: self.at("receiver/disk"),
            format: "qcow2".to_owned(),
            backing: vec![BackingImage {
                path: self.at("giver/base"),
                format: "raw".to_owned(),
                allocated_bytes: 0,
            }],
            flatten: false,
            data_bytes: 8 << 20,
        }
    }

    async fn guest(&self) -> Guest {
        self.driver.guest(self.id).await.unwrap().unwrap()
    }

    async fn lasting(&self) -> Guest {
        self.driver.lasting_guest(self.id).await.unwrap().unwrap()
    }

    async fn whole_copy(&self, disk: &DiskMove) {
        until("the disk copied", async || {
            let state = self.driver.mirror_disk(self.id, disk, None).await;
            (state.unwrap() == Mirror::Ready).then_some(())
        })
        .await;
    }

    async fn is_in(&self, path: &str) {
        for guest in [self.guest().await, self.lasting().await] {
            assert_eq!(guest.disks[0].local_path(), Some(path));
        }
    }
}

impl Drop for Owned<'_> {
    fn drop(&mut self) {
        for act in ["destroy", "undefine"] {
            let mut virsh = Command::new("virsh");
            let uri = self.stack.uri(FROM);
            let _ = virsh
                .args(["-q", "-c", &uri, act, &self.id.to_string()])
                .output();
        }
        let _ = std::fs::remove_dir_all(&self.place);
    }
}

/// The receiver's bridge and a libvirt network on it, as long as the guard lives.
struct Networks<'a>(&'a Stack);

impl<'a> Networks<'a> {
    fn new(stack: &'a Stack) -> Self {
        let networks = Self(stack);
        networks.remove();
        networks.on(&["ip", "link", "add", RECEIVERS, "type", "bridge"]);
        networks.on(&["ip", "link", "set", RECEIVERS, "up"]);
        let file = stack.shared.join("real-network.xml");
        let xml = format!(
            "<network><name>{RECEIVERS_NETWORK}</name><forward mode='bridge'/>
             <bridge name='{RECEIVERS}'/></network>"
        );
        std::fs::write(&file, xml).unwrap();
        stack.virsh(FROM, &["net-create", &file.to_string_lossy()]);
        std::fs::remove_file(file).unwrap();
        networks
    }

    fn on(&self, command: &[&str]) -> String {
        let mut on = Command::new(self.0.commands.join("on"));
        output(on.arg(FROM).args(command))
    }

    fn remove(&self) {
        let uri = self.0.uri(FROM);
        let _ = Command::new("virsh")
            .args(["-q", "-c", &uri, "net-destroy", RECEIVERS_NETWORK])
            .output();
        let _ = Command::new(self.0.commands.join("on"))
            .args([FROM, "ip", "link", "del", RECEIVERS])
            .output();
    }
}

impl Drop for Networks<'_> {
    fn drop(&mut self) {
        self.remove();
    }
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

fn plan(to: NicAttachment) -> TransferPlan {
    TransferPlan {
        mode: TransferMode::Live,
        project: "receiver".parse().unwrap(),
        project_name: "The receiver".to_owned(),
        nics: vec![NicMove {
            mac: MAC.to_owned(),
            from: bridge(GIVERS),
            to,
            new_mac: None,
        }],
        disks: Vec::new(),
        name: None,
        title: Some("after".to_owned()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_guest_changes_hands_and_back() {
    let Some(stack) = Stack::find() else { return };
    let networks = Networks::new(&stack);
    let owned = Owned::running(&stack);
    let (driver, id) = (&owned.driver, owned.id);
    let before = driver.standing(id).await.unwrap();
    let of_bridge = || networks.on(&["bridge", "link"]);
    for to in [bridge(RECEIVERS), network(RECEIVERS_NETWORK)] {
        let plan = plan(to.clone());
        let cut = driver.hand_over(id, &plan).await.unwrap();
        println!("cut for {cut:?}");
        assert!(cut > Duration::ZERO);
        assert!(of_bridge().contains(&format!("master {RECEIVERS} ")));
        for guest in [owned.guest().await, owned.lasting().await] {
            assert_eq!(guest.nics[0].attachment, to);
            assert_eq!((guest.project.as_str(), guest.generation), ("receiver", 2));
        }
        let after = driver.standing(id).await.unwrap();
        for text in [&after.live, &after.lasting] {
            assert!(text.contains("<title>after</title>"), "{text}");
            assert!(text.contains("<nova:project uuid=\"receiver\">The receiver<"));
            for gone in ["giver<", "nova:user", GIVERS, "state='down'"] {
                assert!(!text.contains(gone), "{gone} in {text}");
            }
        }
        assert_eq!(driver.hand_over(id, &plan).await.unwrap(), Duration::ZERO);
        for _ in 0..2 {
            driver.hand_back(id, &before).await.unwrap();
            assert_eq!(driver.standing(id).await.unwrap(), before);
        }
    }
    assert!(is_wrong_state(stop_and(&owned).await));
}

async fn stop_and(owned: &Owned<'_>) -> Result<Duration> {
    owned.virsh(&["destroy"]);
    owned
        .driver
        .hand_over(owned.id, &plan(bridge(RECEIVERS)))
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handover_that_died_on_the_way_goes_on_or_back() {
    let Some(stack) = Stack::find() else { return };
    let _networks = Networks::new(&stack);
    let owned = Owned::running(&stack);
    let (driver, id) = (&owned.driver, owned.id);
    let before = driver.standing(id).await.unwrap();
    let file = owned.at("nic.xml");
    let half = format!(
        "<interface type='bridge'><mac address='{MAC}'/><source bridge='{RECEIVERS}'/>\
         <model type='virtio'/><link state='down'/></interface>"
    );
    let link = || owned.virsh(&["domif-getlink", MAC]);
    for goes_on in [true, false] {
        std::fs::write(&file, &half).unwrap();
        owned.virsh(&["update-device", &file, "--live"]);
        assert!(link().contains("down"));
        if goes_on {
            let plan = plan(bridge(RECEIVERS));
            driver.hand_over(id, &plan).await.unwrap();
            assert!(!link().contains("down"), "{}", link());
            assert_eq!(owned.lasting().await.nics[0].attachment, plan.nics[0].to);
        }
        driver.hand_back(id, &before).await.unwrap();
        assert!(!link().contains("down"), "{}", link());
        assert_eq!(owned.guest().await.nics[0].attachment, bridge(GIVERS));
        assert_eq!(owned.lasting().await.nics[0].attachment, bridge(GIVERS));
    }
    // A link that was down before stays so.
    owned.virsh(&["domif-setlink", MAC, "down"]);
    let cut = driver
        .hand_over(id, &plan(bridge(RECEIVERS)))
        .await
        .unwrap();
    assert_eq!((cut, link().contains("down")), (Duration::ZERO, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_guests_disk_moves_and_back() {
    let Some(stack) = Stack::find() else { return };
    let owned = Owned::running(&stack);
    let (driver, id, disk) = (&owned.driver, owned.id, owned.disk());
    assert!(is_wrong_state(driver.pivot_disk(id, &disk).await));
    std::fs::write(&disk.to, "somebody's").unwrap();
    let there = driver.mirror_disk(id, &disk, None).await;
    assert_eq!(there, Err(HypervisorError::Exists(disk.to.clone())));
    std::fs::remove_file(&disk.to).unwrap();

    // Slow enough to be given up, and to outlive libvirtd.
    for given_up in [true, false] {
        let rate = Some(1 << 20);
        driver.mirror_disk(id, &disk, rate).await.unwrap();
        assert!(is_wrong_state(driver.pivot_disk(id, &disk).await));
        if given_up {
            driver.abandon_mirror(id, &disk).await.unwrap();
            driver.abandon_mirror(id, &disk).await.unwrap();
            owned.is_in(&disk.from).await;
            std::fs::remove_file(&disk.to).unwrap();
        } else {
            let mut events = driver.events();
            drop(stack.kill(FROM));
            connection(&mut events, true).await;
        }
    }
    owned.whole_copy(&disk).await;
    let lasting_before = owned.virsh(&["dumpxml", "--inactive"]);
    let begun = std::time::Instant::now();
    driver.pivot_disk(id, &disk).await.unwrap();
    println!("changed over in {:?}", begun.elapsed());
    owned.is_in(&disk.to).await;
    qemu_img(&["compare", "-q", "-U", &disk.from, &disk.to]);
    assert_eq!(owned.guest().await.disks[0].backing, disk.backing);
    let moved = driver.mirror_disk(id, &disk, None).await;
    assert_eq!(moved, Ok(Mirror::Moved));

    // As if libvirtd had died before it wrote the lasting definition.
    owned.define(&lasting_before);
    driver.pivot_disk(id, &disk).await.unwrap();
    owned.is_in(&disk.to).await;

    std::fs::remove_file(&disk.from).unwrap();
    let back = DiskMove {
        flatten: true,
        ..disk.reversed()
    };
    owned.whole_copy(&back).await;
    driver.pivot_disk(id, &back).await.unwrap();
    owned.is_in(&disk.from).await;
    assert_eq!(owned.guest().await.disks[0].backing, []);
    qemu_img(&["compare", "-q", "-U", &disk.from, &disk.to]);
    assert!(is_wrong_state(driver.remove_disk(&disk.from).await));
    driver.remove_disk(&disk.to).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_of_a_guest_that_is_off_is_placed() {
    let Some(stack) = Stack::find() else { return };
    let _networks = Networks::new(&stack);
    let owned = Owned::new(&stack);
    let (driver, id, disk) = (&owned.driver, owned.id, owned.disk());
    assert_eq!(
        driver.lasting_guest(id).await.unwrap().unwrap().disks[0]
            .backing
            .len(),
        1
    );
    for _ in 0..2 {
        driver.place_disk(&disk, None).await.unwrap();
    }
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    let far = DiskMove {
        to: elsewhere.path().join("disk").display().to_string(),
        ..disk.clone()
    };
    driver.place_disk(&far, None).await.unwrap();
    qemu_img(&["compare", "-q", &disk.from, &far.to]);
    let plan = TransferPlan {
        disks: vec![disk.clone()],
        name: Some(format!("other-{id}")),
        ..plan(bridge(RECEIVERS))
    };
    let old = driver.definition(id).await.unwrap().unwrap();
    let new = driver.transferred(&old, &plan).unwrap();
    driver.define(&new, None).await.unwrap();
    driver.remove_disk(&disk.from).await.unwrap();
    driver.start(id).await.unwrap();
    owned.is_in(&disk.to).await;
    let guest = owned.guest().await;
    assert_eq!(
        (guest.name, guest.project.as_str()),
        (plan.name.unwrap(), "receiver")
    );
    assert!(is_wrong_state(
        driver.place_disk(&disk.reversed(), None).await
    ));
    let snapshots = Definition {
        snapshots: vec![String::new()],
        ..old
    };
    assert!(driver.transferred(&snapshots, &plan_of_nothing()).is_err());
}

fn plan_of_nothing() -> TransferPlan {
    TransferPlan {
        nics: Vec::new(),
        title: None,
        ..plan(NicAttachment::User)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_tells_what_a_transfer_asks() {
    let Some(stack) = Stack::find() else { return };
    let _networks = Networks::new(&stack);
    let owned = Owned::new(&stack);
    let (driver, id) = (&owned.driver, owned.id);
    let here = network(RECEIVERS_NETWORK);
    let asked = [here.clone(), network("real-gone"), bridge("br-real-gone")];
    assert_eq!(driver.networks_present(&asked).await, Ok(vec![here]));

    let pool = format!("real-{id}");
    let target = owned.at("receiver");
    stack.virsh(FROM, &["pool-create-as", &pool, "dir", "--target", &target]);
    let locations = [
        Location::Directory {
            path: owned.at("giver"),
        },
        Location::Pool { pool: pool.clone() },
        Location::Pool {
            pool: "real-gone".to_owned(),
        },
    ];
    let names = ["disk", "free"].map(str::to_owned);
    let facts = driver.location_facts(&locations, &names).await.unwrap();
    stack.virsh(FROM, &["pool-destroy", &pool]);
    assert_eq!(facts[0].taken, ["disk"]);
    assert_eq!(facts[1].directory, Ok(target));
    assert_eq!(facts[1].file_system, facts[0].file_system);
    assert!(
        facts[2]
            .directory
            .as_ref()
            .is_err_and(|e| e.contains("real-gone"))
    );

    let (top, base) = (owned.at("giver/disk"), owned.at("giver/base"));
    let other = InstanceId(Uuid::new_v4());
    let paths = [top, base.clone(), owned.at("receiver/disk")];
    assert_eq!(driver.other_users(id, &paths).await.unwrap(), []);
    let used = driver.other_users(other, &paths).await.unwrap();
    assert_eq!(used.len(), 2, "{used:?}");
    assert!(used.iter().all(|file| file.domain == pool), "{used:?}");
}
