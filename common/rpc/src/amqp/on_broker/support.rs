//! What the tests against a real broker share: the broker's URL, names of their
//! own, and a wire that can be cut.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use crate::{
    AmqpTransport, CallOptions, Endpoint, MessagingSettings, RemoteFailure, Request,
    RequestContext, RpcClient, RpcError, RpcServer, Target, Transport,
};
use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, watch},
    task::{JoinHandle, JoinSet},
};

/// The broker to test with. Without one the test says so and is skipped, unless
/// `DROVER_REQUIRE_REAL=1`.
pub(super) fn broker_url() -> Option<String> {
    match std::env::var("DROVER_TEST_AMQP_URL") {
        Ok(url) if !url.is_empty() => Some(url),
        _ if std::env::var("DROVER_REQUIRE_REAL").as_deref() == Ok("1") => {
            panic!("DROVER_REQUIRE_REAL=1, and DROVER_TEST_AMQP_URL names no broker")
        }
        _ => {
            eprintln!("SKIPPED: needs a real broker, set DROVER_TEST_AMQP_URL");
            None
        }
    }
}

/// Fails the test instead of hanging it.
pub(super) async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), work)
        .await
        .expect("nothing happened within 30 s")
}

/// One test's corner of the broker, behind a wire that can be cut.
pub(super) struct Rig {
    pub(super) url: String,
    pub(super) proxy: Proxy,
    pub(super) settings: MessagingSettings,
    pub(super) topic: String,
}

impl Rig {
    pub(super) async fn new() -> Option<Self> {
        let url = broker_url()?;
        let name = format!("drover-test-{:016x}", fastrand::u64(..));
        let (user, rest) = split_url(&url);
        let (host, path) = rest.split_once('/').unwrap_or((&rest, ""));
        let proxy = Proxy::start(host.to_owned()).await;
        let settings = MessagingSettings {
            control_exchange: name.clone(),
            amqp_auto_delete: true,
            publish_timeout_s: 5,
            response_timeout_s: 20,
            reconnect_max_s: 1,
            ..MessagingSettings::with_url(format!("rabbit://{user}@{}/{path}", proxy.address))
        };
        Some(Self {
            url,
            proxy,
            settings,
            topic: name,
        })
    }

    pub(super) fn transport(&self) -> Arc<dyn Transport> {
        AmqpTransport::new(&self.settings).expect("the settings are right")
    }

    pub(super) fn client(&self) -> RpcClient {
        RpcClient::new(self.transport(), &self.settings)
    }

    pub(super) fn target(&self) -> Target {
        Target::topic(&self.topic).version("1.0")
    }

    pub(super) async fn server(&self, worker: &Worker) -> RpcServer {
        self.server_on(self.transport(), worker).await
    }

    pub(super) async fn server_on(
        &self,
        transport: Arc<dyn Transport>,
        worker: &Worker,
    ) -> RpcServer {
        let server = RpcServer::builder(transport, &self.settings, &self.topic, "host")
            .endpoint(worker.clone())
            .start();
        soon(server).await.expect("the names are right")
    }

    /// A channel of the test's own, straight to the broker.
    pub(super) async fn channel(&self) -> (lapin::Connection, lapin::Channel) {
        let (user, rest) = split_url(&self.url);
        let (host, path) = rest.split_once('/').unwrap_or((&rest, ""));
        let vhost = if path.is_empty() { "%2f" } else { path };
        let url = format!("amqp://{user}@{host}/{vhost}");
        let connection = lapin::Connection::connect(&url, Default::default());
        let connection = connection.await.expect("the broker is there");
        let channel = connection.create_channel().await.expect("a channel");
        (connection, channel)
    }

    /// Calls until somebody is there to answer.
    pub(super) async fn call_until_answered(&self, client: &RpcClient) -> Value {
        let options = CallOptions {
            timeout: Some(Duration::from_secs(2)),
            mandatory: true,
            ..CallOptions::default()
        };
        soon(async {
            loop {
                let context = RequestContext::new();
                let outcome: Result<Value, RpcError> = client
                    .call_with(&self.target(), &context, "echo", &json!({"x": 1}), options)
                    .await;
                match outcome {
                    Ok(value) => return value,
                    Err(error) => {
                        eprintln!("not yet: {error}");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                }
            }
        })
        .await
    }
}

/// `user:password` and `host:port/path` of a broker URL of one host.
fn split_url(url: &str) -> (String, String) {
    let rest = url.split_once("://").expect("a URL").1;
    let (user, rest) = rest.rsplit_once('@').unwrap_or(("guest:guest", rest));
    (user.to_owned(), rest.to_owned())
}

/// An endpoint whose requests the test holds in its hand.
#[derive(Clone, Default)]
pub(super) struct Worker {
    pub(super) seen: Arc<Mutex<Vec<Seen>>>,
    pub(super) arrived: Arc<Notify>,
    /// Handlers of `hold` wait for it.
    pub(super) go: Arc<Notify>,
}

#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) method: String,
    pub(super) redelivered: bool,
    pub(super) context: RequestContext,
}

impl Worker {
    pub(super) fn count(&self, method: &str) -> usize {
        let seen = self.seen.lock().expect("no test panics with it");
        seen.iter().filter(|seen| seen.method == method).count()
    }

    pub(super) async fn has_seen(&self, method: &str, times: usize) {
        soon(async {
            while self.count(method) < times {
                self.arrived.notified().await;
            }
        })
        .await;
    }
}

#[async_trait]
impl Endpoint for Worker {
    fn methods(&self) -> &[&str] {
        &[
            "echo",
            "hold",
            "accept_and_hold",
            "fail",
            "panic",
            "stumble",
        ]
    }

    async fn handle(&self, request: Request) -> Result<Value, RemoteFailure> {
        let seen = Seen {
            method: request.method().to_owned(),
            redelivered: request.is_redelivered(),
            context: request.context().clone(),
        };
        if request.method() == "accept_and_hold" {
            request.accept().await;
        }
        self.seen.lock().expect("no test panics with it").push(seen);
        self.arrived.notify_one();
        match request.method() {
            "hold" | "accept_and_hold" => self.go.notified().await,
            "fail" => {
                let failure = RemoteFailure::nova("MigrationPreCheckError", "not today");
                return Err(failure.with_kwarg("reason", "today"));
            }
            // Trouble that passes with the third try.
            "stumble" if self.count("stumble") < 3 => {
                return Err(RemoteFailure::runtime_error("the database failed").passing());
            }
            "panic" => panic!("a handler that panics"),
            _ => {}
        }
        Ok(request.args_map()?.into())
    }
}

/// What a proxy does with connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wire {
    /// Passes everything on.
    Up,
    /// Cuts what there is and takes nothing new.
    Cut,
    /// Takes connections and says nothing.
    Silent,
}

/// A wire to the broker that can be cut.
pub(super) struct Proxy {
    pub(super) address: SocketAddr,
    wire: watch::Sender<Wire>,
    _task: JoinHandle<()>,
}

impl Proxy {
    pub(super) async fn start(broker: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let wire = watch::Sender::new(Wire::Up);
        let state = wire.clone();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(pass(client, broker.clone(), state.subscribe()));
                while connections.try_join_next().is_some() {}
            }
        });
        Self {
            address,
            wire,
            _task: task,
        }
    }

    pub(super) fn set(&self, wire: Wire) {
        self.wire.send_replace(wire);
    }
}

async fn pass(mut client: TcpStream, broker: String, mut wire: watch::Receiver<Wire>) {
    let now = *wire.borrow_and_update();
    match now {
        Wire::Cut => return,
        Wire::Silent => {
            let _ = wire.changed().await;
            return;
        }
        Wire::Up => {}
    }
    let Ok(mut server) = TcpStream::connect(&broker).await else {
        return;
    };
    tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
        // Whatever the change: cut and mended at once is cut all the same.
        _ = wire.changed() => {}
    }
}
