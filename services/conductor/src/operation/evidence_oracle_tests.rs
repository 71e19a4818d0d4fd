//! Every combination of evidence against rules written down as data: each row
//! says when it applies and what it forbids. Nothing here calls what is tested.

use drover_model::operation::{Control, Reach};

use super::*;

/// What an agent does.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Agent {
    Answers,
    Silent,
    NotAsked,
}

/// What the broker says of its queue.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Queue {
    Empty,
    Consumed,
    Unknown,
}

/// What the other nodes see.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Witnesses {
    None,
    DoNotAnswer,
    ReachNobody,
    Unreached,
    OneUnreachedOneUnanswered,
    OneReaches,
    Refused,
}

/// What the fencing agent says of the power.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Power {
    NoAgent,
    On,
    Off,
    Unknown,
}

/// Who asks, and what is overruled.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Asked {
    Unattended,
    Operator { confirms: bool, despite: Despite },
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Despite {
    Nothing,
    WhatIsSeen,
    All,
    Many,
}

#[derive(Debug, Clone, Copy)]
struct Case {
    agent: Agent,
    queue: Queue,
    witnesses: Witnesses,
    /// Silent nodes of four, this one among them.
    lost: u32,
    power: Power,
    asked: Asked,
    down: bool,
    listened: bool,
}

const AGENTS: [Agent; 3] = [Agent::Answers, Agent::Silent, Agent::NotAsked];
const QUEUES: [Queue; 3] = [Queue::Empty, Queue::Consumed, Queue::Unknown];
const WITNESSES: [Witnesses; 7] = [
    Witnesses::None,
    Witnesses::DoNotAnswer,
    Witnesses::ReachNobody,
    Witnesses::Unreached,
    Witnesses::OneUnreachedOneUnanswered,
    Witnesses::OneReaches,
    Witnesses::Refused,
];
const POWERS: [Power; 4] = [Power::NoAgent, Power::On, Power::Off, Power::Unknown];
const DESPITES: [Despite; 4] = [
    Despite::Nothing,
    Despite::WhatIsSeen,
    Despite::All,
    Despite::Many,
];

fn cases() -> Vec<Case> {
    let mut askeds = vec![Asked::Unattended];
    for confirms in [false, true] {
        askeds.extend(DESPITES.map(|despite| Asked::Operator { confirms, despite }));
    }
    let mut cases = vec![];
    for agent in AGENTS {
        for queue in QUEUES {
            for witnesses in WITNESSES {
                for lost in 1..=4 {
                    for power in POWERS {
                        for asked in askeds.clone() {
                            for (down, listened) in
                                [(true, true), (true, false), (false, true), (false, false)]
                            {
                                cases.push(Case {
                                    agent,
                                    queue,
                                    witnesses,
                                    lost,
                                    power,
                                    asked,
                                    down,
                                    listened,
                                });
                            }
                        }
                    }
                }
            }
        }
    }
    cases
}

impl Case {
    fn unattended(self) -> bool {
        self.asked == Asked::Unattended
    }

    fn confirmed(self) -> bool {
        matches!(self.asked, Asked::Operator { confirms: true, .. })
    }

    fn despite(self) -> Despite {
        match self.asked {
            Asked::Unattended => Despite::Nothing,
            Asked::Operator { despite, .. } => despite,
        }
    }

    fn reach(self) -> Vec<Reach> {
        let lonely = |from: &str| Reach {
            controls: vec![Control {
                host: host("kvm9"),
                reached: Err("timed out".into()),
            }],
            ..unreached(from)
        };
        let mute = |from: &str| Reach {
            answered: false,
            ..lonely(from)
        };
        match self.witnesses {
            Witnesses::None => vec![],
            Witnesses::DoNotAnswer => vec![mute("kvm2"), mute("kvm3")],
            Witnesses::ReachNobody => vec![lonely("kvm2"), lonely("kvm3")],
            Witnesses::Unreached => vec![unreached("kvm2"), unreached("kvm3")],
            Witnesses::OneUnreachedOneUnanswered => vec![mute("kvm2"), unreached("kvm3")],
            Witnesses::OneReaches => {
                let reached = Reach {
                    libvirt: Ok(()),
                    ..unreached("kvm3")
                };
                vec![unreached("kvm2"), reached]
            }
            Witnesses::Refused => {
                let refused = Reach {
                    refused: true,
                    ..unreached("kvm3")
                };
                vec![unreached("kvm2"), refused]
            }
        }
    }

    fn evidence(self) -> Evidence {
        Evidence {
            listening_ms: if self.listened { 600_000 } else { 30_000 },
            silent_ms: if self.down { 60_000 } else { 30_000 },
            queue_consumers: match self.queue {
                Queue::Empty => Ok(0),
                Queue::Consumed => Ok(1),
                Queue::Unknown => Err("no answer".into()),
            },
            reach: self.reach(),
            agent: match self.agent {
                Agent::Answers => Some(Ok(())),
                Agent::Silent => Some(Err("no answer".into())),
                Agent::NotAsked => None,
            },
            fence: match self.power {
                Power::NoAgent => FenceAnswer::NotConfigured,
                Power::On => on(),
                Power::Off => off(),
                Power::Unknown => failed(),
            },
            nodes_expected: 4,
            nodes_silent: self.lost,
            ..silent()
        }
    }

    fn options(self) -> EvacuateOptions {
        let seen = || {
            let mut seen = vec![];
            if self.agent == Agent::Answers {
                seen.push(LifeSign::AgentAnswers);
            }
            match self.witnesses {
                Witnesses::OneReaches => seen.push(LifeSign::LibvirtReachable),
                Witnesses::Refused => seen.push(LifeSign::HostResponds),
                _ => {}
            }
            seen
        };
        EvacuateOptions {
            automatic: self.unattended(),
            despite: match self.despite() {
                Despite::Nothing | Despite::Many => vec![],
                Despite::WhatIsSeen => seen(),
                Despite::All => LifeSign::ALL.to_vec(),
            },
            ..options(self.confirmed(), self.despite() == Despite::Many)
        }
    }

    fn shows_life(self) -> bool {
        self.agent == Agent::Answers
            || matches!(self.witnesses, Witnesses::OneReaches | Witnesses::Refused)
    }
}

type When = fn(Case) -> bool;

/// What forbids that anything is done to the node: when, and the reason.
const FORBIDDEN: &[(&str, CheckCode, When)] = &[
    ("it was just heard of", CheckCode::HostUp, |c| !c.down),
    ("most nodes are lost", CheckCode::TooManyLost, |c| {
        c.lost >= 3 && c.despite() != Despite::Many
    }),
    (
        "an operator, and nobody answers",
        CheckCode::TooManyLost,
        |c| {
            !c.unattended()
                && c.witnesses == Witnesses::DoNotAnswer
                && matches!(c.power, Power::On | Power::Unknown)
                && c.despite() != Despite::Many
        },
    ),
    ("unattended, life", CheckCode::HostAlive, |c| {
        c.unattended() && c.shows_life()
    }),
    (
        "unattended, the agent not asked",
        CheckCode::NoEvidence,
        |c| c.unattended() && c.agent == Agent::NotAsked,
    ),
    (
        "unattended, the conductor was deaf",
        CheckCode::NoEvidence,
        |c| c.unattended() && !c.listened,
    ),
    ("unattended, no witness", CheckCode::NoEvidence, |c| {
        let without = [
            Witnesses::None,
            Witnesses::DoNotAnswer,
            Witnesses::ReachNobody,
        ];
        c.unattended() && without.contains(&c.witnesses)
    }),
    ("nothing can cut its power", CheckCode::NotFenced, |c| {
        c.power == Power::NoAgent && !c.confirmed()
    }),
    ("life that nobody named", CheckCode::HostAlive, |c| {
        let named = matches!(c.despite(), Despite::WhatIsSeen | Despite::All);
        !c.unattended() && c.power != Power::NoAgent && c.shows_life() && !named
    }),
    ("life that nothing can end", CheckCode::HostAlive, |c| {
        c.confirmed() && c.power == Power::NoAgent && c.shows_life()
    }),
    ("what is not there was named", CheckCode::Options, |c| {
        // Not all three are ever seen at once.
        c.despite() == Despite::All
    }),
];

/// What makes the node count as off once its agent has answered so: the first row
/// that applies.
const PROVEN: &[(&str, Option<&str>, When)] = &[
    ("power is seen", None, |c| c.power == Power::On),
    ("life is seen", None, Case::shows_life),
    ("the fence says off", Some("fence"), |c| {
        c.power == Power::Off
    }),
    (
        "an operator answers for it",
        Some("operator"),
        Case::confirmed,
    ),
    ("nobody does", None, |_| true),
];

#[test]
fn every_combination_of_evidence_is_judged_by_the_rules() {
    let (mut allowed, mut all) = (0, 0);
    for case in cases() {
        all += 1;
        let rules = FORBIDDEN.iter().filter(|(.., when)| when(case));
        let mut expected: Vec<_> = rules.map(|(_, code, _)| *code).collect();
        let mut found = codes(&judge(&case.options(), &case.evidence()));
        for codes in [&mut expected, &mut found] {
            codes.sort();
            codes.dedup();
        }
        assert_eq!(found, expected, "{case:?}");
        allowed += usize::from(found.is_empty());
        let rule = PROVEN.iter().find(|(.., when)| when(case)).unwrap();
        let proof = verdict(&case.options(), &case.evidence()).ok();
        let proof = proof.map(|proof| match proof {
            ProofOfDeath::Fence { .. } => "fence",
            ProofOfDeath::Operator { .. } => "operator",
        });
        assert_eq!(proof, rule.1, "{}: {case:?}", rule.0);
    }
    assert!(all > 30_000 && allowed > 1000, "{allowed} of {all}");
}

/// The rule by itself: unattended, nothing is done to a node that shows life, or of
/// which nobody can say that it does not.
#[test]
fn unattended_nothing_is_done_to_what_may_live() {
    for case in cases().into_iter().filter(|c| c.unattended()) {
        if judge(&case.options(), &case.evidence()).is_empty() {
            let gone = [Witnesses::Unreached, Witnesses::OneUnreachedOneUnanswered];
            assert!(
                case.agent == Agent::Silent
                    && gone.contains(&case.witnesses)
                    && case.lost <= 2
                    && case.down
                    && case.listened
                    && case.power != Power::NoAgent,
                "{case:?}"
            );
        }
    }
}
