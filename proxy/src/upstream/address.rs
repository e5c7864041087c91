//! A server's base address.

use std::net::IpAddr;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Over TLS.
    pub tls: bool,
    /// Name or address, without brackets.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Host and port as they stand in the address, for `Host`.
    pub authority: String,
    /// Path before every path: empty, or `/...` without a trailing slash.
    pub prefix: String,
}

impl Address {
    /// Reads `http://host:port/path` or `https://...`.
    ///
    /// # Errors
    /// A sentence that says what is wrong with it.
    pub fn parse(base: &str) -> Result<Self, String> {
        let uri: http::Uri = base.parse().map_err(|e| format!("{base}: {e}"))?;
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(format!("{base}: is neither http:// nor https://")),
        };
        let host = uri.host().ok_or_else(|| format!("{base}: names no host"))?;
        Ok(Self {
            tls,
            port: uri.port_u16().unwrap_or(if tls { 443 } else { 80 }),
            authority: uri.port().map_or(host.to_owned(), |p| format!("{host}:{p}")),
            prefix: uri.path().trim_end_matches('/').to_owned(),
            host: host.trim_start_matches('[').trim_end_matches(']').to_owned(),
        })
    }

    /// Whether that is this machine, as far as the name tells.
    #[must_use]
    pub fn is_here(&self) -> bool {
        self.host
            .parse::<IpAddr>()
            .map_or(self.host == "localhost", |ip| ip.is_loopback())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_addresses() {
        let parse = |base: &str| {
            let a = Address::parse(base).unwrap();
            format!("{} {} {} | {} | {}", a.tls, a.host, a.port, a.authority, a.prefix)
        };
        assert_eq!(parse("https://api.test"), "true api.test 443 | api.test | ");
        assert_eq!(parse("http://h:81/v/w/"), "false h 81 | h:81 | /v/w");
        assert_eq!(parse("https://[::1]:8443"), "true ::1 8443 | [::1]:8443 | ");
        for (base, here) in [
            ("http://[::1]", true),
            ("http://localhost:1", true),
            ("http://10.0.0.1", false),
        ] {
            assert_eq!(Address::parse(base).unwrap().is_here(), here);
        }
        assert!(Address::parse("ftp://h").is_err() && Address::parse("h:80").is_err());
    }
}
