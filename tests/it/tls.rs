//! TLS: certificates, their renewal while the server runs, and callers who come with one.

use std::{fs, net::Ipv4Addr, path::Path, time::Duration};

use keyward::proto::{self, Verdict, self_service_client::SelfServiceClient};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use tonic::{
    Code, Request, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Identity},
};

use crate::world::{Actor, Backend, World, eventually, keyward, runtime};

/// A certificate authority of the test's own.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("a certificate"))
    }

    /// A certificate and its key, in PEM.
    fn issue(&self, name: SanType) -> (String, String) {
        let (params, key) = request(vec![name]);
        (params.signed_by(&key, &self.0).expect("a certificate").pem(), key.serialize_pem())
    }

    /// What a server that Keyward calls shows: a certificate and its key, in PEM.
    pub fn credential(&self, credential: Credential) -> (String, String) {
        let local = || vec![SanType::DnsName("localhost".try_into().expect("a name")), SanType::IpAddress(Ipv4Addr::LOCALHOST.into())];
        let (mut params, key) = match credential {
            Credential::WrongName => request(vec![SanType::DnsName("elsewhere.test".try_into().expect("a name"))]),
            Credential::Good | Credential::SelfSigned | Credential::Foreign | Credential::Expired => request(local()),
        };
        let certificate = match credential {
            Credential::SelfSigned => params.self_signed(&key),
            Credential::Foreign => params.signed_by(&key, &Self::new().0),
            Credential::Expired => {
                params.not_after = rcgen::date_time_ymd(2020, 1, 1);
                params.signed_by(&key, &self.0)
            }
            Credential::Good | Credential::WrongName => params.signed_by(&key, &self.0),
        };
        (certificate.expect("a certificate").pem(), key.serialize_pem())
    }

    fn server(&self) -> (String, String) {
        self.issue(SanType::DnsName("localhost".try_into().expect("a name")))
    }

    /// Of the client that [`settings`] take as `default/gateway`.
    pub fn gateway(&self) -> (String, String) {
        self.issue(SanType::DnsName("gateway.internal".try_into().expect("a name")))
    }

    /// Its own certificate, which a caller trusts.
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A connection without a client certificate.
    pub async fn channel(&self, world: &World) -> Channel {
        connect(world, self, None).await.expect("a connection")
    }

    /// Whoever comes with a certificate of this name.
    pub async fn actor(&self, world: &World, name: &str) -> Actor {
        let identity = self.issue(SanType::DnsName(name.try_into().expect("a name")));
        Actor { channel: connect(world, self, Some(&identity)).await.expect("a connection"), token: None }
    }
}

/// How good a server's certificate is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Credential {
    /// For `localhost` and 127.0.0.1.
    Good,
    /// For another host.
    WrongName,
    /// By nobody but itself.
    SelfSigned,
    /// By another authority.
    Foreign,
    /// Ended in 2020.
    Expired,
}

/// What a certificate for these names needs.
fn request(names: Vec<SanType>) -> (CertificateParams, KeyPair) {
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.subject_alt_names = names;
    (params, KeyPair::generate().expect("a key"))
}

pub fn write(folder: &Path, (cert, key): &(String, String)) {
    fs::write(folder.join("cert.pem"), cert).expect("writable");
    fs::write(folder.join("key.pem"), key).expect("writable");
}

/// Clients that the tests here come as.
const CLIENTS: &str = "gateway.internal=default/gateway keyward:validate; spiffe://prod/ops=default/ops keyward:admin";

/// The settings of a server with a certificate of this authority, which knows these clients. The files are made.
fn settings_for(authority: &Authority, folder: &Path, clients: &str) -> [(&'static str, String); 4] {
    write(folder, &authority.server());
    fs::write(folder.join("ca.pem"), authority.pem()).expect("writable");
    let path = |name: &str| folder.join(name).display().to_string();
    [
        ("tls_cert", path("cert.pem")),
        ("tls_key", path("key.pem")),
        ("tls_client_ca", path("ca.pem")),
        ("tls_client_map", clients.to_owned()),
    ]
}

/// As [`settings_for`], with the usual clients.
pub fn settings(authority: &Authority, folder: &Path) -> [(&'static str, String); 4] {
    settings_for(authority, folder, CLIENTS)
}

/// A world that speaks TLS with a certificate of this authority, and knows its clients.
async fn world(authority: &Authority) -> World {
    secured(authority, Backend::Sqlite, CLIENTS).await
}

/// As [`world`], with these clients.
pub async fn secured(authority: &Authority, backend: Backend, clients: &str) -> World {
    let mut world = World::unstarted(backend).await;
    let settings = settings_for(authority, world.folder.path(), clients);
    world.settings.extend(settings);
    world.start_server().await;
    world
}

async fn connect(world: &World, authority: &Authority, identity: Option<&(String, String)>) -> Result<Channel, tonic::transport::Error> {
    connect_to(world.server().address().port(), authority, identity).await
}

pub async fn connect_to(port: u16, authority: &Authority, identity: Option<&(String, String)>) -> Result<Channel, tonic::transport::Error> {
    let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authority.pem())).domain_name("localhost");
    if let Some((cert, key)) = identity {
        tls = tls.identity(Identity::from_pem(cert, key));
    }
    let address = format!("https://localhost:{port}");
    Channel::from_shared(address).expect("an address").tls_config(tls).expect("good settings").connect().await
}

async fn who_am_i(channel: Channel, token: Option<&str>) -> Result<proto::WhoAmIResponse, Status> {
    let mut request = Request::new(proto::WhoAmIRequest {});
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().expect("a header value"));
    }
    SelfServiceClient::new(channel).who_am_i(request).await.map(tonic::Response::into_inner)
}

#[test]
fn tokens_and_certificates_identify_callers() {
    runtime().block_on(async {
        let authority = Authority::new();
        let world = world(&authority).await;
        let root = world.root_token().to_owned();
        let plain = connect(&world, &authority, None).await.expect("TLS without a client certificate");
        assert_eq!(who_am_i(plain.clone(), Some(&root)).await.expect("a token will do").principal, "root");
        assert_eq!(who_am_i(plain, None).await.expect_err("neither").code(), Code::Unauthenticated);

        let channel = connect(&world, &authority, Some(&authority.gateway())).await.expect("a connection");
        let me = who_am_i(channel.clone(), None).await.expect("known");
        assert_eq!((me.principal.as_str(), me.scopes, me.token), ("gateway", vec!["keyward:validate".to_owned()], None));
        let actor = crate::world::Actor { channel: channel.clone(), token: None };
        assert_eq!(actor.verdict(&root).await, Verdict::Valid);
        assert_eq!(actor.create(crate::world::new_token("t", &[])).await.expect_err("may only validate").code(), Code::PermissionDenied);
        let status = actor.own().revoke_self(Request::new(proto::RevokeSelfRequest::default())).await.expect_err("there is no token");
        assert_eq!(status.code(), Code::FailedPrecondition);
        let both = who_am_i(channel.clone(), Some(&root)).await.expect("the token counts");
        assert_eq!(both.principal, "root");
        assert_eq!(who_am_i(channel, Some("kw_bad")).await.expect_err("a bad token is not made good").code(), Code::Unauthenticated);

        let ops = authority.issue(SanType::URI("spiffe://prod/ops".try_into().expect("a name")));
        let ops = crate::world::Actor { channel: connect(&world, &authority, Some(&ops)).await.expect("a connection"), token: None };
        let (token, _) = ops.issue("made with a certificate", &[]).await;
        assert_eq!((token.created_by.as_str(), token.principal.as_str()), ("ops", "ops"));

        let unknown = authority.issue(SanType::DnsName("somebody.else".try_into().expect("a name")));
        let channel = connect(&world, &authority, Some(&unknown)).await.expect("a connection");
        assert_eq!(who_am_i(channel, None).await.expect_err("maps to nobody").code(), Code::Unauthenticated);
        let stranger = Authority::new().gateway();
        let refused = match connect(&world, &authority, Some(&stranger)).await {
            Err(_) => true,
            // TLS 1.3 tells a client of its refusal only after the handshake.
            Ok(channel) => who_am_i(channel, None).await.is_err(),
        };
        assert!(refused, "a certificate of another authority");
        let plaintext = Channel::from_shared(format!("http://{}", world.server().address())).expect("an address");
        let spoken = match plaintext.connect().await {
            Err(_) => false,
            Ok(channel) => who_am_i(channel, Some(&root)).await.is_ok(),
        };
        assert!(!spoken, "plain text on a TLS port");
    });
}

#[test]
fn a_bad_certificate_keeps_the_good_one() {
    runtime().block_on(async {
        let (first, second) = (Authority::new(), Authority::new());
        let world = world(&first).await;
        let folder = world.folder.path().to_owned();
        let root = world.root_token().to_owned();
        let open = connect(&world, &first, None).await.expect("the first certificate");
        let mismatched = (second.server().0, second.server().1);
        write(&folder, &mismatched);
        let error = world.server().reload().expect_err("the key is another's");
        assert!(error.contains("cannot be used together"), "{error}");
        fs::write(folder.join("cert.pem"), "").expect("writable");
        assert!(world.server().reload().expect_err("empty").contains("holds no certificate"));
        connect(&world, &first, None).await.expect("the first certificate still");
        write(&folder, &second.server());
        // Without a signal, since the files changed.
        let channel = eventually("the second certificate is in use", async || connect(&world, &second, None).await.ok()).await;
        who_am_i(channel, Some(&root)).await.expect("known");
        who_am_i(open, Some(&root)).await.expect("open connections go on");
        assert!(connect(&world, &first, None).await.is_err(), "the first certificate is gone");
    });
}

#[test]
fn a_hangup_reads_the_certificates_anew() {
    let authority = Authority::new();
    let folder = tempfile::tempdir().expect("a folder");
    write(folder.path(), &authority.server());
    let port = crate::world::free_port();
    let mut command = keyward();
    command
        .args(["serve", "--http-listen", "off", "--metrics-listen", "off", "--listen", &format!("127.0.0.1:{port}"), "--data-dir"])
        .arg(folder.path().join("data"));
    command.arg("--tls-cert").arg(folder.path().join("cert.pem")).arg("--tls-key").arg(folder.path().join("key.pem"));
    let log = fs::File::create(folder.path().join("log")).expect("writable");
    let mut server = command.stdout(std::process::Stdio::null()).stderr(log).spawn().expect("it runs");
    let said = |text: &str| fs::read_to_string(folder.path().join("log")).expect("readable").contains(text);
    let wait = |text: &str| {
        let begin = std::time::Instant::now();
        while !said(text) {
            assert!(begin.elapsed() < Duration::from_secs(20), "{text} was not said");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    wait("serving");
    crate::world::run_as_root(&["kill", "-HUP", &server.id().to_string()]);
    wait("the certificates were read again");
    crate::world::run_as_root(&["kill", "-TERM", &server.id().to_string()]);
    assert!(server.wait().expect("an end").success());
}
