//! Texts as an operator reads them.

use drover_model::migration::{Flavor, TransferOptions};

use super::*;
use crate::samples;

#[test]
fn a_plan_looks_so() {
    let mut sample = samples::plan();
    sample.failures = samples::checks();
    let expected = "\
instance       demo-1 (11111111-2222-4333-8444-555555555555)
from           kvm1
to             kvm2
memory         128 MiB
disks to copy  1 (600 MiB)
verdict        would be refused: 2 checks failed

disks to copy
  vda  600 MiB

decisions
  kvm2 has the most room

failed checks
  memory (destination): kvm2 has 64 MiB left, 128 MiB needed
      what to do: free memory on kvm2
  network (destination): bridge br1[2J is missing";
    assert_eq!(plan(&sample), expected);
    assert!(plan(&samples::plan()).contains("verdict        would be accepted"));
}

#[test]
fn a_whole_record_looks_so() {
    let mut m = samples::completed(samples::migration());
    m.warnings = vec!["kvm1: /var/lib/x stays".to_owned()];
    m.way = Way::Live(LiveOptions {
        post_copy: true,
        bandwidth_mib_s: Some(100),
        ..LiveOptions::default()
    });
    m.requester.user_id = Some("ann".to_owned());
    let expected = "\
id             7
uuid           01997777-0000-7000-8000-00000000abcd
type           live-migration
instance       demo-1 (11111111-2222-4333-8444-555555555555)
project        default
from           kvm1
to             kvm2 (named by the caller)
status         completed
phase          done
step           transfer
ended because  -
downtime       212 ms
total time     2.1 s
memory         128 MiB, 128 MiB sent, 0 B remaining
disk           1 GiB, 1 GiB sent, 0 B remaining
options        copy disks that are not shared, post-copy allowed, at most 100 MiB/s
asked          -
requester      user ann
conductor      ctl, attempt 1
accepted       2026-11-23 18:46:51Z
changed        2026-11-23 18:46:53Z
ended          2026-11-23 18:46:53Z

steps
  STEP      TOOK
  check     120 ms
  transfer  1.8 s

decisions
    +100 ms  vda is copied: kvm2 does not see its directory

warnings
  kvm1: /var/lib/x stays";
    assert_eq!(migration(&m), expected, "\n{}", migration(&m));
}

#[test]
fn a_whole_record_of_a_cold_one_looks_so() {
    let mut m = samples::finished();
    m.way = Way::Cold(ColdOptions {
        shutdown_timeout_s: Some(90),
        force_stop_after_s: Some(120),
        pre_copy: true,
        bandwidth_mib_s: Some(100),
        progress_timeout_s: Some(60),
        flavor: Some(Flavor {
            vcpus: 2,
            memory_mb: 256,
        }),
        ..Default::default()
    });
    m.warnings = vec!["kvm1: /var/lib/x stays".to_owned()];
    let expected = "\
id             7
uuid           01997777-0000-7000-8000-00000000abcd
type           migration
instance       demo-1 (11111111-2222-4333-8444-555555555555)
project        default
from           kvm1
to             kvm2 (named by the caller)
status         finished
phase          done
step           start
ended because  -
off for        14.3 s
total time     21.5 s
disk           1 GiB, 1 GiB sent, 0 B remaining
options        copy disks before it stops, 90 s to shut down in, stopped hard after 120 s, \
at most 100 MiB/s, given up after 60 s without progress, resized to 2 vCPUs and 256 MiB
asked          -
requester      -
conductor      ctl, attempt 1
accepted       2026-11-23 18:46:51Z
changed        2026-11-23 18:47:12Z
ended          2026-11-23 18:47:12Z

what can be done
  `drover instance confirm demo-1`: kvm1 removes its copy
  `drover instance revert demo-1`: back to kvm1, as it was there
  `drover instance revert demo-1 --keep-changes`: back with all it wrote since

steps
  STEP  TOOK
  stop  8.0 s
  copy  5.2 s

decisions
    +100 ms  vda is copied: kvm2 does not see its directory

warnings
  kvm1: /var/lib/x stays";
    assert_eq!(migration(&m), expected, "\n{}", migration(&m));
}

#[test]
fn a_cold_one_tells_what_was_decided_and_nothing_of_memory() {
    let mut m = samples::finished();
    m.status = MigrationStatus::Reverting;
    m.ending = Some(Ending::Revert);
    let text = migration(&m);
    assert!(text.contains(" to revert\n"), "{text}");
    assert!(!text.contains("what can be done"), "{text}");
    let text = migration(&samples::stopping());
    for word in ["memory", "dirty rate", "iteration", "expected downtime"] {
        assert!(!text.contains(word), "{text}");
    }
    assert!(
        text.contains("waiting for the guest to shut down"),
        "{text}"
    );
}

#[test]
fn a_plan_without_memory_to_send_does_not_speak_of_it() {
    let mut sample = samples::plan();
    sample.memory_mib = 0;
    assert!(!plan(&sample).contains("memory"), "{}", plan(&sample));
}

#[test]
fn a_plan_of_a_transfer_looks_so() {
    let mut sample = samples::plan();
    sample.dest_host = Some(sample.source_host.clone());
    sample.memory_mib = 0;
    sample.decisions = vec!["lan (br0) becomes blue's lan (br-blue)".to_owned()];
    let expected = "\
instance       demo-1 (11111111-2222-4333-8444-555555555555)
receiver       blue
host           kvm1
disks to move  1 (600 MiB)
verdict        would be transferred to blue on kvm1

disks to move
  vda  600 MiB

decisions
  lan (br0) becomes blue's lan (br-blue)";
    let text = transfer_plan(&sample, "blue");
    assert_eq!(text, expected, "\n{text}");
    sample.failures = samples::checks();
    let text = transfer_plan(&sample, "blue");
    assert!(
        text.contains("verdict        would be refused: 2 checks failed"),
        "{text}"
    );
}

#[test]
fn a_whole_record_of_a_transfer_looks_so() {
    let mut m = samples::handed_over(samples::handover(TransferMode::Live));
    let expected = "\
id              7
uuid            01997777-0000-7000-8000-00000000abcd
type            project-transfer
instance        demo-1 (11111111-2222-4333-8444-555555555555)
project         default -> blue (giver -> receiver)
host            kvm1
status          completed
phase           done
step            disks
ended because   -
network cut     34 ms
total time      2.1 s
disk            1 GiB, 1 GiB sent, 0 B remaining
options         live
offer           01997777-0000-7000-8000-00000000feed
offered         2026-11-23 18:45:51Z by user ann
offer accepted  2026-11-23 18:46:51Z by user bob
asked           -
requester       user bob
conductor       ctl, attempt 1
accepted        2026-11-23 18:46:51Z
changed         2026-11-23 18:46:53Z
ended           2026-11-23 18:46:53Z

decisions
    +100 ms  lan (br0) becomes blue's lan (br-blue)";
    assert_eq!(migration(&m), expected, "\n{}", migration(&m));
    if let Some(consent) = &mut m.consent {
        consent.offer = None;
    }
    let text = migration(&m);
    assert!(
        text.contains("none: asked for on behalf of both sides"),
        "{text}"
    );
}

#[test]
fn all_options_of_a_transfer_are_told() {
    let mut m = samples::handed_over(samples::handover(TransferMode::Cold));
    if let Way::Transfer(transfer) = &mut m.way {
        transfer.options = TransferOptions {
            networks: [("br0".to_owned(), "lan".to_owned())].into(),
            keep_disk: true,
            new_mac: true,
            name: Some("new\x1b[2J".to_owned()),
            title: Some("T".to_owned()),
            shutdown_timeout_s: Some(90),
            force_stop_after_s: Some(120),
            bandwidth_mib_s: Some(100),
            progress_timeout_s: Some(60),
            ..transfer.options.clone()
        };
    }
    let text = migration(&m);
    let expected = "cold, network br0 -> lan, disks stay where they are, new MAC addresses, \
                    renamed to new[2J, titled T, 90 s to shut down in, stopped hard after 120 s, \
                    at most 100 MiB/s, given up after 60 s without progress";
    assert!(text.contains(expected), "{text}");
    assert!(text.contains("\noff for         34 ms\n"), "{text}");
    m.downtime_ms = None;
    assert!(migration(&m).contains("none: it was off before"));
}

#[test]
fn a_running_record_tells_its_outlook() {
    let text = migration(&samples::running(samples::migration()));
    assert!(text.contains("\neta                1.5 s\n"), "{text}");
    assert!(text.contains("\ndirty rate         4 MiB/s\n"), "{text}");
}

#[test]
fn a_node_looks_so() {
    let text = node(&samples::node("kvm1"), &[]);
    let expected = "\
host          kvm1
state         up
placing       enabled
operation     -
heard         1.2 s ago
clock         +3 ms to the conductor's
vcpus         2/16
memory        0.2/7.5 GiB
disk claimed  0 B
address       100.100.100.11
libvirt uri   qemu+tcp://kvm1/system
agent         0.1.0, RPC 1.0 to 1.1, since 2026-11-23 18:46:51Z, incarnation 1
libvirt       9.0.0
hypervisor    QEMU 7.2.0, offers KVM
cpu           4 x EPYC-Rome (x86_64)
host memory   8 GiB
disk          80 GiB free of 100 GiB";
    assert_eq!(text, expected, "\n{text}");
}

#[test]
fn an_instance_looks_so() {
    let text = instance(&samples::instance("demo-1"));
    assert!(
        text.starts_with("name        demo-1\nuuid        11111111"),
        "{text}"
    );
    assert!(text.contains("\nstate       running (active)\n"), "{text}");
}
