//! The plane's mount: its begin, its users, its end.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
};

use tokio::runtime::Handle;

use super::{Plane, PlaneConfig, Stay};
use crate::{
    fuse::{self, Adapter, Connection, Keeper, Lifetime, Shown},
    layer::Layer,
    refs::Refs,
};

impl Plane {
    /// Goes on with the mount that an earlier process has left to the keeper, or clears what is left and mounts; serves. The
    /// slots must be filled or expected before: a request for one that is neither fails.
    ///
    /// # Errors
    ///
    /// Nothing can be mounted.
    pub fn serve(&self, keeper: Arc<dyn Keeper>) -> io::Result<()> {
        self.serve_names(keeper, None)
    }

    /// [`Plane::serve`], with references in the mount's root instead of slots.
    ///
    /// # Errors
    ///
    /// Nothing can be mounted.
    pub fn serve_refs(&self, keeper: Arc<dyn Keeper>, refs: Arc<Refs>) -> io::Result<()> {
        self.serve_names(keeper, Some(refs))
    }

    fn serve_names(&self, keeper: Arc<dyn Keeper>, refs: Option<Arc<Refs>>) -> io::Result<()> {
        let PlaneConfig { opaque, read_deadline, threads, .. } = self.config;
        let runtime = Handle::current();
        let shown = if refs.is_some() { Shown::References } else { Shown::Slots };
        let adapter = || {
            let slots = self.slots.clone();
            Adapter::new(slots, self.fuse.clone(), runtime.clone(), opaque, read_deadline)
                .with_refs(refs.clone())
        };
        let connection = Connection::open(&self.mountpoint(), &adapter, shown, threads, &*keeper)?;
        *self.connection.lock() = Some(Arc::new(connection));
        *self.keeper.lock() = Some(keeper);
        Ok(())
    }

    /// Whether it serves a mount: not before [`Plane::serve`], nor after it was drained.
    pub fn is_serving(&self) -> bool {
        self.connection.lock().is_some()
    }

    /// Where slots appear, `<mountpoint>/<slot>`, or references.
    pub fn mountpoint(&self) -> PathBuf {
        self.config.mountpoint.clone()
    }

    /// The mounts that use it.
    fn users(&self) -> io::Result<Vec<PathBuf>> {
        let (mountpoint, snapshots) = (self.mountpoint(), self.config.root.join("snapshots"));
        fuse::users(&mountpoint, &|lower| lower.starts_with(&snapshots) || leads_to(lower, &mountpoint))
    }

    /// Whether any mount uses it, or may. Blocking.
    pub(crate) fn is_used(&self) -> bool {
        self.users().map_or(true, |users| !users.is_empty())
    }

    /// A name in the mount's root means nothing any more.
    pub(crate) fn forget_name(&self, name: String) {
        if let Some(connection) = self.connection.lock().clone() {
            tokio::task::spawn_blocking(move || connection.forget_name(&name));
        }
    }

    /// Ends background work and makes what is stored durable. A mount that is kept stays for the next process as long as
    /// [`Stay`] says; then the process must end without giving up what it has not answered (`true`). Otherwise it is
    /// unmounted if nothing uses it; one in use stays, with what the page cache holds. Blocking.
    pub fn stop(&self) -> bool {
        self.stopping.store(true, Ordering::Release);
        if let Err(error) = self.checkpoint() {
            tracing::warn!(%error, "content was not synced; it will be hashed again after a reboot");
        }
        // An overlay that took a layer goes on with it whether the mount is there or not, and needs the next daemon.
        let used = || self.config.stay == Stay::UntilDrained || self.is_used();
        let is_kept = |c: &Arc<Connection>| c.lifetime() == Lifetime::Kept;
        let kept = self.connection.lock().as_ref().is_some_and(is_kept);
        if kept && used() {
            self.connection.lock().take();
            tracing::info!(mount = %self.mountpoint().display(), "the mount stays for the next daemon");
            return true;
        }
        self.unmount();
        false
    }

    /// Attaches nothing more, and unmounts if nothing uses the mount; otherwise who does. To be called again then. Blocking.
    ///
    /// # Errors
    ///
    /// The mount table cannot be read.
    pub fn drain(&self) -> io::Result<Vec<PathBuf>> {
        self.draining.store(true, Ordering::Release);
        let users = self.users()?;
        if users.is_empty() {
            self.unmount();
        }
        Ok(users)
    }

    /// Ends the connection, if it is there and nobody uses it.
    fn unmount(&self) {
        let Some(connection) = self.connection.lock().take() else { return };
        if let Some(keeper) = self.keeper.lock().take() {
            keeper.forget();
        }
        if !connection.close_if_idle() {
            tracing::info!(mount = %self.mountpoint().display(), "the lazy layers are in use");
        }
    }

    fn checkpoint(&self) -> io::Result<()> {
        let layers: Vec<Arc<Layer>> = self.open.lock().values().map(|open| open.layer.clone()).collect();
        layers.iter().for_each(|layer| layer.store().freeze());
        rustix::fs::syncfs(fs::File::open(self.layers_dir())?)?;
        let mut result = Ok(());
        for layer in &layers {
            // One that fails costs itself only.
            result = result.and(layer.store().checkpoint());
        }
        result
    }
}

/// Whether a lower directory is in a mount, or a link of containers/storage that leads there: `overlay/l/<short>` to
/// `../<id>/diff`, and that into the mount. No other link is looked at: it may lie on a file system that hangs.
fn leads_to(lower: &Path, mountpoint: &Path) -> bool {
    let follow = |path: &Path| {
        let target = fs::read_link(path).ok()?;
        Some(normal(&path.parent()?.join(target)))
    };
    let is_short = lower.parent().and_then(Path::file_name).is_some_and(|dir| dir == "l");
    let layer = || follow(lower).and_then(|diff| follow(&diff));
    lower.starts_with(mountpoint) || is_short && layer().is_some_and(|layer| layer.starts_with(mountpoint))
}

/// A path without `..`, by its names alone.
fn normal(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => drop(out.pop()),
            std::path::Component::CurDir => {}
            part => out.push(part),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_of_podman_lead_to_the_mount() {
        let dir = tempfile::tempdir().unwrap();
        let (graph, mount) = (dir.path().join("overlay"), dir.path().join("mount"));
        fs::create_dir_all(graph.join("l")).unwrap();
        for id in ["lazy", "plain"] {
            fs::create_dir(graph.join(id)).unwrap();
            symlink(format!("../{id}/diff"), graph.join("l").join(id)).unwrap();
        }
        symlink(mount.join("cmVm/sha256:0/diff"), graph.join("lazy/diff")).unwrap();
        fs::create_dir(graph.join("plain/diff")).unwrap();
        assert!(leads_to(&graph.join("l/lazy"), &mount));
        assert!(leads_to(&mount.join("cmVm/sha256:0/diff"), &mount));
        assert!(!leads_to(&graph.join("l/plain"), &mount));
        assert!(!leads_to(&graph.join("lazy/diff"), &mount), "not as podman names it");
        assert!(!leads_to(&graph.join("l/missing"), &mount));
    }
}
