//! What the tests have in common: a receiver with files, a proxy that does bad
//! things to a connection, and the protocol by hand.

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use drover_carrier::{
    Control, Incoming, Mode, Outgoing, Receiver, SendError, SendSpec, Summary, Token, send,
};
use tempfile::TempDir;
use uuid::Uuid;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

pub(crate) const KIB: u64 = 1024;
pub(crate) const MIB: u64 = 1024 * KIB;

pub(crate) fn localhost() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

/// A receiver, a directory for both sides, one migration.
pub(crate) struct Rig {
    pub(crate) dir: TempDir,
    pub(crate) receiver: Option<Receiver>,
    pub(crate) port: u16,
    pub(crate) migration: Uuid,
    pub(crate) token: Token,
    pub(crate) files: usize,
    pub(crate) mode: Mode,
}

impl Rig {
    /// One that expects so many files, fresh.
    pub(crate) fn new(files: usize) -> Self {
        Self::with_mode(files, Mode::Fresh)
    }

    pub(crate) fn with_mode(files: usize, mode: Mode) -> Self {
        let mut rig = Self {
            dir: tempfile::tempdir().unwrap(),
            receiver: None,
            port: 0,
            migration: Uuid::new_v4(),
            token: Token::generate(),
            files,
            mode,
        };
        rig.start();
        rig
    }

    /// Starts the receiver: on the port it had before, if it had one.
    pub(crate) fn start(&mut self) {
        let address = SocketAddr::new(localhost().ip(), self.port);
        let receiver = Receiver::listen(address).unwrap();
        self.port = receiver.port();
        let expected = receiver.expect(self.migration, &self.token, self.incoming());
        expected.unwrap();
        self.receiver = Some(receiver);
    }

    pub(crate) fn receiver(&self) -> &Receiver {
        self.receiver.as_ref().unwrap()
    }

    pub(crate) fn incoming(&self) -> Vec<Incoming> {
        let mode = self.mode;
        let paths = (0..self.files).map(|file| self.to(file));
        paths.map(|path| Incoming { path, mode }).collect()
    }

    /// The source's path of a file.
    pub(crate) fn from(&self, file: usize) -> PathBuf {
        self.dir.path().join(format!("source-{file}"))
    }

    /// The destination's.
    pub(crate) fn to(&self, file: usize) -> PathBuf {
        self.dir.path().join(format!("target-{file}"))
    }

    pub(crate) fn spec(&self) -> SendSpec {
        let paths = (0..self.files).map(|file| self.from(file));
        SendSpec {
            address: "127.0.0.1".to_owned(),
            port: self.port,
            migration: self.migration,
            token: self.token.clone(),
            files: paths.map(|path| Outgoing { path }).collect(),
            resume: false,
            progress_timeout: Duration::from_secs(15),
        }
    }

    pub(crate) fn send(&self) -> Result<Summary, SendError> {
        send(&self.spec(), &Control::new())
    }

    pub(crate) fn resume(&self) -> Result<Summary, SendError> {
        let resume = true;
        send(
            &SendSpec {
                resume,
                ..self.spec()
            },
            &Control::new(),
        )
    }

    pub(crate) fn send_through(&self, proxy: &Proxy) -> Result<Summary, SendError> {
        let port = proxy.port;
        send(
            &SendSpec {
                port,
                ..self.spec()
            },
            &Control::new(),
        )
    }

    /// Sends on a thread.
    pub(crate) fn spawn(&self, spec: SendSpec, control: &Arc<Control>) -> Sending {
        let control = Arc::clone(control);
        thread::spawn(move || send(&spec, &control))
    }

    /// Asserts that all files are the same on both sides, and as sparse.
    pub(crate) fn assert_same(&self) {
        for file in 0..self.files {
            assert_same(&self.from(file), &self.to(file));
        }
    }
}

pub(crate) type Sending = JoinHandle<Result<Summary, SendError>>;

/// Asserts that two files have the same length and bytes, and that the second
/// takes about as much of the disk.
pub(crate) fn assert_same(from: &Path, to: &Path) {
    assert!(fs::read(from).unwrap() == fs::read(to).unwrap(), "{to:?}");
    let blocks = |path| fs::metadata(path).unwrap().blocks();
    let (from, to) = (blocks(from), blocks(to));
    assert!(to <= from + from / 16 + 64, "{to} blocks instead of {from}");
}

/// Makes a file of this length with random bytes in some ranges.
pub(crate) fn make(path: &Path, len: u64, data: &[(u64, u64)]) {
    let file = File::options();
    let file = file
        .clone()
        .create(true)
        .truncate(true)
        .write(true)
        .open(path)
        .unwrap();
    file.set_len(len).unwrap();
    for (at, len) in data {
        fill(&file, *at, *len);
    }
}

/// Fills a range with random bytes.
pub(crate) fn fill(file: &File, at: u64, len: u64) {
    let mut bytes = vec![0; usize::try_from(len).unwrap()];
    for piece in bytes.chunks_mut(8) {
        let random = fastrand::u64(1..).to_le_bytes();
        piece.copy_from_slice(&random[..piece.len()]);
    }
    file.write_all_at(&bytes, at).unwrap();
}

/// Makes one byte another.
pub(crate) fn flip(path: &Path, at: u64) {
    let file = open(path);
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x55], at).unwrap();
}

/// Opens a file to change it.
pub(crate) fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

/// Waits until it is so, or long enough.
pub(crate) fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !so() {
        assert!(begun.elapsed() < Duration::from_secs(10), "never: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// What becomes of a frame, or of the hello.
pub(crate) enum Fate {
    Pass,
    /// Only so many bytes of it pass, then the connection is cut.
    Cut(usize),
    /// Nothing passes any more, and nobody is told.
    Stall,
}

/// What decides it: the number of the connection, and the frame's bytes.
pub(crate) type Judge = dyn Fn(usize, &mut Vec<u8>) -> Fate + Send + Sync;

/// Stands between sender and receiver.
pub(crate) struct Proxy {
    pub(crate) port: u16,
    state: Arc<ProxyState>,
}

struct ProxyState {
    over: Mutex<bool>,
    changed: Condvar,
    streams: Mutex<Vec<TcpStream>>,
}

impl Proxy {
    pub(crate) fn new(
        to: u16,
        judge: impl Fn(usize, &mut Vec<u8>) -> Fate + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(localhost()).unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(ProxyState {
            over: Mutex::new(false),
            changed: Condvar::new(),
            streams: Mutex::default(),
        });
        let judge: Arc<Judge> = Arc::new(judge);
        let own = Arc::clone(&state);
        thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                if *own.over.lock().unwrap() {
                    return;
                }
                let (state, judge) = (Arc::clone(&own), Arc::clone(&judge));
                let Ok(there) = TcpStream::connect(("127.0.0.1", to)) else {
                    continue;
                };
                relay(number, stream.unwrap(), there, state, judge);
            }
        });
        Self { port, state }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        *self.state.over.lock().unwrap() = true;
        self.state.changed.notify_all();
        for stream in self.state.streams.lock().unwrap().iter() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn relay(
    number: usize,
    here: TcpStream,
    there: TcpStream,
    state: Arc<ProxyState>,
    judge: Arc<Judge>,
) {
    let stalled = Arc::new(Mutex::new(false));
    let clone = |stream: &TcpStream| stream.try_clone().unwrap();
    state
        .streams
        .lock()
        .unwrap()
        .extend([clone(&here), clone(&there)]);
    let (mut back_from, mut back_to) = (clone(&there), clone(&here));
    let silent = Arc::clone(&stalled);
    thread::spawn(move || {
        let mut bytes = [0; 65536];
        while let Ok(count @ 1..) = back_from.read(&mut bytes) {
            if !*silent.lock().unwrap() && back_to.write_all(&bytes[..count]).is_err() {
                break;
            }
        }
        if !*silent.lock().unwrap() {
            let _ = back_to.shutdown(Shutdown::Both);
        }
    });
    thread::spawn(move || {
        let (mut here, mut there) = (here, there);
        let mut first = true;
        while let Some(mut frame) = read_frame(&mut here, first) {
            first = false;
            match judge(number, &mut frame) {
                Fate::Pass if there.write_all(&frame).is_ok() => {}
                Fate::Pass => break,
                Fate::Cut(after) => {
                    let _ = there.write_all(&frame[..after.min(frame.len())]);
                    break;
                }
                Fate::Stall => {
                    *stalled.lock().unwrap() = true;
                    let mut over = state.over.lock().unwrap();
                    while !*over {
                        over = state.changed.wait(over).unwrap();
                    }
                    break;
                }
            }
        }
        let _ = here.shutdown(Shutdown::Both);
        let _ = there.shutdown(Shutdown::Both);
    });
}

/// The hello or a frame, as bytes.
fn read_frame(stream: &mut TcpStream, hello: bool) -> Option<Vec<u8>> {
    let mut frame = vec![0; if hello { 72 } else { 32 }];
    stream.read_exact(&mut frame).ok()?;
    if !hello {
        let body = u32::from_le_bytes(frame[4..8].try_into().unwrap());
        frame.resize(32 + usize::try_from(body).unwrap(), 0);
        stream.read_exact(&mut frame[32..]).ok()?;
    }
    Some(frame)
}

pub(crate) const OPEN: u8 = 1;
pub(crate) const DATA: u8 = 2;
pub(crate) const CHECK: u8 = 3;
pub(crate) const ZERO: u8 = 4;
pub(crate) const WELCOME: u8 = 65;
pub(crate) const REFUSED: u8 = 66;
pub(crate) const OPENED: u8 = 67;
pub(crate) const HASH: u8 = 68;
pub(crate) const ZEROED: u8 = 69;
pub(crate) const ALIVE: u8 = 71;
pub(crate) const DIFFERS: u8 = 73;

/// Whether these bytes are a frame of this kind. (A hello begins with a `D`.)
pub(crate) fn is_kind(frame: &[u8], kind: u8) -> bool {
    frame[0] == kind
}

/// The protocol by hand, as its tables say.
pub(crate) struct Raw(pub(crate) TcpStream);

impl Raw {
    pub(crate) fn connect(rig: &Rig) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", rig.port)).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        Self(stream)
    }

    pub(crate) fn hello(rig: &Rig, migration: Uuid, token: &Token) -> Self {
        let mut raw = Self::connect(rig);
        let mut hello = b"DRVC\x01\0".to_vec();
        hello.extend(u16::try_from(rig.files).unwrap().to_le_bytes());
        hello.extend(migration.as_bytes());
        let text = token.to_string();
        let digits = (0..32).map(|at| u8::from_str_radix(&text[at * 2..][..2], 16).unwrap());
        hello.extend(digits);
        hello.extend(Uuid::new_v4().as_bytes());
        raw.0.write_all(&hello).unwrap();
        raw
    }

    pub(crate) fn welcome(rig: &Rig) -> Self {
        let mut raw = Self::hello(rig, rig.migration, &rig.token);
        assert_eq!(raw.hear().unwrap().0, WELCOME);
        raw
    }

    pub(crate) fn opened(rig: &Rig, len: u64) -> Self {
        let mut raw = Self::welcome(rig);
        raw.say(OPEN, 0, 0, len, &[]);
        assert_eq!(raw.hear().unwrap().0, OPENED);
        raw
    }

    pub(crate) fn say(&mut self, kind: u8, file: u16, offset: u64, len: u64, body: &[u8]) {
        let count = u32::try_from(body.len()).unwrap();
        let head = head(kind, file, count, offset, len);
        // It may have hung up on us; what it said is what counts.
        let _ = self.0.write_all(&[&head[..], body].concat());
    }

    /// The next frame, kind and body; nothing if it hung up.
    pub(crate) fn hear(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            let frame = read_frame(&mut self.0, false)?;
            if frame[0] != ALIVE {
                return Some((frame[0], frame[32..].to_vec()));
            }
        }
    }
}

pub(crate) fn head(kind: u8, file: u16, body: u32, offset: u64, len: u64) -> Vec<u8> {
    let mut head = vec![kind, 0];
    head.extend(file.to_le_bytes());
    head.extend(body.to_le_bytes());
    head.extend(offset.to_le_bytes());
    head.extend(len.to_le_bytes());
    head.extend(xxh3_64(&head).to_le_bytes());
    head
}

pub(crate) fn hash(bytes: &[u8]) -> Vec<u8> {
    xxh3_128(bytes).to_le_bytes().to_vec()
}
