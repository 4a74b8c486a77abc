//! `lazurite login-check`: with which login the registry of an image is asked, what every source of logins says, and whether
//! the login is let in. Prints no secret.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use registry::{Login, LoginAnswer, LoginKind, Reference, Registry};
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
    let (mut settings, _login) = login::settings(config, &args.registry, Some(reference.host()))?;
    // What pulls brought along only the daemon has, in its memory.
    let pulls = settings.pull_credentials.take().is_some();
    let registry = Registry::new(settings)?;
    let mut logins = registry.logins(&reference).await?;
    if pulls {
        logins.iter_mut().for_each(|login| login.answers.insert(0, unseen_pulls()));
    }
    let answer = registry.manifest(&reference, None, Instant::now() + LIMIT).await;
    let mut out = std::io::stdout();
    match args.json {
        true => {
            let logins = logins.iter().map(|login| {
                let sources = login.answers.iter().map(|LoginAnswer { source, kind: found, said }| {
                    json!({ "source": source, "login": kind(*found), "said": said })
                });
                json!({
                    "host": login.host.as_str(),
                    "login": kind(login.kind),
                    "from": login.tried,
                    "sources": sources.collect::<Vec<_>>(),
                })
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
        LoginKind::AccessToken => "access token",
    }
}

/// What stands for the source that cannot be asked from here.
fn unseen_pulls() -> LoginAnswer {
    let said = "in the daemon's memory only, not seen from here".to_owned();
    LoginAnswer { source: "CRI pulls".to_owned(), kind: LoginKind::Anonymous, said }
}

fn text(logins: &[Login], answer: &Result<registry::ManifestBytes, registry::Error>) -> String {
    let mut text = String::new();
    for Login { host, kind: found, answers, .. } in logins {
        text += &format!("{host}: {}\n", kind(*found));
        for LoginAnswer { source, kind: found, said } in answers {
            text += &format!("  {source}: {} ({said})\n", kind(*found));
        }
    }
    text + &match answer {
        Ok(manifest) => format!("let in: the manifest is {}\n", manifest.digest),
        Err(error) => format!("not let in: {error} [{}]\n", error.reason()),
    }
}
