//! The images of `tests/images`, built once per machine and cached there.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{DockerRegistry, said};

/// How an image's layers are packed. Both forms of an image unpack to the same tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Plain gzip: nothing about it can be lazy.
    Plain,
    /// eStargz, converted by `ctr-remote`.
    Estargz,
}

/// An image that is ready to be served by [`DockerRegistry::with_images`].
#[derive(Clone, Debug)]
pub struct Image {
    name: &'static str,
    store: PathBuf,
}

impl Image {
    /// One small layer: busybox with its applets, `/etc/passwd`, `/tmp`.
    ///
    /// # Panics
    /// As [`Image::torture`].
    pub fn busybox() -> Image {
        Image::build("busybox")
    }

    /// Six layers on busybox: whiteouts, opaque directories, hard links, devices, set-id files, extended attributes,
    /// long and strange names, files around chunk borders, a layer that occurs twice, and, in a layer of their own,
    /// names that are not UTF-8.
    ///
    /// # Panics
    /// If it is not cached and cannot be built; the message holds what `tests/images/build.sh` said.
    pub fn torture() -> Image {
        Image::build("torture")
    }

    /// Debian with Python 3 and, on top, `/app/hello.py`, which prints one JSON object. Three layers. Building it takes
    /// about two minutes and needs a Debian mirror.
    ///
    /// # Panics
    /// As [`Image::torture`].
    pub fn python() -> Image {
        Image::build("python")
    }

    fn build(name: &'static str) -> Image {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../images/build.sh");
        // No deadline of ours: the script has its own, and the first build on a slow line may take long.
        let output = Command::new(&script).arg(name).output().expect("tests/images/build.sh can be started");
        assert!(output.status.success(), "{} {name}: {}", script.display(), said(&output));
        let store = String::from_utf8_lossy(&output.stdout).trim().into();
        Image { name, store }
    }

    /// The image's repository.
    pub fn name(&self) -> &str {
        self.name
    }

    /// The reference to pull from `registry`.
    pub fn reference(&self, registry: &DockerRegistry, form: Form) -> String {
        let tag = match form {
            Form::Plain => "plain",
            Form::Estargz => "estargz",
        };
        format!("{}/{}:{tag}", registry.address(), self.name)
    }

    /// The uncompressed tars of the layers, lowest first; one that occurs twice in the image occurs twice here.
    ///
    /// # Panics
    /// If the cache was removed meanwhile.
    pub fn layers(&self) -> Vec<PathBuf> {
        let list = std::fs::read_to_string(self.store.join(self.name).join("layers"));
        list.expect("the image cache is still there").lines().map(PathBuf::from).collect()
    }

    /// The docker-registry storage directory that holds both forms of the image.
    pub(super) fn storage(&self) -> PathBuf {
        self.store.join("registry")
    }
}
