//! Whether nodes can reach each other: ports tried and ports opened for trying.

use std::{ops::RangeInclusive, time::Duration};

use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
    sync::{Mutex, watch},
    time::{Instant, sleep_until, timeout},
};

use super::settings::LibvirtSettings;
use crate::hypervisor::Unreached;

/// How long a caller may keep a probe's next one waiting.
const LONGEST_CALL: Duration = Duration::from_secs(1);

/// Tries and opens ports.
#[derive(Debug)]
pub(super) struct Ports {
    first: u16,
    last: u16,
    /// Where disks come in: in the range, and perhaps not open yet.
    disk_port: u16,
    listen: String,
    open_for: Duration,
    reach_within: Duration,
    /// The probe that was opened last: one serves all who ask while it is open.
    probe: Mutex<Option<Probe>>,
}

/// An open port, and the moment until which it stays so.
#[derive(Debug)]
struct Probe {
    port: u16,
    until: watch::Sender<Instant>,
}

impl Ports {
    /// As the settings say.
    pub(super) fn new(settings: &LibvirtSettings) -> Self {
        Self {
            first: settings.migration_port_min,
            last: settings.migration_port_max,
            disk_port: settings.disk_port,
            listen: settings.probe_listen_address.clone(),
            open_for: Duration::from_secs(settings.probe_open_s),
            reach_within: Duration::from_secs(settings.reach_timeout_s),
            probe: Mutex::default(),
        }
    }

    /// The ports that migrations use.
    pub(super) fn range(&self) -> RangeInclusive<u16> {
        self.first..=self.last
    }

    /// Whether a TCP connection comes about.
    pub(super) async fn reach(&self, address: &str, port: u16) -> Result<(), Unreached> {
        let target = format!("{address} port {port}");
        match timeout(self.reach_within, TcpStream::connect((address, port))).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(Unreached {
                message: format!("{target}: {error}"),
                refused: error.kind() == std::io::ErrorKind::ConnectionRefused,
            }),
            Err(_) => Err(Unreached::silent(format!(
                "{target}: no answer within {} s",
                self.reach_within.as_secs()
            ))),
        }
    }

    /// Opens a port of the migration range for a while, or keeps one open for longer.
    pub(super) async fn open_probe(&self) -> Result<u16, String> {
        let mut probe = self.probe.lock().await;
        let until = Instant::now() + self.open_for;
        if let Some(probe) = &*probe
            && probe.until.send(until).is_ok()
        {
            return Ok(probe.port);
        }
        let ports: Vec<u16> = self.range().filter(|p| *p != self.disk_port).collect();
        let start = fastrand::usize(..ports.len().max(1));
        let mut last_error = String::new();
        for port in ports.iter().cycle().skip(start).take(ports.len()) {
            match TcpListener::bind((self.listen.as_str(), *port)).await {
                Ok(listener) => {
                    let (until, end) = watch::channel(until);
                    tokio::spawn(serve(listener, end));
                    *probe = Some(Probe { port: *port, until });
                    return Ok(*port);
                }
                Err(error) => last_error = error.to_string(),
            }
        }
        Err(format!(
            "no port of {} to {} can be opened on {}: {last_error}",
            self.first, self.last, self.listen
        ))
    }
}

/// Takes callers until the time is up. The caller hangs up first, so that the
/// port is free for QEMU at once afterwards.
async fn serve(listener: TcpListener, mut end: watch::Receiver<Instant>) {
    loop {
        let until = *end.borrow_and_update();
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((mut caller, _)) = accepted else { return };
                let _ = timeout(LONGEST_CALL, caller.read(&mut [0_u8; 1])).await;
            }
            changed = end.changed() => if changed.is_err() { return },
            () = sleep_until(until) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports() -> Ports {
        Ports::new(&LibvirtSettings {
            migration_port_min: 40_152,
            migration_port_max: 40_215,
            probe_listen_address: "127.0.0.1".to_owned(),
            probe_open_s: 1,
            ..LibvirtSettings::default()
        })
    }

    #[tokio::test]
    async fn a_probe_port_is_reached_while_it_is_open() {
        let ports = ports();
        let port = ports.open_probe().await.unwrap();
        assert!((40_152..=40_215).contains(&port));
        ports.reach("127.0.0.1", port).await.unwrap();
        ports.reach("127.0.0.1", port).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1200)).await;
        let error = ports.reach("127.0.0.1", port).await.unwrap_err();
        assert!(
            error.message.contains(&port.to_string()) && error.refused,
            "{error:?}"
        );
    }

    #[tokio::test]
    async fn one_probe_port_serves_all_who_ask_and_outlives_the_first() {
        let ports = ports();
        let port = ports.open_probe().await.unwrap();
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(500)).await;
            assert_eq!(ports.open_probe().await.unwrap(), port);
        }
        ports.reach("127.0.0.1", port).await.unwrap();
    }

    #[tokio::test]
    async fn the_port_for_disks_is_left_to_them() {
        let ports = Ports::new(&LibvirtSettings {
            migration_port_min: 40_250,
            migration_port_max: 40_251,
            disk_port: 40_251,
            probe_listen_address: "127.0.0.1".to_owned(),
            ..LibvirtSettings::default()
        });
        assert_eq!(ports.open_probe().await, Ok(40_250));
        // Its port is taken now, and the other is not tried.
        let taken = ports.probe.lock().await.take();
        let again = ports.open_probe().await;
        assert!(again.is_err_and(|e| e.contains("40250 to 40251")));
        drop(taken);
    }
}
