//! What is in the files of a node that guests use and do not own.

use std::collections::BTreeMap;

use drover_model::{
    api::compute::Mark,
    content::{AddressFact, BoundAddress, Digest, FileContent, Seen, UseRole},
    guest::Guest,
    ids::{HostName, InstanceId},
};
use sha2::{Digest as _, Sha256};

use super::{
    ledger::Violation,
    storage::{Content, File, directory_of, is_device},
    world::World,
};

fn sha256(text: &str) -> String {
    format!("{:x}", Sha256::digest(text))
}

fn number(text: &str) -> u64 {
    let digits = sha256(text);
    digits
        .get(..15)
        .and_then(|d| u64::from_str_radix(d, 16).ok())
        .unwrap_or_default()
}

impl World {
    pub(super) fn content(&self, host: &HostName, path: &str, marks: &[Mark]) -> FileContent {
        let directory = directory_of(path);
        let seen = match self.storage.file(host, path) {
            None => Seen::Missing,
            Some(_) if self.node(host).unreadable.contains(path) => Seen::Unreadable {
                error: "Permission denied".to_owned(),
            },
            Some(File {
                content,
                length_bytes,
                ..
            }) => {
                let volume = self.storage.volume_at(host, directory);
                let volume = volume.map_or("", |v| v.name.as_str());
                Seen::File {
                    length_bytes: *length_bytes,
                    inode: self.inode(host, path),
                    stamp: match is_device(path) {
                        // Nothing tells that one was written.
                        true => format!("device {path}:{length_bytes}"),
                        false => sha256(&format!("{volume}:{path}:{content:?}")),
                    },
                    marked: marks
                        .iter()
                        .any(|m| m.directory == directory && self.sees_mark(host, m)),
                    digest: Digest::Unasked,
                }
            }
        };
        FileContent {
            path: path.to_owned(),
            seen,
        }
    }

    /// The number of whatever is at a path.
    pub(super) fn inode(&self, host: &HostName, path: &str) -> u64 {
        let volume = self.storage.volume_at(host, directory_of(path));
        let volume = volume.map_or("", |v| v.name.as_str());
        number(&format!("{volume}:{path}"))
    }

    /// The same with its digest, once it was asked for as often as the node needs.
    pub(super) fn digested(&mut self, host: &HostName, path: &str) -> FileContent {
        let mut found = self.content(host, path, &[]);
        let Some(file) = self.storage.file(host, path) else {
            return found;
        };
        let known = sha256(&format!("{:?}", file.content));
        let node = self.node_mut(host);
        let asked = node.digests_asked.entry(known.clone()).or_default();
        *asked += 1;
        if let Seen::File { digest, .. } = &mut found.seen {
            *digest = match *asked > node.spec.digest_takes_asks {
                true => Digest::Known { sha256: known },
                false => Digest::Working {
                    done_bytes: u64::from(*asked),
                },
            };
        }
        found
    }

    pub(super) fn address_fact(&self, host: &HostName, bound: &BoundAddress) -> AddressFact {
        let own = |address: &str| {
            matches!(address, "0.0.0.0" | "::" | "127.0.0.1" | "localhost")
                || self.node(host).address == address
        };
        AddressFact {
            bound: bound.clone(),
            error: (!own(&bound.address)).then(|| "no interface has it".to_owned()),
        }
    }

    /// What a guest's files hold that it only reads, by path.
    pub(super) fn read_contents(
        &self,
        host: &HostName,
        guest: &Guest,
    ) -> BTreeMap<String, Content> {
        let read = read_paths(guest).into_iter();
        read.filter_map(|path| {
            let content = self.storage.file(host, &path)?.content.clone();
            Some((path, content))
        })
        .collect()
    }

    /// Makes the files that a guest reads and that are neither drives nor below them.
    pub(super) fn make_reads(&mut self, host: &HostName, guest: &Guest) {
        for file in &guest.reads {
            let made = File::dense(Content::Text(file.what.clone()), 4096);
            self.put_file(host, &file.path, made);
        }
    }

    /// Whether a copy that runs reads the bytes that its guest is used to.
    pub(super) fn check_reads(&mut self, host: &HostName, id: InstanceId) {
        let (Some(domain), Some(nature)) = (self.domain(host, id), self.natures.get(&id)) else {
            return;
        };
        let wrong = read_paths(&domain.guest).into_iter().filter(|path| {
            let found = self.storage.file(host, path).map(|f| &f.content);
            let wanted = nature.reads.get(path);
            found.zip(wanted).is_some_and(|(f, w)| f != w)
        });
        for path in wrong.collect::<Vec<_>>() {
            self.ledger.record(Violation::DiskLost {
                guest: id,
                node: host.clone(),
                what: format!("{path} holds other bytes"),
            });
        }
    }
}

/// Files that a guest only reads.
pub(super) fn read_paths(guest: &Guest) -> Vec<String> {
    let uses = guest.uses().into_iter();
    let read = uses.filter(|u| !matches!(u.role, UseRole::Own | UseRole::SharedDisk));
    read.map(|u| u.path).collect()
}
