//! `drover`, the operator's command: an RPC client like any other.
//!
//! | step | module |
//! |---|---|
//! | words on the command line | [`args`] |
//! | which broker, and who is asked what | [`setup`], [`client`] |
//! | what a verb does | [`command`], one module per noun |
//! | how values look | [`render`] |
//! | how it ends | [`exit`], [`failure`] |

pub mod args;
pub mod client;
pub mod command;
pub mod exit;
pub mod failure;
pub mod render;
#[cfg(test)]
mod samples;
pub mod setup;

use std::{
    io::{self, IsTerminal},
    process::ExitCode,
    time::Duration,
};

use clap::{CommandFactory, Parser};
use clap_complete::Shell;
use drover_runtime::logging::{self, LogSettings};

use crate::{
    args::{Cli, Global, Noun},
    client::Client,
    command::{
        Answers, Interrupt, Session, doctor, instance, migration, node, operation, project,
        transfer,
    },
    exit::{Exit, Trouble},
    render::screen::Screen,
};

/// How long taking leave of the broker may take once everything is told.
const LEAVE: Duration = Duration::from_millis(100);

/// The whole of a process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut screen = Screen::standard(cli.global.json);
    let exit = run(cli, &mut screen).unwrap_or_else(|trouble| {
        screen.trouble(&trouble);
        trouble.exit
    });
    ExitCode::from(exit.code())
}

fn run(cli: Cli, screen: &mut Screen) -> Result<Exit, Trouble> {
    if let Noun::Completions { shell } = cli.noun {
        return completions(shell, screen);
    }
    // Silent unless asked: what goes wrong is told as the command's own trouble.
    if std::env::var_os("DROVER_LOG").is_some() {
        logging::init(&LogSettings::default()).map_err(Trouble::usage)?;
    }
    // One thread: it waits most of the time, and starts in no time.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| {
        Trouble::new(
            Exit::Failed,
            format!("cannot start waiting for I/O: {error}"),
        )
    })?;
    let ended = runtime.block_on(work(cli, screen));
    // Whatever is still under way ends with the process.
    runtime.shutdown_background();
    ended
}

async fn work(cli: Cli, screen: &mut Screen) -> Result<Exit, Trouble> {
    let (client, source) = match connect(&cli.global) {
        Ok(connected) => connected,
        Err(trouble) => {
            return match cli.noun {
                Noun::Doctor(args) => doctor::run(screen, Err(trouble), args).await,
                _ => Err(trouble),
            };
        }
    };
    let mut session = Session {
        client,
        screen: std::mem::replace(screen, Screen::standard(cli.global.json)),
        interrupt: interrupt(),
        answers: answers(),
        input: input(),
    };
    let ended = dispatch(&mut session, cli.noun, source).await;
    let _ = tokio::time::timeout(LEAVE, session.client.close()).await;
    ended
}

/// Does what a verb says.
pub async fn dispatch(session: &mut Session, noun: Noun, source: String) -> Result<Exit, Trouble> {
    match noun {
        Noun::Node(verb) => node::run(session, verb).await,
        Noun::Instance(verb) => instance::run(session, verb).await,
        Noun::Migration(verb) => migration::run(session, verb).await,
        Noun::Operation(verb) => operation::run(session, verb).await,
        Noun::Project(verb) => project::run(session, verb).await,
        Noun::Transfer(verb) => transfer::run(session, verb).await,
        Noun::Doctor(args) => {
            let setup = doctor::Setup {
                source,
                client: session.client.clone(),
            };
            doctor::run(&mut session.screen, Ok(setup), args).await
        }
        Noun::Completions { shell } => completions(shell, &mut session.screen),
    }
}

fn connect(global: &Global) -> Result<(Client, String), Trouble> {
    let setup::Source { messaging, words } = setup::read(global)?;
    Ok((Client::connect(&messaging)?, words))
}

/// Completes at the first Ctrl-C; never where that cannot be heard.
fn interrupt() -> Interrupt {
    Box::pin(async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    })
}

/// The operator, where one sits at a terminal and sees what is asked.
fn answers() -> Answers {
    let there = io::stdin().is_terminal() && io::stderr().is_terminal();
    there.then(|| Box::new(io::BufReader::new(io::stdin())) as Box<dyn io::BufRead + Send>)
}

/// What comes in by a pipe or from a file.
fn input() -> Answers {
    let piped = !io::stdin().is_terminal();
    piped.then(|| Box::new(io::BufReader::new(io::stdin())) as Box<dyn io::BufRead + Send>)
}

fn completions(shell: Shell, screen: &mut Screen) -> Result<Exit, Trouble> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "drover", &mut script);
    screen.raw(&script)?;
    Ok(Exit::Done)
}

#[cfg(test)]
mod flow_tests;
