//! TLS: the certificate that is shown to clients, and what is trusted at peers.
//!
//! Nothing of it is set up before it is needed: a proxy without a certificate and without https peers pays nothing.

use std::path::Path;
use std::sync::Arc;

use tokio::sync::OnceCell;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature,
};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
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

/// Reads certificate chain and key, both PEM, for HTTP/2 and HTTP/1.1.
///
/// # Errors
/// A sentence that names the file.
pub fn acceptor(certificate: &Path, key: &Path) -> Result<TlsAcceptor, String> {
    let chain = chain(certificate).map_err(|e| format!("--tls-cert-file {e}"))?;
    let secret = PrivateKeyDer::from_pem_file(key)
        .map_err(|e| format!("--tls-key-file {}: no private key: {e}", key.display()))?;
    let config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .and_then(|b| b.with_no_client_auth().with_single_cert(chain, secret));
    let mut config = config.map_err(|e| {
        format!(
            "--tls-cert-file {} with --tls-key-file {}: {e}",
            certificate.display(),
            key.display()
        )
    })?;
    config.alpn_protocols = vec![H2.to_vec(), HTTP1.to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
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
