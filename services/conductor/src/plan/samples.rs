//! Clusters that several planners' tests need, and what holds of every plan.

use std::collections::{BTreeMap, BTreeSet};

use drover_model::{
    check::{CheckCode, CheckFailure, Side},
    ids::{HostName, InstanceId},
    operation::{Fill, OperationPlan, Verdict},
};
use drover_store::claims::{Resources, Usage};
use proptest::prelude::*;
use uuid::Uuid;

use super::{Examination, Examinations, GuestView, Load, NodeView, World, forecast};

pub(super) fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

pub(super) fn id(n: usize) -> InstanceId {
    InstanceId(Uuid::from_u128(n as u128))
}

pub(super) fn failure(code: CheckCode, side: Side) -> CheckFailure {
    CheckFailure {
        code,
        side,
        message: format!("no: {code}"),
        remedy: "mend it".to_owned(),
    }
}

/// An open node with 4 CPUs (16 vCPUs) and 4096 MiB.
pub(super) fn node(name: &str) -> NodeView {
    NodeView {
        host: host(name),
        closed: vec![],
        usage: Usage {
            used: Resources::default(),
            usable: Resources {
                vcpus: 16,
                memory_mib: 4096,
                disk_bytes: 0,
            },
        },
        vcpus: 4,
        memory_mib: 4096,
    }
}

/// A guest that runs, with one vCPU and 512 MiB, half of both used.
pub(super) fn guest(n: usize, on: &str) -> GuestView {
    GuestView {
        id: id(n),
        name: format!("vm{n}"),
        project: "demo".into(),
        host: host(on),
        vcpus: 1,
        memory_mib: 512,
        disk_bytes: 1 << 30,
        runs: true,
        priority: 0,
        anti_affinity: vec![],
        busy: None,
        leaves_live: false,
        load: Some(Load {
            cpus: 0.5,
            memory_mib: 256,
        }),
        dirty_rate_mib_s: None,
        moved_at_ms: None,
    }
}

/// A cluster in which nodes have what their guests use.
pub(super) fn world(nodes: Vec<NodeView>, guests: Vec<GuestView>) -> World {
    let mut world = World {
        now_ms: 1_000_000_000,
        nodes,
        guests,
    };
    for node in &mut world.nodes {
        let here = world
            .guests
            .iter()
            .filter(|g| g.host == node.host && g.runs);
        for guest in here {
            node.usage.used.vcpus += u64::from(guest.vcpus);
            node.usage.used.memory_mib += guest.memory_mib;
        }
    }
    world
}

const WAYS: [super::MoveWay; 3] = [
    super::MoveWay::Live,
    super::MoveWay::Cold,
    super::MoveWay::Evacuate,
];

pub(super) fn unfit(n: usize, on: &[&str]) -> Examinations {
    let no = |name: &&str| (host(name), vec![failure(CheckCode::Cpu, Side::Destination)]);
    let all: BTreeMap<_, _> = on.iter().map(no).collect();
    let examination = Examination {
        unfit: WAYS.map(|way| (way, all.clone())).into(),
        ..Examination::default()
    };
    BTreeMap::from([(id(n), examination)])
}

/// The world when a plan is carried out.
pub(super) fn applied(world: &World, plan: &OperationPlan) -> World {
    let mut world = world.clone();
    for planned in plan.moving() {
        let Verdict::Moves { to, .. } = &planned.verdict else {
            continue;
        };
        move_to(&mut world, planned.instance, to);
    }
    world
}

pub(super) fn move_to(world: &mut World, instance: InstanceId, to: &HostName) {
    let guest = world.guests.iter_mut().find(|g| g.id == instance).unwrap();
    let from = std::mem::replace(&mut guest.host, to.clone());
    if !guest.runs {
        return;
    }
    for node in &mut world.nodes {
        if node.host == from {
            node.usage.used.vcpus -= u64::from(guest.vcpus);
            node.usage.used.memory_mib -= guest.memory_mib;
        }
        if node.host == *to {
            node.usage.used.vcpus += u64::from(guest.vcpus);
            node.usage.used.memory_mib += guest.memory_mib;
        }
    }
}

fn fill(world: &World, node: &NodeView) -> Fill {
    let mut used = forecast::Used::default();
    for guest in world.guests.iter().filter(|g| g.host == node.host) {
        used.add(forecast::Used::by(guest));
    }
    let known = used.unknown == 0;
    Fill {
        guests: used.guests,
        vcpus: node.usage.used.vcpus,
        memory_mib: node.usage.used.memory_mib,
        cpu_load_percent: known.then(|| forecast::percent(used.cpu_load(node))),
        memory_load_percent: known.then(|| forecast::percent(used.memory_load(node))),
    }
}

/// What holds of every plan: nothing goes where it must not, no node takes more
/// than it has, and what is promised comes true.
pub(super) fn check(world: &World, plan: &OperationPlan, examinations: &Examinations) {
    let guests: BTreeMap<_, _> = world.guests.iter().map(|g| (g.id, g)).collect();
    let nodes: BTreeMap<_, _> = world.nodes.iter().map(|n| (&n.host, n)).collect();
    let mut usage: BTreeMap<_, _> = world.nodes.iter().map(|n| (&n.host, n.usage)).collect();
    let mut seen = BTreeSet::new();
    for planned in plan.moving() {
        let Verdict::Moves { to, way, .. } = &planned.verdict else {
            continue;
        };
        assert!(seen.insert(planned.instance), "a guest moves twice");
        assert_ne!(*to, planned.source);
        assert!(nodes[to].closed.is_empty(), "{to} is closed");
        let examination = examinations.get(&planned.instance);
        assert!(examination.is_none_or(|e| e.refusal(*way, to).is_none()));
        let guest = guests[&planned.instance];
        if guest.runs {
            let used = usage.get_mut(to).unwrap();
            used.used.vcpus += u64::from(guest.vcpus);
            used.used.memory_mib += guest.memory_mib;
            assert!(used.used.vcpus <= used.usable.vcpus, "vCPUs of {to}");
            assert!(
                used.used.memory_mib <= used.usable.memory_mib,
                "memory of {to}"
            );
        }
    }
    let after = applied(world, plan);
    for moved in &seen {
        let guest = after.guests.iter().find(|g| g.id == *moved).unwrap();
        let others = after
            .guests
            .iter()
            .filter(|g| g.id != *moved && g.host == guest.host);
        let groups: BTreeSet<&String> = others.flat_map(|g| &g.anti_affinity).collect();
        assert!(guest.anti_affinity.iter().all(|g| !groups.contains(g)));
    }
    for forecast in &plan.nodes {
        let find = |w: &World| w.nodes.iter().find(|n| n.host == forecast.host).cloned();
        assert_eq!(forecast.before, fill(world, &find(world).unwrap()));
        assert_eq!(forecast.after, fill(&after, &find(&after).unwrap()));
    }
}

prop_compose! {
    fn any_guest(nodes: usize)(
        on in 0..nodes, size in 1..5u64, vcpus in 1..4u32, runs in prop::bool::weighted(0.85),
        priority in -1..2i32, group in prop::option::weighted(0.3, 0..3u8),
        busy in prop::bool::weighted(0.1), cpus in 0..40u32,
        known in prop::bool::weighted(0.95), moved in prop::option::weighted(0.2, 0..200_000u64),
    ) -> GuestView {
        GuestView {
            vcpus,
            memory_mib: size * 256,
            runs,
            priority,
            anti_affinity: group.map(|g| format!("g{g}")).into_iter().collect(),
            busy: busy.then(|| "a backup".to_owned()),
            load: known.then(|| Load { cpus: f64::from(cpus) / 10.0, memory_mib: size * 200 }),
            moved_at_ms: moved.map(|ago| 1_000_000_000 - ago),
            ..guest(0, &format!("n{on}"))
        }
    }
}

/// What a guest was found to be: nodes that it cannot go to, ways it cannot go.
type Found = (BTreeSet<usize>, bool, bool);

fn any_found() -> impl Strategy<Value = Found> {
    let unfit = prop::collection::btree_set(0..6usize, 0..3);
    (
        unfit,
        prop::bool::weighted(0.15),
        prop::bool::weighted(0.15),
    )
}

prop_compose! {
    /// A cluster of 2 to 6 nodes, and what its nodes said of its guests.
    pub(super) fn any_world()(count in 2..7usize)(
        closed in prop::collection::vec(prop::bool::weighted(0.15), count),
        sizes in prop::collection::vec((2..5u64, 2..9u32), count),
        guests in prop::collection::vec((any_guest(count), any_found()), 0..24),
    ) -> (World, Examinations) {
        let mut nodes = Vec::new();
        for (i, (closed, (memory, vcpus))) in closed.iter().zip(&sizes).enumerate() {
            let mut node = node(&format!("n{i}"));
            node.memory_mib = memory * 2048;
            node.vcpus = *vcpus;
            node.usage.usable.memory_mib = memory * 2048 - 512;
            node.usage.usable.vcpus = u64::from(*vcpus) * 4;
            if *closed {
                node.closed = vec![failure(CheckCode::HostDown, Side::Destination)];
            }
            nodes.push(node);
        }
        let mut examinations = Examinations::new();
        let mut views = Vec::new();
        for (n, (mut guest, (unfit, no_live, no_cold))) in guests.into_iter().enumerate() {
            guest.id = id(n);
            guest.name = format!("vm{n}");
            let mut examination = Examination::default();
            let no = || vec![failure(CheckCode::HostDevice, Side::Instance)];
            for (is, way) in [(no_live, super::MoveWay::Live), (no_cold, super::MoveWay::Cold)] {
                if is {
                    examination.source.insert(way, no());
                }
            }
            for node in unfit {
                let why = vec![failure(CheckCode::Cpu, Side::Destination)];
                for way in WAYS {
                    examination.refuse(way, host(&format!("n{node}")), why.clone());
                }
            }
            examinations.insert(guest.id, examination);
            views.push(guest);
        }
        (world(nodes, views), examinations)
    }
}

/// The same cluster, told in another order.
pub(super) fn turned(world: &World) -> World {
    let mut world = world.clone();
    world.nodes.reverse();
    world.guests.reverse();
    let half = world.guests.len() / 2;
    world.guests.rotate_left(half);
    world
}
