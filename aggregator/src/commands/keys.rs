//! `aggregator keys`.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use aggregator::keys;
use anyhow::{Context, Result};
use clap::Subcommand;
use isthmus_secagg::report::Credential;

const DAY: u64 = 24 * 3600;

#[derive(Subcommand)]
pub enum Args {
    /// A party's keys. `public.toml` in the folder goes to the other parties, the rest stays.
    Party {
        /// 0, 1 or 2.
        #[arg(long, value_parser = clap::value_parser!(u8).range(0..3))]
        party: u8,
        /// Where other parties reach it, for example https://agg1.example.org:50071.
        #[arg(long)]
        url: String,
        /// Name or address that clients use; may be given several times.
        #[arg(long, default_value = "localhost")]
        host: Vec<String>,
        /// Folder; its files must not exist yet.
        #[arg(long)]
        out: PathBuf,
    },
    /// The key that enrols clients. Prints its public half, which goes into every party's configuration.
    Authority {
        /// File; must not exist yet.
        #[arg(long)]
        out: PathBuf,
    },
    /// A client's key. Prints its public half, which the authority signs.
    Client {
        /// File; must not exist yet.
        #[arg(long)]
        out: PathBuf,
    },
    /// Enrols a client: signs its public key.
    Enrol {
        /// The authority's key.
        #[arg(long)]
        authority: PathBuf,
        /// The client's public key, 64 hexadecimal digits.
        #[arg(long)]
        client: String,
        /// How long the credential is valid.
        #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u64).range(1..36500))]
        days: u64,
        /// File for the credential.
        #[arg(long)]
        out: PathBuf,
    },
    /// An operator's token. Prints its SHA-256, which goes into party 0's configuration.
    Operator {
        /// File; must not exist yet.
        #[arg(long)]
        out: PathBuf,
    },
}

pub fn run(args: Args) -> Result<()> {
    match args {
        Args::Party { party, url, host, out } => {
            keys::make_party(&out, party, &url, &host)?;
            println!("{}", out.join(keys::PUBLIC).display());
        }
        Args::Authority { out } | Args::Client { out } => println!("{}", hex::encode(keys::make_signer(&out)?)),
        Args::Enrol { authority, client, days, out } => {
            let client = keys::from_hex("--client", &client)?;
            let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?.as_secs();
            let credential = Credential::issue(&keys::open_signer(&authority)?, client, now + days * DAY);
            keys::write_credential(&out, &credential)?;
        }
        Args::Operator { out } => println!("{}", keys::make_token(&out)?),
    }
    Ok(())
}
