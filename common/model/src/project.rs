//! A project: who owns instances, how much it may have, and where on each node
//! its guests live: their networks and their disks.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    guest::NicAttachment,
    ids::{HostName, ProjectId},
    unknown::Unknown,
};

/// Logical networks that one project has at the most.
pub const MOST_NETWORKS: usize = 64;
/// Node groups that one network or storage location is spelled out for at the most.
pub const MOST_PLACES: usize = 256;

/// How much there may be of something; on the wire a number, -1 for no limit,
/// as in Nova's quotas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "i64", into = "i64")]
pub enum Limit {
    /// As much as one likes.
    #[default]
    Unlimited,
    /// So much.
    AtMost(u64),
}

impl Limit {
    /// Whether so much is too much.
    pub fn is_exceeded_by(self, amount: u64) -> bool {
        matches!(self, Self::AtMost(most) if amount > most)
    }
}

impl TryFrom<i64> for Limit {
    type Error = &'static str;
    fn try_from(number: i64) -> Result<Self, Self::Error> {
        match number {
            -1 => Ok(Self::Unlimited),
            _ => u64::try_from(number)
                .map(Self::AtMost)
                .map_err(|_| "a limit is 0 or more, or -1 for none"),
        }
    }
}

impl From<Limit> for i64 {
    fn from(limit: Limit) -> Self {
        match limit {
            Limit::Unlimited => -1,
            Limit::AtMost(most) => Self::try_from(most).unwrap_or(Self::MAX),
        }
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unlimited => f.write_str("unlimited"),
            Self::AtMost(most) => write!(f, "{most}"),
        }
    }
}

/// How much a project may have. A guest that is off counts like one that runs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Quota {
    /// Instances.
    pub instances: Limit,
    /// vCPUs of all of them.
    pub vcpus: Limit,
    /// Memory of all of them, MB in Nova's sense (MiB).
    pub memory_mb: Limit,
    /// Disks of all of them as the guests see them, GB in Nova's sense (GiB).
    pub disk_gb: Limit,
    /// What a newer version says of it.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// How much a project has, and is about to get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ProjectUsage {
    /// Instances.
    pub instances: u64,
    /// vCPUs.
    pub vcpus: u64,
    /// Memory, MB in Nova's sense (MiB).
    pub memory_mb: u64,
    /// Disks, bytes.
    pub disk_bytes: u64,
}

impl ProjectUsage {
    /// With something more.
    #[must_use]
    pub fn plus(self, more: Self) -> Self {
        Self {
            instances: self.instances.saturating_add(more.instances),
            vcpus: self.vcpus.saturating_add(more.vcpus),
            memory_mb: self.memory_mb.saturating_add(more.memory_mb),
            disk_bytes: self.disk_bytes.saturating_add(more.disk_bytes),
        }
    }

    /// Disks, GB in Nova's sense (GiB), rounded up.
    pub fn disk_gb(&self) -> u64 {
        self.disk_bytes.div_ceil(1 << 30)
    }
}

impl Quota {
    /// What a project that uses `used` may not have of `wanted`.
    pub fn shortfalls(&self, used: &ProjectUsage, wanted: &ProjectUsage) -> Vec<QuotaShortfall> {
        let sum = used.plus(*wanted);
        let all = [
            ("instances", self.instances, sum.instances, wanted.instances),
            ("vcpus", self.vcpus, sum.vcpus, wanted.vcpus),
            ("memory_mb", self.memory_mb, sum.memory_mb, wanted.memory_mb),
            ("disk_gb", self.disk_gb, sum.disk_gb(), wanted.disk_bytes),
        ];
        let broken = all
            .into_iter()
            .filter_map(|(resource, limit, would_be, wanted)| {
                let Limit::AtMost(most) = limit else {
                    return None;
                };
                (wanted > 0 && limit.is_exceeded_by(would_be)).then_some(QuotaShortfall {
                    resource,
                    would_be,
                    limit: most,
                })
            });
        broken.collect()
    }
}

/// Something that a project may not have more of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuotaShortfall {
    /// Of what, as [`Quota`] names it.
    pub resource: &'static str,
    /// How much it would have.
    pub would_be: u64,
    /// How much it may have.
    pub limit: u64,
}

/// What a logical network is on a group of nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkPlace {
    /// On which nodes; none named: on all that no other place names.
    #[serde(default)]
    pub nodes: Vec<HostName>,
    /// A bridge or a libvirt network.
    pub attachment: NicAttachment,
    /// What a newer version says of it.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl NetworkPlace {
    /// It is this on these nodes; on all that no other place names, if none is named.
    pub fn new(nodes: Vec<HostName>, attachment: NicAttachment) -> Self {
        Self {
            nodes,
            attachment,
            unknown: Unknown::default(),
        }
    }
}

/// Where disks are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Location {
    /// A directory of the node.
    Directory {
        /// Absolute path.
        path: String,
    },
    /// A storage pool of the node's libvirt whose volumes are files.
    Pool {
        /// Its name.
        pool: String,
    },
}

impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Directory { path } => f.write_str(path),
            Self::Pool { pool } => write!(f, "pool {pool}"),
        }
    }
}

/// Where a project's disks are on a group of nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoragePlace {
    /// On which nodes; none named: on all that no other place names.
    #[serde(default)]
    pub nodes: Vec<HostName>,
    /// Where there.
    pub location: Location,
    /// What a newer version says of it.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl StoragePlace {
    /// They are here on these nodes; on all that no other place names, if none is named.
    pub fn new(nodes: Vec<HostName>, location: Location) -> Self {
        Self {
            nodes,
            location,
            unknown: Unknown::default(),
        }
    }
}

/// A project, as it was created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Project {
    /// Id, as instances' metadata name it.
    pub id: ProjectId,
    /// What people call it.
    #[serde(default)]
    pub name: String,
    /// Whether it may get instances.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// How much it may have.
    #[serde(default)]
    pub quota: Quota,
    /// Its logical networks.
    #[serde(default)]
    pub networks: BTreeMap<String, Vec<NetworkPlace>>,
    /// Where its disks are; nothing named: wherever they are.
    #[serde(default)]
    pub storage: Vec<StoragePlace>,
    /// What a newer version says of it.
    #[serde(flatten)]
    pub unknown: Unknown,
}

fn yes() -> bool {
    true
}

impl Project {
    /// One without limits, networks or storage of its own.
    pub fn new(id: ProjectId) -> Self {
        Self {
            name: id.to_string(),
            id,
            enabled: true,
            quota: Quota::default(),
            networks: BTreeMap::new(),
            storage: Vec::new(),
            unknown: Unknown::default(),
        }
    }

    /// What a logical network is on a node, if it is there.
    pub fn network_on(&self, network: &str, host: &HostName) -> Option<&NicAttachment> {
        let places = self.networks.get(network)?;
        let place = placed(places, host, |place| &place.nodes)?;
        Some(&place.attachment)
    }

    /// All logical networks that are on a node, with what they are there.
    pub fn networks_on(&self, host: &HostName) -> BTreeMap<&str, &NicAttachment> {
        let names = self.networks.keys();
        let found = names.filter_map(|name| Some((name.as_str(), self.network_on(name, host)?)));
        found.collect()
    }

    /// Where its disks are on a node, if that is said.
    pub fn storage_on(&self, host: &HostName) -> Option<&Location> {
        let place = placed(&self.storage, host, |place| &place.nodes)?;
        Some(&place.location)
    }

    /// What is wrong with it in itself; empty if nothing is.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = self.unknown.problems();
        problems.extend(self.quota.unknown.problems());
        if !is_shown_well(&self.name) {
            problems.push("a name is 1 to 255 characters, no control characters".to_owned());
        }
        if self.networks.len() > MOST_NETWORKS {
            problems.push(format!("a project has at most {MOST_NETWORKS} networks"));
        }
        for (name, places) in &self.networks {
            if !is_shown_well(name) || name.contains('=') {
                problems.push(format!("'{name}' is no name for a network"));
            }
            let groups = places.iter().map(|place| &place.nodes);
            problems.extend(groups_problem(&format!("network {name}"), groups));
            let wrong = places
                .iter()
                .find_map(|p| attachment_problem(&p.attachment));
            problems.extend(wrong.map(|words| format!("network {name}: {words}")));
            let unknown = places.iter().flat_map(|p| p.unknown.problems());
            problems.extend(unknown.map(|words| format!("network {name}: {words}")));
        }
        let groups = self.storage.iter().map(|place| &place.nodes);
        problems.extend(groups_problem("storage", groups));
        let wrong = self
            .storage
            .iter()
            .filter_map(|p| location_problem(&p.location));
        let unknown = self.storage.iter().flat_map(|p| p.unknown.problems());
        let wrong = wrong.chain(unknown);
        problems.extend(wrong.map(|words| format!("storage: {words}")));
        problems
    }
}

/// The place that names a node, else the one that names none.
fn placed<'a, P>(
    places: &'a [P],
    host: &HostName,
    nodes: impl Fn(&P) -> &Vec<HostName>,
) -> Option<&'a P> {
    let named = places.iter().find(|place| nodes(place).contains(host));
    named.or_else(|| places.iter().find(|place| nodes(place).is_empty()))
}

fn is_shown_well(text: &str) -> bool {
    (1..=255).contains(&text.chars().count()) && !text.chars().any(char::is_control)
}

fn groups_problem<'a>(
    what: &str,
    groups: impl Iterator<Item = &'a Vec<HostName>>,
) -> Option<String> {
    let groups: Vec<_> = groups.collect();
    if groups.len() > MOST_PLACES {
        return Some(format!("{what}: at most {MOST_PLACES} groups of nodes"));
    }
    if groups.iter().filter(|nodes| nodes.is_empty()).count() > 1 {
        return Some(format!("{what}: said twice for all nodes"));
    }
    let mut all: Vec<&HostName> = groups.into_iter().flatten().collect();
    all.sort();
    let twice = all.windows(2).find(|pair| pair[0] == pair[1]);
    twice.map(|pair| format!("{what}: said twice for {}", pair[0]))
}

fn attachment_problem(attachment: &NicAttachment) -> Option<String> {
    let (what, name) = match attachment {
        NicAttachment::Bridge { bridge } => ("bridge", bridge),
        NicAttachment::Network { network } => ("libvirt network", network),
        _ => return Some("it is a bridge or a libvirt network on each node".to_owned()),
    };
    (!is_shown_well(name)).then(|| format!("'{name}' is no name of a {what}"))
}

fn location_problem(location: &Location) -> Option<String> {
    match location {
        Location::Directory { path } => {
            let parts = path.split('/').skip(1);
            let plain = path.starts_with('/')
                && path.len() < 4000
                && !path.chars().any(char::is_control)
                && parts.clone().all(|p| !matches!(p, "" | "." | ".."));
            (!plain).then(|| format!("'{path}' is no absolute, plain path of a directory"))
        }
        Location::Pool { pool } => {
            (!is_shown_well(pool)).then(|| format!("'{pool}' is no name of a storage pool"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str) -> HostName {
        name.parse().unwrap()
    }

    fn bridge(name: &str) -> NicAttachment {
        NicAttachment::Bridge {
            bridge: name.to_owned(),
        }
    }

    fn project() -> Project {
        Project::new("p1".parse().unwrap())
    }

    #[test]
    fn the_place_that_names_a_node_goes_before_the_one_for_all() {
        let mut project = project();
        let places = vec![
            NetworkPlace::new(Vec::new(), bridge("br-all")),
            NetworkPlace::new(vec![host("kvm2")], bridge("br-two")),
        ];
        project.networks.insert("lan".to_owned(), places);
        assert_eq!(project.problems(), Vec::<String>::new());
        let on = |name| project.network_on("lan", &host(name)).cloned();
        assert_eq!(on("kvm1"), Some(bridge("br-all")));
        assert_eq!(on("kvm2"), Some(bridge("br-two")));
        assert_eq!(project.network_on("wan", &host("kvm1")), None);
    }

    #[test]
    fn what_cannot_be_is_named() {
        let mut wrong = project();
        wrong.networks.insert(
            "lan".to_owned(),
            vec![
                NetworkPlace::new(vec![host("kvm1")], bridge("a")),
                NetworkPlace::new(vec![host("kvm1")], NicAttachment::User),
            ],
        );
        for path in ["relative", "/a/../b", "/a//b", "/a/", "/"] {
            wrong.storage = vec![StoragePlace::new(
                Vec::new(),
                Location::Directory {
                    path: path.to_owned(),
                },
            )];
            assert_eq!(wrong.problems().len(), 3, "{path}: {:?}", wrong.problems());
        }
    }

    #[test]
    fn quota_counts_what_is_wanted_and_no_more() {
        let quota = Quota {
            vcpus: Limit::AtMost(4),
            disk_gb: Limit::AtMost(1),
            ..Quota::default()
        };
        let used = ProjectUsage {
            instances: 9,
            vcpus: 5,
            memory_mb: 100,
            disk_bytes: 1 << 30,
        };
        let nothing = ProjectUsage::default();
        assert!(
            quota.shortfalls(&used, &nothing).is_empty(),
            "it wants nothing"
        );
        let guest = ProjectUsage {
            instances: 1,
            vcpus: 1,
            memory_mb: 1,
            disk_bytes: 1,
        };
        let short = quota.shortfalls(&used, &guest);
        let short = short.iter().map(|s| (s.resource, s.would_be, s.limit));
        assert_eq!(
            short.collect::<Vec<_>>(),
            [("vcpus", 6, 4), ("disk_gb", 2, 1)]
        );
        assert!(quota.shortfalls(&nothing, &guest).is_empty());
    }

    #[test]
    fn limits_are_numbers_on_the_wire() {
        let quota: Quota = serde_json::from_str(r#"{"vcpus": 4, "instances": -1}"#).unwrap();
        assert_eq!(quota.vcpus, Limit::AtMost(4));
        assert_eq!(quota.instances, Limit::Unlimited);
        let text = serde_json::to_string(&quota).unwrap();
        assert!(text.contains(r#""memory_mb":-1"#), "{text}");
        assert!(serde_json::from_str::<Quota>(r#"{"vcpus": -2}"#).is_err());
    }
}
