//! Messages as bytes: oslo.messaging's message format 2.0.
//!
//! A body is `{"oslo.version": "2.0", "oslo.message": "<JSON text>"}`: JSON
//! inside a JSON string. Encoding writes the inner text escaped, straight into
//! the body, in one pass. Decoding reads requests leniently in what does not
//! matter and says precisely what is wrong where it does, with the place to
//! answer if that much could be read.

use std::{fmt, io};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{IgnoredAny, MapAccess, Visitor},
};
use serde_json::{Map, Value, value::RawValue};

use crate::{context::RequestContext, version};

const HEAD: &[u8] = br#"{"oslo.version": "2.0", "oslo.message": ""#;
const TAIL: &[u8] = br#""}"#;
const ENVELOPE_VERSION: &str = "2.0";
const CONTEXT_PREFIX: &str = "_context_";

/// A new unique id as it travels: 32 hexadecimal digits.
pub(crate) fn unique_id() -> u128 {
    uuid::Uuid::new_v4().as_u128()
}

/// The message as it goes out, inner text escaped on the way.
struct Writer {
    body: Vec<u8>,
    separator: &'static [u8],
}

impl Writer {
    fn new() -> Self {
        let mut body = Vec::with_capacity(512);
        body.extend_from_slice(HEAD);
        Self {
            body,
            separator: b"{",
        }
    }

    /// `name` must need no escaping.
    fn key(&mut self, name: &str) {
        self.body.extend_from_slice(self.separator);
        self.separator = b", ";
        self.body.extend_from_slice(b"\\\"");
        self.body.extend_from_slice(name.as_bytes());
        self.body.extend_from_slice(b"\\\": ");
    }

    fn value<T: Serialize + ?Sized>(&mut self, value: &T) -> serde_json::Result<()> {
        serde_json::to_writer(Escaped(&mut self.body), value)
    }

    fn member<T: Serialize + ?Sized>(&mut self, name: &str, value: &T) -> serde_json::Result<()> {
        self.key(name);
        self.value(value)
    }

    fn id(&mut self, name: &str, id: u128) {
        self.key(name);
        let text = uuid::Uuid::from_u128(id).simple();
        let mut buffer = [0; 32];
        self.body.extend_from_slice(b"\\\"");
        self.body
            .extend_from_slice(text.encode_lower(&mut buffer).as_bytes());
        self.body.extend_from_slice(b"\\\"");
    }

    fn context(&mut self, context: &RequestContext) -> serde_json::Result<()> {
        for (key, value) in context.iter() {
            let name = serde_json::to_string(&format!("{CONTEXT_PREFIX}{key}"))?;
            self.body.extend_from_slice(self.separator);
            self.separator = b", ";
            io::Write::write_all(&mut Escaped(&mut self.body), name.as_bytes())
                .map_err(serde_json::Error::io)?;
            self.body.extend_from_slice(b": ");
            self.value(value)?;
        }
        Ok(())
    }

    fn finish(mut self) -> Vec<u8> {
        self.body.push(b'}');
        self.body.extend_from_slice(TAIL);
        self.body
    }
}

/// Escapes JSON text into a JSON string. JSON text has no raw control
/// characters, so only quotes and backslashes need it.
struct Escaped<'a>(&'a mut Vec<u8>);

impl io::Write for Escaped<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut rest = bytes;
        while let Some(at) = rest.iter().position(|byte| matches!(byte, b'"' | b'\\')) {
            self.0.extend_from_slice(&rest[..at]);
            self.0.extend_from_slice(&[b'\\', rest[at]]);
            rest = &rest[at + 1..];
        }
        self.0.extend_from_slice(rest);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A request on its way out.
pub(crate) struct RequestOut<'a, A: ?Sized> {
    pub(crate) method: &'a str,
    pub(crate) args: &'a A,
    pub(crate) namespace: Option<&'a str>,
    pub(crate) version: Option<&'a str>,
    pub(crate) reply: Option<ReplyWanted<'a>>,
    pub(crate) unique_id: u128,
    pub(crate) context: &'a RequestContext,
}

/// Where and how the answer is wanted.
pub(crate) struct ReplyWanted<'a> {
    pub(crate) msg_id: u128,
    pub(crate) queue: &'a str,
    /// Seconds between heartbeats the caller bears, if it monitors the call.
    pub(crate) monitor_s: Option<f64>,
}

impl<A: Serialize + ?Sized> RequestOut<'_, A> {
    /// The body to send.
    ///
    /// # Errors
    /// For arguments that are no JSON object.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, String> {
        self.write().map_err(|error| error.to_string())?
    }

    fn write(&self) -> serde_json::Result<Result<Vec<u8>, String>> {
        let mut out = Writer::new();
        out.member("method", self.method)?;
        out.key("args");
        let start = out.body.len();
        out.value(self.args)?;
        if out.body.get(start) != Some(&b'{') {
            return Ok(Err("they must be an object with a name for each".to_owned()));
        }
        if let Some(namespace) = self.namespace {
            out.member("namespace", namespace)?;
        }
        if let Some(version) = self.version {
            out.member("version", version)?;
        }
        if let Some(reply) = &self.reply {
            out.id("_msg_id", reply.msg_id);
            out.member("_reply_q", reply.queue)?;
            // Whole seconds as an integer: a Python peer computes with it either way.
            match reply.monitor_s {
                Some(seconds) if seconds.fract() == 0.0 => {
                    out.member("_timeout", &(seconds as u64))?;
                }
                seconds => out.member("_timeout", &seconds)?,
            }
        }
        out.id("_unique_id", self.unique_id);
        out.context(self.context)?;
        Ok(Ok(out.finish()))
    }
}

/// The answer's body. `failure` is the failure's own JSON text.
pub(crate) fn encode_reply(
    msg_id: &str,
    result: &Value,
    failure: Option<&str>,
    ending: bool,
) -> Vec<u8> {
    let mut out = Writer::new();
    let written = out
        .member("result", result)
        .and_then(|()| out.member("failure", &failure))
        .and_then(|()| out.member("ending", &ending))
        .and_then(|()| out.member("_msg_id", msg_id));
    debug_assert!(written.is_ok(), "JSON values always serialise into memory");
    out.id("_unique_id", unique_id());
    out.finish()
}

/// A notification's body.
pub(crate) fn encode_notification<P: Serialize + ?Sized>(
    head: &NotificationHead<'_>,
    payload: &P,
    context: &RequestContext,
) -> Result<Vec<u8>, String> {
    let mut out = Writer::new();
    out.member("message_id", head.message_id)
        .and_then(|()| out.member("publisher_id", head.publisher_id))
        .and_then(|()| out.member("event_type", head.event_type))
        .and_then(|()| out.member("priority", head.priority))
        .and_then(|()| out.member("payload", payload))
        .and_then(|()| out.member("timestamp", head.timestamp))
        .map_err(|error| error.to_string())?;
    out.id("_unique_id", unique_id());
    out.context(context).map_err(|error| error.to_string())?;
    Ok(out.finish())
}

/// What a notification says besides its payload.
pub(crate) struct NotificationHead<'a> {
    pub(crate) message_id: &'a str,
    pub(crate) publisher_id: &'a str,
    pub(crate) event_type: &'a str,
    pub(crate) priority: &'a str,
    pub(crate) timestamp: &'a str,
}

/// A message that is none, and where to say so.
#[derive(Debug)]
pub(crate) struct Unreadable {
    pub(crate) reason: String,
    pub(crate) answer_to: Option<AnswerTo>,
}

/// A caller waiting at its reply queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AnswerTo {
    pub(crate) msg_id: String,
    pub(crate) queue: String,
}

/// `version` of a request: absent and null are different things on this wire.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Version {
    #[default]
    Absent,
    Null,
    Text(String),
}

/// A request as it came.
#[derive(Debug, Default)]
pub(crate) struct RequestIn {
    pub(crate) method: Value,
    pub(crate) args: Option<Box<RawValue>>,
    pub(crate) namespace: Option<String>,
    pub(crate) version: Version,
    pub(crate) msg_id: Option<String>,
    pub(crate) reply_q: Option<String>,
    pub(crate) monitor_s: Value,
    pub(crate) unique_id: Option<String>,
    pub(crate) context: RequestContext,
}

impl RequestIn {
    /// Reads a body.
    pub(crate) fn decode(body: &[u8]) -> Result<Self, Unreadable> {
        decode(body)
    }

    /// Whoever waits for the answer.
    pub(crate) fn answer_to(&self) -> Option<AnswerTo> {
        let msg_id = self.msg_id.clone()?;
        let queue = self.reply_q.clone().filter(|queue| !queue.is_empty())?;
        Some(AnswerTo { msg_id, queue })
    }
}

/// A reply as it came.
#[derive(Debug, Default)]
pub(crate) struct ReplyIn {
    pub(crate) msg_id: Option<String>,
    pub(crate) result: Option<Box<RawValue>>,
    pub(crate) failure: Option<Value>,
    pub(crate) ending: bool,
}

impl ReplyIn {
    /// Reads a body.
    pub(crate) fn decode(body: &[u8]) -> Result<Self, Unreadable> {
        decode(body)
    }
}

#[derive(Deserialize)]
struct Envelope {
    #[serde(rename = "oslo.version")]
    version: Option<Value>,
    #[serde(rename = "oslo.message")]
    message: Option<String>,
}

fn decode<T: for<'de> Deserialize<'de>>(body: &[u8]) -> Result<T, Unreadable> {
    let told = |reason: String| Unreadable {
        reason,
        answer_to: AnswerTo::find(body),
    };
    let json = |error: serde_json::Error| told(error.to_string());
    let text = std::str::from_utf8(body).map_err(|error| told(error.to_string()))?;
    let envelope: Envelope = serde_json::from_str(text).map_err(json)?;
    match (envelope.version, envelope.message) {
        (Some(version), Some(message)) => {
            // What it says in an envelope of another version nobody can know;
            // Python is silent too.
            check_envelope_version(&version).map_err(|reason| Unreadable {
                reason,
                answer_to: None,
            })?;
            serde_json::from_str(&message).map_err(json)
        }
        _ => serde_json::from_str(text).map_err(json),
    }
}

fn check_envelope_version(version: &Value) -> Result<(), String> {
    let text = version.as_str().unwrap_or_default();
    match version::is_compatible(ENVELOPE_VERSION, text) {
        Ok(true) => Ok(()),
        _ => Err(format!(
            "envelope version {version} is not {ENVELOPE_VERSION}"
        )),
    }
}

/// A message, read for nothing but who sent it.
#[derive(Default)]
struct Sender {
    msg_id: Option<String>,
    reply_q: Option<String>,
    inner: Option<Inner>,
}

impl<'de> Deserialize<'de> for Sender {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Sender;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a message")
            }
            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Sender, M::Error> {
                let mut sender = Sender::default();
                // The last of equal names wins, as in a request.
                while let Some(key) = map.next_key::<Key>()? {
                    match key {
                        Key::MsgId => sender.msg_id = map.next_value()?,
                        Key::ReplyQ => sender.reply_q = map.next_value()?,
                        Key::Inner => sender.inner = map.next_value()?,
                        _ => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(sender)
            }
        }
        from.deserialize_map(Members)
    }
}

/// The message in an envelope: text as it should be, or written straight in.
#[derive(Deserialize)]
#[serde(untagged)]
enum Inner {
    Text(String),
    Message(Box<Sender>),
}

impl AnswerTo {
    /// Who waits for the answer to a message that is not taken, if what can be
    /// read of it tells. (Python, for one, writes NaN and infinities, which are
    /// no JSON.)
    pub(crate) fn find(body: &[u8]) -> Option<Self> {
        let read = |text: &str| serde_json::from_str::<Sender>(&without_python_numbers(text)).ok();
        let outer = read(&String::from_utf8_lossy(body))?;
        let sender = match outer.inner {
            Some(Inner::Text(text)) => read(&text)?,
            Some(Inner::Message(sender)) => *sender,
            None => outer,
        };
        Some(Self {
            msg_id: sender.msg_id?,
            queue: sender.reply_q.unwrap_or_default(),
        })
    }
}

/// `NaN`, `Infinity` and `-Infinity` outside strings become `null`.
fn without_python_numbers(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(['"', 'N', 'I', '-']) {
        clean.push_str(&rest[..at]);
        rest = &rest[at..];
        let word = ["NaN", "Infinity", "-Infinity"]
            .into_iter()
            .find(|word| rest.starts_with(word));
        let taken = match word {
            Some(word) => {
                clean.push_str("null");
                word.len()
            }
            None => {
                let taken = if rest.starts_with('"') {
                    string_len(rest)
                } else {
                    1
                };
                clean.push_str(&rest[..taken]);
                taken
            }
        };
        rest = &rest[taken..];
    }
    clean.push_str(rest);
    clean
}

/// Length of the JSON string `text` begins with, quotes included. Always a
/// character boundary: right after a quote, or the end.
fn string_len(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut at = 1;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    text.len()
}

/// Reads a JSON object member by member; the last of equal names wins, as in Python.
macro_rules! members {
    ($type:ty, $what:literal, |$into:ident, $key:ident, $map:ident| $body:block) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                struct Members;
                impl<'de> Visitor<'de> for Members {
                    type Value = $type;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($what)
                    }
                    fn visit_map<M: MapAccess<'de>>(self, mut $map: M) -> Result<$type, M::Error> {
                        let mut $into = <$type>::default();
                        let mut context = Map::new();
                        while let Some($key) = $map.next_key::<Key>()? {
                            if let Key::Context(name) = $key {
                                context.insert(name, $map.next_value()?);
                                continue;
                            }
                            $body
                        }
                        $into.take_context(context);
                        Ok($into)
                    }
                }
                from.deserialize_map(Members)
            }
        }
    };
}

members!(RequestIn, "a request object", |request, key, map| {
    match key {
        Key::Method => request.method = map.next_value()?,
        Key::Args => request.args = Some(map.next_value()?),
        Key::Namespace => request.namespace = map.next_value()?,
        Key::Version => {
            request.version = match map.next_value::<Option<String>>()? {
                Some(text) => Version::Text(text),
                None => Version::Null,
            }
        }
        Key::MsgId => request.msg_id = map.next_value()?,
        Key::ReplyQ => request.reply_q = map.next_value()?,
        Key::Timeout => request.monitor_s = map.next_value()?,
        Key::UniqueId => request.unique_id = map.next_value()?,
        _ => {
            map.next_value::<IgnoredAny>()?;
        }
    }
});

members!(ReplyIn, "a reply object", |reply, key, map| {
    match key {
        Key::MsgId => reply.msg_id = map.next_value()?,
        Key::Result => reply.result = Some(map.next_value()?),
        Key::Failure => reply.failure = map.next_value()?,
        Key::Ending => reply.ending = truth(&map.next_value()?),
        _ => {
            map.next_value::<IgnoredAny>()?;
        }
    }
});

impl RequestIn {
    fn take_context(&mut self, context: Map<String, Value>) {
        self.context = context.into();
    }
}

impl ReplyIn {
    fn take_context(&mut self, _context: Map<String, Value>) {}
}

/// Truth as Python sees it.
fn truth(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

enum Key {
    Method,
    Args,
    Namespace,
    Version,
    MsgId,
    ReplyQ,
    Timeout,
    UniqueId,
    Result,
    Failure,
    Ending,
    Inner,
    Context(String),
    Other,
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Name;
        impl Visitor<'_> for Name {
            type Value = Key;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name")
            }
            fn visit_str<E>(self, name: &str) -> Result<Key, E> {
                Ok(match name {
                    "method" => Key::Method,
                    "args" => Key::Args,
                    "namespace" => Key::Namespace,
                    "version" => Key::Version,
                    "_msg_id" => Key::MsgId,
                    "_reply_q" => Key::ReplyQ,
                    "_timeout" => Key::Timeout,
                    "_unique_id" => Key::UniqueId,
                    "result" => Key::Result,
                    "failure" => Key::Failure,
                    "ending" => Key::Ending,
                    "oslo.message" => Key::Inner,
                    _ => match name.strip_prefix(CONTEXT_PREFIX) {
                        Some(key) => Key::Context(key.to_owned()),
                        None => Key::Other,
                    },
                })
            }
        }
        from.deserialize_str(Name)
    }
}
