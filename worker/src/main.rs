//! The `mlxworker` program: see the library.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use knobs::{Command, ParsedArgs};
use mlxworker::serve::Failed;
use tracing_subscriber::EnvFilter;

/// A command line that makes no sense.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match knobs::parse_command(&args) {
        Ok(Command::Help) => print(&knobs::help_text()),
        Ok(Command::Version) => print(&format!("mlxworker {}\n", env!("CARGO_PKG_VERSION"))),
        Ok(Command::Serve(args)) => serve(*args),
        Err(error) => {
            complain(&error.to_string());
            ExitCode::from(USAGE)
        }
    }
}

fn serve(args: ParsedArgs) -> ExitCode {
    if let Err(error) = mlxworker::serve::environment::apply(&args.knobs) {
        complain(&format!("cannot start again with MLX's variables set: {error}"));
        return ExitCode::FAILURE;
    }
    let filter =
        EnvFilter::try_from_env("RUST_LOG").unwrap_or_else(|_| EnvFilter::new(&args.knobs.log_level));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        .init();
    for warning in &args.warnings {
        tracing::warn!("{warning}");
    }
    die_with_parent();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&format!("cannot start threads: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(mlxworker::serve::run(args));
    // Not waited for: a thread that renders a long prompt for nobody any more.
    runtime.shutdown_background();
    let code = match result {
        Ok(ending) => {
            tracing::info!("ended: {ending:?}");
            0
        }
        Err(Failed) => 1,
    };
    mlx_ext::exit_now(code)
}

/// Under a proxy, on Linux: the kernel ends this process with the thread that started it. Elsewhere, and before this
/// call, the control socket's end of file does.
fn die_with_parent() {
    #[cfg(target_os = "linux")]
    if std::env::var_os(api_types::control::CONTROL_ENV).is_some()
        && let Err(error) = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
    {
        tracing::warn!("PR_SET_PDEATHSIG: {error}");
    }
}

fn print(text: &str) -> ExitCode {
    // A reader that went away (`| head`) is no error.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

fn complain(message: &str) {
    let _ = writeln!(std::io::stderr().lock(), "mlxworker: {message}");
}
