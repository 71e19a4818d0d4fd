//! Work that blocks its thread: files, above all.

use std::{cell::Cell, io};

use tokio::task::JoinError;

thread_local! {
    static AT_ONCE: Cell<bool> = const { Cell::new(false) };
}

/// Does work that blocks on a thread that is there for it.
///
/// # Errors
/// The work panicked.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    if AT_ONCE.get() {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await
}

/// The same of work with files, say.
///
/// # Errors
/// The work's own, or it panicked.
pub async fn blocking_io<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    blocking(work)
        .await
        .unwrap_or_else(|panic| Err(io::Error::other(panic)))
}

/// From now on [`blocking`] does its work at once where this thread calls it. A
/// simulation that no other thread takes part in can be repeated.
pub fn block_at_once() {
    AT_ONCE.set(true);
}
