//! Measures RPC: the real oslo.messaging, drover-rpc and a bare echo on the AMQP
//! library, one after the other in each round, on the same broker.
//!
//! Client and server are processes of their own on every side. The bare echo
//! sends the same properties, confirms and acknowledgements over the same number
//! of connections; it is what the library reaches with nothing on top. Numbers
//! are printed and never judged here.
//!
//! ```text
//! bench-rpc run URL [ROUNDS [SECONDS]]
//! ```

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use drover_rpc::{
    AmqpTransport, Endpoint, MessagingSettings, RemoteFailure, Request, RequestContext, RpcClient,
    RpcServer, Target, Transport,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{io::AsyncReadExt, sync::oneshot};

/// Exchange of all sides, apart from any real service on the broker.
const EXCHANGE: &str = "drover-bench";
const SIDES: [Side; 3] = [Side::Oslo, Side::Drover, Side::Lapin];
const CALLERS: [usize; 2] = [1, 16];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Side {
    Oslo,
    Drover,
    Lapin,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Measured {
    calls_per_s: f64,
    p50_ms: f64,
    p99_ms: f64,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["run", url, rest @ ..] => {
            let rounds = rest.first().map_or(Ok(3), |text| text.parse())?;
            let seconds = rest.get(1).map_or(Ok(5.0), |text| text.parse())?;
            run(url, rounds, seconds)
        }
        [side @ ("drover" | "lapin"), url, "server", topic] => on_tokio(serve(side, url, topic)),
        [
            side @ ("drover" | "lapin"),
            url,
            "client",
            topic,
            callers,
            seconds,
        ] => {
            let seconds = Duration::from_secs_f64(seconds.parse()?);
            on_tokio(call(side, url, topic, callers.parse()?, seconds))
        }
        _ => bail!("usage: bench-rpc run URL [ROUNDS [SECONDS]]"),
    }
}

/// One thread, as in Drover's services.
fn on_tokio(work: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(work)
}

// ---- the rounds -----------------------------------------------------------

fn run(url: &str, rounds: usize, seconds: f64) -> Result<()> {
    let python = python()?;
    let mut measured: HashMap<(Side, usize), Vec<Measured>> = HashMap::new();
    for round in 1..=rounds {
        for callers in CALLERS {
            for side in SIDES {
                let topic = format!("bench-{}-{round}-{callers}", side.name());
                let result = measure(side, &python, url, &topic, callers, seconds)?;
                eprintln!(
                    "round {round}: {:6} {callers:2} callers {:8.0} calls/s",
                    side.name(),
                    result.calls_per_s
                );
                measured.entry((side, callers)).or_default().push(result);
            }
        }
    }
    print_table(&measured);
    Ok(())
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Oslo => "oslo",
            Self::Drover => "drover",
            Self::Lapin => "lapin",
        }
    }

    fn command(self, python: &str, url: &str) -> Result<Command> {
        let mut command = match self {
            Self::Oslo => {
                let mut command = Command::new(python);
                command.args(["-W", "ignore"]);
                command.arg(repository().join("bench/oslo_echo.py"));
                command
            }
            Self::Drover | Self::Lapin => {
                let mut command = Command::new(std::env::current_exe()?);
                command.arg(self.name());
                command
            }
        };
        command.arg(url);
        Ok(command)
    }
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn python() -> Result<String> {
    let directory = std::env::var("DROVER_TEST_VENV").unwrap_or_else(|_| {
        let beside = repository().join("../target/oslo-venv");
        beside.to_string_lossy().into_owned()
    });
    let made = Command::new(repository().join("interop/venv.sh"))
        .arg(directory)
        .output()?;
    if !made.status.success() {
        bail!(
            "no virtualenv: {}",
            String::from_utf8_lossy(&made.stderr).trim()
        );
    }
    Ok(String::from_utf8(made.stdout)?.trim().to_owned())
}

fn measure(
    side: Side,
    python: &str,
    url: &str,
    topic: &str,
    callers: usize,
    seconds: f64,
) -> Result<Measured> {
    let mut server = side
        .command(python, url)?
        .args(["server", topic])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let outcome = wait_ready(&mut server).and_then(|()| {
        let client = side
            .command(python, url)?
            .args(["client", topic, &callers.to_string(), &seconds.to_string()])
            .stderr(Stdio::inherit())
            .output()?;
        let text = String::from_utf8(client.stdout)?;
        serde_json::from_str(text.trim())
            .with_context(|| format!("{} client answered {text:?}", side.name()))
    });
    // The server ends when its input does.
    drop(server.stdin.take());
    server.wait()?;
    outcome
}

fn wait_ready(server: &mut Child) -> Result<()> {
    let output = server.stdout.as_mut().context("the server has no output")?;
    let mut reader = BufReader::new(output.by_ref());
    let mut line = String::new();
    reader.read_line(&mut line)?;
    match line.trim() {
        "READY" => Ok(()),
        other => bail!("the server said {other:?}"),
    }
}

fn print_table(measured: &HashMap<(Side, usize), Vec<Measured>>) {
    println!(
        "| side | callers | calls/s | p50 ms | p99 ms | calls/s to oslo | p50 to oslo | p99 to oslo | calls/s to lapin |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for callers in CALLERS {
        let of = |side| median(measured.get(&(side, callers)).map_or(&[], Vec::as_slice));
        let (oslo, lapin) = (of(Side::Oslo), of(Side::Lapin));
        for side in SIDES {
            let it = of(side);
            println!(
                "| {} | {callers} | {:.0} | {:.3} | {:.3} | {:.2} | {:.2} | {:.2} | {:.2} |",
                side.name(),
                it.calls_per_s,
                it.p50_ms,
                it.p99_ms,
                it.calls_per_s / oslo.calls_per_s,
                it.p50_ms / oslo.p50_ms,
                it.p99_ms / oslo.p99_ms,
                it.calls_per_s / lapin.calls_per_s,
            );
        }
    }
}

fn median(runs: &[Measured]) -> Measured {
    let middle = |of: fn(&Measured) -> f64| {
        let mut values: Vec<f64> = runs.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    };
    Measured {
        calls_per_s: middle(|run| run.calls_per_s),
        p50_ms: middle(|run| run.p50_ms),
        p99_ms: middle(|run| run.p99_ms),
    }
}

// ---- one side -------------------------------------------------------------

/// Asks for one echo.
#[async_trait]
trait Caller: Send + Sync + 'static {
    async fn echo(&self, value: u64) -> Result<u64>;
}

async fn serve(side: &str, url: &str, topic: &str) -> Result<()> {
    match side {
        "drover" => {
            let settings = settings(url);
            let transport = AmqpTransport::new(&settings)?;
            let server = RpcServer::builder(transport, &settings, topic, "bench")
                .endpoint(Echo)
                .start()
                .await?;
            until_input_ends().await?;
            server.stop(Duration::from_secs(5)).await;
        }
        _ => {
            let _server = bare::serve(url, topic).await?;
            until_input_ends().await?;
        }
    }
    Ok(())
}

async fn until_input_ends() -> Result<()> {
    println!("READY");
    tokio::io::stdin().read_to_end(&mut Vec::new()).await?;
    Ok(())
}

async fn call(side: &str, url: &str, topic: &str, callers: usize, seconds: Duration) -> Result<()> {
    let caller: Arc<dyn Caller> = match side {
        "drover" => Arc::new(DroverCaller::new(url, topic)?),
        _ => Arc::new(bare::BareCaller::new(url, topic).await?),
    };
    caller.echo(0).await?;
    let before = Instant::now();
    let tasks: Vec<_> = (0..callers)
        .map(|_| tokio::spawn(call_until(caller.clone(), before + seconds)))
        .collect();
    let mut latencies = Vec::new();
    for task in tasks {
        latencies.extend(task.await??);
    }
    let elapsed = before.elapsed().as_secs_f64();
    latencies.sort();
    let at = |share: usize| latencies[latencies.len() * share / 100].as_secs_f64() * 1e3;
    let measured = Measured {
        calls_per_s: latencies.len() as f64 / elapsed,
        p50_ms: at(50),
        p99_ms: at(99),
    };
    println!("{}", serde_json::to_string(&measured)?);
    Ok(())
}

async fn call_until(caller: Arc<dyn Caller>, end: Instant) -> Result<Vec<Duration>> {
    let mut latencies = Vec::new();
    loop {
        let before = Instant::now();
        if before >= end {
            return Ok(latencies);
        }
        let value = latencies.len() as u64;
        if caller.echo(value).await? != value {
            bail!("a wrong echo");
        }
        latencies.push(before.elapsed());
    }
}

fn settings(url: &str) -> MessagingSettings {
    MessagingSettings {
        control_exchange: EXCHANGE.to_owned(),
        ..MessagingSettings::with_url(url)
    }
}

struct Echo;

#[async_trait]
impl Endpoint for Echo {
    fn methods(&self) -> &[&str] {
        &["echo"]
    }

    async fn handle(&self, request: Request) -> Result<Value, RemoteFailure> {
        let mut args = request.args_map()?;
        Ok(args.remove("value").unwrap_or_default())
    }
}

struct DroverCaller {
    client: RpcClient,
    target: Target,
    context: RequestContext,
}

impl DroverCaller {
    fn new(url: &str, topic: &str) -> Result<Self> {
        let settings = settings(url);
        let transport: Arc<dyn Transport> = AmqpTransport::new(&settings)?;
        Ok(Self {
            client: RpcClient::new(transport, &settings),
            target: Target::topic(topic).version("1.0"),
            context: RequestContext::new(),
        })
    }
}

#[async_trait]
impl Caller for DroverCaller {
    async fn echo(&self, value: u64) -> Result<u64> {
        let args = json!({ "value": value });
        let echo = self
            .client
            .call(&self.target, &self.context, "echo", &args)
            .await?;
        Ok(echo)
    }
}

/// The same traffic with nothing but the library.
mod bare {
    use super::*;
    use lapin::{
        BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind, options::*,
        types::FieldTable,
    };
    use tokio_stream_next::next;

    /// The stream's next item, without another dependency.
    mod tokio_stream_next {
        use lapin::Consumer;
        use std::{future::poll_fn, pin::Pin};

        pub(super) async fn next(
            consumer: &mut Consumer,
        ) -> Option<lapin::Result<lapin::message::Delivery>> {
            poll_fn(|cx| futures_util::Stream::poll_next(Pin::new(&mut *consumer), cx)).await
        }
    }

    struct Ends {
        publishing: Channel,
        consuming: Channel,
        _connections: [Connection; 2],
    }

    async fn connect(url: &str) -> Result<Ends> {
        let url = url.replacen("rabbit://", "amqp://", 1);
        let url = match url.trim_end_matches('/') {
            bare if bare.matches('/').count() == 2 => format!("{bare}/%2f"),
            _ => url,
        };
        let one = Connection::connect(&url, ConnectionProperties::default()).await?;
        let other = Connection::connect(&url, ConnectionProperties::default()).await?;
        let publishing = one.create_channel().await?;
        publishing
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        let consuming = other.create_channel().await?;
        consuming.basic_qos(64, BasicQosOptions::default()).await?;
        Ok(Ends {
            publishing,
            consuming,
            _connections: [one, other],
        })
    }

    async fn publish(
        channel: &Channel,
        exchange: &str,
        key: &str,
        body: &[u8],
        reply: bool,
    ) -> Result<()> {
        let properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_content_encoding("utf-8".into())
            .with_headers(FieldTable::default())
            .with_delivery_mode(2)
            .with_priority(0);
        let properties = match reply {
            true => properties,
            false => properties.with_expiration("60000".into()),
        };
        let options = BasicPublishOptions {
            mandatory: reply,
            immediate: false,
        };
        channel
            .basic_publish(exchange.into(), key.into(), options, body, properties)
            .await?
            .await?;
        Ok(())
    }

    async fn declare(channel: &Channel, queue: &str) -> Result<()> {
        let none = FieldTable::default;
        channel
            .queue_declare(queue.into(), QueueDeclareOptions::default(), none())
            .await?;
        channel
            .exchange_declare(
                EXCHANGE.into(),
                ExchangeKind::Topic,
                ExchangeDeclareOptions::default(),
                none(),
            )
            .await?;
        channel
            .queue_bind(
                queue.into(),
                EXCHANGE.into(),
                queue.into(),
                QueueBindOptions::default(),
                none(),
            )
            .await?;
        Ok(())
    }

    /// Sends every body back to the queue it names.
    pub(super) async fn serve(url: &str, topic: &str) -> Result<impl Sized> {
        let ends = connect(url).await?;
        declare(&ends.consuming, topic).await?;
        let options = BasicConsumeOptions::default();
        let mut consumer = ends
            .consuming
            .basic_consume(topic.into(), "1".into(), options, FieldTable::default())
            .await?;
        let publishing = ends.publishing.clone();
        tokio::spawn(async move {
            while let Some(Ok(delivery)) = next(&mut consumer).await {
                let publishing = publishing.clone();
                tokio::spawn(async move {
                    delivery.acker.ack(BasicAckOptions::default()).await?;
                    let message: Value = serde_json::from_slice(&delivery.data)?;
                    let queue = message["_reply_q"].as_str().context("no reply queue")?;
                    publish(&publishing, "", queue, &delivery.data, true).await
                });
            }
        });
        Ok(ends)
    }

    type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<u64>>>>;

    pub(super) struct BareCaller {
        ends: Ends,
        topic: String,
        reply_queue: String,
        waiting: Waiting,
    }

    impl BareCaller {
        pub(super) async fn new(url: &str, topic: &str) -> Result<Self> {
            let ends = connect(url).await?;
            let reply_queue = format!("reply_{}", uuid::Uuid::new_v4().simple());
            declare(&ends.consuming, &reply_queue).await?;
            let options = BasicConsumeOptions::default();
            let tag = "1".into();
            let arguments = FieldTable::default();
            let mut consumer = ends
                .consuming
                .basic_consume(reply_queue.as_str().into(), tag, options, arguments)
                .await?;
            let waiting = Waiting::default();
            let waiters = waiting.clone();
            tokio::spawn(async move {
                while let Some(Ok(delivery)) = next(&mut consumer).await {
                    // Gone channels end the loop by themselves.
                    let _ = delivery.acker.ack(BasicAckOptions::default()).await;
                    if let Ok(message) = serde_json::from_slice::<Value>(&delivery.data) {
                        let id = message["_msg_id"].as_u64().unwrap_or_default();
                        let value = message["value"].as_u64().unwrap_or_default();
                        let waiter = waiters.lock().expect("no holder panics").remove(&id);
                        if let Some(waiter) = waiter {
                            let _ = waiter.send(value);
                        }
                    }
                }
            });
            Ok(Self {
                ends,
                topic: topic.to_owned(),
                reply_queue,
                waiting,
            })
        }
    }

    #[async_trait]
    impl Caller for BareCaller {
        async fn echo(&self, value: u64) -> Result<u64> {
            let id = fastrand::u64(..);
            let (waiter, answered) = oneshot::channel();
            self.waiting
                .lock()
                .expect("no holder panics")
                .insert(id, waiter);
            // As long as the body of a small oslo request.
            let body = json!({
                "_msg_id": id, "_reply_q": self.reply_queue, "value": value, "pad": "x".repeat(200),
            });
            let body = serde_json::to_vec(&body)?;
            publish(&self.ends.publishing, EXCHANGE, &self.topic, &body, false).await?;
            Ok(answered.await?)
        }
    }
}
