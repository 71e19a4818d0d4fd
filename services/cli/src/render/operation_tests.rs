//! Texts as an operator reads them.

use drover_model::{
    migration::Decision,
    operation::{BalanceOptions, EvacuateOptions, FenceAnswer, MoveWay},
};

use super::*;
use crate::samples;

#[test]
fn operations_look_so() {
    let mut balance = samples::planning(&Task::Balance(BalanceOptions {
        automatic: true,
        ..BalanceOptions::default()
    }));
    balance.cancel_requested = true;
    let table = table(&[balance, samples::drain(), samples::drained()]);
    let expected = "\
ID  KIND     HOST  STATUS                MOVED  OTHERS                                TIME    ACCEPTED              BY      REASON
4   balance  -     planning, called off  0/0    -                                     0 ms    2026-11-23 18:46:51Z  itself  -
4   drain    kvm1  running               1/4    1 moving, 1 waits, 1 stays, 1 failed  12.3 s  2026-11-23 18:46:51Z  ann     new disks
4   drain    kvm1  completed             2/2    -                                     21.5 s  2026-11-23 18:46:51Z  ann     new disks";
    assert_eq!(table, expected, "\n{table}");
    assert_eq!(super::table(&[]), "no operations");
}

#[test]
fn a_whole_operation_looks_so() {
    let mut view = samples::drain_view();
    view.operation.decisions = vec![Decision {
        at_ms: samples::T0 + 100,
        text: "kvm1 is disabled:\x1b[2J new disks".to_owned(),
    }];
    let text = whole(&view);
    let expected = "\
id         4
uuid       01997777-0000-7000-8000-00000000beef
kind       drain
host       kvm1
status     running
options    live, reason: new disks
guests     1 of 4 moved, 1 moving, 1 waits, 1 stays, 1 failed
expected   40.0 s
time       12.3 s
requester  user ann
conductor  ctl, attempt 1
accepted   2026-11-23 18:46:51Z
changed    2026-11-23 18:47:03Z
ended      -

guests
  VM   PROJECT  PHASE    TARGET  %    MOVED        RATE      DIRTY    ETA    DOWNTIME  REASON
  vm1  default  moved    kvm2    100  -            -         -        -      212 ms    -
  vm2  default  memory   kvm2    61   0.6/1.1 GiB  90 MiB/s  4 MiB/s  1.5 s  ~120 ms   -
  vm3  default  waiting  kvm2    -    -            -         -        -      ~120 ms   kvm2 takes 1 guest at a time
  vm4  default  failed   -       -    -            -         -        -      -         QEMU on kvm3 died
  vm5  default  stays    -       -    -            -         -        -      -         it has the host's device 0000:01:00.0

came to nothing
  vm4: live to kvm2: bridge br1[2J is missing

nodes
  HOST  GUESTS  VCPUS         MEMORY
  kvm1  3 -> 1  3 -> 1 of 16  384 MiB -> 128 MiB of 7.5 GiB
  kvm2  0 -> 2  0 -> 2 of 16  0 B -> 256 MiB of 7.5 GiB
  1 node stays as it is

decisions
    +100 ms  kvm1 is disabled:[2J new disks";
    assert_eq!(text, expected, "\n{text}");
}

#[test]
fn a_plan_looks_so() {
    let plan = samples::operation_plan();
    let text = plan::text(&samples::emptying(), &plan, &[], None);
    let expected = "\
guests
  INSTANCE  PROJECT  MEMORY   PRIO  WAY    TARGET  EXPECTED  DOWNTIME  WHY
  vm1       default  128 MiB  0     live   kvm2    2.5 s     ~120 ms   kvm2 has the most room
  vm2       default  128 MiB  0     cold   kvm2    2.5 s     ~120 ms   kvm2 has the most room
  vm3       default  128 MiB  0     stays  -       -         -         host_device
  vm4       default  128 MiB  0     stays  -       -         -         host_device

those that stay
  vm3
    host_device (instance): it has the host's device 0000:01:00.0
        what to do: detach it, or allow cold with --mixed
  vm4 (in nobody's way)
    host_device (instance): it has the host's device 0000:01:00.0
        what to do: detach it, or allow cold with --mixed

nodes
  HOST  GUESTS  VCPUS         MEMORY
  kvm1  3 -> 1  3 -> 1 of 16  384 MiB -> 128 MiB of 7.5 GiB
  kvm2  0 -> 2  0 -> 2 of 16  0 B -> 256 MiB of 7.5 GiB
  1 node stays as it is

notes
  2 at a time: the link of kvm1 carries no more

4 guests: 1 live, 1 cold, 1 stays, 1 stays in nobody's way; about 40.0 s
the drain of kvm1 would be accepted";
    assert_eq!(text, expected, "\n{text}");
}

#[test]
fn a_plan_of_an_evacuation_begins_with_the_evidence() {
    let task = Task::Evacuate(EvacuateOptions::new(samples::host("kvm1")));
    let mut plan = samples::operation_plan();
    plan.moves = vec![samples::planned(1, MoveWay::Evacuate, "kvm2")];
    plan.notes.clear();
    let evidence = samples::evidence();
    let text = plan::text(&task, &plan, &samples::checks(), Some(&evidence));
    let expected = "\
evidence
  seen at        2026-11-23 18:46:51Z by conductor ctl
  heard last     2026-11-23 18:45:16Z, of an agent that runs since 2026-11-22 18:46:51Z
  silent for     1 min 35 s (counts as down after 1 min 0 s)
  declared down  no
  queue          nobody listens
  agent          was not asked
  libvirtd       reached from kvm3; not reached from kvm2 (connection timed out)
  fence          none is configured for it
  signs of life  libvirt-reachable
  nodes lost     1 of 3

what stands in the way
  memory (destination): kvm2 has 64 MiB left, 128 MiB needed
      what to do: free memory on kvm2
  network (destination): bridge br1[2J is missing

guests
  INSTANCE  PROJECT  MEMORY   PRIO  WAY       TARGET  EXPECTED  DOWNTIME  WHY
  vm1       default  128 MiB  0     evacuate  kvm2    2.5 s     ~120 ms   kvm2 has the most room

nodes
  HOST  GUESTS  VCPUS         MEMORY
  kvm1  3 -> 1  3 -> 1 of 16  384 MiB -> 128 MiB of 7.5 GiB
  kvm2  0 -> 2  0 -> 2 of 16  0 B -> 256 MiB of 7.5 GiB
  1 node stays as it is

1 guest: 1 started elsewhere; about 40.0 s
the evacuation of kvm1 would be refused: 2 checks failed";
    assert_eq!(text, expected, "\n{text}");
}

#[test]
fn every_answer_of_a_fence_is_told() {
    let agent = || "fence_ipmilan".to_owned();
    let cases = [
        (FenceAnswer::NotConfigured, "none is configured for it"),
        (
            FenceAnswer::Off {
                agent: agent(),
                at_ms: samples::T0,
            },
            "off, says fence_ipmilan at 2026-11-23 18:46:51Z",
        ),
        (FenceAnswer::On { agent: agent() }, "on, says fence_ipmilan"),
        (
            FenceAnswer::Failed {
                agent: agent(),
                message: "login\x1b[2J failed".to_owned(),
            },
            "fence_ipmilan failed: login[2J failed",
        ),
    ];
    for (fence, told) in cases {
        let mut e = samples::evidence();
        e.fence = fence;
        e.confirmed_by = Some(samples::user("ann"));
        e.queue_consumers = Err("no management\nplugin".to_owned());
        e.reach.clear();
        let lines = evidence::lines(&e).join("\n");
        assert!(lines.contains(&format!("  {told}\n")), "{lines}");
        assert!(
            lines.contains("user ann") && lines.contains("no other node"),
            "{lines}"
        );
        assert!(
            lines.contains("cannot be told: no management plugin"),
            "{lines}"
        );
    }
}

#[test]
fn a_balance_tells_the_spread_of_each_step() {
    let mut plan = samples::operation_plan();
    plan.moves.truncate(2);
    plan.moves[0].spread_after_percent = Some(31.25);
    plan.moves[1].spread_after_percent = Some(14.0);
    plan.spread_percent = Some((45.94, 14.0));
    plan.notes.clear();
    let text = plan::text(&Task::Balance(BalanceOptions::default()), &plan, &[], None);
    let expected = "\
guests
  INSTANCE  PROJECT  MEMORY   PRIO  WAY   FROM  TARGET  EXPECTED  DOWNTIME  SPREAD        WHY
  vm1       default  128 MiB  0     live  kvm1  kvm2    2.5 s     ~120 ms   45.9 -> 31.2  kvm2 has the most room
  vm2       default  128 MiB  0     cold  kvm1  kvm2    2.5 s     ~120 ms   31.2 -> 14.0  kvm2 has the most room

nodes
  HOST  GUESTS  VCPUS         MEMORY                         CPU LOAD      MEMORY LOAD
  kvm1  3 -> 1  3 -> 1 of 16  384 MiB -> 128 MiB of 7.5 GiB  71 % -> 30 %  - -> -
  kvm2  0 -> 2  0 -> 2 of 16  0 B -> 256 MiB of 7.5 GiB      0 % -> 41 %   - -> -
  1 node stays as it is

2 guests: 1 live, 1 cold; about 40.0 s
spread 45.9 -> 14.0 points
the balance would be accepted";
    assert_eq!(text, expected, "\n{text}");
}

#[test]
fn every_end_says_what_stays_and_what_to_do() {
    let end = |status| ending::text(&samples::ended(samples::drain(), status));
    let expected = "\
kvm1 is not drained: 1 moved, 2 stay:
  vm4: QEMU on kvm3 died
  vm5: it has the host's device 0000:01:00.0
`drover operation show 4` tells what was tried; kvm1 stays disabled: `drover node drain kvm1` tries again, `drover node restore kvm1` brings all back";
    assert_eq!(end(S::Incomplete), expected);
    let mut o = samples::drain();
    o.items.truncate(3);
    o.items[2].state = ItemState::Cancelled;
    o.items[1].state = ItemState::Cancelled;
    let expected = "\
the drain of kvm1 is cancelled: 1 moved, 2 guests called off
kvm1 stays disabled: `drover node restore kvm1` opens it and brings back what left";
    assert_eq!(ending::text(&samples::ended(o, S::Cancelled)), expected);
    let mut o = samples::planning(&samples::emptying());
    o.failure = Some("no plan\x1b[2J".to_owned());
    o.refusals = samples::checks();
    let expected = "\
the drain of kvm1 failed: no plan[2J
  memory (destination): kvm2 has 64 MiB left, 128 MiB needed
      what to do: free memory on kvm2
  network (destination): bridge br1[2J is missing";
    assert_eq!(ending::text(&samples::ended(o, S::Failed)), expected);
}

#[test]
fn every_kind_has_an_end_of_its_own() {
    let host = samples::host("kvm1");
    let tasks = [
        (
            json("restore", &host),
            "kvm1 is restored: 1 guest came back in 21.5 s, longest",
        ),
        (
            json("evacuate", &host),
            "kvm1 is evacuated: 1 guest started elsewhere in 21.5 s",
        ),
        (
            Task::Balance(BalanceOptions::default()),
            "balanced: 1 guest moved in 21.5 s, longest downtime 212 ms; spread 45.9 -> 14.0 points",
        ),
    ];
    for (task, told) in tasks {
        let mut o = samples::drained();
        o.items.truncate(1);
        if let Task::Balance(_) = task {
            o.spread_percent = Some((45.9, 14.0));
        }
        o.task = task;
        let text = ending::text(&o);
        assert!(text.starts_with(told), "{text}");
    }
}

fn json(kind: &str, host: &drover_model::ids::HostName) -> Task {
    let task = serde_json::json!({"kind": kind, "options": {"host": host}});
    serde_json::from_value(task).unwrap()
}

#[test]
fn many_that_stay_are_counted() {
    let mut o = samples::drain();
    let stays = o.items[4].clone();
    o.items = vec![stays; 25];
    let text = ending::text(&samples::ended(o, S::Incomplete));
    assert_eq!(text.matches("host's device").count(), 20);
    assert!(text.contains("\n  and 5 more\n"), "{text}");
}
