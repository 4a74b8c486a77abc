//! `lazurite login-check`: with which login the registry of an image is asked, where that login comes from, and whether it is
//! let in. Prints no secret.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use registry::{Login, LoginKind, Reference, Registry};
use serde_json::json;
use tokio::time::Instant;

use crate::cli::LoginCheckArgs;
use crate::config::Config;
use crate::login;

/// A registry that is there answers within this.
const LIMIT: Duration = Duration::from_secs(60);

/// Looks logins up as the daemon does, asks for the image's manifest, and says what came of it. The exit code says whether the
/// manifest could be had.
///
/// # Errors
///
/// The reference or the settings cannot be used.
pub async fn run(args: &LoginCheckArgs, config: &Config) -> anyhow::Result<ExitCode> {
    let reference: Reference = args.reference.parse()?;
    let (settings, _login) = login::settings(config, &args.registry, Some(reference.host()))?;
    let registry = Registry::new(settings)?;
    let logins = registry.logins(&reference).await?;
    let answer = registry.manifest(&reference, None, Instant::now() + LIMIT).await;
    let mut out = std::io::stdout();
    match args.json {
        true => {
            let logins = logins.iter().map(|login| {
                json!({ "host": login.host.as_str(), "login": kind(login.kind), "from": login.tried })
            });
            let answer = match &answer {
                Ok(manifest) => json!({ "ok": true, "digest": manifest.digest }),
                Err(error) => json!({ "ok": false, "reason": error.reason(), "error": error.to_string() }),
            };
            let report = json!({
                "reference": reference.to_string(),
                "hosts": logins.collect::<Vec<_>>(),
                "answer": answer,
            });
            writeln!(out, "{}", serde_json::to_string_pretty(&report)?)
        }
        false => out.write_all(text(&logins, &answer).as_bytes()),
    }
    .context("writing the result")?;
    Ok(if answer.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn kind(kind: LoginKind) -> &'static str {
    match kind {
        LoginKind::Anonymous => "none",
        LoginKind::Password => "user and password",
        LoginKind::Token => "identity token",
    }
}

fn text(logins: &[Login], answer: &Result<registry::ManifestBytes, registry::Error>) -> String {
    let mut text = String::new();
    for Login { host, kind: found, tried } in logins {
        text += &format!("{host}: {} ({tried})\n", kind(*found));
    }
    text + &match answer {
        Ok(manifest) => format!("let in: the manifest is {}\n", manifest.digest),
        Err(error) => format!("not let in: {error} [{}]\n", error.reason()),
    }
}
