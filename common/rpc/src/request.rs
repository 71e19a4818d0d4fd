//! One request as its handler sees it.

use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, value::RawValue};

use crate::{context::RequestContext, dedup::Receipts, failure::RemoteFailure, text::shown};

/// A request, its context, and the right to say when it counts as taken.
#[derive(Debug)]
pub struct Request {
    pub(crate) method: String,
    pub(crate) namespace: Option<String>,
    pub(crate) version: Option<String>,
    pub(crate) args: Option<Box<RawValue>>,
    pub(crate) context: RequestContext,
    pub(crate) unique_id: Option<String>,
    pub(crate) monitor_s: Option<f64>,
    pub(crate) wants_reply: bool,
    pub(crate) redelivered: bool,
    pub(crate) receipts: Arc<Receipts>,
}

impl Request {
    /// The method called; always one of the endpoint's.
    pub fn method(&self) -> &str {
        &self.method
    }

    /// The namespace called.
    pub fn namespace(&self) -> Option<&str> {
        self.namespace.as_deref()
    }

    /// The version asked for; none if the caller named none.
    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// What is answered to a version that is not served.
    pub fn unsupported_version(&self) -> RemoteFailure {
        let version = shown(self.version.as_deref().unwrap_or("1.0"));
        RemoteFailure::unsupported_version(&version, &self.method)
    }

    /// Who asks.
    pub fn context(&self) -> &RequestContext {
        &self.context
    }

    /// The id by which a redelivery is recognised. Peers other than
    /// oslo.messaging may leave it out; then nothing can be recognised.
    pub fn unique_id(&self) -> Option<&str> {
        self.unique_id.as_deref()
    }

    /// Whether the broker delivered it before, to this process or another.
    pub fn is_redelivered(&self) -> bool {
        self.redelivered
    }

    /// Whether somebody waits for the result (a call, not a cast).
    pub fn wants_reply(&self) -> bool {
        self.wants_reply
    }

    /// Seconds without a heartbeat the caller bears, if it monitors the call.
    /// (Heartbeats are sent for the handler.)
    pub fn monitor_timeout_s(&self) -> Option<f64> {
        self.monitor_s
    }

    /// Acknowledges the request before the handler is done: from here on, a
    /// crash does not bring it back. To be called once it is in the journal.
    pub async fn accept(&self) {
        self.receipts.take();
    }

    /// The arguments as a type of one's own.
    ///
    /// # Errors
    /// `TypeError` for arguments that are missing, unknown or of the wrong type,
    /// `ValueError` for text that is no value, each with the place of the mistake.
    pub fn args<T: DeserializeOwned>(&self) -> Result<T, RemoteFailure> {
        let text = self.args_text()?;
        let mut reader = serde_json::Deserializer::from_str(text);
        serde_path_to_error::deserialize(&mut reader).map_err(|error| {
            let place = match error.path().to_string() {
                path if path == "." => String::new(),
                path => format!(" {path:?}:"),
            };
            let wrong = error.inner();
            let message = shown(&format!("{}():{place} {wrong}", self.method));
            match wrong.is_data() {
                true => RemoteFailure::type_error(message),
                false => RemoteFailure::value_error(message),
            }
        })
    }

    /// The arguments as a map.
    ///
    /// # Errors
    /// As [`Self::args`].
    pub fn args_map(&self) -> Result<Map<String, Value>, RemoteFailure> {
        self.args()
    }

    /// The arguments as the JSON text that came, `{}` if none came.
    ///
    /// # Errors
    /// `TypeError` for anything but an object.
    pub fn args_text(&self) -> Result<&str, RemoteFailure> {
        let text = self.args.as_ref().map_or("{}", |raw| raw.get());
        match text.starts_with('{') {
            true => Ok(text),
            false => Err(RemoteFailure::type_error(format!(
                "{}() argument after ** must be a mapping",
                self.method
            ))),
        }
    }
}
