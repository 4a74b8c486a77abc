//! The lazurite binary: command line, configuration, logging, and the wiring of the libraries.
//!
//! Only this package knows TOML, argv, environment variables and signals. A command that fails prints one line with
//! the whole chain of causes and exits with 1; a command line that makes no sense exits with 2.

mod cache;
mod check;
mod cli;
mod config;
mod containerd;
mod convert;
mod daemon;
mod drain;
mod hosts;
mod image;
mod inspect;
mod login;
mod login_check;
mod progress;
mod pull;
mod serve;
mod signals;
mod status;
mod store_helper;
mod toc;
mod transport;
mod user;

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::{
    Layer as _, filter::Targets, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

use cli::{Cli, Command, ConfigCommand};
use config::{Config, Level, LogFormat, Notice};

fn main() -> ExitCode {
    match run(Cli::parse_from(arguments(std::env::args_os())).command) {
        Ok(code) => code,
        // The reader of our output is gone, as with `| head`: nothing is left to say.
        Err(error) if broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The name of a link to this program that registries.conf can name: it gives no arguments.
const HELPER: &str = "lazurite-store-helper";

/// The command line; under [`HELPER`]'s name it is that command's.
fn arguments(given: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = given.collect();
    let name = arguments.first().map(Path::new).and_then(Path::file_name);
    if name.is_some_and(|name| name == HELPER) {
        arguments.insert(1, "store-helper".into());
    }
    arguments
}

/// Begins the log of a daemon with what is to be said of its configuration; what becomes of one that runs.
fn begin(config: &Config, notices: Vec<Notice>, replace: bool) -> serve::Others {
    log(config.log.level, config.log.format);
    for notice in notices {
        tracing::warn!("{notice}");
    }
    if replace { serve::Others::Stop } else { serve::Others::Refuse }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    let mut out = std::io::stdout();
    match command {
        Command::Serve(args) => {
            let (mut config, notices) = Config::load(args.config.config.as_deref())?;
            args.apply(&mut config);
            serve::run(&config, begin(&config, notices, args.replace))?;
        }
        Command::Store(args) => {
            let (mut config, notices) = Config::load(args.config.config.as_deref())?;
            args.apply(&mut config);
            let others = begin(&config, notices, args.replace);
            serve::store(&config, &args.mountpoint, others)?;
        }
        Command::StoreHelper(args) => {
            let mut config = load(args.config.config.as_deref())?;
            args.config.apply(&mut config);
            log(Level::Warn, LogFormat::Text);
            runtime()?.block_on(store_helper::run(&config))?;
        }
        Command::Pull(args) => {
            let config = load(args.registry.config.as_deref())?;
            log(Level::Warn, LogFormat::Text);
            runtime()?.block_on(pull::run(args, config))?;
        }
        Command::Convert(args) => {
            let config = load(args.registry.config.as_deref())?;
            log(Level::Warn, LogFormat::Text);
            return runtime()?.block_on(convert::run(&args, &config));
        }
        Command::Inspect(args) => {
            let config = load(args.registry.config.as_deref())?;
            log(Level::Warn, LogFormat::Text);
            return runtime()?.block_on(inspect::run(&args, &config));
        }
        Command::LoginCheck(args) => {
            let config = load(args.registry.config.as_deref())?;
            log(Level::Error, LogFormat::Text);
            return runtime()?.block_on(login_check::run(&args, &config));
        }
        Command::Cache(command) => {
            let args = command.config();
            let mut config = load(args.config.as_deref())?;
            args.apply(&mut config);
            log(Level::Warn, LogFormat::Text);
            return runtime()?.block_on(cache::run(&command, &config));
        }
        Command::Check(args) => {
            let mut config = load(args.config.config.as_deref())?;
            args.config.apply(&mut config);
            return runtime()?.block_on(check::run(args, config));
        }
        Command::Config(ConfigCommand::Example) => {
            out.write_all(config::render(&Config::default()).as_bytes())?;
        }
        Command::Config(ConfigCommand::Reference) => out.write_all(config::render_reference().as_bytes())?,
        Command::Config(ConfigCommand::Print(args)) => {
            let mut config = load(args.config.as_deref())?;
            args.apply(&mut config);
            out.write_all(config::render(&config).as_bytes())?;
        }
        Command::Config(ConfigCommand::Check { file }) => {
            let (_, notices) = Config::load(Some(&file))?;
            for notice in &notices {
                writeln!(out, "{notice}")?;
            }
            writeln!(out, "{}: the daemon can start with it", file.display())?;
        }
        Command::Status(args) => {
            let mut config = load(args.config.config.as_deref())?;
            args.config.apply(&mut config);
            log(Level::Warn, LogFormat::Text);
            runtime()?.block_on(status::run(&args, &config))?;
        }
        Command::Drain(args) => {
            let mut config = load(args.config.config.as_deref())?;
            args.config.apply(&mut config);
            log(Level::Warn, LogFormat::Text);
            return runtime()?.block_on(drain::run(&args, &config));
        }
        Command::Keep { socket } => serve::keep(&socket)?,
        Command::Probe { mountpoint } => serve::probe(&mountpoint)?,
        Command::Version => writeln!(out, "lazurite {}", env!("CARGO_PKG_VERSION"))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The configuration for a command that prints to people, who see the notices at once.
fn load(named: Option<&std::path::Path>) -> anyhow::Result<Config> {
    let (config, notices) = Config::load(named)?;
    for notice in notices {
        writeln!(std::io::stderr(), "warning: {notice}")?;
    }
    Ok(config)
}

/// Sends log lines to standard error.
fn log(level: Level, format: LogFormat) {
    let level = match level {
        Level::Error => LevelFilter::ERROR,
        Level::Warn => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
        Level::Trace => LevelFilter::TRACE,
    };
    // The libraries below ours tell every frame of every connection; only their warnings are of use.
    let ours = ["lazurite", "snapshotter", "fusefs", "registry", "estargz"].map(|name| (name, level));
    let filter = Targets::new().with_default(level.min(LevelFilter::WARN)).with_targets(ours);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    tracing_subscriber::registry().with(lines.with_filter(filter)).init();
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Runtime::new().context("cannot start the async runtime")
}

fn broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
