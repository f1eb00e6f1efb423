//! What a hostile or broken client meets: limits on messages, streams, headers, silence; and the drain.

use std::time::{Duration, Instant};

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, Method, Request, StatusCode};
use keyward::proto::{self, Verdict};
use prost_reflect::prost::Message as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_types::StatusExt as _;

use crate::world::{Actor, World, eventually, new_token};

crate::on_sqlite!(
    messages_have_limits,
    silent_clients_are_cut,
    a_connection_carries_a_bounded_number_of_streams,
    resets_without_end_close_the_connection,
    large_headers_are_refused,
    health_tells_the_drain,
    a_drain_has_an_end,
    a_drain_finishes_what_is_under_way,
    a_revoked_caller_finishes_nothing,
    half_open_calls_keep_nobody_out,
    errors_fit_into_headers,
    other_protocols_do_no_harm,
    errors_of_the_framework_are_explained,
    reflection_serves_both_versions,
);

pub type RawClient = h2::client::SendRequest<Bytes>;

/// A connection on which a test does what no gRPC library would.
pub async fn raw(world: &World) -> (RawClient, tokio::task::JoinHandle<Result<(), h2::Error>>) {
    let stream = TcpStream::connect(world.server().address()).await.expect("a connection");
    stream.set_nodelay(true).expect("set");
    let (client, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
    (client, tokio::spawn(connection))
}

pub fn head(actor: &Actor, path: &str) -> Request<()> {
    let request = Request::builder().method(Method::POST).uri(format!("http://keyward{path}")).header("content-type", "application/grpc");
    let request = request.header("te", "trailers");
    let token = actor.token.as_deref().unwrap_or("none");
    request.header("authorization", format!("Bearer {token}")).body(()).expect("a request")
}

pub fn frame(message: &impl prost_reflect::prost::Message) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.encoded_len()).expect("small"));
    message.encode(&mut frame).expect("room");
    frame.freeze()
}

async fn messages_have_limits(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let ask = |bytes: usize| proto::ValidateTokenRequest { token: "x".repeat(bytes), ..Default::default() };
    assert_eq!(validator.ask(ask(16 * 1024 - 100)).await.expect("an answer").verdict(), Verdict::Unknown);
    for bytes in [16 * 1024 + 1, 900 * 1024, 4 << 20] {
        let status = validator.ask(ask(bytes)).await.expect_err("too large");
        assert_eq!(status.code(), Code::ResourceExhausted, "{bytes}: {status:?}");
        assert_eq!(status.get_details_error_info().expect("ErrorInfo").reason, "MESSAGE_TOO_LARGE");
    }
    for bytes in [64 * 1024, 4 << 20] {
        let status = admin.create(new_token(&"x".repeat(bytes), &[])).await.expect_err("too large");
        assert_eq!(status.get_details_error_info().expect("ErrorInfo").reason, "MESSAGE_TOO_LARGE", "{status:?}");
    }
    let batch = |count: usize, bytes: usize| proto::BatchValidateTokensRequest { requests: vec![ask(bytes); count] };
    let answers =
        validator.validation().batch_validate_tokens(validator.request(batch(1000, 900))).await.expect("below 1 MiB").into_inner();
    assert_eq!(answers.responses.len(), 1000);
    let status = validator.validation().batch_validate_tokens(validator.request(batch(1000, 1100))).await.expect_err("above 1 MiB");
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(validator.verdict("x").await, Verdict::Unknown, "the connection goes on");
}

async fn silent_clients_are_cut(world: World) {
    let begin = Instant::now();
    let mut silent = TcpStream::connect(world.server().address()).await.expect("a connection");
    let mut half = TcpStream::connect(world.server().address()).await.expect("a connection");
    let mut bytes = Vec::new();
    half.write_all(b"PRI * HTTP/2").await.expect("sent");
    let gone = timeout(Duration::from_secs(20), silent.read_to_end(&mut bytes)).await;
    assert!(gone.is_ok(), "still open after {:?}", begin.elapsed());
    assert!(begin.elapsed() >= Duration::from_secs(4), "it had its time");
    let gone = timeout(Duration::from_mins(1), half.read_to_end(&mut bytes)).await;
    assert!(gone.is_ok() && begin.elapsed() < Duration::from_secs(20), "half a greeting keeps a connection for {:?}", begin.elapsed());
}

async fn a_connection_carries_a_bounded_number_of_streams(world: World) {
    let validator = world.validator().await;
    let begun = async || world.metric("keyward_cache_hits_total").await + world.metric("keyward_cache_misses_total").await;
    let before = begun().await;
    let (client, connection) = raw(&world).await;
    let mut client = client.ready().await.expect("ready");
    let mut open = Vec::new();
    eventually("the server's settings have come", async || (client.current_max_send_streams() == 128).then_some(())).await;
    // Streams that never end: 128 are taken; what comes after them waits on the client's own side.
    for _ in 0..140 {
        client = client.ready().await.expect("open");
        let Ok((response, body)) = client.send_request(head(&validator, "/keyward.v1.ValidationService/ValidateToken"), false) else {
            break;
        };
        open.push((response, body));
        if open.len() > 128 {
            break;
        }
    }
    eventually("128 calls are under way", async || (begun().await >= before + 128.0).then_some(())).await;
    assert_eq!(begun().await, before + 128.0, "and no more");
    assert_eq!(validator.verdict("x").await, Verdict::Unknown, "others are not disturbed");
    connection.abort();
}

async fn resets_without_end_close_the_connection(world: World) {
    let validator = world.validator().await;
    let (mut client, connection) = raw(&world).await;
    let mut sent = 0;
    // CVE-2023-44487: streams are opened and reset at once.
    while sent < 20_000 {
        let Ok(ready) = client.ready().await else { break };
        client = ready;
        let Ok((_, mut body)) = client.send_request(head(&validator, "/keyward.v1.ValidationService/ValidateToken"), false) else { break };
        body.send_reset(h2::Reason::CANCEL);
        sent += 1;
        if sent % 64 == 0 {
            tokio::task::yield_now().await;
        }
    }
    let ended = timeout(Duration::from_secs(10), connection).await;
    assert!(sent < 20_000 || matches!(ended, Ok(Ok(Err(_)))), "20,000 resets went through unhindered");
    assert_eq!(validator.verdict("x").await, Verdict::Unknown, "others are not disturbed");
}

async fn large_headers_are_refused(world: World) {
    let validator = world.validator().await;
    for (bytes, refused) in [(4 * 1024, false), (60 * 1024, true)] {
        let (client, connection) = raw(&world).await;
        let mut request = head(&validator, "/keyward.v1.ValidationService/ValidateToken");
        request.headers_mut().insert("x-filler", "x".repeat(bytes).parse().expect("a header value"));
        let mut client = client.ready().await.expect("ready");
        let (response, mut body) = client.send_request(request, false).expect("sent");
        let message = proto::ValidateTokenRequest { token: "x".to_owned(), ..Default::default() };
        let _ = body.send_data(frame(&message), true);
        let answered = timeout(Duration::from_secs(10), response).await.expect("an end");
        let good = answered.as_ref().is_ok_and(|response| response.status() == StatusCode::OK);
        assert_eq!(good, !refused, "{bytes}: {answered:?}");
        connection.abort();
    }
    assert_eq!(validator.verdict("x").await, Verdict::Unknown);
}

async fn health(world: &World, service: &str) -> Result<ServingStatus, tonic::Status> {
    let request = HealthCheckRequest { service: service.to_owned() };
    Ok(HealthClient::new(world.channel().await).check(request).await?.into_inner().status())
}

async fn health_tells_the_drain(mut world: World) {
    for service in ["", "keyward.v1.TokenService", "keyward.v1.ValidationService", "keyward.v1.SelfService"] {
        assert_eq!(health(&world, service).await.expect("known"), ServingStatus::Serving, "{service}");
    }
    assert_eq!(health(&world, "keyward.v1.Nothing").await.expect_err("unknown").code(), Code::NotFound);
    let mut client = HealthClient::new(world.channel().await);
    let request = HealthCheckRequest { service: "keyward.v1.ValidationService".to_owned() };
    let mut watch = client.watch(request).await.expect("a stream").into_inner();
    assert_eq!(watch.message().await.expect("a message").expect("a status").status(), ServingStatus::Serving);
    let server = world.take_server();
    let stopping = tokio::spawn(server.stop());
    let told = timeout(Duration::from_secs(10), watch.message()).await.expect("in time").expect("a message").expect("a status");
    assert_eq!(told.status(), ServingStatus::NotServing);
    drop((watch, client));
    timeout(Duration::from_secs(26), stopping).await.expect("an end").expect("no panic").expect("a clean stop");
}

async fn a_drain_has_an_end(mut world: World) {
    let validator = world.validator().await;
    let address = world.server().address();
    // A stream that never ends, and a client that says nothing.
    let (client, _connection) = raw(&world).await;
    let mut client = client.ready().await.expect("ready");
    let _open = client.send_request(head(&validator, "/grpc.health.v1.Health/Watch"), false).expect("sent");
    let _silent = TcpStream::connect(address).await.expect("a connection");
    let begin = Instant::now();
    let server = world.take_server();
    timeout(Duration::from_secs(30), server.stop()).await.expect("an end within the limit").expect("a clean stop");
    assert!(begin.elapsed() < Duration::from_secs(26), "{:?}", begin.elapsed());
    assert!(TcpStream::connect(address).await.is_err(), "nobody listens any more");
}

async fn a_drain_finishes_what_is_under_way(mut world: World) {
    let validator = world.validator().await;
    let (client, _connection) = raw(&world).await;
    let mut client = client.ready().await.expect("ready");
    let (response, mut body) = client.send_request(head(&validator, "/keyward.v1.ValidationService/ValidateToken"), false).expect("sent");
    // The call has begun, but its message is not there yet.
    eventually("the call has begun", async || {
        (world.metric("keyward_cache_hits_total").await >= 1.0 || world.metric("keyward_cache_misses_total").await >= 1.0).then_some(())
    })
    .await;
    let server = world.take_server();
    let stopping = tokio::spawn(server.stop());
    let message = proto::ValidateTokenRequest { token: "x".to_owned(), ..Default::default() };
    body.send_data(frame(&message), true).expect("sent");
    let response = timeout(Duration::from_secs(10), response).await.expect("in time").expect("answered");
    let mut answer = response.into_body();
    let data = answer.data().await.expect("a message").expect("whole");
    assert_eq!(proto::ValidateTokenResponse::decode(&data[5..]).expect("an answer").verdict(), Verdict::Unknown);
    let trailers: HeaderMap = answer.trailers().await.expect("whole").expect("trailers");
    assert_eq!(trailers["grpc-status"], "0");
    timeout(Duration::from_secs(20), stopping).await.expect("an end").expect("no panic").expect("a clean stop");
}

/// The head of a call comes before its caller is revoked, the message after.
async fn a_revoked_caller_finishes_nothing(world: World) {
    let root = world.root().await;
    // What writes looks once more in its transaction; what reads hangs on this alone.
    for (path, message) in [
        ("/keyward.v1.TokenService/ListTokens", frame(&proto::ListTokensRequest::default())),
        ("/keyward.v1.TokenService/CreateToken", frame(&new_token("back door", &["keyward:admin"]))),
    ] {
        let admin = world.actor("admin", &["keyward:admin", "keyward:self"]).await;
        let id = admin.own_id().await;
        let (client, _connection) = raw(&world).await;
        let mut client = client.ready().await.expect("ready");
        let begun = async || world.metric("keyward_cache_hits_total").await;
        let before = begun().await;
        let (response, mut body) = client.send_request(head(&admin, path), false).expect("sent");
        eventually("the head has been judged", async || (begun().await > before).then_some(())).await;
        root.revoke(&id).await.expect("done");
        body.send_data(message, true).expect("sent");
        let response = timeout(Duration::from_secs(10), response).await.expect("in time").expect("answered");
        assert_eq!(response.headers()["grpc-status"], "16", "{path}: {response:?}");
    }
    assert_eq!(world.db_number("SELECT COUNT(*) FROM token WHERE display_name = 'back door'").await, 0);
}

/// More calls without a message than there are places, with and without credentials.
async fn half_open_calls_keep_nobody_out(world: World) {
    let (admin, weak) = (world.admin().await, world.actor("weak", &[]).await);
    let (token, _) = admin.issue("t", &[]).await;
    let mut open = Vec::new();
    for path in ["/keyward.v1.SelfService/WhoAmI", "/grpc.health.v1.Health/Check"] {
        for _ in 0..3 {
            let (mut client, connection) = raw(&world).await;
            for _ in 0..100 {
                client = client.ready().await.expect("ready");
                open.push(client.send_request(head(&weak, path), false).expect("sent"));
            }
            tokio::spawn(connection);
        }
    }
    admin.revoke(&token.id).await.expect("there is room for those who send their message");
    assert_eq!(health(&world, "").await.expect("known"), ServingStatus::Serving);
    let (response, _body) = open.remove(0);
    let response = timeout(Duration::from_secs(15), response).await.expect("an end").expect("answered");
    assert_eq!(response.headers()["grpc-status"], "4", "a message has its time");
}

async fn errors_fit_into_headers(world: World) {
    let admin = world.admin().await;
    let request =
        proto::CreateTokenRequest { scopes: vec!["X".repeat(200); 100], audiences: vec!["X".to_owned(); 20], ..new_token("", &[]) };
    let status = admin.create(request).await.expect_err("wrong in many fields");
    let violations = status.get_details_bad_request().expect("BadRequest").field_violations;
    assert_eq!(violations.len(), 13);
    assert!(violations[12].description.contains("109 more"), "{:?}", violations[12]);
    assert!(status.details().len() * 4 / 3 + status.message().len() < 7 * 1024, "{} bytes", status.details().len());
    let states = proto::ListTokensRequest { states: vec![99; 20_000], ..Default::default() };
    let status = admin.list(states).await.expect_err("wrong in many fields");
    assert!(status.details().len() * 4 / 3 + status.message().len() < 7 * 1024, "{} bytes", status.details().len());
}

async fn other_protocols_do_no_harm(world: World) {
    let address = world.server().address();
    for greeting in [&b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"[..], b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", &[0; 64]] {
        let mut stream = TcpStream::connect(address).await.expect("a connection");
        stream.write_all(greeting).await.expect("sent");
        let mut bytes = Vec::new();
        timeout(Duration::from_secs(15), stream.read_to_end(&mut bytes)).await.expect("an end").ok();
    }
    assert_eq!(world.validator().await.verdict("x").await, Verdict::Unknown);
}

async fn errors_of_the_framework_are_explained(world: World) {
    let validator = world.validator().await;
    let (client, _connection) = raw(&world).await;
    let mut client = client.ready().await.expect("ready");
    for (path, header, value, code, reason) in [
        ("/keyward.v1.ValidationService/Nothing", "x-a", "b", "12", "UNKNOWN_METHOD"),
        ("/nothing.at.All/Nothing", "x-a", "b", "12", "UNKNOWN_METHOD"),
        ("/keyward.v1.ValidationService/ValidateToken", "grpc-timeout", "soon", "3", "INVALID_FIELD"),
        ("/keyward.v1.ValidationService/ValidateToken", "grpc-timeout", "0n", "4", "DEADLINE_EXCEEDED"),
        ("/keyward.v1.ValidationService/ValidateToken", "grpc-encoding", "gzip", "12", "UNSUPPORTED"),
    ] {
        let mut request = head(&validator, path);
        request.headers_mut().insert(header, value.parse().expect("a header value"));
        client = client.ready().await.expect("ready");
        let (response, mut body) = client.send_request(request, false).expect("sent");
        let message = proto::ValidateTokenRequest { token: "x".to_owned(), ..Default::default() };
        let mut bytes = frame(&message).to_vec();
        bytes[0] = u8::from(header == "grpc-encoding");
        let _ = body.send_data(bytes.into(), true);
        let response = timeout(Duration::from_secs(10), response).await.expect("in time").expect("answered");
        assert!(response.headers().contains_key("grpc-status"), "{path} {value}: {response:?}");
        assert_eq!(response.headers()["grpc-status"], code, "{path} {value}: {:?}", response.headers());
        let status = tonic::Status::from_header_map(response.headers()).expect("a status");
        assert_eq!(status.get_details_error_info().expect("ErrorInfo").reason, reason);
    }
}

async fn reflection_serves_both_versions(world: World) {
    use tonic_reflection::pb::{v1, v1alpha};
    let channel = world.channel().await;
    let ask = v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1::server_reflection_request::MessageRequest::ListServices(String::new())),
    };
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(channel.clone());
    let mut stream = client.server_reflection_info(tokio_stream(ask)).await.expect("a stream").into_inner();
    let answer = stream.message().await.expect("a message").expect("an answer");
    let Some(v1::server_reflection_response::MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}")
    };
    let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    for name in ["keyward.v1.TokenService", "keyward.v1.SelfService", "keyward.v1.ValidationService", "grpc.health.v1.Health"] {
        assert!(names.iter().any(|listed| listed == name), "{name} is not in {names:?}");
    }
    let ask = v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1alpha::server_reflection_request::MessageRequest::FileContainingSymbol(
            "keyward.v1.TokenService".to_owned(),
        )),
    };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(channel);
    let mut stream = client.server_reflection_info(tokio_stream(ask)).await.expect("a stream").into_inner();
    let answer = stream.message().await.expect("a message").expect("an answer");
    assert!(matches!(answer.message_response, Some(v1alpha::server_reflection_response::MessageResponse::FileDescriptorResponse(_))));
}

/// A stream of one message.
fn tokio_stream<T: Send + 'static>(message: T) -> impl tonic::IntoStreamingRequest<Message = T> {
    tonic::Request::new(tokio_stream::once(message))
}

/// A server with few file descriptors: beyond them it waits, and goes on when some are free again.
#[test]
fn running_out_of_file_descriptors_is_outlived() {
    let folder = tempfile::tempdir().expect("a folder");
    let port = crate::world::free_port();
    let serve = format!(
        "ulimit -n 64; exec {} serve --listen 127.0.0.1:{port} --http-listen off --metrics-listen off --workers 1 --data-dir {}",
        env!("CARGO_BIN_EXE_keyward"),
        folder.path().join("data").display()
    );
    let log = std::fs::File::create(folder.path().join("log")).expect("writable");
    let mut server =
        std::process::Command::new("sh").args(["-c", &serve]).stdout(std::process::Stdio::null()).stderr(log).spawn().expect("it runs");
    let said = |text: &str| std::fs::read_to_string(folder.path().join("log")).expect("readable").contains(text);
    crate::world::runtime().block_on(async {
        eventually("the server serves", async || said("serving").then_some(())).await;
        let mut crowd = Vec::new();
        for _ in 0..100 {
            crowd.push(TcpStream::connect(("127.0.0.1", port)).await.expect("the system takes it"));
        }
        eventually("it has run out", async || said("could not be accepted").then_some(())).await;
        drop(crowd);
        let health = eventually("it answers again", async || {
            let channel =
                tonic::transport::Channel::from_shared(format!("http://127.0.0.1:{port}")).expect("an address").connect().await.ok()?;
            HealthClient::new(channel).check(HealthCheckRequest::default()).await.ok()
        })
        .await;
        assert_eq!(health.into_inner().status(), ServingStatus::Serving);
    });
    server.kill().expect("it ran");
    server.wait().expect("an end");
}
