//! Does to the files what the sender asks for, and says what they hold then.

use std::{io, os::unix::fs::FileExt, sync::Arc};

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

/// The files of one connection.
pub(super) struct Store<'a> {
    pass: &'a Pass,
    pool: Arc<Pool>,
    targets: Vec<Option<Target>>,
    piece: Vec<u8>,
}

impl<'a> Store<'a> {
    pub(super) fn new(pass: &'a Pass, pool: Arc<Pool>) -> Self {
        let mut targets = Vec::new();
        targets.resize_with(pass.expected.files.len(), || None);
        Self {
            pass,
            pool,
            targets,
            piece: vec![0; PIECE],
        }
    }

    /// Does it.
    pub(super) fn serve(&mut self, request: &Request) -> Result<Answer, Trouble> {
        let Head {
            file, offset, len, ..
        } = request.head;
        let failed = |error| Trouble::Failed {
            file,
            offset,
            error,
        };
        let answer = |kind, hash: Option<Hash>| {
            let body = hash.map_or(0, |_| size_of::<Hash>());
            let head = Head::about(kind, file, offset, len).with_body(body);
            Ok(Answer { head, hash })
        };
        match request.head.kind {
            Kind::Open => self.open(file, len),
            Kind::Data => {
                let body = request.body.as_deref().unwrap_or_default();
                let hash = self.write(&request.head, body)?;
                answer(Kind::Hash, Some(hash))
            }
            Kind::Check => {
                self.target(&request.head, CHUNK as u64)?;
                let hash = self.read_back(&request.head).map_err(failed)?;
                answer(Kind::Hash, Some(hash))
            }
            Kind::Zero => {
                self.zero(&request.head)?;
                answer(Kind::Zeroed, None)
            }
            Kind::Finish => {
                let target = self.target(&request.head, u64::MAX)?;
                if len != target.len {
                    return Err(Malformed("finished a file of another length").into());
                }
                self.finish(file).map_err(failed)?;
                answer(Kind::Finished, None)
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
        self.targets[number] = Some(target);
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
    fn target(&self, head: &Head, most: u64) -> Result<&Target, Malformed> {
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

    fn write(&mut self, head: &Head, body: &[u8]) -> Result<Hash, Trouble> {
        if self.target(head, CHUNK as u64)?.compare {
            return Err(Malformed("wrote to what must not be written").into());
        }
        self.write_down(head, body)
            .and_then(|()| self.read_back(head))
            .map_err(|error| Trouble::Failed {
                file: head.file,
                offset: head.offset,
                error,
            })
    }

    fn write_down(&mut self, head: &Head, body: &[u8]) -> io::Result<()> {
        let Some(Some(target)) = self.targets.get_mut(usize::from(head.file)) else {
            return Err(io::Error::other("is not open"));
        };
        target.file.write_all_at(body, head.offset)
    }

    /// What the file holds now, hashed.
    fn read_back(&mut self, head: &Head) -> io::Result<Hash> {
        let Some(Some(target)) = self.targets.get(usize::from(head.file)) else {
            return Err(io::Error::other("is not open"));
        };
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

    fn zero(&mut self, head: &Head) -> Result<(), Trouble> {
        let target = self.target(head, u64::MAX)?;
        let range = head.offset..head.offset + head.len;
        let go_on = || !self.pass.is_over();
        match target.make_zero(range, &self.pool, go_on) {
            Ok(Zeroed::Yes) => Ok(()),
            Ok(Zeroed::Interrupted) => Err(Trouble::Over),
            Ok(Zeroed::Differs(offset)) => Err(Trouble::Differs {
                file: head.file,
                offset,
            }),
            Err(error) => Err(Trouble::Failed {
                file: head.file,
                offset: head.offset,
                error,
            }),
        }
    }

    /// Its length is as it was.
    fn finish(&self, file: u16) -> io::Result<()> {
        match self.targets.get(usize::from(file)) {
            Some(Some(target)) => target.finish(),
            _ => Ok(()),
        }
    }
}
