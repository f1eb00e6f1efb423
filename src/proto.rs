//! The generated messages, clients and servers of `proto/`, and the descriptors behind reflection.
//!
//! Invariant: messages that carry a token do not print it (test `messages_do_not_print_secrets`).

#![allow(missing_docs, clippy::all, clippy::pedantic, reason = "generated from the proto files, whose comments are the documentation")]

use std::fmt;

tonic::include_proto!("keyward.v1");

/// What is read and answered of Envoy's external authorization API.
pub mod envoy {
    tonic::include_proto!("envoy.service.auth.v3");
}

/// The compiled proto files, with their comments.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Messages for which `build.rs` derives no `Debug`, since they carry a token or what a token stands for.
macro_rules! silent {
    ($($message:ident),+ $(,)?) => {
        $(impl fmt::Debug for $message {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($message), " { … }"))
            }
        })+
    };
}

use envoy::{HeaderValue, attribute_context::HttpRequest};

silent!(
    HeaderValue,
    HttpRequest,
    ValidateTokenRequest,
    BatchValidateTokensRequest,
    CreateTokenResponse,
    RegenerateTokenResponse,
    RegenerateSelfResponse,
    CreateMyTokenResponse,
    IssueTemporaryTokenResponse,
    ReportLeakedTokensRequest,
    RotateWebhookSecretResponse,
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_do_not_print_secrets() {
        let secret = "kw_canary".to_owned();
        let request = ValidateTokenRequest { token: secret.clone(), ..Default::default() };
        let printed = [
            format!("{request:?}"),
            format!("{:?}", BatchValidateTokensRequest { requests: vec![request] }),
            format!("{:?}", CreateTokenResponse { secret: secret.clone(), ..Default::default() }),
            format!("{:?}", RegenerateTokenResponse { secret: secret.clone(), ..Default::default() }),
            format!("{:?}", RegenerateSelfResponse { secret: secret.clone(), ..Default::default() }),
            format!("{:?}", CreateMyTokenResponse { secret: secret.clone(), ..Default::default() }),
            format!("{:?}", IssueTemporaryTokenResponse { secret: secret.clone(), ..Default::default() }),
            format!("{:?}", ReportLeakedTokensRequest { tokens: vec![secret.clone()] }),
            format!("{:?}", RotateWebhookSecretResponse { webhook_secret: secret, ..Default::default() }),
        ];
        let headers = [("authorization".to_owned(), "Bearer kw_canary".to_owned())];
        let requests = [
            format!("{:?}", HttpRequest { headers: headers.into(), ..Default::default() }),
            format!("{:?}", HeaderValue { value: "kw_canary".to_owned(), ..Default::default() }),
        ];
        assert!(requests.iter().all(|text| text.ends_with("{ … }")), "{requests:?}");
        assert!(printed.iter().all(|text| text.ends_with("{ … }")), "{printed:?}");
    }
}
