//! What is known of a node that may be dead, piece by piece.

use drover_model::operation::{Evidence, FenceAnswer, Reach};

use crate::render::{
    clean,
    describe::{facts, who},
    units::{moment, span},
};

/// So many nodes are named.
const NAMED: usize = 4;

/// Each piece a line.
pub fn lines(e: &Evidence) -> Vec<String> {
    let mut pairs = vec![(
        "seen at",
        match e.conductor.as_str() {
            "" => moment(e.at_ms),
            conductor => format!("{} by conductor {}", moment(e.at_ms), clean(conductor)),
        },
    )];
    if e.heard_at_ms > 0 {
        let (heard, since) = (moment(e.heard_at_ms), moment(e.agent_started_ms));
        pairs.push((
            "heard last",
            format!("{heard}, of an agent that runs since {since}"),
        ));
    }
    pairs.extend([
        (
            "silent for",
            format!(
                "{} (counts as down after {})",
                span(e.silent_ms),
                span(e.down_after_ms)
            ),
        ),
        ("declared down", yes_no(e.forced_down).to_owned()),
        ("queue", queue(&e.queue_consumers)),
        ("agent", agent(e.agent.as_ref())),
        ("libvirtd", libvirtd(e)),
        ("fence", fence(&e.fence)),
    ]);
    if let Some(at_ms) = e.cut_at_ms {
        pairs.push(("power cut at", moment(at_ms)));
    }
    let signs = e.life_signs();
    let signs: Vec<_> = signs.iter().map(|(sign, _)| sign.as_str()).collect();
    pairs.push((
        "signs of life",
        if signs.is_empty() {
            "none".to_owned()
        } else {
            signs.join(", ")
        },
    ));
    pairs.extend(
        e.confirmed_by
            .as_ref()
            .map(|by| ("said to be off by", who(by))),
    );
    pairs.push((
        "nodes lost",
        format!("{} of {}", e.nodes_silent, e.nodes_expected),
    ));
    facts(pairs).lines().map(str::to_owned).collect()
}

fn yes_no(is: bool) -> &'static str {
    if is { "yes" } else { "no" }
}

fn queue(consumers: &Result<u32, String>) -> String {
    match consumers {
        Ok(0) => "nobody listens".to_owned(),
        Ok(n) => format!("{n} listening (a broker drops a dead one only after a while)"),
        Err(why) => format!("cannot be told: {}", clean(why)),
    }
}

fn agent(answer: Option<&Result<(), String>>) -> String {
    match answer {
        None => "was not asked".to_owned(),
        Some(Ok(())) => "answers".to_owned(),
        Some(Err(why)) => format!("does not answer: {}", clean(why)),
    }
}

fn libvirtd(e: &Evidence) -> String {
    let reach = &e.reach;
    if reach.is_empty() {
        return "no other node could be asked".to_owned();
    }
    let (reached, not): (Vec<&Reach>, Vec<&Reach>) = reach.iter().partition(|r| r.libvirt.is_ok());
    let reached = reached.iter().map(|r| r.from.to_string());
    let not = not.iter().map(|r| {
        let why = r.libvirt.as_ref().err().map(|why| clean(why));
        format!("{} ({})", r.from, why.unwrap_or_default())
    });
    let parts = [
        ("reached from", some(reached.collect())),
        ("not reached from", some(not.collect())),
        (
            "of no weight, as they reach nobody:",
            some(no_weight(reach)),
        ),
    ];
    let parts = parts.into_iter().filter(|(_, nodes)| !nodes.is_empty());
    let parts = parts.map(|(what, nodes)| format!("{what} {nodes}"));
    parts.collect::<Vec<_>>().join("; ")
}

/// Nodes that answered, and whose word does not count.
fn no_weight(reach: &[Reach]) -> Vec<String> {
    let idle = reach
        .iter()
        .filter(|r| r.answered && r.libvirt.is_err() && !r.counts());
    idle.map(|r| r.from.to_string()).collect()
}

fn some(nodes: Vec<String>) -> String {
    let more = nodes.len().saturating_sub(NAMED);
    let named = nodes.into_iter().take(NAMED).collect::<Vec<_>>().join(", ");
    match more {
        0 => named,
        n => format!("{named} and {n} more"),
    }
}

fn fence(answer: &FenceAnswer) -> String {
    match answer {
        FenceAnswer::NotConfigured => "none is configured for it".to_owned(),
        FenceAnswer::Off { agent, at_ms } => {
            format!("off, says {} at {}", clean(agent), moment(*at_ms))
        }
        FenceAnswer::On { agent } => format!("on, says {}", clean(agent)),
        FenceAnswer::Failed { agent, message } => {
            format!("{} failed: {}", clean(agent), clean(message))
        }
    }
}
