//! A lookout for a guest that runs twice, and for power that is cut without need,
//! during a whole case, by the machine's processes and whatever hypervisors say. A
//! guest that is on its way has two QEMUs, of which one waits: what counts is whose
//! processors are at work.

use std::{
    collections::BTreeMap,
    fs,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use super::{
    cloud::{Cloud, qemus},
    plan::POOL,
};

/// Between two looks; a guest does something several times within it.
const PAUSE: Duration = Duration::from_millis(250);
/// A processor at work uses more than this between two looks, ns.
const AT_WORK_NS: u64 = 3_000_000;
/// A guest that goes over works on both nodes within one pause, or within two if it is
/// called back; not in so many on end.
const TWICE: u32 = 4;

/// See the module.
#[derive(Default)]
pub(super) struct Lookout {
    over: AtomicBool,
    seen: Mutex<Vec<String>>,
}

impl Lookout {
    /// Looks out until [`Self::end`].
    pub(super) fn look(&self, cloud: &Cloud<'_>, may_lose_power: &[String]) {
        let mut used: BTreeMap<u32, u64> = BTreeMap::new();
        let mut twice: BTreeMap<&str, u32> = BTreeMap::new();
        let mut cut: Vec<&String> = Vec::new();
        while !self.over.load(Ordering::Relaxed) {
            let mut at_work: BTreeMap<&str, Vec<String>> = BTreeMap::new();
            let mut now = BTreeMap::new();
            for qemu in qemus() {
                let Some(guest) = POOL.iter().find(|guest| guest.name == qemu.guest) else {
                    continue;
                };
                let Some(host) = cloud.host_of(&qemu) else {
                    continue;
                };
                let ns = processor_ns(qemu.pid);
                let before = used.get(&qemu.pid).copied().unwrap_or(ns);
                if ns.saturating_sub(before) > AT_WORK_NS {
                    let whose = at_work.entry(guest.name).or_default();
                    whose.push(format!("{} on {host}", qemu.pid));
                }
                now.insert(qemu.pid, ns);
            }
            used = now;
            twice.retain(|guest, _| at_work.get(guest).is_some_and(|all| all.len() > 1));
            for (guest, all) in at_work.iter().filter(|(_, all)| all.len() > 1) {
                let times = twice.entry(guest).or_default();
                *times += 1;
                if *times == TWICE {
                    self.note(format!("{guest} runs twice: {all:?}"));
                }
            }
            for host in &cloud.hosts {
                let is_cut = cloud.has_lost_power(host);
                if is_cut && !cut.contains(&host) && !may_lose_power.contains(host) {
                    cut.push(host);
                    self.note(format!("{host} was well, and its power was cut"));
                }
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn note(&self, what: String) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.push(what);
    }

    /// Ends it.
    pub(super) fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    /// What it saw.
    pub(super) fn seen(&self) -> Vec<String> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.clone()
    }
}

/// What a QEMU's virtual processors have used, ns.
fn processor_ns(pid: u32) -> u64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    let of = |entry: fs::DirEntry| {
        let name = fs::read_to_string(entry.path().join("comm")).ok()?;
        let is_processor = name.starts_with("CPU ");
        let text = fs::read_to_string(entry.path().join("schedstat")).ok()?;
        let used: u64 = text.split(' ').next()?.parse().ok()?;
        is_processor.then_some(used)
    };
    threads.into_iter().flatten().flatten().filter_map(of).sum()
}
