//! Plans a drain and a balance of a large skewed cluster, and prints how long
//! that takes and what memory the process has used at its peak. Ends with 1 if
//! it is more than a conductor has: a second each, and 200 MiB.
//!
//! ```text
//! bench-plan [NODES [GUESTS]]
//! ```

use std::time::Instant;

use anyhow::{Context, Result};
use drover_conductor::plan::{
    Costs, Examinations, GuestView, Load, NodeView, World, balance, drain,
};
use drover_model::{
    ids::InstanceId,
    operation::{DrainOptions, OperationPlan},
};
use drover_store::claims::{Resources, Usage};
use uuid::Uuid;

const MOST_MS: u128 = 1000;
const MOST_MIB: u64 = 200;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let nodes = args.next().map_or(Ok(1000), |text| text.parse())?;
    let guests = args.next().map_or(Ok(50_000), |text| text.parse())?;
    let world = cluster(nodes, guests)?;
    println!("{nodes} nodes, {guests} guests, {} MiB", peak_mib()?);
    let none = Examinations::new();
    let options = DrainOptions::new("n0".parse()?);
    let drain = timed("drain", || {
        drain::plan(&world, &options, &none, Costs::default())
    });
    let goal = balance::Goal {
        threshold_percent: 10,
        cool_down_ms: 600_000,
        target_limit_percent: 85,
        max_moves: 1000,
    };
    let balance = timed("balance", || {
        balance::plan(&world, &goal, &none, Costs::default())
    });
    let peak = peak_mib()?;
    println!("peak {peak} MiB");
    if drain >= MOST_MS || balance >= MOST_MS || peak >= MOST_MIB {
        println!("too much: at most {MOST_MS} ms each and {MOST_MIB} MiB");
        std::process::exit(1);
    }
    Ok(())
}

fn timed(what: &str, plan: impl FnOnce() -> OperationPlan) -> u128 {
    let begun = Instant::now();
    let plan = plan();
    let took = begun.elapsed().as_millis();
    let (moves, all) = (plan.moving().count(), plan.moves.len());
    println!("{what}: {took} ms, {moves} of {all} guests move");
    if let Some((before, after)) = plan.spread_percent {
        println!(
            "  spread {before:.1} -> {after:.1} points: {}",
            plan.notes.join("; ")
        );
    }
    took
}

/// Guests of 1 to 8 GiB; those of every tenth node are three times as busy.
fn cluster(nodes: usize, guests: usize) -> Result<World> {
    let mut random = fastrand::Rng::with_seed(7);
    let mut world = World {
        now_ms: 1_000_000_000,
        ..World::default()
    };
    for n in 0..nodes {
        let usable = Resources {
            vcpus: 64 * 4,
            memory_mib: 512 << 10,
            disk_bytes: 0,
        };
        world.nodes.push(NodeView {
            host: format!("n{n}").parse()?,
            closed: vec![],
            usage: Usage {
                used: Resources::default(),
                usable,
            },
            vcpus: 64,
            memory_mib: 512 << 10,
        });
    }
    for n in 0..guests {
        let on = n % nodes;
        let node = &mut world.nodes[on];
        let (vcpus, memory_mib) = (random.u32(1..5), random.u64(1..9) << 10);
        node.usage.used.vcpus += u64::from(vcpus);
        node.usage.used.memory_mib += memory_mib;
        let busy = if on.is_multiple_of(10) { 3.0 } else { 1.0 };
        world.guests.push(GuestView {
            leaves_live: false,
            id: InstanceId(Uuid::from_u128(n as u128 + 1)),
            name: format!("vm{n}"),
            project: format!("project{}", n % 100),
            host: node.host.clone(),
            vcpus,
            memory_mib,
            disk_bytes: 20 << 30,
            runs: true,
            priority: random.i32(0..3),
            anti_affinity: n
                .is_multiple_of(20)
                .then(|| format!("group{}", n / 200))
                .into_iter()
                .collect(),
            busy: None,
            load: Some(Load {
                cpus: random.f64() * 0.5 * busy,
                memory_mib: memory_mib / 2,
            }),
            dirty_rate_mib_s: Some(random.u64(0..300)),
            moved_at_ms: None,
        });
    }
    Ok(world)
}

/// The most memory that this process ever held, MiB.
fn peak_mib() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let kib = line.and_then(|l| l.split_whitespace().next());
    Ok(kib
        .context("no VmHWM in /proc/self/status")?
        .parse::<u64>()?
        >> 10)
}
