//! One connection: four threads once it is let in. One takes what the sender
//! says, and says itself that it is alive; one writes to the files; one reads
//! back what was written, and answers; one flushes what was written. Finding
//! memory for what is written can take longer than all the rest, which therefore
//! goes on meanwhile.

use std::{
    io::{self, ErrorKind},
    net::TcpStream,
    sync::{
        Arc, Mutex,
        mpsc::{self, Receiver, SyncSender},
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    registry::{Pass, Visit},
    store::{Answer, Proof, Request, Served, Store, Trouble},
};
use crate::{
    buffer::Pool,
    disk::Target,
    link::{self, BEAT, Reader, SILENCE, TICK},
    pipe::{Pipe, Pop, Push},
    protocol::{BATCH, CHUNK, HEAD, HELLO, Head, Hello, Kind, Malformed, TEXT},
    sync::locked,
};

/// Bytes that have arrived and are not written yet. More would not be in the
/// processor's cache any more when their turn comes.
const ARRIVED: usize = CHUNK;
/// Bytes that were written and are not read back yet.
const WRITTEN: usize = CHUNK;
/// Files that wait to be flushed, besides the one that is.
const UNFLUSHED: usize = 1;
/// How long a sender that was told to go may take to read why.
const FAREWELL: Duration = Duration::from_secs(2);

/// Receives from whoever this is.
pub(super) fn receive(visit: &Visit) {
    let peer = visit.peer;
    if let Err(error) = try_receive(visit) {
        tracing::warn!(%peer, %error, "a connection is dropped");
    }
    link::cut(&visit.stream);
}

fn try_receive(visit: &Visit) -> io::Result<()> {
    link::prepare(&visit.stream)?;
    let voice = Voice {
        stream: &visit.stream,
        gate: Mutex::new(()),
    };
    let mut reader = Reader::new(Arc::clone(&visit.stream));
    let hello = match listen(&mut reader) {
        Ok(hello) => hello,
        Err(error) => {
            // In case it is one of us, of another version.
            let _ = voice.say_text(Head::bare(Kind::Refused), &error.to_string());
            return Err(error);
        }
    };
    let Some(expected) = visit.registry.find(hello.migration, &hello.token) else {
        let _ = voice.say_text(
            Head::bare(Kind::Refused),
            "the migration or its token is not known",
        );
        return Err(io::Error::other("neither known nor expected"));
    };
    if usize::from(hello.files) != expected.files.len() {
        let _ = voice.say_text(Head::bare(Kind::Refused), "another number of files");
        return Err(io::Error::other("has another number of files"));
    }
    let beat = || voice.say(&Head::bare(Kind::Alive).encode());
    let Some(pass) = expected.enter(&visit.stream, hello.run, beat)? else {
        return Ok(());
    };
    let migration = expected.migration;
    tracing::debug!(%migration, peer = %visit.peer, "a sender is let in");
    let welcome = Head::bare(Kind::Welcome).with_body(pass.epoch.len());
    voice.say(&[&welcome.encode()[..], &pass.epoch].concat())?;
    Session {
        pass: &pass,
        voice,
        arrived: Pipe::new(ARRIVED),
        written: Pipe::new(WRITTEN),
        pool: Arc::default(),
    }
    .work(reader)
}

/// Waits for the hello, but not for long.
fn listen(reader: &mut Reader) -> io::Result<Hello> {
    let until = Instant::now() + SILENCE;
    let mut hello = [0; HELLO];
    reader.fill(&mut hello, || match Instant::now() < until {
        true => Ok(()),
        false => Err(link::silent()),
    })?;
    Hello::decode(&hello).map_err(broken)
}

fn broken(how: Malformed) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, how)
}

/// The socket to the sender, used by two threads.
struct Voice<'a> {
    stream: &'a TcpStream,
    gate: Mutex<()>,
}

impl Voice<'_> {
    /// Says it, unless the sender does not listen.
    fn say(&self, bytes: &[u8]) -> io::Result<()> {
        let gate = locked(&self.gate);
        let until = Instant::now() + SILENCE;
        let said = link::write(self.stream, &[bytes], || match Instant::now() < until {
            true => Ok(()),
            false => Err(link::silent()),
        });
        drop(gate);
        said
    }

    fn say_text(&self, head: Head, text: &str) -> io::Result<()> {
        let mut end = text.len().min(TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let text = &text.as_bytes()[..end];
        let head = head.with_body(text.len()).encode();
        self.say(&[&head[..], text].concat())
    }
}

struct Session<'a> {
    pass: &'a Pass,
    voice: Voice<'a>,
    arrived: Pipe<Vec<Request>>,
    written: Pipe<Vec<Result<Served, Trouble>>>,
    pool: Arc<Pool>,
}

impl Session<'_> {
    fn work(self, mut reader: Reader) -> io::Result<()> {
        thread::scope(|scope| {
            let named = |name: &str| thread::Builder::new().name(name.to_owned());
            let (flusher, unflushed) = mpsc::sync_channel(UNFLUSHED);
            named("carrier-flush").spawn_scoped(scope, || self.flush(unflushed))?;
            let prover = named("carrier-prove").spawn_scoped(scope, || {
                let ended = self.prove();
                self.abandon();
                ended
            })?;
            let writer = named("carrier-write").spawn_scoped(scope, || self.serve(flusher));
            let taken = match &writer {
                Ok(_) => self.take(&mut reader),
                Err(error) => Err(io::Error::new(error.kind(), "no thread to write")),
            };
            // What has not been written yet would not be acknowledged either.
            self.abandon();
            let died = || io::Error::other("a thread died");
            let wrote = writer.map_or(Ok(()), |writer| writer.join().map_err(|_| died()));
            let proved = prover.join().unwrap_or_else(|_| Err(died()));
            match (wrote.and(proved), taken) {
                (Err(error), _) => Err(error),
                (Ok(()), Err(error)) if self.pass.is_over() || is_end(&error) => Ok(()),
                (Ok(()), taken) => taken,
            }
        })
    }

    fn abandon(&self) {
        self.arrived.abandon();
        self.written.abandon();
    }

    /// Takes requests until the sender goes, or is told to.
    fn take(&self, reader: &mut Reader) -> io::Result<()> {
        let mut beat = Instant::now();
        let (mut batch, mut bytes) = (Vec::new(), 0);
        loop {
            if let Some(request) = self.take_one(reader, &mut beat)? {
                bytes += request.weight();
                batch.push(request);
            }
            if bytes >= BATCH || (bytes > 0 && !reader.has_more()) {
                if !self.push(std::mem::take(&mut batch), bytes, &mut beat)? {
                    return see_off(reader);
                }
                bytes = 0;
            }
        }
    }

    /// The next request; nothing, if it was none.
    fn take_one(&self, reader: &mut Reader, beat: &mut Instant) -> io::Result<Option<Request>> {
        let mut head = [0; HEAD];
        reader.fill(&mut head, || self.beat(beat))?;
        let head = Head::decode(&head).map_err(broken)?;
        let body = if head.kind == Kind::Data {
            let mut body = self.pool.take(head.body);
            reader.fill(&mut body, || self.beat(beat))?;
            Some(body)
        } else if head.body > 0 {
            return Err(broken(Malformed("said what only a receiver says")));
        } else {
            None
        };
        self.beat(beat)?;
        Ok((head.kind != Kind::Ping).then_some(Request { head, body }))
    }

    /// Waits for room. False: nobody takes it any more.
    fn push(&self, mut batch: Vec<Request>, bytes: usize, beat: &mut Instant) -> io::Result<bool> {
        loop {
            match self.arrived.push(batch, bytes, TICK) {
                Push::Done => return Ok(true),
                Push::Closed => return Ok(false),
                Push::Full(again) => batch = again,
            }
            self.beat(beat)?;
        }
    }

    /// Says that we are alive, if it is time to; and whether to go on.
    fn beat(&self, last: &mut Instant) -> io::Result<()> {
        if self.pass.is_over() {
            return Err(ErrorKind::ConnectionAborted.into());
        }
        if last.elapsed() >= BEAT {
            *last = Instant::now();
            self.voice.say(&Head::bare(Kind::Alive).encode())?;
        }
        Ok(())
    }

    /// Serves requests until there are no more, or one that cannot be served.
    fn serve(&self, flusher: SyncSender<Arc<Target>>) {
        let mut store = Store::new(self.pass, Arc::clone(&self.pool), flusher);
        while !self.pass.is_over() {
            let batch = match self.arrived.pop(TICK) {
                Pop::Item(batch) => batch,
                Pop::Empty => continue,
                Pop::Closed => return,
            };
            let mut served = Vec::new();
            let mut passed_on = Instant::now();
            for request in batch {
                if self.pass.is_over() {
                    return;
                }
                served.push(store.serve(&request));
                if matches!(served.last(), Some(Err(_))) {
                    break;
                }
                // They may be small and yet take long.
                if passed_on.elapsed() > TICK {
                    self.pass_on(std::mem::take(&mut served));
                    passed_on = Instant::now();
                }
            }
            let last = matches!(served.last(), Some(Err(_)));
            self.pass_on(served);
            if last {
                return;
            }
        }
    }

    /// Flushes files while more of them arrives. That one cannot be is said when it is
    /// finished, or found by whoever connects next.
    fn flush(&self, unflushed: Receiver<Arc<Target>>) {
        for target in unflushed {
            if target.flush().is_err() {
                self.pass.expected.distrust();
            }
        }
    }

    /// Waits for room. Nothing takes it when the session is over.
    fn pass_on(&self, mut served: Vec<Result<Served, Trouble>>) {
        let bytes = served.iter().flatten().map(Served::weight).sum();
        while !self.pass.is_over() {
            match self.written.push(served, bytes, TICK) {
                Push::Full(again) => served = again,
                Push::Done | Push::Closed => return,
            }
        }
    }

    /// Reads back and answers until there is nothing more. Answers to small
    /// requests go together.
    fn prove(&self) -> io::Result<()> {
        let mut proof = Proof::new();
        let mut unsaid = Vec::new();
        while !self.pass.is_over() {
            let batch = match self.written.pop(TICK) {
                Pop::Item(batch) => batch,
                Pop::Empty => continue,
                Pop::Closed => break,
            };
            let mut said = Instant::now();
            for served in batch {
                if self.pass.is_over() {
                    break;
                }
                match served.and_then(|served| proof.complete(served)) {
                    Ok(answer) => add(&mut unsaid, &answer),
                    Err(trouble) => {
                        self.voice.say(&unsaid)?;
                        return self.explain(trouble);
                    }
                }
                // They may be small and yet take long.
                if said.elapsed() > TICK {
                    self.voice.say(&unsaid)?;
                    unsaid.clear();
                    said = Instant::now();
                }
            }
            self.voice.say(&unsaid)?;
            unsaid.clear();
        }
        Ok(())
    }

    /// Tells the sender what ends this, and the log.
    fn explain(&self, trouble: Trouble) -> io::Result<()> {
        let expected = &self.pass.expected;
        let migration = expected.migration;
        match trouble {
            Trouble::Over => Ok(()),
            Trouble::Malformed(how) => {
                // Not worth a farewell.
                link::cut(self.voice.stream);
                Err(broken(how))
            }
            Trouble::Differs { file, offset } => {
                let path = expected.files[usize::from(file)].path.display();
                tracing::warn!(%migration, %path, offset, "is not the same as at the source");
                let head = Head::about(Kind::Differs, file, offset, 0);
                self.voice.say(&head.encode())
            }
            Trouble::Failed {
                file,
                offset,
                error,
            } => {
                let path = expected.files[usize::from(file)].path.display();
                tracing::warn!(%migration, %path, offset, %error, "cannot be received");
                let head = Head::about(Kind::Failed, file, offset, 0);
                self.voice.say_text(head, &error.to_string())
            }
        }
    }
}

fn add(unsaid: &mut Vec<u8>, answer: &Answer) {
    unsaid.extend_from_slice(&answer.head.encode());
    if let Some(hash) = answer.hash {
        unsaid.extend_from_slice(&hash.to_le_bytes());
    }
}

/// The sender went; whether it was done is its own to know.
fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset
    )
}

/// Was told to go: reads on, or what it was told would be lost with what it said
/// meanwhile.
fn see_off(reader: &mut Reader) -> io::Result<()> {
    let until = Instant::now() + FAREWELL;
    let mut rest = [0; 4096];
    while Instant::now() < until {
        let gone = reader.fill(&mut rest, || match Instant::now() < until {
            true => Ok(()),
            false => Err(link::silent()),
        });
        if gone.is_err() {
            break;
        }
    }
    Ok(())
}
