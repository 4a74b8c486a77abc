//! What images' manifests say of the layers that are attached.
//!
//! Owns: when a manifest is asked for, and what is begun on its word. May not: read one; that is [`manifest`](crate::manifest).

use std::{sync::Arc, time::Duration};

use estargz::Digest;
use registry::Reference;
use tokio::time::Instant;

use super::{AttachRequest, Plane, behind};
use crate::{
    manifest::ManifestLayer,
    resolve::{AttachError, LayerSpec},
};

/// How long an image that is most likely an ordinary one may be kept waiting for its manifest.
const MANIFEST_DEADLINE: Duration = Duration::from_secs(5);

impl Plane {
    /// The digest of a layer's TOC by its image's manifest, which is asked for once for all of the image's layers. `None`
    /// where there is none, or the manifest cannot be had in a few seconds.
    pub async fn find_toc(
        &self,
        reference: &Reference,
        blob_digest: &str,
        manifest_digest: &str,
    ) -> Option<Digest> {
        if !self.config.find_tocs {
            return None;
        }
        let deadline = Instant::now() + self.config.attach_deadline.min(MANIFEST_DEADLINE);
        let layers =
            self.manifests.layers_if_any(&self.registry, reference, manifest_digest, deadline).await?;
        layers.iter().find(|layer| layer.digest == blob_digest)?.toc_digest()
    }

    /// What its image's manifest says of the layer; also starts opening the image's other layers. A
    /// manifest that cannot be had is no reason to fail: the size is then learnt from the blob.
    pub(super) async fn ask_manifest(
        self: &Arc<Self>,
        request: &AttachRequest,
        deadline: Instant,
    ) -> Result<Option<ManifestLayer>, AttachError> {
        let digest = request.manifest_digest.as_deref();
        let layers = match self.manifests.layers(&self.registry, &request.reference, digest, deadline).await {
            Ok(layers) => layers,
            Err(error @ (registry::Error::AuthDenied { .. } | registry::Error::Timeout { .. })) => {
                return Err(error.into());
            }
            Err(error) => {
                tracing::debug!(reference = %request.reference, %error, "no manifest; learning the size from the blob");
                return Ok(None);
            }
        };
        for other in layers
            .iter()
            .filter(|l| l.digest != request.blob_digest && request.neighbours.contains(&l.digest))
        {
            let Some(toc) = other.toc else { continue };
            if self.open.lock().contains_key(&toc.digest) {
                continue;
            }
            let spec = LayerSpec {
                reference: request.reference.clone(),
                blob_digest: other.digest.clone(),
                blob_size: Some(other.size),
                toc_digest: toc.digest,
                toc_position: toc.position,
            };
            tokio::spawn(behind::open_ahead(self.clone(), spec, deadline));
        }
        Ok(layers.iter().find(|l| l.digest == request.blob_digest).cloned())
    }
}
