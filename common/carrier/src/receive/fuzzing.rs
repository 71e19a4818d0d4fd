//! What holds of the wire between nodes, whatever comes over it: the body of a
//! fuzz target (`tests/fuzz`). A property that does not hold is a panic.

use std::{
    cell::RefCell,
    fs,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
};

use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_64;

use super::{
    Incoming, Mode,
    registry::Registry,
    store::{Proof, Request, Store, Trouble},
};
use crate::{
    buffer::Pool,
    protocol::{CHUNK, HEAD, HELLO, Head, Hello, Kind, TEXT, hash},
    token::Token,
};

/// What the file to be compared holds.
const COMPARED: &[u8] = &[7; 5000];
/// Frames of one run.
const FRAMES: usize = 16;

/// Frames of a sender who may say anything: heads are bounded and written as they
/// were read, a receiver writes to open files, within their lengths, and never to
/// what it compares.
pub fn frames(data: &[u8]) {
    if let Some(hello) = data.first_chunk::<HELLO>()
        && let Ok(read) = Hello::decode(hello)
    {
        assert_eq!(Hello::decode(&read.encode()), Ok(read));
    }
    if let Some(head) = data.first_chunk::<HEAD>() {
        decode(head);
    }
    thread_local! {
        static RIG: RefCell<Option<Rig>> = const { RefCell::new(None) };
    }
    RIG.with_borrow_mut(|rig| rig.get_or_insert_with(Rig::new).session(data));
}

fn decode(bytes: &[u8; HEAD]) -> Option<Head> {
    let head = Head::decode(bytes).ok()?;
    let most = if head.kind == Kind::Data { CHUNK } else { TEXT };
    assert!(head.body <= most, "memory for {head:?}");
    assert_eq!(&head.encode(), bytes);
    Some(head)
}

/// The head with a sum that is right.
fn seal(mut head: [u8; HEAD]) -> [u8; HEAD] {
    let sum = xxh3_64(&head[..24]);
    head[24..].copy_from_slice(&sum.to_le_bytes());
    head
}

struct Rig {
    place: PathBuf,
    registry: Arc<Registry>,
    stream: Arc<TcpStream>,
}

impl Rig {
    fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let place = if memory.is_dir() {
            memory
        } else {
            Path::new("/tmp")
        };
        let place = place.join(format!("drover-fuzz-{}", Uuid::new_v4()));
        fs::create_dir(&place).expect("a directory");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let address = listener.local_addr().expect("its address");
        let stream = Arc::new(TcpStream::connect(address).expect("a connection"));
        Self {
            place,
            registry: Arc::default(),
            stream,
        }
    }

    /// Serves what the data say, as a session does, in one thread.
    fn session(&mut self, data: &[u8]) {
        let path = |name: &str| self.place.join(name);
        drop(fs::remove_file(path("fresh")));
        fs::write(path("compared"), COMPARED).expect("a file");
        let incoming = |name, mode| Incoming {
            path: path(name),
            mode,
        };
        let files = vec![
            incoming("fresh", Mode::Fresh),
            incoming("compared", Mode::Compare),
        ];
        let (migration, token) = (Uuid::new_v4(), Token::generate());
        let expected = self.registry.expect(migration, &token, files);
        expected.expect("nobody else is");
        let found = self.registry.find(migration, token.bytes());
        let found = found.expect("it was just expected");
        let entered = found.enter(&self.stream, [1; 16], || Ok(()));
        let pass = entered.ok().flatten().expect("nobody else is in");
        let pool = Arc::<Pool>::default();
        let (flusher, _) = mpsc::sync_channel(1);
        let mut store = Store::new(&pass, Arc::clone(&pool), flusher);
        let (mut proof, mut rest) = (Proof::new(), data);
        let mut opened = [None; 2];
        for _ in 0..FRAMES {
            let Some((bytes, after)) = rest.split_first_chunk::<HEAD>() else {
                break;
            };
            rest = after;
            // A sum is not found by trying: it is made good, but for one in 16.
            let sealed = if bytes[24] & 15 == 15 {
                *bytes
            } else {
                seal(*bytes)
            };
            let Some(head) = decode(&sealed) else { break };
            let body = (head.kind == Kind::Data).then(|| {
                let mut body = pool.take(head.body);
                let have = rest.len().min(head.body);
                body.fill(0);
                body[..have].copy_from_slice(&rest[..have]);
                rest = &rest[have..];
                body
            });
            let request = Request { head, body };
            let sent = request.body.as_deref().map(hash);
            match store
                .serve(&request)
                .and_then(|served| proof.complete(served))
            {
                Ok(answer) => {
                    let file = usize::from(head.file);
                    if head.kind == Kind::Open {
                        opened[file] = Some(head.len);
                    }
                    let len = opened[file].expect("only open files are answered for");
                    let end = head.offset.checked_add(head.len);
                    let within = end.is_some_and(|end| end <= len);
                    assert!(within || head.kind == Kind::Open, "{head:?} of {len}");
                    assert_eq!(decode(&answer.head.encode()), Some(answer.head));
                    if let Some(sent) = sent {
                        assert_eq!(
                            (file, answer.hash),
                            (0, Some(sent)),
                            "it holds what was sent"
                        );
                    }
                }
                Err(Trouble::Over) => panic!("nobody ended it"),
                Err(_) => break,
            }
        }
        drop(store);
        drop(pass);
        self.registry.forget(migration);
        let compared = fs::read(path("compared")).expect("it is there");
        assert_eq!(compared, COMPARED, "what is compared is never written");
        let made = fs::metadata(path("fresh")).map(|about| about.len()).ok();
        // It may have been made, and then not been given its length.
        if let (Some(made), Some(len)) = (made, opened[0]) {
            assert_eq!(made, len, "no file grows");
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.place));
    }
}
