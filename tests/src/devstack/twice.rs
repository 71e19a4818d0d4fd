//! A lookout for guests that run twice. All nodes share the machine's process
//! ids, so that every QEMU is seen whatever its libvirtd knows.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{JoinHandle, sleep},
    time::Duration,
};

use super::Devstack;

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(50);

/// Looks out until it is dropped.
pub struct Lookout {
    over: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<String>>>,
    thread: Option<JoinHandle<()>>,
}

impl Devstack {
    /// Looks out for guests with a shared disk that run twice at once.
    pub fn lookout(&self) -> Lookout {
        let over = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (ends, notes, shared) = (over.clone(), seen.clone(), self.shared());
        let look = move || {
            while !ends.load(Ordering::Relaxed) {
                let twice = running_twice(&shared);
                notes
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .extend(twice);
                sleep(PAUSE);
            }
        };
        Lookout {
            over,
            seen,
            thread: Some(std::thread::spawn(look)),
        }
    }
}

impl Lookout {
    /// Ends it; it must have seen none.
    pub fn end(mut self) {
        self.stop();
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(seen.is_empty(), "{seen:#?}");
    }

    fn stop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Lookout {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Command lines of QEMUs that have the same guest.
fn running_twice(shared: &str) -> Vec<String> {
    let mut by_guest: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(line) = std::fs::read(process.path().join("cmdline")) else {
            continue;
        };
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let name = line
            .split("guest=")
            .nth(1)
            .and_then(|t| t.split(',').next());
        if let Some(name) = name.filter(|_| line.contains(shared)) {
            by_guest.entry(name.to_owned()).or_default().push(line);
        }
    }
    let twice = by_guest.into_values().filter(|lines| lines.len() > 1);
    twice.flatten().collect()
}
