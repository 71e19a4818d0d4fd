//! A whole Drover in one process and in virtual time: conductor and agents as
//! they are, on a broker in memory and hypervisors that share a fabric. Any of
//! them can be killed and started again; an independent check says afterwards
//! whether what the invariants promise held.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use drover_compute::{
    AgentSettings,
    app::{Agent, AgentHandle},
    hypervisor::fake::{Fabric, NodeSpec},
    journal::StateDisk,
};
use drover_conductor::{
    app::{Conductor, Context},
    clock::Clock,
    config::ConductorSettings,
    operation::fence::Fences,
};
use drover_model::{
    api::{
        CONDUCTOR_TOPIC, NAMESPACE, VERSION,
        conductor::{
            BalanceNodes, DrainNode, EvacuateNode, Instance, InstanceRef, MigrateAnswer,
            MigrateInstance, MigrationRef, Node, NodeRef, OperationAnswer, OperationRef,
            OperationView, RestoreNode, WaitMigration, method,
        },
    },
    ids::{HostName, InstanceId, MigrationId, OperationId},
    migration::{LiveOptions, Migration, MigrationStatus, Way},
    node::AllocationPolicy,
    operation::{Operation, OperationPlan, Task},
};
use drover_rpc::{
    MessagingSettings, RequestContext, RpcClient, RpcError, Target, Transport,
    memory::{Faults, MemoryBroker},
};
use drover_saga::Patience;
use drover_store::Store;
use serde::{Serialize, de::DeserializeOwned};
use tempfile::TempDir;
use tokio::time::{Instant, timeout};

use crate::{dialect::Dialect, tap::Tap};

/// Longest that anything is waited for, in virtual time.
const PATIENCE: Duration = Duration::from_secs(3600);
/// Virtual time begins here, milliseconds since 1970.
const EPOCH_MS: u64 = 1_800_000_000_000;
/// The conductor that every cloud begins with.
pub const CTL: &str = "ctl";

/// A Drover in virtual time.
pub struct Cloud {
    /// The world of the hypervisors.
    pub fabric: Fabric,
    /// The broker.
    pub broker: MemoryBroker,
    /// The record, which outlives the conductors; the tests' own way into it.
    pub store: Store,
    /// What cuts nodes' power; a conductor takes it at its start.
    pub fences: Fences,
    /// The conductors' settings; each takes them at its start.
    pub settings: ConductorSettings,
    database_url: Option<String>,
    began: Instant,
    messaging: MessagingSettings,
    conductors: BTreeMap<String, Conductor>,
    agents: BTreeMap<String, AgentHandle>,
    /// How far each machine's clock is ahead, ms.
    dialects: BTreeMap<String, Dialect>,
    tap: Option<Tap>,
    clocks: Mutex<BTreeMap<String, Arc<AtomicI64>>>,
    directories: TempDir,
    disks: BTreeMap<String, StateDisk>,
    client: RpcClient,
}

impl Cloud {
    /// A conductor and two idle nodes, `kvm1` and `kvm2`, that it has heard of.
    pub async fn start(seed: u64) -> Self {
        Self::with_faults(seed, Faults::default()).await
    }

    /// The same over a broker that loses, delays, doubles and reorders.
    pub async fn with_faults(seed: u64, faults: Faults) -> Self {
        let store = Store::in_memory().await.expect("memory needs nothing");
        let settings = ConductorSettings::default();
        Self::around(seed, faults, settings, (store, None)).await
    }

    /// The same on a database, which each conductor opens for itself. It works in
    /// real time: its server does not wait for ours.
    pub async fn on_database(seed: u64, url: &str, settings: ConductorSettings) -> Self {
        let store = Store::open(url).await.expect("the database opens");
        let record = (store, Some(url.to_owned()));
        Self::around(seed, Faults::default(), settings, record).await
    }

    async fn around(
        seed: u64,
        faults: Faults,
        settings: ConductorSettings,
        (store, database_url): (Store, Option<String>),
    ) -> Self {
        let fabric = Fabric::new(seed);
        let broker = MemoryBroker::new(seed, Faults::default());
        let messaging = MessagingSettings::default();
        let client = RpcClient::new(broker.transport("operator"), &messaging);
        let mut cloud = Self {
            fabric,
            broker,
            store,
            fences: Fences::default(),
            settings,
            database_url,
            began: Instant::now(),
            messaging,
            conductors: BTreeMap::new(),
            agents: BTreeMap::new(),
            dialects: BTreeMap::new(),
            tap: None,
            clocks: Mutex::default(),
            directories: TempDir::new().expect("a temporary directory"),
            disks: BTreeMap::new(),
            client,
        };
        cloud.start_conductor().await;
        for host in ["kvm1", "kvm2"] {
            cloud.add_node(host, NodeSpec::default()).await;
        }
        cloud.broker.set_faults(faults);
        cloud
    }

    /// Adds a node and its agent, and waits until the conductor knows of it.
    pub async fn add_node(&mut self, host: &str, spec: NodeSpec) {
        drop(self.fabric.add_node(host, spec));
        self.start_agent(host).await;
        let store = self.store.clone();
        let name: HostName = host.parse().expect("a host name");
        eventually("the node's first report", async || {
            store.node(&name).await.ok()
        })
        .await;
    }

    /// A machine's clock: virtual time, and as far ahead as it is set.
    fn clock(&self, machine: &str) -> impl Fn() -> u64 + Send + Sync + 'static {
        let (began, ahead_ms) = (self.began, self.ahead_ms(machine));
        move || {
            let elapsed_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
            (EPOCH_MS + elapsed_ms).saturating_add_signed(ahead_ms.load(Ordering::Relaxed))
        }
    }

    fn ahead_ms(&self, machine: &str) -> Arc<AtomicI64> {
        let mut clocks = self.clocks.lock().expect("nobody panics with it");
        clocks.entry(machine.to_owned()).or_default().clone()
    }

    /// Sets a machine's clock (`ctl`, or a node's), now and while it runs.
    pub fn set_clock(&self, machine: &str, ahead: i64) {
        self.ahead_ms(machine)
            .store(ahead.saturating_mul(1000), Ordering::Relaxed);
    }

    /// Starts the first conductor, which takes up what it finds.
    pub async fn start_conductor(&mut self) {
        self.start_conductor_named(CTL).await;
    }

    /// Starts a conductor beside any others.
    pub async fn start_conductor_named(&mut self, name: &str) {
        let store = match &self.database_url {
            Some(url) => Store::open(url).await.expect("the database opens"),
            None => self.store.clone(),
        };
        self.start_conductor_on(name, store).await;
    }

    /// Starts a conductor that has its own way to the record.
    pub async fn start_conductor_on(&mut self, name: &str, store: Store) {
        let mut settings = self.settings.clone();
        settings.speaks = self.dialect(name).speaks();
        let started = Conductor::start(
            &settings,
            name,
            &self.messaging,
            self.transport(name),
            store,
            Clock::from_fn(self.clock(name)),
            Patience::default(),
            self.fences.clone(),
        );
        let conductor = started.await.expect("a conductor in memory starts");
        self.conductors.insert(name.to_owned(), conductor);
    }

    /// Migrations that a conductor drives now.
    pub fn driven_by(&self, name: &str) -> usize {
        self.conductors.get(name).map_or(0, Conductor::driven)
    }

    /// What the parts of the first conductor work with.
    pub fn context(&self) -> Context {
        let conductor = self.conductors.get(CTL).expect("it was started");
        conductor.context().clone()
    }

    /// Kills the first conductor in the middle of whatever it does.
    pub fn kill_conductor(&mut self) {
        self.kill_conductor_named(CTL);
    }

    /// Kills a conductor in the middle of whatever it does.
    pub fn kill_conductor_named(&mut self, name: &str) {
        if let Some(conductor) = self.conductors.remove(name) {
            conductor.kill();
        }
    }

    /// Starts a node's agent on what its last life left.
    pub async fn start_agent(&mut self, host: &str) {
        self.launch_agent(host, host);
        if let Some(agent) = self.agents.get_mut(host)
            && !self.conductors.is_empty()
        {
            agent.ready().await;
        }
    }

    /// Starts an agent for a node with a state directory of its own, and does not
    /// wait until it serves. Its name in this cloud is the directory's, and the
    /// machine's that it runs on.
    pub fn launch_agent(&mut self, host: &str, name: &str) {
        let machine_id_file = self.directories.path().join(format!("{name}.machine"));
        std::fs::write(&machine_id_file, name).expect("there is room");
        let settings = AgentSettings {
            host: host.parse().expect("a host name"),
            endpoint: self.fabric.endpoint(host),
            policy: AllocationPolicy::default(),
            state_dir: self.state_dir(name),
            state_disk: self.state_disk(name),
            report_interval_s: 5,
            max_downtime_ms: 500,
            progress_timeout_s: 150,
            guard_autostart: true,
            boot_id_file: self.directories.path().join(format!("{host}.boot")),
            machine_id_file,
            speaks: self.dialect(name).speaks(),
        };
        let started = Agent::start(
            Arc::new(self.fabric.driver(host)),
            self.transport(name),
            &self.messaging,
            settings,
            Arc::new(self.clock(name)),
        );
        let agent = started.expect("an agent in memory starts");
        self.agents.insert(name.to_owned(), agent);
    }

    /// Has a process be of another version from its next start on.
    pub fn set_dialect(&mut self, name: &str, dialect: Dialect) {
        self.dialects.insert(name.to_owned(), dialect);
    }

    fn dialect(&self, name: &str) -> Dialect {
        self.dialects.get(name).copied().unwrap_or_default()
    }

    fn transport(&self, name: &str) -> Arc<dyn Transport> {
        let transport = self.dialect(name).over(self.broker.transport(name));
        match &self.tap {
            Some(tap) => tap.over(transport),
            None => transport,
        }
    }

    /// Has whoever starts from now on be listened to.
    pub fn listen_to(&mut self, tap: Tap) {
        let operator = tap.over(self.broker.transport("listened"));
        self.client = RpcClient::new(operator, &self.messaging);
        self.tap = Some(tap);
    }

    /// Waits until an agent serves.
    pub async fn serves(&mut self, name: &str) {
        let agent = self.agents.get_mut(name).expect("it was started");
        agent.ready().await;
    }

    /// Stops an agent as its service manager does.
    pub async fn stop_agent(&mut self, name: &str) {
        let agent = self.agents.remove(name).expect("it was started");
        agent.stop().await;
    }

    /// A node as an operator sees it.
    pub async fn node(&self, host: &str) -> Node {
        let ask = NodeRef {
            host: host.parse().expect("a host name"),
        };
        let node = self.call(method::GET_NODE, &ask).await;
        node.expect("the conductor answers")
    }

    /// The disk below the state directory of a node's agent, which may be filled.
    pub fn state_disk(&mut self, host: &str) -> StateDisk {
        self.disks.entry(host.to_owned()).or_default().clone()
    }

    /// Loses what a node's agent has written down, as when the node is installed
    /// again; the agent is not running meanwhile.
    pub fn lose_state(&self, host: &str) {
        // Under another name first: what the dead agent's threads still write goes nowhere.
        let state = self.state_dir(host);
        let gone = state.with_extension("gone");
        std::fs::rename(&state, &gone).expect("an agent has been there");
        std::fs::remove_dir_all(&gone).expect("it is there");
    }

    /// What a node's agent has written down of a migration that it carries out.
    pub fn journal(&self, host: &str, id: MigrationId) -> PathBuf {
        self.state_dir(host).join(format!("migrations/{id}.json"))
    }

    fn state_dir(&self, host: &str) -> PathBuf {
        self.directories.path().join(host)
    }

    /// Kills a node's agent in the middle of whatever it does.
    pub fn kill_agent(&mut self, host: &str) {
        if let Some(agent) = self.agents.remove(host) {
            agent.kill();
        }
    }

    /// A node that has no power boots, and its agent starts with it.
    pub async fn boot(&mut self, host: &str) {
        let boot = self.directories.path().join(format!("{host}.boot"));
        let id = format!("{:?}", self.began.elapsed());
        std::fs::write(boot, id).expect("there is room");
        self.fabric.power_on(host);
        self.start_agent(host).await;
    }

    /// Waits until the conductor lists an instance.
    pub async fn adopted(&self, id: InstanceId) -> Instance {
        let ask = InstanceRef {
            instance: id.to_string(),
        };
        let found = async || {
            self.call::<_, Instance>(method::GET_INSTANCE, &ask)
                .await
                .ok()
        };
        eventually("the instance's adoption", found).await
    }

    /// Calls the conductor.
    ///
    /// # Errors
    /// As [`RpcClient::call`].
    pub async fn call<A, R>(&self, method: &str, args: &A) -> Result<R, RpcError>
    where
        A: Serialize + Sync,
        R: DeserializeOwned,
    {
        let target = Target::topic(CONDUCTOR_TOPIC)
            .namespace(NAMESPACE)
            .version(VERSION);
        let context = RequestContext::service("req-test");
        self.client.call(&target, &context, method, args).await
    }

    /// Asks for a live migration.
    ///
    /// # Errors
    /// As [`RpcClient::call`].
    pub async fn migrate(
        &self,
        id: InstanceId,
        host: Option<&str>,
        options: LiveOptions,
    ) -> Result<Migration, RpcError> {
        self.migrate_by(id, host, &Way::Live(options)).await
    }

    /// Asks for a migration of any kind.
    ///
    /// # Errors
    /// As [`RpcClient::call`].
    pub async fn migrate_by(
        &self,
        id: InstanceId,
        host: Option<&str>,
        way: &Way,
    ) -> Result<Migration, RpcError> {
        let host = host.map(|h| h.parse().expect("a host name"));
        let ask = MigrateInstance::new(id.to_string(), host, way);
        match self.call(method::MIGRATE_INSTANCE, &ask).await? {
            MigrateAnswer::Accepted { migration } => Ok(*migration),
            MigrateAnswer::Plan { plan } => panic!("a plan was not asked for: {plan:?}"),
        }
    }

    /// Asks for an abort.
    ///
    /// # Errors
    /// As [`RpcClient::call`].
    pub async fn abort(&self, id: MigrationId) -> Result<Migration, RpcError> {
        let ask = MigrationRef {
            migration: id.to_string(),
        };
        self.call(method::ABORT_MIGRATION, &ask).await
    }

    /// Has a live migration come to its end.
    ///
    /// # Errors
    /// As [`RpcClient::call`].
    pub async fn force_complete(&self, id: MigrationId) -> Result<Migration, RpcError> {
        let ask = MigrationRef {
            migration: id.to_string(),
        };
        self.call(method::FORCE_COMPLETE_MIGRATION, &ask).await
    }

    /// Has a stuck migration tried again.
    ///
    /// # Errors
    /// As [`RpcClient::call`].
    pub async fn resume(&self, id: MigrationId) -> Result<Migration, RpcError> {
        let ask = MigrationRef {
            migration: id.to_string(),
        };
        self.call(method::RESUME_MIGRATION, &ask).await
    }

    /// Waits, on the record, until a migration satisfies something.
    pub async fn until(
        &self,
        id: MigrationId,
        what: &str,
        want: impl Fn(&Migration) -> bool,
    ) -> Migration {
        let mut changes = self.store.changes();
        let waiting = async {
            loop {
                let m = self.store.migration(id).await.expect("it is on the record");
                if want(&m) {
                    return m;
                }
                // Anything wakes: a change, or a second without one.
                let _ = timeout(Duration::from_secs(1), changes.recv()).await;
            }
        };
        match timeout(PATIENCE, waiting).await {
            Ok(m) => m,
            Err(_) => panic!("never {what}: {:#?}", self.store.migration(id).await),
        }
    }

    /// Waits until a migration's record has reached a version, or rests.
    pub async fn until_version(&self, id: MigrationId, version: u64) -> Migration {
        let there = |m: &Migration| m.version >= version || m.status.rests();
        self.until(id, "there", there).await
    }

    /// Asks for an operation on nodes.
    ///
    /// # Errors
    /// As [`RpcClient::call`].
    pub async fn operate(&self, task: &Task) -> Result<Operation, RpcError> {
        match self.answer_to(task, false).await? {
            OperationAnswer::Accepted { operation } => Ok(*operation),
            OperationAnswer::Plan { plan, .. } => panic!("a plan was not asked for: {plan:?}"),
        }
    }

    /// Asks what an operation would do.
    ///
    /// # Errors
    /// As [`RpcClient::call`].
    pub async fn dry_run(&self, task: &Task) -> Result<OperationPlan, RpcError> {
        match self.answer_to(task, true).await? {
            OperationAnswer::Plan { plan, failures, .. } => {
                assert!(failures.is_empty(), "{failures:?}");
                Ok(*plan)
            }
            OperationAnswer::Accepted { operation } => panic!("it was begun: {operation:?}"),
        }
    }

    async fn answer_to(&self, task: &Task, dry_run: bool) -> Result<OperationAnswer, RpcError> {
        match task.clone() {
            Task::Drain(options) => {
                let ask = DrainNode { options, dry_run };
                self.call(method::DRAIN_NODE, &ask).await
            }
            Task::Restore(options) => {
                let ask = RestoreNode { options, dry_run };
                self.call(method::RESTORE_NODE, &ask).await
            }
            Task::Evacuate(options) => {
                let ask = EvacuateNode { options, dry_run };
                self.call(method::EVACUATE_NODE, &ask).await
            }
            Task::Balance(options) => {
                let ask = BalanceNodes { options, dry_run };
                self.call(method::BALANCE_NODES, &ask).await
            }
        }
    }

    /// Calls an operation off.
    ///
    /// # Errors
    /// As [`RpcClient::call`].
    pub async fn cancel(&self, id: OperationId) -> Result<Operation, RpcError> {
        let ask = OperationRef {
            operation: id.to_string(),
        };
        let view: OperationView = self.call(method::CANCEL_OPERATION, &ask).await?;
        Ok(view.operation)
    }

    /// Waits, on the record, until an operation satisfies something.
    pub async fn until_operation(
        &self,
        id: OperationId,
        what: &str,
        want: impl Fn(&Operation) -> bool,
    ) -> Operation {
        let mut changes = self.store.operation_changes();
        let waiting = async {
            loop {
                let o = self.store.operation(id).await.expect("on the record");
                if want(&o) {
                    return o;
                }
                // Anything wakes: a change, or a second without one.
                let _ = timeout(Duration::from_secs(1), changes.recv()).await;
            }
        };
        match timeout(PATIENCE, waiting).await {
            Ok(o) => o,
            Err(_) => panic!("never {what}: {:#?}", self.store.operation(id).await),
        }
    }

    /// Waits for the end of an operation.
    pub async fn operation_end(&self, id: OperationId) -> Operation {
        self.until_operation(id, "at its end", |o| o.status.is_final())
            .await
    }

    /// Kills one process (`conductor`, or the agent of a node), and starts it
    /// again after a while.
    pub async fn kill_and_start(&mut self, who: &str, dead_for: Duration) {
        match who {
            "conductor" => self.kill_conductor(),
            agent => self.kill_agent(agent),
        }
        tokio::time::sleep(dead_for).await;
        match who {
            "conductor" => self.start_conductor().await,
            agent => self.start_agent(agent).await,
        }
    }

    /// Waits for the end of a migration.
    pub async fn end(&self, id: MigrationId) -> Migration {
        self.until(id, "at its end", |m| m.status.is_final()).await
    }

    /// Waits for the end by `wait_migration`, as the command does.
    ///
    /// # Errors
    /// As [`RpcClient::call`].
    pub async fn wait(&self, id: MigrationId) -> Result<Migration, RpcError> {
        let mut seen_version = 0;
        loop {
            let ask = WaitMigration {
                migration: id.to_string(),
                seen_version,
                timeout_ms: 20_000,
            };
            let m: Migration = self.call(method::WAIT_MIGRATION, &ask).await?;
            if m.status.rests() {
                return Ok(m);
            }
            seen_version = m.version;
        }
    }

    /// Checks what must hold after a migration, however it ended: the guest
    /// runs once, where the record says; the record's outcome fits; nothing is
    /// claimed and nothing is left behind.
    pub async fn check(&self, m: &Migration) {
        self.fabric
            .check_invariants()
            .unwrap_or_else(|v| panic!("{v:?}\n{m:#?}"));
        let running = self.fabric.running_on(m.instance_uuid);
        let expected = match m.status {
            MigrationStatus::Completed => m
                .dest_host
                .clone()
                .expect("a completed one has a destination"),
            _ => m.source_host.clone(),
        };
        assert_eq!(running.as_ref(), Some(&expected), "{m:#?}");
        let row = self
            .store
            .find_instance(&m.instance_uuid.to_string())
            .await
            .expect("on the record");
        assert_eq!(
            row.host, expected,
            "the record follows the hypervisor: {m:#?}"
        );
        let none: Vec<(String, drover_store::claims::Resources)> = Vec::new();
        assert_eq!(self.store.claims().await.expect("readable"), none, "{m:#?}");
        let fabric = self.fabric.clone();
        // The agents' timers may still have marks to take away.
        eventually("nothing is left behind", async || {
            fabric.leftovers().is_empty().then_some(())
        })
        .await;
    }
}

/// Waits for something that can only be asked for, in virtual time.
pub async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let asking = async {
        loop {
            if let Some(found) = ask().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    match timeout(PATIENCE, asking).await {
        Ok(found) => found,
        Err(_) => panic!("never came: {what}"),
    }
}
