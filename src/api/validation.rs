//! `ValidationService`: questions about tokens in, verdicts out.

use prost::Message as _;
use tonic::{Request, Response, Status, Streaming, codegen::BoxStream};

use super::{Api, Call, call, convert, invalidations};
use crate::{
    error::{Error, Violations},
    grant::{Derived, Grant, Need},
    proto::{self, validation_service_server::ValidationService},
    scope::Scope,
    validator::{Answer as Judgement, HttpRequest, Question},
};

pub(super) const BATCH_MAX: usize = 1_000;
pub(super) const SCOPES_MAX: usize = 100;
pub(super) const AUDIENCE_CHARS_MAX: usize = 63;

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl ValidationService for Api {
    type StreamValidateTokensStream = BoxStream<proto::StreamValidateTokensResponse>;

    /// Never called: the gate hands this method to `stream`, where a message that does not decode does not end the call.
    async fn stream_validate_tokens(&self, _: Request<Streaming<proto::ValidateTokenRequest>>) -> Answer<Self::StreamValidateTokensStream> {
        Err(Error::Internal("a call came past the gate".into()).into())
    }

    type WatchInvalidationsStream = invalidations::Told;

    async fn watch_invalidations(&self, request: Request<proto::WatchInvalidationsRequest>) -> Answer<Self::WatchInvalidationsStream> {
        self.watch(request).map(Response::new)
    }

    async fn validate_token(&self, request: Request<proto::ValidateTokenRequest>) -> Answer<proto::ValidateTokenResponse> {
        let (Call { caller, now, .. }, message) = call(request)?;
        let mut violations = Violations::default();
        let scopes = required_scopes("", &message, &mut violations);
        let question = question("", &message, &scopes, caller.validation_reach(), &mut violations);
        violations.finish()?;
        let judgement = self.validator.validate(question, now).await?;
        Ok(Response::new(self.answer(judgement, &question)?))
    }

    async fn batch_validate_tokens(
        &self,
        request: Request<proto::BatchValidateTokensRequest>,
    ) -> Answer<proto::BatchValidateTokensResponse> {
        let (Call { caller, now, .. }, message) = call(request)?;
        if !(1..=BATCH_MAX).contains(&message.requests.len()) {
            let rule = format!("must hold 1 to {BATCH_MAX} entries; it has {}", message.requests.len());
            return Err(Error::invalid("requests", rule).into());
        }
        let mut violations = Violations::default();
        let path = |index| format!("requests[{index}].");
        let numbered = || message.requests.iter().enumerate();
        let scopes: Vec<_> = numbered().map(|(index, request)| required_scopes(&path(index), request, &mut violations)).collect();
        let reach = caller.validation_reach();
        let questions: Vec<_> = numbered()
            .zip(&scopes)
            .map(|((index, request), scopes)| question(&path(index), request, scopes, reach, &mut violations))
            .collect();
        violations.finish()?;
        let judgements = self.validator.validate_batch(&questions, now).await?;
        let responses = judgements.into_iter().zip(&questions).map(|(judgement, question)| self.answer(judgement, question));
        let responses = responses.collect::<Result<_, _>>()?;
        Ok(Response::new(proto::BatchValidateTokensResponse { responses }))
    }
}

impl Api {
    pub(super) fn answer(&self, judgement: Judgement, question: &Question<'_>) -> Result<proto::ValidateTokenResponse, Error> {
        self.metrics.verdict(judgement.verdict);
        let verdict = convert::verdict(judgement.verdict);
        let valid = verdict == proto::Verdict::Valid;
        Ok(match judgement.grant {
            None => proto::ValidateTokenResponse { valid, verdict: verdict.into(), ..Default::default() },
            Some(grant) => proto::ValidateTokenResponse {
                missing_scopes: if verdict == proto::Verdict::InsufficientScope {
                    let derived = judgement.derived_scope.as_ref().map_or(Derived::NotAsked, |scope| Derived::Scope(scope.as_str()));
                    grant.missing_scopes(&Need { derived, ..question.need }).map(str::to_owned).collect()
                } else {
                    Vec::new()
                },
                derived_scope: judgement.derived_scope.map(|scope| scope.as_str().to_owned()).unwrap_or_default(),
                ..facts(&grant, valid, verdict)?
            },
        })
    }
}

/// The answer as the grant holds it, and what it does not hold.
fn facts(grant: &Grant, valid: bool, verdict: proto::Verdict) -> Result<proto::ValidateTokenResponse, Error> {
    let told = proto::ValidateTokenResponse::decode(grant.answer());
    let told = told.map_err(|error| Error::Internal(error.into()))?;
    Ok(proto::ValidateTokenResponse { valid, verdict: verdict.into(), ..told })
}

pub(super) fn required_scopes<'a>(path: &str, message: &'a proto::ValidateTokenRequest, violations: &mut Violations) -> Vec<&'a str> {
    let field = format!("{path}required_scopes");
    if message.required_scopes.len() > SCOPES_MAX {
        violations.add(field, format!("must have at most {SCOPES_MAX} entries; it has {}", message.required_scopes.len()));
        return Vec::new();
    }
    let scope = |(index, text): (usize, &'a String)| {
        violations.take(&format!("{field}[{index}]"), Scope::check_single(text).map(|()| text.as_str()))
    };
    message.required_scopes.iter().enumerate().filter_map(scope).collect()
}

pub(super) fn question<'a>(
    path: &str,
    message: &'a proto::ValidateTokenRequest,
    scopes: &'a [&'a str],
    reach: Option<&'a str>,
    violations: &mut Violations,
) -> Question<'a> {
    if message.audience.len() > AUDIENCE_CHARS_MAX {
        violations.add(format!("{path}audience"), format!("must be at most {AUDIENCE_CHARS_MAX} characters"));
    }
    let audience = Some(message.audience.as_str()).filter(|audience| !audience.is_empty());
    let client_ip = convert::client_ip(format!("{path}client_ip"), &message.client_ip, violations);
    let http = match (message.http_method.as_str(), message.path.as_str()) {
        ("", "") => None,
        ("", _) => {
            violations.add(format!("{path}http_method"), "must come with path");
            None
        }
        (_, "") => {
            violations.add(format!("{path}path"), "must come with http_method");
            None
        }
        (method, path) => Some(HttpRequest { method, path }),
    };
    let need = Need { workspace: reach, audience, client_ip, scopes, derived: Derived::NotAsked };
    Question { text: message.token.as_bytes(), need, http, peek: message.peek }
}
