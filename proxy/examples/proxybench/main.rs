//! What the proxy costs: rounds of direct and proxied requests, interleaved, against a model server that costs next to
//! nothing, with a bare relay of bytes beside them: what any proxy in a process of its own costs on this machine.
//!
//! `make bench-proxy`, or `proxybench [--rounds N] [--json FILE]`. `proxybench load WHAT PORT CLIENTS TIMES` only makes the
//! load, for a profiler to look at a server that is already there.
//!
//! Latency and throughput are of the best round of each way, medians in the note: on a machine that does other work too,
//! the best round is the one that was disturbed least. Client, server and proxy have one thread each.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    clippy::print_stdout,
    unreachable_pub
)]

mod report;
mod roles;
mod system;
mod wire;

use std::path::Path;
use std::time::Duration;

use api_types::control::CONTROL_ENV;
use report::{Report, percentile};
use system::{Swapd, cpu, free_ports, growth_mb, me, relay, rss_mb};
use wire::{Client, request, stream, streams, throughput};

/// Streams and events of the measurement with a pace.
const PACED: (u64, u64) = (20, 1000);

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["upstream", port] => return roles::upstream(port.parse().unwrap()),
        ["relay", port, to] => return roles::relay(port.parse().unwrap(), to.parse().unwrap()),
        ["load", what, port, clients, times] => {
            return roles::load(
                what,
                port.parse().unwrap(),
                clients.parse().unwrap(),
                times.parse().unwrap(),
            );
        }
        // As a worker of swapd's own kind.
        ["serve", ..] if std::env::var_os(CONTROL_ENV).is_some() => return roles::upstream(0),
        _ => {}
    }
    let option = |name: &str| words.iter().position(|w| *w == name).map(|i| words[i + 1]);
    let rounds: usize = option("--rounds").map_or(7, |n| n.parse().unwrap());
    let dir = std::env::temp_dir().join(format!("proxybench-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let report = measure(&dir, rounds);
    if let Some(file) = option("--json") {
        std::fs::write(file, report.to_json()).unwrap();
    }
    let _ = std::fs::remove_dir_all(dir);
}

fn measure(dir: &Path, rounds: usize) -> Report {
    let mut report = Report::default();
    let [direct, late, bare] = free_ports();
    let config = dir.join("config.yaml");
    let start = roles::START_ENV;
    // Ports of our own: the server is asked directly too.
    let foreign = |port| {
        format!(
            "cmd: '{} upstream {port}', proxy: 'http://127.0.0.1:{port}'",
            me().display()
        )
    };
    let text = format!(
        "
models:
  m: {{{}}}
  foreign: {{{}, env: [{start}=130]}}
  native: {{worker: {{model: {}, env: [{start}=130]}}}}
groups: {{all: {{swap: false, members: [m, foreign, native]}}}}
",
        foreign(direct),
        foreign(late),
        dir.display()
    );
    std::fs::write(&config, text).unwrap();

    let mut starts: Vec<f64> = (0..5)
        .map(|_| Swapd::start(&config).start.as_secs_f64() * 1e3)
        .collect();
    let best = percentile(&mut starts, 0.0);
    let note = format!("median {:.1}", percentile(&mut starts, 0.5));
    report.at_most("start to accepting", best, "ms", 20.0, &note);

    let mut swapd = Swapd::start(&config);
    let (pid, port) = (swapd.pid, swapd.port);
    std::thread::sleep(Duration::from_millis(300));
    report.at_most("memory idle", rss_mb(pid), "MB", 10.0, "");
    let small = request("m", "");
    Client::new(port).ask(&small, false);
    let mut client = Client::new(port);
    (0..5000).for_each(|_| drop(client.ask(&small, false)));
    report.at_most("memory after 5,000 requests", rss_mb(pid), "MB", 20.0, "");
    drop(client);
    let bare_relay = relay(bare, direct);

    ready_to_use(&mut report, port);
    latency(&mut report, [direct, bare, port], rounds);
    cpu_of_requests(&mut report, pid, bare_relay.0.id(), [bare, port]);
    first_byte(&mut report, [direct, bare, port], rounds);
    cpu_of_events(&mut report, pid, bare_relay.0.id(), [bare, port]);

    let lost = streams(port, 512, 200, 100, 10_000);
    let note = "200 events each, summed up";
    report.at_most("512 streams: changed or lost", lost as f64, "", 0.0, note);

    for clients in [8, 64] {
        ratio(&mut report, [direct, bare, port], clients, rounds);
    }
    let long = stream("m", 1, 40_000, 950, 0);
    let grown = growth_mb(pid, || drop(Client::new(port).ask(&long, false)));
    report.at_most("growth for a 40 MB stream", grown, "MB", 2.0, "");
    let big = request("m", &format!(r#","x":"{}""#, "y".repeat(20_000_000)));
    let grown = growth_mb(pid, || drop(Client::new(port).ask(&big, false)));
    report.at_most(
        "growth for a 20 MB body",
        grown / 20.0,
        "x",
        1.2,
        "times the body",
    );
    assert!(swapd.is_running());
    report
}

/// From the moment at which a worker is ready to the arrival of the request that waited for it.
fn ready_to_use(report: &mut Report, port: u16) {
    for (model, limit) in [("native", 5.0), ("foreign", 50.0)] {
        let mut times: Vec<f64> = (0..10)
            .map(|_| {
                let reply = Client::new(port).ask(&request(model, ",\"since_ready\":1"), false);
                let us: f64 = String::from_utf8(reply.body).unwrap().parse().unwrap();
                let unload = format!(
                    "POST /api/models/unload/{model} HTTP/1.1\r\nHost: bench\r\nContent-Length: 0\r\n\r\n"
                );
                Client::new(port).ask(unload.as_bytes(), false);
                us / 1e3
            })
            .collect();
        let (median, worst) = (percentile(&mut times, 0.5), percentile(&mut times, 1.0));
        let name = format!("ready to its first request, {model}");
        let note = format!("of 10; worst {worst:.1}");
        report.at_most(&name, median, "ms", limit, &note);
    }
}

/// Rounds of all three ways in turn; per way and round the time below which `share` of its requests stay.
fn rounds_of(
    ports: [u16; 3],
    rounds: usize,
    each: usize,
    share: f64,
    ask: impl Fn(&mut Client) -> Duration,
) -> [Vec<f64>; 3] {
    let mut clients = ports.map(Client::new);
    let mut found = [vec![], vec![], vec![]];
    for client in &mut clients {
        (0..each / 4).for_each(|_| _ = ask(client));
    }
    for _ in 0..rounds {
        let mut times = [vec![], vec![], vec![]];
        // Switched often, so that a disturbance hits all three.
        for _ in 0..10 {
            for (client, times) in clients.iter_mut().zip(&mut times) {
                times.extend((0..each / 10).map(|_| ask(client).as_secs_f64() * 1e6));
            }
        }
        for (found, mut times) in found.iter_mut().zip(times) {
            found.push(percentile(&mut times, share));
        }
    }
    found
}

/// What is added to the direct way: best round beside best round, median beside median.
fn added_row(report: &mut Report, name: &str, mut found: [Vec<f64>; 3], limit: f64) {
    let [best, median] = [0.0, 0.5].map(|p| found.each_mut().map(|times| percentile(times, p)));
    let note = format!(
        "median {:.0}; direct {:.0} (median {:.0}); bare relay adds {:.0} (median {:.0})",
        median[2] - median[0],
        best[0],
        median[0],
        best[1] - best[0],
        median[1] - median[0],
    );
    report.at_most(name, best[2] - best[0], "us", limit, &note);
}

fn latency(report: &mut Report, ports: [u16; 3], rounds: usize) {
    let small = request("m", "");
    for (name, share, limit) in [("p50", 0.5, 60.0), ("p99", 0.99, 150.0)] {
        let found = rounds_of(ports, rounds, 1000, share, |client| client.time(&small).1);
        added_row(
            report,
            &format!("added latency, one at a time, {name}"),
            found,
            limit,
        );
    }
}

fn first_byte(report: &mut Report, ports: [u16; 3], rounds: usize) {
    let events = stream("m", 1, 20, 20, 0);
    let found = rounds_of(ports, rounds, 500, 0.99, |client| client.time(&events).0);
    added_row(report, "added time to first byte of a stream, p99", found, 300.0);
}

/// CPU time of `pid` while `work` runs, in microseconds.
fn spent(pid: u32, work: impl FnOnce()) -> f64 {
    let before = cpu(pid);
    work();
    (cpu(pid) - before).as_secs_f64() * 1e6
}

fn cpu_of_requests(report: &mut Report, swapd: u32, relay: u32, [bare, port]: [u16; 2]) {
    let small = request("m", "");
    let one = |pid, port| {
        let mut client = Client::new(port);
        spent(pid, || (0..10_000).for_each(|_| drop(client.ask(&small, false)))) / 1e6
    };
    let note = format!("one at a time; bare relay {:.2}", one(relay, bare));
    report.at_most("CPU per 10,000 small requests", one(swapd, port), "s", 1.0, &note);
    let many = |pid, port| {
        let mut n = 0.0;
        let us = spent(pid, || {
            n = throughput(port, &small, 64, Duration::from_secs(2)) * 2.0
        });
        us / n / 100.0
    };
    let note = format!("64 at a time; bare relay {:.2}", many(relay, bare));
    report.at_most(
        "CPU per 10,000 small requests",
        many(swapd, port),
        "s",
        1.0,
        &note,
    );
}

/// A lone event costs a read and a write, whoever passes it on: what they cost on this machine is what the bare relay
/// spends, and what swapd adds to it is a row of its own.
fn cpu_of_events(report: &mut Report, swapd: u32, relay: u32, [bare, port]: [u16; 2]) {
    let all = (PACED.0 * PACED.1) as f64;
    let paced = |pid, port| {
        spent(pid, || {
            assert_eq!(streams(port, PACED.0, PACED.1, 60, 1000), 0);
        }) / all
    };
    let burst = |pid, port| {
        let fast = stream("m", 1, 200_000, 60, 0);
        spent(pid, || drop(Client::new(port).ask(&fast, false))) / 200_000.0
    };
    let pace = "20 streams of 1,000/s, an event a packet";
    let ways: [(_, _, &dyn Fn(u32, u16) -> f64); 2] = [
        ("one by one", pace, &paced),
        ("burst", "as fast as they come", &burst),
    ];
    for (way, what, measure) in ways {
        let mut times = [vec![], vec![]];
        for _ in 0..3 {
            times[0].push(measure(relay, bare));
            times[1].push(measure(swapd, port));
        }
        let [relayed, whole] = times.map(|mut t| percentile(&mut t, 0.0));
        let name = format!("CPU per forwarded event, {way}");
        let note = format!("{what}; bare relay {relayed:.2}");
        report.at_most(&name, whole, "us", 2.0, &note);
        let name = format!("of it beyond a bare relay, {way}");
        let note = "what swapd adds to a read and a write; both the best of 3";
        report.at_most(&name, whole - relayed, "us", 2.0, note);
    }
}

fn ratio(report: &mut Report, ports: [u16; 3], clients: usize, rounds: usize) {
    let small = request("m", "");
    let mut rates = [vec![], vec![], vec![]];
    for _ in 0..rounds {
        for (port, rates) in ports.iter().zip(&mut rates) {
            rates.push(throughput(*port, &small, clients, Duration::from_millis(700)));
        }
    }
    let [best, median] = [1.0, 0.5].map(|p| rates.each_mut().map(|rates| percentile(rates, p)));
    let of_direct = |rate: f64, direct: f64| rate / direct * 100.0;
    let note = format!(
        "median {:.0}; {:.0}/s, direct {:.0}/s; bare relay {:.0} (median {:.0})",
        of_direct(median[2], median[0]),
        best[2],
        best[0],
        of_direct(best[1], best[0]),
        of_direct(median[1], median[0]),
    );
    let best = of_direct(best[2], best[0]);
    let name = format!("throughput at {clients}, of direct");
    report.row(&name, best, "%", ">= 40", best >= 40.0, &note);
}
