//! Same name is not same content (invariant 12). Whatever a guest uses on its
//! destination and is not copied there is the same file, as its mark or its storage
//! shows, or of proven equal content: as long, and of the same SHA-256. All else is
//! refused; so is what nobody can tell.

use drover_model::{
    api::compute::{DestinationFacts, FileRole, SourceFacts},
    check::{CheckCode, CheckFailure, Side},
    content::{AddressFact, CheckedFile, Digest, FileContent, Seen, Use, UseRole},
    guest::Guest,
    ids::HostName,
    migration::Way,
};

use super::{cold, fail};

/// A guest's files as both nodes see them.
#[derive(Debug, Clone, Copy)]
pub struct Both<'a> {
    /// Whose.
    pub guest: &'a Guest,
    /// The node that it is on, or was on, and what that said.
    pub source: (&'a HostName, &'a [FileContent]),
    /// The node where it is to be, and what that says.
    pub dest: (&'a HostName, &'a [FileContent]),
    /// Paths of missing base images that are carried along.
    pub brought: &'a [String],
    /// The source is dead: what it did not tell while it lived is not known.
    pub source_is_dead: bool,
}

/// What is known of one file on both nodes.
enum Verdict {
    /// It is that very file.
    Same,
    /// It is another one of equal content.
    Equal,
    /// It is missing, and is brought along.
    Brought,
    /// Its digests are still to be asked for.
    Undecided,
    /// It must not be used.
    Wrong(Box<CheckFailure>),
}

impl<'a> Both<'a> {
    /// Of a migration.
    pub fn of(
        guest: &'a Guest,
        brought: &'a [String],
        source: (&'a HostName, &'a SourceFacts),
        dest: (&'a HostName, &'a DestinationFacts),
    ) -> Self {
        Self {
            guest,
            source: (source.0, &source.1.contents),
            dest: (dest.0, &dest.1.contents),
            brought,
            source_is_dead: false,
        }
    }

    /// What stands in the way.
    pub fn failures(&self) -> Vec<CheckFailure> {
        let judged = self.judged();
        let wrong = judged.into_iter().filter_map(|(u, verdict)| match verdict {
            Verdict::Wrong(failure) => Some(*failure),
            Verdict::Undecided => Some(self.not_yet(&u)),
            Verdict::Same | Verdict::Equal | Verdict::Brought => None,
        });
        wrong.collect()
    }

    /// The same but for what is not known yet.
    pub fn known_failures(&self) -> Vec<CheckFailure> {
        let judged = self.judged().into_iter();
        let wrong = judged.filter_map(|(_, verdict)| match verdict {
            Verdict::Wrong(failure) => Some(*failure),
            _ => None,
        });
        wrong.collect()
    }

    /// Files whose digests decide, and are not there yet.
    pub fn undecided(&self) -> Vec<String> {
        let judged = self.judged().into_iter();
        let undecided = judged.filter(|(_, verdict)| matches!(verdict, Verdict::Undecided));
        undecided.map(|(u, _)| u.path).collect()
    }

    /// Every file that was judged, with the stamps that it has there and here: of
    /// one that was compared, it has to stay.
    pub fn checked(&self) -> Checked {
        let mut checked = Checked::default();
        for (u, verdict) in self.judged() {
            let holds = |files| match verdict {
                Verdict::Equal => seen(files, &u.path).and_then(|f| f.stamp().map(str::to_owned)),
                _ => None,
            };
            if matches!(verdict, Verdict::Same | Verdict::Equal) {
                let file = |stamp| CheckedFile {
                    path: u.path.clone(),
                    stamp,
                };
                checked.source.push(file(holds(self.source.1)));
                checked.dest.push(file(holds(self.dest.1)));
            }
        }
        checked
    }

    fn judged(&self) -> Vec<(Use, Verdict)> {
        let uses = self.guest.uses().into_iter();
        let is_judged = |u: &Use| match u.role {
            UseRole::Own => false,
            // Of a dead node's, its storage alone speaks.
            UseRole::SharedDisk => !self.source_is_dead,
            UseRole::ReadDisk | UseRole::Backing | UseRole::Read => true,
        };
        let judged = uses.filter(is_judged).map(|u| {
            let verdict = self.judge(&u);
            (u, verdict)
        });
        judged.collect()
    }

    fn judge(&self, u: &Use) -> Verdict {
        if self.source_is_dead && self.is_marked(u) {
            return Verdict::Same;
        }
        let (here, there) = match (self.on_source(u), self.on_dest(u)) {
            (Ok(here), Ok(Some(there))) => (here, there),
            (Ok(_), Ok(None)) => return Verdict::Brought,
            (Err(failure), _) | (_, Err(failure)) => return Verdict::Wrong(failure),
        };
        if there.marked && here.inode == there.inode {
            return Verdict::Same;
        }
        if u.role == UseRole::SharedDisk {
            return Verdict::Wrong(self.not_shared(u));
        }
        if here.length_bytes != there.length_bytes {
            let size = |file: File<'_>| format!("{} bytes", file.length_bytes);
            return Verdict::Wrong(self.another(u, &size(here), &size(there)));
        }
        match (here.digest, there.digest) {
            (Digest::Known { sha256: a }, Digest::Known { sha256: b }) if a == b => Verdict::Equal,
            (Digest::Known { sha256: a }, Digest::Known { sha256: b }) => {
                let shown = |sha256: &str| format!("SHA-256 {sha256}");
                Verdict::Wrong(self.another(u, &shown(a), &shown(b)))
            }
            (Digest::Failed { error }, _) if self.source_is_dead => {
                Verdict::Wrong(self.never_told(u, error))
            }
            (Digest::Unasked | Digest::Working { .. }, _) if self.source_is_dead => {
                Verdict::Wrong(self.never_told(u, "reading it had not come to its end"))
            }
            (Digest::Failed { error }, _) => Verdict::Wrong(unreadable(u, self.source.0, error)),
            (_, Digest::Failed { error }) => Verdict::Wrong(unreadable(u, self.dest.0, error)),
            _ => Verdict::Undecided,
        }
    }

    fn is_marked(&self, u: &Use) -> bool {
        let there = seen(self.dest.1, &u.path).map(|f| &f.seen);
        matches!(there, Some(Seen::File { marked: true, .. }))
    }

    fn on_source(&self, u: &Use) -> Result<File<'a>, Box<CheckFailure>> {
        let host = self.source.0;
        let told = seen(self.source.1, &u.path).map(|f| &f.seen);
        if self.source_is_dead && !matches!(told, Some(Seen::File { .. })) {
            let why = match told {
                Some(Seen::Unreadable { error }) => error,
                Some(Seen::Missing) => "it had no such file",
                _ => "its agent was too old to say",
            };
            return Err(self.never_told(u, why));
        }
        let missing = || {
            Box::new(fail(
                CheckCode::FileContent,
                Side::Source,
                format!("{host} has no {}, which is {} of the guest", u.path, u.what),
                "see what became of it; the guest would not start again there either",
            ))
        };
        match told {
            Some(Seen::Missing) => Err(missing()),
            found => file(u, host, found),
        }
    }

    /// None if it is missing and will be brought along.
    fn on_dest(&self, u: &Use) -> Result<Option<File<'a>>, Box<CheckFailure>> {
        let host = self.dest.0;
        match seen(self.dest.1, &u.path).map(|f| &f.seen) {
            Some(Seen::Missing) => match self.brought.contains(&u.path) {
                true => Ok(None),
                false => Err(missing(u, host)),
            },
            found => file(u, host, found).map(Some),
        }
    }

    fn another(&self, u: &Use, here: &str, there: &str) -> Box<CheckFailure> {
        let (source, dest) = (self.source.0, self.dest.0);
        Box::new(fail(
            CheckCode::FileContent,
            Side::Destination,
            format!(
                "{} is another file on {dest}, and is {} of the guest: {here} on {source}, \
                 {there} on {dest}",
                u.path, u.what
            ),
            format!(
                "see which of the two is right; copy it from {source} under that name, if no guest \
                 of {dest} uses it, or choose another node"
            ),
        ))
    }

    fn never_told(&self, u: &Use, why: &str) -> Box<CheckFailure> {
        let (source, dest) = (self.source.0, self.dest.0);
        Box::new(fail(
            CheckCode::FileContent,
            Side::Instance,
            format!(
                "{} is {} of the guest; what was in it on {source} is not known ({why}), and                  {dest} does not see the same file",
                u.path, u.what
            ),
            "choose a node that shares the storage; or define and start it by hand, once you have              seen that the file there is the right one",
        ))
    }

    fn not_shared(&self, u: &Use) -> Box<CheckFailure> {
        let (source, dest) = (self.source.0, self.dest.0);
        Box::new(fail(
            CheckCode::DiskNotShared,
            Side::Destination,
            format!(
                "{} ({}) is shareable, so several guests write it, and nothing shows that it is \
                 the same on {source} and {dest}",
                u.what, u.path
            ),
            "put it on a file system that both nodes mount, in a directory that the agent may \
             write to",
        ))
    }

    fn not_yet(&self, u: &Use) -> CheckFailure {
        let (source, dest) = (self.source.0, self.dest.0);
        let done = |files| match seen(files, &u.path).and_then(FileContent::digest) {
            Some(Digest::Known { .. }) => "all".to_owned(),
            Some(Digest::Working { done_bytes }) => format!("{} MiB", done_bytes >> 20),
            _ => "nothing".to_owned(),
        };
        let length = match seen(self.source.1, &u.path).map(|f| &f.seen) {
            Some(Seen::File { length_bytes, .. }) => length_bytes >> 20,
            _ => 0,
        };
        fail(
            CheckCode::FileContent,
            Side::Path,
            format!(
                "{} is {} of the guest, and whether it is the same on {source} and {dest} is not \
                 known yet: of {length} MiB, {} read on {source}, {} on {dest}",
                u.path,
                u.what,
                done(self.source.1),
                done(self.dest.1)
            ),
            "ask again while it is read; what was read is remembered",
        )
    }
}

/// The files that were judged, as each side has them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checked {
    /// On the source.
    pub source: Vec<CheckedFile>,
    /// On the destination.
    pub dest: Vec<CheckedFile>,
}

#[derive(Clone, Copy)]
struct File<'a> {
    length_bytes: u64,
    inode: u64,
    marked: bool,
    digest: &'a Digest,
}

fn seen<'a>(files: &'a [FileContent], path: &str) -> Option<&'a FileContent> {
    files.iter().find(|file| file.path == path)
}

fn file<'a>(
    u: &Use,
    host: &HostName,
    found: Option<&'a Seen>,
) -> Result<File<'a>, Box<CheckFailure>> {
    match found {
        Some(Seen::File {
            length_bytes,
            inode,
            marked,
            digest,
            ..
        }) => Ok(File {
            length_bytes: *length_bytes,
            inode: *inode,
            marked: *marked,
            digest,
        }),
        Some(Seen::Unreadable { error }) => Err(unreadable(u, host, error)),
        Some(Seen::Missing) => Err(missing(u, host)),
        None | Some(Seen::Unknown) => Err(Box::new(fail(
            CheckCode::FileContent,
            Side::Path,
            format!(
                "{} is {} of the guest, and the agent on {host} is of a version that does not say \
                 what is in it",
                u.path, u.what
            ),
            format!("bring drover-compute on {host} to the version of the other nodes"),
        ))),
    }
}

fn missing(u: &Use, host: &HostName) -> Box<CheckFailure> {
    let (code, remedy) = match u.role {
        UseRole::Backing => (
            CheckCode::BackingImage,
            "copy the base image there, same path",
        ),
        UseRole::Read => (CheckCode::FileContent, "put the same file there"),
        UseRole::Own | UseRole::SharedDisk | UseRole::ReadDisk => (
            CheckCode::DiskNotCopyable,
            "put the same file there, or eject it",
        ),
    };
    Box::new(fail(
        code,
        Side::Destination,
        format!(
            "{host} has no {}, which is {} of the guest and is not copied",
            u.path, u.what
        ),
        remedy,
    ))
}

fn unreadable(u: &Use, host: &HostName, error: &str) -> Box<CheckFailure> {
    Box::new(fail(
        CheckCode::FileContent,
        Side::Path,
        format!(
            "{} is {} of the guest and cannot be read on {host}: {error}",
            u.path, u.what
        ),
        "have the agent there read it, or the guest do without it",
    ))
}

/// Base images that a migration carries along, as the destination lacks them: those
/// under disks that are carried themselves.
pub fn brought(guest: &Guest, facts: &DestinationFacts, way: &Way) -> Vec<String> {
    let Way::Cold(_) = way else {
        return Vec::new();
    };
    let carried = cold::carried(guest, facts).into_iter();
    let images = carried.filter(|file| file.role == FileRole::Backing && !file.present);
    images.map(|file| file.path).collect()
}

/// Takes what both say of a disk's number into account: in a directory that both
/// nodes have, a path can still lead to two files. And one that a node cannot read as
/// an image of its own, its data being in another file, say, is not known to be one.
pub fn unshare_other_files(guest: &Guest, source: &SourceFacts, dest: &mut DestinationFacts) {
    let number = |files: &[FileContent], path: &str| match seen(files, path)?.seen {
        Seen::File { inode, .. } => Some(inode),
        _ => None,
    };
    for fact in dest.disks.iter_mut().filter(|fact| fact.shared) {
        let disk = guest.disks.iter().find(|d| d.target == fact.target);
        let Some(path) = disk.and_then(|d| d.local_path()) else {
            continue;
        };
        let sides = [&source.contents, &dest.contents];
        let unreadable = |files: &&Vec<FileContent>| {
            seen(files, path).is_some_and(|file| matches!(file.seen, Seen::Unreadable { .. }))
        };
        let numbers = number(sides[0], path).zip(number(sides[1], path));
        fact.shared =
            !sides.iter().any(unreadable) && numbers.is_none_or(|(here, there)| here == there);
    }
}

/// Addresses that a guest is bound to and the destination does not have.
pub fn addresses(facts: &[AddressFact], host: &HostName) -> Vec<CheckFailure> {
    let missing = facts.iter().filter_map(|fact| {
        let error = fact.error.as_ref()?;
        let bound = &fact.bound;
        let port = bound
            .port
            .map_or_else(String::new, |p| format!(" port {p}"));
        Some(fail(
            CheckCode::BoundAddress,
            Side::Destination,
            format!(
                "{} is bound to {}{port}, which QEMU on {host} could not have: {error}",
                bound.what, bound.address
            ),
            "have it listen on an address that every node has, such as 0.0.0.0 or 127.0.0.1",
        ))
    });
    missing.collect()
}

#[cfg(test)]
#[path = "content_tests.rs"]
mod tests;
