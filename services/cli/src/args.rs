//! The command line: nouns, verbs, options, and nothing of what they do. Those
//! of projects and of transfers between them are in [`project`] and [`transfer`],
//! those that empty, open and balance nodes in [`operation`].

pub mod operation;
pub mod project;
pub mod transfer;

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use drover_model::{
    ids::HostName,
    migration::{BlockMigration, ColdOptions, Flavor, LiveOptions, Way},
    unknown::Unknown,
};

const EXIT_CODES: &str = "\
ID is a UUID, a unique prefix of one, or a name (for migrations: the number).
TIME is seconds, or such as 90s, 2m, 1h. P is a project's id or its name.

Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 refused by a check,
4 timed out or nobody answered, 130 interrupted (what was begun goes on).";

/// Moves libvirt guests between compute nodes and between projects, and says how they are.
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
    /// Drains, restores, evacuations and balances of nodes, running and past
    #[command(subcommand)]
    Operation(operation::OperationVerb),
    /// Who owns guests, how much each may have, and where its guests live
    #[command(subcommand)]
    Project(project::ProjectVerb),
    /// Offers of guests from one project to another
    #[command(subcommand)]
    Transfer(transfer::TransferVerb),
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
    /// Empty a node: it is disabled, and its guests move to others
    Drain(Box<operation::Drain>),
    /// Open a node again, and bring back what its last drain took away
    Restore(operation::Restore),
    /// Start elsewhere what ran on a node that is dead
    Evacuate(operation::Evacuate),
    /// Declare a node down without waiting for its silence
    ForceDown(operation::ForceDown),
    /// End a node that was scrapped: all that is kept for it goes
    Forget {
        /// Host name.
        host: HostName,
        /// Its guests that are nowhere else are gone for good: forget them with it
        #[arg(long)]
        despite_lost_guests: bool,
        /// How to do it.
        #[command(flatten)]
        change: Change,
    },
    /// Move guests from nodes that are loaded more than others
    Balance(operation::Balance),
    /// What the conductor does by itself; pause it for a maintenance window
    Automation(operation::SetAutomation),
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
    /// Print how an instance was defined last, also of one that is gone
    Definition {
        /// UUID; of one that is not gone also a prefix or its name.
        #[arg(value_parser = some_text)]
        id: String,
    },
    /// Take an instance that was lost with its node from the record
    Forget {
        /// UUID, prefix or name.
        #[arg(value_parser = some_text)]
        id: String,
        /// How to do it.
        #[command(flatten)]
        change: Change,
    },
    /// Move an instance to another node
    Migrate(Box<Migrate>),
    /// Keep an instance where a cold migration brought it: the node it left removes its copy
    Confirm(Settle),
    /// Take an instance back to the node that a cold migration brought it from
    Revert(Revert),
    /// Give an instance to another project, for both sides at once; it stays on its node
    Transfer(Box<transfer::TransferInstance>),
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
    /// How to do it.
    #[command(flatten)]
    pub change: Change,
    /// How long to wait.
    #[command(flatten)]
    pub patience: Patience,
    // What has a heading of its own comes last: it would go for all that follows.
    /// How, in either way.
    #[command(flatten)]
    pub how: How,
    /// How, live.
    #[command(flatten)]
    pub live: LiveHow,
    /// How, cold.
    #[command(flatten)]
    pub cold: ColdHow,
}

impl Migrate {
    /// Kind and options as they travel; a cold one's new size is known only by
    /// the record where half of it is named.
    pub fn way(&self, flavor: Option<Flavor>) -> Way {
        if self.kind.cold {
            Way::Cold(self.cold.options(&self.how, flavor))
        } else {
            Way::Live(self.live.options(&self.how))
        }
    }
}

/// In which way an instance moves. Named always: none of them is a default.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct Kind {
    /// The guest runs on while it moves
    #[arg(long)]
    pub live: bool,
    /// The guest is shut down, moved and started again; one that is off just moves
    #[arg(long)]
    pub cold: bool,
}

/// Options of a migration of either kind; what is left out is as the source's agent is set.
#[derive(Debug, Args)]
#[command(next_help_heading = "Any migration")]
pub struct How {
    /// Upper limit for memory and for each disk; for all disks, if cold
    #[arg(long, value_name = "MIB_S", alias = "bandwidth-mib-s")]
    pub bandwidth: Option<u64>,
    /// Give up after so long without progress
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    pub progress_timeout: Option<u64>,
}

/// Options of a live migration.
#[derive(Debug, Args)]
#[command(next_help_heading = "Live migration")]
pub struct LiveHow {
    /// Let the guest run on the destination before all its memory is there, if it must be
    #[arg(long, conflicts_with = "cold")]
    pub post_copy: bool,
    /// Slow a guest that writes faster than the link carries
    #[arg(long, conflicts_with = "cold")]
    pub auto_converge: bool,
    /// Streams for memory (2 to 255)
    #[arg(long, value_name = "N", conflicts_with = "cold")]
    pub parallel: Option<u32>,
    /// How long the guest may stand still at switch-over
    #[arg(long, value_name = "N", conflicts_with = "cold")]
    pub max_downtime_ms: Option<u64>,
    /// Copy disks: what is not shared, always, or never
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    #[arg(conflicts_with = "cold")]
    pub block_migration: Block,
}

impl LiveHow {
    fn options(&self, how: &How) -> LiveOptions {
        LiveOptions {
            block_migration: match self.block_migration {
                Block::Auto => BlockMigration::Auto,
                Block::Yes => BlockMigration::Yes,
                Block::No => BlockMigration::No,
            },
            post_copy: self.post_copy,
            auto_converge: self.auto_converge,
            parallel_connections: self.parallel,
            bandwidth_mib_s: how.bandwidth,
            max_downtime_ms: self.max_downtime_ms,
            progress_timeout_s: how.progress_timeout,
            unknown: Unknown::default(),
        }
    }
}

/// Options of a cold migration.
#[derive(Debug, Args)]
#[command(next_help_heading = "Cold migration")]
pub struct ColdHow {
    /// Give up if the guest has not shut down after so long
    #[arg(long, value_name = "TIME", value_parser = seconds, conflicts_with = "live")]
    pub shutdown_timeout: Option<u64>,
    /// Stop the guest hard, as pulling its plug would, if it has not shut down after so long;
    /// without this no guest is ever stopped hard
    #[arg(long, value_name = "TIME", value_parser = seconds, conflicts_with = "live")]
    pub force_stop_after: Option<u64>,
    /// Copy disks while the guest still runs, and only what changed while it is off
    #[arg(long, conflicts_with = "live")]
    pub pre_copy: bool,
    /// Give the guest so many vCPUs on the destination
    #[arg(long, value_name = "N", conflicts_with = "live")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub vcpus: Option<u32>,
    /// Give the guest so much memory on the destination
    #[arg(long, value_name = "MIB", conflicts_with = "live")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    pub memory_mib: Option<u64>,
}

impl ColdHow {
    fn options(&self, how: &How, flavor: Option<Flavor>) -> ColdOptions {
        ColdOptions {
            shutdown_timeout_s: self.shutdown_timeout,
            force_stop_after_s: self.force_stop_after,
            pre_copy: self.pre_copy,
            bandwidth_mib_s: how.bandwidth,
            progress_timeout_s: how.progress_timeout,
            flavor,
            unknown: Unknown::default(),
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

/// Settling a cold migration that has finished.
#[derive(Debug, Args)]
pub struct Settle {
    /// UUID, prefix or name of the instance.
    #[arg(value_parser = some_text)]
    pub id: String,
    /// How to do it.
    #[command(flatten)]
    pub change: Change,
    /// How long to wait.
    #[command(flatten)]
    pub patience: Patience,
}

/// Taking an instance back.
#[derive(Debug, Args)]
pub struct Revert {
    /// Which, and how to do it.
    #[command(flatten)]
    pub settle: Settle,
    /// Lose nothing that the guest wrote since: confirm, and migrate it back cold
    #[arg(long)]
    pub keep_changes: bool,
    /// Do not ask whether what the guest wrote since may be lost
    #[arg(long)]
    pub yes: bool,
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
        /// Only those that are not over: under way, stuck, or to be confirmed or reverted
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
    /// End one before the guest has changed sides; it stays where it is
    Abort(Steer),
    /// Make a live one come to its end: by post-copy where allowed, else by pausing the guest
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
    /// Stop waiting after so long (90, 90s, 2m, 1h), with exit code 4; what was begun goes on
    #[arg(long, value_name = "TIME", value_parser = some_seconds)]
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

/// A time: plain seconds, or a number with `s`, `m` or `h`.
fn seconds(text: &str) -> Result<u64, String> {
    let (number, unit) = match text.strip_suffix(['s', 'm', 'h']) {
        Some(number) if text.ends_with('m') => (number, 60),
        Some(number) if text.ends_with('h') => (number, 3600),
        Some(number) => (number, 1),
        None => (text, 1),
    };
    let number: Option<u64> = number.parse().ok();
    let seconds = number.and_then(|n| n.checked_mul(unit));
    seconds.ok_or_else(|| "a time is seconds, or such as 90s, 2m, 1h".to_owned())
}

/// The same, with `d` for days too.
fn long_seconds(text: &str) -> Result<u64, String> {
    let Some(days) = text.strip_suffix('d') else {
        return some_seconds(text);
    };
    let days: Option<u64> = days.parse().ok().filter(|days| *days > 0);
    let seconds = days.and_then(|days| days.checked_mul(86_400));
    seconds.ok_or_else(|| "days are a number such as 3d".to_owned())
}

fn some_seconds(text: &str) -> Result<u64, String> {
    match seconds(text)? {
        0 => Err("no time at all is too short".to_owned()),
        seconds => Ok(seconds),
    }
}

fn some_text(text: &str) -> Result<String, String> {
    match text.trim() {
        "" => Err("an ID cannot be empty".to_owned()),
        id => Ok(id.to_owned()),
    }
}

/// `LEFT=RIGHT`, neither of them empty.
fn pair(text: &str) -> Option<(String, String)> {
    let (left, right) = text.split_once('=')?;
    let (left, right) = (left.trim(), right.trim());
    (!left.is_empty() && !right.is_empty()).then(|| (left.to_owned(), right.to_owned()))
}

#[cfg(test)]
#[path = "args_tests.rs"]
mod tests;
