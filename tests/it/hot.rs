//! Two ways to one answer: what is answered ahead of the framework is answered as the framework's handlers would have answered it, to the byte.
//!
//! A request with the content type `application/grpc` may be answered ahead of them, one with `application/grpc+proto` never is. Each random request goes both ways. A
//! difference is shown with the seed and the shape of its request; `KEYWARD_TEST_SEED` repeats a run, and with `KEYWARD_TEST_ROUNDS=1` its first request alone.

mod shapes;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request};
use keyward::proto::{self, Verdict, create_token_request::Lifetime};
use shapes::{Cast, SHARED, Sent, Twins};
use tokio::time::{sleep, timeout};
use tonic::Code;

use crate::{
    crash::number_from,
    gateways::{check, http_status},
    limits::{RawClient, raw},
    validation::world_behind_proxy,
    world::{self, Actor, World, eventually, new_token},
};

crate::on_sqlite!(both_ways_give_the_same_answer, a_request_that_never_ends_is_not_answered_early);

/// What a request is sent as, and which of the twins it is about.
const WAYS: [(&str, usize); 2] = [("application/grpc", 0), ("application/grpc+proto", 1)];
const ROUNDS: u64 = 2_000;
/// Requests that go one way before they go the other.
const CHUNK: u64 = 100;

/// All that a client can see of an answer.
#[derive(PartialEq, Eq, Debug, Default)]
struct Seen {
    status: u16,
    headers: BTreeMap<String, Vec<Vec<u8>>>,
    body: Vec<u8>,
    trailers: BTreeMap<String, Vec<Vec<u8>>>,
    /// How the stream broke off.
    broken: Option<String>,
}

impl Seen {
    /// What is different in another answer, by name.
    fn differences(&self, other: &Self) -> Vec<String> {
        let mut named = Vec::new();
        let mut name = |what: String, one: String, two: String| {
            if one != two {
                named.push(format!("{what}: {one} and {two}"));
            }
        };
        name("HTTP status".to_owned(), self.status.to_string(), other.status.to_string());
        for (kind, one, two) in [("header", &self.headers, &other.headers), ("trailer", &self.trailers, &other.trailers)] {
            for key in one.keys().chain(two.keys()).collect::<BTreeSet<_>>() {
                let text = |values: Option<&Vec<Vec<u8>>>| {
                    values.map_or("none".to_owned(), |values| {
                        format!("{:?}", values.iter().map(|value| value.escape_ascii().to_string()).collect::<Vec<_>>())
                    })
                };
                name(format!("{kind} {key}"), text(one.get(key)), text(two.get(key)));
            }
        }
        let place = self.body.iter().zip(&other.body).position(|(one, two)| one != two).unwrap_or(self.body.len().min(other.body.len()));
        let near =
            |body: &[u8]| format!("{} bytes, …{}…", body.len(), body[place.saturating_sub(20)..body.len().min(place + 40)].escape_ascii());
        if self.body != other.body {
            name(format!("body at byte {place}"), near(&self.body), near(&other.body));
        }
        name("end".to_owned(), format!("{:?}", self.broken), format!("{:?}", other.broken));
        named
    }
}

fn fields(headers: &HeaderMap) -> BTreeMap<String, Vec<Vec<u8>>> {
    let mut fields: BTreeMap<String, Vec<Vec<u8>>> = BTreeMap::new();
    for (name, value) in headers.iter().filter(|(name, _)| *name != "date") {
        fields.entry(name.to_string()).or_default().push(value.as_bytes().to_vec());
    }
    fields
}

/// The status, wherever it stands.
fn code(seen: &Seen) -> String {
    let code = [&seen.headers, &seen.trailers].into_iter().find_map(|fields| fields.get("grpc-status"));
    code.map_or("none".to_owned(), |code| code[0].escape_ascii().to_string())
}

fn broken(error: &h2::Error) -> Option<String> {
    Some(format!("{:?}", error.reason()))
}

/// One connection, made anew when the server has closed it.
struct Line<'a> {
    world: &'a World,
    client: Option<RawClient>,
}

impl Line<'_> {
    async fn client(&mut self) -> RawClient {
        if let Some(client) = self.client.take()
            && let Ok(client) = client.ready().await
        {
            return client;
        }
        let (client, connection) = raw(self.world).await;
        tokio::spawn(connection);
        client.ready().await.expect("ready")
    }

    async fn send(&mut self, sent: &Sent, content_type: &str) -> Seen {
        let mut client = self.client().await;
        let mut request = Request::builder().method(sent.method).uri(format!("http://keyward{}", sent.path)).body(()).expect("a request");
        request.headers_mut().insert("content-type", content_type.parse().expect("a header value"));
        for (name, value) in &sent.headers {
            request.headers_mut().append(*name, HeaderValue::from_bytes(value).expect("a header value"));
        }
        let ends = sent.pieces.is_empty() && !sent.trailers;
        let (response, mut stream) = client.send_request(request, ends).expect("sent");
        self.client = Some(client);
        // What fails here is that the server has answered before it had read everything.
        for (index, (piece, slowly)) in sent.pieces.iter().enumerate() {
            if *slowly {
                sleep(Duration::from_millis(1)).await;
            }
            let last = index + 1 == sent.pieces.len() && !sent.trailers;
            let _ = stream.send_data(Bytes::copy_from_slice(piece), last);
        }
        if sent.trailers {
            let _ = stream.send_trailers(HeaderMap::from_iter([(http::HeaderName::from_static("x-end"), HeaderValue::from_static("1"))]));
        }
        timeout(Duration::from_secs(30), seen(response))
            .await
            .unwrap_or_else(|_| Seen { broken: Some("no answer".to_owned()), ..Seen::default() })
    }
}

async fn seen(response: h2::client::ResponseFuture) -> Seen {
    let mut seen = Seen::default();
    let response = match response.await {
        Ok(response) => response,
        Err(error) => return Seen { broken: broken(&error), ..seen },
    };
    seen.status = response.status().as_u16();
    seen.headers = fields(response.headers());
    let mut body = response.into_body();
    while let Some(data) = body.data().await {
        match data {
            Ok(data) => {
                body.flow_control().release_capacity(data.len()).expect("taken");
                seen.body.extend_from_slice(&data);
            }
            Err(error) => return Seen { broken: broken(&error), ..seen },
        }
    }
    match body.trailers().await {
        Ok(trailers) => seen.trailers = trailers.as_ref().map(fields).unwrap_or_default(),
        Err(error) => seen.broken = broken(&error),
    }
    seen
}

/// Puts the ids of the first twins where an answer has those of the second: they are as long.
fn as_the_first(mut body: Vec<u8>, cast: &Cast) -> Vec<u8> {
    for Twins { ids: [first, second, _], .. } in cast.tokens.iter().chain(&cast.callers) {
        let mut from = 0;
        while let Some(place) = body[from..].windows(second.len()).position(|window| window == second.as_bytes()) {
            body[from + place..from + place + first.len()].copy_from_slice(first.as_bytes());
            from += place + first.len();
        }
    }
    body
}

/// Makes one token three times.
async fn triple(root: &Actor, name: &'static str, wish: proto::CreateTokenRequest) -> Twins {
    let mut twins = Twins { name, ids: Default::default(), secrets: Default::default() };
    for (id, secret) in twins.ids.iter_mut().zip(&mut twins.secrets) {
        let wish = proto::CreateTokenRequest { display_name: name.to_owned(), ..wish.clone() };
        let created = root.create(wish).await.expect("created");
        (*id, *secret) = (created.token.expect("a token").id, created.secret);
    }
    assert!(twins.secrets.iter().all(|secret| secret.len() == twins.secrets[0].len()), "twins are as long");
    twins
}

fn texts(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

/// A wish for a token of somebody in a workspace.
fn of(workspace: &str, principal: &str, scopes: &[&str]) -> proto::CreateTokenRequest {
    proto::CreateTokenRequest { workspace: workspace.to_owned(), principal: principal.to_owned(), ..new_token("", scopes) }
}

fn seconds(seconds: i64) -> Option<Lifetime> {
    Some(Lifetime::Ttl(prost_types::Duration { seconds, nanos: 0 }))
}

/// Those who ask. The first may ask about tokens of its workspace.
async fn callers(root: &Actor) -> Vec<Twins> {
    let gateway = || of("default", "gateway", &["keyward:validate"]);
    let mut callers = Vec::new();
    for (name, wish) in [
        ("gateway", gateway()),
        ("gateway-of-all", of("default", "gateway", &["keyward:validate-any", "a:b"])),
        ("admin", of("default", "gateway", &["keyward:admin"])),
        ("root", of("default", "gateway", &["keyward:root"])),
        ("gateway-elsewhere", of("other", "gateway", &["keyward:validate"])),
        ("admin-elsewhere", of("other", "gateway", &["keyward:admin"])),
        ("member", of("default", "gateway", &["keyward:self", "*"])),
        ("nobody", of("default", "gateway", &[])),
        ("gateway-from-here", proto::CreateTokenRequest { allowed_cidrs: texts(&["127.0.0.0/8"]), ..gateway() }),
        ("gateway-from-afar", proto::CreateTokenRequest { allowed_cidrs: texts(&["10.0.0.0/8"]), ..gateway() }),
        ("gateway-at-billing", proto::CreateTokenRequest { audiences: texts(&["billing"]), ..gateway() }),
        ("gateway-expired", proto::CreateTokenRequest { lifetime: seconds(1), ..gateway() }),
        ("gateway-revoked", gateway()),
        ("gateway-inactive", gateway()),
        ("gateway-suspended", of("default", "bad", &["keyward:validate"])),
        ("gateway-of-closed", of("closed", "gateway", &["keyward:validate"])),
    ] {
        callers.push(triple(root, name, wish).await);
    }
    callers
}

/// Those who are asked about. The first is good and plain.
async fn tokens(root: &Actor) -> Vec<Twins> {
    let alice = |scopes: &[&str]| of("default", "alice", scopes);
    let many: Vec<String> = (0..60).map(|number| format!("s{number}:read")).chain(["agents:*".to_owned()]).collect();
    let metadata = (0..20).map(|number| (format!("key-{number}"), format!("wert-ü-{number}"))).collect();
    let temporary =
        proto::CreateTokenRequest { kind: proto::TokenKind::Temporary.into(), session_id: "session".to_owned(), ..alice(&["agents:list"]) };
    let mut tokens = Vec::new();
    for (name, wish) in [
        ("plain", alice(&["agents:list"])),
        ("scopeless", alice(&[])),
        ("many-scopes", proto::CreateTokenRequest { scopes: many.clone(), ..alice(&[]) }),
        ("star", alice(&["*"])),
        ("audiences", proto::CreateTokenRequest { audiences: texts(&["billing", "search"]), ..alice(&["agents:*"]) }),
        ("metadata", proto::CreateTokenRequest { metadata, ..alice(&["agents:list"]) }),
        ("expiring", proto::CreateTokenRequest { lifetime: seconds(3_600), ..alice(&["agents:list"]) }),
        ("for-ever", proto::CreateTokenRequest { lifetime: Some(Lifetime::Never(true)), ..alice(&["agents:list"]) }),
        ("ranges", proto::CreateTokenRequest { allowed_cidrs: texts(&["10.0.0.0/8", "2001:db8::/32"]), ..alice(&["agents:list"]) }),
        ("session", temporary),
        ("root", alice(&["keyward:root"])),
        ("expired", proto::CreateTokenRequest { lifetime: seconds(1), ..alice(&["agents:list"]) }),
        ("revoked", alice(&["agents:list"])),
        ("inactive", alice(&["agents:list"])),
        ("deleted", alice(&["agents:list"])),
        ("suspended", of("default", "bad", &["agents:list"])),
        ("replaced", alice(&["agents:list"])),
        ("in-grace", alice(&["agents:list"])),
        ("elsewhere", of("other", "alice", &["agents:list"])),
        ("elsewhere-revoked", of("other", "alice", &["agents:list"])),
        ("closed", of("closed", "alice", &["agents:list"])),
    ] {
        tokens.push(triple(root, name, wish).await);
    }
    tokens
}

/// The cast, with all that has happened to it.
async fn cast(world: &World) -> Cast {
    let root = world.root().await;
    world.relax().await;
    for (id, prefix) in [("other", "ot"), ("closed", "cl")] {
        world.add_workspace(id, prefix).await;
    }
    let operations = [("list", "GET", ""), ("create", "POST", ""), ("read", "GET", "/{id}")].map(|(operation, method, path)| {
        proto::Operation { operation: operation.to_owned(), method: method.to_owned(), path: path.to_owned() }
    });
    let resource = proto::Resource { resource: "agents".to_owned(), endpoint: "/api/agents".to_owned(), operations: operations.to_vec() };
    let routes = proto::Workspace { id: "default".to_owned(), resources: vec![resource], ..Default::default() };
    root.update_workspace(routes, &["resources"]).await.expect("changed");

    let mut cast = Cast { callers: callers(&root).await, tokens: tokens(&root).await };
    let mut regenerated = Vec::new();
    for twins in cast.callers.iter().chain(&cast.tokens) {
        let mut anew = Twins { name: "regenerated", ids: twins.ids.clone(), secrets: Default::default() };
        for (id, secret) in twins.ids.iter().zip(&mut anew.secrets) {
            match twins.name {
                "gateway-revoked" | "revoked" | "elsewhere-revoked" => drop(root.revoke(id).await.expect("done")),
                "gateway-inactive" | "inactive" => drop(root.deactivate(id).await.expect("done")),
                "deleted" => root.delete(id).await.expect("done"),
                "replaced" => *secret = root.regenerate(id, 0).await.expect("done").secret,
                "in-grace" => *secret = root.regenerate(id, 3_600).await.expect("done").secret,
                _ => {}
            }
        }
        if !anew.secrets[0].is_empty() {
            regenerated.push(anew);
        }
    }
    cast.tokens.extend(regenerated);
    root.suspend_principal("default", "bad").await.expect("done");
    root.suspend_workspace("closed").await.expect("done");
    world.advance(Duration::from_secs(2));
    cast
}

/// What was counted of questions so far.
async fn counted(world: &World) -> BTreeMap<String, u64> {
    let page = world.metrics().await;
    let ours = |line: &&str| {
        line.starts_with("keyward_verdicts_total")
            || line.starts_with("keyward_requests_total{method=\"unknown")
            || line.starts_with("keyward_requests_total{method=\"keyward.v1.ValidationService/")
            || line.starts_with("keyward_requests_total{method=\"envoy.")
    };
    let numbers = page.lines().filter(ours).filter_map(|line| line.rsplit_once(' '));
    numbers.map(|(name, number)| (name.to_owned(), number.parse().expect("a number"))).collect()
}

/// Forgets what is known of the tokens, as every change of a workspace does.
async fn forget(root: &Actor, number: u64) {
    for id in ["default", "other"] {
        let workspace = proto::Workspace { id: id.to_owned(), display_name: format!("round {number}"), ..Default::default() };
        root.update_workspace(workspace, &["display_name"]).await.expect("changed");
    }
}

async fn both_ways_give_the_same_answer(mut world: World) {
    let rounds = number_from("KEYWARD_TEST_ROUNDS").unwrap_or(ROUNDS);
    let seed =
        number_from("KEYWARD_TEST_SEED").unwrap_or_else(|| u64::from(u32::from_ne_bytes(keyward::ambient::random().expect("randomness"))));
    println!("KEYWARD_TEST_SEED={seed}");
    let (cast, root) = (cast(&world).await, world.root().await);
    let (mut failures, mut codes) = (Vec::new(), BTreeMap::new());
    for begin in (0..rounds).step_by(CHUNK as usize) {
        let seeds: Vec<u64> = (begin..rounds.min(begin + CHUNK)).map(|round| seed.wrapping_add(round)).collect();
        let mut answers: [Vec<[Seen; 2]>; 2] = Default::default();
        let mut counts = Vec::new();
        for (content_type, twin) in WAYS {
            let (mut line, before) = (Line { world: &world, client: None }, counted(&world).await);
            for seed in &seeds {
                let sent = shapes::request(*seed, &cast, twin);
                if seed % 8 == 0 {
                    forget(&root, *seed).await;
                }
                // The first may find nothing in memory, the second finds what the first left there.
                answers[twin].push([line.send(&sent, content_type).await, line.send(&sent, content_type).await]);
            }
            let after = counted(&world).await;
            counts.push(after.into_iter().map(|(name, number)| (name.clone(), number - before[&name])).collect::<BTreeMap<_, _>>());
        }
        for (name, ahead) in &counts[0] {
            let generated = counts[1][name];
            if *ahead != generated {
                failures
                    .insert(0, format!("of the seeds {} to {}, {name} counts {ahead} and {generated}", seeds[0], seeds[seeds.len() - 1]));
            }
        }
        let [ahead, generated] = answers;
        for ((seed, ahead), generated) in seeds.iter().zip(ahead).zip(generated) {
            for ((state, one), two) in ["the first time", "again"].into_iter().zip(ahead).zip(generated) {
                *codes.entry(code(&two)).or_insert(0) += 1;
                let differences = one.differences(&Seen { body: as_the_first(two.body.clone(), &cast), ..two });
                if !differences.is_empty() {
                    let shape = shapes::request(*seed, &cast, 0).shape;
                    failures.push(format!(
                        "KEYWARD_TEST_SEED={seed} KEYWARD_TEST_ROUNDS=1: {shape}\n    {state}: {}",
                        differences.join("\n    ")
                    ));
                    break;
                }
            }
        }
    }
    println!("answers by their code: {codes:?}");
    // A clean stop writes every use that was counted.
    world.restart().await;
    let root = world.root().await;
    for Twins { name, ids, .. } in cast.callers.iter().chain(&cast.tokens) {
        let mut uses = Vec::new();
        for id in &ids[..SHARED] {
            // The clock stands still: which of the addresses at one instant is the last is not said.
            uses.push(root.get(id).await.ok().map(|token| (token.use_count, token.last_used_time)));
        }
        if uses[0] != uses[1] {
            failures.insert(0, format!("uses of {name}: {:?} and {:?}", uses[0], uses[1]));
        }
    }
    let shown = failures.iter().take(20).cloned().collect::<Vec<_>>().join("\n");
    assert!(failures.is_empty(), "{} differences; ahead of the framework and by its handlers:\n{shown}", failures.len());
    assert!(rounds < ROUNDS || codes.len() > 5, "the requests are too much alike: {codes:?}");
}

/// The whole message is there, but not the end of the request: more may come.
async fn a_request_that_never_ends_is_not_answered_early(world: World) {
    let cast = cast(&world).await;
    let mut answers = Vec::new();
    for (content_type, twin) in WAYS {
        let (caller, token) = (world.bearer(&cast.callers[0].secrets[twin]).await, cast.tokens[0].secrets[twin].clone());
        // What is not in memory goes the long way for that alone.
        caller.verdict(&token).await;
        let (client, connection) = raw(&world).await;
        tokio::spawn(connection);
        // The head may come without the message; not each time.
        for _ in 0..5 {
            let mut request = crate::limits::head(&caller, "/keyward.v1.ValidationService/ValidateToken");
            request.headers_mut().insert("content-type", content_type.parse().expect("a header value"));
            let (response, mut stream) = client.clone().ready().await.expect("ready").send_request(request, false).expect("sent");
            let message = proto::ValidateTokenRequest { token: token.clone(), ..Default::default() };
            stream.send_data(crate::limits::frame(&message), false).expect("sent");
            answers.push(tokio::spawn(async move {
                let seen = timeout(Duration::from_secs(30), seen(response)).await.expect("an end");
                drop(stream);
                seen
            }));
        }
    }
    let generated = answers.pop().expect("one").await.expect("no panic");
    assert_eq!(code(&generated), "4");
    for ended in answers {
        assert_eq!(ended.await.expect("no panic").differences(&generated), Vec::<String>::new());
    }
}

/// What a plain question costs hangs on this: a call that goes to the handlers takes a place among the calls that are under way, and here there is none left.
#[test]
fn plain_questions_never_reach_the_handlers() {
    world::runtime().block_on(async {
        let Some((mut world, proxy)) = world_behind_proxy().await else { return };
        let (slow, slow_secret) = world.admin().await.issue("slow", &[]).await;
        let (_, other) = world.admin().await.issue("other", &[]).await;
        let (_, known) = world.admin().await.issue("known", &[]).await;
        let validator = world.validator().await.token.expect("a token");
        world.limits.data_calls_max = 1;
        world.restart().await;
        let validator = world.bearer(&validator).await;
        assert_eq!(validator.verdict(&known).await, Verdict::Valid, "it is in memory now");
        proxy.hold_after(world.db_digest(&slow.id).await);
        let holder = tokio::spawn({
            let validator = validator.clone();
            async move { validator.verdict(&slow_secret).await }
        });
        eventually("the one place is taken", async || proxy.is_holding().then_some(())).await;
        let question = proto::ValidateTokenRequest { token: known.clone(), peek: true, ..Default::default() };
        let batch = proto::BatchValidateTokensRequest { requests: vec![question.clone(); 100] };
        let bearer = format!("Bearer {known}");
        // A message may come later than its head, and then goes to the handlers.
        let one = eventually("a question is answered", async || validator.ask(question.clone()).await.ok()).await;
        let many = eventually("a batch is answered", async || {
            validator.validation().batch_validate_tokens(validator.request(batch.clone())).await.ok()
        });
        let many = many.await.into_inner();
        let check = eventually("an Envoy is answered", async || {
            check(&validator, &[("authorization", &bearer)], &[("required_scopes", "")]).await.ok()
        });
        assert_eq!((one.verdict(), many.responses.len(), http_status(&check.await)), (Verdict::Valid, 100, 200));
        let asked = proto::ValidateTokenRequest { token: other, ..Default::default() };
        assert_eq!(validator.ask(asked).await.expect_err("it is not in memory").code(), Code::ResourceExhausted);
        assert!(!holder.is_finished(), "the place was taken all the time");
        proxy.release();
        assert_eq!(holder.await.expect("no panic"), Verdict::Valid);
    });
}
