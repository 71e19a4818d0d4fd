//! Transfers to another project in virtual time, with every process dying at
//! every turn and every act of the hypervisor failing. What must hold afterwards
//! is checked apart from the code under test: all of it, or none of it.

use std::{collections::BTreeMap, time::Duration};

use drover_compute::hypervisor::{
    ColdDriver, Hypervisor, HypervisorError,
    fake::{Call, GuestBuilder, script::Effect},
};
use drover_model::{
    api::conductor::{
        AcceptTransfer, MigrateAnswer, OfferMade, OfferRef, OfferState, OfferTransfer, ProjectRef,
        ProjectView, TransferInstance, method,
    },
    guest::{Guest, NicAttachment, PowerState},
    ids::InstanceId,
    migration::{LiveOptions, Migration, MigrationStatus as S, TransferMode, TransferOptions},
    project::{Limit, Location, NetworkPlace, Project, Quota, StoragePlace},
};
use drover_rpc::RpcError;
use drover_tests::cloud::{Cloud, eventually};

fn bridge(project: &str) -> NicAttachment {
    NicAttachment::Bridge {
        bridge: format!("br-{project}"),
    }
}

fn directory(project: &str) -> String {
    format!("/projects/{project}")
}

fn project(id: &str, instances: Limit) -> Project {
    let mut project = Project::new(id.parse().expect("an id"));
    project.quota = Quota {
        instances,
        ..Quota::default()
    };
    project.networks = BTreeMap::from([(
        "lan".to_owned(),
        vec![NetworkPlace::new(Vec::new(), bridge(id))],
    )]);
    project.storage = vec![StoragePlace::new(
        Vec::new(),
        Location::Directory {
            path: directory(id),
        },
    )];
    project
}

/// A cloud with the projects alpha and beta, and room for one instance in beta.
async fn cloud(seed: u64) -> Cloud {
    let cloud = Cloud::start(seed).await;
    for id in ["alpha", "beta"] {
        cloud.fabric.make_directory("kvm1", &directory(id));
        cloud.fabric.edit_node("kvm1", |node| {
            node.bridges.insert(format!("br-{id}"));
        });
        let created: ProjectView = cloud
            .call(method::CREATE_PROJECT, &project(id, Limit::AtMost(1)))
            .await
            .expect("it is created");
        assert!(created.created);
    }
    cloud
}

fn web() -> GuestBuilder {
    GuestBuilder::new("web")
        .project("alpha")
        .memory_mib(512)
        .nics(&[bridge("alpha")])
        .disk("/projects/alpha/web.qcow2", 256)
        .disk("/projects/alpha/data.raw", 64)
}

async fn guest(cloud: &Cloud, builder: GuestBuilder) -> InstanceId {
    let id = cloud.fabric.add_guest("kvm1", builder);
    cloud.adopted(id).await;
    id
}

fn options(mode: TransferMode) -> TransferOptions {
    TransferOptions {
        mode,
        ..TransferOptions::default()
    }
}

async fn transfer(
    cloud: &Cloud,
    id: InstanceId,
    mode: TransferMode,
) -> Result<Migration, RpcError> {
    let ask = TransferInstance {
        instance: id.to_string(),
        project: "beta".to_owned(),
        options: options(mode),
        dry_run: false,
    };
    accepted(cloud.call(method::TRANSFER_INSTANCE, &ask).await)
}

fn accepted(answer: Result<MigrateAnswer, RpcError>) -> Result<Migration, RpcError> {
    match answer? {
        MigrateAnswer::Accepted { migration } => Ok(*migration),
        MigrateAnswer::Plan { plan } => panic!("a plan was not asked for: {plan:?}"),
    }
}

async fn view(cloud: &Cloud, project: &str) -> ProjectView {
    let ask = ProjectRef {
        project: project.to_owned(),
    };
    let view = cloud.call(method::GET_PROJECT, &ask).await;
    view.expect("it is there")
}

/// A guest as its node has it now and after its next start.
async fn as_it_is(cloud: &Cloud, id: InstanceId) -> [Guest; 2] {
    let driver = cloud.fabric.driver("kvm1");
    let now = driver.guest(id).await.expect("libvirt answers");
    let lasting = driver.lasting_guest(id).await.expect("libvirt answers");
    [now.expect("it is there"), lasting.expect("it is there")]
}

/// All of it, or none of it.
async fn check(cloud: &Cloud, m: &Migration, runs: bool) {
    if let Err(found) = cloud.fabric.check_invariants() {
        panic!("{found:?}\n{m:#?}");
    }
    let id = m.instance_uuid;
    let owner = match m.status {
        S::Completed => "beta",
        S::Failed | S::Cancelled => "alpha",
        other => panic!("it is {other}: {m:#?}"),
    };
    let other = if owner == "beta" { "alpha" } else { "beta" };
    let running = cloud.fabric.running_on(id);
    assert_eq!(running.is_some(), runs, "{m:#?}");
    for guest in as_it_is(cloud, id).await {
        assert_eq!(guest.project, owner, "{m:#?}");
        assert_eq!(guest.nics[0].attachment, bridge(owner), "{m:#?}");
        for disk in &guest.disks {
            let path = disk.local_path().expect("a file");
            assert!(path.starts_with(&directory(owner)), "{path}: {m:#?}");
        }
    }
    let row = cloud.store.find_instance(&id.to_string()).await;
    assert_eq!(row.expect("on the record").project, owner, "{m:#?}");
    let (has, has_not) = (view(cloud, owner).await, view(cloud, other).await);
    assert_eq!((has.usage.instances, has_not.usage.instances), (1, 0));
    let promised = (has.promised.instances, has_not.promised.instances);
    assert_eq!(promised, (0, 0), "{m:#?}");
    let fabric = cloud.fabric.clone();
    eventually("nothing is left behind", async || {
        fabric.leftovers().is_empty().then_some(())
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_guest_changes_hands() {
    for (mode, state) in [
        (TransferMode::Live, PowerState::Running),
        (TransferMode::Live, PowerState::Paused),
        (TransferMode::Live, PowerState::Shutdown),
        (TransferMode::Cold, PowerState::Running),
        (TransferMode::Cold, PowerState::Shutdown),
    ] {
        let cloud = cloud(1).await;
        let id = guest(&cloud, web().state(state)).await;
        let m = transfer(&cloud, id, mode).await.expect("it is accepted");
        let m = cloud.end(m.uuid).await;
        assert_eq!(m.status, S::Completed, "{m:#?}");
        assert_eq!(m.dest_host.as_ref(), Some(&m.source_host));
        assert!(m.consent.is_some(), "{m:#?}");
        check(&cloud, &m, state == PowerState::Running).await;
    }
}

/// Kills one process whenever the record has reached a version, for every
/// version there is, and starts it again after a while.
async fn killed_everywhere(who: &str, dead_for: Duration, mode: TransferMode) {
    let stride = if dead_for == LONG { 3 } else { 1 };
    for turn in (0..).step_by(stride) {
        let mut cloud = cloud(turn).await;
        let id = guest(&cloud, web()).await;
        let m = transfer(&cloud, id, mode).await.expect("it is accepted");
        let at_version = m.version + turn;
        let m = cloud.until_version(m.uuid, at_version).await;
        let over = m.status.rests();
        cloud.kill_and_start(who, dead_for).await;
        let m = cloud.end(m.uuid).await;
        // Before anything was touched, an absence that lasts is a reason to fail.
        let gave_up = dead_for == LONG && m.status == S::Failed;
        let killed = format!("killed {who} at {at_version}: {m:#?}");
        assert!(m.status == S::Completed || gave_up, "{killed}");
        check(&cloud, &m, true).await;
        if over {
            assert!(turn > 1, "it was killed at every turn: {turn}");
            return;
        }
    }
}

const SHORT: Duration = Duration::from_secs(3);
/// Long enough for everybody to lose patience. That takes long here too: not at each
/// turn, of which two that follow each other mostly differ in progress alone.
const LONG: Duration = Duration::from_secs(200);
const MODES: [TransferMode; 2] = [TransferMode::Live, TransferMode::Cold];

#[tokio::test(start_paused = true)]
async fn the_conductor_dies_at_every_turn() {
    for mode in MODES {
        killed_everywhere("conductor", SHORT, mode).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_agent_dies_at_every_turn() {
    for mode in MODES {
        killed_everywhere("kvm1", SHORT, mode).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_agent_is_away_for_long() {
    for mode in MODES {
        killed_everywhere("kvm1", LONG, mode).await;
    }
}

#[tokio::test(start_paused = true)]
async fn it_is_aborted_at_every_turn() {
    for mode in MODES {
        for at_version in 1.. {
            let cloud = cloud(at_version).await;
            let id = guest(&cloud, web()).await;
            let m = transfer(&cloud, id, mode).await.expect("it is accepted");
            let m = cloud.until_version(m.uuid, at_version).await;
            let over = m.status.rests();
            let taken = cloud.abort(m.uuid).await;
            assert!(!over || taken.is_err(), "what is over is not aborted");
            let m = cloud.end(m.uuid).await;
            assert!(matches!(m.status, S::Cancelled | S::Completed), "{m:#?}");
            check(&cloud, &m, true).await;
            if over {
                break;
            }
        }
    }
}

/// Every act that a mode needs, and a restart of the agent in the middle of it.
const ACTS: [(TransferMode, &[Call]); 2] = [
    (
        TransferMode::Live,
        &[
            Call::Standing,
            Call::MirrorDisk,
            Call::HandOver,
            Call::PivotDisk,
            Call::Definition,
        ],
    ),
    (
        TransferMode::Cold,
        &[
            Call::Definition,
            Call::ShutDown,
            Call::PlaceDisk,
            Call::Define,
            Call::Start,
        ],
    ),
];

/// Refuses the nth time that each act is asked for.
#[tokio::test(start_paused = true)]
async fn every_act_is_refused_once() {
    for (mode, acts) in ACTS {
        for call in acts {
            for nth in 0..4_u32 {
                let cloud = cloud(u64::from(nth)).await;
                let id = guest(&cloud, web()).await;
                let (no, none) = (
                    HypervisorError::Failed("no".to_owned()),
                    Effect::SlowBefore(Duration::ZERO),
                );
                if nth > 0 {
                    cloud.fabric.on_call("kvm1", *call, nth, none);
                }
                cloud.fabric.on_call("kvm1", *call, 1, Effect::Refuse(no));
                let m = transfer(&cloud, id, mode).await.expect("it is accepted");
                let m = cloud.end(m.uuid).await;
                assert!(
                    m.status == S::Failed || nth > 0 || *call == Call::ShutDown,
                    "{call:?}: {m:#?}"
                );
                check(&cloud, &m, true).await;
            }
        }
    }
}

/// Each act is done, and nobody hears of it: nobody knows, so it is looked at.
#[tokio::test(start_paused = true)]
async fn every_act_is_lost_once() {
    for (mode, acts) in ACTS {
        for call in acts {
            let cloud = cloud(5).await;
            let id = guest(&cloud, web()).await;
            let lost = HypervisorError::Lost("libvirtd went away".to_owned());
            cloud.fabric.on_call("kvm1", *call, 1, Effect::Forget(lost));
            let m = transfer(&cloud, id, mode).await.expect("it is accepted");
            let m = cloud.end(m.uuid).await;
            assert!(matches!(m.status, S::Completed | S::Failed), "{m:#?}");
            check(&cloud, &m, true).await;
        }
    }
}

/// libvirtd dies, and is there again, whenever the record has reached a version.
#[tokio::test(start_paused = true)]
async fn libvirtd_dies_at_every_turn() {
    for mode in MODES {
        for at_version in 1.. {
            let cloud = cloud(at_version).await;
            let id = guest(&cloud, web()).await;
            let m = transfer(&cloud, id, mode).await.expect("it is accepted");
            let m = cloud.until_version(m.uuid, at_version).await;
            let over = m.status.rests();
            cloud.fabric.libvirtd_dies("kvm1");
            tokio::time::sleep(SHORT).await;
            cloud.fabric.libvirtd_back("kvm1");
            let m = cloud.end(m.uuid).await;
            check(&cloud, &m, true).await;
            if over {
                break;
            }
        }
    }
}

/// The guest goes off by itself in the middle of it: nothing starts it again,
/// and it is whole on one side.
#[tokio::test(start_paused = true)]
async fn the_guest_goes_off_by_itself() {
    for at_version in 1.. {
        let cloud = cloud(at_version).await;
        let id = guest(&cloud, web()).await;
        let m = transfer(&cloud, id, TransferMode::Live).await;
        let m = cloud
            .until_version(m.expect("it is accepted").uuid, at_version)
            .await;
        let over = m.status.rests();
        cloud.fabric.shut_down_guest(id);
        let m = cloud.end(m.uuid).await;
        check(&cloud, &m, false).await;
        cloud.fabric.start_guest("kvm1", id);
        cloud.fabric.check_invariants().expect("on its own disks");
        if over {
            break;
        }
    }
}

/// Somebody starts the guest after its disks were copied, and has it shut down
/// again: what it wrote meanwhile is not lost with the old disk.
/// The agent asks it to shut down, and loses all that it knew.
#[tokio::test(start_paused = true)]
async fn a_guest_that_was_shut_down_and_forgotten_runs_again() {
    let mut cloud = cloud(6).await;
    let id = guest(&cloud, web().shuts_down_after(Duration::from_secs(2))).await;
    let m = transfer(&cloud, id, TransferMode::Cold).await.unwrap();
    cloud.until(m.uuid, "stopping", |m| m.step == "stop").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    cloud.kill_agent("kvm1");
    cloud.lose_state("kvm1");
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(cloud.fabric.running_on(id), None);
    cloud.start_agent("kvm1").await;
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Failed, "{m:#?}");
    let home = "kvm1".parse().expect("a host name");
    assert_eq!(cloud.fabric.running_on(id), Some(home), "{m:#?}");
    cloud.fabric.check_invariants().expect("it runs once");
}

#[tokio::test(start_paused = true)]
async fn what_is_written_between_copy_and_hand_over_is_kept() {
    let cloud = cloud(14).await;
    let id = guest(&cloud, web()).await;
    // Looked at when it is checked, and again when it is handed over: slowly.
    let look = |time| {
        cloud
            .fabric
            .on_call("kvm1", Call::LastingGuest, 1, Effect::SlowBefore(time))
    };
    look(Duration::ZERO);
    look(Duration::from_secs(10));
    let m = transfer(&cloud, id, TransferMode::Cold).await;
    let m = m.expect("it is accepted");
    cloud
        .until(m.uuid, "handed over", |m| m.step == "hand_over")
        .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    cloud.fabric.start_guest("kvm1", id);
    tokio::time::sleep(Duration::from_secs(2)).await;
    cloud.fabric.shut_down_guest(id);
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
    check(&cloud, &m, true).await;
}

/// Somebody defines the guest anew before it is handed over: that would be lost, in
/// part, by handing it over.
#[tokio::test(start_paused = true)]
async fn a_guest_that_is_defined_anew_meanwhile_stays_with_what_it_got() {
    for mode in MODES {
        let cloud = cloud(15).await;
        let id = guest(&cloud, web()).await;
        let m = transfer(&cloud, id, mode).await.expect("it is accepted");
        let is_planned = |m: &Migration| ["stop", "copy"].contains(&m.step.as_str());
        cloud.until(m.uuid, "planned", is_planned).await;
        cloud.fabric.redefine("kvm1", id, |guest| guest.vcpus = 4);
        let m = cloud.end(m.uuid).await;
        assert_eq!(m.status, S::Failed, "{m:#?}");
        let reason = m.end_reason.as_ref().expect("it has one").to_string();
        assert!(
            reason.contains("lasting definition was changed"),
            "{reason}"
        );
        check(&cloud, &m, true).await;
        let [_, lasting] = as_it_is(&cloud, id).await;
        assert_eq!(lasting.vcpus, 4, "{mode:?}");
    }
}

/// Two disks of one name on their way to one directory: one gets there, the other
/// stays where it is, and neither is lost.
#[tokio::test(start_paused = true)]
async fn two_disks_of_one_name_do_not_meet() {
    for mode in MODES {
        let cloud = cloud(13).await;
        let set = drover_model::api::conductor::SetProject {
            project: "beta".to_owned(),
            change: drover_model::api::conductor::ProjectChange {
                instances: Some(Limit::Unlimited),
                ..Default::default()
            },
        };
        let set: Result<ProjectView, _> = cloud.call(method::SET_PROJECT, &set).await;
        set.expect("it is set");
        let mut ids = Vec::new();
        for name in ["a", "b"] {
            let directory = format!("/projects/alpha/{name}");
            cloud.fabric.make_directory("kvm1", &directory);
            let builder = GuestBuilder::new(name)
                .project("alpha")
                .nics(&[bridge("alpha")])
                .disk(&format!("{directory}/disk"), 64);
            ids.push(guest(&cloud, builder).await);
        }
        let (a, b) = tokio::join!(
            transfer(&cloud, ids[0], mode),
            transfer(&cloud, ids[1], mode)
        );
        let mut completed = 0;
        for m in [a, b].into_iter().flatten() {
            let m = cloud.end(m.uuid).await;
            completed += u32::from(m.status == S::Completed);
        }
        assert_eq!(completed, 1, "{mode:?}");
        for id in ids {
            assert!(cloud.fabric.running_on(id).is_some());
        }
        if let Err(found) = cloud.fabric.check_invariants() {
            panic!("{mode:?}: {found:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_transfer_and_a_migration_do_not_meet() {
    let cloud = cloud(8).await;
    let id = guest(&cloud, web()).await;
    let m = transfer(&cloud, id, TransferMode::Live)
        .await
        .expect("it is accepted");
    let live = cloud.migrate(id, Some("kvm2"), LiveOptions::default());
    let refused = live.await.expect_err("one is enough");
    let words = refused.failure().map_or("", |f| &f.message);
    assert!(words.contains("project-transfer"), "{words}");
    let m = cloud.end(m.uuid).await;
    check(&cloud, &m, true).await;
}

#[tokio::test(start_paused = true)]
async fn of_a_transfer_and_a_migration_at_once_one_wins() {
    for seed in 0..16 {
        let cloud = cloud(seed).await;
        let id = guest(&cloud, web()).await;
        let move_it = || cloud.migrate(id, Some("kvm2"), LiveOptions::default());
        let give_it = || transfer(&cloud, id, TransferMode::Live);
        let (given, moved) = match seed % 2 {
            0 => tokio::join!(give_it(), move_it()),
            _ => {
                let (moved, given) = tokio::join!(move_it(), give_it());
                (given, moved)
            }
        };
        assert!(given.is_ok() != moved.is_ok(), "{given:?} {moved:?}");
        let (loser, winner) = match (given, moved) {
            (Err(loser), _) => (loser, "live-migration"),
            (Ok(_), other) => (other.expect_err("one lost"), "project-transfer"),
        };
        let words = loser.failure().map_or("", |f| &f.message);
        assert!(words.contains(winner), "{words}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_receivers_quota_is_kept_by_two_at_once() {
    let cloud = cloud(9).await;
    let first = guest(&cloud, web()).await;
    let other = GuestBuilder::new("db")
        .project("alpha")
        .nics(&[bridge("alpha")])
        .disk("/projects/alpha/db.qcow2", 64);
    let second = guest(&cloud, other).await;
    let (a, b) = tokio::join!(
        transfer(&cloud, first, TransferMode::Live),
        transfer(&cloud, second, TransferMode::Live)
    );
    let mut completed = 0;
    for m in [a, b].into_iter().flatten() {
        let m = cloud.end(m.uuid).await;
        completed += u32::from(m.status == S::Completed);
    }
    assert_eq!(completed, 1, "beta may have one");
    let beta = view(&cloud, "beta").await;
    assert_eq!((beta.usage.instances, beta.promised.instances), (1, 0));
}

async fn offered(cloud: &Cloud, id: InstanceId) -> OfferMade {
    let ask = OfferTransfer {
        instance: id.to_string(),
        project: None,
        expires_in_s: Some(3600),
    };
    let made = cloud.call(method::OFFER_TRANSFER, &ask).await;
    made.expect("it is offered")
}

async fn accept(cloud: &Cloud, made: &OfferMade, key: &str) -> Result<Migration, RpcError> {
    let ask = AcceptTransfer {
        offer: made.offer.id.to_string(),
        key: key.to_owned(),
        project: "beta".to_owned(),
        options: options(TransferMode::Live),
        dry_run: false,
    };
    accepted(cloud.call(method::ACCEPT_TRANSFER, &ask).await)
}

fn class(error: &RpcError) -> &str {
    error.failure().map_or("", |failure| &failure.class)
}

async fn state(cloud: &Cloud, made: &OfferMade) -> OfferState {
    let ask = OfferRef {
        offer: made.offer.id.to_string(),
    };
    let offer = cloud.call::<_, drover_model::api::conductor::Offer>(method::GET_TRANSFER, &ask);
    offer.await.expect("it is there").state
}

#[tokio::test(start_paused = true)]
async fn an_offer_is_accepted_once() {
    let cloud = cloud(10).await;
    let id = guest(&cloud, web()).await;
    let made = offered(&cloud, id).await;
    let m = accept(&cloud, &made, &made.key)
        .await
        .expect("it is accepted");
    let consent = m.consent.clone().expect("somebody agreed");
    assert_eq!(consent.offer, Some(made.offer.id));
    let again = accept(&cloud, &made, &made.key).await;
    assert_eq!(class(&again.expect_err("once is enough")), "OfferNotOpen");
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
    check(&cloud, &m, true).await;
    assert_eq!(state(&cloud, &made).await, OfferState::Accepted);
    let again = accept(&cloud, &made, &made.key).await;
    assert_eq!(class(&again.expect_err("once is enough")), "OfferNotOpen");
}

#[tokio::test(start_paused = true)]
async fn an_offer_whose_transfer_fails_is_open_again() {
    let cloud = cloud(11).await;
    let id = guest(&cloud, web()).await;
    let made = offered(&cloud, id).await;
    let no = HypervisorError::Failed("no".to_owned());
    cloud
        .fabric
        .on_call("kvm1", Call::HandOver, 1, Effect::Refuse(no));
    let m = accept(&cloud, &made, &made.key)
        .await
        .expect("it is accepted");
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Failed, "{m:#?}");
    check(&cloud, &m, true).await;
    let m = accept(&cloud, &made, &made.key)
        .await
        .expect("it is open again");
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
}

#[tokio::test(start_paused = true)]
async fn late_withdrawn_and_wrong_keys_are_refused() {
    let cloud = cloud(12).await;
    let id = guest(&cloud, web()).await;
    let made = offered(&cloud, id).await;
    let twice = OfferTransfer {
        instance: id.to_string(),
        project: None,
        expires_in_s: None,
    };
    let twice = cloud
        .call::<_, OfferMade>(method::OFFER_TRANSFER, &twice)
        .await;
    assert_eq!(class(&twice.expect_err("one is open")), "OfferNotOpen");
    for tried in 0..5 {
        let wrong = accept(&cloud, &made, "0000").await;
        assert_eq!(
            class(&wrong.expect_err("another key")),
            "WrongKey",
            "{tried}"
        );
    }
    let locked = accept(&cloud, &made, &made.key).await;
    assert_eq!(class(&locked.expect_err("too many tries")), "OfferNotOpen");
    assert_eq!(state(&cloud, &made).await, OfferState::Locked);

    let made = offered(&cloud, id).await;
    let withdrawn = OfferRef {
        offer: made.offer.id.to_string(),
    };
    let offer: drover_model::api::conductor::Offer = cloud
        .call(method::WITHDRAW_TRANSFER, &withdrawn)
        .await
        .expect("its giver may");
    assert_eq!(offer.state, OfferState::Withdrawn);
    let gone = accept(&cloud, &made, &made.key).await;
    assert_eq!(class(&gone.expect_err("withdrawn")), "OfferNotOpen");

    let made = offered(&cloud, id).await;
    tokio::time::sleep(Duration::from_secs(3601)).await;
    let late = accept(&cloud, &made, &made.key).await;
    assert_eq!(class(&late.expect_err("too late")), "OfferNotOpen");
    assert_eq!(state(&cloud, &made).await, OfferState::Expired);
    for guest in as_it_is(&cloud, id).await {
        assert_eq!(guest.project, "alpha");
    }
}
