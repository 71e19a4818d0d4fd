//! The shapes in which Drover's own methods travel, one module per side that
//! serves them. Additive within a major version: new fields have defaults.
//! Nova's frontends' shapes are decoded where they are served, in the services.

pub mod compute;
pub mod conductor;
pub mod fault;

use crate::version::{RpcVersion, VersionRange};

/// Topic that all conductors share.
pub const CONDUCTOR_TOPIC: &str = "conductor";
/// Topic of the agents; the server name is the host name.
pub const COMPUTE_TOPIC: &str = "compute";
/// Namespace of Drover's own methods on either topic.
pub const NAMESPACE: &str = "drover";
/// Key of the request context for what is asked of an agent: the incarnation that
/// is meant, or an older one. One that it was followed by does not serve it.
pub const INCARNATION_KEY: &str = "agent_incarnation";
/// The oldest version of both interfaces: what was there from the beginning is asked
/// for in it by whoever does not know who will read that. What is added later says
/// from which version on it is there.
pub const OLDEST: RpcVersion = RpcVersion::new(1, 0);
/// The same as text.
pub const VERSION: &str = "1.0";
/// What this build speaks. `1.1` tells versions apart, and has the epoch of the lease
/// in each step. Raise the second number with each thing that an older peer has to
/// understand (not with what it may pass over: a field, a value that only informs);
/// raise the first once nothing that is older is spoken with any more.
pub const SPEAKS: VersionRange = VersionRange::new(OLDEST, RpcVersion::new(1, 1));
