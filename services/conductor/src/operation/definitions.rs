//! Definitions of all instances, kept while their nodes live, for the day on
//! which one is dead.
//!
//! Every report tells a digest of each definition. One that is another than what
//! is kept is fetched from its node in the background, by one worker; what fails,
//! or has files that its node is still reading, is asked for again with the next
//! report.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use drover_model::{
    api::compute::{GetDefinition, InstanceOnNode},
    content::FileContent,
    ids::{HostName, InstanceId},
    node::{HypervisorReport, NodeReport},
};
use drover_store::{StoreError, nodes::ReportPlace};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::app::Context;

/// Definitions that wait to be fetched; what comes beyond waits for a later report.
const MAX_WANTED: usize = 100_000;
/// Time between two looks for what need no longer be kept.
const PRUNE_AFTER: Duration = Duration::from_secs(600);

type Digests = BTreeMap<InstanceId, String>;

/// What is to be fetched. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Definitions(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    book: Mutex<Book>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Book {
    /// What the record is known to hold: so most reports cost nothing.
    kept: HashMap<InstanceId, (HostName, String)>,
    wanted: BTreeMap<HostName, Digests>,
    waiting: usize,
    /// Why those were not told that were asked for in vain: said once each.
    untold: HashMap<InstanceId, String>,
}

impl Book {
    fn feed(&mut self, report: &NodeReport) -> bool {
        let HypervisorReport::Up { instances, .. } = &report.hypervisor else {
            return false;
        };
        // What waits from an older report is in this one, or is gone.
        let old = self.wanted.remove(&report.host).unwrap_or_default();
        self.waiting -= old.len();
        let mut wanted = Digests::new();
        for seen in instances.iter().filter(|seen| !seen.incoming) {
            let Some(digest) = &seen.definition_digest else {
                continue;
            };
            let kept = self.kept.get(&seen.id);
            let is_kept = kept.is_some_and(|(h, d)| *h == report.host && d == digest);
            if !is_kept && self.waiting + wanted.len() < MAX_WANTED {
                wanted.insert(seen.id, digest.clone());
            }
        }
        self.waiting += wanted.len();
        let any = !wanted.is_empty();
        if any {
            self.wanted.insert(report.host.clone(), wanted);
        }
        any
    }

    fn want(&mut self, id: InstanceId, host: &HostName) {
        if self.waiting < MAX_WANTED {
            let of_host = self.wanted.entry(host.clone()).or_default();
            // No definition has this digest.
            self.waiting += usize::from(of_host.insert(id, String::new()).is_none());
        }
    }

    fn next(&mut self) -> Option<(HostName, Digests)> {
        let (host, wanted) = self.wanted.pop_first()?;
        self.waiting -= wanted.len();
        Some((host, wanted))
    }
}

impl Definitions {
    /// Takes in a report.
    pub fn feed(&self, report: &NodeReport) {
        if self.lock().feed(report) {
            self.0.changed.notify_one();
        }
    }

    /// An instance is on another node now. Its definition is asked for at once: what
    /// was kept is the other node's, and the next report may come too late.
    pub fn moved(&self, id: InstanceId, host: &HostName) {
        self.lock().want(id, host);
        self.0.changed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        self.0.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept(&self, id: InstanceId, host: &HostName, digest: String) {
        self.lock().kept.insert(id, (host.clone(), digest));
    }

    /// It was told.
    fn told(&self, id: InstanceId) {
        self.lock().untold.remove(&id);
    }

    /// It was not told; says whether that is news.
    fn untold(&self, id: InstanceId, why: &str) -> bool {
        let before = self.lock().untold.insert(id, why.to_owned());
        before.as_deref() != Some(why)
    }

    /// Forgets instances that are no longer on the record.
    fn prune(&self, known: impl Fn(&InstanceId) -> bool) {
        let mut book = self.lock();
        book.kept.retain(|id, _| known(id));
        book.untold.retain(|id, _| known(id));
    }
}

/// Fetches until told to stop.
pub async fn keep(context: Context, stop: CancellationToken) {
    let definitions = context.definitions.clone();
    let mut pruned = Instant::now();
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = definitions.0.changed.notified() => {}
        }
        if pruned.elapsed() >= PRUNE_AFTER {
            pruned = Instant::now();
            if let Err(error) = prune(&context).await {
                warn!(%error, "instances that are gone are still remembered");
            }
        }
        loop {
            // Not in the loop's head: the book would be locked all through it.
            let next = definitions.lock().next();
            let Some((host, wanted)) = next else {
                break;
            };
            let fetched = fetch(&context, &host, wanted);
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                fetched = fetched => if let Err(error) = fetched {
                    warn!(%host, %error, "definitions could not be kept; tried again with its next report");
                },
            }
        }
    }
}

async fn fetch(context: &Context, host: &HostName, wanted: Digests) -> Result<(), StoreError> {
    let store = &context.store;
    let definitions = &context.definitions;
    let known: HashMap<_, _> = store.definition_digests(host).await?.into_iter().collect();
    for (id, digest) in wanted {
        if known.get(&id) == Some(&digest) {
            definitions.kept(id, host, digest);
            continue;
        }
        // A copy that was left behind must not speak for the one that lives.
        let row = match store.find_instance(&id.to_string()).await {
            Ok(row) => row,
            Err(StoreError::NotFound(_)) => continue,
            Err(error) => return Err(error),
        };
        if row.host != *host {
            continue;
        }
        let node = store.known_node(host).await?;
        let after = node.as_ref().map(|node| ReportPlace::from(&node.report));
        match context
            .agents
            .ask(host, &GetDefinition(InstanceOnNode { instance: id }))
            .await
        {
            Ok(mut kept) => {
                definitions.told(id);
                let is_whole = !kept.contents.iter().any(FileContent::is_working);
                if !is_whole {
                    // No definition has this digest: it is asked for again.
                    kept.digest.clear();
                }
                let now_ms = context.clock.now_ms();
                if store.keep_definition(host, &kept, after, now_ms).await? && is_whole {
                    definitions.kept(id, host, kept.digest);
                }
            }
            Err(error) => {
                if definitions.untold(id, &error.message) {
                    warn!(%host, instance = %id, %error, "its definition was not told: what is kept of it may be old");
                }
                if !error.answered {
                    // The others would wait for the same silence.
                    return Ok(());
                }
            }
        }
    }
    Ok(())
}

/// Forgets instances that are gone. Their definitions outlive them for a while.
async fn prune(context: &Context) -> Result<(), StoreError> {
    let rows = context.store.instances(None, None).await?;
    let ids: std::collections::HashSet<_> = rows.into_iter().map(|row| row.id).collect();
    context.definitions.prune(|id| ids.contains(id));
    Ok(())
}

#[cfg(test)]
mod tests {
    use drover_model::{guest::PowerState, node::InstanceReport};
    use uuid::Uuid;

    use super::*;
    use crate::tests_support::node_row;

    fn report(host: &str, digests: &[(u128, &str)]) -> NodeReport {
        let mut report = node_row(host, 1).report;
        let seen = |(n, digest): &(u128, &str)| InstanceReport {
            id: InstanceId(Uuid::from_u128(*n)),
            name: String::new(),
            project: String::new(),
            generation: 0,
            power_state: PowerState::Running,
            incoming: false,
            vcpus: 1,
            memory_mib: 1,
            disk_bytes: 0,
            migration: None,
            wishes: drover_model::node::Wishes::default(),
            usage: None,
            definition_digest: (!digest.is_empty()).then(|| (*digest).to_owned()),
            autostart: false,
            unreadable: None,
        };
        report.hypervisor = HypervisorReport::Up {
            inventory: drover_model::node::Inventory {
                hypervisor_type: "QEMU".into(),
                hypervisor_version: 1,
                libvirt_version: 1,
                arch: "x86_64".into(),
                cpu_model: String::new(),
                kvm: false,
                vcpus: 1,
                memory_mib: 1,
                disk_bytes: 1,
                disk_free_bytes: 1,
            },
            instances: digests.iter().map(seen).collect(),
        };
        report
    }

    fn wanted(book: &mut Book) -> Vec<u128> {
        let next = book.next().map(|(_, wanted)| wanted).unwrap_or_default();
        next.keys().map(|id| id.0.as_u128()).collect()
    }

    #[test]
    fn what_is_kept_is_fetched_once_and_what_changed_again() {
        let kvm1: HostName = "kvm1".parse().unwrap();
        let mut book = Book::default();
        assert!(book.feed(&report("kvm1", &[(1, "a"), (2, "b"), (3, "")])));
        assert!(book.feed(&report("kvm1", &[(1, "a"), (2, "b")])));
        assert_eq!(wanted(&mut book), [1, 2], "twice told is wanted once");
        assert_eq!(book.waiting, 0);
        for (n, digest) in [(1, "a"), (2, "b")] {
            let id = InstanceId(Uuid::from_u128(n));
            book.kept.insert(id, (kvm1.clone(), digest.to_owned()));
        }
        assert!(!book.feed(&report("kvm1", &[(1, "a"), (2, "b")])));
        assert!(book.feed(&report("kvm1", &[(1, "a"), (2, "c")])));
        assert_eq!(wanted(&mut book), [2]);
        assert!(book.feed(&report("kvm2", &[(1, "a")])), "it has moved");
        assert!(!book.feed(&report("kvm2", &[])), "and is gone again");
        assert_eq!(book.next(), None);
        for _ in 0..2 {
            book.want(InstanceId(Uuid::from_u128(2)), &kvm1);
        }
        assert_eq!(wanted(&mut book), [2], "it was moved to where it is");
        assert_eq!(book.waiting, 0);
    }

    #[test]
    fn what_is_not_told_is_said_once_for_each_reason() {
        let (definitions, id) = (Definitions::default(), InstanceId(Uuid::from_u128(1)));
        assert!(definitions.untold(id, "its storage hangs"));
        assert!(!definitions.untold(id, "its storage hangs"));
        assert!(definitions.untold(id, "no such guest"));
        definitions.told(id);
        assert!(definitions.untold(id, "no such guest"));
    }
}
