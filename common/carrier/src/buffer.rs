//! Memory for chunks, used again and again: fresh memory costs a page fault per
//! page, which is more than the copying.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex},
};

use crate::{protocol::CHUNK, sync::locked};

/// Up to this size memory is not worth keeping.
const SMALL: usize = 64 * 1024;

/// The memory that is not in use at the moment. There is never more of it than
/// was in use at one time, which the pipes bound.
#[derive(Default)]
pub(crate) struct Pool {
    idle: Mutex<Vec<Vec<u8>>>,
}

/// Memory for one chunk; goes back where it came from.
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    len: usize,
    pool: Arc<Pool>,
}

impl Pool {
    /// So many bytes, at most [`CHUNK`], of any content.
    pub(crate) fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let bytes = if len <= SMALL {
            vec![0; len]
        } else {
            let idle = locked(&self.idle).pop();
            idle.unwrap_or_else(|| vec![0; CHUNK.max(len)])
        };
        let pool = Arc::clone(self);
        Buffer { bytes, len, pool }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.bytes.len() > SMALL {
            locked(&self.pool.idle).push(std::mem::take(&mut self.bytes));
        }
    }
}
