//! Fencing agents: programs that cut a node's power, with the interface that
//! ClusterLabs' `fence-agents` share.
//!
//! An agent reads `key=value` lines from standard input, `action=off` or
//! `action=status` among them, and answers with its exit code: 0 for an action
//! that was done, and for `status` 0 for *on*, 2 for *off*; anything else is
//! *unknown*. A shell that does not understand its script and a Python program
//! that does not understand its options end with 2 as well, so a status of *off*
//! is a proof only after an *off* that ended with 0. Parameters hold passwords: they stand on no command line, in no
//! environment and in no log.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use drover_model::{ids::HostName, operation::FenceAnswer};
use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
    time::timeout,
};
use tracing::{error, info, warn};

use super::joined::Joined;
use crate::clock::Clock;

/// Where an agent is that is given by its name alone.
const AGENTS: &str = "/usr/sbin";
/// Where agents find programs; they get nothing else of our environment.
const SEARCH_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// What is kept of what an agent says, bytes: the end of it.
const MAX_SAID: usize = 2048;
/// How long whoever starts guests waits for an answer.
const SHARED_LIMIT: Duration = Duration::from_secs(10);
/// Parameters of one agent.
const MAX_PARAMETERS: usize = 64;

/// `[fence.HOST]`: what cuts a node's power.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FenceSettings {
    /// The program: its path, or its name in `/usr/sbin`.
    pub agent: String,
    /// What it needs to know, by the names in its manual page.
    #[serde(default)]
    pub parameters: BTreeMap<String, String>,
}

impl fmt::Debug for FenceSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.parameters.keys().collect();
        f.debug_struct("FenceSettings")
            .field("agent", &self.agent)
            .field("parameters", &names)
            .finish()
    }
}

impl FenceSettings {
    /// The first thing that cannot be: its key, and what is wrong with it.
    pub fn problem(&self) -> Option<(String, String)> {
        let agent = |why: &str| Some(("agent".to_owned(), why.to_owned()));
        if self.agent.is_empty() || self.agent.chars().any(char::is_control) {
            return agent("must be a path, or a name in /usr/sbin");
        }
        let path = self.path();
        if !path.is_absolute() {
            return agent("must be an absolute path, or a name in /usr/sbin");
        }
        if !path.is_file() {
            return agent(&format!(
                "there is no {}: install the fence-agents package that has it",
                path.display()
            ));
        }
        if self.parameters.len() > MAX_PARAMETERS {
            let why = format!("at most {MAX_PARAMETERS} are given");
            return Some(("parameters".to_owned(), why));
        }
        let mut parameters = self.parameters.iter();
        parameters.find_map(|(key, value)| {
            let why = bad_parameter(key, value)?;
            let shown: String = key.chars().filter(|c| !c.is_control()).take(40).collect();
            Some((format!("parameters.{shown}"), why.to_owned()))
        })
    }

    fn path(&self) -> PathBuf {
        match self.agent.contains('/') {
            true => PathBuf::from(&self.agent),
            false => Path::new(AGENTS).join(&self.agent),
        }
    }
}

/// Every agent reads lines, so none may hold a line's end.
fn bad_parameter(key: &str, value: &str) -> Option<&'static str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    if key.is_empty() || !key.chars().all(plain) {
        return Some("a parameter's name is letters, digits, '_' and '-'");
    }
    if matches!(key, "action" | "option") {
        return Some("the conductor says itself what is to be done");
    }
    let broken = value.chars().any(char::is_control);
    broken.then_some("must be one line")
}

/// What an agent is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Say whether the node has power.
    Status,
    /// Cut its power.
    Off,
}

impl Action {
    fn as_str(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Off => "off",
        }
    }
}

type Script = dyn Fn(&HostName, Action) -> FenceAnswer + Send + Sync;

#[derive(Clone)]
enum Means {
    /// The settings' programs.
    Programs(Arc<BTreeMap<HostName, FenceSettings>>),
    /// A function, for tests.
    Script(Arc<Script>),
}

/// The fencing agents of all nodes. Cheap to clone.
#[derive(Clone)]
pub struct Fences {
    means: Means,
    limit: Duration,
    shared: Joined<FenceAnswer>,
}

impl Default for Fences {
    /// None at all.
    fn default() -> Self {
        Self::new(BTreeMap::new(), Duration::ZERO)
    }
}

impl Fences {
    /// Those of the settings, each run for at most `limit`.
    pub fn new(of: BTreeMap<HostName, FenceSettings>, limit: Duration) -> Self {
        Self {
            means: Means::Programs(Arc::new(of)),
            limit,
            shared: Joined::default(),
        }
    }

    /// Any other: a function that answers for a node's agent; when it says *off* is
    /// seen here. For tests.
    pub fn from_fn(
        answer: impl Fn(&HostName, Action) -> FenceAnswer + Send + Sync + 'static,
    ) -> Self {
        Self {
            means: Means::Script(Arc::new(answer)),
            limit: Duration::ZERO,
            shared: Joined::default(),
        }
    }

    /// Whether a node has one.
    pub fn has(&self, host: &HostName) -> bool {
        match &self.means {
            Means::Programs(of) => of.contains_key(host),
            Means::Script(answer) => answer(host, Action::Status) != FenceAnswer::NotConfigured,
        }
    }

    /// Whether a node has power, as far as its agent says; *off* is no proof yet.
    pub async fn status(&self, host: &HostName, clock: &Clock) -> FenceAnswer {
        self.ask(host, Action::Status, clock).await
    }

    /// The same, within a time: no answer in time is one that failed.
    pub async fn status_within(
        &self,
        host: &HostName,
        clock: &Clock,
        limit: Duration,
    ) -> FenceAnswer {
        let asked = timeout(limit, self.status(host, clock)).await;
        asked.unwrap_or_else(|_| FenceAnswer::Failed {
            agent: "its fencing agent".to_owned(),
            message: format!("no answer within {} s", limit.as_secs()),
        })
    }

    /// Whether a node has power: one answer serves all who start its guests and
    /// waited when it was asked for, and nobody who came later.
    pub async fn status_shared(&self, host: &HostName, clock: &Clock) -> FenceAnswer {
        let asking = self.status_within(host, clock, SHARED_LIMIT);
        self.shared.ask(host, asking).await
    }

    /// How long one use may take, its status with it.
    pub fn longest(&self) -> Duration {
        self.limit * 2
    }

    /// Cuts a node's power, and asks whether it is gone: only an *off* that the
    /// status confirms is one. Safe to repeat.
    pub async fn off(&self, host: &HostName, clock: &Clock) -> FenceAnswer {
        info!(%host, "its power is to be cut");
        let cut = self.ask(host, Action::Off, clock).await;
        let answer = match cut {
            FenceAnswer::Off { .. } => confirmed(self.ask(host, Action::Status, clock).await),
            other => other,
        };
        if !answer.is_off() {
            error!(%host, ?answer, "its power was not cut, or that is not known: its guests stay where they are");
        }
        answer
    }

    async fn ask(&self, host: &HostName, action: Action, clock: &Clock) -> FenceAnswer {
        let settings = match &self.means {
            Means::Script(answer) => {
                return match answer(host, action) {
                    FenceAnswer::Off { agent, .. } => FenceAnswer::Off {
                        agent,
                        at_ms: clock.now_ms(),
                    },
                    other => other,
                };
            }
            Means::Programs(of) => match of.get(host) {
                Some(settings) => settings,
                None => return FenceAnswer::NotConfigured,
            },
        };
        let agent = settings.agent.clone();
        let ran = timeout(self.limit, run(settings, action)).await;
        let failed = |message: String| FenceAnswer::Failed {
            agent: agent.clone(),
            message,
        };
        let (code, said) = match ran {
            Ok(Ok(ended)) => ended,
            Ok(Err(error)) => return failed(error),
            Err(_) => {
                let limit_s = self.limit.as_secs();
                return failed(format!("it did not end within {limit_s} s"));
            }
        };
        let off = || FenceAnswer::Off {
            agent: agent.clone(),
            at_ms: clock.now_ms(),
        };
        match (action, code) {
            (Action::Off, Some(0)) | (Action::Status, Some(2)) => off(),
            (Action::Status, Some(0)) => FenceAnswer::On { agent },
            (_, Some(code)) => failed(format!("exit code {code}{said}")),
            (_, None) => failed(format!("it was killed by a signal{said}")),
        }
    }
}

/// The status after an *off* was answered, as what comes of both.
fn confirmed(status: FenceAnswer) -> FenceAnswer {
    const CUT: &str = "it said that it cut the power, and";
    match status {
        FenceAnswer::On { agent } => FenceAnswer::Failed {
            agent,
            message: format!("{CUT} says now that it is on"),
        },
        FenceAnswer::Failed { agent, message } => FenceAnswer::Failed {
            agent,
            message: format!("{CUT} does not confirm it: {message}"),
        },
        other => other,
    }
}

/// The processes of an agent: itself, and what it has started. Given up, all of them
/// are killed: what cuts the power may be a child that its agent waits for.
struct Group(Option<Pid>);

impl Group {
    /// That of an agent that leads one.
    fn of(agent: &Child) -> Self {
        let id = agent.id().and_then(|id| i32::try_from(id).ok());
        Self(id.and_then(Pid::from_raw))
    }

    /// It has come to its end by itself. Its number may be another's from now on.
    fn has_ended(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let killed = self.0.map(|group| kill_process_group(group, Signal::KILL));
        if let Some(Err(error)) = killed {
            warn!(%error, "a fencing agent that is given up may go on");
        }
    }
}

/// Runs an agent; gives its exit code and the end of what it said. Dropped, it
/// is killed, with all that it has started.
async fn run(settings: &FenceSettings, action: Action) -> Result<(Option<i32>, String), String> {
    let path = settings.path();
    let mut child = Command::new(&path)
        .env_clear()
        .env("PATH", SEARCH_PATH)
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| format!("{} cannot be run: {e}", path.display()))?;
    let group = Group::of(&child);
    let (input, output, errors) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let lines = input_lines(settings, action);
    let telling = async {
        if let Some(mut input) = input {
            // One that does not read its input says so by its exit code.
            let _ = input.write_all(lines.as_bytes()).await;
        }
    };
    let ((), output, errors) = tokio::join!(telling, end_of(output), end_of(errors));
    // Last of all: until it is waited for, its number is the group's and nobody else's.
    let ended = child.wait().await;
    group.has_ended();
    let ended = ended.map_err(|e| format!("its end was not seen: {e}"))?;
    let said = match errors.is_empty() {
        true => output,
        false => errors,
    };
    let said = hide(&last_line(&said), settings);
    let said = match said.is_empty() {
        true => said,
        false => format!(": {said}"),
    };
    Ok((ended.code(), said))
}

fn input_lines(settings: &FenceSettings, action: Action) -> String {
    let mut lines = format!("action={}\n", action.as_str());
    for (key, value) in &settings.parameters {
        lines.push_str(&format!("{key}={value}\n"));
    }
    lines
}

/// Reads to the end and keeps the last of it.
async fn end_of(pipe: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(mut pipe) = pipe else {
        return kept;
    };
    let mut buffer = [0; MAX_SAID];
    while let Ok(n @ 1..) = pipe.read(&mut buffer).await {
        kept.extend_from_slice(&buffer[..n]);
        let surplus = kept.len().saturating_sub(MAX_SAID);
        kept.drain(..surplus);
    }
    kept
}

/// The last line that says something.
fn last_line(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let last = text.lines().rev().map(str::trim).find(|l| !l.is_empty());
    let line = last.unwrap_or_default().chars().take(200);
    line.map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// Agents repeat what they were told when they complain.
fn hide(text: &str, settings: &FenceSettings) -> String {
    /// A shorter value would make holes in every text.
    const SHORTEST: usize = 3;
    let values = settings.parameters.values();
    let mut values: Vec<_> = values.filter(|v| v.len() >= SHORTEST).collect();
    // One that holds another goes first, or its rest would show.
    values.sort_by_key(|v| std::cmp::Reverse(v.len()));
    values.iter().fold(text.to_owned(), |text, value| {
        text.replace(value.as_str(), "***")
    })
}

#[cfg(test)]
#[path = "fence_tests.rs"]
mod tests;
