//! The devstack that is tortured: its commands, its processes, its record, each
//! call within a limit. Nothing here asks Drover but [`Cloud::drover`].

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

use super::plan::{LOAD, POOL};
use crate::devstack::{Devstack, told};

/// Short, so that a pause is long.
const CONDUCTOR: &str = "lease_s = 5\nservice_down_time_s = 8\nauto_evacuate = true\n\
    auto_evacuate_delay_s = 3\nauto_evacuate_max_per_hour = 100\nauto_evacuate_max_per_node = 100\n";
const AGENT: &str = "report_interval_s = 1\n";
/// Its conductors.
pub(super) const CONDUCTORS: [&str; 2] = ["conductor", "conductor2"];

/// What a call may take.
const LIMIT: Duration = Duration::from_secs(120);

/// See the module.
pub(super) struct Cloud<'a> {
    _held: &'a Devstack,
    directory: PathBuf,
    drover: String,
    name: String,
    /// Namespaces, logs.
    pub(super) run: PathBuf,
    /// Disks.
    pub(super) state: PathBuf,
    /// Its nodes.
    pub(super) hosts: Vec<String>,
    /// Where the record is.
    database: String,
}

/// A domain as its node's libvirt lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Domain {
    pub(super) host: String,
    pub(super) name: String,
    /// `running`, `shut off`, `paused`.
    pub(super) state: String,
}

impl<'a> Cloud<'a> {
    /// A devstack with an empty record at that database.
    pub(super) fn new(devstack: &'a Devstack, database: &str) -> Self {
        let export = |name| devstack.export(name);
        let mut hosts = devstack.nodes().to_vec();
        hosts.truncate(3);
        Self {
            _held: devstack,
            directory: export("DEVSTACK").into(),
            drover: export("BIN"),
            name: export("DEVSTACK_NAME"),
            run: export("DEVSTACK_RUN").into(),
            state: export("DEVSTACK_STATE").into(),
            hosts,
            database: database.to_owned(),
        }
    }

    /// Everything anew: the record, what agents remember, the guests.
    pub(super) fn make(&self) -> Result<(), String> {
        let mut made = self.try_to_make();
        // A busy machine may take longer over one of its parts than that may take.
        for _ in 0..2 {
            if made.is_err() {
                made = self.try_to_make();
            }
        }
        made
    }

    fn try_to_make(&self) -> Result<(), String> {
        self.heal()?;
        for name in CONDUCTORS {
            self.devstack("service", &["ctl", name, "stop"])?;
        }
        for host in &self.hosts {
            self.devstack("service", &[host, "agent", "stop"])?;
        }
        self.forget()?;
        let remove = |name: &str| self.devstack("guest", &[name, "remove"]).map(drop);
        self.each_guest(|at| remove(POOL[at].name))?;
        let write = |path: PathBuf, text: &str| std::fs::write(path, text).map_err(words);
        write(self.run.join("ctl/database-url"), &self.database)?;
        write(self.run.join("ctl/settings.toml"), CONDUCTOR)?;
        for host in &self.hosts {
            write(self.run.join(host).join("settings.toml"), AGENT)?;
            let kept = self.state.join(host).join("var/lib/drover");
            for entry in std::fs::read_dir(kept).map_err(words)?.flatten() {
                let path = entry.path();
                let gone = match path.is_dir() {
                    true => std::fs::remove_dir_all(path),
                    false => std::fs::remove_file(path),
                };
                gone.map_err(words)?;
            }
        }
        self.start_all()?;
        self.until("the first reports", Duration::from_secs(60), || {
            self.drover(&["doctor"]).is_ok()
        })?;
        self.projects()?;
        self.each_guest(|at| self.add(at))?;
        self.until("the guests are known", Duration::from_secs(60), || {
            self.known().is_ok_and(|known| known.len() == POOL.len())
        })
    }

    /// As it was before, for whoever uses the devstack next.
    pub(super) fn leave(&self) -> Result<(), String> {
        self.heal()?;
        let remove = |name: &str| self.devstack("guest", &[name, "remove"]).map(drop);
        self.each_guest(|at| remove(POOL[at].name))?;
        self.devstack("service", &["ctl", CONDUCTORS[1], "stop"])?;
        let settings = self.run.join("ctl/settings.toml");
        for file in [settings, self.run.join("ctl/database-url")] {
            let _ = std::fs::remove_file(file);
        }
        self.devstack("service", &["ctl", CONDUCTORS[0], "restart"])?;
        for host in &self.hosts {
            let _ = std::fs::remove_file(self.run.join(host).join("settings.toml"));
            self.devstack("service", &[host, "agent", "restart"])?;
        }
        Ok(())
    }

    fn add(&self, at: usize) -> Result<(), String> {
        let host = &self.hosts[at % self.hosts.len()];
        let guest = &POOL[at];
        let words = [guest.name, "add", "--node", host, "--cmdline", LOAD];
        self.devstack("guest", &[&words[..], guest.options].concat())
            .map(drop)
    }

    fn projects(&self) -> Result<(), String> {
        for project in ["alpha", "beta"] {
            let network = format!("lan=bridge:br-{project}");
            let storage = format!("directory:/var/lib/libvirt/projects/{project}");
            let room = ["--instances", "20", "--vcpus", "20", "--memory-mib", "8192"];
            let words = [
                &["project", "create", project, "--network", &network][..],
                &["--storage", &storage, "--disk-gib", "20"],
                &room,
            ];
            self.drover(&words.concat())?;
        }
        Ok(())
    }

    /// Does something for every guest at once.
    pub(super) fn each_guest<T: Send>(
        &self,
        work: impl Fn(usize) -> Result<T, String> + Sync,
    ) -> Result<Vec<T>, String> {
        std::thread::scope(|scope| {
            let work = &work;
            let begin = |at| scope.spawn(move || work(at));
            let threads: Vec<_> = (0..POOL.len()).map(begin).collect();
            let done = threads.into_iter().map(|t| t.join().expect("no panic"));
            done.collect()
        })
    }

    /// Everything runs again, as supervisors and people would see to.
    pub(super) fn heal(&self) -> Result<(), String> {
        for host in &self.hosts {
            self.devstack("power", &[host, "on"])?;
            self.devstack("link", &[host, "up"])?;
        }
        self.start_all()
    }

    fn start_all(&self) -> Result<(), String> {
        self.devstack("service", &["ctl", "broker", "start"])?;
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for name in CONDUCTORS {
                threads.push(scope.spawn(move || self.start("ctl", name)));
            }
            for host in &self.hosts {
                threads.push(scope.spawn(move || {
                    self.start(host, "libvirtd")?;
                    self.start(host, "agent")
                }));
            }
            let all = threads.into_iter().map(|t| t.join().expect("no panic"));
            all.collect()
        })
    }

    /// Starts a service that does not run, unless its node has no power.
    pub(super) fn start(&self, place: &str, name: &str) -> Result<(), String> {
        if self.has_lost_power(place) {
            return Ok(());
        }
        self.devstack("service", &[place, name, "start"]).map(drop)
    }

    /// Whether a node's power is cut.
    pub(super) fn has_lost_power(&self, host: &str) -> bool {
        self.run.join(host).join("off").exists()
    }

    /// One of the devstack's commands.
    pub(super) fn devstack(&self, script: &str, args: &[&str]) -> Result<String, String> {
        let path = self.directory.join(script);
        run(&path, args, LIMIT)
    }

    /// The operator's command.
    pub(super) fn drover(&self, args: &[&str]) -> Result<String, String> {
        run(Path::new(&self.drover), args, LIMIT)
    }

    /// The same, tried again while nobody is there who listens.
    pub(super) fn drover_surely(&self, args: &[&str]) -> Result<(), String> {
        let mut said = String::new();
        let asked = self.until("Drover takes an order", LIMIT, || {
            let answer = self.drover(args);
            said = answer.clone().err().unwrap_or_default();
            answer.is_ok()
        });
        asked.map_err(|_| said)
    }

    /// The same, as JSON.
    pub(super) fn json(&self, args: &[&str]) -> Result<Value, String> {
        let text = self.drover(&[args, &["--json"]].concat())?;
        serde_json::from_str(&text).map_err(words)
    }

    /// virsh on a node, over its libvirtd's socket.
    pub(super) fn virsh(&self, host: &str, args: &[&str]) -> Result<String, String> {
        let socket = self.run.join(host).join("run/libvirt/libvirt-sock");
        let uri = format!("qemu:///system?socket={}", socket.display());
        let args = [&["-q", "-c", &uri], args].concat();
        run(Path::new("virsh"), &args, Duration::from_secs(15))
    }

    /// Every domain of every node.
    pub(super) fn domains(&self) -> Result<Vec<Domain>, String> {
        let mut all = Vec::new();
        for host in &self.hosts {
            for line in self.virsh(host, &["list", "--all"])?.lines() {
                let mut columns = line.split_whitespace().skip(1);
                let Some(name) = columns.next() else { continue };
                let state: Vec<_> = columns.collect();
                all.push(Domain {
                    host: host.clone(),
                    name: name.to_owned(),
                    state: state.join(" "),
                });
            }
        }
        Ok(all)
    }

    /// Where a guest is, if it is on one node alone.
    pub(super) fn place_of(&self, name: &str) -> Result<Domain, String> {
        let mut all = self.domains()?;
        all.retain(|domain| domain.name == name);
        match &all[..] {
            [one] => Ok(one.clone()),
            _ => Err(format!("{name} is at {all:?}")),
        }
    }

    /// What the record says of each guest: its name, its node, its power state.
    pub(super) fn known(&self) -> Result<Vec<(String, String, String)>, String> {
        let listed = self.json(&["instance", "list"])?;
        let text = |v: &Value, field: &str| v[field].as_str().unwrap_or_default().to_owned();
        let row = |v: &Value| (text(v, "name"), text(v, "host"), text(v, "power_state"));
        let all = listed.as_array().into_iter().flatten();
        let wrong = all.clone().find(|v| !v["other_copy"].is_null());
        if let Some(wrong) = wrong {
            return Err(format!("two copies on the record: {wrong}"));
        }
        Ok(all.map(row).collect())
    }

    /// Rows of the record, past Drover; columns are apart by `|`.
    pub(super) fn sql(&self, query: &str) -> Result<Vec<String>, String> {
        let args = ["-X", "-At", "-v", "ON_ERROR_STOP=1", "-c", query];
        let args = [&args[..], &[&self.database]].concat();
        let text = run(Path::new("psql"), &args, LIMIT)?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// Empties the record, tables and all.
    fn forget(&self) -> Result<(), String> {
        self.sql(
            "DO $$ DECLARE own text := current_schema(); BEGIN \
             EXECUTE format('DROP SCHEMA %I CASCADE', own); EXECUTE format('CREATE SCHEMA %I', own); \
             END $$",
        )
        .map(drop)
    }

    /// QEMUs of a guest on a node, by the machine's processes.
    pub(super) fn qemus(&self, host: &str, guest: &str) -> Vec<u32> {
        let Some(net) = inode(&self.netns(host)) else {
            return Vec::new();
        };
        let mut all = qemus();
        all.retain(|q| q.guest == guest && inode(&q.netns()) == Some(net));
        all.into_iter().map(|q| q.pid).collect()
    }

    /// The node that a process is on.
    pub(super) fn host_of(&self, qemu: &Qemu) -> Option<&str> {
        let net = inode(&qemu.netns())?;
        let mut hosts = self.hosts.iter();
        hosts
            .find(|host| inode(&self.netns(host)) == Some(net))
            .map(String::as_str)
    }

    fn netns(&self, host: &str) -> PathBuf {
        format!("/run/netns/{}.{host}", self.name).into()
    }

    /// Looks again until something is so, for so long.
    pub(super) fn until(
        &self,
        what: &str,
        limit: Duration,
        mut is_so: impl FnMut() -> bool,
    ) -> Result<(), String> {
        let began = Instant::now();
        while !is_so() {
            if began.elapsed() > limit {
                return Err(format!("never so: {what}"));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }

    /// A guest's own account.
    pub(super) fn account(&self, name: &str, how: &str) -> Result<Value, String> {
        let text = self.devstack("guest", &[name, how])?;
        serde_json::from_str(text.trim()).map_err(|e| format!("{name} says '{text}': {e}"))
    }

    /// Runs a command on a node.
    pub(super) fn on(&self, host: &str, args: &[&str]) -> Result<String, String> {
        self.devstack("on", &[&[host], args].concat())
    }
}

/// A QEMU among the machine's processes.
pub(super) struct Qemu {
    pub(super) pid: u32,
    pub(super) guest: String,
}

impl Qemu {
    fn netns(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.pid).into()
    }
}

/// All of this machine.
pub(super) fn qemus() -> Vec<Qemu> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let qemu = |entry: std::fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line);
        let guest = line.split("\0guest=").nth(1)?.split([',', '\0']).next()?;
        Some(Qemu {
            pid,
            guest: guest.to_owned(),
        })
    };
    processes.filter_map(qemu).collect()
}

fn inode(path: &Path) -> Option<u64> {
    Some(std::fs::metadata(path).ok()?.ino())
}

/// Runs a command that must work, within a limit.
pub(super) fn run(program: &Path, args: &[&str], limit: Duration) -> Result<String, String> {
    let mut command = Command::new("timeout");
    command
        .args(["-k", "5", &limit.as_secs().to_string()])
        .arg(program)
        .args(args)
        .stdin(Stdio::null());
    let output = command.output().map_err(words)?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => {
            let name = program.file_name().unwrap_or_default().to_string_lossy();
            Err(format!("{name} {args:?}: {}", told(&output)))
        }
    }
}

fn words(error: impl std::fmt::Display) -> String {
    error.to_string()
}
