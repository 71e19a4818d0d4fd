//! What happened, in its order: as a number that is the same whenever all of it is,
//! and, if somebody wants to read it, in words.

use std::{
    borrow::Cow,
    fmt,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use drover_rpc::transport::Address;
use tokio::time::Instant;

/// What stands for the directory of a run's files.
const SOMEWHERE: &str = "/run/swarm";

/// What becomes of what is heard, besides a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heed {
    /// Nothing.
    Sum,
    /// It is printed.
    Gist,
    /// It is printed, whole.
    Whole,
}

struct Book {
    began: Instant,
    hash: u64,
    count: u64,
    heed: Heed,
    /// Where this run's files are: nobody's to foresee.
    directory: String,
}

/// A run's trace. Cheap to clone.
#[derive(Clone)]
pub(super) struct Trace(Arc<Mutex<Book>>);

impl Trace {
    /// An empty one.
    pub(super) fn new(began: Instant, heed: Heed, directory: &Path) -> Self {
        Self(Arc::new(Mutex::new(Book {
            began,
            hash: 0xcbf2_9ce4_8422_2325,
            count: 0,
            heed,
            directory: directory.display().to_string(),
        })))
    }

    /// Something happens.
    pub(super) fn note(&self, who: &str, what: fmt::Arguments<'_>) {
        let mut book = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = book.began.elapsed();
        let line = format!("{who}: {what}").replace(&book.directory, SOMEWHERE);
        book.mix(&at.as_nanos().to_le_bytes());
        book.mix(line.as_bytes());
        book.heed(at, |_| line);
    }

    /// A message is sent.
    pub(super) fn sent(&self, who: &str, to: &Address, body: &[u8]) {
        let mut book = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = book.began.elapsed();
        let body = book.without_directory(body);
        book.mix(&at.as_nanos().to_le_bytes());
        book.mix(who.as_bytes());
        book.mix(&body);
        book.heed(at, |whole| match whole {
            true => format!("{who} ─► {to}: {}", String::from_utf8_lossy(&body)),
            false => format!("{who} ─► {to}: {}", gist(&body)),
        });
    }

    /// The number that stands for all of it, and of how many things.
    pub(super) fn sum(&self) -> (u64, u64) {
        let book = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (book.hash, book.count)
    }
}

impl Book {
    fn heed(&mut self, at: Duration, line: impl FnOnce(bool) -> String) {
        let line = |whole| format!("{:>10.3}  {}", at.as_secs_f64(), line(whole));
        match self.heed {
            Heed::Sum => {}
            Heed::Gist => println!("{}", line(false)),
            Heed::Whole => println!("{}", line(true)),
        }
    }

    fn without_directory<'a>(&self, body: &'a [u8]) -> Cow<'a, [u8]> {
        match std::str::from_utf8(body) {
            Ok(text) if text.contains(&self.directory) => {
                let text = text.replace(&self.directory, SOMEWHERE);
                Cow::Owned(text.into_bytes())
            }
            _ => Cow::Borrowed(body),
        }
    }

    /// FNV-1a, eight bytes at a time.
    fn mix(&mut self, bytes: &[u8]) {
        self.count += 1;
        let prime = 0x0100_0000_01b3;
        for piece in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..piece.len()].copy_from_slice(piece);
            self.hash = (self.hash ^ u64::from_le_bytes(word)).wrapping_mul(prime);
            self.hash ^= self.hash >> 29;
        }
    }
}

/// What a message is about: its method, or how its answer begins.
fn gist(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let after = |mark: &str| {
        let at = text.find(mark)? + mark.len();
        Some(text[at..].chars().take(60).collect::<String>())
    };
    let method = after("\\\"method\\\":\\\"").or_else(|| after("\\\"method\\\": \\\""));
    let answer = || after("\\\"result\\\":").or_else(|| after("\\\"failure\\\":"));
    method
        .map(|m| m.split('\\').next().unwrap_or_default().to_owned())
        .or_else(answer)
        .unwrap_or_else(|| format!("{} bytes", body.len()))
}
