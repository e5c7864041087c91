//! The tables of the activity database, and what is asked of them.

use std::time::Duration;

use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, Transaction, params, params_from_iter};

use super::Row;
use super::query::{Column, Found, Page, Totals};
use crate::usage::Usage;

/// Longest wait for another program that has the file.
const BUSY: Duration = Duration::from_secs(5);
/// Most speeds that a distribution is made of: the latest ones.
const MAX_SPEEDS: i64 = 100_000;
/// The form of the tables below, as it is noted in the file.
const VERSION: i64 = 2;

const TABLES: &str = "
CREATE TABLE activity (
    id INTEGER PRIMARY KEY, unix_ms INTEGER NOT NULL, model TEXT NOT NULL, path TEXT NOT NULL,
    content_type TEXT NOT NULL, status INTEGER NOT NULL, prompt INTEGER, completion INTEGER, cached INTEGER,
    duration_us INTEGER NOT NULL, generating_us INTEGER, reading_us INTEGER, error TEXT,
    drafted INTEGER, accepted INTEGER, prompt_rate REAL, gen_rate REAL, priority INTEGER, selector TEXT
) STRICT;
CREATE INDEX activity_time ON activity (unix_ms);
CREATE INDEX activity_model ON activity (model);
CREATE TABLE captures (id INTEGER PRIMARY KEY, packed BLOB NOT NULL) STRICT;
PRAGMA user_version = 2;
";
/// From the form before, in the order of the columns above.
const FROM_1: &str = "
ALTER TABLE activity ADD COLUMN drafted INTEGER;
ALTER TABLE activity ADD COLUMN accepted INTEGER;
ALTER TABLE activity ADD COLUMN prompt_rate REAL;
ALTER TABLE activity ADD COLUMN gen_rate REAL;
ALTER TABLE activity ADD COLUMN priority INTEGER;
ALTER TABLE activity ADD COLUMN selector TEXT;
PRAGMA user_version = 2;
";
const COLUMNS: &str = "id, unix_ms, model, path, content_type, status, prompt, completion, cached, duration_us, \
    generating_us, reading_us, error, drafted, accepted, prompt_rate, gen_rate, priority, selector";
/// As `Row::prompt_speed` and `Row::gen_speed`; -1 if it is not known.
const PROMPT_SPEED: &str =
    "ifnull(prompt_rate, CASE WHEN max(prompt - ifnull(cached, 0), 0) > 0 AND reading_us > 0
    THEN (prompt - ifnull(cached, 0)) * 1e6 / reading_us ELSE -1.0 END)";
const GEN_SPEED: &str = "ifnull(gen_rate, CASE WHEN completion > 0 AND generating_us > 0
    THEN completion * 1e6 / generating_us ELSE -1.0 END)";

/// Makes the tables if there are none.
///
/// # Errors
/// What the database says, or that its tables are of another form.
pub(super) fn prepare(db: &Connection) -> Result<(), String> {
    let text = |e: rusqlite::Error| e.to_string();
    db.busy_timeout(BUSY).map_err(text)?;
    // Readers do not wait for the writer, and a crash loses the last rows at most.
    db.pragma_update(None, "journal_mode", "wal").map_err(text)?;
    db.pragma_update(None, "synchronous", "normal").map_err(text)?;
    let version: i64 = db
        .pragma_query_value(None, "user_version", |r| r.get(0))
        .map_err(text)?;
    let change = |sql: &str| {
        db.execute_batch(&format!("BEGIN IMMEDIATE; {sql} COMMIT;"))
            .map_err(text)
    };
    match version {
        0 => change(TABLES),
        1 => change(FROM_1),
        VERSION => Ok(()),
        other => Err(format!(
            "its tables have the form {other}, which this version does not know"
        )),
    }
}

/// SQLite's numbers have a sign.
pub(super) fn whole(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn micros(time: Option<Duration>) -> Option<i64> {
    time.map(|t| i64::try_from(t.as_micros()).unwrap_or(i64::MAX))
}

pub(super) fn insert(db: &Transaction<'_>, row: &Row) -> rusqlite::Result<()> {
    let sql = "INSERT OR REPLACE INTO activity VALUES \
        (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";
    db.prepare_cached(sql)?.execute(params![
        whole(row.id),
        whole(row.unix_ms),
        &*row.model,
        row.path,
        row.content_type,
        row.status,
        row.usage.prompt.map(whole),
        row.usage.completion.map(whole),
        row.usage.cached.map(whole),
        micros(Some(row.duration)),
        micros(row.generating),
        micros(row.reading),
        row.error,
        row.usage.drafted.map(whole),
        row.usage.accepted.map(whole),
        row.usage.prompt_speed,
        row.usage.gen_speed,
        row.priority,
        row.selector.as_deref(),
    ])?;
    Ok(())
}

/// `size` is what all captures take, once somebody has counted.
pub(super) fn insert_capture(
    db: &Transaction<'_>,
    id: u64,
    packed: &[u8],
    limit: usize,
    size: &mut Option<u64>,
) -> rusqlite::Result<()> {
    let counted = match *size {
        Some(counted) => counted,
        None => db.query_row("SELECT ifnull(sum(length(packed)), 0) FROM captures", [], |r| {
            r.get::<_, i64>(0).map(|n| u64::try_from(n).unwrap_or(0))
        })?,
    };
    // Counted anew should this transaction fail.
    *size = None;
    db.prepare_cached("INSERT OR REPLACE INTO captures VALUES (?, ?)")?
        .execute(params![whole(id), packed])?;
    let mut taken = counted + packed.len() as u64;
    while taken > limit as u64 {
        let sql = "DELETE FROM captures WHERE id = (SELECT min(id) FROM captures) RETURNING length(packed)";
        let freed = db
            .prepare_cached(sql)?
            .query_row([], |r| r.get::<_, i64>(0))
            .optional()?;
        let Some(freed) = freed else { break };
        taken = taken.saturating_sub(u64::try_from(freed).unwrap_or(0));
    }
    *size = Some(taken);
    Ok(())
}

fn expression(column: Column) -> &'static str {
    match column {
        Column::Id => "id",
        Column::Time => "unix_ms",
        Column::Model => "model",
        Column::Path => "path",
        Column::Status => "status",
        Column::ContentType => "content_type",
        Column::Cached => "cached",
        Column::Prompt => "prompt",
        Column::Generated => "completion",
        Column::Drafted => "drafted",
        Column::PromptSpeed => PROMPT_SPEED,
        Column::GenSpeed => GEN_SPEED,
        Column::Duration => "duration_us",
    }
}

/// A condition on the model, and its values.
fn of_models(models: &[String]) -> (String, Vec<Value>) {
    if models.is_empty() {
        return ("TRUE".to_owned(), Vec::new());
    }
    let marks = vec!["?"; models.len()].join(", ");
    let values = models.iter().cloned().map(Value::from).collect();
    (format!("model IN ({marks})"), values)
}

pub(super) fn find(db: &Connection, page: &Page) -> rusqlite::Result<Found> {
    let (models, mut values) = of_models(&page.models);
    let wanted = format!("{models} AND unix_ms BETWEEN ? AND ? AND id BETWEEN ? AND ?");
    let bounds = [
        page.time.start(),
        page.time.end(),
        page.ids.start(),
        page.ids.end(),
    ];
    values.extend(bounds.map(|n| Value::from(whole(*n))));
    let total = db.query_row(
        &format!("SELECT count(*) FROM activity WHERE {wanted}"),
        params_from_iter(&values),
        |r| r.get::<_, i64>(0),
    )?;
    let (by, way) = (
        expression(page.sort),
        if page.descending { "DESC" } else { "ASC" },
    );
    let sql = format!(
        "SELECT {COLUMNS}, EXISTS (SELECT 1 FROM captures c WHERE c.id = activity.id) FROM activity
         WHERE {wanted} ORDER BY {by} {way}, id {way} LIMIT ? OFFSET ?"
    );
    values.extend([page.limit, page.skipped()].map(|n| Value::from(whole(n))));
    let mut statement = db.prepare(&sql)?;
    let rows = statement.query_map(params_from_iter(&values), |r| Ok((read(r)?, r.get(19)?)))?;
    Ok(Found {
        rows: rows.collect::<rusqlite::Result<_>>()?,
        total: u64::try_from(total).unwrap_or(0),
    })
}

fn read(r: &rusqlite::Row<'_>) -> rusqlite::Result<Row> {
    let number =
        |i: usize| Ok::<_, rusqlite::Error>(r.get::<_, Option<i64>>(i)?.and_then(|n| u64::try_from(n).ok()));
    let time = |i: usize| Ok::<_, rusqlite::Error>(number(i)?.map(Duration::from_micros));
    Ok(Row {
        id: number(0)?.unwrap_or(0),
        unix_ms: number(1)?.unwrap_or(0),
        model: r.get::<_, String>(2)?.into(),
        path: r.get(3)?,
        content_type: r.get(4)?,
        status: r.get(5)?,
        usage: Usage {
            prompt: number(6)?,
            completion: number(7)?,
            cached: number(8)?,
            drafted: number(13)?,
            accepted: number(14)?,
            prompt_speed: r.get(15)?,
            gen_speed: r.get(16)?,
        },
        duration: time(9)?.unwrap_or_default(),
        generating: time(10)?,
        reading: time(11)?,
        error: r.get(12)?,
        priority: r.get(17)?,
        selector: r.get(18)?,
    })
}

pub(super) fn sum(db: &Connection, models: &[String]) -> rusqlite::Result<Totals> {
    let (wanted, values) = of_models(models);
    let sums = "count(*), ifnull(sum(prompt), 0), ifnull(sum(completion), 0), ifnull(sum(cached), 0)";
    let mut totals = db.query_row(
        &format!("SELECT {sums} FROM activity WHERE {wanted}"),
        params_from_iter(&values),
        |r| {
            let number = |i: usize| r.get::<_, i64>(i).map(|n| u64::try_from(n).unwrap_or(0));
            Ok(Totals {
                requests: number(0)?,
                prompt: number(1)?,
                completion: number(2)?,
                cached: number(3)?,
                ..Totals::default()
            })
        },
    )?;
    let speeds = |speed: &str| -> rusqlite::Result<Vec<f64>> {
        let sql = format!(
            "SELECT speed FROM (SELECT {speed} AS speed, id FROM activity WHERE {wanted})
             WHERE speed > 0 ORDER BY id DESC LIMIT {MAX_SPEEDS}"
        );
        let mut statement = db.prepare(&sql)?;
        let found = statement.query_map(params_from_iter(&values), |r| r.get(0))?;
        found.collect()
    };
    totals.prompt_speeds = speeds(PROMPT_SPEED)?;
    totals.gen_speeds = speeds(GEN_SPEED)?;
    Ok(totals)
}

/// A packed capture.
pub(super) fn capture(db: &Connection, id: u64) -> rusqlite::Result<Option<Vec<u8>>> {
    let found = db.query_row("SELECT packed FROM captures WHERE id = ?", [whole(id)], |r| {
        r.get(0)
    });
    found.optional()
}

/// The last id; 0 if there is none.
pub(super) fn last_id(db: &Connection) -> rusqlite::Result<u64> {
    let last = db.query_row("SELECT ifnull(max(id), 0) FROM activity", [], |r| {
        r.get::<_, i64>(0)
    })?;
    Ok(u64::try_from(last).unwrap_or(0))
}
