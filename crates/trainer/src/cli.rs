//! Commands and flags of `trainer`.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use isthmus_codec::Quality;
use isthmus_trainer::photos::Set;

use crate::lr_range;

/// Trains the encoders, entropy tables and decoders of Isthmus.
#[derive(Parser)]
#[command(version, about)]
pub struct Cli {
    /// Folder with the unpacked packages (made by setup/fetch.py).
    #[arg(long, default_value = "third_party", global = true)]
    pub third_party: PathBuf,
    /// Folder for packed photos.
    #[arg(long, default_value = "data", global = true)]
    pub data: PathBuf,
    #[command(subcommand)]
    pub command: Command,
}

/// A bundle that is made of another one.
#[derive(clap::Args)]
pub struct NewBundle {
    /// The bundle that it is made of (for a blueprint: whose encoder the run used).
    #[arg(long)]
    pub bundle: PathBuf,
    /// Folder of the new bundle.
    #[arg(long)]
    pub out: PathBuf,
    /// Version of the new bundle.
    #[arg(long)]
    pub version: String,
}

#[derive(Subcommand)]
pub enum Command {
    /// Fetch the photo packages, check them against the frozen split, and pack the training photos.
    Fetch {
        /// Decide the split anew and write it to this file, and evaluation-crops.json beside it, instead of checking the frozen one.
        #[arg(long, value_name = "FILE")]
        freeze: Option<PathBuf>,
        /// Use what is in the third-party folder without running setup/fetch.py.
        #[arg(long)]
        offline: bool,
        /// Leave the training photos out: fetch these and cut their crops.
        #[arg(long, value_name = "WHICH")]
        only: Option<Wanted>,
    },
    /// Split and pack photos of your own into the --data folder, for `distill` and `export` with the same --data.
    Prepare {
        /// Folder with JPEG, PNG and WebP files (subfolders too).
        photos: PathBuf,
    },
    /// Convert the fetched backbones to safetensors and write the class names.
    Import {
        /// Where to write.
        #[arg(long, default_value = "data/backbones")]
        out: PathBuf,
    },
    /// Turn a run into a bundle.
    Export {
        /// Folder of the run.
        #[arg(long)]
        run: PathBuf,
        /// Folder of the bundle.
        #[arg(long)]
        out: PathBuf,
        /// Version of the bundle.
        #[arg(long, default_value = "1")]
        version: String,
        /// Folder with imported backbones.
        #[arg(long, default_value = "data/backbones")]
        backbones: PathBuf,
    },
    /// Add a decoder for another backbone to a bundle: that of a run of `distill --bundle`.
    Blueprint {
        /// Folder of the run.
        #[arg(long)]
        run: PathBuf,
        #[command(flatten)]
        from: NewBundle,
        /// Folder with imported backbones.
        #[arg(long, default_value = "data/backbones")]
        backbones: PathBuf,
    },
    /// Write a bundle anew with the entropy coder's contexts fitted again, and without latent channels that are empty on all training crops.
    Contexts(NewBundle),
    /// Write a bundle anew with progressive bitstreams: level 1, then refinements, of which any number can be left out.
    Refine {
        #[command(flatten)]
        from: NewBundle,
        /// Qualities that the refinements go towards, rising.
        #[arg(long, value_delimiter = ',', default_value = "3,5.5")]
        towards: Vec<Quality>,
    },
    /// Compare a bundle with WebP, JPEG, AVIF and other bundles on folders of photos, in this process.
    Evaluate {
        /// Bundle folder.
        #[arg(long, default_value = "bundles/lite0-patch-stem")]
        bundle: PathBuf,
        /// Folders with imported backbones.
        #[arg(long, default_value = "data/backbones")]
        backbones: PathBuf,
        /// Which of the bundle's backbones answers; absent: its first.
        #[arg(long)]
        backbone: Option<String>,
        /// Folders with photos (and optionally labels.json), one table each.
        #[arg(required = true)]
        photos: Vec<PathBuf>,
        /// Compare with this bundle, or all versions in this folder, too (may be given several times).
        #[arg(long, value_name = "FOLDER")]
        rival: Vec<PathBuf>,
        /// Leave the image codecs out.
        #[arg(long)]
        no_codecs: bool,
        /// Also what the first parts of this level's bitstreams are worth.
        #[arg(long, value_name = "LEVEL")]
        prefixes: Option<u8>,
        /// Also what every beginning of a progressive bitstream is worth, and where streams end that stop once the answer is certain.
        #[arg(long)]
        progressive: bool,
        /// Qualities from one level to the next: 1 for the levels alone, 2 with those halfway.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
        each_level: u8,
        /// Where to write results (JSON) and plots (SVG).
        #[arg(long, default_value = "data/evaluation")]
        out: PathBuf,
    },
    /// Draw the learning curves of several bundles in one chart each for agreement, KL and bytes.
    Curves {
        /// Bundle folders, or folders of their versions.
        #[arg(required = true)]
        bundles: Vec<PathBuf>,
        /// Of bundles with several levels these alone.
        #[arg(long, value_delimiter = ',')]
        level: Vec<usize>,
        /// Where to write the charts (SVG).
        #[arg(long, default_value = "data/evaluation")]
        out: PathBuf,
    },
    /// Make a bundle of what a fleet has learned (`aggregator train` with the task bundle).
    Adapt {
        /// The bundle that the fleet had.
        #[arg(long, default_value = "bundles/lite0-patch-stem")]
        bundle: PathBuf,
        /// Folder with imported backbones.
        #[arg(long, default_value = "data/backbones")]
        backbones: PathBuf,
        /// The federated model.
        #[arg(long)]
        model: PathBuf,
        /// Photos of the clients' domain; those in its folder held-out score the new bundle.
        #[arg(long)]
        photos: PathBuf,
        /// Version of the new bundle.
        #[arg(long)]
        version: String,
        /// Folder of the new bundle.
        #[arg(long)]
        out: PathBuf,
        /// Sign it with this key.
        #[arg(long)]
        key: Option<PathBuf>,
    },
    /// What a fitted bundle saves: its bytes against the old one's at the same KL to the backbone.
    Gain {
        /// The old bundle.
        #[arg(long, default_value = "bundles/lite0-patch-stem")]
        before: PathBuf,
        /// The new one.
        #[arg(long)]
        after: PathBuf,
        /// Folder with imported backbones.
        #[arg(long, default_value = "data/backbones")]
        backbones: PathBuf,
        /// Photos of the clients' domain; those in its folder held-out are compared.
        #[arg(long)]
        photos: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Sign a bundle: clients and servers that trust the key take it, and no other.
    Sign {
        /// Bundle folder.
        #[arg(long)]
        bundle: PathBuf,
        /// The key (`aggregator keys authority` makes one).
        #[arg(long)]
        key: PathBuf,
    },
    /// Cut the training and held-out photos to what monochrome cameras would see: a domain that the bundle was not trained on.
    Monochrome {
        /// Where to write; held-out photos go to its folder held-out.
        #[arg(long, default_value = "data/monochrome")]
        out: PathBuf,
        /// Crops of each training photo.
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=1000))]
        each: u32,
    },
    /// Write an untrained encoder graph (for timing engines) as ONNX.
    Graph {
        /// Encoder shape: patch-stem or frankensplit.
        #[arg(long)]
        encoder: String,
        /// Where to write.
        #[arg(long)]
        out: PathBuf,
    },
    /// Run a bundle's decoder and tail in a bare loop (the server's upper bound); prints JSON.
    Direct {
        /// Bundle folder.
        #[arg(long, default_value = "bundles/lite0-patch-stem")]
        bundle: PathBuf,
        /// Folder with imported backbones.
        #[arg(long, default_value = "data/backbones")]
        backbones: PathBuf,
        /// Photos per call.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
        batch: u16,
        /// Calls timed, after a tenth as many to warm up.
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
        rounds: u32,
        /// CPU threads (0: all cores).
        #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(i32).range(0..=1024))]
        threads: i32,
    },
    /// Find out which peak learning rate a recipe can bear: the rate grows from batch to batch until the loss blows up.
    LrRange(lr_range::LrRange),
    /// Train a bottleneck.
    Distill {
        /// What to train.
        #[arg(long)]
        recipe: PathBuf,
        /// Folder for checkpoints and logs.
        #[arg(long)]
        run: PathBuf,
        /// Go on from the checkpoint in the run folder.
        #[arg(long)]
        resume: bool,
        /// Train a decoder for another backbone on the encoder of this bundle, which stays as it is (the recipe says decoder_only; a resumed run has it
        /// already).
        #[arg(long, conflicts_with = "warm_start")]
        bundle: Option<PathBuf>,
        /// Start from the encoder, gains and decoder of this bundle and train all of them on; with --bundle, from its decoder alone.
        #[arg(long, value_name = "BUNDLE", conflicts_with = "warm_start")]
        start: Option<PathBuf>,
        /// Start from the weights of this other run, as far as they fit; given several times, from the mean of their weights, with the history of the first: runs of
        /// one shape, one of which went on from the other (a resumed run has its own weights already).
        #[arg(long, value_name = "RUN")]
        warm_start: Vec<PathBuf>,
        /// Stop after this step instead of the recipe's last.
        #[arg(long)]
        until: Option<u64>,
        /// Steps between checkpoints and evaluations.
        #[arg(long, default_value_t = 250, value_parser = clap::value_parser!(u64).range(1..))]
        every: u64,
        /// auto, cpu or cuda:N.
        #[arg(long, default_value = "auto")]
        device: String,
        /// CPU threads (0: all cores).
        #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(i32).range(0..=1024))]
        threads: i32,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Wanted {
    /// The ImageNet photos of the demo.
    Demo,
    /// All photos that bundles are evaluated on.
    Evaluation,
}

impl Wanted {
    pub fn sets(wanted: Option<Self>) -> &'static [Set] {
        match wanted {
            Some(Self::Demo) => &[Set::Demo],
            Some(Self::Evaluation) => &[Set::HeldOut, Set::Labelled, Set::Demo],
            None => &[Set::Train, Set::HeldOut, Set::Labelled, Set::Demo],
        }
    }

    /// Groups of setup/assets.json.
    pub fn packages(wanted: Option<Self>) -> &'static [&'static str] {
        match wanted {
            Some(Self::Demo) => &["weights", "demo-photos"],
            Some(Self::Evaluation) => &["weights", "demo-photos", "photos"],
            None => &["weights", "demo-photos", "photos", "training-photos"],
        }
    }
}
