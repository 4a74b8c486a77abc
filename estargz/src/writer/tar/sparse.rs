//! Sparse files: which pieces of a file its tar entry stores.
//!
//! | version | written by | map |
//! |---|---|---|
//! | old GNU | GNU tar, `--format=gnu` | type `S`, four pieces in the header, 21 in each of the blocks behind it |
//! | 0.0 | GNU tar, pax | records `GNU.sparse.offset` and `GNU.sparse.numbytes` in turn |
//! | 0.1 | GNU tar, libarchive, pax | record `GNU.sparse.map`: numbers between commas |
//! | 1.0 | GNU tar, pax | decimal lines in front of the data, filled up to whole blocks |
//!
//! Source: GNU tar's manual, "Storing Sparse Files". Holes read as zeros; what is converted has none, because most
//! engines that unpack layers do not know sparse entries.

use super::header::{BLOCK, Block, Dialect, Header, Why, number};
use super::pax::{Records, decimal};

/// Largest map in bytes, stored in any way. Go reads no larger ones.
pub(super) const MAX_MAP: usize = 1 << 20;

/// Bytes of an entry `offset, length` of an old GNU map.
const OLD_PIECE: usize = 24;

/// A stored piece of a file, at least 1 byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Offset in the file.
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// How an entry is sparse.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Sparse {
    /// The map goes on in the next block, if the flag says so.
    Old { numbers: Vec<i64>, more: bool, size: i64 },
    /// The map was in the records.
    Records { numbers: Vec<i64>, size: i64 },
    /// The map comes first in the data.
    InData { size: i64 },
}

impl Sparse {
    /// What header and records say; `None` for an entry without holes. `stored` is the entry's size in the tar.
    pub(super) fn of(header: &Header, records: &Records, stored: i64) -> Result<Option<Self>, Why> {
        if header.type_flag() == b'S' {
            if header.dialect() != Dialect::Gnu {
                return Err("it is sparse as only GNU tar's own headers can be".into());
            }
            if records.get("size").is_some() {
                return Err(
                    "it has a size in a pax record, which GNU tar's sparse headers cannot have".into()
                );
            }
            return old(header).map(Some);
        }
        let version = (records.get("GNU.sparse.major"), records.get("GNU.sparse.minor"));
        let size = || {
            let size = records.integer("GNU.sparse.size")?;
            Ok::<_, Why>(size.or(records.integer("GNU.sparse.realsize")?).unwrap_or(stored))
        };
        match version {
            (Some(b"1"), Some(b"0")) => Ok(Some(Sparse::InData { size: size()? })),
            (Some(b"0"), Some(b"0" | b"1")) | (None, None) => {
                let numbers = numbers(records)?;
                // Versions 0.0 and 0.1 did not always say so.
                if version == (None, None) && numbers.is_empty() {
                    return Ok(None);
                }
                Ok(Some(Sparse::Records { numbers, size: size()? }))
            }
            _ => Err("it is sparse in a version of the format that is not known".into()),
        }
    }
}

fn old(header: &Header) -> Result<Sparse, Why> {
    let field = header.gnu_sparse();
    let (map, rest) = field.split_at(4 * OLD_PIECE);
    let (more, size) = (rest[0] != 0, &rest[1..13]);
    let mut numbers = Vec::new();
    old_pieces(map, &mut numbers)?;
    let size = number(size).ok_or("its real size is not a number")?;
    Ok(Sparse::Old { numbers, more, size })
}

/// Reads a block of an old GNU map that goes on behind the header. Returns whether it goes on again.
pub(super) fn old_block(block: &Block, numbers: &mut Vec<i64>) -> Result<bool, Why> {
    let (map, rest) = block.split_at(21 * OLD_PIECE);
    old_pieces(map, numbers)?;
    Ok(rest[0] != 0)
}

fn old_pieces(map: &[u8], numbers: &mut Vec<i64>) -> Result<(), Why> {
    for piece in map.chunks_exact(OLD_PIECE) {
        let (offset, len) = piece.split_at(OLD_PIECE / 2);
        // The rest is unused.
        if len[0] == 0 {
            break;
        }
        for field in [offset, len] {
            numbers.push(number(field).ok_or("its sparse map holds something else than numbers")?);
        }
    }
    Ok(())
}

/// The map of versions 0.0 and 0.1.
fn numbers(records: &Records) -> Result<Vec<i64>, Why> {
    let bad = "its sparse map is malformed";
    let mut numbers = Vec::new();
    for (key, value) in records.iter() {
        let expected = match key {
            b"GNU.sparse.offset" => 0,
            b"GNU.sparse.numbytes" => 1,
            _ => continue,
        };
        if numbers.len() % 2 != expected {
            return Err(bad.into());
        }
        numbers.push(decimal(value).ok_or(bad)?);
    }
    if let Some(map) = records.get("GNU.sparse.map") {
        if !numbers.is_empty() {
            return Err("it has two sparse maps".into());
        }
        for value in map.split(|&byte| byte == b',') {
            numbers.push(decimal(value).ok_or(bad)?);
        }
    }
    Ok(numbers)
}

/// A map of version 1.0 on its way out of the data, block by block.
#[derive(Debug, Default)]
pub(super) struct Text {
    /// The number of pieces, then their offsets and lengths.
    numbers: Vec<i64>,
    line: Vec<u8>,
    read: usize,
}

impl Text {
    /// Takes the next block. Returns the numbers if the map is complete.
    pub(super) fn feed(&mut self, block: &Block) -> Result<Option<Vec<i64>>, Why> {
        let bad = "the sparse map in its data is malformed";
        self.read += BLOCK;
        if self.read > MAX_MAP {
            return Err("the sparse map in its data is larger than 1 MiB".into());
        }
        for &byte in block {
            if byte != b'\n' {
                self.line.push(byte);
                continue;
            }
            self.numbers.push(decimal(&self.line).ok_or(bad)?);
            self.line.clear();
            let pieces = usize::try_from(self.numbers[0]).map_err(|_| bad)?;
            if pieces.checked_mul(2).ok_or(bad)? == self.numbers.len() - 1 {
                return Ok(Some(self.numbers.split_off(1)));
            }
        }
        Ok(None)
    }
}

/// Checks a map: pieces ascend without overlap, lie in the file, and are as long together as what is stored.
pub(super) fn pieces(numbers: &[i64], size: i64, stored: u64) -> Result<(Vec<Piece>, u64), Why> {
    let size = u64::try_from(size).map_err(|_| "its real size is negative")?;
    let (pairs, odd) = numbers.as_chunks::<2>();
    if !odd.is_empty() {
        return Err("its sparse map ends in the middle".into());
    }
    let (mut pieces, mut end, mut total) = (Vec::new(), 0, 0);
    for &[offset, len] in pairs {
        let (Ok(offset), Ok(len)) = (u64::try_from(offset), u64::try_from(len)) else {
            return Err("its sparse map holds a negative number".into());
        };
        // Both are below 2^63: no overflow, and the sum of what does not overlap is at most `size`.
        if offset < end || offset + len > size {
            return Err("the pieces of its sparse map overlap or lie outside the file".into());
        }
        end = offset + len;
        total += len;
        if len > 0 {
            pieces.push(Piece { offset, len });
        }
    }
    if total != stored {
        return Err(format!("its sparse map covers {total} bytes, but {stored} are stored").into());
    }
    Ok((pieces, size))
}

/// The blocks of a header like this one, but for an entry without holes: `extensions` as they were if they do not
/// speak of holes, else new ones.
pub(super) fn filled(
    header: &Header,
    extensions: &[u8],
    records: &Records,
    name: &[u8],
    size: u64,
) -> Vec<u8> {
    let mut main = header.clone();
    main.make_regular(size);
    if header.type_flag() == b'S' {
        return [extensions, main.block()].concat();
    }
    // The block has a made-up name for tools that do not know sparse entries.
    main.set_name(name);
    let mut body = Vec::new();
    for (key, value) in records.iter() {
        if !key.starts_with(b"GNU.sparse.") && key != b"size" && key != b"path" {
            Records::write(&mut body, key, value);
        }
    }
    Records::write(&mut body, b"path", name);
    if size > super::header::MAX_OCTAL_SIZE {
        Records::write(&mut body, b"size", size.to_string().as_bytes());
    }
    let mut out = Header::pax(body.len() as u64).block().to_vec();
    out.append(&mut body);
    out.resize(out.len().next_multiple_of(BLOCK), 0);
    out.extend_from_slice(main.block());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(pairs: &[(&str, &str)]) -> Records {
        let mut body = Vec::new();
        for (key, value) in pairs {
            Records::write(&mut body, key.as_bytes(), value.as_bytes());
        }
        Records::parse(&body).unwrap()
    }

    fn of(pairs: &[(&str, &str)]) -> Result<Option<Sparse>, Why> {
        Sparse::of(&Header::file(b"name", 7), &records(pairs), 7)
    }

    #[test]
    fn versions_in_records() {
        assert_eq!(of(&[("path", "x")]), Ok(None));
        let numbers = vec![0, 5, 100, 2];
        let map = ("GNU.sparse.map", "0,5,100,2");
        let size = ("GNU.sparse.size", "200");
        let pieces = [
            ("GNU.sparse.offset", "0"),
            ("GNU.sparse.numbytes", "5"),
            ("GNU.sparse.offset", "100"),
            ("GNU.sparse.numbytes", "2"),
        ];
        let expected = Ok(Some(Sparse::Records { numbers, size: 200 }));
        assert_eq!(of(&[map, size]), expected);
        assert_eq!(of(&[&[size], &pieces[..]].concat()), expected);
        let [zero, one] = [("GNU.sparse.major", "0"), ("GNU.sparse.minor", "1")];
        assert_eq!(of(&[zero, one, ("GNU.sparse.realsize", "200"), map]), expected);
        assert_eq!(of(&[zero, one]), Ok(Some(Sparse::Records { numbers: vec![], size: 7 })));
        let version_1 = [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "9")];
        assert_eq!(of(&version_1), Ok(Some(Sparse::InData { size: 9 })));

        assert!(of(&[("GNU.sparse.major", "2"), ("GNU.sparse.minor", "0")]).is_err());
        assert!(of(&[("GNU.sparse.major", "1")]).is_err());
        assert!(of(&[&pieces[..], &[map]].concat()).is_err());
        assert!(of(&pieces[1..]).is_err());
        assert!(of(&[("GNU.sparse.map", "1,,2")]).is_err());
        assert!(of(&[map, ("GNU.sparse.size", "x")]).is_err());
    }

    #[test]
    fn maps_in_data() {
        let mut block = [0; BLOCK];
        let lines = b"2\n0\n5\n100\n2\n";
        block[..lines.len()].copy_from_slice(lines);
        assert_eq!(Text::default().feed(&block), Ok(Some(vec![0, 5, 100, 2])));

        let long: String =
            std::iter::once("90\n".to_owned()).chain((0..180).map(|n| format!("{n:05}\n"))).collect();
        let mut text = Text::default();
        let blocks: Vec<Block> = long
            .as_bytes()
            .chunks(BLOCK)
            .map(|part| {
                let mut block = [0; BLOCK];
                block[..part.len()].copy_from_slice(part);
                block
            })
            .collect();
        let (last, first) = blocks.split_last().unwrap();
        assert!(first.iter().all(|block| text.feed(block) == Ok(None)));
        assert_eq!(text.feed(last).unwrap().unwrap(), (0..180).collect::<Vec<_>>());

        for lines in [&b"x\n"[..], b"\n", b"-1\n", b"9223372036854775807\n1\n"] {
            let mut block = [b' '; BLOCK];
            block[..lines.len()].copy_from_slice(lines);
            let mut text = Text::default();
            // The last one only ends at the limit.
            let outcome = (0..).map(|_| text.feed(&block)).find(|outcome| *outcome != Ok(None));
            assert!(outcome.unwrap().is_err());
        }
        let mut endless = Text::default();
        assert!((0..=MAX_MAP / BLOCK).any(|_| endless.feed(&[b'1'; BLOCK]).is_err()));
    }

    #[test]
    fn pieces_are_checked() {
        let piece = |offset, len| Piece { offset, len };
        assert_eq!(pieces(&[0, 5, 100, 2, 200, 0], 200, 7), Ok((vec![piece(0, 5), piece(100, 2)], 200)));
        assert_eq!(pieces(&[], 1 << 40, 0), Ok((vec![], 1 << 40)));
        for (numbers, size, stored) in [
            (&[0, 5, 100][..], 200, 5),
            (&[0, 5, 4, 2], 200, 7),
            (&[100, 2, 0, 5], 200, 7),
            (&[0, 5], 4, 5),
            (&[0, 5], 200, 6),
            (&[0, 5], -1, 5),
            (&[-1, 5], 200, 5),
            (&[0, -5], 200, 5),
            (&[i64::MAX, i64::MAX], i64::MAX, 5),
        ] {
            assert!(pieces(numbers, size, stored).is_err(), "{numbers:?}");
        }
    }
}
