//! The port for gateways that ask by HTTP: HTTP/1.1 and HTTP/2, with the certificates of the gRPC port.
//!
//! Invariant: who connects and sends no request is gone after [`FIRST_HEAD_TIMEOUT`] (test `silent_clients_of_http_are_cut`).

use std::{
    convert::Infallible,
    future::pending,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hyper::{Request, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{sleep, timeout},
};

use super::{connection::Phase, tls::Certificates};
use crate::{
    api::{
        gate::{Gate, Peer},
        http::Known,
    },
    caller::Caller,
};

/// Open connections.
pub(super) const CONNECTIONS_MAX: u16 = 1_024;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// From the connection to the end of the first request's head.
const FIRST_HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// From an answer to the end of the next request's head: longer than gateways keep connections that they do not use (nginx a minute, Traefik 90 seconds, Caddy two minutes), so
/// that they do not ask on one that is being closed.
const NEXT_HEAD_TIMEOUT: Duration = Duration::from_secs(150);
/// How long a connection may go on after that on which nobody was identified: who only asks for `/readyz` comes anew.
const STRANGER_TIMEOUT: Duration = Duration::from_secs(25);
/// How long the calls that are under way at the drain may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long connections without a call stay open then.
const FAREWELL_TIMEOUT: Duration = Duration::from_millis(500);
/// Of a request's head: gateways pass on what their clients send.
const HEADER_BYTES_MAX: usize = 256 * 1024;
/// As many as gateways take of their clients, and some of their own.
const HEADERS_MAX: usize = 300;
const STREAMS_MAX: u32 = 128;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);

/// The port.
pub(super) struct HttpPort {
    pub(super) gate: Arc<Gate>,
    pub(super) certificates: Option<Arc<Certificates>>,
    pub(super) phase: watch::Receiver<Phase>,
    /// Whether questions can be answered.
    pub(super) able: watch::Receiver<bool>,
    /// One for each connection that may be open.
    pub(super) permits: Arc<Semaphore>,
}

impl HttpPort {
    /// Accepts connections until the drain begins.
    pub(super) async fn accept(self: Arc<Self>, listener: TcpListener) {
        let mut phase = self.phase.clone();
        loop {
            let Ok(permit) = Arc::clone(&self.permits).acquire_owned().await else { return };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = phase.wait_for(|phase| *phase != Phase::Serving) => return,
            };
            match accepted {
                Ok((stream, address)) => {
                    tokio::spawn(Arc::clone(&self).serve(stream, address, permit));
                }
                Err(error) => {
                    tracing::warn!(%error, "an HTTP connection could not be accepted");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Waits until no call is under way, and its answer is on its way.
    pub(super) async fn drained(&self) {
        let answered = async {
            while !self.gate.is_idle() {
                sleep(Duration::from_millis(1)).await;
            }
            timeout(FAREWELL_TIMEOUT, self.permits.acquire_many(CONNECTIONS_MAX.into())).await
        };
        if timeout(CLOSE_TIMEOUT, answered).await.is_err() {
            tracing::info!("calls by HTTP that have not ended are cut");
        }
    }

    async fn serve(self: Arc<Self>, stream: TcpStream, address: SocketAddr, _permit: OwnedSemaphorePermit) {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY could not be set");
        }
        let Some(certificates) = &self.certificates else {
            return self.drive(stream, address, None).await;
        };
        match timeout(HANDSHAKE_TIMEOUT, certificates.http_acceptor().accept(stream)).await {
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
        let (_open, closing) = watch::channel(false);
        let peer = Arc::new(Peer { address, certificate, closing: Arc::new(closing) });
        let (has_asked, is_known) = (AtomicBool::new(false), Arc::new(AtomicBool::new(false)));
        let service = service_fn(|request: Request<Incoming>| {
            has_asked.store(true, Ordering::Relaxed);
            let is_ready = *self.able.borrow() && *self.phase.borrow() == Phase::Serving;
            let answer = Arc::clone(&self.gate).serve_http(request, Arc::clone(&peer), is_ready);
            let is_known = Arc::clone(&is_known);
            async move {
                let answer = answer.await;
                if answer.extensions().get::<Known>().is_some() {
                    is_known.store(true, Ordering::Relaxed);
                }
                Ok::<_, Infallible>(answer)
            }
        });
        let builder = http();
        let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
        let mut phase = self.phase.clone();
        let silence = async {
            sleep(FIRST_HEAD_TIMEOUT).await;
            if !has_asked.load(Ordering::Relaxed) {
                return true;
            }
            sleep(STRANGER_TIMEOUT).await;
            if is_known.load(Ordering::Relaxed) { pending().await } else { false }
        };
        let is_closed = tokio::select! {
            is_silent = silence => is_silent,
            // Whoever breaks the protocol is no concern of ours.
            _broken = connection.as_mut() => true,
            _ = phase.wait_for(|phase| *phase != Phase::Serving) => false,
        };
        if !is_closed {
            connection.as_mut().graceful_shutdown();
            let _farewell = timeout(CLOSE_TIMEOUT, connection).await;
        }
    }
}

fn http() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).max_headers(HEADERS_MAX).header_read_timeout(NEXT_HEAD_TIMEOUT).max_buf_size(HEADER_BYTES_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(u32::try_from(HEADER_BYTES_MAX).unwrap_or(u32::MAX))
        .keep_alive_interval(KEEPALIVE_INTERVAL);
    builder
}
