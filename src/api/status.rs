//! Errors as gRPC statuses, in one place.
//!
//! Invariant: every error carries `ErrorInfo` (test `every_error_carries_error_info`), also those that the framework makes before or
//! after our code runs.

use std::time::Duration;

use prost::Message as _;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt as _, pb};

use crate::error::Error;

const DOMAIN: &str = "keyward";
const RETRY_OVERLOADED: Duration = Duration::from_millis(200);
const RETRY_UNAVAILABLE: Duration = Duration::from_secs(1);

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::Invalid(violations) => {
                let violations = violations.into_iter().map(|violation| FieldViolation::new(violation.field, violation.rule));
                status(Code::InvalidArgument, "INVALID_FIELD", message, |details| {
                    details.set_bad_request(violations.collect::<Vec<_>>());
                })
            }
            Error::Unauthenticated(_) => plain(Code::Unauthenticated, "UNAUTHENTICATED", message),
            Error::Denied(_) => plain(Code::PermissionDenied, "PERMISSION_DENIED", message),
            Error::NotFound(_) => plain(Code::NotFound, "NOT_FOUND", message),
            Error::Exists(_) => plain(Code::AlreadyExists, "ALREADY_EXISTS", message),
            Error::Conflict => plain(Code::Aborted, "ETAG_MISMATCH", message),
            Error::Precondition(_) => plain(Code::FailedPrecondition, "ILLEGAL_STATE", message),
            Error::Overloaded(_) => overloaded(message),
            Error::Unavailable(source) => {
                tracing::warn!(error = %chain(source.as_ref()), "the store did not answer");
                status(Code::Unavailable, "STORE_UNAVAILABLE", message, |details| {
                    details.set_retry_info(Some(RETRY_UNAVAILABLE));
                })
            }
            Error::Internal(source) => {
                tracing::error!(error = %chain(source.as_ref()), "internal error");
                plain(Code::Internal, "INTERNAL", message)
            }
        }
    }
}

/// Too much at once.
pub(super) fn overloaded(message: String) -> Status {
    status(Code::ResourceExhausted, "OVERLOADED", message, |details| {
        details.set_retry_info(Some(RETRY_OVERLOADED));
    })
}

/// The caller's time, or ours, ran out.
pub(super) fn deadline_exceeded() -> Status {
    plain(
        Code::DeadlineExceeded,
        "DEADLINE_EXCEEDED",
        "the time for this call ran out; a change that it asked for may have been made all the same",
    )
}

/// A message beyond its limit.
pub(super) fn message_too_large(limit: usize) -> Status {
    plain(Code::ResourceExhausted, "MESSAGE_TOO_LARGE", format!("the message is larger than the {limit} bytes that this method takes"))
}

/// Bytes that are not the message that the method takes.
pub(super) fn malformed_message() -> Status {
    plain(Code::InvalidArgument, "MALFORMED_MESSAGE", "the message is not the one that this method takes; is the proto file up to date?")
}

/// The end of a stream that is no fault of anybody's. Clients take `UNAVAILABLE` for what it means here: connect again, and send once more what has no answer.
pub(super) fn reopen(message: &str) -> Status {
    plain(Code::Unavailable, "STREAM_ENDED", message)
}

/// An error as part of an answer.
pub(super) fn message(status: Status) -> pb::Status {
    let status = complete(&status).unwrap_or(status);
    let whole = pb::Status::decode(status.details());
    whole.unwrap_or_else(|_| pb::Status { code: status.code().into(), message: status.message().to_owned(), details: Vec::new() })
}

/// Gives an error that the framework made what our own errors have; nothing if it has it.
pub(super) fn complete(status: &Status) -> Option<Status> {
    if !status.details().is_empty() || status.code() == Code::Ok {
        return None;
    }
    let message = status.message();
    Some(match status.code() {
        // tonic's decoder: https://docs.rs/tonic/0.14/tonic/struct.Streaming.html
        Code::OutOfRange => plain(Code::ResourceExhausted, "MESSAGE_TOO_LARGE", message),
        Code::Internal if message.contains("decode Protobuf") => malformed_message(),
        Code::Unimplemented if message.is_empty() => plain(Code::Unimplemented, "UNKNOWN_METHOD", "there is no such method"),
        Code::Unimplemented => plain(Code::Unimplemented, "UNSUPPORTED", message),
        code => plain(code, "PROTOCOL_ERROR", message),
    })
}

fn plain(code: Code, reason: &str, message: impl Into<String>) -> Status {
    status(code, reason, message, |_| ())
}

fn status(code: Code, reason: &str, message: impl Into<String>, more: impl FnOnce(&mut ErrorDetails)) -> Status {
    let mut details = ErrorDetails::new();
    details.set_error_info(reason, DOMAIN, std::collections::HashMap::new());
    more(&mut details);
    Status::with_error_details(code, message, details)
}

/// An error and all that lies below it, in a line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut below = error.source();
    while let Some(error) = below {
        let part = error.to_string();
        if !text.contains(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        below = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_carries_error_info() {
        let source = || "below".into();
        let errors = [
            (Error::invalid("a", "b"), Code::InvalidArgument),
            (Error::Unauthenticated("a"), Code::Unauthenticated),
            (Error::Denied("a".to_owned()), Code::PermissionDenied),
            (Error::NotFound("a"), Code::NotFound),
            (Error::Conflict, Code::Aborted),
            (Error::Exists("a"), Code::AlreadyExists),
            (Error::precondition("a"), Code::FailedPrecondition),
            (Error::Overloaded("a"), Code::ResourceExhausted),
            (Error::Unavailable(source()), Code::Unavailable),
            (Error::Internal(source()), Code::Internal),
        ];
        for (error, code) in errors {
            let status = Status::from(error);
            assert_eq!(status.code(), code);
            let info = status.get_details_error_info().expect("ErrorInfo");
            assert!(info.domain == "keyward" && info.reason.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_'), "{info:?}");
            assert!(!status.message().contains("below"));
            let retry = matches!(code, Code::ResourceExhausted | Code::Unavailable);
            assert_eq!(status.get_details_retry_info().is_some(), retry);
        }
    }

    #[test]
    fn the_frameworks_errors_are_completed() {
        assert!(complete(&Status::from(Error::Conflict)).is_none());
        let completed = complete(&Status::out_of_range("too large")).expect("it has no details");
        assert_eq!(completed.code(), Code::ResourceExhausted);
        assert!(complete(&Status::unimplemented("")).expect("none").get_details_error_info().is_some());
    }
}
