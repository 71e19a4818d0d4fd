//! Versions of Drover's RPC: which of them two processes speak with each other.
//!
//! Each says from which version to which it speaks; a conductor asks an agent in the
//! newest that both know, Nova's way of pinning. Where there is none, it asks nothing,
//! and says so: the agent lives, its heartbeats count, and its node waits for an
//! upgrade. Agents and clients, who do not know which of several conductors will read
//! what they send, send in the oldest version that has the method.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use serde_json::Value;

/// A version: of two with one major number, the higher minor one only adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RpcVersion {
    /// What it begins anew with.
    pub major: u32,
    /// What it adds to.
    pub minor: u32,
}

impl RpcVersion {
    /// A version by its numbers.
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }
}

impl fmt::Display for RpcVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl FromStr for RpcVersion {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('.');
        let parsed = numbers.and_then(|(major, minor)| {
            let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
            Some(Self { major, minor })
        });
        parsed.ok_or_else(|| format!("'{}' is no version", text.escape_debug()))
    }
}

impl Serialize for RpcVersion {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RpcVersion {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

/// From the oldest version that is spoken to the newest; `["1.0", "1.2"]` in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(into = "[RpcVersion; 2]")]
pub struct VersionRange {
    /// The oldest.
    pub min: RpcVersion,
    /// The newest.
    pub max: RpcVersion,
}

impl VersionRange {
    /// From one version to another.
    pub const fn new(min: RpcVersion, max: RpcVersion) -> Self {
        Self { min, max }
    }

    /// The newest version that both know.
    pub fn common(self, other: Self) -> Option<RpcVersion> {
        let newest = self.max.min(other.max);
        (newest >= self.min.max(other.min)).then_some(newest)
    }
}

impl From<VersionRange> for [RpcVersion; 2] {
    fn from(range: VersionRange) -> Self {
        [range.min, range.max]
    }
}

impl<'de> Deserialize<'de> for VersionRange {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let [min, max] = <[RpcVersion; 2]>::deserialize(from)?;
        match min <= max {
            true => Ok(Self { min, max }),
            false => Err(D::Error::custom(format!("{min} is newer than {max}"))),
        }
    }
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.min == self.max {
            true => write!(f, "{}", self.min),
            false => write!(f, "{} to {}", self.min, self.max),
        }
    }
}

/// What a peer says that it speaks. A field of it costs the message nothing, whatever
/// it holds: a sign of life counts even if its sender's versions make no sense.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Spoken {
    /// Nothing: it is older than the question.
    #[default]
    Unsaid,
    /// From one version to another.
    Range(VersionRange),
    /// Something that is no range; the beginning of its text.
    Garbled(String),
}

/// Longest text of a garbled range that is kept, characters.
const LONGEST_GARBLED: usize = 60;

impl Spoken {
    /// Whether it says nothing.
    pub fn is_unsaid(&self) -> bool {
        *self == Self::Unsaid
    }

    /// The versions it speaks; none if that cannot be told.
    pub fn range(&self) -> Option<VersionRange> {
        match self {
            Self::Unsaid => Some(VersionRange::new(crate::api::OLDEST, crate::api::OLDEST)),
            Self::Range(range) => Some(*range),
            Self::Garbled(_) => None,
        }
    }
}

impl From<VersionRange> for Spoken {
    fn from(range: VersionRange) -> Self {
        Self::Range(range)
    }
}

impl fmt::Display for Spoken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsaid => write!(f, "{}", crate::api::OLDEST),
            Self::Range(range) => write!(f, "{range}"),
            Self::Garbled(text) => write!(f, "what is no range of versions ({text})"),
        }
    }
}

impl Serialize for Spoken {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Unsaid => to.serialize_none(),
            Self::Range(range) => range.serialize(to),
            Self::Garbled(text) => to.serialize_str(text),
        }
    }
}

impl<'de> Deserialize<'de> for Spoken {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(from)?;
        if value.is_null() {
            return Ok(Self::Unsaid);
        }
        let range = VersionRange::deserialize(&value);
        let garbled = |_| {
            let text = match value {
                Value::String(text) => text,
                other => other.to_string(),
            };
            Self::Garbled(text.chars().take(LONGEST_GARBLED).collect())
        };
        Ok(range.map_or_else(garbled, Self::Range))
    }
}

/// One side of a conversation.
#[derive(Debug, Clone, Copy)]
pub struct Side<'a> {
    /// What it is, in words: `the agent of kvm1`, `this conductor`.
    pub who: &'a str,
    /// What stands for it where somebody is told to upgrade it.
    pub program: &'a str,
    /// Its version of Drover.
    pub version: &'a str,
    /// What it speaks.
    pub speaks: &'a Spoken,
}

/// The version in which two speak with each other.
///
/// # Errors
/// There is none; in words, with what to do.
pub fn negotiate(one: Side<'_>, other: Side<'_>) -> Result<RpcVersion, Mismatch> {
    let common = one.speaks.range().zip(other.speaks.range());
    let common = common.and_then(|(one, other)| one.common(other));
    common.ok_or_else(|| Mismatch {
        message: format!(
            "{} and {}: no version is common to both",
            said(one),
            said(other)
        ),
        remedy: remedy(one, other),
    })
}

/// Two who have no version in common, or do not understand each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}; {remedy}")]
pub struct Mismatch {
    /// What was found, with both versions.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
}

/// A side with its versions.
pub fn said(side: Side<'_>) -> String {
    let version = match side.version {
        "" => "of an unknown version",
        version => version,
    };
    format!("{} (Drover {version}) speaks RPC {}", side.who, side.speaks)
}

/// Which of two to upgrade: the one that lags behind, as far as that can be told.
pub fn remedy(one: Side<'_>, other: Side<'_>) -> String {
    let newest = |side: Side<'_>| side.speaks.range().map(|range| range.max);
    let older = match (newest(one), newest(other)) {
        (Some(a), Some(b)) if a < b => one,
        (Some(a), Some(b)) if a > b => other,
        (None, Some(_)) => one,
        (Some(_), None) => other,
        _ => return "bring both to one version of Drover".to_owned(),
    };
    format!("upgrade {}", older.program)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn range(min: (u32, u32), max: (u32, u32)) -> VersionRange {
        VersionRange::new(RpcVersion::new(min.0, min.1), RpcVersion::new(max.0, max.1))
    }

    fn with(speaks: &Spoken, other: &Spoken) -> Result<RpcVersion, Mismatch> {
        let agent = Side {
            who: "the agent of kvm1",
            program: "drover-compute on kvm1",
            version: "0.2.0",
            speaks,
        };
        let conductor = Side {
            who: "this conductor",
            program: "drover-conductor",
            version: "0.1.0",
            speaks: other,
        };
        negotiate(agent, conductor)
    }

    #[test]
    fn two_speak_in_the_newest_version_that_both_know() {
        for (one, other, common) in [
            (range((1, 0), (1, 1)), range((1, 0), (1, 1)), Some((1, 1))),
            (range((1, 0), (1, 1)), range((1, 0), (1, 10)), Some((1, 1))),
            (range((1, 9), (1, 10)), range((1, 0), (1, 9)), Some((1, 9))),
            (range((1, 2), (1, 3)), range((1, 0), (1, 1)), None),
            (range((2, 0), (2, 0)), range((1, 0), (1, 9)), None),
        ] {
            let common = common.map(|(major, minor)| RpcVersion::new(major, minor));
            assert_eq!(one.common(other), common);
            assert_eq!(other.common(one), common);
        }
    }

    #[test]
    fn who_has_nothing_in_common_is_told_whom_to_upgrade() {
        let (old, new) = (range((1, 0), (1, 1)), range((1, 4), (1, 6)));
        let refused = with(&new.into(), &old.into()).unwrap_err().to_string();
        assert_eq!(
            refused,
            "the agent of kvm1 (Drover 0.2.0) speaks RPC 1.4 to 1.6 and this conductor \
             (Drover 0.1.0) speaks RPC 1.0 to 1.1: no version is common to both; \
             upgrade drover-conductor"
        );
        let refused = with(&Spoken::Unsaid, &new.into()).unwrap_err().to_string();
        assert!(
            refused.ends_with("upgrade drover-compute on kvm1"),
            "{refused}"
        );
        let garbled = Spoken::Garbled("soup".to_owned());
        let refused = with(&garbled, &new.into()).unwrap_err().to_string();
        assert!(refused.contains("(soup)"), "{refused}");
    }

    #[test]
    fn whatever_is_said_of_versions_is_taken_in() {
        let read = |value: Value| serde_json::from_value::<Spoken>(value).unwrap();
        assert_eq!(
            read(json!(["1.0", "1.2"])),
            Spoken::Range(range((1, 0), (1, 2)))
        );
        assert_eq!(read(json!(null)), Spoken::Unsaid);
        for garbage in [
            json!("1.2"),
            json!(["1.2", "1.0"]),
            json!(["x", "1.0"]),
            json!(["1.0"]),
            json!({"min": "1.0"}),
            json!(7),
            json!("x".repeat(10_000)),
            json!(["1.-1", "99999999999999999999.0"]),
        ] {
            let read = read(garbage.clone());
            assert!(
                matches!(&read, Spoken::Garbled(text) if text.len() <= 60),
                "{garbage}"
            );
            assert_eq!(read.range(), None);
        }
        let range = Spoken::from(range((1, 0), (1, 2)));
        assert_eq!(serde_json::to_value(&range).unwrap(), json!(["1.0", "1.2"]));
    }
}
