//! The order of entries when some are to come first. Pure: knows the entries' paths and links, not their bytes.
//!
//! A prioritized entry is brought to the front with all it needs: its parent directories, and for a hard link its
//! target, each before it and once. All entries of a path move together and stay in order, so that of entries listed
//! twice the later one still wins. All others keep their order behind them.

use std::collections::HashSet;
use std::ops::Range;

use super::Pattern;

/// What ordering needs to know of an entry.
#[derive(Debug)]
pub(super) struct Item {
    /// Cleaned.
    pub(super) path: Vec<u8>,
    /// Cleaned target of a hard link.
    pub(super) target: Option<Vec<u8>>,
}

/// Numbers of items.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Order {
    /// Those in front of the landmark.
    pub(super) first: Vec<u32>,
    pub(super) rest: Vec<u32>,
    /// Patterns that match nothing.
    pub(super) missing: Vec<Pattern>,
}

/// Puts first what `patterns` name, in their order; what a glob names stays in the order of the items, but for what others
/// of them need: so that ordering what was ordered changes nothing.
pub(super) fn order(items: &[Item], patterns: &[Pattern]) -> Order {
    let mut front = Front::new(items);
    let mut missing = Vec::new();
    let globs = patterns.iter().any(|pattern| pattern.exact().is_none());
    let sound = if globs { sound(items) } else { Vec::new() };
    for pattern in patterns {
        let before = front.wanted;
        match pattern.exact() {
            Some(path) => front.want(path),
            None => sound
                .iter()
                .map(|&item| &items[item as usize])
                .filter(|item| pattern.matches(&item.path))
                .for_each(|item| front.want(&item.path)),
        }
        if front.wanted == before {
            missing.push(pattern.clone());
        }
    }
    let Front { moved, first, .. } = front;
    let rest = (0..items.len() as u32).filter(|&item| !moved[item as usize]).collect();
    Order { first, rest, missing }
}

/// All items, each behind what it needs. In most tars that is their order.
fn sound(items: &[Item]) -> Vec<u32> {
    let mut all = Front::new(items);
    items.iter().for_each(|item| all.want(&item.path));
    all.first
}

struct Front<'a> {
    items: &'a [Item],
    /// Numbers of all items, by path and then in order.
    by_path: Vec<u32>,
    /// Paths brought to the front, or on their way there.
    seen: HashSet<&'a [u8]>,
    moved: Vec<bool>,
    first: Vec<u32>,
    /// How often something was wanted that exists.
    wanted: usize,
}

enum Step<'a> {
    /// Bring what the path needs, then the path.
    Bring(&'a [u8]),
    /// All it needs is there.
    Place(&'a [u8]),
}

impl<'a> Front<'a> {
    fn new(items: &'a [Item]) -> Self {
        let mut by_path: Vec<u32> = (0..items.len() as u32).collect();
        by_path.sort_by_key(|&item| &items[item as usize].path);
        Front {
            items,
            by_path,
            seen: HashSet::new(),
            moved: vec![false; items.len()],
            first: Vec::new(),
            wanted: 0,
        }
    }

    /// The items of a path: a range of `by_path`.
    fn named(&self, path: &[u8]) -> Range<usize> {
        let path_of = |&item: &u32| &self.items[item as usize].path[..];
        let start = self.by_path.partition_point(|item| path_of(item) < path);
        start..start + self.by_path[start..].partition_point(|item| path_of(item) == path)
    }

    fn want(&mut self, path: &[u8]) {
        let Some(&item) = self.by_path[self.named(path)].first() else {
            return;
        };
        self.wanted += 1;
        // A stack of its own, last step first: neither depth nor chains of links cost the thread's.
        let mut steps = vec![Step::Bring(&self.items[item as usize].path)];
        while let Some(step) = steps.pop() {
            match step {
                Step::Bring(path) if self.seen.insert(path) => {
                    steps.push(Step::Place(path));
                    let named = self.by_path[self.named(path)].iter();
                    steps.extend(
                        named
                            .filter_map(|&item| self.items[item as usize].target.as_deref())
                            .map(Step::Bring),
                    );
                    if !path.is_empty() {
                        steps.push(Step::Bring(parent(path)));
                    }
                }
                Step::Bring(_) => {}
                Step::Place(path) => {
                    for at in self.named(path) {
                        let item = self.by_path[at];
                        self.moved[item as usize] = true;
                        self.first.push(item);
                    }
                }
            }
        }
    }
}

fn parent(path: &[u8]) -> &[u8] {
    path.iter().rposition(|&byte| byte == b'/').map_or(b"", |slash| &path[..slash])
}

/// A name in a tar as a path from the layer's root, without leading slash; `.` and `..` are resolved as if that were
/// the root of everything.
pub(super) fn clean(name: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(name.len());
    for part in name.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => path.truncate(parent(&path).len()),
            _ => {
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(part);
            }
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(names: &[&str]) -> Vec<Item> {
        names
            .iter()
            .map(|name| match name.split_once(" -> ") {
                None => Item { path: clean(name.as_bytes()), target: None },
                Some((name, target)) => {
                    Item { path: clean(name.as_bytes()), target: Some(clean(target.as_bytes())) }
                }
            })
            .collect()
    }

    fn first(names: &[&str], patterns: &[&str]) -> (Vec<String>, Vec<String>) {
        let items = items(names);
        let patterns: Vec<_> = patterns
            .iter()
            .map(|text| if text.contains('*') { Pattern::glob(text).unwrap() } else { Pattern::path(text) })
            .collect();
        let Order { first, rest, missing } = order(&items, &patterns);
        let mut all = [&first[..], &rest].concat();
        assert!(rest.is_sorted());
        all.sort();
        assert_eq!(all, (0..items.len() as u32).collect::<Vec<_>>());
        let name = |item: &u32| names[*item as usize].to_owned();
        (first.iter().map(name).collect(), missing.iter().map(Pattern::to_string).collect())
    }

    #[test]
    fn names_are_cleaned() {
        for (name, path) in [
            ("./", ""),
            ("/", ""),
            ("a", "a"),
            ("./a//b/", "a/b"),
            ("a/../b", "b"),
            ("../../a", "a"),
            ("a/b/../../..", ""),
            ("a/...", "a/..."),
        ] {
            assert_eq!(clean(name.as_bytes()), path.as_bytes(), "{name}");
        }
    }

    #[test]
    fn parents_and_link_targets_come_first() {
        let names = ["x", "a/b/link -> t/file", "t/file", "a/b/", "./", "a/", "t/", "y"];
        let (order, missing) = first(&names, &["/a/b/link", "no", "x"]);
        assert_eq!(order, ["./", "a/", "a/b/", "t/", "t/file", "a/b/link -> t/file", "x"]);
        assert_eq!(missing, ["no"]);
        assert_eq!(first(&names, &[]).0, [""; 0]);
        assert_eq!(first(&names, &["x", "x", "./x"]).0, ["./", "x"]);
        // A parent without an entry of its own is no reason to leave a file behind.
        assert_eq!(first(&["p/q/file", "r"], &["p/q/file"]).0, ["p/q/file"]);
    }

    #[test]
    fn globs_keep_the_order() {
        let names = ["lib/", "lib/z.so", "lib/a.so", "bin/", "bin/z"];
        assert_eq!(first(&names, &["lib/*.so"]).0, names[..3]);
        assert_eq!(first(&names, &["**/z*", "lib/**"]).0, ["lib/", "lib/z.so", "bin/", "bin/z", "lib/a.so"]);
        assert_eq!(first(&names, &["*.so"]).1, ["*.so"]);
    }

    #[test]
    fn duplicates_move_together() {
        assert_eq!(first(&["a", "b", "a", "c", "./a"], &["a"]).0, ["a", "a", "./a"]);
    }

    #[test]
    fn circles_and_long_chains_end() {
        assert_eq!(first(&["a -> b", "b -> a", "c -> c"], &["a", "c"]).0, ["b -> a", "a -> b", "c -> c"]);
        let chain: Vec<String> = (0..20_000).map(|n| format!("n{n} -> n{}", n + 1)).collect();
        let names: Vec<&str> = chain.iter().map(String::as_str).collect();
        let (order, _) = first(&names, &["n0"]);
        assert_eq!((order.len(), &*order[0]), (20_000, "n19999 -> n20000"));
        let deep = "d/".repeat(2000);
        assert_eq!(first(&[&deep], &[&deep]).0, [&*deep]);
    }

    #[test]
    fn ordering_twice_changes_nothing() {
        let names = ["b/x", "l -> t", "a", "b/", "t", "c -> b/x", "a", "z"];
        for patterns in [&["**"][..], &["*"], &["c", "*"], &["z", "**/x", "l"]] {
            let (once, _) = first(&names, patterns);
            let rest: Vec<_> = names.iter().filter(|name| !once.iter().any(|moved| moved == *name)).collect();
            let again: Vec<&str> = once.iter().map(String::as_str).chain(rest.into_iter().copied()).collect();
            assert_eq!(first(&again, patterns).0, once);
        }
    }

    #[test]
    fn ordering_what_was_ordered_changes_nothing() {
        // The target of a link of another directory comes last, and is wanted itself.
        let mut names = vec!["n6", "n9", "n6/b -> n12", "n9/n13 -> n6/b", "n12", "c -> d", "d -> c"];
        let expected = ["n12", "n9", "n6", "n6/b -> n12", "n9/n13 -> n6/b"];
        for _ in 0..3 {
            let (order, _) = first(&names, &["**/n1*"]);
            assert_eq!(order, expected);
            let rest: Vec<&str> =
                names.iter().copied().filter(|name| !order.iter().any(|o| o == name)).collect();
            let order: Vec<&str> =
                order.iter().map(|o| *names.iter().find(|name| *name == o).unwrap()).collect();
            names = [order, rest].concat();
        }
    }
}
