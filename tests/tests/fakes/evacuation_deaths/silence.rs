//! Silence is not death: in virtual time, with a conductor that evacuates by
//! itself. Whatever makes an agent silent, the power of a node that may live is
//! not cut; that of one which is dead is, in time and not too often.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

use drover_model::api::conductor::{Node, NodeRef, method};

use super::*;

const MINUTE: Duration = Duration::from_secs(60);
/// What the settings' delay and silence come to.
const USUAL: Duration = Duration::from_secs(180);
/// What was not done by then is not done.
const FOR_GOOD: Duration = Duration::from_secs(900);

/// What a fence does when it is told to cut power.
#[derive(Clone, Copy, PartialEq)]
enum Manner {
    /// That.
    Cuts,
    /// Says so, and cuts that of another node.
    CutsAnother(&'static str),
    /// Says so, and does nothing: its status knows.
    SaysItIsOn,
    /// Says so, and then nothing that can be understood.
    LosesItsWords,
    /// Not even that.
    Fails,
}

/// Fences of all nodes, and whose power they were told to cut.
#[derive(Clone, Default)]
struct Told {
    cut: Arc<Mutex<Vec<String>>>,
    off: Arc<Mutex<BTreeSet<String>>>,
}

impl Told {
    fn cuts(&self) -> Vec<String> {
        self.cut.lock().expect("nobody panics with it").clone()
    }

    /// Somebody else switched it off, or on again.
    fn switch(&self, host: &str, is_off: bool) {
        let mut off = self.off.lock().expect("nobody panics with it");
        match is_off {
            true => off.insert(host.to_owned()),
            false => off.remove(host),
        };
    }

    fn is_off(&self, host: &str) -> bool {
        self.off
            .lock()
            .expect("nobody panics with it")
            .contains(host)
    }

    fn fences(&self, fabric: &Fabric, manner: Manner) -> Fences {
        let (told, fabric) = (self.clone(), fabric.clone());
        Fences::from_fn(move |host, action| {
            let agent = "fence_fabric".to_owned();
            let host = host.as_str();
            let off = |agent| FenceAnswer::Off { agent, at_ms: 1 };
            let failed = |agent| FenceAnswer::Failed {
                agent,
                message: "exit code 1".to_owned(),
            };
            if action == Action::Off {
                told.cut
                    .lock()
                    .expect("nobody panics with it")
                    .push(host.to_owned());
                match manner {
                    Manner::Fails => return failed(agent),
                    Manner::SaysItIsOn | Manner::LosesItsWords => {}
                    Manner::Cuts => fabric.power_off(host),
                    Manner::CutsAnother(other) => fabric.power_off(other),
                }
                if matches!(manner, Manner::Cuts | Manner::CutsAnother(_)) {
                    told.switch(host, true);
                }
                return off(agent);
            }
            match told.is_off(host) {
                true => off(agent),
                false if manner == Manner::LosesItsWords => failed(agent),
                false => FenceAnswer::On { agent },
            }
        })
    }
}

/// Four nodes and a guest on the first; the conductor evacuates by itself, and has
/// listened for long.
async fn unattended(manner: Manner) -> (Cloud, InstanceId, Told) {
    let mut cloud = cloud(1).await;
    cloud.add_node("kvm4", NodeSpec::default()).await;
    let nodes = ["kvm1", "kvm2", "kvm3", "kvm4"];
    cloud.fabric.share_directory(IMAGES, &nodes, 1000 * GIB);
    let id = guest(&cloud).await;
    let told = Told::default();
    cloud.fences = told.fences(&cloud.fabric, manner);
    cloud.settings.auto_evacuate = true;
    cloud
        .kill_and_start("conductor", Duration::from_secs(1))
        .await;
    tokio::time::sleep(5 * MINUTE).await;
    (cloud, id, told)
}

async fn node(cloud: &Cloud, host: &str) -> Node {
    let ask = NodeRef { host: name(host) };
    let node = cloud.call(method::GET_NODE, &ask).await;
    node.expect("it is on the record")
}

/// Nothing was fenced, and no guest was touched.
async fn check_left_alone(cloud: &Cloud, id: InstanceId, told: &Told) {
    assert_eq!(told.cuts(), [""; 0]);
    assert_eq!(evacuations(&cloud.store).await, []);
    assert_eq!(cloud.fabric.running_on(id), Some(name("kvm1")));
    cloud.fabric.check_invariants().expect("they hold");
}

async fn check_lost(cloud: &Cloud, host: &str, code: CheckCode) {
    let node = node(cloud, host).await;
    let lost = node
        .agent_lost
        .unwrap_or_else(|| panic!("{host} is not said to be lost"));
    assert!(codes(&lost.reasons).contains(&code), "{lost:#?}");
    assert!(!node.up);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_stopped_beside_healthy_guests_is_lost_and_nothing_is_fenced() {
    let (mut cloud, id, told) = unattended(Manner::Cuts).await;
    cloud.kill_agent("kvm1");
    tokio::time::sleep(60 * MINUTE).await;
    check_left_alone(&cloud, id, &told).await;
    check_lost(&cloud, "kvm1", CheckCode::HostAlive).await;
    cloud.start_agent("kvm1").await;
    tokio::time::sleep(MINUTE).await;
    let node = node(&cloud, "kvm1").await;
    assert!(node.up && node.agent_lost.is_none(), "{node:#?}");
    assert_eq!(cloud.store.agents_lost().await.expect("readable"), []);
}

#[tokio::test(start_paused = true)]
async fn a_node_cut_off_from_the_broker_is_not_fenced() {
    let (cloud, id, told) = unattended(Manner::Cuts).await;
    cloud.broker.cut("kvm1");
    tokio::time::sleep(FOR_GOOD).await;
    check_left_alone(&cloud, id, &told).await;
    check_lost(&cloud, "kvm1", CheckCode::HostAlive).await;
}

/// Its agent has stopped and its libvirtd is being restarted, or has died as well: a
/// machine that refuses a connection has power, and runs its guests.
#[tokio::test(start_paused = true)]
async fn a_node_without_agent_and_libvirtd_whose_machine_runs_is_not_fenced() {
    let (mut cloud, id, told) = unattended(Manner::Cuts).await;
    cloud.kill_agent("kvm1");
    cloud.fabric.libvirtd_dies("kvm1");
    tokio::time::sleep(FOR_GOOD).await;
    check_left_alone(&cloud, id, &told).await;
    check_lost(&cloud, "kvm1", CheckCode::HostAlive).await;
}

#[tokio::test(start_paused = true)]
async fn a_dead_libvirtd_beside_an_agent_that_lives_is_no_death() {
    let (cloud, id, told) = unattended(Manner::Cuts).await;
    cloud.fabric.libvirtd_dies("kvm1");
    tokio::time::sleep(FOR_GOOD).await;
    check_left_alone(&cloud, id, &told).await;
    assert!(node(&cloud, "kvm1").await.up);
}

#[tokio::test(start_paused = true)]
async fn a_conductor_that_is_cut_off_fences_nobody() {
    let (mut cloud, id, told) = unattended(Manner::Cuts).await;
    cloud.broker.cut("ctl");
    tokio::time::sleep(FOR_GOOD).await;
    assert_eq!(told.cuts(), [""; 0]);
    // One agent stops meanwhile: what was not heard of it proves nothing.
    cloud.kill_agent("kvm1");
    cloud.broker.heal("ctl");
    tokio::time::sleep(FOR_GOOD).await;
    check_left_alone(&cloud, id, &told).await;
}

#[tokio::test(start_paused = true)]
async fn when_all_agents_stop_nothing_is_fenced() {
    let (mut cloud, id, told) = unattended(Manner::Cuts).await;
    for host in ["kvm1", "kvm2", "kvm3", "kvm4"] {
        cloud.kill_agent(host);
    }
    tokio::time::sleep(FOR_GOOD).await;
    check_left_alone(&cloud, id, &told).await;
}

/// The witnesses themselves reach nobody: that they do not reach the node says
/// nothing.
#[tokio::test(start_paused = true)]
async fn witnesses_that_reach_nobody_do_not_count() {
    let (mut cloud, id, told) = unattended(Manner::Cuts).await;
    let nodes = ["kvm1", "kvm2", "kvm3", "kvm4"];
    for (n, a) in nodes.iter().enumerate() {
        nodes[n + 1..]
            .iter()
            .for_each(|b| cloud.fabric.cut_link(a, b));
    }
    cloud.kill_agent("kvm1");
    tokio::time::sleep(FOR_GOOD).await;
    check_left_alone(&cloud, id, &told).await;
    check_lost(&cloud, "kvm1", CheckCode::NoEvidence).await;
}

#[tokio::test(start_paused = true)]
async fn a_conductor_whose_clock_jumps_fences_nobody() {
    let (mut cloud, id, told) = unattended(Manner::Cuts).await;
    cloud.set_clock("ctl", 3 * 3600);
    tokio::time::sleep(10 * MINUTE).await;
    check_left_alone(&cloud, id, &told).await;
    cloud.kill_agent("kvm1");
    tokio::time::sleep(Duration::from_secs(20)).await;
    cloud.set_clock("ctl", 6 * 3600);
    tokio::time::sleep(FOR_GOOD).await;
    check_left_alone(&cloud, id, &told).await;
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_dead_is_fenced_and_evacuated_in_the_usual_time() {
    let (mut cloud, id, told) = unattended(Manner::Cuts).await;
    dies(&mut cloud, "kvm1");
    tokio::time::sleep(Duration::from_secs(140)).await;
    assert_eq!(told.cuts(), [""; 0], "not before the delay");
    tokio::time::sleep(USUAL - Duration::from_secs(140)).await;
    let ended = the_evacuation(&cloud).await;
    check_evacuated(&cloud, &ended, id).await;
    assert_eq!(told.cuts(), ["kvm1"]);
    let evidence = ended.evidence.expect("it is kept");
    assert_eq!(evidence.conductor, "ctl");
    assert!(
        evidence.cut_at_ms.is_some() && evidence.fence.is_off(),
        "{evidence:#?}"
    );
    tokio::time::sleep(FOR_GOOD).await;
    assert_eq!(told.cuts(), ["kvm1"], "once is enough");
    assert!(node(&cloud, "kvm1").await.agent_lost.is_none());
}

async fn the_evacuation(cloud: &Cloud) -> Operation {
    let begun = eventually("an evacuation", async || {
        evacuations(&cloud.store).await.pop()
    })
    .await;
    cloud.operation_end(begun.uuid).await
}

#[tokio::test(start_paused = true)]
async fn a_conductor_that_restarts_beside_a_dead_node_listens_first() {
    let (mut cloud, id, told) = unattended(Manner::Cuts).await;
    dies(&mut cloud, "kvm1");
    tokio::time::sleep(2 * MINUTE).await;
    cloud
        .kill_and_start("conductor", Duration::from_secs(1))
        .await;
    tokio::time::sleep(Duration::from_secs(140)).await;
    assert_eq!(told.cuts(), [""; 0], "it has not heard the silence itself");
    let ended = the_evacuation(&cloud).await;
    check_evacuated(&cloud, &ended, id).await;
}

/// One that dies after it took up the fence goes on with it, and it is one fence.
#[tokio::test(start_paused = true)]
async fn of_two_conductors_one_fences() {
    let (mut cloud, id, told) = unattended(Manner::Cuts).await;
    cloud.start_conductor_named("ctl2").await;
    tokio::time::sleep(5 * MINUTE).await;
    dies(&mut cloud, "kvm1");
    tokio::time::sleep(10 * MINUTE).await;
    let ended = the_evacuation(&cloud).await;
    check_evacuated(&cloud, &ended, id).await;
    assert_eq!(told.cuts(), ["kvm1"]);
    assert_eq!(evacuations(&cloud.store).await.len(), 1);
}

/// Its agent and its links are dead, and its guests run on.
fn is_cut_off(cloud: &mut Cloud) {
    cloud.kill_agent("kvm1");
    for other in ["kvm2", "kvm3", "kvm4"] {
        cloud.fabric.cut_link("kvm1", other);
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_fence_cannot_confirm_is_not_believed() {
    for manner in [Manner::SaysItIsOn, Manner::LosesItsWords, Manner::Fails] {
        let (mut cloud, id, told) = unattended(manner).await;
        is_cut_off(&mut cloud);
        let ended = the_evacuation(&cloud).await;
        assert_eq!(ended.status, OperationStatus::Failed, "{ended:#?}");
        assert_eq!(codes(&ended.refusals), [CheckCode::NotFenced]);
        tokio::time::sleep(FOR_GOOD).await;
        assert_eq!(told.cuts(), ["kvm1"], "it is not tried again and again");
        assert_eq!(cloud.fabric.running_on(id), Some(name("kvm1")));
    }
}

/// It was overruled that libvirtd answers; another machine lost its power; and
/// libvirtd still answers.
#[tokio::test(start_paused = true)]
async fn a_fence_that_cuts_another_machine_is_found_out() {
    let (mut cloud, id, told) = unattended(Manner::CutsAnother("kvm4")).await;
    cloud.kill_agent("kvm1");
    silence().await;
    let begun = cloud.operate(&Task::Evacuate(despite())).await;
    let ended = cloud.operation_end(begun.expect("it is taken").uuid).await;
    assert_eq!(ended.status, OperationStatus::Failed, "{ended:#?}");
    assert_eq!(codes(&ended.refusals), [CheckCode::HostAlive]);
    assert_eq!(told.cuts(), ["kvm1"]);
    assert_eq!(cloud.fabric.running_on(id), Some(name("kvm1")));
    assert!(
        cloud
            .store
            .migrations_of(ended.uuid)
            .await
            .expect("readable")
            .is_empty()
    );
}

#[tokio::test(start_paused = true)]
async fn an_operator_names_what_is_seen_and_nothing_else() {
    let (mut cloud, id, told) = unattended(Manner::Cuts).await;
    cloud.kill_agent("kvm1");
    silence().await;
    let refused = async |despite: &[LifeSign], expected: CheckCode| {
        let options = EvacuateOptions {
            despite: despite.to_vec(),
            ..options(true)
        };
        let begun = cloud.operate(&Task::Evacuate(options)).await;
        let ended = cloud.operation_end(begun.expect("it is taken").uuid).await;
        assert_eq!(codes(&ended.refusals), [expected], "{ended:#?}");
    };
    refused(&[], CheckCode::HostAlive).await;
    let too_much = [LifeSign::LibvirtReachable, LifeSign::AgentAnswers];
    refused(&too_much, CheckCode::Options).await;
    check_untouched(&cloud, id, &told);
    let begun = cloud.operate(&Task::Evacuate(despite())).await;
    let ended = cloud.operation_end(begun.expect("it is taken").uuid).await;
    check_evacuated(&cloud, &ended, id).await;
    assert_eq!(told.cuts(), ["kvm1"]);
}

fn check_untouched(cloud: &Cloud, id: InstanceId, told: &Told) {
    assert_eq!(told.cuts(), [""; 0]);
    assert_eq!(cloud.fabric.running_on(id), Some(name("kvm1")));
}

#[tokio::test(start_paused = true)]
async fn what_is_off_by_its_status_is_told_off_as_well() {
    let (mut cloud, id, told) = unattended(Manner::Cuts).await;
    dies(&mut cloud, "kvm1");
    told.switch("kvm1", true);
    let ended = the_evacuation(&cloud).await;
    check_evacuated(&cloud, &ended, id).await;
    assert_eq!(told.cuts(), ["kvm1"]);
}

/// A script that no shell understands ends with the exit code that means *off*,
/// whatever it is asked for; and the node is only cut off.
#[tokio::test(start_paused = true)]
async fn a_status_of_off_alone_proves_nothing() {
    let (mut cloud, id, told) = unattended(Manner::Fails).await;
    told.switch("kvm1", true);
    is_cut_off(&mut cloud);
    let ended = the_evacuation(&cloud).await;
    assert_eq!(ended.status, OperationStatus::Failed, "{ended:#?}");
    assert_eq!(codes(&ended.refusals), [CheckCode::NotFenced]);
    assert_eq!(cloud.fabric.running_on(id), Some(name("kvm1")));
    cloud.fabric.check_invariants().expect("they hold");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_on_again_when_its_guests_would_start_is_noticed() {
    let (mut cloud, id, told) = unattended(Manner::Cuts).await;
    dies(&mut cloud, "kvm1");
    told.switch("kvm1", true);
    silence().await;
    // What follows the proof takes its time.
    cloud.broker.set_faults(Faults {
        delay_min: Duration::from_millis(200),
        delay_max: Duration::from_millis(300),
        ..Faults::default()
    });
    let begun = cloud.operate(&Task::Evacuate(options(false))).await;
    let begun = begun.expect("it is taken");
    let proven = |o: &Operation| o.proof.is_some();
    cloud.until_operation(begun.uuid, "proven", proven).await;
    told.switch("kvm1", false);
    let ended = cloud.operation_end(begun.uuid).await;
    assert_eq!(ended.status, OperationStatus::Incomplete, "{ended:#?}");
    assert_eq!(cloud.fabric.running_on(id), None);
}

async fn another_guest(cloud: &Cloud, host: &str) -> InstanceId {
    let disk = format!("{IMAGES}/{host}.qcow2");
    let builder = GuestBuilder::new(host).memory_mib(512).disk(&disk, 256);
    let id = cloud.fabric.add_guest(host, builder);
    cloud.adopted(id).await;
    eventually("its definition is kept", async || {
        cloud.store.kept_definition(id).await.expect("readable")
    })
    .await;
    id
}

#[tokio::test(start_paused = true)]
async fn so_many_nodes_are_fenced_within_an_hour_and_no_more() {
    let (mut cloud, id, told) = unattended(Manner::Cuts).await;
    cloud.settings.auto_evacuate_max_per_hour = 1;
    cloud
        .kill_and_start("conductor", Duration::from_secs(1))
        .await;
    let second = another_guest(&cloud, "kvm2").await;
    tokio::time::sleep(5 * MINUTE).await;
    dies(&mut cloud, "kvm1");
    let ended = the_evacuation(&cloud).await;
    check_evacuated(&cloud, &ended, id).await;
    returns(&mut cloud, "kvm1").await;
    told.switch("kvm1", false);
    tokio::time::sleep(MINUTE).await;
    let home = cloud.fabric.running_on(second).expect("it runs");
    dies(&mut cloud, home.as_str());
    tokio::time::sleep(10 * MINUTE).await;
    check_lost(&cloud, home.as_str(), CheckCode::FenceLimit).await;
    // Neither a restart nor a clock makes it forget.
    cloud
        .kill_and_start("conductor", Duration::from_secs(1))
        .await;
    tokio::time::sleep(10 * MINUTE).await;
    check_lost(&cloud, home.as_str(), CheckCode::FenceLimit).await;
    assert_eq!(told.cuts(), ["kvm1"]);
    tokio::time::sleep(60 * MINUTE).await;
    assert_eq!(told.cuts(), ["kvm1", home.as_str()], "the hour is over");
}

#[tokio::test(start_paused = true)]
async fn a_closed_node_that_dies_waits_for_people() {
    let (mut cloud, _, told) = unattended(Manner::Cuts).await;
    let host = name("kvm1");
    let closed = cloud.store.set_node(&host, false, Some("new fans"));
    closed.await.expect("writable");
    dies(&mut cloud, "kvm1");
    tokio::time::sleep(FOR_GOOD).await;
    assert_eq!(told.cuts(), [""; 0]);
    check_lost(&cloud, "kvm1", CheckCode::HostDisabled).await;
}

/// In a cloud of many nodes every one is asked: one that reaches it is enough.
#[tokio::test(start_paused = true)]
async fn a_node_that_one_of_many_reaches_is_left_alone() {
    let (mut cloud, id, told) = unattended(Manner::Cuts).await;
    for n in 5..=20 {
        cloud
            .add_node(&format!("kvm{n}"), NodeSpec::default())
            .await;
    }
    tokio::time::sleep(MINUTE).await;
    // The last by its name still does.
    for n in (2..=20).filter(|n| *n != 9) {
        cloud.fabric.cut_link("kvm1", &format!("kvm{n}"));
    }
    cloud.kill_agent("kvm1");
    tokio::time::sleep(FOR_GOOD).await;
    check_left_alone(&cloud, id, &told).await;
    check_lost(&cloud, "kvm1", CheckCode::HostAlive).await;
}
