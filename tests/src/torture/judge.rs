//! What became of a case, seen apart from Drover: by virsh on every node, the files
//! of every node, the guests' own accounts, the tables of the record.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use drover_model::migration::Ending;
use serde_json::Value;

use super::{
    cloud::{Cloud, Domain},
    plan::{Case, POOL, Wish},
};

/// Everything is to be at its end so long after everything runs again.
const PATIENCE: Duration = Duration::from_secs(180);
/// What a confirmation or a revert that was refused waits before it is asked for again.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// A guest as it was before.
#[derive(Debug, Clone)]
pub(super) struct Before {
    pub(super) host: String,
    written: u64,
    uptime_ms: u64,
    /// Of its data disk, which it does not write.
    data: Option<String>,
}

fn count(account: &Value, what: &str) -> Result<u64, String> {
    account[what]
        .as_u64()
        .ok_or_else(|| format!("no {what}: {account}"))
}

/// All guests as they are: running, each once.
pub(super) fn before(cloud: &Cloud<'_>) -> Result<Vec<Before>, String> {
    cloud.each_guest(|at| {
        let name = POOL[at].name;
        let place = cloud.place_of(name)?;
        let account = cloud.account(name, "status")?;
        Ok(Before {
            data: data_of(cloud, &place)?,
            host: place.host,
            written: count(&account, "disk_written")?,
            uptime_ms: count(&account, "uptime_ms")?,
        })
    })
}

/// The digest of its data disk, if it has one.
fn data_of(cloud: &Cloud<'_>, place: &Domain) -> Result<Option<String>, String> {
    let disks = disks(cloud, place)?;
    let data = disks.iter().find(|path| path.ends_with("-data.raw"));
    let Some(path) = data else { return Ok(None) };
    let line = cloud.on(&place.host, &["sha256sum", path])?;
    Ok(line.split(' ').next().map(str::to_owned))
}

/// Files of a domain's disks, as its node has them.
fn disks(cloud: &Cloud<'_>, place: &Domain) -> Result<Vec<String>, String> {
    let list = cloud.virsh(
        &place.host,
        &["domblklist", "--inactive", "--details", &place.name],
    )?;
    let paths = list
        .lines()
        .filter_map(|line| line.split_whitespace().last());
    Ok(paths.map(str::to_owned).collect())
}

/// Waits until all has come to rest, and gives what was waited for last; what has not, at
/// the end of patience.
pub(super) fn rest(cloud: &Cloud<'_>, case: &Case) -> Result<String, Vec<String>> {
    let began = Instant::now();
    let mut last = String::new();
    let mut asked: Option<Instant> = None;
    loop {
        if asked.is_none_or(|at| at.elapsed() > ASK_AGAIN) {
            asked = end_finished(cloud, case).then(Instant::now);
        }
        let left = unrest(cloud);
        if left.is_empty() {
            return Ok(format!("{:.1} s{last}", began.elapsed().as_secs_f64()));
        }
        last = left.iter().fold(", the last was".to_owned(), |all, one| {
            format!("{all} {}", one.chars().take(120).collect::<String>())
        });
        if began.elapsed() > PATIENCE {
            return Err(left);
        }
        std::thread::sleep(Duration::from_millis(300));
    }
}

/// Confirms or reverts what waits for that; whether anything did.
fn end_finished(cloud: &Cloud<'_>, case: &Case) -> bool {
    let query = "SELECT record::json->>'instance_name' FROM migrations WHERE status = 'finished'";
    let waiting = cloud.sql(query).unwrap_or_default();
    for name in &waiting {
        let own = case.moves.iter().find(|m| POOL[m.guest].name == name);
        let end: &[&str] = match own.map(|m| m.wish) {
            Some(Wish::Cold {
                ending: Ending::Revert,
                ..
            }) => &["revert", "--yes"],
            _ => &["confirm"],
        };
        // What refuses it shows as what has not come to rest.
        let words = [&["instance"], end, &[name, "--no-wait"]].concat();
        let _ = cloud.drover(&words);
    }
    !waiting.is_empty()
}

/// What has not come to rest, in words.
fn unrest(cloud: &Cloud<'_>) -> Vec<String> {
    let under_way = cloud.sql(
        "SELECT 'migration ' || id || ' of ' || (record::json->>'instance_name') || ' is ' || status \
         || ' at ' || (record::json->>'step') || ' ' || coalesce(record::json->>'end_reason', '') \
         || (record::json->>'warnings') FROM migrations WHERE active = 1 \
         UNION ALL SELECT 'operation ' || id || ' on ' || subject FROM operations WHERE active = 1 \
         UNION ALL SELECT 'a claim of ' || migration_uuid || ' on ' || host FROM claims \
         UNION ALL SELECT 'a claim on a quota' FROM quota_claims \
         UNION ALL SELECT 'tidying ' || step || ' of ' || migration_uuid || ', tried ' || attempts \
         FROM cleanups UNION ALL SELECT 'untold ' || event_type FROM outbox",
    );
    match under_way {
        Err(e) => return vec![e],
        Ok(rows) if !rows.is_empty() => return rows,
        Ok(_) => {}
    }
    let looked = nodes(cloud).and_then(|()| world(cloud));
    looked.unwrap_or_else(|e| vec![e])
}

/// Every node is heard of. (That an agent of before was refused is shown for a minute.)
fn nodes(cloud: &Cloud<'_>) -> Result<(), String> {
    let listed = cloud.json(&["node", "list"])?;
    for node in listed.as_array().into_iter().flatten() {
        let is_well = node["up"] == true
            && node["agent_lost"].is_null()
            && node["report"]["hypervisor"]["state"] == "up";
        if !is_well {
            let host = &node["host"];
            return Err(format!("{host} is not well: {node}"));
        }
    }
    Ok(())
}

/// Each guest once, as the record has it, with its files and nothing else.
fn world(cloud: &Cloud<'_>) -> Result<Vec<String>, String> {
    let (domains, known) = (cloud.domains()?, cloud.known()?);
    let mut wrong = Vec::new();
    let mut files: BTreeSet<PathBuf> = BTreeSet::new();
    for guest in &POOL {
        let own: Vec<_> = domains.iter().filter(|d| d.name == guest.name).collect();
        let [place] = own[..] else {
            wrong.push(format!("{} is at {own:?}", guest.name));
            continue;
        };
        let state = match place.state.as_str() {
            "shut off" => "shutdown",
            other => other,
        };
        if !["running", "shutdown"].contains(&state) {
            wrong.push(format!("{place:?}"));
        }
        // One whose QEMU was killed is off as well.
        let said = known.iter().find(|(name, ..)| name == guest.name);
        let is_so = |power: &str| power == state || (power, state) == ("crashed", "shutdown");
        if !said.is_some_and(|(_, host, power)| *host == place.host && is_so(power)) {
            wrong.push(format!("{place:?}, the record says {said:?}"));
        }
        for disk in disks(cloud, place)? {
            files.insert(real_path(cloud, &place.host, &disk));
        }
    }
    let known_to_us = |d: &&Domain| POOL.iter().any(|guest| guest.name == d.name);
    wrong.extend(
        domains
            .iter()
            .filter(|d| !known_to_us(d))
            .map(|d| format!("{d:?}")),
    );
    for file in found(cloud) {
        if !files.remove(&file) {
            wrong.push(format!("left over: {}", file.display()));
        }
    }
    wrong.extend(files.iter().map(|file| format!("lost: {}", file.display())));
    wrong.extend(processes(cloud, &domains));
    Ok(wrong)
}

/// Each guest that runs has one QEMU, and no other has any.
fn processes(cloud: &Cloud<'_>, domains: &[Domain]) -> Vec<String> {
    let mut wrong = Vec::new();
    for host in &cloud.hosts {
        for guest in &POOL {
            let here = |d: &&Domain| d.host == *host && d.name == guest.name;
            let state = domains.iter().find(here).map(|d| d.state.as_str());
            let wanted = usize::from(state == Some("running"));
            let pids = cloud.qemus(host, guest.name);
            if pids.len() != wanted {
                let name = guest.name;
                wrong.push(format!("{name} is {state:?} on {host}, by QEMUs {pids:?}"));
            }
        }
    }
    wrong
}

/// A path of a node's as the machine has it.
fn real_path(cloud: &Cloud<'_>, host: &str, path: &str) -> PathBuf {
    match Path::new(path).starts_with(&cloud.state) {
        true => path.into(),
        false => cloud.state.join(host).join(path.trim_start_matches('/')),
    }
}

/// Files where disks are, and where agents keep what is unfinished.
fn found(cloud: &Cloud<'_>) -> Vec<PathBuf> {
    let mut all = Vec::new();
    files_below(&cloud.state.join("shared"), &mut all);
    for host in &cloud.hosts {
        let node = cloud.state.join(host);
        files_below(&node.join("var/lib/libvirt/images"), &mut all);
        files_below(&node.join("var/lib/libvirt/projects"), &mut all);
        files_below(&node.join("var/lib/drover"), &mut all);
    }
    let usual = [
        "base.qcow2",
        ".drover-storage",
        "identity.json",
        "boot.json",
        "storage.json",
        "lock",
    ];
    all.retain(|path| {
        let name = path.file_name().unwrap_or_default();
        let remembered = path.components().any(|part| part.as_os_str() == "seen");
        !remembered && !usual.iter().any(|usual| name == *usual)
    });
    all
}

fn files_below(directory: &Path, all: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files_below(&entry.path(), all),
            _ => all.push(entry.path()),
        }
    }
}

/// Whether a guest is whole, and runs if it has to; one that may be off is started.
pub(super) fn guest(
    cloud: &Cloud<'_>,
    at: usize,
    before: &Before,
    (may_be_off, may_restart): (bool, bool),
) -> Result<(), String> {
    let name = POOL[at].name;
    let place = cloud.place_of(name)?;
    if data_of(cloud, &place)? != before.data {
        return Err(format!("{name}'s data disk has other bytes"));
    }
    if place.state != "running" {
        if !may_be_off {
            return Err(format!("{place:?}, and nobody but Drover touched it"));
        }
        for disk in disks(cloud, &place)?
            .iter()
            .filter(|path| path.ends_with(".qcow2"))
        {
            cloud.on(&place.host, &["qemu-img", "check", "-q", disk])?;
        }
        cloud.devstack("guest", &[name, "start"])?;
    }
    cloud.devstack("guest", &[name, "await"])?;
    let account = cloud.account(name, "check")?;
    let written = count(&account, "disk_written")?;
    let whole = account["mem_ok"] == true && account["disk_ok"] == true;
    if !whole || written < before.written || count(&account, "disk_foreign")? > 0 {
        return Err(format!("{name}, of {before:?}, is not whole: {account}"));
    }
    let restarted = count(&account, "uptime_ms")? < before.uptime_ms;
    if restarted && !may_be_off && !may_restart {
        return Err(format!(
            "{name} started anew, which nobody asked for: {account}"
        ));
    }
    Ok(())
}
