//! Locks without poison: a thread that panicked has ended its transfer, and
//! the others still have to clean up.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// The lock's content.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a notification, at most so long. May wake without a reason.
pub(crate) fn wait<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    patience: Duration,
) -> MutexGuard<'a, T> {
    condvar
        .wait_timeout(guard, patience)
        .unwrap_or_else(PoisonError::into_inner)
        .0
}
