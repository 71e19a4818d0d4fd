//! The request context: who asks, on whose behalf, under which request id.
//!
//! On the wire it is a set of `_context_<key>` members. The set is open: keys
//! nobody here knows are carried through unchanged.

use serde_json::{Map, Value};

/// An open map of context keys (without the wire's `_context_` prefix).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RequestContext(Map<String, Value>);

impl RequestContext {
    /// An empty context.
    pub fn new() -> Self {
        Self::default()
    }

    /// A context for work a service starts by itself, as its administrator.
    pub fn service(request_id: impl Into<String>) -> Self {
        Self::new()
            .with("request_id", request_id.into())
            .with("is_admin", true)
    }

    /// The same context with one key set.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.set(key, value);
        self
    }

    /// Sets one key.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.0.insert(key.to_owned(), value.into());
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    /// All keys with their values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Whether no key is set.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `request_id`: the id that follows one request through all logs.
    pub fn request_id(&self) -> Option<&str> {
        self.text("request_id")
    }

    /// `user_id`, or the older `user`.
    pub fn user_id(&self) -> Option<&str> {
        self.text("user_id").or_else(|| self.text("user"))
    }

    /// `project_id`, or the older `project` and `tenant`.
    pub fn project_id(&self) -> Option<&str> {
        self.text("project_id")
            .or_else(|| self.text("project"))
            .or_else(|| self.text("tenant"))
    }

    /// `is_admin`; absent is no.
    pub fn is_admin(&self) -> bool {
        self.get("is_admin").and_then(Value::as_bool) == Some(true)
    }

    /// A copy fit for others to read: no token and no service catalog.
    #[must_use]
    pub fn redacted(&self) -> Self {
        let mut copy = self.clone();
        for key in ["auth_token", "service_catalog"] {
            if copy.0.contains_key(key) {
                copy.set(key, Value::Null);
            }
        }
        copy
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }
}

impl From<Map<String, Value>> for RequestContext {
    fn from(map: Map<String, Value>) -> Self {
        Self(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typed_accessors_read_what_oslo_sends() {
        let context = RequestContext::new()
            .with("request_id", "req-1")
            .with("user", "u")
            .with("tenant", "p")
            .with("is_admin", true);
        assert_eq!(context.request_id(), Some("req-1"));
        assert_eq!(context.user_id(), Some("u"));
        assert_eq!(context.project_id(), Some("p"));
        assert!(context.is_admin());
        assert!(!RequestContext::new().with("is_admin", "yes").is_admin());
    }

    #[test]
    fn a_redacted_context_keeps_everything_but_secrets() {
        let context = RequestContext::new()
            .with("auth_token", "secret")
            .with("anything", 1);
        let redacted = context.redacted();
        assert_eq!(redacted.get("auth_token"), Some(&Value::Null));
        assert_eq!(redacted.get("anything"), Some(&Value::from(1)));
    }
}
