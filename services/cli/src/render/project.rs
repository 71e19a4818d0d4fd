//! Projects: what each has of what it may have, and where its guests live.

use drover_model::{
    api::conductor::ProjectView,
    guest::NicAttachment,
    ids::HostName,
    project::{Limit, Project},
};

use super::{
    describe::{facts, section},
    table::{NOTHING_HERE, grid, nothing},
    units::bytes_of,
};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// Projects.
pub fn table(projects: &[ProjectView]) -> String {
    if projects.is_empty() {
        return "no projects".to_owned();
    }
    let header = [
        "ID",
        "NAME",
        "ENABLED",
        "INSTANCES",
        "VCPUS",
        "MEMORY",
        "DISK",
        "NETWORKS",
    ];
    grid(&header, projects.iter().map(row))
}

fn row(view: &ProjectView) -> Vec<String> {
    let p = &view.project;
    let networks: Vec<&str> = p.networks.keys().map(String::as_str).collect();
    let networks = match networks.as_slice() {
        [] => nothing(),
        names => names.join(","),
    };
    let enabled = if p.enabled { "yes" } else { "no" };
    let enabled = if view.created { enabled } else { NOTHING_HERE };
    let mut cells = vec![p.id.to_string(), p.name.clone(), enabled.to_owned()];
    cells.extend(usage(view).map(|(_, text)| text));
    cells.push(networks);
    cells
}

/// What it has and is about to get, of what it may have.
fn usage(view: &ProjectView) -> [(&'static str, String); 4] {
    let (quota, has, soon) = (&view.project.quota, &view.usage, &view.promised);
    let of_bytes = |has, soon, limit, unit: u64| {
        let most = most(limit).map(|n| n.saturating_mul(unit));
        bytes_of(has, soon, most)
    };
    let (memory, coming) = (
        has.memory_mb.saturating_mul(MIB),
        soon.memory_mb.saturating_mul(MIB),
    );
    [
        (
            "instances",
            number(has.instances, soon.instances, quota.instances),
        ),
        ("vcpus", number(has.vcpus, soon.vcpus, quota.vcpus)),
        ("memory", of_bytes(memory, coming, quota.memory_mb, MIB)),
        (
            "disk",
            of_bytes(has.disk_bytes, soon.disk_bytes, quota.disk_gb, GIB),
        ),
    ]
}

fn most(limit: Limit) -> Option<u64> {
    match limit {
        Limit::Unlimited => None,
        Limit::AtMost(most) => Some(most),
    }
}

fn number(has: u64, soon: u64, limit: Limit) -> String {
    let soon = match soon {
        0 => String::new(),
        soon => format!("+{soon}"),
    };
    let most = most(limit).map_or_else(nothing, |most| most.to_string());
    format!("{has}{soon}/{most}")
}

/// A project with all that is said of it.
pub fn whole(view: &ProjectView) -> String {
    let p = &view.project;
    let enabled = match (view.created, p.enabled) {
        (false, _) => "no: it is only named by instances, nobody has created it",
        (true, true) => "yes",
        (true, false) => "no: it may not get instances",
    };
    let mut pairs = vec![
        ("id", p.id.to_string()),
        ("name", p.name.clone()),
        ("enabled", enabled.to_owned()),
    ];
    pairs.extend(usage(view));
    facts(pairs)
        + &section(
            "networks",
            lines(&["NETWORK", "NODES", "WHAT"], networks(p)),
        )
        + &section("storage", lines(&["NODES", "WHERE"], storage(p)))
}

fn lines(header: &[&str], rows: Vec<Vec<String>>) -> Vec<String> {
    if rows.is_empty() {
        return Vec::new();
    }
    grid(header, rows).lines().map(str::to_owned).collect()
}

fn networks(p: &Project) -> Vec<Vec<String>> {
    let places = p.networks.iter().flat_map(|(name, places)| {
        places.iter().map(move |place| {
            let nodes = group(&place.nodes, places.len());
            vec![name.clone(), nodes, attachment(&place.attachment)]
        })
    });
    places.collect()
}

fn storage(p: &Project) -> Vec<Vec<String>> {
    let row = |place: &drover_model::project::StoragePlace| {
        let nodes = group(&place.nodes, p.storage.len());
        vec![nodes, place.location.to_string()]
    };
    p.storage.iter().map(row).collect()
}

/// The nodes of one group of so many.
fn group(nodes: &[HostName], groups: usize) -> String {
    match nodes {
        [] if groups > 1 => "all others".to_owned(),
        [] => "all".to_owned(),
        nodes => nodes
            .iter()
            .map(HostName::as_str)
            .collect::<Vec<_>>()
            .join(","),
    }
}

fn attachment(attachment: &NicAttachment) -> String {
    match attachment {
        NicAttachment::Bridge { bridge } => format!("bridge {bridge}"),
        NicAttachment::Network { network } => format!("libvirt network {network}"),
        NicAttachment::Direct { device } => format!("macvtap on {device}"),
        NicAttachment::User => "user-mode network".to_owned(),
        NicAttachment::Other { kind } => kind.clone(),
    }
}

#[cfg(test)]
mod tests {
    use drover_model::project::ProjectUsage;

    use super::*;
    use crate::samples;

    #[test]
    fn projects_look_so() {
        let mut named = samples::project("old");
        named.project = Project::new("old".parse().unwrap());
        named.created = false;
        named.promised = ProjectUsage::default();
        let mut off = samples::project("red");
        off.project.enabled = false;
        let expected = "\
ID    NAME       ENABLED  INSTANCES  VCPUS  MEMORY         DISK         NETWORKS
blue  Blue team  yes      2+1/10     3+1/-  0.5+0.1/4 GiB  12+1/50 GiB  lan,wan
old   old        -        2/-        3/-    512 MiB/-      12 GiB/-     -
red   Blue team  no       2+1/10     3+1/-  0.5+0.1/4 GiB  12+1/50 GiB  lan,wan";
        let table = table(&[samples::project("blue"), named, off]);
        assert_eq!(table, expected, "\n{table}");
    }

    #[test]
    fn a_whole_project_looks_so() {
        let expected = "\
id         blue
name       Blue team
enabled    yes
instances  2+1/10
vcpus      3+1/-
memory     0.5+0.1/4 GiB
disk       12+1/50 GiB

networks
  NETWORK  NODES       WHAT
  lan      kvm1,kvm2   bridge br-blue
  lan      all others  libvirt network blue
  wan      all         bridge br-wan

storage
  NODES  WHERE
  kvm1   /srv/blue
  kvm2   pool blue";
        let text = whole(&samples::project("blue"));
        assert_eq!(text, expected, "\n{text}");
    }

    #[test]
    fn a_project_that_nobody_made_is_told_apart_from_one_that_is_off() {
        let mut view = samples::project("blue");
        view.project.enabled = false;
        assert!(whole(&view).contains("no: it may not get instances"));
        view.created = false;
        assert!(whole(&view).contains("nobody has created it"));
    }
}
