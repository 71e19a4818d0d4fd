//! Two nodes with an agent each, and a conductor that only listens.

use std::{collections::HashMap, sync::Arc, time::Duration};

use drover_compute::{
    AgentSettings,
    app::{Agent, AgentHandle},
    hypervisor::{
        Hypervisor,
        fake::{At, Fabric, Fault as Mishap, GuestBuilder, NodeSpec},
    },
    journal::StateDisk,
};
use drover_model::{
    api::{
        COMPUTE_TOPIC, CONDUCTOR_TOPIC, NAMESPACE, SPEAKS, VERSION,
        compute::{
            CheckDestination, CheckPath, CheckSource, CleanUp, CopySeen, DestinationFacts,
            GuestLocation, JobState, LiveMigration, Outcome, PathFacts, PreLiveMigration,
            RemoveCopy, SourceFacts, StepRef, Survivor, method,
        },
        conductor::{EvacuatedAnswer, MigrationReport},
        fault::Fault,
    },
    guest::{Guest, Presence},
    ids::{HostName, InstanceId, MigrationId},
    migration::LiveOptions,
    node::AllocationPolicy,
};
use drover_rpc::{
    CallOptions, MessagingSettings, RequestContext, RpcClient, RpcServer, Target,
    memory::MemoryBroker,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;
use tempfile::TempDir;
use tokio::time::Instant;

use crate::listener::{Heard, Listener};

pub(crate) const A: &str = "kvm1";
pub(crate) const B: &str = "kvm2";
pub(crate) const DISK: &str = "/var/lib/libvirt/images/vm.qcow2";

/// A little cloud.
pub(crate) struct World {
    pub(crate) fabric: Fabric,
    pub(crate) broker: MemoryBroker,
    pub(crate) client: RpcClient,
    pub(crate) heard: Arc<Heard>,
    agents: HashMap<&'static str, AgentHandle>,
    state: TempDir,
    disks: HashMap<&'static str, StateDisk>,
    began: Instant,
    _conductor: RpcServer,
}

impl World {
    /// Two nodes with agents that serve.
    pub(crate) async fn new() -> Self {
        let mut world = Self::without_agents().await;
        world.start(A).await;
        world.start(B).await;
        world
    }

    pub(crate) async fn without_agents() -> Self {
        let fabric = Fabric::new(7);
        for node in [A, B] {
            fabric.add_node(node, NodeSpec::default());
        }
        let broker = MemoryBroker::default();
        let heard = Arc::new(Heard::default());
        *heard.listed.lock().unwrap() = json!([]);
        *heard.evacuated.lock().unwrap() = Some(EvacuatedAnswer::default());
        let transport = broker.transport("ctl");
        let settings = MessagingSettings::default();
        let conductor = RpcServer::builder(transport.clone(), &settings, CONDUCTOR_TOPIC, "ctl")
            .endpoint(Listener(heard.clone()))
            .start()
            .await
            .unwrap();
        Self {
            client: RpcClient::new(transport, &settings),
            fabric,
            broker,
            heard,
            agents: HashMap::new(),
            state: tempfile::tempdir().unwrap(),
            disks: HashMap::new(),
            began: Instant::now(),
            _conductor: conductor,
        }
    }

    pub(crate) fn state_dir(&self, node: &str) -> std::path::PathBuf {
        self.state.path().join(node)
    }

    /// The disk below a node's state directory.
    pub(crate) fn disk(&self, node: &str) -> &StateDisk {
        &self.disks[node]
    }

    /// Starts a node's agent, or starts it again.
    pub(crate) async fn start(&mut self, node: &'static str) {
        self.launch(node);
        self.agents.get_mut(node).unwrap().ready().await;
    }

    /// The same, without waiting until it serves.
    pub(crate) fn launch(&mut self, node: &'static str) {
        let settings = AgentSettings {
            host: host(node),
            endpoint: self.fabric.endpoint(node),
            policy: AllocationPolicy::default(),
            state_dir: self.state_dir(node),
            state_disk: self.disks.entry(node).or_default().clone(),
            report_interval_s: 5,
            max_downtime_ms: 500,
            progress_timeout_s: 30,
            guard_autostart: true,
            boot_id_file: self.state.path().join(format!("{node}.boot")),
            machine_id_file: self.state.path().join(format!("{node}.machine")),
            speaks: SPEAKS,
        };
        let began = self.began;
        let clock = move || 1_700_000_000_000 + u64::try_from(began.elapsed().as_millis()).unwrap();
        let agent = Agent::start(
            Arc::new(self.fabric.driver(node)),
            self.broker.transport(node),
            &MessagingSettings::default(),
            settings,
            Arc::new(clock),
        );
        self.agents.insert(node, agent.unwrap());
    }

    /// `kill -9` of a node's agent.
    pub(crate) fn kill(&mut self, node: &str) {
        self.agents.remove(node).unwrap().kill();
    }

    /// The disk of a node whose agent was killed is gone. Taken away at one stroke: a thread of
    /// that agent, which no kill reaches here, may still be writing.
    pub(crate) fn lose_state(&self, node: &str) {
        let state_dir = self.state_dir(node);
        std::fs::rename(&state_dir, state_dir.with_extension("lost")).unwrap();
    }

    pub(crate) async fn stop(&mut self, node: &str) {
        self.agents.remove(node).unwrap().stop().await;
    }

    pub(crate) async fn restart(&mut self, node: &'static str) {
        self.kill(node);
        self.start(node).await;
    }

    pub(crate) async fn call<R: DeserializeOwned>(
        &self,
        node: &str,
        method: &str,
        args: &(impl Serialize + Sync),
    ) -> Result<R, Fault> {
        let target = Target::topic(COMPUTE_TOPIC)
            .server(node)
            .namespace(NAMESPACE)
            .version(VERSION);
        let options = CallOptions {
            timeout: Some(Duration::from_secs(20)),
            ..CallOptions::default()
        };
        let context = RequestContext::service("req-test");
        let called = self
            .client
            .call_with(&target, &context, method, args, options);
        called.await.map_err(|e| {
            let f = e.failure().unwrap_or_else(|| panic!("{method}: {e}"));
            Fault::from_parts(&f.module, &f.class, &f.message, &f.kwargs)
                .unwrap_or_else(|| panic!("{method}: {f}"))
        })
    }

    /// The same by a conductor whose lease has an epoch.
    pub(crate) async fn call_under<R: DeserializeOwned>(
        &self,
        epoch: u64,
        node: &str,
        method: &str,
        args: &(impl Serialize + Sync),
    ) -> Result<R, Fault> {
        let mut args = serde_json::to_value(args).unwrap();
        args["epoch"] = epoch.into();
        self.call(node, method, &args).await
    }

    /// A migration of a guest from A to B that copies its one disk.
    pub(crate) fn migration(&self, guest: GuestBuilder) -> Move {
        let instance = self.fabric.add_guest(A, guest);
        self.migration_of(instance)
    }

    pub(crate) fn migration_of(&self, instance: InstanceId) -> Move {
        Move {
            step: StepRef {
                migration: MigrationId::generate(),
                instance,
            },
            options: LiveOptions::default(),
            copied: vec!["vda".to_owned()],
        }
    }

    pub(crate) async fn guest(&self, m: &Move) -> Guest {
        let facts: SourceFacts = self
            .call(A, method::CHECK_SOURCE, &m.check_source())
            .await
            .unwrap();
        facts.guest.unwrap()
    }

    pub(crate) async fn prepare(&self, m: &Move) -> Result<(), Fault> {
        let guest = self.guest(m).await;
        let () = self.check_path(m).await.map(drop).unwrap();
        self.call(B, method::PRE_LIVE_MIGRATION, &m.prepare(guest))
            .await
    }

    pub(crate) async fn check_destination(&self, m: &Move) -> Result<DestinationFacts, Fault> {
        let facts: SourceFacts = self
            .call(A, method::CHECK_SOURCE, &m.check_source())
            .await?;
        let ask = CheckDestination {
            migration: m.step.migration,
            guest: facts.guest.unwrap(),
            marks: facts.marks,
            source: self.fabric.endpoint(A),
        };
        self.call(B, method::CHECK_DESTINATION, &ask).await
    }

    pub(crate) async fn check_path(&self, m: &Move) -> Result<PathFacts, Fault> {
        let ask = CheckPath {
            migration: m.step.migration,
            instance: m.step.instance,
            destination: self.fabric.endpoint(B),
            probe_port: None,
            disk_port: None,
        };
        self.call(A, method::CHECK_PATH, &ask).await
    }

    /// What tells when a file of a node changes.
    pub(crate) async fn stamp(&self, node: &str, path: &str) -> Option<String> {
        let driver = self.fabric.driver(node);
        let found = driver.contents(&[path.to_owned()], &[]).await.unwrap();
        found[0].stamp().map(str::to_owned)
    }

    pub(crate) async fn send(&self, m: &Move) -> Result<JobState, Fault> {
        let ask = m.live_migration(self);
        self.call(A, method::LIVE_MIGRATION, &ask).await
    }

    /// Makes the destination ready and sends the guest, which will not go well.
    pub(crate) async fn send_into(&self, m: &Move, at: At, mishap: Mishap) {
        self.prepare(m).await.unwrap();
        self.fabric.on_migration(m.step.instance, at, mishap);
        self.send(m).await.unwrap();
    }

    pub(crate) async fn ask(&self, node: &str, method: &str, m: &Move) -> Result<(), Fault> {
        self.call(node, method, &m.step).await
    }

    pub(crate) async fn clean_up(
        &self,
        node: &str,
        method: &str,
        m: &Move,
    ) -> Result<CleanUp, Fault> {
        let removes = [
            method::ROLLBACK_AT_DESTINATION,
            method::POST_LIVE_MIGRATION,
            method::ROLLBACK_RESIZE,
            method::CONFIRM_RESIZE,
        ];
        match removes.contains(&method) {
            true => {
                let other = if node == A { B } else { A };
                let survivor = self.survivor(other, m).await;
                self.remove(node, method, m, survivor).await
            }
            false => self.call(node, method, &m.step).await,
        }
    }

    /// What a node sees of its copy, as evidence for the other.
    pub(crate) async fn survivor(&self, node: &str, m: &Move) -> Option<Survivor> {
        let seen: Result<CopySeen, Fault> = self.call(node, method::LOOK_AT_COPY, &m.step).await;
        seen.ok().map(|copy| Survivor {
            host: host(node),
            seen_at_ms: 1,
            copy,
            moved_on: false,
        })
    }

    /// Asks for a removal by that evidence, or by none.
    pub(crate) async fn remove(
        &self,
        node: &str,
        method: &str,
        m: &Move,
        survivor: Option<Survivor>,
    ) -> Result<CleanUp, Fault> {
        let ask = RemoveCopy {
            migration: m.step.migration,
            instance: m.step.instance,
            survivor,
        };
        self.call(node, method, &ask).await
    }

    pub(crate) async fn job(&self, m: &Move) -> JobState {
        self.call(A, method::GET_JOB, &m.step).await.unwrap()
    }

    pub(crate) async fn locate(&self, node: &str, m: &Move) -> Presence {
        let seen: GuestLocation = self.call(node, method::LOCATE, &m.step).await.unwrap();
        seen.presence
    }

    /// Polls the source until the transfer is over.
    pub(crate) async fn outcome(&self, m: &Move) -> Outcome {
        for _ in 0..100_000 {
            match self.job(m).await {
                JobState::Ended { outcome, .. } => return outcome,
                JobState::Running { .. } => tokio::time::sleep(Duration::from_millis(100)).await,
                JobState::Unknown => panic!("the source knows nothing of it"),
            }
        }
        panic!("the transfer never ends");
    }

    /// What the conductor heard of a migration.
    pub(crate) fn reports(&self, m: &Move) -> Vec<MigrationReport> {
        let all = self.heard.migrations.lock().unwrap();
        let own = all.iter().filter(|(_, r)| r.migration == m.step.migration);
        own.map(|(_, r)| r.clone()).collect()
    }

    pub(crate) fn journal_files(&self, node: &str) -> Vec<String> {
        let mut names = Vec::new();
        for shelf in ["migrations", "marks"] {
            let listing = std::fs::read_dir(self.state_dir(node).join(shelf)).unwrap();
            names.extend(listing.map(|e| format!("{shelf}/{}", e.unwrap().file_name().display())));
        }
        names
    }

    /// The guest is on that node alone, and nothing of the migration anywhere.
    pub(crate) fn assert_tidy(&self, m: &Move, node: &str) {
        assert_eq!(self.fabric.running_on(m.step.instance), Some(host(node)));
        assert_eq!(self.fabric.leftovers(), Vec::<String>::new());
        self.fabric.check_invariants().unwrap();
        assert_eq!(self.journal_files(A), Vec::<String>::new());
        assert_eq!(self.journal_files(B), Vec::<String>::new());
    }

    /// Ends a migration that moved, as a conductor does.
    pub(crate) async fn settle(&self, m: &Move) -> (CleanUp, CleanUp) {
        let there = self
            .clean_up(B, method::POST_AT_DESTINATION, m)
            .await
            .unwrap();
        let here = self
            .clean_up(A, method::POST_LIVE_MIGRATION, m)
            .await
            .unwrap();
        (there, here)
    }

    /// Takes back one that did not, as a conductor does.
    pub(crate) async fn take_back(&self, m: &Move) {
        self.ask(A, method::ROLLBACK_AT_SOURCE, m).await.unwrap();
        let undone = self
            .clean_up(B, method::ROLLBACK_AT_DESTINATION, m)
            .await
            .unwrap();
        assert_eq!(undone.warnings, Vec::<String>::new());
    }
}

/// A migration as a test asks for it.
pub(crate) struct Move {
    pub(crate) step: StepRef,
    pub(crate) options: LiveOptions,
    pub(crate) copied: Vec<String>,
}

impl Move {
    pub(crate) fn check_source(&self) -> CheckSource {
        CheckSource {
            migration: self.step.migration,
            instance: self.step.instance,
            lasting: false,
        }
    }

    pub(crate) fn live_migration(&self, world: &World) -> LiveMigration {
        LiveMigration {
            migration: self.step.migration,
            instance: self.step.instance,
            dest_host: host(B),
            destination: world.fabric.endpoint(B),
            copied_disks: self.copied.clone(),
            shared_disks: Vec::new(),
            checked: None,
            attach: false,
            disks: None,
            options: self.options.clone(),
        }
    }

    pub(crate) fn prepare(&self, guest: Guest) -> PreLiveMigration {
        PreLiveMigration {
            migration: self.step.migration,
            guest,
            copied_disks: self.copied.clone(),
            checked: Vec::new(),
        }
    }
}

pub(crate) fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

/// A guest that is sent in a second or two.
pub(crate) fn small() -> GuestBuilder {
    GuestBuilder::new("vm")
        .memory_mib(512)
        .dirty_mib_s(10)
        .disk(DISK, 200)
}

/// One that writes faster than the link carries.
pub(crate) fn busy() -> GuestBuilder {
    GuestBuilder::new("vm")
        .memory_mib(4096)
        .working_set_mib(4096)
        .dirty_mib_s(3000)
        .disk(DISK, 200)
}

pub(crate) async fn pause(ms: u64) {
    tokio::time::sleep(Duration::from_millis(ms)).await;
}
