//! A fake hypervisor for tests: [`FakeDriver`]s on one [`Fabric`].
//!
//! A fake migration moves a fake guest from one fake node to another, in
//! virtual time: memory and disks take as long as the guest's size, its
//! writing and the road's width make them. It is honest to the contract in
//! [`super`], which the contract suite holds it to beside the real driver, and
//! it can be made to break wherever the real thing breaks ([`script`]).
//!
//! The world checks itself apart from what the nodes believe ([`ledger`],
//! [`Fabric::check_invariants`]): each guest's memory counts how long it has
//! run, and its disks hold that count, so lost memory, an old disk or a second
//! running copy shows. A guest that is shut down loses its memory and no more:
//! started again, it must find its disks as it left them.
//!
//! Paths below the system's directories for temporary files are the machine's own,
//! of which all nodes see the same ([`machine`]): agents under test have their
//! state there.
//!
//! Only tests make a fabric: no setting of any binary leads here.

mod acts;
mod answers;
mod breakage;
mod carriage;
#[cfg(test)]
mod carriage_tests;
mod cold;
#[cfg(test)]
mod cold_tests;
mod contents;
mod definitions;
mod departure;
mod fabric;
mod files;
mod guest_builder;
mod handing;
mod hands;
#[cfg(test)]
mod hands_tests;
mod inbox;
mod inspect;
mod journey;
pub mod ledger;
mod machine;
mod mirrors;
mod node;
mod overlays;
mod power;
mod rebuild;
pub mod script;
mod storage;
#[cfg(test)]
mod tests;
pub mod transfer;
mod vcpus;
mod world;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use drover_model::{
    api::compute::Mark,
    content::{AddressFact, BoundAddress, FileContent},
    guest::{Disk, Guest, Presence},
    ids::{HostName, InstanceId, MigrationId},
    node::{InstanceReport, Inventory},
};
use tokio::{
    sync::{broadcast, watch},
    time::{Instant, sleep},
};

use super::{
    DestinationAnswer, DestinationQuestion, Event, Hypervisor, HypervisorError, Job, JobSample,
    MigrateSpec, Result, Unreached,
};
use inbox::Process;
use journey::Outcome;
use node::Libvirtd;
use script::Effect;
use world::World;

pub use fabric::Fabric;
pub use guest_builder::GuestBuilder;
pub use ledger::Violation;
pub use node::NodeSpec;
pub use script::{At, Call, End, Fault};
pub use storage::{Content, File};
/// What ends a `send`, for tests that have no other way to name it.
pub use tokio_util::sync::CancellationToken;

/// Longest time a call takes when no script slows it, microseconds.
const LATENCY_US: u64 = 2_000;
/// How long it takes to find out that nobody answers.
const REACH_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a probe port stays open.
const PROBE_TIME: Duration = Duration::from_secs(5);

/// The driver of one fake node. It remembers nothing: all there is, is the
/// fabric's, so dropping it is what killing an agent is. What an agent's process
/// holds (the door for files, what is to come in, what is being sent) goes with
/// the last clone of it.
#[derive(Debug, Clone)]
pub struct FakeDriver {
    fabric: Fabric,
    host: HostName,
    process: Arc<Process>,
    /// While this is true, that process stands still.
    still: Option<watch::Receiver<bool>>,
}

impl FakeDriver {
    fn new(fabric: Fabric, host: HostName) -> Self {
        let process = Arc::new(Process);
        Self {
            fabric,
            host,
            process,
            still: None,
        }
    }

    /// The driver of a process that stands still while that is true: its calls wait.
    pub fn still_while(self, still: watch::Receiver<bool>) -> Self {
        let still = Some(still);
        Self { still, ..self }
    }

    /// Its node.
    pub fn host(&self) -> &HostName {
        &self.host
    }

    /// Carries out a call as scripts and the node's libvirtd allow.
    async fn call<T>(
        &self,
        call: Call,
        act: impl FnOnce(&mut World, &HostName, Instant) -> Result<T> + Send,
    ) -> Result<T> {
        let effect = self.enter(call).await?;
        let result = self.fabric.with(|world, now| {
            self.answers(world, call)?;
            act(world, &self.host, now)
        });
        leave(effect, result).await
    }

    /// A call is on its way: as long as that takes, and if it is let in.
    async fn enter(&self, call: Call) -> Result<Option<Effect>> {
        let (latency, effect) = self.fabric.with(|world, _| {
            let latency = Duration::from_micros(world.rng.u64(..LATENCY_US));
            (latency, take_effect(world, &self.host, call))
        });
        let before = match &effect {
            Some(Effect::SlowBefore(delay)) => *delay,
            _ => Duration::ZERO,
        };
        sleep(latency + before).await;
        if let Some(still) = &self.still {
            // What froze it may be gone: then it is dead, and does nothing more.
            if still.clone().wait_for(|still| !still).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
        match effect {
            Some(Effect::Refuse(error)) => Err(error),
            Some(Effect::Panic) => panic!("as scripted, at {call:?}"),
            effect => Ok(effect),
        }
    }

    fn answers(&self, world: &World, call: Call) -> Result<()> {
        let node = world.node(&self.host);
        if !call.asks_libvirt() || node.answers() {
            return Ok(());
        }
        Err(HypervisorError::Unreachable {
            uri: "qemu:///system".to_owned(),
            message: match node.libvirtd {
                Libvirtd::Dead => "Failed to connect socket: Connection refused".to_owned(),
                Libvirtd::Away | Libvirtd::Up => "no answer in time".to_owned(),
            },
        })
    }

    fn can_reach(&self, address: &str, port: u16) -> Reach {
        self.fabric.with(|world, now| {
            let Some(to) = world.host_at(address) else {
                return Reach::Unknown(format!("{address}: no such host"));
            };
            let node = world.node(&to);
            let blocked = node.spec.blocked_ports.contains(&port);
            if blocked || (to != self.host && !world.is_linked(&self.host, &to)) {
                return Reach::Silent;
            }
            let libvirtd = port == node.spec.libvirt_port && node.libvirtd != Libvirtd::Dead;
            let probe = node
                .probe_ports
                .get(&port)
                .is_some_and(|until| now <= *until);
            let disks = port == node.spec.disk_port && node.takes_files();
            if libvirtd || probe || disks {
                Reach::Open
            } else {
                Reach::Refused(format!("{address}:{port}: Connection refused"))
            }
        })
    }
}

/// What comes of trying a port.
enum Reach {
    Open,
    Refused(String),
    Unknown(String),
    Silent,
}

/// A call's caller hears of it, as a script has it.
async fn leave<T, E: From<HypervisorError>>(
    effect: Option<Effect>,
    result: std::result::Result<T, E>,
) -> std::result::Result<T, E> {
    match effect {
        Some(Effect::SlowAfter(delay)) => {
            sleep(delay).await;
            result
        }
        Some(Effect::Forget(error)) => result.and(Err(error.into())),
        _ => result,
    }
}

fn take_effect(world: &mut World, host: &HostName, call: Call) -> Option<Effect> {
    let scripts = &mut world.node_mut(host).call_scripts;
    scripts.retain(|script| script.times > 0);
    let script = scripts.iter_mut().find(|script| script.call == call)?;
    script.times -= 1;
    Some(script.effect.clone())
}

/// Waits for a migration's end, and hears of it when its script lets it.
async fn end_of(mut outcome: watch::Receiver<Outcome>) -> Result<()> {
    let ended = match outcome.wait_for(Option::is_some).await {
        Ok(ended) => ended.clone(),
        Err(_) => None,
    };
    match ended {
        Some((result, delay)) => {
            sleep(delay).await;
            result
        }
        None => Err(HypervisorError::Lost("the fabric is gone".to_owned())),
    }
}

#[async_trait]
impl Hypervisor for FakeDriver {
    async fn inventory(&self) -> Result<Inventory> {
        self.call(Call::Inventory, |world, host, _| Ok(world.inventory(host)))
            .await
    }

    async fn guests(&self) -> Result<Vec<InstanceReport>> {
        self.call(
            Call::Guests,
            |world, host, now| Ok(world.reports(host, now)),
        )
        .await
    }

    async fn guest(&self, id: InstanceId) -> Result<Option<Guest>> {
        self.call(Call::Guest, |world, host, _| {
            match world.unreadable.get(&id) {
                Some(reason) => Err(HypervisorError::Failed(reason.clone())),
                None => Ok(world.describe(host, id)),
            }
        })
        .await
    }

    async fn presence(&self, id: InstanceId) -> Result<Presence> {
        self.call(
            Call::Presence,
            |world, host, _| Ok(world.presence(host, id)),
        )
        .await
    }

    fn events(&self) -> broadcast::Receiver<Event> {
        self.fabric
            .with(|world, _| world.node(&self.host).events.subscribe())
    }

    async fn leave_marks(&self, migration: MigrationId, disks: &[Disk]) -> Result<Vec<Mark>> {
        self.call(Call::LeaveMarks, |world, host, _| {
            Ok(world.leave_marks(host, migration, disks))
        })
        .await
    }

    async fn remove_marks(&self, marks: &[Mark]) -> Result<()> {
        self.call(Call::RemoveMarks, |world, host, _| {
            world.remove_marks(host, marks);
            Ok(())
        })
        .await
    }

    async fn answer_destination(
        &self,
        question: DestinationQuestion<'_>,
    ) -> Result<DestinationAnswer> {
        self.call(Call::AnswerDestination, |world, host, _| {
            Ok(world.answer(host, &question))
        })
        .await
    }

    async fn contents(&self, paths: &[String], marks: &[Mark]) -> Result<Vec<FileContent>> {
        self.call(Call::Contents, |world, host, _| {
            let paths = paths.iter();
            Ok(paths.map(|p| world.content(host, p, marks)).collect())
        })
        .await
    }

    async fn digests(&self, paths: &[String]) -> Result<Vec<FileContent>> {
        self.call(Call::Digests, |world, host, _| {
            let paths = paths.iter();
            Ok(paths.map(|p| world.digested(host, p)).collect())
        })
        .await
    }

    async fn addresses(&self, bound: &[BoundAddress]) -> Result<Vec<AddressFact>> {
        self.call(Call::Addresses, |world, host, _| {
            let bound = bound.iter();
            Ok(bound.map(|b| world.address_fact(host, b)).collect())
        })
        .await
    }

    async fn reach(&self, address: &str, port: u16) -> std::result::Result<(), Unreached> {
        match self.can_reach(address, port) {
            Reach::Open => Ok(()),
            Reach::Refused(message) => Err(Unreached {
                message,
                refused: true,
            }),
            Reach::Unknown(words) => Err(Unreached::silent(words)),
            Reach::Silent => {
                sleep(REACH_TIMEOUT).await;
                Err(Unreached::silent(format!("{address}:{port}: timed out")))
            }
        }
    }

    async fn open_probe_port(&self) -> std::result::Result<u16, String> {
        self.fabric.with(|world, now| {
            let node = world.node_mut(&self.host);
            node.probe_ports.retain(|_, until| now <= *until);
            let (first, end) = node.spec.migration_ports;
            let free = (first..end).find(|port| !node.probe_ports.contains_key(port));
            let port = free.ok_or("no free port in the migration range")?;
            node.probe_ports.insert(port, now + PROBE_TIME);
            Ok(port)
        })
    }

    async fn create_disk(&self, disk: &Disk, inode: u64) -> Result<()> {
        self.call(Call::CreateDisk, |world, host, _| {
            world.create_disk(host, disk, inode)
        })
        .await
    }

    async fn remove_disk(&self, path: &str) -> Result<()> {
        self.call(Call::RemoveDisk, |world, host, _| {
            world.remove_disk(host, path)
        })
        .await
    }

    async fn migrate(&self, spec: MigrateSpec) -> Result<()> {
        let outcome = self
            .call(Call::Migrate, |world, host, now| {
                world.begin(host, spec, now)
            })
            .await?;
        end_of(outcome).await
    }

    async fn job(&self, id: InstanceId) -> Result<Job> {
        self.call(Call::Job, |world, host, _| world.job(host, id))
            .await
    }

    async fn completed_job(&self, id: InstanceId) -> Result<Option<JobSample>> {
        self.call(Call::CompletedJob, |world, host, _| {
            world.completed_job(host, id)
        })
        .await
    }

    async fn abort(&self, id: InstanceId) -> Result<()> {
        self.call(Call::Abort, |world, host, now| world.abort(host, id, now))
            .await
    }

    async fn sever(&self, id: InstanceId, _dest_address: &str) -> Result<()> {
        self.call(Call::Sever, |world, host, now| world.sever(host, id, now))
            .await
    }

    async fn start_post_copy(&self, id: InstanceId) -> Result<()> {
        self.call(Call::StartPostCopy, |world, host, now| {
            world.start_post_copy(host, id, now)
        })
        .await
    }

    async fn pause_for_switch_over(&self, id: InstanceId) -> Result<()> {
        self.call(Call::PauseForSwitchOver, |world, host, now| {
            world.pause_for_switch_over(host, id, now)
        })
        .await
    }

    async fn resume(&self, id: InstanceId) -> Result<()> {
        self.call(Call::Resume, |world, host, now| world.resume(host, id, now))
            .await
    }

    async fn set_max_downtime_ms(&self, id: InstanceId, downtime_ms: u64) -> Result<()> {
        self.call(Call::SetMaxDowntime, |world, host, _| {
            world.set_max_downtime(host, id, downtime_ms)
        })
        .await
    }

    async fn discard_incoming(&self, id: InstanceId) -> Result<()> {
        self.call(Call::DiscardIncoming, |world, host, now| {
            world.discard_incoming(host, id, now)
        })
        .await
    }

    async fn discard_outgoing(&self, id: InstanceId) -> Result<()> {
        self.call(Call::DiscardOutgoing, |world, host, now| {
            world.discard_outgoing(host, id, now)
        })
        .await
    }

    async fn discard_half(&self, id: InstanceId) -> Result<()> {
        self.call(Call::DiscardHalf, |world, host, now| {
            world.discard_half(host, id, now)
        })
        .await
    }

    async fn undefine(&self, id: InstanceId) -> Result<()> {
        self.call(Call::Undefine, |world, host, _| {
            world.undefine(host, id, None)
        })
        .await
    }
}
