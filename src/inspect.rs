//! `lazurite inspect`: what is in an image's layers, and whether Lazurite would mount them lazily, and why not.
//!
//! Reads documents, and of each layer its first bytes and its table of contents. With `--verify` it reads everything
//! ([`verify`]). What was read is judged by pure functions ([`examine`]); the reason codes are those that the daemon
//! logs.

mod examine;
mod file;
mod report;
mod verify;

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use estargz::{Limits, TocJson};
use futures::{StreamExt, TryStreamExt, stream};
use registry::Registry;
use tokio::task::spawn_blocking;

use crate::cli::InspectArgs;
use crate::config::Config;
use crate::convert::media::{LayerKind, layer_kind};
use crate::convert::plan::Plan;
use crate::convert::priority::Priorities;
use crate::convert::{Wanted, pipe};
use crate::image::{self, Descriptor, Platform};
use crate::login;
use crate::toc::{self, Guess};
use crate::transport::{Blobs, Location, Means};
use examine::Named;
use report::{Image, Layer, Report};
use verify::{Contents, Expected, Findings};

/// Layers that are read at once.
const JOBS: usize = 4;

/// Bytes that tell what a blob is: a tar's magic number is at the end of its first header.
const HEAD: u64 = 512;

/// Inspects and prints. The exit code says whether `--verify` found something wrong.
///
/// # Errors
///
/// There is no such image or file, or it cannot be read.
pub async fn run(args: &InspectArgs, config: &Config) -> anyhow::Result<ExitCode> {
    let report = match location(&args.image)? {
        Some(location) => image(args, config, &location).await?,
        None => single(args, Path::new(&args.image)).await?,
    };
    let text = match args.json {
        true => serde_json::to_string_pretty(&report)? + "\n",
        false => report.to_string(),
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        // Who has read enough still wants to know by the exit status.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
        written => written?,
    }
    Ok(if report.sound() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Where the image is; `None` if the text names a file with one layer.
fn location(text: &str) -> anyhow::Result<Option<Location>> {
    let transport =
        ["docker:", "oci:", "oci-archive:", "containerd:"].iter().any(|name| text.starts_with(name));
    if transport {
        return text.parse().map(Some);
    }
    if text.starts_with(['/', '.']) || Path::new(text).is_file() {
        return Ok(None);
    }
    Ok(Some(Location::Registry(text.parse().context("it is no file either")?)))
}

async fn image(args: &InspectArgs, config: &Config, location: &Location) -> anyhow::Result<Report> {
    let (settings, _login) = login::settings(config, &args.registry, location.host())?;
    let registry = Registry::new(settings)?;
    let means =
        Means { registry: &registry, containerd: &args.containerd, deadline: config.fetch().read_deadline };
    let source = location.source(means).await?;
    let root = source.root().await?.with_context(|| format!("there is no image {location}"))?;
    let digest = root.digest.clone();
    let wanted = if args.all_platforms { Wanted::All } else { Wanted::named(&args.platform)? };
    let plan = Plan::read(&*source, root, &wanted, &Priorities::default()).await?;

    let mut images = Vec::new();
    for image in &plan.images {
        let diff_ids = image.contents.as_deref().map(image::diff_ids).transpose()?.unwrap_or_default();
        let blobs: &dyn Blobs = &*source;
        let layers = image.layers.iter().enumerate().map(|(n, (layer, _))| {
            let diff_id = diff_ids.get(n).cloned();
            async move {
                let named = match layer.named_toc_digest() {
                    Some(text) => Named::As(text.to_owned()),
                    None => Named::Not,
                };
                let inspected = inspect(args, blobs, layer, named, diff_id).await;
                inspected.with_context(|| format!("layer {}", layer.digest))
            }
        });
        images.push(Image {
            platform: image.platform.as_ref().map(Platform::to_string),
            digest: image.raw.digest.clone(),
            layers: stream::iter(layers).buffered(JOBS).try_collect().await?,
        });
    }
    Ok(Report { image: location.to_string(), digest: Some(digest), images })
}

/// A file with one layer.
async fn single(args: &InspectArgs, path: &Path) -> anyhow::Result<Report> {
    let (file, descriptor) = file::open(path).await?;
    let layer = inspect(args, &file, &descriptor, Named::Unknown, None).await?;
    let images = vec![Image { platform: None, digest: String::new(), layers: vec![layer] }];
    Ok(Report { image: args.image.clone(), digest: None, images })
}

async fn inspect(
    args: &InspectArgs,
    blobs: &dyn Blobs,
    layer: &Descriptor,
    named: Named,
    diff_id: Option<String>,
) -> anyhow::Result<Layer> {
    let kind = layer_kind(&layer.media_type);
    if kind != LayerKind::Tar && named != Named::Unknown {
        let mut other = Layer::other(layer, kind);
        if args.verify && kind == LayerKind::Other {
            let expected = Expected { blob: Some(layer.digest.parse()?), ..Expected::of(layer.size) };
            other.findings = Some(read_all(blobs, layer, expected).await?);
        }
        return Ok(other);
    }
    let limits = Limits::default();
    let head = blobs.range(layer, 0..layer.size.min(HEAD)).await?;
    let tail = blobs.range(layer, layer.size.saturating_sub(8)..layer.size).await?;
    let guess = if named == Named::Not { Guess::Plain } else { Guess::Lazy };
    let json: Result<TocJson, estargz::Error> = toc::read(blobs, layer, guess, &limits).await?;
    let format = examine::format(&head, &tail, json.as_ref().ok());
    let toc = json.and_then(|json| Ok((json.parse(&limits)?, json)));
    let lazy = examine::lazy(&named, toc.as_ref().map(|(_, json)| json).map_err(Clone::clone), &limits);

    let mut inspected = Layer::new(layer, format, &named, lazy);
    inspected.diff_id.clone_from(&diff_id);
    if let Ok((toc, json)) = &toc {
        inspected.contents = Some(examine::contents(layer.size, json, toc));
        if args.files {
            inspected.files = Some(examine::files(toc));
        }
    }
    if args.verify {
        let expected = Expected {
            blob: (named != Named::Unknown).then(|| layer.digest.parse()).transpose()?,
            size: layer.size,
            diff_id: diff_id.map(|text| text.parse()).transpose()?,
            toc: toc.ok().map(|(toc, _)| toc),
            contents: Contents::Tar,
        };
        let mut findings = read_all(blobs, layer, expected).await?;
        findings.problems.extend(inspected.lazy.broken(&named));
        inspected.findings = Some(findings);
    }
    Ok(inspected)
}

/// Reads a layer and checks it.
async fn read_all(blobs: &dyn Blobs, layer: &Descriptor, expected: Expected) -> anyhow::Result<Findings> {
    let stream = blobs.stream(layer).await?;
    let (feed, inlet) = pipe::inlet();
    let checking = spawn_blocking(move || verify::verify(inlet, &expected));
    let (checked, fed) = tokio::join!(checking, pipe::feed(feed, stream, |_| {}));
    match fed {
        // A registry's stream ends with this when the bytes are wrong; the findings say so too, and more.
        Err(error) if error.downcast_ref::<registry::Error>().is_some_and(wrong_bytes) => {
            let mut findings = Findings::default();
            findings.problems.push(error.to_string());
            Ok(findings)
        }
        Err(error) => Err(error),
        Ok(()) => Ok(checked.context("the check has panicked")??),
    }
}

fn wrong_bytes(error: &registry::Error) -> bool {
    matches!(error, registry::Error::DigestMismatch { .. })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_and_files_are_told_apart() {
        let place = |text: &str| location(text).unwrap().map(|location| location.to_string());
        assert_eq!(place("alpine"), Some("docker://docker.io/library/alpine:latest".to_owned()));
        assert_eq!(place("docker://r.example/a:1"), Some("docker://r.example/a:1".to_owned()));
        assert_eq!(place("oci:dir:1"), Some("oci:dir:1".to_owned()));
        assert_eq!(place("./layer.tar.gz"), None);
        assert_eq!(place("/tmp/layer"), None);
        assert!(location("No Image").is_err());
    }
}
