//! Nodes as the conductor hears of them: which of two agents of one name is the
//! node's, what clocks may do, whose silence counts; and that the record follows
//! the copy of a guest that runs.

use std::time::Duration;

use drover_compute::hypervisor::{
    ColdDriver, Hypervisor,
    fake::{Call, GuestBuilder, script::Effect},
};
use drover_model::{
    api::conductor::{Definition, Instance, InstanceRef, Node, method},
    ids::{HostName, InstanceId},
    migration::{ColdOptions, LiveOptions, MigrationStatus, Way},
    node::HypervisorReport,
};
use drover_rpc::RpcError;
use drover_tests::cloud::{Cloud, eventually};
use tokio::time::sleep;

const SECOND: Duration = Duration::from_secs(1);
const HOUR_S: i64 = 3600;

async fn until(cloud: &Cloud, host: &str, what: &str, want: impl Fn(&Node) -> bool) -> Node {
    eventually(what, async || {
        let node = cloud.node(host).await;
        want(&node).then_some(node)
    })
    .await
}

async fn report_of(cloud: &Cloud, host: &str) -> (u64, u64) {
    let report = cloud.node(host).await.report;
    (report.incarnation, report.sequence)
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_started_with_its_clock_ahead_is_believed_all_the_same() {
    let mut cloud = Cloud::start(1).await;
    cloud.kill_agent("kvm2");
    cloud.set_clock("kvm2", 10 * HOUR_S);
    cloud.start_agent("kvm2").await;
    let skewed = until(&cloud, "kvm2", "its skew is shown", |n| {
        n.clock_offset_ms > 9 * 3_600_000
    });
    assert!(skewed.await.up);
    cloud.kill_agent("kvm2");
    cloud.set_clock("kvm2", 0);
    cloud.start_agent("kvm2").await;
    let before = report_of(&cloud, "kvm2").await;
    for _ in 0..20 {
        sleep(5 * SECOND).await;
        assert!(cloud.node("kvm2").await.up);
    }
    assert!(
        report_of(&cloud, "kvm2").await > before,
        "its reports count"
    );
    assert!(cloud.node("kvm2").await.clock_offset_ms.abs() < 1000);
}

#[tokio::test(start_paused = true)]
async fn clocks_that_jump_make_no_node_silent_and_no_dead_one_alive() {
    let mut cloud = Cloud::start(2).await;
    sleep(20 * SECOND).await;
    cloud.set_clock("ctl", 2 * HOUR_S);
    cloud.set_clock("kvm1", -3 * HOUR_S);
    assert!(cloud.node("kvm1").await.up && cloud.node("kvm2").await.up);
    sleep(40 * SECOND).await;
    assert!(cloud.node("kvm1").await.up && cloud.node("kvm2").await.up);
    cloud.kill_agent("kvm2");
    cloud.set_clock("ctl", -HOUR_S);
    sleep(40 * SECOND).await;
    assert!(
        !cloud.node("kvm2").await.up,
        "it is silent, whatever the time"
    );
    assert!(cloud.node("kvm1").await.up);
}

#[tokio::test(start_paused = true)]
async fn a_second_agent_of_one_name_is_refused_until_the_first_is_gone() {
    let mut cloud = Cloud::start(3).await;
    let first = cloud.node("kvm1").await.incarnation;
    cloud.launch_agent("kvm1", "twin");
    let shown = until(&cloud, "kvm1", "the twin is shown", |n| n.refusal.is_some()).await;
    assert!(
        shown
            .refusal
            .is_some_and(|r| r.contains("another agent that lives"))
    );
    sleep(60 * SECOND).await;
    let (incarnation, _) = report_of(&cloud, "kvm1").await;
    assert_eq!((incarnation, cloud.node("kvm1").await.up), (first, true));
    // The first stops: the other waits as long as for one that died.
    cloud.stop_agent("kvm1").await;
    sleep(25 * SECOND).await;
    assert_eq!(cloud.node("kvm1").await.incarnation, first, "not yet");
    cloud.serves("twin").await;
    until(&cloud, "kvm1", "the other is the node's", |n| {
        n.incarnation == first + 1
    })
    .await;
    sleep(70 * SECOND).await;
    let node = cloud.node("kvm1").await;
    assert!(node.up && node.refusal.is_none(), "{node:?}");
}

/// The twin would make the node's guests missing, and forget them.
#[tokio::test(start_paused = true)]
async fn a_twin_does_not_take_the_place_of_an_agent_that_is_restarted() {
    let mut cloud = Cloud::start(12).await;
    let first = cloud.node("kvm1").await.incarnation;
    cloud.launch_agent("kvm1", "twin");
    until(&cloud, "kvm1", "the twin is shown", |n| n.refusal.is_some()).await;
    for again in 1..=3 {
        cloud.stop_agent("kvm1").await;
        // The twin asks every 5 s.
        sleep(12 * SECOND).await;
        cloud.launch_agent("kvm1", "kvm1");
        cloud.serves("kvm1").await;
        assert_eq!(cloud.node("kvm1").await.incarnation, first + again);
    }
    sleep(60 * SECOND).await;
    assert_eq!(cloud.node("kvm1").await.incarnation, first + 3);
}

#[tokio::test(start_paused = true)]
async fn a_node_whose_agent_was_installed_anew_is_let_in_at_once() {
    let mut cloud = Cloud::start(13).await;
    let first = cloud.node("kvm1").await.incarnation;
    cloud.stop_agent("kvm1").await;
    cloud.lose_state("kvm1");
    cloud.launch_agent("kvm1", "kvm1");
    sleep(SECOND).await;
    cloud.serves("kvm1").await;
    assert_eq!(cloud.node("kvm1").await.incarnation, first + 1);
}

#[tokio::test(start_paused = true)]
async fn a_twin_takes_the_place_of_one_that_died_after_its_silence_alone() {
    let mut cloud = Cloud::start(4).await;
    let first = cloud.node("kvm1").await.incarnation;
    cloud.launch_agent("kvm1", "twin");
    sleep(10 * SECOND).await;
    cloud.kill_agent("kvm1");
    sleep(20 * SECOND).await;
    assert_eq!(cloud.node("kvm1").await.incarnation, first, "not yet");
    cloud.serves("twin").await;
    assert_eq!(cloud.node("kvm1").await.incarnation, first + 1);
    // The dead one comes back, and is the twin now.
    cloud.launch_agent("kvm1", "kvm1");
    sleep(60 * SECOND).await;
    assert_eq!(cloud.node("kvm1").await.incarnation, first + 1);
}

#[tokio::test(start_paused = true)]
async fn a_restart_is_let_in_at_once_however_it_ended() {
    let mut cloud = Cloud::start(5).await;
    let first = cloud.node("kvm1").await.incarnation;
    for again in 1..=3 {
        cloud.kill_agent("kvm1");
        cloud.launch_agent("kvm1", "kvm1");
        sleep(SECOND).await;
        cloud.serves("kvm1").await;
        assert_eq!(cloud.node("kvm1").await.incarnation, first + again);
    }
    cloud.stop_agent("kvm1").await;
    cloud.launch_agent("kvm1", "kvm1");
    sleep(SECOND).await;
    assert_eq!(cloud.node("kvm1").await.incarnation, first + 4);
}

#[tokio::test(start_paused = true)]
async fn of_two_agents_that_race_one_is_let_in() {
    let mut cloud = Cloud::start(6).await;
    let nodes = ["a", "b", "c"];
    let spec = drover_compute::hypervisor::fake::NodeSpec::default();
    drop(cloud.fabric.add_node("kvm3", spec));
    for name in nodes {
        cloud.launch_agent("kvm3", name);
    }
    let store = cloud.store.clone();
    let host: HostName = "kvm3".parse().unwrap();
    eventually("a report", async || store.node(&host).await.ok()).await;
    sleep(60 * SECOND).await;
    assert_eq!(cloud.node("kvm3").await.incarnation, 1);
}

#[tokio::test(start_paused = true)]
async fn a_conductors_own_deafness_is_nobodys_silence() {
    let mut cloud = Cloud::start(7).await;
    sleep(20 * SECOND).await;
    // Cut off from the broker for long, with a node that dies meanwhile.
    cloud.broker.cut("ctl");
    cloud.kill_agent("kvm2");
    sleep(300 * SECOND).await;
    cloud.broker.heal("ctl");
    for _ in 0..8 {
        sleep(2 * SECOND).await;
        assert!(cloud.node("kvm1").await.up);
    }
    assert!(
        cloud.node("kvm2").await.up,
        "it has not been listened for yet"
    );
    until(&cloud, "kvm2", "now it was", |n| !n.up).await;
    assert!(cloud.node("kvm1").await.up);
    sleep(6 * SECOND).await;
    // One that starts goes on where the last left off.
    cloud.kill_conductor();
    sleep(300 * SECOND).await;
    cloud.start_conductor().await;
    assert!(cloud.node("kvm1").await.up && !cloud.node("kvm2").await.up);
    sleep(60 * SECOND).await;
    assert!(cloud.node("kvm1").await.up && !cloud.node("kvm2").await.up);
}

#[tokio::test(start_paused = true)]
async fn reports_that_piled_up_make_no_dead_node_alive() {
    let mut cloud = Cloud::start(8).await;
    sleep(20 * SECOND).await;
    cloud.kill_agent("kvm2");
    until(&cloud, "kvm2", "down", |n| !n.up).await;
    cloud.start_agent("kvm2").await;
    until(&cloud, "kvm2", "up", |n| n.up).await;
    cloud.kill_conductor();
    sleep(120 * SECOND).await;
    cloud.kill_agent("kvm2");
    sleep(300 * SECOND).await;
    cloud.start_conductor().await;
    let before = report_of(&cloud, "kvm2").await;
    sleep(60 * SECOND).await;
    assert_eq!(
        report_of(&cloud, "kvm2").await,
        before,
        "nothing old is read"
    );
    assert!(!cloud.node("kvm2").await.up);
}

fn said(error: &RpcError) -> String {
    error
        .failure()
        .map_or_else(String::new, |f| f.message.to_string())
}

fn guest(cloud: &Cloud, name: &str) -> InstanceId {
    let path = format!("/var/lib/libvirt/images/{name}.qcow2");
    let builder = GuestBuilder::new(name).memory_mib(512).disk(&path, 64);
    cloud.fabric.add_guest("kvm1", builder)
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_cannot_be_read_refuses_its_own_moves_alone() {
    let cloud = Cloud::start(9).await;
    let (broken, sound) = (guest(&cloud, "broken"), guest(&cloud, "sound"));
    cloud.adopted(broken).await;
    let reason = "elements are nested deeper than 64";
    cloud.fabric.set_unreadable(broken, Some(reason));
    sleep(10 * SECOND).await;
    let node = cloud.node("kvm1").await;
    assert!(node.up && node.instances == Some(2) && node.memory_used_mib == 1024);
    let listed = cloud.adopted(broken).await;
    assert_eq!(listed.unreadable.as_deref(), Some(reason));
    let options = LiveOptions::default();
    let refused = cloud.migrate(broken, Some("kvm2"), options.clone()).await;
    let words = said(&refused.expect_err("it cannot be read"));
    assert!(words.contains(reason), "{words}");
    let moved = cloud.migrate(sound, Some("kvm2"), options.clone()).await;
    let moved = cloud.end(moved.expect("another").uuid).await;
    assert_eq!(moved.status, MigrationStatus::Completed, "{moved:#?}");
    cloud.fabric.set_unreadable(broken, None);
    sleep(10 * SECOND).await;
    let moved = cloud.migrate(broken, Some("kvm2"), options).await;
    let moved = cloud.end(moved.expect("mended").uuid).await;
    assert_eq!(moved.status, MigrationStatus::Completed, "{moved:#?}");
}

#[tokio::test(start_paused = true)]
async fn a_hypervisor_that_hangs_is_down_and_its_node_is_not() {
    let cloud = Cloud::start(10).await;
    let hour = Duration::from_secs(3600);
    let hang = Effect::SlowBefore(hour);
    cloud.fabric.on_call("kvm1", Call::Guests, 1000, hang);
    let hung = until(
        &cloud,
        "kvm1",
        "it is said",
        |n| matches!(&n.report.hypervisor, HypervisorReport::Down { reason } if reason.contains("not answered")),
    );
    assert!(hung.await.up);
    sleep(120 * SECOND).await;
    assert!(cloud.node("kvm1").await.up, "its agent lives");
}

#[tokio::test(start_paused = true)]
async fn a_guest_is_judged_by_what_its_node_says_now() {
    let cloud = Cloud::start(11).await;
    let id = guest(&cloud, "web");
    cloud.adopted(id).await;
    cloud.fabric.pause_guest("kvm1", id);
    sleep(10 * SECOND).await;
    let way = Way::Cold(ColdOptions::default());
    let refused = cloud.migrate_by(id, Some("kvm2"), &way).await;
    let words = said(&refused.expect_err("it is paused"));
    assert!(words.contains("paused"), "{words}");
    let driver = cloud.fabric.driver("kvm1");
    driver.resume(id).await.expect("it runs on");
    let moved = cloud.migrate_by(id, Some("kvm2"), &way).await;
    let moved = moved.expect("it runs, whatever was reported last");
    let moved = cloud
        .until(moved.uuid, "at rest", |m| m.status.rests())
        .await;
    assert_eq!(moved.status, MigrationStatus::Finished, "{moved:#?}");
}

/// Somebody takes a guest off its node (`virsh destroy`, `virsh undefine`).
async fn is_undefined(cloud: &Cloud, id: InstanceId) {
    cloud.fabric.kill_guest(id);
    let driver = cloud.fabric.driver("kvm1");
    driver.withdraw(id).await.expect("it is off");
}

async fn look_up(cloud: &Cloud, id: InstanceId) -> Option<Instance> {
    let instance = id.to_string();
    let ask = InstanceRef { instance };
    cloud.call(method::GET_INSTANCE, &ask).await.ok()
}

async fn how_it_was_defined(cloud: &Cloud, id: InstanceId) -> Definition {
    let instance = id.to_string();
    let ask = InstanceRef { instance };
    eventually("its definition", async || {
        cloud.call(method::GET_KEPT_DEFINITION, &ask).await.ok()
    })
    .await
}

#[tokio::test(start_paused = true)]
async fn what_a_node_lost_when_it_was_installed_anew_is_not_forgotten() {
    let mut cloud = Cloud::start(31).await;
    let (lost, removed) = (guest(&cloud, "lost"), guest(&cloud, "removed"));
    cloud.adopted(lost).await;
    let before = how_it_was_defined(&cloud, lost).await;
    how_it_was_defined(&cloud, removed).await;
    cloud.stop_agent("kvm1").await;
    cloud.lose_state("kvm1");
    is_undefined(&cloud, lost).await;
    cloud.start_agent("kvm1").await;
    sleep(60 * SECOND).await;
    is_undefined(&cloud, removed).await;
    sleep(120 * SECOND).await;
    let found = look_up(&cloud, lost).await.expect("it is on the record");
    let words = found.lost.expect("it says so").message;
    assert!(words.contains("installed anew"), "{words}");
    assert_eq!(look_up(&cloud, removed).await, None, "as of any node");
    // Of both it is known how they were.
    assert_eq!(how_it_was_defined(&cloud, lost).await, before);
    let of_removed = how_it_was_defined(&cloud, removed).await;
    assert!(of_removed.domain.contains("removed"), "{of_removed:?}");
}
