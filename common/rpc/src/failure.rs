//! Failures on the wire: an exception raised at the far end.
//!
//! A failure travels as JSON text inside the reply's JSON (inside the envelope's
//! JSON): `{"class", "module", "message", "tb", "args", "kwargs"}`. A Python
//! caller rebuilds the exception as `class(*args, **kwargs)` when the module is
//! one it allows, so `args` has to hold the message.

use std::{borrow::Cow, fmt, ops::Deref};

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

/// Module of Nova's exceptions, the ones a Nova-style caller raises again.
pub const NOVA_MODULE: &str = "nova.exception";
/// Module of Python's own exceptions, which every caller raises again.
pub const BUILTINS_MODULE: &str = "builtins";
/// Module of oslo.messaging's dispatch errors.
pub const DISPATCHER_MODULE: &str = "oslo_messaging.rpc.dispatcher";

/// An exception of the far end, or the one a handler answers with. Boxed, so
/// that results carrying it stay small; its fields are read directly.
#[derive(Debug, Clone, PartialEq)]
pub struct RemoteFailure(Box<FailureParts>);

/// What a [`RemoteFailure`] consists of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FailureParts {
    /// Class name, such as `MigrationPreCheckError`.
    #[serde(default, deserialize_with = "text_or_empty")]
    pub class: Cow<'static, str>,
    /// Module of the class, such as `nova.exception`.
    #[serde(default, deserialize_with = "text_or_empty")]
    pub module: Cow<'static, str>,
    /// The exception's text.
    #[serde(default, deserialize_with = "text_or_empty")]
    pub message: Cow<'static, str>,
    /// Traceback lines, each ending in a newline.
    #[serde(rename = "tb", default, deserialize_with = "null_is_default")]
    pub traceback: Vec<String>,
    /// Positional arguments the exception is rebuilt from.
    #[serde(default, deserialize_with = "null_is_default")]
    pub args: Vec<Value>,
    /// Keyword arguments the exception is rebuilt from.
    #[serde(default, deserialize_with = "null_is_default")]
    pub kwargs: Map<String, Value>,
    /// Whether the same request may succeed later; said to the server, not on the wire.
    #[serde(skip)]
    pub is_passing: bool,
}

impl RemoteFailure {
    /// An exception of any module.
    pub fn new(
        module: impl Into<Cow<'static, str>>,
        class: impl Into<Cow<'static, str>>,
        message: impl Into<String>,
    ) -> Self {
        let message = message.into();
        Self(Box::new(FailureParts {
            class: class.into(),
            module: module.into(),
            args: vec![Value::from(message.clone())],
            message: message.into(),
            traceback: Vec::new(),
            kwargs: Map::new(),
            is_passing: false,
        }))
    }

    /// An exception of `nova.exception`.
    pub fn nova(class: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self::new(NOVA_MODULE, class, message)
    }

    /// One of Python's own exceptions.
    pub fn builtin(class: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self::new(BUILTINS_MODULE, class, message)
    }

    /// `builtins.TypeError`: wrong arguments.
    pub fn type_error(message: impl Into<String>) -> Self {
        Self::builtin("TypeError", message)
    }

    /// `builtins.ValueError`: arguments of the right type with a wrong value.
    pub fn value_error(message: impl Into<String>) -> Self {
        Self::builtin("ValueError", message)
    }

    /// `builtins.RuntimeError`: a mistake at this end.
    pub fn runtime_error(message: impl Into<String>) -> Self {
        Self::builtin("RuntimeError", message)
    }

    pub(crate) fn unsupported_version(version: &str, method: &str) -> Self {
        Self::new(
            DISPATCHER_MODULE,
            "UnsupportedVersion",
            format!("Endpoint does not support RPC version {version}. Attempted method: {method}"),
        )
    }

    pub(crate) fn no_such_method(method: &str) -> Self {
        Self::new(
            DISPATCHER_MODULE,
            "NoSuchMethod",
            format!("Endpoint does not support RPC method {method}"),
        )
    }

    /// The same failure, as passing trouble: a cast that meets it is tried again. A
    /// caller is told of it as of any other, and may call again.
    #[must_use]
    pub fn passing(mut self) -> Self {
        self.0.is_passing = true;
        self
    }

    /// The same failure, of a request that is worth nothing later.
    #[must_use]
    pub fn final_at_once(mut self) -> Self {
        self.0.is_passing = false;
        self
    }

    /// The same failure with one keyword argument more.
    #[must_use]
    pub fn with_kwarg(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.0.kwargs.insert(key.to_owned(), value.into());
        self
    }

    /// Whether this is that class of that module.
    pub fn is(&self, module: &str, class: &str) -> bool {
        self.module == module && self.class == class
    }

    /// The text that travels.
    pub(crate) fn to_wire(&self) -> String {
        // Strings, string-keyed maps and JSON values always serialise.
        serde_json::to_string(&self.0).expect("a failure is plain JSON data")
    }

    /// Reads the text that travelled; unknown and missing members are forgiven.
    pub(crate) fn from_wire(text: &str) -> Result<Self, String> {
        if !text.trim_start().starts_with('{') {
            return Err("the failure is no JSON object".to_owned());
        }
        let mut parts: Box<FailureParts> =
            serde_json::from_str(text).map_err(|error| error.to_string())?;
        strip_remote_suffix(&mut parts.class);
        strip_remote_suffix(&mut parts.module);
        Ok(Self(parts))
    }
}

/// A failure that was itself received over RPC carries `_Remote` in its names.
fn strip_remote_suffix(name: &mut Cow<'static, str>) {
    if let Some(plain) = name.strip_suffix("_Remote") {
        *name = Cow::Owned(plain.to_owned());
    }
}

fn text_or_empty<'de, D: Deserializer<'de>>(from: D) -> Result<Cow<'static, str>, D::Error> {
    Ok(match Value::deserialize(from)? {
        Value::String(text) => Cow::Owned(text),
        Value::Null => Cow::Borrowed(""),
        other => Cow::Owned(other.to_string()),
    })
}

fn null_is_default<'de, D: Deserializer<'de>, T>(from: D) -> Result<T, D::Error>
where
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

impl Deref for RemoteFailure {
    type Target = FailureParts;

    fn deref(&self) -> &FailureParts {
        &self.0
    }
}

impl fmt::Display for RemoteFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}: {}", self.module, self.class, self.message)
    }
}

impl std::error::Error for RemoteFailure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_has_oslos_members_in_oslos_order() {
        let failure = RemoteFailure::nova("InstanceNotFound", "no such").with_kwarg("code", 404);
        assert_eq!(
            failure.to_wire(),
            r#"{"class":"InstanceNotFound","module":"nova.exception","message":"no such","tb":[],"args":["no such"],"kwargs":{"code":404}}"#
        );
    }

    #[test]
    fn nulls_and_strange_types_are_read_forgivingly() {
        let failure = RemoteFailure::from_wire(
            r#"{"class":"X_Remote","module":null,"message":5,"tb":null,"args":null,"kwargs":null,"more":1}"#,
        )
        .unwrap();
        assert_eq!(failure.class, "X");
        assert_eq!(failure.module, "");
        assert_eq!(failure.message, "5");
        assert!(failure.args.is_empty());
        assert!(RemoteFailure::from_wire("plain words").is_err());
        assert!(RemoteFailure::from_wire("[]").is_err());
    }
}
