//! The swarm: everything at once, from a seed. A seed draws a cloud, what is asked
//! of it and what is done to it ([`plan`]); the code under test runs in virtual time
//! behind edges at which each process can be stopped ([`world`], [`process`]); what
//! must hold is checked in the fabric ([`ledger`]). One seed is one run, always the
//! same ([`entropy`], [`trace`]), and a plan that fails is made smaller ([`shrink`]).

mod entropy;
mod fences;
mod ledger;
mod operator;
pub mod plan;
mod process;
mod shrink;
mod trace;
mod world;

use std::{
    cell::RefCell,
    panic,
    path::{Path, PathBuf},
    sync::{
        Mutex, Once, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use drover_runtime::blocking::block_at_once;
use tempfile::TempDir;
use tokio::time::Instant;

use plan::Plan;
use trace::{Heed, Trace};

/// Stack of a run's thread, bytes: futures are deep where nothing was optimised.
const STACK_BYTES: usize = 16 << 20;

/// What came of a plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Ran {
    /// Stands for everything that happened, in its order.
    pub hash: u64,
    /// How many things that were.
    pub things: u64,
    /// Virtual time that it took, ms.
    pub virtual_ms: u64,
    /// What was promised and did not hold; empty if all is well.
    pub broken: Vec<String>,
}

/// Carries a plan out in a thread of its own; `aloud`, it prints what happens.
pub fn run(plan: &Plan, aloud: bool) -> Ran {
    let heed = if aloud { Heed::Aloud } else { Heed::Sum };
    run_heeding(plan, heed).0
}

/// Carries a plan out twice; the first thing in which the two differ, as it was in each.
pub fn first_difference(plan: &Plan) -> Option<[String; 2]> {
    let [mut first, mut second] = [(), ()].map(|()| run_heeding(plan, Heed::Keep).1.into_iter());
    loop {
        let next = [first.next(), second.next()];
        match next {
            [None, None] => return None,
            [a, b] if a == b => {}
            differ => return Some(differ.map(|line| line.unwrap_or("the end".to_owned()))),
        }
    }
}

fn run_heeding(plan: &Plan, heed: Heed) -> (Ran, Vec<String>) {
    note_panics();
    let run = || carry_out(plan, heed);
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, run);
        let ran = thread.expect("a thread can be made").join();
        ran.unwrap_or_else(|_| {
            let panicked = Ran {
                hash: 0,
                things: 0,
                virtual_ms: 0,
                broken: vec!["the swarm itself panicked".to_owned()],
            };
            (panicked, Vec::new())
        })
    })
}

fn carry_out(plan: &Plan, heed: Heed) -> (Ran, Vec<String>) {
    // Its name is nobody's to foresee.
    let files = TempDir::new_in(directory()).expect("a temporary directory");
    entropy::follows_from(plan.seed);
    block_at_once();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime can be made");
    runtime.block_on(async {
        let began = Instant::now();
        let trace = Trace::new(began, heed, files.path());
        let mut broken = world::carry_out(plan, files, &trace).await;
        broken.extend(PANICS.take());
        let (hash, things) = trace.sum();
        let ran = Ran {
            hash,
            things,
            virtual_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
            broken,
        };
        (ran, trace.kept())
    })
}

/// Carries out what `draw` makes of each seed, on all cores; tells of each run.
pub fn run_seeds(
    seeds: std::ops::Range<u64>,
    draw: &(dyn Fn(u64) -> Plan + Sync),
    tell: &(dyn Fn(u64, &Ran) + Sync),
) {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicU64::new(seeds.start);
    let telling = Mutex::new(());
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let ran = run(&draw(seed), false);
                    let _turn = telling.lock().unwrap_or_else(PoisonError::into_inner);
                    tell(seed, &ran);
                }
            });
        }
    });
}

/// The least of a plan's events with which it still fails.
pub fn least(plan: &Plan) -> Plan {
    shrink::shrink(plan, &mut |less| !run(less, false).broken.is_empty())
}

thread_local! {
    /// Where the code under test panicked: its runtime swallows that.
    static PANICS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

fn note_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let text = info.to_string();
            PANICS.with_borrow_mut(|panics| panics.push(format!("a panic: {text}")));
            if thread::current().name().is_some() {
                before(info);
            }
        }));
    });
}

/// Where runs keep the agents' files: in memory if there is such a place.
fn directory() -> PathBuf {
    let memory = Path::new("/dev/shm");
    match memory.is_dir() {
        true => memory.to_owned(),
        false => std::env::temp_dir(),
    }
}
