//! Memory does not grow with the layer.

use std::io::{self, Cursor, Read};
use std::process::Command;

use super::*;

/// Set in the process that is measured.
const CHILD: &str = "ESTARGZ_MEMORY_CHILD";

/// Bytes of a file of the layer, and how many there are: 384 MiB.
const FILE: usize = 8 << 20;
const FILES: usize = 48;

/// A process of its own converts them, because other tests use memory too, and says how much it held at most.
#[test]
fn a_large_layer_takes_little_memory() {
    if std::env::var_os(CHILD).is_some() {
        return child();
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "writer::memory::a_large_layer_takes_little_memory", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let peak = text.split_once("VmHWM:").and_then(|(_, rest)| rest.split_whitespace().next());
    let peak: u64 = peak.unwrap_or_else(|| panic!("{text}")).parse().unwrap();
    // Two chunks for each of two threads in both forms, one being cut, buffers, the test program itself.
    assert!(peak < 80 << 10, "{peak} KiB");
}

fn child() {
    let layer = Layer::new().file("x", vec![7; FILE]).tar();
    let (file, end) = layer.split_at(layer.len() - 1024);
    let mut input: Box<dyn Read> = Box::new(end);
    for _ in 0..FILES {
        input = Box::new(Cursor::new(file).chain(input));
    }
    let summary = convert(input, io::sink(), &options(), || Ok(Cursor::new(vec![])), &()).unwrap();
    assert_eq!((summary.entries, summary.chunks), (FILES as u64, 2 * FILES as u64));
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    println!("{}", status.lines().find(|line| line.starts_with("VmHWM:")).unwrap());
}
