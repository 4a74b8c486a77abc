//! Requests for what is above the layers' trees, where the root holds references ([`crate::refs`]).
//!
//! Nothing can be created or removed, but who tries to create `use` or to remove a layer's directory is counted, and told that
//! it is not there: containers/storage takes any other answer for a failure.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _, sync::Arc, time::Duration};

use fuser::{Errno, FileAttr, Generation, INodeNo, ReplyData, ReplyEntry};
use tokio::time::Instant;

use super::adapter::{Adapter, FOREVER, file_attr};
use crate::{
    index::Attr,
    reader,
    refs::{Found, Looked, Refs, name::Place},
    slots::Slots,
};

impl Adapter {
    /// The references and a place among them, if the number is of one.
    pub(super) fn place(&self, ino: INodeNo) -> Option<(&Arc<Refs>, Place)> {
        Some((self.refs.as_ref()?, Place::of(ino.0)?))
    }

    /// What `stat` says of a place.
    pub(super) fn place_attr(refs: &Refs, place: Place) -> Option<(Duration, FileAttr)> {
        let attr = FileAttr { ino: INodeNo(place.ino()), ..file_attr(0, 0, &refs.attr(place)?) };
        // What is said of a layer may be said otherwise by the next process.
        let ttl = if matches!(place, Place::Info(_)) { Duration::ZERO } else { FOREVER };
        Some((ttl, attr))
    }

    /// Answers a lookup, from a task if the network has to be asked.
    pub(super) fn lookup_place(&self, refs: &Arc<Refs>, parent: Place, name: &OsStr, reply: ReplyEntry) {
        match refs.lookup(parent, name.as_bytes()) {
            Looked::Found(found) => answer(refs, &self.slots, Some(found), reply),
            Looked::Nothing => reply.error(Errno::ENOENT),
            Looked::Later(look) => {
                let (refs, slots) = (refs.clone(), self.slots.clone());
                self.runtime.spawn(async move {
                    let found = look.await;
                    answer(&refs, &slots, found, reply);
                });
            }
        }
    }

    /// Reads `info` or `blob`.
    pub(super) fn read_place(&self, refs: &Arc<Refs>, place: Place, offset: u64, len: u32, reply: ReplyData) {
        match place {
            Place::Info(slot) => match refs.info(slot) {
                Some(text) => {
                    let bytes = reader::clip(text.len() as u64, offset, len);
                    reply.data(&text[bytes.start as usize..bytes.end as usize]);
                }
                None => reply.error(Errno::ESTALE),
            },
            Place::Blob(slot) => {
                let Some(Attr { size, .. }) = refs.attr(place) else { return reply.error(Errno::ESTALE) };
                let (refs, bytes) = (refs.clone(), reader::clip(size, offset, len));
                let deadline = Instant::now() + self.read_deadline;
                self.runtime.spawn(async move {
                    match refs.read_blob(slot, bytes.clone(), deadline).await {
                        Ok(data) => reply.data(&data),
                        Err(error) => {
                            let reason = error.reason();
                            tracing::error!(slot, start = bytes.start, end = bytes.end, reason, %error, "reading a blob");
                            reply.error(Errno::EIO);
                        }
                    }
                });
            }
            Place::Root | Place::Reference(_) | Place::Layer(_) => reply.error(Errno::EISDIR),
        }
    }

    /// Lists a place; as [`Adapter::list`].
    pub(super) fn list_place(
        &self,
        refs: &Refs,
        place: Place,
        offset: u64,
        mut add: impl FnMut(u64, u64, &[u8], &dyn Fn() -> (Duration, FileAttr)) -> bool,
    ) -> Result<(), Errno> {
        let own = Self::place_attr(refs, place).ok_or(Errno::ESTALE)?;
        let above = refs.above(place).ino();
        let dots = [(b".".to_vec(), place.ino(), own), (b"..".to_vec(), above, own)];
        let tree = match place {
            Place::Layer(slot) => {
                tree_attr(&self.slots, slot).map(|attr| (b"diff".to_vec(), attr.1.ino.0, attr))
            }
            _ => None,
        };
        let entries = refs.entries(place).into_iter().filter_map(|(name, place)| {
            Some((name.into_bytes(), place.ino(), Self::place_attr(refs, place)?))
        });
        for (at, (name, ino, attr)) in (0_u64..).zip(dots.into_iter().chain(tree).chain(entries)) {
            if at >= offset && add(ino, at + 1, &name, &|| attr) {
                break;
            }
        }
        Ok(())
    }

    /// Somebody creates a name: what it is told.
    pub(super) fn create_name(&self, parent: INodeNo, name: &OsStr) -> Errno {
        match self.place(parent) {
            Some((refs, Place::Layer(slot))) if name == "use" => {
                refs.take(slot);
                Errno::ENOENT
            }
            _ => Errno::EROFS,
        }
    }

    /// Somebody removes a directory: what it is told.
    pub(super) fn remove_name(&self, parent: INodeNo, name: &OsStr) -> Errno {
        match self.place(parent) {
            Some((refs, Place::Reference(number))) => {
                refs.release(number, name.as_bytes());
                Errno::ENOENT
            }
            _ => Errno::EROFS,
        }
    }
}

fn answer(refs: &Refs, slots: &Slots, found: Option<Found>, reply: ReplyEntry) {
    let found = match found {
        Some(Found::Place(place)) => Adapter::place_attr(refs, place),
        Some(Found::Tree(slot)) => tree_attr(slots, slot),
        None => None,
    };
    match found {
        Some((ttl, attr)) => reply.entry_with_ttls(&FOREVER, &ttl, &attr, Generation(0)),
        None => reply.error(Errno::ENOENT),
    }
}

/// The root of the layer in a slot.
fn tree_attr(slots: &Slots, slot: u32) -> Option<(Duration, FileAttr)> {
    Some((FOREVER, file_attr(slot, 0, &slots.get(slot)?.attr(0)?)))
}
