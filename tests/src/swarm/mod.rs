//! The swarm: everything at once, from a seed. A seed draws a cloud, what is asked
//! of it and what is done to it ([`plan`]); the code under test runs in virtual time
//! behind edges at which each process can be stopped ([`world`], [`process`]); what
//! must hold is checked in the fabric ([`ledger`]). One seed is one run in a process of
//! its own, always the same ([`entropy`], [`trace`]), and a plan that fails is made smaller ([`shrink`]).

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
    io::BufRead,
    panic,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Mutex, Once, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use drover_runtime::blocking::block_at_once;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use tokio::time::Instant;

use plan::Plan;
pub use trace::Heed;
use trace::Trace;

/// Stack of a run's thread, bytes: futures are deep where nothing was optimised.
const STACK_BYTES: usize = 16 << 20;

/// What came of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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

impl Ran {
    fn broken(why: String) -> Self {
        Self {
            hash: 0,
            things: 0,
            virtual_ms: 0,
            broken: vec![why],
        }
    }
}

/// Carries a plan out in a thread of its own.
pub fn run(plan: &Plan, heed: Heed) -> Ran {
    note_panics();
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, || carry_out(plan, heed));
        let ran = thread.expect("a thread can be made").join();
        ran.unwrap_or_else(|_| Ran::broken("the swarm itself panicked".to_owned()))
    })
}

/// What `program`, which is the swarm's, prints of a seed: in a process of its own, as
/// whatever ran in one before has its say in whom tokio wakes first.
pub fn run_apart(program: &Path, seed: u64, how: &[&str]) -> Vec<u8> {
    let mut command = Command::new(program);
    let ran = command.arg("--seed").arg(seed.to_string()).args(how);
    let ran = ran.stderr(Stdio::inherit()).output();
    ran.expect("the swarm's program can be run").stdout
}

/// Carries a seed out twice; the first thing in which the two differ, as it was in each.
pub fn first_difference(program: &Path, seed: u64) -> Option<[String; 2]> {
    let [first, second] = [(), ()].map(|()| run_apart(program, seed, &["--whole"]));
    assert!(!first.is_empty(), "nothing happened");
    let [mut first, mut second] = [&first, &second].map(|printed| printed.lines());
    loop {
        let next = [first.next(), second.next()].map(|line| line.map(|l| l.expect("it is text")));
        match next {
            [None, None] => return None,
            [a, b] if a == b => {}
            differ => return Some(differ.map(|line| line.unwrap_or("the end".to_owned()))),
        }
    }
}

fn carry_out(plan: &Plan, heed: Heed) -> Ran {
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
        Ran {
            hash,
            things,
            virtual_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
            broken,
        }
    })
}

/// Carries out each seed, on all cores; tells of each run.
pub fn run_seeds(program: &Path, seeds: std::ops::Range<u64>, tell: &(dyn Fn(u64, &Ran) + Sync)) {
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
                    let printed = run_apart(program, seed, &["--sum"]);
                    let ran = serde_json::from_slice(&printed);
                    let ran = ran.unwrap_or_else(|_| Ran::broken("the swarm itself died".into()));
                    let _turn = telling.lock().unwrap_or_else(PoisonError::into_inner);
                    tell(seed, &ran);
                }
            });
        }
    });
}

/// The least of a plan's events with which it still fails.
pub fn least(plan: &Plan) -> Plan {
    shrink::shrink(plan, &mut |less| !run(less, Heed::Sum).broken.is_empty())
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
