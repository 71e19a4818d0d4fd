//! Carries a plan out: conductors and agents as they are, each behind the edges of
//! its [`Life`], on a broker in memory and a fabric of hypervisors.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use drover_compute::{
    AgentSettings,
    app::{Agent, AgentHandle},
    hypervisor::{
        ColdDriver,
        fake::{Fabric, GuestBuilder, NodeSpec},
    },
    journal::StateDisk,
};
use drover_conductor::{app::Conductor, clock::Clock, config::ConductorSettings};
use drover_model::{
    api::{
        SPEAKS,
        conductor::{ProjectView, method},
    },
    guest::{Disk, DiskSource, NicAttachment, PowerState},
    ids::InstanceId,
    node::AllocationPolicy,
    project::{Location, NetworkPlace, Project, StoragePlace},
};
use drover_rpc::{
    MessagingSettings, RpcClient,
    memory::{Faults, MemoryBroker},
};
use drover_saga::Patience;
use drover_store::Store;
use tempfile::TempDir;
use tokio::{
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep, sleep_until},
};

use super::{
    fences::Switches,
    ledger::Ledger,
    operator::{Operator, asked},
    plan::{Disks, Event, Fence, GuestPlan, Plan, Planned, Who},
    process::{Life, WallClock, seconds},
    trace::Trace,
};

/// Where guests' disks are that all nodes share.
const SHARED: &str = "/srv/shared";
/// Where those are that nodes have for themselves.
const LOCAL: &str = "/var/lib/libvirt/images";
/// The projects that guests are handed between.
pub(super) const PROJECTS: [&str; 2] = ["alpha", "beta"];
const GIB: u64 = 1 << 30;
/// Time that everything has to come to rest in after the last fault.
const PATIENCE_S: u64 = 1800;
/// How long a node has to be dead before it is evacuated unasked.
const AUTO_EVACUATE_DELAY_S: u64 = 20;
/// How long a node stays off whose power was cut unasked.
const CUT_FOR_S: u64 = 90;
/// How often agents report.
const REPORT_INTERVAL_S: u64 = 8;
/// How often is looked.
const LOOK_S: u64 = 5;

/// Something that lasts; begun twice, it ends when both are over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Hold {
    Dead(Who),
    Frozen(Who),
    CutOff(Who),
    Link(usize, usize),
    Network,
    Clock(Who),
    FullDisk(usize),
    FullState(usize),
    Libvirtd(usize),
    Power(usize),
}

enum Step {
    Happens(Event),
    Ends(Hold),
}

/// A process, in whatever life it is.
struct Process {
    clock: WallClock,
    life: Option<Arc<Life>>,
    body: Body,
}

enum Body {
    None,
    Agent(AgentHandle),
    Conductor(JoinHandle<Conductor>),
}

/// A cloud that a plan is carried out on.
pub(super) struct World {
    plan: Plan,
    fabric: Fabric,
    broker: MemoryBroker,
    store: Store,
    trace: Trace,
    processes: BTreeMap<Who, Process>,
    holds: BTreeMap<Hold, u32>,
    guests: Vec<InstanceId>,
    directories: TempDir,
    messaging: MessagingSettings,
    operator: Arc<Operator>,
    asking: JoinSet<()>,
    boots: u32,
    switches: Switches,
    /// Nodes whose power was cut unasked, and when they have it again.
    returning: BTreeMap<usize, Instant>,
    state_disks: Vec<StateDisk>,
}

/// The name of a process, as the broker knows it.
pub(super) fn name(who: Who) -> String {
    match who {
        Who::Conductor(n) => format!("ctl{}", n + 1),
        Who::Agent(n) => host(n),
    }
}

/// A node's name.
pub(super) fn host(node: usize) -> String {
    format!("kvm{}", node + 1)
}

/// Carries a plan out; what was promised and did not hold.
pub(super) async fn carry_out(plan: &Plan, files: TempDir, trace: &Trace) -> Vec<String> {
    let mut world = World::build(plan, files, trace).await;
    let mut found = world.events().await;
    if found.is_empty() {
        found = world.come_to_rest().await;
    }
    found
}

impl World {
    async fn build(plan: &Plan, directories: TempDir, trace: &Trace) -> Self {
        let fabric = Fabric::new(plan.seed);
        let broker = MemoryBroker::new(plan.seed, Faults::default());
        let messaging = MessagingSettings::default();
        let store = Store::in_memory().await.expect("memory needs nothing");
        let client = RpcClient::new(broker.transport("operator"), &messaging);
        let operator = Operator {
            client,
            store: store.clone(),
            fabric: fabric.clone(),
            trace: trace.clone(),
        };
        let switches = Switches::new(&fabric, plan.fence, trace);
        let mut world = Self {
            plan: plan.clone(),
            fabric,
            broker,
            store,
            trace: trace.clone(),
            processes: BTreeMap::new(),
            holds: BTreeMap::new(),
            guests: Vec::new(),
            directories,
            messaging,
            operator: Arc::new(operator),
            asking: JoinSet::new(),
            boots: 0,
            switches,
            returning: BTreeMap::new(),
            state_disks: (0..plan.nodes).map(|_| StateDisk::default()).collect(),
        };
        world.furnish();
        let began = Instant::now();
        let conductors = (0..plan.conductors).map(Who::Conductor);
        for who in conductors.chain((0..plan.nodes).map(Who::Agent)) {
            let process = Process {
                clock: WallClock::new(began),
                life: None,
                body: Body::None,
            };
            world.processes.insert(who, process);
            world.start(who);
        }
        world.is_up().await;
        world.look_at_nodes();
        world
    }

    /// Nodes and guests.
    fn furnish(&mut self) {
        let hosts: Vec<String> = (0..self.plan.nodes).map(host).collect();
        for host in &hosts {
            drop(self.fabric.add_node(host, NodeSpec::default()));
            for project in PROJECTS {
                self.fabric
                    .make_directory(host, &format!("/projects/{project}"));
                let bridge = format!("br-{project}");
                self.fabric.edit_node(host, |node| {
                    node.bridges.insert(bridge);
                });
            }
            self.write_boot_id(host);
            std::fs::write(self.machine_id_file(host), host).expect("there is room");
        }
        let names: Vec<&str> = hosts.iter().map(String::as_str).collect();
        self.fabric.share_directory(SHARED, &names, 1000 * GIB);
        for (number, guest) in self.plan.guests.clone().iter().enumerate() {
            let builder = builder(number, guest);
            let id = self.fabric.add_guest(&host(guest.node), builder);
            self.guests.push(id);
        }
    }

    /// Waits until the conductors know of everything; projects are made.
    async fn is_up(&self) {
        loop {
            let known = self.store.instances(None, None).await.expect("readable");
            let nodes = self.store.nodes().await.expect("readable");
            if known.len() == self.guests.len() && nodes.len() == self.plan.nodes {
                break;
            }
            sleep(seconds(1)).await;
        }
        for id in PROJECTS {
            let project = project(id);
            let made = self.operator.call(method::CREATE_PROJECT, &project).await;
            let _: ProjectView = made.expect("a healthy cloud makes projects");
        }
    }

    // ---- processes ---------------------------------------------------------------

    fn holds(&self, hold: Hold) -> bool {
        self.holds.get(&hold).is_some_and(|count| *count > 0)
    }

    fn start(&mut self, who: Who) {
        let life = Arc::new(Life::new());
        if self.holds(Hold::Frozen(who)) {
            life.freeze();
        }
        let clock = self.processes[&who].clock.clone();
        let name = name(who);
        let transport = life.transport(&name, self.broker.transport(&name), &self.trace);
        let body = match who {
            Who::Agent(node) => {
                let driver = self.fabric.driver(&name).still_while(life.still());
                let started = Agent::start(
                    Arc::new(driver),
                    transport,
                    &self.messaging,
                    self.agent_settings(node),
                    Arc::new(move || clock.now_ms()),
                );
                match started {
                    Ok(agent) => Body::Agent(agent),
                    // Whoever watches over it tries again when there is room.
                    Err(_) if self.holds(Hold::FullState(node)) => return,
                    Err(error) => panic!("its directory cannot be used: {error}"),
                }
            }
            Who::Conductor(_) => {
                let store = self.store.of_another_process(life.still());
                let messaging = self.messaging.clone();
                let settings = ConductorSettings {
                    auto_evacuate: self.plan.fence != Fence::None,
                    auto_evacuate_delay_s: AUTO_EVACUATE_DELAY_S,
                    ..ConductorSettings::default()
                };
                let fences = self.switches.fences();
                Body::Conductor(tokio::spawn(async move {
                    let started = Conductor::start(
                        &settings,
                        &name,
                        &messaging,
                        transport,
                        store,
                        Clock::from_fn(move || clock.now_ms()),
                        Patience::default(),
                        fences,
                    );
                    started.await.expect("a conductor in memory starts")
                }))
            }
        };
        let process = self.processes.get_mut(&who).expect("it is one of them");
        process.life = Some(life);
        process.body = body;
    }

    fn kill(&mut self, who: Who) {
        let process = self.processes.get_mut(&who).expect("it is one of them");
        process.life = None;
        match std::mem::replace(&mut process.body, Body::None) {
            Body::None => {}
            Body::Agent(agent) => agent.kill(),
            Body::Conductor(starting) if !starting.is_finished() => starting.abort(),
            Body::Conductor(started) => drop(tokio::spawn(async move {
                if let Ok(conductor) = started.await {
                    conductor.kill();
                }
            })),
        }
    }

    fn agent_settings(&self, node: usize) -> AgentSettings {
        let host = host(node);
        AgentSettings {
            endpoint: self.fabric.endpoint(&host),
            policy: AllocationPolicy::default(),
            state_dir: self.state_dir(&host),
            state_disk: self.state_disks[node].clone(),
            report_interval_s: REPORT_INTERVAL_S,
            max_downtime_ms: 500,
            progress_timeout_s: 150,
            guard_autostart: true,
            boot_id_file: self.directories.path().join(format!("{host}.boot")),
            machine_id_file: self.machine_id_file(&host),
            speaks: SPEAKS,
            host: host.parse().expect("a host name"),
        }
    }

    fn state_dir(&self, host: &str) -> PathBuf {
        self.directories.path().join(host)
    }

    fn machine_id_file(&self, host: &str) -> PathBuf {
        self.directories.path().join(format!("{host}.machine"))
    }

    fn write_boot_id(&mut self, host: &str) {
        self.boots += 1;
        let file = self.directories.path().join(format!("{host}.boot"));
        std::fs::write(file, format!("boot {}", self.boots)).expect("there is room");
    }

    // ---- what happens ------------------------------------------------------------

    async fn events(&mut self) -> Vec<String> {
        let began = Instant::now();
        let mut due: BTreeMap<(u64, usize), Step> = BTreeMap::new();
        let events = self.plan.events.clone();
        for (number, Planned { at_ms, event }) in events.into_iter().enumerate() {
            due.insert((at_ms, number), Step::Happens(event));
        }
        let mut ends = due.len();
        while let Some(((at_ms, _), step)) = due.pop_first() {
            sleep_until(began + std::time::Duration::from_millis(at_ms)).await;
            self.notice_cuts();
            match step {
                Step::Happens(event) => {
                    self.trace.note("event", format_args!("{event:?}"));
                    for (hold, for_ms) in self.happens(event).await {
                        self.begin(hold);
                        due.insert((at_ms + for_ms, ends), Step::Ends(hold));
                        ends += 1;
                    }
                }
                Step::Ends(hold) => self.end(hold),
            }
            self.look_at_nodes();
            let found = self.broken();
            if !found.is_empty() {
                return found;
            }
        }
        Vec::new()
    }

    /// What must hold at every moment and does not.
    fn broken(&self) -> Vec<String> {
        let mut broken = Ledger::moment(&self.fabric);
        broken.extend(self.switches.wrong());
        broken
    }

    /// Nodes whose power a conductor has cut stay off for a while.
    fn notice_cuts(&mut self) {
        for cut in self.switches.cut() {
            let node = (0..self.plan.nodes).find(|node| host(*node) == cut);
            let node = node.expect("it is one of them");
            let who = Who::Agent(node);
            for hold in [Hold::Dead(who), Hold::Power(node)] {
                *self.holds.entry(hold).or_default() += 1;
            }
            self.kill(who);
            self.returning
                .insert(node, Instant::now() + seconds(CUT_FOR_S));
        }
        let now = Instant::now();
        let due: Vec<usize> = self
            .returning
            .iter()
            .filter(|(_, at)| **at <= now)
            .map(|(node, _)| *node)
            .collect();
        for node in due {
            self.returning.remove(&node);
            self.end(Hold::Dead(Who::Agent(node)));
            self.end(Hold::Power(node));
        }
    }

    /// Looks at how nodes are, as whoever stands before them can.
    fn look_at_nodes(&self) {
        let has_power = |node| !self.holds(Hold::Power(node));
        let agent_is_heard = |node| {
            let who = Who::Agent(node);
            let away = [Hold::Dead(who), Hold::Frozen(who), Hold::CutOff(who)];
            has_power(node) && !away.into_iter().any(|hold| self.holds(hold))
        };
        for node in 0..self.plan.nodes {
            let is_seen_by = |other: usize| {
                let link = Hold::Link(node.min(other), node.max(other));
                other != node && agent_is_heard(other) && !self.holds(link)
            };
            let libvirtd_is_seen = has_power(node)
                && !self.holds(Hold::Libvirtd(node))
                && (0..self.plan.nodes).any(is_seen_by);
            let is_alive = agent_is_heard(node) || libvirtd_is_seen;
            let life = self.processes[&Who::Agent(node)].life.as_ref();
            self.switches
                .see(&host(node), !has_power(node), is_alive, life);
        }
    }

    /// Lets it happen; gives back what of it lasts, and how long, ms.
    async fn happens(&mut self, event: Event) -> Vec<(Hold, u64)> {
        match event {
            Event::Ask(ask) => {
                let off: Vec<usize> = (0..self.plan.nodes)
                    .filter(|node| self.holds(Hold::Power(*node)))
                    .collect();
                let asking = asked(self.operator.clone(), ask, self.guests.clone(), off);
                self.asking.spawn(asking);
                Vec::new()
            }
            Event::Kill { who, for_ms } => vec![(Hold::Dead(who), for_ms)],
            Event::Freeze { who, for_ms } => vec![(Hold::Frozen(who), for_ms)],
            Event::CutOff { who, for_ms } => vec![(Hold::CutOff(who), for_ms)],
            Event::CutLink { a, b, for_ms } => vec![(Hold::Link(a.min(b), a.max(b)), for_ms)],
            Event::BadNetwork { for_ms } => vec![(Hold::Network, for_ms)],
            Event::WrongClock { who, by_ms, for_ms } => {
                self.processes[&who].clock.set_ahead(by_ms);
                vec![(Hold::Clock(who), for_ms)]
            }
            Event::LoseJournal { node, for_ms } => {
                let who = Who::Agent(node);
                self.kill(who);
                drop(std::fs::remove_dir_all(self.state_dir(&host(node))));
                vec![(Hold::Dead(who), for_ms)]
            }
            Event::FullDisk { node, for_ms } => vec![(Hold::FullDisk(node), for_ms)],
            Event::FullState { node, for_ms } => vec![(Hold::FullState(node), for_ms)],
            Event::RestartLibvirtd { node } => {
                self.fabric.restart_libvirtd(&host(node));
                Vec::new()
            }
            Event::SilentLibvirtd { node, for_ms } => vec![(Hold::Libvirtd(node), for_ms)],
            Event::PowerCut { node, for_ms } => vec![
                (Hold::Dead(Who::Agent(node)), for_ms),
                (Hold::Power(node), for_ms),
            ],
            Event::GuestStops { guest } => {
                self.fabric.kill_guest(self.guests[guest]);
                Vec::new()
            }
            Event::GuestStarts { guest } => {
                self.start_by_hand(self.guests[guest]).await;
                Vec::new()
            }
            Event::GuestReboots { guest } => {
                self.fabric.kill_guest(self.guests[guest]);
                self.start_by_hand(self.guests[guest]).await;
                Vec::new()
            }
            Event::GuestMoves { guest, to } => {
                self.move_by_hand(guest, to).await;
                Vec::new()
            }
            Event::GuestWrites { guest, mib_s } => {
                let id = self.guests[guest];
                if let Some(at) = self.fabric.running_on(id) {
                    self.fabric.set_dirty_mib_s(at.as_str(), id, mib_s);
                }
                Vec::new()
            }
        }
    }

    /// Somebody starts a guest with libvirt's own means: who knows of one domain only.
    async fn start_by_hand(&self, id: InstanceId) {
        if let [(at, here)] = &self.fabric.whereabouts(id)[..]
            && !here.is_active()
        {
            // Refused, nothing has happened.
            drop(self.fabric.driver(at.as_str()).start(id).await);
        }
    }

    /// Somebody stops a guest, takes it to another node with its disks, and starts it
    /// there if it ran: who knows of one domain only, and of no migration.
    async fn move_by_hand(&self, guest: usize, to: usize) {
        let (id, to) = (self.guests[guest], host(to));
        let [(from, was)] = &self.fabric.whereabouts(id)[..] else {
            return;
        };
        let (from, runs) = (from.as_str(), was.is_active());
        let hands_can = [from, &to].iter().all(|node| {
            let node = (0..self.plan.nodes).find(|n| host(*n) == **node);
            let away = |node| {
                [
                    Hold::Power(node),
                    Hold::Libvirtd(node),
                    Hold::FullDisk(node),
                ]
            };
            node.is_some_and(|node| !away(node).into_iter().any(|hold| self.holds(hold)))
        });
        let found = self.fabric.guest(from, id);
        let own = disks(guest, &self.plan.guests[guest]);
        let has_its_own = found.is_some_and(|found| {
            let file = |disk: &Disk| matches!(&disk.source, DiskSource::File { path } if own.contains(path));
            found.disks.iter().all(file)
        });
        if from == to || !hands_can || !has_its_own || self.fabric.migrating().contains(&id) {
            return;
        }
        let (here, there) = (self.fabric.driver(from), self.fabric.driver(&to));
        let Ok(Some(definition)) = here.definition(id).await else {
            return;
        };
        self.fabric.kill_guest(id);
        if here.withdraw(id).await.is_err() {
            return;
        }
        if self.plan.guests[guest].disks != Disks::Shared {
            own.iter()
                .for_each(|path| self.fabric.copy_file(from, &to, path));
        }
        let defined = there.define(&definition, None).await;
        defined.expect("nobody else has a domain of it");
        self.trace
            .note("hand", format_args!("guest{guest} is on {to} now"));
        if runs {
            drop(there.start(id).await);
        }
    }

    fn begin(&mut self, hold: Hold) {
        let count = self.holds.entry(hold).or_default();
        *count += 1;
        if *count > 1 {
            return;
        }
        let life = |who| self.processes[&who].life.as_ref();
        match hold {
            Hold::Dead(who) => self.kill(who),
            Hold::Frozen(who) => life(who).into_iter().for_each(|life| life.freeze()),
            Hold::CutOff(who) => self.broker.cut(&name(who)),
            Hold::Link(a, b) => self.fabric.cut_link(&host(a), &host(b)),
            Hold::Network => self.broker.set_faults(bad_network()),
            // It is wrong already, by as much as was last said.
            Hold::Clock(_) => {}
            Hold::FullDisk(node) => self.fabric.set_disk_bytes(&host(node), LOCAL, 0),
            Hold::FullState(node) => self.state_disks[node].fill(true),
            Hold::Libvirtd(node) => self.fabric.libvirtd_away(&host(node)),
            Hold::Power(node) => self.fabric.power_off(&host(node)),
        }
    }

    fn end(&mut self, hold: Hold) {
        let count = self.holds.entry(hold).or_default();
        *count = count.saturating_sub(1);
        if *count > 0 {
            return;
        }
        self.trace.note("over", format_args!("{hold:?}"));
        match hold {
            // What has no power is started when that is back.
            Hold::Dead(Who::Agent(node)) if self.holds(Hold::Power(node)) => {}
            Hold::Dead(who) => self.start(who),
            Hold::Frozen(who) => {
                let life = self.processes[&who].life.as_ref();
                life.into_iter().for_each(|life| life.thaw());
            }
            Hold::CutOff(who) => self.broker.heal(&name(who)),
            Hold::Link(a, b) => self.fabric.mend_link(&host(a), &host(b)),
            Hold::Network => self.broker.set_faults(Faults::default()),
            Hold::Clock(who) => self.processes[&who].clock.set_ahead(0),
            Hold::FullDisk(node) => self.fabric.set_disk_bytes(&host(node), LOCAL, 200 * GIB),
            Hold::FullState(node) => {
                self.state_disks[node].fill(false);
                let who = Who::Agent(node);
                let is_gone = matches!(self.processes[&who].body, Body::None);
                if is_gone && !self.holds(Hold::Dead(who)) {
                    self.start(who);
                }
            }
            Hold::Libvirtd(node) => self.fabric.libvirtd_back(&host(node)),
            Hold::Power(node) => {
                self.fabric.power_on(&host(node));
                self.write_boot_id(&host(node));
                let who = Who::Agent(node);
                if !self.holds(Hold::Dead(who)) {
                    self.start(who);
                }
            }
        }
    }

    /// Faults are over: everything has to end.
    async fn come_to_rest(&mut self) -> Vec<String> {
        self.trace
            .note("event", format_args!("the faults are over"));
        let ledger = Ledger {
            fabric: self.fabric.clone(),
            store: self.store.clone(),
            guests: self.guests.clone(),
            switches: self.switches.clone(),
        };
        let began = Instant::now();
        let mut rested = 0;
        loop {
            sleep(seconds(LOOK_S)).await;
            self.notice_cuts();
            self.look_at_nodes();
            let found = self.broken();
            if !found.is_empty() {
                return found;
            }
            let left = ledger.unrest(&self.plan).await;
            let rests = left.is_empty() && self.returning.is_empty();
            rested = if rests { rested + 1 } else { 0 };
            if rested > 2 {
                return ledger.at_rest(&self.plan).await;
            }
            if began.elapsed() > seconds(PATIENCE_S) {
                return left;
            }
        }
    }
}

fn bad_network() -> Faults {
    Faults {
        delay_min: std::time::Duration::from_millis(1),
        delay_max: std::time::Duration::from_millis(800),
        loss: 0.05,
        duplication: 0.1,
        reordering: 0.2,
    }
}

fn disks(number: usize, plan: &GuestPlan) -> [String; 2] {
    let directory = match plan.disks {
        Disks::Local => LOCAL.to_owned(),
        Disks::Shared => SHARED.to_owned(),
        Disks::Project => format!("/projects/{}", PROJECTS[0]),
    };
    ["qcow2", "raw"].map(|format| format!("{directory}/guest{number}.{format}"))
}

fn builder(number: usize, plan: &GuestPlan) -> GuestBuilder {
    let name = format!("guest{number}");
    let [system, data] = disks(number, plan);
    let mut builder = GuestBuilder::new(&name)
        .memory_mib(1024)
        .dirty_mib_s(plan.dirty_mib_s)
        .working_set_mib(512)
        .disk(&system, 256)
        .disk(&data, 64);
    if !plan.runs {
        builder = builder.state(PowerState::Shutdown);
    }
    if !plan.obeys {
        builder = builder.ignores_shutdown();
    }
    if plan.disks == Disks::Project {
        let bridge = format!("br-{}", PROJECTS[0]);
        builder = builder
            .project(PROJECTS[0])
            .nics(&[NicAttachment::Bridge { bridge }]);
    }
    builder
}

fn project(id: &str) -> Project {
    let mut project = Project::new(id.parse().expect("an id"));
    let attachment = NicAttachment::Bridge {
        bridge: format!("br-{id}"),
    };
    let place = NetworkPlace {
        nodes: Vec::new(),
        attachment,
        unknown: Default::default(),
    };
    project.networks = BTreeMap::from([("lan".to_owned(), vec![place])]);
    project.storage = vec![StoragePlace {
        nodes: Vec::new(),
        location: Location::Directory {
            path: format!("/projects/{id}"),
        },
        unknown: Default::default(),
    }];
    project
}
