//! Which files images name beneath them, remembered file by file: where one cannot be read
//! now, its chain goes on with what was read of it last.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use serde::{Deserialize, Serialize};

use super::beneath::{Found, Image, Named};

/// Files beneath one image that are followed.
const MOST_BENEATH: usize = 400;

/// What is known of the files beneath an image.
#[derive(Debug, Clone, Default)]
pub(in super::super) struct Beneath {
    /// Their paths. Some may not be there.
    pub(in super::super) paths: BTreeSet<String>,
    /// Why they may not be all.
    pub(in super::super) unread: Option<String>,
}

/// A walk from an image at the top to what lies beneath it.
#[derive(Debug, Clone, Default)]
pub(super) struct Walk {
    paths: BTreeSet<String>,
    /// Where no image is, and never was one that named anything.
    gaps: Vec<String>,
    /// What cannot be read and never was, and why.
    unread: Vec<(String, String)>,
}

impl Walk {
    /// Takes in what was found of one file on the way; those of its names that are new, as
    /// long as there are not too many.
    pub(super) fn go_on(&mut self, path: &str, step: Step) -> Vec<Named> {
        let names = match step {
            Step::Names(names) => names,
            Step::Gap => {
                self.gaps.push(path.to_owned());
                return Vec::new();
            }
            Step::Unread(words) => {
                self.unread.push((path.to_owned(), words));
                return Vec::new();
            }
        };
        let paths = &mut self.paths;
        let mut is_new =
            |path: &String| paths.len() < MOST_BENEATH && paths.insert(path.to_owned());
        let new = names.into_iter().filter(|(path, _)| is_new(path));
        new.collect()
    }

    /// What was found, with what a former version kept if that is of use: as long as
    /// something does not answer, or is lacking of what it had.
    fn end(self, top: &str, former: Option<&BTreeSet<String>>) -> (Beneath, bool) {
        let had = |path: &String| path == top || former.is_some_and(|whole| whole.contains(path));
        let is_of_use = !self.unread.is_empty() || self.gaps.iter().any(had);
        let mut unread = self.unread.into_iter();
        let unread = unread.find(|(path, _)| former.is_none() || !had(path));
        let mut paths = self.paths;
        let former = former.filter(|_| is_of_use);
        paths.extend(former.into_iter().flatten().cloned());
        let unread = unread.map(|(_, words)| words);
        (Beneath { paths, unread }, former.is_some())
    }
}

/// What is known of one file on the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// The files that it names.
    Names(Vec<Named>),
    /// No image is there, and none is remembered.
    Gap,
    /// It cannot be read, and never was.
    Unread(String),
}

/// What a file named when it was read last.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Link {
    names: Vec<Named>,
    /// The device it was on, in this run of the kernel.
    device: Option<u64>,
    /// It was read, whatever it named. (Former versions do not say so.)
    #[serde(default)]
    seen: bool,
}

impl Link {
    /// As it is known in another run of the kernel.
    pub(super) fn forget_device(&mut self) {
        self.seen = self.was_seen();
        self.device = None;
    }

    fn was_seen(&self) -> bool {
        self.seen || self.device.is_some() || !self.names.is_empty()
    }

    fn renew(&mut self, image: Image) {
        let is_elsewhere = self.device.is_some_and(|device| device != image.device);
        let lacks_one = self.names.iter().any(|name| !image.names.contains(name));
        if is_elsewhere && lacks_one {
            // It may have this one's name only until its own file system is mounted again.
            let new = image.names.into_iter();
            let new: Vec<Named> = new.filter(|name| !self.names.contains(name)).collect();
            self.names.extend(new);
            self.names.truncate(MOST_BENEATH);
            return;
        }
        *self = Self {
            names: image.names,
            device: Some(image.device),
            seen: true,
        };
    }
}

/// All that is remembered.
#[derive(Debug, Default)]
pub(super) struct Links {
    by_path: BTreeMap<String, Link>,
    /// By path of an image at the top: all that was beneath it, as a former version of the
    /// agent kept it. It serves until all of the chain has answered.
    whole: BTreeMap<String, BTreeSet<String>>,
    /// The same as it is known now, for that version.
    beneath: BTreeMap<String, BTreeSet<String>>,
}

impl Links {
    pub(super) fn of(
        by_path: BTreeMap<String, Link>,
        whole: Option<BTreeMap<String, BTreeSet<String>>>,
        beneath: BTreeMap<String, BTreeSet<String>>,
    ) -> Self {
        Self {
            by_path,
            whole: whole.unwrap_or_else(|| beneath.clone()),
            beneath,
        }
    }

    pub(super) fn by_path(&self) -> BTreeMap<String, Link> {
        self.by_path.clone()
    }

    pub(super) fn whole(&self) -> BTreeMap<String, BTreeSet<String>> {
        self.whole.clone()
    }

    pub(super) fn beneath(&self) -> BTreeMap<String, BTreeSet<String>> {
        self.beneath.clone()
    }

    /// What is known of a file that was looked at: as it is, as it was last if no image is
    /// there or it cannot be read.
    pub(super) fn step(&mut self, path: &str, read: Result<Found, String>) -> Step {
        let words = match read {
            Ok(Found::Image(image)) => {
                let link = self.by_path.entry(path.to_owned()).or_default();
                link.renew(image);
                return Step::Names(link.names.clone());
            }
            Ok(Found::Other) => {
                self.by_path.entry(path.to_owned()).or_default().seen = true;
                None
            }
            // Its file system may not be mounted yet.
            Ok(Found::Nothing) => None,
            Err(words) => Some(words),
        };
        let link = self.by_path.get(path).filter(|link| link.was_seen());
        match (link, words) {
            (Some(link), words) if words.is_some() || !link.names.is_empty() => {
                Step::Names(link.names.clone())
            }
            (None, Some(words)) => Step::Unread(words),
            _ => Step::Gap,
        }
    }

    /// Ends a look at all images of interest; what was not met on the way is forgotten.
    pub(super) fn settle(
        &mut self,
        tops: &[(String, String)],
        walks: Vec<Walk>,
        met: &HashSet<String>,
    ) -> Vec<Beneath> {
        self.by_path.retain(|path, _| met.contains(path));
        let former = std::mem::take(&mut self.whole);
        let mut before = std::mem::take(&mut self.beneath);
        let ended = tops.iter().zip(walks).map(|((top, _), walk)| {
            let whole = former.get(top);
            let (found, has_served) = walk.end(top, whole);
            if let Some(whole) = whole.filter(|_| has_served) {
                self.whole.insert(top.clone(), whole.clone());
            }
            let known = match found.unread {
                None => Some(found.paths.clone()),
                Some(_) => before.remove(top),
            };
            if let Some(known) = known {
                self.beneath.insert(top.clone(), known);
            }
            found
        });
        ended.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(names: &[&str], device: u64) -> Result<Found, String> {
        let names = names.iter().map(|name| ((*name).to_owned(), None));
        let names = names.collect();
        Ok(Found::Image(Image { names, device }))
    }

    fn unread() -> Result<Found, String> {
        Err("it broke".to_owned())
    }

    fn names(step: Step) -> String {
        match step {
            Step::Names(names) => {
                let paths: Vec<String> = names.into_iter().map(|(path, _)| path).collect();
                paths.join(" ")
            }
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn what_cannot_be_read_now_is_as_it_was_last() {
        let mut links = Links::default();
        let mut look = |read| names(links.step("/mid", read));
        assert_eq!(look(unread()), r#"Unread("it broke")"#, "never seen");
        assert_eq!(look(Ok(Found::Nothing)), "Gap");
        assert_eq!(look(unread()), r#"Unread("it broke")"#, "not mounted yet");
        assert_eq!(look(Ok(Found::Other)), "Gap");
        assert_eq!(look(unread()), "", "it names none");
        assert_eq!(look(image(&["/base"], 1)), "/base");
        assert_eq!(look(unread()), "/base");
        assert_eq!(look(Ok(Found::Nothing)), "/base", "not mounted");
        assert_eq!(look(image(&["/other"], 1)), "/other");
        assert_eq!(look(image(&[], 1)), "");
        links.settle(&[], Vec::new(), &HashSet::new());
        assert!(links.by_path.is_empty(), "of no interest any more");
    }

    #[test]
    fn what_is_on_another_file_system_hides_nothing() {
        let mut links = Links::default();
        let mut look = |read| names(links.step("/mid", read));
        look(image(&["/base"], 1));
        assert_eq!(look(image(&["/other"], 2)), "/base /other");
        assert_eq!(look(unread()), "/base /other");
        assert_eq!(look(image(&["/base"], 3)), "/base /other", "one is lacking");
        assert_eq!(look(image(&["/base"], 1)), "/base", "it is back");
        assert_eq!(look(image(&["/base"], 3)), "/base");
        assert_eq!(look(image(&["/other"], 3)), "/other", "mounted anew");
    }

    #[test]
    fn what_a_former_version_kept_serves_until_all_was_seen() {
        let below = |paths: &[&str]| paths.iter().map(|path| (*path).to_owned()).collect();
        let whole = BTreeMap::from([("/top".to_owned(), below(&["/mid", "/base"]))]);
        let mut links = Links::of(BTreeMap::new(), None, whole);
        let mut look = |mid| {
            let (mut walk, mut met) = (Walk::default(), HashSet::new());
            for (path, read) in [("/top", image(&["/mid"], 1)), ("/mid", mid)] {
                met.insert(path.to_owned());
                walk.go_on(path, links.step(path, read));
            }
            let tops = [("/top".to_owned(), "qcow2".to_owned())];
            let found = links.settle(&tops, vec![walk], &met).remove(0);
            let paths: Vec<String> = found.paths.into_iter().collect();
            (paths.join(" "), found.unread)
        };
        assert_eq!(look(unread()), ("/base /mid".to_owned(), None));
        assert_eq!(look(Ok(Found::Nothing)), ("/base /mid".to_owned(), None));
        let now = image(&["/new"], 1);
        assert_eq!(look(now), ("/mid /new".to_owned(), None));
        assert_eq!(look(Ok(Found::Nothing)), ("/mid /new".to_owned(), None));
    }
}
