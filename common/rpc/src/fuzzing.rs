//! What holds of messages, whatever bytes come: the bodies of fuzz targets
//! (`tests/fuzz`). A property that does not hold is a panic.

use serde_json::{Value, value::RawValue};

use crate::{
    RemoteFailure,
    envelope::{AnswerTo, ReplyIn, ReplyWanted, RequestIn, RequestOut, Version, encode_reply},
};

/// A request: what is read and written again is read the same; of one that is not
/// read, it is said who waits for the answer, if anything says so.
pub fn envelope(body: &[u8]) {
    let request = match RequestIn::decode(body) {
        Ok(request) => request,
        Err(unreadable) => {
            assert!(!unreadable.reason.is_empty());
            if let Some(to) = &unreadable.answer_to {
                assert_eq!(AnswerTo::find(body).as_ref(), Some(to));
                assert!(to.msg_id.len() + to.queue.len() <= 3 * body.len());
            }
            return;
        }
    };
    if let Some(to) = request.answer_to() {
        assert_eq!(AnswerTo::find(body), Some(to), "found by both ways");
    }
    // What can be sent: a method with arguments by name, ids that are ids.
    let (Some(method), Some(args)) = (request.method.as_str(), &request.args) else {
        return;
    };
    let id = |text: &Option<String>| u128::from_str_radix(text.as_deref()?, 16).ok();
    let again = RequestOut {
        method,
        args: &**args,
        namespace: request.namespace.as_deref(),
        version: match &request.version {
            Version::Text(text) => Some(text),
            Version::Absent | Version::Null => None,
        },
        reply: id(&request.msg_id).map(|msg_id| ReplyWanted {
            msg_id,
            queue: request.reply_q.as_deref().unwrap_or_default(),
            monitor_s: request.monitor_s.as_f64(),
        }),
        unique_id: id(&request.unique_id).unwrap_or_default(),
        context: &request.context,
    };
    let Ok(written) = again.encode() else {
        assert!(!args.get().starts_with('{'), "arguments that are an object");
        return;
    };
    let read = RequestIn::decode(&written).expect("what was written is read");
    assert_eq!(read.method, request.method);
    assert_eq!(json(read.args.as_deref()), json(Some(args)));
    assert_eq!(read.namespace, request.namespace);
    if let Version::Text(_) = &request.version {
        assert_eq!(read.version, request.version);
    }
    assert_eq!(id(&read.unique_id), Some(again.unique_id));
    assert_eq!(
        id(&read.msg_id),
        again.reply.as_ref().map(|reply| reply.msg_id)
    );
    if let Some(reply) = &again.reply {
        assert_eq!(read.reply_q.as_deref(), Some(reply.queue));
        if let Some(seconds) = reply.monitor_s.filter(|seconds| *seconds >= 0.0) {
            assert_eq!(read.monitor_s.as_f64(), Some(seconds));
        }
    }
    assert_eq!(read.context, request.context);
}

/// A reply, and the failure in it: the same.
pub fn reply(body: &[u8]) {
    let Ok(reply) = ReplyIn::decode(body) else {
        return;
    };
    let failure = match &reply.failure {
        Some(Value::String(text)) => {
            if let Ok(failure) = RemoteFailure::from_wire(text) {
                let again = RemoteFailure::from_wire(&failure.to_wire());
                // One suffix is taken off at each reading.
                let suffixed = |name: &str| name.ends_with("_Remote");
                if !suffixed(&failure.class) && !suffixed(&failure.module) {
                    assert_eq!(again.as_ref(), Ok(&failure));
                }
                assert!(again.is_ok());
            }
            Some(text.as_str())
        }
        _ => None,
    };
    let Some(msg_id) = &reply.msg_id else { return };
    // A result that is no value (a number beyond all bounds, say) is not sent.
    let Ok(result) = json(reply.result.as_deref()).transpose() else {
        return;
    };
    let result = result.unwrap_or_default();
    let written = encode_reply(msg_id, &result, failure, reply.ending);
    let read = ReplyIn::decode(&written).expect("what was written is read");
    assert_eq!(read.msg_id.as_ref(), Some(msg_id));
    let sent = json(read.result.as_deref()).transpose();
    assert_eq!(sent.expect("a value").unwrap_or_default(), result);
    assert_eq!(read.failure.as_ref().and_then(Value::as_str), failure);
    assert_eq!(read.ending, reply.ending);
}

fn json(raw: Option<&RawValue>) -> Option<Result<Value, String>> {
    raw.map(|raw| serde_json::from_str(raw.get()).map_err(|e| e.to_string()))
}
