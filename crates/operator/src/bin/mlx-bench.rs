//! The `mlx-bench` program: see [`operator::bench`].

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use operator::bench::{self, Options};

fn main() -> ExitCode {
    let options = Options::parse();
    // One thread: the load generator shares the machine with what it measures.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return complain(&format!("cannot start: {error}"), bench::UNUSABLE),
    };
    let local = tokio::task::LocalSet::new();
    let report = match local.block_on(&runtime, bench::run(&options)) {
        Ok(report) => report,
        Err(error) => return complain(&error.to_string(), bench::UNUSABLE),
    };
    let json = report.to_json();
    if let Some(path) = &options.output
        && let Err(error) = std::fs::write(path, format!("{json}\n"))
    {
        return complain(
            &format!("cannot write {}: {error}", path.display()),
            bench::UNUSABLE,
        );
    }
    let text = if options.json {
        format!("{json}\n")
    } else {
        report.to_string()
    };
    // A reader that went away (`| head`) is no error.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    ExitCode::from(report.exit_code())
}

fn complain(message: &str, code: u8) -> ExitCode {
    let _ = writeln!(std::io::stderr().lock(), "mlx-bench: {message}");
    ExitCode::from(code)
}
