//! The command line of operations: emptying, opening, evacuating and balancing
//! nodes, and following what of that is under way.

use clap::{Args, Subcommand, ValueEnum};
use drover_model::{
    api::conductor::SetAutomation as Automation,
    ids::{HostName, InstanceId},
    migration::{ColdOptions, Way},
    operation::{
        BalanceOptions, DrainOptions, EvacuateOptions, LifeSign, MoveMode, RestoreOptions,
        Returning,
    },
    unknown::Unknown,
};

use super::{Change, How, LiveHow, Patience, seconds, some_text};

/// In which way guests move; live if none is named.
#[derive(Debug, Clone, Copy, Default, Args)]
#[group(multiple = false)]
pub struct Mode {
    /// Guests run on while they move; those that cannot stay (the default)
    #[arg(long)]
    pub live: bool,
    /// Guests are shut down, moved and started again
    #[arg(long)]
    pub cold: bool,
    /// Live where that can be, else cold
    #[arg(long)]
    pub mixed: bool,
}

impl Mode {
    fn chosen(self) -> MoveMode {
        match (self.cold, self.mixed) {
            (true, _) => MoveMode::Cold,
            (_, true) => MoveMode::Mixed,
            _ => MoveMode::Live,
        }
    }
}

/// Where guests may go, and how many at once.
#[derive(Debug, Clone, Default, Args)]
pub struct Targets {
    /// Only to this node, or these (repeated, or with commas); else to any that is fit
    #[arg(long, value_name = "HOST", value_delimiter = ',')]
    pub to: Vec<HostName>,
}

/// How many guests are under way at once.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct AtOnce {
    /// Guests under way at once; the conductor's own limits go as well
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub max_parallel: Option<u32>,
}

/// Emptying a node.
#[derive(Debug, Args)]
pub struct Drain {
    /// Host name.
    pub host: HostName,
    /// In which way.
    #[command(flatten)]
    pub mode: Mode,
    /// Where to.
    #[command(flatten)]
    pub targets: Targets,
    /// How many at once.
    #[command(flatten)]
    pub at_once: AtOnce,
    /// Why, for whoever wonders why the node is closed
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
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
    pub cold: ColdDrain,
}

/// Options of guests that move cold.
#[derive(Debug, Clone, Copy, Default, Args)]
#[command(next_help_heading = "Cold migration")]
pub struct ColdDrain {
    /// Leave a guest where it is if it has not shut down after so long
    #[arg(long, value_name = "TIME", value_parser = seconds, conflicts_with = "live")]
    pub shutdown_timeout: Option<u64>,
    /// Stop a guest hard, as pulling its plug would, if it has not shut down after so long;
    /// without this no guest is ever stopped hard
    #[arg(long, value_name = "TIME", value_parser = seconds, conflicts_with = "live")]
    pub force_stop_after: Option<u64>,
    /// Copy disks while guests still run, and only what changed while they are off
    #[arg(long, conflicts_with = "live")]
    pub pre_copy: bool,
}

impl ColdDrain {
    /// The first option that is said, by its name.
    fn said(&self) -> Option<&'static str> {
        let options = [
            (self.shutdown_timeout.is_some(), "--shutdown-timeout"),
            (self.force_stop_after.is_some(), "--force-stop-after"),
            (self.pre_copy, "--pre-copy"),
        ];
        let said = options.into_iter().find(|(is_said, _)| *is_said);
        said.map(|(_, name)| name)
    }
}

impl Drain {
    /// What travels.
    ///
    /// # Errors
    /// Options that cannot be, in words.
    pub fn options(&self) -> Result<DrainOptions, String> {
        let mode = self.mode.chosen();
        if let (MoveMode::Live, Some(name)) = (mode, self.cold.said()) {
            return Err(format!("{name} is of no use without --cold or --mixed"));
        }
        let live = self.live.options(&self.how);
        let cold = ColdOptions {
            shutdown_timeout_s: self.cold.shutdown_timeout,
            force_stop_after_s: self.cold.force_stop_after,
            pre_copy: self.cold.pre_copy,
            bandwidth_mib_s: self.how.bandwidth,
            progress_timeout_s: self.how.progress_timeout,
            flavor: None,
            unknown: Unknown::default(),
        };
        for way in [Way::Live(live.clone()), Way::Cold(cold.clone())] {
            if let Some(problem) = way.problems().first() {
                return Err(problem.clone());
            }
        }
        if self.targets.to.contains(&self.host) {
            return Err(format!("{0} cannot be emptied to {0} itself", self.host));
        }
        Ok(DrainOptions {
            host: self.host.clone(),
            mode,
            to: self.targets.to.clone(),
            max_parallel: self.at_once.max_parallel,
            reason: self.reason.clone(),
            live,
            cold,
            unknown: Unknown::default(),
        })
    }
}

/// Opening a node again.
#[derive(Debug, Args)]
pub struct Restore {
    /// Host name.
    pub host: HostName,
    /// What comes back.
    #[command(flatten)]
    pub back: Back,
    /// In which way.
    #[command(flatten)]
    pub mode: Mode,
    /// How many at once.
    #[command(flatten)]
    pub at_once: AtOnce,
    /// How to do it.
    #[command(flatten)]
    pub change: Change,
    /// How long to wait.
    #[command(flatten)]
    pub patience: Patience,
}

/// Which guests come back to a restored node.
#[derive(Debug, Clone, Default, Args)]
#[group(multiple = false)]
pub struct Back {
    /// All that its last drain took away and that are still where it put them (the default)
    #[arg(long)]
    pub all: bool,
    /// None: the node is only opened
    #[arg(long)]
    pub none: bool,
    /// This guest of them, or these (repeated, or with commas)
    #[arg(long, value_name = "ID", value_delimiter = ',', value_parser = some_text)]
    pub only: Vec<String>,
}

impl Restore {
    /// What travels.
    pub fn options(&self) -> RestoreOptions {
        let returning = match (self.back.none, self.back.only.is_empty()) {
            (true, _) => Returning::None,
            (false, true) => Returning::All,
            (false, false) => Returning::Only(self.back.only.clone()),
        };
        RestoreOptions {
            host: self.host.clone(),
            returning,
            mode: self.mode.chosen(),
            max_parallel: self.at_once.max_parallel,
            unknown: Unknown::default(),
        }
    }
}

/// Starting elsewhere what ran on a dead node.
#[derive(Debug, Args)]
pub struct Evacuate {
    /// Host name.
    pub host: HostName,
    /// Where to.
    #[command(flatten)]
    pub targets: Targets,
    /// Only this guest, or these (repeated, or with commas); else all
    #[arg(long, value_name = "ID", value_delimiter = ',', value_parser = some_text)]
    pub only: Vec<String>,
    /// How many at once.
    #[command(flatten)]
    pub at_once: AtOnce,
    /// You have seen that the node is off, and answer for it: no fencing agent is needed.
    /// If it still runs, its guests run twice and ruin their disks
    #[arg(long)]
    pub i_confirm_host_is_off: bool,
    /// Go on although many nodes are lost at once and the conductor may be the one that is cut off
    #[arg(long)]
    pub despite_many_lost: bool,
    /// Cut its power although it shows this sign of life, or these (repeated, or with commas);
    /// whatever still runs there ends. Every sign that is seen has to be named, and no other
    #[arg(long, value_name = "SIGN", value_delimiter = ',')]
    pub despite: Vec<Sign>,
    /// How to do it.
    #[command(flatten)]
    pub change: Change,
    /// How long to wait.
    #[command(flatten)]
    pub patience: Patience,
}

/// Signs of life that can be overruled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Sign {
    /// Its agent answers a question
    AgentAnswers,
    /// Another node reaches its libvirtd
    LibvirtReachable,
    /// It refuses another node's connection: no libvirtd, but a machine that runs
    HostResponds,
}

impl Sign {
    fn life_sign(self) -> LifeSign {
        match self {
            Self::AgentAnswers => LifeSign::AgentAnswers,
            Self::LibvirtReachable => LifeSign::LibvirtReachable,
            Self::HostResponds => LifeSign::HostResponds,
        }
    }
}

impl Evacuate {
    /// What travels; names of instances travel as their UUIDs.
    pub fn options(&self, only: Vec<InstanceId>) -> EvacuateOptions {
        EvacuateOptions {
            host: self.host.clone(),
            to: self.targets.to.clone(),
            only,
            max_parallel: self.at_once.max_parallel,
            confirmed_off: self.i_confirm_host_is_off,
            despite_many_lost: self.despite_many_lost,
            despite: self.despite.iter().map(|sign| sign.life_sign()).collect(),
            automatic: false,
            unknown: Unknown::default(),
        }
    }
}

/// Declaring a node down.
#[derive(Debug, Args)]
pub struct ForceDown {
    /// Host name.
    pub host: HostName,
    /// Take it back: the node counts as up again once it reports
    #[arg(long)]
    pub unset: bool,
    /// How to do it.
    #[command(flatten)]
    pub change: Change,
}

/// Spreading load.
#[derive(Debug, Args)]
pub struct Balance {
    /// Largest spread that is left: the most loaded node's load less the mean, in points
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub threshold: Option<u32>,
    /// Moves at the most
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub max_moves: Option<u32>,
    /// How many at once.
    #[command(flatten)]
    pub at_once: AtOnce,
    /// How to do it.
    #[command(flatten)]
    pub change: Change,
    /// How long to wait.
    #[command(flatten)]
    pub patience: Patience,
}

impl Balance {
    /// What travels.
    pub fn options(&self) -> BalanceOptions {
        BalanceOptions {
            threshold_percent: self.threshold,
            max_parallel: self.at_once.max_parallel,
            max_moves: self.max_moves,
            automatic: false,
            unknown: Unknown::default(),
        }
    }
}

/// Pausing what the conductor does by itself.
#[derive(Debug, Clone, Copy, Args)]
pub struct SetAutomation {
    /// Evacuate nodes that died, if the conductor's settings say so
    #[arg(long, value_name = "SWITCH")]
    pub evacuate: Option<Switch>,
    /// Balance load, if the conductor's settings say so
    #[arg(long, value_name = "SWITCH")]
    pub balance: Option<Switch>,
    /// Say what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
}

impl SetAutomation {
    /// What travels.
    pub fn request(self) -> Automation {
        let on = |switch: Switch| switch == Switch::On;
        Automation {
            evacuate: self.evacuate.map(on),
            balance: self.balance.map(on),
        }
    }
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// As the settings say
    On,
    /// Not for now
    Off,
}

/// What can be done with operations.
#[derive(Debug, Subcommand)]
pub enum OperationVerb {
    /// Operations, newest first
    List {
        /// Only on this node
        #[arg(long)]
        host: Option<HostName>,
        /// Only of this kind
        #[arg(long, value_name = "KIND")]
        kind: Option<Kind>,
        /// Only those that are not over
        #[arg(long)]
        active: bool,
        /// At most so many
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
        limit: Option<u32>,
    },
    /// The whole record of one, guest by guest
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
    /// Call one off: no more guests begin, those on their way are called back
    Cancel {
        /// Number, UUID or prefix.
        #[arg(value_parser = some_text)]
        id: String,
        /// How to do it.
        #[command(flatten)]
        change: Change,
        /// How long to wait.
        #[command(flatten)]
        patience: Patience,
    },
}

/// Kinds of operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// A node is emptied
    Drain,
    /// A node gets its guests back
    Restore,
    /// A dead node's guests are started elsewhere
    Evacuate,
    /// Load is spread
    Balance,
}

impl Kind {
    /// The kind as it travels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Drain => "drain",
            Self::Restore => "restore",
            Self::Evacuate => "evacuate",
            Self::Balance => "balance",
        }
    }
}
