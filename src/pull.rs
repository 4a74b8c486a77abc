//! `lazurite pull`: pulls an image through containerd's API so that its layers can be lazy, with any containerd.
//!
//! containerd's own command line hands a snapshotter what it needs only in newer versions and when configured to. This
//! command does what containerd's pull does, in the same order and with the same labels: the image's documents go into
//! the content store ([`content`]), its layers become snapshots ([`unpack`]), and an image record makes it known, all
//! under one lease ([`session`]). How documents are read and which labels are due is decided in [`image`], purely.

mod content;
mod image;
mod login;
mod report;
mod session;
mod unpack;

use std::collections::HashMap;
use std::io::Write;
use std::time::Duration;

use anyhow::{Context, bail};
use containerd_client::services::v1::{CreateImageRequest, Image, UpdateImageRequest};
use containerd_client::types;
use prost_types::FieldMask;
use registry::{Reference, Registry};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;
use tonic::Code;

use crate::cli::PullArgs;
use crate::config::Config;
use crate::containerd::refused;
use crate::progress::Progress;
use content::ContentStore;
use image::{Document, ImageConfig, Manifest, Platform};
use login::Login;
use report::Report;
use session::Session;

/// An image config is read into memory; real ones are a few kilobytes. The same bound as for manifests.
const CONFIG_LIMIT: u64 = 4 << 20;

/// How deep indexes may nest.
const INDEX_DEPTH: usize = 4;

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
    let (settings, _login) = registry_config(&args, &reference, &config)?;
    let registry = Registry::new(settings)?;
    let progress = if args.json { Progress::Silent } else { Progress::detect() };
    let session =
        Session::open(&args.containerd.address, &args.containerd.namespace, &args.snapshotter).await?;

    let deadline = config.fetch().read_deadline;
    let pull = Pull { session: &session, registry: &registry, reference: &reference, platform, deadline };
    let result = tokio::select! {
        result = pull.run(&progress) => result,
        signal = interrupted() => Err(signal),
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

/// The registry client's settings with the command line's wishes for the image's registry.
fn registry_config(
    args: &PullArgs,
    reference: &Reference,
    config: &Config,
) -> anyhow::Result<(registry::Config, Option<Login>)> {
    let mut settings = config.registry();
    if args.plain_http {
        settings.hosts.entry(reference.host().to_owned()).or_default().insecure = true;
    }
    let login = args.user.as_deref().map(|user| Login::new(reference.host(), user)).transpose()?;
    if let Some(login) = &login {
        settings.docker_config = registry::DockerConfig::File(login.path());
    }
    Ok((settings, login))
}

/// Ends when the user or the system wants the command to stop.
async fn interrupted() -> anyhow::Error {
    let both = signal(SignalKind::interrupt()).and_then(|int| Ok((int, signal(SignalKind::terminate())?)));
    match both {
        Ok((mut int, mut term)) => {
            tokio::select! {
                _ = int.recv() => {}
                _ = term.recv() => {}
            }
            anyhow::anyhow!("interrupted; finished layers are kept until containerd collects them")
        }
        Err(error) => anyhow::Error::new(error).context("cannot listen for signals"),
    }
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
        let ImageConfig { platform, diff_ids } = ImageConfig::parse(&config, &manifest, &self.platform)?;
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
        self.record(&name, &target).await?;
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

    /// Makes the image known under `name`, in place of what had the name before.
    async fn record(&self, name: &str, target: &types::Descriptor) -> anyhow::Result<()> {
        let tried = || format!("cannot record image {name}");
        let image = Image { name: name.to_owned(), target: Some(target.clone()), ..Default::default() };
        let mut images = self.session.containerd().images();
        let create = CreateImageRequest { image: Some(image.clone()), ..Default::default() };
        match images.create(create).await {
            Err(status) if status.code() == Code::AlreadyExists => {
                let update_mask = Some(FieldMask { paths: vec!["target".to_owned()] });
                let update = UpdateImageRequest { image: Some(image), update_mask, ..Default::default() };
                images.update(update).await.map(drop).map_err(refused(tried()))
            }
            result => result.map(drop).map_err(refused(tried())),
        }
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.deadline
    }
}
