//! Which byte ranges to ask for, given which members are wanted. Pure.

use std::ops::Range;

/// How wanted members become requests. All in bytes of the compressed blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Two wanted members this close together come in one request: reading over the gap is cheaper than a round trip.
    pub gap: u64,
    /// No request is made longer than this by merging. One member may be longer on its own.
    pub max_request: u64,
    /// How far a request reaches beyond the last wanted member, through members nobody has yet: neighbours in the
    /// blob are neighbours in the tree, and are often wanted next.
    pub ahead: u64,
}

/// One request: consecutive members of the blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The bytes to ask for.
    pub bytes: Range<u64>,
    /// The members to decode from them, ascending; wanted or free, never taken.
    pub members: Vec<u32>,
}

/// What a plan may know of a blob.
pub trait Members {
    /// How many members there are.
    fn count(&self) -> u32;
    /// The bytes that must be fetched to decode all of a member's chunks.
    fn bytes(&self, member: u32) -> Range<u64>;
    /// Nobody has it and nobody is fetching it.
    fn is_free(&self, member: u32) -> bool;
}

/// Merges wanted members (ascending, free) into requests.
pub fn requests(wanted: &[u32], layer: &impl Members, shape: Shape) -> Vec<Request> {
    let mut out: Vec<Request> = Vec::new();
    for &member in wanted {
        let bytes = layer.bytes(member);
        if let Some(open) = out.last_mut()
            && bytes.start <= open.bytes.end.saturating_add(shape.gap)
            && bytes.end.saturating_sub(open.bytes.start) <= shape.max_request
        {
            let previous = *open.members.last().unwrap_or(&member);
            open.members.extend((previous + 1..member).filter(|&m| layer.is_free(m)));
            open.members.push(member);
            open.bytes.end = open.bytes.end.max(bytes.end);
        } else {
            out.push(Request { bytes, members: vec![member] });
        }
    }
    if let Some(last) = out.last_mut() {
        extend(last, layer, shape);
    }
    out
}

/// The first free members of a range, as many as lie within `size` bytes of the blob; at least one if there is one.
pub fn batch(range: Range<u32>, layer: &impl Members, size: u64) -> Vec<u32> {
    let mut batch: Vec<u32> = Vec::new();
    let mut start = 0;
    for member in range.filter(|&member| layer.is_free(member)) {
        let bytes = layer.bytes(member);
        if batch.is_empty() {
            start = bytes.start;
        } else if bytes.end.saturating_sub(start) > size {
            break;
        }
        batch.push(member);
    }
    batch
}

/// Lengthens the last request through the free members behind it, reading over what is taken as [`requests`] does.
fn extend(request: &mut Request, layer: &impl Members, shape: Shape) {
    let until = request.bytes.end.saturating_add(shape.ahead);
    let behind = request.members.last().map_or(0, |m| m + 1);
    for next in behind..layer.count() {
        let bytes = layer.bytes(next);
        let end = request.bytes.end.max(bytes.end);
        let gap = bytes.start.saturating_sub(request.bytes.end);
        if end > until || end - request.bytes.start > shape.max_request || gap > shape.gap {
            break;
        }
        if layer.is_free(next) {
            request.members.push(next);
            request.bytes.end = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Members of the given lengths, one after the other.
    struct Fake {
        lengths: Vec<u64>,
        taken: Vec<u32>,
    }

    impl Members for Fake {
        fn count(&self) -> u32 {
            self.lengths.len() as u32
        }
        fn bytes(&self, member: u32) -> Range<u64> {
            let start: u64 = self.lengths[..member as usize].iter().sum();
            start..start + self.lengths[member as usize]
        }
        fn is_free(&self, member: u32) -> bool {
            !self.taken.contains(&member)
        }
    }

    fn plan(
        wanted: &[u32],
        taken: &[u32],
        gap: u64,
        max_request: u64,
        ahead: u64,
    ) -> Vec<(Range<u64>, Vec<u32>)> {
        let layer = Fake { lengths: vec![10; 8], taken: taken.to_vec() };
        requests(wanted, &layer, Shape { gap, max_request, ahead })
            .into_iter()
            .map(|r| (r.bytes, r.members))
            .collect()
    }

    #[test]
    fn neighbours_merge_over_small_gaps_and_up_to_a_size() {
        assert_eq!(plan(&[1], &[], 0, 100, 0), [(10..20, vec![1])]);
        assert_eq!(plan(&[1, 2], &[], 0, 100, 0), [(10..30, vec![1, 2])]);
        assert_eq!(plan(&[1, 3], &[], 0, 100, 0), [(10..20, vec![1]), (30..40, vec![3])]);
        assert_eq!(plan(&[1, 3], &[], 10, 100, 0), [(10..40, vec![1, 2, 3])]);
        assert_eq!(
            plan(&[1, 3], &[2], 10, 100, 0),
            [(10..40, vec![1, 3])],
            "what is taken is read over, not decoded"
        );
        assert_eq!(plan(&[1, 2, 3], &[], 0, 20, 0), [(10..30, vec![1, 2]), (30..40, vec![3])]);
    }

    #[test]
    fn the_last_request_reaches_ahead_to_the_first_member_somebody_has() {
        assert_eq!(plan(&[1], &[], 0, 100, 25), [(10..40, vec![1, 2, 3])]);
        assert_eq!(plan(&[1], &[3], 0, 100, 25), [(10..30, vec![1, 2])]);
        assert_eq!(plan(&[6], &[], 0, 100, 1000), [(60..80, vec![6, 7])]);
        assert_eq!(plan(&[1], &[], 0, 30, 1000), [(10..40, vec![1, 2, 3])]);
    }

    #[test]
    fn a_batch_is_what_is_free_within_a_size() {
        let layer = Fake { lengths: vec![10; 8], taken: vec![1, 2] };
        assert_eq!(batch(0..8, &layer, 40), [0, 3]);
        assert_eq!(batch(0..8, &layer, 5), [0]);
        assert_eq!(batch(1..8, &layer, 20), [3, 4]);
        assert_eq!(batch(1..3, &layer, 20), [0; 0]);
        assert_eq!(batch(5..8, &layer, 1000), [5, 6, 7]);
    }

    #[test]
    fn a_member_longer_than_a_request_comes_alone() {
        assert_eq!(plan(&[0, 1], &[], 0, 5, 50), [(0..10, vec![0]), (10..20, vec![1])]);
    }
}
