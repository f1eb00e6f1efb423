//! The running server: opens the store, listens, ticks, drains.
//!
//! Invariant: health says `NOT_SERVING` until everything is ready and from the moment a drain begins (test `health_tells_the_drain`).
//! Invariant: a clean stop writes every use that was counted (test `uses_are_counted_exactly_after_a_clean_stop`).

mod connection;
mod http;
mod tls;
mod workers;

use std::{convert::Infallible, io::Write as _, net::SocketAddr, os::unix::fs::DirBuilderExt as _, path::Path, sync::Arc, time::Duration};

use ::http::{Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    task::JoinHandle,
    time::{MissedTickBehavior, interval, timeout},
};
use tonic_health::{
    ServingStatus,
    server::{HealthReporter, HealthService},
};

use self::{
    connection::{Phase, Port},
    http::HttpPort,
    tls::Certificates,
    workers::Workers,
};
use crate::{
    ambient::Clock,
    api::{self, Api, gate},
    audit::Audit,
    cache::Cache,
    config::{CertificateIdentity, Config},
    directory::{Certificate, Directory, Outlets},
    error::Error,
    fence::{self, Fence, Membership},
    issuer::Issuer,
    notices::{self, Notices},
    retention::{Periods, Retention},
    store::{DatabaseUrl, Store},
    telemetry::{self, Metrics},
    token::{Keyring, Secret},
    usage::Usage,
    validator::Validator,
};

/// How often counted uses are written.
const USAGE_INTERVAL: Duration = Duration::from_secs(1);
/// How often what nobody needs any more is removed.
const PRUNE_INTERVAL: Duration = Duration::from_secs(10);
/// How often the outbox of notices is looked into.
const OUTBOX_INTERVAL: Duration = Duration::from_secs(1);
/// How long a clean stop waits for notices that are being delivered; they are tried again otherwise.
const NOTICES_TIMEOUT: Duration = Duration::from_secs(1);
/// How often certificates are looked after.
const WATCH_INTERVAL: Duration = Duration::from_secs(3);
/// How long a clean stop tries to write counted uses and to close the database.
const LAST_WRITES_TIMEOUT: Duration = Duration::from_secs(5);
/// How much of that time is given to reports of leaked tokens that are not done yet.
const REPORTS_TIMEOUT: Duration = Duration::from_secs(3);
const METRICS_CONNECTIONS_MAX: usize = 64;

/// A server that answers.
pub struct Server {
    address: SocketAddr,
    http_address: Option<SocketAddr>,
    metrics_address: Option<SocketAddr>,
    rooms: Rooms,
    port: Arc<Port>,
    http_port: Arc<HttpPort>,
    phase: watch::Sender<Phase>,
    health: HealthReporter,
    metrics_task: Option<JoinHandle<()>>,
    membership: Membership,
}

/// The rooms of one server.
#[derive(Clone)]
struct Rooms {
    clock: Clock,
    store: Arc<Store>,
    usage: Arc<Usage>,
    validator: Arc<Validator>,
    issuer: Arc<Issuer>,
    directory: Arc<Directory>,
    audit: Arc<Audit>,
    fence: Arc<Fence>,
    retention: Arc<Retention>,
    notices: Arc<Notices>,
    metrics: Arc<Metrics>,
    certificates: Option<Arc<Certificates>>,
}

impl Server {
    /// Starts one. Returns when it answers. On an empty store `show` gets the root token and the address where it will be good, before it counts:
    /// what cannot be shown is not made.
    ///
    /// # Errors
    /// A sentence for the operator: what is wrong and what to do.
    pub async fn start(
        config: &Config,
        clock: Clock,
        limits: gate::Limits,
        show: impl FnOnce(&Secret, SocketAddr) -> Result<(), String>,
    ) -> Result<Self, String> {
        install_crypto_provider();
        // First what is quick to fail, and only then what leaves traces.
        let certificates = config.tls.as_ref().map(Certificates::load).transpose()?.map(Arc::new);
        let listener = listen("listen", config.listen).await?;
        let metrics_listener = match config.metrics_listen {
            Some(address) => Some(listen("metrics_listen", address).await?),
            None => None,
        };
        let http_listener = match config.http_listen {
            Some(address) => Some(listen("http_listen", address).await?),
            None => None,
        };
        let metrics = Arc::new(Metrics::new(&gate::counted_names()));
        let address = local_address(&listener)?;
        let show = |secret: &Secret| show(secret, address);
        let rooms = Rooms::open(config, clock, Arc::clone(&metrics), certificates.clone(), show).await?;
        let health = HealthReporter::new();
        set_health(&health, ServingStatus::NotServing).await;
        let api = Api {
            validator: Arc::clone(&rooms.validator),
            issuer: Arc::clone(&rooms.issuer),
            directory: Arc::clone(&rooms.directory),
            audit: Arc::clone(&rooms.audit),
            notices: Arc::clone(&rooms.notices),
            fence: Arc::clone(&rooms.fence),
            metrics: Arc::clone(&metrics),
        };
        let routes = api.clone().routes(HealthService::from_health_reporter(health.clone())).map_err(|error| error.to_string())?;
        let (phase, phase_receiver) = watch::channel(Phase::Serving);
        let gate = Arc::new(gate::Gate::new(api, routes, rooms.clock.clone(), limits, config.gateway_peers.clone()));
        let http = Arc::new(HttpPort {
            gate: Arc::clone(&gate),
            certificates: certificates.clone(),
            phase: phase_receiver.clone(),
            able: rooms.fence.able(),
            permits: Arc::new(Semaphore::new(http::CONNECTIONS_MAX.into())),
        });
        let port = Port::new(gate, certificates, metrics, phase_receiver);
        let workers = Workers::start(config.workers, &port)?;
        // Before the first question, and after all that may take its time.
        let membership = rooms.fence.join().await.map_err(|error| error.to_string())?;
        let mut server = Self {
            address,
            http_address: http_listener.as_ref().map(local_address).transpose()?,
            http_port: http,
            metrics_address: metrics_listener.as_ref().map(local_address).transpose()?,
            port,
            phase,
            health,
            metrics_task: None,
            membership,
            rooms,
        };
        server.spawn_ticks(config.notices_interval);
        server.metrics_task = metrics_listener.map(|listener| tokio::spawn(serve_metrics(listener, server.rooms.clone())));
        tokio::spawn(Arc::clone(&server.port).accept(listener, workers));
        if let Some(listener) = http_listener {
            tokio::spawn(Arc::clone(&server.http_port).accept(listener));
        }
        set_health(&server.health, ServingStatus::Serving).await;
        let http = server.http_address.map(tracing::field::display);
        tracing::info!(address = %server.address, http, version = telemetry::VERSION, database = ?config.database_url, "serving");
        Ok(server)
    }

    /// Where gRPC is served.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where gateways ask by HTTP.
    #[must_use]
    pub fn http_address(&self) -> Option<SocketAddr> {
        self.http_address
    }

    /// Where metrics are served.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_address
    }

    /// Reads the certificates again, now.
    ///
    /// # Errors
    /// A sentence that names the file; the certificates in use stay.
    pub fn reload(&self) -> Result<bool, String> {
        self.rooms.certificates.as_ref().map_or(Ok(false), |certificates| certificates.reload())
    }

    /// Stops: says so, finishes what is under way, writes what was counted.
    ///
    /// # Errors
    /// A sentence, if something could not be written.
    pub async fn stop(self) -> Result<(), String> {
        tracing::info!("draining");
        // First, so that nobody says the opposite afterwards.
        self.phase.send_replace(Phase::Draining);
        set_health(&self.health, ServingStatus::NotServing).await;
        tokio::join!(self.port.drained(&self.phase), self.http_port.drained());
        self.port.quiet().await;
        if let Some(metrics) = &self.metrics_task {
            metrics.abort();
        }
        let end = async {
            if let Err(error) = self.membership.leave().await {
                tracing::warn!(%error, "changes may wait for this server as long as its lease, or until it is released if it has to confirm them");
            }
            // What is not through by then is taken up again when its lease has ended.
            let _interrupted = timeout(NOTICES_TIMEOUT, self.rooms.notices.stop()).await;
            let flushed = self.rooms.usage.flush(&self.rooms.store).await;
            let flushed = flushed.and(self.rooms.audit.tick().await);
            if timeout(REPORTS_TIMEOUT, self.rooms.issuer.finish_reports()).await.is_err() {
                tracing::error!("some tokens that were reported as leaked are not ended: report them again");
            }
            flushed.and(self.rooms.store.close().await)
        };
        match timeout(LAST_WRITES_TIMEOUT, end).await {
            Ok(Ok(())) => {
                tracing::info!("stopped");
                Ok(())
            }
            _ => Err(format!(
                "the database did not take everything in time; the uses of up to {} tokens are not written",
                self.rooms.usage.backlog()
            )),
        }
    }

    fn spawn_ticks(&self, notices_interval: Duration) {
        let rooms = self.rooms.clone();
        every(notices_interval, self.phase.subscribe(), move || {
            let rooms = rooms.clone();
            async move { report("not all tokens near their end were told", rooms.notices.scan(rooms.clock.now()).await.map(drop)) }
        });
        let rooms = self.rooms.clone();
        every(OUTBOX_INTERVAL, self.phase.subscribe(), move || {
            let rooms = rooms.clone();
            async move { report("notices could not be delivered; they are kept", rooms.notices.deliver(rooms.clock.now()).await) }
        });
        let rooms = self.rooms.clone();
        every(USAGE_INTERVAL, self.phase.subscribe(), move || {
            let rooms = rooms.clone();
            async move { report("counted uses could not be written; they are kept", rooms.usage.flush(&rooms.store).await) }
        });
        let rooms = self.rooms.clone();
        every(PRUNE_INTERVAL, self.phase.subscribe(), move || {
            let rooms = rooms.clone();
            async move { report("old rows could not be removed", rooms.fence.tick(rooms.clock.now()).await) }
        });
        let rooms = self.rooms.clone();
        every(PRUNE_INTERVAL, self.phase.subscribe(), move || {
            let rooms = rooms.clone();
            async move { report("what has ended long ago could not be removed", rooms.retention.tick(rooms.clock.now()).await.map(drop)) }
        });
        let rooms = self.rooms.clone();
        every(USAGE_INTERVAL, self.phase.subscribe(), move || {
            let rooms = rooms.clone();
            async move { report("refused calls could not be noted; they are kept", rooms.audit.tick().await) }
        });
        let rooms = self.rooms.clone();
        every(WATCH_INTERVAL, self.phase.subscribe(), move || {
            rooms.reload_certificates();
            std::future::ready(())
        });
        tokio::spawn(tell_health(self.health.clone(), self.rooms.fence.able(), self.phase.subscribe()));
    }
}

/// Makes one more root token, without a server: whoever may read the keyring and write the database may do everything anyway.
///
/// # Errors
/// A sentence for the operator: what is wrong and what to do.
pub async fn recover(config: &Config, clock: &Clock) -> Result<Secret, String> {
    const NEW: &str = "there is nothing to recover: this database is new, and the first start of `keyward serve` makes its root token";
    if matches!(&config.database_url, DatabaseUrl::Sqlite(path) if !path.exists()) {
        return Err(NEW.to_owned());
    }
    let store = Arc::new(Store::open(&config.database_url, config.migrate_on_start, Box::new(|_, _, _| ())).await?);
    if !store.has_keys().await.map_err(|error| error.to_string())? {
        return Err(NEW.to_owned());
    }
    let keyring = Arc::new(open_keyring(&store, &config.keyring_file).await?);
    let fence = Fence::new(Arc::new(Cache::new(0, config.lease)), Arc::clone(&store), clock.clone(), fence_settings(config));
    let recovered = Issuer::new(keyring, Arc::clone(&store), fence).recover(clock.now()).await;
    let closed = store.close().await.map_err(|error| error.to_string());
    let secret = recovered.map_err(|error| match error {
        Error::NotFound(_) => NEW.to_owned(),
        error => error.to_string(),
    })?;
    closed.map(|()| secret)
}

impl Rooms {
    async fn open(
        config: &Config,
        clock: Clock,
        metrics: Arc<Metrics>,
        certificates: Option<Arc<Certificates>>,
        show: impl FnOnce(&Secret) -> Result<(), String>,
    ) -> Result<Self, String> {
        make_folder(&config.data_dir)?;
        let observed = Arc::clone(&metrics);
        let observer = Box::new(move |verb, elapsed, failed| observed.store(verb, elapsed, failed));
        let store = Arc::new(Store::open(&config.database_url, config.migrate_on_start, observer).await?);
        let keyring = Arc::new(open_keyring(&store, &config.keyring_file).await?);
        let cache = Arc::new(Cache::new(config.cache_bytes, config.lease));
        let usage = Arc::new(Usage::default());
        let fence = Fence::new(Arc::clone(&cache), Arc::clone(&store), clock.clone(), fence_settings(config));
        let issuer = Issuer::new(Arc::clone(&keyring), Arc::clone(&store), Arc::clone(&fence));
        let directory =
            Directory::new(Arc::clone(&keyring), Arc::clone(&store), Arc::clone(&fence), certificates_of(config), outlets_of(config));
        let notices = Notices::new(Arc::clone(&keyring), Arc::clone(&store), clock.clone(), notices_settings(config)?)?;
        let audit = Audit::new(Arc::clone(&keyring), Arc::clone(&store));
        let periods = Periods { tokens: config.token_retention, audit: config.audit_retention };
        let retention = Retention::new(Arc::clone(&store), Arc::clone(&fence), periods);
        let keep = |secret: &Secret| {
            let written = config.root_token_file.as_ref().map_or(Ok(()), |path| write_root_token(path, secret));
            written.and_then(|()| show(secret)).map_err(|error| Error::Internal(error.into()))
        };
        issuer.bootstrap(clock.now(), keep).await.map_err(|error| match error {
            Error::Internal(source) => source.to_string(),
            error => error.to_string(),
        })?;
        directory.make_certificates_principals(clock.now()).await.map_err(|error| error.to_string())?;
        let validator = Validator::new(keyring, Arc::clone(&cache), Arc::clone(&store), Arc::clone(&usage));
        Ok(Self { clock, store, usage, validator, issuer, directory, audit, fence, retention, notices, metrics, certificates })
    }

    fn reload_certificates(&self) {
        match self.certificates.as_ref().map(|certificates| certificates.reload()) {
            None | Some(Ok(false)) => {}
            Some(Ok(true)) => tracing::info!("the certificates were read anew"),
            Some(Err(error)) => tracing::error!(%error, "the certificates on disk cannot be used; those from before stay"),
        }
    }
}

/// How this server can tell anybody anything.
fn outlets_of(config: &Config) -> Outlets {
    Outlets { mail: config.smtp.is_some(), http: !config.webhook_allowed_cidrs.is_empty() }
}

/// How this server stands beside others.
fn fence_settings(config: &Config) -> fence::Settings {
    fence::Settings {
        name: config.replica_name.clone(),
        version: telemetry::VERSION.to_owned(),
        lease: config.lease,
        is_acked_only: config.is_acked_only,
    }
}

fn notices_settings(config: &Config) -> Result<notices::Settings, String> {
    let read = |path: &std::path::PathBuf| {
        std::fs::read(path).map_err(|error| format!("notices_ca_file {} cannot be read: {error}", path.display()))
    };
    Ok(notices::Settings {
        mail: config.smtp.clone(),
        webhook_allowed_cidrs: config.webhook_allowed_cidrs.clone(),
        ca: config.notices_ca_file.as_ref().map(read).transpose()?,
    })
}

/// Whom certificates stand for.
fn certificates_of(config: &Config) -> Vec<Certificate> {
    let certificate = |identity: &CertificateIdentity| Certificate {
        workspace: identity.workspace.clone(),
        principal: identity.principal.clone(),
        scopes: identity.scopes.clone(),
    };
    config.tls.iter().flat_map(|tls| &tls.clients).map(certificate).collect()
}

/// rustls takes one provider for the whole process.
pub fn install_crypto_provider() {
    // An error says that there is one already, which is then this one.
    let _already = rustls::crypto::ring::default_provider().install_default();
}

async fn set_health(health: &HealthReporter, status: ServingStatus) {
    for service in api::SERVICES.into_iter().chain([""]) {
        health.set_service_status(service, status).await;
    }
}

/// Says that nothing can be answered while the store is silent and memory is not good any more, until a drain begins.
async fn tell_health(health: HealthReporter, mut able: watch::Receiver<bool>, mut phase: watch::Receiver<Phase>) {
    loop {
        tokio::select! {
            changed = able.changed() => if changed.is_err() { return },
            _ = phase.wait_for(|phase| *phase != Phase::Serving) => return,
        }
        let is_able = *able.borrow_and_update();
        set_health(&health, if is_able { ServingStatus::Serving } else { ServingStatus::NotServing }).await;
    }
}

async fn listen(setting: &str, address: SocketAddr) -> Result<TcpListener, String> {
    let listener = TcpListener::bind(address).await;
    listener.map_err(|error| {
        format!("{setting} {address} cannot be listened on: {error}; name another address with --{}", setting.replace('_', "-"))
    })
}

fn local_address(listener: &TcpListener) -> Result<SocketAddr, String> {
    listener.local_addr().map_err(|error| error.to_string())
}

fn make_folder(path: &Path) -> Result<(), String> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|error| format!("the folder {} cannot be made: {error}; name another one with --data-dir", path.display()))
}

/// The keyring that this store's tokens were made with; a new one if none ever were.
async fn open_keyring(store: &Store, path: &Path) -> Result<Keyring, String> {
    let keyring = match Keyring::load(path)? {
        Some(keyring) => keyring,
        None if store.has_keys().await.map_err(|error| error.to_string())? => {
            return Err(format!(
                "the keyring {} is missing, and without it every token of this database would look forged: put back the copy that you keep \
                 of it, or name its place with --keyring-file",
                path.display()
            ));
        }
        None => {
            let keyring = Keyring::generate().map_err(|error| error.to_string())?;
            if keyring.save_first(path)? {
                tracing::info!(path = %path.display(), "made a new keyring: keep a copy of it in a safe place");
                keyring
            } else {
                Keyring::load(path)?.ok_or_else(|| format!("the keyring {} has just been removed", path.display()))?
            }
        }
    };
    store.settle_keyring(&keyring).await?;
    Ok(keyring)
}

fn write_root_token(path: &Path, secret: &Secret) -> Result<(), String> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let write = || {
        // A file that is there already might be readable by others: it makes way for one that is not.
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        writeln!(file, "{}", secret.reveal())?;
        file.sync_all()
    };
    write().map_err(|error| format!("root_token_file {} cannot be written: {error}; nothing was created", path.display()))
}

/// Runs a tick again and again until the drain begins; one that takes long delays the next, and one that has begun ends.
fn every<F>(period: Duration, mut phase: watch::Receiver<Phase>, mut tick: impl FnMut() -> F + Send + 'static)
where
    F: Future<Output = ()> + Send,
{
    tokio::spawn(async move {
        let mut interval = interval(period);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let draining = tokio::select! {
                _ = interval.tick() => false,
                _ = phase.wait_for(|phase| *phase != Phase::Serving) => true,
            };
            if draining {
                return;
            }
            tick().await;
        }
    });
}

/// Logs a failure of background work, which will be tried again.
fn report(what: &'static str, outcome: Result<(), Error>) {
    if let Err(error) = outcome {
        let below = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        tracing::warn!(%error, below, "{what}");
    }
}

/// The page for Prometheus.
async fn serve_metrics(listener: TcpListener, rooms: Rooms) {
    let permits = Arc::new(Semaphore::new(METRICS_CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let rooms = rooms.clone();
        tokio::spawn(async move {
            let _permit = permit;
            let service =
                service_fn(move |request: Request<Incoming>| std::future::ready(Ok::<_, Infallible>(metrics_answer(&request, &rooms))));
            let mut builder = http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(5)).keep_alive(false);
            // A reader that goes away is no concern of ours.
            let _gone = timeout(Duration::from_secs(30), builder.serve_connection(TokioIo::new(stream), service)).await;
        });
    }
}

fn metrics_page(rooms: &Rooms) -> Result<String, std::fmt::Error> {
    rooms.metrics.page(
        rooms.validator.stats(),
        rooms.usage.backlog(),
        rooms.retention.removed(),
        &rooms.notices.stats(),
        rooms.fence.stats(),
    )
}

fn metrics_answer(request: &Request<Incoming>, rooms: &Rooms) -> Response<String> {
    let (status, content_type, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => match metrics_page(rooms) {
            Ok(page) => (StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", page),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, "text/plain", error.to_string()),
        },
        _ => (StatusCode::NOT_FOUND, "text/plain", "the metrics are at /metrics\n".to_owned()),
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, ::http::HeaderValue::from_static(content_type));
    response
}
