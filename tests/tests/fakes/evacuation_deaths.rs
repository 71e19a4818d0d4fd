//! Evacuations in virtual time, with every process dying at every turn, and
//! dead nodes that return. No guest may ever run twice; the fabric sees if one
//! does, even for a moment.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use drover_compute::hypervisor::{
    HypervisorError,
    fake::{Call, Fabric, GuestBuilder, NodeSpec, script::Effect},
};
use drover_conductor::operation::{
    evacuation::{LastWord, examine, inspect, prove},
    fence::{Action, Fences},
};
use drover_model::{
    api::conductor::ListOperations,
    check::{CheckCode, CheckFailure},
    ids::{HostName, InstanceId, OperationId},
    migration::{Evacuation, Migration, MigrationStatus as S, ProofOfDeath, Requester, Way},
    operation::{
        EvacuateOptions, Evidence, FenceAnswer, LifeSign, MoveWay, Operation, OperationStatus,
        Task, Verdict,
    },
};
use drover_rpc::memory::Faults;
use drover_store::{Store, Term};
use drover_tests::cloud::{Cloud, eventually};

#[path = "evacuation_deaths/moving.rs"]
mod moving;
#[path = "evacuation_deaths/silence.rs"]
mod silence_is_not_death;

const IMAGES: &str = "/var/lib/libvirt/images";
const GIB: u64 = 1 << 30;

fn name(host: &str) -> HostName {
    host.parse().expect("a host name")
}

/// A fence that cuts power in the fabric.
fn fences(fabric: &Fabric) -> Fences {
    let fabric = fabric.clone();
    let is_off = AtomicBool::new(false);
    Fences::from_fn(move |host, action| {
        let agent = "fence_fabric".to_owned();
        if action == Action::Off && !is_off.swap(true, Ordering::SeqCst) {
            fabric.power_off(host.as_str());
        }
        match is_off.load(Ordering::SeqCst) {
            true => FenceAnswer::Off { agent, at_ms: 1 },
            false => FenceAnswer::On { agent },
        }
    })
}

/// Gives the conductor a fence, which it takes at its start.
async fn with_fences(cloud: &mut Cloud) {
    cloud.fences = fences(&cloud.fabric);
    cloud
        .kill_and_start("conductor", Duration::from_secs(1))
        .await;
}

/// The operation did its work: the guest runs where its move says.
async fn check_evacuated(cloud: &Cloud, ended: &Operation, id: InstanceId) {
    assert_eq!(ended.status, OperationStatus::Completed, "{ended:#?}");
    let moved = cloud.store.migrations_of(ended.uuid).await;
    let moved = moved.expect("readable");
    let home = moved[0].dest_host.as_ref().map(HostName::as_str);
    check(cloud, &moved[0], home);
    assert_eq!(moved[0].instance_uuid, id);
}

/// Three nodes, each with its own images.
async fn unshared(seed: u64) -> Cloud {
    let mut cloud = Cloud::start(seed).await;
    cloud.add_node("kvm3", NodeSpec::default()).await;
    cloud
}

/// Three nodes that share their images.
async fn cloud(seed: u64) -> Cloud {
    let cloud = unshared(seed).await;
    let nodes = ["kvm1", "kvm2", "kvm3"];
    cloud.fabric.share_directory(IMAGES, &nodes, 1000 * GIB);
    cloud
}

fn options(confirmed_off: bool) -> EvacuateOptions {
    EvacuateOptions {
        confirmed_off,
        ..EvacuateOptions::new(name("kvm1"))
    }
}

/// A fence that an operator has used although libvirtd answers.
fn despite() -> EvacuateOptions {
    EvacuateOptions {
        despite: vec![LifeSign::LibvirtReachable],
        ..options(false)
    }
}

/// Nothing more forbids that power is cut.
struct Allowed;

#[async_trait::async_trait]
impl LastWord for Allowed {
    async fn before_cut(&self, _: &Evidence) -> drover_store::Result<Vec<CheckFailure>> {
        Ok(Vec::new())
    }
}

async fn guest(cloud: &Cloud) -> InstanceId {
    let disk = format!("{IMAGES}/web.qcow2");
    let builder = GuestBuilder::new("web").memory_mib(1024).disk(&disk, 256);
    let id = cloud.fabric.add_guest("kvm1", builder);
    cloud.adopted(id).await;
    eventually("its definition is kept", async || {
        cloud.store.kept_definition(id).await.expect("readable")
    })
    .await;
    id
}

/// The node loses its power, and its agent with it.
fn dies(cloud: &mut Cloud, host: &str) {
    cloud.fabric.power_off(host);
    cloud.kill_agent(host);
}

async fn returns(cloud: &mut Cloud, host: &str) {
    cloud.fabric.power_on(host);
    cloud.start_agent(host).await;
}

/// An evacuation as an operation begins one, its node being proven dead now.
pub(crate) async fn begin(cloud: &Cloud, id: InstanceId, to: &[&str]) -> Migration {
    let row = cloud.store.find_instance(&id.to_string()).await;
    let row = row.expect("on the record");
    let node = cloud.store.node(&row.host).await.expect("on the record");
    let at_ms = node.heard_at_ms + 60_000;
    let way = Way::Evacuation(Evacuation {
        operation: OperationId::generate(),
        proof: ProofOfDeath::Fence {
            agent: "fence_fabric".into(),
            at_ms,
            life: None,
        },
        to: to.iter().map(|host| name(host)).collect(),
    });
    let m = Migration {
        instance_name: row.name,
        project_id: row.project,
        owner: "nobody".into(),
        ..Migration::new(id, row.host, way, at_ms)
    };
    // Its lease has run out: the next pass of the conductor takes it up.
    let no_term = Term {
        now_ms: 0,
        lease_ms: 0,
    };
    cloud
        .store
        .admit(&m, None, None, no_term)
        .await
        .expect("writable");
    cloud.store.migration(m.uuid).await.expect("on the record")
}

/// Silence until the node counts as down.
async fn silence() {
    tokio::time::sleep(Duration::from_secs(60)).await;
}

fn check(cloud: &Cloud, m: &Migration, host: Option<&str>) {
    if let Err(found) = cloud.fabric.check_invariants() {
        panic!("{found:?}\n{m:#?}");
    }
    let running = cloud.fabric.running_on(m.instance_uuid);
    assert_eq!(running, host.map(name), "{m:#?}");
}

#[tokio::test(start_paused = true)]
async fn a_guest_starts_elsewhere_and_the_node_that_returns_gives_up_its_copy() {
    let mut cloud = cloud(1).await;
    let id = guest(&cloud).await;
    dies(&mut cloud, "kvm1");
    silence().await;
    let m = begin(&cloud, id, &[]).await;
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
    assert!(m.downtime_ms.is_some_and(|ms| ms >= 60_000), "{m:#?}");
    let home = m.dest_host.clone().expect("it went somewhere");
    check(&cloud, &m, Some(home.as_str()));
    let row = cloud
        .store
        .find_instance(&id.to_string())
        .await
        .expect("there");
    assert_eq!((&row.host, row.generation), (&home, 1));
    // Its home does not answer: what it has is not known, and the copy stays.
    cloud.kill_agent(home.as_str());
    returns(&mut cloud, "kvm1").await;
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert!(
        cloud.fabric.guest("kvm1", id).is_some(),
        "unknown is not absent"
    );
    cloud.start_agent(home.as_str()).await;
    eventually("the old copy is given up", async || {
        cloud.fabric.guest("kvm1", id).is_none().then_some(())
    })
    .await;
    eventually("that is known", async || {
        let left = cloud
            .store
            .evacuated_from(&name("kvm1"))
            .await
            .expect("readable");
        left.is_empty().then_some(())
    })
    .await;
    check(&cloud, &m, Some(home.as_str()));
}

/// A guest's node has died, its evacuation was begun, and its record has come so
/// many versions far; none if that is its end.
async fn midway(turn: u64) -> Option<(Cloud, InstanceId, Migration)> {
    let mut cloud = cloud(turn).await;
    let id = guest(&cloud).await;
    dies(&mut cloud, "kvm1");
    silence().await;
    let m = begin(&cloud, id, &["kvm2"]).await;
    let reached = cloud.until_version(m.uuid, m.version + turn).await;
    (!reached.status.is_final()).then_some((cloud, id, m))
}

/// Kills a process at every moment of an evacuation, and starts it again.
async fn starts_it_once_whenever_dies(who: &str) {
    let mut turn = 0;
    while let Some((mut cloud, _, m)) = midway(turn).await {
        cloud.kill_and_start(who, Duration::from_secs(3)).await;
        let m = cloud.end(m.uuid).await;
        assert_eq!(m.status, S::Completed, "turn {turn}: {m:#?}");
        check(&cloud, &m, Some("kvm2"));
        turn += 1;
    }
    assert!(turn > 3, "no more than {turn} versions");
}

#[tokio::test(start_paused = true)]
async fn a_conductor_that_dies_at_any_moment_starts_it_once() {
    starts_it_once_whenever_dies("conductor").await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_dies_at_any_moment_starts_it_once() {
    starts_it_once_whenever_dies("kvm2").await;
}

/// The new home dies for good at a moment of the evacuation: before it can have
/// been asked to start the guest another takes its place; after that nobody
/// decides on a guess, until it is back, or an operator says that it is off.
#[tokio::test(start_paused = true)]
async fn a_destination_that_dies_at_any_moment_costs_no_guest() {
    let mut came_back = [0, 0];
    let mut others = 0;
    for (turn, comes_back) in (0..).flat_map(|turn| [(turn, true), (turn, false)]) {
        let Some((mut cloud, id, m)) = midway(turn).await else {
            break;
        };
        dies(&mut cloud, "kvm2");
        let stands = |m: &Migration| m.status.is_final() || m.status == S::Stuck;
        let m = cloud.until(m.uuid, "ended or stuck", stands).await;
        match m.status {
            // What was seen to run has moved; then its new home died.
            S::Completed => check(&cloud, &m, None),
            S::Stuck => {
                came_back[usize::from(comes_back)] += 1;
                check(&cloud, &m, None);
                match comes_back {
                    true => returns(&mut cloud, "kvm2").await,
                    false => is_said_off(&cloud, "kvm2").await,
                }
                let m = cloud.end(m.uuid).await;
                if comes_back {
                    assert_eq!(m.status, S::Completed, "turn {turn}: {m:#?}");
                    check(&cloud, &m, Some("kvm2"));
                } else {
                    assert_eq!(m.status, S::Failed, "turn {turn}: {m:#?}");
                    another_takes_its_place(&mut cloud, id).await;
                }
            }
            _ => {
                others += 1;
                another_takes_its_place(&mut cloud, id).await;
            }
        }
    }
    assert!(
        others > 0 && came_back[0] > 0,
        "{others} went elsewhere, {came_back:?} waited"
    );
    assert_eq!(came_back[0], came_back[1]);
}

/// An operator says that a node is off, and evacuates it.
async fn is_said_off(cloud: &Cloud, host: &str) {
    silence().await;
    let asked = EvacuateOptions {
        confirmed_off: true,
        despite_many_lost: true,
        ..EvacuateOptions::new(name(host))
    };
    let begun = cloud.operate(&Task::Evacuate(asked)).await;
    cloud.operation_end(begun.expect("it is taken").uuid).await;
}

async fn another_takes_its_place(cloud: &mut Cloud, id: InstanceId) {
    let m = begin(cloud, id, &["kvm3"]).await;
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
    check(cloud, &m, Some("kvm3"));
    returns(cloud, "kvm2").await;
    let fabric = cloud.fabric.clone();
    eventually("what was defined on the dead one is gone", async || {
        fabric.guest("kvm2", id).is_none().then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    check(cloud, &m, Some("kvm3"));
}

#[tokio::test(start_paused = true)]
async fn a_node_that_returned_keeps_what_was_not_evacuated() {
    let mut cloud = cloud(1).await;
    let id = guest(&cloud).await;
    dies(&mut cloud, "kvm1");
    silence().await;
    returns(&mut cloud, "kvm1").await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let m = begin(&cloud, id, &[]).await;
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Failed, "{m:#?}");
    let why = m.end_reason.as_ref().expect("a reason").to_string();
    assert!(why.contains("host_alive"), "{why}");
    check(&cloud, &m, None);
    assert!(
        cloud.fabric.guest("kvm1", id).is_some(),
        "it is not taken away"
    );
    let row = cloud
        .store
        .find_instance(&id.to_string())
        .await
        .expect("there");
    assert_eq!((row.host, row.generation), (name("kvm1"), 0));
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_is_not_shared_is_not_rebuilt() {
    let mut cloud = Cloud::start(1).await;
    let id = guest(&cloud).await;
    dies(&mut cloud, "kvm1");
    silence().await;
    let found = examine(&cloud.context(), &options(false)).await;
    let found = found.expect("readable");
    let stays = &found[&id].source[&MoveWay::Evacuate];
    assert_eq!(codes(stays), [CheckCode::DiskNotShared], "{found:?}");
    let m = begin(&cloud, id, &[]).await;
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Failed, "{m:#?}");
    let why = m.end_reason.as_ref().expect("a reason").to_string();
    assert!(why.contains("disk_not_shared"), "{why}");
    check(&cloud, &m, None);
    assert!(cloud.store.claims().await.expect("readable").is_empty());
}

fn codes(failures: &[CheckFailure]) -> Vec<CheckCode> {
    failures.iter().map(|f| f.code).collect()
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_only_cut_off_is_fenced_or_left_alone() {
    let mut cloud = cloud(1).await;
    let id = guest(&cloud).await;
    let who = Requester::default();
    let asked = inspect(&cloud.context(), &options(false), &who).await;
    let (evidence, failures) = asked.expect("readable");
    assert_eq!(evidence.queue_consumers, Ok(1));
    let up = [CheckCode::HostUp, CheckCode::NotFenced];
    assert_eq!(codes(&failures), up, "{evidence:#?}");
    // Its agent is away; libvirtd and guest are well.
    cloud.kill_agent("kvm1");
    silence().await;
    let asked = prove(&cloud.context(), &options(false), &who, &Allowed).await;
    let (evidence, proof) = asked.expect("readable");
    assert_eq!(evidence.reach.len(), 2);
    assert!(
        evidence.reach.iter().all(|r| r.libvirt.is_ok()),
        "{evidence:#?}"
    );
    let refused = proof.expect_err("silence is no proof");
    assert_eq!(codes(&refused), [CheckCode::NotFenced]);
    let asked = prove(&cloud.context(), &options(true), &who, &Allowed).await;
    let refused = asked.expect("readable").1.expect_err("it is alive");
    assert_eq!(codes(&refused), [CheckCode::HostAlive]);
    assert_eq!(cloud.fabric.running_on(id), Some(name("kvm1")));

    with_fences(&mut cloud).await;
    let asked = inspect(&cloud.context(), &options(false), &who).await;
    let (evidence, failures) = asked.expect("readable");
    assert!(
        matches!(evidence.fence, FenceAnswer::On { .. }),
        "{evidence:#?}"
    );
    assert_eq!(codes(&failures), [CheckCode::HostAlive]);
    assert_eq!(
        cloud.fabric.running_on(id),
        Some(name("kvm1")),
        "to look does nothing"
    );
    let asked = prove(&cloud.context(), &options(false), &who, &Allowed).await;
    let refused = asked.expect("readable").1.expect_err("it shows life");
    assert_eq!(codes(&refused), [CheckCode::HostAlive]);
    assert_eq!(cloud.fabric.running_on(id), Some(name("kvm1")));
    let asked = prove(&cloud.context(), &despite(), &who, &Allowed).await;
    let (evidence, proof) = asked.expect("readable");
    assert!(proof.is_ok(), "{proof:?} {evidence:#?}");
    assert!(evidence.cut_at_ms.is_some(), "{evidence:#?}");
    let asked = prove(&cloud.context(), &options(false), &who, &Allowed).await;
    let (evidence, proof) = asked.expect("readable");
    assert!(proof.is_ok(), "safe to repeat: {proof:?} {evidence:#?}");
    assert_eq!(cloud.fabric.running_on(id), None);
    let found = examine(&cloud.context(), &options(false)).await;
    let found = found.expect("readable");
    assert!(
        found[&id].source.is_empty() && found[&id].unfit.is_empty(),
        "{found:?}"
    );
    let m = begin(&cloud, id, &[]).await;
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
    check(&cloud, &m, m.dest_host.as_ref().map(HostName::as_str));
}

/// By an operation, as an operator asks for it: the fence puts a node off that is
/// only cut off, and the guest starts elsewhere.
#[tokio::test(start_paused = true)]
async fn an_operation_fences_and_starts_everything_elsewhere() {
    let mut cloud = cloud(1).await;
    let id = guest(&cloud).await;
    with_fences(&mut cloud).await;
    cloud.kill_agent("kvm1");
    silence().await;
    let begun = cloud.operate(&Task::Evacuate(despite())).await;
    let ended = cloud.operation_end(begun.expect("it is taken").uuid).await;
    check_evacuated(&cloud, &ended, id).await;
}

async fn evacuations(store: &Store) -> Vec<Operation> {
    let all = ListOperations::default();
    store.operations(&all).await.expect("readable")
}

/// Without being asked, if the settings say so: after the delay, once, and not while
/// the switch is off.
#[tokio::test(start_paused = true)]
async fn a_dead_node_is_evacuated_without_being_asked() {
    let mut cloud = cloud(1).await;
    let id = guest(&cloud).await;
    cloud.settings.auto_evacuate = true;
    with_fences(&mut cloud).await;
    let store = cloud.store.clone();
    // For as long as a conductor that just came up trusts no silence.
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(evacuations(&store).await.len(), 0, "everybody is well");
    let switch = store.switch("evacuate", false);
    switch.await.expect("writable");
    dies(&mut cloud, "kvm1");
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(evacuations(&store).await.len(), 0, "it is switched off");
    let switch = store.switch("evacuate", true);
    switch.await.expect("writable");
    let ended = eventually("an evacuation's end", async || {
        let first = evacuations(&store).await.pop()?;
        first.status.is_final().then_some(first)
    })
    .await;
    check_evacuated(&cloud, &ended, id).await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(evacuations(&store).await.len(), 1, "once is enough");
}

/// The node that was chosen cannot start it: the next one does.
#[tokio::test(start_paused = true)]
async fn the_next_node_is_tried_when_one_refuses() {
    let mut cloud = cloud(1).await;
    let id = guest(&cloud).await;
    with_fences(&mut cloud).await;
    dies(&mut cloud, "kvm1");
    silence().await;
    let planned = cloud.dry_run(&Task::Evacuate(options(false))).await;
    let planned = planned.expect("it is answered");
    let Verdict::Moves { to: first, .. } = &planned.moves[0].verdict else {
        panic!("{planned:#?}");
    };
    let refusal = HypervisorError::Failed("out of memory".to_owned());
    let refusal = Effect::Refuse(refusal);
    cloud
        .fabric
        .on_call(first.as_str(), Call::Start, 1, refusal);
    let begun = cloud.operate(&Task::Evacuate(options(false))).await;
    let ended = cloud.operation_end(begun.expect("it is taken").uuid).await;
    assert_eq!(ended.status, OperationStatus::Completed, "{ended:#?}");
    let tried = &ended.items[0].tried;
    assert_eq!(tried.len(), 1, "{ended:#?}");
    assert_eq!(tried[0].host, *first, "{ended:#?}");
    let home = cloud.fabric.running_on(id);
    assert!(home.is_some_and(|home| home != *first), "{ended:#?}");
    if let Err(found) = cloud.fabric.check_invariants() {
        panic!("{found:?}\n{ended:#?}");
    }
}

/// From now on the node's libvirt fails like this.
fn fails(cloud: &Cloud, call: Call) {
    let words = HypervisorError::Failed("its storage does not answer".to_owned());
    let refusal = Effect::Refuse(words);
    cloud.fabric.on_call("kvm1", call, 1000, refusal);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_was_changed_since_its_definition_was_told_is_not_started_from_that() {
    let mut cloud = cloud(1).await;
    let id = guest(&cloud).await;
    fails(&cloud, Call::KeptDefinition);
    cloud.fabric.redefine("kvm1", id, |guest| guest.vcpus = 4);
    tokio::time::sleep(Duration::from_secs(20)).await;
    dies(&mut cloud, "kvm1");
    silence().await;
    let planned = cloud.dry_run(&Task::Evacuate(options(true))).await;
    let planned = planned.expect("it is answered");
    let Verdict::Stays { reasons, .. } = &planned.moves[0].verdict else {
        panic!("{planned:#?}");
    };
    assert_eq!(reasons[0].code, CheckCode::NoDefinition, "{reasons:?}");
    let m = begin(&cloud, id, &[]).await;
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Failed, "{m:#?}");
    check(&cloud, &m, None);
}

#[tokio::test(start_paused = true)]
async fn that_a_guest_may_have_been_changed_since_is_said() {
    let mut cloud = cloud(1).await;
    let id = guest(&cloud).await;
    let evacuate = Task::Evacuate(options(true));
    fails(&cloud, Call::Guests);
    tokio::time::sleep(Duration::from_secs(20)).await;
    dies(&mut cloud, "kvm1");
    silence().await;
    let planned = cloud.dry_run(&evacuate).await.expect("it is answered");
    let doubt = |note: &String| note.contains("web") && note.contains("is not known");
    assert!(planned.notes.iter().any(doubt), "{planned:#?}");
    let begun = cloud.operate(&evacuate).await.expect("it is taken");
    let ended = cloud.operation_end(begun.uuid).await;
    check_evacuated(&cloud, &ended, id).await;
}
