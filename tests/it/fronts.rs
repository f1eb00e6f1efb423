//! Real gateways with the files of `deploy/gateways`: who comes through them to the upstream, and what the upstream is told.

use std::time::{Duration, Instant};

use keyward::proto::{self, create_token_request::Lifetime};
use percent_encoding::percent_decode_str;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tonic::{Code, transport::Channel};
use tonic_prost::ProstCodec;

use crate::{
    front::{Front, Program},
    upstream::{self, Seen},
    world::{eventually, new_token, runtime, skip},
};

macro_rules! with_each_program {
    ($($name:ident),* $(,)?) => {
        mod envoy { $(#[test] fn $name() { super::run(super::Program::Envoy, super::$name) })* }
        mod traefik { $(#[test] fn $name() { super::run(super::Program::Traefik, super::$name) })* }
        mod caddy { $(#[test] fn $name() { super::run(super::Program::Caddy, super::$name) })* }
        mod nginx { $(#[test] fn $name() { super::run(super::Program::Nginx, super::$name) })* }
        mod haproxy { $(#[test] fn $name() { super::run(super::Program::Haproxy, super::$name) })* }
    };
}

with_each_program!(
    good_tokens_come_through_and_no_other_request,
    what_clients_claim_is_not_believed,
    no_path_leads_around_the_routes,
    every_kind_of_request_is_asked_about,
    the_door_stays_shut_while_keyward_is_away,
);

fn run(program: Program, test: impl AsyncFnOnce(Program)) {
    if program.path().is_none() {
        return skip(&format!("no {program:?} on this machine (tests/run installs it)"));
    }
    runtime().block_on(test(program));
}

const IDENTITY: [&str; 4] = ["x-keyward-token-id", "x-keyward-principal", "x-keyward-workspace", "x-keyward-scopes"];

/// A token for `orders:read` at the audience `shop`, as the files want it, unless `more` changes it.
async fn issue(front: &Front, more: impl FnOnce(&mut proto::CreateTokenRequest)) -> (String, String) {
    let mut request =
        proto::CreateTokenRequest { principal: "alice".to_owned(), audiences: vec!["shop".to_owned()], ..new_token("t", &["orders:read"]) };
    more(&mut request);
    let made = front.world.root().await.create(request).await.expect("created");
    (made.token.expect("a token").id, format!("authorization: Bearer {}", made.secret))
}

impl Front {
    /// The one request that has come through since the last time.
    fn one(&self, what: &str) -> Seen {
        let mut seen = self.upstream.take();
        assert_eq!(seen.len(), 1, "{what}: {seen:?}\n{}", self.log());
        seen.remove(0)
    }

    fn nothing_came(&self, what: &str) {
        let seen = self.upstream.take();
        assert!(seen.is_empty(), "{what}: {seen:?}");
    }

    /// Which status a client gets where Keyward says this one.
    fn told(&self, status: u16) -> u16 {
        match (self.program, status) {
            (Program::Nginx, 400) => 401,
            _ => status,
        }
    }
}

/// Whoever reads headers as variables takes these for the same.
fn as_variable(name: &str) -> String {
    name.replace('_', "-").to_ascii_lowercase()
}

/// What the upstream was told about who comes: each name of ours at most once, however it is written.
fn identity(seen: &Seen) -> [String; 4] {
    IDENTITY.map(|name| {
        let values: Vec<&str> =
            seen.headers.iter().filter(|(each, _)| as_variable(each) == name).map(|(_, value)| value.as_str()).collect();
        assert!(values.len() <= 1, "{name}: {values:?}");
        values.concat()
    })
}

async fn good_tokens_come_through_and_no_other_request(program: Program) {
    let front = Front::start(program).await;
    let (id, good) = issue(&front, |_| ()).await;
    for _ in 0..3 {
        let answer = front.get("/orders/7?full=1", &[&good]).await;
        assert_eq!((answer.status, answer.body.as_str()), (200, upstream::BODY), "{}", front.log());
        let seen = front.one("a good token");
        assert_eq!(identity(&seen), [id.as_str(), "alice", "default", "orders:read"]);
        assert_eq!((seen.method.as_str(), seen.path.as_str()), ("GET", "/orders/7?full=1"));
        assert!(seen.values("x-keyward-authorization").is_empty(), "the gateway's own token stays with it");
    }
    let (_, soon) = issue(&front, |request| request.lifetime = Some(Lifetime::Ttl(prost_types::Duration { seconds: 60, nanos: 0 }))).await;
    assert_eq!(front.get("/", &[&soon]).await.status, 200);
    front.one("not expired yet");
    front.world.advance(Duration::from_secs(61));
    let (_, narrow) = issue(&front, |request| request.scopes = vec!["orders:write".to_owned()]).await;
    let (_, elsewhere) = issue(&front, |request| request.audiences = vec!["billing".to_owned()]).await;
    let garbage = good.replace("Bearer ", "Bearer x");
    let twice = format!("{good}, {}", good.split_once(' ').expect("a value").1);
    let none = r#"Bearer realm="keyward""#;
    let bad = r#"Bearer realm="keyward", error="invalid_token""#;
    let request = r#"Bearer realm="keyward", error="invalid_request""#;
    for (what, lines, status, challenge) in [
        ("no token", vec![], 401, none),
        ("another scheme", vec!["authorization: Basic YTpi"], 401, none),
        ("no token in it", vec!["authorization: Bearer"], 400, request),
        ("a forged token", vec![&garbage], 401, bad),
        ("an expired token", vec![&soon], 401, bad),
        ("the wrong scope", vec![&narrow], 403, r#"Bearer realm="keyward", error="insufficient_scope", scope="orders:read""#),
        ("the wrong audience", vec![&elsewhere], 401, bad),
        ("two Authorization headers", vec![&good, &good], 400, request),
        ("a bad one before a good one", vec![&garbage, &good], 400, request),
        ("a good one before a bad one", vec![&good, "authorization: Basic YTpi"], 400, request),
        ("a comma in one", vec![&twice], 400, request),
    ] {
        let answer = front.get("/orders/7", &lines).await;
        front.nothing_came(what);
        if program == Program::Nginx && lines.len() > 1 {
            // It refuses the second one itself.
            assert_eq!(answer.status, 400, "{what}");
            continue;
        }
        assert_eq!(answer.status, front.told(status), "{what}: {answer:?}\n{}", front.log());
        // nginx passes the challenge on with 401 only.
        let expected = if program == Program::Nginx && status == 403 { "" } else { challenge };
        assert_eq!(answer.header("www-authenticate"), expected, "{what}: {answer:?}");
    }
    assert_eq!(front.get("/", &[&good]).await.status, 200);
    front.one("still good");
    front.world.admin().await.revoke(&id).await.expect("revoked");
    assert_eq!(front.get("/", &[&good]).await.status, 401, "revoked a moment ago");
    front.nothing_came("a token that was revoked");
}

async fn what_clients_claim_is_not_believed(program: Program) {
    let front = Front::start(program).await;
    let (id, good) = issue(&front, |_| ()).await;
    let claims = |separators: [&str; 2]| {
        let [a, b] = separators;
        [
            format!("x{a}keyward{b}token{a}id: tok_spoofed"),
            format!("X{a}Keyward{b}Principal: root"),
            format!("X{a}KEYWARD{b}WORKSPACE: spoofed"),
            format!("x{a}KeyWard{b}scopes: keyward:root"),
        ]
    };
    for separators in [["-", "-"], ["_", "_"], ["-", "_"], ["_", "-"]] {
        let claims = claims(separators);
        for copies in [1, 2] {
            let mut lines = vec![good.as_str()];
            lines.extend((0..copies).flat_map(|_| claims.iter().map(String::as_str)));
            let answer = front.get("/", &lines).await;
            let what = format!("{lines:?}");
            if answer.status != 200 {
                assert!((400..500).contains(&answer.status), "{what}: {answer:?}");
                front.nothing_came(&what);
                continue;
            }
            assert_eq!(identity(&front.one(&what)), [id.as_str(), "alice", "default", "orders:read"], "{what}");
        }
        let mut lines: Vec<&str> = claims.iter().map(String::as_str).collect();
        lines.push("x-keyward-authorization: Bearer spoofed");
        assert!((400..=500).contains(&front.get("/", &lines).await.status), "{lines:?}");
        front.nothing_came("claims without a token");
    }
    // What a client calls a matter of this connection alone, proxies leave out: nothing that the gateway itself has put there.
    let line = format!("connection: {}, x-forwarded-for, x-forwarded-uri, x-forwarded-method", IDENTITY.join(", "));
    let answer = front.get("/", &[&good, &line]).await;
    let seen = front.upstream.take();
    assert_eq!(seen.len(), usize::from(answer.status == 200), "{answer:?}");
    assert!(seen.iter().all(|seen| identity(seen) == [id.as_str(), "alice", "default", "orders:read"]), "{seen:?}");
    front.get("/", &["connection: authorization", &good]).await;
    assert!(front.upstream.take().iter().all(|seen| identity(seen)[1] == "alice"));
    // A token that is good from elsewhere: the client cannot say that it comes from there.
    let (_, far) = issue(&front, |request| request.allowed_cidrs = vec!["192.0.2.0/24".to_owned()]).await;
    let (_, near) = issue(&front, |request| request.allowed_cidrs = vec!["127.0.0.0/8".to_owned()]).await;
    for claim in [
        "x-forwarded-for: 192.0.2.7",
        "x-real-ip: 192.0.2.7",
        "forwarded: for=192.0.2.7",
        "x-envoy-external-address: 192.0.2.7",
        "X-Forwarded-For: 192.0.2.7, 192.0.2.7",
    ] {
        let refused = front.get("/", &[claim, &far]).await;
        assert_eq!(refused.status, 401, "{claim}: {refused:?}");
        front.nothing_came(claim);
        let passed = front.get("/", &[claim, &near]).await;
        assert_eq!(passed.status, 200, "{claim}: {passed:?}\n{}", front.log());
        // Nor can it tell the upstream so, which goes by the last address.
        let seen = front.one(claim);
        let told = seen.values("x-forwarded-for").join(",");
        assert!(told.rsplit(',').next().is_some_and(|last| !["", "192.0.2.7"].contains(&last.trim())), "{claim}: {seen:?}");
    }
    // More of one header than any gateway takes: whoever sends them ends nothing but their own request.
    for count in [100, 253] {
        let many = vec!["authorization: Bearer x"; count];
        assert!(
            front
                .ask_shortly(&format!("GET / HTTP/1.1\r\nhost: orders\r\n{}\r\n\r\n", many.join("\r\n")))
                .await
                .is_none_or(|answer| answer.status != 200)
        );
        front.nothing_came("many tokens");
        assert_eq!(front.get("/", &[&good]).await.status, 200, "{count}: {}", front.log());
        front.one("after many tokens");
    }
    drop(front);
    // An identity without scopes: nothing of the client's fills the gap.
    let none = if program == Program::Envoy { "required_scopes: \"\"" } else { "&required_scopes=" };
    let front = Front::start_with(program, &[(program.scope_setting(), none)]).await;
    let (bare, unscoped) = issue(&front, |request| request.scopes.clear()).await;
    let answer = front.get("/", &[&unscoped.replace(": ", ":  "), "x-keyward-scopes: keyward:root"]).await;
    assert_eq!(answer.status, 200, "{answer:?}\n{}", front.log());
    assert_eq!(identity(&front.one("no scopes")), [bare.as_str(), "alice", "default", ""]);
    // And one with as many as there may be.
    let scopes: Vec<String> =
        (0..100).map(|number| format!("{}:{number:0>60}", "r".repeat(40))).map(|scope| scope.replace(":0", ":a")).collect();
    let (rich, scoped) = issue(&front, |request| request.scopes.clone_from(&scopes)).await;
    let answer = front.get("/", &[&scoped]).await;
    assert_eq!(answer.status, 200, "{answer:?}\n{}", front.log());
    let mut told: Vec<String> = identity(&front.one("many scopes"))[3].split(' ').map(str::to_owned).collect();
    told.sort();
    assert_eq!((told.len(), rich.is_empty()), (100, false));
    // Whatever room is left beside what the client sends: all of its identity, or nothing.
    for kib in [80, 90, 92, 94, 95, 96] {
        let large = format!("x-large: {}", "y".repeat(kib * 1_000));
        let status = front
            .ask_shortly(&format!("GET / HTTP/1.1\r\nhost: orders\r\n{scoped}\r\n{large}\r\nconnection: close\r\n\r\n"))
            .await
            .map(|answer| answer.status);
        for seen in front.upstream.take() {
            assert_eq!(identity(&seen)[3].split(' ').count(), 100, "{kib}: {status:?}");
        }
    }
}

#[test]
fn envoy_is_understood_in_both_encodings() {
    run(Program::Envoy, async |program| {
        let settings = ["required_scopes: orders:read", "token_header: x-api-key", "strip_token: \"true\"", "client_ip_header: x-client"];
        let settings = settings.join("\n                              ");
        // What Envoy does against these names is switched off: Keyward has them removed.
        let mut changes = vec![
            ("required_scopes: orders:read", settings.as_str()),
            ("headers_with_underscores_action: DROP_HEADER", "headers_with_underscores_action: ALLOW"),
        ];
        for raw in [false, true] {
            if raw {
                changes.push(("failure_mode_allow: false", "failure_mode_allow: false\n                      encode_raw_headers: true"));
            }
            let front = Front::start_with(program, &changes).await;
            let (id, good) = issue(&front, |request| request.allowed_cidrs = vec!["192.0.2.0/24".to_owned()]).await;
            let (other, key) = (good.clone(), good.replace("authorization: Bearer ", "X-Api-Key: "));
            let spoofed =
                ["x_keyward_principal: root", "X-Keyward_Scopes: *", "x-keyward-workspace: spoofed", "x-keyward-authorization: x"];
            let mut lines = vec![key.as_str(), "x-client: 198.51.100.1, 192.0.2.7"];
            lines.extend(spoofed);
            let answer = front.get("/", &lines).await;
            assert_eq!(answer.status, 200, "raw: {raw}: {answer:?}\n{}", front.log());
            let seen = front.one("an API key");
            assert_eq!(identity(&seen), [id.as_str(), "alice", "default", "orders:read"], "raw: {raw}");
            assert!(
                seen.headers.iter().all(|(name, _)| IDENTITY.contains(&name.as_str()) || !as_variable(name).starts_with("x-keyward-")),
                "{seen:?}"
            );
            assert!(seen.values("x-api-key").is_empty(), "the token stays here");
            for (lines, status) in [
                (vec![key.as_str(), "x-client: 192.0.2.7, 198.51.100.1"], 401),
                (vec![&key, "x-client: nowhere"], 401),
                (vec![&key], 401),
                (vec!["x-client: 192.0.2.7"], 401),
                (vec![&other, "x-client: 192.0.2.7"], 401),
                (vec![&key, &key, "x-client: 192.0.2.7"], 400),
                (vec!["x-api-key: a b", "x-client: 192.0.2.7"], 400),
            ] {
                let answer = front.get("/", &lines).await;
                assert_eq!(answer.status, status, "raw: {raw}: {lines:?}: {answer:?}");
                front.nothing_came("a bad one");
            }
            let logged = format!("GET / 200 verdict=VERDICT_VALID token={id} principal=alice");
            eventually("the access log says who came", async || front.log().contains(&logged).then_some(())).await;
            assert!(front.log().contains("401 verdict=VERDICT_IP_NOT_ALLOWED"), "{}", front.log());
        }
    });
}

#[test]
fn an_error_in_lua_opens_no_door() {
    run(Program::Haproxy, async |program| {
        for (usual, broken, without_token) in [
            ("local answer = core.httpclient()", "local answer = core.nothing()", 503),
            ("    forget_claims(txn)\n    local asked", "    error(\"broken\")\n    local asked", 503),
            ("    txn:set_var(\"txn.keyward\", \"open\")", "    error(\"broken\")", 401),
        ] {
            let front = Front::start_until(program, &[(usual, broken)], without_token).await;
            let (_, good) = issue(&front, |_| ()).await;
            assert_eq!(front.get("/", &[&good]).await.status, 503, "{broken}: {}", front.log());
            front.nothing_came(broken);
        }
    });
}

/// What an upstream may take a path for: decoded again and again, with either slash, without `;…`, `.` and `..`, in small letters.
fn resolved(path: &str) -> String {
    let mut text = path.split(['?', '#']).next().unwrap_or_default().to_owned();
    for _ in 0..3 {
        text = percent_decode_str(&text).decode_utf8_lossy().into_owned();
    }
    let mut segments: Vec<&str> = Vec::new();
    for segment in text.split(['/', '\\']).map(|segment| segment.split(';').next().unwrap_or_default()) {
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop()),
            other => segments.push(other),
        }
    }
    format!("/{}", segments.join("/")).to_lowercase()
}

async fn no_path_leads_around_the_routes(program: Program) {
    let front = Front::start_by_routes(program).await;
    around_the_routes(&front).await;
    // Nor does a query: with nothing set at all, no setting is the client's.
    let settings = match program {
        Program::Envoy => vec![(program.scope_setting(), ""), ("audience: shop", "")],
        Program::Nginx => vec![("&audience=shop&required_scopes=orders:read", "")],
        _ => vec![("audience=shop&required_scopes=orders:read", "")],
    };
    let front = Front::start_with(program, &settings).await;
    around_the_routes(&front).await;
    let (_, other) = issue(&front, |request| request.scopes = vec!["orders:write".to_owned()]).await;
    let (_, far) = issue(&front, |request| request.allowed_cidrs = vec!["192.0.2.0/24".to_owned()]).await;
    for (token, query) in [
        (&other, "required_scopes="),
        (&other, "required_scopes=orders:write"),
        (&far, "client_ip_header=x-me"),
        (&other, "token_header=x-me"),
    ] {
        let answer = front.get(&format!("/api/orders/7?{query}"), &[token, "x-me: 192.0.2.7"]).await;
        assert!((400..=500).contains(&answer.status), "{query}: {answer:?}");
        front.nothing_came(query);
    }
}

async fn around_the_routes(front: &Front) {
    let operation = |operation: &str, method: &str, path: &str| proto::Operation {
        operation: operation.to_owned(),
        method: method.to_owned(),
        path: path.to_owned(),
    };
    let resource = |name: &str, endpoint: &str, operations: Vec<proto::Operation>| proto::Resource {
        resource: name.to_owned(),
        endpoint: endpoint.to_owned(),
        operations,
    };
    let resources = vec![
        resource("orders", "/api/orders", vec![operation("read", "GET", "/{rest...}"), operation("write", "POST", "/{rest...}")]),
        resource("admin", "/api/admin", vec![operation("read", "*", ""), operation("read", "*", "/{rest...}")]),
    ];
    let routes = proto::Workspace { id: "default".to_owned(), resources, ..Default::default() };
    front.world.root().await.update_workspace(routes, &["resources"]).await.expect("changed");
    let (_, good) = issue(front, |_| ()).await;
    let answer = front.get("/api/orders/7?x=/api/admin", &[&good]).await;
    assert_eq!(answer.status, 200, "{answer:?}\n{}", front.log());
    front.one("a route");
    let mut came = 0;
    for path in [
        "/api/admin",
        "/api/admin/users",
        "/api/orders/../admin",
        "/api/orders/x/../../admin/users",
        "/api/orders/%2e%2e/admin",
        "/api/orders/%2E%2E/admin/users",
        "/api/orders/.%2e/admin",
        "/api/orders/..%2fadmin",
        "/api/orders/..%2Fadmin",
        "/api/orders/%2e%2e%2fadmin",
        "/api/orders%2f..%2fadmin",
        "/api/orders/%252e%252e/admin",
        "/api/orders/..%5cadmin",
        "/api/orders/..\\admin",
        "/api/orders/..;/admin",
        "/api/orders/;/../admin",
        "/api/orders//../admin",
        "//api/admin",
        "/api//admin",
        "/./api/admin",
        "/api/./admin",
        "/api/%61dmin",
        "/api/ADMIN",
        "/api/admin/",
        "/api/admin;x=/api/orders/7",
        "/api/admin%00/api/orders/7",
        "/api/admin#/api/orders/7",
        "/api/admin?x=/api/orders/7",
        "/api/admin%3f/../orders/7",
        "/nothing",
        "http://orders/api/admin",
        "http://other/api/orders/../admin",
    ] {
        for spoofed in ["x-spoofed: none", "x-forwarded-uri: /api/orders/7", "x-original-url: /api/orders/7", "x-forwarded-method: GET"] {
            let answer = front.get(path, &[&good, spoofed]).await;
            for seen in front.upstream.take() {
                came += 1;
                let taken = resolved(&seen.path);
                assert!(taken.starts_with("/api/orders/"), "{path} came through as {}, which may be read as {taken}", seen.path);
                assert_eq!(answer.status, 200, "{path}");
            }
            assert!(answer.status == 200 || (300..=500).contains(&answer.status), "{path}: {answer:?}");
        }
    }
    println!("{:?}: {came} of them came through, harmless", front.program);
    for told in ["x-http-method-override", "x-http-method", "x-method-override", "x-original-url", "x-rewrite-url"] {
        let answer = front.get("/api/orders/7", &[&good, &format!("{told}: DELETE")]).await;
        assert_eq!(answer.status, 200, "{told}: {answer:?}");
        assert!(front.one(told).values(told).is_empty(), "{told} tells the upstream of another request than Keyward judged");
    }
    // The method counts as well.
    for (method, status) in [("GET", 200), ("HEAD", 200), ("POST", 403), ("DELETE", 403), ("PROPFIND", 403), ("get", 403)] {
        for spoofed in ["x-spoofed: none", "x-forwarded-method: GET"] {
            let request = format!(
                "{method} /api/orders/7 HTTP/1.1\r\nhost: orders\r\n{good}\r\n{spoofed}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            );
            let answer = front.ask(&request).await;
            let came = front.upstream.take().len();
            assert_eq!(came, usize::from(status == 200), "{method}: {answer:?}");
            assert!(answer.status == status || (status != 200 && (400..=405).contains(&answer.status)), "{method}: {answer:?}");
        }
    }
}

async fn every_kind_of_request_is_asked_about(program: Program) {
    let front = Front::start(program).await;
    let (id, good) = issue(&front, |_| ()).await;
    let bad = good.replace("Bearer ", "Bearer x");
    let expected = [id.as_str(), "alice", "default", "orders:read"];
    // A body goes on whole, and Keyward does not see it.
    let body = "x".repeat(100_000);
    for (token, status) in [(&good, 200), (&bad, 401)] {
        let post = format!(
            "POST /orders HTTP/1.1\r\nhost: orders\r\n{token}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        );
        let answer = front.ask(&post).await;
        assert_eq!(answer.status, status, "{answer:?}\n{}", front.log());
        if status == 200 {
            let seen = front.one("a body");
            assert_eq!((seen.method.as_str(), seen.body.len()), ("POST", body.len()));
        }
    }
    front.nothing_came("a body with a bad token");
    for (token, status) in [(&good, 200), (&bad, 401)] {
        let answer = front.ask(&format!("HEAD / HTTP/1.1\r\nhost: orders\r\n{token}\r\nconnection: close\r\n\r\n")).await;
        assert_eq!((answer.status, answer.body.as_str()), (status, ""), "HEAD");
    }
    assert_eq!(front.one("HEAD").method, "HEAD");
    // The oldest HTTP: some refuse it whatever it brings.
    let old = front.ask(&format!("GET / HTTP/1.0\r\nhost: orders\r\n{good}\r\n\r\n")).await;
    assert_eq!(front.upstream.take().len(), usize::from(old.status == 200), "{old:?}");
    assert!(old.status == 200 || old.status == 426, "{old:?}");
    let old = front.ask(&format!("GET / HTTP/1.0\r\nhost: orders\r\n{bad}\r\n\r\n")).await;
    assert!((400..500).contains(&old.status), "{old:?}");
    front.nothing_came("HTTP/1.0 with a bad token");
    // A large header: the token may stand before or behind it.
    let large = format!("x-large: {}", "y".repeat(60 * 1024));
    for lines in [[good.as_str(), &large], [&large, &good]] {
        let answer = front.get("/", &lines).await;
        let seen = front.upstream.take();
        assert_eq!(seen.len(), usize::from(answer.status == 200));
        assert!(matches!(answer.status, 200 | 400 | 431), "{}", answer.status);
        assert!(seen.iter().all(|seen| identity(seen) == expected && seen.values("x-large").concat().len() == 60 * 1024));
        println!("{program:?}: a header of 60 KiB: {}", answer.status);
    }
    assert!((400..500).contains(&front.get("/", &[&bad, &large]).await.status));
    front.nothing_came("a large header with a bad token");
    web_sockets(&front, &good, &bad).await;
    // Behind HTTP/2 other requests could come, which nobody asks about.
    for lines in [
        &["connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAARAAAAAAAIAAAAA"][..],
        &["connection: Upgrade", "upgrade: websocket, h2c"],
        &["connection: Upgrade", "upgrade: websocket", "upgrade: h2c"],
        &["connection: Upgrade", "upgrade: h2c", "upgrade: websocket"],
        &["connection: Upgrade", "upgrade: orders/2"],
    ] {
        let request = format!("GET / HTTP/1.1\r\nhost: orders\r\n{good}\r\n{}\r\n\r\n", lines.join("\r\n"));
        let answer = front.ask_shortly(&request).await;
        for seen in front.upstream.take() {
            let asked = seen.values("upgrade");
            assert!(asked.iter().all(|protocol| !protocol.contains("h2c")), "{lines:?}: {seen:?}");
        }
        assert!(answer.is_none_or(|answer| !answer.header("upgrade").contains("h2c")), "{lines:?}");
    }
    grpc(&front, &good, &bad).await;
}

async fn web_sockets(front: &Front, good: &str, bad: &str) {
    let upgrade = format!(
        "host: orders\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: {}\r\n",
        upstream::WEBSOCKET_KEY
    );
    let refused = front.ask(&format!("GET /live HTTP/1.1\r\n{bad}\r\n{upgrade}\r\n")).await;
    assert_eq!(refused.status, 401, "{refused:?}");
    front.nothing_came("an upgrade with a bad token");
    let mut stream = TcpStream::connect(("127.0.0.1", front.port)).await.expect("a connection");
    stream.write_all(format!("GET /live HTTP/1.1\r\n{good}\r\n{upgrade}\r\n").as_bytes()).await.expect("sent");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let byte = timeout(Duration::from_secs(10), stream.read_u8()).await.expect("an answer in time");
        head.push(byte.unwrap_or_else(|_| panic!("closed after {}: {}", String::from_utf8_lossy(&head), front.log())));
    }
    assert!(head.starts_with(b"HTTP/1.1 101 "), "{}: {}", String::from_utf8_lossy(&head), front.log());
    stream.write_all(b"echo").await.expect("sent");
    let mut echo = [0; 4];
    timeout(Duration::from_secs(10), stream.read_exact(&mut echo)).await.expect("in time").expect("an echo");
    assert_eq!(&echo, b"echo");
    assert_eq!(identity(&front.one("an upgrade"))[1], "alice");
}

async fn grpc(front: &Front, good: &str, bad: &str) {
    let channel = Channel::from_shared(format!("http://127.0.0.1:{}", front.port)).expect("an address").connect().await.expect("HTTP/2");
    let call = async |line: &str| {
        let mut request = tonic::Request::new(());
        let value = line.split_once(": ").expect("a header").1;
        request.metadata_mut().insert("authorization", value.parse().expect("a value"));
        let mut client = tonic::client::Grpc::new(channel.clone());
        client.ready().await.expect("connected");
        let path = http::uri::PathAndQuery::from_static("/orders.v1.Orders/Get");
        client.unary(request, path, ProstCodec::<(), ()>::default()).await
    };
    call(good).await.unwrap_or_else(|status| panic!("{status:?}\n{}", front.log()));
    let seen = front.one("gRPC");
    assert_eq!((seen.path.as_str(), seen.values("content-type")), ("/orders.v1.Orders/Get", vec!["application/grpc"]));
    assert_eq!(identity(&seen)[1], "alice");
    let refused = call(bad).await.expect_err("a bad token");
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused:?}");
    front.nothing_came("gRPC with a bad token");
    // Other clients than this one understand it only with its content type, and with the status 200 or one that says the same.
    let (mut client, connection) = {
        let stream = TcpStream::connect(("127.0.0.1", front.port)).await.expect("a connection");
        h2::client::handshake(stream).await.expect("HTTP/2")
    };
    tokio::spawn(connection);
    let request =
        http::Request::post("http://orders/orders.v1.Orders/Get").header("content-type", "application/grpc").header("te", "trailers");
    let request = request.header("authorization", bad.split_once(": ").expect("a header").1).body(()).expect("a request");
    let (answer, mut body) = client.send_request(request, false).expect("sent");
    let _ = body.send_data(bytes::Bytes::from_static(&[0; 5]), true);
    let answer = answer.await.expect("an answer");
    assert_eq!(
        (answer.headers()["content-type"].as_bytes(), answer.headers()["grpc-status"].as_bytes()),
        (&b"application/grpc"[..], &b"16"[..]),
        "{answer:?}"
    );
    assert!(matches!(answer.status().as_u16(), 200 | 401), "{answer:?}");
}

async fn the_door_stays_shut_while_keyward_is_away(program: Program) {
    let mut front = Front::start(program).await;
    let (_, good) = issue(&front, |_| ()).await;
    let is_open = async |front: &Front| (front.get("/", &[&good]).await.status == 200).then_some(());
    is_open(&front).await.expect("open");
    front.one("it is there");
    let refused = async |front: &Front, what: &str| {
        let begin = Instant::now();
        let answer = front.get("/", &[&good]).await;
        front.nothing_came(what);
        assert!((500..=504).contains(&answer.status), "{what}: {answer:?}");
        println!("{program:?}: Keyward {what}: {} after {} ms", answer.status, begin.elapsed().as_millis());
    };
    front.to_keyward.cut();
    for _ in 0..3 {
        refused(&front, "is away").await;
    }
    front.to_keyward.heal();
    eventually("the door opens", async || is_open(&front).await).await;
    front.upstream.take();
    // Traefik has no limit of its own below 30 s; what it waits for is an answer that comes, in the end, and counts.
    front.to_keyward.delay(Duration::from_secs(if program == Program::Traefik { 35 } else { 3 }));
    refused(&front, "is slow").await;
    front.to_keyward.heal();
    eventually("the door opens", async || is_open(&front).await).await;
    front.upstream.take();
    front.world.stop_server().await;
    for _ in 0..3 {
        refused(&front, "is stopped").await;
    }
}
