//! The `[messaging]` section: plain data, units in the names, oslo's defaults
//! wherever a peer could tell the difference.

use std::{fmt, time::Duration};

use serde::Deserialize;

/// How to reach the broker and how to behave there.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MessagingSettings {
    /// `rabbit://user:password@host:port[,user:password@host:port…]/vhost[?option=value…]`.
    pub url: BrokerUrl,
    /// Exchange of topics and notifications; peers must use the same.
    pub control_exchange: String,
    /// Durable exchange and queues. Every peer on the broker must agree.
    pub amqp_durable_queues: bool,
    /// Exchange and queues vanish when unused. Every peer must agree.
    pub amqp_auto_delete: bool,
    /// Quorum queues (durable, replicated). Every peer must agree.
    pub rabbit_quorum_queue: bool,
    /// Redeliveries after which a quorum queue drops a message; 0 is no limit.
    pub rabbit_quorum_delivery_limit: u32,
    /// Messages a quorum queue keeps in memory; 0 is no limit.
    pub rabbit_quorum_max_memory_length: u32,
    /// Bytes a quorum queue keeps in memory; 0 is no limit.
    pub rabbit_quorum_max_memory_bytes: u32,
    /// Quorum queues for replies and fanout too. Every peer must agree.
    pub rabbit_transient_quorum_queue: bool,
    /// Life of an unused reply or fanout queue, seconds; 0 is for ever.
    pub transient_queues_ttl_s: u32,
    /// Unacknowledged messages a consumer may hold; 0 is no limit (and no bound on memory).
    pub prefetch_count: u16,
    /// AMQP heartbeat, seconds; 0 is none.
    pub heartbeat_s: u16,
    /// How long one attempt to connect to one host may take, seconds.
    pub connect_timeout_s: u64,
    /// Longest pause between attempts to connect, seconds.
    pub reconnect_max_s: u64,
    /// How long a message waits for the broker to take it, seconds.
    pub publish_timeout_s: u64,
    /// How long a call waits for its answer unless it says otherwise, seconds.
    pub response_timeout_s: u64,
    /// How long a reply is tried again when the caller's queue is missing, seconds.
    pub reply_retry_s: u64,
    /// Largest message taken, bytes.
    pub max_message_bytes: usize,
    /// Requests a server works on at the same time; more wait.
    pub max_running_requests: usize,
    /// Calls that may wait for an answer at the same time; more are refused.
    pub max_waiting_calls: usize,
    /// Topics notifications go to.
    pub notification_topics: Vec<String>,
}

impl Default for MessagingSettings {
    fn default() -> Self {
        Self {
            url: BrokerUrl::from("rabbit://guest:guest@127.0.0.1:5672/"),
            control_exchange: "drover".to_owned(),
            amqp_durable_queues: false,
            amqp_auto_delete: false,
            rabbit_quorum_queue: false,
            rabbit_quorum_delivery_limit: 0,
            rabbit_quorum_max_memory_length: 0,
            rabbit_quorum_max_memory_bytes: 0,
            rabbit_transient_quorum_queue: false,
            transient_queues_ttl_s: 1800,
            prefetch_count: 64,
            heartbeat_s: 60,
            connect_timeout_s: 5,
            reconnect_max_s: 10,
            publish_timeout_s: 15,
            response_timeout_s: 60,
            reply_retry_s: 60,
            max_message_bytes: 16 * 1024 * 1024,
            max_running_requests: 64,
            max_waiting_calls: 4096,
            notification_topics: vec!["notifications".to_owned()],
        }
    }
}

impl MessagingSettings {
    /// The defaults with another broker.
    pub fn with_url(url: impl Into<String>) -> Self {
        Self {
            url: BrokerUrl(url.into()),
            ..Self::default()
        }
    }

    /// Checks everything that can be checked without a broker.
    ///
    /// # Errors
    /// The first thing that cannot work, in words; never the password.
    pub fn validate(&self) -> Result<(), SettingsError> {
        self.resolved().map(|_| ())
    }

    /// The settings after the URL's options, and the broker the URL names.
    pub(crate) fn resolved(&self) -> Result<(Self, Broker), SettingsError> {
        let mut settings = self.clone();
        let broker = Broker::parse(&self.url.0, &mut settings)?;
        settings.check()?;
        Ok((settings, broker))
    }

    fn check(&self) -> Result<(), SettingsError> {
        let positive = [
            ("connect_timeout_s", self.connect_timeout_s),
            ("reconnect_max_s", self.reconnect_max_s),
            ("publish_timeout_s", self.publish_timeout_s),
            ("response_timeout_s", self.response_timeout_s),
            ("max_message_bytes", self.max_message_bytes as u64),
            ("max_running_requests", self.max_running_requests as u64),
            ("max_waiting_calls", self.max_waiting_calls as u64),
        ];
        for (name, value) in positive {
            if value == 0 {
                return Err(SettingsError::new(name, "must be greater than 0"));
            }
        }
        if self.control_exchange.is_empty() || self.control_exchange.len() > 127 {
            return Err(SettingsError::new(
                "control_exchange",
                "must have 1 to 127 bytes",
            ));
        }
        if self.transient_queues_ttl_s > i32::MAX as u32 / 1000 {
            return Err(SettingsError::new(
                "transient_queues_ttl_s",
                "must be at most 2147483 (24 days)",
            ));
        }
        Ok(())
    }

    pub(crate) fn publish_timeout(&self) -> Duration {
        Duration::from_secs(self.publish_timeout_s)
    }

    pub(crate) fn response_timeout(&self) -> Duration {
        Duration::from_secs(self.response_timeout_s)
    }
}

/// A broker URL that never shows its password.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct BrokerUrl(String);

impl From<&str> for BrokerUrl {
    fn from(url: &str) -> Self {
        Self(url.to_owned())
    }
}

impl From<String> for BrokerUrl {
    fn from(url: String) -> Self {
        Self(url)
    }
}

impl fmt::Display for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Broker::parse(&self.0, &mut MessagingSettings::default()) {
            Ok(broker) => write!(f, "{broker}"),
            Err(_) => f.write_str("(unusable URL, not shown: it may hold a password)"),
        }
    }
}

impl fmt::Debug for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A setting that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("[messaging] {name}: {reason}")]
pub struct SettingsError {
    name: String,
    reason: String,
}

impl SettingsError {
    fn new(name: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            reason: reason.into(),
        }
    }

    /// Its key in `[messaging]`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What is wrong with it.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    fn url(reason: impl Into<String>) -> Self {
        Self::new("url", reason)
    }
}

/// What a broker URL says: one or more hosts of one virtual host.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Broker {
    pub(crate) hosts: Vec<BrokerHost>,
    pub(crate) vhost: String,
    pub(crate) login: Login,
}

/// One host of a broker.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct BrokerHost {
    pub(crate) user: String,
    pub(crate) password: String,
    pub(crate) host: String,
    pub(crate) port: u16,
}

/// SASL mechanism; both are the same user and password.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Login {
    AmqPlain,
    Plain,
}

impl fmt::Display for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts: Vec<String> = self.hosts.iter().map(BrokerHost::to_string).collect();
        write!(f, "{} (vhost {})", hosts.join(", "), self.vhost)
    }
}

impl fmt::Display for BrokerHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

impl Broker {
    fn parse(url: &str, settings: &mut MessagingSettings) -> Result<Self, SettingsError> {
        let rest = strip_scheme(url)?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let hosts = authority
            .split(',')
            .map(parse_host)
            .collect::<Result<Vec<_>, _>>()?;
        let vhost = match percent_decoded(path)?.as_str() {
            "" | "/" => "/".to_owned(),
            name => name.to_owned(),
        };
        let mut login = Login::AmqPlain;
        for option in query.split('&').filter(|option| !option.is_empty()) {
            apply_option(option, settings, &mut login)?;
        }
        Ok(Self {
            hosts,
            vhost,
            login,
        })
    }
}

fn strip_scheme(url: &str) -> Result<&str, SettingsError> {
    let (scheme, rest) = url.split_once("://").ok_or_else(|| {
        SettingsError::url("must look like rabbit://user:password@host:5672/vhost")
    })?;
    match scheme {
        "rabbit" | "amqp" => Ok(rest),
        "amqps" | "rabbits" => Err(SettingsError::url(
            "TLS to the broker is not built in; use rabbit:// on a trusted network or a local tunnel",
        )),
        _ => Err(SettingsError::url(
            "the scheme must be rabbit:// (or amqp://)",
        )),
    }
}

fn parse_host(text: &str) -> Result<BrokerHost, SettingsError> {
    let (credentials, place) = text.rsplit_once('@').unwrap_or(("", text));
    let (user, password) = match credentials {
        "" => ("guest".to_owned(), "guest".to_owned()),
        _ => {
            let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
            (percent_decoded(user)?, percent_decoded(password)?)
        }
    };
    let (host, port) = match place.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest
                .split_once(']')
                .ok_or_else(|| SettingsError::url("an IPv6 address must end with ]"))?;
            (host, port.strip_prefix(':'))
        }
        None => match place.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (place, None),
        },
    };
    // What stands here may be a stray piece of a password: it is not shown.
    let port = port.map_or(Ok(5672), |port| {
        port.parse().map_err(|_| {
            SettingsError::url(
                "the port must be a number from 1 to 65535 (write @ : / ? , in a password as %40 %3A %2F %3F %2C)",
            )
        })
    })?;
    let host = if host.is_empty() { "localhost" } else { host };
    if !host
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || ".-_:%".contains(c))
    {
        return Err(SettingsError::url(
            "the host name has characters no host name has",
        ));
    }
    Ok(BrokerHost {
        user,
        password,
        host: host.to_owned(),
        port,
    })
}

/// oslo.messaging lets a URL override options of its driver; the same names work here.
fn apply_option(
    option: &str,
    settings: &mut MessagingSettings,
    login: &mut Login,
) -> Result<(), SettingsError> {
    let (name, value) = option.split_once('=').unwrap_or((option, ""));
    let value = percent_decoded(value)?;
    match name {
        "heartbeat_timeout_threshold" | "heartbeat" => settings.heartbeat_s = num(name, &value)?,
        "rabbit_qos_prefetch_count" => settings.prefetch_count = num(name, &value)?,
        "rabbit_transient_queues_ttl" => settings.transient_queues_ttl_s = num(name, &value)?,
        "rabbit_quorum_delivery_limit" => {
            settings.rabbit_quorum_delivery_limit = num(name, &value)?;
        }
        "amqp_durable_queues" => settings.amqp_durable_queues = flag(name, &value)?,
        "amqp_auto_delete" => settings.amqp_auto_delete = flag(name, &value)?,
        "rabbit_quorum_queue" => settings.rabbit_quorum_queue = flag(name, &value)?,
        "rabbit_transient_quorum_queue" => {
            settings.rabbit_transient_quorum_queue = flag(name, &value)?;
        }
        "rabbit_login_method" => {
            *login = match value.as_str() {
                "PLAIN" => Login::Plain,
                "AMQPLAIN" => Login::AmqPlain,
                _ => {
                    return Err(SettingsError::url(
                        "rabbit_login_method must be PLAIN or AMQPLAIN",
                    ));
                }
            }
        }
        "ssl" if flag(name, &value)? => {
            return Err(SettingsError::url(
                "TLS to the broker is not built in; remove ssl=",
            ));
        }
        "ssl" => {}
        _ => {
            let shown: String = name.chars().take(40).flat_map(char::escape_debug).collect();
            return Err(SettingsError::url(format!(
                "option {shown:?} is not one of ours"
            )));
        }
    }
    Ok(())
}

fn num<T: std::str::FromStr>(name: &str, value: &str) -> Result<T, SettingsError> {
    value
        .parse()
        .map_err(|_| SettingsError::url(format!("{name} must be a number that fits")))
}

fn flag(name: &str, value: &str) -> Result<bool, SettingsError> {
    match value.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Ok(true),
        "0" | "false" | "no" | "off" => Ok(false),
        _ => Err(SettingsError::url(format!("{name} must be true or false"))),
    }
}

fn percent_decoded(text: &str) -> Result<String, SettingsError> {
    let bad = || SettingsError::url("a % must be followed by two hexadecimal digits of UTF-8");
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let digits = tail.get(..2).ok_or_else(bad)?;
        let digits = std::str::from_utf8(digits).map_err(|_| bad())?;
        bytes.push(u8::from_str_radix(digits, 16).map_err(|_| bad())?);
        rest = &tail[2..];
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(url: &str) -> Result<(MessagingSettings, Broker), SettingsError> {
        MessagingSettings::with_url(url).resolved()
    }

    #[test]
    fn hosts_credentials_and_vhost_are_read_as_oslo_reads_them() {
        for (url, vhost) in [
            ("rabbit://guest:guest@127.0.0.1:5692", "/"),
            ("rabbit://guest:guest@127.0.0.1:5692/", "/"),
            ("rabbit://guest:guest@127.0.0.1:5692//", "/"),
            ("rabbit://guest:guest@127.0.0.1:5692/%2F", "/"),
            ("amqp://guest:guest@127.0.0.1:5692/oslo_wire", "oslo_wire"),
        ] {
            assert_eq!(resolved(url).unwrap().1.vhost, vhost, "{url}");
        }
        let (_, broker) = resolved("rabbit://a:p%40s@h1,b:c@[::1]:9/v").unwrap();
        assert_eq!(broker.hosts.len(), 2);
        assert_eq!(broker.hosts[0].password, "p@s");
        assert_eq!(broker.hosts[0].port, 5672);
        assert_eq!(broker.hosts[1].host, "::1");
        assert_eq!(broker.to_string(), "h1:5672, [::1]:9 (vhost v)");
    }

    #[test]
    fn url_options_override_settings() {
        let (settings, broker) = resolved(
            "rabbit://h/v?heartbeat_timeout_threshold=17&rabbit_login_method=PLAIN&amqp_durable_queues=true",
        )
        .unwrap();
        assert_eq!(settings.heartbeat_s, 17);
        assert!(settings.amqp_durable_queues);
        assert_eq!(broker.login, Login::Plain);
    }

    #[test]
    fn bad_urls_are_refused_without_showing_the_password() {
        for url in [
            "secret",
            "http://u:secret@h/",
            "amqps://u:secret@h/",
            "rabbit://u:secret@h:port/",
            "rabbit://u:se/cret:secret@h:1/",
            "rabbit://u:secret#1@h o/",
            "rabbit://u:%zzsecret@h/",
            "rabbit://u:secret@h/?nonsense=1",
            "rabbit://u:secret@h/?ssl=1",
            "rabbit://u:secret@[::1/",
            "rabbit://u:secret@h/?heartbeat=secret",
        ] {
            let error = resolved(url).map(|_| ()).unwrap_err().to_string();
            assert!(!error.contains("secret"), "{url}: {error}");
            let settings = MessagingSettings::with_url(url);
            assert!(!format!("{settings:?}").contains("secret"), "{url}");
        }
    }

    #[test]
    fn zero_bounds_are_refused() {
        let mut settings = MessagingSettings {
            publish_timeout_s: 0,
            ..MessagingSettings::default()
        };
        assert!(settings.validate().is_err());
        settings.publish_timeout_s = 1;
        assert!(settings.validate().is_ok());
    }
}
