//! What the record promises of projects, their quota and offers of instances,
//! each kept in both databases.

#![allow(clippy::unwrap_used)] // all of it is test

use crate::common::{HELD, host, listed, lists_nothing, migration, postgresql_url, report, term};
use drover_model::{
    api::conductor::{ListOffers, Offer, OfferState, ProjectChange},
    error::ErrorClass,
    guest::PowerState,
    ids::{InstanceId, ProjectId},
    migration::{
        Consent, Migration, MigrationStatus, ProjectTransfer, Requester, TransferOptions, Way,
    },
    node::InstanceReport,
    project::{Limit, Location, Project, ProjectUsage, QuotaShortfall, StoragePlace},
};
use drover_store::{
    Store, StoreError,
    migrations::{Admitted, Lease},
    offers::{KeyTried, MAX_WRONG_KEYS, NewOffer, OfferKey},
};
use sqlx::{
    AnyPool, Row,
    migrate::{Migration as SchemaChange, MigrationType, Migrator},
};
use uuid::Uuid;

promises! {
    a_project_is_created_once_changed_and_found,
    a_change_that_cannot_be_leaves_the_project,
    usage_is_what_instances_say,
    a_claim_of_quota_balances,
    rival_claims_never_exceed_the_quota,
    quota_is_claimed_of_projects_that_are_there,
    during_a_transfer_reports_do_not_say_whose_it_is,
    an_offer_is_made_once_and_found,
    an_offer_is_listed_for_both_sides,
    what_has_changed_hands_is_not_offered_by_its_old_owner,
    an_offer_is_open_until_it_is_withdrawn_or_expires,
    wrong_keys_lock_an_offer,
    rival_wrong_keys_are_all_counted,
    an_offer_is_accepted_once,
    an_offer_that_was_accepted_at_once_by_many_is_taken_by_one,
    a_transfer_that_fails_leaves_the_offer_open,
    an_offer_is_void_when_the_instance_is_not_the_givers,
}

const GUEST: ProjectUsage = ProjectUsage {
    instances: 1,
    vcpus: 1,
    memory_mb: 1024,
    disk_bytes: 1 << 30,
};

fn id(text: &str) -> ProjectId {
    text.parse().unwrap()
}

/// A project that may have so many vCPUs.
fn project(name: &str, vcpus: u64) -> Project {
    let mut project = Project::new(id(name));
    project.quota.vcpus = Limit::AtMost(vcpus);
    project
}

/// Puts instance `n`, which is `demo`'s, on the record.
async fn with_instance(store: &Store, n: u128) {
    store
        .record_report(&report("kvm1", 1, vec![listed(n)]), 1000)
        .await
        .unwrap();
}

/// A transfer of an instance to `other`, by an offer if there is one.
fn transfer(n: u128, instance: u128, offer: Option<&Offer>) -> Migration {
    let consent = Consent {
        offer: offer.map(|offer| offer.id),
        offered_by: Requester::default(),
        offered_at_ms: 1,
        accepted_by: Requester::default(),
        accepted_at_ms: 2,
    };
    Migration {
        way: Way::Transfer(ProjectTransfer {
            project: id("other"),
            options: TransferOptions::default(),
        }),
        consent: Some(consent),
        created_at_ms: 2000,
        ..migration(n, instance)
    }
}

fn lease(m: &Migration) -> Lease {
    Store::first_lease(m.uuid)
}

async fn admit(store: &Store, m: &Migration) -> Admitted {
    store.admit(m, None, None, term(0, HELD)).await.unwrap()
}

async fn end(store: &Store, m: &Migration, status: MigrationStatus) {
    let ended = |m: &mut Migration| {
        m.status = status;
        true
    };
    store.update_migration(m.uuid, ended).await.unwrap();
}

/// Gives instance 7 to a project.
async fn hand_over(
    store: &Store,
    m: &Migration,
    project: &ProjectId,
    name: Option<&str>,
    now_ms: u64,
) {
    let instance = InstanceId(Uuid::from_u128(7));
    store
        .hand_over(lease(m), instance, project, name, now_ms)
        .await
        .unwrap();
}

/// Tries to offer `vm7` until the moment 10 000.
async fn try_offer(store: &Store) -> Result<(Offer, OfferKey), Offer> {
    let instance = store.find_instance("vm7").await.unwrap();
    let new = NewOffer {
        instance: &instance,
        to_project: None,
        offered_by: Requester {
            user_id: Some("giver".into()),
            ..Requester::default()
        },
        now_ms: 1000,
        expires_at_ms: 10_000,
    };
    store.create_offer(&new).await.unwrap()
}

/// Puts `vm7` on the record and offers it.
async fn offered(store: &Store) -> (Offer, OfferKey) {
    with_instance(store, 7).await;
    try_offer(store).await.unwrap()
}

async fn state(store: &Store, offer: &Offer, now_ms: u64) -> OfferState {
    let found = store.find_offer(&offer.id.to_string(), now_ms).await;
    found.unwrap().state
}

async fn a_project_is_created_once_changed_and_found(store: Store) {
    let p1 = Project {
        name: "first".into(),
        ..project("p1", 4)
    };
    assert_eq!(store.create_project(&p1).await.unwrap(), p1);
    let again = store.create_project(&project("p1", 9)).await.unwrap_err();
    assert_eq!(again.to_string(), "project 'p1' exists already");
    assert_eq!(again.class(), ErrorClass::Refused);
    for reference in ["p1", "first"] {
        assert_eq!(store.find_project(reference).await.unwrap(), p1);
    }
    let change = ProjectChange {
        enabled: Some(false),
        vcpus: Some(Limit::AtMost(5)),
        name: Some("one".into()),
        ..ProjectChange::default()
    };
    let changed = store.change_project("first", &change).await.unwrap();
    assert_eq!((changed.enabled, changed.name.as_str()), (false, "one"));
    assert_eq!(changed.quota.vcpus, Limit::AtMost(5));
    assert_eq!(store.find_project("one").await.unwrap(), changed);
    // Its old name is free, and may be another's id, which goes before names.
    let missing = store.find_project("first").await.unwrap_err();
    assert_eq!(missing.to_string(), "there is no project 'first'");
    let twin = Project {
        name: "one".into(),
        ..project("p2", 1)
    };
    store.create_project(&twin).await.unwrap();
    let twins = store.find_project("one").await;
    assert!(matches!(twins, Err(StoreError::Ambiguous(_))), "{twins:?}");
    let named = project("one", 1);
    store.create_project(&named).await.unwrap();
    assert_eq!(store.find_project("one").await.unwrap(), named);
}

async fn a_change_that_cannot_be_leaves_the_project(store: Store) {
    let p1 = project("p1", 4);
    store.create_project(&p1).await.unwrap();
    let relative = Location::Directory {
        path: "relative".into(),
    };
    let change = ProjectChange {
        enabled: Some(false),
        name: Some(String::new()),
        storage: Some(vec![StoragePlace::new(vec![], relative)]),
        ..ProjectChange::default()
    };
    let refused = store.change_project("p1", &change).await.unwrap_err();
    assert_eq!(refused.class(), ErrorClass::Refused);
    let words = refused.to_string();
    assert!(
        words.contains("; ") && words.contains("'relative'"),
        "{words}"
    );
    assert_eq!(store.find_project("p1").await.unwrap(), p1);
    let wrong = Project {
        id: id("p2"),
        ..change.applied(&p1)
    };
    let refused = store.create_project(&wrong).await;
    assert!(matches!(refused, Err(StoreError::Invalid(_))));
    let unknown = store.change_project("p2", &change).await;
    assert!(matches!(unknown, Err(StoreError::NotFound(_))));
}

async fn usage_is_what_instances_say(store: Store) {
    let off = InstanceReport {
        power_state: PowerState::Shutdown,
        vcpus: 2,
        ..listed(2)
    };
    let of_no_project = InstanceReport {
        project: " ".into(),
        ..listed(3)
    };
    let all = vec![listed(1), off, of_no_project];
    store
        .record_report(&report("kvm1", 1, all), 1000)
        .await
        .unwrap();
    store.create_project(&project("p9", 4)).await.unwrap();
    store.create_project(&project("p1", 4)).await.unwrap();
    let views = store.project_views().await.unwrap();
    let ids = views.iter().map(|v| (v.project.id.as_str(), v.created));
    assert_eq!(
        ids.collect::<Vec<_>>(),
        [("demo", false), ("p1", true), ("p9", true)],
        "by id; what cannot be a project is none"
    );
    let used = ProjectUsage {
        instances: 2,
        vcpus: 3,
        memory_mb: 2048,
        disk_bytes: 2 << 30,
    };
    assert_eq!(
        views[0].usage, used,
        "one that is off counts like one that runs"
    );
    assert_eq!(views[0].project, Project::new(id("demo")));
    assert_eq!(store.project_view("demo").await.unwrap(), views[0]);
    assert_eq!(store.project_view("p9").await.unwrap(), views[2]);
    let unknown = store.project_view("p8").await;
    assert!(matches!(unknown, Err(StoreError::NotFound(_))));
    // Missing is not gone (invariant 3).
    store
        .record_report(&report("kvm1", 2, vec![]), 1001)
        .await
        .unwrap();
    assert_eq!(store.project_view("demo").await.unwrap().usage, used);
    store
        .create_project(&Project::new(id("demo")))
        .await
        .unwrap();
    let created = store.project_view("demo").await.unwrap();
    assert_eq!((created.created, created.usage), (true, used));
}

async fn a_claim_of_quota_balances(store: Store) {
    with_instance(&store, 7).await;
    store.create_project(&project("other", 2)).await.unwrap();
    let (m, rival) = (transfer(1, 7, None), transfer(2, 8, None));
    for m in [&m, &rival] {
        admit(&store, m).await;
    }
    for _ in 0..2 {
        let claimed = store.claim_quota(lease(&m), &id("other"), GUEST).await;
        claimed.unwrap().unwrap();
    }
    let view = store.project_view("other").await.unwrap();
    assert_eq!(
        (view.usage, view.promised),
        (ProjectUsage::default(), GUEST),
        "claimed twice is claimed once"
    );
    let greedy = ProjectUsage { vcpus: 2, ..GUEST };
    let short = store.claim_quota(lease(&rival), &id("other"), greedy).await;
    let vcpus = QuotaShortfall {
        resource: "vcpus",
        would_be: 3,
        limit: 2,
    };
    assert_eq!(short.unwrap(), Err(vec![vcpus]));
    assert_eq!(store.quota_claims().await.unwrap().len(), 1);
    // Handed over: the instance's own use takes the claim's place, and another's
    // claim stays.
    let claimed = store.claim_quota(lease(&rival), &id("other"), GUEST).await;
    claimed.unwrap().unwrap();
    for _ in 0..2 {
        hand_over(&store, &m, &id("other"), Some("web"), 2000).await;
    }
    let row = store.find_instance("web").await.unwrap();
    assert_eq!((row.project.as_str(), row.changed_at_ms), ("other", 2000));
    let view = store.project_view("other").await.unwrap();
    assert_eq!((view.usage, view.promised), (GUEST, GUEST));
    let gone = store.project_view("demo").await;
    assert!(matches!(gone, Err(StoreError::NotFound(_))), "{gone:?}");
    for _ in 0..2 {
        store.release_quota(lease(&rival)).await.unwrap();
    }
    assert_eq!(store.quota_claims().await.unwrap(), []);
    hand_over(&store, &m, &id("demo"), None, 2001).await;
    assert_eq!(store.find_instance("web").await.unwrap().project, "demo");
}

async fn rival_claims_never_exceed_the_quota(store: Store) {
    store.create_project(&project("other", 2)).await.unwrap();
    let rivals = (1..=8).map(|n| {
        let store = store.clone();
        tokio::spawn(async move {
            let rival = migration(n, n);
            admit(&store, &rival).await;
            let claimed = store.claim_quota(lease(&rival), &id("other"), GUEST).await;
            claimed.unwrap().is_ok()
        })
    });
    let mut won = 0;
    for rival in rivals.collect::<Vec<_>>() {
        won += usize::from(rival.await.unwrap());
    }
    assert_eq!(won, 2);
    assert_eq!(store.quota_claims().await.unwrap().len(), 2);
}

async fn quota_is_claimed_of_projects_that_are_there(store: Store) {
    with_instance(&store, 7).await;
    let m = migration(1, 7);
    admit(&store, &m).await;
    let claimed = store.claim_quota(lease(&m), &id("demo"), GUEST).await;
    assert!(
        matches!(claimed, Err(StoreError::NotFound(_))),
        "{claimed:?}"
    );
}

async fn during_a_transfer_reports_do_not_say_whose_it_is(store: Store) {
    with_instance(&store, 7).await;
    let m = transfer(1, 7, None);
    admit(&store, &m).await;
    let handed = InstanceReport {
        project: "other".into(),
        name: "web".into(),
        vcpus: 3,
        ..listed(7)
    };
    let tell = async |sequence, seen: &InstanceReport| {
        let told = report("kvm1", sequence, vec![seen.clone()]);
        store.record_report(&told, 1000 + sequence).await.unwrap();
        store.instances(None, None).await.unwrap().remove(0)
    };
    let row = tell(2, &handed).await;
    assert_eq!((row.project.as_str(), row.name.as_str()), ("demo", "vm7"));
    assert_eq!(row.vcpus, 3, "the rest follows the report");
    hand_over(&store, &m, &id("other"), Some("web"), 1500).await;
    let row = tell(3, &listed(7)).await;
    assert_eq!((row.project.as_str(), row.name.as_str()), ("other", "web"));
    assert_eq!(row.vcpus, 1);
    end(&store, &m, MigrationStatus::Failed).await;
    let row = tell(4, &listed(7)).await;
    assert_eq!(
        (row.project.as_str(), row.name.as_str()),
        ("demo", "vm7"),
        "the hypervisor is the truth (invariant 2)"
    );
    // A move between nodes says nothing of owners.
    admit(&store, &migration(2, 7)).await;
    assert_eq!(tell(5, &handed).await.project, "other");
}

async fn an_offer_is_made_once_and_found(store: Store) {
    let (offer, _) = offered(&store).await;
    assert_eq!(offer.state, OfferState::Open);
    assert_eq!(
        (offer.instance_name.as_str(), offer.from_project.as_str()),
        ("vm7", "demo")
    );
    assert_eq!((offer.created_at_ms, offer.expires_at_ms), (1000, 10_000));
    assert_eq!(offer.offered_by.user_id.as_deref(), Some("giver"));
    let again = try_offer(&store).await;
    assert_eq!(again.unwrap_err(), offer, "there is an open one");
    let uuid = offer.id.to_string();
    for reference in [uuid.as_str(), &uuid[..4], &uuid[..20]] {
        assert_eq!(store.find_offer(reference, 1000).await.unwrap(), offer);
    }
    for wrong in ["", "%", &uuid[..3], "ffffffff"] {
        let missing = store.find_offer(wrong, 1000).await.unwrap_err();
        assert_eq!(missing.to_string(), format!("there is no offer '{wrong}'"));
    }
    store.withdraw_offer(&uuid, 1000).await.unwrap();
    let (second, _) = try_offer(&store).await.unwrap();
    assert_ne!(second.id, offer.id, "an open one is in the way, no other");
    // Both were made in the same hour and begin alike.
    let both = store.find_offer(&uuid[..4], 1000).await;
    assert!(matches!(both, Err(StoreError::Ambiguous(_))), "{both:?}");
}

async fn an_offer_is_listed_for_both_sides(store: Store) {
    with_instance(&store, 7).await;
    let instance = store.find_instance("vm7").await.unwrap();
    let mut ids = vec![];
    for now_ms in [1000, 2000] {
        let new = NewOffer {
            instance: &instance,
            to_project: Some(id("other")),
            offered_by: Requester::default(),
            now_ms,
            expires_at_ms: now_ms + 500,
        };
        let (offer, _) = store.create_offer(&new).await.unwrap().unwrap();
        assert_eq!(offer.to_project, Some(id("other")));
        ids.push(offer.id);
    }
    let list = async |project: Option<&str>, all| {
        let filter = ListOffers {
            project: project.map(str::to_owned),
            all,
        };
        let found = store.offers(&filter, 2000).await.unwrap();
        found.iter().map(|offer| offer.id).collect::<Vec<_>>()
    };
    for project in [None, Some("demo"), Some("other")] {
        assert_eq!(list(project, false).await, [ids[1]], "the first is expired");
        assert_eq!(list(project, true).await, [ids[1], ids[0]], "newest first");
    }
    assert_eq!(list(Some("third"), true).await, []);
}

async fn what_has_changed_hands_is_not_offered_by_its_old_owner(store: Store) {
    with_instance(&store, 7).await;
    let seen = store.find_instance("vm7").await.unwrap();
    let m = migration(1, 7);
    admit(&store, &m).await;
    hand_over(&store, &m, &id("other"), None, 1001).await;
    end(&store, &m, MigrationStatus::Completed).await;
    let new = NewOffer {
        instance: &seen,
        to_project: None,
        offered_by: Requester::default(),
        now_ms: 1002,
        expires_at_ms: 9000,
    };
    let late = store.create_offer(&new).await;
    assert!(matches!(late, Err(StoreError::Conflict(_))), "{late:?}");
}

async fn an_offer_is_open_until_it_is_withdrawn_or_expires(store: Store) {
    let (offer, key) = offered(&store).await;
    let uuid = offer.id.to_string();
    let tried = store.try_key(&uuid, &key.to_string(), 9999).await.unwrap();
    assert!(matches!(tried, KeyTried::Right(o) if *o == offer));
    let late = store.try_key(&uuid, &key.to_string(), 10_000).await;
    assert!(matches!(late.unwrap(), KeyTried::NotOpen(o) if o.state == OfferState::Expired));
    let m = Migration {
        created_at_ms: 10_000,
        ..transfer(1, 7, Some(&offer))
    };
    let late = admit(&store, &m).await;
    assert!(matches!(late, Admitted::OfferTaken(o) if o.state == OfferState::Expired));
    let late = store.withdraw_offer(&uuid, 10_000).await.unwrap_err();
    assert!(matches!(late, StoreError::Invalid(_)));
    assert!(late.to_string().contains("is expired"), "{late}");
    let withdrawn = store.withdraw_offer(&uuid, 2000).await.unwrap();
    assert_eq!(withdrawn.state, OfferState::Withdrawn);
    let tried = store.try_key(&uuid, &key.to_string(), 2000).await.unwrap();
    assert_eq!(tried, KeyTried::NotOpen(Box::new(withdrawn)));
    let taken = admit(&store, &transfer(1, 7, Some(&offer))).await;
    assert!(matches!(taken, Admitted::OfferTaken(o) if o.state == OfferState::Withdrawn));
    let none = store.migrations(&Default::default(), None).await.unwrap();
    assert_eq!(none, [], "nothing was admitted");
}

async fn wrong_keys_lock_an_offer(store: Store) {
    let (offer, key) = offered(&store).await;
    let uuid = offer.id.to_string();
    let other = OfferKey::generate().to_string();
    let no_key = "x".repeat(1000);
    let wrong = [&other, &no_key, "", &key.to_string()[1..], &other];
    for (i, wrong) in wrong.into_iter().enumerate() {
        let tried = store.try_key(&uuid, wrong, 2000).await.unwrap();
        let KeyTried::Wrong { offer, left } = tried else {
            panic!("{wrong} was taken: {tried:?}")
        };
        let so_far = u32::try_from(i).unwrap() + 1;
        assert_eq!((offer.wrong_keys, left), (so_far, MAX_WRONG_KEYS - so_far));
        if left == 1 {
            let right = store.try_key(&uuid, &key.to_string(), 2000).await.unwrap();
            assert!(matches!(right, KeyTried::Right(_)), "{right:?}");
        }
    }
    // Not even the right one is looked at from now on, and no more are counted.
    for text in [key.to_string(), other] {
        let tried = store.try_key(&uuid, &text, 2000).await.unwrap();
        let KeyTried::NotOpen(offer) = tried else {
            panic!("{tried:?}")
        };
        assert_eq!(offer.state, OfferState::Locked);
        assert_eq!(offer.wrong_keys, MAX_WRONG_KEYS);
    }
    let taken = admit(&store, &transfer(1, 7, Some(&offer))).await;
    assert!(matches!(taken, Admitted::OfferTaken(o) if o.state == OfferState::Locked));
}

async fn rival_wrong_keys_are_all_counted(store: Store) {
    let (offer, _) = offered(&store).await;
    let rivals = (0..8).map(|_| {
        let store = store.clone();
        let uuid = offer.id.to_string();
        tokio::spawn(async move {
            let tried = store.try_key(&uuid, "wrong", 2000).await.unwrap();
            matches!(tried, KeyTried::Wrong { .. })
        })
    });
    let mut looked_at = 0;
    for rival in rivals.collect::<Vec<_>>() {
        looked_at += u32::from(rival.await.unwrap());
    }
    assert_eq!(looked_at, MAX_WRONG_KEYS);
}

async fn an_offer_is_accepted_once(store: Store) {
    let (offer, _) = offered(&store).await;
    let m = transfer(1, 7, Some(&offer));
    let first = store
        .admit(&m, None, Some("u1"), term(0, HELD))
        .await
        .unwrap();
    let Admitted::New(kept) = first else {
        panic!("{first:?}")
    };
    let accepted = store.find_offer(&offer.id.to_string(), 2000).await.unwrap();
    assert_eq!(accepted.state, OfferState::Accepted);
    assert_eq!(accepted.migration, Some(m.uuid));
    let again = store
        .admit(&m, None, Some("u1"), term(0, HELD))
        .await
        .unwrap();
    assert_eq!(
        again,
        Admitted::Repeated(kept),
        "the same request comes again"
    );
    let second = admit(&store, &transfer(2, 7, Some(&offer))).await;
    assert_eq!(second, Admitted::OfferTaken(Box::new(accepted)));
    let withdrawn = store.withdraw_offer(&offer.id.to_string(), 2000).await;
    assert!(matches!(withdrawn, Err(StoreError::Invalid(_))));
    // Done, it stays accepted, though the instance is another's and its time over.
    hand_over(&store, &m, &id("other"), None, 2001).await;
    assert_eq!(state(&store, &offer, 2001).await, OfferState::Accepted);
    end(&store, &m, MigrationStatus::Completed).await;
    assert_eq!(state(&store, &offer, 99_000).await, OfferState::Accepted);
    let third = admit(&store, &transfer(3, 7, Some(&offer))).await;
    assert!(matches!(third, Admitted::OfferTaken(_)), "{third:?}");
}

async fn an_offer_that_was_accepted_at_once_by_many_is_taken_by_one(store: Store) {
    let (offer, _) = offered(&store).await;
    let rivals = (1..=4).map(|n| {
        let store = store.clone();
        let m = transfer(n, 7, Some(&offer));
        tokio::spawn(async move { admit(&store, &m).await })
    });
    let mut new = 0;
    for rival in rivals.collect::<Vec<_>>() {
        match rival.await.unwrap() {
            Admitted::New(_) => new += 1,
            Admitted::OfferTaken(o) => assert_eq!(o.state, OfferState::Accepted),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(new, 1);
}

async fn a_transfer_that_fails_leaves_the_offer_open(store: Store) {
    let (offer, key) = offered(&store).await;
    // One that was refused is on the record, and never took the offer.
    let refused = Migration {
        status: MigrationStatus::Failed,
        ..transfer(1, 7, Some(&offer))
    };
    assert!(matches!(admit(&store, &refused).await, Admitted::New(_)));
    assert_eq!(state(&store, &offer, 2000).await, OfferState::Open);
    // Neither did one that lost against another operation.
    let rival = migration(2, 7);
    admit(&store, &rival).await;
    let busy = admit(&store, &transfer(3, 7, Some(&offer))).await;
    assert!(matches!(busy, Admitted::Busy(m) if m.uuid == rival.uuid));
    assert_eq!(state(&store, &offer, 2000).await, OfferState::Open);
    end(&store, &rival, MigrationStatus::Completed).await;
    for (n, ended) in [
        (4, MigrationStatus::Failed),
        (5, MigrationStatus::Cancelled),
    ] {
        let m = transfer(n, 7, Some(&offer));
        assert!(matches!(admit(&store, &m).await, Admitted::New(_)));
        assert_eq!(state(&store, &offer, 2000).await, OfferState::Accepted);
        end(&store, &m, ended).await;
        let (uuid, key) = (offer.id.to_string(), key.to_string());
        let again = store.try_key(&uuid, &key, 2000).await.unwrap();
        assert!(matches!(again, KeyTried::Right(o) if o.migration == Some(m.uuid)));
    }
}

async fn an_offer_is_void_when_the_instance_is_not_the_givers(store: Store) {
    let (offer, key) = offered(&store).await;
    let told = |project: &str, sequence| {
        let seen = InstanceReport {
            project: project.into(),
            ..listed(7)
        };
        report("kvm1", sequence, vec![seen])
    };
    store.record_report(&told("third", 2), 1001).await.unwrap();
    assert_eq!(state(&store, &offer, 2000).await, OfferState::Void);
    let uuid = offer.id.to_string();
    let tried = store.try_key(&uuid, &key.to_string(), 2000).await.unwrap();
    assert!(matches!(tried, KeyTried::NotOpen(_)), "{tried:?}");
    let taken = admit(&store, &transfer(1, 7, Some(&offer))).await;
    assert!(matches!(taken, Admitted::OfferTaken(o) if o.state == OfferState::Void));
    store.record_report(&told("demo", 3), 1002).await.unwrap();
    assert_eq!(state(&store, &offer, 2000).await, OfferState::Open);
    // Gone for good.
    lists_nothing(&store, "kvm1", 4, 1003).await;
    assert_eq!(state(&store, &offer, 2000).await, OfferState::Void);
}

/// A record as the first version of its schema had it: an instance under cold
/// migration.
async fn fill_old(url: &str, cold: &Migration) {
    sqlx::any::install_default_drivers();
    let pool = AnyPool::connect(url).await.unwrap();
    let sql = sqlx::SqlStr::from_static(include_str!("../../migrations/0001_record.sql"));
    let first = SchemaChange::new(1, "record".into(), MigrationType::Simple, sql, false);
    let schema = Migrator::with_migrations(vec![first]);
    schema.run(&pool).await.unwrap();
    let mut record = serde_json::to_value(cold).unwrap();
    record.as_object_mut().unwrap().remove("consent");
    sqlx::query(
        "INSERT INTO migrations (uuid, id, instance_uuid, status, active, source_host, owner, \
         epoch, lease_until_ms, version, record) \
         VALUES ($1, 1, $2, 'accepted', 1, 'kvm1', 'ctl', 1, 100, 1, $3)",
    )
    .bind(cold.uuid.to_string())
    .bind(cold.instance_uuid.to_string())
    .bind(record.to_string())
    .execute(&pool)
    .await
    .unwrap();
    sqlx::query(
        "INSERT INTO instances (uuid, name, project_id, host, power_state, vcpus, memory_mib, \
         disk_bytes, generation, changed_at_ms) \
         VALUES ($1, 'vm7', 'demo', 'kvm1', '\"running\"', 1, 1024, 1073741824, 0, 1000)",
    )
    .bind(cold.instance_uuid.to_string())
    .execute(&pool)
    .await
    .unwrap();
    pool.close().await;
}

/// An old record is brought up to date with all that is in it.
async fn an_old_record_is_carried_over(url: &str) {
    let cold = Migration {
        way: Way::Cold(Default::default()),
        ..migration(1, 7)
    };
    fill_old(url, &cold).await;
    let store = Store::open(url).await.unwrap();
    assert_eq!(store.migration(cold.uuid).await.unwrap().way, cold.way);
    let view = store.project_view("demo").await.unwrap();
    assert_eq!((view.created, view.usage), (false, GUEST));
    let (offer, _) = try_offer(&store).await.unwrap();
    let busy = admit(&store, &transfer(2, 7, Some(&offer))).await;
    assert!(matches!(busy, Admitted::Busy(m) if m.uuid == cold.uuid));
    store
        .settle(
            lease(&cold),
            cold.instance_uuid,
            &host("kvm2"),
            None,
            None,
            1001,
        )
        .await
        .unwrap();
    end(&store, &cold, MigrationStatus::Failed).await;
    let new = admit(&store, &transfer(2, 7, Some(&offer))).await;
    assert!(matches!(new, Admitted::New(m) if m.id == 2));
    drop(store);
    let pool = AnyPool::connect(url).await.unwrap();
    let query = sqlx::query("SELECT migration_type FROM migrations ORDER BY id");
    let rows = query.fetch_all(&pool).await.unwrap();
    let types = rows.iter().map(|row| row.get::<String, _>(0));
    assert_eq!(types.collect::<Vec<_>>(), ["migration", "project-transfer"]);
}

#[tokio::test]
async fn an_old_record_in_sqlite_is_carried_over() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("conductor.sqlite");
    let url = format!("sqlite://{}?mode=rwc", path.display());
    an_old_record_is_carried_over(&url).await;
}

#[tokio::test]
async fn an_old_record_in_postgresql_is_carried_over() {
    if let Some(url) = postgresql_url().await {
        an_old_record_is_carried_over(&url).await;
    }
}
