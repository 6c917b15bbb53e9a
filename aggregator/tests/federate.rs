//! Training with real client processes beside simulated ones.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use aggregator::local::set_up;

const REAL: usize = 10;
const SIMULATED: usize = 4;
const PARTS: usize = REAL + SIMULATED;

fn data() -> Option<PathBuf> {
    let folder = isthmus_testkit::root().join("third_party/dataset-fashion-mnist/usr/share/datasets/fashion-mnist");
    folder.join("train-images-idx3-ubyte.gz").exists().then_some(folder)
}

fn config(folder: &Path, data: &Path, more: &str) -> PathBuf {
    let path = folder.join("train.toml");
    let text = format!(
        "data = {data:?}\nout = \"run\"\nrounds = 3\nseed = 1\n[training]\ntask = \"fashion-mnist\"\nepochs = 1\nbatch_size = 32\nlearning_rate = 0.02\n\
         [fleet]\nsimulated = {SIMULATED}\nparts = {PARTS}\nlinger = \"6s\"\n[aggregation]\nkind = \"secure\"\nnorm = 2.0\nnorm_quantile = 0.8\nmin_clients = 3\n\
         upload = \"2m\"\ncompute = \"1m\"\n[parties]\nlocal = \"parties\"\n{more}"
    );
    std::fs::write(&path, text).unwrap();
    path
}

/// A client process that is killed with this value.
struct Client(Child);

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn client(trial: &aggregator::local::Trial, data: &Path, number: usize) -> Client {
    let file = |kind: &str| trial.clients.join(format!("{number}.{kind}"));
    let mut command = Command::new(isthmus_testkit::binary("edge-client-train"));
    command.args([
        "federate",
        "--url",
        &trial.url,
        "--part",
        &(SIMULATED + number).to_string(),
        "--of",
        &PARTS.to_string(),
        "--rounds",
        "3",
    ]);
    command
        .arg("--ca")
        .arg(&trial.certificate)
        .arg("--key")
        .arg(file("key"))
        .arg("--credential")
        .arg(file("credential"))
        .arg("--data")
        .arg(data);
    // a core each would be more than there are
    command.env("OMP_NUM_THREADS", "1").stdout(Stdio::null()).stderr(Stdio::null());
    Client(command.spawn().unwrap())
}

#[test]
fn ten_client_processes_and_simulated_ones_train_together() {
    let Some(data) = data() else { return isthmus_testkit::skipped("Fashion-MNIST is not there (make federated-data)") };
    let folder = tempfile::tempdir().unwrap();
    let trial = set_up(&folder.path().join("parties"), 0, REAL, 3).unwrap();
    let path = config(folder.path(), &data, "");
    let mut command = Command::new(isthmus_testkit::binary("aggregator"));
    command.args(["train", "--json"]).arg(&path).stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null());
    let mut training = Client(command.spawn().unwrap());
    let lines = BufReader::new(training.0.stdout.take().unwrap()).lines();
    // the parties' addresses come first, among what is for people
    let mut said = BufReader::new(training.0.stderr.take().unwrap()).lines();
    assert!(said.any(|l| l.unwrap().starts_with("serving clients on 127.0.0.1")));
    let more = std::thread::spawn(move || said.map_while(Result::ok).for_each(drop));
    let mut clients: Vec<Client> = (0..REAL).map(|c| client(&trial, &data, c)).collect();
    let mut rounds = Vec::new();
    for line in lines.map_while(Result::ok) {
        // nothing but JSON on standard output
        let json: serde_json::Value = serde_json::from_str(&line).unwrap();
        rounds.push(json["progress"].clone());
        // kill -9 in the middle of whatever they do; their memory tells the next processes what was sent
        for (number, killed) in clients.iter_mut().enumerate().take(2) {
            let _ = killed.0.kill();
            let _ = killed.0.wait();
            *killed = client(&trial, &data, number);
        }
    }
    more.join().unwrap();
    assert!(training.0.wait().unwrap().success());
    assert_eq!(rounds.len(), 3, "{rounds:?}");
    for round in &rounds {
        // a client that starts late misses the first round
        let counted = round["clients"].as_u64().unwrap() as usize;
        assert!(counted > SIMULATED && counted <= PARTS, "{round}");
        assert_eq!(round["kept"], round["clients"]);
    }
    assert!(rounds.last().unwrap()["clients"].as_u64().unwrap() as usize >= SIMULATED + REAL / 2, "{rounds:?}");
    assert!(rounds.last().unwrap()["accuracy"].as_f64().unwrap() > 0.5, "{rounds:?}");
    // each of them voted once a round and says so in its memory
    let remembered = std::fs::read_to_string(trial.clients.join("0.sent")).unwrap();
    assert!(remembered.contains("\"voted\""), "{remembered}");
    for config in ["configs/shakespeare.toml", "configs/adapt.toml"] {
        aggregator::train::TrainConfig::open(&isthmus_testkit::root().join(config)).unwrap();
    }
    drop(clients);

    // the same command has nothing left to do; more rounds go on from the checkpoint
    let again = Command::new(isthmus_testkit::binary("aggregator"))
        .args(["train", "--rounds", "4", "--json"])
        .arg(&path)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&again.stdout).into_owned();
    let done: Vec<&str> = text.lines().filter(|l| l.contains("\"round\":")).collect();
    assert!(
        again.status.success() && done.len() == 1 && done[0].contains("\"round\":4"),
        "{text}\n{}",
        String::from_utf8_lossy(&again.stderr)
    );
}

#[test]
fn wrong_descriptions_are_refused_with_the_key() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("nothing");
    let path = config(folder.path(), &data, "");
    let good = std::fs::read_to_string(&path).unwrap();
    let error = |change: &dyn Fn(String) -> String| {
        std::fs::write(&path, change(good.clone())).unwrap();
        let out = Command::new(isthmus_testkit::binary("aggregator")).arg("train").arg(&path).stdin(Stdio::null()).output().unwrap();
        assert!(!out.status.success());
        String::from_utf8_lossy(&out.stderr).into_owned()
    };
    for (from, to, says) in [
        ("rounds = 3", "runds = 3", "runds"),
        ("rounds = 3", "rounds = 0", "rounds"),
        ("learning_rate = 0.02", "learning_rate = -1.0", "learning_rate"),
        ("norm = 2.0", "norm = 0.0", "norm"),
        ("kind = \"secure\"", "kind = \"magic\"", "magic"),
        ("parts = 14", "parts = 2", "parts"),
        ("fashion-mnist", "chess", "chess"),
        ("seed = 1", "seed = 2", "make federated-data"),
    ] {
        let text = error(&|t| t.replacen(from, to, 1));
        assert!(text.contains(says), "{says}: {text}");
    }
    std::thread::sleep(Duration::from_millis(10));
}

#[test]
fn sample_configurations_hold_every_key_with_its_default() {
    let root = isthmus_testkit::root();
    let text = std::fs::read_to_string(root.join("configs/aggregator.toml")).unwrap();
    let sample: aggregator::Config = toml::from_str(&text).unwrap();
    let zeros = "0".repeat(64);
    let expected = aggregator::Config { authorities: vec![zeros.clone()], operators: vec![zeros], ..aggregator::Config::default() };
    assert_eq!(sample, expected);
    let all: toml::Table = toml::Table::try_from(&expected).unwrap();
    let named: toml::Table = toml::from_str(&text).unwrap();
    assert_eq!(all.keys().collect::<Vec<_>>(), named.keys().collect::<Vec<_>>());
    aggregator::train::TrainConfig::open(&root.join("configs/federated.toml")).unwrap();
}
