//! A devstack as the cluster tests see it: the same commands that a person
//! types, a guest of one's own for each test, and a TCP session to it that
//! tells how long it stood still.

mod following;
mod guest;
mod twice;

use std::{
    path::PathBuf,
    process::{Command, Output, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde_json::Value;

pub use following::Following;
pub use guest::{Guest, Party, Session};
pub use twice::Lookout;

/// One test at a time: they share two small nodes, and kill each other's services.
static TURN: Mutex<()> = Mutex::new(());

/// Longer than anything that is waited for here takes.
const LONGEST: Duration = Duration::from_secs(120);

/// The devstack, held for one test.
pub struct Devstack {
    directory: PathBuf,
    /// What `devstack/env` tells.
    exports: String,
    /// Its nodes, also those that the test leaves alone.
    nodes: Vec<String>,
    _turn: MutexGuard<'static, ()>,
}

impl Devstack {
    /// The devstack of `DROVER_DEVSTACK`, with two nodes that take guests; none,
    /// said aloud, without one.
    ///
    /// # Panics
    /// There is none, and `DROVER_REQUIRE_REAL=1` wants one.
    pub fn take() -> Option<Self> {
        Self::take_with(2)
    }

    /// The same, with three nodes that take guests.
    ///
    /// # Panics
    /// As [`Self::take`].
    pub fn take_three() -> Option<Self> {
        Self::take_with(3)
    }

    fn take_with(open: usize) -> Option<Self> {
        let Some(directory) = std::env::var_os("DROVER_DEVSTACK") else {
            assert!(
                std::env::var_os("DROVER_REQUIRE_REAL").is_none(),
                "DROVER_DEVSTACK is not set"
            );
            println!("SKIPPED: needs a devstack, see devstack/test");
            return None;
        };
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let mut devstack = Self {
            directory: directory.into(),
            exports: String::new(),
            nodes: Vec::new(),
            _turn: turn,
        };
        devstack.exports = devstack.ok("env", &[]);
        let nodes = devstack.export("NODES");
        devstack.nodes = nodes.split('\\').map(|n| n.trim().to_owned()).collect();
        let has = devstack.nodes.len();
        assert!(
            has >= open,
            "the devstack has {has} nodes: up --nodes {open}"
        );
        devstack.heal(open);
        Some(devstack)
    }

    /// Everything as a test before should have left it; nodes after the first
    /// few stay out of it.
    fn heal(&self, open: usize) {
        self.ok("service", &["ctl", "conductor", "start"]);
        for (at, host) in self.nodes.iter().enumerate() {
            self.ok("power", &[host, "on"]);
            self.ok("service", &[host, "agent", "start"]);
            self.ok("link", &[host, "up"]);
            let word = if at < open { "enable" } else { "disable" };
            self.drover(&["node", word, host]);
            if open > 2 {
                self.drover(&["node", "force-down", host, "--unset"]);
            }
        }
    }

    /// Its nodes, also those that the test leaves alone.
    pub fn nodes(&self) -> &[String] {
        &self.nodes
    }

    /// What `devstack/env` tells under a name.
    ///
    /// # Panics
    /// It does not.
    pub fn export(&self, name: &str) -> String {
        let start = format!("export DROVER_{name}=");
        let found = self
            .exports
            .lines()
            .find_map(|line| line.strip_prefix(&start));
        found.expect("devstack/env has it").to_owned()
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
        let guest = self.guest_on("kvm1", name, options);
        self.until_room();
        guest
    }

    /// The same, on another node, and whether there is room for it elsewhere or
    /// not.
    pub fn guest_on(&self, host: &str, name: &str, options: &[&str]) -> Guest<'_> {
        let guest = Guest::new(self, name);
        guest.remove();
        self.ok("guest", &[&[name, "add", "--node", host], options].concat());
        guest.until_known(host);
        guest
    }

    /// Several at once.
    pub fn party(&self, host: &str, wanted: &[(&str, &[&str])]) -> Party<'_> {
        let guests = std::thread::scope(|scope| {
            let mut making = Vec::new();
            for &(name, options) in wanted {
                making.push(scope.spawn(move || self.guest_on(host, name, options)));
            }
            let made = making
                .into_iter()
                .map(|one| one.join().expect("it is made"));
            made.collect()
        });
        self.until_room();
        Party::new(guests)
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
        self.watch("migration", id)
    }

    /// Begins an operation on nodes and follows it: its record, and migrations
    /// of it that are under way.
    pub fn begin_operation(&self, args: &[&str]) -> Following {
        let accepted = self.json(&[&["node"], args, &["--no-wait"]].concat());
        self.watch("operation", accepted["uuid"].as_str().expect("a record"))
    }

    /// Carries an operation on nodes out, which must exit so; gives its record.
    pub fn operation(&self, code: i32, args: &[&str]) -> Value {
        let output = self.drover(&[&["node"], args, &["--json"]].concat());
        assert_eq!(output.status.code(), Some(code), "{}", told(&output));
        let view: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|e| panic!("{e}: {}", told(&output)));
        view["operation"].clone()
    }

    /// What a dry run of an operation on nodes says.
    pub fn dry_run(&self, args: &[&str]) -> Value {
        let output = self.drover(&[&["node"], args, &["--dry-run", "--json"]].concat());
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", told(&output)))
    }

    /// Waits until what it takes to start a node's guests elsewhere was told.
    ///
    /// # Panics
    /// It never is.
    pub fn until_kept(&self, host: &str, guests: &[&str]) {
        let moves = |answer: &Value, name: &str| {
            let all = answer["plan"]["moves"].as_array().into_iter().flatten();
            let mut named = all.filter(|guest| guest["name"] == name);
            named.any(|guest| guest["verdict"]["verdict"] == "moves")
        };
        self.until("definitions are kept", || {
            let answer = self.dry_run(&["evacuate", host]);
            guests.iter().all(|name| moves(&answer, name))
        });
    }

    fn watch(&self, noun: &str, id: &str) -> Following {
        Following::new(
            id,
            self.command("on", &["ctl", "drover", noun, "watch", id, "--json"]),
        )
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

    /// Gives a place's service further settings, and restarts the conductor; as
    /// it was at the end of the test.
    pub fn settings(&self, text: &str) -> Settings<'_> {
        let file = format!("{}/ctl/settings.toml", self.export("DEVSTACK_RUN"));
        std::fs::write(&file, text).expect("it can be written");
        self.ok("service", &["ctl", "conductor", "restart"]);
        Settings {
            devstack: self,
            file,
        }
    }

    /// The directory that all nodes share.
    pub fn shared(&self) -> String {
        self.export("SHARED")
    }

    /// SHA-256 of a file on a node.
    pub fn sha256(&self, host: &str, path: &str) -> String {
        let line = self.ok("on", &[host, "sha256sum", path]);
        line.split(' ').next().expect("a sum").to_owned()
    }

    /// Neither node keeps anything for a migration, files aside or journals, but the
    /// memory that it is over.
    pub fn assert_nothing_kept(&self, id: &str) {
        let shared = self.shared();
        let find = format!(
            "find /var/lib/libvirt /var/lib/drover '{shared}' -path /var/lib/drover/seen -prune \
             -o -name '*{id}*' -print"
        );
        for host in &self.nodes {
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

/// Settings for a test.
pub struct Settings<'a> {
    devstack: &'a Devstack,
    file: String,
}

impl Drop for Settings<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
        self.devstack
            .run("service", &["ctl", "conductor", "restart"]);
    }
}
