//! Checks a set-up from the client's side and says what is wrong.

use std::path::Path;
use std::time::{Duration, Instant};

use isthmus_codec::golden;
use isthmus_pixels::Rgb;

use crate::{Client, ClientError, Encoder, Endpoint, InferOptions, Payload, open_bundle};

/// Share of golden symbols that this machine's engine must reproduce.
pub const SYMBOL_PARITY: f64 = 0.999;
const ROUND_TRIPS: usize = 5;

/// One check.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Check {
    /// What was checked.
    pub name: &'static str,
    /// Whether it passed.
    pub ok: bool,
    /// What was found, or what is wrong and what to do.
    pub detail: String,
}

fn check(name: &'static str, result: Result<String, String>) -> Check {
    let ok = result.is_ok();
    Check { name, ok, detail: result.unwrap_or_else(|e| e) }
}

/// Runs all checks; later ones are left out when an earlier one makes them pointless.
pub async fn run(bundle: &Path, endpoints: &[Endpoint], deadline: Duration) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut encoder = match open_bundle(bundle).and_then(|b| Encoder::new(b, 1)) {
        Ok(encoder) => {
            let b = encoder.bundle();
            let text = format!("{} {}, {} quality levels, hash {}", b.manifest.name, b.manifest.version, b.levels(), b.hash);
            checks.push(check("bundle", Ok(text)));
            Some(encoder)
        }
        Err(e) => {
            checks.push(check("bundle", Err(e.to_string())));
            None
        }
    };
    if let Some(encoder) = &mut encoder {
        checks.push(check("encoder", parity(encoder)));
    }
    let mut reached = Vec::new();
    for endpoint in endpoints {
        let name = if endpoints.len() == 1 { String::new() } else { format!("{}: ", endpoint.url()) };
        checks.push(check(
            "connection",
            match Client::connect(endpoint).await {
                Ok(client) => {
                    reached.push((name.clone(), client));
                    Ok(format!("{name}connected"))
                }
                Err(e) => {
                    let text = e.to_string();
                    let hint =
                        if text.contains("is the server running") { "" } else { "; is the server running, and is the address right?" };
                    Err(format!("{text}{hint}"))
                }
            },
        ));
    }
    for (name, client) in &mut reached {
        server(&mut checks, name, client, encoder.as_mut(), deadline).await;
    }
    checks
}

/// What there is to check of one server that was reached.
async fn server(checks: &mut Vec<Check>, name: &str, client: &mut Client, encoder: Option<&mut Encoder>, deadline: Duration) {
    let described = client.describe(None, deadline).await;
    let models = described.as_ref().map(|d| d.models.iter().map(|m| format!("{} on {}", m.name, m.device)).collect::<Vec<_>>().join(", "));
    checks.push(check("server", models.map(|m| format!("{name}answers; models: {m}")).map_err(|e| format!("{name}{e}"))));
    if let (Some(encoder), Ok(_)) = (encoder, described) {
        let hash = encoder.bundle().hash;
        let known = client.describe(Some(&hash), deadline).await;
        let known = known
            .map(|_| format!("{name}loaded on the server"))
            .map_err(|e| format!("{name}{e}; start the server with this bundle, or use the server's"));
        let ok = known.is_ok();
        checks.push(check("bundle hash", known));
        if ok {
            checks.push(check("round trip", round_trip(encoder, client, deadline).await.map(|t| format!("{name}{t}"))));
        }
    }
}

fn golden_input(encoder: &Encoder) -> Result<Rgb, String> {
    let side = encoder.bundle().manifest.input.size;
    Rgb::new(side, side, golden::pixels(side)).ok_or_else(|| "the golden input cannot be made".into())
}

/// Compares this machine's symbols of the golden input with the bundle's.
fn parity(encoder: &mut Encoder) -> Result<String, String> {
    let text = |e: ClientError| e.to_string();
    let input = golden_input(encoder)?;
    let start = Instant::now();
    let latent = encoder.latent(&input).map_err(text)?;
    let took = start.elapsed();
    let bundle = encoder.bundle();
    let (header, expected) = bundle.golden_symbols().map_err(|e| e.to_string())?;
    let level = bundle.tables.level(header.quality).map_err(|e| e.to_string())?;
    let symbols = level.quantise(&latent, bundle.manifest.latent).map_err(|e| e.to_string())?;
    let same = symbols.iter().zip(&expected).filter(|(a, b)| a == b).count() as f64 / expected.len() as f64;
    let line = format!("{:.3} % of the golden symbols reproduced, {took:.1?} for the network", same * 100.0);
    if same >= SYMBOL_PARITY { Ok(line) } else { Err(format!("{line}; at least {} % are needed", SYMBOL_PARITY * 100.0)) }
}

async fn round_trip(encoder: &mut Encoder, client: &mut Client, deadline: Duration) -> Result<String, String> {
    let input = golden_input(encoder)?;
    let quality = encoder.default_quality();
    let container = encoder.encode_rgb(&input, quality).map_err(|e| e.to_string())?.container;
    let options = InferOptions { deadline, ..InferOptions::default() };
    let mut times = Vec::new();
    for _ in 0..ROUND_TRIPS {
        let start = Instant::now();
        client.infer(Payload::Bitstream(container.clone().into()), &options).await.map_err(|e| e.to_string())?;
        times.push(start.elapsed());
    }
    times.sort();
    Ok(format!("{} bytes answered in {:.1?} (median of {ROUND_TRIPS})", container.len(), times[ROUND_TRIPS / 2]))
}
