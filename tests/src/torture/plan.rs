//! What a case is, drawn from the run's seed and the case's number alone: the same
//! two are always the same case. Nodes have parts in it, not names, as it begins
//! where the case before has left the guests.

use std::{fmt, time::Duration};

use drover_model::migration::Ending;
use fastrand::Rng;

/// Longer than a lease and than a node may be silent: see `cloud::SETTINGS`.
const PAUSES_MS: std::ops::Range<u64> = 6_500..13_000;
/// Between the end of a process and its next start, as a supervisor would.
const RESTARTS_MS: std::ops::Range<u64> = 0..3_000;

/// A guest of every run.
pub(super) struct Pooled {
    /// Its name, which tells whether its disk is shared.
    pub(super) name: &'static str,
    /// Options of `devstack/guest add`.
    pub(super) options: &'static [&'static str],
}

/// What guests do, which is little: they are emulated.
pub(super) const LOAD: &str =
    "drover.dirty_mib_s=1 drover.mem_mib=8 drover.disk_hz=4 drover.clock_ms=0";

/// The guests; the last one is a project's.
pub(super) const POOL: [Pooled; 5] = [
    Pooled {
        name: "vm31",
        options: &[],
    },
    Pooled {
        name: "vm32",
        options: &["--data-mib", "8"],
    },
    Pooled {
        name: "shared31",
        options: &[],
    },
    Pooled {
        name: "shared32",
        options: &["--raw"],
    },
    Pooled {
        name: "vm33",
        options: &["--project", "alpha"],
    },
];
const SHARED: [usize; 2] = [2, 3];
const OWNED: usize = 4;

/// A node's part in a case, as its first move has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// Where the guest is when it begins.
    Source,
    /// Where it is asked to go.
    Destination,
    /// The other one.
    Third,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    Live,
    Cold { pre_copy: bool, ending: Ending },
    Transfer { live: bool },
    Evacuate { by_itself: bool, back_ms: u64 },
    Drain { mixed: bool },
}

/// One thing that is asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Move {
    /// Which of the pool; of a node that is drained or evacuated one of its guests.
    pub(super) guest: usize,
    pub(super) wish: Wish,
    /// Which of the two other nodes.
    pub(super) to: usize,
    pub(super) bandwidth_mib_s: Option<u32>,
}

/// When something goes wrong.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    /// So many steps of migrations after it began; 0: at once.
    pub(super) step: usize,
    /// And so long after that.
    pub(super) after: Duration,
}

/// A process of Drover's or of the nodes'.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Process {
    Conductor(usize),
    Broker,
    Agent(Part),
    Libvirtd(Part),
    /// The QEMU of the first move's guest.
    Qemu(Part),
}

/// What somebody does to the first move's guest with virsh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hand {
    Destroy,
    Shutdown,
    Start,
    Reset,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Harm {
    Kill { process: Process, back_ms: u64 },
    Pause { process: Process, for_ms: u64 },
    Hand { hand: Hand, at: Part },
    Power { of: Part, back_ms: u64 },
    Link { of: Part, back_ms: u64 },
}

/// One thing that goes wrong.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fault {
    pub(super) when: Moment,
    pub(super) harm: Harm,
}

/// A case.
#[derive(Debug, Clone)]
pub(super) struct Case {
    pub(super) seed: u64,
    pub(super) number: u64,
    /// The first is what faults are about.
    pub(super) moves: Vec<Move>,
    pub(super) faults: Vec<Fault>,
}

impl Case {
    /// That run's case of that number.
    pub(super) fn draw(seed: u64, number: u64) -> Self {
        let mut rng = Rng::with_seed(seed.wrapping_mul(1_000_003).wrapping_add(number));
        let first = first_move(&mut rng);
        let mut moves = vec![first];
        let alone = matches!(first.wish, Wish::Evacuate { .. } | Wish::Drain { .. });
        if !alone && rng.u8(0..100) < 40 {
            moves.push(second_move(&mut rng, first.guest));
        }
        let count = rng.usize(1..=3);
        let faults = (0..count).map(|_| fault(&mut rng)).collect();
        Self {
            seed,
            number,
            moves,
            faults,
        }
    }

    /// Whether a guest may be off, or have started anew, at the end: somebody else than
    /// Drover ended it, or its node's power did.
    pub(super) fn may_be_off(&self, guest: usize, at: impl Fn(Part) -> bool) -> bool {
        let first = self.moves[0].guest == guest;
        let harmed = self.faults.iter().any(|fault| match fault.harm {
            Harm::Kill {
                process: Process::Qemu(_),
                ..
            }
            | Harm::Hand { .. } => first,
            // A cut link may end in its power being cut.
            Harm::Power { of, .. } | Harm::Link { of, .. } => at(of),
            _ => false,
        });
        let dead = matches!(self.moves[0].wish, Wish::Evacuate { .. });
        harmed || (dead && at(Part::Source))
    }

    /// Whether a guest may have started anew, because that was asked for.
    pub(super) fn may_restart(&self, guest: usize) -> bool {
        let own = self.moves.iter().filter(|m| m.guest == guest);
        let cold = own
            .map(|m| m.wish)
            .any(|wish| matches!(wish, Wish::Cold { .. } | Wish::Transfer { live: false }));
        // A drain takes whoever is there.
        cold || matches!(self.moves[0].wish, Wish::Drain { mixed: true })
    }

    /// Whether a node's power may be cut.
    pub(super) fn may_lose_power(&self, part: Part) -> bool {
        let dies = matches!(self.moves[0].wish, Wish::Evacuate { .. }) && part == Part::Source;
        dies || self.faults.iter().any(
            |fault| matches!(fault.harm, Harm::Power { of, .. } | Harm::Link { of, .. } if of == part),
        )
    }
}

fn first_move(rng: &mut Rng) -> Move {
    let (guest, wish) = match rng.u8(0..100) {
        0..34 => (rng.usize(0..POOL.len()), Wish::Live),
        34..62 => (rng.usize(0..POOL.len()), cold(rng)),
        62..76 => (OWNED, Wish::Transfer { live: rng.bool() }),
        76..88 => {
            let wish = Wish::Evacuate {
                by_itself: rng.bool(),
                back_ms: rng.u64(4_000..25_000),
            };
            (SHARED[rng.usize(0..2)], wish)
        }
        _ => {
            let wish = Wish::Drain { mixed: rng.bool() };
            (rng.usize(0..POOL.len()), wish)
        }
    };
    with(rng, guest, wish)
}

fn second_move(rng: &mut Rng, taken: usize) -> Move {
    let guest = (taken + rng.usize(1..POOL.len())) % POOL.len();
    let wish = match rng.bool() {
        true => Wish::Live,
        false => cold(rng),
    };
    with(rng, guest, wish)
}

fn with(rng: &mut Rng, guest: usize, wish: Wish) -> Move {
    Move {
        guest,
        wish,
        to: rng.usize(0..2),
        bandwidth_mib_s: [None, Some(8), Some(24)][rng.usize(0..3)],
    }
}

fn cold(rng: &mut Rng) -> Wish {
    let ending = match rng.bool() {
        true => Ending::Confirm,
        false => Ending::Revert,
    };
    Wish::Cold {
        pre_copy: rng.u8(0..4) == 0,
        ending,
    }
}

fn fault(rng: &mut Rng) -> Fault {
    let when = match rng.u8(0..10) {
        0..6 => Moment {
            step: rng.usize(1..=9),
            after: Duration::from_millis(rng.u64(0..500)),
        },
        _ => Moment {
            step: 0,
            after: Duration::from_millis(rng.u64(0..9_000)),
        },
    };
    Fault {
        when,
        harm: harm(rng),
    }
}

fn harm(rng: &mut Rng) -> Harm {
    let part = match rng.u8(0..10) {
        0..5 => Part::Source,
        5..9 => Part::Destination,
        _ => Part::Third,
    };
    let conductor = Process::Conductor(rng.usize(0..2));
    let back_ms = rng.u64(RESTARTS_MS);
    let for_ms = rng.u64(PAUSES_MS);
    let kill = |process| Harm::Kill { process, back_ms };
    let pause = |process| Harm::Pause { process, for_ms };
    let hand = |hand| Harm::Hand { hand, at: part };
    match rng.u8(0..100) {
        0..17 => kill(conductor),
        17..29 => pause(conductor),
        29..34 => kill(Process::Broker),
        34..38 => pause(Process::Broker),
        38..51 => kill(Process::Agent(part)),
        51..60 => pause(Process::Agent(part)),
        60..70 => kill(Process::Libvirtd(part)),
        70..76 => pause(Process::Libvirtd(part)),
        76..82 => kill(Process::Qemu(part)),
        82..84 => pause(Process::Qemu(part)),
        84..88 => hand(Hand::Destroy),
        88..90 => hand(Hand::Start),
        90..92 => hand(Hand::Shutdown),
        92..94 => hand(Hand::Reset),
        94..97 => Harm::Power {
            of: part,
            back_ms: rng.u64(1_000..15_000),
        },
        _ => Harm::Link {
            of: part,
            back_ms: rng.u64(1_000..15_000),
        },
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "case {} of seed {}:", self.number, self.seed)?;
        for one in &self.moves {
            let name = POOL[one.guest].name;
            write!(f, " {name} {:?}", one.wish)?;
            if let Some(rate) = one.bandwidth_mib_s {
                write!(f, " at {rate} MiB/s")?;
            }
            write!(f, ";")?;
        }
        for Fault { when, harm } in &self.faults {
            write!(
                f,
                " [{}+{} ms: {harm:?}]",
                when.step,
                when.after.as_millis()
            )?;
        }
        Ok(())
    }
}
