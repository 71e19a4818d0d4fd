//! An evacuation's steps on the new home: a guest of a dead node defined, started,
//! kept or taken back; and what is asked before.

use drover_compute::hypervisor::{
    HypervisorError,
    fake::{Call, script::Effect},
};
use drover_model::{
    api::{
        compute::{
            CheckEvacuation, CleanUp, DirtyRate, EvacuationFacts, GuestLocation, InstanceOnNode,
            KeptDefinition, ProbeAddress, ProbeAnswer, RebuildInstance, method,
        },
        fault::Fault,
    },
    content::{CheckedFile, Seen},
    error::ErrorClass,
    guest::{PowerState, Presence},
};

use crate::harness::*;

pub(crate) const SHARED: &str = "/shared";
const RUNNING: Presence = Presence::Present(PowerState::Running);
const OFF: Presence = Presence::Present(PowerState::Shutdown);

/// Two nodes with a shared directory, and a guest on it whose node dies.
struct Dead {
    world: World,
    m: Move,
    kept: KeptDefinition,
}

impl Dead {
    async fn new() -> Self {
        let world = World::new().await;
        world.fabric.share_directory(SHARED, &[A, B], 1 << 40);
        let disk = format!("{SHARED}/vm.qcow2");
        let guest = drover_compute::hypervisor::fake::GuestBuilder::new("vm").disk(&disk, 100);
        let m = world.migration(guest);
        let which = InstanceOnNode {
            instance: m.step.instance,
        };
        let kept = world.call(A, method::GET_DEFINITION, &which).await;
        let kept = kept.unwrap();
        let mut dead = Self { world, m, kept };
        dead.world.kill(A);
        dead.world.fabric.power_off(A);
        dead
    }

    async fn prepare(&self) -> Result<(), Fault> {
        let ask = RebuildInstance {
            migration: self.m.step.migration,
            instance: self.m.step.instance,
            domain: self.kept.domain.clone(),
            generation: 1,
            checked: Vec::new(),
        };
        self.world.call(B, method::PREP_REBUILD, &ask).await
    }

    /// Prepares with a file of B that was compared.
    async fn prepare_over(&self, path: &str, stamp: Option<String>) -> Result<(), Fault> {
        let ask = RebuildInstance {
            migration: self.m.step.migration,
            instance: self.m.step.instance,
            domain: self.kept.domain.clone(),
            generation: 1,
            checked: vec![CheckedFile {
                path: path.to_owned(),
                stamp,
            }],
        };
        self.world.call(B, method::PREP_REBUILD, &ask).await
    }

    async fn rebuild(&self) -> Result<GuestLocation, Fault> {
        self.world.call(B, method::REBUILD, &self.m.step).await
    }

    async fn end(&self, method: &str) -> Result<CleanUp, Fault> {
        self.world.clean_up(B, method, &self.m).await
    }

    async fn on_b(&self) -> Presence {
        self.world.locate(B, &self.m).await
    }

    fn assert_over(&self) {
        assert_eq!(self.world.journal_files(B), Vec::<String>::new());
        self.world.fabric.check_invariants().unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_of_a_dead_node_is_started_once_however_often_it_is_asked_for() {
    let dead = Dead::new().await;
    for _ in 0..2 {
        dead.prepare().await.unwrap();
        assert_eq!(dead.on_b().await, OFF);
    }
    for _ in 0..2 {
        assert_eq!(dead.rebuild().await.unwrap().presence, RUNNING);
    }
    dead.prepare().await.unwrap();
    assert_eq!(dead.on_b().await, RUNNING);
    for _ in 0..2 {
        dead.end(method::POST_REBUILD).await.unwrap();
    }
    assert_eq!(dead.rebuild().await.unwrap().presence, RUNNING);
    let guest = dead.world.fabric.guest(B, dead.m.step.instance).unwrap();
    assert_eq!(guest.generation, 1);
    assert!(dead.prepare().await.unwrap_err().message.contains("over"));
    dead.assert_over();
}

#[tokio::test(start_paused = true)]
async fn death_of_the_agent_after_any_step_changes_nothing() {
    let mut dead = Dead::new().await;
    dead.prepare().await.unwrap();
    dead.world.restart(B).await;
    dead.prepare().await.unwrap();
    dead.world.restart(B).await;
    assert_eq!(dead.rebuild().await.unwrap().presence, RUNNING);
    dead.world.restart(B).await;
    assert_eq!(dead.rebuild().await.unwrap().presence, RUNNING);
    dead.end(method::POST_REBUILD).await.unwrap();
    dead.world.restart(B).await;
    dead.end(method::POST_REBUILD).await.unwrap();
    assert_eq!(dead.on_b().await, RUNNING);
    dead.assert_over();
}

#[tokio::test(start_paused = true)]
async fn a_step_whose_answer_was_lost_is_repeated() {
    for call in [Call::DefineRebuilt, Call::Start] {
        let mut dead = Dead::new().await;
        let lost = Effect::Forget(HypervisorError::Lost("gone".to_owned()));
        dead.world.fabric.on_call(B, call, 1, lost);
        let first = async {
            dead.prepare().await?;
            dead.rebuild().await
        };
        assert_eq!(first.await.unwrap_err().class, ErrorClass::Lost, "{call:?}");
        dead.world.restart(B).await;
        dead.prepare().await.unwrap();
        assert_eq!(dead.rebuild().await.unwrap().presence, RUNNING);
        dead.end(method::POST_REBUILD).await.unwrap();
        dead.assert_over();
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_defined_is_taken_back_and_nothing_else() {
    let mut dead = Dead::new().await;
    dead.prepare().await.unwrap();
    dead.world.restart(B).await;
    for _ in 0..2 {
        dead.end(method::ROLLBACK_REBUILD).await.unwrap();
        assert_eq!(dead.on_b().await, Presence::Absent);
    }
    assert!(dead.world.fabric.file(B, "/shared/vm.qcow2").is_some());
    assert!(dead.rebuild().await.is_err(), "nothing is started any more");
    dead.assert_over();
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_runs_is_not_taken_back() {
    let dead = Dead::new().await;
    dead.prepare().await.unwrap();
    dead.rebuild().await.unwrap();
    let refused = dead.end(method::ROLLBACK_REBUILD).await.unwrap_err();
    assert_eq!(refused.class, ErrorClass::Refused);
    assert_eq!(dead.on_b().await, RUNNING);
}

#[tokio::test(start_paused = true)]
async fn a_domain_that_is_here_already_is_never_replaced_nor_removed() {
    let dead = Dead::new().await;
    let other = drover_compute::hypervisor::fake::GuestBuilder::new("vm")
        .id(dead.m.step.instance)
        .state(PowerState::Shutdown);
    dead.world.fabric.add_guest(B, other);
    let refused = dead.prepare().await.unwrap_err();
    assert!(refused.message.contains("already"), "{refused}");
    dead.end(method::ROLLBACK_REBUILD).await.unwrap();
    assert_eq!(dead.on_b().await, OFF);
    assert_eq!(dead.world.journal_files(B), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_did_not_start_is_not_over() {
    let dead = Dead::new().await;
    dead.prepare().await.unwrap();
    let full = HypervisorError::Failed("Cannot allocate memory".to_owned());
    dead.world
        .fabric
        .on_call(B, Call::Start, 1, Effect::Refuse(full));
    assert!(dead.rebuild().await.is_err());
    let refused = dead.end(method::POST_REBUILD).await.unwrap_err();
    assert!(refused.message.contains("does not run"), "{refused}");
    dead.end(method::ROLLBACK_REBUILD).await.unwrap();
    assert_eq!(dead.on_b().await, Presence::Absent);
}

#[tokio::test(start_paused = true)]
async fn shared_disks_are_told_from_local_ones_without_the_dead_node() {
    let world = World::new().await;
    world.fabric.share_directory(SHARED, &[A, B], 1 << 40);
    let guest = drover_compute::hypervisor::fake::GuestBuilder::new("vm")
        .disk(&format!("{SHARED}/vm.qcow2"), 100)
        .disk(DISK, 100)
        .backing("/var/lib/libvirt/images/base.qcow2");
    let m = world.migration(guest);
    let which = InstanceOnNode {
        instance: m.step.instance,
    };
    let kept: KeptDefinition = world.call(A, method::GET_DEFINITION, &which).await.unwrap();
    world.fabric.power_off(A);
    let base = "/var/lib/libvirt/images/base.qcow2";
    let told: Vec<_> = kept.contents.iter().map(|f| f.path.as_str()).collect();
    assert_eq!(told, [base], "what it only reads was read while it lived");
    let ask = CheckEvacuation {
        migration: m.step.migration,
        guest: kept.guest,
        identities: kept.identities,
        contents: kept.contents,
    };
    let facts: EvacuationFacts = world.call(B, method::CHECK_EVACUATION, &ask).await.unwrap();
    assert_eq!(
        facts.foreign_files,
        Vec::<String>::new(),
        "contents tell more"
    );
    let seen = facts.destination.contents.iter();
    let missing = seen.filter(|f| f.seen == Seen::Missing);
    let missing: Vec<_> = missing.map(|f| f.path.as_str()).collect();
    assert_eq!(missing, [DISK, base]);
    // Of a conductor that kept no contents.
    let ask = CheckEvacuation {
        contents: Vec::new(),
        ..ask
    };
    let facts: EvacuationFacts = world.call(B, method::CHECK_EVACUATION, &ask).await.unwrap();
    let shared: Vec<bool> = facts.destination.disks.iter().map(|d| d.shared).collect();
    assert_eq!(shared, [true, false]);
    let [foreign] = &facts.foreign_files[..] else {
        panic!("{:?}", facts.foreign_files);
    };
    assert!(foreign.starts_with("/var/lib/libvirt/images/base.qcow2: "));
    assert_eq!(facts.destination.same_uuid, Presence::Absent);
    assert_eq!(world.journal_files(B), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn questions_about_other_nodes_and_loads_are_answered() {
    let world = World::new().await;
    let m = world.migration(busy());
    let which = InstanceOnNode {
        instance: m.step.instance,
    };
    let rate: DirtyRate = world
        .call(A, method::MEASURE_DIRTY_RATE, &which)
        .await
        .unwrap();
    assert_eq!(rate.mib_s, Some(3000));
    let probe = ProbeAddress {
        address: world.fabric.endpoint(A).address,
        port: world.fabric.endpoint(A).libvirt_port,
    };
    let alive: ProbeAnswer = world.call(B, method::PROBE_ADDRESS, &probe).await.unwrap();
    assert_eq!(alive.reached, Ok(()));
    world.fabric.power_off(A);
    let dead: ProbeAnswer = world.call(B, method::PROBE_ADDRESS, &probe).await.unwrap();
    assert!(dead.reached.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_guest_is_not_started_over_a_file_that_changed_since_it_was_compared() {
    let dead = Dead::new().await;
    let iso = format!("{SHARED}/tools.iso");
    dead.world.fabric.write_file(B, &iso, "bytes").unwrap();
    let stamp = dead.world.stamp(B, &iso).await;
    dead.prepare_over(&iso, stamp).await.unwrap();
    dead.world.fabric.change_file(B, &iso).unwrap();
    let fault = dead.rebuild().await.unwrap_err();
    assert_eq!(fault.class, ErrorClass::Refused);
    assert!(fault.message.contains(&iso), "{}", fault.message);
    assert_eq!(dead.on_b().await, OFF);
}
