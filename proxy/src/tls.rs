//! TLS: the certificate that is shown to clients, and what is trusted at peers.
//!
//! Nothing of it is set up before it is needed: a proxy without a certificate and without https peers pays nothing.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::OnceCell;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature,
};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::server::{ClientHello, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, ServerConfig,
    SignatureScheme,
};

/// HTTP/2's name in the handshake.
pub const H2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// The chain of a PEM file, the server's own certificate first.
fn chain(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let name = file.display();
    let chain = CertificateDer::pem_file_iter(file)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| format!("{name}: {e}"))?;
    if chain.is_empty() {
        return Err(format!("{name}: holds no certificate"));
    }
    Ok(chain)
}

/// The certificate that is shown to clients. Read again on demand, so that a renewed one needs no restart.
#[derive(Debug)]
pub struct Shown {
    certificate: PathBuf,
    key: PathBuf,
    provider: Arc<CryptoProvider>,
    current: Mutex<Arc<CertifiedKey>>,
}

impl Shown {
    /// Reads certificate chain and key, both PEM.
    ///
    /// # Errors
    /// A sentence that names the file.
    pub fn read(certificate: &Path, key: &Path) -> Result<Arc<Self>, String> {
        let provider = provider();
        let current = Mutex::new(certified(certificate, key, &provider)?);
        Ok(Arc::new(Self {
            certificate: certificate.to_owned(),
            key: key.to_owned(),
            provider,
            current,
        }))
    }

    /// Reads the files again; what is wrong with them leaves the present certificate in force.
    ///
    /// # Errors
    /// A sentence that names the file.
    pub fn read_again(&self) -> Result<(), String> {
        let new = certified(&self.certificate, &self.key, &self.provider)?;
        let mut current = self.current.lock();
        if current.cert != new.cert {
            tracing::info!("certificate taken up");
        }
        *current = new;
        Ok(())
    }

    /// For HTTP/2 and HTTP/1.1.
    ///
    /// # Errors
    /// The versions of TLS and the cryptography do not fit together.
    pub fn acceptor(self: Arc<Self>) -> Result<TlsAcceptor, String> {
        let config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|e| e.to_string())?;
        let mut config = config.with_no_client_auth().with_cert_resolver(self);
        config.alpn_protocols = vec![H2.to_vec(), HTTP1.to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.lock().clone())
    }
}

fn certified(certificate: &Path, key: &Path, provider: &CryptoProvider) -> Result<Arc<CertifiedKey>, String> {
    let chain = chain(certificate).map_err(|e| format!("--tls-cert-file {e}"))?;
    let secret = PrivateKeyDer::from_pem_file(key)
        .map_err(|e| format!("--tls-key-file {}: no private key: {e}", key.display()))?;
    let certified = CertifiedKey::from_der(chain, secret, provider).map_err(|e| {
        let (certificate, key) = (certificate.display(), key.display());
        format!("--tls-cert-file {certificate} with --tls-key-file {key}: {e}")
    })?;
    Ok(Arc::new(certified))
}

/// How peers are spoken to: the certificates that the system trusts, HTTP/1.1. Read with the first use, off the thread
/// that everything runs on: a keychain may take its time.
///
/// # Errors
/// The system has no certificates that can be read.
pub async fn client() -> Result<Arc<ClientConfig>, String> {
    static CONFIG: OnceCell<Arc<ClientConfig>> = OnceCell::const_new();
    let read = || async {
        tokio::task::spawn_blocking(read_trusted)
            .await
            .map_err(|e| e.to_string())?
    };
    CONFIG.get_or_try_init(read).await.cloned()
}

fn read_trusted() -> Result<Arc<ClientConfig>, String> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (taken, _) = roots.add_parsable_certificates(found.certs);
    if taken == 0 {
        let why: Vec<String> = found.errors.iter().map(ToString::to_string).collect();
        let why = why.join("; ");
        return Err(format!(
            "the system's trusted certificates cannot be read (SSL_CERT_FILE may name others) {why}"
        ));
    }
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?;
    let mut config = config.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![HTTP1.to_vec()];
    Ok(Arc::new(config))
}

/// Trusts the one server that shows the first certificate of this file, whatever its name and its issuer: how a
/// command asks the proxy beside it.
///
/// # Errors
/// A sentence that names the file.
pub fn pinned(certificate: &Path) -> Result<Arc<ClientConfig>, String> {
    let mut chain = chain(certificate).map_err(|e| format!("--tls-cert-file {e}"))?;
    let provider = provider();
    let pinned = Pinned {
        certificate: chain.swap_remove(0),
        algorithms: provider.signature_verification_algorithms,
    };
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?;
    let config = config
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(pinned))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Accepts one certificate, and proof that the other side has its key.
#[derive(Debug)]
struct Pinned {
    certificate: CertificateDer<'static>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if *end_entity == self.certificate {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
