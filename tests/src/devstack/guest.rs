//! A guest of a test: where it is, what it says of itself, a TCP session to it.

use std::{
    io::{BufRead, BufReader, Lines},
    process::{Child, ChildStdout, Stdio},
};

use serde_json::Value;

use super::Devstack;

/// A guest of a test.
pub struct Guest<'a> {
    devstack: &'a Devstack,
    /// Its name.
    pub name: String,
}

impl<'a> Guest<'a> {
    /// That name's, whether it is there or not.
    pub(super) fn new(devstack: &'a Devstack, name: &str) -> Self {
        Self {
            devstack,
            name: name.to_owned(),
        }
    }
}

impl Guest<'_> {
    /// Where the hypervisors have it, and nowhere else.
    pub fn node(&self) -> String {
        let here = |host: &&String| self.state_on(host).as_deref() == Some("running");
        let nodes: Vec<&String> = self.devstack.nodes.iter().filter(here).collect();
        assert_eq!(nodes.len(), 1, "{} runs on {nodes:?}", self.name);
        nodes[0].clone()
    }

    /// Its state as a node's libvirt tells it; none where it is not defined.
    pub fn state_on(&self, host: &str) -> Option<String> {
        let state = self.devstack.on(host, &["virsh", "domstate", &self.name]);
        let text = String::from_utf8_lossy(&state.stdout).trim().to_owned();
        state.status.success().then_some(text)
    }

    /// It is on that node in that state, and no other knows anything of it.
    pub fn assert_only_on(&self, host: &str, state: &str) {
        for node in &self.devstack.nodes {
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
    pub(super) fn remove(&self) {
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

    /// Generation that its definition on a node names; 0 if it names none.
    pub fn generation_on(&self, host: &str) -> u64 {
        let args = [host, "virsh", "dumpxml", "--inactive", &self.name];
        let xml = self.devstack.ok("on", &args);
        let after = xml.split("generation>").nth(1);
        after
            .and_then(|t| t.split('<').next()?.parse().ok())
            .unwrap_or(0)
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

/// Guests that were made, and go, at once.
pub struct Party<'a> {
    guests: Vec<Guest<'a>>,
}

impl<'a> Party<'a> {
    pub(super) fn new(guests: Vec<Guest<'a>>) -> Self {
        Self { guests }
    }

    /// One of them.
    ///
    /// # Panics
    /// There is none of that name.
    pub fn get(&self, name: &str) -> &Guest<'a> {
        let found = self.guests.iter().find(|guest| guest.name == name);
        found.expect("it is of the party")
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Guest<'a>> {
        self.guests.iter()
    }
}

impl Drop for Party<'_> {
    fn drop(&mut self) {
        std::thread::scope(|scope| {
            for guest in self.guests.drain(..) {
                scope.spawn(move || drop(guest));
            }
        });
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
