//! Whether nodes can reach each other: ports tried and ports opened for trying.

use std::{sync::Arc, time::Duration};

use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout, timeout_at},
};

use super::settings::LibvirtSettings;

/// Probe ports open at once.
const PROBES: usize = 8;
/// Callers that one probe port serves.
const CALLERS: usize = 16;

/// Tries and opens ports.
#[derive(Debug)]
pub(super) struct Ports {
    first: u16,
    last: u16,
    listen: String,
    open_for: Duration,
    reach_within: Duration,
    free: Arc<Semaphore>,
}

impl Ports {
    /// As the settings say.
    pub(super) fn new(settings: &LibvirtSettings) -> Self {
        Self {
            first: settings.migration_port_min,
            last: settings.migration_port_max,
            listen: settings.probe_listen_address.clone(),
            open_for: Duration::from_secs(settings.probe_open_s),
            reach_within: Duration::from_secs(settings.reach_timeout_s),
            free: Arc::new(Semaphore::new(PROBES)),
        }
    }

    /// Whether a TCP connection comes about.
    pub(super) async fn reach(&self, address: &str, port: u16) -> Result<(), String> {
        let target = format!("{address} port {port}");
        match timeout(self.reach_within, TcpStream::connect((address, port))).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(format!("{target}: {error}")),
            Err(_) => Err(format!(
                "{target}: no answer within {} s",
                self.reach_within.as_secs()
            )),
        }
    }

    /// Opens a port of the migration range for a while.
    pub(super) async fn open_probe(&self) -> Result<u16, String> {
        let permit = self
            .free
            .clone()
            .try_acquire_owned()
            .map_err(|_| format!("{PROBES} probe ports are open already"))?;
        let count = u32::from(self.last - self.first) + 1;
        let start = fastrand::u32(..count);
        let mut last_error = String::new();
        for step in 0..count {
            let offset = (start + step) % count;
            let port = self.first + u16::try_from(offset).map_err(|e| e.to_string())?;
            match TcpListener::bind((self.listen.as_str(), port)).await {
                Ok(listener) => {
                    tokio::spawn(serve(listener, self.open_for, permit));
                    return Ok(port);
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
async fn serve(listener: TcpListener, open_for: Duration, _permit: OwnedSemaphorePermit) {
    let end = Instant::now() + open_for;
    for _ in 0..CALLERS {
        let Ok(Ok((mut caller, _))) = timeout_at(end, listener.accept()).await else {
            return;
        };
        let _ = timeout_at(end, caller.read(&mut [0_u8; 1])).await;
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
        assert!(error.contains(&port.to_string()), "{error}");
    }

    #[tokio::test]
    async fn probe_ports_are_bounded() {
        let ports = ports();
        for _ in 0..PROBES {
            ports.open_probe().await.unwrap();
        }
        ports.open_probe().await.unwrap_err();
    }
}
