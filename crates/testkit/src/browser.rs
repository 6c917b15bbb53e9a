//! Pages as a browser shows them.

use std::process::{Command, Stdio};

/// Most seconds for a page.
const LIMIT: &str = "90";
const NAMES: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];

/// The document at `url` after its scripts have run for three seconds, as headless Chromium has it.
/// Without Chromium it says so ([`crate::skipped`]).
///
/// # Panics
/// If the browser fails, or a script of the page does.
pub fn shown(url: &str) -> Option<String> {
    let found = NAMES.iter().find(|name| Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok());
    let Some(browser) = found else {
        crate::skipped("the page in a browser: `apt-get install chromium`");
        return None;
    };
    let profile = tempfile::tempdir().expect("a folder for the browser");
    let mut command = Command::new("timeout");
    command.arg(LIMIT).arg(browser).args([
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--enable-logging=stderr",
    ]);
    command.arg(format!("--user-data-dir={}", profile.path().display())).args(["--virtual-time-budget=3000", "--dump-dom", url]);
    let output = command.stdin(Stdio::null()).output().expect("the browser starts");
    let (document, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{browser} {url}: {log}");
    let wrong: Vec<&str> = log.lines().filter(|l| l.contains("CONSOLE") && (l.contains("Uncaught") || l.contains("Refused"))).collect();
    assert!(wrong.is_empty(), "{url}: {wrong:?}");
    Some(document.into_owned())
}
