//! Files of a journal: whole, in order, and read back.

use std::os::unix::fs::PermissionsExt;

use drover_model::{api::fault::Fault, error::ErrorClass};
use uuid::Uuid;

use super::{
    super::{DestinationRecord, Journal, Record},
    *,
};

fn instance(n: u128) -> InstanceId {
    InstanceId(Uuid::from_u128(n))
}

fn record_of(n: u128) -> Record {
    Record::Destination(DestinationRecord {
        inodes: Default::default(),
        instance: instance(n),
        disks: Vec::new(),
        prepared: false,
        ran_here: false,
    })
}

fn open(dir: &tempfile::TempDir) -> Shelf<Record> {
    open_on(dir, &StateDisk::default())
}

fn open_on(dir: &tempfile::TempDir, disk: &StateDisk) -> Shelf<Record> {
    Journal::open(dir.path(), disk).unwrap().migrations
}

fn names(shelf: &Shelf<Record>) -> Vec<String> {
    let listing = fs::read_dir(&shelf.directory).unwrap();
    let name = |e: io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<String> = listing.map(name).collect();
    names.sort();
    names
}

#[tokio::test]
async fn what_was_stored_is_there_after_opening_again() {
    let dir = tempfile::tempdir().unwrap();
    let id = MigrationId::generate();
    open(&dir).store(id, &record_of(7)).await.unwrap();
    let again = open(&dir);
    assert_eq!(again.load().unwrap().read, vec![(id, record_of(7))]);
    assert!(again.summary(id).is_some());
    again.remove(id).await.unwrap();
    again.remove(id).await.unwrap();
    assert!(again.summary(id).is_none());
    assert!(open(&dir).load().unwrap().read.is_empty());
}

#[tokio::test]
async fn what_is_damaged_is_set_aside_and_the_rest_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = open(&dir);
    let good = MigrationId::generate();
    shelf.store(good, &record_of(7)).await.unwrap();
    let text = fs::read_to_string(shelf.path(good)).unwrap();
    let cut = MigrationId::generate();
    fs::write(shelf.path(cut), &text[..text.len() / 2]).unwrap();
    let empty = MigrationId::generate();
    fs::write(shelf.path(empty), "").unwrap();
    fs::write(shelf.directory.join("no-uuid.json"), &text).unwrap();
    fs::write(shelf.directory.join("half.new"), "{").unwrap();

    let loaded = open(&dir).load().unwrap();
    assert_eq!(loaded.read, vec![(good, record_of(7))]);
    assert_eq!(loaded.unread, Vec::new());
    let corrupt: std::collections::HashSet<_> = loaded.corrupt.into_iter().collect();
    assert_eq!(corrupt, [cut, empty].into());
    let names = names(&shelf);
    assert_eq!(names.len(), 4, "{names:?}");
    assert_eq!(names.iter().filter(|n| n.ends_with(".corrupt")).count(), 3);
}

/// Whatever falls over in a file, it is not read as another: not another guest, not
/// another disk.
#[tokio::test]
async fn a_file_that_was_changed_by_nobody_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = open(&dir);
    let id = MigrationId::generate();
    shelf.store(id, &record_of(7)).await.unwrap();
    let text = fs::read(shelf.path(id)).unwrap();
    for at in 0..text.len() {
        for bit in 0..8 {
            let mut damaged = text.clone();
            damaged[at] ^= 1 << bit;
            let read = decode::<Record>(id, &damaged);
            assert!(
                read.as_ref().is_err() || read == Ok(record_of(7)),
                "{}",
                String::from_utf8_lossy(&damaged)
            );
        }
    }
    let another = MigrationId::generate();
    fs::rename(shelf.path(id), shelf.path(another)).unwrap();
    assert_eq!(open(&dir).load().unwrap().corrupt, vec![another]);
}

#[tokio::test]
async fn a_file_of_an_agent_that_wrote_no_sums_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = open(&dir);
    let id = MigrationId::generate();
    let said = serde_json::to_value(record_of(7)).unwrap();
    let mut old = serde_json::json!({"version": 1});
    old.as_object_mut()
        .unwrap()
        .extend(said.as_object().unwrap().clone());
    fs::write(shelf.path(id), serde_json::to_vec_pretty(&old).unwrap()).unwrap();
    assert_eq!(shelf.load().unwrap().read, vec![(id, record_of(7))]);
}

#[tokio::test]
async fn what_another_agent_would_understand_stays_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = open(&dir);
    let id = MigrationId::generate();
    shelf.store(id, &record_of(7)).await.unwrap();
    let text = fs::read_to_string(shelf.path(id)).unwrap();
    let longer = format!("{text}{}", " ".repeat(200));
    for (what, changed, max_bytes) in [
        (
            "a newer version",
            text.replace("\"version\": 1", "\"version\": 2"),
            MAX_BYTES,
        ),
        (
            "a newer role",
            text.replace("\"destination\"", "\"witness\""),
            MAX_BYTES,
        ),
        (
            "a field that is not a yes or no",
            text.replace("false", "\"perhaps\""),
            MAX_BYTES,
        ),
        ("too long a text", longer, text.len() as u64),
    ] {
        let mut changed = changed.into_bytes();
        let sealed = seal(id, &mut changed);
        assert!(sealed.is_ok() || what == "a newer version");
        fs::write(shelf.path(id), &changed).unwrap();
        let mut again = open(&dir);
        again.max_bytes = max_bytes;
        let loaded = again.load().unwrap();
        assert_eq!(loaded.read, Vec::new(), "{what}");
        assert_eq!(loaded.corrupt, Vec::new(), "{what}");
        let [unread] = loaded.unread.as_slice() else {
            panic!("{what}: {:?}", loaded.unread)
        };
        assert_eq!(unread.migration, id, "{what}");
        assert!(unread.why.contains(&id.to_string()), "{}", unread.why);
        if max_bytes == MAX_BYTES {
            assert_eq!(unread.instance, Some(instance(7)), "{what}");
        }
        assert_eq!(names(&again), vec![format!("{id}.json")], "{what}");
        assert_eq!(fs::read(again.path(id)).unwrap(), changed);
    }
}

#[tokio::test]
async fn a_file_that_cannot_be_opened_now_is_not_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = open(&dir);
    let id = MigrationId::generate();
    // A directory of that name opens, and cannot be read: an I/O error also for root.
    fs::create_dir(shelf.path(id)).unwrap();
    let loaded = shelf.load().unwrap();
    assert_eq!((loaded.read.len(), loaded.corrupt.len()), (0, 0));
    assert_eq!(loaded.unread[0].migration, id);
    assert!(matches!(shelf.read(id).await, Err(Unread::NotNow(_))));
}

#[tokio::test]
async fn more_than_is_read_back_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let id = MigrationId::generate();
    let mut shelf = open(&dir);
    shelf.store(id, &record_of(7)).await.unwrap();
    shelf.max_bytes = fs::metadata(shelf.path(id)).unwrap().len();
    shelf.store(id, &record_of(8)).await.unwrap();
    assert_eq!(shelf.read(id).await, Ok(Some(record_of(8))));
    shelf.max_bytes -= 1;
    let fault = Fault::from(shelf.store(id, &record_of(9)).await.unwrap_err());
    assert_eq!(
        fault.class,
        ErrorClass::Refused,
        "asking again does not help"
    );
    assert!(fault.message.contains("no more than"), "{fault}");
    shelf.max_bytes += 1;
    assert_eq!(shelf.read(id).await, Ok(Some(record_of(8))), "as before");
    assert_eq!(names(&shelf).len(), 1, "and nothing beside it");
}

#[tokio::test]
async fn a_full_disk_is_a_retryable_fault_and_leaves_what_was_there() {
    let (dir, disk) = (tempfile::tempdir().unwrap(), StateDisk::default());
    let shelf = open_on(&dir, &disk);
    let id = MigrationId::generate();
    shelf.store(id, &record_of(7)).await.unwrap();
    disk.fill(true);
    let fault = Fault::from(shelf.store(id, &record_of(8)).await.unwrap_err());
    assert_eq!(fault.class, ErrorClass::Retryable);
    assert!(fault.message.contains("migrations/"), "{fault}");
    assert_eq!(shelf.read(id).await, Ok(Some(record_of(7))));
    assert_eq!(names(&shelf).len(), 1);
    disk.fill(false);
    shelf.store(id, &record_of(8)).await.unwrap();
    assert_eq!(shelf.read(id).await, Ok(Some(record_of(8))));
}

#[tokio::test]
async fn files_are_for_the_agents_user_alone() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = open(&dir);
    let id = MigrationId::generate();
    shelf.store(id, &record_of(7)).await.unwrap();
    let mode = fs::metadata(shelf.path(id)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn what_was_asked_for_before_a_removal_does_not_come_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = open(&dir);
    let id = MigrationId::generate();
    shelf.store(id, &record_of(1)).await.unwrap();
    // Asked for in this order, done in the other.
    let late = shelf.store(id, &record_of(2));
    shelf.remove(id).await.unwrap();
    late.await.unwrap_err();
    assert_eq!(shelf.read(id).await, Ok(None), "it did not come back");
    assert!(shelf.summary(id).is_none());
    shelf.store(id, &record_of(3)).await.unwrap();
    assert_eq!(shelf.read(id).await, Ok(Some(record_of(3))));
    assert!(shelf.lock().writers.is_empty(), "nothing is left of turns");
}

/// Many writers of a few files, in every order that threads make of it: what is on
/// disk is always whole, and in the end what was asked for last.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_writers_at_once_the_last_to_ask_wins() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = open(&dir);
    let ids: Vec<MigrationId> = (0..4).map(|_| MigrationId::generate()).collect();
    let mut random = fastrand::Rng::with_seed(7);
    for round in 0..40 {
        let mut last: HashMap<MigrationId, Option<u128>> = HashMap::new();
        let mut tasks = tokio::task::JoinSet::new();
        for n in 1..24 {
            let id = ids[random.usize(..ids.len())];
            match random.u8(..4) {
                0 => {
                    last.insert(id, None);
                    tasks.spawn(shelf.remove(id));
                }
                _ => {
                    last.insert(id, Some(n));
                    tasks.spawn(shelf.store(id, &record_of(n)));
                }
            }
            let seen = shelf.read_file(id);
            assert!(seen.is_ok(), "round {round}: {seen:?}");
        }
        if random.bool() {
            // The monitor is dropped: what it began goes on in its thread.
            tasks.abort_all();
            let id = ids[0];
            last.insert(id, None);
            shelf.remove(id).await.unwrap();
            while tasks.join_next().await.is_some() {}
            assert_eq!(shelf.read(id).await, Ok(None), "round {round}");
            continue;
        }
        while tasks.join_next().await.is_some() {}
        for (id, n) in last {
            let there = shelf.read(id).await;
            assert_eq!(there, Ok(n.map(record_of)), "round {round}");
        }
    }
}

#[tokio::test]
async fn damaged_files_do_not_gather_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = open(&dir);
    for _ in 0..100 {
        fs::write(shelf.path(MigrationId::generate()), "{").unwrap();
        shelf.load().unwrap();
    }
    assert!(names(&shelf).len() <= 32, "{}", names(&shelf).len());
}
