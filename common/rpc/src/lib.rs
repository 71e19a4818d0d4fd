//! RPC and notifications on oslo.messaging's RabbitMQ wire.
//!
//! A Python service with an unmodified oslo.messaging calls a Drover service
//! and is called by one; neither can tell. The way of a request through this
//! crate, from the outside in:
//!
//! | step | module |
//! |---|---|
//! | settings and the broker's URL | [`settings`](MessagingSettings) |
//! | bytes come and go at addresses | [`transport`], by [`amqp`] or [`memory`] |
//! | bytes are messages: envelope, request, reply | `envelope` |
//! | a request runs once | `dedup` |
//! | which endpoint answers | `dispatch`, `version` |
//! | [`RpcServer`]: bounds, heartbeats, replies | `server`; the handler sees a [`Request`] |
//! | [`RpcClient`]: calls, casts, waiting for answers | `client` |
//! | exceptions over the wire | [`RemoteFailure`] |
//! | [`Notifier`]: events for whoever listens | `notifier` |
//!
//! What holds everywhere: every send has a deadline and every wait a bound;
//! whatever comes from outside may be wrong and never stops a service; only
//! [`amqp`] knows the AMQP library.
//!
//! ```
//! # use std::sync::Arc;
//! # use async_trait::async_trait;
//! # use drover_rpc::*;
//! # use serde_json::{Value, json};
//! struct Greeter;
//!
//! #[async_trait]
//! impl Endpoint for Greeter {
//!     fn version(&self) -> &str { "1.2" }
//!     fn methods(&self) -> &[&str] { &["greet"] }
//!     async fn handle(&self, request: Request) -> Result<Value, RemoteFailure> {
//!         let args = request.args_map()?;
//!         // … write the request into the journal …
//!         request.accept().await;
//!         Ok(json!(format!("hello {}", args["name"])))
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let settings = MessagingSettings::default();
//! let broker = memory::MemoryBroker::default();
//! let transport = broker.transport("here"); // or AmqpTransport::new(&settings)?
//! let server = RpcServer::builder(transport.clone(), &settings, "greetings", "here")
//!     .endpoint(Greeter)
//!     .start()
//!     .await?;
//! let client = RpcClient::new(transport, &settings);
//! let target = Target::topic("greetings").version("1.0");
//! let answer: String = client
//!     .call(&target, &RequestContext::new(), "greet", &json!({"name": 1}))
//!     .await?;
//! assert_eq!(answer, "hello 1");
//! server.stop(std::time::Duration::from_secs(5)).await;
//! # Ok(())
//! # }
//! ```

pub mod amqp;
mod client;
mod context;
mod dedup;
mod dispatch;
mod envelope;
mod error;
mod failure;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod memory;
mod notifier;
mod request;
mod server;
mod settings;
mod stats;
mod target;
mod text;
pub mod transport;
#[cfg(test)]
mod vectors;
mod version;

pub use amqp::AmqpTransport;
pub use client::{CallOptions, RpcClient};
pub use context::RequestContext;
pub use dispatch::Endpoint;
pub use error::{ErrorClass, RpcError, TransportError};
pub use failure::{BUILTINS_MODULE, DISPATCHER_MODULE, FailureParts, NOVA_MODULE, RemoteFailure};
pub use notifier::{Notifier, Priority};
pub use request::Request;
pub use server::{RpcServer, RpcServerBuilder};
pub use settings::{BrokerUrl, MessagingSettings, SettingsError};
pub use stats::{Counter, RpcStats, RpcStatsSnapshot};
pub use target::Target;
pub use transport::Transport;
