//! What is to be done: the images that are wanted, and each distinct layer of them once.
//!
//! Reads the source's documents, no layers. Two layers are one task if they are the same blob and the same files of
//! it shall come first.

use std::collections::{HashMap, HashSet};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;

use super::media::{LayerKind, is_image_config, layer_kind};
use super::priority::{First, Priorities};
use super::select::{Wanted, select};
use crate::image::{Descriptor, Document, INDEX_DEPTH, ImageConfig, Manifest, Platform, choose};
use crate::transport::{Raw, Source};

/// Bytes of documents that are kept in memory. Real images have some kilobytes for each platform.
const MAX_DOCUMENTS: u64 = 64 << 20;

/// The images and layers of a conversion.
#[derive(Debug)]
pub struct Plan {
    /// Each manifest once.
    pub images: Vec<Image>,
    /// What the result's name will stand for.
    pub root: Node,
    /// Each distinct layer once, in the order of the images.
    pub tasks: Vec<Task>,
}

/// A document of the source and what it refers to.
#[derive(Debug)]
pub enum Node {
    /// An index of [`Plan::images`].
    Image(usize),
    /// An index, and those of its entries that are wanted by their digests.
    Index(Raw, Vec<(String, Node)>),
}

/// A manifest.
#[derive(Debug)]
pub struct Image {
    /// The document.
    pub raw: Raw,
    /// What it is for, if its config says so.
    pub platform: Option<Platform>,
    /// The config's descriptor.
    pub config: Descriptor,
    /// The config of a container image; `None` for anything else, which is copied as it is.
    pub contents: Option<Bytes>,
    /// Its layers from the bottom up, each with its index in [`Plan::tasks`].
    pub layers: Vec<(Descriptor, usize)>,
}

/// A layer to be dealt with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Its descriptor where it was met first.
    pub layer: Descriptor,
    /// The files that shall come first.
    pub first: Vec<First>,
    /// What is to be done with it.
    pub kind: LayerKind,
}

impl Plan {
    /// Reads the documents of the image that `root` is.
    ///
    /// # Errors
    ///
    /// A document cannot be read or is not valid, or a platform is not there.
    pub async fn read(
        source: &dyn Source,
        root: Raw,
        wanted: &Wanted,
        priorities: &Priorities,
    ) -> anyhow::Result<Self> {
        let mut reader =
            Reader { source, images: Vec::new(), nodes: HashMap::new(), known: HashSet::new(), read: 0 };
        let root = reader.root(root, wanted).await?;
        let Reader { images, known, .. } = reader;
        let mut plan = Self { images: Vec::new(), root, tasks: Vec::new() };
        for (image, manifest) in images {
            plan.add(image, manifest, priorities, &known);
        }
        Ok(plan)
    }

    fn add(
        &mut self,
        mut image: Image,
        manifest: Manifest,
        priorities: &Priorities,
        known: &HashSet<String>,
    ) {
        for (index, layer) in manifest.layers.into_iter().enumerate() {
            // A tar in something that is no container image is not a layer of one.
            let kind = match image.contents {
                Some(_) => layer_kind(&layer.media_type),
                None => LayerKind::Other,
            };
            let first = match kind {
                LayerKind::Tar => priorities.of(&image.raw.digest, index, known),
                _ => Vec::new(),
            };
            // One of two may lack the annotation that makes it lazy.
            let toc = |layer: &Descriptor| layer.named_toc_digest().map(str::to_owned);
            let same = |task: &Task| {
                (&task.layer.digest, &task.first, task.kind) == (&layer.digest, &first, kind)
                    && toc(&task.layer) == toc(&layer)
            };
            let task = self.tasks.iter().position(same).unwrap_or_else(|| {
                self.tasks.push(Task { layer: layer.clone(), first, kind });
                self.tasks.len() - 1
            });
            image.layers.push((layer, task));
        }
        self.images.push(image);
    }
}

struct Reader<'a> {
    source: &'a dyn Source,
    images: Vec<(Image, Manifest)>,
    /// Images by the digests of their manifests: an index may name one twice.
    nodes: HashMap<String, usize>,
    /// All manifests the source was seen to have.
    known: HashSet<String>,
    /// Bytes of documents read so far.
    read: u64,
}

impl Reader<'_> {
    /// A document that an index names.
    async fn document(&mut self, entry: &Descriptor) -> anyhow::Result<Raw> {
        let document = self.source.document(entry).await?;
        self.count(document.bytes.len())?;
        Ok(document)
    }

    fn count(&mut self, bytes: usize) -> anyhow::Result<()> {
        self.read += bytes as u64;
        ensure!(
            self.read <= MAX_DOCUMENTS,
            "the image has more than {MAX_DOCUMENTS} bytes of manifests and configs: choose with --platform"
        );
        Ok(())
    }

    async fn root(&mut self, raw: Raw, wanted: &Wanted) -> anyhow::Result<Node> {
        match wanted {
            Wanted::All => self.node(raw, 0).await,
            Wanted::Any => self.follow(raw, &Platform::host(), Strictness::Index).await,
            Wanted::These(platforms) => match (&platforms[..], Document::parse(&raw.media_type, &raw.bytes)?)
            {
                ([platform], _) | ([platform, ..], Document::Manifest(_)) => {
                    self.follow(raw, platform, Strictness::Image).await
                }
                (platforms, Document::Index(entries)) => {
                    let kept = select(&entries, platforms)?;
                    self.index(raw, entries, |entry| kept.contains(&entry.digest), 0).await
                }
                ([], _) => bail!("no platform is wanted"),
            },
        }
    }

    /// Goes to the image that serves one platform.
    async fn follow(
        &mut self,
        mut raw: Raw,
        platform: &Platform,
        mut strict: Strictness,
    ) -> anyhow::Result<Node> {
        for _ in 0..=INDEX_DEPTH {
            match Document::parse(&raw.media_type, &raw.bytes)? {
                Document::Index(entries) => {
                    self.known.extend(entries.iter().map(|entry| entry.digest.clone()));
                    // The index has said what the image is for.
                    strict = Strictness::Index;
                    raw = self.document(choose(&entries, platform)?).await?;
                }
                Document::Manifest(manifest) => {
                    let insist = (strict == Strictness::Image).then_some(platform);
                    return self.image(raw, manifest, insist).await;
                }
            }
        }
        bail!("more than {INDEX_DEPTH} indexes lead to one another")
    }

    /// Takes a document with everything it refers to.
    fn node(&mut self, raw: Raw, depth: usize) -> BoxFuture<'_, anyhow::Result<Node>> {
        async move {
            match Document::parse(&raw.media_type, &raw.bytes)? {
                Document::Manifest(manifest) => self.image(raw, manifest, None).await,
                Document::Index(entries) => self.index(raw, entries, |_| true, depth).await,
            }
        }
        .boxed()
    }

    async fn index(
        &mut self,
        raw: Raw,
        entries: Vec<Descriptor>,
        kept: impl Fn(&Descriptor) -> bool,
        depth: usize,
    ) -> anyhow::Result<Node> {
        if depth > INDEX_DEPTH {
            bail!("more than {INDEX_DEPTH} indexes lead to one another");
        }
        self.known.extend(entries.iter().map(|entry| entry.digest.clone()));
        let mut children = Vec::new();
        for entry in entries.iter().filter(|entry| kept(entry)) {
            let node = async {
                let document = self.document(entry).await?;
                self.node(document, depth + 1).await
            };
            let platform =
                entry.platform.as_ref().map_or_else(String::new, |platform| format!(" for {platform}"));
            let node = node.await.with_context(|| format!("manifest {}{platform}", entry.digest))?;
            children.push((entry.digest.clone(), node));
        }
        Ok(Node::Index(raw, children))
    }

    async fn image(
        &mut self,
        raw: Raw,
        manifest: Manifest,
        insist: Option<&Platform>,
    ) -> anyhow::Result<Node> {
        if let Some(known) = self.nodes.get(&raw.digest) {
            return Ok(Node::Image(*known));
        }
        self.known.insert(raw.digest.clone());
        let layered = manifest.layers.iter().any(|layer| layer_kind(&layer.media_type) != LayerKind::Other);
        let mut image = Image {
            platform: None,
            config: manifest.config.clone(),
            contents: None,
            layers: Vec::new(),
            raw,
        };
        if is_image_config(&manifest.config.media_type) && layered {
            let contents =
                self.source.small(&manifest.config).await.context("cannot read the image config")?;
            self.count(contents.len())?;
            let config = ImageConfig::parse(&contents, &manifest)?;
            if let Some(platform) = insist {
                config.check_platform(platform)?;
            }
            image.platform = Some(config.platform);
            image.contents = Some(contents);
        }
        let number = self.images.len();
        self.nodes.insert(image.raw.digest.clone(), number);
        self.images.push((image, manifest));
        Ok(Node::Image(number))
    }
}

/// Whether an image that no index leads to must be for the platform.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Strictness {
    /// It need not: only a choice is made by it.
    Index,
    /// It must.
    Image,
}

#[cfg(test)]
mod tests;
