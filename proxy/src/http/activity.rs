//! Finished requests: pages, totals, distributions.

use api_types::error::ApiError;
use serde_json::{Value, json};

use super::App;
use super::routes::decode;
use crate::activity::query::{Column, Page};
use crate::clock::parse_rfc3339;

/// Bars of a distribution.
const BINS: usize = 20;

fn pairs(query: Option<&str>) -> Vec<(String, String)> {
    let pairs = query.unwrap_or_default().split('&').filter(|p| !p.is_empty());
    pairs
        .map(|p| p.split_once('=').unwrap_or((p, "")))
        .map(|(k, v)| (decode(k), decode(&v.replace('+', " "))))
        .collect()
}

fn models(pairs: &[(String, String)]) -> Vec<String> {
    pairs
        .iter()
        .filter(|(k, v)| k == "model" && !v.is_empty())
        .map(|(_, v)| v.clone())
        .collect()
}

/// `GET /api/metrics/activity`.
///
/// # Errors
/// A parameter is not what it should be, or the store does not answer.
pub async fn rows(app: &App, query: Option<&str>) -> Result<Value, ApiError> {
    let wanted = page(&pairs(query))?;
    let (page, limit) = (wanted.page, wanted.limit);
    let found = app.activity.page(wanted).await.map_err(no_store)?;
    let data: Vec<Value> = found
        .rows
        .iter()
        .map(|(row, captured)| row.to_json(*captured))
        .collect();
    Ok(json!({
        "data": data, "page": page, "limit": limit, "total": found.total, "total_pages": found.total.div_ceil(limit),
    }))
}

fn no_store(why: String) -> ApiError {
    ApiError::internal(format!("the activity store does not answer: {why}")).with_code("store")
}

fn page(pairs: &[(String, String)]) -> Result<Page, ApiError> {
    let get = |key: &str| {
        pairs
            .iter()
            .find(|(k, v)| k == key && !v.is_empty())
            .map(|(_, v)| v.as_str())
    };
    let number = |key: &str| -> Result<Option<u64>, ApiError> {
        let parse = |v: &str| {
            v.parse()
                .map_err(|_| ApiError::invalid(key, format!("'{v}' is not a number")))
        };
        get(key).map(parse).transpose()
    };
    let time = |key: &str| -> Result<Option<u64>, ApiError> {
        let parse = |v: &str| {
            parse_rfc3339(v).ok_or_else(|| ApiError::invalid(key, format!("'{v}' is not RFC 3339")))
        };
        get(key).map(parse).transpose()
    };
    let limit = number("limit")?.unwrap_or(25);
    if !(1..=999).contains(&limit) {
        return Err(ApiError::invalid(
            "limit",
            format!("{limit} is not within 1 and 999"),
        ));
    }
    let sort = get("sort").unwrap_or("id");
    Ok(Page {
        models: models(pairs),
        time: time("start")?.unwrap_or(0)..=time("end")?.unwrap_or(u64::MAX),
        ids: number("min_id")?.unwrap_or(0)..=number("max_id")?.unwrap_or(u64::MAX),
        sort: Column::named(sort)
            .ok_or_else(|| ApiError::invalid("sort", format!("'{sort}' is not a column")))?,
        descending: match get("order").unwrap_or("desc") {
            "asc" => false,
            "desc" => true,
            other => {
                return Err(ApiError::invalid(
                    "order",
                    format!("'{other}' is neither asc nor desc"),
                ));
            }
        },
        limit,
        page: number("page")?.unwrap_or(1).max(1),
    })
}

/// `GET /api/metrics/stats`.
///
/// # Errors
/// The store does not answer.
pub async fn stats(app: &App, query: Option<&str>) -> Result<Value, ApiError> {
    let wanted = models(&pairs(query));
    let totals = app.activity.totals(wanted).await.map_err(no_store)?;
    Ok(json!({
        "total_requests": totals.requests,
        "total_input_tokens": totals.prompt,
        "total_output_tokens": totals.completion,
        "total_cache_tokens": totals.cached,
        "prompt_histogram": histogram(totals.prompt_speeds),
        "gen_histogram": histogram(totals.gen_speeds),
    }))
}

/// `GET /api/captures/{id}`.
///
/// # Errors
/// No such capture, or the store does not answer.
pub async fn capture(app: &App, id: &str) -> Result<Value, ApiError> {
    let id: u64 = id
        .parse()
        .map_err(|_| ApiError::invalid("id", format!("'{id}' is not a number")))?;
    let captured = app.activity.captured(id).await.map_err(no_store)?;
    let captured = captured.ok_or_else(|| ApiError::not_found(format!("there is no capture {id}")))?;
    Ok(captured.to_json(id))
}

fn histogram(mut values: Vec<f64>) -> Value {
    values.sort_by(f64::total_cmp);
    let (Some(min), Some(max)) = (values.first().copied(), values.last().copied()) else {
        return Value::Null;
    };
    let width = if max > min { (max - min) / BINS as f64 } else { 1.0 };
    let mut bins = vec![0_u64; BINS];
    for value in &values {
        let at = (((value - min) / width) as usize).min(BINS - 1);
        if let Some(bin) = bins.get_mut(at) {
            *bin += 1;
        }
    }
    let percentile = |p: usize| values.get((values.len() - 1) * p / 100).copied();
    json!({
        "bins": bins, "min": min, "max": max, "binSize": width,
        "p50": percentile(50), "p95": percentile(95), "p99": percentile(99),
    })
}
