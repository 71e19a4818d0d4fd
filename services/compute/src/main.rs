//! `drover-compute --config FILE`: reads its settings, puts the agent together,
//! and runs until a signal.

use std::{
    fs::{File, TryLockError},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use clap::Parser;
use drover_compute::{
    app::Agent,
    config::{self, ComputeSettings},
    hypervisor::libvirt::LibvirtDriver,
};
use drover_rpc::{AmqpTransport, MessagingSettings};
use drover_runtime::{
    clock,
    config::{ConfigError, DEFAULT_PATH, Document},
    error_chain::Chain,
    logging::{self, LogSettings},
    shutdown,
};
use tracing::{error, info};

/// Exit code for settings that cannot be used.
const EXIT_USAGE: u8 = 2;

/// How long an agent that was stopped may take to end.
const ENDING: Duration = Duration::from_secs(10);

/// Drover's compute agent: carries out migrations on this node's libvirt.
#[derive(Parser)]
#[command(name = "drover-compute", version)]
struct Args {
    /// Configuration file
    #[arg(long, value_name = "FILE", env = "DROVER_CONFIG", default_value = DEFAULT_PATH)]
    config: PathBuf,
}

struct Settings {
    compute: ComputeSettings,
    messaging: MessagingSettings,
    log: LogSettings,
}

fn main() -> ExitCode {
    let read = read(&Args::parse().config);
    let settings = match read.and_then(|s| logging::init(&s.log).map(|()| s)) {
        Ok(settings) => settings,
        Err(message) => {
            eprintln!("drover-compute: {message}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    // Work here is waiting for others: one thread answers sooner than several
    // that wake each other. Each call to libvirt blocks one of the pool's, and a
    // migration has one of its own.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(32)
        .thread_keep_alive(Duration::from_secs(5))
        .enable_all()
        .build();
    let ended = match runtime {
        Ok(runtime) => {
            let ended = runtime.block_on(run(settings));
            runtime.shutdown_timeout(Duration::from_secs(2));
            ended
        }
        Err(e) => Err(format!("the runtime cannot start: {e}")),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            error!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn read(path: &Path) -> Result<Settings, String> {
    let text = |e: ConfigError| e.to_string();
    let document = Document::read(path).map_err(text)?;
    let messaging: MessagingSettings = document.section("messaging").map_err(text)?;
    messaging
        .validate()
        .map_err(|e| text(document.bad_key("messaging", e.name(), e.reason())))?;
    Ok(Settings {
        compute: config::read(&document).map_err(text)?,
        messaging,
        log: document.section("log").map_err(text)?,
    })
}

async fn run(settings: Settings) -> Result<(), String> {
    let stop = shutdown::signal_token().map_err(|e| format!("signals cannot be caught: {e}"))?;
    let ComputeSettings { agent, mut libvirt } = settings.compute;
    libvirt.memory_file = Some(agent.state_dir.join("storage.json"));
    info!(
        version = env!("CARGO_PKG_VERSION"), host = %agent.host, libvirt = %libvirt.libvirt_uri,
        state_dir = %agent.state_dir.display(), "starting"
    );
    let _own = own(&agent.state_dir).await?;
    let driver = LibvirtDriver::start(libvirt).map_err(|e| Chain(&e).to_string())?;
    let transport = AmqpTransport::new(&settings.messaging).map_err(|e| Chain(&e).to_string())?;
    let clock = Arc::new(clock::now_ms);
    let started = Agent::start(driver, transport, &settings.messaging, agent, clock);
    let mut agent = started.map_err(|e| format!("{e}; correct [compute] state_dir"))?;
    let failure = tokio::select! {
        () = stop.cancelled() => None,
        reason = agent.failed() => Some(reason),
    };
    agent.stop().await;
    failure.map_or(Ok(()), Err)
}

/// Makes sure that no other agent has the state directory, for as long as what is
/// returned lives: of two that write one journal neither knows what holds.
async fn own(state_dir: &Path) -> Result<File, String> {
    let words = |e: std::io::Error| {
        let dir = state_dir.display();
        format!("{dir} cannot be made this agent's own: {e}; correct [compute] state_dir")
    };
    std::fs::create_dir_all(state_dir).map_err(words)?;
    let file = File::create(state_dir.join("lock")).map_err(words)?;
    let until = tokio::time::Instant::now() + ENDING;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            // Its predecessor may be about to end.
            Err(TryLockError::WouldBlock) if tokio::time::Instant::now() < until => {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(TryLockError::WouldBlock) => {
                return Err(format!(
                    "another agent runs in {}: stop that, or give this one a [compute] state_dir \
                     of its own",
                    state_dir.display()
                ));
            }
            Err(TryLockError::Error(e)) => return Err(words(e)),
        }
    }
}
