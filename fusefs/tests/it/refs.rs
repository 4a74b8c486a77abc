//! References instead of slots in the mount's root: what is kept of them, and what goes.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use fusefs::{Audits, Fill, NoKeeper, Plane, PlaneConfig, Refs};
use registry::Registry;
use support::{
    estargz::{Built, Encoder},
    guard::{self, MountGuard},
    layer::Layer,
    registry::{LayerBlob, ScriptedRegistry},
};

use super::bed::{LIMIT, read};

/// A plane that shows references, and a registry. Fields end in order.
struct Shelf {
    refs: Option<Arc<Refs>>,
    plane: Option<Arc<Plane>>,
    runtime: tokio::runtime::Runtime,
    registry: ScriptedRegistry,
    config: PlaneConfig,
    _mount: MountGuard,
    _dir: tempfile::TempDir,
}

impl Shelf {
    fn new() -> Option<Shelf> {
        if !guard::require_root_and_fuse() {
            return None;
        }
        let dir = guard::temp_dir();
        let mut config = PlaneConfig::new(dir.path().join("root"));
        config.mountpoint = dir.path().join("mount");
        config.fill = Fill::On;
        config.fetch.audits = Audits::Off;
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let mut shelf = Shelf {
            refs: None,
            plane: None,
            runtime,
            registry: ScriptedRegistry::start(),
            _mount: MountGuard::new(&config.mountpoint),
            config,
            _dir: dir,
        };
        shelf.start();
        Some(shelf)
    }

    fn start(&mut self) {
        let _entered = self.runtime.enter();
        let registry = Registry::new(registry::Config::default()).unwrap();
        let plane = Plane::start(self.config.clone(), registry.clone()).unwrap();
        let refs = Refs::open(&plane, registry, Duration::from_secs(30)).unwrap();
        let shown = refs.shown();
        plane.expect(shown.iter().map(|(slot, _)| *slot));
        plane.serve_refs(Arc::new(NoKeeper), refs.clone()).unwrap();
        for (slot, request) in shown {
            self.runtime.block_on(plane.restore(slot, &request)).unwrap();
        }
        (self.plane, self.refs) = (Some(plane), Some(refs));
    }

    fn stop(&mut self) {
        let (plane, refs) = (self.plane.take().unwrap(), self.refs.take().unwrap());
        let stop = move || {
            refs.flush();
            plane.stop()
        };
        guard::deadline(LIMIT, stop).unwrap();
    }

    /// The directory of the only layer of an image, by its TOC.
    fn push(&self, built: &Built) -> PathBuf {
        self.registry.put_image("app", "v1", &[LayerBlob::lazy(built)], &serde_json::Value::Null);
        let reference = format!("{}/app:v1", self.registry.host());
        self.config.mountpoint.join(fusefs::refs::name::encode(&reference)).join(&built.toc_digest)
    }

    fn is_complete(&self) -> bool {
        self.plane.as_ref().unwrap().layers().iter().all(|(layer, _)| layer.is_complete())
    }
}

fn number(path: PathBuf) -> Option<u64> {
    guard::deadline(LIMIT, move || fs::metadata(path).ok()).unwrap().map(|found| found.ino())
}

/// What a client does that begins to use a layer, and one that ends.
fn take(dir: &Path) {
    let path = dir.join("use");
    guard::deadline(LIMIT, || fs::File::create(path).unwrap_err()).unwrap();
}

fn release(dir: &Path) {
    let dir = dir.to_owned();
    guard::deadline(LIMIT, || fs::remove_dir(dir).unwrap_err()).unwrap();
}

#[test]
fn what_was_given_up_is_fetched_again_once_somebody_uses_it() {
    let Some(mut shelf) = Shelf::new() else { return };
    let layer = Layer::new().noise("file", 500_000, 1);
    let dir = shelf.push(&Encoder::new().encode(&layer));
    assert!(number(dir.join("diff")).is_some());
    take(&dir);
    assert!(guard::eventually(LIMIT, || shelf.is_complete()));
    release(&dir);
    shelf.stop();
    shelf.start();
    let plane = shelf.plane.clone().unwrap();
    assert!(plane.evict(&[], Duration::ZERO)[0].bytes > 0);
    assert!(!shelf.is_complete());
    assert!(read(dir.join("diff/file")).unwrap() == layer.contents()[&b"file"[..]]);
    plane.evict(&[], Duration::ZERO);
    take(&dir);
    assert!(guard::eventually(LIMIT, || shelf.is_complete()), "it is filled again");
}

#[test]
fn a_forgotten_reference_is_gone_and_comes_back_under_other_numbers() {
    let Some(mut shelf) = Shelf::new() else { return };
    let dir = shelf.push(&Encoder::new().encode(&Layer::new().file("file", &b"x"[..])));
    let before = number(dir.join("diff")).unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let later = now + 40 * 24 * 3600;
    let tidy = |shelf: &Shelf| {
        let refs = shelf.refs.clone().unwrap();
        shelf.runtime.block_on(async { tokio::time::timeout(LIMIT, refs.tidy(later)).await.unwrap() });
    };
    take(&dir);
    tidy(&shelf);
    assert_eq!(number(dir.join("diff")), Some(before), "it is in use");
    release(&dir);
    tidy(&shelf);
    let layers = shelf.config.root.join("layers");
    assert!(guard::eventually(LIMIT, || fs::read_dir(&layers).unwrap().count() == 0));
    let mount = shelf.config.mountpoint.clone();
    let names = move || fs::read_dir(mount).unwrap().count();
    assert_eq!(guard::deadline(LIMIT, names).unwrap(), 0);

    let after = number(dir.join("diff")).unwrap();
    assert_ne!(after, before);
    assert_eq!(read(dir.join("diff/file")).unwrap(), b"x");
    shelf.stop();
    shelf.start();
    assert_eq!(number(dir.join("diff")), Some(after));
}
