//! Carries files from one node to another: disk images, UEFI variables, TPM
//! state, backing images of a guest that does not run.
//!
//! Bytes are carried at file level over one TCP connection. Sparse files stay
//! sparse, every byte is verified by reading it back where it arrived, and a
//! broken connection, sender or receiver costs what was in flight, not what
//! has arrived. Paths never travel: both sides are told the files in the same
//! order and name them by number.
//!
//! The destination runs a [`Receiver`] and tells it what to expect; the source
//! calls [`send()`]. Both are plain threads, which exist while a transfer runs.
//! What goes over the wire is in `protocol.rs`, to be read first; then
//! `send/session.rs` and `receive/session.rs`.

mod buffer;
mod control;
mod disk;
mod extents;
mod link;
mod pipe;
mod protocol;
mod receive;
mod send;
mod sync;
mod token;

pub use control::{Control, Progress};
pub use extents::data_bytes;
#[cfg(feature = "fuzzing")]
pub use receive::fuzzing;
pub use receive::{ExpectError, Incoming, MOST_FILES, Mode, Receiver};
pub use send::{Outgoing, SendError, SendSpec, Summary, send};
pub use token::{NotAToken, Token};
