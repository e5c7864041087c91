//! Finished requests and captures in an SQLite file.
//!
//! One thread owns the connection. What is to be written comes to it over a bounded queue and is written many rows at
//! a time; when it cannot keep up, rows are lost and counted: no request waits for a disk. Questions go through the
//! same queue, so that an answer holds everything that was finished before it was asked for.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use super::Row;
use super::query::{Found, Page, Totals};
use super::sql;

/// Jobs that may wait for the thread.
const WAITING: usize = 4096;
/// Rows of one transaction.
const BATCH: usize = 512;
/// Longest wait for the last rows to be written.
const LAST: Duration = Duration::from_secs(5);
enum Job {
    Row(Box<Row>),
    /// The packed capture, and bytes that all captures may take.
    Capture(u64, Box<[u8]>, usize),
    Ask(Box<dyn FnOnce(&mut Connection) + Send>),
    /// Write what came before and end; the sender is dropped when that is done.
    End(oneshot::Sender<()>),
}

/// A database and the thread that owns it.
#[derive(Debug)]
pub struct Store {
    /// Its file.
    pub path: PathBuf,
    /// The last id in it when it was opened.
    pub last_id: u64,
    jobs: mpsc::Sender<Job>,
    lost: AtomicU64,
}

impl Store {
    /// Opens the file, which is made if need be, and begins its thread.
    ///
    /// # Errors
    /// A sentence that names file and reason.
    pub fn open(path: &Path) -> Result<Self, String> {
        let name = path.display();
        let fail = |e: &dyn std::fmt::Display| format!("store.path: {name}: {e}");
        if path.as_os_str().is_empty() {
            return Err("store.path: must not be empty".to_owned());
        }
        if path.is_dir() {
            return Err(fail(&"is a directory; a file is needed"));
        }
        // What the system says is plainer than what SQLite makes of it. Prompts are in it: for its owner only.
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path);
        file.map_err(|e| fail(&format!("cannot be written: {e}")))?;
        let db = Connection::open(path).map_err(|e| fail(&e))?;
        sql::prepare(&db).map_err(|e| fail(&e))?;
        let last_id = sql::last_id(&db).map_err(|e| fail(&e))?;
        let (jobs, queue) = mpsc::channel(WAITING);
        std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || run(db, queue))
            .map_err(|e| fail(&e))?;
        Ok(Self {
            path: path.to_owned(),
            last_id,
            jobs,
            lost: AtomicU64::new(0),
        })
    }

    /// Writes a row, some time soon.
    pub fn put(&self, row: Row) {
        self.send(Job::Row(Box::new(row)));
    }

    /// Writes a capture, and lets go of the oldest ones while all take more than `limit` bytes.
    pub fn put_capture(&self, id: u64, packed: Box<[u8]>, limit: usize) {
        self.send(Job::Capture(id, packed, limit));
    }

    fn send(&self, job: Job) {
        if self.jobs.try_send(job).is_err() && self.lost.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::warn!(path = %self.path.display(), "the store cannot keep up; rows are lost");
        }
    }

    /// Rows and captures that were not taken.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, String> {
        let (sender, answer) = oneshot::channel();
        let job = Job::Ask(Box::new(move |db| drop(sender.send(question(db)))));
        let gone = || "the store's thread has ended".to_owned();
        self.jobs.send(job).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?.map_err(|e| e.to_string())
    }

    /// One page of rows.
    ///
    /// # Errors
    /// What the database says.
    pub async fn page(&self, page: Page) -> Result<Found, String> {
        self.ask(move |db| sql::find(db, &page)).await
    }

    /// Sums over all rows.
    ///
    /// # Errors
    /// What the database says.
    pub async fn totals(&self, models: Vec<String>) -> Result<Totals, String> {
        self.ask(move |db| sql::sum(db, &models)).await
    }

    /// A packed capture.
    ///
    /// # Errors
    /// What the database says.
    pub async fn capture(&self, id: u64) -> Result<Option<Vec<u8>>, String> {
        self.ask(move |db| sql::capture(db, id)).await
    }

    /// Writes what is waiting and closes the file.
    pub async fn close(&self) {
        let (sender, ended) = oneshot::channel();
        let closing = async {
            if self.jobs.send(Job::End(sender)).await.is_ok() {
                let _ = ended.await;
            }
        };
        if tokio::time::timeout(LAST, closing).await.is_err() {
            tracing::warn!(path = %self.path.display(), "the last rows could not be written in time");
        }
    }
}

fn run(mut db: Connection, mut jobs: mpsc::Receiver<Job>) {
    let mut captures = None;
    let mut failing = false;
    let mut last = None;
    while let Some(job) = jobs.blocking_recv() {
        let mut next = Some(job);
        while let Some(job) = next.take() {
            match job {
                Job::Ask(question) => question(&mut db),
                Job::End(ended) => {
                    last = Some(ended);
                    jobs.close();
                }
                write => {
                    let written = write_all(&mut db, write, &mut jobs, &mut captures, &mut next);
                    if let (Err(error), false) = (&written, failing) {
                        tracing::error!(%error, "the store cannot be written; rows are lost");
                    }
                    failing = written.is_err();
                }
            }
        }
    }
    // Closing folds the write-ahead log into the file.
    drop(db);
    drop(last);
}

/// Writes this job and those behind it in one transaction, up to the first one that is none to write (`next`).
fn write_all(
    db: &mut Connection,
    first: Job,
    jobs: &mut mpsc::Receiver<Job>,
    captures: &mut Option<u64>,
    next: &mut Option<Job>,
) -> rusqlite::Result<()> {
    let mut job = first;
    let writing = db.transaction()?;
    for n in 1..=BATCH {
        match job {
            Job::Row(row) => sql::insert(&writing, &row)?,
            Job::Capture(id, packed, limit) => sql::insert_capture(&writing, id, &packed, limit, captures)?,
            other => {
                *next = Some(other);
                break;
            }
        }
        match jobs.try_recv() {
            Ok(more) if n == BATCH => {
                *next = Some(more);
                break;
            }
            Ok(more) => job = more,
            Err(_) => break,
        }
    }
    writing.commit()
}

#[cfg(test)]
mod tests {
    use std::collections::{HashSet, VecDeque};

    use super::super::query::Column;
    use super::*;
    use crate::usage::Usage;

    fn row(id: u64) -> Row {
        let known = |n: u64| (!id.is_multiple_of(3)).then_some(n);
        Row {
            id,
            unix_ms: 1_000_000 + id,
            model: if id.is_multiple_of(2) { "even" } else { "odd/x" }.into(),
            path: format!("/v1/{}", id % 5),
            content_type: "application/json".to_owned(),
            status: if id.is_multiple_of(7) { 502 } else { 200 },
            usage: Usage {
                prompt: known(10 * (id % 11)),
                completion: known(id % 13),
                cached: id.is_multiple_of(4).then_some(id % 9),
                drafted: id.is_multiple_of(5).then_some(id % 6),
                accepted: id.is_multiple_of(5).then_some(id % 3),
                prompt_speed: id.is_multiple_of(10).then_some(id as f64 / 7.0),
                gen_speed: id.is_multiple_of(9).then_some(id as f64 / 3.0),
            },
            duration: Duration::from_micros(1_000 * (id * 7_919 % 1_009)),
            generating: known(1).map(|_| Duration::from_micros(1 + id % 17)),
            reading: Some(Duration::from_micros(id % 19)),
            error: id.is_multiple_of(7).then(|| "broke off".to_owned()),
            priority: id.is_multiple_of(2).then_some(-3),
            selector: id.is_multiple_of(11).then(|| "best".into()),
        }
    }

    fn page(sort: Column, descending: bool) -> Page {
        Page {
            models: Vec::new(),
            time: 0..=u64::MAX,
            ids: 0..=u64::MAX,
            sort,
            descending,
            limit: 50,
            page: 1,
        }
    }

    #[test]
    fn what_cannot_be_opened_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("text");
        std::fs::write(&text, "this is no database, however long it is".repeat(100)).unwrap();
        let newer = dir.path().join("newer");
        let db = Connection::open(&newer).unwrap();
        db.pragma_update(None, "user_version", 7).unwrap();
        drop(db);
        for (path, expected) in [
            (PathBuf::new(), "must not be empty"),
            (dir.path().to_owned(), "is a directory"),
            (dir.path().join("none/file.db"), "cannot be written: No such file"),
            (text.join("file.db"), "cannot be written: Not a directory"),
            (text.clone(), "not a database"),
            (newer, "form 7"),
        ] {
            let error = Store::open(&path).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        let path = dir.path().join("a.db");
        let _store = Store::open(&path).unwrap();
        let mode = std::os::unix::fs::MetadataExt::mode(&path.metadata().unwrap());
        assert_eq!(mode & 0o777, 0o600);
    }

    /// The database finds what memory would find, in the same order, after another start too.
    #[tokio::test]
    async fn rows_are_found_as_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let store = Store::open(&path).unwrap();
        let rows: VecDeque<Row> = (1..=2_000).map(row).collect();
        for row in &rows {
            store.put(row.clone());
        }
        store.put_capture(3, vec![1; 10].into(), 1_000);
        store.close().await;
        assert_eq!(store.lost(), 0);
        let store = Store::open(&path).unwrap();
        assert_eq!(store.last_id, 2_000);
        let columns = [
            "id",
            "time",
            "model",
            "req_path",
            "resp_status_code",
            "resp_content_type",
            "cached",
            "prompt",
            "generated",
            "drafted",
            "prompt_speed",
            "gen_speed",
            "duration",
        ];
        let captured = HashSet::from([3]);
        let shown = |found: &Found| -> Vec<String> {
            found
                .rows
                .iter()
                .map(|(r, c)| r.to_json(*c).to_string())
                .collect()
        };
        for column in columns {
            for descending in [true, false] {
                let mut wanted = page(Column::named(column).unwrap(), descending);
                wanted.page = 3;
                let (here, there) = (wanted.of(&rows, &captured), store.page(wanted).await.unwrap());
                assert_eq!(shown(&here), shown(&there), "{column} {descending}");
                assert_eq!((here.total, here.rows.len()), (2_000, 50));
            }
        }
        let mut wanted = page(Column::Id, false);
        wanted.models = vec!["odd/x".to_owned(), "x' OR 1 --".to_owned()];
        (wanted.ids, wanted.time) = (3..=40, 1_000_000..=1_000_009);
        let (here, there) = (wanted.of(&rows, &captured), store.page(wanted).await.unwrap());
        assert_eq!((shown(&here), here.total), (shown(&there), 4));
        assert!(there.rows[0].1 && !there.rows[1].1, "has a capture");
        for models in [vec![], vec!["even".to_owned()]] {
            let here = Totals::of(rows.iter(), &models);
            let mut there = store.totals(models).await.unwrap();
            there.prompt_speeds.reverse();
            there.gen_speeds.reverse();
            let near = |a: &[f64], b: &[f64]| {
                a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < a * 1e-9)
            };
            assert!(
                near(&here.prompt_speeds, &there.prompt_speeds) && near(&here.gen_speeds, &there.gen_speeds)
            );
            assert_eq!(
                (here.requests, here.prompt, here.completion, here.cached),
                (there.requests, there.prompt, there.completion, there.cached)
            );
        }
    }

    /// A database of the form before opens with its rows.
    #[tokio::test]
    async fn an_older_database_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let db = Connection::open(&path).unwrap();
        db.execute_batch(
            "CREATE TABLE activity (
                 id INTEGER PRIMARY KEY, unix_ms INTEGER NOT NULL, model TEXT NOT NULL, path TEXT NOT NULL,
                 content_type TEXT NOT NULL, status INTEGER NOT NULL, prompt INTEGER, completion INTEGER, cached INTEGER,
                 duration_us INTEGER NOT NULL, generating_us INTEGER, reading_us INTEGER, error TEXT
             ) STRICT;
             CREATE TABLE captures (id INTEGER PRIMARY KEY, packed BLOB NOT NULL) STRICT;
             INSERT INTO activity VALUES (4, 5, 'm', '/v1/x', '', 200, 7, 1, NULL, 100, 50, 50, NULL);
             PRAGMA user_version = 1;",
        )
        .unwrap();
        drop(db);
        let store = Store::open(&path).unwrap();
        assert_eq!(store.last_id, 4);
        store.put(row(5));
        let found = store.page(page(Column::Id, false)).await.unwrap();
        let shown: Vec<serde_json::Value> = found.rows.iter().map(|(r, c)| r.to_json(*c)).collect();
        assert_eq!(shown[0]["tokens"]["input_tokens"], 7);
        assert_eq!(shown[0]["tokens"]["draft_tokens"], -1);
        assert_eq!(shown[1], row(5).to_json(false));
        store.close().await;
        assert_eq!(Store::open(&path).unwrap().last_id, 5, "opened once more");
    }

    #[tokio::test]
    async fn captures_make_room_for_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let store = Store::open(&path).unwrap();
        for id in 1..=10 {
            store.put_capture(id, vec![u8::try_from(id).unwrap(); 300].into(), 1_000);
        }
        assert_eq!(store.capture(7).await.unwrap(), None);
        assert_eq!(store.capture(8).await.unwrap(), Some(vec![8; 300]));
        store.close().await;
        // Counted anew after another start.
        let store = Store::open(&path).unwrap();
        store.put_capture(11, vec![11; 300].into(), 1_000);
        assert_eq!(store.capture(8).await.unwrap(), None);
        assert!(store.capture(9).await.unwrap().is_some() && store.capture(11).await.unwrap().is_some());
        store.put_capture(12, vec![12; 2_000].into(), 1_000);
        assert!(store.capture(11).await.unwrap().is_none() && store.capture(12).await.unwrap().is_none());
    }

    /// A disk that does not answer costs rows, and no time.
    #[tokio::test]
    async fn a_queue_that_is_full_loses_and_counts() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("a.db")).unwrap();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let (begun, begins) = oneshot::channel();
        let asking = store.ask(move |_| {
            begun.send(()).unwrap();
            let _ = wait.recv();
            Ok(())
        });
        let mut asking = std::pin::pin!(asking);
        // From then on the thread takes nothing from the queue, which is empty.
        tokio::select! {
            _ = &mut asking => panic!("nobody has let it go on"),
            begins = begins => begins.unwrap(),
        }
        let all = WAITING as u64 + 100;
        for id in 1..=all {
            store.put(row(id));
        }
        let lost = store.lost();
        assert_eq!(lost, 100);
        go.send(()).unwrap();
        asking.await.unwrap();
        let found = store.page(page(Column::Id, true)).await.unwrap();
        assert_eq!(found.total, all - lost);
    }
}
