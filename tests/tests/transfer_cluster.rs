//! Transfers of real guests between projects, asked for by the operator's
//! command: networks, disks, metadata and quota change hands together or not at
//! all, whatever dies on the way; and the two projects do not reach each other.

use drover_tests::devstack::{Devstack, Following, Guest, told};
use serde_json::Value;

/// So many MiB take some seconds at [`SLOWLY`]: time to be caught in the middle.
const DATA: &[&str] = &["--project", "alpha", "--data-mib", "16"];
const SLOWLY: &[&str] = &["--bandwidth", "8"];
const ALPHAS: &[&str] = &["--project", "alpha"];

/// The other project.
fn other(project: &str) -> &'static str {
    match project {
        "alpha" => "beta",
        _ => "alpha",
    }
}

fn transfer(guest: &Guest<'_>, to: &str, mode: &str, options: &[&str]) -> Vec<String> {
    let args = ["instance", "transfer", &guest.name, "--project", to, mode];
    let all = args.iter().chain(options);
    all.map(|text| (*text).to_owned()).collect()
}

/// Has it change hands and waits for that; gives the record.
fn transferred(
    devstack: &Devstack,
    guest: &Guest<'_>,
    to: &str,
    mode: &str,
    options: &[&str],
) -> Value {
    let args = transfer(guest, to, mode, options);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let record = devstack.json(&args);
    assert_eq!(record["status"], "completed", "{record:#}");
    assert_eq!(record["warnings"], Value::Array(Vec::new()), "{record:#}");
    record
}

/// A transfer that is asked for and not waited for.
fn begun(devstack: &Devstack, guest: &Guest<'_>, to: &str, mode: &str) -> Following {
    let options = [SLOWLY, &["--no-wait"]].concat();
    let args = transfer(guest, to, mode, &options);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let accepted = devstack.json(&args);
    devstack.follow(accepted["uuid"].as_str().expect("a record"))
}

/// Whether a project's client reaches the guest's echo.
fn reaches(devstack: &Devstack, project: &str, guest: &Guest<'_>) -> bool {
    let number: u32 = guest.name.trim_start_matches("vm").parse().expect("vmN");
    let ask = format!(
        "exec 3<>/dev/tcp/10.99.0.{}/7; echo drover >&3; read -r -t 2 line <&3; [ \"$line\" = drover ]",
        10 + number
    );
    let asked = devstack.on(project, &["timeout", "3", "bash", "-c", &ask]);
    asked.status.success()
}

fn definitions(devstack: &Devstack, guest: &Guest<'_>) -> [String; 2] {
    [&[][..], &["--inactive"]].map(|flags| {
        let args = [&["kvm1", "virsh", "dumpxml", &guest.name], flags].concat();
        devstack.ok("on", &args)
    })
}

/// The project's name stands nowhere in either definition, nor has it a file.
fn assert_no_trace_of(devstack: &Devstack, project: &str, guest: &Guest<'_>) {
    for definition in definitions(devstack, guest) {
        let trace = definition.lines().find(|line| line.contains(project));
        assert_eq!(trace, None, "{definition}");
    }
    let find = format!(
        "find /var/lib/libvirt/projects/{project} -name '{}[.-]*'",
        guest.name
    );
    assert_eq!(devstack.sh("kvm1", &find), "", "{project} has files of it");
}

/// It is that project's in every respect: reached from there, and from there alone.
fn assert_owned(devstack: &Devstack, owner: &str, guest: &Guest<'_>) {
    let shown = devstack.json(&["instance", "show", &guest.name]);
    assert_eq!(shown["project_id"], owner, "{shown:#}");
    assert_no_trace_of(devstack, other(owner), guest);
    devstack.until("its owner reaches it", || reaches(devstack, owner, guest));
    assert!(
        !reaches(devstack, other(owner), guest),
        "it is reached from outside"
    );
    for definition in definitions(devstack, guest) {
        assert!(definition.contains(&format!("br-{owner}")), "{definition}");
        let place = format!("/var/lib/libvirt/projects/{owner}/");
        assert!(definition.contains(&place), "{definition}");
    }
}

fn count(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

fn usage(devstack: &Devstack, project: &str) -> [u64; 4] {
    let shown = devstack.json(&["project", "show", project]);
    let usage = &shown["usage"];
    ["instances", "vcpus", "memory_mb", "disk_bytes"].map(|what| count(&usage[what]))
}

/// Waits until the record has forgotten the guests of tests before, which count
/// as used until then.
fn until_forgotten(devstack: &Devstack) {
    devstack.until("guests that are gone are forgotten", || {
        let all = devstack.json(&["instance", "list"]);
        all.as_array().into_iter().flatten().all(|guest| {
            let text = |field: &str| guest[field].as_str().unwrap_or_default().to_owned();
            let asked = devstack.on(&text("host"), &["virsh", "domid", &text("name")]);
            asked.status.success()
        })
    });
}

/// A transfer that did not come about: the guest runs as it did, and nothing is
/// left of the attempt.
fn assert_undone(devstack: &Devstack, guest: &Guest<'_>, before: &[String; 2], record: &Value) {
    let ended = record["status"].as_str();
    assert!(matches!(ended, Some("failed" | "cancelled")), "{record:#}");
    guest.assert_only_on("kvm1", "running");
    assert_owned(devstack, "alpha", guest);
    guest.check();
    let plain = |text: &String| {
        // What libvirt numbers anew at every start, or when a NIC is plugged.
        let skipped = ["<alias", "<target dev='vnet", "<seclabel", "id='"];
        let kept = text
            .lines()
            .filter(|l| !skipped.iter().any(|s| l.contains(s)));
        kept.collect::<Vec<_>>().join("\n")
    };
    let lasting = &definitions(devstack, guest)[1];
    assert_eq!(
        plain(lasting),
        plain(&before[1]),
        "its definition is another"
    );
    devstack.assert_nothing_kept(record["uuid"].as_str().expect("a record"));
}

#[test]
fn a_running_guest_changes_hands_and_back() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest_with("vm61", ALPHAS);
    assert_owned(&devstack, "alpha", &guest);
    until_forgotten(&devstack);
    let mut before = guest.check();
    for to in ["beta", "alpha"] {
        let (had, gave) = (usage(&devstack, to), usage(&devstack, other(to)));
        let record = transferred(&devstack, &guest, to, "--live", &[]);
        assert!(
            record["downtime_ms"].is_u64(),
            "its network was cut: {record:#}"
        );
        assert_owned(&devstack, to, &guest);
        let after = guest.check();
        assert!(
            count(&after["uptime_ms"]) > count(&before["uptime_ms"]),
            "it ran on: before {before}, after {after}"
        );
        assert!(
            count(&after["disk_found"]) == count(&before["disk_found"]),
            "it was not booted anew: before {before}, after {after}"
        );
        let (has, left) = (usage(&devstack, to), usage(&devstack, other(to)));
        for what in 0..4 {
            let (more, less) = (has[what] - had[what], gave[what] - left[what]);
            assert!(
                more == less && more > 0,
                "what one has not, the other has: {has:?} {left:?}"
            );
        }
        before = after;
    }
}

#[test]
fn a_guest_changes_hands_cold() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest_with("vm62", DATA);
    let before = guest.check();
    let data = devstack.sha256("kvm1", "/var/lib/libvirt/projects/alpha/vm62-data.raw");
    let record = transferred(&devstack, &guest, "beta", "--cold", &[]);
    assert!(record["downtime_ms"].as_u64() > Some(0), "{record:#}");
    assert_owned(&devstack, "beta", &guest);
    guest.assert_only_on("kvm1", "running");
    let after = guest.check();
    assert!(
        count(&after["disk_found"]) >= count(&before["disk_written"]),
        "before {before}, after {after}"
    );
    let there = devstack.sha256("kvm1", "/var/lib/libvirt/projects/beta/vm62-data.raw");
    assert_eq!(there, data, "its second disk");
}

#[test]
fn a_guest_that_is_off_changes_hands_and_stays_off() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest_with("vm63", &[ALPHAS, &["--off"]].concat());
    let options = ["--new-mac", "--title", "of beta"];
    transferred(&devstack, &guest, "beta", "--cold", &options);
    guest.assert_only_on("kvm1", "shut off");
    assert_no_trace_of(&devstack, "alpha", &guest);
    let [definition, _] = definitions(&devstack, &guest);
    assert!(
        definition.contains("<title>of beta</title>"),
        "{definition}"
    );
    assert!(!definition.contains("52:54:00:0a:63:49"), "{definition}");
}

#[test]
fn what_stands_in_the_way_is_said_and_changes_nothing() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest_with("vm64", ALPHAS);
    let before = definitions(&devstack, &guest);
    let refused = |args: &[&str], codes: &[&str]| {
        let output = devstack.drover(&[args, &["--json"]].concat());
        assert_eq!(output.status.code(), Some(3), "{args:?}: {}", told(&output));
        let said = told(&output);
        for code in codes {
            assert!(said.contains(&format!("\"{code}\"")), "{code}: {said}");
        }
    };
    let to = |project| {
        [
            "instance",
            "transfer",
            "vm64",
            "--live",
            "--project",
            project,
        ]
    };
    refused(&to("nobody"), &["unknown_project"]);
    refused(&to("alpha"), &["same_project"]);
    let project = [
        "project",
        "create",
        "small",
        "--instances",
        "0",
        "--disabled",
    ];
    let network = ["--network", "lan=bridge:br-none"];
    let storage = ["--storage", "directory:/var/lib/libvirt/projects/none"];
    let created = devstack.drover(&[&project[..], &network, &storage].concat());
    // A run before may have left it.
    assert!(
        created.status.success() || told(&created).contains("already"),
        "{}",
        told(&created)
    );
    let all = ["quota", "project_disabled", "network", "storage"];
    refused(&to("small"), &all);
    refused(&[&to("small")[..], &["--dry-run"]].concat(), &all);
    devstack.ok("on", &["kvm1", "virsh", "snapshot-create-as", "vm64", "s1"]);
    refused(&to("beta"), &["snapshots"]);
    devstack.ok("on", &["kvm1", "virsh", "snapshot-delete", "vm64", "s1"]);
    let taken = "/var/lib/libvirt/projects/beta/vm64.qcow2";
    devstack.sh("kvm1", &format!("echo mine > {taken}"));
    refused(&to("beta"), &["disk_exists"]);
    assert_eq!(
        devstack.sh("kvm1", &format!("cat {taken}; rm {taken}")),
        "mine\n"
    );
    let planned = devstack.json(&[&to("beta")[..], &["--dry-run"]].concat());
    assert_eq!(planned["failures"], Value::Array(Vec::new()), "{planned:#}");
    assert_eq!(definitions(&devstack, &guest), before, "nothing changed");
    assert_owned(&devstack, "alpha", &guest);
}

#[test]
fn an_offer_is_accepted_with_its_key() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest_with("vm65", ALPHAS);
    let made = devstack.json(&["transfer", "offer", "vm65", "--project", "beta"]);
    let (offer, key) = (
        made["offer"]["id"].as_str().expect("an offer"),
        made["key"].as_str().expect("a key"),
    );
    let accept = |key: &str| {
        let args = [
            "transfer",
            "accept",
            offer,
            "--project",
            "beta",
            "--live",
            "--key",
            key,
        ];
        devstack.drover(&args)
    };
    let wrong = accept("0000-0000");
    assert_eq!(wrong.status.code(), Some(3), "{}", told(&wrong));
    let right = accept(key);
    assert_eq!(right.status.code(), Some(0), "{}", told(&right));
    assert_owned(&devstack, "beta", &guest);
    let again = accept(key);
    assert_eq!(again.status.code(), Some(3), "{}", told(&again));
    let shown = devstack.json(&["transfer", "show", offer]);
    assert_eq!(shown["state"], "accepted", "{shown:#}");
}

#[test]
fn an_aborted_transfer_leaves_no_trace() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest_with("vm66", DATA);
    let before = definitions(&devstack, &guest);
    let mut following = begun(&devstack, &guest, "beta", "--live");
    following.until_disk();
    // One operation at a time, whoever asks.
    let busy = devstack.drover(&["instance", "migrate", "vm66", "--live", "--json"]);
    assert_eq!(busy.status.code(), Some(3), "{}", told(&busy));
    assert!(told(&busy).contains("instance_busy"), "{}", told(&busy));
    devstack.json(&["migration", "abort", &following.id]);
    let record = following.end();
    assert_undone(&devstack, &guest, &before, &record);
}

/// The steps at which processes are killed. Those that are over in no time may be
/// over when the blow falls: `transfer_deaths.rs` hits every one of them.
const STEPS: [&str; 6] = ["prepare", "stop", "copy", "hand_over", "settle", "tidy"];

/// Kills a process at every step of a transfer, and starts it again.
fn survives(name: &str, mode: &str, place: &str, service: &str) {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest_with(name, DATA);
    let (mut before, mut to) = (guest.check(), "beta");
    for step in STEPS {
        let mut following = begun(&devstack, &guest, to, mode);
        let id = following.id.clone();
        let place_of = |m: &Value| STEPS.iter().position(|s| m["step"] == *s);
        let wanted = STEPS.iter().position(|s| *s == step);
        following.until(step, |m| {
            m["finished_at_ms"].is_u64() || place_of(m) >= wanted
        });
        devstack.ok("service", &[place, service, "kill"]);
        devstack.ok("service", &[place, service, "start"]);
        drop(following);
        let record = devstack.follow(&id).end();
        assert_eq!(
            record["status"], "completed",
            "killed at {step}: {record:#}"
        );
        assert_owned(&devstack, to, &guest);
        let after = guest.check();
        let (had, has) = (&before["disk_written"], &after["disk_written"]);
        assert!(count(has) >= count(had), "before {before}, after {after}");
        (before, to) = (after, other(to));
    }
}

#[test]
fn the_agent_dies_at_every_step_of_a_live_one() {
    survives("vm67", "--live", "kvm1", "agent");
}

#[test]
fn the_conductor_dies_at_every_step_of_a_live_one() {
    survives("vm68", "--live", "ctl", "conductor");
}

/// While disks are being copied. (One that dies in the very moment in which it
/// begins a copy can lose the guest: it writes down a job that it cannot read
/// again, up to libvirt 9.0 at least.)
#[test]
fn libvirtd_dies_in_the_middle_of_a_live_one() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest_with("vm69", DATA);
    let before = guest.check();
    let mut following = begun(&devstack, &guest, "beta", "--live");
    following.until_disk();
    devstack.ok("service", &["kvm1", "libvirtd", "kill"]);
    devstack.ok("service", &["kvm1", "libvirtd", "start"]);
    let record = following.end();
    assert_eq!(record["status"], "completed", "{record:#}");
    assert_owned(&devstack, "beta", &guest);
    let after = guest.check();
    let (had, has) = (&before["disk_written"], &after["disk_written"]);
    assert!(count(has) >= count(had), "before {before}, after {after}");
}

#[test]
fn the_agent_dies_at_every_step_of_a_cold_one() {
    survives("vm71", "--cold", "kvm1", "agent");
}

#[test]
fn the_conductor_dies_at_every_step_of_a_cold_one() {
    survives("vm72", "--cold", "ctl", "conductor");
}

/// A network that goes away after the checks: the guest is given back whole.
#[test]
fn a_network_that_vanishes_is_no_loss() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest_with("vm70", DATA);
    let before = definitions(&devstack, &guest);
    let mut following = begun(&devstack, &guest, "beta", "--live");
    following.until_disk();
    // A TAP interface cannot join a bridge that is not there.
    devstack.sh("kvm1", "ip link set br-beta name br-away");
    let record = following.end();
    devstack.sh(
        "kvm1",
        "ip link set br-away name br-beta; ip link set br-beta up",
    );
    assert_undone(&devstack, &guest, &before, &record);
}

/// The same for one that is off meanwhile: it is started again where it was.
#[test]
fn a_network_that_vanishes_is_no_loss_cold() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest_with("vm73", ALPHAS);
    let before = definitions(&devstack, &guest);
    let mut following = begun(&devstack, &guest, "beta", "--cold");
    following.until("stopping", |m| m["step"] == "stop");
    devstack.sh("kvm1", "ip link set br-beta name br-away");
    let record = following.end();
    devstack.sh(
        "kvm1",
        "ip link set br-away name br-beta; ip link set br-beta up",
    );
    assert_undone(&devstack, &guest, &before, &record);
}
