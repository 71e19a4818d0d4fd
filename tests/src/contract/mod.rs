//! The contract suite for hypervisor drivers: what each point asks, written
//! against the trait alone, and the stages on which it is asked.
//!
//! A [`Stage`] gives a point two drivers and a guest between them: [`fake`] for
//! the fake driver in virtual time, [`real`] for libvirt on a devstack. The
//! points are in [`looking`], [`moving`], [`turning`], [`cold`], [`files`],
//! [`carrying`], [`hands`], [`rebuild`] and [`away`]; `tests/tests/contract.rs` runs every one
//! of them on either.

pub mod away;
pub mod carrying;
pub mod cold;
pub mod fake;
pub mod files;
pub mod hands;
pub mod looking;
pub mod moving;
pub mod real;
pub mod rebuild;
pub mod turning;

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use async_trait::async_trait;
use drover_compute::hypervisor::{self, Hypervisor, HypervisorError, Job, JobSample, MigrateSpec};
use drover_model::{
    error::ErrorClass,
    guest::{NicAttachment, PowerState, Presence},
    ids::InstanceId,
};
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

/// Memory of the suite's guests, MiB.
pub const MEMORY_MIB: u64 = 128;
/// vCPUs of one that somebody defines anew.
pub const REDEFINED_VCPUS: u32 = 2;
/// A road so narrow that a migration lasts until it is told otherwise, MiB/s.
pub const NARROW_MIB_S: u64 = 1;
/// How long anything may take until it counts as never.
const PATIENCE: Duration = Duration::from_secs(180);

/// Where a guest's disk lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In a directory that both nodes have.
    Shared,
    /// In a directory of its node.
    Local,
}

/// The guest that a point wants on a.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    /// Its state.
    pub state: PowerState,
    /// Its one disk, if it is to have one.
    pub disk: Option<Place>,
    /// How fast it writes to a part of its memory, MiB/s.
    pub dirty_mib_s: u64,
    /// It has a system that obeys its power button.
    pub obeys: bool,
    /// It has a NIC on the guests' bridge for certain.
    pub nic: bool,
    /// Data on its disk, MiB.
    pub data_mib: usize,
    /// Its priority where nodes are emptied.
    pub priority: i32,
    /// A group no two of which shall be on one node.
    pub group: Option<&'static str>,
}

impl Default for Wish {
    /// Running, idle, without a disk.
    fn default() -> Self {
        Self {
            state: PowerState::Running,
            disk: None,
            dirty_mib_s: 0,
            obeys: false,
            nic: false,
            data_mib: 1,
            priority: 0,
            group: None,
        }
    }
}

impl Wish {
    /// In that state.
    pub fn state(state: PowerState) -> Self {
        Self {
            state,
            ..Self::default()
        }
    }

    /// Running, with a disk there.
    pub fn disk(place: Place) -> Self {
        Self {
            disk: Some(place),
            ..Self::default()
        }
    }

    /// Running, with a disk that both nodes see, and a system that obeys.
    pub fn obedient() -> Self {
        Self {
            obeys: true,
            ..Self::disk(Place::Shared)
        }
    }

    /// Running, and writing so fast that no narrow road carries it.
    pub fn busy() -> Self {
        Self {
            dirty_mib_s: 40,
            ..Self::default()
        }
    }
}

/// Where a project that gets a's guests has its networks and its disks.
#[derive(Debug, Clone)]
pub struct Receiver {
    /// A bridge of a that no guest is on yet.
    pub bridge: NicAttachment,
    /// Directories of a in which no guest's disk is yet; one or more, and on more
    /// than one file system if that can be had.
    pub directories: Vec<String>,
    /// A storage pool of a, which is the first of these directories.
    pub pool: String,
}

/// Two nodes and what a point needs of them beyond their drivers.
#[async_trait(?Send)]
pub trait Stage {
    /// Driver of the node where guests are.
    fn a(&self) -> Arc<dyn Hypervisor>;

    /// Driver of the node where they go.
    fn b(&self) -> Arc<dyn Hypervisor>;

    /// Puts a guest on a, and waits until it is as wished.
    async fn guest(&self, wish: Wish) -> Result<InstanceId>;

    /// How a guest gets from a to b: a disk on a shared directory named as
    /// such, another named as copied, and its file made ready on b.
    async fn way(&self, id: InstanceId) -> Result<MigrateSpec>;

    /// Whether what a guest had on a is all on b.
    async fn verify(&self, id: InstanceId) -> Result<()>;

    /// From now on a's hypervisor does not answer a's driver. Migrations go on.
    async fn cut_off_a(&self) -> Result<()>;

    /// It answers again.
    async fn reconnect_a(&self) -> Result<()>;

    /// A directory for files that both nodes have, for this stage alone.
    fn shared_directory(&self) -> String;

    /// A directory that each node has for itself, if the drivers see one.
    fn local_directory(&self) -> Option<String>;

    /// Puts a file with that text into one of these directories, on a.
    async fn write(&self, path: &str, text: &str) -> Result<()>;

    /// Writes to a file that is there.
    async fn change(&self, path: &str) -> Result<()>;

    /// Whether a file on a holds the same as one on b. An error if either is gone.
    async fn same(&self, on_a: &str, on_b: &str) -> Result<bool>;

    /// A fingerprint of a file on a; none if there is none.
    async fn fingerprint(&self, path: &str) -> Result<Option<String>>;

    /// What a project has on a that is to get guests; this stage's alone.
    async fn receiver(&self) -> Result<Receiver>;

    /// Has a's hypervisor start a guest when its node boots.
    async fn set_autostart(&self, id: InstanceId) -> Result<()>;

    /// Somebody defines a guest of a anew, with [`REDEFINED_VCPUS`].
    async fn redefine(&self, id: InstanceId) -> Result<()>;

    /// A network that a's driver sees. (Not always one that a's guests can use.)
    fn network_in_sight(&self) -> NicAttachment;

    /// Whether two files on a hold the same disk. Nothing is said of what its
    /// guest wrote meanwhile, if the guests of this stage write.
    async fn same_disk(&self, one: &str, other: &str) -> Result<bool>;

    /// Address at which a finds b's probe ports.
    fn probe_address(&self) -> String;
}

/// A migration that somebody waits for.
pub type Underway = JoinHandle<hypervisor::Result<()>>;

/// Sets a guest off from a.
pub fn set_off(stage: &dyn Stage, spec: MigrateSpec) -> Underway {
    let a = stage.a();
    tokio::spawn(async move { a.migrate(spec).await })
}

/// How a migration ended.
///
/// # Errors
/// It does not end in time, or its task panicked.
pub async fn end_of(underway: Underway) -> Result<hypervisor::Result<()>> {
    timeout(PATIENCE, underway)
        .await
        .context("the migration does not end")?
        .context("the task of the migration died")
}

/// Sets a guest off on a narrow road and waits until its memory is on its way.
///
/// # Errors
/// It ends first, or never begins.
pub async fn set_off_slowly(stage: &dyn Stage, id: InstanceId) -> Result<Underway> {
    let mut spec = stage.way(id).await?;
    spec.options.bandwidth_mib_s = Some(NARROW_MIB_S);
    set_off_and_watch(stage, spec).await
}

/// Sets a guest off and waits until its memory is on its way.
///
/// # Errors
/// It ends first, or never begins.
pub async fn set_off_and_watch(stage: &dyn Stage, spec: MigrateSpec) -> Result<Underway> {
    let id = spec.instance;
    let underway = set_off(stage, spec);
    until("memory is on its way", async || {
        ensure!(!underway.is_finished(), "the migration ended at once");
        let sample = sample_of(stage.a().job(id).await?);
        Ok(sample.filter(|s| s.memory.processed_bytes > 0))
    })
    .await?;
    Ok(underway)
}

/// The sample of a migration job.
pub fn sample_of(job: Job) -> Option<JobSample> {
    match job {
        Job::Migration(sample) => Some(sample),
        Job::None | Job::Other(_) => None,
    }
}

/// Looks until it sees something. Neither driver announces every change, and
/// the contract says that events are only hints: so it looks again and again.
///
/// # Errors
/// Looking fails, or nothing is seen in time.
pub async fn until<T>(what: &str, look: impl AsyncFn() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(seen) = look().await.with_context(|| format!("until {what}"))? {
            return Ok(seen);
        }
        if Instant::now() > deadline {
            bail!("waited in vain until {what}");
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// The guest is on b, running, and a has nothing of it.
///
/// # Errors
/// It is not.
pub async fn assert_moved(stage: &dyn Stage, id: InstanceId) -> Result<()> {
    let (on_a, on_b) = (stage.a().presence(id).await?, stage.b().presence(id).await?);
    ensure!(
        on_a == Presence::Absent,
        "after the move it is {on_a:?} on a"
    );
    let running = Presence::Present(PowerState::Running);
    ensure!(on_b == running, "after the move it is {on_b:?} on b");
    stage.verify(id).await
}

/// The guest runs on a, and b has nothing of it.
///
/// # Errors
/// It does not, after a while in which b may tidy.
pub async fn assert_stayed(stage: &dyn Stage, id: InstanceId) -> Result<()> {
    let running = Presence::Present(PowerState::Running);
    until("the guest runs on a", async || {
        Ok((stage.a().presence(id).await? == running).then_some(()))
    })
    .await?;
    until("b has nothing of it", async || {
        Ok((stage.b().presence(id).await? == Presence::Absent).then_some(()))
    })
    .await
}

/// A call was refused because of the state of things.
///
/// # Errors
/// It was not.
pub fn assert_wrong_state<T: std::fmt::Debug>(
    what: &str,
    result: hypervisor::Result<T>,
) -> Result<()> {
    match result {
        Err(HypervisorError::WrongState(_)) => Ok(()),
        other => bail!("{what}: WrongState expected, got {other:?}"),
    }
}

/// A call was refused because there is no such guest.
///
/// # Errors
/// It was not.
pub fn assert_no_such_guest<T: std::fmt::Debug>(
    what: &str,
    result: hypervisor::Result<T>,
) -> Result<()> {
    match result {
        Err(HypervisorError::NoSuchGuest(_)) => Ok(()),
        other => bail!("{what}: NoSuchGuest expected, got {other:?}"),
    }
}

/// A call failed, with an error of that class.
///
/// # Errors
/// It did not.
pub fn assert_class<T: std::fmt::Debug>(
    what: &str,
    class: ErrorClass,
    result: hypervisor::Result<T>,
) -> Result<()> {
    match result {
        Err(error) if error.class() == class => Ok(()),
        other => bail!("{what}: an error of class {class:?} expected, got {other:?}"),
    }
}

/// An instance that no node knows.
pub fn nobody() -> InstanceId {
    InstanceId(uuid::Uuid::new_v4())
}
