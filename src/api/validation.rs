//! `ValidationService`: questions about tokens in, verdicts out.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::{Api, Call, call, convert};
use crate::{
    error::{Error, Violations},
    grant::{Derived, Grant, Need},
    proto::{self, validation_service_server::ValidationService},
    scope::Scope,
    validator::{Answer as Judgement, HttpRequest, Question},
};

const BATCH_MAX: usize = 1_000;
const SCOPES_MAX: usize = 100;
const AUDIENCE_CHARS_MAX: usize = 63;

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl ValidationService for Api {
    async fn validate_token(&self, request: Request<proto::ValidateTokenRequest>) -> Answer<proto::ValidateTokenResponse> {
        let (Call { caller, now }, message) = call(request)?;
        let mut violations = Violations::default();
        let scopes = required_scopes("", &message, &mut violations);
        let question = question("", &message, &scopes, caller.validation_reach(), &mut violations);
        violations.finish()?;
        let judgement = self.validator.validate(question, now).await?;
        Ok(Response::new(self.answer(judgement, &question)))
    }

    async fn batch_validate_tokens(
        &self,
        request: Request<proto::BatchValidateTokensRequest>,
    ) -> Answer<proto::BatchValidateTokensResponse> {
        let (Call { caller, now }, message) = call(request)?;
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
        let responses = judgements.into_iter().zip(&questions).map(|(judgement, question)| self.answer(judgement, question)).collect();
        Ok(Response::new(proto::BatchValidateTokensResponse { responses }))
    }
}

impl Api {
    fn answer(&self, judgement: Judgement, question: &Question<'_>) -> proto::ValidateTokenResponse {
        self.metrics.verdict(judgement.verdict);
        let verdict = convert::verdict(judgement.verdict);
        let valid = verdict == proto::Verdict::Valid;
        match judgement.grant {
            None => proto::ValidateTokenResponse { valid, verdict: verdict.into(), ..Default::default() },
            Some(grant) => proto::ValidateTokenResponse {
                missing_scopes: if verdict == proto::Verdict::InsufficientScope {
                    let derived = judgement.derived_scope.as_ref().map_or(Derived::NotAsked, Derived::Scope);
                    convert::scope_texts(grant.missing_scopes(&Need { derived, ..question.need }))
                } else {
                    Vec::new()
                },
                derived_scope: judgement.derived_scope.map(|scope| scope.as_str().to_owned()).unwrap_or_default(),
                ..facts(&grant, valid, verdict)
            },
        }
    }
}

fn facts(grant: &Arc<Grant>, valid: bool, verdict: proto::Verdict) -> proto::ValidateTokenResponse {
    proto::ValidateTokenResponse {
        valid,
        verdict: verdict.into(),
        token_id: grant.token_id.to_string(),
        workspace: grant.workspace.to_string(),
        principal: grant.principal.to_string(),
        kind: convert::kind(grant.kind).into(),
        scopes: convert::scope_texts(grant.scopes.iter()),
        audiences: grant.audiences.clone(),
        display_name: grant.display_name.clone(),
        metadata: grant.metadata.clone(),
        expire_time: convert::timestamp(grant.expire_time),
        missing_scopes: Vec::new(),
        derived_scope: String::new(),
    }
}

fn required_scopes(path: &str, message: &proto::ValidateTokenRequest, violations: &mut Violations) -> Vec<Scope> {
    let field = format!("{path}required_scopes");
    if message.required_scopes.len() > SCOPES_MAX {
        violations.add(field, format!("must have at most {SCOPES_MAX} entries; it has {}", message.required_scopes.len()));
        return Vec::new();
    }
    let scope = |(index, text): (usize, &String)| {
        let parsed = text.parse::<Scope>().and_then(|scope| {
            if scope.is_wildcard() { Err("must not be a wildcard: name the operation that the use needs") } else { Ok(scope) }
        });
        violations.take(&format!("{field}[{index}]"), parsed)
    };
    message.required_scopes.iter().enumerate().filter_map(scope).collect()
}

fn question<'a>(
    path: &str,
    message: &'a proto::ValidateTokenRequest,
    scopes: &'a [Scope],
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
