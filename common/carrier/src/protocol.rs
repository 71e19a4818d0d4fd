//! What goes over the wire, version 1.
//!
//! The sender connects and says hello (72 bytes). All numbers are little-endian.
//!
//! | at | bytes | |
//! |---:|---:|---|
//! | 0 | 4 | `DRVC` |
//! | 4 | 1 | version |
//! | 5 | 1 | 0 |
//! | 6 | 2 | how many files it has |
//! | 8 | 16 | the migration's UUID |
//! | 24 | 32 | token |
//! | 56 | 16 | the sender's run: random, the same on all connections of one call of `send` |
//!
//! Everything after that, in both directions, is frames: a head of 32 bytes and
//! sometimes a body.
//!
//! | at | bytes | |
//! |---:|---:|---|
//! | 0 | 1 | kind |
//! | 1 | 1 | flags |
//! | 2 | 2 | number of the file |
//! | 4 | 4 | length of the body |
//! | 8 | 8 | offset in the file |
//! | 16 | 8 | length of the range, or of the file |
//! | 24 | 8 | XXH3-64 of the 24 bytes before: a flipped bit must not write elsewhere |
//!
//! The sender says, and the receiver answers in the order of the questions:
//!
//! | sender | file, range | answer | |
//! |---|---|---|---|
//! | `Open` | file, its length | `Opened` + flags | once for each file, before anything else about it |
//! | `Data` + bytes | file, range | `Hash` + 16 bytes | after the bytes were written: XXH3-128 of what the file now holds there |
//! | `Check` | file, range | `Hash` + 16 bytes | the same without writing |
//! | `Zero` | file, range | `Zeroed` | after the range was made to read as zeros |
//! | `Finish` | file, its length | `Finished` | after a last look at the length, and once all of it is on stable storage |
//! | `Ping` | | none | when it has nothing else to say |
//!
//! The receiver says unasked:
//!
//! | receiver | | |
//! |---|---|---|
//! | `Welcome` + 16 bytes | answer to the hello | the epoch: as long as it stays the same, acknowledged is acknowledged |
//! | `Refused` + text | answer to the hello | and closes |
//! | `Alive` | | every second, also when the disk is busy, also before `Welcome` |
//! | `Failed` + text | file, offset | its disk failed it; then closes |
//! | `Differs` | file, offset | a file that must not be written is not the same; then closes |
//!
//! A side that breaks these rules is cut off.

use uuid::Uuid;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use crate::token::TOKEN;

/// This version. Another one is refused.
pub(crate) const VERSION: u8 = 1;
/// Most bytes of one chunk.
pub(crate) const CHUNK: usize = 1024 * 1024;
/// Small things are passed from thread to thread together, up to so many bytes.
pub(crate) const BATCH: usize = 256 * 1024;
/// Bytes of a frame's head.
pub(crate) const HEAD: usize = 32;
/// Bytes of a hello.
pub(crate) const HELLO: usize = 72;
/// Most bytes of a text, and of any body but a chunk's.
pub(crate) const TEXT: usize = 512;

const MAGIC: [u8; 4] = *b"DRVC";

/// In `Opened`: every byte of the file reads as zero and is a hole.
pub(crate) const VIRGIN: u8 = 1;
/// In `Opened`: the file is compared, not written.
pub(crate) const COMPARE: u8 = 2;
/// In `Opened`: it is a block device.
pub(crate) const BLOCK: u8 = 4;

/// The hash of a chunk.
pub(crate) type Hash = u128;

/// Hashes a chunk.
pub(crate) fn hash(bytes: &[u8]) -> Hash {
    xxh3_128(bytes)
}

/// A random number of 16 bytes: a run, an epoch.
pub(crate) type Nonce = [u8; 16];

/// A new one.
pub(crate) fn nonce() -> Nonce {
    Uuid::new_v4().into_bytes()
}

/// What a frame is about: see the tables above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Open = 1,
    Data = 2,
    Check = 3,
    Zero = 4,
    Finish = 5,
    Ping = 6,
    Welcome = 65,
    Refused = 66,
    Opened = 67,
    Hash = 68,
    Zeroed = 69,
    Finished = 70,
    Alive = 71,
    Failed = 72,
    Differs = 73,
}

const KINDS: [Kind; 15] = [
    Kind::Open,
    Kind::Data,
    Kind::Check,
    Kind::Zero,
    Kind::Finish,
    Kind::Ping,
    Kind::Welcome,
    Kind::Refused,
    Kind::Opened,
    Kind::Hash,
    Kind::Zeroed,
    Kind::Finished,
    Kind::Alive,
    Kind::Failed,
    Kind::Differs,
];

/// The peer does not speak this protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("broke the protocol: {0}")]
pub(crate) struct Malformed(pub(crate) &'static str);

/// The head of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) kind: Kind,
    pub(crate) flags: u8,
    pub(crate) file: u16,
    pub(crate) body: usize,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl Head {
    /// One without file, range and body.
    pub(crate) fn bare(kind: Kind) -> Self {
        Self::about(kind, 0, 0, 0)
    }

    /// One without a body.
    pub(crate) fn about(kind: Kind, file: u16, offset: u64, len: u64) -> Self {
        Self {
            kind,
            flags: 0,
            file,
            body: 0,
            offset,
            len,
        }
    }

    /// The same with so many bytes to follow.
    pub(crate) fn with_body(self, body: usize) -> Self {
        Self { body, ..self }
    }

    /// As it travels. A body longer than four bytes can say is cut off there by
    /// the check of the peer; none is.
    pub(crate) fn encode(&self) -> [u8; HEAD] {
        let mut bytes = [0; HEAD];
        bytes[0] = self.kind as u8;
        bytes[1] = self.flags;
        bytes[2..4].copy_from_slice(&self.file.to_le_bytes());
        let body = u32::try_from(self.body).unwrap_or(u32::MAX);
        bytes[4..8].copy_from_slice(&body.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.offset.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.len.to_le_bytes());
        let check = xxh3_64(&bytes[..24]);
        bytes[24..].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    /// Reads one, whole, of a known kind and with a body of a length that kind
    /// can have.
    pub(crate) fn decode(bytes: &[u8; HEAD]) -> Result<Self, Malformed> {
        if xxh3_64(&bytes[..24]) != number(&bytes[24..]) {
            return Err(Malformed("the head of a frame is damaged"));
        }
        let kind = KINDS
            .into_iter()
            .find(|kind| *kind as u8 == bytes[0])
            .ok_or(Malformed("a frame of an unknown kind"))?;
        let head = Self {
            kind,
            flags: bytes[1],
            file: u16::from_le_bytes([bytes[2], bytes[3]]),
            body: usize::try_from(number(&bytes[4..8])).unwrap_or(usize::MAX),
            offset: number(&bytes[8..16]),
            len: number(&bytes[16..24]),
        };
        let fits = match kind {
            Kind::Data => head.body > 0 && head.body <= CHUNK && head.body as u64 == head.len,
            Kind::Hash | Kind::Welcome => head.body == 16,
            Kind::Refused | Kind::Failed => head.body <= TEXT,
            _ => head.body == 0,
        };
        if !fits {
            return Err(Malformed("a frame of the wrong length"));
        }
        Ok(head)
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// What a sender says first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) files: u16,
    pub(crate) migration: Uuid,
    pub(crate) token: [u8; TOKEN],
    pub(crate) run: Nonce,
}

impl Hello {
    /// As it travels.
    pub(crate) fn encode(&self) -> [u8; HELLO] {
        let mut bytes = [0; HELLO];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = VERSION;
        bytes[6..8].copy_from_slice(&self.files.to_le_bytes());
        bytes[8..24].copy_from_slice(self.migration.as_bytes());
        bytes[24..56].copy_from_slice(&self.token);
        bytes[56..].copy_from_slice(&self.run);
        bytes
    }

    /// Reads one.
    pub(crate) fn decode(bytes: &[u8; HELLO]) -> Result<Self, Malformed> {
        if bytes[..4] != MAGIC {
            return Err(Malformed("not a hello"));
        }
        if bytes[4] != VERSION {
            return Err(Malformed("another version"));
        }
        let mut hello = Self {
            files: u16::from_le_bytes([bytes[6], bytes[7]]),
            migration: Uuid::nil(),
            token: [0; TOKEN],
            run: [0; 16],
        };
        let mut migration = [0; 16];
        migration.copy_from_slice(&bytes[8..24]);
        hello.migration = Uuid::from_bytes(migration);
        hello.token.copy_from_slice(&bytes[24..56]);
        hello.run.copy_from_slice(&bytes[56..]);
        Ok(hello)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_and_hellos_read_back() {
        let head = Head::about(Kind::Data, 7, 1 << 40, 4096).with_body(4096);
        assert_eq!(Head::decode(&head.encode()), Ok(head));
        let hello = Hello {
            files: 3,
            migration: Uuid::new_v4(),
            token: [9; TOKEN],
            run: nonce(),
        };
        assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
    }

    #[test]
    fn any_flipped_bit_of_a_head_is_seen() {
        let good = Head::about(Kind::Zero, 1, 512, 1 << 20).encode();
        for bit in 0..HEAD * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Head::decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn bodies_are_bounded() {
        for (kind, body) in [
            (Kind::Data, CHUNK + 1),
            (Kind::Data, 0),
            (Kind::Failed, TEXT + 1),
            (Kind::Ping, 1),
            (Kind::Hash, 15),
        ] {
            let head = Head::about(kind, 0, 0, body as u64).with_body(body);
            assert!(Head::decode(&head.encode()).is_err(), "{kind:?} {body}");
        }
    }
}
