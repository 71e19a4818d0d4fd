//! Disks placed on a file system of the machine.

use drover_model::guest::BackingImage;

use super::*;

const NOISE: usize = 3 << 20;

fn qemu_img(arguments: &[&str]) {
    let done = std::process::Command::new("qemu-img")
        .args(arguments)
        .output();
    let done = done.unwrap();
    let words = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{words}");
}

/// A raw base full of noise, and an empty image over it that names it by its place.
struct Scene {
    place: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        for name in ["old", "new"] {
            std::fs::create_dir(place.path().join(name)).unwrap();
        }
        let scene = Self { place };
        let mut noise = vec![0_u8; NOISE];
        fastrand::fill(&mut noise);
        std::fs::write(scene.at("old/base"), noise).unwrap();
        let top = scene.at("old/top");
        qemu_img(&[
            "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base", &top,
        ]);
        scene
    }

    fn at(&self, name: &str) -> String {
        self.place.path().join(name).display().to_string()
    }

    fn disk(&self, flatten: bool) -> DiskMove {
        DiskMove {
            target: "vda".to_owned(),
            from: self.at("old/top"),
            to: self.at("new/top"),
            format: "qcow2".to_owned(),
            backing: vec![BackingImage {
                path: self.at("old/base"),
                format: "raw".to_owned(),
                allocated_bytes: 0,
            }],
            flatten,
            data_bytes: 0,
        }
    }

    fn places(&self) -> chain::Places {
        chain::Places(vec![self.place.path().to_path_buf()])
    }

    fn link(&self, disk: &DiskMove, used: &[String]) -> Result<Placed> {
        link(&check(disk).unwrap(), used, &self.places())
    }

    fn is_whole(&self) {
        let (old, new) = (self.at("old/top"), self.at("new/top"));
        qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "qcow2", &old, &new]);
    }

    fn below(&self) -> Vec<String> {
        let below = chain::below(&self.at("new/top"), "qcow2", &self.places()).unwrap();
        below.into_iter().map(|image| image.path).collect()
    }
}

#[tokio::test]
async fn a_link_is_made_once_and_leads_to_what_was_below() {
    let scene = Scene::new();
    let disk = scene.disk(false);
    std::fs::write(&disk.to, "left by an earlier try").unwrap();
    let placing = check(&disk).unwrap();
    let used = [disk.from.clone()];
    let astray = Placed::Linked { leads_astray: true };
    // The second finds what the first left if that died here.
    for _ in 0..2 {
        assert_eq!(scene.link(&disk, &used).unwrap(), astray);
    }
    straighten(&placing, "qemu-img").await.unwrap();
    settle(&placing).unwrap();
    let straight = Placed::Linked {
        leads_astray: false,
    };
    assert_eq!(scene.link(&disk, &used).unwrap(), straight);
    assert_eq!(scene.below(), [scene.at("old/base")]);
    scene.is_whole();
}

#[tokio::test]
async fn a_copy_is_whole_thin_and_owners_only() {
    use std::os::unix::fs::PermissionsExt;
    for flatten in [false, true] {
        let scene = Scene::new();
        let disk = scene.disk(flatten);
        if flatten {
            assert_eq!(scene.link(&disk, &[]).unwrap(), Placed::NotYet);
        }
        let placing = check(&disk).unwrap();
        copy(&placing, "qemu-img", None, Some(1 << 30))
            .await
            .unwrap();
        settle(&placing).unwrap();
        scene.is_whole();
        let metadata = std::fs::metadata(&disk.to).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        let bytes = metadata.blocks() * 512;
        let expected = if flatten {
            Vec::new()
        } else {
            vec![scene.at("old/base")]
        };
        assert_eq!(scene.below(), expected);
        assert_eq!(bytes >= u64::try_from(NOISE).unwrap(), flatten, "{bytes}");
        let again = copy(&placing, "qemu-img", None, None).await;
        assert!(
            matches!(again, Err(HypervisorError::Exists(_))),
            "{again:?}"
        );
    }
}

#[tokio::test]
async fn what_was_written_since_is_not_placed_whatever_the_clock_said() {
    let scene = Scene::new();
    let disk = scene.disk(true);
    assert!(!is_placed(&disk).unwrap(), "nothing is there");
    let placing = check(&disk).unwrap();
    copy(&placing, "qemu-img", None, None).await.unwrap();
    assert!(is_placed(&disk).unwrap());
    assert!(is_placed(&disk.reversed()).unwrap(), "neither was written");
    let (now, hour) = (std::time::SystemTime::now(), Duration::from_secs(3600));
    for then in [now + hour, now - hour] {
        let old = File::options().write(true).open(&disk.from).unwrap();
        old.set_modified(then).unwrap();
        assert!(!is_placed(&disk).unwrap(), "{then:?}");
        assert!(!is_placed(&disk.reversed()).unwrap(), "{then:?}");
    }
}

#[test]
fn a_time_that_is_kept_less_exactly_is_the_same() {
    let at = (7, 123_456_789);
    for kept in [123_456_789, 123_456_700, 123_456_000, 123_000_000, 0] {
        assert!(
            is_one_time(at, (7, kept)) && is_one_time((7, kept), at),
            "{kept}"
        );
    }
    for other in [(8, 123_456_789), (7, 123_456_788), (7, 123_456_800)] {
        assert!(
            !is_one_time(at, other) && !is_one_time(other, at),
            "{other:?}"
        );
    }
}

#[tokio::test]
async fn a_copy_that_fails_leaves_nothing_and_says_why() {
    let scene = Scene::new();
    let disk = scene.disk(true);
    std::fs::remove_file(scene.at("old/base")).unwrap();
    let failed = copy(&check(&disk).unwrap(), "qemu-img", None, None).await;
    let words = failed.unwrap_err().to_string();
    assert!(words.contains("base"), "{words}");
    assert!(!Path::new(&disk.to).exists());
}

#[test]
fn nothing_is_placed_over_what_is_used_or_over_another_chain() {
    let scene = Scene::new();
    let disk = scene.disk(false);
    let wrong = |result: Result<Placed>| matches!(result, Err(HypervisorError::WrongState(_)));
    std::fs::write(&disk.to, "somebody's").unwrap();
    assert!(wrong(scene.link(&disk, std::slice::from_ref(&disk.to))));
    assert!(Path::new(&disk.to).exists());
    let other = DiskMove {
        backing: Vec::new(),
        ..disk.clone()
    };
    assert!(wrong(scene.link(&other, &[])));
    assert!(
        check(&DiskMove {
            to: disk.from.clone(),
            ..disk.clone()
        })
        .is_err()
    );
    assert!(
        check(&DiskMove {
            format: "raw".to_owned(),
            ..disk
        })
        .is_err()
    );
}

#[test]
fn a_directory_is_looked_at() {
    let scene = Scene::new();
    let names = ["top", "free", "../old/base"].map(str::to_owned);
    let room = look(&scene.at("old"), &names).unwrap();
    assert_eq!(room.taken, ["top"]);
    assert!(room.free_bytes > 0 && !room.file_system.is_empty());
    assert!(look(&scene.at("old/top"), &names).is_err());
    assert!(look(&scene.at("gone"), &names).is_err());
    assert!(look("relative", &names).is_err());
}
