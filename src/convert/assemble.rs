//! The documents of the result, from the plan and what became of its layers: a pure function.

use std::collections::{HashMap, HashSet};

use anyhow::Context;
use bytes::Bytes;

use super::media::Types;
use super::plan::{Node, Plan};
use super::rewrite::{self, Change, Target};
use crate::transport::Raw;

/// The documents of a converted image, in the order they are to be stored.
#[derive(Debug)]
pub struct Documents {
    /// Of each of [`Plan::images`], its manifest and, if it is a container image, its config.
    pub images: Vec<(Raw, Option<Bytes>)>,
    /// Indexes that others refer to, the innermost first.
    pub indexes: Vec<Raw>,
    /// What the name is to stand for: one of the above or an index around them.
    pub root: Raw,
}

/// Makes the documents. `changes` has an entry for each of [`Plan::tasks`].
///
/// # Errors
///
/// A document of the source is not valid.
pub fn documents(plan: &Plan, changes: &[Option<Change>], types: Types) -> anyhow::Result<Documents> {
    let mut images = Vec::new();
    for image in &plan.images {
        let made = match &image.contents {
            None => Ok((image.raw.clone(), None)),
            Some(contents) => {
                let changes: Vec<Option<Change>> =
                    image.layers.iter().map(|(_, task)| changes[*task].clone()).collect();
                rewrite::config(contents, &changes).and_then(|config| {
                    Ok((rewrite::manifest(&image.raw, types, &config, &changes)?, Some(config)))
                })
            }
        };
        images.push(made.with_context(|| format!("manifest {}", image.raw.digest))?);
    }
    let mut indexes = Vec::new();
    let root = node(&plan.root, &images, types, &mut indexes)?;
    // The root is stored by the name, after all others.
    indexes.retain(|index| index.digest != root.digest);
    Ok(Documents { images, indexes, root })
}

fn node(
    node_: &Node,
    images: &[(Raw, Option<Bytes>)],
    types: Types,
    indexes: &mut Vec<Raw>,
) -> anyhow::Result<Raw> {
    match node_ {
        Node::Image(number) => Ok(images[*number].0.clone()),
        Node::Index(raw, children) => {
            let mut converted = HashMap::new();
            for (digest, child) in children {
                let target = Target::of(&node(child, images, types, indexes)?);
                converted.insert(digest.clone(), target);
            }
            let kept: HashSet<String> = converted.keys().cloned().collect();
            let index = rewrite::index(raw, types, &converted, &kept)
                .with_context(|| format!("index {}", raw.digest))?;
            indexes.push(index.clone());
            Ok(index)
        }
    }
}
