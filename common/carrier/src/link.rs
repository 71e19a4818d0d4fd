//! Reading from and writing to the socket, awake every [`TICK`]: to notice that
//! it is over, and to say that one is alive.

use std::{
    io::{self, ErrorKind, IoSlice, Read, Write},
    net::{Shutdown, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

/// How long one call may block.
pub(crate) const TICK: Duration = Duration::from_millis(50);
/// A side that has nothing to say says so this often.
pub(crate) const BEAT: Duration = Duration::from_secs(1);
/// A side that has said nothing for so long is gone, or the link is.
pub(crate) const SILENCE: Duration = Duration::from_secs(4);

/// Read at once, for many small things to come with one call.
const AHEAD: usize = 64 * 1024;
/// From this size on it is read where it belongs: otherwise it is copied twice.
const LARGE: usize = 16 * 1024;

/// Sets a connection up. Both directions of a socket share this.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(TICK))?;
    stream.set_write_timeout(Some(TICK))
}

/// Ends a connection, whatever both sides are doing with it.
pub(crate) fn cut(stream: &TcpStream) {
    // It may be cut already.
    let _ = stream.shutdown(Shutdown::Both);
}

fn is_tick(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// The side that reads.
pub(crate) struct Reader {
    stream: Arc<TcpStream>,
    ahead: Box<[u8]>,
    from: usize,
    to: usize,
}

impl Reader {
    pub(crate) fn new(stream: Arc<TcpStream>) -> Self {
        let ahead = vec![0; AHEAD].into_boxed_slice();
        Self {
            stream,
            ahead,
            from: 0,
            to: 0,
        }
    }

    /// Whether there is more that has arrived already.
    pub(crate) fn has_more(&self) -> bool {
        self.from < self.to
    }

    /// Reads so many bytes. In between asks `tick` whether to go on.
    ///
    /// # Errors
    /// What `tick` said, or that the connection is closed, broken or silent.
    pub(crate) fn fill<E: From<io::Error>>(
        &mut self,
        into: &mut [u8],
        mut tick: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        let mut filled = 0;
        let mut heard = Instant::now();
        while filled < into.len() {
            let rest = &mut into[filled..];
            if self.from < self.to {
                let count = rest.len().min(self.to - self.from);
                rest[..count].copy_from_slice(&self.ahead[self.from..self.from + count]);
                self.from += count;
                filled += count;
                continue;
            }
            let direct = rest.len() >= LARGE;
            let target = if direct { rest } else { &mut self.ahead[..] };
            match (&*self.stream).read(target) {
                Ok(0) => return Err(io::Error::from(ErrorKind::UnexpectedEof).into()),
                Ok(count) => {
                    heard = Instant::now();
                    if direct {
                        filled += count;
                    } else {
                        (self.from, self.to) = (0, count);
                    }
                }
                Err(error) if is_tick(&error) => {
                    tick()?;
                    if heard.elapsed() > SILENCE {
                        return Err(silent().into());
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// The other side has said nothing for too long.
pub(crate) fn silent() -> io::Error {
    io::Error::new(ErrorKind::TimedOut, "nothing was heard of the other side")
}

/// Writes these one after the other. While the other side does not take them,
/// asks `tick` whether to go on.
///
/// # Errors
/// What `tick` said, or that the connection is broken.
pub(crate) fn write<E: From<io::Error>>(
    mut stream: &TcpStream,
    parts: &[&[u8]],
    mut tick: impl FnMut() -> Result<(), E>,
) -> Result<(), E> {
    let mut parts: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
    let mut parts = &mut parts[..];
    while parts.iter().any(|part| !part.is_empty()) {
        match stream.write_vectored(parts) {
            Ok(0) => return Err(io::Error::from(ErrorKind::WriteZero).into()),
            Ok(count) => IoSlice::advance_slices(&mut parts, count),
            Err(error) if is_tick(&error) => tick()?,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
