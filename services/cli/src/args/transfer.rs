//! The command line of transfers from one project to another: done at once, or
//! offered by the one and accepted by the other.

use std::collections::BTreeMap;

use clap::{Args, Subcommand, builder::NonEmptyStringValueParser};
use drover_model::{
    migration::{TransferMode, TransferOptions},
    unknown::Unknown,
};

use super::{Change, Patience, long_seconds, pair, seconds, some_text};

/// What can be done with offers.
#[derive(Debug, Subcommand)]
pub enum TransferVerb {
    /// Offer an instance to another project, which accepts it with the key that is shown
    Offer(Offer),
    /// Take an instance that was offered
    Accept(Box<Accept>),
    /// Offers, newest first
    List {
        /// Only those by or for this project (its id)
        #[arg(long, value_name = "P", value_parser = some_text)]
        project: Option<String>,
        /// Also those that can no longer be accepted
        #[arg(long)]
        all: bool,
    },
    /// One offer
    Show {
        /// UUID or prefix.
        #[arg(value_parser = some_text)]
        offer: String,
    },
    /// Take back an offer that was not accepted
    Withdraw {
        /// UUID or prefix.
        #[arg(value_parser = some_text)]
        offer: String,
        /// How to do it.
        #[command(flatten)]
        change: Change,
    },
}

/// Offering an instance.
#[derive(Debug, Args)]
pub struct Offer {
    /// UUID, prefix or name of the instance.
    #[arg(value_parser = some_text)]
    pub id: String,
    /// The project that may accept; without it, any that has the key
    #[arg(long, value_name = "P", value_parser = some_text)]
    pub project: Option<String>,
    /// For how long it can be accepted (2h, 3d); a day if it is left out
    #[arg(long, value_name = "TIME", value_parser = long_seconds)]
    pub expires: Option<u64>,
    /// How to do it.
    #[command(flatten)]
    pub change: Change,
}

/// Accepting an offer.
#[derive(Debug, Args)]
pub struct Accept {
    /// UUID or prefix of the offer.
    #[arg(value_parser = some_text)]
    pub offer: String,
    /// The project that gets the instance
    #[arg(long, value_name = "P", value_parser = some_text)]
    pub project: String,
    /// What the giver was told when it offered; asked for, or read from standard input, if left
    /// out (other users of this machine can see what stands here)
    #[arg(long, value_parser = NonEmptyStringValueParser::new())]
    pub key: Option<String>,
    /// In which way.
    #[command(flatten)]
    pub how: Handover,
    /// How to do it.
    #[command(flatten)]
    pub change: Change,
    /// How long to wait.
    #[command(flatten)]
    pub patience: Patience,
}

/// Moving an instance to another project.
#[derive(Debug, Args)]
pub struct TransferInstance {
    /// UUID, prefix or name.
    #[arg(value_parser = some_text)]
    pub id: String,
    /// The project that gets it
    #[arg(long, value_name = "P", value_parser = some_text)]
    pub project: String,
    /// In which way.
    #[command(flatten)]
    pub how: Handover,
    /// How to do it.
    #[command(flatten)]
    pub change: Change,
    /// How long to wait.
    #[command(flatten)]
    pub patience: Patience,
}

/// Whether the guest runs on. Named always: neither is a default.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct Mode {
    /// The guest runs on while it changes hands; one that is off stays off
    #[arg(long)]
    pub live: bool,
    /// The guest is shut down, changes hands and is started again
    #[arg(long)]
    pub cold: bool,
}

/// How an instance changes hands.
#[derive(Debug, Args)]
pub struct Handover {
    /// Whether the guest runs on.
    #[command(flatten)]
    pub mode: Mode,
    /// The receiver's network that takes the place of one the guest is on; OLD is the giver's
    /// name of it, its bridge or libvirt network, or the MAC address of a NIC
    #[arg(long, value_name = "OLD=NEW", value_parser = mapping)]
    pub network: Vec<(String, String)>,
    /// Leave the disks where they are
    #[arg(long)]
    pub keep_disk: bool,
    /// Give every NIC a new MAC address (cold only)
    #[arg(long)]
    pub new_mac: bool,
    /// Give the instance another name (cold only)
    #[arg(long)]
    pub name: Option<String>,
    /// Give the instance another title
    #[arg(long, value_name = "TEXT")]
    pub title: Option<String>,
    /// Give up if the guest has not shut down after so long
    #[arg(long, value_name = "TIME", value_parser = seconds, conflicts_with = "live")]
    pub shutdown_timeout: Option<u64>,
    /// Stop the guest hard, as pulling its plug would, if it has not shut down after so long;
    /// without this no guest is ever stopped hard
    #[arg(long, value_name = "TIME", value_parser = seconds, conflicts_with = "live")]
    pub force_stop_after: Option<u64>,
    /// Upper limit for each disk
    #[arg(long, value_name = "MIB_S", alias = "bandwidth-mib-s")]
    pub bandwidth: Option<u64>,
    /// Give up after so long without progress
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    pub progress_timeout: Option<u64>,
}

impl Handover {
    /// The options as they travel.
    ///
    /// # Errors
    /// They cannot be; says why.
    pub fn options(&self) -> Result<TransferOptions, String> {
        self.suits_its_mode()?;
        let mut networks = BTreeMap::new();
        for (old, new) in &self.network {
            if networks.insert(old.clone(), new.clone()).is_some() {
                return Err(format!("network {old} is replaced twice"));
            }
        }
        let options = TransferOptions {
            mode: match self.mode.cold {
                true => TransferMode::Cold,
                false => TransferMode::Live,
            },
            networks,
            keep_disk: self.keep_disk,
            new_mac: self.new_mac,
            name: self.name.clone(),
            title: self.title.clone(),
            shutdown_timeout_s: self.shutdown_timeout,
            force_stop_after_s: self.force_stop_after,
            bandwidth_mib_s: self.bandwidth,
            progress_timeout_s: self.progress_timeout,
            unknown: Unknown::default(),
        };
        match options.problems().as_slice() {
            [] => Ok(options),
            problems => Err(problems.join("; ")),
        }
    }

    /// What no running guest can be given, with the reason: clap would tell only
    /// that the options exclude each other.
    fn suits_its_mode(&self) -> Result<(), String> {
        let why = match self {
            _ if self.mode.cold => return Ok(()),
            Self { name: Some(_), .. } => "--name: libvirt renames no running domain",
            Self { new_mac: true, .. } => "--new-mac: a running NIC keeps its MAC address",
            _ => return Ok(()),
        };
        Err(format!("--live cannot be used with {why}"))
    }
}

fn mapping(text: &str) -> Result<(String, String), String> {
    pair(text).ok_or_else(|| "it is OLD=NEW, such as br0=lan".to_owned())
}
