//! What gateways ask: whether a request that waits at them may pass, and for whom it comes.
//!
//! A request is what it carries and what the operator has set for its route. The answer is one of a closed list, and only one of that list opens the door; whatever is wrong with
//! the request, its token or its route is another one. That Keyward itself cannot answer is an error, and never one of these.
//!
//! Invariant: nothing but a token that was judged to be good lets a request pass (test `only_a_good_token_opens_the_door`).
//! Invariant: a setting of a route that is not known closes it (test `a_route_that_is_set_wrongly_is_closed`).

use std::{net::IpAddr, num::NonZeroU32, sync::LazyLock};

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use smallvec::SmallVec;
use tonic::Code;

use super::validation::{AUDIENCE_CHARS_MAX, SCOPES_MAX};
use crate::{
    grant::{Derived, Grant, Need, Verdict},
    rules,
    scope::Scope,
    validator::{HttpRequest, Judgement, Question},
};

/// What the names of our headers begin with.
const HEADERS: &str = "x-keyward-";

/// What an operator has set for a route.
#[derive(Default, Debug)]
pub(super) struct Route<'a> {
    /// Only tokens of this workspace are good.
    workspace: Option<&'a str>,
    /// The product that is called.
    audience: Option<&'a str>,
    /// What the token must be good for; nothing: the workspace's routes say it.
    scopes: Option<SmallVec<[&'a str; 4]>>,
    /// Where the token is, if not in `authorization`.
    token_header: Option<&'a str>,
    /// Where the gateway puts the client's address, if it is not the peer's.
    pub(super) client_ip_header: Option<&'a str>,
    /// The token is not passed on.
    strip_token: bool,
}

impl<'a> Route<'a> {
    /// Reads it from names and values.
    pub(super) fn read(settings: impl Iterator<Item = (&'a str, &'a str)>) -> Result<Self, Refusal> {
        let mut route = Self::default();
        let mut seen = SmallVec::<[&str; 6]>::new();
        for (name, value) in settings {
            // A name that is none of ours may be anything, a token as well.
            let shown =
                if name.len() < 20 && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_') { name } else { "a setting" };
            if seen.contains(&name) {
                return Err(Refusal::Misconfigured(format!("{shown} is there more than once")));
            }
            seen.push(name);
            route.set(name, value).map_err(|rule| Refusal::Misconfigured(format!("{shown} {rule}")))?;
        }
        Ok(route)
    }

    fn set(&mut self, name: &str, value: &'a str) -> Result<(), String> {
        match name {
            "workspace" => self.workspace = Some(rules::workspace_id(value).map(|_| value)?),
            "audience" if !(1..=AUDIENCE_CHARS_MAX).contains(&value.len()) => {
                return Err(format!("must be 1 to {AUDIENCE_CHARS_MAX} characters"));
            }
            "audience" => self.audience = Some(value),
            "required_scopes" => self.scopes = Some(scopes(value)?),
            "token_header" => self.token_header = Some(header_name(value)?),
            "client_ip_header" => self.client_ip_header = Some(header_name(value)?),
            "strip_token" => self.strip_token = value.parse().map_err(|_| "must be true or false")?,
            _ => {
                return Err(
                    "is unknown: there are workspace, audience, required_scopes, token_header, client_ip_header and strip_token".to_owned()
                );
            }
        }
        Ok(())
    }

    /// The header that holds the token, in lower case.
    pub(super) fn token_header(&self) -> &'a str {
        self.token_header.unwrap_or("authorization")
    }

    /// Headers of the client that the upstream must not see.
    pub(super) fn unwanted<'b>(&'b self, names: impl Iterator<Item = &'b str>) -> impl Iterator<Item = &'b str> {
        let token = Some(self.token_header()).filter(|_| self.strip_token);
        // `x_keyward_principal` is the same as `x-keyward-principal` to whoever makes variables of headers (RFC 3875, section 4.1.18).
        token.into_iter().chain(names.filter(|name| is_ours(name) && !Identity::NAMES.contains(name)))
    }
}

fn is_ours(name: &str) -> bool {
    let is_same = |(letter, ours): (u8, u8)| letter.eq_ignore_ascii_case(&ours) || (ours == b'-' && !letter.is_ascii_alphanumeric());
    name.len() >= HEADERS.len() && name.bytes().zip(HEADERS.bytes()).all(is_same)
}

fn scopes(text: &str) -> Result<SmallVec<[&str; 4]>, String> {
    let scopes: SmallVec<[&str; 4]> = text.split_ascii_whitespace().collect();
    if scopes.len() > SCOPES_MAX {
        return Err(format!("must have at most {SCOPES_MAX} entries; it has {}", scopes.len()));
    }
    scopes.iter().try_for_each(|scope| Scope::check_single(scope)).map(|()| scopes).map_err(str::to_owned)
}

fn header_name(text: &str) -> Result<&str, &'static str> {
    let is_name = !text.is_empty() && http::HeaderName::from_lowercase(text.as_bytes()).is_ok();
    is_name.then_some(text).ok_or("must be the name of a header, in lower case")
}

/// The last address of a list, which the gateway itself has put there.
pub(super) fn last_address(list: &[u8]) -> Option<IpAddr> {
    let last = list.rsplit(|byte| *byte == b',').next()?;
    let address: IpAddr = std::str::from_utf8(last).ok()?.trim().parse().ok()?;
    Some(address.to_canonical())
}

/// Whether a client speaks gRPC. Not gRPC-Web, which a proxy translates.
pub(super) fn is_grpc(content_type: &[u8]) -> bool {
    content_type.strip_prefix(b"application/grpc").is_some_and(|rest| rest.first().is_none_or(|byte| b"+;".contains(byte)))
}

/// What a request carries in the place of a token.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Presented<'a> {
    /// Nothing of ours.
    Nothing,
    /// Something that cannot be a token.
    Malformed,
    /// This.
    Token(&'a [u8]),
}

impl<'a> Presented<'a> {
    /// From the values of the route's header. Gateways join several with a comma, which no token has.
    pub(super) fn of(header: &str, mut values: impl Iterator<Item = &'a [u8]>) -> Self {
        let value = match (values.next(), values.next()) {
            (None, _) => return Self::Nothing,
            (Some(value), None) => value,
            (Some(_), Some(_)) => return Self::Malformed,
        };
        let text = if header == "authorization" {
            match value.iter().position(|byte| *byte == b' ').and_then(|end| value.split_at_checked(end)) {
                Some((scheme, rest)) if scheme.eq_ignore_ascii_case(b"bearer") => rest.get(1..).unwrap_or_default(),
                // Another scheme, which is for somebody else.
                _ if !value.contains(&b',') && !value.eq_ignore_ascii_case(b"bearer") => return Self::Nothing,
                _ => return Self::Malformed,
            }
        } else {
            value
        };
        if text.is_empty() || text.iter().any(|byte| b" ,\t".contains(byte)) { Self::Malformed } else { Self::Token(text) }
    }
}

/// A request that waits.
#[derive(Debug)]
pub(super) struct Inquiry<'a> {
    pub(super) route: Route<'a>,
    pub(super) presented: Presented<'a>,
    pub(super) http: HttpRequest<'a>,
    pub(super) client_ip: Option<IpAddr>,
}

impl Inquiry<'_> {
    /// As the validator takes it, from a gateway that may ask about the tokens of this workspace; nothing: of every one.
    pub(super) fn question<'b>(&'b self, reach: Option<&'b str>) -> Result<Question<'b>, Refusal> {
        let text = match self.presented {
            Presented::Nothing => return Err(Refusal::NoCredentials),
            Presented::Malformed => return Err(Refusal::Malformed),
            Presented::Token(text) => text,
        };
        let workspace = match (reach, self.route.workspace) {
            (Some(reach), Some(wanted)) if reach != wanted => {
                return Err(Refusal::Misconfigured(format!("workspace is {wanted}, and the gateway may ask about {reach} only")));
            }
            (reach, wanted) => wanted.or(reach),
        };
        let http = self.route.scopes.is_none().then_some(self.http);
        if http.is_some_and(|http| http.method.is_empty() || http.path.is_empty()) {
            return Err(Refusal::Misconfigured("required_scopes must be set, since the request came without method or path".to_owned()));
        }
        let scopes = self.route.scopes.as_deref().unwrap_or_default();
        let need = Need { workspace, audience: self.route.audience, client_ip: self.client_ip, scopes, derived: Derived::NotAsked };
        Ok(Question { text, need, http, peek: false })
    }
}

/// For whom a request comes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Identity {
    pub(super) token_id: String,
    pub(super) principal: String,
    pub(super) workspace: String,
    /// With blanks between them.
    pub(super) scopes: String,
}

impl Identity {
    /// The headers that the upstream sees.
    pub(super) const NAMES: [&str; 4] = ["x-keyward-token-id", "x-keyward-principal", "x-keyward-workspace", "x-keyward-scopes"];

    pub(super) fn of(grant: &Grant) -> Self {
        Self {
            token_id: grant.token_id().to_string(),
            principal: grant.principal().to_owned(),
            workspace: grant.workspace().to_owned(),
            scopes: grant.scopes().collect::<Vec<_>>().join(" "),
        }
    }

    /// All of [`Identity::NAMES`], with their values.
    pub(super) fn headers(&self) -> [(&'static str, &str); 4] {
        let [token_id, principal, workspace, scopes] = Self::NAMES;
        [(token_id, &self.token_id), (principal, &self.principal), (workspace, &self.workspace), (scopes, &self.scopes)]
    }
}

/// What becomes of a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Decision {
    /// It passes.
    Pass(Identity),
    /// It does not.
    Refuse(Refusal),
}

/// Why a request does not pass. What is wrong with a token is not told to whoever sent it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Refusal {
    /// It carries none.
    NoCredentials,
    /// What it carries is no token.
    Malformed,
    /// The token is not good, or not good here.
    BadToken,
    /// The token is good, but not for this; for this, if it is known.
    InsufficientScope(String),
    /// The route is set wrongly: a sentence for its operator.
    Misconfigured(String),
}

impl Refusal {
    /// The status of HTTP (RFC 6750, section 3.1).
    pub(super) fn http_status(&self) -> u16 {
        match self {
            Self::NoCredentials | Self::BadToken => 401,
            Self::Malformed => 400,
            Self::InsufficientScope(_) => 403,
            Self::Misconfigured(_) => 500,
        }
    }

    /// The status of gRPC.
    pub(super) fn code(&self) -> Code {
        match self {
            Self::NoCredentials | Self::BadToken => Code::Unauthenticated,
            Self::Malformed => Code::InvalidArgument,
            Self::InsufficientScope(_) => Code::PermissionDenied,
            Self::Misconfigured(_) => Code::Internal,
        }
    }

    /// The error of RFC 6750; nothing if nothing was presented.
    pub(super) fn error(&self) -> Option<&'static str> {
        match self {
            Self::NoCredentials => None,
            Self::Malformed => Some("invalid_request"),
            Self::BadToken => Some("invalid_token"),
            Self::InsufficientScope(_) => Some("insufficient_scope"),
            Self::Misconfigured(_) => Some("server_error"),
        }
    }

    /// A sentence for whoever sent the request.
    pub(super) fn sentence(&self) -> &'static str {
        match self {
            Self::NoCredentials => "a token is needed",
            Self::Malformed => "the credentials are not one bearer token",
            Self::BadToken => "the token is not good",
            Self::InsufficientScope(_) => "the token is not good for this",
            Self::Misconfigured(_) => "this cannot be decided",
        }
    }

    /// The error and the sentence in JSON.
    pub(super) fn body(&self) -> String {
        let sentence = self.sentence();
        match self.error() {
            Some(error) => format!(r#"{{"error":"{error}","error_description":"{sentence}"}}"#),
            None => format!(r#"{{"error_description":"{sentence}"}}"#),
        }
    }

    /// The value of `www-authenticate` (RFC 6750, section 3), if the client can do something about it.
    pub(super) fn challenge(&self) -> Option<String> {
        let error = match (self, self.error()) {
            (Self::Misconfigured(_), _) => return None,
            (_, None) => String::new(),
            (Self::InsufficientScope(scope), Some(error)) if !scope.is_empty() => format!(r#", error="{error}", scope="{scope}""#),
            (_, Some(error)) => format!(r#", error="{error}""#),
        };
        Some(format!(r#"Bearer realm="keyward"{error}"#))
    }
}

/// Tells the operator that a route is set wrongly: a line a second at most, since clients cause them.
pub(super) fn complain_of_route(why: &str) {
    static LIMIT: LazyLock<DefaultDirectRateLimiter> = LazyLock::new(|| RateLimiter::direct(Quota::per_second(NonZeroU32::MIN)));
    if LIMIT.check().is_ok() {
        tracing::warn!(?why, "a gateway's route is set wrongly, and every request of it is denied");
    }
}

/// Tells the operator that a gateway is not let in, as [`complain_of_route`] does.
pub(super) fn complain_of_gateway(why: &str) {
    static LIMIT: LazyLock<DefaultDirectRateLimiter> = LazyLock::new(|| RateLimiter::direct(Quota::per_second(NonZeroU32::MIN)));
    if LIMIT.check().is_ok() {
        tracing::warn!(why, "a gateway that asks by HTTP is not let in, and every request of it is denied");
    }
}

/// What a judgement means for the request.
pub(super) fn decide(judgement: Judgement<'_>, question: &Question<'_>) -> Decision {
    match (judgement.verdict, judgement.grant) {
        (Verdict::Valid, Some(grant)) => Decision::Pass(Identity::of(grant)),
        (Verdict::InsufficientScope, _) => {
            let derived = judgement.derived_scope.map(Scope::as_str);
            let wanted: Vec<&str> = question.need.scopes.iter().copied().chain(derived).collect();
            Decision::Refuse(Refusal::InsufficientScope(wanted.join(" ")))
        }
        _ => Decision::Refuse(Refusal::BadToken),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grant::Facts;

    const BEARER: &str = "authorization";

    fn presented<'a>(header: &str, values: &[&'a str]) -> Presented<'a> {
        Presented::of(header, values.iter().map(|value| value.as_bytes()))
    }

    #[test]
    fn a_token_is_presented_once_and_whole() {
        assert_eq!(presented(BEARER, &["Bearer kw_1"]), Presented::Token(b"kw_1"));
        assert_eq!(presented(BEARER, &["bEARER kw_1"]), Presented::Token(b"kw_1"), "the scheme has no case");
        assert_eq!(presented("x-api-key", &["kw_1"]), Presented::Token(b"kw_1"));
        for nothing in [&[][..], &["Basic YTpi"], &["Negotiate"], &[""]] {
            assert_eq!(presented(BEARER, nothing), Presented::Nothing, "{nothing:?}");
        }
        for bad in [
            &["Bearer"][..],
            &["Bearer "],
            &["Bearer  kw_1"],
            &["Bearer kw_1 kw_2"],
            &["Bearer kw_1,Bearer kw_2"],
            &["Bearer kw_1, Bearer kw_2"],
            &["Bearer kw_1,"],
            &["Basic YTpi, Bearer kw_1"],
            &["Bearer kw_1", "Bearer kw_1"],
        ] {
            assert_eq!(presented(BEARER, bad), Presented::Malformed, "{bad:?}");
        }
        for bad in [&[""][..], &["kw_1,kw_2"], &["kw_1 "], &["kw_1", "kw_1"]] {
            assert_eq!(presented("x-api-key", bad), Presented::Malformed, "{bad:?}");
        }
    }

    #[test]
    fn a_route_that_is_set_wrongly_is_closed() {
        let read = |name: &'static str, value: &'static str| Route::read(std::iter::once((name, value)));
        let route = read("required_scopes", "orders:read  orders:write").expect("good");
        assert_eq!(route.scopes.as_deref(), Some(["orders:read", "orders:write"].as_slice()));
        assert_eq!(read("required_scopes", "").expect("none is needed").scopes.as_deref(), Some([].as_slice()));
        assert_eq!(read("token_header", "x-api-key").expect("good").token_header(), "x-api-key");
        for (name, value) in [
            ("required_scope", "orders:read"),
            ("audience", ""),
            ("workspace", ""),
            ("required_scopes", "orders"),
            ("required_scopes", "orders:read,orders:write"),
            ("token_header", "X-Api-Key"),
            ("token_header", ""),
            ("token_header", "x api"),
            ("strip_token", "yes"),
            ("workspace", "no blanks"),
        ] {
            let Err(Refusal::Misconfigured(why)) = read(name, value) else { panic!("{name}={value}") };
            assert!(why.starts_with(name), "{why}");
        }
        let Err(Refusal::Misconfigured(why)) = read("kw_AJZzEYqjUBsyrYc", "") else { panic!("it is no setting") };
        assert!(why.starts_with("a setting "), "{why}: it may be a secret");
        let twice = Route::read([("required_scopes", "orders:read"), ("required_scopes", "")].into_iter());
        assert!(matches!(twice, Err(Refusal::Misconfigured(_))), "whoever can add a setting does not choose it");
        let route = read("workspace", "ours").expect("good");
        let http = HttpRequest { method: "GET", path: "/" };
        let inquiry = Inquiry { route, presented: Presented::Token(b"kw_1"), http, client_ip: None };
        assert!(inquiry.question(None).is_ok_and(|question| question.need.workspace == Some("ours")));
        assert!(inquiry.question(Some("ours")).is_ok());
        assert!(matches!(inquiry.question(Some("theirs")), Err(Refusal::Misconfigured(_))));
        let bare = Inquiry { route: Route::default(), http: HttpRequest { method: "GET", path: "" }, ..inquiry };
        assert!(matches!(bare.question(None), Err(Refusal::Misconfigured(_))), "no scope, and no path to find one by");
    }

    #[test]
    fn only_a_good_token_opens_the_door() {
        let grant = Grant::of(&Facts::example("ci"));
        let need = Need { scopes: &["orders:read"], ..Need::default() };
        let question = Question { text: b"kw_1", need, http: None, peek: false };
        let verdicts = [
            Verdict::Valid,
            Verdict::Unknown,
            Verdict::Revoked,
            Verdict::Expired,
            Verdict::Inactive,
            Verdict::PrincipalSuspended,
            Verdict::WorkspaceSuspended,
            Verdict::WrongAudience,
            Verdict::InsufficientScope,
            Verdict::IpNotAllowed,
        ];
        for verdict in verdicts {
            for grant in [None, Some(&grant)] {
                let decision = decide(Judgement { verdict, grant, derived_scope: None }, &question);
                let passes = matches!(decision, Decision::Pass(_));
                assert_eq!(passes, verdict == Verdict::Valid && grant.is_some(), "{verdict:?}");
                if let Decision::Refuse(refusal) = decision {
                    assert!((400..=599).contains(&refusal.http_status()) && refusal.code() != Code::Ok, "{refusal:?}");
                    assert!(refusal.challenge().is_some_and(|challenge| challenge.starts_with("Bearer realm=")), "{refusal:?}");
                }
            }
        }
        let refusal = Refusal::InsufficientScope("orders:read".to_owned());
        let challenge = r#"Bearer realm="keyward", error="insufficient_scope", scope="orders:read""#;
        assert_eq!((refusal.http_status(), refusal.challenge().as_deref()), (403, Some(challenge)));
        assert_eq!(Refusal::NoCredentials.challenge().as_deref(), Some(r#"Bearer realm="keyward""#), "no error without credentials");
    }
}
