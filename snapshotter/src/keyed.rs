//! Locks by name, held across awaits.
//!
//! One lock exists per name in use and is forgotten with its last holder or waiter, also when a waiter gives up.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

type Cells = Arc<Mutex<HashMap<String, Arc<AsyncMutex<()>>>>>;

/// A set of locks, one for each name.
#[derive(Debug, Default)]
pub(crate) struct KeyedLocks {
    cells: Cells,
}

/// Keeps the lock of a name until dropped.
#[derive(Debug)]
pub(crate) struct KeyedGuard {
    // Dropped first, so that the ticket counts only other users.
    _held: OwnedMutexGuard<()>,
    _ticket: Ticket,
}

/// An interest in a name, as holder or waiter.
#[derive(Debug)]
struct Ticket {
    name: String,
    cell: Arc<AsyncMutex<()>>,
    cells: Cells,
}

impl KeyedLocks {
    pub async fn lock(&self, name: &str) -> KeyedGuard {
        let cell = self.cells.lock().entry(name.to_owned()).or_default().clone();
        let ticket = Ticket { name: name.to_owned(), cell, cells: self.cells.clone() };
        KeyedGuard { _held: ticket.cell.clone().lock_owned().await, _ticket: ticket }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut cells = self.cells.lock();
        // Cells are cloned only under this lock: two left are the map's and ours.
        if Arc::strong_count(&self.cell) == 2 {
            cells.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn names_exclude_themselves_only_and_leave_nothing() {
        let locks = KeyedLocks::default();
        let a = locks.lock("a").await;
        let b = locks.lock("b").await;
        assert!(timeout(Duration::from_secs(1), locks.lock("a")).await.is_err());
        assert_eq!(locks.cells.lock().len(), 2);
        drop(a);
        let a = timeout(Duration::from_secs(1), locks.lock("a")).await.unwrap();
        let waiter = locks.lock("a");
        tokio::pin!(waiter);
        assert!(timeout(Duration::from_secs(1), &mut waiter).await.is_err());
        drop(a);
        drop((waiter.await, b));
        assert_eq!(locks.cells.lock().len(), 0);
    }
}
