//! What a seed stands for: a cloud, and what is asked of it and done to it, each at
//! its moment. Pure, so that a plan can be shown, changed and run again.

use std::fmt;

use fastrand::Rng;

/// Everything that happens in a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// What it was drawn from; what is drawn on the way follows from it too.
    pub seed: u64,
    /// How many nodes: `kvm1`, `kvm2`, ….
    pub nodes: usize,
    /// How many conductors: `ctl1`, ….
    pub conductors: usize,
    /// What can cut nodes' power; if anything can, dead nodes are evacuated unasked.
    pub fence: Fence,
    /// The guests.
    pub guests: Vec<GuestPlan>,
    /// What happens, in order of time.
    pub events: Vec<Planned>,
}

/// A guest to be.
#[derive(Debug, Clone, PartialEq)]
pub struct GuestPlan {
    /// Its node.
    pub node: usize,
    /// It runs to begin with.
    pub runs: bool,
    /// Where its disks are.
    pub disks: Disks,
    /// How fast it writes memory, MiB/s.
    pub dirty_mib_s: u64,
    /// It heeds its power button.
    pub obeys: bool,
}

/// Where a guest's disks are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Disks {
    /// On its node.
    Local,
    /// On storage that all nodes share.
    Shared,
    /// In its project's directory on its node: it can be handed to another project.
    Project,
}

/// What can cut nodes' power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fence {
    /// Nothing.
    None,
    /// An agent that does it.
    Works,
    /// One that says that it could not.
    Fails,
}

/// Something and its moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// When, milliseconds after the cloud is up.
    pub at_ms: u64,
    /// What.
    pub event: Event,
}

/// A process of Drover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Who {
    /// A conductor.
    Conductor(usize),
    /// A node's agent.
    Agent(usize),
}

/// What happens. What lasts ends by itself.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // The fields' names say it: numbers of nodes and guests from 0.
pub enum Event {
    /// Somebody asks for something.
    Ask(Ask),
    /// A process dies, and is started again.
    Kill { who: Who, for_ms: u64 },
    /// A process stands still, and goes on as if nothing had been.
    Freeze { who: Who, for_ms: u64 },
    /// A process does not reach the broker.
    CutOff { who: Who, for_ms: u64 },
    /// Two nodes do not reach each other.
    CutLink { a: usize, b: usize, for_ms: u64 },
    /// Messages are lost, late, doubled and out of order.
    BadNetwork { for_ms: u64 },
    /// A process's wall clock is wrong by so much.
    WrongClock { who: Who, by_ms: i64, for_ms: u64 },
    /// A node's agent dies, and its state directory is empty when it is started again.
    LoseJournal { node: usize, for_ms: u64 },
    /// A node has no room for disks.
    FullDisk { node: usize, for_ms: u64 },
    /// Nor for what its agent writes down.
    FullState { node: usize, for_ms: u64 },
    /// A node's libvirtd is started anew.
    RestartLibvirtd { node: usize },
    /// A node's libvirtd answers nobody.
    SilentLibvirtd { node: usize, for_ms: u64 },
    /// A node loses its power.
    PowerCut { node: usize, for_ms: u64 },
    /// A guest's QEMU ends, as of a guest that shuts itself down or dies.
    GuestStops { guest: usize },
    /// Somebody starts a guest by hand, if it is off.
    GuestStarts { guest: usize },
    /// Somebody stops a guest and starts it again.
    GuestReboots { guest: usize },
    /// Somebody moves a guest by hand, with its disks: stopped meanwhile.
    GuestMoves { guest: usize, to: usize },
    /// A guest writes more or less memory.
    GuestWrites { guest: usize, mib_s: u64 },
}

/// What an operator asks for.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // As above.
pub enum Ask {
    /// A live migration.
    Live {
        guest: usize,
        to: Option<usize>,
        post_copy: bool,
    },
    /// A cold one.
    Cold {
        guest: usize,
        to: Option<usize>,
        pre_copy: bool,
        force: bool,
    },
    /// That the guest's cold migration is kept.
    Confirm { guest: usize },
    /// That it is taken back.
    Revert { guest: usize },
    /// That the guest is handed to the other project.
    Transfer { guest: usize, live: bool },
    /// That the guest's migration is called off.
    Abort { guest: usize },
    /// That it ends although the guest writes too fast.
    ForceComplete { guest: usize },
    /// That a node is emptied.
    Drain { node: usize, mixed: bool },
    /// That it is filled again.
    Restore { node: usize },
    /// That a dead node's guests start elsewhere; the operator has seen that it is off.
    Evacuate { node: usize },
    /// That load is evened out.
    Balance,
    /// That the newest operation is called off.
    CancelOperation,
}

/// Length of the time in which things happen, ms.
const HORIZON_MS: u64 = 100_000;

impl Plan {
    /// What that seed stands for.
    pub fn draw(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let nodes = pick(&mut rng, &[2, 3, 3, 4, 4, 5]);
        let conductors = pick(&mut rng, &[1, 2, 2, 3]);
        let fence = pick(
            &mut rng,
            &[Fence::None, Fence::Works, Fence::Works, Fence::Fails],
        );
        let guests: Vec<GuestPlan> = (0..rng.usize(1..=5))
            .map(|_| guest(&mut rng, nodes))
            .collect();
        let mut events: Vec<Planned> = (0..rng.usize(4..=16))
            .map(|_| Planned {
                at_ms: moment(&mut rng),
                event: event(&mut rng, (nodes, conductors, guests.len())),
            })
            .collect();
        events.sort_by_key(|planned| planned.at_ms);
        Self {
            seed,
            nodes,
            conductors,
            fence,
            guests,
            events,
        }
    }
}

/// Things come in bursts: half of them in the first seconds, where they meet.
fn moment(rng: &mut Rng) -> u64 {
    match rng.bool() {
        true => rng.u64(..HORIZON_MS / 10),
        false => rng.u64(..HORIZON_MS),
    }
}

fn guest(rng: &mut Rng, nodes: usize) -> GuestPlan {
    GuestPlan {
        node: rng.usize(..nodes),
        runs: rng.u8(..4) > 0,
        disks: pick(
            rng,
            &[
                Disks::Local,
                Disks::Local,
                Disks::Shared,
                Disks::Shared,
                Disks::Project,
            ],
        ),
        dirty_mib_s: pick(rng, &[0, 50, 50, 300, 2000]),
        obeys: rng.u8(..8) > 0,
    }
}

fn pick<T: Clone>(rng: &mut Rng, from: &[T]) -> T {
    from[rng.usize(..from.len())].clone()
}

fn event(rng: &mut Rng, (nodes, conductors, guests): (usize, usize, usize)) -> Event {
    if rng.u8(..100) < 50 {
        return Event::Ask(ask(rng, nodes, guests));
    }
    let node = rng.usize(..nodes);
    let who = match rng.bool() {
        true => Who::Conductor(rng.usize(..conductors)),
        false => Who::Agent(node),
    };
    // Short of every patience, longer than a lease, longer than most patience.
    let for_ms = pick(rng, FOR_MS);
    let kind = pick(rng, KINDS);
    match kind {
        Kind::Kill => Event::Kill { who, for_ms },
        Kind::Freeze => Event::Freeze { who, for_ms },
        Kind::CutOff => Event::CutOff { who, for_ms },
        Kind::CutLink => {
            let b = (node + rng.usize(1..nodes)) % nodes;
            Event::CutLink { a: node, b, for_ms }
        }
        Kind::BadNetwork => Event::BadNetwork { for_ms },
        Kind::WrongClock => {
            let by_ms = pick(
                rng,
                &[-36_000_000, -600_000, -40_000, 40_000, 600_000, 36_000_000],
            );
            // Several conductors on SQLite, as here, hold their leases by their own clocks,
            // which they are not meant to: on PostgreSQL it is the server's.
            let who = match who {
                Who::Conductor(_) if conductors > 1 => Who::Agent(node),
                who => who,
            };
            Event::WrongClock { who, by_ms, for_ms }
        }
        Kind::LoseJournal => Event::LoseJournal { node, for_ms },
        Kind::FullDisk => Event::FullDisk { node, for_ms },
        Kind::FullState => Event::FullState { node, for_ms },
        Kind::RestartLibvirtd => Event::RestartLibvirtd { node },
        Kind::SilentLibvirtd => Event::SilentLibvirtd { node, for_ms },
        Kind::PowerCut => Event::PowerCut { node, for_ms },
        Kind::Guest => {
            let guest = rng.usize(..guests);
            match rng.u8(..6) {
                0 => Event::GuestStops { guest },
                1 => Event::GuestStarts { guest },
                2 => Event::GuestReboots { guest },
                3 => Event::GuestMoves { guest, to: node },
                _ => Event::GuestWrites {
                    guest,
                    mib_s: pick(rng, &[0, 100, 1000, 4000]),
                },
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Kill,
    Freeze,
    CutOff,
    CutLink,
    BadNetwork,
    WrongClock,
    LoseJournal,
    FullDisk,
    FullState,
    RestartLibvirtd,
    SilentLibvirtd,
    PowerCut,
    Guest,
}

/// For how long things last, ms; what stands twice is drawn twice as often.
const FOR_MS: &[u64] = &[
    300, 300, 3_000, 3_000, 20_000, 20_000, 20_000, 60_000, 60_000, 200_000,
];

/// The kinds of faults; the same holds of them.
const KINDS: &[Kind] = &[
    Kind::Kill,
    Kind::Kill,
    Kind::Kill,
    Kind::Freeze,
    Kind::Freeze,
    Kind::CutOff,
    Kind::CutLink,
    Kind::BadNetwork,
    Kind::FullDisk,
    Kind::RestartLibvirtd,
    Kind::SilentLibvirtd,
    Kind::PowerCut,
    Kind::PowerCut,
    Kind::LoseJournal,
    Kind::WrongClock,
    Kind::FullState,
    Kind::Guest,
    Kind::Guest,
    Kind::Guest,
];

fn ask(rng: &mut Rng, nodes: usize, guests: usize) -> Ask {
    let guest = rng.usize(..guests);
    let node = rng.usize(..nodes);
    let to = rng.bool().then_some(node);
    match rng.u8(..100) {
        0..25 => Ask::Live {
            guest,
            to,
            post_copy: rng.bool(),
        },
        25..50 => Ask::Cold {
            guest,
            to,
            pre_copy: rng.bool(),
            force: rng.bool(),
        },
        50..58 => Ask::Confirm { guest },
        58..66 => Ask::Revert { guest },
        66..72 => Ask::Transfer {
            guest,
            live: rng.bool(),
        },
        72..78 => Ask::Abort { guest },
        78..82 => Ask::ForceComplete { guest },
        82..89 => Ask::Drain {
            node,
            mixed: rng.bool(),
        },
        89..92 => Ask::Restore { node },
        92..96 => Ask::Evacuate { node },
        96..98 => Ask::Balance,
        _ => Ask::CancelOperation,
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "seed {}: {} nodes, {} conductors, fence: {:?}",
            self.seed, self.nodes, self.conductors, self.fence
        )?;
        for (number, guest) in self.guests.iter().enumerate() {
            writeln!(f, "  guest {number}: {guest:?}")?;
        }
        for planned in &self.events {
            let at = planned.at_ms;
            writeln!(
                f,
                "  {:>4}.{:03} s  {:?}",
                at / 1000,
                at % 1000,
                planned.event
            )?;
        }
        Ok(())
    }
}

impl Plan {
    /// Whether no event names a conductor that there is not.
    pub fn names_only_what_it_has(&self) -> bool {
        self.events.iter().all(|planned| match planned.event {
            Event::Kill { who, .. }
            | Event::Freeze { who, .. }
            | Event::CutOff { who, .. }
            | Event::WrongClock { who, .. } => match who {
                Who::Conductor(n) => n < self.conductors,
                Who::Agent(n) => n < self.nodes,
            },
            _ => true,
        })
    }
}
