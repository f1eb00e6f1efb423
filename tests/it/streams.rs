//! `StreamValidateTokens`: many questions on one stream that is held open, as a gateway asks them, and as no gRPC library would.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::{Buf as _, Bytes, BytesMut};
use http::HeaderMap;
use keyward::proto::{self, Verdict, create_token_request::Lifetime, stream_validate_tokens_response::Result as Kind};
use prost_reflect::prost::Message as _;
use tokio::time::timeout;
use tonic::{Code, Status};
use tonic_types::{StatusExt as _, pb};

use crate::{
    limits::{frame, head, raw},
    validation::world_behind_proxy,
    world::{Actor, World, eventually, new_token, runtime},
};

crate::on_both_databases!(
    answers_come_in_order_and_a_bad_message_ends_nothing,
    a_revoked_caller_ends_the_stream_with_its_next_message,
    a_token_revoked_in_mid_stream_is_refused_from_the_next_message_on,
    any_grpc_library_can_hold_a_stream,
    messages_come_in_any_pieces,
    what_is_no_message_ends_the_stream_after_what_came_before,
    half_a_message_and_silence_end_the_stream,
    who_does_not_read_is_not_read_either,
    streams_end_after_silence_and_with_age,
    the_callers_own_time_ends_a_stream,
    a_drain_ends_streams_at_once,
    open_streams_are_bounded_and_counted,
);

const PATH: &str = "/keyward.v1.ValidationService/StreamValidateTokens";

/// A stream, and all that keeps it open.
struct Held {
    questions: h2::SendStream<Bytes>,
    answers: Answers,
}

/// What comes back on a stream.
struct Answers {
    body: h2::RecvStream,
    buffer: BytesMut,
    frames: usize,
}

impl Held {
    async fn open(world: &World, actor: &Actor) -> Self {
        Self::open_with(world, actor, HeaderMap::new()).await.expect("it opens")
    }

    /// With more headers; or the status that it is refused with.
    async fn open_with(world: &World, actor: &Actor, headers: HeaderMap) -> Result<Self, Status> {
        let (client, connection) = raw(world).await;
        tokio::spawn(connection);
        let mut request = head(actor, PATH);
        request.headers_mut().extend(headers);
        let mut client = client.ready().await.expect("ready");
        let (response, questions) = client.send_request(request, false).expect("sent");
        // Before a byte of a message: libraries wait for the head.
        let response = timeout(Duration::from_secs(10), response).await.expect("in time").expect("answered");
        match Status::from_header_map(response.headers()) {
            Some(status) => Err(status),
            None => Ok(Self { questions, answers: Answers { body: response.into_body(), buffer: BytesMut::new(), frames: 0 } }),
        }
    }

    fn send(&mut self, bytes: impl Into<Bytes>) {
        self.questions.send_data(bytes.into(), false).expect("sent");
    }

    fn ask(&mut self, message: &proto::ValidateTokenRequest) {
        self.send(frame(message));
    }

    fn end(&mut self) {
        self.questions.send_data(Bytes::new(), true).expect("sent");
    }

    async fn verdict(&mut self, secret: &str) -> Verdict {
        self.ask(&peek(secret));
        self.answers.next().await.expect("an answer").expect("judged").verdict()
    }
}

impl Answers {
    /// The next result; nothing at the end.
    async fn next(&mut self) -> Option<Result<proto::ValidateTokenResponse, pb::Status>> {
        loop {
            if self.buffer.len() >= 5 {
                let length = u32::from_be_bytes(self.buffer[1..5].try_into().expect("four")) as usize;
                if self.buffer.len() >= 5 + length {
                    assert_eq!(self.buffer[0], 0, "not compressed");
                    self.buffer.advance(5);
                    let message = self.buffer.split_to(length);
                    let response = proto::StreamValidateTokensResponse::decode(&message[..]).expect("a result");
                    return Some(match response.result.expect("one of two") {
                        Kind::Answer(answer) => Ok(answer),
                        Kind::Error(status) => Err(status),
                    });
                }
            }
            let Some(data) = timeout(Duration::from_secs(30), self.body.data()).await.expect("in time") else {
                assert!(self.buffer.is_empty(), "half an answer");
                return None;
            };
            let data = data.expect("whole");
            self.frames += 1;
            self.body.flow_control().release_capacity(data.len()).expect("taken");
            self.buffer.extend_from_slice(&data);
        }
    }

    /// What the stream ended with, when there is nothing left to read.
    async fn status(&mut self) -> Status {
        let left = self.next().await;
        assert!(left.is_none(), "one more result: {left:?}");
        let trailers = timeout(Duration::from_secs(10), self.body.trailers()).await.expect("in time").expect("whole").expect("trailers");
        Status::from_header_map(&trailers).expect("a status")
    }
}

fn question(secret: &str) -> proto::ValidateTokenRequest {
    proto::ValidateTokenRequest { token: secret.to_owned(), ..Default::default() }
}

fn peek(secret: &str) -> proto::ValidateTokenRequest {
    proto::ValidateTokenRequest { peek: true, ..question(secret) }
}

fn raw_frame(message: &[u8]) -> Vec<u8> {
    [&[0][..], &u32::try_from(message.len()).expect("small").to_be_bytes(), message].concat()
}

fn reason(status: &Status) -> String {
    status.get_details_error_info().expect("ErrorInfo").reason
}

/// What `ValidateToken` says to the same message, as a stream would put it.
async fn said_to_one(actor: &Actor, message: proto::ValidateTokenRequest) -> Result<proto::ValidateTokenResponse, pb::Status> {
    actor.ask(message).await.map_err(|status| pb::Status::decode(status.details()).expect("details"))
}

async fn answers_come_in_order_and_a_bad_message_ends_nothing(world: World) {
    const MESSAGES: usize = 10_000;
    world.relax().await;
    let (admin, validator) = (world.admin().await, world.validator().await);
    let lifetime = Some(Lifetime::Ttl(prost_types::Duration { seconds: 1, nanos: 0 }));
    let expired = admin.create(proto::CreateTokenRequest { lifetime, ..new_token("brief", &[]) }).await.expect("created").secret;
    world.advance(Duration::from_secs(2));
    let mut tokens = Vec::new();
    for number in 0..20 {
        tokens.push(admin.issue(&format!("t{number}"), &["a:b"]).await);
    }
    let mut kinds: Vec<proto::ValidateTokenRequest> = tokens.iter().map(|(_, secret)| question(secret)).collect();
    kinds.extend([
        question("invented"),
        question(""),
        question(&expired),
        proto::ValidateTokenRequest { client_ip: "nowhere".to_owned(), ..question(&tokens[0].1) },
        proto::ValidateTokenRequest { required_scopes: vec!["a:*".to_owned(), "a:b".to_owned()], path: "/".to_owned(), ..question("x") },
        proto::ValidateTokenRequest { required_scopes: vec!["b:c".to_owned()], ..question(&tokens[1].1) },
        peek(&tokens[2].1),
    ]);
    let mut expected = Vec::new();
    for kind in &kinds {
        expected.push(said_to_one(&validator, proto::ValidateTokenRequest { peek: true, ..kind.clone() }).await);
    }
    let malformed = kinds.len();
    let mut held = Held::open(&world, &validator).await;
    let order: Vec<usize> = (0..MESSAGES).map(|number| number * 7919 % (kinds.len() + 1)).collect();
    for chunk in order.chunks(333) {
        let frames = chunk.iter().map(|kind| kinds.get(*kind).map_or_else(|| raw_frame(b"\xff\xff\xff"), |kind| frame(kind).to_vec()));
        held.send(frames.collect::<Vec<_>>().concat());
    }
    held.end();
    for (place, kind) in order.iter().enumerate() {
        let result = held.answers.next().await.unwrap_or_else(|| panic!("no result {place}"));
        if *kind == malformed {
            let status = result.expect_err("no message");
            assert_eq!(status.code, 3, "{status:?}");
            let whole = Status::with_details(Code::InvalidArgument, &*status.message, status.encode_to_vec().into());
            assert_eq!(reason(&whole), "MALFORMED_MESSAGE");
        } else {
            assert_eq!(result, expected[*kind], "result {place}, of kind {kind}");
        }
    }
    let status = held.answers.status().await;
    assert_eq!(status.code(), Code::Ok, "{status:?}");
    for (number, (token, _)) in tokens.iter().enumerate() {
        let used = order.iter().filter(|kind| **kind == number).count();
        eventually("uses are counted", async || (admin.get(&token.id).await.expect("known").use_count == used as i64).then_some(())).await;
    }
}

async fn a_revoked_caller_ends_the_stream_with_its_next_message(world: World) {
    let (root, admin) = (world.root().await, world.admin().await);
    let (_, secret) = admin.issue("t", &[]).await;
    let (revoked, weakened) = (world.validator().await, world.actor("gateway2", &["keyward:validate"]).await);
    let mut held = Held::open(&world, &revoked).await;
    assert_eq!(held.verdict(&secret).await, Verdict::Valid);
    root.revoke(&revoked.own_id().await).await.expect("done");
    held.ask(&question(&secret));
    assert_eq!(held.answers.status().await.code(), Code::Unauthenticated);

    let mut held = Held::open(&world, &weakened).await;
    assert_eq!(held.verdict(&secret).await, Verdict::Valid);
    let change = proto::Token { id: weakened.own_id().await, scopes: vec!["a:b".to_owned()], ..Default::default() };
    root.update(change, &["scopes"]).await.expect("changed");
    held.ask(&question(&secret));
    assert_eq!(held.answers.status().await.code(), Code::PermissionDenied);
    let refused = Held::open_with(&world, &weakened, HeaderMap::new()).await.err().expect("refused");
    assert_eq!(refused.code(), Code::PermissionDenied);
}

async fn a_token_revoked_in_mid_stream_is_refused_from_the_next_message_on(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let mut held = Held::open(&world, &validator).await;
    for _ in 0..20 {
        let (token, secret) = admin.issue("t", &[]).await;
        assert_eq!(held.verdict(&secret).await, Verdict::Valid);
        admin.revoke(&token.id).await.expect("done");
        assert_eq!(held.verdict(&secret).await, Verdict::Revoked);
    }
}

async fn any_grpc_library_can_hold_a_stream(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let (_, secret) = admin.issue("t", &[]).await;
    let (ask, questions) = tokio::sync::mpsc::channel(8);
    let request = validator.request(Questions(questions));
    let mut answers = validator.validation().stream_validate_tokens(request).await.expect("it opens").into_inner();
    for (asked, verdict) in [(&*secret, Verdict::Valid), ("invented", Verdict::Unknown), (&*secret, Verdict::Valid)] {
        ask.send(peek(asked)).await.expect("taken");
        let response = answers.message().await.expect("open").expect("a result");
        let Some(Kind::Answer(answer)) = response.result else { panic!("{response:?}") };
        assert_eq!(answer.verdict(), verdict);
    }
    drop(ask);
    assert!(answers.message().await.expect("OK").is_none());
}

/// A channel as a stream.
struct Questions(tokio::sync::mpsc::Receiver<proto::ValidateTokenRequest>);

impl tonic::codegen::tokio_stream::Stream for Questions {
    type Item = proto::ValidateTokenRequest;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context)
    }
}

async fn messages_come_in_any_pieces(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let (_, secret) = admin.issue("t", &[]).await;
    let two = [frame(&peek(&secret)).to_vec(), frame(&peek("invented")).to_vec()].concat();
    let mut held = Held::open(&world, &validator).await;
    for border in 0..=two.len() {
        held.send(two[..border].to_vec());
        tokio::task::yield_now().await;
        held.send(two[border..].to_vec());
        assert_eq!(held.answers.next().await.expect("a result").expect("judged").verdict(), Verdict::Valid);
        assert_eq!(held.answers.next().await.expect("a result").expect("judged").verdict(), Verdict::Unknown);
    }
    for byte in &two {
        held.send(vec![*byte]);
    }
    // An empty message is one, too.
    held.send(raw_frame(b""));
    held.send(two.repeat(1000));
    held.end();
    let before = held.answers.frames;
    let mut verdicts = Vec::new();
    while let Some(result) = held.answers.next().await {
        verdicts.push(result.expect("judged").verdict());
    }
    assert_eq!(verdicts.len(), 2 + 1 + 2000);
    assert!(held.answers.frames - before < 200, "{} frames: answers of a group go together", held.answers.frames - before);
    assert_eq!(verdicts[..3], [Verdict::Valid, Verdict::Unknown, Verdict::Unknown]);
    assert!(verdicts[3..].chunks(2).all(|pair| pair == [Verdict::Valid, Verdict::Unknown]));
    assert_eq!(held.answers.status().await.code(), Code::Ok);
}

async fn what_is_no_message_ends_the_stream_after_what_came_before(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let (_, secret) = admin.issue("t", &[]).await;
    let good = frame(&peek(&secret)).to_vec();
    let long = |bytes: usize| frame(&question(&"x".repeat(bytes))).to_vec();
    for (bad, code, why, ends) in [
        (vec![0, 0, 0, 0x40, 1], Code::ResourceExhausted, "MESSAGE_TOO_LARGE", false),
        (long(20_000), Code::ResourceExhausted, "MESSAGE_TOO_LARGE", false),
        (vec![1, 0, 0, 0, 0], Code::Internal, "PROTOCOL_ERROR", false),
        (vec![2, 0, 0, 0, 0], Code::Internal, "PROTOCOL_ERROR", false),
        (good[..good.len() - 1].to_vec(), Code::Internal, "PROTOCOL_ERROR", true),
        (vec![0], Code::Internal, "PROTOCOL_ERROR", true),
    ] {
        let mut held = Held::open(&world, &validator).await;
        held.send([good.clone(), good.clone(), bad.clone(), if ends { Vec::new() } else { good.clone() }].concat());
        if ends {
            held.end();
        }
        for _ in 0..2 {
            assert_eq!(held.answers.next().await.expect("a result").expect("judged").verdict(), Verdict::Valid);
        }
        let status = held.answers.status().await;
        assert_eq!((status.code(), &*reason(&status)), (code, why), "{bad:?}");
    }
    let mut held = Held::open(&world, &validator).await;
    held.send(long(16 * 1024 - 10));
    assert_eq!(held.answers.next().await.expect("a result").expect("judged").verdict(), Verdict::Unknown);
    let compressed = HeaderMap::from_iter([(http::HeaderName::from_static("grpc-encoding"), http::HeaderValue::from_static("gzip"))]);
    let refused = Held::open_with(&world, &validator, compressed).await.err().expect("refused");
    assert_eq!((refused.code(), &*reason(&refused)), (Code::Unimplemented, "UNSUPPORTED"));
}

async fn half_a_message_and_silence_end_the_stream(world: World) {
    let validator = world.validator().await;
    let mut held = Held::open(&world, &validator).await;
    assert_eq!(held.verdict("invented").await, Verdict::Unknown);
    let begin = Instant::now();
    let whole = frame(&peek("invented"));
    held.send([&whole[..], &whole[..6]].concat());
    assert_eq!(held.answers.next().await.expect("a result").expect("judged").verdict(), Verdict::Unknown);
    tokio::time::sleep(Duration::from_secs(2)).await;
    held.send(whole.slice(6..7));
    assert_eq!(held.answers.status().await.code(), Code::DeadlineExceeded);
    assert!((4..9).contains(&begin.elapsed().as_secs()), "{:?}", begin.elapsed());
}

/// What waits in the server while its answers are not taken does not grow with what is sent.
async fn who_does_not_read_is_not_read_either(world: World) {
    const MESSAGES: usize = 60_000;
    let (admin, validator) = (world.admin().await, world.validator().await);
    let mut tokens = Vec::new();
    for number in 0..3 {
        tokens.push(admin.issue(&format!("t{number}"), &[]).await);
    }
    let mut held = Held::open(&world, &validator).await;
    // Larger than what is kept of it: bounds on bytes count, too.
    let messages: Vec<Bytes> = tokens
        .iter()
        .map(|(_, secret)| frame(&proto::ValidateTokenRequest { required_scopes: vec!["a:b".to_owned(); 40], ..peek(secret) }))
        .collect();
    for number in 0..MESSAGES {
        held.send(messages[number % 3].clone());
    }
    held.end();
    let judged = async || world.metric("keyward_verdicts_total{verdict=\"INSUFFICIENT_SCOPE\"}").await;
    let mut before = -1.0;
    let stopped = eventually("the server stops to read", async || {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = judged().await;
        let stopped = now == before && now > 0.0;
        before = now;
        stopped.then_some(now)
    })
    .await;
    assert!(stopped < 3_000.0, "{stopped} of {MESSAGES} were judged for nobody");
    assert_eq!(validator.verdict("invented").await, Verdict::Unknown, "others are not disturbed");
    for number in 0..MESSAGES {
        let answer = held.answers.next().await.expect("a result").expect("judged");
        assert_eq!(answer.token_id, tokens[number % 3].0.id, "result {number}");
    }
    assert_eq!(held.answers.status().await.code(), Code::Ok);
    assert_eq!(judged().await, MESSAGES as f64);
}

async fn streams_end_after_silence_and_with_age(mut world: World) {
    world.limits.stream_silence_max = Duration::from_millis(1500);
    world.limits.stream_age_max = Duration::from_secs(4);
    world.restart().await;
    let validator = world.validator().await;
    let begin = Instant::now();
    let (mut silent, mut busy) = (Held::open(&world, &validator).await, Held::open(&world, &validator).await);
    let silence = tokio::spawn(async move { (silent.answers.status().await, begin.elapsed()) });
    while begin.elapsed() < Duration::from_millis(3500) {
        assert_eq!(busy.verdict("invented").await, Verdict::Unknown);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (status, elapsed) = silence.await.expect("no panic");
    assert_eq!((status.code(), &*reason(&status)), (Code::Unavailable, "STREAM_ENDED"), "{status:?}");
    assert!((1500..3000).contains(&elapsed.as_millis()), "{elapsed:?}");
    let status = busy.answers.status().await;
    assert_eq!((status.code(), &*reason(&status)), (Code::Unavailable, "STREAM_ENDED"), "{status:?}");
    assert!((4000..6000).contains(&begin.elapsed().as_millis()), "{:?}", begin.elapsed());
}

async fn the_callers_own_time_ends_a_stream(world: World) {
    let validator = world.validator().await;
    let timeout = |value: &'static str| {
        HeaderMap::from_iter([(http::HeaderName::from_static("grpc-timeout"), http::HeaderValue::from_static(value))])
    };
    let begin = Instant::now();
    let mut held = Held::open_with(&world, &validator, timeout("700m")).await.expect("it opens");
    assert_eq!(held.verdict("invented").await, Verdict::Unknown);
    assert_eq!(held.answers.status().await.code(), Code::DeadlineExceeded);
    assert!((700..3000).contains(&begin.elapsed().as_millis()), "{:?}", begin.elapsed());
    for (value, code) in [("0n", Code::DeadlineExceeded), ("soon", Code::InvalidArgument)] {
        assert_eq!(Held::open_with(&world, &validator, timeout(value)).await.err().expect("refused").code(), code);
    }
}

async fn a_drain_ends_streams_at_once(mut world: World) {
    let validator = world.validator().await;
    let (mut silent, mut busy) = (Held::open(&world, &validator).await, Held::open(&world, &validator).await);
    assert_eq!(busy.verdict("invented").await, Verdict::Unknown);
    drop(validator);
    let begin = Instant::now();
    let stopping = tokio::spawn(world.take_server().stop());
    for held in [&mut silent, &mut busy] {
        let status = held.answers.status().await;
        assert_eq!((status.code(), &*reason(&status)), (Code::Unavailable, "STREAM_ENDED"), "{status:?}");
    }
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    drop((silent, busy));
    stopping.await.expect("no panic").expect("a clean stop");
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
}

async fn open_streams_are_bounded_and_counted(mut world: World) {
    world.limits.streams_max = 2;
    world.restart().await;
    let validator = world.validator().await;
    let count = async |code: &str| {
        let page = world.metrics().await;
        let name = format!("keyward_requests_total{{method=\"{}\",code=\"{code}\"}}", PATH.trim_start_matches('/'));
        page.lines().find_map(|line| line.strip_prefix(&name)?.trim().parse::<u64>().ok()).expect("counted")
    };
    let (mut first, second) = (Held::open(&world, &validator).await, Held::open(&world, &validator).await);
    let refused = Held::open_with(&world, &validator, HeaderMap::new()).await.err().expect("full");
    assert_eq!((refused.code(), &*reason(&refused)), (Code::ResourceExhausted, "OVERLOADED"));
    assert_eq!((count("OK").await, count("RESOURCE_EXHAUSTED").await), (0, 1));
    drop(second);
    eventually("its place is free", async || (count("CANCELLED").await == 1).then_some(())).await;
    let _third = Held::open(&world, &validator).await;
    assert_eq!(first.verdict("invented").await, Verdict::Unknown);
    first.end();
    assert_eq!(first.answers.status().await.code(), Code::Ok);
    eventually("it is counted", async || (count("OK").await == 1).then_some(())).await;
    let unauthenticated = Held::open_with(&world, &world.stranger().await, HeaderMap::new()).await.err().expect("refused");
    assert_eq!(unauthenticated.code(), Code::Unauthenticated);
    assert_eq!(count("UNAUTHENTICATED").await, 1);
}

/// Longer than a drain waits for connections on which nothing is under way.
#[test]
fn a_drain_answers_the_group_that_is_under_way() {
    runtime().block_on(async {
        let Some((mut world, proxy)) = world_behind_proxy().await else { return };
        let (admin, validator) = (world.admin().await, world.validator().await);
        let (token, secret) = admin.issue("t", &[]).await;
        let mut held = Held::open(&world, &validator).await;
        assert_eq!(held.verdict("invented").await, Verdict::Unknown);
        proxy.hold_after(world.db_digest(&token.id).await);
        held.ask(&peek(&secret));
        eventually("the look-up is in the air", async || proxy.is_holding().then_some(())).await;
        let stopping = tokio::spawn(world.take_server().stop());
        tokio::time::sleep(Duration::from_millis(2500)).await;
        held.ask(&peek(&secret));
        proxy.release();
        assert_eq!(held.answers.next().await.expect("a result").expect("judged").verdict(), Verdict::Valid);
        let status = held.answers.status().await;
        assert_eq!(reason(&status), "STREAM_ENDED", "what comes after the wish to stop is asked elsewhere");
        stopping.await.expect("no panic").expect("a clean stop");
    });
}

/// Each message is told what becomes of it; those that memory knows are judged on.
#[test]
fn a_lost_database_is_told_by_message() {
    runtime().block_on(async {
        let Some((world, proxy)) = world_behind_proxy().await else { return };
        let (admin, validator) = (world.admin().await, world.validator().await);
        let (token, known) = admin.issue("known", &[]).await;
        let (_, unknown) = admin.issue("unknown", &[]).await;
        let mut held = Held::open(&world, &validator).await;
        assert_eq!(held.verdict(&known).await, Verdict::Valid);
        proxy.cut();
        let group = [question(&known), question(&unknown), question("invented"), question(&known)];
        held.send(group.iter().map(|question| frame(question).to_vec()).collect::<Vec<_>>().concat());
        assert_eq!(held.answers.next().await.expect("a result").expect("known").verdict(), Verdict::Valid);
        let status = held.answers.next().await.expect("a result").expect_err("nobody knows");
        assert_eq!(Err(status), said_to_one(&validator, question(&unknown)).await, "as ValidateToken says it");
        assert_eq!(held.answers.next().await.expect("a result").expect("by form").verdict(), Verdict::Unknown);
        assert_eq!(held.answers.next().await.expect("a result").expect("known").verdict(), Verdict::Valid);
        proxy.heal();
        eventually("the database is back", async || admin.get(&token.id).await.ok()).await;
        assert_eq!(held.verdict(&unknown).await, Verdict::Valid, "the stream goes on");
        eventually("uses are counted once", async || (admin.get(&token.id).await.ok()?.use_count == 2).then_some(())).await;
    });
}
