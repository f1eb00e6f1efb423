//! Gateways, asked for by hand: what Envoy's external authorization, forward-auth and introspection are answered.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use keyward::proto::{
    self,
    envoy::{
        Address, AttributeContext, CheckRequest, CheckResponse, SocketAddress, address, attribute_context,
        authorization_client::AuthorizationClient, check_response::HttpResponse,
    },
};
use reqwest::{Client, Response, StatusCode, header::HeaderMap};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::{Code, Status};

use crate::{
    tls::{Authority, secured},
    validation::world_behind_proxy,
    world::{self, Actor, World, eventually},
};

crate::on_both_databases!(
    envoy_hears_who_comes_and_who_may_not,
    envoy_hears_nothing_without_the_right_to_ask,
    forward_auth_lets_good_tokens_pass_and_no_other_request,
    what_other_proxies_say_of_the_client_does_not_count,
    a_gateway_that_is_not_known_is_told_nothing,
    introspection_tells_of_active_tokens_only,
    load_balancers_are_told_whether_questions_are_answered,
    addresses_of_gateways_stand_for_credentials,
    certificates_of_gateways_stand_for_credentials,
    silent_clients_of_http_are_cut,
    a_caller_of_introspection_who_is_revoked_meanwhile_is_told_nothing,
    a_stop_waits_for_calls_by_http,
    a_drain_is_told_by_readiness,
    an_overload_is_told_as_one,
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

pub async fn check(gateway: &Actor, headers: &[(&str, &str)], settings: &[(&str, &str)]) -> Result<CheckResponse, Status> {
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
        ("required_scopes=orders:write&required_scopes=", &bearer, 500, ""),
        ("required_scopes=&only_401_403=yes", &bearer, 500, ""),
        ("required_scopes=&audience=", &bearer, 500, ""),
    ] {
        let refused = ask(query, value).await;
        let told = refused.headers().get("www-authenticate").map_or("", |value| value.to_str().expect("text"));
        assert_eq!((refused.status().as_u16(), told), (status, challenge), "{query} {value}");
        assert!(refused.headers().keys().all(|name| !name.as_str().starts_with("x-keyward-")), "{query}");
        assert!(!refused.text().await.expect("a body").contains("garbage"));
    }
    world.admin().await.revoke(&token.id).await.expect("revoked");
    assert_eq!(ask("required_scopes=", &bearer).await.status(), 401, "revoked a moment ago");
    // Of another workspace than the gateway's: as if it did not exist.
    world.add_workspace("other", "ot").await;
    let foreign = world.actor_in("other", "eve", &["orders:read"]).await.token.expect("a token");
    assert_eq!(ask("required_scopes=", &format!("Bearer {foreign}")).await.status(), 401);
    let unscoped = world.actor("bob", &[]).await.token.expect("a token");
    let passed = ask("required_scopes=", &format!("Bearer {unscoped}")).await;
    assert_eq!(passed.headers()["x-keyward-scopes"], "", "empty rather than missing: a gateway might leave the client's own");
}

async fn what_other_proxies_say_of_the_client_does_not_count(world: World) {
    let request = proto::CreateTokenRequest { allowed_cidrs: vec!["192.0.2.0/24".to_owned()], ..crate::world::new_token("t", &[]) };
    let bearer = format!("Bearer {}", world.admin().await.create(request).await.expect("created").secret);
    let gateway = Gateway::new(&world, world.validator().await.token.as_deref());
    for (query, claims, status) in [
        ("", &[("x-forwarded-for", "192.0.2.7")][..], 200),
        ("", &[("x-forwarded-for", "198.51.100.1, 192.0.2.7")], 200),
        ("", &[("x-forwarded-for", "192.0.2.7, 198.51.100.1")], 401),
        ("", &[("x-forwarded-for", "198.51.100.1"), ("x-forwarded-for", "192.0.2.7")], 200),
        ("", &[("x-forwarded-for", "192.0.2.7"), ("x-forwarded-for", "198.51.100.1")], 401),
        ("", &[("x-forwarded-for", "192.0.2.7, nowhere")], 401),
        ("", &[("x-real-ip", "192.0.2.7")], 401),
        ("&client_ip_header=x-real-ip", &[("x-real-ip", "192.0.2.7"), ("x-forwarded-for", "198.51.100.1")], 200),
        ("&client_ip_header=x-real-ip", &[("x-forwarded-for", "192.0.2.7")], 401),
    ] {
        let mut headers = vec![("authorization", bearer.as_str())];
        headers.extend_from_slice(claims);
        let answer = gateway.authorize(&format!("required_scopes={query}"), &headers).await;
        assert_eq!(answer.status().as_u16(), status, "{query} {claims:?}");
    }
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
    world.add_workspace("other", "ot").await;
    let foreign = world.actor_in("other", "eve", &["orders:read"]).await.token.expect("a token");
    assert_eq!(gateway.introspect(&own, &format!("token={foreign}")).await.2, nothing, "of another workspace");
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
        let names_an_error = headers.get("www-authenticate").is_some_and(|told| told.to_str().expect("text").contains("error="));
        assert_eq!(names_an_error, matches!(status, 401 | 403) && !credentials.is_empty(), "{credentials}");
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

async fn addresses_of_gateways_stand_for_credentials(mut world: World) {
    let (_, secret) = orders(&world).await;
    let bearer = format!("Bearer {secret}");
    let headers = [("authorization", bearer.as_str())];
    let settings = [("required_scopes", "orders:read")];
    for (peers, known) in [("192.0.2.0/24", false), ("192.0.2.0/24, 127.0.0.0/8", true)] {
        world.settings.insert("gateway_peers", peers.to_owned());
        world.restart().await;
        let stranger = world.stranger().await;
        let told = check(&stranger, &headers, &settings).await;
        assert_eq!(told.as_ref().map_or_else(Status::code, |_| Code::Ok), if known { Code::Ok } else { Code::Unauthenticated }, "{peers}");
        assert!(told.is_err() || http_status(&told.expect("an answer")) == 200);
        let gateway = Gateway::new(&world, None);
        let status = gateway.authorize("required_scopes=orders:read", &headers).await.status().as_u16();
        assert_eq!(status, if known { 200 } else { 500 }, "{peers}");
        // It stands for the credentials of a gateway only: for nothing else, and not for bad ones.
        let form = format!("token={secret}");
        assert_eq!(gateway.introspect("", &form).await.0.as_u16(), 401, "{peers}");
        let question = stranger.request(proto::ValidateTokenRequest { token: secret.clone(), ..Default::default() });
        let asked = proto::validation_service_client::ValidationServiceClient::new(stranger.channel.clone()).validate_token(question).await;
        assert_eq!(asked.expect_err("no credentials").code(), Code::Unauthenticated, "{peers}");
        let bad = Gateway::new(&world, Some("kw_bad"));
        assert_eq!(bad.authorize("required_scopes=orders:read", &headers).await.status().as_u16(), 500, "{peers}");
        assert_eq!(check(&world.bearer("kw_bad").await, &headers, &settings).await.expect_err("bad").code(), Code::Unauthenticated);
    }
    assert_eq!(world.metric(r#"keyward_requests_total{method="v1/authorize",code="OK"}"#).await as u64, 1);
}

/// A connection to the port for HTTP, with what was agreed on.
async fn secure(world: &World, authority: &Authority, identity: Option<&(String, String)>, protocol: &str) -> TlsStream<TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem().as_bytes()).expect("a certificate")).expect("a root");
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
    let config = config.with_safe_default_protocol_versions().expect("known").with_root_certificates(roots);
    let mut config = match identity {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => {
            let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).expect("a certificate");
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("a key");
            config.with_client_auth_cert(vec![certificate], key).expect("a key that fits")
        }
    };
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    let stream = TcpStream::connect(world.server().http_address().expect("HTTP is on")).await.expect("a connection");
    let stream = TlsConnector::from(Arc::new(config)).connect("localhost".try_into().expect("a name"), stream).await.expect("TLS");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(protocol.as_bytes()));
    stream
}

async fn certificates_of_gateways_stand_for_credentials(plain: World) {
    let authority = Authority::new();
    let world = secured(&authority, plain.backend, "gateway.internal=default/gateway keyward:validate").await;
    let root = world.root_token().to_owned();
    let gateway = authority.gateway();
    for (identity, status) in [(Some(&gateway), 200), (None, 500)] {
        let mut stream = secure(&world, &authority, identity, "http/1.1").await;
        let request =
            format!("GET /v1/authorize?required_scopes= HTTP/1.1\r\nhost: k\r\nauthorization: Bearer {root}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut answer = Vec::new();
        // The end may come without a farewell of TLS.
        let _ = stream.read_to_end(&mut answer).await;
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");

        let (client, connection) = h2::client::handshake(secure(&world, &authority, identity, "h2").await).await.expect("HTTP/2");
        tokio::spawn(connection);
        let request =
            http::Request::get("https://localhost/v1/authorize?required_scopes=").header("authorization", format!("Bearer {root}"));
        let (response, _) = client.ready().await.expect("ready").send_request(request.body(()).expect("a request"), true).expect("sent");
        assert_eq!(response.await.expect("an answer").status().as_u16(), status);
    }
    let mut plain = TcpStream::connect(world.server().http_address().expect("HTTP is on")).await.expect("a connection");
    plain.write_all(b"GET /healthz HTTP/1.1\r\nhost: k\r\n\r\n").await.expect("sent");
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP"), "plain text on a TLS port");
}

async fn silent_clients_of_http_are_cut(world: World) {
    let begin = Instant::now();
    let address = world.server().http_address().expect("HTTP is on");
    let (mut silent, mut half) = (TcpStream::connect(address).await.expect("open"), TcpStream::connect(address).await.expect("open"));
    let mut asking = TcpStream::connect(address).await.expect("open");
    half.write_all(b"GET /healthz HTTP/1.1\r\nhost:").await.expect("sent");
    let healthz = b"GET /healthz HTTP/1.1\r\nhost: k\r\n\r\n";
    asking.write_all(healthz).await.expect("sent");
    for stream in [&mut silent, &mut half] {
        let mut bytes = Vec::new();
        // An end or a reset: both are one.
        let gone = timeout(Duration::from_secs(20), stream.read_to_end(&mut bytes)).await;
        assert!(gone.is_ok() && bytes.is_empty(), "still open after {:?}", begin.elapsed());
    }
    assert!(begin.elapsed() >= Duration::from_secs(4), "they had their time");
    // Who has asked may ask again after a while: gateways keep connections.
    asking.write_all(healthz).await.expect("sent");
    let mut answers = Vec::new();
    while String::from_utf8_lossy(&answers).matches("HTTP/1.1 200 ").count() < 2 {
        let read = timeout(Duration::from_secs(10), asking.read_buf(&mut answers)).await.expect("in time").expect("open");
        assert!(read > 0, "closed after {}", String::from_utf8_lossy(&answers));
    }
}

/// Begins an introspection whose body is not there yet, and waits until the server has looked at who asks and wants the body.
async fn half_asked(world: &World, credentials: &str, form: &str) -> TcpStream {
    let mut stream = TcpStream::connect(world.server().http_address().expect("HTTP is on")).await.expect("a connection");
    let head = format!(
        "POST /oauth2/introspect HTTP/1.1\r\nhost: k\r\nauthorization: Bearer {credentials}\r\ncontent-type: application/x-www-form-urlencoded\r\n\
         content-length: {}\r\nexpect: 100-continue\r\nconnection: close\r\n\r\n",
        form.len()
    );
    stream.write_all(head.as_bytes()).await.expect("sent");
    let mut wanted = [0; 25];
    timeout(Duration::from_secs(10), stream.read_exact(&mut wanted)).await.expect("in time").expect("open");
    assert_eq!(String::from_utf8_lossy(&wanted), "HTTP/1.1 100 Continue\r\n\r\n");
    stream
}

async fn rest_asked(mut stream: TcpStream, form: &str) -> String {
    stream.write_all(form.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    timeout(Duration::from_secs(10), stream.read_to_string(&mut answer)).await.expect("in time").expect("text");
    answer
}

async fn a_caller_of_introspection_who_is_revoked_meanwhile_is_told_nothing(world: World) {
    let (_, secret) = orders(&world).await;
    let (gateway, form) = (world.validator().await, format!("token={secret}"));
    let stream = half_asked(&world, gateway.token.as_deref().expect("a token"), &form).await;
    world.root().await.revoke(&gateway.own_id().await).await.expect("revoked");
    let answer = rest_asked(stream, &form).await;
    assert!(answer.starts_with("HTTP/1.1 401 ") && !answer.contains("active"), "{answer}");
}

async fn a_stop_waits_for_calls_by_http(mut world: World) {
    let (token, secret) = orders(&world).await;
    let (gateway, form) = (world.validator().await, format!("token={secret}"));
    let stream = half_asked(&world, gateway.token.as_deref().expect("a token"), &form).await;
    drop(gateway);
    let stop = tokio::spawn(world.take_server().stop());
    // Longer than connections without a call are waited for.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let answer = rest_asked(stream, &form).await;
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains(r#""active":true"#), "{answer}");
    stop.await.expect("no panic").expect("a clean stop");
    world.start_server().await;
    assert_eq!(world.root().await.get(&token.id).await.expect("found").use_count, 1, "it was counted");
}

async fn a_drain_is_told_by_readiness(mut world: World) {
    let (_, secret) = orders(&world).await;
    let (gateway, form) = (world.validator().await, format!("token={secret}"));
    let address = world.server().http_address().expect("HTTP is on");
    let mut probe = TcpStream::connect(address).await.expect("a connection");
    // The request has begun before the drain, and ends in it: the server has accepted it before the next one.
    probe.write_all(b"GET /readyz HTTP/1.1\r\nhost: k\r\n").await.expect("sent");
    let half = half_asked(&world, gateway.token.as_deref().expect("a token"), &form).await;
    drop(gateway);
    let stop = tokio::spawn(world.take_server().stop());
    eventually("the drain begins", async || TcpStream::connect(address).await.err()).await;
    probe.write_all(b"connection: close\r\n\r\n").await.expect("sent");
    let mut answer = String::new();
    timeout(Duration::from_secs(10), probe.read_to_string(&mut answer)).await.expect("in time").expect("text");
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    rest_asked(half, &form).await;
    stop.await.expect("no panic").expect("a clean stop");
}

async fn an_overload_is_told_as_one(mut world: World) {
    let (_, secret) = orders(&world).await;
    let (validator, bearer) = (world.validator().await.token.expect("a token"), format!("Bearer {secret}"));
    world.limits.data_calls_max = 0;
    world.restart().await;
    let gateway = Gateway::new(&world, Some(&validator));
    for (query, status) in [("required_scopes=orders:read", 429), ("required_scopes=orders:read&only_401_403=true", 403)] {
        let told = gateway.authorize(query, &[("authorization", &bearer)]).await;
        assert_eq!((told.status().as_u16(), told.headers()["retry-after"].to_str().expect("text")), (status, "1"), "{query}");
    }
    let (status, headers, told) = gateway.introspect(&format!("Bearer {validator}"), &format!("token={secret}")).await;
    assert_eq!((status.as_u16(), headers["retry-after"].to_str().expect("text")), (429, "1"));
    assert!(told.get("active").is_none(), "{told}");
    assert_eq!(world.metric("keyward_shed_total").await, 3.0);
}

#[test]
fn an_outage_of_ours_is_told_as_one() {
    world::runtime().block_on(async {
        let Some((world, proxy)) = world_behind_proxy().await else { return };
        let (_, known) = orders(&world).await;
        let unknown = world.actor("bob", &["orders:read"]).await.token.expect("a token");
        let validator = world.validator().await;
        let gateway = Gateway::new(&world, validator.token.as_deref());
        let (known, unknown) = (format!("Bearer {known}"), format!("Bearer {unknown}"));
        let settings = [("required_scopes", "orders:read")];
        let authorize = async |query: &str, value: &str| gateway.authorize(query, &[("authorization", value)]).await;
        assert_eq!(authorize("required_scopes=orders:read", &known).await.status(), 200);
        proxy.cut();
        assert_eq!(authorize("required_scopes=orders:read", &known).await.status(), 200, "what is known is judged on");
        assert_eq!(http_status(&check(&validator, &[("authorization", &known)], &settings).await.expect("an answer")), 200);
        assert_eq!(authorize("required_scopes=orders:read", "Bearer garbage").await.status(), 401, "what cannot be a token as well");
        let outage = check(&validator, &[("authorization", &unknown)], &settings).await.expect_err("nobody knows");
        assert_eq!(outage.code(), Code::Unavailable, "{outage:?}");
        for (query, status) in [("required_scopes=orders:read", 503), ("required_scopes=orders:read&only_401_403=true", 403)] {
            let told = authorize(query, &unknown).await;
            assert_eq!((told.status().as_u16(), told.headers()["retry-after"].to_str().expect("text")), (status, "1"), "{query}");
            assert!(!told.headers().contains_key("www-authenticate"), "it is not the client's fault");
            assert!(told.text().await.expect("a body").contains("temporarily_unavailable"), "{query}");
        }
        let own = format!("Bearer {}", validator.token.as_deref().expect("a token"));
        let (status, headers, told) = gateway.introspect(&own, &format!("token={}", &unknown["Bearer ".len()..])).await;
        assert_eq!((status.as_u16(), headers["retry-after"].to_str().expect("text")), (503, "1"));
        assert!(told.get("active").is_none(), "{told}");
        proxy.heal();
        eventually("the database is back", async || {
            let answer = authorize("required_scopes=orders:read", &unknown).await;
            (answer.status().as_u16() == 200).then_some(())
        })
        .await;
    });
}
