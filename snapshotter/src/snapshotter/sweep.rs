//! Getting rid of directories and slots that no record names.
//!
//! Remove only takes the record away and returns; a sweep then finds what is left over, the same way it finds
//! what a crash or a failed call left. It looks inside a write transaction, when no snapshot is half made, and
//! deletes outside of it: ids are never reused, so garbage stays garbage. What cannot be deleted, for example
//! because something is mounted on it, is left for the next sweep.

use std::sync::{Arc, atomic::Ordering};

use super::Inner;
use crate::{dirs::Found, error::Result, filesystem::FileSystem};

impl<F: FileSystem> Inner<F> {
    /// Sweeps in the background. Requests made before it begins to look are served by one sweep.
    pub(super) fn sweep_soon(self: &Arc<Self>) {
        if self.sweep_due.swap(true, Ordering::AcqRel) {
            return;
        }
        let inner = self.clone();
        self.tasks.spawn(async move {
            if let Err(error) = inner.sweep().await {
                tracing::warn!(%error, "could not look for leftover snapshot directories");
            }
        });
    }

    pub(super) async fn sweep(self: &Arc<Self>) -> Result<()> {
        let _alone = self.sweeping.lock().await;
        self.sweep_due.store(false, Ordering::Release);
        for found in self.garbage().await? {
            // Before the directory goes, so that a crash in between is made up for by the next start.
            if found.is_lazy() {
                self.detach(found.id).await;
            }
            self.blocking(move |_| {
                if let Err(error) = found.remove() {
                    tracing::warn!(path = %found.path.display(), %error, "could not remove a leftover, will try again");
                }
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    async fn garbage(self: &Arc<Self>) -> Result<Vec<Found>> {
        self.blocking(|inner| {
            inner.store.write_soon(|tx| {
                let mut garbage = vec![];
                for found in inner.dirs.list()? {
                    if !(found.complete && tx.is_live(found.id)?) {
                        garbage.push(found);
                    }
                }
                Ok(garbage)
            })
        })
        .await
    }
}
