//! Placement: which nodes to try for an instance, best first. Pure.

use drover_model::{
    check::{CheckCode, CheckFailure, Side},
    ids::HostName,
};
use drover_store::{
    claims::{Resources, Usage},
    nodes::NodeRow,
};

use crate::checks::{self, Liveness};

/// A node that may be tried, and what is known of its room.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// The node.
    pub node: NodeRow,
    /// Its room.
    pub usage: Usage,
}

/// Orders the nodes that the record does not already rule out: those with the
/// most memory left come first, then those with the most vCPUs left, then by
/// name, so that the same record always gives the same order. The second part
/// says of every other node why not.
pub fn rank(
    source: &HostName,
    wanted: &Resources,
    candidates: Vec<Candidate>,
    live: Liveness,
) -> (Vec<Candidate>, Vec<(HostName, Vec<CheckFailure>)>) {
    let mut fit = Vec::new();
    let mut unfit = Vec::new();
    for candidate in candidates {
        let host = &candidate.node.report.host;
        if host == source {
            continue;
        }
        let mut failures = checks::node(host, Some(&candidate.node), Side::Destination, live);
        failures.extend(checks::room(&candidate.usage.shortfalls(wanted), host));
        match failures.is_empty() {
            true => fit.push(candidate),
            false => unfit.push((host.clone(), failures)),
        }
    }
    let left = |c: &Candidate| {
        let left = |usable: u64, used: u64| usable.saturating_sub(used);
        (
            left(c.usage.usable.memory_mib, c.usage.used.memory_mib),
            left(c.usage.usable.vcpus, c.usage.used.vcpus),
        )
    };
    fit.sort_by(|a, b| {
        let by_room = left(b).cmp(&left(a));
        by_room.then_with(|| a.node.report.host.cmp(&b.node.report.host))
    });
    (fit, unfit)
}

/// No node is fit: one failure that says so, and each node's own.
pub fn nowhere(tried: &[(HostName, Vec<CheckFailure>)]) -> Vec<CheckFailure> {
    let hosts: Vec<&str> = tried.iter().map(|(host, _)| host.as_str()).collect();
    let message = match hosts.as_slice() {
        [] => "there is no other node".to_owned(),
        hosts => format!("none of the other nodes can take it: {}", hosts.join(", ")),
    };
    let first = CheckFailure {
        code: CheckCode::NoValidHost,
        side: Side::Destination,
        message,
        remedy: "see below what stands in the way on each".to_owned(),
    };
    let each = tried
        .iter()
        .flat_map(|(_, failures)| failures.iter().cloned());
    std::iter::once(first).chain(each).collect()
}
