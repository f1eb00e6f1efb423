//! What gateways ask by HTTP: may this request pass (forward-auth), and what is this token (RFC 7662).
//!
//! `/v1/authorize` takes any method and never reads a body. What the route needs is in its query, under the names that `context_extensions` have for Envoy; the request that waits is described by
//! `x-forwarded-method` and `x-forwarded-uri`, and its client by the last address of `x-forwarded-for`. Its `authorization` is the client's, so the gateway's own is `x-keyward-authorization`.
//!
//! Invariant: the gateway is identified before anything that it sends counts (test `a_gateway_that_is_not_known_is_told_nothing`).
//! Invariant: every answer but 200 closes the door, and 200 names all identity headers (test `only_a_good_token_opens_the_door`).

use std::{borrow::Cow, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode,
    header::{ALLOW, AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, IntoHeaderName, RETRY_AFTER, WWW_AUTHENTICATE},
};
use http_body_util::{BodyExt as _, Full, Limited};
use serde_json::json;
use tokio::time::timeout;
use tonic::{Code, Status};
use url::form_urlencoded;

use super::{
    gate::{self, Gate, Judge, MESSAGE_TIMEOUT, METHODS, Peer, Plane},
    gateway::{self, Decision, Identity, Inquiry, Presented, Refusal, Route},
    status,
};
use crate::{
    ambient::Stopwatch,
    caller::{Access, Caller},
    error::Error,
    grant::{Grant, Need, Verdict},
    validator::{HttpRequest, Judgement, Question},
};

/// The gateway's own credentials: those of `authorization` are the client's.
const GATEWAY: HeaderName = HeaderName::from_static("x-keyward-authorization");
/// A setting of the query: refusals are 401 and 403 only.
const ONLY_401_403: &str = "only_401_403";
const FORM_BYTES_MAX: usize = 64 * 1024;
const GRPC: &str = "application/grpc";
const FORM: &str = "application/x-www-form-urlencoded";
const RETRY: Duration = Duration::from_secs(1);

/// Under what calls are counted, behind the methods of gRPC.
pub(super) const COUNTED: [&str; 2] = [AUTHORIZE, INTROSPECT];
const AUTHORIZE: &str = "/v1/authorize";
const INTROSPECT: &str = "/oauth2/introspect";

type Answer = Response<Full<Bytes>>;

/// Goes with an answer to somebody who was identified.
#[derive(Clone, Copy)]
pub struct Known;

impl Gate {
    /// Answers one request. `is_ready` says whether questions can be answered now.
    pub async fn serve_http<B>(self: Arc<Self>, request: Request<B>, peer: Arc<Peer>, is_ready: bool) -> Answer
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let watch = Stopwatch::start();
        let _active = self.begin();
        let (head, body) = request.into_parts();
        let work = async {
            match (head.uri.path(), &head.method) {
                ("/healthz", _) => Ok(text(StatusCode::OK, "the process lives\n")),
                ("/readyz", _) if is_ready => Ok(text(StatusCode::OK, "questions are answered\n")),
                ("/readyz", _) => Ok(text(StatusCode::SERVICE_UNAVAILABLE, "questions cannot be answered now\n")),
                (AUTHORIZE, _) => self.authorize(&head.headers, head.uri.query().unwrap_or_default(), &peer).await,
                (INTROSPECT, &Method::POST) => self.introspect(&head.headers, body, &peer).await,
                (INTROSPECT, _) => Ok(with(text(StatusCode::METHOD_NOT_ALLOWED, "POST a form\n"), ALLOW, "POST")),
                _ => Ok(text(StatusCode::NOT_FOUND, "there are /v1/authorize, /oauth2/introspect, /healthz and /readyz\n")),
            }
        };
        let answered = timeout(self.limits.deadline_max, work).await.unwrap_or_else(|_| Err(status::deadline_exceeded()));
        let code = answered.as_ref().map_or_else(Status::code, |_| Code::Ok);
        let mut answer = match answered {
            Ok(answer) => answer,
            Err(status) if head.uri.path() == INTROSPECT => unanswered(&status, head.headers.contains_key(AUTHORIZATION)),
            Err(status) => undecided(&status),
        };
        let is_probe_or_nothing = !COUNTED.contains(&head.uri.path()) || answer.status() == StatusCode::METHOD_NOT_ALLOWED;
        if code == Code::Ok && !is_probe_or_nothing {
            answer.extensions_mut().insert(Known);
        }
        let answer = if only_401_403(&head) { narrowed(answer) } else { answer };
        let is_grpc = head.headers.get(CONTENT_TYPE).is_some_and(|value| gateway::is_grpc(value.as_bytes()));
        let answer = if head.uri.path() == AUTHORIZE && is_grpc { grpc(answer) } else { answer };
        let place = COUNTED.iter().position(|path| *path == head.uri.path());
        if let Some(place) = place {
            self.api.metrics.request(METHODS.len() + 1 + place, usize::try_from(i32::from(code)).unwrap_or_default(), watch.elapsed());
            tracing::debug!(
                method = head.uri.path(),
                status = answer.status().as_u16(),
                micros = watch.elapsed().as_micros(),
                peer = %peer.address.ip(),
                "call"
            );
        }
        answer
    }

    async fn authorize(&self, headers: &HeaderMap, query: &str, peer: &Peer) -> Result<Answer, Status> {
        let caller = self.gateway(headers, GATEWAY, true, peer, Judge::WithTheMessage).await?;
        let (plain, settings): (Vec<_>, Vec<_>) = form_urlencoded::parse(query.as_bytes()).partition(|(name, _)| name == ONLY_401_403);
        if plain.iter().any(|(_, value)| value.parse::<bool>().is_err()) {
            return Ok(refused(&Refusal::Misconfigured(format!("{ONLY_401_403} must be true or false"))));
        }
        let decision = match inquiry(headers, &settings) {
            Ok(inquiry) => match inquiry.question(caller.validation_reach()) {
                Ok(question) => self.judge(&question, |judgement| gateway::decide(judgement, &question)).await?,
                Err(refusal) => Decision::Refuse(refusal),
            },
            Err(refusal) => Decision::Refuse(refusal),
        };
        Ok(match decision {
            Decision::Pass(identity) => passed(&identity),
            Decision::Refuse(refusal) => refused(&refusal),
        })
    }

    async fn introspect<B>(&self, headers: &HeaderMap, body: B, peer: &Peer) -> Result<Answer, Status>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        self.gateway(headers, AUTHORIZATION, false, peer, Judge::BeforeTheMessage).await?;
        let is_form = headers.get(CONTENT_TYPE).is_some_and(|value| is_form(value.as_bytes()));
        let read = timeout(MESSAGE_TIMEOUT, Limited::new(body, FORM_BYTES_MAX).collect()).await;
        let form = read.ok().and_then(Result::ok).map(http_body_util::Collected::to_bytes).filter(|_| is_form);
        let form = form.ok_or_else(|| Error::invalid("body", format!("must be {FORM} of at most {FORM_BYTES_MAX} bytes")))?;
        let mut tokens = form_urlencoded::parse(&form).filter(|(name, _)| name == "token").map(|(_, value)| value);
        let (Some(token), None) = (tokens.next(), tokens.next()) else {
            return Err(Error::invalid("token", "must be there once").into());
        };
        // Once more, since the body may have been long on its way.
        let caller = self.gateway(headers, AUTHORIZATION, false, peer, Judge::WithTheMessage).await?;
        let need = Need { workspace: caller.validation_reach(), ..Need::default() };
        let question = Question { text: token.as_bytes(), need, http: None, peek: false };
        self.judge(&question, |judgement| {
            let good = judgement.grant.filter(|_| judgement.verdict == Verdict::Valid);
            json_answer(StatusCode::OK, good.map_or_else(|| json!({"active": false}), introspected).to_string())
        })
        .await
    }

    /// Judges, if there is room for it.
    async fn judge<T>(&self, question: &Question<'_>, answer: impl FnOnce(Judgement<'_>) -> T) -> Result<T, Status> {
        let Ok(_place) = self.places(Plane::Data).try_acquire() else {
            self.api.metrics.shed();
            return Err(status::overloaded("too many calls are under way; try again".to_owned()));
        };
        let judged = self.api.validator.validate(*question, self.clock.now()).await?;
        self.api.metrics.verdict(judged.verdict);
        Ok(answer(judged.judgement()))
    }

    /// Who asks, by the credentials in this header; for a forward-auth also by their address.
    async fn gateway(&self, headers: &HeaderMap, name: HeaderName, is_gateway: bool, peer: &Peer, judge: Judge) -> Result<Caller, Error> {
        let mut values = headers.get_all(name).iter();
        let presented = match (values.next(), values.next()) {
            (None, _) => None,
            (Some(value), None) => Some(own_token(value).ok_or(Error::Unauthenticated("the credentials are no bearer token"))?),
            (Some(_), Some(_)) => return Err(Error::Unauthenticated("the credentials are there more than once")),
        };
        self.identify_presented(presented.as_deref(), Access::Validate, is_gateway, peer, judge).await
    }
}

fn is_form(content_type: &[u8]) -> bool {
    let kind = content_type.split(|byte| *byte == b';').next().unwrap_or_default();
    kind.trim_ascii().eq_ignore_ascii_case(FORM.as_bytes())
}

/// Whether the gateway takes every other refusal for an error of its own.
fn only_401_403(head: &http::request::Parts) -> bool {
    let query = head.uri.query().unwrap_or_default();
    head.uri.path() == AUTHORIZE && form_urlencoded::parse(query.as_bytes()).any(|(name, value)| name == ONLY_401_403 && value == "true")
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
    let last = |name: &str| headers.get_all(name).iter().next_back();
    let client_ip = last(route.client_ip_header.unwrap_or("x-forwarded-for")).and_then(|list| gateway::last_address(list.as_bytes()));
    let text = |name: &str| last(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let http = HttpRequest { method: text("x-forwarded-method"), path: text("x-forwarded-uri") };
    Ok(Inquiry { route, presented, http, client_ip })
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
        gateway::complain_of_route(why);
    }
    let status = StatusCode::from_u16(refusal.http_status()).unwrap_or(StatusCode::FORBIDDEN);
    let answer = json_answer(status, refusal.body());
    match refusal.challenge() {
        Some(challenge) => with(answer, WWW_AUTHENTICATE, &challenge),
        None => answer,
    }
}

/// What a client is told if nothing was decided. That a gateway is not let in is no fault of its clients, who are told nothing of it.
fn undecided(status: &Status) -> Answer {
    if matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied) {
        gateway::complain_of_gateway(status.message());
        return oauth(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "this cannot be decided");
    }
    outage(status)
}

/// What a caller is told who asked about a token and gets no answer (RFC 7662, section 2.3; RFC 6750, section 3.1).
/// Whoever came without credentials is told of no error in them.
fn unanswered(status: &Status, has_credentials: bool) -> Answer {
    match status.code() {
        Code::Unauthenticated => {
            let bearer = if has_credentials { r#"Bearer realm="keyward", error="invalid_token""# } else { r#"Bearer realm="keyward""# };
            let mut answer = oauth(StatusCode::UNAUTHORIZED, "invalid_client", "the caller's own credentials are missing or not good");
            for challenge in [bearer, r#"Basic realm="keyward""#] {
                answer.headers_mut().append(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
            }
            answer
        }
        Code::PermissionDenied => {
            let answer = oauth(StatusCode::FORBIDDEN, "insufficient_scope", "the caller's own token needs the scope keyward:validate");
            with(answer, WWW_AUTHENTICATE, r#"Bearer realm="keyward", error="insufficient_scope", scope="keyward:validate""#)
        }
        Code::InvalidArgument => oauth(StatusCode::BAD_REQUEST, "invalid_request", status.message()),
        _ => outage(status),
    }
}

/// Nobody can say now.
fn outage(status: &Status) -> Answer {
    let told = if status.code() == Code::ResourceExhausted { StatusCode::TOO_MANY_REQUESTS } else { StatusCode::SERVICE_UNAVAILABLE };
    let answer = oauth(told, "temporarily_unavailable", "this cannot be decided now; try again");
    with(answer, RETRY_AFTER, &RETRY.as_secs().to_string())
}

/// For gateways that take every other status for an error of their own (`auth_request` of nginx).
fn narrowed(mut answer: Answer) -> Answer {
    match answer.status() {
        StatusCode::OK | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {}
        StatusCode::BAD_REQUEST => *answer.status_mut() = StatusCode::UNAUTHORIZED,
        _ => *answer.status_mut() = StatusCode::FORBIDDEN,
    }
    answer
}

/// A refusal for a client that speaks gRPC, where the gateway passes it on: the status of HTTP closes the door, that of gRPC is for the client.
fn grpc(mut answer: Answer) -> Answer {
    let code = match answer.status() {
        StatusCode::OK => return answer,
        StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED => Code::Unauthenticated,
        StatusCode::FORBIDDEN => Code::PermissionDenied,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Code::Unavailable,
        _ => Code::Internal,
    };
    *answer.body_mut() = Full::default();
    let answer = with(answer, CONTENT_TYPE, GRPC);
    with(answer, Status::GRPC_STATUS, &i32::from(code).to_string())
}

/// RFC 7662, section 2.2. Times are in seconds since 1970 (RFC 7519, section 2).
fn introspected(grant: &Grant) -> serde_json::Value {
    let audiences: Vec<&str> = grant.audiences().collect();
    let told = [
        ("active", json!(true)),
        ("scope", json!(grant.scopes().collect::<Vec<_>>().join(" "))),
        ("client_id", json!(grant.principal())),
        ("username", json!(grant.principal())),
        ("token_type", json!("Bearer")),
        ("exp", json!(grant.secret_end().to_timestamp().map(|end| end.seconds))),
        ("iat", json!(grant.token_id().create_time().to_timestamp().map(|begin| begin.seconds))),
        ("sub", json!(grant.principal())),
        ("aud", json!(Some(audiences).filter(|audiences| !audiences.is_empty()))),
        ("iss", json!(format!("urn:keyward:{}", grant.workspace()))),
        ("jti", json!(grant.token_id().to_string())),
    ];
    told.into_iter().filter(|(_, value)| !value.is_null()).collect()
}

fn oauth(status: StatusCode, error: &str, description: &str) -> Answer {
    json_answer(status, json!({"error": error, "error_description": description}).to_string())
}

fn json_answer(status: StatusCode, body: String) -> Answer {
    let answer = Response::new(Full::from(body));
    let mut answer = with(answer, CONTENT_TYPE, "application/json");
    *answer.status_mut() = status;
    with(answer, CACHE_CONTROL, "no-store")
}

fn text(status: StatusCode, body: &'static str) -> Answer {
    let mut answer = Response::new(Full::from(body));
    *answer.status_mut() = status;
    with(answer, CACHE_CONTROL, "no-store")
}

fn with(mut answer: Answer, name: impl IntoHeaderName, value: &str) -> Answer {
    if let Ok(value) = HeaderValue::from_str(value) {
        answer.headers_mut().insert(name, value);
    }
    answer
}
