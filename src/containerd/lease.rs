//! A lease: what keeps the things a command makes in containerd from its garbage collector until something refers to
//! them. It also expires by itself, for the case that the command is killed.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_client::services::v1::{AddResourceRequest, CreateRequest, DeleteRequest, Resource};

use super::{Containerd, refused};

/// When containerd drops the lease of a command that was killed; its own clients use the same.
const LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// A lease and the connection under it.
#[derive(Debug)]
pub struct Lease {
    containerd: Containerd,
    id: String,
}

impl Lease {
    /// Takes a lease for the command `purpose`.
    ///
    /// # Errors
    ///
    /// containerd refuses.
    pub async fn take(containerd: Containerd, purpose: &str) -> anyhow::Result<Self> {
        let now = SystemTime::now();
        let id = format!("lazurite-{purpose}-{}", unique(now));
        let expiry = ("containerd.io/gc.expire".to_owned(), rfc3339(now + LIFETIME));
        let request = CreateRequest { id: id.clone(), labels: HashMap::from([expiry]) };
        containerd.leases().create(request).await.map_err(refused("cannot take a lease"))?;
        Ok(Self { containerd: containerd.leased(&id)?, id })
    }

    /// The connection, under the lease.
    pub fn containerd(&self) -> &Containerd {
        &self.containerd
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Keeps the resource `name` of a type (`content`, `snapshots/NAME`), which may or may not exist.
    ///
    /// # Errors
    ///
    /// containerd refuses.
    pub async fn hold(&self, kind: &str, name: &str) -> anyhow::Result<()> {
        let resource = Resource { id: name.to_owned(), r#type: kind.to_owned() };
        let request = AddResourceRequest { id: self.id.clone(), resource: Some(resource) };
        let result = self.containerd.leases().add_resource(request).await;
        result.map(drop).map_err(refused(format!("cannot hold {kind} {name}")))
    }

    /// Gives it back.
    ///
    /// # Errors
    ///
    /// containerd refuses. The lease then expires by itself.
    pub async fn release(&self) -> anyhow::Result<()> {
        let request = DeleteRequest { id: self.id.clone(), sync: false };
        let released = self.containerd.leases().delete(request).await;
        released.map(drop).map_err(refused(format!("cannot release lease {}", self.id)))
    }
}

/// `<nanoseconds of the second>-<four letters>`, as containerd's clients make keys unique.
pub fn unique(now: SystemTime) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    // Each RandomState is keyed anew from the system's randomness.
    let mut bits = RandomState::new().build_hasher().finish();
    let mut letters = String::new();
    for _ in 0..4 {
        letters.push(LETTERS[(bits % 64) as usize].into());
        bits /= 64;
    }
    format!("{}-{letters}", since.subsec_nanos())
}

/// A time as containerd reads it in labels, in UTC (RFC 3339).
fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (mut days, of_day) = (seconds / 86_400, seconds % 86_400);
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{:02}T{hour:02}:{minute:02}:{second:02}Z", days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_for_containerd() {
        let cases = [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_709_164_800, "2024-02-29T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (1_735_689_600, "2025-01-01T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ];
        for (seconds, text) in cases {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn keys_are_unique_and_of_containerds_form() {
        let now = UNIX_EPOCH + Duration::new(5, 123_456_789);
        let one = unique(now);
        let (nanos, letters) = one.split_once('-').unwrap();
        assert_eq!(nanos, "123456789");
        assert_eq!(letters.len(), 4);
        assert!(letters.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'));
        assert!((0..8).any(|_| unique(now) != one), "equal times give different keys");
    }
}
