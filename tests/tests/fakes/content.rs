//! Same name is not same content (invariant 12): guests whose destination has
//! another file where they read one stay where they are, whichever way they were
//! to go; those whose destination has the same bytes move.

use std::time::Duration;

use drover_compute::hypervisor::{
    HypervisorError,
    fake::{Call, Fabric, GuestBuilder, NodeSpec, script::Effect},
};
use drover_model::{
    api::conductor::{MigrateAnswer, MigrateInstance, method},
    check::{CheckCode, CheckFailure},
    ids::{HostName, InstanceId},
    migration::{ColdOptions, EndReason, LiveOptions, Migration, MigrationStatus as S, Way},
};
use drover_tests::cloud::{Cloud, eventually};

use crate::evacuation_deaths;

const IMAGES: &str = "/var/lib/libvirt/images";
const BASE: &str = "/var/lib/libvirt/images/base.qcow2";
const ISO: &str = "/var/lib/libvirt/images/tools.iso";
const KERNEL: &str = "/boot/vmlinuz";
const SHARED: &str = "/srv/shared";
const GIB: u64 = 1 << 30;

fn name(host: &str) -> HostName {
    host.parse().expect("a host name")
}

fn live() -> Way {
    Way::Live(LiveOptions::default())
}

fn cold() -> Way {
    Way::Cold(ColdOptions::default())
}

/// What a guest reads and does not take along.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// An image under a disk that is copied.
    Base,
    /// An image on each node under a disk that both share.
    BaseOfShared,
    /// A CD.
    Iso,
    /// What it is started from.
    Kernel,
}

const KINDS: [Kind; 4] = [Kind::Base, Kind::BaseOfShared, Kind::Iso, Kind::Kernel];

impl Kind {
    fn path(self) -> &'static str {
        match self {
            Self::Base | Self::BaseOfShared => BASE,
            Self::Iso => ISO,
            Self::Kernel => KERNEL,
        }
    }

    fn guest(self) -> GuestBuilder {
        let vm = GuestBuilder::new("web").memory_mib(512);
        let own = format!("{IMAGES}/web.qcow2");
        let shared = format!("{SHARED}/web.qcow2");
        match self {
            Self::Base => vm.disk(&own, 64).backing(BASE),
            Self::BaseOfShared => vm.disk(&shared, 64).backing(BASE),
            Self::Iso => vm.disk(&shared, 64).cdrom(ISO),
            Self::Kernel => vm.disk(&shared, 64).reads(KERNEL, "the kernel"),
        }
    }
}

/// Two nodes that share a directory; the file as given on each, the guest on the first.
async fn cloud(kind: Kind, here: &str, there: Option<&str>) -> (Cloud, InstanceId) {
    let cloud = Cloud::start(11).await;
    share(&cloud.fabric, &["kvm1", "kvm2"]);
    put(&cloud.fabric, "kvm1", kind.path(), here);
    if let Some(there) = there {
        put(&cloud.fabric, "kvm2", kind.path(), there);
    }
    let id = cloud.fabric.add_guest("kvm1", kind.guest());
    cloud.adopted(id).await;
    (cloud, id)
}

fn share(fabric: &Fabric, nodes: &[&str]) {
    fabric.share_directory(SHARED, nodes, 1000 * GIB);
    for node in nodes {
        fabric.make_directory(node, "/boot");
    }
}

fn put(fabric: &Fabric, node: &str, path: &str, text: &str) {
    fabric
        .write_file(node, path, text)
        .expect("it can be put there");
}

async fn migrated(cloud: &Cloud, id: InstanceId, way: &Way) -> Migration {
    let m = cloud.migrate_by(id, Some("kvm2"), way).await;
    let m = m.expect("the record has nothing against it");
    let rests = |m: &Migration| m.status.rests();
    cloud.until(m.uuid, "at its end", rests).await
}

/// What a dry run has against a migration.
async fn dry_run(cloud: &Cloud, id: InstanceId, way: &Way) -> Vec<CheckFailure> {
    let mut ask = MigrateInstance::new(id.to_string(), Some(name("kvm2")), way);
    ask.dry_run = true;
    match cloud.call(method::MIGRATE_INSTANCE, &ask).await {
        Ok(MigrateAnswer::Plan { plan }) => plan.failures,
        other => panic!("a plan was asked for: {other:?}"),
    }
}

fn refusal(m: &Migration) -> Vec<CheckFailure> {
    match &m.end_reason {
        Some(EndReason::Refused { checks }) => checks.clone(),
        other => panic!("it was to be refused: {other:?}"),
    }
}

/// The guest runs on, where it was, and nothing was done to anybody's files.
fn assert_unharmed(cloud: &Cloud, id: InstanceId, kind: Kind, there: Option<&str>) {
    let invariants = cloud.fabric.check_invariants();
    assert!(invariants.is_ok(), "{kind:?}: {invariants:?}");
    assert_eq!(cloud.fabric.running_on(id), Some(name("kvm1")), "{kind:?}");
    let found = cloud.fabric.file("kvm2", kind.path());
    assert_eq!(found.is_some(), there.is_some(), "{kind:?}");
}

#[tokio::test(start_paused = true)]
async fn another_file_of_the_name_is_refused_with_both_digests() {
    for kind in KINDS {
        for way in [live(), cold()] {
            let (cloud, id) = cloud(kind, "these bytes", Some("other bytes")).await;
            let planned = dry_run(&cloud, id, &way).await;
            let m = migrated(&cloud, id, &way).await;
            assert_eq!(m.status, S::Failed, "{kind:?}: {m:#?}");
            let checks = refusal(&m);
            assert_eq!(planned, checks, "{kind:?}: a dry run says the same");
            let [failure] = &checks[..] else {
                panic!("{kind:?}: one reason: {checks:?}");
            };
            assert_eq!(failure.code, CheckCode::FileContent);
            let words = &failure.message;
            let named = [kind.path(), "SHA-256", "on kvm1", "on kvm2"];
            assert!(named.iter().all(|part| words.contains(part)), "{words}");
            assert_unharmed(&cloud, id, kind, Some("other bytes"));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn another_length_is_told_without_reading() {
    for kind in KINDS {
        let long = "x".repeat(5000);
        let (cloud, id) = cloud(kind, "short", Some(&long)).await;
        let unwanted = HypervisorError::Bug("nothing was to be read".into());
        let refuse = Effect::Refuse(unwanted);
        cloud.fabric.on_call("kvm2", Call::Digests, 1, refuse);
        let checks = refusal(&migrated(&cloud, id, &live()).await);
        assert!(
            checks[0].message.contains("5000 bytes on kvm2"),
            "{checks:?}"
        );
        assert_unharmed(&cloud, id, kind, Some(&long));
    }
}

#[tokio::test(start_paused = true)]
async fn equal_content_moves() {
    for kind in KINDS {
        for way in [live(), cold()] {
            let (cloud, id) = cloud(kind, "these bytes", Some("these bytes")).await;
            assert_eq!(dry_run(&cloud, id, &way).await, [], "{kind:?}");
            let m = migrated(&cloud, id, &way).await;
            let good = matches!(m.status, S::Completed | S::Finished);
            assert!(good, "{kind:?}: {m:#?}");
            assert_eq!(cloud.fabric.running_on(id), Some(name("kvm2")), "{kind:?}");
            let invariants = cloud.fabric.check_invariants();
            assert!(invariants.is_ok(), "{kind:?}: {invariants:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_missing_is_refused_or_brought_along() {
    for kind in KINDS {
        for way in [live(), cold()] {
            let (cloud, id) = cloud(kind, "these bytes", None).await;
            let m = migrated(&cloud, id, &way).await;
            if kind == Kind::Base && way == cold() {
                assert_eq!(m.status, S::Finished, "{m:#?}");
                continue;
            }
            let code = match kind {
                Kind::Base | Kind::BaseOfShared => CheckCode::BackingImage,
                Kind::Iso => CheckCode::DiskNotCopyable,
                Kind::Kernel => CheckCode::FileContent,
            };
            let codes: Vec<_> = refusal(&m).iter().map(|f| f.code).collect();
            assert_eq!(codes, [code], "{kind:?}");
            assert_unharmed(&cloud, id, kind, None);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_read_is_refused() {
    for kind in KINDS {
        let (cloud, id) = cloud(kind, "these bytes", Some("these bytes")).await;
        cloud.fabric.set_readable("kvm2", kind.path(), false);
        let checks = refusal(&migrated(&cloud, id, &live()).await);
        assert!(
            checks[0].message.contains("Permission denied"),
            "{checks:?}"
        );
        assert_unharmed(&cloud, id, kind, Some("these bytes"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_migration_waits_while_long_files_are_read_and_a_dry_run_says_so() {
    let mut cloud = Cloud::start(12).await;
    let slow = NodeSpec {
        digest_takes_asks: 100,
        ..NodeSpec::default()
    };
    cloud.add_node("kvm3", slow).await;
    share(&cloud.fabric, &["kvm1", "kvm3"]);
    for node in ["kvm1", "kvm3"] {
        put(&cloud.fabric, node, BASE, "these bytes");
    }
    let id = cloud.fabric.add_guest("kvm1", Kind::Base.guest());
    cloud.adopted(id).await;
    let mut ask = MigrateInstance::new(id.to_string(), Some(name("kvm3")), &live());
    ask.dry_run = true;
    let planned: MigrateAnswer = cloud
        .call(method::MIGRATE_INSTANCE, &ask)
        .await
        .expect("it is answered in time");
    let MigrateAnswer::Plan { plan } = planned else {
        panic!("a plan was asked for");
    };
    assert!(
        plan.failures[0].message.contains("not known yet"),
        "{plan:?}"
    );
    let m = cloud
        .migrate(id, Some("kvm3"), LiveOptions::default())
        .await;
    let m = cloud.end(m.expect("admitted").uuid).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
    cloud.check(&m).await;
}

#[tokio::test(start_paused = true)]
async fn an_address_that_the_destination_lacks_is_refused_before() {
    for way in [live(), cold()] {
        let cloud = Cloud::start(13).await;
        let own = cloud.fabric.endpoint("kvm1").address;
        let guest = GuestBuilder::new("web").bound_to(&own);
        let id = cloud.fabric.add_guest("kvm1", guest);
        cloud.adopted(id).await;
        let planned = dry_run(&cloud, id, &way).await;
        let codes: Vec<_> = planned.iter().map(|f| f.code).collect();
        assert_eq!(codes, [CheckCode::BoundAddress], "{planned:?}");
        assert!(planned[0].message.contains(&own), "{planned:?}");
        assert_eq!(refusal(&migrated(&cloud, id, &way).await), planned);
        assert_eq!(cloud.fabric.running_on(id), Some(name("kvm1")));
    }
}

#[tokio::test(start_paused = true)]
async fn no_reason_is_named_twice() {
    let cloud = Cloud::start(14).await;
    let guest = GuestBuilder::new("web").state(drover_model::guest::PowerState::Shutdown);
    let id = cloud.fabric.add_guest("kvm1", guest);
    cloud.adopted(id).await;
    let planned = dry_run(&cloud, id, &live()).await;
    let codes: Vec<_> = planned.iter().map(|f| f.code).collect();
    assert_eq!(codes, [CheckCode::InstanceState], "{planned:?}");
}

// ---- of a dead node ------------------------------------------------------------------

/// Its node dies, and it is to start on the other.
async fn evacuated_from_kvm1(cloud: &mut Cloud, id: InstanceId) -> Migration {
    cloud.fabric.power_off("kvm1");
    cloud.kill_agent("kvm1");
    tokio::time::sleep(Duration::from_secs(60)).await;
    let m = evacuation_deaths::begin(cloud, id, &["kvm2"]).await;
    cloud.end(m.uuid).await
}

/// The guest's node has died, with that file on the node where it is to start.
async fn evacuated(kind: Kind, there: Option<&str>) -> (Cloud, InstanceId, Migration) {
    let (mut cloud, id) = cloud(kind, "these bytes", there).await;
    eventually("its definition is kept", async || {
        let kept = cloud.store.kept_definition(id).await.expect("readable")?;
        (!kept.kept.digest.is_empty()).then_some(())
    })
    .await;
    let m = evacuated_from_kvm1(&mut cloud, id).await;
    (cloud, id, m)
}

#[tokio::test(start_paused = true)]
async fn a_dead_nodes_guest_is_not_started_where_its_address_is_not() {
    let mut cloud = Cloud::start(15).await;
    let own = cloud.fabric.endpoint("kvm1").address;
    let guest = GuestBuilder::new("web").bound_to(&own);
    let id = cloud.fabric.add_guest("kvm1", guest);
    cloud.adopted(id).await;
    eventually("its definition is kept", async || {
        cloud.store.kept_definition(id).await.expect("readable")
    })
    .await;
    let m = evacuated_from_kvm1(&mut cloud, id).await;
    let bound = |f: &CheckFailure| f.code == CheckCode::BoundAddress;
    assert!(refusal(&m).iter().any(bound), "{m:#?}");
    assert_eq!(cloud.fabric.running_on(id), None);
}

#[tokio::test(start_paused = true)]
async fn a_dead_nodes_guest_starts_on_the_bytes_that_it_had_or_not_at_all() {
    for kind in [Kind::BaseOfShared, Kind::Iso, Kind::Kernel] {
        let (cloud, id, m) = evacuated(kind, Some("these bytes")).await;
        assert_eq!(m.status, S::Completed, "{kind:?}: {m:#?}");
        assert_eq!(cloud.fabric.running_on(id), Some(name("kvm2")));
        let invariants = cloud.fabric.check_invariants();
        assert!(invariants.is_ok(), "{kind:?}: {invariants:?}");
        for there in [Some("other bytes"), None] {
            let (cloud, id, m) = evacuated(kind, there).await;
            assert_eq!(m.status, S::Failed, "{kind:?}, {there:?}: {m:#?}");
            assert_eq!(cloud.fabric.running_on(id), None);
            let words = m.end_reason.expect("it has a reason").to_string();
            assert!(words.contains(kind.path()), "{words}");
        }
    }
}
