//! What every call passes before its handler: room, time, and who is asking.
//!
//! The order is: is the method known → who is it, and may they → the whole message → is there room → who is it, and may they, still → handler,
//! all of it within the deadline. Whatever comes out is counted, and logged at debug in one line. A stream of questions (`stream`) is let in by its head, and takes the other steps
//! again for each group of its messages.
//!
//! Invariant: a method that is not in [`METHODS`] is closed (test `every_method_is_in_the_table`).
//! Invariant: the caller is authorised before a byte of the message is read (test `strangers_learn_nothing_from_their_arguments`).
//! Invariant: a call whose message comes after its caller was revoked is refused (test `a_revoked_caller_finishes_nothing`).
//! Invariant: who does not send their message keeps nobody out (test `half_open_calls_keep_nobody_out`).
//! Invariant: beyond its places a plane refuses at once; nothing queues without bound (test `overload_is_refused_at_once`).

use std::{
    net::SocketAddr,
    num::NonZeroU32,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, header::AUTHORIZATION};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use ipnet::IpNet;
use tokio::{
    runtime::Handle,
    sync::{Semaphore, watch},
    task::JoinSet,
    time::timeout,
};
use tonic::{Code, Status, body::Body, service::Routes};
use tower_service::Service as _;

use super::{
    Api, Call, Deadline,
    hot::{Begun, Credentials, Reply},
    invalidations,
    rates::{PerPrincipal, Reports},
    status, stream,
};
use crate::{
    ambient::{Clock, Stopwatch, Time},
    audit::Refusal,
    caller::{Access, Caller},
    error::Error,
    telemetry,
    validator::Identity,
};

/// From the head of a request to the end of its message.
pub(super) const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);
const HEALTH_CALLS_MAX: usize = 1_024;
const REPORT_CALLS_MAX: usize = 64;
/// Methods that make tokens or secrets for the caller's own principal.
const OWN_CHANGES: [&str; 3] =
    ["/keyward.v1.SelfService/CreateMyToken", "/keyward.v1.SelfService/IssueTemporaryToken", "/keyward.v1.SelfService/RegenerateSelf"];
/// Methods that send at once, to where the caller has chosen.
const SEND_TEST: &str = "/keyward.v1.NoticeService/SendTestNotice";
const RETRY: &str = "/keyward.v1.NoticeService/RetryNotice";
/// Answers to calls of the control plane that the audit keeps a sample of.
const REFUSALS: [Code; 4] = [Code::Unauthenticated, Code::PermissionDenied, Code::NotFound, Code::FailedPrecondition];
/// How long the caller waits (<https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>).
const GRPC_TIMEOUT: &str = "grpc-timeout";
/// The name under which calls of methods that do not exist are counted.
const UNKNOWN_METHOD: &str = "unknown";

const CREDENTIALS_MISSING: &str = "this method needs credentials: send the metadata `authorization: Bearer <token>`";
const CREDENTIALS_REFUSED: &str = "the bearer token or the certificate's principal is unknown, has ended, is switched off, is suspended or may not be used from this address";

/// Which limits a method falls under.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Plane {
    /// Questions about tokens.
    Data,
    /// Changes and lists.
    Control,
    /// Reports of leaked tokens, which anybody may send.
    Report,
    /// Health.
    Health,
    /// Reflection: a stream, without a deadline.
    Stream,
    /// Questions about tokens on a stream that is held open.
    Held,
    /// A stream that tells what has changed.
    Watch,
}

/// When a caller is judged. Their use of the token counts once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Judge {
    BeforeTheMessage,
    WithTheMessage,
}

/// A method: its path, whom it is open to, and the limits that it falls under.
#[derive(Clone, Copy, Debug)]
pub struct Method {
    /// `/package.Service/Method`.
    pub path: &'static str,
    /// Whom it is open to.
    pub access: Access,
    /// Its limits.
    pub plane: Plane,
    /// The largest request, in bytes on the wire; of a stream, the largest message.
    pub request_bytes_max: usize,
}

/// Methods that are answered at once where that is possible.
pub(super) const VALIDATE: &str = "/keyward.v1.ValidationService/ValidateToken";
pub(super) const BATCH: &str = "/keyward.v1.ValidationService/BatchValidateTokens";
const BATCH_BYTES_MAX: usize = 1_024 * KIB;
pub(super) const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";
/// All headers that a gateway takes: Envoy's own limit is at most 8 MiB and 60 KiB by default.
const CHECK_BYTES_MAX: usize = 256 * KIB;

/// The largest message of a public method.
pub const PUBLIC_BYTES_MAX: usize = 64 * KIB;
const KIB: usize = 1_024;
const DATA_BYTES_MAX: usize = 16 * KIB;

const fn method(path: &'static str, access: Access, plane: Plane) -> Method {
    let request_bytes_max = match plane {
        Plane::Data | Plane::Held => DATA_BYTES_MAX,
        Plane::Control | Plane::Report | Plane::Stream => 64 * KIB,
        Plane::Health | Plane::Watch => KIB,
    };
    Method { path, access, plane, request_bytes_max }
}

/// Every method there is: who may what.
pub const METHODS: [Method; 49] = [
    method(VALIDATE, Access::Validate, Plane::Data),
    Method { request_bytes_max: CHECK_BYTES_MAX, ..method(CHECK, Access::Validate, Plane::Data) },
    Method { request_bytes_max: BATCH_BYTES_MAX, ..method(BATCH, Access::Validate, Plane::Data) },
    method("/keyward.v1.ValidationService/StreamValidateTokens", Access::Validate, Plane::Held),
    method("/keyward.v1.ValidationService/WatchInvalidations", Access::Validate, Plane::Watch),
    method("/keyward.v1.TokenService/CreateToken", Access::Admin, Plane::Control),
    method("/keyward.v1.TokenService/GetToken", Access::Admin, Plane::Control),
    method("/keyward.v1.TokenService/ListTokens", Access::Admin, Plane::Control),
    method("/keyward.v1.TokenService/UpdateToken", Access::Admin, Plane::Control),
    method("/keyward.v1.TokenService/ActivateToken", Access::Admin, Plane::Control),
    method("/keyward.v1.TokenService/DeactivateToken", Access::Admin, Plane::Control),
    method("/keyward.v1.TokenService/RevokeToken", Access::Admin, Plane::Control),
    method("/keyward.v1.TokenService/RegenerateToken", Access::Admin, Plane::Control),
    method("/keyward.v1.TokenService/DeleteToken", Access::Admin, Plane::Control),
    method("/keyward.v1.TokenService/RevokePrincipalTokens", Access::Admin, Plane::Control),
    method("/keyward.v1.SelfService/WhoAmI", Access::Known, Plane::Control),
    method("/keyward.v1.SelfService/ListMyTokens", Access::Own, Plane::Control),
    method("/keyward.v1.SelfService/RegenerateSelf", Access::Own, Plane::Control),
    method("/keyward.v1.SelfService/RevokeSelf", Access::Known, Plane::Control),
    method("/keyward.v1.SelfService/CreateMyToken", Access::Own, Plane::Control),
    method("/keyward.v1.SelfService/IssueTemporaryToken", Access::Own, Plane::Control),
    method("/keyward.v1.SelfService/EndSession", Access::Known, Plane::Control),
    method("/keyward.v1.SelfService/ReportLeakedTokens", Access::Public, Plane::Report),
    Method { request_bytes_max: 256 * KIB, ..method("/keyward.v1.WorkspaceService/CreateWorkspace", Access::Root, Plane::Control) },
    method("/keyward.v1.WorkspaceService/GetWorkspace", Access::Admin, Plane::Control),
    method("/keyward.v1.WorkspaceService/ListWorkspaces", Access::Admin, Plane::Control),
    Method { request_bytes_max: 256 * KIB, ..method("/keyward.v1.WorkspaceService/UpdateWorkspace", Access::Admin, Plane::Control) },
    method("/keyward.v1.WorkspaceService/SuspendWorkspace", Access::Root, Plane::Control),
    method("/keyward.v1.WorkspaceService/ResumeWorkspace", Access::Root, Plane::Control),
    method("/keyward.v1.WorkspaceService/DeleteWorkspace", Access::Root, Plane::Control),
    method("/keyward.v1.PrincipalService/UpsertPrincipal", Access::Admin, Plane::Control),
    method("/keyward.v1.PrincipalService/GetPrincipal", Access::Admin, Plane::Control),
    method("/keyward.v1.PrincipalService/ListPrincipals", Access::Admin, Plane::Control),
    method("/keyward.v1.PrincipalService/SuspendPrincipal", Access::Admin, Plane::Control),
    method("/keyward.v1.PrincipalService/ResumePrincipal", Access::Admin, Plane::Control),
    method("/keyward.v1.PrincipalService/DeletePrincipal", Access::Admin, Plane::Control),
    method("/keyward.v1.AuditService/ListAuditEvents", Access::Admin, Plane::Control),
    method("/keyward.v1.NoticeService/ListFaults", Access::Admin, Plane::Control),
    method("/keyward.v1.NoticeService/AcknowledgeFault", Access::Admin, Plane::Control),
    method("/keyward.v1.NoticeService/ListNotices", Access::Admin, Plane::Control),
    method(RETRY, Access::Admin, Plane::Control),
    method(SEND_TEST, Access::Admin, Plane::Control),
    method("/keyward.v1.NoticeService/RotateWebhookSecret", Access::Admin, Plane::Control),
    method("/keyward.v1.ReplicaService/ListReplicas", Access::Root, Plane::Control),
    method("/keyward.v1.ReplicaService/ReleaseReplica", Access::Root, Plane::Control),
    method("/grpc.health.v1.Health/Check", Access::Public, Plane::Health),
    method("/grpc.health.v1.Health/Watch", Access::Public, Plane::Health),
    method("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Access::Public, Plane::Stream),
    method("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", Access::Public, Plane::Stream),
];

/// Counts a call as long as it is under way.
pub struct Active(Arc<AtomicUsize>);

impl Active {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(count))
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// An answer whose call is under way until the last of it is taken.
struct Counted {
    body: Body,
    _active: Active,
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<http_body::Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

/// What calls are counted under: the methods in their order, what is none, and what is asked by HTTP.
#[must_use]
pub fn counted_names() -> Vec<&'static str> {
    METHODS.iter().map(|method| method.path).chain([UNKNOWN_METHOD]).chain(super::http::COUNTED).collect()
}

/// How much may be under way at once, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Calls of the data plane at once.
    pub data_calls_max: usize,
    /// Calls of the control plane at once.
    pub control_calls_max: usize,
    /// Streams of questions at once, and as many that tell what has changed.
    pub streams_max: usize,
    /// How long a stream stays open without a message.
    pub stream_silence_max: Duration,
    /// How long a stream stays open at all; up to a tenth more, so that they do not come anew at once.
    pub stream_age_max: Duration,
    /// The longest deadline; also that of a caller who names none.
    pub deadline_max: Duration,
    /// Reports of leaked tokens from one address: so many at once, and as many in a minute.
    pub address_reports_max: NonZeroU32,
    /// Reports of leaked tokens from everywhere: so many at once, and as many in a second.
    pub reports_max: NonZeroU32,
    /// Tokens and secrets that one principal makes for itself, and notices that one workspace retries: so many at once, and as many in a minute.
    pub own_changes_max: NonZeroU32,
    /// Tests of notices that one workspace sends: so many at once, and as many in a minute.
    pub test_notices_max: NonZeroU32,
}

impl Default for Limits {
    fn default() -> Self {
        const ADDRESS_REPORTS: NonZeroU32 = NonZeroU32::new(30).unwrap();
        const REPORTS: NonZeroU32 = NonZeroU32::new(50).unwrap();
        const OWN: NonZeroU32 = NonZeroU32::new(60).unwrap();
        const TESTS: NonZeroU32 = NonZeroU32::new(6).unwrap();
        Self {
            data_calls_max: 4_096,
            control_calls_max: 256,
            streams_max: 1_024,
            stream_silence_max: Duration::from_mins(5),
            stream_age_max: Duration::from_hours(1),
            deadline_max: Duration::from_secs(15),
            address_reports_max: ADDRESS_REPORTS,
            reports_max: REPORTS,
            own_changes_max: OWN,
            test_notices_max: TESTS,
        }
    }
}

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Their address.
    pub address: SocketAddr,
    /// Whom their certificate stands for.
    pub certificate: Option<Arc<Caller>>,
    /// Turns true when the connection is to end.
    pub closing: Arc<watch::Receiver<bool>>,
}

/// The gate.
pub struct Gate {
    pub(super) api: Api,
    routes: Routes,
    pub(super) clock: Clock,
    pub(super) limits: Limits,
    data_calls: Arc<Semaphore>,
    control_calls: Arc<Semaphore>,
    health_calls: Arc<Semaphore>,
    report_calls: Arc<Semaphore>,
    pub(super) streams: Arc<Semaphore>,
    pub(super) watchers: Arc<Semaphore>,
    reports: Reports,
    own_changes: PerPrincipal,
    test_notices: PerPrincipal,
    retries: PerPrincipal,
    active: Arc<AtomicUsize>,
    control: Handle,
    gateway_peers: Vec<IpNet>,
}

impl Gate {
    /// One in front of these routes, which asks gateways at these addresses for no credentials. What has to wait is done on the present runtime.
    #[must_use]
    pub fn new(api: Api, routes: Routes, clock: Clock, limits: Limits, gateway_peers: Vec<IpNet>) -> Self {
        Self {
            api,
            routes,
            clock,
            limits,
            data_calls: Arc::new(Semaphore::new(limits.data_calls_max)),
            control_calls: Arc::new(Semaphore::new(limits.control_calls_max)),
            health_calls: Arc::new(Semaphore::new(HEALTH_CALLS_MAX)),
            report_calls: Arc::new(Semaphore::new(REPORT_CALLS_MAX)),
            streams: Arc::new(Semaphore::new(limits.streams_max)),
            watchers: Arc::new(Semaphore::new(limits.streams_max)),
            reports: Reports::new(limits.address_reports_max, limits.reports_max),
            own_changes: PerPrincipal::new(limits.own_changes_max),
            test_notices: PerPrincipal::new(limits.test_notices_max),
            retries: PerPrincipal::new(limits.own_changes_max),
            active: Arc::default(),
            control: Handle::current(),
            gateway_peers,
        }
    }

    /// Whether no call is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.active.load(Ordering::SeqCst) == 0
    }

    /// Something is under way until this is dropped.
    pub(super) fn begin(&self) -> Active {
        Active::new(&self.active)
    }

    /// Answers a call at once, if it is one that can be.
    pub fn serve_at_once<B>(&self, request: &mut Request<Begun<B>>, peer: &Peer, credentials: &Credentials) -> Option<Response<Reply>>
    where
        B: http_body::Body<Data = Bytes> + Unpin,
    {
        let watch = Stopwatch::start();
        // They stand at the head of the table.
        let at_once = METHODS.iter().enumerate().take_while(|(_, method)| method.plane == Plane::Data);
        let (place, method) = at_once.into_iter().find(|(_, method)| method.path == request.uri().path())?;
        let response = self.api.answer_at_once(request, peer, credentials, method.request_bytes_max, self.clock.now())?;
        self.api.metrics.request(place, 0, watch.elapsed());
        tracing::debug!(method = method.path, code = "OK", micros = watch.elapsed().as_micros(), peer = %peer.address.ip(), "call");
        if response.body().is_large() {
            return Some(response.map(|reply| reply.under_way(self.begin())));
        }
        Some(response)
    }

    /// Answers one call, on the runtime that the server was started on, where the store is.
    pub async fn serve_elsewhere<B>(self: Arc<Self>, request: Request<B>, peer: Arc<Peer>) -> Response<Reply>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let gate = Arc::clone(&self);
        let response = gate.elsewhere(async move { self.serve(request, &peer).await }).await;
        response.unwrap_or_else(|status| completed(status.into_http())).map(Reply::Generated)
    }

    /// Does something on the runtime that the server was started on. It goes no further if nobody waits for it any more.
    pub(super) fn elsewhere<T, W>(&self, work: W) -> impl Future<Output = Result<T, Status>> + Send + use<T, W>
    where
        T: Send + 'static,
        W: Future<Output = T> + Send + 'static,
    {
        // A set ends its tasks when it is dropped.
        let mut tasks = JoinSet::new();
        tasks.spawn_on(work, &self.control);
        async move {
            match tasks.join_next().await {
                Some(Ok(done)) => Ok(done),
                Some(Err(error)) => Err(Error::Internal(error.into()).into()),
                None => Err(Error::Internal("a task was lost".into()).into()),
            }
        }
    }

    /// Answers one call.
    async fn serve<B>(self: &Arc<Self>, request: Request<B>, peer: &Peer) -> Response<Body>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let watch = Stopwatch::start();
        let active = self.begin();
        let place = METHODS.iter().position(|method| method.path == request.uri().path());
        let known = place.and_then(|place| METHODS.get(place));
        let mut who = None;
        let response = match known {
            None => status::complete(&Status::unimplemented("")).unwrap_or_else(|| Status::unimplemented("")).into_http(),
            Some(method) => self.serve_known(*method, request, peer, &mut who).await,
        };
        let response = match known.map(|method| method.plane) {
            Some(Plane::Data | Plane::Control | Plane::Report) => {
                completed(response).map(|body| Body::new(Counted { body, _active: active }))
            }
            _ => completed(response),
        };
        let (path, code) = (known.map_or(UNKNOWN_METHOD, |method| method.path), code(response.headers()));
        if known.is_some_and(|method| method.plane == Plane::Held) && code == 0 {
            // It is counted at its end, under the code that it ends with.
            return response;
        }
        self.api.metrics.request(place.unwrap_or(METHODS.len()), code, watch.elapsed());
        let caller = who.as_ref().and_then(|caller: &Caller| caller.token_id);
        if let (Some(method), Some(caller)) = (known, who) {
            self.note_refusal(*method, caller, code);
        }
        tracing::debug!(
            method = path,
            code = telemetry::code_name(code),
            micros = watch.elapsed().as_micros(),
            peer = %peer.address.ip(),
            caller = caller.map(tracing::field::display),
            "call"
        );
        response
    }

    /// Notes that a call of the control plane was refused. What it asked for is not noted: it may hold anything.
    fn note_refusal(&self, method: Method, caller: Caller, code: usize) {
        let is_refusal = REFUSALS.iter().any(|refusal| usize::try_from(i32::from(*refusal)) == Ok(code));
        if method.plane != Plane::Control || !is_refusal {
            return;
        }
        let name = method.path.rsplit('/').next().unwrap_or_default();
        let refusal = Refusal { caller, method: name, code: telemetry::code_name(code), time: self.clock.now() };
        if !self.api.audit.refused(refusal) {
            self.api.metrics.unsampled();
        }
    }

    async fn serve_known<B>(self: &Arc<Self>, method: Method, request: Request<B>, peer: &Peer, who: &mut Option<Caller>) -> Response<Body>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        if method.plane == Plane::Stream {
            return self.route(request).await;
        }
        if method.plane == Plane::Held {
            return stream::open(self, method, request, peer, who).await.unwrap_or_else(Status::into_http);
        }
        if method.plane == Plane::Watch {
            return invalidations::open(self, method, request, peer, who).await.unwrap_or_else(Status::into_http);
        }
        let deadline = match deadline(request.headers(), self.limits.deadline_max) {
            Ok(deadline) => deadline,
            Err(error) => return Status::from(error).into_http(),
        };
        if deadline.is_zero() {
            return status::deadline_exceeded().into_http();
        }
        let begun = Stopwatch::start();
        let work = async { self.pass(method, request, peer, (begun, deadline), who).await.unwrap_or_else(Status::into_http) };
        timeout(deadline, work).await.unwrap_or_else(|_| status::deadline_exceeded().into_http())
    }

    /// Lets a call through to its handler. The caller is judged twice: before a byte of the message is read, and again when the whole of it is
    /// there, since a message may be long on its way and its caller revoked meanwhile.
    async fn pass<B>(
        &self,
        method: Method,
        request: Request<B>,
        peer: &Peer,
        (begun, longest): (Stopwatch, Duration),
        who: &mut Option<Caller>,
    ) -> Result<Response<Body>, Status>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        if method.plane == Plane::Report && !self.reports.admit(peer.address.ip()) {
            return Err(status::overloaded("too many reports were sent; try again".to_owned()));
        }
        self.identify(method, request.headers(), peer, Judge::BeforeTheMessage, who).await?;
        let mut request = whole(request, method.request_bytes_max).await?;
        let Ok(place) = Arc::clone(self.places(method.plane)).try_acquire_owned() else {
            self.api.metrics.shed();
            return Err(status::overloaded("too many calls are under way; try again".to_owned()));
        };
        let deadline = Deadline::new(begun, longest);
        *deadline.place.lock() = Some(place);
        if let Some(call) = self.identify(method, request.headers(), peer, Judge::WithTheMessage, who).await? {
            if OWN_CHANGES.contains(&method.path) && !self.own_changes.admit(&call.caller.workspace, &call.caller.principal) {
                return Err(status::overloaded("this principal makes too many tokens for itself; try again in a minute".to_owned()));
            }
            // Whoever administers a workspace can make any number of principals in it.
            let everybody = Arc::from("");
            if method.path == SEND_TEST && !self.test_notices.admit(&call.caller.workspace, &everybody) {
                return Err(status::overloaded("this workspace sends too many tests of notices; try again in a minute".to_owned()));
            }
            if method.path == RETRY && !self.retries.admit(&call.caller.workspace, &everybody) {
                return Err(status::overloaded("this workspace retries too many notices; try again in a minute".to_owned()));
            }
            request.headers_mut().remove(AUTHORIZATION);
            request.extensions_mut().insert(Call { deadline: deadline.clone(), ..call });
        }
        Ok(self.route(request).await)
    }

    pub(super) fn places(&self, plane: Plane) -> &Arc<Semaphore> {
        match plane {
            Plane::Data => &self.data_calls,
            Plane::Control => &self.control_calls,
            Plane::Report => &self.report_calls,
            Plane::Health | Plane::Stream => &self.health_calls,
            Plane::Held => &self.streams,
            Plane::Watch => &self.watchers,
        }
    }

    /// Finds out who is calling and whether they may, now; nobody for a method that is open to all.
    pub(super) async fn identify(
        &self,
        method: Method,
        headers: &HeaderMap,
        peer: &Peer,
        judge: Judge,
        who: &mut Option<Caller>,
    ) -> Result<Option<Call>, Error> {
        let now = self.clock.now();
        let address = Some(peer.address.ip().to_canonical());
        if method.access == Access::Public {
            return Ok(Some(Call {
                caller: Caller::nobody(address),
                now,
                deadline: Deadline::new(Stopwatch::start(), self.limits.deadline_max),
            }));
        }
        let caller = match self.identity(bearer(headers)?, peer, method.path == CHECK, judge, now).await? {
            Identity::Good(caller) => caller,
            Identity::Refused(known) => {
                *who = known;
                return Err(Error::Unauthenticated(CREDENTIALS_REFUSED));
            }
        };
        *who = Some(caller.clone());
        caller.authorize(method.access)?;
        Ok(Some(Call { caller, now, deadline: Deadline::new(Stopwatch::start(), self.limits.deadline_max) }))
    }

    /// Whom a call comes from. A gateway is asked for no credentials if its address is known.
    async fn identity(&self, presented: Option<&[u8]>, peer: &Peer, is_gateway: bool, judge: Judge, now: Time) -> Result<Identity, Error> {
        let address = peer.address.ip().to_canonical();
        match (presented, &peer.certificate) {
            (Some(text), _) => self.api.validator.identify(text, Some(address), judge == Judge::BeforeTheMessage, now).await,
            (None, Some(certificate)) => self.api.validator.identify_certificate(certificate).await,
            (None, None) if is_gateway && self.gateway_peers.iter().any(|range| range.contains(&address)) => {
                Ok(Identity::Good(Caller::gateway(address)))
            }
            (None, None) => Err(Error::Unauthenticated(CREDENTIALS_MISSING)),
        }
    }

    /// As [`Gate::identify`], by what was presented elsewhere than in `authorization`.
    pub(super) async fn identify_presented(
        &self,
        presented: Option<&[u8]>,
        access: Access,
        is_gateway: bool,
        peer: &Peer,
        judge: Judge,
    ) -> Result<Caller, Error> {
        match self.identity(presented, peer, is_gateway, judge, self.clock.now()).await? {
            Identity::Good(caller) => caller.authorize(access).map(|()| caller),
            Identity::Refused(_) => Err(Error::Unauthenticated(CREDENTIALS_REFUSED)),
        }
    }

    pub(super) async fn route<B>(&self, request: Request<B>) -> Response<Body>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        match self.routes.clone().call(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    }
}

/// Waits for the whole of a request, as far as its method takes it.
pub(super) async fn whole<B>(request: Request<B>, bytes_max: usize) -> Result<Request<Full<Bytes>>, Status>
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// The prefix of a message: one byte of flags, four of length.
    const FRAME_HEADER_BYTES: usize = 5;
    let (head, body) = request.into_parts();
    let collected = timeout(MESSAGE_TIMEOUT, Limited::new(body, bytes_max + FRAME_HEADER_BYTES).collect()).await;
    let collected = collected.map_err(|_| status::deadline_exceeded())?.map_err(|error| match error.downcast::<LengthLimitError>() {
        Ok(_) => status::message_too_large(bytes_max),
        Err(error) => Status::from_error(error),
    })?;
    Ok(Request::from_parts(head, Full::new(collected.to_bytes())))
}

/// The token that the caller presents (RFC 6750, section 2.1); nothing if they present none.
fn bearer(headers: &HeaderMap) -> Result<Option<&[u8]>, Error> {
    const RULE: Error = Error::Unauthenticated("the metadata `authorization` must be there once, as `Bearer <token>`");
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(RULE);
    }
    token_of(value).map(Some).ok_or(RULE)
}

/// The token in the value of `authorization`.
pub(super) fn token_of(value: &HeaderValue) -> Option<&[u8]> {
    let (scheme, token) = value.as_bytes().split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(token)
}

/// How long the caller waits: at most 8 digits and a unit, as the gRPC protocol has it; at most our own limit.
pub(super) fn deadline(headers: &HeaderMap, longest: Duration) -> Result<Duration, Error> {
    let Some(value) = headers.get(GRPC_TIMEOUT) else { return Ok(longest) };
    let parse = || {
        let (digits, unit) = value.to_str().ok()?.split_at_checked(value.len().checked_sub(1)?)?;
        let well_formed = (1..=8).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit());
        let number: u64 = digits.parse().ok().filter(|_| well_formed)?;
        Some(match unit {
            "H" => Duration::from_hours(number),
            "M" => Duration::from_mins(number),
            "S" => Duration::from_secs(number),
            "m" => Duration::from_millis(number),
            "u" => Duration::from_micros(number),
            "n" => Duration::from_nanos(number),
            _ => return None,
        })
    };
    parse().map(|wished| wished.min(longest)).ok_or_else(|| Error::invalid(GRPC_TIMEOUT, "must be 1 to 8 digits and one of H M S m u n"))
}

/// The status that an answer without a body carries; an answer with one is taken for good.
fn code(headers: &HeaderMap) -> usize {
    headers.get(Status::GRPC_STATUS).and_then(|value| value.to_str().ok()?.parse().ok()).unwrap_or(0)
}

/// Gives an error that the framework made the details that ours have.
fn completed(response: Response<Body>) -> Response<Body> {
    if code(response.headers()) == 0 {
        return response;
    }
    match Status::from_header_map(response.headers()).as_ref().and_then(status::complete) {
        Some(status) => status.into_http(),
        None => response,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, values: &[&'static str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(name, value.parse().expect("a header value"));
        }
        headers
    }

    #[test]
    fn credentials_are_taken_once_and_whole() {
        let token = |values| bearer(&headers("authorization", values)).map(|token| token.map(<[u8]>::to_vec));
        assert!(token(&[]).expect("none").is_none());
        assert_eq!(token(&["Bearer abc"]).expect("one").as_deref(), Some(b"abc".as_slice()));
        assert_eq!(token(&["bearer abc"]).expect("the scheme has no case").as_deref(), Some(b"abc".as_slice()));
        for bad in [&["Basic abc"][..], &["Bearer"], &["abc"], &["Bearer a", "Bearer b"], &[""]] {
            assert!(token(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn deadlines_follow_the_protocol() {
        let longest = Duration::from_secs(15);
        let of = |value| deadline(&headers("grpc-timeout", &[value]), longest);
        assert_eq!(of("250m").ok(), Some(Duration::from_millis(250)));
        assert_eq!(of("99999999H").ok(), Some(longest));
        assert_eq!(deadline(&HeaderMap::new(), longest).ok(), Some(longest));
        for bad in ["", "m", "5", "123456789S", "-1S", "1.5S", "5s", "+5S"] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }
}
