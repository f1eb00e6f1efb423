//! What gateways ask by HTTP: may this request pass (forward-auth), and what is this token (RFC 7662).
//!
//! `/v1/authorize` takes any method and never reads a body. What the route needs is in its query, under the names that `context_extensions` have for Envoy; the request that waits is described by
//! `x-forwarded-method` and `x-forwarded-uri`, and its client by the last address of `x-forwarded-for`. Its `authorization` is the client's, so the gateway's own is `x-keyward-authorization`.
//!
//! Invariant: the gateway is identified before anything that it sends counts (test `a_gateway_that_is_not_known_is_told_nothing`).
//! Invariant: every answer but 200 closes the door, and 200 names all identity headers (test `only_a_good_token_opens_the_door`).

use std::{borrow::Cow, net::IpAddr, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode,
    header::{ALLOW, AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE},
};
use http_body_util::{BodyExt as _, Full, Limited};
use serde_json::json;
use tokio::time::timeout;

use super::gate::{self, Gate, MESSAGE_TIMEOUT, Peer};
use super::gateway::{self, Decision, Identity, Inquiry, Presented, Refusal, Route};
use crate::{
    caller::{Access, Caller},
    error::Error,
    grant::{Derived, Grant, Need, Verdict},
    validator::{HttpRequest, Judgement, Question},
};

/// The gateway's own credentials: those of `authorization` are the client's.
const GATEWAY: &str = "x-keyward-authorization";
const FORM_BYTES_MAX: usize = 64 * 1024;
const FORM: &str = "application/x-www-form-urlencoded";
const RETRY: Duration = Duration::from_secs(1);

type Answer = Response<Full<Bytes>>;

impl Gate {
    /// Answers one request. `is_ready` says whether questions can be answered now.
    pub async fn serve_http<B>(self: Arc<Self>, request: Request<B>, peer: Arc<Peer>, is_ready: bool) -> Answer
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let _active = self.begin();
        let (head, body) = request.into_parts();
        let work = async {
            match head.uri.path() {
                "/healthz" => text(StatusCode::OK, "the process lives\n"),
                "/readyz" if is_ready => text(StatusCode::OK, "questions are answered\n"),
                "/readyz" => text(StatusCode::SERVICE_UNAVAILABLE, "questions cannot be answered now\n"),
                "/v1/authorize" => self.authorize(&head.headers, head.uri.query().unwrap_or_default(), &peer).await,
                "/oauth2/introspect" if head.method == Method::POST => self.introspect(&head.headers, body, &peer).await,
                "/oauth2/introspect" => with(text(StatusCode::METHOD_NOT_ALLOWED, "POST a form\n"), ALLOW, "POST"),
                _ => text(StatusCode::NOT_FOUND, "there are /v1/authorize, /oauth2/introspect, /healthz and /readyz\n"),
            }
        };
        timeout(self.limits.deadline_max, work).await.unwrap_or_else(|_| outage(&Error::Unavailable("the call took too long".into())))
    }

    async fn authorize(&self, headers: &HeaderMap, query: &str, peer: &Peer) -> Answer {
        let (plain, settings): (Vec<_>, Vec<_>) = url::form_urlencoded::parse(query.as_bytes()).partition(|(name, _)| name == "only_401_403");
        let answer = self.decided(headers, &settings, peer).await;
        if plain.iter().any(|(_, value)| value == "true") { narrowed(answer) } else { answer }
    }

    async fn decided(&self, headers: &HeaderMap, settings: &[(Cow<'_, str>, Cow<'_, str>)], peer: &Peer) -> Answer {
        let caller = match self.gateway(headers, HeaderName::from_static(GATEWAY), true, peer).await {
            Ok(caller) => caller,
            Err(error) => return foreign(&error),
        };
        let inquiry = match inquiry(headers, settings) {
            Ok(inquiry) => inquiry,
            Err(refusal) => return refused(&refusal),
        };
        let question = match inquiry.question(caller.validation_reach()) {
            Ok(question) => question,
            Err(refusal) => return refused(&refusal),
        };
        let Ok(_place) = self.places(gate::Plane::Data).try_acquire() else {
            self.api.metrics.shed();
            return outage(&Error::Overloaded("too many calls are under way"));
        };
        let answer = match self.api.validator.validate(question, self.now()).await {
            Ok(answer) => answer,
            Err(error) => return outage(&error),
        };
        self.api.metrics.verdict(answer.verdict);
        let judgement = Judgement { verdict: answer.verdict, grant: answer.grant.as_ref(), derived_scope: answer.derived_scope.as_ref() };
        match gateway::decide(judgement, &question) {
            Decision::Pass(identity) => passed(&identity),
            Decision::Refuse(refusal) => refused(&refusal),
        }
    }

    async fn introspect<B>(&self, headers: &HeaderMap, body: B, peer: &Peer) -> Answer
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let caller = match self.gateway(headers, AUTHORIZATION, false, peer).await {
            Ok(caller) => caller,
            Err(error @ (Error::Unavailable(_) | Error::Overloaded(_) | Error::Internal(_))) => return outage(&error),
            Err(Error::Denied(_)) => return oauth(StatusCode::FORBIDDEN, "insufficient_scope", "the caller needs keyward:validate"),
            Err(_) => {
                let answer = oauth(StatusCode::UNAUTHORIZED, "invalid_client", "the caller's own credentials are missing or not good");
                return with(answer, WWW_AUTHENTICATE, r#"Bearer realm="keyward", Basic realm="keyward""#);
            }
        };
        let is_form = headers.get(CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(FORM.as_bytes()));
        let read = timeout(MESSAGE_TIMEOUT, Limited::new(body, FORM_BYTES_MAX).collect()).await;
        let Some(form) = read.ok().and_then(Result::ok).map(http_body_util::Collected::to_bytes).filter(|_| is_form) else {
            return oauth(StatusCode::BAD_REQUEST, "invalid_request", "the body must be a form of at most 64 KiB");
        };
        let mut tokens = url::form_urlencoded::parse(&form).filter(|(name, _)| name == "token").map(|(_, value)| value);
        let (Some(token), None) = (tokens.next(), tokens.next()) else {
            return oauth(StatusCode::BAD_REQUEST, "invalid_request", "token must be there once");
        };
        let Ok(_place) = self.places(gate::Plane::Data).try_acquire() else {
            self.api.metrics.shed();
            return outage(&Error::Overloaded("too many calls are under way"));
        };
        let need = Need { workspace: caller.validation_reach(), audience: None, client_ip: None, scopes: &[], derived: Derived::NotAsked };
        let question = Question { text: token.as_bytes(), need, http: None, peek: false };
        match self.api.validator.validate(question, self.now()).await {
            Err(error) => outage(&error),
            Ok(answer) => {
                self.api.metrics.verdict(answer.verdict);
                let good = answer.grant.filter(|_| answer.verdict == Verdict::Valid);
                json_answer(StatusCode::OK, &good.map_or_else(|| json!({"active": false}), |grant| introspected(&grant)))
            }
        }
    }

    /// The gateway that asks.
    async fn gateway(&self, headers: &HeaderMap, name: HeaderName, is_gateway: bool, peer: &Peer) -> Result<Caller, Error> {
        let mut values = headers.get_all(name).iter();
        let presented = match (values.next(), values.next()) {
            (None, _) => None,
            (Some(value), None) => Some(own_token(value).ok_or(Error::Unauthenticated("the gateway's credentials are no bearer token"))?),
            (Some(_), Some(_)) => return Err(Error::Unauthenticated("the gateway's credentials are there more than once")),
        };
        self.identify_presented(presented.as_deref(), Access::Validate, is_gateway, peer).await
    }
}

/// The token of `Bearer`, or the password of `Basic` (RFC 6749, section 2.3.1).
fn own_token(value: &HeaderValue) -> Option<Vec<u8>> {
    if let Some(token) = gate::token_of(value) {
        return Some(token.to_vec());
    }
    let (scheme, credentials) = value.as_bytes().split_at_checked(6)?;
    let decoded = scheme.eq_ignore_ascii_case(b"basic ").then(|| STANDARD.decode(credentials).ok())??;
    let colon = decoded.iter().position(|byte| *byte == b':')?;
    Some(percent_encoding::percent_decode(decoded.get(colon + 1..)?).collect())
}

fn inquiry<'a>(headers: &'a HeaderMap, settings: &'a [(Cow<'a, str>, Cow<'a, str>)]) -> Result<Inquiry<'a>, Refusal> {
    let route = Route::read(settings.iter().map(|(name, value)| (&**name, &**value)))?;
    let presented = Presented::of(route.token_header(), headers.get_all(route.token_header()).iter().map(HeaderValue::as_bytes));
    // Of several, the last was put there by the gateway itself.
    let last = |name: &str| headers.get_all(name).iter().next_back().and_then(|value| value.to_str().ok());
    let client_ip = last(route.client_ip_header.unwrap_or("x-forwarded-for")).and_then(|list| list.rsplit(',').next()?.trim().parse::<IpAddr>().ok());
    let method = last("x-forwarded-method").unwrap_or_default();
    let path = last("x-forwarded-uri").unwrap_or_default();
    Ok(Inquiry { route, presented, http: HttpRequest { method, path }, client_ip: client_ip.map(|address| address.to_canonical()) })
}

fn passed(identity: &Identity) -> Answer {
    let mut answer = text(StatusCode::OK, "");
    for (name, value) in identity.headers() {
        // Ids, scopes: their rules allow nothing that a header does not.
        let value = HeaderValue::from_str(value).unwrap_or_else(|_| HeaderValue::from_static(""));
        answer.headers_mut().insert(HeaderName::from_static(name), value);
    }
    answer
}

fn refused(refusal: &Refusal) -> Answer {
    if let Refusal::Misconfigured(why) = refusal {
        tracing::warn!(why, "a gateway's route is set wrongly, and every request of it is denied");
    }
    let status = StatusCode::from_u16(refusal.http_status()).unwrap_or(StatusCode::FORBIDDEN);
    let body = match refusal.error() {
        Some(error) => json!({"error": error, "error_description": refusal.sentence()}),
        None => json!({"error_description": refusal.sentence()}),
    };
    let answer = json_answer(status, &body);
    match refusal.challenge() {
        Some(challenge) => with(answer, WWW_AUTHENTICATE, &challenge),
        None => answer,
    }
}

/// A gateway that is not let in is not the fault of its client, who is told nothing of it.
fn foreign(error: &Error) -> Answer {
    if matches!(error, Error::Unavailable(_) | Error::Overloaded(_) | Error::Internal(_)) {
        return outage(error);
    }
    tracing::warn!(%error, header = GATEWAY, "a gateway is not let in, and every request of it is denied");
    oauth(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "this cannot be decided")
}

/// Nobody can say now whether the request may pass.
fn outage(error: &Error) -> Answer {
    let status = if matches!(error, Error::Overloaded(_)) { StatusCode::TOO_MANY_REQUESTS } else { StatusCode::SERVICE_UNAVAILABLE };
    tracing::debug!(%error, "a gateway's question is not answered");
    with(oauth(status, "temporarily_unavailable", "this cannot be decided now; try again"), RETRY_AFTER, &RETRY.as_secs().to_string())
}

/// For gateways that take every other status for an error of their own (nginx's auth_request).
fn narrowed(mut answer: Answer) -> Answer {
    match answer.status() {
        StatusCode::OK | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {}
        StatusCode::BAD_REQUEST => *answer.status_mut() = StatusCode::UNAUTHORIZED,
        _ => *answer.status_mut() = StatusCode::FORBIDDEN,
    }
    answer
}

/// RFC 7662, section 2.2.
fn introspected(grant: &Grant) -> serde_json::Value {
    let mut told = json!({
        "active": true,
        "scope": grant.scopes().collect::<Vec<_>>().join(" "),
        "client_id": grant.principal(),
        "username": grant.principal(),
        "token_type": "Bearer",
        "sub": grant.principal(),
        "iss": format!("urn:keyward:{}", grant.workspace()),
        "jti": grant.token_id().to_string(),
    });
    if let Some(end) = grant.expire_time().to_timestamp() {
        told["exp"] = json!(end.seconds);
    }
    let audiences: Vec<&str> = grant.audiences().collect();
    if !audiences.is_empty() {
        told["aud"] = json!(audiences);
    }
    told
}

fn oauth(status: StatusCode, error: &str, description: &str) -> Answer {
    json_answer(status, &json!({"error": error, "error_description": description}))
}

fn json_answer(status: StatusCode, body: &serde_json::Value) -> Answer {
    let answer = Response::new(Full::from(body.to_string()));
    let mut answer = with(answer, CONTENT_TYPE, "application/json");
    *answer.status_mut() = status;
    with(answer, CACHE_CONTROL, "no-store")
}

fn text(status: StatusCode, body: &'static str) -> Answer {
    let mut answer = Response::new(Full::from(body));
    *answer.status_mut() = status;
    with(answer, CACHE_CONTROL, "no-store")
}

fn with(mut answer: Answer, name: HeaderName, value: &str) -> Answer {
    if let Ok(value) = HeaderValue::from_str(value) {
        answer.headers_mut().insert(name, value);
    }
    answer
}
