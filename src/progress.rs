//! What a pull or a conversion shows while it runs, on standard error: a bar for each layer on a terminal, a line for
//! each change of a layer's state elsewhere, nothing when only the result is wanted.
//!
//! Knows layers only by a name and a size; decides nothing.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Where progress goes.
#[derive(Debug)]
pub enum Progress {
    /// Bars that are redrawn in place.
    Bars(MultiProgress),
    /// A line for each change.
    Lines,
    /// Nothing.
    Silent,
}

impl Progress {
    /// Bars if standard error is a terminal, else lines.
    pub fn detect() -> Self {
        if std::io::stderr().is_terminal() { Self::Bars(MultiProgress::new()) } else { Self::Lines }
    }

    /// A layer that has to be dealt with: a short name and the size of its blob in bytes.
    pub fn layer(&self, name: &str, size: u64) -> LayerProgress {
        match self {
            Self::Bars(bars) => {
                let bar = bars.add(ProgressBar::new(size));
                bar.set_style(style(WAITING));
                bar.set_prefix(name.to_owned());
                bar.set_message("waiting");
                LayerProgress::Bar { bar, total: None }
            }
            Self::Lines => LayerProgress::Lines(name.to_owned()),
            Self::Silent => LayerProgress::Silent,
        }
    }

    /// A bar over all layers, which together have `size` bytes; its progress is that of its parts.
    pub fn total(&self, size: u64) -> Total {
        Total(match self {
            Self::Bars(bars) => {
                let bar = bars.add(ProgressBar::new(size));
                bar.set_style(style(TOTAL));
                Some(bar)
            }
            Self::Lines | Self::Silent => None,
        })
    }

    /// As [`layer`](Progress::layer), for a layer that is part of a total.
    pub fn part(&self, total: &Total, name: &str, size: u64) -> LayerProgress {
        match self.layer(name, size) {
            LayerProgress::Bar { bar, .. } => LayerProgress::Bar { bar, total: total.0.clone() },
            other => other,
        }
    }

    /// Removes the bars, so that what is printed next stands alone.
    pub fn clear(&self) {
        if let Self::Bars(bars) = self {
            // A terminal that is gone needs no clearing.
            let _ = bars.clear();
        }
    }
}

/// The progress of all layers together.
#[derive(Debug)]
pub struct Total(Option<ProgressBar>);

const TOTAL: &str = "total         {bar:30}  {bytes}/{total_bytes}  {binary_bytes_per_sec}  {eta} left";
const WAITING: &str = "{prefix}  {msg}";
const WORKING: &str = "{prefix}  {spinner} {msg}";
const LOADING: &str = "{prefix}  {bar:30}  {bytes}/{total_bytes}  {binary_bytes_per_sec}  {msg}";

/// The templates are constants; one that does not parse is shown as the default look rather than failing a pull.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// One layer's progress.
#[derive(Debug, Clone)]
pub enum LayerProgress {
    /// A bar, and one that shows the progress of several.
    Bar {
        /// The layer's.
        bar: ProgressBar,
        /// That of all.
        total: Option<ProgressBar>,
    },
    /// Lines beginning with this name.
    Lines(String),
    /// Nothing.
    Silent,
}

impl LayerProgress {
    /// The layer is worked on, without a measure of how far it is.
    pub fn doing(&self, what: &'static str) {
        match self {
            Self::Bar { bar, .. } => {
                bar.set_style(style(WORKING));
                bar.enable_steady_tick(Duration::from_millis(120));
                bar.set_message(what);
            }
            Self::Lines(name) => line(name, what),
            Self::Silent => {}
        }
    }

    /// The bytes of the layer's blob are passing, and `present` of them have.
    pub fn started(&self, what: &'static str, present: u64) {
        match self {
            Self::Bar { bar, .. } => {
                bar.disable_steady_tick();
                bar.set_style(style(LOADING));
                bar.set_message(what);
                bar.set_position(present);
                bar.reset_eta();
            }
            Self::Lines(name) => line(name, what),
            Self::Silent => {}
        }
    }

    /// `bytes` more of the blob have passed.
    pub fn advanced(&self, bytes: u64) {
        if let Self::Bar { bar, total } = self {
            bar.inc(bytes);
            if let Some(total) = total {
                total.inc(bytes);
            }
        }
    }

    /// The layer is dealt with.
    pub fn done(&self, how: &str) {
        match self {
            Self::Bar { bar, total } => {
                if let Some(total) = total {
                    // Bytes that did not have to pass.
                    total.inc(bar.length().unwrap_or(0).saturating_sub(bar.position()));
                }
                bar.set_style(style(WAITING));
                bar.finish_with_message(how.to_owned());
            }
            Self::Lines(name) => line(name, how),
            Self::Silent => {}
        }
    }
}

/// Progress that cannot be written is not worth failing a pull for.
fn line(name: &str, what: &str) {
    let _ = writeln!(std::io::stderr(), "{name}  {what}");
}

/// A size in bytes for people.
pub fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}
