//! Files on their way from one node to another: as long as their bytes take on
//! the road there is, in slices, so that progress shows. What the real carrier
//! does, it does: connections that break are made anew, what is there already is
//! found, what must not be written is compared, and a source that was written
//! to meanwhile is told.

use std::time::Duration;

use drover_model::ids::{HostName, InstanceId};
use tokio::time::Instant;

use super::{
    super::{Incoming, SendError, SendSpec, Sent},
    machine,
    script::{End, Fault},
    storage::{Content, File, is_device},
    transfer::{bytes_in, time_for},
    world::{World, pair},
};

/// Longest time between two looks at the road.
const SLICE: Duration = Duration::from_millis(200);
/// How much of its disk a guest changes while it runs, bytes per second: what of
/// an older copy cannot be used again.
const DISK_WRITES_BYTES_S: u64 = 1 << 20;

/// What is to be done next.
pub(super) enum Step {
    /// Nothing for so long.
    Wait(Duration),
    /// Everything is there.
    Done,
}

/// A file to be sent, as it was when sending began.
struct Cargo {
    path: String,
    content: Content,
    bytes: u64,
    length: u64,
}

/// One call of `send`.
pub(super) struct Course {
    from: HostName,
    spec: SendSpec,
    cargo: Vec<Cargo>,
    /// Files that are there.
    over: usize,
    /// Bytes of the next one that are there, once it was begun.
    begun: Option<u64>,
    sent: Sent,
    connected: bool,
    /// The other side knew us once.
    welcome: bool,
    /// When it was seen to be away last.
    away_at: Option<Instant>,
    /// Up to when bytes have moved.
    settled: Instant,
    /// When some arrived last.
    progressed: Instant,
}

/// As long as the real one believes in a restart.
const UNKNOWN: Duration = Duration::from_secs(3);

/// Why nothing moves.
enum Obstacle {
    /// It may go away.
    Now(String),
    /// The other side does not know us: if it was away, it may have been restarted.
    Unknown(String),
    /// It will not.
    Fatal(SendError),
}

impl From<SendError> for Obstacle {
    fn from(error: SendError) -> Self {
        Self::Fatal(error)
    }
}

fn failed(words: String) -> SendError {
    SendError::Failed(words)
}

/// A file at the destination that fails.
fn there(number: usize, words: &str) -> SendError {
    failed(format!("file {number} at the destination: {words}"))
}

impl Course {
    pub(super) fn begin(
        world: &mut World,
        from: &HostName,
        spec: SendSpec,
        now: Instant,
    ) -> Result<Self, SendError> {
        world.write_all_disks(from, now);
        let load = |path: &String| {
            let file = world
                .file_to_carry(from, path)
                .map_err(|words| failed(format!("reading {path}: {words}")))?;
            Ok(Cargo {
                path: path.clone(),
                content: file.content,
                bytes: file.allocated_bytes,
                length: file.length_bytes,
            })
        };
        let cargo = spec.files.iter().map(load);
        let cargo = cargo.collect::<Result<Vec<_>, SendError>>()?;
        Ok(Self {
            from: from.clone(),
            sent: Sent {
                total_bytes: cargo.iter().map(|c| c.bytes).sum(),
                ..Sent::default()
            },
            spec,
            cargo,
            over: 0,
            begun: None,
            connected: false,
            welcome: false,
            away_at: None,
            settled: now,
            progressed: now,
        })
    }

    /// How far it is.
    pub(super) fn sent(&self) -> Sent {
        self.sent
    }

    /// Goes on as far as time has.
    pub(super) fn step(&mut self, world: &mut World, now: Instant) -> Result<Step, SendError> {
        let cause = match self.go_on(world, now) {
            Ok(step) => return Ok(step),
            Err(Obstacle::Fatal(error)) => return Err(error),
            Err(Obstacle::Now(cause) | Obstacle::Unknown(cause)) => cause,
        };
        self.settled = now;
        let idle = now - self.progressed;
        if idle > self.spec.progress_timeout {
            let after = idle.as_secs();
            return Err(SendError::Stalled(format!(
                "no progress for {after} s: {cause}"
            )));
        }
        Ok(Step::Wait(SLICE))
    }

    fn go_on(&mut self, world: &mut World, now: Instant) -> Result<Step, Obstacle> {
        let (to, files) = self.connect(world, now)?;
        let rate = self.rate(world, &to);
        let mut budget = bytes_in(rate, now - self.settled);
        if budget > 0 {
            self.settled = now;
        }
        loop {
            self.meet_scripts(world, &to, now)?;
            if self.over == self.cargo.len() {
                self.check_unchanged(world, now)?;
                return Ok(Step::Done);
            }
            let moved = self.move_file(world, &to, &files[self.over], budget)?;
            budget -= moved;
            if moved > 0 || self.begun.is_none() {
                self.progressed = now;
                continue;
            }
            let rest = self.until_script(world).min(self.rest());
            return Ok(Step::Wait(time_for(rest, rate).min(SLICE)));
        }
    }

    /// The other side, and what it wants; a broken connection is made anew.
    fn connect(
        &mut self,
        world: &World,
        now: Instant,
    ) -> Result<(HostName, Vec<Incoming>), Obstacle> {
        let found = self.look_for(world);
        match &found {
            Err(Obstacle::Unknown(words)) => {
                self.connected = false;
                let restarted = self.away_at.is_some_and(|at| now - at <= UNKNOWN);
                if !self.welcome && !restarted {
                    return Err(Obstacle::Fatal(failed(words.clone())));
                }
            }
            Err(_) => {
                self.connected = false;
                self.away_at = Some(now);
            }
            Ok(_) if !self.connected => {
                self.sent.reconnects += u64::from(self.welcome);
                self.connected = true;
                self.welcome = true;
                self.settled = now;
            }
            Ok(_) => {}
        }
        if found.is_ok() && world.node(&self.from).sends_stalled {
            let words = "the destination is alive, but acknowledges nothing";
            return Err(Obstacle::Now(words.to_owned()));
        }
        found
    }

    fn look_for(&self, world: &World) -> Result<(HostName, Vec<Incoming>), Obstacle> {
        let (address, port) = (&self.spec.address, self.spec.port);
        let obstacle = |words: &str| Err(Obstacle::Now(format!("{address}:{port}: {words}")));
        let Some(to) = world.host_at(address) else {
            return obstacle("the name has no address");
        };
        let node = world.node(&to);
        if !world.is_linked(&self.from, &to) || node.spec.blocked_ports.contains(&port) {
            return obstacle("connection timed out");
        }
        if port != node.spec.disk_port || !node.takes_files() {
            return obstacle("Connection refused");
        }
        let inbox = node.inbox(self.spec.key, &self.spec.token);
        match inbox.filter(|inbox| inbox.files.len() == self.cargo.len()) {
            Some(inbox) => Ok((to, inbox.files.clone())),
            None => {
                let words = "the destination refused: it expects no such files";
                Err(Obstacle::Unknown(words.to_owned()))
            }
        }
    }

    fn rate(&self, world: &World, to: &HostName) -> u64 {
        let limit = self.spec.bandwidth_bytes_s.filter(|limit| *limit > 0);
        let limit = limit.unwrap_or(u64::MAX);
        world.road_bytes_s(&self.from, to).min(limit).max(1)
    }

    fn rest(&self) -> u64 {
        self.sent.total_bytes - self.sent.done_bytes
    }

    /// Bytes until the next script of the source's node.
    fn until_script(&self, world: &World) -> u64 {
        let scripts = world.node(&self.from).send_scripts.iter();
        let points = scripts.map(|script| self.point(script.percent));
        let next = points.filter(|at| *at > self.sent.done_bytes).min();
        next.map_or(u64::MAX, |at| at - self.sent.done_bytes)
    }

    fn point(&self, percent: u8) -> u64 {
        let bytes = u128::from(self.sent.total_bytes) * u128::from(percent) / 100;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    /// Lets what scripts have for this moment happen.
    fn meet_scripts(
        &mut self,
        world: &mut World,
        to: &HostName,
        now: Instant,
    ) -> Result<(), Obstacle> {
        let done = self.sent.done_bytes;
        let due = |percent: u8| self.point(percent) <= done;
        let scripts = &mut world.node_mut(&self.from).send_scripts;
        let Some(next) = scripts.iter().position(|script| due(script.percent)) else {
            return Ok(());
        };
        let fault = scripts.remove(next).fault;
        let host = |end: End| match end {
            End::Source => &self.from,
            End::Destination => to,
        };
        match fault {
            Fault::Fail(words) => return Err(failed(words).into()),
            Fault::Stall => world.node_mut(&self.from).sends_stalled = true,
            Fault::CutLink => {
                world.cut.insert(pair(&self.from, to));
            }
            Fault::LibvirtdAway(end) => world.libvirtd_away(host(end)),
            Fault::LibvirtdDies(end) => world.libvirtd_dies(host(end), now),
            Fault::PowerOff(end) => world.power_off(host(end), now),
            _ => {}
        }
        // What it broke shows at the next look.
        Err(Obstacle::Now("a script was met".to_owned()))
    }

    /// Moves up to so many bytes of the next file; how many it were.
    fn move_file(
        &mut self,
        world: &mut World,
        to: &HostName,
        file: &Incoming,
        budget: u64,
    ) -> Result<u64, SendError> {
        let (number, bytes) = (self.over, self.cargo[self.over].bytes);
        let at = match self.begun {
            Some(at) => at,
            None if file.present => {
                self.compare(world, to, file)?;
                self.sent.reused_bytes += bytes;
                self.sent.done_bytes += bytes;
                self.over += 1;
                return Ok(0);
            }
            None => {
                let cargo = &self.cargo[number];
                let found = world.file_to_carry(to, &file.path).ok();
                let found = found.filter(|_| self.spec.resume);
                let reused = found.map_or(0, |f| in_common(&f.content, &cargo.content, bytes));
                self.sent.reused_bytes += reused;
                self.sent.done_bytes += reused;
                reused
            }
        };
        let moved = budget.min(bytes - at).min(self.until_script(world));
        let at = at + moved;
        let cargo = &self.cargo[number];
        let content = if at == bytes {
            cargo.content.clone()
        } else {
            Content::Partial {
                of: Box::new(cargo.content.clone()),
                bytes: at,
            }
        };
        let arrived = File {
            content,
            allocated_bytes: at,
            length_bytes: cargo.length,
        };
        world
            .take_in(to, &file.path, arrived)
            .map_err(|words| there(number, &words))?;
        self.sent.done_bytes += moved;
        self.begun = Some(at);
        if at == bytes {
            self.begun = None;
            self.over += 1;
        }
        Ok(moved)
    }

    fn compare(&self, world: &World, to: &HostName, file: &Incoming) -> Result<(), SendError> {
        let number = self.over;
        let found = world.file_to_carry(to, &file.path);
        let found = found.map_err(|words| there(number, &words))?;
        if found.content == self.cargo[number].content {
            return Ok(());
        }
        let words = format!("file {number} is not the same at the destination");
        Err(failed(words))
    }

    /// Nobody has written to what was sent.
    fn check_unchanged(&self, world: &mut World, now: Instant) -> Result<(), SendError> {
        world.write_all_disks(&self.from, now);
        for cargo in &self.cargo {
            // One that has another name by now is held open by the real carrier.
            let found = world.file_to_carry(&self.from, &cargo.path);
            if found.is_ok_and(|file| file.content != cargo.content) {
                let path = &cargo.path;
                let words = format!("reading {path}: was changed while it was sent");
                return Err(failed(words));
            }
        }
        Ok(())
    }
}

/// How many bytes of what is there are also in what is to come.
fn in_common(there: &Content, new: &Content, bytes: u64) -> u64 {
    match (there, new) {
        (Content::Partial { of, bytes: some }, _) => in_common(of, new, *some).min(bytes),
        (
            Content::Disk { token, written },
            Content::Disk {
                token: same,
                written: later,
            },
        ) if token == same => {
            let time = later.saturating_sub(*written);
            bytes.saturating_sub(bytes_in(DISK_WRITES_BYTES_S, time))
        }
        (there, new) if there == new => bytes,
        _ => 0,
    }
}

impl World {
    /// What the road between two nodes carries, bytes per second.
    fn road_bytes_s(&self, from: &HostName, to: &HostName) -> u64 {
        let own = |host| self.node(host).spec.bandwidth_bytes_s;
        let link = self.links.get(&pair(from, to)).copied();
        own(from).min(own(to)).min(link.unwrap_or(u64::MAX))
    }

    /// Every guest that runs on a node has written to its disks.
    fn write_all_disks(&mut self, host: &HostName, now: Instant) {
        let ids: Vec<InstanceId> = self.node(host).domains.keys().copied().collect();
        for id in ids {
            self.write_disks(host, id, now);
        }
    }

    /// A file as it is carried, the machine's own included; or why not, in words.
    fn file_to_carry(&self, host: &HostName, path: &str) -> Result<File, String> {
        if machine::has(path) {
            let text = machine::read(path)?;
            let bytes = text.len() as u64;
            return Ok(File::dense(Content::Text(text), bytes));
        }
        let file = self.storage.file(host, path).cloned();
        file.ok_or_else(|| "No such file or directory (os error 2)".to_owned())
    }

    /// So much of a file has arrived; or why it has not.
    fn take_in(&mut self, host: &HostName, path: &str, arrived: File) -> Result<(), String> {
        if machine::has(path) {
            return match arrived.content {
                Content::Text(text) => machine::write(path, &text),
                Content::Partial { .. } => Ok(()),
                other => Err(format!("the machine has no room for {other:?}")),
            };
        }
        let free = self
            .storage
            .volume_at(host, path)
            .map_or(0, |v| v.free_bytes());
        match self.storage.file_mut(host, path) {
            Some(file) if is_device(path) => {
                let (has, needed) = (file.length_bytes, arrived.length_bytes);
                if has < needed {
                    return Err(format!("the device has {has} bytes, {needed} are needed"));
                }
                *file = File {
                    length_bytes: has,
                    ..arrived
                };
                Ok(())
            }
            // A device that is missing must not become a file.
            None if is_device(path) => Err("No such file or directory (os error 2)".to_owned()),
            Some(file) => {
                let more = arrived.allocated_bytes.saturating_sub(file.allocated_bytes);
                if more > free {
                    return Err("No space left on device (os error 28)".to_owned());
                }
                *file = arrived;
                Ok(())
            }
            None => self.storage.create(host, path, arrived),
        }
    }
}
