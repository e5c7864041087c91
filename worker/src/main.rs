//! The `mlxworker` program: see the library.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use knobs::{Command, ParsedArgs};
use mlxworker::engine::bench::{self, Wish};
use mlxworker::serve::{Failed, HubPlaces};
use tracing_subscriber::EnvFilter;

/// A command line that makes no sense.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(("bench", rest)) = args.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        return bench(rest);
    }
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

/// Log lines go to standard error.
fn log(level: &str) {
    let filter = EnvFilter::try_from_env("RUST_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        .init();
}

fn serve(args: ParsedArgs) -> ExitCode {
    if let Err(error) = mlxworker::serve::environment::apply(&args.knobs) {
        complain(&format!("cannot start again with MLX's variables set: {error}"));
        return ExitCode::FAILURE;
    }
    log(&args.knobs.log_level);
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

const BENCH_USAGE: &str = "mlxworker bench MODEL [--streams N] [--prompt-tokens N] [--tokens N] [--rounds N] \
                           [--path bare|engine] [--case STREAMS:PROMPT:TOKENS]... [flags of serve]";

/// `mlxworker bench`: prints one JSON object for each case; without `--case` one, of the other flags.
fn bench(args: &[String]) -> ExitCode {
    let mut wish = Wish {
        streams: 1,
        prompt_tokens: 256,
        tokens: 256,
        rounds: 3,
    };
    let mut through_engine = false;
    let mut cases = Vec::new();
    let mut rest = Vec::new();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut number = |place: &mut usize| match args.next().map(|value| value.parse()) {
            Some(Ok(value)) if value > 0 => {
                *place = value;
                true
            }
            _ => false,
        };
        let understood = match arg.as_str() {
            "--streams" => number(&mut wish.streams),
            "--prompt-tokens" => number(&mut wish.prompt_tokens),
            "--tokens" => number(&mut wish.tokens),
            "--rounds" => number(&mut wish.rounds),
            "--case" => match args.next().and_then(|case| parse_case(case)) {
                Some(case) => {
                    cases.push(case);
                    true
                }
                None => false,
            },
            "--path" => match args.next().map(String::as_str) {
                Some("bare") => true,
                Some("engine") => {
                    through_engine = true;
                    true
                }
                _ => false,
            },
            _ => {
                rest.push(arg.clone());
                true
            }
        };
        if !understood {
            complain(&format!("{arg}: not a value for it; usage: {BENCH_USAGE}"));
            return ExitCode::from(USAGE);
        }
    }
    let parsed = match knobs::parse_args(&rest) {
        Ok(parsed) => parsed,
        Err(error) => {
            complain(&format!("{error}; usage: {BENCH_USAGE}"));
            return ExitCode::from(USAGE);
        }
    };
    let wishes: Vec<Wish> = match cases.as_slice() {
        [] => vec![wish],
        cases => cases
            .iter()
            .map(|&[streams, prompt_tokens, tokens]| Wish {
                streams,
                prompt_tokens,
                tokens,
                rounds: wish.rounds,
            })
            .collect(),
    };
    match run_bench(parsed, &wishes, through_engine) {
        Ok(line) => print(&line),
        Err(error) => {
            complain(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// `STREAMS:PROMPT:TOKENS`, each at least 1.
fn parse_case(case: &str) -> Option<[usize; 3]> {
    let numbers: Vec<usize> = case
        .split(':')
        .map(|number| number.parse().ok().filter(|&number| number > 0))
        .collect::<Option<_>>()?;
    numbers.try_into().ok()
}

fn run_bench(mut args: ParsedArgs, wishes: &[Wish], through_engine: bool) -> anyhow::Result<String> {
    let streams = wishes.iter().map(|wish| wish.streams).max().unwrap_or(1);
    log(&args.knobs.log_level);
    args.knobs.max_num_seqs = args.knobs.max_num_seqs.max(streams as u64);
    let folder = mlxworker::serve::resolve_model(&args.model, &HubPlaces::from_environment())?;
    let config = mlxworker::serve::engine_config(&args.knobs, folder)?;
    let figures = if through_engine {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let mut all = Vec::new();
        for &wish in wishes {
            all.push(runtime.block_on(bench::engine(config.clone(), wish))?);
        }
        all
    } else {
        bench::bare(config, wishes)?
    };
    let mut lines = String::new();
    for figures in &figures {
        lines += &serde_json::to_string(figures)?;
        lines.push('\n');
    }
    Ok(lines)
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
