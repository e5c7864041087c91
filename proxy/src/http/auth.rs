//! API keys: who may use which models.

use api_types::error::ApiError;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::HeaderMap;
use http::header::AUTHORIZATION;
use registry::ApiKey;
use subtle::ConstantTimeEq;

use super::routes::Route;

/// What a client may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// Everything.
    All,
    /// Use these models (ids or names), nothing else.
    Models(Vec<String>),
}

impl Access {
    /// Whether this model may be used, asked for by this name.
    #[must_use]
    pub fn permits(&self, model: &str, requested: &str) -> bool {
        match self {
            Self::All => true,
            Self::Models(names) => names.iter().any(|n| n == model || n == requested),
        }
    }
}

/// Whether a route needs no key.
#[must_use]
pub fn is_open(route: &Route) -> bool {
    matches!(
        route,
        Route::Health | Route::Home | Route::Icon | Route::UpstreamPage
    )
}

/// Checks the key that a request presents: as Basic password, Bearer token or `x-api-key`; any valid one will do.
///
/// Every key is compared in full, whatever the outcome, so that the time taken tells nothing but its length.
///
/// # Errors
/// 401 without a valid key, if there are keys at all.
pub fn check(keys: &[ApiKey], headers: &HeaderMap) -> Result<Access, ApiError> {
    if keys.is_empty() {
        return Ok(Access::All);
    }
    let presented = presented(headers);
    let mut found = None;
    for key in keys {
        for text in &presented {
            if bool::from(text.as_bytes().ct_eq(key.key.as_bytes())) {
                found = Some(key);
            }
        }
    }
    match found {
        Some(ApiKey {
            models: Some(models), ..
        }) => Ok(Access::Models(models.clone())),
        Some(_) => Ok(Access::All),
        None if presented.is_empty() => Err(ApiError::unauthorized("an API key is required")),
        None => Err(ApiError::unauthorized("the API key is not valid")),
    }
}

fn presented(headers: &HeaderMap) -> Vec<String> {
    let mut keys = Vec::new();
    for value in headers
        .get_all(AUTHORIZATION)
        .iter()
        .filter_map(|v| v.to_str().ok())
    {
        let Some((scheme, rest)) = value.trim().split_once(' ') else {
            continue;
        };
        if scheme.eq_ignore_ascii_case("bearer") {
            keys.push(rest.trim().to_owned());
        } else if scheme.eq_ignore_ascii_case("basic") {
            let pair = STANDARD
                .decode(rest.trim())
                .ok()
                .and_then(|b| String::from_utf8(b).ok());
            keys.extend(
                pair.as_deref()
                    .and_then(|p| p.split_once(':'))
                    .map(|(_, password)| password.to_owned()),
            );
        }
    }
    keys.extend(
        headers
            .get_all("x-api-key")
            .iter()
            .filter_map(|v| v.to_str().ok())
            .map(str::to_owned),
    );
    keys
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(k, v)| (http::HeaderName::from_static(k), HeaderValue::from_static(v)))
            .collect()
    }

    #[test]
    fn any_valid_key_will_do() {
        let keys = vec![
            ApiKey {
                key: "all".into(),
                models: None,
            },
            ApiKey {
                key: "some".into(),
                models: Some(vec!["m".into()]),
            },
        ];
        let check = |pairs| check(&keys, &headers(pairs));
        assert_eq!(check(&[("authorization", "Bearer all")]).unwrap(), Access::All);
        assert_eq!(
            check(&[("authorization", "basic dTphbGw=")]).unwrap(),
            Access::All
        );
        assert_eq!(
            check(&[("authorization", "Bearer wrong"), ("x-api-key", "all")]).unwrap(),
            Access::All
        );
        let some = check(&[("x-api-key", "some")]).unwrap();
        assert!(some.permits("m", "alias") && some.permits("x", "m") && !some.permits("x", "y"));
        assert_eq!(check(&[("x-api-key", "al")]).unwrap_err().status, 401);
        assert_eq!(check(&[]).unwrap_err().status, 401);
        assert_eq!(super::check(&[], &HeaderMap::new()).unwrap(), Access::All);
    }
}
