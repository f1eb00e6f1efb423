//! Gateways, asked for by hand: what Envoy's external authorization, forward-auth and introspection are answered.

use keyward::proto::{
    self,
    envoy::{
        Address, AttributeContext, CheckRequest, CheckResponse, SocketAddress, address, attribute_context,
        authorization_client::AuthorizationClient, check_response::HttpResponse,
    },
};
use reqwest::{Client, Response, StatusCode, header::HeaderMap};
use serde_json::Value;
use tonic::{Code, Status};

use crate::world::{Actor, World};

crate::on_both_databases!(
    envoy_hears_who_comes_and_who_may_not,
    envoy_hears_nothing_without_the_right_to_ask,
    forward_auth_lets_good_tokens_pass_and_no_other_request,
    a_gateway_that_is_not_known_is_told_nothing,
    introspection_tells_of_active_tokens_only,
    load_balancers_are_told_whether_questions_are_answered,
);

/// A request that waits at an Envoy.
pub fn check_request(headers: &[(&str, &str)], settings: &[(&str, &str)]) -> CheckRequest {
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    let http = attribute_context::HttpRequest {
        method: "GET".to_owned(),
        path: "/api/orders/7?full=1".to_owned(),
        headers: headers.iter().map(owned).collect(),
        ..Default::default()
    };
    let socket = SocketAddress { address: "192.0.2.7".to_owned() };
    let attributes = AttributeContext {
        source: Some(attribute_context::Peer { address: Some(Address { address: Some(address::Address::SocketAddress(socket)) }) }),
        request: Some(attribute_context::Request { http: Some(http) }),
        context_extensions: settings.iter().map(owned).collect(),
    };
    CheckRequest { attributes: Some(attributes) }
}

async fn check(gateway: &Actor, headers: &[(&str, &str)], settings: &[(&str, &str)]) -> Result<CheckResponse, Status> {
    let request = gateway.request(check_request(headers, settings));
    AuthorizationClient::new(gateway.channel.clone()).check(request).await.map(tonic::Response::into_inner)
}

/// The status of HTTP that the client gets; 200: the request passes.
pub fn http_status(answer: &CheckResponse) -> i32 {
    let code = answer.status.as_ref().expect("a status").code;
    match answer.http_response.as_ref().expect("what becomes of it") {
        HttpResponse::OkResponse(_) => {
            assert_eq!(code, 0);
            200
        }
        HttpResponse::DeniedResponse(denied) => {
            assert_ne!(code, 0, "a denial with the status OK lets the request pass");
            denied.status.as_ref().expect("a status").code
        }
    }
}

async fn orders(world: &World) -> (proto::Token, String) {
    let request = proto::CreateTokenRequest {
        principal: "alice".to_owned(),
        audiences: vec!["shop".to_owned()],
        ..crate::world::new_token("t", &["orders:read"])
    };
    let made = world.admin().await.create(request).await.expect("created");
    (made.token.expect("a token"), made.secret)
}

async fn envoy_hears_who_comes_and_who_may_not(world: World) {
    let (token, secret) = orders(&world).await;
    let gateway = world.validator().await;
    let bearer = format!("Bearer {secret}");
    let with = async |value: &str, settings: &[(&str, &str)]| {
        let headers: &[(&str, &str)] = if value.is_empty() { &[] } else { &[("authorization", value)] };
        check(&gateway, headers, settings).await.expect("an answer")
    };
    let shop = [("audience", "shop"), ("required_scopes", "orders:read")];
    // Asked twice: from the store, and from memory.
    for _ in 0..2 {
        let passed = with(&bearer, &shop).await;
        assert_eq!(http_status(&passed), 200);
        let Some(HttpResponse::OkResponse(passed)) = passed.http_response else { panic!("it passes") };
        let set: Vec<(&str, &str)> =
            passed.headers.iter().filter_map(|header| header.header.as_ref()).map(|header| (&*header.key, &*header.value)).collect();
        let expected = [
            ("x-keyward-token-id", &*token.id),
            ("x-keyward-principal", "alice"),
            ("x-keyward-workspace", "default"),
            ("x-keyward-scopes", "orders:read"),
        ];
        assert_eq!(set, expected);
    }
    for (value, settings, status) in [
        ("", &shop[..], 401),
        ("Basic YTpi", &shop, 401),
        ("Bearer garbage", &shop, 401),
        (&format!("{bearer},{bearer}"), &shop, 400),
        (&format!("{bearer} x"), &shop, 400),
        (&*bearer, &[("audience", "billing"), ("required_scopes", "")], 401),
        (&bearer, &[("required_scopes", "orders:write")], 403),
        (&bearer, &[], 403),
        (&bearer, &[("required_scope", "orders:read")], 500),
        (&bearer, &[("workspace", "other"), ("required_scopes", "")], 500),
    ] {
        assert_eq!(http_status(&with(value, settings).await), status, "{value} {settings:?}");
    }
    let elsewhere = check(&gateway, &[("x-api-key", &secret)], &[("token_header", "x-api-key"), ("required_scopes", "")]).await;
    assert_eq!(http_status(&elsewhere.expect("an answer")), 200);
    world.admin().await.revoke(&token.id).await.expect("revoked");
    assert_eq!(http_status(&with(&bearer, &shop).await), 401, "revoked a moment ago");
    let nothing = gateway.request(CheckRequest::default());
    let nothing = AuthorizationClient::new(gateway.channel.clone()).check(nothing).await.expect("an answer").into_inner();
    assert_eq!(http_status(&nothing), 401);
}

async fn envoy_hears_nothing_without_the_right_to_ask(world: World) {
    let (_, secret) = orders(&world).await;
    let headers = [("authorization", secret.as_str())];
    let code = async |actor: &Actor| check(actor, &headers, &[]).await.expect_err("no right").code();
    assert_eq!(code(&world.stranger().await).await, Code::Unauthenticated);
    assert_eq!(code(&world.bearer(&secret).await).await, Code::PermissionDenied);
}

/// A gateway that speaks HTTP.
struct Gateway {
    client: Client,
    base: String,
    token: Option<String>,
}

impl Gateway {
    fn new(world: &World, token: Option<&str>) -> Self {
        let base = format!("http://{}", world.server().http_address().expect("HTTP is on"));
        let client = Client::builder().no_proxy().build().expect("a client");
        Self { client, base, token: token.map(str::to_owned) }
    }

    async fn authorize(&self, query: &str, headers: &[(&'static str, &str)]) -> Response {
        let mut request = self.client.get(format!("{}/v1/authorize?{query}", self.base));
        if let Some(token) = &self.token {
            request = request.header("x-keyward-authorization", format!("Bearer {token}"));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.send().await.expect("an answer")
    }

    async fn introspect(&self, credentials: &str, form: &str) -> (StatusCode, HeaderMap, Value) {
        let mut request = self.client.post(format!("{}/oauth2/introspect", self.base)).body(form.to_owned());
        request = request.header("content-type", "application/x-www-form-urlencoded");
        if !credentials.is_empty() {
            request = request.header("authorization", credentials);
        }
        let answer = request.send().await.expect("an answer");
        let (status, headers) = (answer.status(), answer.headers().clone());
        (status, headers, serde_json::from_slice(&answer.bytes().await.expect("a body")).expect("JSON"))
    }
}

async fn forward_auth_lets_good_tokens_pass_and_no_other_request(world: World) {
    let (token, secret) = orders(&world).await;
    let gateway = Gateway::new(&world, world.validator().await.token.as_deref());
    let bearer = format!("Bearer {secret}");
    let request = [("x-forwarded-method", "GET"), ("x-forwarded-uri", "/api/orders/7?full=1"), ("x-forwarded-for", "192.0.2.7")];
    let ask = async |query: &str, value: &str| {
        let mut headers = request.to_vec();
        headers.extend((!value.is_empty()).then_some(("authorization", value)));
        gateway.authorize(query, &headers).await
    };
    let passed = ask("audience=shop&required_scopes=orders:read", &bearer).await;
    assert_eq!(passed.status(), 200);
    let identity = ["token-id", "principal", "workspace", "scopes"]
        .map(|name| passed.headers()[&format!("x-keyward-{name}")].to_str().expect("text").to_owned());
    assert_eq!(identity, [token.id.as_str(), "alice", "default", "orders:read"]);
    assert_eq!(passed.bytes().await.expect("a body").len(), 0);
    for (query, value, status, challenge) in [
        ("required_scopes=", "", 401, r#"Bearer realm="keyward""#),
        ("required_scopes=", "Bearer garbage", 401, r#"Bearer realm="keyward", error="invalid_token""#),
        ("required_scopes=", "Bearer a,b", 400, r#"Bearer realm="keyward", error="invalid_request""#),
        ("audience=billing&required_scopes=", &*bearer, 401, r#"Bearer realm="keyward", error="invalid_token""#),
        ("required_scopes=orders:write", &bearer, 403, r#"Bearer realm="keyward", error="insufficient_scope", scope="orders:write""#),
        ("", &bearer, 403, r#"Bearer realm="keyward", error="insufficient_scope""#),
        ("scope=orders:read", &bearer, 500, ""),
        ("required_scopes=&only_401_403=true", "Bearer a,b", 401, r#"Bearer realm="keyward", error="invalid_request""#),
        ("scope=orders:read&only_401_403=true", &bearer, 403, ""),
    ] {
        let refused = ask(query, value).await;
        let told = refused.headers().get("www-authenticate").map_or("", |value| value.to_str().expect("text"));
        assert_eq!((refused.status().as_u16(), told), (status, challenge), "{query} {value}");
        assert!(refused.headers().keys().all(|name| !name.as_str().starts_with("x-keyward-")), "{query}");
        assert!(!refused.text().await.expect("a body").contains("garbage"));
    }
    world.admin().await.revoke(&token.id).await.expect("revoked");
    assert_eq!(ask("required_scopes=", &bearer).await.status(), 401, "revoked a moment ago");
}

async fn a_gateway_that_is_not_known_is_told_nothing(world: World) {
    let (_, secret) = orders(&world).await;
    let bearer = format!("Bearer {secret}");
    for token in [None, Some("garbage"), Some(secret.as_str())] {
        let gateway = Gateway::new(&world, token);
        for value in [&*bearer, "Bearer garbage"] {
            let refused = gateway.authorize("required_scopes=", &[("authorization", value)]).await;
            assert_eq!(refused.status(), 500, "{token:?}");
            assert!(refused.headers().get("www-authenticate").is_none(), "it is not the client's fault");
        }
    }
}

async fn introspection_tells_of_active_tokens_only(world: World) {
    let (token, secret) = orders(&world).await;
    let validator = world.validator().await.token.expect("a token");
    let gateway = Gateway::new(&world, None);
    let own = format!("Bearer {validator}");
    let form = format!("token={secret}&token_type_hint=access_token");
    let (status, headers, told) = gateway.introspect(&own, &form).await;
    assert_eq!((status.as_u16(), headers["cache-control"].to_str().expect("text")), (200, "no-store"));
    assert_eq!(told["active"], true);
    assert_eq!(
        (told["scope"].as_str(), told["sub"].as_str(), told["jti"].as_str()),
        (Some("orders:read"), Some("alice"), Some(&*token.id))
    );
    assert_eq!((told["aud"][0].as_str(), told["exp"].as_i64()), (Some("shop"), token.expire_time.map(|end| end.seconds)));
    let basic = format!("Basic {}", base64::Engine::encode(&base64::engine::general_purpose::STANDARD, format!("gateway:{validator}")));
    assert_eq!(gateway.introspect(&basic, &form).await.2["active"], true);
    let nothing: Value = serde_json::json!({"active": false});
    assert_eq!(gateway.introspect(&own, "token=garbage").await.2, nothing);
    for (credentials, form, status) in [
        ("", &*form, 401),
        ("Bearer garbage", &form, 401),
        (&*format!("Bearer {secret}"), &form, 403),
        (&own, "", 400),
        (&own, "token=a&token=b", 400),
    ] {
        let (found, headers, told) = gateway.introspect(credentials, form).await;
        assert_eq!(found.as_u16(), status, "{credentials} {form}");
        assert!(told["error"].is_string() && told.get("active").is_none());
        assert_eq!(headers.contains_key("www-authenticate"), matches!(status, 401 | 403));
    }
    world.admin().await.revoke(&token.id).await.expect("revoked");
    assert_eq!(gateway.introspect(&own, &form).await.2, nothing, "and nothing more");
}

async fn load_balancers_are_told_whether_questions_are_answered(world: World) {
    let gateway = Gateway::new(&world, None);
    for (path, status) in [("/healthz", 200), ("/readyz", 200), ("/", 404), ("/oauth2/introspect", 405)] {
        let answer = gateway.client.get(format!("{}{path}", gateway.base)).send().await.expect("an answer");
        assert_eq!(answer.status().as_u16(), status, "{path}");
    }
}
