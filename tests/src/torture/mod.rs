//! Torture: a devstack on which, case by case, guests are moved in every way while
//! processes are killed, stand still for longer than a lease, lose their power or
//! their network, and guests are stopped and started past Drover. Then everything runs
//! again, nobody does anything, and each guest has to be there, whole, once.
//!
//! [`plan`] draws a case from a seed, [`carry`] carries it out, [`lookout`] looks out
//! for guests that run twice meanwhile, [`judge`] judges by what is seen apart from
//! Drover, [`cloud`] is the devstack.

mod carry;
mod cloud;
mod judge;
mod lookout;
mod plan;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use crate::devstack::Devstack;
use carry::{Parts, Stage};
use cloud::Cloud;
use lookout::Lookout;
use plan::{Case, POOL, Part};

/// What is to be run.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// The run.
    pub seed: u64,
    /// Its first case.
    pub from: u64,
    /// How many.
    pub cases: u64,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    /// How many cases.
    pub cases: u64,
    /// What was wrong, and in which case.
    pub failed: Vec<String>,
}

/// Runs cases on a devstack, with its record at that database, and says what comes of
/// each. The devstack's nodes and guests are the run's alone meanwhile.
///
/// # Errors
/// The devstack cannot be made ready.
pub fn run(devstack: &Devstack, database: &str, asked: Asked) -> Result<Ran, String> {
    let cloud = Cloud::new(devstack, database);
    cloud.make()?;
    let mut failed = Vec::new();
    for number in asked.from..asked.from + asked.cases {
        let case = Case::draw(asked.seed, number);
        let logs = Logs::of(&cloud);
        let began = Instant::now();
        println!("{case}");
        let (said, wrong) = match one(&cloud, &case) {
            Ok(said) => (said, Vec::new()),
            Err(wrong) => (String::new(), wrong),
        };
        let took = began.elapsed().as_secs_f64();
        if wrong.is_empty() {
            println!("  ok in {took:.1} s: {said}");
            continue;
        }
        let kept = logs.keep(&cloud, &case, &wrong);
        for what in &wrong {
            println!("  WRONG: {what}");
        }
        println!("  after {took:.1} s; logs: {}", kept.display());
        failed.push(format!("{case}\n  {}", wrong.join("\n  ")));
        cloud.make()?;
    }
    cloud.leave()?;
    Ok(Ran {
        cases: asked.cases,
        failed,
    })
}

/// One case: what came of its moves, or what is wrong.
fn one(cloud: &Cloud<'_>, case: &Case) -> Result<String, Vec<String>> {
    let begin = || {
        let before = judge::before(cloud)?;
        let parts = Parts::of(cloud, &case.moves[0])?;
        let last = cloud.sql("SELECT coalesce(max(id), 0) FROM migrations")?;
        let last = last.first().and_then(|row| row.parse().ok()).unwrap_or(0);
        Ok((before, parts, last))
    };
    let (before, parts, last) = begin().map_err(|e: String| vec![format!("at the start: {e}")])?;
    let Parts {
        source,
        destination,
        third,
        ..
    } = &parts;
    println!("  {source} to {destination}; the third is {third}");
    let all = [Part::Source, Part::Destination, Part::Third];
    let dark = all.iter().filter(|part| case.may_lose_power(**part));
    let dark: Vec<_> = dark.map(|part| parts.host(*part).to_owned()).collect();
    let lookout = Lookout::default();
    let came = std::thread::scope(|scope| {
        scope.spawn(|| lookout.look(cloud, &dark));
        let came = play(cloud, case, &parts, last);
        lookout.end();
        came
    });
    let mut wrong = lookout.seen();
    match came {
        Err(ref more) => wrong.extend(more.iter().cloned()),
        Ok(_) => wrong.extend(whole(cloud, case, &parts, &before)),
    }
    match wrong.is_empty() {
        true => Ok(came.unwrap_or_default()),
        false => Err(wrong),
    }
}

/// Carries it out, heals everything, and waits for the end.
fn play(cloud: &Cloud<'_>, case: &Case, parts: &Parts, last: u64) -> Result<String, Vec<String>> {
    let began = Instant::now();
    let said = Stage::new(cloud, case, parts, last).play();
    let played = began.elapsed().as_secs_f64();
    for words in said {
        println!("  not so: {}", words.trim().replace('\n', "\n    "));
    }
    cloud.heal().map_err(|e| vec![e])?;
    let declared = ["node", "force-down", &parts.source, "--unset"];
    cloud.drover_surely(&declared).map_err(|e| vec![e])?;
    let healed = began.elapsed().as_secs_f64() - played;
    let rested = judge::rest(cloud, case)?;
    let ends = cloud.sql(&format!(
        "SELECT (record::json->>'instance_name') || ' ' || status || ' ' \
         || left(coalesce(record::json->>'end_reason', ''), 200) FROM migrations \
         WHERE id > {last} ORDER BY id"
    ));
    for host in &cloud.hosts {
        let enable = ["node", "enable", host];
        cloud.drover_surely(&enable).map_err(|e| vec![e])?;
    }
    let ends = ends.map_err(|e| vec![e])?.join("; ");
    Ok(format!(
        "played {played:.1} s, healed {healed:.1} s, at rest after {rested}; {ends}"
    ))
}

/// What is wrong with guests.
fn whole(cloud: &Cloud<'_>, case: &Case, parts: &Parts, before: &[judge::Before]) -> Vec<String> {
    let check = |at: usize| {
        let was_on = |part| parts.host(part) == before[at].host;
        // One that came to a node before that lost its power was there as well.
        let moved = case.moves.iter().any(|one| one.guest == at)
            || matches!(
                case.moves[0].wish,
                plan::Wish::Drain { .. } | plan::Wish::Evacuate { .. }
            );
        let off = case.may_be_off(at, |part| was_on(part) || moved);
        let all = case.may_restart(at);
        Ok(judge::guest(cloud, at, &before[at], (off, all)).err())
    };
    let checked = cloud.each_guest(check).unwrap_or_default();
    checked.into_iter().flatten().collect()
}

/// How long every log was when a case began.
struct Logs(Vec<(PathBuf, u64)>);

impl Logs {
    fn of(cloud: &Cloud<'_>) -> Self {
        let places = cloud.hosts.iter().map(String::as_str).chain(["ctl"]);
        let mut all = Vec::new();
        for place in places {
            let entries = fs::read_dir(cloud.run.join(place));
            for entry in entries.into_iter().flatten().flatten() {
                let path = entry.path();
                if path.extension().is_some_and(|e| e == "log") {
                    let length = entry.metadata().map_or(0, |m| m.len());
                    all.push((path, length));
                }
            }
        }
        Self(all)
    }

    /// What was written since, with the case's plan and the record, in a directory.
    fn keep(&self, cloud: &Cloud<'_>, case: &Case, wrong: &[String]) -> PathBuf {
        let name = format!("torture-{}-{}", case.seed, case.number);
        let kept = std::env::temp_dir().join(name);
        let _ = fs::create_dir_all(&kept);
        let _ = fs::write(kept.join("case"), format!("{case}\n{}\n", wrong.join("\n")));
        for (path, length) in &self.0 {
            let text = fs::read(path).unwrap_or_default();
            let from = usize::try_from(*length).unwrap_or(0).min(text.len());
            let place = path.parent().and_then(Path::file_name).unwrap_or_default();
            let file = path.file_name().unwrap_or_default();
            let name = format!("{}-{}", place.to_string_lossy(), file.to_string_lossy());
            let _ = fs::write(kept.join(name), &text[from..]);
        }
        for table in [
            "migrations",
            "operations",
            "cleanups",
            "claims",
            "saga_events",
            "nodes",
        ] {
            let rows = cloud.sql(&format!("SELECT row_to_json(t) FROM {table} t"));
            let text = rows.map_or_else(|e| e, |rows| rows.join("\n"));
            let _ = fs::write(kept.join(format!("{table}.json")), text);
        }
        for guest in &POOL {
            let console = Command::new("tail")
                .args(["-n", "200"])
                .args(cloud.hosts.iter().map(|host| {
                    let log = format!("var/log/libvirt/qemu/{}.log", guest.name);
                    cloud.state.join(host).join(log)
                }))
                .output();
            let text = console.map(|o| o.stdout).unwrap_or_default();
            let _ = fs::write(kept.join(format!("{}-qemu.log", guest.name)), text);
        }
        kept
    }
}
