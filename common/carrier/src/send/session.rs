//! One connection: three threads while it lasts. One reads ahead and hashes,
//! one writes to the socket, one takes the answers.

use std::{
    io,
    net::{TcpStream, ToSocketAddrs},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    SendError, SendSpec,
    ledger::{Ledger, Opened, Take, Unsettled},
    prepare::{Message, prepare},
};
use crate::{
    buffer::Pool,
    control::{Bucket, Control},
    disk::Source,
    link::{self, BEAT, Reader, TICK},
    pipe::{Pipe, Pop, Push},
    protocol::{BATCH, CHUNK, HEAD, Head, Hello, Kind, Malformed, Nonce, TEXT},
    sync::locked,
};

/// How long one attempt to connect may take.
const CONNECT: Duration = Duration::from_secs(4);
/// How many ticks the other side's last words may take to be heard.
const LAST_WORDS: u32 = 4;
/// How many messages are written with one call.
const AT_ONCE: usize = 64;
/// Bytes read ahead. The kernel reads ahead of us where disks are slow; more
/// here would not be in the processor's cache any more when it is sent.
const READ_AHEAD: usize = CHUNK;

/// Why a connection ended before its time.
pub(super) enum Cut {
    /// It broke. Another one may do.
    Link(io::Error),
    /// The receiver does not know us.
    Refused(String),
    /// Another one would not help.
    Fatal(SendError),
}

impl From<io::Error> for Cut {
    fn from(error: io::Error) -> Self {
        Self::Link(error)
    }
}

impl From<SendError> for Cut {
    fn from(error: SendError) -> Self {
        Self::Fatal(error)
    }
}

impl From<Malformed> for Cut {
    fn from(error: Malformed) -> Self {
        Self::Link(io::Error::other(format!("the destination {error}")))
    }
}

/// What all connections of a transfer have in common.
pub(super) struct Dial<'a> {
    pub(super) spec: &'a SendSpec,
    pub(super) run: Nonce,
    pub(super) control: &'a Control,
    pub(super) ledger: &'a Ledger<'a>,
    pub(super) sources: &'a [Source],
}

impl Dial<'_> {
    /// Whether to go on.
    pub(super) fn check(&self, cause: &str) -> Result<(), SendError> {
        if self.control.is_cancelled() {
            return Err(SendError::Cancelled);
        }
        let after = self.ledger.idle();
        if after > self.spec.progress_timeout {
            let cause = cause.to_owned();
            return Err(SendError::Stalled { after, cause });
        }
        Ok(())
    }

    /// The same while connected.
    fn check_busy(&self) -> Result<(), Cut> {
        Ok(self.check("the destination is alive, but acknowledges nothing")?)
    }

    /// Connects, in a thread of its own: neither the name nor the connection
    /// can be waited for in bits.
    fn connect(&self) -> Result<TcpStream, Cut> {
        let (say, hear) = mpsc::channel();
        let (address, port) = (self.spec.address.clone(), self.spec.port);
        let name = "carrier-connect".to_owned();
        thread::Builder::new().name(name).spawn(move || {
            // Nobody may be waiting any more.
            let _ = say.send(connect(&address, port));
        })?;
        loop {
            match hear.recv_timeout(TICK) {
                Ok(connected) => return Ok(connected?),
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    self.check("the connection is not accepted")?;
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(io::Error::other("the attempt to connect died").into());
                }
            }
        }
    }
}

fn connect(address: &str, port: u16) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in (address, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECT) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Runs one connection, to the end of the transfer or its own. Whether the
/// receiver knows us is noted in `welcome`.
pub(super) fn run(dial: &Dial, welcome: &mut bool) -> Result<(), Cut> {
    let stream = Arc::new(dial.connect()?);
    link::prepare(&stream)?;
    let mut reader = Reader::new(Arc::clone(&stream));
    let epoch = greet(dial, &stream, &mut reader)?;
    if *welcome {
        dial.control.count_reconnect();
    }
    *welcome = true;
    let opened = open(dial, &stream, &mut reader)?;
    dial.ledger.begin(epoch, opened);
    let session = Session {
        dial,
        stream,
        pipe: Pipe::new(READ_AHEAD),
        over: AtomicBool::new(false),
        cut: Mutex::new(None),
    };
    session.carry(reader)
}

fn greet(dial: &Dial, stream: &TcpStream, reader: &mut Reader) -> Result<Nonce, Cut> {
    let hello = Hello {
        files: u16::try_from(dial.sources.len()).unwrap_or(u16::MAX),
        migration: dial.spec.migration,
        token: *dial.spec.token.bytes(),
        run: dial.run,
    };
    link::write(stream, &[&hello.encode()], || dial.check_busy())?;
    let answer = answer(dial, stream, reader)?;
    if answer.head.kind != Kind::Welcome {
        return Err(Malformed("did not welcome us").into());
    }
    Ok(answer.number())
}

/// Has all files opened at the other side.
fn open(dial: &Dial, stream: &TcpStream, reader: &mut Reader) -> Result<Vec<Opened>, Cut> {
    for (source, file) in dial.sources.iter().zip(0..) {
        let head = Head::about(Kind::Open, file, 0, source.len);
        link::write(stream, &[&head.encode()], || dial.check_busy())?;
    }
    let opened = dial.sources.iter().zip(0..).map(|(_, file)| {
        let Answer { head, .. } = answer(dial, stream, reader)?;
        match head.kind == Kind::Opened && head.file == file {
            true => Ok(Opened(head.flags)),
            false => Err(Malformed("did not open a file").into()),
        }
    });
    opened.collect()
}

/// Something the other side said.
struct Answer {
    head: Head,
    body: [u8; TEXT],
}

impl Answer {
    fn number(&self) -> Nonce {
        let mut number = [0; 16];
        number.copy_from_slice(&self.body[..16]);
        number
    }

    /// What the other side says in words, made fit to be shown.
    fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.body[..self.head.body]);
        text.chars().filter(|c| !c.is_control()).collect()
    }
}

/// The next answer while nothing else goes on.
fn answer(dial: &Dial, stream: &TcpStream, reader: &mut Reader) -> Result<Answer, Cut> {
    loop {
        let answer = hear(reader, || dial.check_busy())?;
        if answer.head.kind != Kind::Alive {
            return Ok(answer);
        }
        // It is busy; and so that it does not take us for gone:
        let ping = Head::bare(Kind::Ping).encode();
        link::write(stream, &[&ping], || dial.check_busy())?;
        dial.check_busy()?;
    }
}

/// The next thing the other side says. What ends the transfer is an error.
fn hear(reader: &mut Reader, mut tick: impl FnMut() -> Result<(), Cut>) -> Result<Answer, Cut> {
    let mut head = [0; HEAD];
    reader.fill(&mut head, &mut tick)?;
    let mut answer = Answer {
        head: Head::decode(&head)?,
        body: [0; TEXT],
    };
    if answer.head.body > TEXT {
        return Err(Malformed("said too much").into());
    }
    reader.fill(&mut answer.body[..answer.head.body], &mut tick)?;
    let file = usize::from(answer.head.file);
    match answer.head.kind {
        Kind::Refused => Err(Cut::Refused(answer.text())),
        Kind::Differs => Err(SendError::Differs { file }.into()),
        Kind::Failed => {
            let reason = answer.text();
            Err(SendError::Destination { file, reason }.into())
        }
        _ => Ok(answer),
    }
}

/// Messages that are passed on together.
#[derive(Default)]
struct Batch {
    messages: Vec<Message>,
    bytes: usize,
}

impl Batch {
    fn add(&mut self, messages: Vec<Message>) {
        for message in messages {
            self.bytes += message.weight();
            self.messages.push(message);
        }
    }
}

struct Session<'a> {
    dial: &'a Dial<'a>,
    stream: Arc<TcpStream>,
    pipe: Pipe<Vec<Message>>,
    over: AtomicBool,
    cut: Mutex<Option<Cut>>,
}

impl Session<'_> {
    fn carry(self, mut reader: Reader) -> Result<(), Cut> {
        thread::scope(|scope| {
            let named = |name: &str| thread::Builder::new().name(name.to_owned());
            let reads = || self.ended(self.read_ahead());
            let hears = || self.ended(self.take_answers(&mut reader));
            let spawned = named("carrier-read")
                .spawn_scoped(scope, reads)
                .and_then(|_| named("carrier-hear").spawn_scoped(scope, hears));
            self.ended(match spawned {
                Ok(_) => self.write(),
                Err(error) => Err(error.into()),
            });
        });
        let cut = self.cut.into_inner();
        cut.unwrap_or_else(PoisonError::into_inner)
            .map_or(Ok(()), Err)
    }

    /// One of the threads has ended, so the others have to. The first reason counts.
    fn ended(&self, how: Result<(), Cut>) {
        let mut cut = locked(&self.cut);
        if self.over.swap(true, Relaxed) {
            return;
        }
        *cut = how.err();
        drop(cut);
        self.pipe.abandon();
        link::cut(&self.stream);
    }

    fn is_over(&self) -> bool {
        self.over.load(Relaxed)
    }

    /// Reads and hashes until all is done, which ends the session.
    fn read_ahead(&self) -> Result<(), Cut> {
        let pool = Arc::new(Pool::default());
        let ledger = self.dial.ledger;
        let mut batch = Batch::default();
        while !self.is_over() {
            // What is collected does not wait for what may come.
            let patience = match batch.messages.is_empty() {
                true => TICK,
                false => Duration::ZERO,
            };
            match ledger.take(patience)? {
                Take::Item(item, opened) => {
                    let messages = prepare(item, opened, self.dial.sources, ledger, &pool)?;
                    batch.add(messages);
                    if batch.bytes < BATCH {
                        continue;
                    }
                }
                Take::Wait if batch.messages.is_empty() => continue,
                Take::Wait => {}
                Take::Done => return Ok(()),
            }
            self.push(std::mem::take(&mut batch));
        }
        Ok(())
    }

    /// Waits for room; the messages are dropped when the session is over, and
    /// stay in the ledger as under way.
    fn push(&self, batch: Batch) {
        let Batch {
            mut messages,
            bytes,
        } = batch;
        loop {
            match self.pipe.push(messages, bytes, TICK) {
                Push::Full(again) => messages = again,
                Push::Done | Push::Closed => return,
            }
        }
    }

    fn take_answers(&self, reader: &mut Reader) -> Result<(), Cut> {
        while !self.is_over() {
            let answer = hear(reader, || Ok(()))?;
            if answer.head.kind == Kind::Alive {
                continue;
            }
            let hash = u128::from_le_bytes(answer.number());
            match self.dial.ledger.settle(&answer.head, hash) {
                Ok(()) => {}
                Err(Unsettled::Malformed(how)) => return Err(how.into()),
                Err(Unsettled::Failed(error)) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn write(&self) -> Result<(), Cut> {
        let mut bucket = Bucket::new();
        let mut beat = Instant::now();
        while !self.is_over() {
            match self.pipe.pop(TICK) {
                Pop::Closed => return Ok(()),
                Pop::Empty => self.pause(&mut beat)?,
                Pop::Item(messages) => {
                    for some in messages.chunks(AT_ONCE) {
                        self.put_some(some, &mut bucket, &mut beat)?;
                    }
                    beat = Instant::now();
                }
            }
        }
        Ok(())
    }

    fn put_some(
        &self,
        messages: &[Message],
        bucket: &mut Bucket,
        beat: &mut Instant,
    ) -> Result<(), Cut> {
        let bytes: usize = messages.iter().map(|message| message.body().len()).sum();
        self.wait_for_limit(bytes as u64, bucket, beat)?;
        let parts = messages
            .iter()
            .flat_map(|message| [&message.head[..], message.body()]);
        self.put(&parts.collect::<Vec<_>>())?;
        self.dial.control.count_sent(bytes as u64);
        Ok(())
    }

    /// Until the limit allows so many bytes. That is no lack of progress.
    fn wait_for_limit(
        &self,
        bytes: u64,
        bucket: &mut Bucket,
        beat: &mut Instant,
    ) -> Result<(), Cut> {
        if bytes == 0 {
            return Ok(());
        }
        while let Err(time) = bucket.take(bytes, self.dial.control) {
            self.dial.control.sleep(time.min(TICK));
            self.dial.ledger.excuse();
            self.pause(beat)?;
            if self.is_over() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Between two messages: says that we are alive, if it is time to.
    fn pause(&self, beat: &mut Instant) -> Result<(), Cut> {
        self.dial.check_busy()?;
        if beat.elapsed() >= BEAT {
            *beat = Instant::now();
            self.put(&[&Head::bare(Kind::Ping).encode()])?;
        }
        Ok(())
    }

    fn put(&self, parts: &[&[u8]]) -> Result<(), Cut> {
        let written = link::write(&self.stream, parts, || self.dial.check_busy());
        if let Err(Cut::Link(_)) = written {
            // The other side may have said why, and the thread that hears it
            // shall be the first to end.
            for _ in 0..LAST_WORDS {
                if !self.is_over() {
                    thread::sleep(TICK);
                }
            }
        }
        written
    }
}
