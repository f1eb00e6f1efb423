//! Certificates: read, checked, swapped while the server runs; and whom a client's certificate stands for.
//!
//! Invariant: a certificate that cannot be used never replaces one that can (test `a_bad_certificate_keeps_the_good_one`).

use std::{path::Path, sync::Arc};

use parking_lot::RwLock;
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::{
    caller::Caller,
    config::{CertificateIdentity, Tls},
};

/// The certificates in use.
pub(super) struct Certificates {
    settings: Tls,
    loaded: RwLock<Loaded>,
}

struct Loaded {
    /// The files' contents, to see whether they changed.
    files: Vec<Vec<u8>>,
    config: Arc<ServerConfig>,
    /// The same for the port of HTTP.
    http: Arc<ServerConfig>,
}

impl Certificates {
    /// Reads the files that the settings name.
    pub(super) fn load(settings: &Tls) -> Result<Self, String> {
        let files = read(settings)?;
        let (config, http) = build(settings, &files)?;
        Ok(Self { settings: settings.clone(), loaded: RwLock::new(Loaded { files, config, http }) })
    }

    /// What new connections are accepted with.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        Arc::clone(&self.loaded.read().config).into()
    }

    /// As [`Certificates::acceptor`], where HTTP/1.1 is spoken as well.
    pub(super) fn http_acceptor(&self) -> TlsAcceptor {
        Arc::clone(&self.loaded.read().http).into()
    }

    /// Reads the files again; says whether they changed. On an error the certificates in use stay.
    pub(super) fn reload(&self) -> Result<bool, String> {
        let files = read(&self.settings)?;
        if files == self.loaded.read().files {
            return Ok(false);
        }
        let (config, http) = build(&self.settings, &files)?;
        *self.loaded.write() = Loaded { files, config, http };
        Ok(true)
    }

    /// Whom the client's certificate stands for: the first entry of `tls_client_map` whose name is one of its DNS or URI names.
    pub(super) fn caller(&self, stream: &TlsStream<TcpStream>) -> Option<Caller> {
        let certificate = stream.get_ref().1.peer_certificates()?.first()?;
        let parsed = webpki::EndEntityCert::try_from(certificate).ok()?;
        let names: Vec<&str> = parsed.valid_dns_names().chain(parsed.valid_uri_names()).collect();
        let identity = self.settings.clients.iter().find(|identity| names.contains(&identity.name.as_str()));
        if identity.is_none() {
            tracing::info!(names = ?names, "a client certificate names nobody of tls_client_map: the client needs a token");
        }
        identity.map(|identity| caller_of(identity, stream))
    }
}

fn caller_of(identity: &CertificateIdentity, stream: &TlsStream<TcpStream>) -> Caller {
    Caller {
        token_id: None,
        digest: None,
        workspace: identity.workspace.as_str().into(),
        principal: identity.principal.as_str().into(),
        scopes: identity.scopes.clone().into(),
        // The store says that, when the caller is judged.
        has_admin_role: false,
        address: stream.get_ref().0.peer_addr().ok().map(|address| address.ip().to_canonical()),
    }
}

fn read(settings: &Tls) -> Result<Vec<Vec<u8>>, String> {
    let files = [Some(&settings.cert), Some(&settings.key), settings.client_ca.as_ref()];
    files
        .into_iter()
        .flatten()
        .map(|path| std::fs::read(path).map_err(|error| format!("{} cannot be read: {error}", path.display())))
        .collect()
}

fn build(settings: &Tls, files: &[Vec<u8>]) -> Result<(Arc<ServerConfig>, Arc<ServerConfig>), String> {
    let [cert, key, client_ca @ ..] = files else {
        return Err("the certificate's files are missing".to_owned());
    };
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| format!("{} holds no private key in PEM", settings.key.display()))?;
    let builder = ServerConfig::builder();
    let builder = match (client_ca, &settings.client_ca) {
        ([client_ca], Some(path)) => {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(path, client_ca)? {
                roots.add(certificate).map_err(|error| format!("{}: {error}", path.display()))?;
            }
            let verifier = WebPkiClientVerifier::builder(roots.into()).allow_unauthenticated().build();
            builder.with_client_cert_verifier(verifier.map_err(|error| format!("{}: {error}", path.display()))?)
        }
        _ => builder.with_no_client_auth(),
    };
    let mut config = builder.with_single_cert(certificates(&settings.cert, cert)?, key).map_err(|error| {
        format!("the certificate {} and the key {} cannot be used together: {error}", settings.cert.display(), settings.key.display())
    })?;
    if settings.client_ca.is_some() {
        // A resumed session is not asked for its certificate again: none are, so that one that has ended stays out.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
    }
    config.alpn_protocols = vec![b"h2".to_vec()];
    let mut http = config.clone();
    http.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok((Arc::new(config), Arc::new(http)))
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(format!("{} holds no certificate in PEM", path.display())),
    }
}
