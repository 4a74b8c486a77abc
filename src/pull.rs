//! `lazurite pull`: pulls an image through containerd's API so that its layers can be lazy, with any containerd.
//!
//! containerd's own command line hands a snapshotter what it needs only in newer versions and when configured to. This
//! command does what containerd's pull does, in the same order and with the same labels: the image's documents go into
//! the content store ([`content`]), its layers become snapshots ([`unpack`]), and an image record makes it known, all
//! under one lease ([`session`]). Which labels are due is decided in [`labels`], purely.

mod content;
mod labels;
mod report;
mod session;
mod unpack;

use std::collections::HashMap;
use std::io::Write;
use std::time::Duration;

use anyhow::{Context, bail};
use containerd_client::types;
use registry::{Reference, Registry};
use tokio::time::Instant;

use crate::cli::PullArgs;
use crate::config::Config;
use crate::containerd::images;
use crate::image::{self, Document, INDEX_DEPTH, ImageConfig, Manifest, Platform};
use crate::login;
use crate::progress::Progress;
use crate::signals;
use content::ContentStore;
use report::Report;
use session::Session;

/// An image config is read into memory; real ones are a few kilobytes. The same bound as for manifests.
const CONFIG_LIMIT: u64 = 4 << 20;

/// Pulls an image and prints what became of its layers.
///
/// # Errors
///
/// The image cannot be resolved, downloaded or unpacked, containerd refuses, or the user interrupts. Nothing but
/// finished layers is left behind.
pub async fn run(args: PullArgs, config: Config) -> anyhow::Result<()> {
    let started = Instant::now();
    let reference: Reference = args.reference.parse()?;
    let platform = args.platform.as_deref().map_or_else(|| Ok(Platform::host()), Platform::parse)?;
    let (settings, _login) = login::settings(&config, &args.registry, Some(reference.host()))?;
    let registry = Registry::new(settings)?;
    let progress = if args.json { Progress::Silent } else { Progress::detect() };
    let session =
        Session::open(&args.containerd.address, &args.containerd.namespace, &args.snapshotter).await?;

    let deadline = config.fetch().read_deadline;
    let pull = Pull { session: &session, registry: &registry, reference: &reference, platform, deadline };
    let result = tokio::select! {
        result = pull.run(&progress) => result,
        signal = signals::interrupted() => {
            signal.and(Err(anyhow::anyhow!("interrupted; finished layers are kept until containerd collects them")))
        }
    };
    progress.clear();
    let closed = session.close().await;
    let pulled = result?;
    closed?;

    let report = Report {
        reference: reference.to_string(),
        digest: pulled.target.digest,
        manifest_digest: pulled.manifest_digest,
        platform: pulled.platform.to_string(),
        namespace: args.containerd.namespace,
        snapshotter: args.snapshotter,
        seconds: started.elapsed().as_secs_f64(),
        layers: pulled.layers,
    };
    let mut out = std::io::stdout();
    match args.json {
        true => writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?,
        false => writeln!(out, "{report}")?,
    }
    Ok(())
}

struct Pull<'a> {
    session: &'a Session,
    registry: &'a Registry,
    reference: &'a Reference,
    platform: Platform,
    deadline: Duration,
}

/// What a pull brought.
struct Pulled {
    target: types::Descriptor,
    manifest_digest: String,
    platform: Platform,
    layers: Vec<report::Layer>,
}

/// What a reference was resolved to.
struct Resolved {
    /// What the image's name stands for.
    target: types::Descriptor,
    manifest_digest: String,
    manifest: Manifest,
}

impl Pull<'_> {
    async fn run(&self, progress: &Progress) -> anyhow::Result<Pulled> {
        let containerd = self.session.containerd();
        let store = ContentStore { containerd, reference: self.reference, deadline: self.deadline };

        let Resolved { target, manifest_digest, manifest } = self.resolve(&store).await?;
        manifest.layers.iter().try_for_each(content::check_unpackable)?;
        let config = self
            .registry
            .blob_bytes(self.reference, &manifest.config.digest, CONFIG_LIMIT, self.deadline())
            .await
            .context("cannot download the image config")?;
        let parsed = ImageConfig::parse(&config, &manifest)?;
        parsed.check_platform(&self.platform)?;
        let ImageConfig { platform, diff_ids } = parsed;
        store.put("config", &manifest.config.digest, &config, HashMap::new()).await?;

        let name = self.reference.to_string();
        let chain_ids = image::chain_ids(&diff_ids);
        let image = unpack::Image {
            reference: self.reference,
            name: &name,
            manifest_digest: &manifest_digest,
            layers: &manifest.layers,
            diff_ids: &diff_ids,
            chain_ids: &chain_ids,
        };
        let layers = unpack::unpack(self.session, &store, self.registry, &image, progress).await?;

        if let Some(top) = chain_ids.last() {
            let key = format!("containerd.io/gc.ref.snapshot.{}", self.session.snapshotter());
            store.label(&manifest.config.digest, HashMap::from([(key, top.clone())])).await?;
        }
        images::record(containerd, &name, target.clone()).await?;
        Ok(Pulled { target, manifest_digest, platform, layers })
    }

    /// Follows the reference to the platform's manifest and stores every document on the way.
    async fn resolve(&self, store: &ContentStore<'_>) -> anyhow::Result<Resolved> {
        let mut target = None;
        let mut next: Option<String> = None;
        for _ in 0..INDEX_DEPTH {
            let answer = self.registry.manifest(self.reference, next.as_deref(), self.deadline()).await?;
            let document = Document::parse(&answer.media_type, &answer.bytes)?;
            let kind = match document {
                Document::Index(_) => "index",
                Document::Manifest(_) => "manifest",
            };
            store.put(kind, &answer.digest, &answer.bytes, document.gc_labels()).await?;
            let target = target.get_or_insert_with(|| types::Descriptor {
                media_type: answer.media_type,
                digest: answer.digest.clone(),
                size: i64::try_from(answer.bytes.len()).unwrap_or(i64::MAX),
                annotations: HashMap::new(),
            });
            match document {
                Document::Index(manifests) => {
                    next = Some(image::choose(&manifests, &self.platform)?.digest.clone());
                }
                Document::Manifest(manifest) => {
                    return Ok(Resolved { target: target.clone(), manifest_digest: answer.digest, manifest });
                }
            }
        }
        bail!("{}: more than {INDEX_DEPTH} indexes lead to one another", self.reference)
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.deadline
    }
}
