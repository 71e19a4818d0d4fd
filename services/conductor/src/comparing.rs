//! Has agents read the files whose content decides whether a guest can move. Short
//! ones are read while the agent is asked; of others it is asked again and again,
//! for as long as reading goes on.

use std::time::Duration;

use drover_model::{
    api::compute::GetContents,
    check::{CheckFailure, Side},
    content::{Digest, FileContent, Seen},
    ids::HostName,
};
use tokio::time::{Instant, sleep};

use crate::{
    agent_client::AgentClient,
    checks::{self, content::Both},
};

/// Pause between two questions about files that are being read.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How long nothing more may be read until the files are given up.
const STANDSTILL: Duration = Duration::from_secs(60);

/// How long it is worth to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// Somebody waits for an answer now.
    Brief,
    /// The same, and what is not known yet is no hindrance: each migration of a plan
    /// finds out for itself.
    ForPlan,
    /// As long as reading goes on.
    WhileRead,
}

impl Patience {
    fn limit(self) -> Option<Duration> {
        match self {
            Self::Brief => Some(Duration::from_secs(20)),
            Self::ForPlan => Some(Duration::from_secs(5)),
            Self::WhileRead => None,
        }
    }
}

/// Both sides' view of a guest's files, to be completed.
pub struct Compared {
    /// As seen on the source.
    pub source: Vec<FileContent>,
    /// As seen on the destination.
    pub dest: Vec<FileContent>,
    /// Nodes that did not answer.
    pub failures: Vec<CheckFailure>,
}

/// Asks both nodes, or the destination alone if the source is dead, for the digests
/// on which something depends.
pub async fn complete(agents: &AgentClient, both: Both<'_>, patience: Patience) -> Compared {
    let mut compared = Compared {
        source: both.source.1.to_vec(),
        dest: both.dest.1.to_vec(),
        failures: Vec::new(),
    };
    let began = Instant::now();
    let (mut moved, mut read) = (began, 0);
    loop {
        let paths = compared.view(both).undecided();
        if paths.is_empty() || !compared.failures.is_empty() {
            return compared;
        }
        let source = async {
            match both.source_is_dead {
                true => Ok(Vec::new()),
                false => {
                    ask(
                        agents,
                        both.source.0,
                        Side::Source,
                        &compared.source,
                        &paths,
                    )
                    .await
                }
            }
        };
        let dest = ask(
            agents,
            both.dest.0,
            Side::Destination,
            &compared.dest,
            &paths,
        );
        let (source, dest) = tokio::join!(source, dest);
        compared.take(source, dest);
        let now = Instant::now();
        let read_now = compared.read_bytes();
        if read_now != read {
            (moved, read) = (now, read_now);
        }
        let over = patience.limit().is_some_and(|limit| now - began >= limit);
        if over || now - moved >= STANDSTILL || compared.view(both).undecided().is_empty() {
            return compared;
        }
        sleep(ASK_AGAIN).await;
    }
}

/// Digests of those files that are not known yet.
async fn ask(
    agents: &AgentClient,
    host: &HostName,
    side: Side,
    known: &[FileContent],
    paths: &[String],
) -> Result<Vec<FileContent>, CheckFailure> {
    let is_known = |path: &&String| {
        let file = known.iter().find(|file| file.path == **path);
        file.is_some_and(|f| matches!(f.digest(), Some(Digest::Known { .. })))
    };
    let paths: Vec<String> = paths
        .iter()
        .filter(|path| !is_known(path))
        .cloned()
        .collect();
    if paths.is_empty() {
        return Ok(Vec::new());
    }
    let asked = agents.ask(host, &GetContents { paths }).await;
    let answer = asked.map_err(|e| checks::unanswered(host, side, &e))?;
    Ok(answer.files)
}

impl Compared {
    /// These files instead of those that were there before.
    pub fn view<'a>(&'a self, both: Both<'a>) -> Both<'a> {
        Both {
            source: (both.source.0, &self.source),
            dest: (both.dest.0, &self.dest),
            ..both
        }
    }

    fn take(
        &mut self,
        source: Result<Vec<FileContent>, CheckFailure>,
        dest: Result<Vec<FileContent>, CheckFailure>,
    ) {
        for (known, told) in [(&mut self.source, source), (&mut self.dest, dest)] {
            match told {
                Ok(files) => files.into_iter().for_each(|file| update(known, file)),
                Err(failure) => self.failures.push(failure),
            }
        }
    }

    /// Changes whenever reading has gone on.
    fn read_bytes(&self) -> u64 {
        let files = self.source.iter().chain(&self.dest);
        files.fold(0, |sum: u64, file| {
            sum.saturating_add(match &file.seen {
                Seen::File {
                    digest: Digest::Working { done_bytes },
                    ..
                } => *done_bytes,
                Seen::File {
                    digest: Digest::Known { .. },
                    length_bytes,
                    ..
                } => length_bytes.saturating_add(1),
                _ => 0,
            })
        })
    }
}

/// What a node says now of a file; whether a mark lay beside it was told before.
fn update(known: &mut [FileContent], mut file: FileContent) {
    let Some(before) = known.iter_mut().find(|before| before.path == file.path) else {
        return;
    };
    if let (Seen::File { marked: was, .. }, Seen::File { marked, .. }) =
        (&before.seen, &mut file.seen)
    {
        *marked = *was;
    }
    *before = file;
}
