//! Holds the shape of the workspace: who depends on whom, and who alone may
//! name a foreign thing (`docs/architecture.md`).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

/// Which of our crates a crate may use.
const EDGES: &[(&str, &[&str])] = &[
    ("drover-carrier", &[]),
    ("drover-model", &[]),
    ("drover-rpc", &[]),
    ("drover-runtime", &[]),
    ("drover-saga", &["drover-model"]),
    ("drover-store", &["drover-model", "drover-saga"]),
    (
        "drover-conductor",
        &[
            "drover-model",
            "drover-rpc",
            "drover-runtime",
            "drover-saga",
            "drover-store",
        ],
    ),
    (
        "drover-compute",
        &[
            "drover-carrier",
            "drover-model",
            "drover-rpc",
            "drover-runtime",
        ],
    ),
    (
        "drover-cli",
        &["drover-model", "drover-rpc", "drover-runtime"],
    ),
];

/// Who alone may depend on a foreign crate.
const OWNERS: &[(&str, &[&str])] = &[
    ("lapin", &["drover-rpc", "drover-tests"]),
    ("sqlx", &["drover-store"]),
    ("rusqlite", &["drover-store"]),
    ("virt", &["drover-compute"]),
];

/// Names that may stand in code only below a folder.
const PLACES: &[(&str, &[&str])] = &[
    ("lapin::", &["common/rpc/src/amqp", "tests/src/bin"]),
    ("sqlx::", &["common/store/src", "common/store/tests"]),
    ("rusqlite::", &["common/store/src/here.rs"]),
    ("virt::", &["services/compute/src/hypervisor/libvirt"]),
    (
        "unsafe {",
        &[
            "services/compute/src/hypervisor/libvirt",
            "tests/src/swarm/entropy.rs",
        ],
    ),
    (
        "allow(unsafe_code)",
        &[
            "services/compute/src/hypervisor/libvirt",
            "tests/src/swarm/entropy.rs",
        ],
    ),
];

/// Acts that destroy, and where alone they may be asked for: each there takes
/// evidence. Below the first folder only; tests and the drivers themselves apart.
const DESTRUCTIVE: &[(&str, &[&str], &[&str])] = &[
    (
        "services/compute/src",
        &[
            ".undefine(",
            ".withdraw(",
            ".discard_incoming(",
            ".discard_outgoing(",
            ".discard_half(",
            ".remove_disk(",
            ".rename_file(",
            "hypervisor.stop(",
            "driver.stop(",
        ],
        &[
            "services/compute/src/migration/destroy.rs",
            "services/compute/src/hypervisor",
        ],
    ),
    (
        "services/conductor/src",
        &[
            "Survivor {",
            "RemoveCopy {",
            "PostLiveMigration {",
            "= RevertResize {",
            "::RevertResize {",
            "(RevertResize {",
        ],
        &[
            "services/conductor/src/task/proof.rs",
            "services/conductor/src/agent_client.rs",
        ],
    ),
];

/// What takes time, order or ids from elsewhere than a simulation's seed
/// (`docs/decisions/0013-a-seed-is-a-run.md`), and where alone it may stand.
const OUTSIDE_THE_SEED: &[(&str, &[&str])] = &[
    ("spawn_blocking(", &["common/runtime/src/blocking.rs"]),
    ("thread::", &[]),
    ("tokio::fs", &[]),
    ("SystemTime", &["common/runtime/src/clock.rs"]),
    ("std::time::Instant", &[]),
    ("Timestamp::now(", &[]),
    ("Zoned::now(", &[]),
    ("now_v7(", &["common/model/src/ids.rs"]),
];

/// What no simulation reaches.
const NOT_SIMULATED: &[&str] = &[
    "common/carrier",
    "common/rpc/src/amqp",
    "services/cli",
    "services/compute/src/hypervisor/libvirt",
    "services/compute/src/main.rs",
    "services/conductor/src/main.rs",
    "common/runtime/src/shutdown.rs",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("a workspace")
        .to_owned()
}

/// Each package of the workspace and what it depends on.
fn packages() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version",
            "1",
            "--no-deps",
            "--offline",
        ])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let name = |v: &Value| v["name"].as_str().expect("a name").to_owned();
    let of = |p: &Value| {
        p["dependencies"]
            .as_array()
            .expect("a list")
            .iter()
            .map(name)
            .collect()
    };
    let packages = metadata["packages"].as_array().expect("a list");
    packages.iter().map(|p| (name(p), of(p))).collect()
}

#[test]
fn our_crates_use_only_what_they_may() {
    let packages = packages();
    for (name, dependencies) in &packages {
        if name == "drover-tests" {
            continue;
        }
        let (_, allowed) = EDGES
            .iter()
            .find(|(n, _)| n == name)
            .unwrap_or_else(|| panic!("{name} is new: say in EDGES what it may use"));
        for used in dependencies.iter().filter(|d| d.starts_with("drover-")) {
            assert!(
                allowed.contains(&used.as_str()),
                "{name} may not use {used}"
            );
        }
    }
    for (name, _) in EDGES {
        assert!(
            packages.contains_key(*name),
            "{name} is gone: take it from EDGES"
        );
    }
}

#[test]
fn foreign_crates_have_one_owner() {
    for (name, dependencies) in packages() {
        for (foreign, owners) in OWNERS {
            let may = owners.contains(&name.as_str());
            assert!(
                may || !dependencies.contains(*foreign),
                "{name} may not use {foreign}"
            );
        }
    }
}

fn sources(below: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(below).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            // What cargo-fuzz builds is below tests/fuzz.
            if !path.ends_with("target") {
                sources(&path, found);
            }
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

fn all_sources() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for folder in ["common", "services", "tests"] {
        sources(&root().join(folder), &mut found);
    }
    let read = |path: PathBuf| {
        let shown = path
            .strip_prefix(root())
            .expect("below the root")
            .display()
            .to_string();
        (shown, fs::read_to_string(&path).expect("text"))
    };
    found.into_iter().map(read).collect()
}

#[test]
fn foreign_names_stand_only_where_they_may() {
    for (path, text) in all_sources() {
        if path.ends_with("tests/architecture.rs") {
            continue;
        }
        let code = text
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"));
        for line in code {
            for (name, folders) in PLACES {
                let word = line.match_indices(name).any(|(at, _)| {
                    let before = line[..at].chars().next_back();
                    !before.is_some_and(|c| c.is_alphanumeric() || c == '_')
                });
                let may = folders.iter().any(|folder| path.starts_with(folder));
                assert!(!word || may, "{path} may not say '{name}': {line}");
            }
        }
    }
}

#[test]
fn what_destroys_is_asked_for_with_evidence_alone() {
    for (path, text) in all_sources() {
        let own = DESTRUCTIVE
            .iter()
            .filter(|(below, ..)| path.starts_with(below));
        for (_, acts, places) in own {
            if places.iter().any(|place| path.starts_with(place)) {
                continue;
            }
            // A call may be broken over lines.
            let code = text.lines().map(str::trim);
            let code: String = code.filter(|line| !line.starts_with("//")).collect();
            let found = acts.iter().find(|act| code.contains(**act));
            assert_eq!(found, None, "{path} destroys without evidence");
        }
    }
    for (.., places) in DESTRUCTIVE {
        for place in *places {
            assert!(root().join(place).exists(), "{place} is gone");
        }
    }
}

/// Code that a simulation runs, without its own tests.
fn simulated() -> impl Iterator<Item = (String, String)> {
    let is_simulated = |path: &str| {
        let ours = path.starts_with("common/") || path.starts_with("services/");
        ours && path.contains("/src/")
            && !path.ends_with("tests.rs")
            && !NOT_SIMULATED.iter().any(|place| path.starts_with(place))
    };
    let all = all_sources().into_iter();
    all.filter(move |(path, _)| is_simulated(path))
        .map(|(path, text)| {
            let code = text.split("#[cfg(test)]\nmod tests").next();
            (path, code.unwrap_or_default().to_owned())
        })
}

#[test]
fn what_is_simulated_follows_from_its_seed() {
    for (path, text) in simulated() {
        for (form, places) in OUTSIDE_THE_SEED {
            let may = places.iter().any(|place| path.starts_with(place));
            assert!(may || !text.contains(form), "{path} may not say '{form}'");
        }
        for choice in text.split("select! {").skip(1) {
            let biased = choice.trim_start().starts_with("biased;");
            assert!(biased, "{path}: what a select! tries first is by chance");
        }
    }
}

#[test]
fn every_module_says_what_it_is_for() {
    for (path, text) in all_sources() {
        assert!(
            text.starts_with("//!"),
            "{path} does not begin with what it is for"
        );
    }
}
