//! What the tests of several ways to a server share: a certificate, and a connection that changes its protocol.

use std::io::{Read, Write};
use std::path::PathBuf;

use tempfile::TempDir;

/// Certificate and key of `localhost`, as files.
pub struct Certificate {
    pub dir: TempDir,
    pub cert: PathBuf,
    pub key: PathBuf,
}

impl Certificate {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
        std::fs::write(&cert, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        Self { dir, cert, key }
    }

    /// What swapd is started with to show it.
    pub fn args(&self) -> [&str; 4] {
        let path = |p: &'_ PathBuf| -> &str { Box::leak(p.to_str().unwrap().to_owned().into_boxed_str()) };
        [
            "-tls-cert-file",
            path(&self.cert),
            "-tls-key-file",
            path(&self.key),
        ]
    }
}

/// Asks for another protocol at this path; the head of the reply, behind which the connection is the server's.
pub fn upgrade(stream: &mut (impl Read + Write), path: &str) -> String {
    let head = format!(
        "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut reply = Vec::new();
    while !reply.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        reply.push(byte[0]);
    }
    let reply = String::from_utf8(reply).unwrap();
    assert!(
        reply.starts_with("HTTP/1.1 101") && reply.to_lowercase().contains("upgrade: websocket"),
        "{reply}"
    );
    reply
}

/// What is said into an upgraded connection comes back.
pub fn echoes(stream: &mut (impl Read + Write), text: &str) {
    stream.write_all(text.as_bytes()).unwrap();
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(back, text.as_bytes());
}
