//! Makes messages of pieces: reads them, leaves out what is zero, hashes the rest.

use std::{os::unix::fs::FileExt, sync::Arc};

use super::{
    SendError,
    ledger::{Item, Ledger, Opened, Task},
};
use crate::{
    buffer::{Buffer, Pool},
    disk::Source,
    extents::is_zero,
    protocol::{HEAD, Head, Kind, hash},
};

/// Zeros are left out in units of so many bytes.
const GRAIN: usize = 64 * 1024;

/// What goes over the wire.
pub(super) struct Message {
    pub(super) head: [u8; HEAD],
    body: Option<(Arc<Buffer>, std::ops::Range<usize>)>,
}

impl Message {
    fn bare(item: &Item) -> Self {
        let kind = match item.task {
            Task::Data => Kind::Data,
            Task::Check => Kind::Check,
            Task::Zero => Kind::Zero,
            Task::Finish => Kind::Finish,
        };
        let head = Head::about(kind, item.file, item.offset, item.len);
        Self {
            head: head.encode(),
            body: None,
        }
    }

    fn with_body(item: &Item, buffer: &Arc<Buffer>, range: std::ops::Range<usize>) -> Self {
        let head = Head::about(Kind::Data, item.file, item.offset, item.len);
        Self {
            head: head.with_body(range.len()).encode(),
            body: Some((Arc::clone(buffer), range)),
        }
    }

    /// What it counts for while it waits: small ones have a price too.
    pub(super) fn weight(&self) -> usize {
        self.body().len().max(1024)
    }

    /// The bytes after the head.
    pub(super) fn body(&self) -> &[u8] {
        match &self.body {
            Some((buffer, range)) => &buffer[range.clone()],
            None => &[],
        }
    }
}

/// Makes messages of one piece, which are on their way from then on.
pub(super) fn prepare(
    item: Item,
    opened: Opened,
    sources: &[Source],
    ledger: &Ledger,
    pool: &Arc<Pool>,
) -> Result<Vec<Message>, SendError> {
    if matches!(item.task, Task::Zero | Task::Finish) {
        ledger.commit(&[item]);
        return Ok(vec![Message::bare(&item)]);
    }
    let source = &sources[usize::from(item.file)];
    let len = usize::try_from(item.len).map_err(|_| SendError::bug("a chunk's length", 0))?;
    let mut buffer = pool.take(len);
    source
        .file
        .read_exact_at(&mut buffer, item.offset)
        .map_err(|error| SendError::source(source, error))?;
    let buffer = Arc::new(buffer);
    let (mut items, mut messages) = (Vec::new(), Vec::new());
    for (range, zero) in runs(&buffer) {
        let task = if zero { Task::Zero } else { item.task };
        let mut part = item.part(task, range.start as u64, range.len() as u64);
        if zero && opened.is_virgin() {
            ledger.settle_zero(&part)?;
            continue;
        }
        if !zero {
            part.hash = hash(&buffer[range.clone()]);
        }
        messages.push(match task {
            Task::Data => Message::with_body(&part, &buffer, range),
            _ => Message::bare(&part),
        });
        items.push(part);
    }
    ledger.commit(&items);
    Ok(messages)
}

/// The chunk's ranges of zeros and of something else, in turn.
fn runs(chunk: &[u8]) -> Vec<(std::ops::Range<usize>, bool)> {
    let mut runs: Vec<(std::ops::Range<usize>, bool)> = Vec::new();
    let mut at = 0;
    for grain in chunk.chunks(GRAIN) {
        let zero = is_zero(grain);
        let end = at + grain.len();
        match runs.last_mut() {
            Some((range, same)) if *same == zero => range.end = end,
            _ => runs.push((at..end, zero)),
        }
        at = end;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_split_where_zeros_begin_and_end() {
        let mut chunk = vec![0; 5 * GRAIN + 7];
        assert_eq!(runs(&chunk), [(0..chunk.len(), true)]);
        chunk[2 * GRAIN + 1] = 1;
        chunk[3 * GRAIN] = 1;
        let expected = [
            (0..2 * GRAIN, true),
            (2 * GRAIN..4 * GRAIN, false),
            (4 * GRAIN..chunk.len(), true),
        ];
        assert_eq!(runs(&chunk), expected);
    }
}
