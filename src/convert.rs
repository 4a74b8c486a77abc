//! `lazurite convert`: an image in, the same image with lazy layers out: eStargz or zstd:chunked.
//!
//! | module | owns |
//! |---|---|
//! | [`plan`], [`select`], [`media`] | which manifests and layers are wanted, and what can be done with them |
//! | [`priority`] | which files of a layer come first |
//! | [`earlier`], [`journal`] | what an earlier run has left at the destination |
//! | [`layer`], [`pipe`], [`encode`] | one layer: decided on, converted or copied, in memory |
//! | [`rewrite`], [`assemble`] | the documents of the result |
//! | [`estimate`], [`report`] | what is told before and after |
//!
//! The order at the destination is layers, configs, manifests, indexes, and the name last: a run that is interrupted
//! anywhere leaves blobs at most, and the name as it was.

mod assemble;
mod earlier;
mod encode;
mod estimate;
mod journal;
mod layer;
pub mod media;
pub mod pipe;
pub mod plan;
pub mod priority;
mod report;
mod rewrite;
mod select;

use std::cell::Cell;
use std::io::Write;
use std::num::NonZero;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};
use estargz::writer::{Dialect, Target};
use futures::{StreamExt, stream};
use registry::Registry;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::cli::ConvertArgs;
use crate::config::Config;
use crate::image::{Platform, short};
use crate::login::{self, Wishes};
use crate::progress::Progress;
use crate::transport::{Destination, Location, Means, Source, put_blob};
use crate::{image, signals};
use assemble::Documents;
use earlier::{Earlier, Shape};
use encode::Settings;
use estimate::{Estimate, Nowhere};
use journal::Journal;
use layer::{Again, Done, Fate, Stopped, Work, unless_stopped};
use media::Types;
use plan::Plan;
use priority::Priorities;
use report::Report;

pub use encode::DEFAULT_LEVEL;
pub use select::Wanted;

/// Layers are read, decompressed and hashed by one thread each, and compressed by all: more layers at once than this
/// only take memory.
const MAX_JOBS: usize = 4;

/// How long stopped work may take to cancel its uploads.
const CLEANUP: Duration = Duration::from_secs(15);

/// Converts an image and prints what became of it.
///
/// # Errors
///
/// The image cannot be read, converted or stored. The destination's name is then as it was.
pub async fn run(args: &ConvertArgs, config: &Config) -> anyhow::Result<ExitCode> {
    let stop = CancellationToken::new();
    let progress = if args.json { Progress::Silent } else { Progress::detect() };
    // Whether the name is being set: from then on nobody but the result can say what it stands for.
    let naming = Cell::new(false);
    let result = {
        let converting = convert(args, config, &progress, &stop, &naming);
        tokio::pin!(converting);
        tokio::select! {
            result = &mut converting => result.map(Ok),
            signal = signals::interrupted() => {
                stop.cancel();
                let ended = match tokio::time::timeout(CLEANUP, &mut converting).await {
                    Err(_) if naming.get() => Ok(converting.await),
                    ended => ended,
                };
                match ended {
                    // It was about to end.
                    Ok(Ok(outcome)) => Ok(Ok(outcome)),
                    Ok(Err(error)) if naming.get() => Err(error),
                    Ok(Err(_)) | Err(_) => signal.map(Err),
                }
            }
        }
    };
    progress.clear();
    let mut out = std::io::stdout();
    match result? {
        Ok(Outcome::Converted(report)) if args.json => {
            writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
        }
        Ok(Outcome::Converted(report)) => writeln!(out, "{report}")?,
        Ok(Outcome::Estimated(estimate)) if args.json => {
            writeln!(out, "{}", serde_json::to_string_pretty(&estimate)?)?;
        }
        Ok(Outcome::Estimated(estimate)) => writeln!(out, "{estimate}")?,
        Err(status) => {
            let destination = &args.destination;
            // Whoever reads it may have been interrupted first; the exit status is what counts.
            let _ = writeln!(
                std::io::stderr(),
                "interrupted; {destination} is as it was, run the command again to go on"
            );
            return Ok(ExitCode::from(status));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What the command prints.
enum Outcome {
    Converted(Report),
    Estimated(Estimate),
}

async fn convert(
    args: &ConvertArgs,
    config: &Config,
    progress: &Progress,
    stop: &CancellationToken,
    naming: &Cell<bool>,
) -> anyhow::Result<Outcome> {
    let started = Instant::now();
    let (from, to) = (&args.source, &args.destination);
    let wanted = if args.all_platforms { Wanted::All } else { Wanted::named(&args.platform)? };
    let priorities = priorities(args)?;
    let settings = settings(args);
    settings.check()?;
    check_format(args)?;

    let (at_source, at_destination) = wishes(args)?;
    let (registry_settings, _login) = login::settings(config, at_source, from.host())?;
    let registry = Registry::new(registry_settings)?;
    let (registry_settings, _login) = login::settings(config, at_destination, to.host())?;
    let other_registry = Registry::new(registry_settings)?;
    let deadline = config.fetch().read_deadline;
    let means = |registry| Means { registry, containerd: &args.containerd, deadline };

    let source = from.source(means(&registry)).await?;
    let means = means(&other_registry);
    let again = if args.force { Again::Always } else { Again::Never };
    let journal = Journal::of(to);
    let reading = async {
        let plan = read_plan(&*source, from, &wanted, &priorities).await?;
        let earlier = match again {
            Again::Always => Earlier::new(),
            Again::Never => {
                let mut earlier = journal.read();
                earlier.extend(find_earlier(to, means).await);
                earlier
            }
        };
        Ok((plan, earlier))
    };
    let (plan, earlier) = unless_stopped(stop, reading).await?;

    let destination: Box<dyn Destination> = match (args.dry_run, to) {
        // An archive is written from its beginning, whatever there was before.
        (true, Location::Archive(..)) => Box::new(Nowhere::new(None)),
        (true, _) => Box::new(Nowhere::new(to.source(means).await.ok())),
        (false, _) => to.destination(means).await?,
    };
    let work = Work {
        source: &*source,
        from,
        destination: &*destination,
        earlier: &earlier,
        settings: &settings,
        again,
        stop,
    };
    let result = async {
        if args.dry_run {
            return Ok(Outcome::Estimated(Estimate::of(&plan, &work, jobs(args)).await?));
        }
        let done = layers(&plan, &work, jobs(args), &journal, progress).await?;
        let types = if args.no_oci { Types::Source } else { Types::Oci };
        let changes: Vec<_> = done.iter().map(|done| done.change.clone()).collect();
        let documents = assemble::documents(&plan, &changes, types)?;
        publish(&plan, &documents, &work, naming).await?;
        journal.remove();
        anyhow::Ok(Outcome::Converted(report(args, &plan, &done, &documents, started)?))
    };
    let result = result.await;
    if let Err(error) = destination.close().await {
        tracing::warn!("{error:#}");
    }
    result
}

/// Checks that the format can be what is asked of it.
fn check_format(args: &ConvertArgs) -> anyhow::Result<()> {
    let target = args.target();
    ensure!(
        args.dialect.is_none() || target != Target::EStargz,
        "--dialect is one of zstd:chunked: say --format zstd:chunked too"
    );
    ensure!(
        !args.no_oci || target == Target::EStargz,
        "docker's manifests have no layers in zstd: say --format zstd:chunked without --no-oci"
    );
    ensure!(
        target != Target::ZstdChunked(Dialect::Podman)
            || (args.record_in.is_none() && args.prefetch_list.is_none()),
        "podman's dialect of zstd:chunked cannot say which files come first: say --dialect stargz, or --format estargz"
    );
    Ok(())
}

/// What is said of the registries at both ends. A login for one of them is no business of the other.
fn wishes<'a>(args: &'a ConvertArgs) -> anyhow::Result<(Wishes<'a>, Wishes<'a>)> {
    let general = Wishes::from(&args.registry);
    if let (Some(from), Some(to)) = (args.source.host(), args.destination.host())
        && from != to
    {
        ensure!(
            general.user.is_none(),
            "--user says not whether it is for {from} or {to}: say --src-user or --dst-user"
        );
        ensure!(
            !general.plain_http,
            "--plain-http says not whether it is for {from} or {to}: say --src-plain-http or --dst-plain-http"
        );
    }
    let at = |user: Option<&'a str>, plain_http| Wishes {
        user: user.or(general.user),
        plain_http: plain_http || general.plain_http,
    };
    Ok((at(args.src_user.as_deref(), args.src_plain_http), at(args.dst_user.as_deref(), args.dst_plain_http)))
}

/// Reads the documents of the image at `from`.
async fn read_plan(
    source: &dyn Source,
    from: &Location,
    wanted: &Wanted,
    priorities: &Priorities,
) -> anyhow::Result<Plan> {
    let root = source.root().await?.with_context(|| format!("there is no image {from}"))?;
    Plan::read(source, root, wanted, priorities).await
}

fn priorities(args: &ConvertArgs) -> anyhow::Result<Priorities> {
    let mut priorities = Priorities::default();
    if let Some(file) = &args.record_in {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        priorities.record(&text).with_context(|| file.display().to_string())?;
    }
    if let Some(file) = &args.prefetch_list {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        priorities.list(&text);
    }
    Ok(priorities)
}

fn settings(args: &ConvertArgs) -> Settings {
    Settings {
        shape: Shape {
            target: args.target(),
            chunk_size: args.chunk_size,
            min_chunk_size: args.min_chunk_size,
            level: args.level,
        },
        threads: processors(),
        tmpdir: args.tmpdir.clone().unwrap_or_else(std::env::temp_dir),
    }
}

fn processors() -> NonZero<usize> {
    std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN)
}

fn jobs(args: &ConvertArgs) -> usize {
    args.jobs.map_or(processors().get().min(MAX_JOBS), NonZero::get)
}

/// What an earlier run has left at the destination. That there is no such place yet is as good as nothing.
async fn find_earlier(to: &Location, means: Means<'_>) -> Earlier {
    match to.source(means).await {
        Ok(source) => earlier::read(&*source).await,
        Err(error) => {
            tracing::debug!(%error, "nothing is at the destination yet");
            Earlier::new()
        }
    }
}

/// Deals with each distinct layer, several at a time. After the first failure the others stop, and cancel what they
/// have begun.
async fn layers(
    plan: &Plan,
    work: &Work<'_>,
    jobs: usize,
    journal: &Journal,
    progress: &Progress,
) -> anyhow::Result<Vec<Done>> {
    let total = progress.total(plan.tasks.iter().map(|task| task.layer.size).sum());
    let bars: Vec<_> = plan
        .tasks
        .iter()
        .map(|task| progress.part(&total, &short(&task.layer.digest), task.layer.size))
        .collect();
    let running = plan.tasks.iter().zip(&bars).enumerate().map(|(number, (task, bar))| async move {
        let dealing = async {
            bar.doing("looking");
            let fate = work.fate(task).await?;
            work.perform(task, fate, bar).await
        };
        let result = dealing.await.with_context(|| format!("layer {}", task.layer.digest));
        match &result {
            Ok(done) => {
                if let Done { fate: Fate::Convert, change: Some(change), .. } = done {
                    journal.note(change);
                }
                let target = work.settings.shape.target;
                bar.done(&report::Layer::new(&task.layer, None, target, done).to_string());
            }
            Err(_) => work.stop.cancel(),
        }
        (number, result)
    });
    let mut results: Vec<(usize, anyhow::Result<Done>)> =
        stream::iter(running).buffer_unordered(jobs).collect().await;
    results.sort_by_key(|(number, _)| *number);
    let mut first = None;
    let mut all = Vec::new();
    for (_, result) in results {
        match result {
            Ok(done) => all.push(done),
            // Those that were stopped are not the cause.
            Err(error) if first.is_none() || first.as_ref().is_some_and(is_stopped) => first = Some(error),
            Err(_) => {}
        }
    }
    first.map_or(Ok(all), Err)
}

fn is_stopped(error: &anyhow::Error) -> bool {
    error.is::<Stopped>()
}

/// Stores configs and documents, the image's name last.
async fn publish(
    plan: &Plan,
    documents: &Documents,
    work: &Work<'_>,
    naming: &Cell<bool>,
) -> anyhow::Result<()> {
    let silent = Progress::Silent.layer("", 0);
    for (image, (_, config)) in plan.images.iter().zip(&documents.images) {
        let stored = match config {
            None => work.transfer(&image.config, &silent).await.map(drop),
            Some(config) => put_blob(work.destination, config.clone()).await,
        };
        stored.context("cannot store the image config")?;
    }
    let storing = async {
        let manifests = documents.images.iter().map(|(manifest, _)| manifest).chain(&documents.indexes);
        for document in manifests.filter(|document| document.digest != documents.root.digest) {
            let stored = work.destination.put(document).await;
            stored.with_context(|| format!("cannot store manifest {}", document.digest))?;
        }
        Ok(())
    };
    unless_stopped(work.stop, storing).await?;
    // Not interrupted any more: nobody could say then what the name stands for.
    naming.set(true);
    work.destination.publish(&documents.root).await.context("cannot give the image its name")
}

fn report(
    args: &ConvertArgs,
    plan: &Plan,
    done: &[Done],
    documents: &Documents,
    started: Instant,
) -> anyhow::Result<Report> {
    let mut images = Vec::new();
    for (image, (manifest, config)) in plan.images.iter().zip(&documents.images) {
        let (config_digest, diff_ids) = match config {
            None => (image.config.digest.clone(), Vec::new()),
            Some(config) => (estargz::Digest::of(config).to_string(), image::diff_ids(config)?),
        };
        let layers = image.layers.iter().enumerate();
        images.push(report::Image {
            platform: image.platform.as_ref().map(Platform::to_string),
            digest: manifest.digest.clone(),
            source_digest: image.raw.digest.clone(),
            config_digest,
            layers: layers
                .map(|(n, (layer, task))| {
                    report::Layer::new(
                        layer,
                        diff_ids.get(n).map(String::as_str),
                        args.target(),
                        &done[*task],
                    )
                })
                .collect(),
        });
    }
    Ok(Report {
        source: args.source.to_string(),
        destination: args.destination.to_string(),
        digest: documents.root.digest.clone(),
        media_type: documents.root.media_type.clone(),
        format: report::name(args.target()),
        images,
        not_found: not_found(plan, done),
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// The paths and globs that match nothing in any layer, as far as is known: what an earlier run has not found it has
/// told then. A layer that stays as it is has none of them.
fn not_found(plan: &Plan, done: &[Done]) -> Vec<String> {
    let found = |done: &Done, first: &String| match done.fate {
        Fate::Convert => !done.missing.contains(first),
        Fate::Earlier(_) => true,
        _ => false,
    };
    let mut all: Vec<String> = Vec::new();
    for first in plan.tasks.iter().flat_map(|task| &task.first).map(ToString::to_string) {
        let somewhere =
            plan.tasks.iter().zip(done).any(|(task, done)| {
                task.first.iter().any(|own| own.to_string() == first) && found(done, &first)
            });
        if !somewhere && !all.contains(&first) {
            all.push(first);
        }
    }
    all
}
