//! Fashion-MNIST (Xiao et al. 2017) with a network of LeNet-5's size (61,706 parameters).

use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha20Rng;
use tch::nn::{self, Module, OptimizerConfig};
use tch::{Device, Kind, Tensor};

use super::partition::{Split, deal};
use super::{Examples, Learner, Model, Score, Training, network, torch};
use crate::error::FederateError;

/// Name of the task.
pub const TASK: &str = "fashion-mnist";
const SIDE: usize = 28;
const CLASSES: i64 = 10;
/// Largest file after unpacking: 60,000 pictures.
const MOST_BYTES: u64 = 64 << 20;
const SCORED_AT_ONCE: i64 = 1000;

/// The data and a network.
pub struct Fashion {
    pictures: Tensor,
    labels: Vec<u8>,
    test_pictures: Tensor,
    test_labels: Tensor,
    variables: nn::VarStore,
    network: nn::Sequential,
}

fn read(folder: &Path, name: &str, dimensions: usize) -> Result<(Vec<usize>, Vec<u8>), FederateError> {
    let path = folder.join(name);
    let bad = |why: String| FederateError::Invalid(format!("{}: {why}", path.display()));
    let file = std::fs::File::open(&path).map_err(|e| bad(format!("{e} (`make federated-data` fetches it)")))?;
    let mut bytes = Vec::new();
    GzDecoder::new(file).take(MOST_BYTES).read_to_end(&mut bytes).map_err(|e| bad(e.to_string()))?;
    // IDX: two zeros, type 8 (bytes), number of dimensions, then each as 32 bits, most significant first
    let header = 4 + 4 * dimensions;
    if bytes.len() < header || bytes[..4] != [0, 0, 8, dimensions as u8] {
        return Err(bad("is no IDX file of bytes".into()));
    }
    let size = |d: usize| bytes[4 + 4 * d..8 + 4 * d].iter().fold(0, |n, b| n << 8 | usize::from(*b));
    let sizes: Vec<usize> = (0..dimensions).map(size).collect();
    let values = bytes.split_off(header);
    if sizes.iter().try_fold(1usize, |n, s| n.checked_mul(*s)) != Some(values.len()) {
        return Err(bad(format!("{} values for sizes {sizes:?}", values.len())));
    }
    Ok((sizes, values))
}

fn set(folder: &Path, prefix: &str) -> Result<(Tensor, Vec<u8>), FederateError> {
    let (sizes, pictures) = read(folder, &format!("{prefix}-images-idx3-ubyte.gz"), 3)?;
    let (_, labels) = read(folder, &format!("{prefix}-labels-idx1-ubyte.gz"), 1)?;
    if sizes[1..] != [SIDE, SIDE] || sizes[0] != labels.len() || labels.iter().any(|l| i64::from(*l) >= CLASSES) {
        return Err(FederateError::Invalid(format!("{}: {sizes:?} pictures, {} labels", folder.display(), labels.len())));
    }
    let side = SIDE as i64;
    let pictures = Tensor::f_from_slice(&pictures).and_then(|t| t.f_view([-1, 1, side, side])).map_err(torch)?;
    Ok((pictures, labels))
}

impl Fashion {
    /// Reads the four files of the Debian package `dataset-fashion-mnist`.
    ///
    /// # Errors
    /// Names the file that is missing or wrong.
    pub fn open(folder: &Path) -> Result<Self, FederateError> {
        let (pictures, labels) = set(folder, "train")?;
        let (test_pictures, test) = set(folder, "t10k")?;
        let test_labels = Tensor::f_from_slice(&test).and_then(|t| t.f_to_kind(Kind::Int64)).map_err(torch)?;
        let variables = nn::VarStore::new(Device::Cpu);
        let root = variables.root();
        let padded = nn::ConvConfig { padding: 2, ..Default::default() };
        let network = nn::seq()
            .add(nn::conv2d(&root / "conv1", 1, 6, 5, padded))
            .add_fn(|x| x.relu().max_pool2d_default(2))
            .add(nn::conv2d(&root / "conv2", 6, 16, 5, Default::default()))
            .add_fn(|x| x.relu().max_pool2d_default(2).flat_view())
            .add(nn::linear(&root / "full1", 400, 120, Default::default()))
            .add_fn(|x| x.relu())
            .add(nn::linear(&root / "full2", 120, 84, Default::default()))
            .add_fn(|x| x.relu())
            .add(nn::linear(&root / "full3", 84, CLASSES, Default::default()));
        Ok(Self { pictures, labels, test_pictures, test_labels, variables, network })
    }

    fn input(pictures: &Tensor) -> Result<Tensor, FederateError> {
        pictures
            .f_to_kind(Kind::Float)
            .and_then(|t| t.f_div_scalar(255.0))
            .and_then(|t| t.f_sub_scalar(0.2860))
            .and_then(|t| t.f_div_scalar(0.3530))
            .map_err(torch)
    }
}

impl Learner for Fashion {
    fn initial(&mut self, seed: u64) -> Result<Model, FederateError> {
        network::fresh(&network::store(&self.variables)?, seed)
    }

    fn deal(&self, clients: usize, split: Split, seed: u64) -> Result<Vec<Examples>, FederateError> {
        deal(&self.labels, clients, split, seed)
    }

    fn update(&mut self, model: &Model, own: &Examples, training: &Training, seed: u64) -> Result<Vec<f32>, FederateError> {
        network::load(&self.variables, model, TASK)?;
        let mut optimiser =
            nn::Sgd { momentum: 0.9, ..Default::default() }.build(&self.variables, training.learning_rate).map_err(torch)?;
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        let mut order: Vec<i64> = own.places.iter().map(|p| *p as i64).collect();
        if order.iter().any(|p| *p as usize >= self.labels.len()) {
            return Err(FederateError::Invalid("an example that the data do not have".into()));
        }
        for _ in 0..training.epochs {
            order.shuffle(&mut rng);
            for batch in order.chunks(training.batch_size) {
                let label = |p: &i64| i64::from(self.labels[*p as usize]);
                let labels: Vec<i64> = batch.iter().map(|p| if own.flipped { CLASSES - 1 - label(p) } else { label(p) }).collect();
                let pictures = self.pictures.f_index_select(0, &Tensor::f_from_slice(batch).map_err(torch)?).map_err(torch)?;
                let logits = self.network.forward(&Self::input(&pictures)?);
                let labels = Tensor::f_from_slice(&labels).map_err(torch)?;
                let loss = logits.f_cross_entropy_loss::<Tensor>(&labels, None, tch::Reduction::Mean, -100, 0.0).map_err(torch)?;
                optimiser.backward_step(&loss);
            }
        }
        Ok(network::difference(&network::store(&self.variables)?, model))
    }

    fn score(&mut self, model: &Model) -> Result<Score, FederateError> {
        network::load(&self.variables, model, TASK)?;
        let of = self.test_labels.size()[0];
        let mut right = 0;
        for from in (0..of).step_by(SCORED_AT_ONCE as usize) {
            let some = SCORED_AT_ONCE.min(of - from);
            let pictures = self.test_pictures.f_narrow(0, from, some).map_err(torch)?;
            let logits = tch::no_grad(|| self.network.forward(&Self::input(&pictures)?).f_argmax(1, false).map_err(torch))?;
            let equal = logits.f_eq_tensor(&self.test_labels.f_narrow(0, from, some).map_err(torch)?).map_err(torch)?;
            right += i64::try_from(equal.f_sum(Kind::Int64).map_err(torch)?).map_err(torch)?;
        }
        Ok(Score { right: right as usize, of: of as usize, bytes: None })
    }
}
