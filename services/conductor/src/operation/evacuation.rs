//! What an evacuation needs before a guest may start elsewhere (invariant 1):
//! evidence, a fence that says *off*, and definitions.

use std::time::Duration;

use async_trait::async_trait;
use drover_model::{
    api::{
        compute::{CheckEvacuation, EvacuationFacts, KeptDefinition, ProbeAddress, ProbeAnswer},
        conductor::ListOperations,
    },
    check::{CheckCode, CheckFailure, Side},
    content::CheckedFile,
    ids::{HostName, MigrationId},
    migration::{ProofOfDeath, Requester},
    node::Endpoint,
    operation::{Control, EvacuateOptions, Evidence, FenceAnswer, MoveWay, Reach},
};
use drover_store::{instances::InstanceRow, nodes::NodeRow};
use futures_util::{FutureExt, StreamExt, future::join_all, stream};
use tokio::time::Instant;
use tracing::warn;

use super::evidence::{count, judge, verdict};
use crate::{
    agent_client::AgentClient,
    app::Context,
    checks::{self, content::Both},
    comparing::{self, Patience},
    plan::{Examination, Examinations},
};

/// Nodes that are asked about a guest.
const MOST_ASKED: usize = 16;
/// Questions under way at once.
const AT_ONCE: usize = 8;
/// Nodes that try to reach the one in question at once; all that are up do.
const TRYING_AT_ONCE: usize = 2048;
/// Of those, so many try to reach third nodes too: that they do not reach it counts. Of
/// the others it counts that they do.
const MOST_WITNESSES: usize = 16;
/// Of what they say, so much is kept, the most telling first.
const MOST_KEPT: usize = 16;
/// Third nodes that one who tries has to reach, one of them at least.
const MOST_CONTROLS: usize = 2;
/// How long one of those who try may take.
const PROBE_LIMIT: Duration = Duration::from_secs(5);
/// The same of a node that showed no life before.
const BRIEFLY: Duration = Duration::from_secs(1);
/// Nodes asked about one that was proven dead before.
const LATE_WITNESSES: usize = 3;
/// How long a fencing agent may take to say whether a node has power, as a piece
/// of evidence.
const STATUS_LIMIT: Duration = Duration::from_secs(10);
/// Evidence that took so much longer than its questions may is not of now.
const STALE: Duration = Duration::from_secs(20);

/// What is known of a node without doing anything to it, and everything that
/// stands in the way of evacuating it. A fencing agent is only asked for the
/// status: that it can put the node off shows when it does.
///
/// # Errors
/// There is no such node, or the record cannot be read.
pub async fn inspect(
    context: &Context,
    options: &EvacuateOptions,
    requester: &Requester,
) -> drover_store::Result<(Evidence, Vec<CheckFailure>)> {
    let (evidence, _) = collect(context, options, requester).await?;
    let failures = judge(options, &evidence);
    Ok((evidence, failures))
}

/// Whoever has the last word before a node's power is cut.
#[async_trait]
pub trait LastWord: Sync {
    /// Keeps the evidence, and says what forbids it.
    ///
    /// # Errors
    /// The record cannot be read or written.
    async fn before_cut(&self, evidence: &Evidence) -> drover_store::Result<Vec<CheckFailure>>;
}

/// Makes sure that the node is off, by its fencing agent or by the operator's
/// word; else says why nothing may start elsewhere. Safe to repeat.
///
/// A status of *off* proves nothing by itself: a script that died has the same exit
/// code. So the agent is told *off* in any case, which does nothing to a node that
/// is off; somebody has the last word, right before.
///
/// # Errors
/// There is no such node, or the record cannot be read or written.
pub async fn prove(
    context: &Context,
    options: &EvacuateOptions,
    requester: &Requester,
    last_word: &dyn LastWord,
) -> drover_store::Result<(Evidence, Result<ProofOfDeath, Vec<CheckFailure>>)> {
    let (mut evidence, failures) = fresh(context, options, requester).await?;
    if !failures.is_empty() {
        return Ok((evidence, Err(failures)));
    }
    if evidence.fence != FenceAnswer::NotConfigured {
        let failures = last_word.before_cut(&evidence).await?;
        if !failures.is_empty() {
            return Ok((evidence, Err(failures)));
        }
        cut(context, options, &mut evidence).await?;
    }
    let proof = verdict(options, &evidence);
    Ok((evidence, proof))
}

/// Evidence that is not older than a few seconds, whatever kept this process
/// meanwhile, and what forbids going on with it.
async fn fresh(
    context: &Context,
    options: &EvacuateOptions,
    requester: &Requester,
) -> drover_store::Result<(Evidence, Vec<CheckFailure>)> {
    loop {
        let began = Instant::now();
        let (evidence, failures) = inspect(context, options, requester).await?;
        if began.elapsed() < STALE {
            return Ok((evidence, failures));
        }
    }
}

/// Has the power cut, and looks again: an agent that cut another machine's says
/// *off* as well, and so the node must show no life any more. One that was off by
/// its status and showed none was looked at as such already.
async fn cut(
    context: &Context,
    options: &EvacuateOptions,
    evidence: &mut Evidence,
) -> drover_store::Result<()> {
    let host = &options.host;
    let was_off = evidence.fence.is_off() && evidence.life_signs().is_empty();
    warn!(%host, automatic = options.automatic, was_off, "its power is cut now");
    evidence.cut_at_ms = Some(context.clock.now_ms());
    evidence.fence = context.fences.off(host, &context.clock).await;
    if evidence.fence.is_off() && !was_off {
        // What lives answers at once; what was there before is given more time.
        let limit = match evidence.life_signs().is_empty() {
            true => BRIEFLY,
            false => PROBE_LIMIT,
        };
        let nodes = context.store.nodes().await?;
        if let Some(node) = nodes.iter().find(|n| n.report.host == *host) {
            let (reach, agent) = signs(context, node, &nodes, limit).await;
            (evidence.reach, evidence.agent) = (reach, Some(agent));
            // What it said until its end is no sign of life after it.
            evidence.life = context.store.hearing().state(host).life;
        }
    }
    Ok(())
}

async fn collect(
    context: &Context,
    options: &EvacuateOptions,
    requester: &Requester,
) -> drover_store::Result<(Evidence, NodeRow)> {
    let host = &options.host;
    let node = context.store.node(host).await?;
    let nodes = context.store.nodes().await?;
    let (queue_consumers, fence, (reach, agent)) = tokio::join!(
        context.agents.consumers(host, PROBE_LIMIT),
        context
            .fences
            .status_within(host, &context.clock, STATUS_LIMIT),
        signs(context, &node, &nodes, PROBE_LIMIT),
    );
    // Whoever was heard of meanwhile counts.
    let node = context.store.node(host).await?;
    let nodes = context.store.nodes().await?;
    let live = context.liveness();
    let (nodes_expected, nodes_silent) = count(&nodes, host, live);
    let evidence = Evidence {
        at_ms: context.clock.now_ms(),
        conductor: context.name.clone(),
        listening_ms: context.store.hearing().listened_ms(),
        endpoint: Some(node.report.endpoint.clone()),
        agent_started_ms: node.report.agent_started_ms,
        heard_at_ms: node.heard_at_ms,
        life: node.agent.life,
        silent_ms: live.silent_ms(&node),
        down_after_ms: live.down_after_ms,
        forced_down: node.forced_down,
        queue_consumers,
        reach,
        agent: Some(agent),
        fence,
        cut_at_ms: None,
        confirmed_by: options.confirmed_off.then(|| requester.clone()),
        nodes_expected,
        nodes_silent,
    };
    Ok((evidence, node))
}

/// What other nodes see of a node, and whether its agent answers.
async fn signs(
    context: &Context,
    node: &NodeRow,
    nodes: &[NodeRow],
    limit: Duration,
) -> (Vec<Reach>, Result<(), String>) {
    let host = &node.report.host;
    let live = context.liveness();
    let others: Vec<_> = nodes
        .iter()
        .filter(|n| n.report.host != *host && live.is_up(n))
        .collect();
    let witnesses: Vec<_> = (0..others.len())
        .map(|at| witness(context, &others, at, node, limit).boxed())
        .collect();
    let asking = stream::iter(witnesses).buffered(TRYING_AT_ONCE).collect();
    let (reach, agent) = tokio::join!(asking, context.agents.answers(host, limit));
    (most_telling(reach), agent.map_err(|e| e.message))
}

/// One sign of life outweighs whoever saw none, and one whose word counts whoever
/// cannot tell.
fn most_telling(mut reach: Vec<Reach>) -> Vec<Reach> {
    reach.sort_by_key(|r| std::cmp::Reverse((r.shows_life(), r.counts(), r.answered)));
    reach.truncate(MOST_KEPT);
    reach
}

/// What one of the others sees of a node. The next ones in the list are what a witness
/// has to reach for its word to count.
async fn witness(
    context: &Context,
    others: &[&NodeRow],
    at: usize,
    node: &NodeRow,
    limit: Duration,
) -> Reach {
    let from = &others[at].report.host;
    let most = if at < MOST_WITNESSES {
        MOST_CONTROLS
    } else {
        0
    };
    let thirds = (1..others.len()).take(most);
    let thirds = thirds.map(|next| others[(at + next) % others.len()]);
    let controls: Vec<_> = thirds
        .map(|third| control(context, from, third, limit).boxed())
        .collect();
    let (asked, controls) = tokio::join!(
        probe(context, from, &node.report.endpoint, limit),
        join_all(controls)
    );
    let (answered, refused) = match &asked {
        Ok(answer) => (true, answer.refused),
        Err(_) => (false, false),
    };
    Reach {
        from: from.clone(),
        libvirt: asked.map_or_else(Err, |answer| answer.reached),
        answered,
        refused,
        controls,
        at_ms: context.clock.now_ms(),
    }
}

async fn control(context: &Context, from: &HostName, third: &NodeRow, limit: Duration) -> Control {
    let asked = probe(context, from, &third.report.endpoint, limit).await;
    Control {
        host: third.report.host.clone(),
        reached: asked.map_or_else(Err, |answer| answer.reached),
    }
}

async fn probe(
    context: &Context,
    from: &HostName,
    endpoint: &Endpoint,
    limit: Duration,
) -> Result<ProbeAnswer, String> {
    let ask = ProbeAddress {
        address: endpoint.address.clone(),
        port: endpoint.libvirt_port,
    };
    let answered = context.agents.ask_briefly(from, &ask, limit).await;
    answered.map_err(|error| format!("it did not say: {}", error.message))
}

/// What the other nodes say to each running guest of the node: which of them
/// cannot have it, and why (its disks are not reached there, …).
///
/// # Errors
/// The record cannot be read.
pub async fn examine(
    context: &Context,
    options: &EvacuateOptions,
) -> drover_store::Result<Examinations> {
    let store = &context.store;
    let guests = store.instances(Some(&options.host), None).await?;
    let wanted = guests.into_iter().filter(|guest| {
        let named = options.only.is_empty() || options.only.contains(&guest.id);
        named && guest.power_state.is_active()
    });
    let node = store.node(&options.host).await?;
    let candidates = candidates(context, options).await?;
    let mut found = Examinations::new();
    let examining: Vec<_> = wanted
        .map(|guest| examine_guest(context, guest, &node, &candidates).boxed())
        .collect();
    let mut examining = stream::iter(examining).buffer_unordered(AT_ONCE);
    while let Some(examined) = examining.next().await {
        let (guest, examination) = examined?;
        found.insert(guest.id, examination);
    }
    Ok(found)
}

/// Nodes that are asked: those that the record does not rule out.
async fn candidates(
    context: &Context,
    options: &EvacuateOptions,
) -> drover_store::Result<Vec<HostName>> {
    let live = context.liveness();
    let nodes = context.store.nodes().await?;
    let fit = nodes.into_iter().filter(|node| {
        let host = &node.report.host;
        let named = options.to.is_empty() || options.to.contains(host);
        let closed = checks::node(host, Some(node), Side::Destination, live);
        named && *host != options.host && closed.is_empty()
    });
    Ok(fit.map(|n| n.report.host).take(MOST_ASKED).collect())
}

async fn examine_guest(
    context: &Context,
    guest: InstanceRow,
    node: &NodeRow,
    candidates: &[HostName],
) -> drover_store::Result<(InstanceRow, Examination)> {
    let kept = context.store.kept_definition(guest.id).await?;
    let digest = checks::evacuation::last_digest(node, &guest, kept.as_ref());
    let mut at_source = checks::evacuation::definition(&guest.host, kept.as_ref(), digest);
    let mut examination = Examination::default();
    if let Some(row) = &kept {
        examination.doubt = checks::evacuation::doubt(row, digest);
        let migration = MigrationId::generate();
        let mut answers = Vec::new();
        for host in candidates {
            let answer = ask(&context.agents, migration, &row.kept, host).await;
            match answer {
                Ok(facts) => {
                    let mut failures = checks::evacuation::destination(&row.kept, &facts, host);
                    let of = (&row.kept, &guest.host);
                    let compared = compare(context, of, (host, &facts), Patience::ForPlan).await;
                    failures.extend(compared.0);
                    if !failures.is_empty() {
                        examination.refuse(MoveWay::Evacuate, host.clone(), failures);
                    }
                    answers.push(facts);
                }
                // Another move of it ends first; the node is asked again then.
                Err(failure) if failure.code == CheckCode::InstanceBusy => {}
                Err(failure) => {
                    examination.refuse(MoveWay::Evacuate, host.clone(), vec![failure]);
                }
            }
        }
        at_source.extend(checks::evacuation::alone(&row.kept, &answers, &guest.host));
    }
    if !at_source.is_empty() {
        examination.source.insert(MoveWay::Evacuate, at_source);
    }
    Ok((guest, examination))
}

async fn ask(
    agents: &AgentClient,
    migration: MigrationId,
    kept: &KeptDefinition,
    host: &HostName,
) -> Result<EvacuationFacts, CheckFailure> {
    let ask = CheckEvacuation {
        migration,
        guest: kept.guest.clone(),
        identities: kept.identities.clone(),
        contents: kept.contents.clone(),
    };
    let answered = agents.ask(host, &ask).await;
    answered.map_err(|e| checks::unanswered(host, Side::Destination, &e))
}

/// Compares what a dead node told of the files that a guest only reads with what
/// another has; says what stands in the way, and what was found right.
async fn compare(
    context: &Context,
    (kept, source): (&KeptDefinition, &HostName),
    (host, facts): (&HostName, &EvacuationFacts),
    patience: Patience,
) -> (Vec<CheckFailure>, Vec<CheckedFile>) {
    let both = Both {
        guest: &kept.guest,
        source: (source, &kept.contents),
        dest: (host, &facts.destination.contents),
        brought: &[],
        source_is_dead: true,
    };
    let compared = comparing::complete(&context.agents, both, patience).await;
    let both = compared.view(both);
    let mut failures = match patience {
        Patience::ForPlan => both.known_failures(),
        Patience::Brief | Patience::WhileRead => both.failures(),
    };
    let checked = both.checked().dest;
    failures.extend(compared.failures);
    (failures, checked)
}

/// Every check on one node that may be a guest's new home.
///
/// # Errors
/// The record cannot be read.
pub async fn examine_destination(
    context: &Context,
    agents: &AgentClient,
    migration: MigrationId,
    (kept, source): (&KeptDefinition, &HostName),
    host: &HostName,
) -> drover_store::Result<(Option<NodeRow>, Vec<CheckFailure>, Vec<CheckedFile>)> {
    let row = context.store.known_node(host).await?;
    let live = context.liveness();
    let mut checked = Vec::new();
    let mut failures = checks::node(host, row.as_ref(), Side::Destination, live);
    failures.extend(checks::same_host(source, host));
    if failures.is_empty() {
        match ask(agents, migration, kept, host).await {
            Ok(facts) => {
                failures.extend(checks::evacuation::destination(kept, &facts, host));
                let (wrong, right) =
                    compare(context, (kept, source), (host, &facts), Patience::WhileRead).await;
                failures.extend(wrong);
                checked = right;
            }
            Err(failure) => failures.push(failure),
        }
    }
    Ok((row, failures, checked))
}

/// The proof that a node is off, if an evacuation of it came to one that holds still.
///
/// # Errors
/// The record cannot be read.
pub async fn proven_dead(
    context: &Context,
    host: &HostName,
) -> drover_store::Result<Option<ProofOfDeath>> {
    let node = context.store.known_node(host).await?;
    let Some(node) = node.filter(|node| !context.liveness().is_up(node)) else {
        return Ok(None);
    };
    let evacuations = ListOperations {
        host: Some(host.clone()),
        kind: Some("evacuate".to_owned()),
        ..ListOperations::default()
    };
    let evacuations = context.store.operations(&evacuations).await?;
    // Newest first: what makes it void makes the older ones void.
    let proven = evacuations
        .into_iter()
        .find_map(|o| Some((o.proof?, o.evidence)));
    let Some((proof, evidence)) = proven else {
        return Ok(None);
    };
    let (_, alive) = still_dead(context, host, &proof).await?;
    let is_dead = alive.is_none() && !shows_life(context, &node, evidence.as_ref()).await?;
    Ok(is_dead.then_some(proof))
}

/// Whether some of the other nodes see life in one that showed them none when it was
/// proven dead: it may have been switched on since, with its agent off.
async fn shows_life(
    context: &Context,
    node: &NodeRow,
    then: Option<&Evidence>,
) -> drover_store::Result<bool> {
    if then.is_none_or(|evidence| evidence.reach.iter().any(Reach::shows_life)) {
        return Ok(false);
    }
    let live = context.liveness();
    let nodes = context.store.nodes().await?.into_iter();
    let others = nodes.filter(|other| live.is_up(other) && other.report.host != node.report.host);
    let few: Vec<NodeRow> = others.take(LATE_WITNESSES).collect();
    let (reach, _) = signs(context, node, &few, BRIEFLY).await;
    Ok(reach.iter().any(Reach::shows_life))
}

/// Whether the node of an evacuated guest is still dead, by the record and by
/// its fencing agent: somebody may have switched it on again.
///
/// # Errors
/// The record cannot be read.
pub async fn still_dead(
    context: &Context,
    host: &HostName,
    proof: &ProofOfDeath,
) -> drover_store::Result<(Option<NodeRow>, Option<CheckFailure>)> {
    let status = context.fences.status_shared(host, &context.clock).await;
    // The record has a registration at once, and this process only soon: an agent that
    // came back and was told of no evacuation is seen here.
    let recorded = context.store.agent(host).await?.map(|agent| agent.life());
    let mut row = context.store.known_node(host).await?;
    if let Some(row) = &mut row {
        row.agent.life = row.agent.life.max(recorded);
    }
    let live = context.liveness();
    let failure = checks::evacuation::evacuated_node(host, row.as_ref(), proof, live);
    let failure = failure.or_else(|| checks::evacuation::has_power(host, &status));
    Ok((row, failure))
}
