//! The destination's side: a listening socket, and what it is to expect.

#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod registry;
mod session;
mod store;

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use rustix::net::Shutdown;
use uuid::Uuid;

use self::registry::Registry;
use crate::token::Token;

/// Most files of one migration.
pub const MOST_FILES: usize = 256;

/// What may be done with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It is written. It is not there yet, or empty, or ours from an earlier
    /// attempt, or a block device; whatever it holds is lost.
    Fresh,
    /// It is there and shall be the same as the source's. It is never written.
    Compare,
}

/// A file to be received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incoming {
    /// Where it is, or will be. Its directory is there.
    pub path: PathBuf,
    /// What may be done with it.
    pub mode: Mode,
}

/// What is expected makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExpectError {
    /// The migration is expected already, with another token or other files.
    #[error("migration {0} is expected already, otherwise")]
    Conflict(Uuid),
    /// More files than are ever received.
    #[error("more than {MOST_FILES} files")]
    TooMany,
    /// The same path twice.
    #[error("{} is named twice", .0.display())]
    Twice(PathBuf),
}

/// Listens for senders, and lets in those that are expected. Dropping it ends
/// all transfers.
#[derive(Debug)]
pub struct Receiver {
    registry: Arc<Registry>,
    listener: Arc<TcpListener>,
    address: SocketAddr,
    accepting: Option<JoinHandle<()>>,
}

impl Receiver {
    /// Listens at this address; port 0 is any free one. Nobody is let in yet.
    ///
    /// # Errors
    /// The address is taken, or is not one of this node.
    pub fn listen(address: SocketAddr) -> io::Result<Self> {
        let listener = Arc::new(TcpListener::bind(address)?);
        let address = listener.local_addr()?;
        let registry = Arc::new(Registry::default());
        let accepting = {
            let (listener, registry) = (Arc::clone(&listener), Arc::clone(&registry));
            let named = thread::Builder::new().name("carrier-accept".to_owned());
            named.spawn(move || accept(&listener, &registry))?
        };
        Ok(Self {
            registry,
            listener,
            address,
            accepting: Some(accepting),
        })
    }

    /// The port it listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Lets in whoever shows this migration and token, to fill these files. The
    /// same once more changes nothing.
    ///
    /// # Errors
    /// It is expected already, with another token or other files; or the files
    /// make no sense. Nothing was changed.
    pub fn expect(
        &self,
        migration: Uuid,
        token: &Token,
        files: Vec<Incoming>,
    ) -> Result<(), ExpectError> {
        if files.len() > MOST_FILES {
            return Err(ExpectError::TooMany);
        }
        for (at, file) in files.iter().enumerate() {
            if files[..at].iter().any(|other| other.path == file.path) {
                return Err(ExpectError::Twice(file.path.clone()));
            }
        }
        self.registry.expect(migration, token, files)
    }

    /// Lets nobody in for this migration any more, and cuts off who is. Once
    /// this returns nothing writes to its files. Without effect if it is not expected.
    pub fn forget(&self, migration: Uuid) {
        self.registry.forget(migration);
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.registry.close();
        // Wakes the thread that accepts. If that fails, so does its accept.
        let _ = rustix::net::shutdown(&self.listener, Shutdown::Both);
        if let Some(accepting) = self.accepting.take() {
            // It has nothing to say, not even that it panicked.
            let _ = accepting.join();
        }
        self.registry.drain();
    }
}

fn accept(listener: &TcpListener, registry: &Arc<Registry>) {
    while !registry.is_closed() {
        match listener.accept() {
            Ok((stream, peer)) => admit(stream, peer, registry),
            Err(error) => {
                if registry.is_closed() {
                    return;
                }
                // Out of descriptors, or a connection that is gone already.
                tracing::warn!(%error, "a connection was not accepted");
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn admit(stream: TcpStream, peer: SocketAddr, registry: &Arc<Registry>) {
    let Some(visit) = registry.admit(stream, peer) else {
        tracing::warn!(%peer, "too many connections; one more is refused");
        return;
    };
    let named = thread::Builder::new().name("carrier-receive".to_owned());
    if let Err(error) = named.spawn(move || session::receive(&visit)) {
        tracing::warn!(%peer, %error, "no thread for a connection");
    }
}
