//! Rate against agreement: the bundle's quality levels and image codecs, answered by the same backend.

use edge_client::{Encoder, Payload};
use indicatif::{ProgressBar, ProgressStyle};
use isthmus_codec::{Quality, coder, container};
use serde::Serialize;

use crate::codecs::Codec;
use crate::error::HarnessError;
use crate::photos::PhotoSet;
use crate::stats::{Interval, argmax, bootstrap, kl, wilson};

/// Whatever turns payloads into logits: a server, or its networks in this process.
pub trait Backend {
    /// Logits of one payload.
    fn logits(&mut self, payload: Payload) -> impl Future<Output = Result<Vec<f32>, HarnessError>>;
}

/// What to compare.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The bundle's qualities from one level to the next: 1 for the levels alone, 2 with those halfway, and so on.
    pub each_level: u8,
    /// WebP qualities.
    pub webp: Vec<u8>,
    /// JPEG qualities.
    pub jpeg: Vec<u8>,
    /// AVIF qualities; the backend must be able to decode it.
    pub avif: Vec<u8>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            each_level: 1,
            webp: vec![0, 1, 5, 10, 20, 30, 50, 75, 90],
            jpeg: vec![5, 10, 20, 30, 50, 75, 90],
            avif: vec![1, 15, 30, 50, 75],
        }
    }
}

impl Plan {
    /// Fewer settings, for a demonstration.
    pub fn short() -> Self {
        Self { each_level: 1, webp: vec![0, 10, 30, 60, 85], jpeg: vec![10, 30, 60], avif: vec![] }
    }

    /// The bundle alone.
    pub fn ours(each_level: u8) -> Self {
        Self { each_level, webp: vec![], jpeg: vec![], avif: vec![] }
    }
}

/// One row of the comparison.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Method and setting.
    pub name: String,
    /// Method.
    pub family: String,
    /// Mean payload bytes.
    pub bytes: f64,
    /// Share of crops whose top-1 equals the uncompressed teacher's; interval over photos.
    pub agreement: Interval,
    /// Mean KL (nats) to the uncompressed teacher; interval over photos.
    pub kl: Interval,
    /// Top-1 against the labels (Wilson interval), if the set is labelled.
    pub accuracy: Option<Interval>,
}

/// Results on one set of photos.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// Name of the set.
    pub set: String,
    /// Crops.
    pub crops: usize,
    /// Photos they come from.
    pub photos: usize,
    /// Bundle name and version.
    pub bundle: String,
    /// Files of the set that cannot be decoded.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
    /// Top-1 of the uncompressed teacher against the labels.
    pub teacher_accuracy: Option<Interval>,
    /// One per method and setting.
    pub rows: Vec<Row>,
    #[serde(skip)]
    reference: Reference,
}

/// The family name of the bundle's own rows.
pub const OURS: &str = "Isthmus";

/// The teacher's answers to the uncompressed crops.
#[derive(Debug, Clone, Default)]
struct Reference {
    logits: Vec<Vec<f32>>,
}

/// Sends every photo through every method.
///
/// # Errors
/// If encoding or the backend fails.
pub async fn run(set: &PhotoSet, encoder: &mut Encoder, backend: &mut impl Backend, plan: &Plan) -> Result<Comparison, HarnessError> {
    let qualities = qualities(encoder, plan.each_level);
    let mut codecs = Vec::new();
    for (key, qualities) in [("webp", &plan.webp), ("jpeg", &plan.jpeg), ("avif", &plan.avif)] {
        for &q in qualities {
            codecs.push(Codec::new(key, Some(q))?);
        }
    }
    codecs.push(Codec::png());
    let bar = progress(set, qualities.len() + codecs.len(), set.name.clone());

    let mut reference = Reference { logits: Vec::new() };
    for photo in &set.photos {
        reference.logits.push(backend.logits(Payload::Image(Codec::png().encode(&photo.pixels)?.into())).await?);
        bar.inc(1);
    }
    let mut rows = Vec::new();
    for quality in qualities {
        let answers = bitstreams(set, encoder, backend, quality, &bar).await?;
        rows.push(row(set, &reference, named(OURS, quality), OURS, &answers));
    }
    for codec in codecs {
        let mut answers = Vec::new();
        for (i, photo) in set.photos.iter().enumerate() {
            let file = codec.encode(&photo.pixels)?;
            let bytes = file.len();
            let logits =
                if codec.is_lossless() { reference.logits[i].clone() } else { backend.logits(Payload::Image(file.into())).await? };
            answers.push((bytes, logits));
            bar.inc(1);
        }
        rows.push(row(set, &reference, codec.name(), codec.family(), &answers));
    }
    bar.finish_and_clear();
    let mut groups: Vec<&str> = set.photos.iter().map(|p| p.group.as_str()).collect();
    groups.dedup();
    let manifest = &encoder.bundle().manifest;
    Ok(Comparison {
        set: set.name.clone(),
        crops: set.photos.len(),
        photos: groups.len(),
        left_out: set.left_out.clone(),
        bundle: format!("{} {}", manifest.name, manifest.version),
        teacher_accuracy: accuracy(set, reference.logits.iter().map(Vec::as_slice)),
        rows,
        reference,
    })
}

/// Sends every photo of the set that was compared through another bundle, a rival, too: its rows are of the family of its name. `backend` has
/// the same backbone.
///
/// # Errors
/// If encoding or the backend fails.
pub async fn add(
    comparison: &mut Comparison,
    set: &PhotoSet,
    encoder: &mut Encoder,
    backend: &mut impl Backend,
    plan: &Plan,
) -> Result<(), HarnessError> {
    let (family, version) = (encoder.bundle().manifest.name.clone(), encoder.bundle().manifest.version.clone());
    let qualities = qualities(encoder, plan.each_level);
    let bar = progress(set, qualities.len(), format!("{family} {version}"));
    for quality in qualities {
        let answers = bitstreams(set, encoder, backend, quality, &bar).await?;
        let name = named(&format!("{family} {version}"), quality);
        comparison.rows.push(row(set, &comparison.reference, name, &family, &answers));
    }
    bar.finish_and_clear();
    Ok(())
}

/// A bar over so many requests with each photo.
fn progress(set: &PhotoSet, each: usize, what: String) -> ProgressBar {
    let bar = ProgressBar::new((set.photos.len() * each) as u64);
    if let Ok(style) = ProgressStyle::with_template("{msg:12} {bar:30} {pos}/{len} requests, {eta} left") {
        bar.set_style(style);
    }
    bar.set_message(what);
    bar
}

/// Shares of a payload whose answers are compared, in percent.
const PREFIXES: [usize; 11] = [5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90];

/// What the server would answer had it the first part of each bitstream alone, its words sent from the last to the first
/// ([`coder::decode_end`]): symbols that have not come are zero. Rows of a family of their own.
///
/// # Errors
/// If encoding or the backend fails.
pub async fn add_prefixes(
    comparison: &mut Comparison,
    set: &PhotoSet,
    encoder: &mut Encoder,
    backend: &mut impl Backend,
    quality: u8,
) -> Result<(), HarnessError> {
    let family = format!("{OURS}, first part of q{quality}");
    let mut answers = PREFIXES.map(|_| Vec::new());
    let bar = progress(set, PREFIXES.len(), "prefixes".into());
    for photo in &set.photos {
        let latent = encoder.latent(&photo.pixels)?;
        let bundle = encoder.bundle();
        let (level, shape) = (bundle.tables.level(quality)?, bundle.manifest.latent);
        let payload = coder::encode(&level.quantise(&latent, shape)?, &level, shape)?;
        for (share, answers) in PREFIXES.into_iter().zip(&mut answers) {
            let come = payload.len() * share / 400 * 4;
            let part = coder::decode_end(&payload[payload.len() - come..], &level, shape)?;
            let whole = container::encode(&part.symbols, quality, &bundle.hash, shape, &bundle.tables)?;
            answers.push((come + container::OVERHEAD, backend.logits(Payload::Bitstream(whole.into())).await?));
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    for (share, answers) in PREFIXES.into_iter().zip(&answers) {
        comparison.rows.push(row(set, &comparison.reference, format!("{family}, {share} %"), &family, answers));
    }
    Ok(())
}

/// Probabilities of the best class from which on a server wants no refinement.
const CERTAIN: [f32; 4] = [0.3, 0.5, 0.7, 0.9];

/// Probability of the best class.
fn certainty(logits: &[f32]) -> f32 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    1.0 / logits.iter().map(|l| (l - most).exp()).sum::<f32>()
}

/// What every beginning of a progressive bitstream is worth (a family of its own), and streams that end as soon as the server is certain (another one).
///
/// # Errors
/// If the bundle has no refinements, or encoding or the backend fails.
pub async fn add_progressive(
    comparison: &mut Comparison,
    set: &PhotoSet,
    encoder: &mut Encoder,
    backend: &mut impl Backend,
) -> Result<(), HarnessError> {
    let steps = encoder.bundle().refinements()?.steps().len();
    let mut beginnings = vec![Vec::new(); steps + 1];
    let bar = progress(set, steps + 1, "progressive".into());
    for photo in &set.photos {
        let latent = encoder.latent(&photo.pixels)?;
        let mut come = Vec::new();
        for (part, answers) in encoder.bundle().encode_progressive(&latent)?.into_iter().zip(&mut beginnings) {
            come.extend(part);
            answers.push((come.len(), backend.logits(Payload::Bitstream(come.clone().into())).await?));
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let family = format!("{OURS} progressive");
    for (refinements, answers) in beginnings.iter().enumerate() {
        let name = format!("{family}, {refinements} refinements");
        comparison.rows.push(row(set, &comparison.reference, name, &family, answers));
    }
    let family = format!("{OURS} until certain");
    for enough in CERTAIN {
        let answers: Vec<_> = (0..set.photos.len())
            .filter_map(|i| {
                let of_photo = || beginnings.iter().filter_map(|answers| answers.get(i));
                of_photo().find(|(_, logits)| certainty(logits) >= enough).or_else(|| of_photo().next_back()).cloned()
            })
            .collect();
        comparison.rows.push(row(set, &comparison.reference, format!("{family}, {enough}"), &family, &answers));
    }
    Ok(())
}

/// So many from each level of the encoder's bundle to the next.
fn qualities(encoder: &Encoder, each_level: u8) -> Vec<Quality> {
    let each = f64::from(each_level.max(1));
    let steps = u32::from(encoder.bundle().levels().saturating_sub(1)) * u32::from(each_level.max(1));
    (0..=steps).map(|step| Quality::nearest(1.0 + f64::from(step) / each)).collect()
}

fn named(method: &str, quality: Quality) -> String {
    format!("{method} q{}", quality.value())
}

/// Bytes and logits of every photo.
async fn bitstreams(
    set: &PhotoSet,
    encoder: &mut Encoder,
    backend: &mut impl Backend,
    quality: Quality,
    bar: &ProgressBar,
) -> Result<Vec<(usize, Vec<f32>)>, HarnessError> {
    let mut answers = Vec::new();
    for photo in &set.photos {
        let container = encoder.encode_rgb(&photo.pixels, quality)?.container;
        let bytes = container.len();
        answers.push((bytes, backend.logits(Payload::Bitstream(container.into())).await?));
        bar.inc(1);
    }
    Ok(answers)
}

fn accuracy<'a>(set: &PhotoSet, logits: impl Iterator<Item = &'a [f32]>) -> Option<Interval> {
    let labelled: Vec<bool> = set
        .photos
        .iter()
        .zip(logits)
        .filter(|(photo, _)| !photo.labels.is_empty())
        .map(|(photo, l)| photo.labels.contains(&argmax(l)))
        .collect();
    (!labelled.is_empty()).then(|| wilson(labelled.iter().filter(|h| **h).count(), labelled.len()))
}

fn row(set: &PhotoSet, reference: &Reference, name: String, family: &str, answers: &[(usize, Vec<f32>)]) -> Row {
    let pairs = || set.photos.iter().zip(&reference.logits).zip(answers);
    let agreement: Vec<(&str, f64)> =
        pairs().map(|((p, t), (_, s))| (p.group.as_str(), f64::from(u8::from(argmax(t) == argmax(s))))).collect();
    let divergence: Vec<(&str, f64)> = pairs().map(|((p, t), (_, s))| (p.group.as_str(), kl(t, s))).collect();
    Row {
        name,
        family: family.into(),
        bytes: answers.iter().map(|(b, _)| *b as f64).sum::<f64>() / answers.len().max(1) as f64,
        agreement: bootstrap(&agreement),
        kl: bootstrap(&divergence),
        accuracy: accuracy(set, answers.iter().map(|(_, l)| l.as_slice())),
    }
}
