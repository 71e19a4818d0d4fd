//! Where a node's agent takes files in. Agents are processes: what one of them
//! holds is gone when it is.

use std::sync::{Arc, Weak};

use drover_model::ids::HostName;
use uuid::Uuid;

use super::{
    super::{HypervisorError, Incoming, Result},
    node::Node,
    world::World,
};

/// Digits of a token.
const TOKEN_DIGITS: usize = 64;
/// Most files under one key.
const MOST_FILES: usize = 256;

/// An agent's process: lives as long as somebody holds it.
#[derive(Debug)]
pub(super) struct Process;

/// What is to come in under one key.
#[derive(Debug, Clone)]
pub(super) struct Inbox {
    token: String,
    pub(super) files: Vec<Incoming>,
    process: Weak<Process>,
}

impl Inbox {
    /// Whether the agent that opened it lives.
    pub(super) fn is_open(&self) -> bool {
        self.process.strong_count() > 0
    }
}

impl Node {
    /// Whether some agent has the port for files open.
    pub(super) fn takes_files(&self) -> bool {
        let open = self.doors.iter().any(|door| door.strong_count() > 0);
        open && self.spec.disk_port_error.is_none()
    }

    /// What is to come in from whoever shows this.
    pub(super) fn inbox(&self, key: Uuid, token: &str) -> Option<&Inbox> {
        let inbox = self.inboxes.get(&key)?;
        (inbox.is_open() && inbox.token == token).then_some(inbox)
    }
}

/// A token, or the refusal of one.
pub(super) fn check_token(token: &str) -> Result<()> {
    let fits = token.len() == TOKEN_DIGITS && token.chars().all(|c| c.is_ascii_hexdigit());
    if fits {
        return Ok(());
    }
    Err(HypervisorError::Failed(
        "the token for disks is malformed".to_owned(),
    ))
}

impl World {
    /// An agent opens the port for files, or finds it open.
    pub(super) fn open_door(
        &mut self,
        host: &HostName,
        process: &Arc<Process>,
    ) -> std::result::Result<u16, String> {
        let node = self.node_mut(host);
        if let Some(words) = &node.spec.disk_port_error {
            return Err(words.clone());
        }
        node.doors.retain(|door| door.strong_count() > 0);
        let door = Arc::downgrade(process);
        if !node.doors.iter().any(|other| other.ptr_eq(&door)) {
            node.doors.push(door);
        }
        Ok(node.spec.disk_port)
    }

    pub(super) fn receive(
        &mut self,
        host: &HostName,
        process: &Arc<Process>,
        key: Uuid,
        token: &str,
        files: &[Incoming],
    ) -> Result<()> {
        let failed = |words: String| Err(HypervisorError::Failed(words));
        check_token(token)?;
        self.open_door(host, process)
            .map_err(HypervisorError::Failed)?;
        if files.len() > MOST_FILES {
            return failed(format!("more than {MOST_FILES} files"));
        }
        for (at, file) in files.iter().enumerate() {
            if files[..at].iter().any(|other| other.path == file.path) {
                return failed(format!("{} is named twice", file.path));
            }
        }
        let inbox = Inbox {
            token: token.to_owned(),
            files: files.to_vec(),
            process: Arc::downgrade(process),
        };
        let inboxes = &mut self.node_mut(host).inboxes;
        inboxes.retain(|_, inbox| inbox.is_open());
        match inboxes.get(&key) {
            // Another process is another life of the agent.
            Some(known) if known.process.ptr_eq(&inbox.process) => {
                if (known.token.as_str(), &known.files) != (token, &inbox.files) {
                    return failed(format!("migration {key} is expected already, otherwise"));
                }
            }
            _ => {
                inboxes.insert(key, inbox);
            }
        }
        Ok(())
    }

    pub(super) fn stop_receiving(&mut self, host: &HostName, process: &Arc<Process>, key: Uuid) {
        let process = Arc::downgrade(process);
        self.node_mut(host)
            .inboxes
            .retain(|k, inbox| *k != key || !inbox.process.ptr_eq(&process));
    }
}
