//! The proxy's own log: `[INFO] message key=value`, with the time in front where the registry wants it.

use std::fmt;

use jiff::Zoned;
use jiff::fmt::strtime::BrokenDownTime;
use registry::{Globals, LogLevel, LogTo};
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::registry::LookupSpan;

use crate::logs::{Form, Logs};

/// Sets the level of the log while it runs.
pub struct Level(Box<dyn Fn(LogLevel) + Send + Sync>);

impl fmt::Debug for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Level")
    }
}

impl Level {
    /// From now on.
    pub fn set(&self, level: LogLevel) {
        (self.0)(level);
    }

    /// A log that has no level to set.
    #[must_use]
    pub fn fixed() -> Self {
        Self(Box::new(|_| {}))
    }
}

/// Starts the log.
#[must_use]
pub fn start(globals: &Globals, logs: &Logs) -> Level {
    let stdout = matches!(globals.log_to_stdout, LogTo::Proxy | LogTo::Both);
    logs.echo_models(matches!(globals.log_to_stdout, LogTo::Upstream | LogTo::Both));
    let writer = logs.writer(stdout);
    let time = globals.log_time_format.as_deref().and_then(pattern);
    logs.set_form(Form { stdout, time });
    let line = Line { time };
    let builder = tracing_subscriber::fmt()
        .with_ansi(false)
        .event_format(line)
        .with_writer(move || writer.clone())
        .with_env_filter(filter(globals.log_level))
        .with_filter_reloading();
    let handle = builder.reload_handle();
    // Without a subscriber of its own a test may have set one already; then this one is not needed.
    let _ = tracing::subscriber::set_global_default(builder.finish());
    Level(Box::new(move |level| {
        // It fails only when the log is gone.
        let _ = handle.reload(filter(level));
    }))
}

fn filter(level: LogLevel) -> EnvFilter {
    EnvFilter::new(match level {
        LogLevel::Debug => "debug",
        LogLevel::Info => "info",
        LogLevel::Warn => "warn",
        LogLevel::Error => "error",
    })
}

/// Go's named layouts in strftime's notation. An unknown name shows no time; the registry has warned of it.
fn pattern(name: &str) -> Option<&'static str> {
    Some(match name {
        "ansic" => "%a %b %e %H:%M:%S %Y",
        "unixdate" => "%a %b %e %H:%M:%S %Z %Y",
        "rubydate" => "%a %b %d %H:%M:%S %z %Y",
        "rfc822" => "%d %b %y %H:%M %Z",
        "rfc822z" => "%d %b %y %H:%M %z",
        "rfc850" => "%A, %d-%b-%y %H:%M:%S %Z",
        "rfc1123" => "%a, %d %b %Y %H:%M:%S %Z",
        "rfc1123z" => "%a, %d %b %Y %H:%M:%S %z",
        "rfc3339" => "%Y-%m-%dT%H:%M:%S%:z",
        "rfc3339nano" => "%Y-%m-%dT%H:%M:%S%.f%:z",
        "kitchen" => "%-I:%M%p",
        "stamp" => "%b %e %H:%M:%S",
        "stampmilli" => "%b %e %H:%M:%S.%3f",
        "stampmicro" => "%b %e %H:%M:%S.%6f",
        "stampnano" => "%b %e %H:%M:%S.%9f",
        _ => return None,
    })
}

/// The form of a line.
struct Line {
    time: Option<&'static str>,
}

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut to: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        if let Some(time) = self.time.and_then(now) {
            write!(to, "{time} ")?;
        }
        write!(to, "[{}] ", event.metadata().level())?;
        ctx.field_format().format_fields(to.by_ref(), event)?;
        writeln!(to)
    }
}

/// The local time.
pub(crate) fn now(pattern: &str) -> Option<String> {
    BrokenDownTime::from(&Zoned::now()).to_string(pattern).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_named_layout_has_a_form() {
        // Go writes its reference time so; the patterns do the same.
        let reference: Zoned = "2006-01-02T15:04:05.123456789[UTC]".parse().unwrap();
        let shown = |name: &str| {
            BrokenDownTime::from(&reference)
                .to_string(pattern(name).unwrap())
                .unwrap()
        };
        for (name, expected) in [
            ("ansic", "Mon Jan  2 15:04:05 2006"),
            ("unixdate", "Mon Jan  2 15:04:05 UTC 2006"),
            ("rubydate", "Mon Jan 02 15:04:05 +0000 2006"),
            ("rfc822", "02 Jan 06 15:04 UTC"),
            ("rfc822z", "02 Jan 06 15:04 +0000"),
            ("rfc850", "Monday, 02-Jan-06 15:04:05 UTC"),
            ("rfc1123", "Mon, 02 Jan 2006 15:04:05 UTC"),
            ("rfc1123z", "Mon, 02 Jan 2006 15:04:05 +0000"),
            ("rfc3339", "2006-01-02T15:04:05+00:00"),
            ("rfc3339nano", "2006-01-02T15:04:05.123456789+00:00"),
            ("kitchen", "3:04PM"),
            ("stamp", "Jan  2 15:04:05"),
            ("stampmilli", "Jan  2 15:04:05.123"),
            ("stampmicro", "Jan  2 15:04:05.123456"),
            ("stampnano", "Jan  2 15:04:05.123456789"),
        ] {
            assert_eq!(shown(name), expected, "{name}");
        }
        assert_eq!(pattern("none"), None);
    }
}
