//! Which files images name beneath them, remembered file by file: where one cannot be read
//! now, its chain goes on with what was read of it last.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use serde::{Deserialize, Serialize};

use super::beneath::{Image, Named};

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
    found: Beneath,
    /// Where an image was named there is none, and never was one that named anything.
    has_gap: bool,
}

impl Walk {
    /// Takes in what was found of one file on the way; those of its names that are new, as
    /// long as there are not too many.
    pub(super) fn go_on(&mut self, step: Step) -> Vec<Named> {
        let names = match step {
            Step::Names(names) => names,
            Step::Gap => {
                self.has_gap = true;
                return Vec::new();
            }
            Step::Unread(words) => {
                self.found.unread.get_or_insert(words);
                return Vec::new();
            }
        };
        let paths = &mut self.found.paths;
        let mut is_new =
            |path: &String| paths.len() < MOST_BENEATH && paths.insert(path.to_owned());
        let new = names.into_iter().filter(|(path, _)| is_new(path));
        new.collect()
    }

    fn is_whole(&self) -> bool {
        self.found.unread.is_none() && !self.has_gap
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

/// What an image named when it was read last.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Link {
    names: Vec<Named>,
    /// The device it was on, in this run of the kernel.
    device: Option<u64>,
}

impl Link {
    /// As it is known in another run of the kernel.
    pub(super) fn forget_device(&mut self) {
        self.device = None;
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
        };
    }
}

/// All that is remembered.
#[derive(Debug, Default)]
pub(super) struct Links {
    by_path: HashMap<String, Link>,
    /// By path of an image at the top: all that was beneath it, as a former version of the
    /// agent kept it. It serves until all of the chain was seen.
    whole: HashMap<String, BTreeSet<String>>,
}

impl Links {
    pub(super) fn of(
        by_path: BTreeMap<String, Link>,
        whole: BTreeMap<String, BTreeSet<String>>,
    ) -> Self {
        Self {
            by_path: by_path.into_iter().collect(),
            whole: whole.into_iter().collect(),
        }
    }

    pub(super) fn by_path(&self) -> BTreeMap<String, Link> {
        self.by_path.clone().into_iter().collect()
    }

    pub(super) fn whole(&self) -> BTreeMap<String, BTreeSet<String>> {
        self.whole.clone().into_iter().collect()
    }

    /// What is known of a file that was looked at: as it is, as it was last if no image is
    /// there or it cannot be read.
    pub(super) fn step(&mut self, path: &str, read: Result<Option<Image>, String>) -> Step {
        let link = match read {
            Err(words) => match self.by_path.get(path) {
                Some(link) => link,
                None => return Step::Unread(words),
            },
            Ok(image) => {
                let link = self.by_path.entry(path.to_owned()).or_default();
                match image {
                    Some(image) => link.renew(image),
                    None if link.names.is_empty() => return Step::Gap,
                    None => {}
                }
                link
            }
        };
        Step::Names(link.names.clone())
    }

    /// Ends a look at all images of interest; what was not met on the way is forgotten.
    pub(super) fn settle(
        &mut self,
        tops: &[(String, String)],
        walks: Vec<Walk>,
        met: &HashSet<String>,
    ) -> Vec<Beneath> {
        self.by_path.retain(|path, _| met.contains(path));
        let before = std::mem::take(&mut self.whole);
        let ended = tops.iter().zip(walks).map(|((top, _), walk)| {
            let is_whole = walk.is_whole();
            let mut found = walk.found;
            if let Some(whole) = before.get(top).filter(|_| !is_whole) {
                found.paths.extend(whole.iter().cloned());
                found.unread = None;
                self.whole.insert(top.clone(), whole.clone());
            }
            found
        });
        ended.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(names: &[&str], device: u64) -> Result<Option<Image>, String> {
        let names = names.iter().map(|name| ((*name).to_owned(), None));
        let names = names.collect();
        Ok(Some(Image { names, device }))
    }

    fn unread() -> Result<Option<Image>, String> {
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
        assert_eq!(look(Ok(None)), "Gap");
        assert_eq!(look(unread()), "", "nothing was there");
        assert_eq!(look(image(&["/base"], 1)), "/base");
        assert_eq!(look(unread()), "/base");
        assert_eq!(look(Ok(None)), "/base", "not mounted");
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
        let mut links = Links::of(BTreeMap::new(), whole);
        let mut look = |mid| {
            let (mut walk, mut met) = (Walk::default(), HashSet::new());
            for (path, read) in [("/top", image(&["/mid"], 1)), ("/mid", mid)] {
                met.insert(path.to_owned());
                walk.go_on(links.step(path, read));
            }
            let tops = [("/top".to_owned(), "qcow2".to_owned())];
            let found = links.settle(&tops, vec![walk], &met).remove(0);
            let paths: Vec<String> = found.paths.into_iter().collect();
            (paths.join(" "), found.unread)
        };
        assert_eq!(look(unread()), ("/base /mid".to_owned(), None));
        assert_eq!(look(Ok(None)), ("/base /mid".to_owned(), None));
        let now = image(&["/new"], 1);
        assert_eq!(look(now), ("/mid /new".to_owned(), None));
        assert_eq!(look(Ok(None)), ("/mid /new".to_owned(), None));
    }
}
