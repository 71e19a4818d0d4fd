//! The way through all files, from front to back, in pieces.

use super::{SendError, ledger::Opened};
use crate::{
    disk::Source,
    extents::{Range, next_data},
};

/// Where the walk is.
#[derive(Debug, Default)]
pub(super) struct Walk {
    file: u16,
    at: u64,
    /// The extent it is in or before.
    extent: Option<Range>,
}

/// A piece of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    /// Nothing is there.
    Hole(Range),
    /// Data, at most a chunk.
    Data(Range),
}

impl Walk {
    /// The next piece and its file. Chunks end at multiples of their size, or
    /// where the extent ends.
    pub(super) fn next(
        &mut self,
        sources: &[Source],
        chunk: u64,
        opened: &[Opened],
    ) -> Result<Option<(u16, Piece)>, SendError> {
        while let Some(source) = sources.get(usize::from(self.file)) {
            if self.at < source.len {
                let most = opened[usize::from(self.file)].zero_at_once();
                let piece = self
                    .piece(source, chunk, most)
                    .map_err(|error| SendError::source(source, error))?;
                return Ok(Some((self.file, piece)));
            }
            *self = Self {
                file: self.file + 1,
                ..Self::default()
            };
        }
        Ok(None)
    }

    fn piece(&mut self, source: &Source, chunk: u64, hole: u64) -> std::io::Result<Piece> {
        let extent = match self.extent.take() {
            Some(extent) if self.at < extent.end => extent,
            _ => next_data(&source.file, source.block, self.at, source.len)?
                .unwrap_or(source.len..source.len),
        };
        let from = self.at;
        let piece = if from < extent.start {
            self.at = extent.start.min(from.saturating_add(hole));
            Piece::Hole(from..self.at)
        } else {
            self.at = extent.end.min((from / chunk + 1) * chunk);
            Piece::Data(from..self.at)
        };
        self.extent = Some(extent);
        Ok(piece)
    }
}
