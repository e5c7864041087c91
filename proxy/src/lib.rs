//! swapd: one address in front of many model servers, which it starts, swaps and stops.
//!
//! | module      | what it is                                                                                    |
//! |-------------|-----------------------------------------------------------------------------------------------|
//! | `cli`       | command line; `check`, `serve`                                                                 |
//! | `serve`     | listener, signals, end                                                                         |
//! | `connection`| one client's connection: plain or TLS, HTTP/1.1 or HTTP/2                                      |
//! | `joined`    | pieces of a small reply written as one                                                         |
//! | `tls`       | certificates: the proxy's own, and which are trusted                                           |
//! | `http`      | routes, bodies, errors, forwarding                                                             |
//! | `jsonscan`  | finds `model` in a body without building a tree                                                |
//! | `select`    | a requested name to a model: profiles, selectors                                               |
//! | `catalog`   | the registry in force, names looked up                                                         |
//! | `residency` | the registry's groups and matrix as the lifecycle asks for them                                |
//! | `house`     | shell around the pure `lifecycle`: events in, effects out                                      |
//! | `wire`      | where a request in flight learns that it has to end                                            |
//! | `reload`    | a changed registry put in force as a difference                                                |
//! | `watched`   | the registry's files: what they hold, and when they have come to rest                          |
//! | `rewrite`   | filters: named keys of a body changed in place                                                 |
//! | `process`   | one child: spawn, hand-shake, orders, end; the supervisor of foreign commands                  |
//! | `peers`     | other servers: health, models, connections                                                     |
//! | `upstream`  | pooled connections to one server                                                               |
//! | `activity`  | requests in flight, the last finished ones, counters per model                                 |
//! | `ollama`    | Ollama's API in OpenAI's terms                                                                  |
//! | `performance` | how busy the machine is, for an hour                                                         |
//! | `clock`     | times of day as text                                                                          |
//! | `pressure`  | readings of the host's memory, for the lifecycle                                               |
//! | `usage`     | token counts from a reply on its way through                                                   |
//! | `logline`   | the form of the proxy's own log lines                                                          |
//! | `logs`      | bounded log rings and their live feed                                                          |
//! | `outlet`    | standard output behind a bounded queue                                                         |
//!
//! Everything runs on one thread: a request costs no hop between threads, and children are spawned from the main
//! thread, which Linux's parent-death signal needs.

pub mod activity;
pub mod catalog;
pub mod cli;
pub mod clock;
mod connection;
pub mod house;
pub mod http;
mod joined;
pub mod jsonscan;
pub mod logline;
pub mod logs;
pub mod ollama;
mod outlet;
pub mod peers;
pub mod performance;
pub mod pressure;
pub mod process;
pub mod reload;
pub mod residency;
pub mod rewrite;
pub mod select;
pub mod serve;
pub mod tls;
pub mod upstream;
pub mod usage;
pub mod watched;
mod wire;
