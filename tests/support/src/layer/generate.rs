//! Random layers that depend only on a seed.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::{Body, Entry, Layer};

/// A small deterministic generator (xorshift64*), the same on every machine. Not for secrets.
#[derive(Clone, Debug)]
pub struct Xorshift(u64);

impl Xorshift {
    /// A generator for `seed`; any value will do.
    pub fn new(seed: u64) -> Xorshift {
        // xorshift needs a state that is not 0, and near seeds should not start alike
        let mixed = (seed.wrapping_add(1)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut new = Xorshift(mixed.max(1));
        new.next_u64();
        new
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`, which must not be 0.
    pub fn below(&mut self, end: u64) -> u64 {
        (self.next_u64() >> 11) % end
    }

    /// True in `percent` of 100 calls.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of `choices`.
    pub fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len() as u64) as usize]
    }

    /// `length` bytes that do not compress.
    pub fn bytes(&mut self, length: usize) -> Bytes {
        let mut out = Vec::with_capacity(length + 8);
        while out.len() < length {
            out.extend_from_slice(&self.next_u64().to_le_bytes());
        }
        out.truncate(length);
        out.into()
    }
}

/// A layer of about `size` entries: nested directories (some implicit, some listed after their contents), files of 0
/// to 300 KiB, symbolic and hard links (also before their target), devices, pipes, whiteouts, opaque marks, extended
/// attributes, odd modes, owners and times, long and non-ASCII names, entries listed twice. Names are valid UTF-8 and
/// times are whole seconds, so that a TOC can tell the tree exactly.
pub fn random(seed: u64, size: usize) -> Layer {
    let mut state = Growth {
        random: Xorshift::new(seed),
        layer: Layer::new(),
        dirs: vec![String::new()],
        files: Vec::new(),
        pinned: BTreeSet::new(),
        promised: Vec::new(),
        late_dirs: Vec::new(),
        count: 0,
    };
    if state.random.chance(50) {
        let entry = Entry::new("./", Body::Directory);
        state.push(entry);
    }
    while state.layer.entries.len() < size {
        state.grow();
    }
    for path in std::mem::take(&mut state.promised) {
        let data = state.data();
        state.push(Entry::new(path, Body::Regular(data)));
    }
    for path in std::mem::take(&mut state.late_dirs) {
        state.push(Entry::new(path + "/", Body::Directory));
    }
    state.layer
}

struct Growth {
    random: Xorshift,
    layer: Layer,
    dirs: Vec<String>,
    files: Vec<String>,
    /// Targets of hard links: listing them twice would have no defined meaning.
    pinned: BTreeSet<String>,
    /// Targets of hard links already written, to be written at the end.
    promised: Vec<String>,
    late_dirs: Vec<String>,
    count: usize,
}

impl Growth {
    fn grow(&mut self) {
        let path = self.new_path();
        match self.random.below(100) {
            0..20 => self.add_dir(path),
            20..58 => {
                let data = self.data();
                self.files.push(path.clone());
                self.push(Entry::new(path, Body::Regular(data)));
            }
            58..66 => {
                let mut target = self.random.pick(&["..", ".", "/bin/sh", "naïve/☃", "missing"]).to_string();
                if self.random.chance(20) {
                    target = super::long_path(101 + self.random.below(200) as usize);
                }
                self.push(Entry::new(path, Body::Symlink(target.into_bytes())));
            }
            66..76 => self.add_link(path),
            76..80 => self.push(Entry::new(path, Body::Fifo)),
            80..84 => {
                // 0:0 would be a whiteout
                let (major, minor) = (1 + self.random.below(300) as u32, self.random.below(70_000) as u32);
                let body =
                    if self.random.chance(50) { Body::Char(major, minor) } else { Body::Block(major, minor) };
                self.push(Entry::new(path, body));
            }
            84..89 => self.layer = std::mem::take(&mut self.layer).whiteout(path),
            89..92 => {
                let dir = self.random.pick(&self.dirs).clone();
                self.layer = std::mem::take(&mut self.layer).opaque(dir);
            }
            _ => {
                let again = self.files.iter().find(|file| !self.pinned.contains(*file)).cloned();
                if let Some(again) = again {
                    let data = self.data();
                    self.push(Entry::new(again, Body::Regular(data)));
                }
            }
        }
    }

    fn add_dir(&mut self, path: String) {
        self.dirs.push(path.clone());
        match self.random.below(10) {
            0 => {} // only its contents will tell of it
            1 => self.late_dirs.push(path),
            _ => self.push(Entry::new(path + "/", Body::Directory)),
        }
    }

    fn add_link(&mut self, path: String) {
        let later = self.random.chance(30) || self.files.is_empty();
        let target = if later { self.new_path() } else { self.random.pick(&self.files).clone() };
        if later {
            self.promised.push(target.clone());
        }
        self.pinned.insert(target.clone());
        self.layer = std::mem::take(&mut self.layer).hardlink(path.clone(), target);
        if self.random.chance(30) {
            let second = self.new_path();
            self.layer = std::mem::take(&mut self.layer).hardlink(second, path); // a link to a link
        }
    }

    fn new_path(&mut self) -> String {
        self.count += 1;
        let count = self.count;
        let name = match self.random.below(20) {
            0 => format!("naïve ☃ {count}"),
            1 => format!("{count}-{}", "x".repeat(120)),
            2 => format!(".hidden {count} \"quoted\" <&>\\"),
            3 => format!("new\nline {count}"),
            _ => format!("n{count}"),
        };
        let dir = self.random.pick(&self.dirs).clone();
        if dir.is_empty() || dir.len() > 2000 { name } else { format!("{dir}/{name}") }
    }

    fn data(&mut self) -> Bytes {
        let length = match self.random.below(10) {
            0 => 0,
            1..5 => self.random.below(700),
            5 => 512 * self.random.below(9),
            6..9 => self.random.below(40_000),
            _ => self.random.below(300 * 1024),
        } as usize;
        match self.random.below(3) {
            0 => self.random.bytes(length),
            1 => vec![0; length].into(),
            _ => {
                let word = format!("line {} of some text\n", self.random.below(1000));
                word.bytes().cycle().take(length).collect()
            }
        }
    }

    fn push(&mut self, mut entry: Entry) {
        let random = &mut self.random;
        let modes: &[u32] = match entry.body {
            Body::Directory => &[0o755, 0o755, 0o700, 0o1777, 0o2755],
            Body::Symlink(_) => &[0o777],
            _ => &[0o644, 0o644, 0o755, 0o600, 0o4755, 0o2711, 0o6755, 0o1644, 0o444, 0],
        };
        entry.mode = *random.pick(modes);
        let owners = [(0, 0), (0, 0), (1000, 1000), (65_534, 65_534), (3_000_000, 5), (33, 2_200_000)];
        (entry.uid, entry.gid) = *random.pick(&owners);
        if entry.uid == 1000 && random.chance(50) {
            (entry.user, entry.group) = ("user".to_owned(), "group".to_owned());
        }
        let now = 1_500_000_000 + random.below(200_000_000) as i64;
        entry.mtime = (*random.pick(&[now, now, now, 0, 1, -86_400, 4_102_444_800]), 0);
        // user.* is for files and directories only, security.capability for files only
        if matches!(entry.body, Body::Directory | Body::Regular(_)) && random.chance(20) {
            for number in 0..1 + random.below(3) {
                let key = format!("user.key{number}");
                entry.xattrs.insert(key.into_bytes(), random.bytes(number as usize * 40).to_vec());
            }
        }
        if random.chance(5) {
            entry.xattrs.insert(b"trusted.mark".to_vec(), b"\0\xff=\n".to_vec());
        }
        if matches!(entry.body, Body::Regular(_)) && random.chance(5) {
            // revision 2, effective, CAP_NET_RAW: struct vfs_cap_data of linux/capability.h
            let mut value = vec![0; 20];
            value[..6].copy_from_slice(&[1, 0, 0, 2, 0, 0x20]);
            entry.xattrs.insert(b"security.capability".to_vec(), value);
        }
        self.layer.entries.push(entry);
    }
}
