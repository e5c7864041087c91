//! `strftime_now(format)`: Python's `datetime.now().strftime(format)` with a clock that tests can set.

use std::sync::Arc;

use jiff::civil::DateTime;
use jiff::fmt::strtime::{BrokenDownTime, Config};
use minijinja::{Error, ErrorKind};

/// Tells the local date and time (without zone, as Python's naive `datetime.now()`).
pub type Clock = Arc<dyn Fn() -> DateTime + Send + Sync>;

/// The host's clock in its local time zone.
pub fn system_clock() -> Clock {
    Arc::new(|| jiff::Zoned::now().datetime())
}

/// Formats as C's `strftime` does for a naive time: the zone directives give nothing, unknown ones stay as they are.
pub(crate) fn strftime(now: DateTime, format: &str) -> Result<String, Error> {
    let mut naive = String::with_capacity(format.len());
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            naive.push(c);
            continue;
        }
        match chars.next() {
            Some('z' | 'Z') => {}
            Some(next) => naive.extend(['%', next]),
            None => naive.push_str("%%"),
        }
    }
    let time = BrokenDownTime::from(now);
    time.to_string_with_config(&Config::new().lenient(true), &naive)
        .map_err(|error| {
            Error::new(
                ErrorKind::InvalidOperation,
                format!("strftime_now({format:?}): {error}"),
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_as_libc_does() {
        let now = jiff::civil::date(2025, 3, 7).at(9, 5, 3, 0);
        for (format, text) in [
            ("%d %b %Y", "07 Mar 2025"),
            ("%Y-%m-%d", "2025-03-07"),
            ("%A, %-d. %B %y %H:%M:%S %p%%", "Friday, 7. March 25 09:05:03 AM%"),
            ("%j %e|%Z%z|", "066  7||"),
        ] {
            assert_eq!(strftime(now, format).unwrap(), text);
        }
    }
}
