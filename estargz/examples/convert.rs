//! Converts a layer file and says what it cost: `convert IN OUT [--level N] [--threads N] [--first PATH]...`

use std::error::Error;
use std::fs::File;
use std::time::Instant;

use estargz::writer::{Level, Options, Pattern, convert};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: convert IN OUT [--level N] [--threads N] [--first PATH]...";
    let (input, output) = (arguments.next().ok_or(usage)?, arguments.next().ok_or(usage)?);
    let mut options = Options::default();
    while let Some(flag) = arguments.next() {
        let value = arguments.next().ok_or(usage)?;
        match &*flag {
            "--level" => options.level = Level::new(value.parse()?)?,
            "--threads" => options.threads = value.parse()?,
            "--first" => options.prioritized.push(Pattern::path(value)),
            _ => return Err(usage.into()),
        }
    }
    let spool = || {
        let path = format!("{output}.spool");
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        std::fs::remove_file(path)?;
        Ok(file)
    };
    let start = Instant::now();
    let summary = convert(File::open(input)?, File::create(&output)?, &options, spool, &())?;
    let seconds = start.elapsed().as_secs_f64();
    println!("{summary:#?}");
    println!("{seconds:.2} s, {:.1} MB/s of tar", summary.tar_size as f64 / seconds / 1e6);
    // Linux only: the largest resident set.
    if let Ok(status) = std::fs::read_to_string("/proc/self/status") {
        status.lines().filter(|line| line.starts_with("VmHWM")).for_each(|line| println!("{line}"));
    }
    Ok(())
}
