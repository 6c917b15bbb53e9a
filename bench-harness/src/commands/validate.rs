//! `validate`: its options, and what is printed.

use anyhow::{Result, ensure};
use bench_harness::validate;
use clap::Args;

#[derive(Args)]
pub struct ValidateArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub async fn run(args: &ValidateArgs) -> Result<()> {
    let found = validate::run(|c| {
        let mark = if c.ok { "ok " } else { "BAD" };
        eprintln!("{mark} {}: {:.2} {}, ideal {:.2}, allowed {}", c.name, c.measured, c.unit, c.ideal, c.allowed);
    })
    .await?;
    if args.json {
        println!("{}", serde_json::to_string(&found)?);
    }
    for reason in &found.left_out {
        eprintln!("left out: {reason}");
    }
    let bad = found.checks.iter().filter(|c| !c.ok).count();
    ensure!(bad == 0, "{bad} of {} checks failed; a busy machine can be the reason", found.checks.len());
    ensure!(!found.checks.is_empty(), "nothing could be checked");
    Ok(())
}
