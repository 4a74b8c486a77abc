//! `lazurite check`: says whether this host and its containerd or podman are set up for lazy pulling, and how to fix what is
//! not.
//!
//! Facts are gathered at the edge ([`facts`]: files, sockets, one run of `containerd config dump` or `podman --version`);
//! what they mean is decided by pure functions ([`host`], [`setup`], [`podman`]), which tests feed with the configurations
//! of every version and with each known trap. Changes nothing.

mod facts;
mod host;
mod podman;
mod setup;

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

use serde::Serialize;

use crate::cli::CheckArgs;
use crate::config::Config;

/// Gathers, judges and prints. The exit code says whether something failed.
///
/// # Errors
///
/// The findings cannot be printed.
pub async fn run(args: CheckArgs, config: Config) -> anyhow::Result<ExitCode> {
    let mut findings = facts::kernel();
    if args.podman {
        findings.extend(facts::registries(&config));
        findings.extend(facts::podman().await);
    } else {
        findings.extend(facts::host(&config).await);
        findings.extend(facts::containerd(&args, &config).await);
    }

    let mut out = std::io::stdout();
    match args.json {
        true => writeln!(out, "{}", serde_json::to_string_pretty(&findings)?)?,
        false => write!(out, "{}", Findings(&findings))?,
    }
    Ok(if usable(&findings) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whether nothing is worse than a warning.
fn usable(findings: &[Finding]) -> bool {
    findings.iter().all(|finding| finding.verdict != Verdict::Fail)
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub subject: &'static str,
    /// How it is.
    pub verdict: Verdict,
    /// What was found.
    pub detail: String,
    /// What to do, ready to paste where that is possible.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Works, with a drawback.
    Warn,
    /// Lazy pulling does not work so.
    Fail,
}

impl Finding {
    fn ok(subject: &'static str, detail: impl Into<String>) -> Self {
        Self { subject, verdict: Verdict::Ok, detail: detail.into(), fix: None }
    }

    fn warn(subject: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { subject, verdict: Verdict::Warn, detail: detail.into(), fix: Some(fix.into()) }
    }

    fn fail(subject: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { subject, verdict: Verdict::Fail, detail: detail.into(), fix: Some(fix.into()) }
    }
}

/// The findings as lines for people.
struct Findings<'a>(&'a [Finding]);

impl fmt::Display for Findings<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.0.iter().map(|finding| finding.subject.len()).max().unwrap_or(0);
        for Finding { subject, verdict, detail, fix } in self.0 {
            let word = match verdict {
                Verdict::Ok => "ok  ",
                Verdict::Warn => "warn",
                Verdict::Fail => "FAIL",
            };
            writeln!(f, "{word}  {subject:width$}  {detail}")?;
            for line in fix.iter().flat_map(|fix| fix.lines()) {
                writeln!(f, "{}", format!("        {line}").trim_end())?;
            }
        }
        let count = |verdict| self.0.iter().filter(|finding| finding.verdict == verdict).count();
        writeln!(f, "{} failed, {} with warnings", count(Verdict::Fail), count(Verdict::Warn))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_aligned_and_fixes_indented() {
        let findings = [
            Finding::ok("kernel", "6.12"),
            Finding::fail("containerd config", "nothing", "add:\n\n[a]\n  b = 1"),
            Finding::warn("disk", "full", "empty it"),
        ];
        let expected = "\
ok    kernel             6.12
FAIL  containerd config  nothing
        add:

        [a]
          b = 1
warn  disk               full
        empty it
1 failed, 1 with warnings
";
        assert_eq!(Findings(&findings).to_string(), expected);
        let json = serde_json::to_value(&findings).unwrap();
        assert_eq!(json[0], serde_json::json!({ "subject": "kernel", "verdict": "ok", "detail": "6.12" }));
        assert_eq!(json[1]["verdict"], "fail");
    }
}
