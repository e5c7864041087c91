//! The `mlxworker` program: see the library.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use anyhow::Context;
use knobs::{Command, ParsedArgs};
use mlxworker::backend::SamplingParams;
use mlxworker::engine::bench::{self, Wish};
use mlxworker::serve::{Failed, HubPlaces};
use tracing_subscriber::EnvFilter;

/// The whole program's, MLX included: a step's graph is some thousand small pieces of memory, taken by one thread and given back by
/// another, which glibc makes wait for each other (docs/adr/allocator.md).
#[cfg(all(target_os = "linux", feature = "mimalloc"))]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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
fn log(args: &ParsedArgs) {
    let level = &args.knobs.log_level;
    let variable = std::env::var("RUST_LOG").unwrap_or_default();
    let filter = if args.settings.get("log-level").is_some() || variable.trim().is_empty() {
        EnvFilter::new(level)
    } else {
        // On top of the level: what was set for another program (`RUST_LOG=swapd=debug`) silences nothing here.
        EnvFilter::new(format!("{level},{variable}"))
    };
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        .init();
}

/// A line for each knob that does nothing.
fn warn(args: &ParsedArgs) {
    for warning in &args.warnings {
        tracing::warn!("{warning}");
    }
}

fn serve(args: ParsedArgs) -> ExitCode {
    if let Err(error) = mlxworker::serve::environment::apply(&args.knobs) {
        complain(&format!("cannot start again with MLX's variables set: {error}"));
        return ExitCode::FAILURE;
    }
    log(&args);
    warn(&args);
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
        Err(Failed { code }) => code,
    };
    mlx_ext::exit_now(code)
}

const BENCH_USAGE: &str = "mlxworker bench MODEL [--streams N] [--prompt-tokens N] [--tokens N] [--warmup N] [--rounds N] \
                           [--seed N] [--sampling greedy|penalties|default] [--path bare|engine|constrained] \
                           [--case STREAMS:PROMPT:TOKENS]... [flags of serve]";

/// How `mlxworker bench` chooses tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Drawing {
    /// The likeliest, no penalties.
    Greedy,
    /// The likeliest, with the penalties of the knobs.
    Penalties,
    /// As for a request that says nothing: knobs, else the model's own.
    Default,
}

/// What `mlxworker bench` runs: see `engine::bench`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Path {
    Bare,
    Engine,
    Constrained,
}

/// A command line of `mlxworker bench`.
#[derive(Debug, PartialEq, Eq)]
struct BenchLine {
    wishes: Vec<Wish>,
    drawing: Drawing,
    path: Path,
    /// For the knobs.
    rest: Vec<String>,
}

impl BenchLine {
    /// # Errors
    /// The option whose value makes no sense.
    fn parse(args: &[String]) -> Result<Self, String> {
        let mut wish = Wish {
            streams: 1,
            prompt_tokens: 256,
            tokens: 256,
            warmup: 0,
            rounds: 3,
            seed: 0,
        };
        let mut line = Self {
            wishes: Vec::new(),
            drawing: Drawing::Greedy,
            path: Path::Bare,
            rest: Vec::new(),
        };
        let mut cases = Vec::new();
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().map(String::as_str);
            let at_least_one = |value: Option<&str>| value?.parse().ok().filter(|&number: &usize| number > 0);
            let understood = match arg.as_str() {
                "--streams" => set(&mut wish.streams, at_least_one(value())),
                "--prompt-tokens" => set(&mut wish.prompt_tokens, at_least_one(value())),
                "--tokens" => set(&mut wish.tokens, at_least_one(value())),
                "--rounds" => set(&mut wish.rounds, at_least_one(value())),
                "--warmup" => set(&mut wish.warmup, value().and_then(|value| value.parse().ok())),
                "--seed" => set(&mut wish.seed, value().and_then(|value| value.parse().ok())),
                "--case" => value().and_then(parse_case).map(|case| cases.push(case)),
                "--sampling" => set(
                    &mut line.drawing,
                    match value() {
                        Some("greedy") => Some(Drawing::Greedy),
                        Some("penalties") => Some(Drawing::Penalties),
                        Some("default") => Some(Drawing::Default),
                        _ => None,
                    },
                ),
                "--path" => set(
                    &mut line.path,
                    match value() {
                        Some("bare") => Some(Path::Bare),
                        Some("engine") => Some(Path::Engine),
                        Some("constrained") => Some(Path::Constrained),
                        _ => None,
                    },
                ),
                _ => {
                    line.rest.push(arg.clone());
                    Some(())
                }
            };
            understood.ok_or_else(|| format!("{arg}: not a value for it"))?;
        }
        if cases.is_empty() {
            cases.push([wish.streams, wish.prompt_tokens, wish.tokens]);
        }
        line.wishes = cases
            .into_iter()
            .map(|[streams, prompt_tokens, tokens]| Wish {
                streams,
                prompt_tokens,
                tokens,
                ..wish
            })
            .collect();
        Ok(line)
    }
}

/// `None` where there is no such value.
fn set<T>(place: &mut T, value: Option<T>) -> Option<()> {
    *place = value?;
    Some(())
}

/// `STREAMS:PROMPT:TOKENS`, each at least 1.
fn parse_case(case: &str) -> Option<[usize; 3]> {
    let numbers: Vec<usize> = case
        .split(':')
        .map(|number| number.parse().ok().filter(|&number| number > 0))
        .collect::<Option<_>>()?;
    numbers.try_into().ok()
}

/// `mlxworker bench`: prints one JSON object for each case; without `--case` one, of the other flags.
fn bench(args: &[String]) -> ExitCode {
    let parsed = BenchLine::parse(args).and_then(|line| {
        let knobs = knobs::parse_args(&line.rest).map_err(|error| error.to_string())?;
        Ok((line, knobs))
    });
    let (line, args) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => {
            complain(&format!("{error}; usage: {BENCH_USAGE}"));
            return ExitCode::from(USAGE);
        }
    };
    match run_bench(args, &line) {
        Ok(lines) => print(&lines),
        Err(error) => {
            complain(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run_bench(mut args: ParsedArgs, line: &BenchLine) -> anyhow::Result<String> {
    mlxworker::serve::environment::apply(&args.knobs).context("starting again with MLX's variables set")?;
    let streams = line.wishes.iter().map(|wish| wish.streams).max().unwrap_or(1);
    log(&args);
    warn(&args);
    args.knobs.max_num_seqs = args.knobs.max_num_seqs.max(streams as u64);
    let folder = mlxworker::serve::resolve_model(&args.model, &HubPlaces::from_environment())?;
    let usual = mlxworker::serve::default_sampling(&args.knobs, &folder)?;
    let sampling = match line.drawing {
        Drawing::Greedy => SamplingParams::greedy(),
        Drawing::Penalties => SamplingParams {
            presence_penalty: usual.presence_penalty,
            frequency_penalty: usual.frequency_penalty,
            repetition_penalty: usual.repetition_penalty,
            ..SamplingParams::greedy()
        },
        Drawing::Default => usual,
    };
    let config = mlxworker::serve::engine_config(&args.knobs, folder)?;
    let figures = if line.path == Path::Bare {
        bench::bare(config, &line.wishes, &sampling)?
    } else {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let mut all = Vec::new();
        let constrained = line.path == Path::Constrained;
        for &wish in &line.wishes {
            all.push(runtime.block_on(bench::engine(config.clone(), wish, &sampling, constrained))?);
        }
        all
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

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<BenchLine, String> {
        let args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        BenchLine::parse(&args)
    }

    #[test]
    fn lines_of_bench() {
        let line =
            parse("model --tokens 5 --warmup 0 --rounds 2 --seed 9 --sampling penalties --case 1:2:3 --path engine --case 4:5:6 --block-size 16")
                .unwrap();
        let cases: Vec<_> = line
            .wishes
            .iter()
            .map(|w| [w.streams, w.prompt_tokens, w.tokens, w.warmup, w.rounds])
            .collect();
        assert_eq!(cases, [[1, 2, 3, 0, 2], [4, 5, 6, 0, 2]]);
        assert!(line.path == Path::Engine && line.wishes.iter().all(|wish| wish.seed == 9));
        assert_eq!(line.drawing, Drawing::Penalties);
        assert_eq!(line.rest, ["model", "--block-size", "16"]);
        let line = parse("model --streams 3 --warmup 2").unwrap();
        assert_eq!(
            (line.wishes.len(), line.wishes[0].streams, line.wishes[0].warmup),
            (1, 3, 2)
        );
        assert_eq!((line.drawing, line.path), (Drawing::Greedy, Path::Bare));
        for wrong in [
            "--streams 0",
            "--warmup -1",
            "--case 1:2",
            "--sampling hot",
            "--path",
            "--rounds x",
        ] {
            let said = parse(&format!("model {wrong}")).unwrap_err();
            assert!(wrong.starts_with(said.split(':').next().unwrap()), "{said}");
        }
    }
}
