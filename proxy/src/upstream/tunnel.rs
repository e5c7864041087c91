//! The way to servers behind a firewall: a tunnel through the HTTP proxy that the environment names.

use std::io::{Error, ErrorKind};

use hyper_util::client::proxy::matcher::Matcher;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::Address;

/// Longest head of the proxy's answer.
const MAX_HEAD: usize = 8 * 1024;

/// A proxy and what it wants to know.
#[derive(Debug)]
pub(super) struct Tunnel {
    pub(super) host: String,
    pub(super) port: u16,
    /// Header line with name and password; empty without.
    authorization: String,
}

impl Tunnel {
    /// The proxy that `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` name for this server. None is used for servers of this
    /// machine, and for those that are not encrypted: they are in the own network.
    pub(super) fn from_env(address: &Address) -> Option<Self> {
        Self::of(&Matcher::from_env(), address)
    }

    fn of(matcher: &Matcher, address: &Address) -> Option<Self> {
        if address.is_here() || !address.tls {
            return None;
        }
        let server = format!("https://{}/", address.authority).parse().ok()?;
        let proxy = matcher.intercept(&server)?;
        let uri = proxy.uri();
        if uri.scheme_str() != Some("http") {
            tracing::warn!("the proxy {uri} is left out: only http:// ones are spoken to");
            return None;
        }
        let host = uri.host()?.trim_start_matches('[').trim_end_matches(']');
        let secret = proxy.basic_auth().and_then(|v| v.to_str().ok());
        Some(Self {
            host: host.to_owned(),
            port: uri.port_u16().unwrap_or(80),
            authorization: secret
                .map(|s| format!("Proxy-Authorization: {s}\r\n"))
                .unwrap_or_default(),
        })
    }

    /// Asks for a tunnel to `authority` (`host:port`) over a connection to the proxy.
    ///
    /// # Errors
    /// The proxy does not grant it.
    pub(super) async fn open(&self, stream: &mut TcpStream, authority: &str) -> std::io::Result<()> {
        let ask = format!(
            "CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n{}\r\n",
            self.authorization
        );
        stream.write_all(ask.as_bytes()).await?;
        // One by one: what follows the head is the server's.
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if head.len() >= MAX_HEAD {
                return Err(Error::new(
                    ErrorKind::InvalidData,
                    "the proxy's answer is too long",
                ));
            }
            head.push(stream.read_u8().await?);
        }
        let text = String::from_utf8_lossy(&head);
        let line = text.lines().next().unwrap_or_default();
        if line.starts_with("HTTP/1.") && line.split(' ').nth(1).is_some_and(|s| s.starts_with('2')) {
            return Ok(());
        }
        Err(Error::other(format!(
            "the proxy {}:{} answers: {line}",
            self.host, self.port
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_servers_are_behind_it() {
        let matcher = Matcher::builder()
            .https("http://me:word@proxy.test:3128")
            .no("inside.test")
            .build();
        let of = |base: &str| Tunnel::of(&matcher, &Address::parse(base).unwrap());
        let tunnel = of("https://api.test/v1").unwrap();
        assert_eq!((tunnel.host.as_str(), tunnel.port), ("proxy.test", 3128));
        assert_eq!(
            tunnel.authorization,
            "Proxy-Authorization: Basic bWU6d29yZA==\r\n"
        );
        for direct in [
            "http://api.test",
            "https://gpu.inside.test",
            "https://localhost:1",
            "https://127.0.0.1:1",
            "https://[::1]:1",
        ] {
            assert!(of(direct).is_none(), "{direct}");
        }
        let odd = Matcher::builder().https("socks5://proxy.test:1").build();
        assert!(Tunnel::of(&odd, &Address::parse("https://api.test").unwrap()).is_none());
    }

    #[tokio::test]
    async fn it_is_asked_for_and_may_be_refused() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let tunnel = Tunnel {
            host: "127.0.0.1".to_owned(),
            port,
            authorization: "Proxy-Authorization: Basic x\r\n".to_owned(),
        };
        for (answer, granted) in [
            ("HTTP/1.1 200 Connection established\r\nA: b\r\n\r\nserver", true),
            ("HTTP/1.1 407 Who are you\r\n\r\n", false),
            ("", false),
        ] {
            let proxy = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut asked = [0; 90];
                let n = stream.read(&mut asked).await.unwrap();
                stream.write_all(answer.as_bytes()).await.unwrap();
                String::from_utf8_lossy(&asked[..n]).into_owned()
            };
            let client = async {
                let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                let opened = tunnel.open(&mut stream, "api.test:443").await;
                let mut rest = String::new();
                if opened.is_ok() {
                    stream.read_to_string(&mut rest).await.unwrap();
                }
                (opened, rest)
            };
            let (asked, (opened, rest)) = tokio::join!(proxy, client);
            assert_eq!(
                asked,
                "CONNECT api.test:443 HTTP/1.1\r\nHost: api.test:443\r\nProxy-Authorization: Basic x\r\n\r\n"
            );
            assert_eq!(
                (opened.is_ok(), rest == "server"),
                (granted, granted),
                "{opened:?}"
            );
        }
    }
}
