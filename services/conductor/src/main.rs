//! `drover-conductor --config FILE`: reads its settings, puts the conductor
//! together, and runs until a signal. `drover-conductor migrate` brings the
//! record's schema up to date, and ends.

use std::{collections::BTreeMap, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, Subcommand};
use drover_conductor::{
    app::Conductor,
    clock::Clock,
    config::{self, ConductorSettings},
    operation::fence::{FenceSettings, Fences},
};
use drover_model::ids::HostName;
use drover_rpc::{AmqpTransport, MessagingSettings};
use drover_runtime::{
    config::{DEFAULT_PATH, Document},
    error_chain::Chain,
    logging::{self, LogSettings},
    shutdown,
};
use drover_saga::Patience;
use drover_store::Store;
use tracing::{error, info};

/// Exit code for settings that cannot be used.
const EXIT_USAGE: u8 = 2;

/// Drover's conductor: decides, remembers, and has agents carry out.
#[derive(Parser)]
#[command(name = "drover-conductor", version)]
struct Args {
    /// Configuration file
    #[arg(long, value_name = "FILE", env = "DROVER_CONFIG", default_value = DEFAULT_PATH)]
    config: PathBuf,
    /// What to do; serves if nothing is said
    #[command(subcommand)]
    command: Option<Command>,
}

/// What to do instead of serving.
#[derive(Clone, Copy, Subcommand)]
enum Command {
    /// Bring the record's schema up to date, also while conductors of the version before
    /// go on; those that start by themselves do so only when they are alone
    Migrate,
}

struct Settings {
    conductor: ConductorSettings,
    messaging: MessagingSettings,
    fences: BTreeMap<HostName, FenceSettings>,
    log: LogSettings,
    name: String,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let settings = match read(&args.config) {
        Ok(settings) => settings,
        Err(message) => {
            eprintln!("drover-conductor: {message}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    if let Err(message) = logging::init(&settings.log) {
        eprintln!("drover-conductor: {message}");
        return ExitCode::from(EXIT_USAGE);
    }
    // Work here is waiting for others: one thread answers sooner than several
    // that wake each other. The database has threads of its own.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(8)
        .enable_all()
        .build();
    let ended = match runtime {
        Ok(runtime) => {
            let ended = runtime.block_on(async {
                match args.command {
                    None => run(settings).await,
                    Some(Command::Migrate) => migrate(&settings.conductor.database_url).await,
                }
            });
            runtime.shutdown_timeout(Duration::from_secs(2));
            ended
        }
        Err(error) => Err(format!("the runtime cannot start: {error}")),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            error!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn read(path: &std::path::Path) -> Result<Settings, String> {
    let text = |e: drover_runtime::config::ConfigError| e.to_string();
    let document = Document::read(path).map_err(text)?;
    let (conductor, fences) = config::read(&document).map_err(text)?;
    let messaging: MessagingSettings = document.section("messaging").map_err(text)?;
    messaging
        .validate()
        .map_err(|e| text(document.bad_key("messaging", e.name(), e.reason())))?;
    let name = match &conductor.name {
        Some(name) => name.clone(),
        None => host_name()?,
    };
    Ok(Settings {
        log: document.section("log").map_err(text)?,
        conductor,
        messaging,
        fences,
        name,
    })
}

fn host_name() -> Result<String, String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").map_err(|e| e.to_string());
    let name = name
        .map_err(|e| format!("this machine's name cannot be read ({e}); set [conductor] name"))?;
    Ok(name.trim().to_owned())
}

async fn migrate(url: &str) -> Result<(), String> {
    let migrated = Store::migrate(url).await;
    let store = migrated.map_err(|e| Chain(&e).to_string())?;
    info!(
        database = store.kind().as_str(),
        "the record's schema is up to date"
    );
    Ok(())
}

async fn run(settings: Settings) -> Result<(), String> {
    let stop = shutdown::signal_token().map_err(|e| format!("signals cannot be caught: {e}"))?;
    let url = &settings.conductor.database_url;
    let store = Store::open(url).await.map_err(|e| Chain(&e).to_string())?;
    let transport = AmqpTransport::new(&settings.messaging).map_err(|e| Chain(&e).to_string())?;
    let starting = Conductor::start(
        &settings.conductor,
        &settings.name,
        &settings.messaging,
        transport.clone(),
        store,
        Clock::system(),
        Patience::default(),
        Fences::new(settings.fences, settings.conductor.fence_timeout()),
    );
    let conductor = tokio::select! {
        started = starting => started.map_err(|e| Chain(&e).to_string())?,
        () = stop.cancelled() => return Ok(()),
    };
    stop.cancelled().await;
    conductor.stop().await;
    Ok(())
}
