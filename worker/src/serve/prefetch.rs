//! Weight files read into the system's page cache while the model loads.
//!
//! A mapped file is read page by page, when somebody touches it; a thread of low priority that reads ahead keeps the
//! disk busy from the first moment on. Where MLX uses the mapped pages themselves (Metal), it goes on after the start
//! until all of them are in memory, so that no request waits for an expert that has never been used; where MLX copies
//! them, it ends with the loading.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use api_types::control::WorkerEvent;
use mlx_ext::{MappedFile, Prefetch};
use tokio::sync::mpsc;

use crate::model::weights;

/// Weights being read ahead; dropping it stops that.
#[derive(Debug)]
pub(super) struct Ahead {
    prefetch: Option<Prefetch>,
    loading: Arc<AtomicBool>,
}

impl Ahead {
    /// Starts with all weight files of `folder`. Progress goes to `events` while the model loads, and to the log. What
    /// keeps files from being read is the loader's to tell.
    pub(super) fn start(folder: &Path, events: Option<mpsc::Sender<WorkerEvent>>) -> Self {
        let loading = Arc::new(AtomicBool::new(true));
        let while_loading = Arc::clone(&loading);
        let files: Vec<MappedFile> = weights::files(folder)
            .unwrap_or_default()
            .iter()
            .filter_map(|path| MappedFile::open(path).ok())
            .collect();
        let total: u64 = files.iter().map(|file| file.bytes().len() as u64).sum();
        let began = Instant::now();
        let mut tenth = 0;
        let prefetch = Prefetch::start(files, move |done| {
            if let Some(events) = events.as_ref().filter(|_| while_loading.load(Relaxed)) {
                let phase = "pages".to_owned();
                let _ = events.try_send(WorkerEvent::Loading { phase, done, total });
            }
            let tenths = done.saturating_mul(10) / total.max(1);
            if tenths > tenth {
                tenth = tenths;
                let seconds = began.elapsed().as_secs_f64();
                tracing::info!(done, total, seconds, "weight files in memory");
            }
        });
        Self {
            prefetch: prefetch
                .inspect_err(|error| tracing::warn!("weight files are not read ahead: {error}"))
                .ok(),
            loading,
        }
    }

    /// The model is there; `in_place`: in these very pages.
    pub(super) fn loaded(&mut self, in_place: bool) {
        self.loading.store(false, Relaxed);
        if !in_place {
            self.prefetch = None;
        }
    }
}
