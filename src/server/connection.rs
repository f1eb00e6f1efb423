//! Accepting connections and driving them, within limits that tonic's own server does not keep.
//!
//! Invariant: a client that connects and does not greet is gone after [`GREETING_TIMEOUT`] (test `silent_clients_are_cut`).
//! Invariant: a drain ends: what has not closed by itself within [`DRAIN_TIMEOUT`] is cut (test `a_drain_has_an_end`).

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use hyper::{body::Incoming, server::conn::http2, service::Service};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{sleep, timeout},
};

use super::{tls::Certificates, workers::Workers};
use crate::{
    ambient,
    api::{
        gate::{Gate, Peer},
        hot::{Begun, Credentials, Reply},
    },
    caller::Caller,
    telemetry::Metrics,
};

/// Open connections.
const CONNECTIONS_MAX: u32 = 10_000;
/// From the connection, or the TLS handshake if there is one, to the client's whole greeting.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// The client connection preface (RFC 9113, section 3.4).
const GREETING_BYTES: usize = 24;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// From the wish to stop to the last connection: with the last writes after it, a stop takes at most 25 seconds.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);
/// After this a connection is asked to close, so that clients spread anew over the servers; up to a tenth more, so that they do not come at once.
const CONNECTION_AGE_MAX: Duration = Duration::from_hours(1);
/// How long it may take to do so.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);

/// So often in a row there must be no call under way.
const IDLE_ROUNDS: u32 = 10;
const IDLE_INTERVAL: Duration = Duration::from_millis(100);

const STREAMS_MAX: u32 = 128;
const RESET_STREAMS_MAX: usize = 1_024;
const HEADER_BYTES_MAX: u32 = 8 * 1024;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// What connections are told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// Go on.
    Serving,
    /// Finish what is under way.
    Draining,
    /// Stop at once.
    Cut,
}

/// The gRPC port.
pub(super) struct Port {
    pub(super) gate: Arc<Gate>,
    pub(super) certificates: Option<Arc<Certificates>>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) phase: watch::Receiver<Phase>,
    permits: Arc<Semaphore>,
}

impl Port {
    pub(super) fn new(
        gate: Arc<Gate>,
        certificates: Option<Arc<Certificates>>,
        metrics: Arc<Metrics>,
        phase: watch::Receiver<Phase>,
    ) -> Arc<Self> {
        Arc::new(Self { gate, certificates, metrics, phase, permits: Arc::new(Semaphore::new(CONNECTIONS_MAX as usize)) })
    }

    /// Accepts connections until the drain begins.
    pub(super) async fn accept(self: Arc<Self>, listener: TcpListener, workers: Workers) {
        let mut phase = self.phase.clone();
        loop {
            let Ok(permit) = Arc::clone(&self.permits).acquire_owned().await else { return };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = phase.wait_for(|phase| *phase != Phase::Serving) => return,
            };
            match accepted {
                Ok((stream, address)) => {
                    if let Err(error) = workers.hand(stream, address, permit).await {
                        tracing::warn!(%error, "a connection could not be handed on");
                    }
                }
                Err(error) => {
                    // Out of file descriptors, most likely: wait until some connections have closed.
                    tracing::warn!(%error, "a connection could not be accepted");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Waits until every connection is closed, and cuts those that are still open at the end of the drain.
    pub(super) async fn drained(&self, phase: &watch::Sender<Phase>) {
        let closed = async { self.permits.acquire_many(CONNECTIONS_MAX).await.map(drop) };
        let finished = tokio::select! {
            closed = timeout(DRAIN_TIMEOUT, closed) => closed.is_ok(),
            () = self.idle() => false,
        };
        if !finished {
            tracing::info!("connections that are still open are cut");
            phase.send_replace(Phase::Cut);
            if timeout(Duration::from_secs(1), self.permits.acquire_many(CONNECTIONS_MAX)).await.is_err() {
                tracing::error!("some connections could not be cut");
            }
        }
    }

    /// Waits until calls that were cut have ended on the threads that served them, so that what they counted is counted. It takes no longer than a step of theirs.
    pub(super) async fn quiet(&self) {
        const STEP_TIMEOUT: Duration = Duration::from_millis(500);
        let quiet = async {
            while !self.gate.is_idle() {
                sleep(Duration::from_millis(1)).await;
            }
        };
        if timeout(STEP_TIMEOUT, quiet).await.is_err() {
            tracing::warn!("a call that was cut has not ended");
        }
    }

    /// Returns when no call is under way: what is still open then (a watch of health, a silent client) has nothing left to finish.
    async fn idle(&self) {
        let mut quiet = 0;
        while quiet < IDLE_ROUNDS {
            sleep(IDLE_INTERVAL).await;
            quiet = if self.gate.is_idle() { quiet + 1 } else { 0 };
        }
    }

    /// Drives a connection to its end.
    pub(super) async fn serve(self: Arc<Self>, stream: TcpStream, address: SocketAddr, _permit: OwnedSemaphorePermit) {
        self.metrics.connections.inc();
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY could not be set");
        }
        let mut phase = self.phase.clone();
        tokio::select! {
            () = self.speak(stream, address) => {}
            _ = phase.wait_for(|phase| *phase == Phase::Cut) => {}
        }
        self.metrics.connections.dec();
    }

    async fn speak(&self, stream: TcpStream, address: SocketAddr) {
        let Some(certificates) = &self.certificates else {
            return self.drive(stream, address, None).await;
        };
        match timeout(HANDSHAKE_TIMEOUT, certificates.acceptor().accept(stream)).await {
            Ok(Ok(stream)) => {
                let certificate = certificates.caller(&stream).map(Arc::new);
                self.drive(stream, address, certificate).await;
            }
            Ok(Err(error)) => tracing::debug!(%error, peer = %address.ip(), "TLS handshake failed"),
            Err(_) => tracing::debug!(peer = %address.ip(), "TLS handshake took too long"),
        }
    }

    async fn drive(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        address: SocketAddr,
        certificate: Option<Arc<Caller>>,
    ) {
        let (close, closing) = watch::channel(false);
        let peer = Peer { address, certificate, closing: Arc::new(closing) };
        let heard = Arc::new(AtomicUsize::new(0));
        let stream = TokioIo::new(Heard { stream, heard: Arc::clone(&heard) });
        let calls = Calls { gate: Arc::clone(&self.gate), peer: Arc::new(peer), credentials: Credentials::default() };
        let mut connection = pin!(http2().serve_connection(stream, calls));
        let mut phase = self.phase.clone();
        let first = tokio::select! {
            result = connection.as_mut() => Some(result),
            () = sleep(GREETING_TIMEOUT) => None,
            _ = phase.wait_for(|phase| *phase != Phase::Serving) => None,
        };
        if first.is_some() || heard.load(Ordering::Relaxed) < GREETING_BYTES {
            return;
        }
        let closed = tokio::select! {
            _ = connection.as_mut() => true,
            () = sleep(age_max()) => false,
            _ = phase.wait_for(|phase| *phase != Phase::Serving) => false,
        };
        if !closed {
            // Streams that are held open end by themselves, while those who hold them are still heard.
            close.send_replace(true);
            connection.as_mut().graceful_shutdown();
            // An error or an overlong farewell end the same way: the connection is dropped.
            let _farewell = timeout(CLOSE_TIMEOUT, connection).await;
        }
    }
}

fn http2() -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_local_error_reset_streams(RESET_STREAMS_MAX)
        // A client whose deadlines run out resets many streams at once, in good faith.
        .max_pending_accept_reset_streams(STREAMS_MAX as usize)
        .max_header_list_size(HEADER_BYTES_MAX)
        // No gRPC server sends the date, and no client reads it.
        .auto_date_header(false)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    builder
}

fn age_max() -> Duration {
    let jitter = ambient::random::<1>().map_or(0, |[byte]| u32::from(byte));
    CONNECTION_AGE_MAX + CONNECTION_AGE_MAX / 10 * jitter / 256
}

/// The calls of one connection.
struct Calls {
    gate: Arc<Gate>,
    peer: Arc<Peer>,
    credentials: Credentials,
}

/// An answer that is there, or on its way.
#[expect(clippy::large_enum_variant, reason = "most of them are there")]
enum Answering {
    AtOnce(Option<hyper::Response<Reply>>),
    Later(Pin<Box<dyn Future<Output = hyper::Response<Reply>> + Send>>),
}

impl Future for Answering {
    type Output = Result<hyper::Response<Reply>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut *self {
            Self::AtOnce(response) => response.take().map_or(Poll::Pending, |response| Poll::Ready(Ok(response))),
            Self::Later(response) => response.as_mut().poll(context).map(Ok),
        }
    }
}

impl Service<hyper::Request<Incoming>> for Calls {
    type Response = hyper::Response<Reply>;
    type Error = Infallible;
    type Future = Answering;

    fn call(&self, request: hyper::Request<Incoming>) -> Answering {
        let mut request = request.map(Begun::new);
        match self.gate.serve_at_once(&mut request, &self.peer, &self.credentials) {
            Some(response) => Answering::AtOnce(Some(response)),
            None => Answering::Later(Box::pin(Arc::clone(&self.gate).serve_elsewhere(request, Arc::clone(&self.peer)))),
        }
    }
}

/// Counts the first bytes that are read.
struct Heard<S> {
    stream: S,
    heard: Arc<AtomicUsize>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Heard<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        if self.heard.load(Ordering::Relaxed) < GREETING_BYTES {
            self.heard.fetch_add(buffer.filled().len() - before, Ordering::Relaxed);
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Heard<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
