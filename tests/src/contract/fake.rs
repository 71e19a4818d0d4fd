//! The fake driver's stage: two nodes of one fabric, in virtual time.

use std::{collections::BTreeMap, sync::Arc, sync::Mutex};

use anyhow::{Context, Result, anyhow};
use async_trait::async_trait;
use drover_compute::hypervisor::{
    Hypervisor, MigrateSpec,
    fake::{Content, Fabric, FakeDriver, GuestBuilder, Violation},
};
use drover_model::{guest::NicAttachment, ids::InstanceId, migration::LiveOptions};

use super::{MEMORY_MIB, Place, REDEFINED_VCPUS, Receiver, Stage, Wish, files};

const SHARED: &str = "/srv/shared";
const LOCAL: &str = "/var/lib/libvirt/images";
/// Where the receiver's disks are: on the file system of the shared ones, and on
/// another.
const RECEIVERS: [&str; 2] = ["/srv/shared/receiver", "/srv/receiver"];
const BRIDGE: &str = "br-receiver";
const POOL: &str = "receiver";
const SEED: u64 = 7;

/// Two fake nodes.
pub struct FakeStage {
    fabric: Fabric,
    a: FakeDriver,
    b: FakeDriver,
    disks: Mutex<BTreeMap<InstanceId, Place>>,
}

/// Runs a point of the contract on the fake, and then asks the fabric whether
/// every promise to its guests was kept.
pub fn run(point: impl AsyncFn(&dyn Stage) -> Result<()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime for the test");
    let outcome = runtime.block_on(async {
        let stage = FakeStage::new();
        point(&stage).await?;
        stage.fabric.check_invariants().map_err(broken)
    });
    if let Err(error) = outcome {
        panic!("the fake driver breaks the contract: {error:#}");
    }
}

fn broken(violations: Vec<Violation>) -> anyhow::Error {
    let texts: Vec<String> = violations.iter().map(ToString::to_string).collect();
    anyhow!("the fabric saw: {}", texts.join("; "))
}

impl FakeStage {
    fn new() -> Self {
        let fabric = Fabric::new(SEED);
        let a = fabric.add_node("kvm1", Default::default());
        let b = fabric.add_node("kvm2", Default::default());
        fabric.share_directory(SHARED, &["kvm1", "kvm2"], 10 << 30);
        Self {
            fabric,
            a,
            b,
            disks: Mutex::new(BTreeMap::new()),
        }
    }

    fn place_of(&self, id: InstanceId) -> Result<Option<Place>> {
        let disks = self.disks.lock().map_err(|_| anyhow!("a point panicked"))?;
        Ok(disks.get(&id).copied())
    }
}

#[async_trait(?Send)]
impl Stage for FakeStage {
    fn a(&self) -> Arc<dyn Hypervisor> {
        Arc::new(self.a.clone())
    }

    fn b(&self) -> Arc<dyn Hypervisor> {
        Arc::new(self.b.clone())
    }

    async fn guest(&self, wish: Wish) -> Result<InstanceId> {
        let mut guests = self.disks.lock().map_err(|_| anyhow!("a point panicked"))?;
        let name = format!("contract-{}", guests.len());
        let builder = GuestBuilder::new(&name)
            .state(wish.state)
            .memory_mib(MEMORY_MIB)
            .working_set_mib(32)
            .dirty_mib_s(wish.dirty_mib_s)
            .priority(wish.priority);
        let builder = match wish.group {
            Some(group) => builder.anti_affinity(group),
            None => builder,
        };
        let builder = if wish.obeys {
            builder
        } else {
            builder.ignores_shutdown()
        };
        let data_mib = wish.data_mib as u64;
        let builder = match wish.disk {
            Some(Place::Shared) => builder.disk(&format!("{SHARED}/{name}.qcow2"), data_mib),
            Some(Place::Local) => builder.disk(&format!("{LOCAL}/{name}.qcow2"), data_mib),
            None => builder,
        };
        let id = self.fabric.add_guest("kvm1", builder);
        if let Some(place) = wish.disk {
            guests.insert(id, place);
        }
        Ok(id)
    }

    async fn way(&self, id: InstanceId) -> Result<MigrateSpec> {
        let place = self.place_of(id)?;
        let disk = || vec!["vda".to_owned()];
        let b = self.fabric.endpoint("kvm2");
        if place == Some(Place::Local) {
            let guest = self.a.guest(id).await?.context("the guest is on a")?;
            files::make_disk(&self.b, &guest.disks[0]).await?;
        }
        Ok(MigrateSpec {
            instance: id,
            dest_libvirt_uri: b.libvirt_uri,
            dest_address: b.address,
            copied_disks: if place == Some(Place::Local) {
                disk()
            } else {
                Vec::new()
            },
            shared_disks: if place == Some(Place::Shared) {
                disk()
            } else {
                Vec::new()
            },
            initial_downtime_ms: None,
            options: LiveOptions::default(),
        })
    }

    async fn verify(&self, _id: InstanceId) -> Result<()> {
        self.fabric.check_invariants().map_err(broken)
    }

    async fn cut_off_a(&self) -> Result<()> {
        self.fabric.libvirtd_away("kvm1");
        Ok(())
    }

    async fn reconnect_a(&self) -> Result<()> {
        self.fabric.libvirtd_back("kvm1");
        Ok(())
    }

    fn shared_directory(&self) -> String {
        SHARED.to_owned()
    }

    fn local_directory(&self) -> Option<String> {
        Some(LOCAL.to_owned())
    }

    async fn write(&self, path: &str, text: &str) -> Result<()> {
        self.fabric
            .write_file("kvm1", path, text)
            .map_err(anyhow::Error::msg)
    }

    async fn change(&self, path: &str) -> Result<()> {
        self.fabric
            .change_file("kvm1", path)
            .map_err(anyhow::Error::msg)
    }

    async fn same(&self, on_a: &str, on_b: &str) -> Result<bool> {
        let file = |node, path| self.fabric.file(node, path).context("there is no file");
        Ok(file("kvm1", on_a)?.content == file("kvm2", on_b)?.content)
    }

    async fn fingerprint(&self, path: &str) -> Result<Option<String>> {
        Ok(self.fabric.file("kvm1", path).map(|f| match f.content {
            Content::Text(text) => text,
            other => format!("{other:?}"),
        }))
    }

    async fn receiver(&self) -> Result<Receiver> {
        for directory in RECEIVERS {
            self.fabric.make_directory("kvm1", directory);
        }
        self.fabric.edit_node("kvm1", |node| {
            node.bridges.insert(BRIDGE.to_owned());
            let directory = RECEIVERS[0].to_owned();
            node.pools.insert(POOL.to_owned(), directory);
        });
        let bridge = BRIDGE.to_owned();
        Ok(Receiver {
            bridge: NicAttachment::Bridge { bridge },
            directories: RECEIVERS.map(str::to_owned).into(),
            pool: POOL.to_owned(),
        })
    }

    async fn set_autostart(&self, id: InstanceId) -> Result<()> {
        self.fabric.set_autostart("kvm1", id, true);
        Ok(())
    }

    async fn redefine(&self, id: InstanceId) -> Result<()> {
        self.fabric
            .redefine("kvm1", id, |guest| guest.vcpus = REDEFINED_VCPUS);
        Ok(())
    }

    fn network_in_sight(&self) -> NicAttachment {
        let bridge = "br-guests".to_owned();
        NicAttachment::Bridge { bridge }
    }

    async fn same_disk(&self, one: &str, other: &str) -> Result<bool> {
        let token = |path| match self.fabric.file("kvm1", path)?.content {
            Content::Disk { token, .. } => Some(token),
            _ => None,
        };
        Ok(token(one).is_some() && token(one) == token(other))
    }

    fn probe_address(&self) -> String {
        self.fabric.endpoint("kvm2").address
    }
}
