//! What Keyward is compared with: servers that answer every `ValidateToken` with the same constant.
//!
//! The service on tonic is written out here as tonic's generator writes it, boxes included. The generated trait would want every method of
//! the service, and grows with it; what is measured here shall not.

use std::{
    convert::Infallible,
    future::Future,
    net::SocketAddr,
    path::Path,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::Frame;
use http_body_util::BodyExt as _;
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use keyward::proto::{
    self,
    envoy::{
        CheckRequest, CheckResponse, HeaderValue, HeaderValueOption, OkHttpResponse,
        authorization_server::{Authorization, AuthorizationServer},
        check_response::HttpResponse,
        header_value_option::HeaderAppendAction,
    },
};
use prost::Message as _;
use tokio::{net::TcpListener, runtime::Builder};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{
    Request, Response, Status, Streaming,
    body::Body,
    transport::{Identity, ServerTlsConfig},
};

use crate::wire;

type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// What Keyward answers to the bench's question, give or take a few bytes.
fn constant() -> proto::ValidateTokenResponse {
    proto::ValidateTokenResponse {
        valid: true,
        verdict: proto::Verdict::Valid.into(),
        token_id: "tok_0000000000000000000000".to_owned(),
        workspace: "default".to_owned(),
        principal: "root".to_owned(),
        kind: proto::TokenKind::Permanent.into(),
        scopes: vec!["agents:list".to_owned(), "storage:upload".to_owned()],
        audiences: vec!["billing".to_owned()],
        display_name: "bench".to_owned(),
        expire_time: Some(prost_types::Timestamp { seconds: 1_800_000_000, nanos: 1_000_000 }),
        ..Default::default()
    }
}

/// `--empty KIND PORT [FOLDER]`: serves until it is killed.
pub fn serve(kind: &str, port: &str, folder: Option<&String>) {
    let address = format!("127.0.0.1:{port}").parse().expect("an address");
    let mut runtime = match kind {
        "tonic-multi" => Builder::new_multi_thread(),
        _ => Builder::new_current_thread(),
    };
    let runtime = runtime.worker_threads(1).enable_all().build().expect("a runtime");
    match kind {
        "hyper" => runtime.block_on(serve_floor(address)),
        "upstream" => runtime.block_on(serve_upstream(address)),
        _ => runtime.block_on(serve_tonic(address, folder.map(Path::new))),
    }
}

async fn serve_tonic(address: SocketAddr, tls: Option<&Path>) {
    let mut server = tonic::transport::Server::builder();
    if let Some(folder) = tls {
        let read = |name: &str| std::fs::read(folder.join(name)).expect("a certificate");
        let identity = Identity::from_pem(read("cert.pem"), read("key.pem"));
        server = server.tls_config(ServerTlsConfig::new().identity(identity)).expect("TLS");
    }
    server.add_service(Empty).add_service(AuthorizationServer::new(LetsAllPass)).serve(address).await.expect("it serves");
}

/// An external authorization that answers what Keyward answers to the bench's question, give or take a few bytes, as the framework's generator wants it.
struct LetsAllPass;

#[tonic::async_trait]
impl Authorization for LetsAllPass {
    async fn check(&self, _: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
        let text = |text: &str| prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(text.to_owned())) };
        let header = |(name, value): (&str, &str)| HeaderValueOption {
            header: Some(HeaderValue { key: name.to_owned(), value: value.to_owned(), raw_value: Vec::new() }),
            append_action: HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
        };
        let identity = [
            ("x-keyward-token-id", "tok_0000000000000000000000"),
            ("x-keyward-principal", "root"),
            ("x-keyward-workspace", "default"),
            ("x-keyward-scopes", "agents:list storage:upload"),
        ];
        let metadata = [("verdict", "VERDICT_VALID"), ("token_id", identity[0].1), ("principal", "root"), ("workspace", "default")];
        let fields = metadata.map(|(name, value)| (name.to_owned(), text(value))).into();
        Ok(Response::new(CheckResponse {
            status: Some(tonic_types::pb::Status::default()),
            http_response: Some(HttpResponse::OkResponse(OkHttpResponse {
                headers: identity.map(header).into(),
                headers_to_remove: Vec::new(),
            })),
            dynamic_metadata: Some(prost_types::Struct { fields }),
        }))
    }
}

/// The service that does nothing.
#[derive(Clone)]
struct Empty;

impl tonic::server::NamedService for Empty {
    const NAME: &'static str = "keyward.v1.ValidationService";
}

impl tower_service::Service<http::Request<Body>> for Empty {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Boxed<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        match request.uri().path() {
            wire::VALIDATE => {
                Box::pin(async { Ok(tonic::server::Grpc::new(tonic_prost::ProstCodec::default()).unary(Nothing, request).await) })
            }
            wire::STREAM => {
                Box::pin(async { Ok(tonic::server::Grpc::new(tonic_prost::ProstCodec::default()).streaming(Nothing, request).await) })
            }
            path => panic!("{path} is not served here"),
        }
    }
}

struct Nothing;

impl tonic::server::UnaryService<proto::ValidateTokenRequest> for Nothing {
    type Response = proto::ValidateTokenResponse;
    type Future = Boxed<Result<Response<Self::Response>, Status>>;

    fn call(&mut self, request: Request<proto::ValidateTokenRequest>) -> Self::Future {
        Box::pin(async move { validate_token(request).await })
    }
}

/// As the generated trait has it: a box of its own.
fn validate_token(_: Request<proto::ValidateTokenRequest>) -> Boxed<Result<Response<proto::ValidateTokenResponse>, Status>> {
    Box::pin(async { Ok(Response::new(constant())) })
}

/// What the streaming call answers, as far as it is needed here: written out, since not every version has it.
#[derive(Clone, PartialEq, prost::Message)]
struct StreamAnswer {
    #[prost(message, optional, tag = "1")]
    answer: Option<proto::ValidateTokenResponse>,
}

impl tonic::server::StreamingService<proto::ValidateTokenRequest> for Nothing {
    type Response = StreamAnswer;
    type ResponseStream = Pin<Box<dyn Stream<Item = Result<StreamAnswer, Status>> + Send>>;
    type Future = Boxed<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<proto::ValidateTokenRequest>>) -> Self::Future {
        let answers = request.into_inner().map(|question| question.map(|_| StreamAnswer { answer: Some(constant()) }));
        Box::pin(async move { Ok(Response::new(Box::pin(answers) as Self::ResponseStream)) })
    }
}

/// The floor: frames in, frames out, without reading or building a message.
async fn serve_floor(address: SocketAddr) {
    let listener = TcpListener::bind(address).await.expect("a port");
    let message = Bytes::from(wire::framed(&constant().encode_to_vec()));
    loop {
        let (stream, _) = listener.accept().await.expect("a connection");
        stream.set_nodelay(true).expect("a socket");
        let message = message.clone();
        let service = service_fn(move |request| answer(request, message.clone()));
        tokio::spawn(async move {
            let _closed = http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// What stands behind a gateway: HTTP/1.1, a short text.
async fn serve_upstream(address: SocketAddr) {
    let listener = TcpListener::bind(address).await.expect("a port");
    loop {
        let (stream, _) = listener.accept().await.expect("a connection");
        stream.set_nodelay(true).expect("set");
        let text =
            || async { Ok::<_, Infallible>(http::Response::new(http_body_util::Full::new(Bytes::from_static(b"from the upstream")))) };
        let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(move |_| text()));
        tokio::spawn(connection);
    }
}

async fn answer(request: http::Request<Incoming>, message: Bytes) -> Result<http::Response<Answer>, hyper::Error> {
    let question = request.into_body().collect().await?.to_bytes();
    assert!(question.len() > 5, "a call without a message");
    let mut response = http::Response::new(Answer(Some(message), false));
    response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/grpc"));
    Ok(response)
}

/// A message, and the trailers.
struct Answer(Option<Bytes>, bool);

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Some(message) = self.0.take() {
            return Poll::Ready(Some(Ok(Frame::data(message))));
        }
        if std::mem::replace(&mut self.1, true) {
            return Poll::Ready(None);
        }
        let mut trailers = http::HeaderMap::with_capacity(1);
        trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }
}
