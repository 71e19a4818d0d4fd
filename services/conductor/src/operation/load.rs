//! What guests use, averaged over time, from the counters that agents report.
//!
//! Of each guest a few samples are kept, just enough to reach back over the
//! window. A counter that falls, a clock that goes back, or another node begins
//! anew: the guest was started again.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, PoisonError},
};

use drover_model::{
    ids::{HostName, InstanceId},
    node::{HypervisorReport, InstanceReport, NodeReport},
};

use crate::plan::Load;

/// Samples kept of a guest within the window, beside the newest.
const SAMPLES: u64 = 10;

/// The book of one conductor. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Loads(Arc<Mutex<Book>>);

impl Loads {
    /// An empty book that averages over so long, ms.
    pub fn new(window_ms: u64) -> Self {
        Self(Arc::new(Mutex::new(Book::new(window_ms))))
    }

    /// Takes in a report.
    pub fn feed(&self, report: &NodeReport) {
        self.lock().feed(report);
    }

    /// What every guest uses that is known for long enough.
    pub fn all(&self) -> HashMap<InstanceId, Load> {
        let book = self.lock();
        let known = book.guests.iter();
        known
            .filter_map(|(id, track)| Some((*id, track.load(book.window_ms)?)))
            .collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was reported of every guest, within the window.
#[derive(Debug)]
pub struct Book {
    window_ms: u64,
    guests: HashMap<InstanceId, Track>,
}

#[derive(Debug)]
struct Track {
    host: HostName,
    /// Oldest first; the first is as old as the window, once there is one so old.
    kept: VecDeque<Sample>,
    newest: Sample,
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    at_ms: u64,
    cpu_time_ns: u64,
    memory_mib: u64,
}

impl Book {
    /// An empty book that averages over so long, ms.
    pub fn new(window_ms: u64) -> Self {
        Self {
            window_ms,
            guests: HashMap::new(),
        }
    }

    /// Takes in a report. Guests that its node no longer lists are forgotten; a
    /// libvirt that does not answer says nothing about them.
    pub fn feed(&mut self, report: &NodeReport) {
        let HypervisorReport::Up { instances, .. } = &report.hypervisor else {
            return;
        };
        let listed: HashSet<InstanceId> = instances.iter().map(|i| i.id).collect();
        self.guests
            .retain(|id, track| track.host != report.host || listed.contains(id));
        for instance in instances.iter().filter(|i| !i.incoming) {
            self.take_in(report, instance);
        }
    }

    fn take_in(&mut self, report: &NodeReport, instance: &InstanceReport) {
        let Some(usage) = instance.usage else {
            if self
                .guests
                .get(&instance.id)
                .is_some_and(|t| t.host == report.host)
            {
                self.guests.remove(&instance.id);
            }
            return;
        };
        let sample = Sample {
            at_ms: report.clock_ms,
            cpu_time_ns: usage.cpu_time_ns,
            memory_mib: usage.memory_rss_mib,
        };
        let follows = |track: &Track| {
            track.host == report.host
                && track.newest.at_ms <= sample.at_ms
                && track.newest.cpu_time_ns <= sample.cpu_time_ns
        };
        match self.guests.get_mut(&instance.id).filter(|t| follows(t)) {
            Some(track) => track.push(sample, self.window_ms),
            None => {
                let track = Track {
                    host: report.host.clone(),
                    kept: VecDeque::from([sample]),
                    newest: sample,
                };
                self.guests.insert(instance.id, track);
            }
        }
    }

    /// What a guest uses; none until it is known for as long as the window.
    pub fn load(&self, id: InstanceId) -> Option<Load> {
        self.guests.get(&id)?.load(self.window_ms)
    }
}

impl Track {
    fn push(&mut self, sample: Sample, window_ms: u64) {
        self.newest = sample;
        let apart = |last: &Sample| sample.at_ms - last.at_ms >= window_ms / SAMPLES;
        if self.kept.back().is_none_or(apart) {
            self.kept.push_back(sample);
        }
        let begin_ms = sample.at_ms.saturating_sub(window_ms);
        // One that is as old as the window stays: the average reaches back to it.
        while self.kept.get(1).is_some_and(|next| next.at_ms <= begin_ms) {
            self.kept.pop_front();
        }
    }

    fn load(&self, window_ms: u64) -> Option<Load> {
        let oldest = self.kept.front()?;
        let time_ms = self.newest.at_ms - oldest.at_ms;
        if time_ms < window_ms || time_ms == 0 {
            return None;
        }
        let busy_ns = self.newest.cpu_time_ns - oldest.cpu_time_ns;
        let memory: u64 = self.kept.iter().map(|s| s.memory_mib).sum();
        // Nobody notices what a float loses of these.
        #[allow(clippy::cast_precision_loss)]
        let cpus = busy_ns as f64 / (time_ms as f64 * 1e6);
        Some(Load {
            cpus,
            memory_mib: memory / self.kept.len() as u64,
        })
    }
}

#[cfg(test)]
mod tests {
    use drover_model::{
        guest::PowerState,
        node::{AllocationPolicy, Endpoint, GuestUsage, Inventory},
    };

    use super::*;

    const WINDOW_MS: u64 = 300_000;
    const SECOND_NS: u64 = 1_000_000_000;

    fn id() -> InstanceId {
        InstanceId(uuid::Uuid::from_u128(1))
    }

    fn report(host: &str, at_ms: u64, usage: Option<(u64, u64)>) -> NodeReport {
        let instance = InstanceReport {
            id: id(),
            name: "web".into(),
            project: "demo".into(),
            generation: 0,
            power_state: PowerState::Running,
            incoming: false,
            vcpus: 2,
            memory_mib: 1024,
            disk_bytes: 0,
            migration: None,
            wishes: Default::default(),
            usage: usage.map(|(cpu_time_ns, memory_rss_mib)| GuestUsage {
                cpu_time_ns,
                memory_rss_mib,
            }),
            definition_digest: None,
            autostart: false,
            unreadable: None,
        };
        NodeReport {
            host: host.parse().unwrap(),
            agent_version: String::new(),
            agent_started_ms: 0,
            incarnation: 0,
            sequence: 0,
            clock_ms: at_ms,
            endpoint: Endpoint {
                address: String::new(),
                libvirt_uri: String::new(),
                libvirt_port: 1,
            },
            policy: AllocationPolicy::default(),
            hypervisor: HypervisorReport::Up {
                inventory: Inventory {
                    hypervisor_type: String::new(),
                    hypervisor_version: 0,
                    libvirt_version: 0,
                    arch: String::new(),
                    cpu_model: String::new(),
                    kvm: true,
                    vcpus: 8,
                    memory_mib: 8192,
                    disk_bytes: 0,
                    disk_free_bytes: 0,
                },
                instances: vec![instance],
            },
        }
    }

    /// A guest that keeps `cpus` busy, reported every five seconds.
    fn run(book: &mut Book, host: &str, from_s: u64, to_s: u64, cpus: f64) {
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss
        )]
        for s in (from_s..=to_s).step_by(5) {
            let cpu_ns = ((s - from_s) as f64 * cpus * SECOND_NS as f64) as u64;
            book.feed(&report(host, s * 1000, Some((cpu_ns, 512))));
        }
    }

    #[test]
    fn a_load_is_known_after_the_window_and_is_its_average() {
        let mut book = Book::new(WINDOW_MS);
        run(&mut book, "kvm1", 0, 295, 1.5);
        assert_eq!(book.load(id()), None, "not for long enough");
        run(&mut book, "kvm1", 300, 300, 0.0);
        assert_eq!(
            book.load(id()),
            None,
            "its counter fell: it was started again"
        );
        run(&mut book, "kvm1", 305, 905, 1.5);
        let load = book.load(id()).unwrap();
        assert!((load.cpus - 1.5).abs() < 0.01, "{load:?}");
        assert_eq!(load.memory_mib, 512);
        assert!(book.guests[&id()].kept.len() as u64 <= SAMPLES + 2);
    }

    #[test]
    fn only_the_window_counts() {
        let mut book = Book::new(WINDOW_MS);
        let cpu_ns = |s: u64| s.saturating_sub(600) * SECOND_NS;
        for s in (0..=1000).step_by(5) {
            book.feed(&report("kvm1", s * 1000, Some((cpu_ns(s), 100))));
        }
        let load = book.load(id()).unwrap();
        assert!(
            (load.cpus - 1.0).abs() < 0.01,
            "idle before, busy for the window: {load:?}"
        );
    }

    #[test]
    fn another_node_begins_anew_and_the_old_one_takes_nothing_away() {
        let mut book = Book::new(WINDOW_MS);
        run(&mut book, "kvm1", 0, 400, 1.0);
        assert!(book.load(id()).is_some());
        run(&mut book, "kvm2", 405, 405, 1.0);
        assert_eq!(book.load(id()), None);
        let mut gone = report("kvm1", 410_000, None);
        if let HypervisorReport::Up { instances, .. } = &mut gone.hypervisor {
            instances.clear();
        }
        book.feed(&gone);
        assert!(book.guests.contains_key(&id()), "it is kvm2's now");
    }

    #[test]
    fn a_guest_that_is_off_is_forgotten() {
        let mut book = Book::new(WINDOW_MS);
        run(&mut book, "kvm1", 0, 400, 1.0);
        book.feed(&report("kvm1", 405_000, None));
        assert!(book.guests.is_empty());
    }
}
