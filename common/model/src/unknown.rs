//! What a newer Drover wrote and this one does not know: kept as it came, so
//! that a row that goes through an older process loses nothing, and refused in
//! words by whoever would have to act on it.
//!
//! Fields are [`Unknown`], a value of an enumeration is a [`Word`] in its variant
//! `Other`. Enumerations that decide what is done next (a migration's status, its
//! kind, its ending) have no such variant: a row of which they cannot be read is left
//! alone as a whole.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use serde_json::{Map, Value};

/// Fields of a wish that this version does not know. To be flattened into a type
/// whose unknown fields must not be passed over; what is empty is not sent.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
// Boxed: it stands in many types, and is empty in nearly all.
pub struct Unknown(Box<Map<String, Value>>);

impl Unknown {
    /// Whether nothing is unknown.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One line for each field, for whoever would have to act on it.
    pub fn problems(&self) -> Vec<String> {
        let version = env!("CARGO_PKG_VERSION");
        let line = |name: &String| {
            format!("'{name}' is not known to this Drover ({version}): leave it out, or upgrade")
        };
        self.0.keys().map(line).collect()
    }
}

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = Value::Object(self.0.as_ref().clone()).to_string();
        // Whoever wrote it may have had much to say.
        f.write_str(
            text.get(..text.floor_char_boundary(300))
                .unwrap_or_default(),
        )
    }
}

/// A value of an enumeration, as it came. Short, so that it is copied as others are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Word {
    bytes: [u8; Self::LONGEST],
    length: u8,
}

impl Word {
    /// Longest that is kept, bytes.
    const LONGEST: usize = 40;

    /// A text as a word; none if it is too long.
    pub fn new(text: &str) -> Option<Self> {
        let mut bytes = [0; Self::LONGEST];
        bytes
            .get_mut(..text.len())?
            .copy_from_slice(text.as_bytes());
        let length = u8::try_from(text.len()).ok()?;
        Some(Self { bytes, length })
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        let text = self
            .bytes
            .get(..usize::from(self.length))
            .unwrap_or_default();
        // It was made of one.
        std::str::from_utf8(text).unwrap_or_default()
    }
}

impl fmt::Debug for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl Serialize for Word {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Word {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        Self::new(&text).ok_or_else(|| D::Error::custom("a word is too long"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::Word;
    use crate::migration::{LiveOptions, ProjectTransfer, Way};

    #[test]
    fn an_option_of_a_newer_version_is_kept_named_and_sent_on() {
        let newer = json!({"post_copy": true, "colour": "blue"});
        let options: LiveOptions = serde_json::from_value(newer).unwrap();
        assert!(options.post_copy);
        let problems = options.problems();
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].starts_with("'colour' is not known to this Drover"));
        let back = serde_json::to_value(&options).unwrap();
        assert_eq!(back["colour"], "blue");
    }

    #[test]
    fn what_is_known_leaves_no_trace_of_the_unknown() {
        let options = LiveOptions::default();
        assert!(options.problems().is_empty());
        let sent = serde_json::to_value(&options).unwrap();
        assert_eq!(
            serde_json::from_value::<LiveOptions>(sent).unwrap(),
            options
        );
    }

    #[test]
    fn a_value_of_a_newer_version_is_kept_as_it_came() {
        use crate::{check::CheckCode, guest::PowerState, migration::Phase};
        fn kept<T>(text: &str) -> T
        where
            T: serde::Serialize + serde::de::DeserializeOwned,
        {
            let value: T = serde_json::from_value(json!(text)).unwrap();
            assert_eq!(serde_json::to_value(&value).unwrap(), json!(text));
            value
        }
        let state: PowerState = kept("dozing");
        assert!(state.is_active(), "unknown is not off");
        assert_eq!(kept::<PowerState>("paused"), PowerState::Paused);
        let phase: Phase = kept("mirroring");
        assert_eq!(
            (phase.as_str(), phase.max(Phase::Disk)),
            ("mirroring", Phase::Disk)
        );
        assert_eq!(kept::<CheckCode>("odd_moon").as_str(), "odd_moon");
        assert_eq!(kept::<CheckCode>("quota"), CheckCode::Quota);
        assert_eq!(Word::new("é").unwrap().as_str(), "é");
        assert_eq!(Word::new(&"x".repeat(41)), None);
    }

    #[test]
    fn a_record_of_a_newer_version_loses_nothing() {
        use crate::migration::{EndReason, Migration};
        let instance = crate::ids::InstanceId::NONE;
        let way = Way::Live(LiveOptions::default());
        let m = Migration::new(instance, "kvm1".parse().unwrap(), way, 1);
        let mut newer = serde_json::to_value(&m).unwrap();
        newer["shade"] = json!({"of": "blue"});
        newer["end_reason"] = json!({"kind": "bored", "of": "waiting"});
        newer["options"]["colour"] = json!("blue");
        let read: Migration = serde_json::from_value(newer.clone()).unwrap();
        assert_eq!(read.way.migration_type(), m.way.migration_type());
        assert!(matches!(read.end_reason, Some(EndReason::Other(_))));
        assert_eq!(serde_json::to_value(&read).unwrap(), newer);
        for unreadable in ["status", "migration_type"] {
            let mut newer = newer.clone();
            newer[unreadable] = json!("novel");
            serde_json::from_value::<Migration>(newer).unwrap_err();
        }
    }

    #[test]
    fn it_is_found_below_another_flattened_type() {
        let newer = json!({"project": "beta", "mode": "cold", "colour": "blue"});
        let transfer: ProjectTransfer = serde_json::from_value(newer).unwrap();
        let problems = Way::Transfer(transfer).problems();
        assert_eq!(problems.len(), 1, "{problems:?}");
    }
}
