//! Who is expected, and who is there.
//!
//! A migration has at most one connection that works. A newer one ends the
//! older, waits until that has written its last, and then takes its place.

use std::{
    collections::HashMap,
    fs::File,
    io,
    net::{SocketAddr, TcpStream},
    os::unix::fs::MetadataExt,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use uuid::Uuid;

use super::{ExpectError, Incoming};
use crate::{
    link::{self, BEAT},
    protocol::{Nonce, nonce},
    sync::{locked, wait},
    token::{TOKEN, Token},
};

/// Most connections, of whatever kind, at one time.
const MOST: usize = 64;

/// All that is expected and everybody who is there.
#[derive(Debug, Default)]
pub(super) struct Registry {
    state: Mutex<State>,
    /// A visit has ended.
    left: Condvar,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    expected: HashMap<Uuid, Arc<Expected>>,
    visits: HashMap<u64, Arc<TcpStream>>,
    visited: u64,
}

impl Registry {
    pub(super) fn expect(
        &self,
        migration: Uuid,
        token: &Token,
        files: Vec<Incoming>,
    ) -> Result<(), ExpectError> {
        let mut state = locked(&self.state);
        if let Some(known) = state.expected.get(&migration) {
            return match known.token == *token && known.files == files {
                true => Ok(()),
                false => Err(ExpectError::Conflict(migration)),
            };
        }
        let expected = Expected::new(migration, token.clone(), files);
        state.expected.insert(migration, Arc::new(expected));
        Ok(())
    }

    pub(super) fn forget(&self, migration: Uuid) {
        let known = locked(&self.state).expected.remove(&migration);
        if let Some(expected) = known {
            expected.end();
        }
    }

    /// What is expected of who shows this.
    pub(super) fn find(&self, migration: Uuid, token: &[u8; TOKEN]) -> Option<Arc<Expected>> {
        let known = locked(&self.state).expected.get(&migration).cloned();
        known.filter(|expected| expected.token.is(token))
    }

    /// Somebody came in, if there is room.
    pub(super) fn admit(self: &Arc<Self>, stream: TcpStream, peer: SocketAddr) -> Option<Visit> {
        let mut state = locked(&self.state);
        if state.closed || state.visits.len() >= MOST {
            return None;
        }
        let stream = Arc::new(stream);
        state.visited += 1;
        let number = state.visited;
        state.visits.insert(number, Arc::clone(&stream));
        Some(Visit {
            registry: Arc::clone(self),
            number,
            stream,
            peer,
        })
    }

    pub(super) fn is_closed(&self) -> bool {
        locked(&self.state).closed
    }

    /// Lets nobody in any more.
    pub(super) fn close(&self) {
        locked(&self.state).closed = true;
    }

    /// Ends everything and waits until it has ended.
    pub(super) fn drain(&self) {
        let mut state = locked(&self.state);
        let expected: Vec<_> = state.expected.drain().collect();
        for stream in state.visits.values() {
            link::cut(stream);
        }
        drop(state);
        for (_, expected) in expected {
            expected.end();
        }
        let mut state = locked(&self.state);
        while !state.visits.is_empty() {
            state = wait(&self.left, state, BEAT);
        }
    }
}

/// One connection, whoever it is.
pub(super) struct Visit {
    pub(super) registry: Arc<Registry>,
    number: u64,
    pub(super) stream: Arc<TcpStream>,
    pub(super) peer: SocketAddr,
}

impl Drop for Visit {
    fn drop(&mut self) {
        locked(&self.registry.state).visits.remove(&self.number);
        self.registry.left.notify_all();
    }
}

/// One migration that is expected.
#[derive(Debug)]
pub(super) struct Expected {
    pub(super) migration: Uuid,
    token: Token,
    pub(super) files: Vec<Incoming>,
    stage: Mutex<Stage>,
    changed: Condvar,
}

#[derive(Debug)]
struct Stage {
    ended: bool,
    /// The number of the newest who wants to be on it.
    newest: u64,
    on: Option<(Arc<TcpStream>, Arc<AtomicBool>)>,
    run: Option<Nonce>,
    epoch: Nonce,
    seen: Vec<Option<Seen>>,
}

/// A file as it was when it was opened first in this epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    device: u64,
    inode: u64,
    virgin: bool,
}

impl Expected {
    fn new(migration: Uuid, token: Token, files: Vec<Incoming>) -> Self {
        let stage = Stage {
            ended: false,
            newest: 0,
            on: None,
            run: None,
            epoch: nonce(),
            seen: vec![None; files.len()],
        };
        Self {
            migration,
            token,
            files,
            stage: Mutex::new(stage),
            changed: Condvar::new(),
        }
    }

    /// Takes the place of whoever is on it, as soon as that has ended; calls
    /// `beat` now and then until then. Nothing if somebody newer came, or if it
    /// is not expected any more.
    pub(super) fn enter(
        self: &Arc<Self>,
        stream: &Arc<TcpStream>,
        run: Nonce,
        mut beat: impl FnMut() -> io::Result<()>,
    ) -> io::Result<Option<Pass>> {
        let mut stage = locked(&self.stage);
        stage.newest += 1;
        let own = stage.newest;
        self.changed.notify_all();
        loop {
            if stage.ended || stage.newest != own {
                return Ok(None);
            }
            let Some((stream, stop)) = &stage.on else {
                break;
            };
            stop.store(true, Relaxed);
            link::cut(stream);
            stage = wait(&self.changed, stage, BEAT);
            if stage.on.is_some() {
                drop(stage);
                beat()?;
                stage = locked(&self.stage);
            }
        }
        let stop = Arc::new(AtomicBool::new(false));
        stage.on = Some((Arc::clone(stream), Arc::clone(&stop)));
        if stage.run != Some(run) {
            stage.run = Some(run);
            stage.epoch = nonce();
            stage.seen.fill(None);
        }
        Ok(Some(Pass {
            expected: Arc::clone(self),
            epoch: stage.epoch,
            stop,
        }))
    }

    /// What was acknowledged does not count for whoever connects next: it may have been
    /// lost on its way to the disk.
    pub(super) fn distrust(&self) {
        locked(&self.stage).run = None;
    }

    /// Ends whoever is on it, and waits until that has written its last.
    fn end(&self) {
        let mut stage = locked(&self.stage);
        stage.ended = true;
        self.changed.notify_all();
        while let Some((stream, stop)) = &stage.on {
            stop.store(true, Relaxed);
            link::cut(stream);
            stage = wait(&self.changed, stage, BEAT);
        }
    }

    /// Whether the file was one single hole when it was opened first in this
    /// epoch: then what was not written since is one still.
    ///
    /// # Errors
    /// It is another file than it was then, or somebody changed its length.
    pub(super) fn was_virgin(
        &self,
        number: usize,
        file: &File,
        resized: bool,
        is_hole: impl FnOnce() -> io::Result<bool>,
    ) -> io::Result<bool> {
        let about = file.metadata()?;
        let (device, inode) = (about.dev(), about.ino());
        let known = locked(&self.stage).seen[number];
        if let Some(seen) = known {
            if (seen.device, seen.inode) != (device, inode) || resized {
                return Err(io::Error::other("was replaced or resized by somebody else"));
            }
            return Ok(seen.virgin);
        }
        let virgin = is_hole()?;
        locked(&self.stage).seen[number] = Some(Seen {
            device,
            inode,
            virgin,
        });
        Ok(virgin)
    }
}

/// The right to write to the files of a migration. There is one at a time.
pub(super) struct Pass {
    pub(super) expected: Arc<Expected>,
    pub(super) epoch: Nonce,
    stop: Arc<AtomicBool>,
}

impl Pass {
    /// Whether it was taken away.
    pub(super) fn is_over(&self) -> bool {
        self.stop.load(Relaxed)
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        locked(&self.expected.stage).on = None;
        self.expected.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// What was acknowledged in an epoch counts as long as it lasts.
    #[test]
    fn who_connects_after_a_flush_that_failed_asks_about_everything() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, run) = (Arc::new(stream), nonce());
        let expected = Arc::new(Expected::new(Uuid::new_v4(), Token::generate(), Vec::new()));
        let epoch = || {
            let entered = expected.enter(&stream, run, || Ok(()));
            entered.unwrap().expect("nobody is newer").epoch
        };
        let first = epoch();
        assert_eq!(epoch(), first);
        expected.distrust();
        assert_ne!(epoch(), first);
    }
}
