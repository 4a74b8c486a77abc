//! How far a request for a reader reaches beyond what was read: further each time it is read on. Pure.

use std::ops::Range;

/// Places of a layer read at once that are told apart.
const STREAMS: usize = 8;
/// Members between two misses that are looked at; a sequential reader's next miss is nearer.
const FAR: u32 = 4096;

/// Where a layer was read last, in the order of the blob: files that lie one after the other are read on like one.
#[derive(Debug, Default)]
pub struct Streams {
    known: [Option<Stream>; STREAMS],
    oldest: usize,
}

#[derive(Debug, Clone, Copy)]
struct Stream {
    /// The member behind the last miss.
    next: u32,
    ahead: u64,
}

impl Streams {
    /// How many bytes to reach beyond a miss of `members`: `first`, and twice as many as before, up to `most`, if reading on
    /// from the last miss leads there. It does if nothing much between the two is missing: `missing` tells how many bytes of the
    /// blob of a range of members are, `gap` how many do not count.
    pub fn ahead(
        &mut self,
        members: Range<u32>,
        first: u64,
        most: u64,
        gap: u64,
        missing: impl Fn(Range<u32>) -> u64,
    ) -> u64 {
        let continues = |stream: &Stream| {
            members.start >= stream.next
                && members.start - stream.next <= FAR
                && missing(stream.next..members.start) <= gap
        };
        // A large member is asked for in pieces.
        if self.known.iter().flatten().any(|stream| stream.next == members.end) {
            return first;
        }
        if let Some(stream) = self.known.iter_mut().flatten().find(|stream| continues(stream)) {
            *stream =
                Stream { next: members.end, ahead: stream.ahead.saturating_mul(2).min(most.max(first)) };
            return stream.ahead;
        }
        self.known[self.oldest] = Some(Stream { next: members.end, ahead: first });
        self.oldest = (self.oldest + 1) % STREAMS;
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_on_reaches_twice_as_far_and_jumping_does_not() {
        let mut streams = Streams::default();
        // Of the members up to 40 all are here, of the others none; each is 10 bytes long.
        let missing = |members: Range<u32>| {
            10 * u64::from(members.end.saturating_sub(members.start.max(40)).min(members.end - members.start))
        };
        let mut ahead = |member| streams.ahead(member..member + 1, 100, 350, 20, missing);
        assert_eq!(ahead(10), 100);
        assert_eq!(ahead(41), 200, "what lies between is here");
        assert_eq!(ahead(44), 350, "up to the most; a small gap does not count");
        assert_eq!(ahead(45), 350);
        assert_eq!(ahead(45), 100, "the same once more");
        assert_eq!(ahead(46), 350, "is no reason to forget");
        assert_eq!(ahead(44), 100, "backwards");
        assert_eq!(ahead(50), 100, "over what is missing");
        assert_eq!(ahead(FAR * 3), 100, "far away");
        for member in 0..STREAMS as u32 {
            ahead(1_000_000 * (member + 1));
        }
        assert_eq!(ahead(51), 100, "forgotten");
    }
}
