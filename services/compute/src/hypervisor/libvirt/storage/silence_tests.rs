//! What is known of chains of images while the storage of some hangs.

use std::{
    path::Path,
    process::Command,
    sync::mpsc::{Sender, channel},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{
    links::Beneath,
    measure::Measurer,
    memory::{Memory, Remembered},
};

/// A node whose `/dev` stands for a share without its server.
struct Node {
    measurer: Measurer,
    place: tempfile::TempDir,
}

impl Node {
    fn new() -> Self {
        Self {
            measurer: Measurer::default(),
            place: tempfile::tempdir().unwrap(),
        }
    }

    /// That knows this from before.
    fn knows(known: Value) -> Self {
        let known: Remembered = serde_json::from_value(known).unwrap();
        let node = Self::new();
        node.measurer.take_up(known);
        node
    }

    /// It hangs until that is dropped.
    async fn hang(&self) -> Sender<()> {
        let (release, held) = channel();
        let hang = move || held.recv().is_ok();
        let answer = self.measurer.ask(Path::new("/dev/null"), hang).await;
        assert_eq!(answer, None, "it hangs");
        release
    }

    fn top(&self) -> String {
        self.place.path().join("top").display().to_string()
    }

    /// Makes the image at the top one over that.
    fn put_over(&self, base: &str) {
        let common = ["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b"];
        let mut make = Command::new("qemu-img");
        make.args(common).args([base, &self.top(), "1M"]);
        assert!(make.status().unwrap().success());
    }

    async fn look(&self, top: &str) -> Beneath {
        let top = (top.to_owned(), "qcow2".to_owned());
        self.measurer.beneath(vec![top]).await.remove(0)
    }

    /// As its agent is after a restart of the machine.
    async fn restarted(&self) -> Self {
        let file = Some(self.place.path().join("storage.json"));
        Memory::new(file.clone()).keep(&self.measurer).await;
        let mut kept = self.kept();
        kept["boot"] = json!("another");
        std::fs::write(self.place.path().join("storage.json"), kept.to_string()).unwrap();
        let next = Self::new();
        Memory::new(file).take_up(&next.measurer).await;
        next
    }

    fn kept(&self) -> Value {
        let kept = std::fs::read(self.place.path().join("storage.json")).unwrap();
        serde_json::from_slice(&kept).unwrap()
    }
}

fn former(beneath: &Value) -> Value {
    json!({ "boot": "", "beneath": beneath, "identities": {} })
}

#[tokio::test]
async fn a_place_that_hangs_is_waited_for_once_however_deep_a_chain_is() {
    let names = |name: &str| json!({ "names": [[name, null]], "device": null });
    let known = json!({
        "/dev/drover/1": names("/dev/drover/2"),
        "/dev/drover/2": names("/dev/drover/3"),
        "/dev/drover/3": names("/dev/drover/4"),
        "/dev/drover/4": names("/vm/base"),
    });
    let node = Node::knows(json!({
        "boot": "", "beneath": {}, "links": known, "identities": {}
    }));
    let hung = node.hang().await;
    let began = Instant::now();
    let found = node.look("/dev/drover/1").await;
    assert!(
        began.elapsed() < Duration::from_secs(4),
        "{:?}",
        began.elapsed()
    );
    assert!(found.paths.contains("/vm/base"), "{found:?}");
    assert_eq!(found.unread, None);
    drop(hung);
}

#[tokio::test]
async fn what_was_not_there_yet_is_not_known_when_it_hangs() {
    let node = Node::new();
    node.put_over("/dev/drover/mid");
    let found = node.look(&node.top()).await;
    assert_eq!(found.unread, None, "nothing is there");
    let next = node.restarted().await;
    for node in [&node, &next] {
        let hung = node.hang().await;
        let found = node.look("/dev/drover/mid").await;
        drop(hung);
        assert!(found.unread.is_some(), "it never was read: {found:?}");
    }
}

#[tokio::test]
async fn what_a_former_version_kept_is_of_no_use_once_all_has_answered() {
    let node = Node::new();
    let (top, base) = (node.top(), "/nonexistent/base");
    let beneath = json!({ top.as_str(): [base] });
    node.measurer
        .take_up(serde_json::from_value(former(&beneath)).unwrap());
    node.put_over(base);
    let found = node.look(&top).await;
    assert!(found.paths.contains(base), "{found:?}");
    node.put_over("/nonexistent/other");
    let found = node.look(&top).await;
    assert!(!found.paths.contains(base), "it was rebased: {found:?}");
}

#[tokio::test]
async fn what_a_former_version_kept_says_nothing_of_an_image_that_came_since() {
    let node = Node::new();
    let top = node.top();
    let beneath = json!({ top.as_str(): ["/dev/drover/mid", "/vm/base"] });
    node.measurer
        .take_up(serde_json::from_value(former(&beneath)).unwrap());
    node.put_over("/dev/drover/mid");
    let hung = node.hang().await;
    let found = node.look(&top).await;
    assert_eq!(found.unread, None, "that was read then");
    node.put_over("/dev/drover/mid2");
    let found = node.look(&top).await;
    drop(hung);
    assert!(
        found.unread.is_some(),
        "nobody ever read that one: {found:?}"
    );
    assert!(found.paths.contains("/vm/base"), "{found:?}");
}

#[tokio::test]
async fn a_former_version_finds_all_that_is_beneath_each_image() {
    let node = Node::new();
    node.put_over("/nonexistent/base");
    node.look(&node.top()).await;
    let next = node.restarted().await;
    let below = &node.kept()["beneath"][&node.top()];
    assert_eq!(below, &json!(["/nonexistent/base"]), "for the former");
    node.put_over("/nonexistent/other");
    let found = next.look(&node.top()).await;
    assert_eq!(found.paths.len(), 1, "it is not taken for a former's");
    let found = next.look("/gone").await;
    assert!(found.paths.is_empty(), "{found:?}");
}
