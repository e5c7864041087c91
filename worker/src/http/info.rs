//! Models, health, status, metrics.

use std::sync::Arc;

use api_types::ApiError;
use api_types::openai::{ModelCard, ModelList};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header;
use serde_json::{Value, json};

use super::errors::{Failure, PathId, engine_dead};
use super::service::Service;

fn card(service: &Service) -> ModelCard {
    ModelCard {
        id: service.config.served_model.clone(),
        object: "model".to_owned(),
        created: service.created,
        owned_by: "mlxworker".to_owned(),
        max_model_len: Some(service.backend.info().most_tokens()),
    }
}

/// `GET /v1/models`.
pub(super) async fn models(State(service): State<Arc<Service>>) -> Json<ModelList> {
    Json(ModelList {
        object: "list".to_owned(),
        data: vec![card(&service)],
    })
}

/// `GET /v1/models/{id}`; an id may hold slashes.
pub(super) async fn model(
    State(service): State<Arc<Service>>,
    PathId(id): PathId,
) -> Result<Json<ModelCard>, Failure> {
    service.check_model(Some(&id))?;
    Ok(Json(card(&service)))
}

/// `GET /health`: 200 while requests can be expected to be answered.
pub(super) async fn health(State(service): State<Arc<Service>>) -> Result<Json<Value>, Failure> {
    if let Some(reason) = service.death() {
        return Err(engine_dead(&reason).into());
    }
    if service.is_draining() {
        return Err(ApiError::unavailable("draining", "this worker is shutting down", None).into());
    }
    let stats = service.backend.stats();
    let stalled = service
        .config
        .stall_limit
        .is_some_and(|limit| stats.last_step_age > limit);
    if (stats.busy || stats.running + stats.waiting > 0) && stalled {
        let message = format!(
            "the engine has not stepped for {} s with {} requests running and {} waiting",
            stats.last_step_age.as_secs(),
            stats.running,
            stats.waiting
        );
        return Err(ApiError::unavailable("engine_stalled", message, None).into());
    }
    Ok(Json(json!({
        "status": "ok",
        "model": service.config.served_model,
        "steps": stats.steps,
        "last_step_age_ms": millis(stats.last_step_age),
        "running": stats.running,
        "waiting": stats.waiting,
    })))
}

/// `GET /status`: effective limits and the engine's numbers.
pub(super) async fn status(State(service): State<Arc<Service>>) -> Json<Value> {
    let (info, stats, config) = (service.backend.info(), service.backend.stats(), &service.config);
    Json(json!({
        "model": config.served_model,
        "architecture": info.architecture,
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_seconds": service.started.elapsed().as_secs(),
        "draining": service.is_draining(),
        "load": config.load.fields(),
        "limits": {
            "context_length": info.context_length,
            "max_model_len": info.most_tokens(),
            "max_tokens": config.default_max_tokens,
            "max_request_tokens": config.max_request_tokens,
            "max_body_bytes": config.max_body,
            "silence_limit_seconds": config.silence_limit.as_secs_f64(),
            "stall_limit_seconds": config.stall_limit.map(|limit| limit.as_secs_f64()),
            "queue_limit_seconds": config.queue_limit.as_secs_f64(),
            "engine": info.limits,
        },
        "default_sampling": {
            "temperature": config.sampling.temperature,
            "top_p": config.sampling.top_p,
            "top_k": config.sampling.top_k,
            "min_p": config.sampling.min_p,
            "repetition_penalty": config.sampling.repetition_penalty,
            "presence_penalty": config.sampling.presence_penalty,
            "frequency_penalty": config.sampling.frequency_penalty,
        },
        "chat": service.chat.as_ref().map(|chat| json!({
            "tool_call_parser": chat.tool_format.to_string(),
            "tool_calls_not_parsed": chat.unknown_tools,
            "reasoning_parser": chat.reasoning.to_string(),
        })),
        "requests": {"in_flight": service.in_flight(), "running": stats.running, "waiting": stats.waiting,
                     "list": service.requests.list()},
        "engine": {
            "steps": stats.steps,
            "last_step_age_ms": millis(stats.last_step_age),
            "prefill_tokens": stats.prefill_tokens,
            "decode_tokens": stats.decode_tokens,
            "cached_tokens": stats.cache.cached_tokens,
            "preempted": stats.preempted,
            "decode_steps": {"kernels": stats.kernel_decodes, "reference": stats.reference_decodes},
        },
        "prefix_cache": {
            "requests": stats.cache.requests,
            "hits": stats.cache.hits,
            "prompt_tokens": stats.cache.prompt_tokens,
            "cached_tokens": stats.cache.cached_tokens,
            "hit_rate": stats.cache.hit_rate(),
            "request_hit_rate": stats.cache.request_hit_rate(),
            "evicted_blocks": stats.cache.evicted_blocks,
            "copied_blocks": stats.cache.copied_blocks,
            "moved_blocks": stats.cache.moved_blocks,
            "deduplicated_blocks": stats.cache.deduplicated_blocks,
        },
        "memory": {
            "weight_bytes": info.weight_bytes,
            "kv_used_bytes": stats.kv_used_bytes,
            "kv_cached_bytes": stats.kv_cached_bytes,
            "active_bytes": stats.active_bytes,
            "peak_bytes": stats.peak_bytes,
            "buffer_cache_bytes": stats.buffer_cache_bytes,
            "process": service.footprint().json(),
        },
    }))
}

/// `GET /metrics`.
pub(super) async fn metrics(State(service): State<Arc<Service>>) -> Result<Response, Failure> {
    if !service.config.metrics {
        return Err(ApiError::not_found("metrics are switched off (--disable-metrics)").into());
    }
    let text = service.metrics.render(
        &service.backend.stats(),
        &service.footprint(),
        service.in_flight(),
    );
    Ok((
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
        text,
    )
        .into_response())
}

fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
