//! Which endpoint answers a request, decided as oslo.messaging decides it.

use std::sync::Arc;

use async_trait::async_trait;
use serde_json::Value;

use crate::{
    envelope::{RequestIn, Version},
    failure::RemoteFailure,
    request::Request,
    version::is_compatible,
};

/// One interface of a server: a namespace and version with its methods.
#[async_trait]
pub trait Endpoint: Send + Sync + 'static {
    /// The namespace of its methods; `None` is the null namespace.
    fn namespace(&self) -> Option<&str> {
        None
    }

    /// The version implemented, such as `1.25`: answers the same major and any older minor.
    fn version(&self) -> &str {
        "1.0"
    }

    /// The methods it has. Names that begin with `_` are never called from outside.
    fn methods(&self) -> &[&str];

    /// Answers one request for one of [`Self::methods`].
    ///
    /// The request is acknowledged when the handler returns, or earlier when it
    /// calls [`Request::accept`].
    ///
    /// # Errors
    /// The exception the caller shall see.
    async fn handle(&self, request: Request) -> Result<Value, RemoteFailure>;
}

/// Walks the endpoints in order; the first with right namespace, compatible
/// version and the method wins.
pub(crate) fn find<'a>(
    endpoints: &'a [Arc<dyn Endpoint>],
    request: &RequestIn,
) -> Result<(&'a Arc<dyn Endpoint>, String), RemoteFailure> {
    let requested = match &request.version {
        Version::Absent => Some("1.0"),
        Version::Null => None,
        Version::Text(text) => Some(text.as_str()),
    };
    let mut compatible = false;
    for endpoint in endpoints {
        if endpoint.namespace() != request.namespace.as_deref() {
            continue;
        }
        let fits = requested.map_or(Ok(false), |v| is_compatible(endpoint.version(), v))?;
        if !fits {
            continue;
        }
        compatible = true;
        let method = method_name(&request.method)?;
        if !method.starts_with('_') && endpoint.methods().contains(&method) {
            return Ok((endpoint, method.to_owned()));
        }
    }
    let method = shown(request.method.as_str().unwrap_or("None"));
    Err(match compatible {
        true => RemoteFailure::no_such_method(&method),
        false => RemoteFailure::unsupported_version(&shown(requested.unwrap_or("None")), &method),
    })
}

fn method_name(method: &Value) -> Result<&str, RemoteFailure> {
    let type_name = match method {
        Value::String(name) => return Ok(name),
        Value::Null => "NoneType",
        Value::Bool(_) => "bool",
        Value::Number(number) if number.is_f64() => "float",
        Value::Number(_) => "int",
        Value::Array(_) => "list",
        Value::Object(_) => "dict",
    };
    Err(RemoteFailure::type_error(format!(
        "attribute name must be string, not '{type_name}'"
    )))
}

/// A name from outside, short enough to be sent back.
fn shown(name: &str) -> String {
    name.chars().take(200).collect()
}

/// oslo.messaging's ping, which operators use to see whether a server is alive.
pub(crate) struct Ping;

#[async_trait]
impl Endpoint for Ping {
    fn methods(&self) -> &[&str] {
        &["oslo_rpc_server_ping"]
    }

    async fn handle(&self, _request: Request) -> Result<Value, RemoteFailure> {
        Ok("pong".into())
    }
}
