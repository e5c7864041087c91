//! Finished requests: pages, totals, distributions.

use std::cmp::Ordering;

use api_types::error::ApiError;
use serde_json::{Value, json};

use super::App;
use super::routes::decode;
use crate::activity::{Row, parse_rfc3339};

/// Bars of a distribution.
const BINS: usize = 20;

fn pairs(query: Option<&str>) -> Vec<(String, String)> {
    let pairs = query.unwrap_or_default().split('&').filter(|p| !p.is_empty());
    pairs
        .map(|p| p.split_once('=').unwrap_or((p, "")))
        .map(|(k, v)| (decode(k), decode(&v.replace('+', " "))))
        .collect()
}

fn models(pairs: &[(String, String)]) -> Vec<&str> {
    pairs
        .iter()
        .filter(|(k, v)| k == "model" && !v.is_empty())
        .map(|(_, v)| v.as_str())
        .collect()
}

/// `GET /api/metrics/activity`.
///
/// # Errors
/// A parameter is not what it should be.
pub fn rows(app: &App, query: Option<&str>) -> Result<Value, ApiError> {
    let pairs = pairs(query);
    let models = models(&pairs);
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
    let (start, end) = (time("start")?.unwrap_or(0), time("end")?.unwrap_or(u64::MAX));
    let (min_id, max_id) = (
        number("min_id")?.unwrap_or(0),
        number("max_id")?.unwrap_or(u64::MAX),
    );
    let limit = number("limit")?.unwrap_or(25);
    if !(1..=999).contains(&limit) {
        return Err(ApiError::invalid(
            "limit",
            format!("{limit} is not within 1 and 999"),
        ));
    }
    let page = number("page")?.unwrap_or(1).max(1);
    let compare = order_by(get("sort").unwrap_or("id"))?;
    let descending = match get("order").unwrap_or("desc") {
        "asc" => false,
        "desc" => true,
        other => {
            return Err(ApiError::invalid(
                "order",
                format!("'{other}' is neither asc nor desc"),
            ));
        }
    };
    let mut rows = app.activity.rows(|r| {
        (models.is_empty() || models.contains(&&*r.model))
            && (start..=end).contains(&r.unix_ms)
            && (min_id..=max_id).contains(&r.id)
    });
    rows.sort_by(|a, b| if descending { compare(b, a) } else { compare(a, b) });
    let total = rows.len() as u64;
    let skip = usize::try_from((page - 1).saturating_mul(limit)).unwrap_or(usize::MAX);
    let data: Vec<Value> = rows
        .iter()
        .skip(skip)
        .take(limit as usize)
        .map(Row::to_json)
        .collect();
    Ok(
        json!({"data": data, "page": page, "limit": limit, "total": total, "total_pages": total.div_ceil(limit)}),
    )
}

type Compare = fn(&Row, &Row) -> Ordering;

fn order_by(column: &str) -> Result<Compare, ApiError> {
    Ok(match column {
        "id" => |a, b| a.id.cmp(&b.id),
        "time" => |a, b| a.unix_ms.cmp(&b.unix_ms),
        "model" => |a, b| a.model.cmp(&b.model),
        "req_path" => |a, b| a.path.cmp(&b.path),
        "resp_status_code" => |a, b| a.status.cmp(&b.status),
        "resp_content_type" => |a, b| a.content_type.cmp(&b.content_type),
        "cached" => |a, b| a.usage.cached.cmp(&b.usage.cached),
        "prompt" => |a, b| a.usage.prompt.cmp(&b.usage.prompt),
        "generated" => |a, b| a.usage.completion.cmp(&b.usage.completion),
        "drafted" => |_, _| Ordering::Equal,
        "prompt_speed" => |a, b| prompt_speed(a).total_cmp(&prompt_speed(b)),
        "gen_speed" => |a, b| gen_speed(a).total_cmp(&gen_speed(b)),
        "duration" => |a, b| a.duration.cmp(&b.duration),
        other => return Err(ApiError::invalid("sort", format!("'{other}' is not a column"))),
    })
}

fn speed(tokens: Option<u64>, time: Option<std::time::Duration>) -> f64 {
    match (tokens, time) {
        (Some(n), Some(t)) if n > 0 && !t.is_zero() => n as f64 / t.as_secs_f64(),
        _ => -1.0,
    }
}

fn prompt_speed(row: &Row) -> f64 {
    speed(
        row.usage
            .prompt
            .map(|p| p.saturating_sub(row.usage.cached.unwrap_or(0))),
        row.reading,
    )
}

fn gen_speed(row: &Row) -> f64 {
    speed(row.usage.completion, row.generating)
}

/// `GET /api/metrics/stats`.
#[must_use]
pub fn stats(app: &App, query: Option<&str>) -> Value {
    let pairs = pairs(query);
    let models = models(&pairs);
    let rows = app
        .activity
        .rows(|r| models.is_empty() || models.contains(&&*r.model));
    let sum = |f: fn(&Row) -> Option<u64>| rows.iter().filter_map(f).sum::<u64>();
    let speeds = |f: fn(&Row) -> f64| rows.iter().map(f).filter(|s| *s > 0.0).collect::<Vec<_>>();
    json!({
        "total_requests": rows.len(),
        "total_input_tokens": sum(|r| r.usage.prompt),
        "total_output_tokens": sum(|r| r.usage.completion),
        "total_cache_tokens": sum(|r| r.usage.cached),
        "prompt_histogram": histogram(speeds(prompt_speed)),
        "gen_histogram": histogram(speeds(gen_speed)),
    })
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
