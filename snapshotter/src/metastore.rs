//! The records of all snapshots, in one redb file.
//!
//! ```text
//! <root>/snapshots.redb
//!   snapshots   name: str                        -> record (version byte and JSON, see `record`)
//!   live        id: u64                          -> (name: str, parent id: u64 or 0)
//!                                                   every id that owns a directory
//!   children    (parent id: u64, id: u64)        -> ()            "has children" is one range look-up
//!   meta        "next_id"                        -> u64           above every id ever committed
//! ```
//!
//! Transactions are synchronous closures and block: callers run them on a blocking thread. A write closure that
//! fails, or whose commit fails, leaves no trace, and what it returned is dropped, which undoes effects held by a
//! guard. Writers are serialised by redb, so a directory scan inside a write transaction sees no half-made
//! snapshot.
//!
//! A record that does not decode costs only itself: it is as if the snapshot did not exist, but its id stays live,
//! so that descendants keep their lower directory, and it can still be removed by name. The rules of the
//! individual transactions are in [`rules`].
//!
//! A full disk must not keep the user from removing snapshots, so room for the file is taken beforehand. redb
//! refuses all work after an I/O error until reopened; the next transaction does so.

use std::{
    fs::File,
    io,
    ops::Deref,
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use parking_lot::RwLock;
use redb::{
    Database, Durability, ReadOnlyTable, ReadTransaction, ReadableDatabase, ReadableTable, Table,
    TableDefinition, WriteTransaction,
};
use rustix::fs::{FallocateFlags, fallocate};

use crate::{Error, error::Result, record::Record};

pub(crate) mod rules;

const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");
const LIVE: TableDefinition<'_, u64, (&str, u64)> = TableDefinition::new("live");
const CHILDREN: TableDefinition<'_, (u64, u64), ()> = TableDefinition::new("children");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const NEXT_ID: &str = "next_id";

/// Bytes of pages kept in memory: some thousand records. redb's default is a gigabyte.
const CACHE: usize = 16 << 20;

/// Bytes of disk the file is given at once, for some thousand records of up to 10 KiB and their copies on write.
const RESERVE: u64 = 4 << 20;

type Opener = Box<dyn Fn() -> std::result::Result<Database, redb::Error> + Send + Sync>;

pub(crate) struct Metastore {
    open: Opener,
    database: RwLock<Option<Database>>,
    /// redb failed below us; reopen before the next transaction.
    failed: AtomicBool,
    /// In memory, so that the id of a transaction that failed is not given out again.
    next_id: AtomicU64,
}

impl std::fmt::Debug for Metastore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metastore").field("next_id", &self.next_id).finish_non_exhaustive()
    }
}

impl Metastore {
    /// Opens or creates the file. Ids given out are at least `floor`.
    pub fn open(path: &Path, floor: u64) -> Result<Metastore> {
        let path = path.to_owned();
        let open = move || {
            // Without the room, or on a file system that cannot promise it, we do as well as it goes. Done before
            // redb opens the file: closing a second descriptor later could give up its lock.
            if let Err(error) = reserve(&path) {
                tracing::debug!(path = %path.display(), %error, "no room reserved for records");
            }
            Ok(redb::Builder::new().set_cache_size(CACHE).create(&path)?)
        };
        Metastore::with_opener(Box::new(open), floor)
    }

    fn with_opener(open: Opener, floor: u64) -> Result<Metastore> {
        let store = Metastore {
            open,
            database: RwLock::new(None),
            failed: AtomicBool::new(true),
            next_id: AtomicU64::new(floor.max(1)),
        };
        let stored = store.write(|tx| {
            for (name, why) in tx.damaged()? {
                tracing::warn!(
                    snapshot = name,
                    why,
                    "the record cannot be read; the snapshot is left out, remove it by name to free its space"
                );
            }
            tx.stored_next_id()
        })?;
        store.next_id.fetch_max(stored, Ordering::Relaxed);
        Ok(store)
    }

    /// Runs a closure on a consistent view of all records.
    pub fn read<T>(&self, body: impl FnOnce(&ReadTx) -> Result<T>) -> Result<T> {
        self.on_database(|database| body(&ReadTx::begin(&database.begin_read().map_err(failure)?)?))
    }

    /// Runs a closure and commits durably what it did, if it succeeds.
    pub fn write<T>(&self, body: impl FnOnce(&mut WriteTx<'_>) -> Result<T>) -> Result<T> {
        self.transact(Durability::Immediate, body)
    }

    /// The same without waiting for the disk: what it did becomes durable with the next [`write`](Metastore::write). For
    /// what nobody is told of before that, and for what changes no record.
    pub fn write_soon<T>(&self, body: impl FnOnce(&mut WriteTx<'_>) -> Result<T>) -> Result<T> {
        self.transact(Durability::None, body)
    }

    fn transact<T>(
        &self,
        durability: Durability,
        body: impl FnOnce(&mut WriteTx<'_>) -> Result<T>,
    ) -> Result<T> {
        self.on_database(|database| {
            let mut transaction = database.begin_write().map_err(failure)?;
            transaction.set_durability(durability).map_err(failure)?;
            let result = body(&mut WriteTx::begin(&transaction, &self.next_id)?)?;
            transaction.commit().map_err(failure)?;
            Ok(result)
        })
    }

    fn on_database<T>(&self, body: impl FnOnce(&Database) -> Result<T>) -> Result<T> {
        if self.failed.load(Ordering::Acquire) {
            let mut database = self.database.write();
            // The old one holds the file's lock.
            *database = None;
            *database = Some((self.open)().map_err(failure)?);
            self.failed.store(false, Ordering::Release);
        }
        let database = self.database.read();
        let result = body(database.as_ref().ok_or_else(|| failure(redb::Error::DatabaseClosed))?);
        if let Err(Error::Internal { source, .. }) = &result
            && source.is::<redb::Error>()
        {
            self.failed.store(true, Ordering::Release);
        }
        result
    }
}

fn reserve(path: &Path) -> io::Result<()> {
    let file = File::options().create(true).truncate(false).write(true).open(path)?;
    Ok(fallocate(file, FallocateFlags::KEEP_SIZE, 0, RESERVE)?)
}

fn failure(error: impl Into<redb::Error>) -> Error {
    Error::internal("snapshots.redb", error.into())
}

/// The tables of a transaction, with everything that only reads.
pub(crate) struct Tables<S, L, C> {
    snapshots: S,
    live: L,
    children: C,
}

pub(crate) type ReadTx = Tables<
    ReadOnlyTable<&'static str, &'static [u8]>,
    ReadOnlyTable<u64, (&'static str, u64)>,
    ReadOnlyTable<(u64, u64), ()>,
>;

type WriteTables<'t> = Tables<
    Table<'t, &'static str, &'static [u8]>,
    Table<'t, u64, (&'static str, u64)>,
    Table<'t, (u64, u64), ()>,
>;

/// A transaction that may change records.
pub(crate) struct WriteTx<'t> {
    tables: WriteTables<'t>,
    meta: Table<'t, &'static str, u64>,
    next_id: &'t AtomicU64,
}

impl<S, L, C> Tables<S, L, C>
where
    S: ReadableTable<&'static str, &'static [u8]>,
    L: ReadableTable<u64, (&'static str, u64)>,
    C: ReadableTable<(u64, u64), ()>,
{
    /// The record of this name, if there is one that can be read.
    pub fn get(&self, name: &str) -> Result<Option<Record>> {
        let value = self.snapshots.get(name).map_err(failure)?;
        Ok(value.and_then(|value| Record::decode(name, value.value()).ok()))
    }

    /// The record of this name.
    pub fn require(&self, name: &str) -> Result<Record> {
        self.get(name)?.ok_or_else(|| Error::no_such_snapshot(name))
    }

    /// The record with this id, if it can be read.
    pub fn by_id(&self, id: u64) -> Result<Option<Record>> {
        let Some(owner) = self.live.get(id).map_err(failure)? else { return Ok(None) };
        Ok(self.get(owner.value().0)?.filter(|record| record.id == id))
    }

    /// All records that can be read and that the test accepts, by name.
    pub fn all(&self, mut wanted: impl FnMut(&Record) -> bool) -> Result<Vec<Record>> {
        let mut records = vec![];
        for entry in self.snapshots.iter().map_err(failure)? {
            let (name, value) = entry.map_err(failure)?;
            records.extend(Record::decode(name.value(), value.value()).ok().filter(&mut wanted));
        }
        Ok(records)
    }

    /// Whether the id belongs to a snapshot, be its record readable or not.
    pub fn is_live(&self, id: u64) -> Result<bool> {
        Ok(self.live.get(id).map_err(failure)?.is_some())
    }

    fn has_children(&self, id: u64) -> Result<bool> {
        Ok(self.children.range((id, 0)..=(id, u64::MAX)).map_err(failure)?.next().is_some())
    }

    /// The ids under this name if its record cannot be read: one, or more if that happened before.
    fn damaged_ids(&self, name: &str) -> Result<Vec<u64>> {
        let mut ids = vec![];
        let value = self.snapshots.get(name).map_err(failure)?;
        if value.is_some_and(|value| Record::decode(name, value.value()).is_err()) {
            for entry in self.live.iter().map_err(failure)? {
                let (id, owner) = entry.map_err(failure)?;
                ids.extend((owner.value().0 == name).then(|| id.value()));
            }
        }
        Ok(ids)
    }

    /// Names of the records that cannot be read, and why.
    fn damaged(&self) -> Result<Vec<(String, String)>> {
        let mut damaged = vec![];
        for entry in self.snapshots.iter().map_err(failure)? {
            let (name, value) = entry.map_err(failure)?;
            let why = Record::decode(name.value(), value.value()).err();
            damaged.extend(why.map(|why| (name.value().to_owned(), why)));
        }
        Ok(damaged)
    }
}

impl ReadTx {
    fn begin(transaction: &ReadTransaction) -> Result<ReadTx> {
        Ok(Tables {
            snapshots: transaction.open_table(SNAPSHOTS).map_err(failure)?,
            live: transaction.open_table(LIVE).map_err(failure)?,
            children: transaction.open_table(CHILDREN).map_err(failure)?,
        })
    }
}

impl<'t> Deref for WriteTx<'t> {
    type Target = WriteTables<'t>;

    fn deref(&self) -> &Self::Target {
        &self.tables
    }
}

impl<'t> WriteTx<'t> {
    fn begin(transaction: &'t WriteTransaction, next_id: &'t AtomicU64) -> Result<WriteTx<'t>> {
        Ok(WriteTx {
            tables: Tables {
                snapshots: transaction.open_table(SNAPSHOTS).map_err(failure)?,
                live: transaction.open_table(LIVE).map_err(failure)?,
                children: transaction.open_table(CHILDREN).map_err(failure)?,
            },
            meta: transaction.open_table(META).map_err(failure)?,
            next_id,
        })
    }

    fn stored_next_id(&self) -> Result<u64> {
        Ok(self.meta.get(NEXT_ID).map_err(failure)?.map_or(0, |value| value.value()))
    }

    /// An id never given before, even if this transaction fails.
    fn new_id(&mut self) -> Result<u64> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        self.meta.insert(NEXT_ID, id + 1).map_err(failure)?;
        Ok(id)
    }

    /// Stores a record under its name, with its id and its place among its parent's children.
    fn put(&mut self, record: &Record) -> Result<()> {
        let name = record.name.as_str();
        self.tables.snapshots.insert(name, record.encode()?.as_slice()).map_err(failure)?;
        let parent = record.ancestors.first().copied().unwrap_or(0);
        self.tables.live.insert(record.id, (name, parent)).map_err(failure)?;
        if parent != 0 {
            self.tables.children.insert((parent, record.id), ()).map_err(failure)?;
        }
        Ok(())
    }

    /// Takes a name away; the id stays live.
    fn take_name(&mut self, name: &str) -> Result<()> {
        self.tables.snapshots.remove(name).map_err(failure)?;
        Ok(())
    }

    /// Takes an id away, from its parent's children too.
    fn take_id(&mut self, id: u64) -> Result<()> {
        let taken = self.tables.live.remove(id).map_err(failure)?;
        let parent = taken.map_or(0, |value| value.value().1);
        self.tables.children.remove((parent, id)).map_err(failure)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
