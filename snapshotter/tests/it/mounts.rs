//! Mounts as containerd makes them, in a mount namespace of the test's own.

use std::{
    ffi::CString,
    io::Write,
    path::{Path, PathBuf},
};

use containerd_snapshots::api::types::Mount;
use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount},
    thread::{UnshareFlags, unshare_unsafe},
};

/// Runs a test that mounts. Its mounts are seen by nobody else and end with it, however it ends.
///
/// Without root the test is skipped, loudly; where CI is set it fails instead.
pub fn with_mounts(test: impl AsyncFnOnce() + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "mounting needs root, and CI may not skip it");
        // Not a print macro, whose output the harness keeps to itself.
        std::io::stderr().write_all(b"SKIPPED: mounting needs root\n").unwrap();
        return;
    }
    let thread = std::thread::spawn(move || {
        // SAFETY: the namespace and the working directory it unshares belong to this thread and to those it
        // starts from here on, the runtime's; no file descriptor table is unshared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A directory with mounts on it, unmounted when dropped.
#[derive(Debug)]
pub struct Mounted(PathBuf);

impl Mounted {
    /// Mounts all of them on the directory, which is created if need be.
    pub fn all(mounts: &[Mount], target: &Path) -> Mounted {
        std::fs::create_dir_all(target).unwrap();
        assert!(!mounts.is_empty());
        for one in mounts {
            mount_one(one, target);
        }
        Mounted(target.to_owned())
    }
}

impl std::ops::Deref for Mounted {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount(&self.0, UnmountFlags::empty()).unwrap();
    }
}

/// The page that mount(2) takes options in, and what containerd keeps of it in reserve.
const PAGE: usize = 4096;
const RESERVE: usize = 512;

fn mount_one(one: &Mount, target: &Path) {
    let (flags, data) = parse(&one.options);
    let size: usize = one.options.iter().map(String::len).sum();
    let (dir, data) =
        if one.r#type == "overlay" && size >= PAGE - RESERVE { compact(data) } else { (None, data) };
    let data = data.join(",");
    assert!(data.len() < PAGE, "{} bytes of options", data.len());
    let data = CString::new(data).unwrap();
    let before = std::env::current_dir().unwrap();
    if let Some(dir) = &dir {
        std::env::set_current_dir(dir).unwrap();
    }
    let result = mount(one.source.as_str(), target, one.r#type.as_str(), flags, Some(data.as_c_str()));
    std::env::set_current_dir(before).unwrap();
    result.unwrap_or_else(|error| panic!("mounting {one:?} on {}: {error}", target.display()));
    if flags.contains(MountFlags::BIND | MountFlags::RDONLY) {
        // A bind mount takes its flags from a second call only.
        mount_remount(target, flags, "").unwrap();
    }
}

fn parse(options: &[String]) -> (MountFlags, Vec<String>) {
    let mut flags = MountFlags::empty();
    let mut data = vec![];
    for option in options {
        match option.as_str() {
            "rw" => flags.remove(MountFlags::RDONLY),
            "ro" => flags.insert(MountFlags::RDONLY),
            "bind" => flags.insert(MountFlags::BIND),
            "rbind" => flags.insert(MountFlags::BIND | MountFlags::REC),
            _ => data.push(option.clone()),
        }
    }
    (flags, data)
}

/// Names the lower directories from the parent they share.
fn compact(mut options: Vec<String>) -> (Option<PathBuf>, Vec<String>) {
    let at = options.iter().position(|option| option.starts_with("lowerdir=")).unwrap();
    let lower: Vec<String> = options[at]["lowerdir=".len()..].split(':').map(str::to_owned).collect();
    let first = lower.iter().min().unwrap();
    let last = lower.iter().max().unwrap();
    let common: String =
        first.chars().zip(last.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a).collect();
    let parent = Path::new(&common).parent().unwrap().to_owned();
    let prefix = format!("{}/", parent.display());
    let short: Vec<&str> = lower.iter().map(|dir| dir.strip_prefix(&prefix).unwrap()).collect();
    options[at] = format!("lowerdir={}", short.join(":"));
    (Some(parent), options)
}
