//! `drover node`: what nodes there are, and whether they take instances. What
//! moves their guests is in [`operate`].

use drover_model::{
    api::conductor::{ForceDown, ForgetNode, ListOperations, Node, SetNode},
    operation::Operation,
};

use super::{Session, operate};
use crate::{
    args::{Change, NodeVerb, operation as order},
    client::Listed,
    exit::{Exit, Trouble},
    render::{clean, describe, screen::Manner, table},
};

/// So many operations are looked at to tell what became of nodes.
const LOOKED_AT: u32 = 200;

/// Runs a verb.
pub async fn run(session: &mut Session, verb: NodeVerb) -> Result<Exit, Trouble> {
    match verb {
        NodeVerb::List => {
            let nodes = session.client.list_nodes().await?;
            let operations = operations(session, &nodes).await;
            session
                .screen
                .value(&nodes, |nodes| table::nodes(nodes, &operations))?;
        }
        NodeVerb::Show { host } => {
            let node = session.client.get_node(&host).await?;
            let operations = operations(session, std::slice::from_ref(&node)).await;
            session
                .screen
                .value(&node, |node| describe::node(node, &operations))?;
        }
        NodeVerb::Disable {
            host,
            reason,
            change,
        } => {
            set(
                session,
                SetNode {
                    host,
                    enabled: false,
                    reason,
                },
                change,
            )
            .await?;
        }
        NodeVerb::Drain(order) => return operate::drain(session, *order).await,
        NodeVerb::Restore(order) => return operate::restore(session, order).await,
        NodeVerb::Evacuate(order) => return operate::evacuate(session, order).await,
        NodeVerb::Balance(order) => return operate::balance(session, order).await,
        NodeVerb::Automation(order) => return operate::automation(session, order).await,
        NodeVerb::ForceDown(order) => force_down(session, order).await?,
        NodeVerb::Forget {
            host,
            despite_lost_guests,
            change,
        } => {
            let request = ForgetNode {
                host,
                dry_run: change.dry_run,
                despite_lost_guests,
            };
            forget(session, request).await?;
        }
        NodeVerb::Enable { host, change } => {
            set(
                session,
                SetNode {
                    host,
                    enabled: true,
                    reason: None,
                },
                change,
            )
            .await?;
        }
    }
    Ok(Exit::Done)
}

/// Operations that tell what the nodes are about, newest first: those under way,
/// and where a node is closed or down also past ones. JSON tells nodes alone. A
/// conductor that does not tell takes nothing from the nodes.
async fn operations(session: &Session, nodes: &[Node]) -> Vec<Operation> {
    if session.screen.manner() == Manner::Json {
        return Vec::new();
    }
    let host = match nodes {
        [node] => Some(node.host.clone()),
        _ => None,
    };
    let which = ListOperations {
        active: nodes.iter().all(|node| node.enabled && node.up),
        limit: Some(LOOKED_AT),
        host,
        ..ListOperations::default()
    };
    session
        .client
        .list_operations(&which)
        .await
        .map(Listed::into_known)
        .unwrap_or_default()
}

async fn force_down(session: &mut Session, order: order::ForceDown) -> Result<(), Trouble> {
    let (host, forced_down) = (order.host, !order.unset);
    if order.change.dry_run {
        let node = session.client.get_node(&host).await?;
        return session
            .screen
            .value(&node, |node| would_count(node, forced_down));
    }
    let request = ForceDown { host, forced_down };
    let node = session.client.force_down(&request).await?;
    session.screen.value(&node, counts)
}

async fn forget(session: &mut Session, request: ForgetNode) -> Result<(), Trouble> {
    let node = session.client.get_node(&request.host).await?;
    session.client.forget_node(&request).await?;
    session.screen.value(&node, |node| match request.dry_run {
        true => format!("{} would be forgotten", node.host),
        false => format!("{} is forgotten", node.host),
    })
}

fn would_count(node: &Node, forced_down: bool) -> String {
    let host = &node.host;
    match (node.forced_down == forced_down, forced_down) {
        (true, true) => format!("{host} is declared down already: nothing would change"),
        (true, false) => format!("{host} is not declared down: nothing would change"),
        (false, true) => format!(
            "{host} would be declared down; it is {} now",
            table::state(node)
        ),
        (false, false) => format!("{host} would count as up again once it reports"),
    }
}

fn counts(node: &Node) -> String {
    let host = &node.host;
    match (node.forced_down, node.up) {
        (true, _) => format!(
            "{host} is declared down: no guest moves there or from there until \
             `drover node force-down {host} --unset`\n  \
             to start its guests elsewhere: `drover node evacuate {host}`"
        ),
        (false, true) => format!("{host} is up"),
        (false, false) => format!("{host} is not declared down; it counts as up once it reports"),
    }
}

/// The conductor answers when it is done: there is nothing to wait for.
async fn set(session: &mut Session, request: SetNode, change: Change) -> Result<(), Trouble> {
    if change.dry_run {
        let node = session.client.get_node(&request.host).await?;
        return session
            .screen
            .value(&node, |node| would_be(node, request.enabled));
    }
    let node = session.client.set_node(&request).await?;
    session.screen.value(&node, is_now)
}

fn would_be(node: &Node, enabled: bool) -> String {
    let (host, now) = (&node.host, table::placing(node));
    match (node.enabled == enabled, enabled) {
        (true, _) => format!("{host} is {now} already: nothing would change"),
        (false, true) => format!(
            "{host} would be enabled; it is disabled now{}",
            because(node)
        ),
        (false, false) => format!("{host} would be disabled; it is enabled now"),
    }
}

fn is_now(node: &Node) -> String {
    let host = &node.host;
    match (node.enabled, node.instances.unwrap_or(0)) {
        (true, _) => format!("{host} is enabled"),
        (false, 0) => format!("{host} is disabled{}", because(node)),
        (false, n) => format!(
            "{host} is disabled{}; {n} instances stay on it",
            because(node)
        ),
    }
}

fn because(node: &Node) -> String {
    let reason = node.disabled_reason.as_deref().map(clean);
    reason.map_or_else(String::new, |reason| format!(" ({reason})"))
}
