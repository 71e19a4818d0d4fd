//! Images made and removed on a real file system.

use std::os::fd::AsRawFd;

use super::*;

const LIMIT: Duration = Duration::from_secs(30);

fn disk(path: &Path, format: &str) -> Disk {
    Disk {
        target: "vda".to_owned(),
        device: "disk".to_owned(),
        source: DiskSource::File {
            path: path.display().to_string(),
        },
        format: format.to_owned(),
        cache: None,
        read_only: false,
        shareable: false,
        virtual_bytes: 10 << 20,
        allocated_bytes: 0,
        backing: Vec::new(),
    }
}

async fn make(disk: &Disk) -> Result<()> {
    let plan = recipe(disk)?;
    let inode = hold(&plan.path)?;
    make_in(&plan, inode, "qemu-img").await
}

/// Makes it in the file with that number.
async fn make_in(plan: &Recipe, inode: u64, qemu_img: &str) -> Result<()> {
    let file = reserved(&plan.path, inode, |_| Ok(Vec::new()))?;
    create(plan.clone(), file, qemu_img, LIMIT).await
}

/// Reserves a place; says which file holds it.
fn hold(path: &Path) -> Result<u64> {
    reserve(path)?.keep(None)?;
    Ok(std::fs::metadata(path).unwrap().ino())
}

#[tokio::test]
async fn images_have_format_size_and_backing() {
    let place = tempfile::tempdir().unwrap();
    let base = place.path().join("base.raw");
    make(&disk(&base, "raw")).await.unwrap();
    let top = place.path().join("odd, name: 'x'.qcow2");
    let mut overlay = disk(&top, "qcow2");
    overlay.virtual_bytes = 12 << 20;
    overlay.backing = vec![BackingImage {
        path: base.display().to_string(),
        format: "raw".to_owned(),
        allocated_bytes: 0,
    }];
    make(&overlay).await.unwrap();

    let sizes = super::super::sizes::measure(&top, "qcow2").unwrap();
    assert_eq!(sizes.virtual_bytes, 12 << 20);
    let output = std::process::Command::new("qemu-img")
        .args(["info", "--output=json", "-f", "qcow2"])
        .arg(&top)
        .output()
        .unwrap();
    let info: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(info["backing-filename"], base.to_str().unwrap());
    assert_eq!(info["backing-filename-format"], "raw");
}

#[tokio::test]
async fn whatever_stands_there_is_left_alone() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("a.qcow2");
    std::fs::write(&path, "precious").unwrap();
    let error = make(&disk(&path, "qcow2")).await.unwrap_err();
    assert_eq!(error, HypervisorError::Exists(path.display().to_string()));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");

    let link = place.path().join("link.qcow2");
    std::os::unix::fs::symlink(place.path().join("elsewhere"), &link).unwrap();
    make(&disk(&link, "qcow2")).await.unwrap_err();
    assert!(!place.path().join("elsewhere").exists());
}

#[tokio::test]
async fn what_failed_is_made_anew_in_the_same_file_and_no_other() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("a.qcow2");
    let plan = recipe(&disk(&path, "qcow2")).unwrap();
    let inode = hold(&path).unwrap();
    for broken in ["/bin/false", "/nonexistent/qemu-img"] {
        let made = make_in(&plan, inode, broken).await;
        assert!(matches!(made, Err(HypervisorError::Failed(_))), "{made:?}");
    }
    for _ in ["once", "what a former attempt has made"] {
        make_in(&plan, inode, "qemu-img").await.unwrap();
    }
    let sizes = super::super::sizes::measure(&path, "qcow2").unwrap();
    assert_eq!(sizes.virtual_bytes, 10 << 20);

    let other = place.path().join("other");
    std::fs::write(&other, "precious").unwrap();
    std::fs::rename(&other, &path).unwrap();
    let error = make_in(&plan, inode, "qemu-img").await;
    let exists = HypervisorError::Exists(path.display().to_string());
    assert_eq!(error, Err(exists));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    std::fs::remove_file(&path).unwrap();
    let error = make_in(&plan, inode, "qemu-img").await;
    assert!(
        matches!(error, Err(HypervisorError::Failed(_))),
        "{error:?}"
    );

    let mut overlay = disk(&path, "qcow2");
    overlay.backing = vec![BackingImage {
        path: "/nonexistent/base".to_owned(),
        format: "raw".to_owned(),
        allocated_bytes: 0,
    }];
    let error = make(&overlay).await.unwrap_err();
    assert!(error.to_string().contains("/nonexistent/base"), "{error}");
}

#[test]
fn a_reserved_file_that_somebody_uses_or_wrote_to_is_left_alone() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("a.qcow2");
    let (inode, name) = (hold(&path).unwrap(), path.display().to_string());
    let take = |used: &[String]| reserved(&path, inode, |_| Ok(used.to_vec())).map(drop);
    take(&[]).unwrap();
    let error = take(std::slice::from_ref(&name)).unwrap_err();
    assert!(matches!(error, HypervisorError::WrongState(_)), "{error}");
    std::fs::write(&path, "precious").unwrap();
    assert_eq!(take(&[]), Err(HypervisorError::Exists(name)));
    let not_known = |is_empty| match is_empty {
        true => Ok(Vec::new()),
        false => Err(HypervisorError::Untold("it hangs".to_owned())),
    };
    let error = reserved(&path, inode, not_known).map(drop);
    assert!(
        matches!(error, Err(HypervisorError::Untold(_))),
        "{error:?}"
    );
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn what_cannot_be_made_is_refused() {
    let place = Path::new("/srv/a.img");
    let mut vmdk = disk(place, "raw");
    vmdk.format = "vmdk".to_owned();
    let mut empty = disk(place, "raw");
    empty.virtual_bytes = 0;
    let mut device = disk(place, "raw");
    device.source = DiskSource::Block {
        path: "/dev/vg/a".to_owned(),
    };
    let mut option = disk(place, "qcow2");
    option.backing = vec![BackingImage {
        path: "/srv/base".to_owned(),
        format: "raw,file.filename=/etc/passwd".to_owned(),
        allocated_bytes: 0,
    }];
    for bad in [
        vmdk,
        empty,
        device,
        option,
        disk(Path::new("/srv/../a"), "raw"),
    ] {
        assert!(recipe(&bad).is_err(), "{bad:?}");
    }
}

/// A program that notes its number in a file and takes long.
fn slow_program(place: &Path) -> String {
    let path = place.join("slow");
    let number = place.join("number").display().to_string();
    let text = format!("#!/bin/sh\necho $$ > '{number}'\nexec sleep 60\n");
    let source = place.join("text");
    std::fs::write(&source, text).unwrap();
    // Written by another process: what this one has open for writing its other children
    // may have too, and nobody could run it.
    let made = std::process::Command::new("install")
        .args(["-m", "755"])
        .args([&source, &path])
        .status();
    assert!(made.unwrap().success());
    path.display().to_string()
}

/// Whether a process is there and is no zombie.
fn is_alive(number: &str) -> bool {
    let state = std::fs::read_to_string(format!("/proc/{number}/stat")).unwrap_or_default();
    let state = state.rsplit(") ").next().unwrap_or_default();
    !state.is_empty() && !state.starts_with(['Z', 'X'])
}

fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> Option<T> {
    (0..200).find_map(|_| {
        std::thread::sleep(Duration::from_millis(20));
        look()
    })
}

#[test]
fn who_makes_an_image_does_not_outlive_the_agent() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("a.qcow2");
    let plan = recipe(&disk(&path, "qcow2")).unwrap();
    let inode = hold(&path).unwrap();
    let (slow, number) = (slow_program(place.path()), place.path().join("number"));
    // The thread dies as the agent does: it drops nothing.
    let dies = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let mut making = Box::pin(async move { make_in(&plan, inode, &slow).await });
        let started = runtime.block_on(async {
            let begun = async {
                loop {
                    let noted = std::fs::read_to_string(&number).unwrap_or_default();
                    if noted.ends_with('\n') {
                        return noted.trim().to_owned();
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            tokio::select! {
                made = &mut making => panic!("it ended: {made:?}"),
                number = begun => number,
            }
        });
        assert!(is_alive(&started));
        std::mem::forget((making, runtime));
        started
    });
    let started = dies.join().unwrap();
    let died = wait_for(|| (!is_alive(&started)).then_some(()));
    assert!(died.is_some(), "process {started} goes on");
}

#[test]
fn used_files_are_not_removed_by_any_name() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("a.img");
    std::fs::write(&path, "bytes").unwrap();
    let name = path.display().to_string();
    let link = place.path().join("link.img");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    remove(&name, std::slice::from_ref(&name)).unwrap_err();
    remove(&name, &[link.display().to_string()]).unwrap_err();
    assert!(path.exists());
    remove(&name, &["/other".to_owned()]).unwrap();
    remove(&name, &[]).unwrap();
    assert!(!path.exists());
}

#[test]
fn links_and_directories_are_not_removed() {
    let place = tempfile::tempdir().unwrap();
    let link = place.path().join("link");
    std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
    remove(&link.display().to_string(), &[]).unwrap_err();
    remove(&place.path().display().to_string(), &[]).unwrap_err();
    assert!(link.is_symlink());
}

#[test]
fn an_image_that_a_qemu_holds_is_not_removed() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("a.img");
    std::fs::write(&path, vec![0_u8; 512]).unwrap();
    let name = path.display().to_string();
    let held = Held::new(&path);
    let error = remove(&name, &[]).unwrap_err();
    assert!(error.to_string().contains("QEMU"), "{error}");
    drop(held);
    remove(&name, &[]).unwrap();
}

/// A process that holds an image as QEMU does.
struct Held(std::process::Child);

impl Held {
    fn new(path: &Path) -> Self {
        let child = std::process::Command::new("qemu-io")
            .args(["-f", "raw"])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let held = Self(child);
        let file = File::open(path).unwrap();
        assert!(file.as_raw_fd() > 0);
        for _ in 0..200 {
            if ffi::is_locked_by_qemu(&file).unwrap() {
                return held;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("qemu-io never took its locks");
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_name_goes_that_is_not_the_one_a_domain_uses() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name).display().to_string();
    std::fs::write(at("old"), "bytes").unwrap();
    std::os::unix::fs::symlink(at("old"), at("to-old")).unwrap();
    for used in ["old", "to-old"] {
        assert!(remove(&at("old"), &[at(used)]).is_err(), "its only name");
    }
    std::fs::hard_link(at("old"), at("new")).unwrap();
    for used in [
        vec![at("old")],
        vec![at("to-old")],
        vec![at("new"), at("old")],
    ] {
        assert!(remove(&at("old"), &used).is_err(), "{used:?}");
    }
    remove(&at("old"), &[at("new")]).unwrap();
    assert!(!Path::new(&at("old")).exists());
    assert_eq!(std::fs::read_to_string(at("new")).unwrap(), "bytes");
}
