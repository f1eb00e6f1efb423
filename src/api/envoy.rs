//! Envoy's external authorization: a request that waits at an Envoy in, whether and how it passes on out.
//!
//! Source: <https://www.envoyproxy.io/docs/envoy/latest/api-v3/service/auth/v3/external_auth.proto>. An empty answer lets a request pass there, and so does one whose status is OK whatever
//! else it says: so an answer is made in one of two places, for the two kinds of a [`Decision`], and a refusal never has the status OK.
//!
//! Invariant: no header of the client passes for one of ours (test `spoofed_identities_do_not_pass`).

use std::{collections::BTreeMap, net::IpAddr};

use prost_types::{Struct, Value, value::Kind};
use tonic::{Request, Response, Status};
use tonic_types::pb;

use super::{
    Api, Call, call, convert,
    gateway::{self, Decision, Identity, Inquiry, Presented, Refusal, Route},
};
use crate::{
    grant::Verdict,
    proto::envoy::{
        AttributeContext, CheckRequest, CheckResponse, DeniedHttpResponse, HeaderMap, HeaderValue, HeaderValueOption, HttpStatus,
        OkHttpResponse, address::Address, attribute_context, authorization_server::Authorization, check_response::HttpResponse,
        header_value_option::HeaderAppendAction,
    },
    validator::{HttpRequest, Judgement},
};

#[tonic::async_trait]
impl Authorization for Api {
    async fn check(&self, request: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
        let (Call { caller, now, .. }, message) = call(request)?;
        let waiting = Waiting::of(&message);
        let reach = caller.validation_reach();
        let inquiry = match waiting.inquiry() {
            Ok(inquiry) => inquiry,
            Err(refusal) => return Ok(Response::new(waiting.refused(&refusal, None))),
        };
        let question = match inquiry.question(reach) {
            Ok(question) => question,
            Err(refusal) => return Ok(Response::new(waiting.refused(&refusal, None))),
        };
        let answer = self.validator.validate(question, now).await?;
        self.metrics.verdict(answer.verdict);
        let judgement = answer.judgement();
        Ok(Response::new(waiting.answer(&inquiry, judgement, gateway::decide(judgement, &question))))
    }
}

/// A request that waits at a gateway.
pub(super) struct Waiting<'a> {
    http: &'a attribute_context::HttpRequest,
    source: Option<IpAddr>,
    settings: &'a BTreeMap<String, String>,
}

static NO_HTTP: attribute_context::HttpRequest =
    attribute_context::HttpRequest { method: String::new(), headers: BTreeMap::new(), path: String::new(), header_map: None };
static NO_SETTINGS: BTreeMap<String, String> = BTreeMap::new();

impl<'a> Waiting<'a> {
    pub(super) fn of(request: &'a CheckRequest) -> Self {
        let attributes = request.attributes.as_ref();
        let http = attributes.and_then(|attributes| attributes.request.as_ref()?.http.as_ref());
        Self {
            http: http.unwrap_or(&NO_HTTP),
            source: attributes.and_then(source),
            settings: attributes.map_or(&NO_SETTINGS, |attributes| &attributes.context_extensions),
        }
    }

    /// What is to be judged.
    pub(super) fn inquiry(&self) -> Result<Inquiry<'a>, Refusal> {
        let route = Route::read(self.settings.iter().map(|(name, value)| (name.as_str(), value.as_str())))?;
        let token_header = route.token_header();
        let client_ip = match route.client_ip_header {
            // The last of several was put there by the gateway itself.
            Some(header) => self.values(header).last().and_then(gateway::last_address),
            None => self.source,
        };
        let presented = Presented::of(token_header, self.values(token_header));
        Ok(Inquiry { route, presented, http: HttpRequest { method: &self.http.method, path: &self.http.path }, client_ip })
    }

    fn values<'b>(&self, name: &'b str) -> impl Iterator<Item = &'a [u8]> + use<'a, 'b> {
        let joined = self.http.headers.get(name).map(String::as_bytes);
        let raw = self.http.header_map.as_ref().map_or(&[][..], |map| &map.headers);
        let raw = raw.iter().filter(move |header| header.key.eq_ignore_ascii_case(name)).map(|header| header.raw_value.as_slice());
        joined.into_iter().chain(raw)
    }

    fn names(&self) -> impl Iterator<Item = &'a str> {
        let raw = self.http.header_map.as_ref().map_or(&[][..], |map: &HeaderMap| &map.headers);
        self.http.headers.keys().map(String::as_str).chain(raw.iter().map(|header| header.key.as_str()))
    }

    fn is_grpc(&self) -> bool {
        self.values("content-type").any(gateway::is_grpc)
    }

    /// What the gateway is told.
    pub(super) fn answer(&self, inquiry: &Inquiry<'_>, judgement: Judgement<'_>, decision: Decision) -> CheckResponse {
        let metadata = metadata(judgement);
        match decision {
            Decision::Pass(identity) => self.passed(&inquiry.route, &identity, metadata),
            Decision::Refuse(refusal) => self.refused(&refusal, Some(metadata)),
        }
    }

    fn passed(&self, route: &Route<'_>, identity: &Identity, metadata: Struct) -> CheckResponse {
        let (set, empty): (Vec<_>, Vec<_>) = identity.headers().into_iter().partition(|(_, value)| !value.is_empty());
        // An empty value would leave the client's own in its place.
        let removed = empty.into_iter().map(|(name, _)| name).chain(route.unwanted(self.names()));
        let passed = OkHttpResponse {
            headers: set.into_iter().map(|(name, value)| header(name, value)).collect(),
            headers_to_remove: removed.map(str::to_owned).collect(),
        };
        CheckResponse {
            status: Some(pb::Status::default()),
            http_response: Some(HttpResponse::OkResponse(passed)),
            dynamic_metadata: Some(metadata),
        }
    }

    /// As [`Waiting::answer`], if there is nothing to judge.
    pub(super) fn refused(&self, refusal: &Refusal, metadata: Option<Struct>) -> CheckResponse {
        if let Refusal::Misconfigured(why) = refusal {
            gateway::complain_of_route(why);
        }
        let sentence = refusal.sentence();
        let (body, content_type) = if self.is_grpc() { (sentence.to_owned(), None) } else { (refusal.body(), Some("application/json")) };
        let challenge = refusal.challenge();
        let headers = [("www-authenticate", challenge.as_deref()), ("content-type", content_type), ("cache-control", Some("no-store"))];
        let denied = DeniedHttpResponse {
            status: Some(HttpStatus { code: refusal.http_status().into() }),
            headers: headers.into_iter().filter_map(|(name, value)| Some(header(name, value?))).collect(),
            body,
        };
        let status = pb::Status { code: refusal.code().into(), message: sentence.to_owned(), details: Vec::new() };
        CheckResponse { status: Some(status), http_response: Some(HttpResponse::DeniedResponse(denied)), dynamic_metadata: metadata }
    }
}

fn source(attributes: &AttributeContext) -> Option<IpAddr> {
    let Address::SocketAddress(socket) = attributes.source.as_ref()?.address.as_ref()?.address.as_ref()?;
    socket.address.parse::<IpAddr>().ok().map(|address| address.to_canonical())
}

fn header(name: &str, value: &str) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(HeaderValue { key: name.to_owned(), value: value.to_owned(), raw_value: Vec::new() }),
        append_action: HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
    }
}

fn metadata(judgement: Judgement<'_>) -> Struct {
    let text = |text: String| Value { kind: Some(Kind::StringValue(text)) };
    let verdict = convert::verdict(judgement.verdict).as_str_name().to_owned();
    let mut fields = BTreeMap::from([("verdict".to_owned(), text(verdict))]);
    if let Some(grant) = judgement.grant.filter(|_| judgement.verdict != Verdict::Unknown) {
        fields.insert("token_id".to_owned(), text(grant.token_id().to_string()));
        fields.insert("principal".to_owned(), text(grant.principal().to_owned()));
        fields.insert("workspace".to_owned(), text(grant.workspace().to_owned()));
    }
    Struct { fields }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(headers: &[(&str, &str)], raw: bool, settings: &[(&str, &str)]) -> CheckRequest {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let raw_header = |(name, value): &(&str, &str)| HeaderValue {
            key: (*name).to_owned(),
            value: String::new(),
            raw_value: value.as_bytes().to_vec(),
        };
        let http = attribute_context::HttpRequest {
            method: "GET".to_owned(),
            path: "/".to_owned(),
            headers: if raw { BTreeMap::new() } else { headers.iter().map(owned).collect() },
            header_map: raw.then(|| HeaderMap { headers: headers.iter().map(raw_header).collect() }),
        };
        let attributes = AttributeContext {
            request: Some(attribute_context::Request { http: Some(http) }),
            context_extensions: settings.iter().map(owned).collect(),
            ..Default::default()
        };
        CheckRequest { attributes: Some(attributes) }
    }

    #[test]
    fn spoofed_identities_do_not_pass() {
        let spoofed = [
            ("authorization", "Bearer kw_1"),
            ("x-keyward-principal", "root"),
            ("x_keyward_principal", "root"),
            ("x-keyward_scopes", "*"),
            ("x-keyward-anything", "1"),
            ("x.keyward~token-id", "1"),
            ("x-keyword", "1"),
        ];
        let identity =
            Identity { token_id: "tok".to_owned(), principal: "alice".to_owned(), workspace: "w".to_owned(), scopes: String::new() };
        for raw in [false, true] {
            for strip in ["true", "false"] {
                let request = request(&spoofed, raw, &[("strip_token", strip)]);
                let waiting = Waiting::of(&request);
                let inquiry = waiting.inquiry().expect("a good route");
                assert_eq!(inquiry.presented, Presented::Token(b"kw_1"));
                let passed = waiting.passed(&inquiry.route, &identity, Struct::default());
                let Some(HttpResponse::OkResponse(passed)) = passed.http_response else { panic!("it passes") };
                assert!(passed.headers.iter().all(|header| header.append_action() == HeaderAppendAction::OverwriteIfExistsOrAdd));
                let set: Vec<&str> = passed.headers.iter().filter_map(|header| Some(header.header.as_ref()?.key.as_str())).collect();
                assert_eq!(set, ["x-keyward-token-id", "x-keyward-principal", "x-keyward-workspace"]);
                let removed: Vec<&str> = passed.headers_to_remove.iter().map(String::as_str).collect();
                let mut expected =
                    vec!["x-keyward-scopes", "x_keyward_principal", "x-keyward_scopes", "x-keyward-anything", "x.keyward~token-id"];
                expected.extend((strip == "true").then_some("authorization"));
                let sorted = |mut names: Vec<&str>| {
                    names.sort_unstable();
                    names.join(" ")
                };
                assert_eq!(sorted(removed), sorted(expected), "{raw} {strip}");
            }
        }
    }

    /// What lets a request pass at an Envoy: an empty answer, or the status OK.
    #[test]
    fn no_refusal_is_empty_or_ok() {
        let refusals = [
            Refusal::NoCredentials,
            Refusal::Malformed,
            Refusal::BadToken,
            Refusal::InsufficientScope(String::new()),
            Refusal::Misconfigured("why".to_owned()),
        ];
        for content_type in ["text/plain", "application/grpc+proto"] {
            let request = request(&[("content-type", content_type)], false, &[]);
            for refusal in &refusals {
                let answer = Waiting::of(&request).refused(refusal, None);
                assert!(answer.status.is_some_and(|status| status.code != 0), "{refusal:?}");
                let Some(HttpResponse::DeniedResponse(denied)) = answer.http_response else { panic!("{refusal:?}") };
                assert!(denied.status.is_some_and(|status| (400..600).contains(&status.code)), "{refusal:?}");
                assert_eq!(denied.body.starts_with('{'), content_type == "text/plain");
            }
        }
        let nothing = CheckRequest::default();
        let waiting = Waiting::of(&nothing);
        assert_eq!(waiting.inquiry().expect("no route").presented, Presented::Nothing);
    }
}
