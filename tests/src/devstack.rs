//! A devstack as the cluster tests see it: the same commands that a person
//! types, a guest of one's own for each test, and a TCP session to it that
//! tells how long it stood still.

use std::{
    io::{BufRead, BufReader, Lines},
    path::PathBuf,
    process::{Child, ChildStdout, Command, Output, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde_json::Value;

/// One test at a time: they share two small nodes, and kill each other's services.
static TURN: Mutex<()> = Mutex::new(());

/// Longer than anything that is waited for here takes.
const LONGEST: Duration = Duration::from_secs(120);

/// The devstack, held for one test.
pub struct Devstack {
    directory: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

impl Devstack {
    /// The devstack of `DROVER_DEVSTACK`; none, said aloud, without one.
    ///
    /// # Panics
    /// There is none, and `DROVER_REQUIRE_REAL=1` wants one.
    pub fn take() -> Option<Self> {
        let Some(directory) = std::env::var_os("DROVER_DEVSTACK") else {
            assert!(
                std::env::var_os("DROVER_REQUIRE_REAL").is_none(),
                "DROVER_DEVSTACK is not set"
            );
            println!("SKIPPED: needs a devstack, see devstack/test");
            return None;
        };
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let devstack = Self {
            directory: directory.into(),
            _turn: turn,
        };
        devstack.heal();
        Some(devstack)
    }

    /// Everything as a test before should have left it.
    fn heal(&self) {
        for (place, service) in [("ctl", "conductor"), ("kvm1", "agent"), ("kvm2", "agent")] {
            self.ok("service", &[place, service, "start"]);
        }
        for host in ["kvm1", "kvm2"] {
            self.ok("service", &[host, "libvirtd", "start"]);
            self.ok("link", &[host, "up"]);
            self.drover(&["node", "enable", host]);
        }
    }

    fn command(&self, script: &str, args: &[&str]) -> Command {
        let mut command = Command::new(self.directory.join(script));
        command.args(args).stdin(Stdio::null());
        command
    }

    /// Runs one of the devstack's commands.
    pub fn run(&self, script: &str, args: &[&str]) -> Output {
        self.command(script, args)
            .output()
            .expect("the devstack's commands can be run")
    }

    /// The same, and it must work; gives what it printed.
    pub fn ok(&self, script: &str, args: &[&str]) -> String {
        let output = self.run(script, args);
        assert!(
            output.status.success(),
            "{script} {args:?}: {}",
            told(&output)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs a command on a node.
    pub fn on(&self, place: &str, command: &[&str]) -> Output {
        self.run("on", &[&[place], command].concat())
    }

    /// Runs the operator's command.
    pub fn drover(&self, args: &[&str]) -> Output {
        self.on("ctl", &[&["drover"], args].concat())
    }

    /// Runs the operator's command, which must work, and reads its JSON.
    pub fn json(&self, args: &[&str]) -> Value {
        let output = self.drover(&[args, &["--json"]].concat());
        assert!(
            output.status.success(),
            "drover {args:?}: {}",
            told(&output)
        );
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    /// A new guest on kvm1, gone at the end of the test. Its name tells where
    /// its disk is: `vm21` on its node, `shared21` on storage that nodes share.
    pub fn guest(&self, name: &str) -> Guest<'_> {
        self.guest_with(name, &[])
    }

    /// The same, with options of `devstack/guest add`.
    pub fn guest_with(&self, name: &str, options: &[&str]) -> Guest<'_> {
        let guest = Guest {
            devstack: self,
            name: name.to_owned(),
        };
        guest.remove();
        self.ok(
            "guest",
            &[&[name, "add", "--node", "kvm1"], options].concat(),
        );
        guest.until_known("kvm1");
        self.until_room();
        guest
    }

    /// Waits until every node has room for a guest of two vCPUs: what guests of
    /// tests before used counts as used until the conductor forgets them.
    fn until_room(&self) {
        self.until("there is room on every node", || {
            let nodes = self.json(&["node", "list"]);
            nodes.as_array().into_iter().flatten().all(|node| {
                let of = |field: &str| node[field].as_u64().unwrap_or(0);
                of("vcpus_usable") == 0 || of("vcpus_used") + 2 <= of("vcpus_usable")
            })
        });
    }

    /// Starts a live migration and follows its record, one version after the other.
    pub fn start(&self, args: &[&str]) -> Following {
        self.begin("--live", args)
    }

    /// The same, cold.
    pub fn start_cold(&self, args: &[&str]) -> Following {
        self.begin("--cold", args)
    }

    fn begin(&self, way: &str, args: &[&str]) -> Following {
        let full = [&["instance", "migrate"], args, &[way, "--no-wait"]].concat();
        let accepted = self.json(&full);
        self.follow(accepted["uuid"].as_str().expect("a record"))
    }

    /// Follows a migration from now on.
    pub fn follow(&self, id: &str) -> Following {
        let mut child = self
            .command("on", &["ctl", "drover", "migration", "watch", id, "--json"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("the command can be run");
        let lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        Following {
            id: id.to_owned(),
            child,
            lines,
        }
    }

    /// Runs a shell script on a node, which must work; gives what it printed.
    pub fn sh(&self, place: &str, script: &str) -> String {
        self.ok("on", &[place, "sh", "-ec", script])
    }

    /// Looks again until something is so.
    ///
    /// # Panics
    /// It never is.
    pub fn until(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let give_up = Instant::now() + LONGEST;
        // Each look starts a process or more, which takes its own time.
        while !is_so() {
            assert!(Instant::now() < give_up, "never so: {what}");
        }
    }

    /// The directory that all nodes share.
    pub fn shared(&self) -> String {
        let exports = self.ok("env", &[]);
        let shared = exports
            .lines()
            .find_map(|line| line.strip_prefix("export DROVER_SHARED="));
        shared.expect("devstack/env has it").to_owned()
    }

    /// SHA-256 of a file on a node.
    pub fn sha256(&self, host: &str, path: &str) -> String {
        let line = self.ok("on", &[host, "sha256sum", path]);
        line.split(' ').next().expect("a sum").to_owned()
    }

    /// Neither node keeps anything for a migration: files aside, journals.
    pub fn assert_nothing_kept(&self, id: &str) {
        let shared = self.shared();
        let find = format!("find /var/lib/libvirt /var/lib/drover '{shared}' -name '*{id}*'");
        for host in ["kvm1", "kvm2"] {
            let kept = self.sh(host, &find);
            assert_eq!(kept, "", "{host} keeps something of {id}");
        }
    }
}

/// What a command said.
pub fn told(output: &Output) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    format!(
        "{} {}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    )
}

/// A guest of a test.
pub struct Guest<'a> {
    devstack: &'a Devstack,
    /// Its name.
    pub name: String,
}

impl Guest<'_> {
    /// Where the hypervisors have it, and nowhere else.
    pub fn node(&self) -> String {
        let here = |host: &&str| self.state_on(host).as_deref() == Some("running");
        let nodes: Vec<&str> = ["kvm1", "kvm2"].into_iter().filter(here).collect();
        assert_eq!(nodes.len(), 1, "{} runs on {nodes:?}", self.name);
        nodes[0].to_owned()
    }

    /// Its state as a node's libvirt tells it; none where it is not defined.
    pub fn state_on(&self, host: &str) -> Option<String> {
        let state = self.devstack.on(host, &["virsh", "domstate", &self.name]);
        let text = String::from_utf8_lossy(&state.stdout).trim().to_owned();
        state.status.success().then_some(text)
    }

    /// It is on that node in that state, and the other knows nothing of it.
    pub fn assert_only_on(&self, host: &str, state: &str) {
        for node in ["kvm1", "kvm2"] {
            let expected = (node == host).then_some(state);
            assert_eq!(
                self.state_on(node).as_deref(),
                expected,
                "{} on {node}",
                self.name
            );
        }
    }

    /// Waits until the conductor has it on a node, as that node's agent saw it.
    pub fn until_known(&self, host: &str) {
        let what = format!("the conductor has {} on {host}", self.name);
        self.devstack.until(&what, || {
            let args = ["instance", "show", &self.name, "--json"];
            let shown = self.devstack.drover(&args);
            let found: Value = serde_json::from_slice(&shown.stdout).unwrap_or_default();
            // One of before, with the same UUID, may still be on record as missing.
            found["host"] == host && found["vm_state"] != "unknown"
        });
    }

    /// Waits until it answers.
    pub fn until_up(&self) {
        self.devstack.ok("guest", &[&self.name, "await"]);
    }

    /// Removes it and all of it.
    fn remove(&self) {
        // What waits to be confirmed would keep the next of its name from moving.
        self.devstack.drover(&["instance", "confirm", &self.name]);
        self.devstack.run("guest", &[&self.name, "remove"]);
    }

    /// Its UUID, for when another domain has its name.
    pub fn uuid(&self) -> String {
        let uuid = self
            .devstack
            .ok("on", &["kvm1", "virsh", "domuuid", &self.name]);
        uuid.trim().to_owned()
    }

    /// Its own account of what it knows now.
    pub fn status(&self) -> Value {
        let account = self.devstack.ok("guest", &[&self.name, "status"]);
        serde_json::from_str(account.trim()).expect("JSON")
    }

    /// Its own account after it checked all its memory and every disk record.
    pub fn check(&self) -> Value {
        let account = self.devstack.ok("guest", &[&self.name, "check"]);
        let account: Value = serde_json::from_str(account.trim()).expect("JSON");
        assert_eq!(
            (&account["mem_ok"], &account["disk_ok"]),
            (&true.into(), &true.into()),
            "{account}"
        );
        account
    }

    /// Nothing of it is on a node: no domain and no disk.
    pub fn assert_no_trace_on(&self, host: &str) {
        let listed = self
            .devstack
            .ok("on", &[host, "virsh", "list", "--all", "--name"]);
        assert!(
            !listed.lines().any(|name| name.trim() == self.name),
            "{host} still has {}",
            self.name
        );
        let disks = format!(
            "find /var/lib/libvirt/images -name '{0}.*' -o -name '{0}-*'",
            self.name
        );
        assert_eq!(self.devstack.sh(host, &disks), "", "{host} still has them");
    }

    /// Opens a TCP session to its echo.
    pub fn session(&self) -> Session {
        let all = self.devstack.ok("guests", &["--json"]);
        let all: Value = serde_json::from_str(&all).expect("JSON");
        let mine = all
            .as_array()
            .into_iter()
            .flatten()
            .find(|g| g["name"] == self.name.as_str());
        let ip = mine
            .and_then(|g| g["ip"].as_str())
            .expect("it has an address")
            .to_owned();
        let probe = self.devstack.directory.join("lib/tcp-probe");
        let probe = probe.to_str().expect("a path in UTF-8");
        let mut child = self
            .devstack
            .command("on", &["client", "python3", probe, &ip])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the probe can be run");
        let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let first = lines.next().expect("a line").expect("text");
        assert_eq!(first, "ready");
        Session { child, lines }
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        self.remove();
    }
}

/// An open TCP session.
pub struct Session {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Session {
    /// Ends it; it must have lived, and every byte come back in order. Gives
    /// its longest pause, ms.
    pub fn end(mut self) -> f64 {
        drop(self.child.stdin.take());
        let account = self.lines.next().expect("an account").expect("text");
        let account: Value = serde_json::from_str(&account).expect("JSON");
        assert_eq!(account["alive"], true, "{account}");
        assert_eq!(account["sent"], account["received"], "{account}");
        let _ = self.child.wait();
        account["longest_pause_ms"].as_f64().expect("a number")
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A migration that is followed.
pub struct Following {
    /// Its UUID.
    pub id: String,
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Following {
    /// The next version of its record that satisfies something.
    pub fn until(&mut self, what: &str, want: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        for line in self.lines.by_ref() {
            last = serde_json::from_str(&line.expect("text")).expect("JSON");
            if want(&last) {
                return last;
            }
        }
        panic!("never {what}: {last:#}");
    }

    /// Waits until memory is on its way.
    pub fn until_sending(&mut self) -> Value {
        self.until("sending", |m| {
            m["progress"]["memory"]["processed_bytes"].as_u64() > Some(0)
        })
    }

    /// Waits until disks are on their way while the guest is off.
    pub fn until_copying(&mut self) -> Value {
        self.until("copying", |m| {
            m["progress"]["phase"] == "disk"
                && m["progress"]["disk"]["processed_bytes"].as_u64() > Some(4 << 20)
        })
    }

    /// Waits until disks are being copied.
    pub fn until_disk(&mut self) -> Value {
        self.until("copying", |m| {
            m["progress"]["disk"]["processed_bytes"].as_u64() > Some(0)
        })
    }

    /// Its record at its end.
    pub fn end(mut self) -> Value {
        self.until("at its end", |m| m["finished_at_ms"].is_u64())
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
