//! Carries a case out: asks for what is asked for, and harms what is harmed, each in
//! a thread of its own, at its moment.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use super::{
    cloud::{CONDUCTORS, Cloud},
    plan::{Case, Fault, Hand, Harm, Moment, Move, POOL, Part, Process, Wish},
};

/// A step that does not come is not waited for any longer.
const NO_STEP: Duration = Duration::from_secs(8);
/// Between two looks at the record.
const PAUSE: Duration = Duration::from_millis(60);

/// The nodes in their parts, and the guest that it is about.
pub(super) struct Parts {
    pub(super) guest: &'static str,
    pub(super) source: String,
    pub(super) destination: String,
    pub(super) third: String,
}

impl Parts {
    /// As the first move has them.
    pub(super) fn of(cloud: &Cloud<'_>, one: &Move) -> Result<Self, String> {
        let guest = POOL[one.guest].name;
        let source = cloud.place_of(guest)?.host;
        let mut others = cloud.hosts.clone();
        others.retain(|host| *host != source);
        let destination = others.remove(one.to);
        Ok(Self {
            guest,
            source,
            destination,
            third: others.remove(0),
        })
    }

    pub(super) fn host(&self, part: Part) -> &str {
        match part {
            Part::Source => &self.source,
            Part::Destination => &self.destination,
            Part::Third => &self.third,
        }
    }
}

/// What is going on while a case is carried out.
pub(super) struct Stage<'a> {
    pub(super) cloud: &'a Cloud<'a>,
    pub(super) case: &'a Case,
    pub(super) parts: &'a Parts,
    /// Highest number of a migration before it began.
    pub(super) before: u64,
    began: Instant,
    steps: AtomicUsize,
    over: AtomicBool,
}

impl<'a> Stage<'a> {
    pub(super) fn new(cloud: &'a Cloud<'a>, case: &'a Case, parts: &'a Parts, before: u64) -> Self {
        Self {
            cloud,
            case,
            parts,
            before,
            began: Instant::now(),
            steps: AtomicUsize::new(0),
            over: AtomicBool::new(false),
        }
    }

    /// Until everything was asked for and everything went wrong; what was answered.
    pub(super) fn play(&self) -> Vec<String> {
        std::thread::scope(|scope| {
            scope.spawn(|| self.count_steps());
            let ask = |one| scope.spawn(move || self.ask(one));
            let mut threads: Vec<_> = self.case.moves.iter().map(ask).collect();
            let harm = |fault| scope.spawn(move || self.harm(fault));
            threads.extend(self.case.faults.iter().map(harm));
            let said = threads.into_iter().map(|t| t.join().expect("no panic"));
            let said = said.filter_map(Result::err).collect();
            self.over.store(true, Ordering::Relaxed);
            said
        })
    }

    /// Every step of every migration of the case, as the record shows it.
    fn count_steps(&self) {
        let query = format!(
            "SELECT id || status || (record::json->>'step') FROM migrations WHERE id > {}",
            self.before
        );
        let mut seen = BTreeSet::new();
        while !self.over.load(Ordering::Relaxed) {
            seen.extend(self.cloud.sql(&query).unwrap_or_default());
            self.steps.store(seen.len(), Ordering::Relaxed);
            std::thread::sleep(PAUSE);
        }
    }

    fn await_moment(&self, moment: Moment) {
        let give_up = self.began + NO_STEP;
        while self.steps.load(Ordering::Relaxed) < moment.step && Instant::now() < give_up {
            std::thread::sleep(Duration::from_millis(10));
        }
        std::thread::sleep(moment.after);
    }

    fn ask(&self, one: &Move) -> Result<(), String> {
        let name = POOL[one.guest].name;
        let rate = one.bandwidth_mib_s.map(|rate| rate.to_string());
        let slowly = match &rate {
            Some(rate) => vec!["--bandwidth", rate],
            None => Vec::new(),
        };
        let ask = |words: &[&str], slowly: &[&str]| {
            let words = [words, slowly, &["--no-wait"]].concat();
            self.cloud.drover(&words).map(drop)
        };
        let other = match one.guest == self.case.moves[0].guest {
            true => self.parts.destination.clone(),
            false => Parts::of(self.cloud, one)?.destination,
        };
        let migrate = ["instance", "migrate", name, "--to", &other];
        match one.wish {
            Wish::Live => ask(&[&migrate[..], &["--live"]].concat(), &slowly),
            Wish::Cold { pre_copy, .. } => {
                let first = ["--pre-copy"];
                let first = if pre_copy { &first[..] } else { &[] };
                ask(&[&migrate[..], &["--cold"], first].concat(), &slowly)
            }
            Wish::Transfer { live } => self.transfer(name, live, &ask, &slowly),
            Wish::Drain { mixed } => {
                let how = if mixed { "--mixed" } else { "--live" };
                ask(&["node", "drain", &self.parts.source, how], &slowly)
            }
            Wish::Evacuate { by_itself, back_ms } => self.evacuate(by_itself, back_ms, &ask),
        }
    }

    fn transfer(
        &self,
        name: &str,
        live: bool,
        ask: &impl Fn(&[&str], &[&str]) -> Result<(), String>,
        slowly: &[&str],
    ) -> Result<(), String> {
        let shown = self.cloud.json(&["instance", "show", name])?;
        let to = match shown["project_id"].as_str() {
            Some("alpha") => "beta",
            _ => "alpha",
        };
        let how = if live { "--live" } else { "--cold" };
        ask(
            &["instance", "transfer", name, "--project", to, how],
            slowly,
        )
    }

    /// Its power goes, and comes back some time after.
    fn evacuate(
        &self,
        by_itself: bool,
        back_ms: u64,
        ask: &impl Fn(&[&str], &[&str]) -> Result<(), String>,
    ) -> Result<(), String> {
        let host = &self.parts.source;
        self.cloud.devstack("power", &[host, "off"])?;
        let asked = match by_itself {
            true => Ok(()),
            false => {
                let declared = self.cloud.drover(&["node", "force-down", host]);
                declared.and_then(|_| ask(&["node", "evacuate", host], &[]))
            }
        };
        std::thread::sleep(Duration::from_millis(back_ms));
        self.cloud.devstack("power", &[host, "on"])?;
        asked
    }

    fn harm(&self, fault: &Fault) -> Result<(), String> {
        self.await_moment(fault.when);
        match fault.harm {
            Harm::Kill { process, back_ms } => self.kill(process, back_ms),
            Harm::Pause { process, for_ms } => self.pause(process, for_ms),
            Harm::Hand { hand, at } => {
                // It may not be there, or not be in a state for that.
                let _ = self.virsh(hand, self.parts.host(at));
                Ok(())
            }
            Harm::Power { of, back_ms } => self.for_a_while("power", of, ["off", "on"], back_ms),
            Harm::Link { of, back_ms } => self.for_a_while("link", of, ["down", "up"], back_ms),
        }
    }

    fn for_a_while(
        &self,
        what: &str,
        part: Part,
        words: [&str; 2],
        back_ms: u64,
    ) -> Result<(), String> {
        let host = self.parts.host(part);
        self.cloud.devstack(what, &[host, words[0]])?;
        std::thread::sleep(Duration::from_millis(back_ms));
        // Meanwhile its power may have been cut, which healing ends.
        match what == "link" && self.cloud.has_lost_power(host) {
            true => Ok(()),
            false => self.cloud.devstack(what, &[host, words[1]]).map(drop),
        }
    }

    fn virsh(&self, hand: Hand, host: &str) -> Result<String, String> {
        let guest = self.parts.guest;
        match hand {
            Hand::Destroy => self.cloud.virsh(host, &["destroy", guest]),
            Hand::Shutdown => self.cloud.virsh(host, &["shutdown", guest]),
            Hand::Start => self.cloud.virsh(host, &["start", guest]),
            Hand::Reset => self.cloud.virsh(host, &["reset", guest]),
        }
    }

    fn kill(&self, process: Process, back_ms: u64) -> Result<(), String> {
        let Some((place, name)) = self.service(process) else {
            let pids = self.qemus(process);
            return signal("KILL", &pids);
        };
        self.cloud.devstack("service", &[place, name, "kill"])?;
        std::thread::sleep(Duration::from_millis(back_ms));
        self.cloud.start(place, name)
    }

    fn pause(&self, process: Process, for_ms: u64) -> Result<(), String> {
        let time = Duration::from_millis(for_ms);
        let Some((place, name)) = self.service(process) else {
            let pids = self.qemus(process);
            signal("STOP", &pids)?;
            std::thread::sleep(time);
            return signal("CONT", &pids);
        };
        self.cloud.devstack("service", &[place, name, "pause"])?;
        std::thread::sleep(time);
        self.cloud.devstack("service", &[place, name, "continue"])?;
        Ok(())
    }

    fn service(&self, process: Process) -> Option<(&str, &'static str)> {
        match process {
            Process::Conductor(at) => Some(("ctl", CONDUCTORS[at])),
            Process::Broker => Some(("ctl", "broker")),
            Process::Agent(part) => Some((self.parts.host(part), "agent")),
            Process::Libvirtd(part) => Some((self.parts.host(part), "libvirtd")),
            Process::Qemu(_) => None,
        }
    }

    fn qemus(&self, process: Process) -> Vec<u32> {
        match process {
            Process::Qemu(part) => self.cloud.qemus(self.parts.host(part), self.parts.guest),
            _ => Vec::new(),
        }
    }
}

/// Signals processes, those that are there still.
fn signal(name: &str, pids: &[u32]) -> Result<(), String> {
    for pid in pids {
        let mut kill = std::process::Command::new("kill");
        let kill = kill.args([&format!("-{name}"), &pid.to_string()]);
        kill.output().map_err(|e| e.to_string())?;
    }
    Ok(())
}
