//! Migrations and operations, followed one version after the other.

use std::{
    io::{BufRead, BufReader, Lines},
    process::{Child, ChildStdout, Command, Stdio},
};

use serde_json::Value;

/// A migration that is followed.
pub struct Following {
    /// Its UUID.
    pub id: String,
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Following {
    /// By a command that prints each version on a line.
    pub(super) fn new(id: &str, mut command: Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .spawn()
            .expect("the command can be run");
        let lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        Self {
            id: id.to_owned(),
            child,
            lines,
        }
    }

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

    /// Waits until an operation has a guest under way whose memory moves; gives
    /// that migration.
    pub fn until_one_sends(&mut self) -> Value {
        let sends = |m: &&Value| m["progress"]["memory"]["processed_bytes"].as_u64() > Some(0);
        let of = |view: &Value| {
            let all = view["migrations"].as_array();
            all.and_then(|all| all.iter().find(sends).cloned())
        };
        let view = self.until("sending", |view| of(view).is_some());
        of(&view).expect("there is one")
    }

    /// An operation's record at its end.
    pub fn operation_end(mut self) -> Value {
        let over = |view: &Value| view["operation"]["finished_at_ms"].is_u64();
        self.until("at its end", over)["operation"].clone()
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
