//! containerd's image records: names and what they stand for.

use containerd_client::services::v1::{CreateImageRequest, GetImageRequest, Image, UpdateImageRequest};
use containerd_client::types;
use prost_types::FieldMask;
use tonic::Code;

use super::{Containerd, refused};

/// What `name` stands for; `None` if there is no such image.
///
/// # Errors
///
/// containerd refuses.
pub async fn find(containerd: &Containerd, name: &str) -> anyhow::Result<Option<types::Descriptor>> {
    match containerd.images().get(GetImageRequest { name: name.to_owned() }).await {
        Ok(answer) => Ok(answer.into_inner().image.and_then(|image| image.target)),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(refused(format!("cannot look up image {name}"))(status)),
    }
}

/// Makes the image known under `name`, in place of what had the name before.
///
/// # Errors
///
/// containerd refuses.
pub async fn record(containerd: &Containerd, name: &str, target: types::Descriptor) -> anyhow::Result<()> {
    let tried = || format!("cannot record image {name}");
    let image = Image { name: name.to_owned(), target: Some(target), ..Default::default() };
    let mut images = containerd.images();
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
