//! What a call is addressed to, as the caller sees it.

use std::fmt;

use crate::transport::Address;

/// Topic, optional server, namespace and version of the interface called.
///
/// ```
/// use drover_rpc::Target;
/// let agent = Target::topic("compute").server("kvm1").version("6.2");
/// assert_eq!(agent.to_string(), "compute.kvm1");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    topic: String,
    server: Option<String>,
    fanout: bool,
    namespace: Option<String>,
    version: Option<String>,
}

impl Target {
    /// Any one server of a topic.
    pub fn topic(topic: impl Into<String>) -> Self {
        Self {
            topic: topic.into(),
            server: None,
            fanout: false,
            namespace: None,
            version: None,
        }
    }

    /// That one server of the topic.
    #[must_use]
    pub fn server(mut self, server: impl Into<String>) -> Self {
        self.server = Some(server.into());
        self.fanout = false;
        self
    }

    /// Every server of the topic (casts only).
    #[must_use]
    pub fn fanout(mut self) -> Self {
        self.fanout = true;
        self.server = None;
        self
    }

    /// The namespace of the method; without it, the null namespace.
    #[must_use]
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = Some(namespace.into());
        self
    }

    /// The version of the interface the caller needs; without it, `1.0`.
    #[must_use]
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.version = Some(version.into());
        self
    }

    pub(crate) fn namespace_name(&self) -> Option<&str> {
        self.namespace.as_deref()
    }

    pub(crate) fn version_text(&self) -> Option<&str> {
        self.version.as_deref()
    }

    pub(crate) fn is_fanout(&self) -> bool {
        self.fanout
    }

    pub(crate) fn address(&self) -> Address {
        let topic = self.topic.clone();
        match &self.server {
            _ if self.fanout => Address::Fanout { topic },
            Some(server) => Address::Server {
                topic,
                server: server.clone(),
            },
            None => Address::Topic { topic },
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.topic)?;
        match &self.server {
            _ if self.fanout => f.write_str(" (all)"),
            Some(server) => write!(f, ".{server}"),
            None => Ok(()),
        }
    }
}
