//! What builds since RPC 1.1 have sent and kept is read by this one, and says the same.
//!
//! `tests/samples/` has a file for each version, written once, by
//! `DROVER_WRITE_SAMPLES=1 cargo test -p drover-tests --test samples -- --ignored`,
//! and never changed afterwards. When the version is raised, one more is written.

#![allow(clippy::unwrap_used)] // all of it is test

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use drover_compute::{
    hypervisor::fake::GuestBuilder,
    journal::{Record, SeenRecord},
};
use drover_conductor::task::job::Data;
use drover_model::{
    api::{
        SPEAKS, compute as c,
        conductor::{self as d, method},
    },
    guest::NicAttachment,
    ids::InstanceId,
    migration::{
        ColdOptions, LiveOptions, Migration, MigrationStatus as S, TransferMode, TransferOptions,
        Way,
    },
    node::NodeReport,
    operation::{
        BalanceOptions, DrainOptions, EvacuateOptions, MoveMode, Operation, RestoreOptions,
        Returning, Task,
    },
    project::{Location, NetworkPlace, Project, StoragePlace},
};
use drover_saga::Event;
use drover_tests::{
    cloud::{Cloud, eventually},
    tap::{Samples, Tap},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

fn directory() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/samples"))
}

// ---- reading

type Reader = fn(&Value) -> Result<Value, serde_json::Error>;

fn read<T: Serialize + DeserializeOwned>(value: &Value) -> Result<Value, serde_json::Error> {
    serde_json::to_value(T::deserialize(value)?)
}

/// No arguments, or an answer that says nothing.
fn nothing(value: &Value) -> Result<Value, serde_json::Error> {
    Ok(value.clone())
}

fn each<T: Serialize + DeserializeOwned>(value: &Value) -> Result<Value, serde_json::Error> {
    serde_json::to_value(Vec::<T>::deserialize(value)?)
}

/// Whatever travels and is kept, by whom it is asked, and what reads it.
fn readers() -> BTreeMap<&'static str, (Reader, Reader)> {
    let steps: Vec<(&str, (Reader, Reader))> = vec![
        ("agent get_status", (nothing, read::<c::AgentStatus>)),
        (
            "agent check_can_live_migrate_source",
            (read::<c::CheckSource>, read::<c::SourceFacts>),
        ),
        (
            "agent check_can_live_migrate_destination",
            (read::<c::CheckDestination>, read::<c::DestinationFacts>),
        ),
        (
            "agent check_migration_path",
            (read::<c::CheckPath>, read::<c::PathFacts>),
        ),
        (
            "agent pre_live_migration",
            (read::<c::PreLiveMigration>, nothing),
        ),
        (
            "agent live_migration",
            (read::<c::LiveMigration>, read::<c::JobState>),
        ),
        (
            "agent get_live_migration",
            (read::<c::StepRef>, read::<c::JobState>),
        ),
        ("agent abort_live_migration", (read::<c::StepRef>, nothing)),
        (
            "agent force_complete_live_migration",
            (read::<c::StepRef>, nothing),
        ),
        (
            "agent locate_instance",
            (read::<c::StepRef>, read::<c::GuestLocation>),
        ),
        (
            "agent look_at_instance_copy",
            (read::<c::StepRef>, read::<c::CopySeen>),
        ),
        (
            "agent post_live_migration",
            (read::<c::PostLiveMigration>, read::<c::CleanUp>),
        ),
        (
            "agent post_live_migration_at_destination",
            (read::<c::StepRef>, read::<c::CleanUp>),
        ),
        (
            "agent rollback_live_migration_at_destination",
            (read::<c::RemoveCopy>, read::<c::CleanUp>),
        ),
        (
            "agent rollback_live_migration_at_source",
            (read::<c::StepRef>, nothing),
        ),
        (
            "agent prep_resize",
            (read::<c::PrepResize>, read::<c::Inbox>),
        ),
        (
            "agent resize_instance",
            (read::<c::ResizeInstance>, read::<c::JobState>),
        ),
        ("agent abort_resize", (read::<c::StepRef>, nothing)),
        (
            "agent set_aside_instance",
            (read::<c::SetAside>, read::<c::CleanUp>),
        ),
        (
            "agent finish_resize",
            (read::<c::FinishResize>, read::<c::GuestLocation>),
        ),
        (
            "agent rollback_resize_at_destination",
            (read::<c::RemoveCopy>, read::<c::CleanUp>),
        ),
        (
            "agent finish_revert_resize",
            (read::<c::FinishRevertResize>, read::<c::GuestLocation>),
        ),
        (
            "agent confirm_resize_at_destination",
            (read::<c::StepRef>, read::<c::CleanUp>),
        ),
        (
            "agent confirm_resize",
            (read::<c::RemoveCopy>, read::<c::CleanUp>),
        ),
        (
            "agent revert_resize",
            (read::<c::RevertResize>, read::<c::GuestLocation>),
        ),
        (
            "agent check_can_transfer_instance",
            (read::<c::CheckTransfer>, read::<c::TransferFacts>),
        ),
        ("agent prep_transfer", (read::<c::PrepTransfer>, nothing)),
        (
            "agent transfer_instance",
            (read::<c::TransferWork>, read::<c::JobState>),
        ),
        ("agent abort_transfer", (read::<c::StepRef>, nothing)),
        (
            "agent post_transfer",
            (read::<c::StepRef>, read::<c::CleanUp>),
        ),
        (
            "agent rollback_transfer",
            (read::<c::StepRef>, read::<c::CleanUp>),
        ),
        (
            "agent get_instance_definition",
            (read::<c::InstanceOnNode>, read::<c::KeptDefinition>),
        ),
        (
            "agent measure_dirty_rate",
            (read::<c::InstanceOnNode>, read::<c::DirtyRate>),
        ),
        (
            "agent probe_address",
            (read::<c::ProbeAddress>, read::<c::ProbeAnswer>),
        ),
        (
            "agent get_file_contents",
            (read::<c::GetContents>, read::<c::Contents>),
        ),
        (
            "agent check_can_rebuild_instance",
            (read::<c::CheckEvacuation>, read::<c::EvacuationFacts>),
        ),
        (
            "agent prep_rebuild_instance",
            (read::<c::RebuildInstance>, nothing),
        ),
        (
            "agent rebuild_instance",
            (read::<c::StepRef>, read::<c::GuestLocation>),
        ),
    ];
    let rest: Vec<(&str, (Reader, Reader))> = vec![
        (
            "agent post_rebuild_instance",
            (read::<c::StepRef>, read::<c::CleanUp>),
        ),
        (
            "agent rollback_rebuild_instance",
            (read::<c::StepRef>, read::<c::CleanUp>),
        ),
        (
            "conductor get_status",
            (nothing, read::<d::ConductorStatus>),
        ),
        (
            "conductor register_agent",
            (read::<d::RegisterAgent>, read::<d::Registered>),
        ),
        (
            "conductor heartbeat",
            (read::<d::Heartbeat>, read::<d::Heard>),
        ),
        ("conductor agent_leaves", (read::<d::AgentLeaves>, nothing)),
        (
            "conductor report_state",
            (read::<NodeReport>, read::<d::Word>),
        ),
        (
            "conductor migration_progress",
            (read::<d::MigrationReport>, nothing),
        ),
        (
            "conductor list_evacuated",
            (read::<d::ListEvacuated>, read::<d::EvacuatedAnswer>),
        ),
        (
            "conductor evacuated_removed",
            (read::<d::EvacuatedRemoved>, nothing),
        ),
        (
            "conductor migrate_instance",
            (read::<d::MigrateInstance>, read::<d::MigrateAnswer>),
        ),
        (
            "conductor transfer_instance",
            (read::<d::TransferInstance>, read::<d::MigrateAnswer>),
        ),
        (
            "conductor create_project",
            (read::<Project>, read::<d::ProjectView>),
        ),
        (
            "conductor abort_migration",
            (read::<d::MigrationRef>, read::<Migration>),
        ),
        (
            "conductor force_complete_migration",
            (read::<d::MigrationRef>, read::<Migration>),
        ),
        (
            "conductor confirm_migration",
            (read::<d::MigrationRef>, read::<Migration>),
        ),
        (
            "conductor revert_migration",
            (read::<d::RevertMigration>, read::<Migration>),
        ),
        (
            "conductor get_migration",
            (read::<d::MigrationRef>, read::<Migration>),
        ),
        (
            "conductor list_migrations",
            (read::<d::ListMigrations>, each::<Migration>),
        ),
        (
            "conductor get_instance",
            (read::<d::InstanceRef>, read::<d::Instance>),
        ),
        (
            "conductor list_instances",
            (read::<d::ListInstances>, each::<d::Instance>),
        ),
        ("conductor get_node", (read::<d::NodeRef>, read::<d::Node>)),
        ("conductor list_nodes", (nothing, each::<d::Node>)),
        ("conductor set_node", (read::<d::SetNode>, read::<d::Node>)),
        (
            "conductor drain_node",
            (read::<d::DrainNode>, read::<d::OperationAnswer>),
        ),
        (
            "conductor restore_node",
            (read::<d::RestoreNode>, read::<d::OperationAnswer>),
        ),
        (
            "conductor evacuate_node",
            (read::<d::EvacuateNode>, read::<d::OperationAnswer>),
        ),
        (
            "conductor balance_nodes",
            (read::<d::BalanceNodes>, read::<d::OperationAnswer>),
        ),
        (
            "conductor get_operation",
            (read::<d::OperationRef>, read::<d::OperationView>),
        ),
        (
            "conductor list_operations",
            (read::<d::ListOperations>, each::<Operation>),
        ),
        // What is kept: rows, and the agents' journals.
        ("kept migration", (read::<Migration>, nothing)),
    ];
    let kept: Vec<(&str, (Reader, Reader))> = vec![
        ("kept operation", (read::<Operation>, nothing)),
        ("kept events", (each::<Event>, nothing)),
        ("kept data", (read::<Data>, nothing)),
        ("kept record", (read::<Record>, nothing)),
        ("kept seen", (read::<SeenRecord>, nothing)),
    ];
    steps.into_iter().chain(rest).chain(kept).collect()
}

/// What of a sample is no more said by whoever has read it.
fn lost(sample: &Value, said: &Value, path: &str, lost: &mut Vec<String>) {
    match (sample, said) {
        (Value::Object(sample), Value::Object(said)) => {
            for (key, value) in sample {
                let path = format!("{path}.{key}");
                let is_empty = value.is_null()
                    || value.as_array().is_some_and(Vec::is_empty)
                    || value.as_object().is_some_and(serde_json::Map::is_empty);
                match said.get(key) {
                    Some(said) => self::lost(value, said, &path, lost),
                    // The lease's epoch is read apart; the form of a file as well.
                    None if is_empty || [".epoch", ".version", ".sum"].contains(&path.as_str()) => {
                    }
                    None => lost.push(format!("{path} = {value}")),
                }
            }
        }
        (Value::Array(sample), Value::Array(said)) if sample.len() == said.len() => {
            for (n, (sample, said)) in sample.iter().zip(said).enumerate() {
                self::lost(sample, said, &format!("{path}.{n}"), lost);
            }
        }
        (sample, said) if sample == said => {}
        (sample, said) => lost.push(format!("{path} was {sample} and is {said}")),
    }
}

#[test]
fn what_earlier_builds_sent_and_kept_is_read_and_says_the_same() {
    let readers = readers();
    let mut files = 0;
    for entry in std::fs::read_dir(directory()).unwrap() {
        let path = entry.unwrap().path();
        let samples: Samples =
            serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert!(samples.len() > 60, "{} samples in {path:?}", samples.len());
        for (name, sample) in &samples {
            let at = format!("{} in {}", name, path.display());
            let (kind, part) = name.rsplit_once(' ').unwrap();
            let (first, second) = readers
                .get(kind)
                .unwrap_or_else(|| panic!("nobody reads {at}"));
            let reader = if part == "answer" { second } else { first };
            let said = reader(sample).unwrap_or_else(|e| panic!("{at}: {e}"));
            let mut gone = Vec::new();
            lost(sample, &said, "", &mut gone);
            assert!(gone.is_empty(), "{at}: {gone:#?}");
        }
        files += 1;
    }
    assert!(files > 0);
    let newest = directory().join(format!("{}.json", SPEAKS.max));
    assert!(
        newest.exists(),
        "the samples of {} are to be written",
        SPEAKS.max
    );
}

// ---- writing

const IMAGES: &str = "/var/lib/libvirt/images";

fn vm(name: &str) -> GuestBuilder {
    let disk = format!("{IMAGES}/{name}.qcow2");
    GuestBuilder::new(name).memory_mib(1024).disk(&disk, 64)
}

async fn adopted(cloud: &Cloud, guest: GuestBuilder) -> InstanceId {
    let id = cloud.fabric.add_guest("kvm1", guest);
    cloud.adopted(id).await;
    id
}

async fn ends(cloud: &Cloud, guest: InstanceId, to: &str, way: &Way) -> Migration {
    let m = cloud.migrate_by(guest, Some(to), way).await.unwrap();
    cloud.until(m.uuid, "at rest", |m| m.status.rests()).await
}

async fn ask(cloud: &Cloud, method: &str, args: Value) -> Value {
    cloud.call(method, &args).await.unwrap()
}

/// Everything once, listened to.
async fn everything() -> Samples {
    let tap = Tap::default();
    let mut cloud = Cloud::start(11).await;
    cloud.listen_to(tap.clone());
    for who in ["conductor", "kvm1", "kvm2"] {
        cloud.kill_and_start(who, Duration::from_secs(1)).await;
    }
    let mut kept = Samples::new();
    moves(&mut cloud, &mut kept).await;
    hands_over(&cloud).await;
    operates(&mut cloud).await;
    let all = d::ListMigrations::default();
    let rows = cloud.store.migrations_as_kept(&all, None).await.unwrap();
    kept.insert(
        "kept migration row".to_owned(),
        rows.into_iter().next_back().unwrap(),
    );
    let all = d::ListOperations::default();
    let rows = cloud.store.operations_as_kept(&all).await.unwrap();
    kept.insert(
        "kept operation row".to_owned(),
        rows.into_iter().next().unwrap(),
    );
    for (method, args) in [
        (method::GET_STATUS, json!({})),
        (method::LIST_NODES, json!({})),
        (method::LIST_INSTANCES, json!({})),
        (method::LIST_OPERATIONS, json!({"limit": 1})),
        (method::LIST_MIGRATIONS, json!({"limit": 1})),
    ] {
        ask(&cloud, method, args).await;
    }
    let ask_status: c::AgentStatus = cloud
        .context()
        .agents
        .ask(&"kvm1".parse().unwrap(), &c::GetStatus {})
        .await
        .unwrap();
    assert_eq!(ask_status.speaks, SPEAKS.into());
    cloud.stop_agent("kvm1").await;
    let mut samples = tap.samples();
    samples.extend(kept);
    // Nobody's business.
    let who = samples.get_mut("conductor register_agent request").unwrap();
    who["identity"]["machine"] = json!("00000000000000000000000000000001");
    samples
}

async fn moves(cloud: &mut Cloud, kept: &mut Samples) {
    let guest = adopted(cloud, vm("live")).await;
    let m = cloud
        .migrate(guest, Some("kvm2"), LiveOptions::default())
        .await
        .unwrap();
    let m = cloud
        .until(m.uuid, "sending", |m| m.status == S::Running)
        .await;
    let journal = cloud.journal("kvm1", m.uuid);
    let written = async || std::fs::read_to_string(&journal).ok();
    let record = eventually("the source's journal", written).await;
    kept.insert(
        "kept record file".to_owned(),
        serde_json::from_str(&record).unwrap(),
    );
    let m = cloud.end(m.uuid).await;
    let key = drover_store::sagas::SagaKey::of_move(m.uuid);
    let events = cloud.store.saga_events(&key).await.unwrap();
    let data = events.iter().rev().find_map(|event| match event {
        Event::Succeeded { data, .. } => Some(data.clone()),
        _ => None,
    });
    kept.insert("kept data of".to_owned(), data.unwrap());
    let brief: Vec<Value> = events
        .iter()
        .map(|event| match event {
            Event::Succeeded { step, .. } => {
                json!({"event": "succeeded", "step": step, "data": {}})
            }
            other => serde_json::to_value(other).unwrap(),
        })
        .collect();
    kept.insert("kept events of".to_owned(), json!(brief));
    let seen = journal.parent().unwrap().parent().unwrap().join("seen");
    let seen = seen.join(journal.file_name().unwrap());
    let seen = std::fs::read_to_string(seen).unwrap();
    kept.insert(
        "kept seen file".to_owned(),
        serde_json::from_str(&seen).unwrap(),
    );
    // Back, and called off on the way.
    let m = cloud
        .migrate(guest, Some("kvm1"), LiveOptions::default())
        .await
        .unwrap();
    cloud
        .until(m.uuid, "sending", |m| m.status == S::Running)
        .await;
    cloud.abort(m.uuid).await.unwrap();
    cloud.end(m.uuid).await;
    let slow = adopted(cloud, vm("slow").dirty_mib_s(5000).working_set_mib(900)).await;
    let m = cloud
        .migrate(slow, Some("kvm2"), LiveOptions::default())
        .await
        .unwrap();
    cloud
        .until(m.uuid, "sending", |m| m.status == S::Running)
        .await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    ask(
        cloud,
        method::FORCE_COMPLETE_MIGRATION,
        json!({"migration": m.uuid}),
    )
    .await;
    cloud.end(m.uuid).await;
    let cold = Way::Cold(ColdOptions::default());
    let guest = adopted(cloud, vm("cold")).await;
    let m = ends(cloud, guest, "kvm2", &cold).await;
    ask(
        cloud,
        method::REVERT_MIGRATION,
        json!({"migration": m.uuid}),
    )
    .await;
    cloud.end(m.uuid).await;
    let m = ends(cloud, guest, "kvm2", &cold).await;
    ask(
        cloud,
        method::CONFIRM_MIGRATION,
        json!({"migration": m.uuid}),
    )
    .await;
    let m = cloud.end(m.uuid).await;
    ask(
        cloud,
        method::GET_MIGRATION,
        json!({"migration": m.id.to_string()}),
    )
    .await;
    let guest = adopted(
        cloud,
        vm("called-back")
            .memory_mib(16)
            .disk("/var/lib/libvirt/images/big.raw", 8192),
    )
    .await;
    let m = cloud.migrate_by(guest, Some("kvm2"), &cold).await.unwrap();
    cloud
        .until(m.uuid, "copying", |m| m.status == S::Migrating)
        .await;
    cloud.abort(m.uuid).await.unwrap();
    cloud.end(m.uuid).await;
}

async fn hands_over(cloud: &Cloud) {
    let bridge = |project: &str| NicAttachment::Bridge {
        bridge: format!("br-{project}"),
    };
    for id in ["alpha", "beta"] {
        let path = format!("/projects/{id}");
        cloud.fabric.make_directory("kvm1", &path);
        cloud.fabric.edit_node("kvm1", |node| {
            node.bridges.insert(format!("br-{id}"));
        });
        let mut project = Project::new(id.parse().unwrap());
        let lan = vec![NetworkPlace::new(Vec::new(), bridge(id))];
        project.networks = BTreeMap::from([("lan".to_owned(), lan)]);
        project.storage = vec![StoragePlace::new(Vec::new(), Location::Directory { path })];
        let project = serde_json::to_value(&project).unwrap();
        ask(cloud, method::CREATE_PROJECT, project).await;
    }
    let guest = GuestBuilder::new("given")
        .project("alpha")
        .nics(&[bridge("alpha")]);
    let guest = adopted(cloud, guest.disk("/projects/alpha/given.qcow2", 64)).await;
    let wanted = d::TransferInstance {
        instance: guest.to_string(),
        project: "beta".to_owned(),
        options: TransferOptions {
            mode: TransferMode::Live,
            ..TransferOptions::default()
        },
        dry_run: false,
    };
    let answer: d::MigrateAnswer = cloud
        .call(method::TRANSFER_INSTANCE, &wanted)
        .await
        .unwrap();
    let d::MigrateAnswer::Accepted { migration } = answer else {
        panic!("{answer:?}");
    };
    let m = cloud.end(migration.uuid).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
}

async fn operates(cloud: &mut Cloud) {
    cloud
        .fabric
        .share_directory("/shared", &["kvm1", "kvm2"], 1 << 40);
    let shared = GuestBuilder::new("shared").disk("/shared/shared.qcow2", 64);
    let guest = adopted(cloud, shared).await;
    let host = "kvm1".parse().unwrap();
    let drain = Task::Drain(DrainOptions {
        mode: MoveMode::Live,
        ..DrainOptions::new(host)
    });
    let o = cloud.operate(&drain).await.unwrap();
    let o = cloud.operation_end(o.uuid).await;
    ask(cloud, method::GET_OPERATION, json!({"operation": o.uuid})).await;
    let restore = Task::Restore(RestoreOptions {
        host: "kvm1".parse().unwrap(),
        returning: Returning::All,
        mode: MoveMode::Live,
        max_parallel: None,
        unknown: Default::default(),
    });
    let o = cloud.operate(&restore).await.unwrap();
    cloud.operation_end(o.uuid).await;
    let balance = Task::Balance(BalanceOptions::default());
    if let Ok(o) = cloud.operate(&balance).await {
        cloud.operation_end(o.uuid).await;
    }
    ask(
        cloud,
        method::SET_NODE,
        json!({"host": "kvm1", "enabled": true}),
    )
    .await;
    // Wherever it is, that node dies.
    let home = cloud.fabric.running_on(guest).unwrap().to_string();
    eventually("its definition is kept", async || {
        let kept = cloud.store.kept_definition(guest).await.unwrap();
        kept.filter(|kept| kept.host.as_str() == home)
    })
    .await;
    cloud.fabric.power_off(&home);
    cloud.kill_agent(&home);
    eventually("it is down", async || {
        (!cloud.node(&home).await.up).then_some(())
    })
    .await;
    let evacuate = Task::Evacuate(EvacuateOptions {
        confirmed_off: true,
        ..EvacuateOptions::new(home.parse().unwrap())
    });
    let o = cloud.operate(&evacuate).await.unwrap();
    cloud.operation_end(o.uuid).await;
    cloud.fabric.power_on(&home);
    cloud.start_agent(&home).await;
    tokio::time::sleep(Duration::from_secs(120)).await;
}

#[tokio::test(start_paused = true)]
#[ignore = "writes the samples of this version, once"]
async fn samples_are_written() {
    assert!(std::env::var_os("DROVER_WRITE_SAMPLES").is_some());
    let samples = everything().await;
    let path = directory().join(format!("{}.json", SPEAKS.max));
    assert!(!path.exists(), "they are written once");
    std::fs::create_dir_all(directory()).unwrap();
    // A line each: a change of one is seen.
    let lines: Vec<String> = samples
        .iter()
        .map(|(name, sample)| format!("{}: {sample}", json!(name)))
        .collect();
    std::fs::write(&path, format!("{{\n{}\n}}\n", lines.join(",\n"))).unwrap();
}
