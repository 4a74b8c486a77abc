//! How far a request for a reader reaches beyond what was read: further each time the same file is read on. Pure.

use crate::index::Node;

/// Files read at once in one layer that are told apart.
const STREAMS: usize = 8;

/// The files of a layer that were read last, and from where.
#[derive(Debug, Default)]
pub struct Streams {
    known: [Option<Stream>; STREAMS],
    oldest: usize,
}

#[derive(Debug, Clone, Copy)]
struct Stream {
    node: Node,
    /// Where the last miss ended, in bytes of the file.
    end: u64,
    ahead: u64,
}

impl Streams {
    /// How far to reach beyond a miss of `start..end` in a file: `first` bytes, and twice as many as before, up to
    /// `most`, if the miss lies where reading on from the last one leads.
    pub fn ahead(&mut self, node: Node, start: u64, end: u64, first: u64, most: u64) -> u64 {
        // What was fetched ahead was compressed: by how much is not known here, and four times is not rare.
        let continues =
            |stream: &Stream| start >= stream.end && start - stream.end <= stream.ahead.saturating_mul(4);
        let known = self.known.iter_mut().flatten().find(|stream| stream.node == node);
        if let Some(stream) = known {
            let ahead =
                if continues(stream) { stream.ahead.saturating_mul(2).min(most.max(first)) } else { first };
            *stream = Stream { node, end, ahead };
            return ahead;
        }
        self.known[self.oldest] = Some(Stream { node, end, ahead: first });
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
        let mut ahead = |node, start| streams.ahead(node, start, start + 10, 100, 350);
        assert_eq!(ahead(1, 0), 100);
        assert_eq!(ahead(2, 0), 100, "another file is no reason");
        assert_eq!(ahead(1, 110), 200);
        assert_eq!(ahead(1, 500), 350, "up to the most");
        assert_eq!(ahead(1, 900), 350);
        assert_eq!(ahead(1, 5), 100, "backwards");
        assert_eq!(ahead(1, 1_000_000), 100, "far away");
        for node in 10..10 + STREAMS as Node {
            ahead(node, 0);
        }
        assert_eq!(ahead(2, 10), 100, "forgotten");
    }
}
