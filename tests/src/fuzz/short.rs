//! A short run of a target without a fuzzer: everything in its corpus, and what is
//! made of it by chance. A seed is always the same inputs.

use std::{
    fs,
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
};

use fastrand::Rng;

use super::Target;

/// Longest input that is made, bytes.
const LONGEST: usize = 16 * 1024;

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/"))
}

/// The inputs that are kept for a target; for messages those captured of oslo.messaging
/// too.
///
/// # Panics
/// Something of it cannot be read.
pub fn corpus(target: &str) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    let kept = files(&root().join("fuzz/corpus").join(target));
    found.extend(kept.iter().map(|path| fs::read(path).expect("a file")));
    if matches!(target, "envelope" | "reply") {
        let vectors = files(&root().join("wire-vectors"));
        let bodies = vectors.iter().filter_map(|path| {
            let text = fs::read(path).expect("a file");
            let vector: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
            vector
                .get("body")?
                .as_str()
                .map(|body| body.as_bytes().to_vec())
        });
        found.extend(bodies);
    }
    found
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let listing = fs::read_dir(directory).into_iter().flatten();
    let mut paths: Vec<_> = listing
        .map(|entry| entry.expect("an entry").path())
        .collect();
    paths.sort();
    paths
}

/// Runs the corpus, and `count` inputs more.
///
/// # Panics
/// A property does not hold: the input is said.
pub fn run(name: &str, target: Target, seed: u64, count: usize) {
    let corpus = corpus(name);
    assert!(!corpus.is_empty(), "{name} has no corpus");
    let mut random = Rng::with_seed(seed);
    for input in &corpus {
        try_one(name, target, input);
    }
    for _ in 0..count {
        try_one(name, target, &made(&corpus, &mut random));
    }
}

fn try_one(name: &str, target: Target, input: &[u8]) {
    let ended = panic::catch_unwind(AssertUnwindSafe(|| target(input)));
    if let Err(panic) = ended {
        eprintln!("{name} fails with this input:\n{}", input.escape_ascii());
        panic::resume_unwind(panic);
    }
}

/// One of the corpus, changed in a few places.
fn made(corpus: &[Vec<u8>], random: &mut Rng) -> Vec<u8> {
    let mut input = corpus[random.usize(..corpus.len())].clone();
    for _ in 0..=random.usize(..4) {
        let other = &corpus[random.usize(..corpus.len())];
        change(&mut input, other, random);
        input.truncate(LONGEST);
    }
    input
}

fn change(input: &mut Vec<u8>, other: &[u8], random: &mut Rng) {
    const ODD: &[&[u8]] = &[
        b"\"",
        b"\\",
        b"\0",
        b"\n",
        b"<",
        b">",
        b"&",
        b"]]>",
        b"-->",
        b"null",
        b"-1",
        b"1e999",
        b"18446744073709551615",
        b"NaN",
        b"{",
        b"}",
        b"[",
        b"]",
        b"=",
        b"'",
        b"\xff",
        b"\xc3\xa9",
    ];
    if input.is_empty() {
        input.extend_from_slice(other);
    }
    let at = random.usize(..=input.len());
    let here = at.min(input.len().saturating_sub(1));
    match random.u8(..7) {
        0 if !input.is_empty() => input[here] ^= 1 << random.u8(..8),
        1 if !input.is_empty() => input[here] = random.u8(..),
        2 => drop(input.drain(at..(at + random.usize(..32)).min(input.len()))),
        3 => {
            let odd = ODD[random.usize(..ODD.len())];
            drop(input.splice(at..at, odd.iter().copied()));
        }
        4 => {
            let part = part(&input.clone(), random).to_vec();
            drop(input.splice(at..at, part));
        }
        5 => drop(input.splice(at..at, part(other, random).iter().copied())),
        _ => input.truncate(at),
    }
}

fn part<'a>(of: &'a [u8], random: &mut Rng) -> &'a [u8] {
    let from = random.usize(..=of.len());
    let to = (from + random.usize(..128)).min(of.len());
    &of[from..to]
}
