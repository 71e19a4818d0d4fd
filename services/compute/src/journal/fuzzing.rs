//! What holds of the journal, whatever became of its files: the body of a fuzz target
//! (`tests/fuzz`). A property that does not hold is a panic.

use drover_model::ids::MigrationId;
use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;

use super::{
    MarksRecord, Record, SeenRecord, Unread,
    shelf::{decode, encode},
};

/// The file of a migration: a text is read as what it says, and so again once it
/// was written; one that was written and then damaged, as `data` say, is not read as
/// another.
pub fn journal(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    match kind % 3 {
        0 => file::<Record>(data),
        1 => file::<SeenRecord>(data),
        _ => file::<MarksRecord>(data),
    }
}

/// Bytes that are changed in one file.
const CHANGES: usize = 8;

fn file<T: Serialize + DeserializeOwned + Clone + PartialEq + std::fmt::Debug>(data: &[u8]) {
    // What is damaged, and where, stands behind the text.
    let at = data.iter().rposition(|byte| *byte == 0xff);
    let (text, damage) = match at {
        Some(at) => (&data[..at], &data[at + 1..]),
        None => (data, &[][..]),
    };
    let migration = MigrationId(Uuid::from_u128(7));
    let content: T = match decode(migration, text) {
        Ok(content) => content,
        Err(Unread::NotNow(why) | Unread::Corrupt(why)) => return assert!(!why.is_empty()),
    };
    let written = encode(migration, content.clone());
    let written = written.expect("what was read can be written");
    assert_eq!(decode::<T>(migration, &written).as_ref(), Ok(&content));
    let another = MigrationId(Uuid::from_u128(8));
    assert!(decode::<T>(another, &written).is_err(), "another's file");
    if damage.is_empty() {
        return;
    }
    let mut damaged = written.clone();
    for change in damage.chunks_exact(3).take(CHANGES) {
        let at = usize::from(change[0]) << 8 | usize::from(change[1]);
        let at = at % damaged.len();
        damaged[at] = change[2];
    }
    // One that has lost its sum was written by an agent that knew of none.
    let has_sum = damaged.starts_with(b"{\n  \"version\": 1,\n  \"sum\": \"");
    if let Ok(read) = decode::<T>(migration, &damaged) {
        assert!(!has_sum || read == content, "read as another");
    }
}
