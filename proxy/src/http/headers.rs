//! Headers on their way through: what belongs to one connection stays here, and whom a request comes from is told.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use http::header::{self, HeaderMap, HeaderName, HeaderValue};

pub(super) const ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Headers that belong to one connection (RFC 9110, section 7.6.1).
fn is_hop_by_hop(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "connection"
            | "keep-alive"
            | "proxy-connection"
            | "proxy-authenticate"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
            | "http2-settings"
    )
}

/// What a client shows to the proxy is not for the model's server; the length is set from the body that is really
/// sent.
fn is_for_the_proxy(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "authorization" | "proxy-authorization" | "x-api-key" | "expect" | "content-length"
    )
}

/// Drops what belongs to the connection, and what `also` says. Most messages have little of either: they are looked
/// through once.
pub(super) fn drop_headers(headers: &mut HeaderMap, also: impl Fn(&HeaderName) -> bool) {
    let mut dropped: Vec<HeaderName> = headers
        .keys()
        .filter(|name| is_hop_by_hop(name) || also(name))
        .cloned()
        .collect();
    if dropped.contains(&header::CONNECTION) {
        // Headers named in `Connection` belong to the connection too.
        let values = headers.get_all(header::CONNECTION).iter();
        let named = values.flat_map(|v| v.to_str().unwrap_or_default().split(','));
        dropped.extend(named.filter_map(|name| HeaderName::from_bytes(name.trim().as_bytes()).ok()));
    }
    for name in &dropped {
        headers.remove(name);
    }
}

/// An address as text: most clients are on this machine.
pub(super) fn shown(ip: IpAddr) -> Cow<'static, str> {
    match ip {
        IpAddr::V4(Ipv4Addr::LOCALHOST) => Cow::Borrowed("127.0.0.1"),
        ip => Cow::Owned(ip.to_string()),
    }
}

pub(super) fn tidy_request(headers: &mut HeaderMap, client: SocketAddr) {
    drop_headers(headers, is_for_the_proxy);
    let mut chain = shown(client.ip());
    if let Some(before) = headers.get(FORWARDED_FOR).and_then(|v| v.to_str().ok()) {
        chain = Cow::Owned(format!("{before}, {chain}"));
    }
    let value = match chain {
        Cow::Borrowed(text) => Ok(HeaderValue::from_static(text)),
        Cow::Owned(text) => HeaderValue::try_from(text),
    };
    if let Ok(value) = value {
        headers.insert(FORWARDED_FOR, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_the_connection_and_credentials_stay_here() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "keep-alive, x-mine"),
            ("connection", "x-yours"),
            ("x-mine", "1"),
            ("x-yours", "1"),
            ("keep-alive", "5"),
            ("authorization", "Bearer secret"),
            ("x-api-key", "secret"),
            ("x-forwarded-for", "10.0.0.1"),
            ("x-session-id", "s"),
        ] {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        tidy_request(&mut headers, SocketAddr::from(([127, 0, 0, 1], 9)));
        let mut left: Vec<(&str, &str)> = headers
            .iter()
            .map(|(k, v)| (k.as_str(), v.to_str().unwrap()))
            .collect();
        left.sort_unstable();
        assert_eq!(
            left,
            [("x-forwarded-for", "10.0.0.1, 127.0.0.1"), ("x-session-id", "s")]
        );
    }
}
