//! The command line: nouns, verbs, options, and nothing of what they do.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use drover_model::{
    ids::HostName,
    migration::{BlockMigration, LiveOptions},
};

const EXIT_CODES: &str = "\
ID is a UUID, a unique prefix of one, or a name (for migrations: the number).

Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 refused by a check,
4 timed out or nobody answered, 130 interrupted (what was begun goes on).";

/// Moves libvirt guests between compute nodes, and says how they are.
#[derive(Debug, Parser)]
#[command(name = "drover", version, after_help = EXIT_CODES)]
#[command(subcommand_required = true, disable_help_subcommand = true)]
pub struct Cli {
    /// What goes for every verb.
    #[command(flatten)]
    pub global: Global,
    /// The noun.
    #[command(subcommand)]
    pub noun: Noun,
}

/// Options of every verb.
#[derive(Debug, Clone, Default, Args)]
pub struct Global {
    /// Configuration file; its section [messaging] says where the broker is
    #[arg(long, global = true, value_name = "FILE", env = "DROVER_CONFIG")]
    pub config: Option<PathBuf>,
    /// Broker to talk to, before the file's: amqp://USER:PASSWORD@HOST:PORT/VHOST
    /// (other users of this machine can see it: prefer DROVER_URL or the file)
    #[arg(long, global = true, value_name = "URL")]
    #[arg(env = "DROVER_URL", hide_env_values = true)]
    pub url: Option<String>,
    /// Print JSON; `watch` prints one object a line
    #[arg(long, global = true)]
    pub json: bool,
}

/// What there is.
#[derive(Debug, Subcommand)]
pub enum Noun {
    /// Compute nodes
    #[command(subcommand)]
    Node(NodeVerb),
    /// Guests
    #[command(subcommand)]
    Instance(InstanceVerb),
    /// Moves, running and past
    #[command(subcommand)]
    Migration(MigrationVerb),
    /// What is wrong with this installation, and what to do
    Doctor(DoctorArgs),
    /// Completions for a shell, to be sourced by it
    Completions {
        /// Which shell.
        shell: Shell,
    },
}

/// What can be done with nodes.
#[derive(Debug, Subcommand)]
pub enum NodeVerb {
    /// All nodes
    List,
    /// One node with all that is known of it
    Show {
        /// Host name.
        host: HostName,
    },
    /// Place no more instances on a node; those on it stay
    Disable {
        /// Host name.
        host: HostName,
        /// Why, for whoever wonders
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
        /// How to do it.
        #[command(flatten)]
        change: Change,
    },
    /// Let a node take instances again
    Enable {
        /// Host name.
        host: HostName,
        /// How to do it.
        #[command(flatten)]
        change: Change,
    },
}

/// What can be done with instances.
#[derive(Debug, Subcommand)]
pub enum InstanceVerb {
    /// All instances
    List {
        /// Only on this node
        #[arg(long)]
        host: Option<HostName>,
        /// Only of this project
        #[arg(long)]
        project: Option<String>,
    },
    /// One instance
    Show {
        /// UUID, prefix or name.
        #[arg(value_parser = some_text)]
        id: String,
    },
    /// Move an instance to another node
    Migrate(Box<Migrate>),
}

/// Moving an instance.
#[derive(Debug, Args)]
pub struct Migrate {
    /// UUID, prefix or name.
    #[arg(value_parser = some_text)]
    pub id: String,
    /// In which way.
    #[command(flatten)]
    pub kind: Kind,
    /// Where to; without it the conductor chooses
    #[arg(long, value_name = "HOST")]
    pub to: Option<HostName>,
    /// How.
    #[command(flatten)]
    pub how: How,
    /// How to do it.
    #[command(flatten)]
    pub change: Change,
    /// How long to wait.
    #[command(flatten)]
    pub patience: Patience,
}

/// In which way an instance moves. Named always: none of them is a default.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct Kind {
    /// The guest runs on while it moves
    #[arg(long)]
    pub live: bool,
}

/// Options of a live migration; what is left out is as the source's agent is set.
#[derive(Debug, Args)]
#[command(next_help_heading = "Live migration")]
pub struct How {
    /// Let the guest run on the destination before all its memory is there, if it must be
    #[arg(long)]
    pub post_copy: bool,
    /// Slow a guest that writes faster than the link carries
    #[arg(long)]
    pub auto_converge: bool,
    /// Streams for memory (2 to 255)
    #[arg(long, value_name = "N")]
    pub parallel: Option<u32>,
    /// Upper limit for memory and for each disk
    #[arg(long, value_name = "MIB_S")]
    pub bandwidth: Option<u64>,
    /// How long the guest may stand still at switch-over
    #[arg(long, value_name = "N")]
    pub max_downtime_ms: Option<u64>,
    /// Copy disks: what is not shared, always, or never
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pub block_migration: Block,
    /// Give up after so many seconds without progress
    #[arg(long, value_name = "S")]
    pub progress_timeout: Option<u64>,
}

impl How {
    /// The options as they travel.
    pub fn options(&self) -> LiveOptions {
        LiveOptions {
            block_migration: match self.block_migration {
                Block::Auto => BlockMigration::Auto,
                Block::Yes => BlockMigration::Yes,
                Block::No => BlockMigration::No,
            },
            post_copy: self.post_copy,
            auto_converge: self.auto_converge,
            parallel_connections: self.parallel,
            bandwidth_mib_s: self.bandwidth,
            max_downtime_ms: self.max_downtime_ms,
            progress_timeout_s: self.progress_timeout,
        }
    }
}

/// When disks are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Block {
    /// What proves not to be shared
    Auto,
    /// Always; refused if a disk is shared
    Yes,
    /// Never; refused if a disk is not shared
    No,
}

/// What can be done with migrations.
#[derive(Debug, Subcommand)]
pub enum MigrationVerb {
    /// Migrations, newest first
    List {
        /// Only of this instance (UUID, prefix or name)
        #[arg(long, value_name = "ID", value_parser = some_text)]
        instance: Option<String>,
        /// Only from or to this node
        #[arg(long)]
        host: Option<HostName>,
        /// Only unfinished ones
        #[arg(long)]
        active: bool,
        /// At most so many
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
        limit: Option<u32>,
    },
    /// The whole record of one
    Show {
        /// Number, UUID or prefix.
        #[arg(value_parser = some_text)]
        id: String,
    },
    /// Follow one to its end
    Watch {
        /// Number, UUID or prefix.
        #[arg(value_parser = some_text)]
        id: String,
        /// How long to wait.
        #[command(flatten)]
        patience: Patience,
    },
    /// End one before its switch-over; the guest stays where it is
    Abort(Steer),
    /// Make one come to its end: by post-copy where allowed, else by pausing the guest
    ForceComplete(Steer),
    /// Take up one that is stuck
    Resume(Steer),
}

/// Steering a migration that runs.
#[derive(Debug, Args)]
pub struct Steer {
    /// Number, UUID or prefix.
    #[arg(value_parser = some_text)]
    pub id: String,
    /// How to do it.
    #[command(flatten)]
    pub change: Change,
    /// How long to wait.
    #[command(flatten)]
    pub patience: Patience,
}

/// Options of what changes something.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct Change {
    /// Say what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Return when it is over (the default)
    #[arg(long, action = ArgAction::SetTrue, overrides_with = "no_wait")]
    pub wait: bool,
    /// Return as soon as it is accepted
    #[arg(long, action = ArgAction::SetTrue, overrides_with = "wait")]
    pub no_wait: bool,
}

/// How long to wait for an end.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct Patience {
    /// Stop waiting after so many seconds, with exit code 4; what was begun goes on
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout: Option<u64>,
}

/// Options of the doctor.
#[derive(Debug, Clone, Copy, Args)]
pub struct DoctorArgs {
    /// How long each agent has to answer, seconds
    #[arg(long, value_name = "S", default_value_t = 3)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=60))]
    pub agent_timeout: u64,
}

fn some_text(text: &str) -> Result<String, String> {
    match text.trim() {
        "" => Err("an ID cannot be empty".to_owned()),
        id => Ok(id.to_owned()),
    }
}

#[cfg(test)]
#[path = "args_tests.rs"]
mod tests;
