//! Does to the files what the sender asks for ([`Store`]), and looks what they
//! hold then ([`Proof`]). The two are apart so that one piece can be read back
//! while the next is written.

use std::{
    io,
    os::unix::fs::FileExt,
    sync::{Arc, mpsc::SyncSender},
};

use xxhash_rust::xxh3::Xxh3;

use super::{Mode, registry::Pass};
use crate::{
    buffer::{Buffer, Pool},
    disk::{self, Target, Zeroed},
    protocol::{BLOCK, CHUNK, COMPARE, Hash, Head, Kind, Malformed, VIRGIN},
};

/// Read back in pieces of so many bytes, which stay in the processor's cache.
const PIECE: usize = 128 * 1024;

/// Something the sender asks for.
pub(super) struct Request {
    pub(super) head: Head,
    pub(super) body: Option<Buffer>,
}

impl Request {
    /// What it counts for while it waits: small ones have a price too.
    pub(super) fn weight(&self) -> usize {
        self.body
            .as_deref()
            .map_or(1024, |body| body.len().max(1024))
    }
}

/// What is to be said.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) head: Head,
    pub(super) hash: Option<Hash>,
}

/// Why it was not done.
pub(super) enum Trouble {
    /// It must not be asked for.
    Malformed(Malformed),
    /// The disk failed.
    Failed {
        file: u16,
        offset: u64,
        error: io::Error,
    },
    /// A file that must not be written is another.
    Differs { file: u16, offset: u64 },
    /// Nobody wants to know any more.
    Over,
}

impl From<Malformed> for Trouble {
    fn from(how: Malformed) -> Self {
        Self::Malformed(how)
    }
}

/// What came of a request.
pub(super) enum Served {
    /// It is done.
    Done(Answer),
    /// The file has to be read before there is an answer.
    Unproven(Unproven),
}

impl Served {
    /// Bytes still to be read: what it counts for while it waits.
    pub(super) fn weight(&self) -> usize {
        match self {
            Self::Done(_) => 0,
            // It is at most a chunk.
            Self::Unproven(Unproven { head, .. }) => usize::try_from(head.len).unwrap_or(CHUNK),
        }
    }
}

/// A range of a file of which the sender wants to know what is in it now.
pub(super) struct Unproven {
    target: Arc<Target>,
    head: Head,
}

/// The files of one connection.
pub(super) struct Store<'a> {
    pass: &'a Pass,
    pool: Arc<Pool>,
    targets: Vec<Option<Arc<Target>>>,
    /// Flushes what is sent to it, and has others wait meanwhile.
    flusher: SyncSender<Arc<Target>>,
}

impl<'a> Store<'a> {
    pub(super) fn new(pass: &'a Pass, pool: Arc<Pool>, flusher: SyncSender<Arc<Target>>) -> Self {
        let mut targets = Vec::new();
        targets.resize_with(pass.expected.files.len(), || None);
        Self {
            pass,
            pool,
            targets,
            flusher,
        }
    }

    /// Does it.
    pub(super) fn serve(&mut self, request: &Request) -> Result<Served, Trouble> {
        let head = &request.head;
        let done = |kind| {
            let head = Head::about(kind, head.file, head.offset, head.len);
            Ok(Served::Done(Answer { head, hash: None }))
        };
        match head.kind {
            Kind::Open => self.open(head.file, head.len).map(Served::Done),
            Kind::Data => {
                let body = request.body.as_deref().unwrap_or_default();
                self.write(head, body).map(Served::Unproven)
            }
            Kind::Check => {
                let target = Arc::clone(self.target(head, CHUNK as u64)?);
                Ok(Served::Unproven(Unproven {
                    target,
                    head: *head,
                }))
            }
            Kind::Zero => {
                self.zero(head)?;
                done(Kind::Zeroed)
            }
            Kind::Finish => {
                let target = self.target(head, u64::MAX)?;
                if head.len != target.len {
                    return Err(Malformed("finished a file of another length").into());
                }
                target.finish().map_err(|error| {
                    self.pass.expected.distrust();
                    failed(head, error)
                })?;
                done(Kind::Finished)
            }
            _ => Err(Malformed("asked for what only a receiver says").into()),
        }
    }

    fn open(&mut self, file: u16, len: u64) -> Result<Answer, Trouble> {
        let number = usize::from(file);
        let Some(incoming) = self.pass.expected.files.get(number) else {
            return Err(Malformed("a file with an unknown number").into());
        };
        if self.targets[number].is_some() || i64::try_from(len).is_err() {
            return Err(Malformed("opened a file twice, or one of an impossible length").into());
        }
        let failed = |error| Trouble::Failed {
            file,
            offset: 0,
            error,
        };
        let path = &incoming.path;
        let target = match incoming.mode {
            Mode::Fresh => Some(disk::open_fresh(path, len)),
            Mode::Compare => disk::open_compared(path, len).transpose(),
        };
        let target = match target {
            Some(target) => target.map_err(failed)?,
            None => return Err(Trouble::Differs { file, offset: 0 }),
        };
        let mut head = Head::about(Kind::Opened, file, 0, len);
        head.flags = self.flags(number, &target).map_err(failed)?;
        self.targets[number] = Some(Arc::new(target));
        Ok(Answer { head, hash: None })
    }

    fn flags(&self, number: usize, target: &Target) -> io::Result<u8> {
        let block = if target.block { BLOCK } else { 0 };
        if target.compare {
            return Ok(COMPARE | block);
        }
        let expected = &self.pass.expected;
        let is_hole = || target.is_hole();
        let virgin = expected.was_virgin(number, &target.file, target.resized, is_hole)?;
        Ok(if virgin { VIRGIN | block } else { block })
    }

    /// The file, if it is open and has the range.
    fn target(&self, head: &Head, most: u64) -> Result<&Arc<Target>, Malformed> {
        let target = self.targets.get(usize::from(head.file));
        let Some(Some(target)) = target else {
            return Err(Malformed("a file that is not open"));
        };
        let end = head.offset.checked_add(head.len);
        if head.len > most || end.is_none_or(|end| end > target.len) {
            return Err(Malformed("a range beyond the end of the file"));
        }
        Ok(target)
    }

    fn write(&self, head: &Head, body: &[u8]) -> Result<Unproven, Trouble> {
        let target = self.target(head, CHUNK as u64)?;
        if target.compare {
            return Err(Malformed("wrote to what must not be written").into());
        }
        let written = target.write(body, head.offset);
        written.map_err(|error| failed(head, error))?;
        self.flush_if_due(target);
        Ok(Unproven {
            target: Arc::clone(target),
            head: *head,
        })
    }

    fn flush_if_due(&self, target: &Arc<Target>) {
        if target.flush_is_due() {
            // Without a flusher it is flushed at its end.
            let _ = self.flusher.send(Arc::clone(target));
        }
    }

    fn zero(&self, head: &Head) -> Result<(), Trouble> {
        let target = self.target(head, u64::MAX)?;
        self.flush_if_due(target);
        let range = head.offset..head.offset + head.len;
        let go_on = || !self.pass.is_over();
        match target.make_zero(range, &self.pool, go_on) {
            Ok(Zeroed::Yes) => Ok(()),
            Ok(Zeroed::Interrupted) => Err(Trouble::Over),
            Ok(Zeroed::Differs(offset)) => Err(Trouble::Differs {
                file: head.file,
                offset,
            }),
            Err(error) => Err(failed(head, error)),
        }
    }
}

/// Reads what was written.
pub(super) struct Proof {
    piece: Vec<u8>,
}

impl Proof {
    pub(super) fn new() -> Self {
        Self {
            piece: vec![0; PIECE],
        }
    }

    /// The answer to what was asked.
    pub(super) fn complete(&mut self, served: Served) -> Result<Answer, Trouble> {
        let Unproven { target, head } = match served {
            Served::Done(answer) => return Ok(answer),
            Served::Unproven(unproven) => unproven,
        };
        let hash = self
            .read_back(&target, &head)
            .map_err(|error| failed(&head, error))?;
        let head = Head::about(Kind::Hash, head.file, head.offset, head.len);
        Ok(Answer {
            head: head.with_body(size_of::<Hash>()),
            hash: Some(hash),
        })
    }

    /// What the file holds now, hashed.
    fn read_back(&mut self, target: &Target, head: &Head) -> io::Result<Hash> {
        let mut hash = Xxh3::new();
        let (mut at, end) = (head.offset, head.offset + head.len);
        while at < end {
            let count = usize::try_from(end - at).map_or(PIECE, |left| left.min(PIECE));
            let piece = &mut self.piece[..count];
            target.file.read_exact_at(piece, at)?;
            hash.update(piece);
            at += count as u64;
        }
        Ok(hash.digest128())
    }
}

fn failed(head: &Head, error: io::Error) -> Trouble {
    Trouble::Failed {
        file: head.file,
        offset: head.offset,
        error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::hash;

    /// The answer is about the file, not about what arrived for it.
    #[test]
    fn what_the_disk_made_of_it_is_what_counts() {
        let dir = tempfile::tempdir().unwrap();
        let len = 3 * PIECE + 5;
        let target = disk::open_fresh(&dir.path().join("f"), len as u64).unwrap();
        let target = Arc::new(target);
        let mut bytes = vec![7; len];
        target.file.write_all_at(&bytes, 0).unwrap();
        let prove = || {
            let head = Head::about(Kind::Data, 0, 0, len as u64).with_body(len);
            let target = Arc::clone(&target);
            let served = Served::Unproven(Unproven { target, head });
            assert_eq!(served.weight(), len);
            Proof::new().complete(served).ok().unwrap().hash.unwrap()
        };
        assert_eq!(prove(), hash(&bytes));
        // A bit falls over after it was written and before it is looked at.
        bytes[PIECE + 1] ^= 1;
        target.file.write_all_at(&bytes, 0).unwrap();
        assert_eq!(prove(), hash(&bytes));
    }
}
