//! Evidence is made of what was seen, and of nothing less.

use drover_model::{
    api::compute::{CopyHistory, FileSeen},
    ids::MigrationId,
};

use super::*;

fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

fn file(path: &str, length_bytes: u64) -> FileSeen {
    FileSeen {
        path: path.to_owned(),
        exists: length_bytes > 0,
        length_bytes,
    }
}

fn survivor(presence: Presence, files: Vec<FileSeen>) -> Survivor {
    Survivor {
        host: host("kvm1"),
        seen_at_ms: 1,
        copy: CopySeen {
            presence,
            migrating: false,
            generation: Some(3),
            files,
            aside: None,
            known: CopyHistory::default(),
        },
        moved_on: false,
    }
}

const RUNNING: Presence = Presence::Present(PowerState::Running);
const OFF: Presence = Presence::Present(PowerState::Shutdown);

fn judged(survivor: Option<&Survivor>) -> std::result::Result<Redundant, String> {
    let proof = Redundant::by(survivor, &host("kvm2"), 3, ["/a"]);
    proof.map_err(|fault| fault.message)
}

#[test]
fn a_copy_is_redundant_only_by_a_whole_one_elsewhere() {
    for presence in [RUNNING, OFF] {
        let there = survivor(presence, vec![file("/a", 9)]);
        let proof = judged(Some(&there)).unwrap();
        assert!(proof.covers("/a") && !proof.covers("/b"));
        assert_eq!(proof.runs(), presence == RUNNING);
    }
    let said = |survivor| judged(Some(&survivor)).err().expect("it is refused");
    assert!(judged(None).err().unwrap().contains("no copy is named"));
    for presence in [Presence::Absent, Presence::Incoming] {
        let words = said(survivor(presence, vec![file("/a", 9)]));
        assert!(words.contains("no whole copy"), "{words}");
    }
    let words = said(survivor(OFF, vec![file("/a", 0)]));
    assert!(words.contains("without /a"), "{words}");
    let words = said(survivor(OFF, vec![file("/b", 9)]));
    assert!(words.contains("has no /a"), "{words}");
    let mut here = survivor(OFF, vec![file("/a", 9)]);
    here.host = host("kvm2");
    assert!(said(here).contains("this one"));
    let mut older = survivor(OFF, vec![file("/a", 9)]);
    older.copy.generation = Some(2);
    assert!(said(older).contains("older"));
    let mut moving = survivor(RUNNING, vec![file("/a", 9)]);
    moving.copy.migrating = true;
    assert!(said(moving).contains("no whole copy"));
}

#[test]
fn a_disk_that_is_shorter_elsewhere_is_not_the_same() {
    let there = survivor(OFF, vec![file("/a", DISK_BYTES), file("/tpm", 10)]);
    let judge = |bytes| Redundant::none_is_longer(Some(&there), [("/a", bytes)]);
    assert!(judge(DISK_BYTES).is_ok());
    assert!(judge(DISK_BYTES + 1).is_err());
    let tpm = Redundant::none_is_longer(Some(&there), [("/tpm", 20)]);
    assert!(tpm.is_ok(), "a TPM's state may become shorter");
}

#[test]
fn of_a_guest_that_was_moved_on_whole_lengths_and_names_say_nothing() {
    let mut there = survivor(RUNNING, vec![file("/b", 9)]);
    there.moved_on = true;
    let by = |there: &Survivor| Redundant::by(Some(there), &host("kvm2"), 3, ["/a"]);
    assert!(by(&there).is_ok());
    assert!(has_its_own(Some(&there), "/a"));
    let longer = Redundant::none_is_longer(Some(&there), [("/b", DISK_BYTES)]);
    assert!(longer.is_ok());
    there.copy.files = vec![file("/b", 0)];
    assert!(by(&there).is_err(), "it is not whole");
}

#[test]
fn a_newer_copy_is_one_that_was_seen_in_a_higher_generation() {
    let evacuated = |presence, generation| Evacuated {
        instance: InstanceId(uuid::Uuid::from_u128(1)),
        migration: MigrationId::generate(),
        generation: 4,
        host: Some(host("kvm1")),
        confirmed: true,
        seen: Some(CopySeen {
            generation,
            ..survivor(presence, Vec::new()).copy
        }),
    };
    let by = |evacuated: &Evacuated| Superseded::by(evacuated, &host("kvm2"), 3);
    assert!(by(&evacuated(RUNNING, Some(4))).unwrap().is_active_there());
    assert!(!by(&evacuated(OFF, Some(4))).unwrap().is_active_there());
    assert!(by(&evacuated(RUNNING, Some(3))).is_none());
    assert!(by(&evacuated(RUNNING, None)).is_none());
    assert!(by(&evacuated(Presence::Absent, Some(4))).is_none());
    let said = Evacuated {
        seen: None,
        ..evacuated(RUNNING, Some(4))
    };
    assert!(by(&said).is_none(), "a word is no sight");
}
