//! What is random in a seed's thread: everything comes from the seed. Ids and
//! `fastrand` can be told; the order of the standard library's hash maps and the
//! UUIDs of messages come from `getrandom(2)`, which is answered here instead. The
//! library asks by a weak symbol for the sake of this. Other threads are answered
//! by the system.

use std::cell::{Cell, RefCell};

use drover_model::ids;
use uuid::Uuid;

thread_local! {
    static DRAWN: RefCell<Option<fastrand::Rng>> = const { RefCell::new(None) };
    static IDS: Cell<u64> = const { Cell::new(0) };
}

/// From now on nothing in this thread is random that does not follow from the seed.
/// To be called first in a thread of its own.
pub(super) fn follows_from(seed: u64) {
    DRAWN.set(Some(fastrand::Rng::with_seed(seed)));
    fastrand::seed(seed);
    IDS.set(seed << 32);
    ids::made_by(|| {
        IDS.set(IDS.get() + 1);
        // Ordered by time of making, as those are that it stands for.
        Uuid::new_v7(uuid::Timestamp::from_unix(
            uuid::NoContext,
            IDS.get() / 1000,
            0,
        ))
    });
}

/// Fills a buffer from the seed; not in a thread that has none.
fn fill(buffer: &mut [u8]) -> bool {
    DRAWN.with_borrow_mut(|drawn| match drawn {
        Some(rng) => {
            rng.fill(buffer);
            true
        }
        None => false,
    })
}

/// In the system's place.
///
/// # Safety
/// As of `getrandom(2)`: the buffer is as long as is said.
#[allow(unsafe_code)]
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn getrandom(buffer: *mut u8, length: usize, flags: u32) -> isize {
    // SAFETY: the caller's promise; the bytes are written before they are read.
    let bytes = unsafe {
        std::ptr::write_bytes(buffer, 0, length);
        std::slice::from_raw_parts_mut(buffer, length)
    };
    if fill(bytes) {
        return isize::try_from(length).unwrap_or(isize::MAX);
    }
    // SAFETY: the same buffer, handed on.
    let written = unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) };
    isize::try_from(written).unwrap_or(-1)
}
