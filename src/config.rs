//! Every setting of the server: its name in three forms, its default, its rule.
//!
//! A setting `data_dir` is the flag `--data-dir`, the variable `KEYWARD_DATA_DIR` and the key `data_dir` in the settings file; the first
//! of these that is given counts. What holds a secret can also be read from a file: `KEYWARD_DATABASE_URL_FILE`.
//!
//! Invariant: every mistake is reported at once, with the fix, and unknown names are refused (test `every_mistake_is_reported_at_once`).

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::IpNet;

use crate::{
    ambient, fence,
    notices::{self, SmtpUrl},
    rules,
    scope::Scope,
    store::DatabaseUrl,
};

/// Before every variable.
const ENV_PREFIX: &str = "KEYWARD_";
/// The settings file that is read if it is there and no other is named.
const FILE_DEFAULT: &str = "keyward.toml";
/// Variables of the command line's client side, and of the tests.
const ENV_OTHERS: [&str; 6] =
    ["KEYWARD_ADDRESS", "KEYWARD_TOKEN", "KEYWARD_TOKEN_FILE", "KEYWARD_CA_FILE", "KEYWARD_OUTPUT", "KEYWARD_CONFIG"];
const ENV_TESTS: &str = "KEYWARD_TEST_";

/// One setting, for the parser, the help and the documentation.
#[derive(Debug)]
pub struct Setting {
    /// Its name in the settings file.
    pub name: &'static str,
    /// What it is when nobody says anything, as people read it.
    pub default: &'static str,
    /// What it means.
    pub help: &'static str,
    /// What a value looks like; empty: it is on or off.
    pub value: &'static str,
    /// Whether it holds a secret.
    pub secret: bool,
}

const fn setting(name: &'static str, value: &'static str, default: &'static str, help: &'static str) -> Setting {
    Setting { name, default, help, value, secret: false }
}

/// All of them.
pub const SETTINGS: [Setting; 28] = [
    setting("listen", "ADDRESS:PORT", "127.0.0.1:50051", "Where gRPC is served"),
    setting(
        "http_listen",
        "ADDRESS:PORT|off",
        "127.0.0.1:8080",
        "Where gateways ask by HTTP: /v1/authorize, /oauth2/introspect, /healthz, /readyz",
    ),
    setting(
        "gateway_peers",
        "CIDR…",
        "",
        "Addresses of gateways that cannot present credentials: they may ask by /v1/authorize and Envoy's API about tokens of every workspace",
    ),
    setting("metrics_listen", "ADDRESS:PORT|off", "127.0.0.1:9464", "Where Prometheus reads metrics, at /metrics"),
    setting("data_dir", "FOLDER", "keyward-data", "Where the embedded database and the keyring are kept"),
    Setting {
        secret: true,
        ..setting("database_url", "URL", "sqlite://<data_dir>/keyward.db", "sqlite://FILE or postgres://USER:PASSWORD@HOST:PORT/DATABASE")
    },
    setting(
        "lease",
        "SPAN",
        "10s",
        "How long a server answers from memory after it has last asked PostgreSQL what changed, and how long a server that hangs can delay a change (1s to 60s)",
    ),
    setting(
        "fence_mode",
        "lease|acked_only",
        "lease",
        "Whether changes stop waiting for this server once it was silent for longer than its lease, or wait until it is released by hand (keyward replica release)",
    ),
    setting("replica_name", "TEXT", "<host name>", "What keyward replica list calls this server"),
    setting("keyring_file", "FILE", "<data_dir>/keyring", "The keys that tokens are made with; all servers of a database have the same"),
    setting("migrate_on_start", "true|false", "true", "Bring the database's schema up to date when the server starts"),
    setting("root_token_file", "FILE", "", "On the first start, also write the root token to this file (mode 0600)"),
    setting("tls_cert", "FILE", "", "Certificate chain (PEM); read again when it changes and on SIGHUP"),
    setting("tls_key", "FILE", "", "Private key of the certificate (PEM)"),
    setting("tls_client_ca", "FILE", "", "Who may sign client certificates (PEM); a client without one needs a token"),
    setting(
        "tls_client_map",
        "NAME=WORKSPACE/PRINCIPAL SCOPE…;…",
        "",
        "Whom a client certificate stands for, by its DNS or URI name: gw.internal=default/gateway keyward:validate",
    ),
    setting("insecure", "", "false", "Serve a network address without TLS: tokens then cross the network readable"),
    setting("token_retention", "DAYSd", "30d", "How long ended tokens stay listed, and deleted ones are kept (30d to 3650d)"),
    setting("audit_retention", "DAYSd", "365d", "How long audit events are kept (30d to 36500d)"),
    Setting {
        secret: true,
        ..setting(
            "smtp_url",
            "URL",
            "",
            "The mail server: smtps://USER:PASSWORD@HOST (TLS), smtp://… (STARTTLS), smtp://HOST:25?tls=off; without it no mail is sent",
        )
    },
    setting("smtp_from", "ADDRESS", "", "Whom mails come from: keyward@example.com"),
    setting("notices_interval", "SPAN", "1m", "How often tokens near their end are looked for (1s to 1h)"),
    setting("notices_ca_file", "FILE", "", "Certificates (PEM) that the mail server and webhooks are trusted by, beside the system's"),
    setting(
        "webhook_allowed_cidrs",
        "RANGE …",
        "",
        "Private addresses that webhooks of every workspace may reach, also without TLS: 10.1.0.0/16",
    ),
    setting("cache_bytes", "BYTES", "268435456", "Memory for known tokens, about 200 bytes each (4194304 to 1099511627776)"),
    setting("workers", "COUNT", "one per core", "Threads that answer questions about tokens (1 to 1024)"),
    setting("log", "off|error|warn|info|debug|trace", "info", "How much is logged"),
    setting("log_format", "text|json", "text", "How it is logged"),
];

/// Where values come from, strongest first.
#[derive(Debug, Default)]
pub struct Sources {
    /// Flags that were given, by the setting's name.
    pub flags: BTreeMap<&'static str, String>,
    /// The environment.
    pub env: BTreeMap<String, String>,
    /// The settings file that was named.
    pub file: Option<PathBuf>,
}

/// How logs are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs: one JSON object a line.
    Json,
}

/// Whom a client certificate stands for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CertificateIdentity {
    /// The DNS or URI name in the certificate.
    pub name: String,
    /// The workspace.
    pub workspace: String,
    /// The principal.
    pub principal: String,
    /// What they may do.
    pub scopes: Vec<Scope>,
}

/// TLS for gRPC.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tls {
    /// The certificate chain.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Who signs client certificates.
    pub client_ca: Option<PathBuf>,
    /// Whom they stand for.
    pub clients: Vec<CertificateIdentity>,
}

/// The settings of a server, checked.
#[derive(Clone, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "each field is the setting of its name in SETTINGS, which says what it means")]
pub struct Config {
    pub listen: SocketAddr,
    pub metrics_listen: Option<SocketAddr>,
    /// Addresses of gateways that need no credentials.
    pub gateway_peers: Vec<IpNet>,
    /// Where gateways ask by HTTP; nothing: nowhere.
    pub http_listen: Option<SocketAddr>,
    pub data_dir: PathBuf,
    pub database_url: DatabaseUrl,
    pub lease: Duration,
    pub is_acked_only: bool,
    pub replica_name: String,
    pub keyring_file: PathBuf,
    pub migrate_on_start: bool,
    pub root_token_file: Option<PathBuf>,
    pub tls: Option<Tls>,
    pub insecure: bool,
    pub token_retention: Duration,
    pub audit_retention: Duration,
    pub smtp: Option<(SmtpUrl, String)>,
    pub notices_interval: Duration,
    pub notices_ca_file: Option<PathBuf>,
    pub webhook_allowed_cidrs: Vec<IpNet>,
    pub cache_bytes: usize,
    pub workers: usize,
    pub log: String,
    pub log_format: LogFormat,
}

/// The process's environment.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "this room is the owner of the environment")]
pub fn environment() -> BTreeMap<String, String> {
    // An empty variable says nothing, as in most programs.
    std::env::vars_os()
        .filter(|(_, value)| !value.is_empty())
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned())))
        .collect()
}

impl Config {
    /// Reads and checks all settings.
    ///
    /// # Errors
    /// A sentence for every mistake.
    pub fn load(sources: &Sources) -> Result<Self, Vec<String>> {
        let mut reader = Reader { values: BTreeMap::new(), mistakes: Vec::new() };
        reader.read_file(sources);
        reader.read_env(&sources.env);
        for (name, value) in &sources.flags {
            let flag = format!("--{}", name.replace('_', "-"));
            reader.values.insert((*name).to_owned(), Given { value: value.clone(), from: flag });
        }
        reader.config()
    }
}

/// A value and where it was given, for messages.
struct Given {
    value: String,
    from: String,
}

struct Reader {
    values: BTreeMap<String, Given>,
    mistakes: Vec<String>,
}

impl Reader {
    fn read_file(&mut self, sources: &Sources) {
        let named = sources.file.clone().or_else(|| sources.env.get("KEYWARD_CONFIG").map(PathBuf::from));
        let path = named.clone().unwrap_or_else(|| FILE_DEFAULT.into());
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && named.is_none() => return,
            Err(error) => return self.mistakes.push(format!("the settings file {} cannot be read: {error}", path.display())),
        };
        match text.parse::<toml::Table>() {
            Err(error) => self.mistakes.push(format!("the settings file {} is not TOML: {}", path.display(), error.message())),
            Ok(table) => {
                for (name, value) in table {
                    self.take_from_file(&path, &name, &value);
                }
            }
        }
    }

    fn take_from_file(&mut self, path: &Path, name: &str, value: &toml::Value) {
        let from = format!("{name} in {}", path.display());
        if SETTINGS.iter().all(|setting| setting.name != name) {
            return self.mistakes.push(unknown(&from, name, ""));
        }
        let value = match value {
            toml::Value::String(text) => text.clone(),
            toml::Value::Integer(number) => number.to_string(),
            toml::Value::Boolean(truth) => truth.to_string(),
            _ => return self.mistakes.push(format!("{from} must be a text, a number, true or false")),
        };
        self.values.insert(name.to_owned(), Given { value, from });
    }

    fn read_env(&mut self, env: &BTreeMap<String, String>) {
        for (variable, value) in env {
            let Some(upper) = variable.strip_prefix(ENV_PREFIX) else { continue };
            if ENV_OTHERS.contains(&variable.as_str()) || variable.starts_with(ENV_TESTS) {
                continue;
            }
            let name = upper.to_ascii_lowercase();
            let secret_name = name.strip_suffix("_file").unwrap_or_default();
            if SETTINGS.iter().any(|setting| setting.name == name) {
                self.values.insert(name, Given { value: value.clone(), from: variable.clone() });
            } else if SETTINGS.iter().any(|setting| setting.secret && setting.name == secret_name) {
                self.take_secret_file(variable, secret_name, value, env);
            } else {
                self.mistakes.push(unknown(variable, &name, ENV_PREFIX));
            }
        }
    }

    fn take_secret_file(&mut self, variable: &str, name: &str, path: &str, env: &BTreeMap<String, String>) {
        let plain = variable.trim_end_matches("_FILE");
        if env.contains_key(plain) {
            return self.mistakes.push(format!("{plain} and {variable} are both set: remove one"));
        }
        match std::fs::read_to_string(path) {
            Ok(text) => {
                self.values.insert(name.to_owned(), Given { value: text.trim().to_owned(), from: variable.to_owned() });
            }
            Err(error) => self.mistakes.push(format!("{variable}: {path} cannot be read: {error}")),
        }
    }

    fn text(&self, name: &str) -> Option<&Given> {
        self.values.get(name).filter(|given| !given.value.is_empty())
    }

    fn take<T>(&mut self, name: &str, default: T, rule: impl FnOnce(&str) -> Result<T, String>) -> T {
        let outcome = self.text(name).map(|given| rule(&given.value).map_err(|rule| format!("{} {rule}", given.from)));
        match outcome {
            None => default,
            Some(Ok(value)) => value,
            Some(Err(mistake)) => {
                self.mistakes.push(mistake);
                default
            }
        }
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        self.text(name).map(|given| given.value.clone().into())
    }

    fn config(mut self) -> Result<Config, Vec<String>> {
        let data_dir = self.path("data_dir").unwrap_or_else(|| "keyward-data".into());
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let config = Config {
            listen: self.take("listen", ([127, 0, 0, 1], 50051).into(), address),
            gateway_peers: self.take("gateway_peers", Vec::new(), cidrs),
            http_listen: self.take("http_listen", Some(([127, 0, 0, 1], 8080).into()), address_or_off),
            metrics_listen: self.take("metrics_listen", Some(([127, 0, 0, 1], 9464).into()), address_or_off),
            database_url: self.take("database_url", DatabaseUrl::Sqlite(data_dir.join("keyward.db")), str::parse),
            lease: self.take("lease", Duration::from_secs(10), |text| span(text, fence::LEASE_MAX.as_secs())),
            is_acked_only: self.take("fence_mode", false, |text| one_of(text, &["lease", "acked_only"]).map(|mode| mode == "acked_only")),
            replica_name: self.take("replica_name", ambient::host_name(), replica_name),
            keyring_file: self.path("keyring_file").unwrap_or_else(|| data_dir.join("keyring")),
            migrate_on_start: self.take("migrate_on_start", true, truth),
            root_token_file: self.path("root_token_file"),
            tls: self.tls(),
            insecure: self.take("insecure", false, truth),
            token_retention: self.take("token_retention", days(30), |text| retention(text, 3_650)),
            audit_retention: self.take("audit_retention", days(365), |text| retention(text, 36_500)),
            smtp: self.smtp(),
            notices_interval: self.take("notices_interval", Duration::from_mins(1), interval),
            notices_ca_file: self.path("notices_ca_file"),
            webhook_allowed_cidrs: self.take("webhook_allowed_cidrs", Vec::new(), cidrs),
            cache_bytes: self.take("cache_bytes", 256 << 20, |text| number(text, 4 << 20, 1 << 40)),
            workers: self.take("workers", cores, |text| number(text, 1, 1_024)),
            log: self.take("log", "info".to_owned(), |text| {
                one_of(text, &["off", "error", "warn", "info", "debug", "trace"]).map(str::to_owned)
            }),
            log_format: self.take("log_format", LogFormat::Text, |text| {
                one_of(text, &["text", "json"]).map(|text| if text == "json" { LogFormat::Json } else { LogFormat::Text })
            }),
            data_dir,
        };
        let open = |name: &str, address: SocketAddr| {
            format!(
                "{name} {address} can be reached from the network, and tokens would cross it readable: set tls_cert and tls_key, or say --insecure \
                 where something else encrypts the way"
            )
        };
        if config.tls.is_none() && !config.insecure {
            let addresses = [("listen", Some(config.listen)), ("http_listen", config.http_listen)];
            let addresses = addresses.into_iter().filter_map(|(name, address)| Some((name, address?)));
            self.mistakes.extend(addresses.filter(|(_, address)| !address.ip().is_loopback()).map(|(name, address)| open(name, address)));
        }
        if self.mistakes.is_empty() { Ok(config) } else { Err(self.mistakes) }
    }

    fn smtp(&mut self) -> Option<(SmtpUrl, String)> {
        let url = self.take("smtp_url", None, |text| text.parse().map(Some));
        let from = self.take("smtp_from", None, |text| notices::check_from(text).map(|()| Some(text.to_owned())));
        if self.text("smtp_url").is_some() != self.text("smtp_from").is_some() {
            self.mistakes.push("smtp_url and smtp_from go together: set both or neither".to_owned());
        }
        url.zip(from)
    }

    fn tls(&mut self) -> Option<Tls> {
        let (cert, key, client_ca) = (self.path("tls_cert"), self.path("tls_key"), self.path("tls_client_ca"));
        let clients = self.take("tls_client_map", Vec::new(), certificate_identities);
        if cert.is_some() != key.is_some() {
            self.mistakes.push("tls_cert and tls_key go together: set both or neither".to_owned());
        }
        if client_ca.is_some() && cert.is_none() {
            self.mistakes.push("tls_client_ca needs tls_cert and tls_key".to_owned());
        }
        if client_ca.is_some() == clients.is_empty() {
            self.mistakes.push("tls_client_ca and tls_client_map go together: set both or neither".to_owned());
        }
        Some(Tls { cert: cert?, key: key?, client_ca, clients })
    }
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "must be an address and a port, such as 127.0.0.1:50051 or [::1]:50051".to_owned())
}

fn truth(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| "must be true or false".to_owned())
}

fn number(text: &str, min: usize, max: usize) -> Result<usize, String> {
    text.parse().ok().filter(|number| (min..=max).contains(number)).ok_or_else(|| format!("must be a whole number from {min} to {max}"))
}

fn days(count: u64) -> Duration {
    Duration::from_hours(24 * count)
}

/// 30 days at least: people ask why something stopped.
fn retention(text: &str, max: u64) -> Result<Duration, String> {
    let count = text.strip_suffix('d').and_then(|count| count.parse().ok()).filter(|count| (30..=max).contains(count));
    count.map(days).ok_or_else(|| format!("must be a number of days from 30d to {max}d"))
}

fn interval(text: &str) -> Result<Duration, String> {
    span(text, 3_600)
}

/// From one second to so many.
fn span(text: &str, seconds_max: u64) -> Result<Duration, String> {
    let seconds = [("s", 1), ("m", 60), ("h", 3_600)].into_iter().find_map(|(unit, seconds)| {
        let count: u64 = text.strip_suffix(unit)?.parse().ok()?;
        count.checked_mul(seconds)
    });
    let seconds = seconds.filter(|seconds| (1..=seconds_max).contains(seconds));
    let longest = if seconds_max < 3_600 { format!("{seconds_max}s, such as 5s or 30s") } else { "1h, such as 30s or 5m".to_owned() };
    seconds.map(Duration::from_secs).ok_or_else(|| format!("must be a span from 1s to {longest}"))
}

fn replica_name(text: &str) -> Result<String, String> {
    let is_good = (1..=100).contains(&text.chars().count()) && !text.chars().any(char::is_control);
    if is_good { Ok(text.to_owned()) } else { Err("must be 1 to 100 characters without control characters".to_owned()) }
}

fn cidrs(text: &str) -> Result<Vec<IpNet>, String> {
    let ranges = text.split([' ', ';', ',']).filter(|range| !range.is_empty());
    ranges.map(|range| rules::cidr(range).map_err(|rule| format!("has `{range}`, which {rule}"))).collect()
}

fn address_or_off(text: &str) -> Result<Option<SocketAddr>, String> {
    if text == "off" { Ok(None) } else { address(text).map(Some) }
}

fn one_of<'a>(text: &'a str, values: &[&str]) -> Result<&'a str, String> {
    if values.contains(&text) { Ok(text) } else { Err(format!("must be one of {}", values.join(", "))) }
}

fn certificate_identities(text: &str) -> Result<Vec<CertificateIdentity>, String> {
    text.split(';').map(str::trim).filter(|entry| !entry.is_empty()).map(certificate_identity).collect()
}

fn certificate_identity(entry: &str) -> Result<CertificateIdentity, String> {
    let parse = || {
        let (name, identity) = entry.split_once('=')?;
        let mut words = identity.split_ascii_whitespace();
        let (workspace, principal) = words.next()?.split_once('/')?;
        let scopes: Vec<Scope> = words.map(str::parse).collect::<Result<_, _>>().ok()?;
        let (name, workspace, principal) = (name.trim().to_owned(), workspace.to_owned(), principal.to_owned());
        let whole = ![&name, &workspace, &principal].into_iter().any(String::is_empty) && !scopes.is_empty();
        whole.then_some(CertificateIdentity { name, workspace, principal, scopes })
    };
    parse().ok_or_else(|| {
        format!("has `{entry}`, which is not NAME=WORKSPACE/PRINCIPAL SCOPE…, for example gw.internal=default/gateway keyward:validate")
    })
}

/// A name that is no setting, with the setting that was probably meant.
fn unknown(from: &str, name: &str, prefix: &str) -> String {
    let likeness = |setting: &&Setting| edits(setting.name, name);
    let meant = SETTINGS.iter().min_by_key(likeness).filter(|setting| edits(setting.name, name) <= 3);
    match meant {
        Some(setting) if prefix.is_empty() => format!("{from} is not a setting; did you mean {}?", setting.name),
        Some(setting) => format!("{from} is not a setting; did you mean {prefix}{}?", setting.name.to_ascii_uppercase()),
        None => format!("{from} is not a setting: see `keyward serve --help`"),
    }
}

/// How many letters lie between two words (Levenshtein).
fn edits(left: &str, right: &str) -> usize {
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (index, from) in left.bytes().enumerate() {
        let mut diagonal = index;
        let mut last = index + 1;
        for (cell, to) in row.iter_mut().skip(1).zip(right.bytes()) {
            let replaced = diagonal + usize::from(from != to);
            diagonal = *cell;
            *cell = replaced.min(diagonal + 1).min(last + 1);
            last = *cell;
        }
        if let Some(first) = row.first_mut() {
            *first = index + 1;
        }
    }
    row.last().copied().unwrap_or(left.len())
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{ENV_PREFIX}{}", self.name.to_ascii_uppercase())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(flags: &[(&'static str, &str)], env: &[(&str, &str)]) -> Result<Config, Vec<String>> {
        Config::load(&Sources {
            flags: flags.iter().map(|(name, value)| (*name, (*value).to_owned())).collect(),
            env: env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
            file: None,
        })
    }

    #[test]
    fn defaults_are_those_that_the_help_shows() {
        let config = load(&[], &[]).expect("nothing is wrong with nothing");
        assert_eq!(config.listen.to_string(), "127.0.0.1:50051");
        assert_eq!(config.metrics_listen.map(|address| address.to_string()).as_deref(), Some("127.0.0.1:9464"));
        assert_eq!(config.database_url, DatabaseUrl::Sqlite("keyward-data/keyward.db".into()));
        assert_eq!(config.keyring_file, PathBuf::from("keyward-data/keyring"));
        assert_eq!(config.cache_bytes.to_string(), "268435456");
        assert!(config.tls.is_none() && config.migrate_on_start && !config.insecure);
    }

    #[test]
    fn the_strongest_source_counts() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("keyward.toml");
        std::fs::write(&file, "listen = \"127.0.0.1:1\"\ndata_dir = \"/file\"\ncache_bytes = 5000000\n").expect("writable");
        let config = Config::load(&Sources {
            flags: BTreeMap::from([("listen", "127.0.0.1:3".to_owned())]),
            env: BTreeMap::from([
                ("KEYWARD_LISTEN".to_owned(), "127.0.0.1:2".to_owned()),
                ("KEYWARD_DATA_DIR".to_owned(), "/env".to_owned()),
            ]),
            file: Some(file),
        });
        let config = config.expect("all are well formed");
        assert_eq!((config.listen.port(), config.data_dir, config.cache_bytes), (3, "/env".into(), 5_000_000));
    }

    #[test]
    fn every_mistake_is_reported_at_once() {
        let mistakes = load(
            &[("listen", "localhost"), ("tls_cert", "cert.pem")],
            &[("KEYWARD_LOGG", "info"), ("KEYWARD_DATABASE_URL", "mysql://u:hunter2@h/d"), ("KEYWARD_CACHE_TOKENS", "many"), ("HOME", "/")],
        )
        .expect_err("five mistakes");
        assert_eq!(mistakes.len(), 5, "{mistakes:#?}");
        assert!(mistakes.iter().any(|mistake| mistake == "KEYWARD_LOGG is not a setting; did you mean KEYWARD_LOG?"), "{mistakes:#?}");
        assert!(mistakes.iter().any(|mistake| mistake.starts_with("--listen must be")), "{mistakes:#?}");
        assert!(!mistakes.concat().contains("hunter2"));
    }

    #[test]
    fn a_network_address_needs_tls_or_a_word() {
        let refused = load(&[("listen", "0.0.0.0:50051")], &[]).expect_err("no TLS");
        assert!(refused.concat().contains("--insecure"), "{refused:?}");
        assert!(load(&[("listen", "0.0.0.0:50051"), ("insecure", "true")], &[]).is_ok());
        assert!(load(&[("listen", "[::]:50051"), ("tls_cert", "c"), ("tls_key", "k")], &[]).is_ok());
    }

    #[test]
    fn secrets_come_from_files_too() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("url");
        std::fs::write(&file, "postgres://u:p@h/d\n").expect("writable");
        let path = file.display().to_string();
        let config = load(&[], &[("KEYWARD_DATABASE_URL_FILE", &path)]).expect("a good file");
        assert_eq!(config.database_url, DatabaseUrl::Postgres("postgres://u:p@h/d".to_owned()));
        assert!(load(&[], &[("KEYWARD_DATABASE_URL_FILE", &path), ("KEYWARD_DATABASE_URL", "postgres://h/d")]).is_err());
        assert!(load(&[], &[("KEYWARD_DATABASE_URL_FILE", "/nowhere")]).is_err());
    }

    #[test]
    fn certificates_map_to_principals() {
        let identities =
            certificate_identities("gw.internal=default/gateway keyward:validate; spiffe://prod/ops=default/ops keyward:admin *")
                .expect("two");
        assert_eq!(identities.len(), 2);
        assert_eq!((identities[1].name.as_str(), identities[1].scopes.len()), ("spiffe://prod/ops", 2));
        for bad in ["gw", "gw=default", "gw=default/p", "=default/p a:b", "gw=default/p keyward:all"] {
            assert!(certificate_identities(bad).is_err(), "{bad}");
        }
    }
}
