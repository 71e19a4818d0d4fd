//! The shapes in which Drover's own methods travel, one module per side that
//! serves them. Additive within a major version: new fields have defaults.
//! Nova's frontends' shapes are decoded where they are served, in the services.

pub mod compute;
pub mod conductor;
pub mod fault;

/// Topic that all conductors share.
pub const CONDUCTOR_TOPIC: &str = "conductor";
/// Topic of the agents; the server name is the host name.
pub const COMPUTE_TOPIC: &str = "compute";
/// Namespace of Drover's own methods on either topic.
pub const NAMESPACE: &str = "drover";
/// Key of the request context for what is asked of an agent: the incarnation that
/// is meant, or an older one. One that it was followed by does not serve it.
pub const INCARNATION_KEY: &str = "agent_incarnation";
/// Version of both interfaces.
pub const VERSION: &str = "1.0";
