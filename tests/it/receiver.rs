//! A receiver of webhook calls for a test: an HTTP server in this process that notes every call, and behaves as it is told.

use std::{
    collections::HashMap,
    future::pending,
    io,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::{
    Request, Response,
    body::{Body, Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::watch,
    task::{JoinHandle, JoinSet},
};
use tokio_rustls::TlsAcceptor;

use crate::tls::{Authority, Credential};

/// What a receiver does with a call, after it has read and noted it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Behaviour {
    /// Answers 200.
    Ok,
    /// Answers this.
    Status(u16),
    /// Answers this status, with a `location`.
    Redirect(u16, String),
    /// Answers this status, with a header.
    Header(u16, &'static str, String),
    /// Never answers.
    Hang,
    /// Closes without an answer.
    CloseAtOnce,
    /// Answers 200 and half of a body, and closes.
    CloseMiddle,
    /// Answers 200 and a body that never ends.
    Endless,
    /// Answers 200, later.
    Slow(Duration),
}

/// A call that came.
#[derive(Clone, Debug)]
pub struct Call {
    pub method: String,
    /// With its query.
    pub path: String,
    /// In their order, with small letters.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// The body, if it is JSON.
    pub json: Option<Value>,
}

impl Call {
    /// The header of this name, in small letters; of several the first.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(each, _)| each == name).map(|(_, value)| value.as_str())
    }
}

/// What has happened so far, and what is to be done.
#[derive(Default)]
struct State {
    calls: Vec<Call>,
    connections: usize,
    open: usize,
    refused_handshakes: usize,
    under_way: usize,
    under_way_max: usize,
    body_bytes_sent: usize,
}

/// What is to be done.
struct Orders {
    usual: Behaviour,
    paths: HashMap<String, Behaviour>,
}

/// Shared by all connections.
#[derive(Clone)]
struct Shared {
    state: watch::Sender<State>,
    orders: Arc<Mutex<Orders>>,
    tls: Option<TlsAcceptor>,
}

/// The receiver. It ends with the runtime, or when it is dropped.
pub struct Receiver {
    port: u16,
    shared: Shared,
    task: Option<JoinHandle<()>>,
}

impl Receiver {
    /// In plain text.
    pub async fn start() -> Self {
        Self::start_with(None).await
    }

    /// In TLS, with a certificate of this authority or a bad one.
    pub async fn start_tls(authority: &Authority, credential: Credential) -> Self {
        let (certificate, key) = authority.credential(credential);
        let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).expect("a certificate");
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("a key");
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("the provider knows them")
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .expect("a key that fits");
        Self::start_with(Some(TlsAcceptor::from(Arc::new(config)))).await
    }

    async fn start_with(tls: Option<TlsAcceptor>) -> Self {
        let orders = Arc::new(Mutex::new(Orders { usual: Behaviour::Ok, paths: HashMap::new() }));
        let shared = Shared { state: watch::Sender::new(State::default()), orders, tls };
        let mut receiver = Self { port: 0, shared, task: None };
        receiver.open().await;
        receiver
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// At 127.0.0.1. The path begins with a slash.
    pub fn url(&self, path: &str) -> String {
        self.url_at("127.0.0.1", path)
    }

    /// By another name of this machine.
    pub fn url_at(&self, host: &str, path: &str) -> String {
        let scheme = if self.shared.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{host}:{}{path}", self.port)
    }

    /// From now on does this on every path that has no behaviour of its own.
    pub fn set(&self, behaviour: Behaviour) {
        self.shared.orders.lock().expect("not poisoned").usual = behaviour;
    }

    /// From now on does this on this path, whatever its query.
    pub fn set_path(&self, path: &str, behaviour: Behaviour) {
        self.shared.orders.lock().expect("not poisoned").paths.insert(path.to_owned(), behaviour);
    }

    /// What came, in order.
    pub fn calls(&self) -> Vec<Call> {
        self.shared.state.borrow().calls.clone()
    }

    /// What came since the last time, in order; it is not shown again.
    pub fn take(&self) -> Vec<Call> {
        let mut taken = Vec::new();
        self.shared.state.send_modify(|state| taken = std::mem::take(&mut state.calls));
        taken
    }

    /// Waits until so many calls came, and shows them all.
    pub async fn wait_for(&self, count: usize, deadline: Duration) -> Vec<Call> {
        self.until(&format!("{count} calls"), deadline, |state| state.calls.len() >= count).await;
        self.calls()
    }

    /// Waits until exactly so many calls have come and not ended.
    pub async fn wait_under_way(&self, count: usize, deadline: Duration) {
        self.until(&format!("{count} calls under way"), deadline, |state| state.under_way == count).await;
    }

    /// Waits until so many TLS handshakes have failed.
    pub async fn wait_refused_handshakes(&self, count: usize, deadline: Duration) {
        self.until(&format!("{count} failed handshakes"), deadline, |state| state.refused_handshakes >= count).await;
    }

    async fn until(&self, what: &str, deadline: Duration, holds: impl Fn(&State) -> bool) {
        let mut state = self.shared.state.subscribe();
        let outcome = tokio::time::timeout(deadline, state.wait_for(|state| holds(state))).await;
        let Ok(Ok(_)) = outcome else { panic!("{what} were not seen within {deadline:?}; calls: {:?}", self.calls()) };
    }

    /// How many connections there were so far.
    pub fn connections(&self) -> usize {
        self.shared.state.borrow().connections
    }

    /// How many connections there are.
    pub fn open_connections(&self) -> usize {
        self.shared.state.borrow().open
    }

    /// How many TLS handshakes failed so far, as when the caller does not like the certificate.
    pub fn refused_handshakes(&self) -> usize {
        self.shared.state.borrow().refused_handshakes
    }

    /// How many calls have come and not ended: the answer was not sent to its end, and the caller has not gone.
    pub fn under_way(&self) -> usize {
        self.shared.state.borrow().under_way
    }

    /// How many calls were under way at once, at most.
    pub fn under_way_max(&self) -> usize {
        self.shared.state.borrow().under_way_max
    }

    /// How many bytes of bodies were handed out: bounds what a caller reads of an endless one, give or take what sockets hold.
    pub fn body_bytes_sent(&self) -> usize {
        self.shared.state.borrow().body_bytes_sent
    }

    /// Closes what is open, and refuses connections until [`Receiver::open`].
    pub async fn close(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            let _ = task.await;
            // What was open ends on its own threads.
            self.until("no connections", Duration::from_secs(10), |state| state.open == 0).await;
        }
    }

    /// Accepts connections, on the same port as before.
    pub async fn open(&mut self) {
        let listener = TcpListener::bind(("127.0.0.1", self.port)).await.expect("a port");
        self.port = listener.local_addr().expect("an address").port();
        self.task = Some(tokio::spawn(accept(listener, self.shared.clone())));
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}

async fn accept(listener: TcpListener, shared: Shared) {
    // They end with this task.
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (shared, counted) = (shared.clone(), Counted::new(&shared.state, |state| &mut state.open));
        shared.state.send_modify(|state| state.connections += 1);
        connections.spawn(async move {
            let _counted = counted;
            match &shared.tls {
                None => serve(stream, &shared).await,
                Some(tls) => match tls.accept(stream).await {
                    Ok(stream) => serve(stream, &shared).await,
                    Err(_) => shared.state.send_modify(|state| state.refused_handshakes += 1),
                },
            }
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin, shared: &Shared) {
    let service = service_fn(|request| answer(request, shared));
    // An end that the behaviour wants is an error here.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

/// One of those that are there, until it is dropped.
struct Counted {
    state: watch::Sender<State>,
    number: fn(&mut State) -> &mut usize,
}

impl Counted {
    fn new(state: &watch::Sender<State>, number: fn(&mut State) -> &mut usize) -> Self {
        state.send_modify(|state| *number(state) += 1);
        Self { state: state.clone(), number }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.state.send_modify(|state| *(self.number)(state) -= 1);
    }
}

async fn answer(request: Request<Incoming>, shared: &Shared) -> io::Result<Response<Answer>> {
    let counted = Counted::new(&shared.state, |state| &mut state.under_way);
    shared.state.send_modify(|state| state.under_way_max = state.under_way_max.max(state.under_way));
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let behaviour = {
        let orders = shared.orders.lock().expect("not poisoned");
        orders.paths.get(head.uri.path()).unwrap_or(&orders.usual).clone()
    };
    let call = Call {
        method: head.method.to_string(),
        path: head.uri.to_string(),
        headers: head
            .headers
            .iter()
            .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
            .collect(),
        json: serde_json::from_slice(&body).ok(),
        body: body.into(),
    };
    shared.state.send_modify(|state| state.calls.push(call));
    let respond = |status: u16, header: Option<(&str, &str)>, content: Content| {
        let mut response = Response::builder().status(status);
        if let Some((name, value)) = header {
            response = response.header(name, value);
        }
        response.body(Answer { content, counted }).map_err(io::Error::other)
    };
    match behaviour {
        Behaviour::Ok => respond(200, None, Content::Whole),
        Behaviour::Status(status) => respond(status, None, Content::Whole),
        Behaviour::Redirect(status, location) => respond(status, Some(("location", &location)), Content::Whole),
        Behaviour::Header(status, name, value) => respond(status, Some((name, &value)), Content::Whole),
        Behaviour::Hang => pending().await,
        Behaviour::CloseAtOnce => Err(io::Error::other("as it is told")),
        Behaviour::CloseMiddle => respond(200, Some(("content-length", "1000")), Content::Half(Step::First)),
        Behaviour::Endless => respond(200, None, Content::Endless),
        Behaviour::Slow(span) => {
            tokio::time::sleep(span).await;
            respond(200, None, Content::Whole)
        }
    }
}

/// A body.
struct Answer {
    content: Content,
    counted: Counted,
}

enum Content {
    Whole,
    Half(Step),
    Endless,
}

/// Where half a body stands.
enum Step {
    First,
    /// What was written goes out.
    Flush,
    Break,
}

impl Body for Answer {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let bytes = match &mut self.content {
            Content::Whole => return Poll::Ready(None),
            Content::Half(step @ Step::First) => {
                *step = Step::Flush;
                Bytes::from_static(b"half")
            }
            Content::Half(step @ Step::Flush) => {
                *step = Step::Break;
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            Content::Half(Step::Break) => return Poll::Ready(Some(Err(io::Error::other("as it is told")))),
            Content::Endless => Bytes::from_static(&[b'x'; 16_384]),
        };
        self.counted.state.send_modify(|state| state.body_bytes_sent += bytes.len());
        Poll::Ready(Some(Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.content, Content::Whole)
    }
}
