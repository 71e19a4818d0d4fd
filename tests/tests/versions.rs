//! Old and new live together: this build, and one that a transport makes of it with an
//! option, values of enumerations, fields and a step more ([`drover_tests::dialect`]),
//! mixed in every way; and rows and journals as such a one leaves them. Whatever is
//! asked for ends, or is refused with a word about versions; nobody goes down for it,
//! and nothing of the newer one is lost or damaged.
//!
//! A change of what travels or is kept has to keep this green.

#![allow(clippy::unwrap_used)] // all of it is test

use std::{path::PathBuf, time::Duration};

use drover_compute::hypervisor::fake::GuestBuilder;
use drover_model::{
    api::{
        SPEAKS,
        conductor::{ConductorStatus, Instance, ListInstances, ListMigrations, Node, method},
    },
    check::CheckCode,
    guest::{NicAttachment, PowerState},
    ids::{HostName, InstanceId},
    migration::{ColdOptions, EndReason, LiveOptions, Migration, MigrationStatus as S, Way},
    operation::{BalanceOptions, DrainOptions, EvacuateOptions, MoveMode, OperationStatus, Task},
    version::{RpcVersion, VersionRange},
};
use drover_rpc::RpcError;
use drover_tests::{
    cloud::{CTL, Cloud, eventually},
    dialect::{Dialect, NOVEL_BRIDGE, STATE},
};
use serde_json::{Value, json};

const IMAGES: &str = "/var/lib/libvirt/images";

fn live() -> Way {
    Way::Live(LiveOptions::default())
}

fn cold() -> Way {
    Way::Cold(ColdOptions::default())
}

fn range(min: (u32, u32), max: (u32, u32)) -> VersionRange {
    VersionRange::new(RpcVersion::new(min.0, min.1), RpcVersion::new(max.0, max.1))
}

fn vm(name: &str) -> GuestBuilder {
    GuestBuilder::new(name)
        .memory_mib(512)
        .disk(&format!("{IMAGES}/{name}.qcow2"), 64)
}

/// One that takes a while to move.
fn slow(name: &str) -> GuestBuilder {
    GuestBuilder::new(name)
        .memory_mib(8192)
        .dirty_mib_s(40)
        .working_set_mib(64)
        .disk(&format!("{IMAGES}/{name}.qcow2"), 2048)
}

/// A conductor of one dialect and nodes of two.
async fn mixed(conductor: Dialect, kvm1: Dialect, kvm2: Dialect) -> Cloud {
    let mut cloud = Cloud::start(7).await;
    becomes(&mut cloud, CTL, conductor).await;
    becomes(&mut cloud, "kvm1", kvm1).await;
    becomes(&mut cloud, "kvm2", kvm2).await;
    cloud
}

/// A process is replaced by one of another version, in the middle of whatever it does.
async fn becomes(cloud: &mut Cloud, who: &str, dialect: Dialect) {
    cloud.set_dialect(who, dialect);
    match who {
        CTL => {
            cloud.kill_conductor();
            cloud.start_conductor().await;
        }
        host => {
            cloud.kill_agent(host);
            cloud.start_agent(host).await;
        }
    }
}

async fn adopted(cloud: &Cloud, host: &str, guest: GuestBuilder) -> InstanceId {
    let id = cloud.fabric.add_guest(host, guest);
    cloud.adopted(id).await;
    id
}

async fn rests(cloud: &Cloud, guest: InstanceId, to: &str, way: &Way) -> Migration {
    let m = cloud.migrate_by(guest, Some(to), way).await.unwrap();
    cloud.until(m.uuid, "at rest", |m| m.status.rests()).await
}

/// For long enough that one which is not heard of would be down.
async fn nobody_is_down(cloud: &Cloud) {
    tokio::time::sleep(Duration::from_secs(40)).await;
    for host in ["kvm1", "kvm2"] {
        let node = cloud.node(host).await;
        assert!(node.up, "{host}: {node:#?}");
    }
}

/// The checks that a refusal brings.
fn refused(answer: Result<Migration, RpcError>) -> Vec<(CheckCode, String)> {
    let error = answer.expect_err("it is refused");
    let failure = error.failure().expect("a refusal").clone();
    let checks = failure.kwargs.get("checks").cloned().unwrap_or_default();
    let checks: Vec<drover_model::check::CheckFailure> =
        serde_json::from_value(checks).unwrap_or_else(|e| panic!("{e}: {failure:?}"));
    let words = checks
        .into_iter()
        .map(|c| (c.code, format!("{}; {}", c.message, c.remedy)));
    words.collect()
}

async fn status(cloud: &Cloud) -> ConductorStatus {
    cloud.call(method::GET_STATUS, &json!({})).await.unwrap()
}

/// What the conductor leaves alone, once it has said so.
async fn left_alone(cloud: &Cloud) -> String {
    eventually("something is left alone", async || {
        let left = status(cloud).await.left_alone;
        left.first()
            .map(|left| format!("{}: {}", left.what, left.why))
    })
    .await
}

// ---- mixes

#[tokio::test(start_paused = true)]
async fn every_mix_of_two_versions_moves_live_and_cold_and_back() {
    use Dialect::{Next, Now};
    for conductor in [Now, Next] {
        for (kvm1, kvm2) in [(Now, Now), (Now, Next), (Next, Now), (Next, Next)] {
            let mix = (conductor, kvm1, kvm2);
            let cloud = mixed(conductor, kvm1, kvm2).await;
            let guest = adopted(&cloud, "kvm1", vm("vm1")).await;
            let m = rests(&cloud, guest, "kvm2", &live()).await;
            assert_eq!(m.status, S::Completed, "{mix:?}: {m:#?}");
            assert!(m.warnings.is_empty(), "{mix:?}: {m:#?}");
            cloud.check(&m).await;
            let m = rests(&cloud, guest, "kvm1", &cold()).await;
            assert_eq!(m.status, S::Finished, "{mix:?}: {m:#?}");
            assert_eq!(cloud.fabric.running_on(guest), m.dest_host, "{mix:?}");
            cloud.fabric.check_invariants().unwrap();
            // What it wrote since is given up.
            let ask = json!({"migration": m.uuid.to_string()});
            let _: Value = cloud.call(method::REVERT_MIGRATION, &ask).await.unwrap();
            let m = cloud.end(m.uuid).await;
            assert_eq!(m.status, S::Reverted, "{mix:?}: {m:#?}");
            let m = rests(&cloud, guest, "kvm1", &cold()).await;
            let ask = json!({"migration": m.uuid.to_string()});
            let _: Value = cloud.call(method::CONFIRM_MIGRATION, &ask).await.unwrap();
            let m = cloud.end(m.uuid).await;
            assert_eq!(m.status, S::Confirmed, "{mix:?}: {m:#?}");
            assert_eq!(cloud.fabric.running_on(guest), m.dest_host, "{mix:?}");
            nobody_is_down(&cloud).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn every_mix_drains_and_evacuates() {
    use Dialect::{Next, Now};
    for (conductor, kvm1, kvm2) in [(Now, Next, Now), (Next, Now, Now), (Now, Now, Next)] {
        let mix = (conductor, kvm1, kvm2);
        let mut cloud = mixed(conductor, kvm1, kvm2).await;
        cloud
            .fabric
            .share_directory(IMAGES, &["kvm1", "kvm2"], 1 << 40);
        let guest = adopted(&cloud, "kvm1", vm("vm1")).await;
        let host: HostName = "kvm1".parse().unwrap();
        let drain = Task::Drain(DrainOptions {
            mode: MoveMode::Live,
            ..DrainOptions::new(host)
        });
        let drained = cloud.operate(&drain).await.unwrap();
        let drained = cloud.operation_end(drained.uuid).await;
        assert_eq!(
            drained.status,
            OperationStatus::Completed,
            "{mix:?}: {drained:#?}"
        );
        let ask = json!({"host": "kvm1", "enabled": true});
        let _: Node = cloud.call(method::SET_NODE, &ask).await.unwrap();
        eventually("its definition is kept", async || {
            let kept = cloud.store.kept_definition(guest).await.unwrap();
            kept.filter(|kept| kept.host.as_str() == "kvm2")
        })
        .await;
        cloud.fabric.power_off("kvm2");
        cloud.kill_agent("kvm2");
        let down = async || (!cloud.node("kvm2").await.up).then_some(());
        eventually("it is down", down).await;
        let evacuate = Task::Evacuate(EvacuateOptions {
            confirmed_off: true,
            ..EvacuateOptions::new("kvm2".parse().unwrap())
        });
        let evacuated = cloud.operate(&evacuate).await.unwrap();
        let evacuated = cloud.operation_end(evacuated.uuid).await;
        assert_eq!(
            evacuated.status,
            OperationStatus::Completed,
            "{mix:?}: {evacuated:#?}"
        );
        let home = cloud.fabric.running_on(guest);
        assert_eq!(home.unwrap().as_str(), "kvm1", "{mix:?}");
        cloud.fabric.check_invariants().unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn an_option_that_the_agent_does_not_know_is_refused_in_words() {
    // A conductor that asks for it although the agent's version does not have it.
    for way in [live(), cold()] {
        let cloud = mixed(Dialect::Careless, Dialect::Now, Dialect::Now).await;
        let guest = adopted(&cloud, "kvm1", vm("vm1")).await;
        let m = rests(&cloud, guest, "kvm2", &way).await;
        assert_eq!(m.status, S::Failed, "{m:#?}");
        let why = m.end_reason.as_ref().unwrap().to_string();
        assert!(
            why.contains("'hasten' is not known to this Drover"),
            "{why}"
        );
        cloud.check(&m).await;
        nobody_is_down(&cloud).await;
    }
}

#[tokio::test(start_paused = true)]
async fn who_has_no_version_in_common_is_up_and_takes_part_in_nothing() {
    let (newer, now) = (Dialect::Speaking(range((1, 3), (1, 4))), Dialect::Now);
    let mut cloud = mixed(now, now, newer).await;
    let guest = adopted(&cloud, "kvm1", vm("vm1")).await;
    nobody_is_down(&cloud).await;
    let node = cloud.node("kvm2").await;
    let why = node.version_mismatch.expect("it is shown");
    for said in [
        "the agent of kvm2",
        "RPC 1.3 to 1.4",
        "RPC 1.0 to 1.1",
        "upgrade drover-conductor",
    ] {
        assert!(why.contains(said), "{said}: {why}");
    }
    assert_eq!(cloud.node("kvm1").await.version_mismatch, None);
    for way in [live(), cold()] {
        let checks = refused(cloud.migrate_by(guest, Some("kvm2"), &way).await);
        assert_eq!(checks.len(), 1, "{checks:?}");
        assert_eq!(checks[0].0, CheckCode::Version);
        assert!(checks[0].1.contains("RPC 1.3 to 1.4"), "{checks:?}");
    }
    // Of several it is passed over; here it was the only one.
    let m = cloud.migrate_by(guest, None, &live()).await.unwrap();
    let m = cloud.end(m.uuid).await;
    let why = m.end_reason.as_ref().unwrap().to_string();
    assert!(why.contains("RPC 1.3 to 1.4"), "{why}");
    // The other way round, and as a source.
    becomes(&mut cloud, CTL, Dialect::Speaking(range((1, 4), (1, 5)))).await;
    nobody_is_down(&cloud).await;
    let why = cloud.node("kvm1").await.version_mismatch.unwrap();
    assert!(why.ends_with("upgrade drover-compute on kvm1"), "{why}");
    let checks = refused(cloud.migrate_by(guest, Some("kvm2"), &cold()).await);
    assert!(
        checks.iter().all(|(code, _)| *code == CheckCode::Version),
        "{checks:?}"
    );
    // Nothing was begun, so nothing is stuck; upgraded, they move.
    let active = cloud.store.active_migrations().await.unwrap();
    assert!(active.is_empty(), "{active:#?}");
    becomes(&mut cloud, "kvm1", Dialect::Speaking(range((1, 0), (1, 4)))).await;
    let m = rests(&cloud, guest, "kvm2", &live()).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
    cloud.check(&m).await;
}

#[tokio::test(start_paused = true)]
async fn a_heartbeat_with_garbage_for_versions_counts() {
    let mut cloud = mixed(Dialect::Now, Dialect::Now, Dialect::Garbled).await;
    let guest = adopted(&cloud, "kvm1", vm("vm1")).await;
    nobody_is_down(&cloud).await;
    let why = cloud.node("kvm2").await.version_mismatch.unwrap();
    assert!(why.contains("soup"), "{why}");
    let checks = refused(cloud.migrate_by(guest, Some("kvm2"), &live()).await);
    assert_eq!(checks[0].0, CheckCode::Version, "{checks:?}");
    becomes(&mut cloud, "kvm2", Dialect::Now).await;
    let m = rests(&cloud, guest, "kvm2", &live()).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
}

#[tokio::test(start_paused = true)]
async fn an_agent_of_another_version_is_asked_in_it_at_once() {
    // Downgraded, and not heard of yet by the conductor that asks.
    let (older, now) = (Dialect::Speaking(range((1, 0), (1, 0))), Dialect::Now);
    let mut cloud = mixed(now, now, now).await;
    let guest = adopted(&cloud, "kvm1", vm("vm1")).await;
    let hearing = cloud.context().store.hearing().clone();
    let host: HostName = "kvm2".parse().unwrap();
    assert_eq!(hearing.pinned(&host), Ok(SPEAKS.max));
    becomes(&mut cloud, "kvm2", older).await;
    // What it said is forgotten again, as if another conductor had let it in.
    let incarnation = hearing.state(&host).incarnation;
    hearing.said(&host, incarnation, ("", &SPEAKS.into()));
    let m = rests(&cloud, guest, "kvm2", &live()).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
    assert_eq!(hearing.pinned(&host), Ok(RpcVersion::new(1, 0)));
}

// ---- what is reported

#[tokio::test(start_paused = true)]
async fn a_state_that_is_not_known_is_shown_as_such_and_costs_its_guest_alone() {
    let cloud = mixed(Dialect::Now, Dialect::Next, Dialect::Now).await;
    let dozing = adopted(&cloud, "kvm1", vm("dozing").state(PowerState::Paused)).await;
    let other = adopted(&cloud, "kvm1", vm("other")).await;
    let listed = ListInstances::default();
    let listed: Vec<Instance> = cloud.call(method::LIST_INSTANCES, &listed).await.unwrap();
    let one = listed.iter().find(|i| i.uuid == dozing).unwrap();
    assert_eq!(
        serde_json::to_value(one.power_state).unwrap(),
        json!(STATE.0)
    );
    assert_eq!(
        (one.unreadable.as_deref(), one.vm_state.as_str()),
        (None, "unknown")
    );
    for way in [live(), cold()] {
        let checks = refused(cloud.migrate_by(dozing, Some("kvm2"), &way).await);
        assert!(
            checks.iter().any(|(code, _)| *code == CheckCode::Version),
            "{checks:?}"
        );
    }
    let m = rests(&cloud, other, "kvm2", &live()).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
    nobody_is_down(&cloud).await;
}

#[tokio::test(start_paused = true)]
async fn a_kind_of_network_that_is_not_known_costs_its_guest_alone() {
    let cloud = mixed(Dialect::Now, Dialect::Next, Dialect::Now).await;
    for host in ["kvm1", "kvm2"] {
        cloud.fabric.edit_node(host, |node| {
            node.bridges.insert(NOVEL_BRIDGE.to_owned());
        });
    }
    let bridge = NicAttachment::Bridge {
        bridge: NOVEL_BRIDGE.to_owned(),
    };
    let novel = adopted(&cloud, "kvm1", vm("novel").nics(&[bridge])).await;
    let other = adopted(&cloud, "kvm1", vm("other")).await;
    for way in [live(), cold()] {
        let m = rests(&cloud, novel, "kvm2", &way).await;
        let why = m.end_reason.as_ref().unwrap().to_string();
        assert_eq!(m.status, S::Failed, "{m:#?}");
        for said in [
            "vdpa",
            "cannot be read here",
            "RPC 1.0 to 1.2",
            "upgrade drover-conductor",
        ] {
            assert!(
                format!("{:?}", m.end_reason).contains(said),
                "{said}: {why}"
            );
        }
    }
    // Nor does it hold up the rest of a drain.
    let drain = Task::Drain(DrainOptions {
        mode: MoveMode::Live,
        ..DrainOptions::new("kvm1".parse().unwrap())
    });
    let drained = cloud.operate(&drain).await.unwrap();
    let drained = cloud.operation_end(drained.uuid).await;
    assert_eq!(drained.status, OperationStatus::Incomplete, "{drained:#?}");
    assert_eq!(cloud.fabric.running_on(other).unwrap().as_str(), "kvm2");
    assert_eq!(cloud.fabric.running_on(novel).unwrap().as_str(), "kvm1");
    nobody_is_down(&cloud).await;
}

#[tokio::test(start_paused = true)]
async fn a_node_with_which_nobody_speaks_is_not_emptied_and_holds_up_no_operation() {
    let newer = Dialect::Speaking(range((1, 3), (1, 4)));
    let cloud = mixed(Dialect::Now, Dialect::Now, newer).await;
    let guest = adopted(&cloud, "kvm2", vm("vm1")).await;
    for task in [
        Task::Drain(DrainOptions::new("kvm2".parse().unwrap())),
        Task::Balance(BalanceOptions::default()),
    ] {
        match cloud.operate(&task).await {
            Ok(begun) => {
                let ended = cloud.operation_end(begun.uuid).await;
                let said = serde_json::to_string(&ended).unwrap();
                let is_told = said.contains("RPC 1.3 to 1.4") || ended.items.is_empty();
                assert!(is_told, "{ended:#?}");
            }
            Err(error) => assert!(error.failure().is_some(), "{error:?}"),
        }
    }
    assert_eq!(cloud.fabric.running_on(guest).unwrap().as_str(), "kvm2");
    nobody_is_down(&cloud).await;
}

// ---- conductors beside each other

#[tokio::test(start_paused = true)]
async fn conductors_of_two_versions_share_a_record() {
    let mut cloud = mixed(Dialect::Now, Dialect::Now, Dialect::Next).await;
    cloud.set_dialect("new", Dialect::Next);
    cloud.start_conductor_named("new").await;
    // Whatever is written has what only the newer one knows.
    cloud.store.damage(NEWER_FIELDS).await.unwrap();
    let mut guests = Vec::new();
    for n in 0..6 {
        guests.push(adopted(&cloud, "kvm1", slow(&format!("vm{n}"))).await);
    }
    let mut moves = Vec::new();
    for guest in &guests {
        moves.push(
            cloud
                .migrate_by(*guest, Some("kvm2"), &live())
                .await
                .unwrap()
                .uuid,
        );
    }
    tokio::time::sleep(Duration::from_secs(20)).await;
    // The old one goes on with what the new one began, and later the other way round.
    cloud.kill_conductor_named("new");
    tokio::time::sleep(Duration::from_secs(60)).await;
    cloud.start_conductor_named("new").await;
    cloud.kill_conductor();
    for id in moves {
        let m = cloud.end(id).await;
        assert_eq!(m.status, S::Completed, "{m:#?}");
        assert!(
            !m.unknown.is_empty(),
            "what the newer one keeps is kept: {m:#?}"
        );
    }
    nobody_is_down(&cloud).await;
    cloud.fabric.check_invariants().unwrap();
}

/// Each record that is written gets a field of a newer version.
const NEWER_FIELDS: &str = "\
    CREATE TRIGGER newer_begun AFTER INSERT ON migrations BEGIN \
    UPDATE migrations SET record = json_set(record, '$.shade', 'blue') \
    WHERE uuid = NEW.uuid; END; \
    CREATE TRIGGER newer_report AFTER UPDATE OF report ON nodes BEGIN \
    UPDATE nodes SET report = json_set(report, '$.shade', 'blue') \
    WHERE host = NEW.host; END;";

#[tokio::test(start_paused = true)]
async fn a_rolling_upgrade_and_a_downgrade_in_the_middle_of_moves() {
    use Dialect::{Next, Now};
    let orders = [
        [CTL, "kvm1", "kvm2"],
        ["kvm1", "kvm2", CTL],
        ["kvm2", CTL, "kvm1"],
    ];
    for (from, to) in [(Now, Next), (Next, Now)] {
        for order in orders {
            for (way, end) in [(live(), S::Completed), (cold(), S::Finished)] {
                let mut cloud = mixed(from, from, from).await;
                let guest = adopted(&cloud, "kvm1", slow("vm1")).await;
                let m = cloud.migrate_by(guest, Some("kvm2"), &way).await.unwrap();
                for who in order {
                    tokio::time::sleep(Duration::from_secs(3)).await;
                    becomes(&mut cloud, who, to).await;
                }
                let m = cloud.until(m.uuid, "at rest", |m| m.status.rests()).await;
                let case = (from, order, way.migration_type());
                assert_eq!(m.status, end, "{case:?}: {m:#?}");
                assert_eq!(cloud.fabric.running_on(guest), m.dest_host, "{case:?}");
                cloud.fabric.check_invariants().unwrap();
                nobody_is_down(&cloud).await;
            }
        }
    }
}

// ---- rows and journals of a newer conductor

/// A live move under way whose conductor is dead.
async fn orphaned() -> (Cloud, InstanceId, Migration) {
    let mut cloud = Cloud::start(7).await;
    let guest = adopted(&cloud, "kvm1", slow("vm1")).await;
    let m = cloud
        .migrate(guest, Some("kvm2"), LiveOptions::default())
        .await
        .unwrap();
    let m = cloud
        .until(m.uuid, "sending", |m| m.status == S::Running)
        .await;
    cloud.kill_conductor();
    (cloud, guest, m)
}

/// It is shown, has its instance, and nobody but a newer conductor does anything to it.
async fn is_left_alone(cloud: &mut Cloud, guest: InstanceId, m: &Migration, why: &str) {
    let all = ListMigrations::default();
    let before = cloud.store.migrations_as_kept(&all, None).await.unwrap();
    cloud.start_conductor().await;
    tokio::time::sleep(Duration::from_secs(300)).await;
    let said = left_alone(cloud).await;
    assert!(
        said.contains(&m.uuid.to_string()) && said.contains(why),
        "{said}"
    );
    assert_eq!(cloud.driven_by(CTL), 0);
    let listed: Vec<Value> = cloud.call(method::LIST_MIGRATIONS, &all).await.unwrap();
    // Agents' word on progress is taken in where the row can be read.
    let steady = |rows: &[Value]| -> Vec<Value> {
        let parts = ["id", "status", "step", "attempt", "owner", "migration_type"];
        let row = |row: &Value| parts.iter().map(|part| row[part].clone()).collect();
        rows.iter().map(row).collect()
    };
    assert_eq!(steady(&listed), steady(&before));
    let ask = json!({"migration": m.id.to_string()});
    let shown: Value = cloud.call(method::GET_MIGRATION, &ask).await.unwrap();
    assert_eq!(shown["uuid"], json!(m.uuid));
    // It has its instance, and that is all it has: others move.
    let busy = cloud
        .migrate(guest, Some("kvm2"), LiveOptions::default())
        .await;
    let checks = refused(busy);
    assert!(
        checks
            .iter()
            .any(|(code, _)| *code == CheckCode::InstanceBusy),
        "{checks:?}"
    );
    let ask = json!({"instance": guest.to_string()});
    let _: Instance = cloud.call(method::GET_INSTANCE, &ask).await.unwrap();
    let other = adopted(cloud, "kvm1", vm("other")).await;
    let other = rests(cloud, other, "kvm2", &live()).await;
    assert_eq!(other.status, S::Completed, "{other:#?}");
    let listed = ListInstances::default();
    let listed: Vec<Instance> = cloud.call(method::LIST_INSTANCES, &listed).await.unwrap();
    assert_eq!(listed.len(), 2);
    // Operations pass it over, and come to an end.
    let third = adopted(cloud, "kvm1", vm("third")).await;
    let drain = Task::Drain(DrainOptions::new("kvm1".parse().unwrap()));
    let begun = cloud.operate(&drain).await.unwrap();
    let ended = cloud.operation_end(begun.uuid).await;
    assert!(ended.status.is_final(), "{ended:#?}");
    let home = cloud.fabric.running_on(third);
    assert_eq!(home.unwrap().as_str(), "kvm2", "{ended:#?}");
    nobody_is_down(cloud).await;
    cloud.fabric.check_invariants().unwrap();
    cloud.kill_conductor();
}

/// A conductor that knows it goes on with it.
async fn goes_on(cloud: &mut Cloud, m: &Migration) {
    cloud.start_conductor().await;
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
    assert!(status(cloud).await.left_alone.is_empty());
    cloud.check(&m).await;
}

/// A move under way of which the row, or the journal, is made a newer one's, and is put
/// back.
async fn is_left_alone_until_it_is_known(newer: &'static str, why: &str, back: &'static str) {
    let (mut cloud, guest, m) = orphaned().await;
    cloud.store.damage(newer).await.unwrap();
    is_left_alone(&mut cloud, guest, &m, why).await;
    cloud.store.damage(back).await.unwrap();
    goes_on(&mut cloud, &m).await;
}

#[tokio::test(start_paused = true)]
async fn a_status_that_is_not_known_is_left_to_a_newer_conductor() {
    let newer = "UPDATE migrations SET status = 'hovering', \
                 record = json_set(record, '$.status', 'hovering')";
    let back = "UPDATE migrations SET status = 'running', \
                record = json_set(record, '$.status', 'running') WHERE status = 'hovering'";
    is_left_alone_until_it_is_known(newer, "hovering", back).await;
}

#[tokio::test(start_paused = true)]
async fn what_rests_and_is_not_understood_is_left_to_a_newer_conductor() {
    let (mut cloud, guest, m) = orphaned().await;
    let newer = "UPDATE migrations SET status = 'stuck', \
                 record = json_set(record, '$.status', 'stuck', '$.ending', 'polish')";
    cloud.store.damage(newer).await.unwrap();
    is_left_alone(&mut cloud, guest, &m, "polish").await;
    cloud.start_conductor().await;
    for verb in [method::RESUME_MIGRATION, method::ABORT_MIGRATION] {
        let ask = json!({"migration": m.uuid});
        let asked: Result<Value, RpcError> = cloud.call(verb, &ask).await;
        let error = asked.unwrap_err();
        assert!(
            error.failure().unwrap().message.contains("newer Drover"),
            "{error:?}"
        );
    }
    cloud.kill_conductor();
    let back = "UPDATE migrations SET record = json_remove(record, '$.ending') \
                WHERE status = 'stuck'";
    cloud.store.damage(back).await.unwrap();
    goes_on(&mut cloud, &m).await;
}

#[tokio::test(start_paused = true)]
async fn a_kind_of_migration_that_is_not_known_is_left_to_a_newer_conductor() {
    let newer = "UPDATE migrations SET migration_type = 'teleport', \
                 record = json_set(record, '$.migration_type', 'teleport')";
    let back = "UPDATE migrations SET migration_type = 'live-migration', \
                record = json_set(record, '$.migration_type', 'live-migration') \
                WHERE migration_type = 'teleport'";
    is_left_alone_until_it_is_known(newer, "teleport", back).await;
}

#[tokio::test(start_paused = true)]
async fn a_step_that_is_not_known_is_left_to_a_newer_conductor() {
    let newer = "UPDATE saga_events SET event = replace(event, '\"turn\"', '\"warm\"')";
    let back = "UPDATE saga_events SET event = replace(event, '\"warm\"', '\"turn\"')";
    is_left_alone_until_it_is_known(newer, "'warm'", back).await;
}

#[tokio::test(start_paused = true)]
async fn an_event_that_is_not_known_is_left_to_a_newer_conductor() {
    let newer = "UPDATE saga_events SET event = replace(event, '\"started\"', '\"sprouted\"')";
    let back = "UPDATE saga_events SET event = replace(event, '\"sprouted\"', '\"started\"')";
    is_left_alone_until_it_is_known(newer, "sprouted", back).await;
}

#[tokio::test(start_paused = true)]
async fn a_journal_of_one_that_knew_fewer_steps_is_gone_on_with() {
    // As a conductor leaves it for which there were no turns yet.
    const OLDER: &str = "\
        DELETE FROM saga_events WHERE event LIKE '%\"step\":\"turn\"%'; \
        CREATE TEMP TABLE kept AS SELECT saga_uuid, epoch, at_ms, event, \
        ROW_NUMBER() OVER (PARTITION BY saga_uuid ORDER BY seq) - 1 AS seq FROM saga_events; \
        DELETE FROM saga_events; \
        INSERT INTO saga_events (saga_uuid, seq, epoch, at_ms, event) \
        SELECT saga_uuid, seq, epoch, at_ms, event FROM kept; DROP TABLE kept;";
    let (mut cloud, _, m) = orphaned().await;
    cloud.store.damage(OLDER).await.unwrap();
    goes_on(&mut cloud, &m).await;
    // And undone: the step that was passed over is undone without having been.
    let (mut cloud, _, m) = orphaned().await;
    cloud.store.damage(OLDER).await.unwrap();
    cloud.start_conductor().await;
    cloud.abort(m.uuid).await.unwrap();
    let m = cloud.end(m.uuid).await;
    assert_eq!(
        (m.status, &m.end_reason),
        (S::Cancelled, &Some(EndReason::Aborted)),
        "{m:#?}"
    );
    cloud.check(&m).await;
}

#[tokio::test(start_paused = true)]
async fn an_operation_of_a_kind_that_is_not_known_is_left_to_a_newer_conductor() {
    let mut cloud = Cloud::start(7).await;
    adopted(&cloud, "kvm1", slow("vm1")).await;
    let drain = Task::Drain(DrainOptions::new("kvm1".parse().unwrap()));
    let begun = cloud.operate(&drain).await.unwrap();
    cloud.kill_conductor();
    let newer = "UPDATE operations SET kind = 'polish', \
                 record = json_set(record, '$.kind', 'polish')";
    cloud.store.damage(newer).await.unwrap();
    cloud.start_conductor().await;
    let said = left_alone(&cloud).await;
    assert!(
        said.contains(&begun.uuid.to_string()) && said.contains("polish"),
        "{said}"
    );
    let listed: Vec<Value> = cloud.call("list_operations", &json!({})).await.unwrap();
    assert_eq!(listed[0]["kind"], json!("polish"));
    assert_eq!(listed[0]["attempt"], json!(1), "nobody took it up");
    // It has its node.
    let error = cloud.operate(&drain).await.unwrap_err();
    let failure = error.failure().unwrap();
    assert!(failure.message.contains("newer Drover"), "{failure:?}");
    let other = Task::Drain(DrainOptions::new("kvm2".parse().unwrap()));
    let other = cloud.operate(&other).await.unwrap();
    assert!(cloud.operation_end(other.uuid).await.status.is_final());
    cloud.kill_conductor();
    let back = "UPDATE operations SET kind = 'drain', \
                record = json_set(record, '$.kind', 'drain') WHERE kind = 'polish'";
    cloud.store.damage(back).await.unwrap();
    cloud.start_conductor().await;
    let ended = cloud.operation_end(begun.uuid).await;
    assert_eq!(
        ended.status,
        OperationStatus::Incomplete,
        "kvm2 is closed: {ended:#?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_nodes_row_that_cannot_be_read_costs_no_node_its_place() {
    let mut cloud = Cloud::start(7).await;
    cloud.kill_conductor();
    // As kept by a newer conductor, of an agent that does not report again for now.
    cloud.kill_agent("kvm2");
    let newer = "UPDATE nodes SET report = json_set(report, '$.endpoint', 'a moon') \
                 WHERE host = 'kvm2'";
    cloud.store.damage(newer).await.unwrap();
    cloud.start_conductor().await;
    let nodes: Vec<Node> = cloud.call(method::LIST_NODES, &json!({})).await.unwrap();
    assert_eq!(nodes.len(), 2);
    assert!(nodes[0].up && nodes[0].instances.is_some(), "{nodes:#?}");
    assert_eq!(nodes[1].instances, None);
    cloud.start_agent("kvm2").await;
    let reported = async || cloud.node("kvm2").await.instances;
    eventually("its next report counts", reported).await;
}

// ---- journals of a newer agent

#[tokio::test(start_paused = true)]
async fn an_agents_journal_that_it_does_not_understand_is_left_in_place_and_holds() {
    let mut cloud = Cloud::start(7).await;
    let guest = adopted(&cloud, "kvm1", slow("vm1")).await;
    let m = cloud
        .migrate(guest, Some("kvm2"), LiveOptions::default())
        .await
        .unwrap();
    cloud
        .until(m.uuid, "sending", |m| m.status == S::Running)
        .await;
    let file: PathBuf = cloud.journal("kvm1", m.uuid);
    let written = async || std::fs::read_to_string(&file).ok();
    let text = eventually("the source's journal", written).await;
    // The newer agent of the source is taken away, and the older one finds this.
    cloud.kill_agent("kvm1");
    let mut newer: Value = serde_json::from_str(&text).unwrap();
    newer["role"] = json!("juggler");
    // Its own would be right.
    newer.as_object_mut().unwrap().remove("sum");
    let newer = newer.to_string();
    assert_ne!(newer, text);
    std::fs::write(&file, &newer).unwrap();
    cloud.start_agent("kvm1").await;
    nobody_is_down(&cloud).await;
    assert_eq!(
        std::fs::read_to_string(&file).unwrap(),
        newer,
        "it is as it was"
    );
    let record = cloud.store.migration(m.uuid).await.unwrap();
    assert!(
        !record.status.is_final() || record.status == S::Completed,
        "{record:#?}"
    );
    cloud.fabric.check_invariants().unwrap();
    // The newer one is back.
    cloud.kill_agent("kvm1");
    std::fs::write(&file, &text).unwrap();
    cloud.start_agent("kvm1").await;
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
    cloud.check(&m).await;
}
