//! Against real programs: small shell scripts that behave as agents do.

use std::{fs, time::Instant};

use tempfile::TempDir;

use super::*;

struct Rig {
    directory: TempDir,
    fences: Fences,
    clock: Clock,
}

/// An agent with that body; `$action` holds what it is to do, `$password` its password.
fn rig(body: &str) -> Rig {
    let directory = TempDir::new().unwrap();
    let (path, text) = (
        directory.path().join("fence_test"),
        directory.path().join("text"),
    );
    let read = "#!/bin/sh\nwhile IFS== read -r key value; do\n  export \"$key=$value\"\ndone\n";
    fs::write(
        &text,
        format!("{read}cd {}\n{body}\n", directory.path().display()),
    )
    .unwrap();
    // A program that is open for writing cannot be run, and what one thread has open
    // is for a moment also held by what another starts: so another process writes it.
    let mut install = std::process::Command::new("install");
    let installed = install.args(["-m", "755"]).arg(&text).arg(&path).status();
    assert!(installed.unwrap().success());
    let parameters = [("ip", "192.0.2.7"), ("password", "s3cr3t word")];
    let settings = FenceSettings {
        agent: path.to_str().unwrap().to_owned(),
        parameters: parameters
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into_iter()
            .collect(),
    };
    assert_eq!(settings.problem(), None);
    let of = BTreeMap::from([(kvm1(), settings)]);
    Rig {
        directory,
        fences: Fences::new(of, Duration::from_secs(10)),
        clock: Clock::from_fn(|| 7),
    }
}

fn kvm1() -> HostName {
    "kvm1".parse().unwrap()
}

impl Rig {
    async fn off(&self) -> FenceAnswer {
        self.fences.off(&kvm1(), &self.clock).await
    }

    async fn status(&self) -> FenceAnswer {
        self.fences.status(&kvm1(), &self.clock).await
    }

    /// Waits for the end of a process whose number is in that file.
    async fn is_killed(&self, file: &str) {
        let began = Instant::now();
        let pid = fs::read_to_string(self.directory.path().join(file)).unwrap();
        let process = std::path::PathBuf::from(format!("/proc/{}/stat", pid.trim()));
        let lives = || fs::read_to_string(&process).is_ok_and(|s| !s.contains(") Z "));
        while lives() {
            assert!(
                began.elapsed() < Duration::from_secs(20),
                "it was not killed"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn message(answer: &FenceAnswer) -> &str {
    match answer {
        FenceAnswer::Failed { message, .. } => message,
        other => panic!("it did not fail: {other:?}"),
    }
}

fn is_off(answer: &FenceAnswer) -> bool {
    matches!(answer, FenceAnswer::Off { at_ms: 7, .. })
}

/// An agent of a node whose power is on until it is cut.
const WELL: &str = "case $action in
    off) [ \"$password\" = 's3cr3t word' ] || exit 1; touch cut;;
    status) if [ -e cut ]; then exit 2; fi;;
    *) exit 1;;
esac";

#[tokio::test]
async fn power_is_on_until_it_is_cut() {
    let rig = rig(WELL);
    assert!(matches!(rig.status().await, FenceAnswer::On { .. }));
    for _ in 0..2 {
        assert!(is_off(&rig.off().await), "safe to repeat");
        assert!(is_off(&rig.status().await));
    }
    let other: HostName = "kvm2".parse().unwrap();
    assert!(rig.fences.has(&kvm1()) && !rig.fences.has(&other));
    let none = rig.fences.off(&other, &rig.clock).await;
    assert_eq!(none, FenceAnswer::NotConfigured);
}

#[tokio::test]
async fn only_an_off_that_the_status_confirms_counts() {
    let untold = rig("[ $action = off ] || { echo 'no such action' >&2; exit 3; }");
    assert!(message(&untold.off().await).contains("does not confirm it: exit code 3"));
    assert!(message(&untold.status().await).contains("exit code 3: no such action"));
    let denied = rig("exit 0");
    assert!(message(&denied.off().await).contains("says now that it is on"));
    let odd = rig("[ $action = off ] || exit 77");
    assert!(message(&odd.off().await).contains("does not confirm it: exit code 77"));
    let refused = rig("[ $action = status ] && exit 2; exit 1");
    assert!(message(&refused.off().await).contains("exit code 1"));
    let broken = rig("if [ $action = off; then");
    assert!(is_off(&broken.status().await), "so says its exit code");
    assert!(message(&broken.off().await).contains("exit code 2"));
}

#[tokio::test]
async fn an_agent_that_confirms_nothing_in_time_is_not_believed() {
    let mut rig = rig("[ $action = off ] || exec sleep 1000");
    rig.fences.limit = Duration::from_secs(1);
    let answer = rig.off().await;
    assert!(message(&answer).contains("does not confirm it: it did not end within 1 s"));
}

#[tokio::test]
async fn one_answer_serves_all_who_start_guests_at_the_same_time_and_none_later() {
    let rig = rig("echo x >> asked; exit 2");
    let (host, clock) = (kvm1(), &rig.clock);
    let shared = || rig.fences.status_shared(&host, clock);
    let answers = tokio::join!(shared(), shared(), shared(), shared());
    assert!(is_off(&answers.0) && is_off(&answers.1) && is_off(&answers.2) && is_off(&answers.3));
    let asked = || fs::read_to_string(rig.directory.path().join("asked")).unwrap();
    let which = "one for the first, who was there before; one for all others";
    assert_eq!(asked(), "x\nx\n", "{which}");
    assert!(is_off(&shared().await));
    assert_eq!(
        asked(),
        "x\nx\nx\n",
        "an answer of before says nothing of now"
    );
}

#[tokio::test]
async fn an_agent_that_hangs_is_ended() {
    let mut rig = rig("echo $$ > pid; exec sleep 1000");
    rig.fences.limit = Duration::from_secs(2);
    let began = Instant::now();
    let answer = rig.off().await;
    assert!(
        message(&answer).contains("did not end within 2 s"),
        "{answer:?}"
    );
    assert!(began.elapsed() < Duration::from_secs(8));
    rig.is_killed("pid").await;
}

#[tokio::test]
async fn what_an_agent_has_started_ends_with_it() {
    let starts = "sleep 1000 & echo $! > started; wait";
    // Also of one that holds no pipe to its end.
    for body in [starts, &format!("exec > /dev/null 2>&1; {starts}")] {
        let mut rig = rig(body);
        rig.fences.limit = Duration::from_secs(2);
        let answer = rig.off().await;
        assert!(message(&answer).contains("did not end within 2 s"));
        rig.is_killed("started").await;
        // Whoever asked goes away.
        rig.fences.limit = Duration::from_secs(1000);
        let gone = timeout(Duration::from_secs(2), rig.off()).await;
        assert!(gone.is_err());
        rig.is_killed("started").await;
    }
}

#[tokio::test]
async fn what_agents_say_is_bounded_and_tells_no_secret() {
    let loud = rig(
        "head -c 1000000 /dev/zero | tr '\\0' x; echo; echo \"login $ip with $password\" >&2; exit 1",
    );
    let answer = loud.off().await;
    assert_eq!(message(&answer), "exit code 1: login *** with ***");
    let garbage = rig("head -c 100000 /dev/urandom; exit 9");
    let answer = garbage.status().await;
    assert!(message(&answer).starts_with("exit code 9"), "{answer:?}");
    assert!(message(&answer).len() < 1000 && !message(&answer).contains('\n'));
    let killed = rig("kill -9 $$");
    assert!(message(&killed.off().await).contains("signal"));
    let settings = FenceSettings {
        agent: "x".into(),
        parameters: BTreeMap::from([("password".into(), "s3cr3t".into())]),
    };
    assert!(!format!("{settings:?}").contains("s3cr3t"));
}

#[tokio::test]
async fn parameters_stand_on_no_command_line_and_in_no_environment() {
    let rig = rig("[ \"$password\" = 's3cr3t word' ] || exit 5
        grep -q 's3cr3t' /proc/$$/cmdline /proc/$$/environ && exit 6
        exit 2");
    assert!(
        is_off(&rig.status().await),
        "it came, and by standard input alone"
    );
}

#[test]
fn settings_that_cannot_be_are_named() {
    let with = |agent: &str, key: &str, value: &str| FenceSettings {
        agent: agent.into(),
        parameters: BTreeMap::from([(key.into(), value.into())]),
    };
    let cases = [
        (with("", "ip", "x"), "agent"),
        (with("bin/x", "ip", "x"), "agent"),
        (with("/nonexistent/fence_x", "ip", "x"), "agent"),
        (with("/bin/sh", "i p", "x"), "parameters.i p"),
        (with("/bin/sh", "action", "on"), "parameters.action"),
        (with("/bin/sh", "ip", "x\naction=on"), "parameters.ip"),
    ];
    for (settings, key) in cases {
        let (named, _) = settings.problem().expect("it cannot be");
        assert_eq!(named, key);
    }
    assert_eq!(with("/bin/sh", "ip", "x").problem(), None);
}
