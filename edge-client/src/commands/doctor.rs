//! `doctor`: prints the checks.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use crate::ServerArgs;

pub async fn run(server: &ServerArgs, bundle: &Path, deadline: Duration, json: bool) -> Result<bool> {
    let checks = edge_client::doctor::run(bundle, &super::endpoints(server)?, deadline).await;
    for check in &checks {
        if json || !std::io::stdout().is_terminal() {
            writeln!(std::io::stdout(), "{}", serde_json::to_string(check)?)?;
        } else {
            writeln!(std::io::stdout(), "{} {:12} {}", if check.ok { "ok  " } else { "FAIL" }, check.name, check.detail)?;
        }
    }
    Ok(checks.iter().all(|c| c.ok))
}
