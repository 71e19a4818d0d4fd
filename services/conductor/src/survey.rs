//! A survey: asks both nodes about a move and has [`checks`] judge what they
//! say. A dry run is a survey; so is the first step of a migration, which also
//! claims what it found.

use drover_model::{
    api::compute::{
        CarriedFile, CheckDestination, CheckPath, CheckSource, DestinationFacts, SourceFacts,
    },
    check::{CheckCode, CheckFailure, Side},
    content::CheckedFile,
    guest::{Guest, PowerState},
    ids::{HostName, MigrationId},
    migration::Way,
    node::{Endpoint, HypervisorReport},
};
use drover_store::{Store, claims::Resources, instances::InstanceRow, nodes::NodeRow};
use serde::{Deserialize, Serialize};

use crate::{
    agent_client::AgentClient,
    checks::{
        self, Liveness,
        content::{Both, Checked},
    },
    comparing::{self, Patience},
    placement::{self, Candidate},
};

/// Candidates that are asked themselves before a search is given up.
const MAX_ASKED: usize = 16;

/// What is to be looked into.
pub struct Survey<'a> {
    /// The record.
    pub store: &'a Store,
    /// The agents.
    pub agents: &'a AgentClient,
    /// What counts as down, and the time.
    pub live: Liveness,
    /// Keys the agents' marks and probes.
    pub migration: MigrationId,
    /// What is to move.
    pub instance: &'a InstanceRow,
    /// How.
    pub way: &'a Way,
    /// How long files may be compared.
    pub patience: Patience,
}

/// A destination that every check let through.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Chosen {
    /// The node.
    pub host: HostName,
    /// Where it is.
    pub endpoint: Endpoint,
    /// The guest as its source described it.
    pub guest: Guest,
    /// Disks that must be copied, by target.
    pub copied_disks: Vec<String>,
    /// Writable disks on shared storage, by target.
    pub shared_disks: Vec<String>,
    /// Of a cold migration, every file that is carried.
    #[serde(default)]
    pub files: Vec<CarriedFile>,
    /// What to claim there: vCPUs, memory MiB, disk bytes.
    pub claim: (u64, u64, u64),
    /// Files that it uses and that are not copied, as they were on its node when
    /// they were compared.
    #[serde(default)]
    pub checked_at_source: Vec<CheckedFile>,
    /// The same on the destination.
    #[serde(default)]
    pub checked: Vec<CheckedFile>,
}

/// A node, and why it cannot take the guest.
pub type Verdict = (HostName, Vec<CheckFailure>);

impl Survey<'_> {
    /// Destinations to try, best first, and those that the record rules out.
    /// A named destination is the only candidate, whatever the record says:
    /// its failures are wanted too.
    pub async fn candidates(
        &self,
        named: Option<&HostName>,
    ) -> drover_store::Result<(Vec<HostName>, Vec<Verdict>)> {
        if let Some(host) = named {
            return Ok((vec![host.clone()], Vec::new()));
        }
        let nodes = self.store.nodes().await?;
        let reports: Vec<_> = nodes.iter().map(|node| &node.report).collect();
        let usages = self.store.usages(&reports).await?;
        let candidates = nodes.into_iter().zip(usages);
        let candidates = candidates
            .map(|(node, usage)| Candidate { node, usage })
            .collect();
        let size = Size::of(self.instance.vcpus, self.instance.memory_mib, self.way);
        let wanted = size.claim(self.instance.power_state, 0);
        let (fit, unfit) = placement::rank(&self.instance.host, &wanted, candidates, self.live);
        let hosts = fit.into_iter().map(|c| c.node.report.host).take(MAX_ASKED);
        Ok((hosts.collect(), unfit))
    }

    /// Every check on the source alone; the node's and the guest's.
    pub async fn source(&self) -> drover_store::Result<(Option<SourceFacts>, Vec<CheckFailure>)> {
        let host = &self.instance.host;
        let row = self.store.known_node(host).await?;
        let mut failures = checks::node(host, row.as_ref(), Side::Source, self.live);
        if !failures.is_empty() {
            return Ok((None, failures));
        }
        let ask = CheckSource {
            migration: self.migration,
            instance: self.instance.id,
            lasting: matches!(self.way, Way::Cold(_)),
        };
        match self.agents.ask(host, &ask).await {
            Ok(facts) => {
                failures.extend(checks::source(&facts, host, self.way));
                Ok((Some(facts), failures))
            }
            Err(error) => {
                failures.push(checks::unanswered(host, Side::Source, &error));
                Ok((None, failures))
            }
        }
    }

    /// Every check on one destination and the way there. The source is asked
    /// anew for each, because its marks last for one look only. Failures of the
    /// source come apart from the destination's: another destination does not
    /// mend them.
    pub async fn examine(&self, host: &HostName) -> drover_store::Result<Examined> {
        let source_host = &self.instance.host;
        let dest_row = self.store.known_node(host).await?;
        let mut failures = checks::node(host, dest_row.as_ref(), Side::Destination, self.live);
        failures.extend(checks::same_host(source_host, host));
        let (facts, source_failures) = self.source().await?;
        let mut examined = Examined {
            source: source_failures,
            destination: failures,
            chosen: None,
        };
        if let Some(dest_row) = &dest_row
            && examined.destination.iter().all(is_soft)
            && let Some(facts) = facts
            && let Some(guest) = &facts.guest
        {
            self.destination(&mut examined, guest, &facts, dest_row)
                .await?;
        }
        Ok(examined)
    }

    async fn destination(
        &self,
        examined: &mut Examined,
        guest: &Guest,
        source: &SourceFacts,
        dest: &NodeRow,
    ) -> drover_store::Result<()> {
        let host = &dest.report.host;
        let source_host = &self.instance.host;
        let Some(source_row) = self.store.known_node(source_host).await? else {
            return Ok(());
        };
        let ask = CheckDestination {
            migration: self.migration,
            guest: guest.clone(),
            marks: source.marks.clone(),
            source: source_row.report.endpoint.clone(),
        };
        let answered = self.agents.ask(host, &ask).await;
        // Asked whatever the destination said: it also takes the marks away.
        let path = CheckPath {
            migration: self.migration,
            instance: guest.id,
            destination: dest.report.endpoint.clone(),
            probe_port: answered
                .as_ref()
                .ok()
                .and_then(|f| f.probe_port.clone().ok()),
            disk_port: answered
                .as_ref()
                .ok()
                .and_then(|f| f.disk_port.clone().ok())
                .filter(|_| matches!(self.way, Way::Cold(_))),
        };
        let reached = self.agents.ask(source_host, &path).await;
        let failures = &mut examined.destination;
        let mut facts = match answered {
            Ok(facts) => facts,
            Err(error) => {
                failures.push(checks::unanswered(host, Side::Destination, &error));
                return Ok(());
            }
        };
        checks::content::unshare_other_files(guest, source, &mut facts);
        failures.extend(checks::destination(
            guest,
            &source.inventory,
            &facts,
            host,
            self.way,
        ));
        let brought = checks::content::brought(guest, &facts, self.way);
        let both = Both::of(guest, &brought, (source_host, source), (host, &facts));
        let checked = self.compare(both, failures).await;
        match reached {
            Ok(path) => failures.extend(checks::path(&path, source_host, host, self.way)),
            Err(error) => {
                failures.push(checks::unanswered(source_host, Side::Source, &error));
            }
        }
        let mut chosen = choose(guest, &facts, dest, (self.way, self.migration));
        (chosen.checked_at_source, chosen.checked) = (checked.source, checked.dest);
        let usage = self.store.usage(&dest.report).await?;
        failures.extend(checks::room(&usage.shortfalls(&chosen.resources()), host));
        dedup(failures);
        examined.chosen = Some(chosen);
        Ok(())
    }

    /// Compares what both nodes have of the files that are not copied.
    async fn compare(&self, both: Both<'_>, failures: &mut Vec<CheckFailure>) -> Checked {
        let compared = comparing::complete(self.agents, both, self.patience).await;
        let both = compared.view(both);
        failures.extend(match self.patience {
            Patience::ForPlan => both.known_failures(),
            Patience::Brief | Patience::WhileRead => both.failures(),
        });
        let checked = both.checked();
        failures.extend(compared.failures);
        checked
    }
}

/// What came of examining a destination.
#[derive(Debug, Clone, PartialEq)]
pub struct Examined {
    /// What the source or the instance stands in the way with.
    pub source: Vec<CheckFailure>,
    /// What the destination or the path stands in the way with.
    pub destination: Vec<CheckFailure>,
    /// The destination, if both nodes could be asked.
    pub chosen: Option<Chosen>,
}

impl Examined {
    /// The destination, if nothing stands in the way.
    pub fn passed(&self) -> Option<&Chosen> {
        let clear = self.source.is_empty() && self.destination.is_empty();
        self.chosen.as_ref().filter(|_| clear)
    }
}

impl Chosen {
    /// What to claim.
    pub fn resources(&self) -> Resources {
        let (vcpus, memory_mib, disk_bytes) = self.claim;
        Resources {
            vcpus,
            memory_mib,
            disk_bytes,
        }
    }
}

/// vCPUs and memory that a guest will have.
struct Size {
    vcpus: u64,
    memory_mib: u64,
}

impl Size {
    fn of(vcpus: u32, memory_mib: u64, way: &Way) -> Self {
        let flavor = match way {
            Way::Cold(options) => options.flavor,
            Way::Live(_) | Way::Transfer(_) | Way::Evacuation(_) => None,
        };
        let (vcpus, memory_mib) = flavor.map_or((vcpus, memory_mib), |f| (f.vcpus, f.memory_mb));
        Self {
            vcpus: u64::from(vcpus),
            memory_mib,
        }
    }

    /// What it takes: a guest that is off, and stays so, holds neither memory nor CPU.
    fn claim(&self, state: PowerState, disk_bytes: u64) -> Resources {
        let active = u64::from(state.is_active());
        Resources {
            vcpus: self.vcpus * active,
            memory_mib: self.memory_mib * active,
            disk_bytes,
        }
    }
}

fn choose(
    guest: &Guest,
    facts: &DestinationFacts,
    dest: &NodeRow,
    (way, migration): (&Way, MigrationId),
) -> Chosen {
    let names = |disks: Vec<&drover_model::guest::Disk>| -> Vec<String> {
        disks.into_iter().map(|d| d.target.clone()).collect()
    };
    let copied = checks::copied(guest, &facts.disks);
    let mut files = match way {
        Way::Cold(_) => checks::cold::carried(guest, facts),
        Way::Live(_) | Way::Transfer(_) | Way::Evacuation(_) => Vec::new(),
    };
    if let Way::Cold(options) = way
        && options.pre_copy
        && guest.power_state.is_active()
    {
        files.extend(checks::cold::deltas(guest, &files, migration));
    }
    let disk_bytes = match way {
        Way::Live(_) | Way::Transfer(_) | Way::Evacuation(_) => {
            copied.iter().map(|d| d.allocated_bytes).sum()
        }
        Way::Cold(_) => {
            let made = files.iter().filter(|f| !f.present);
            made.map(|f| f.data_bytes).sum()
        }
    };
    let size = Size::of(guest.vcpus, guest.memory_mib, way);
    let claim = size.claim(guest.power_state, disk_bytes);
    Chosen {
        host: dest.report.host.clone(),
        endpoint: dest.report.endpoint.clone(),
        claim: (claim.vcpus, claim.memory_mib, claim.disk_bytes),
        files,
        copied_disks: names(copied),
        shared_disks: names(checks::shared(guest, &facts.disks)),
        guest: guest.clone(),
        checked_at_source: Vec::new(),
        checked: Vec::new(),
    }
}

/// A failure that does not keep the node from answering questions.
fn is_soft(failure: &CheckFailure) -> bool {
    matches!(failure.code, CheckCode::HostDisabled)
}

/// The disk room check exists per file system and for the node: one is enough.
fn dedup(failures: &mut Vec<CheckFailure>) {
    let mut seen_space = false;
    failures
        .retain(|f| f.code != CheckCode::DiskSpace || !std::mem::replace(&mut seen_space, true));
}

/// Whether a node of the record reports a hypervisor at all.
pub fn hypervisor_is_up(node: &NodeRow) -> bool {
    matches!(node.report.hypervisor, HypervisorReport::Up { .. })
}
