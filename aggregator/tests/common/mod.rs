//! Three real parties on loopback, and clients.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use aggregator::keys::open_identity;
use aggregator::local::{Trial, set_up};
use isthmus_federate::participant::Found;
use isthmus_federate::report::{Identity, Report, make};
use isthmus_federate::{Operator, Participant, RoundPlan};
use isthmus_proto::aggregator_v1::{CreateRoundRequest, Mode, Round, Transform};
use isthmus_secagg::Bits;
use isthmus_testkit::Process;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha20Rng;

pub const LIMIT: Duration = Duration::from_secs(60);

pub struct Parties {
    folder: tempfile::TempDir,
    pub trial: Trial,
    pub processes: Vec<Option<Process>>,
}

impl Parties {
    /// Starts three parties for `clients` clients.
    pub fn start(clients: usize) -> Self {
        Self::configured(clients, |text| text)
    }

    /// With changes to the parties' configurations.
    pub fn configured(clients: usize, change: impl Fn(String) -> String) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let trial = set_up(folder.path(), 0, clients, 2).unwrap();
        for config in &trial.configs {
            let text = std::fs::read_to_string(config).unwrap();
            std::fs::write(config, change(text)).unwrap();
        }
        let mut parties = Self { folder, trial, processes: vec![None, None, None] };
        (0..3).for_each(|p| parties.restart(p));
        parties
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What a party has logged since the start.
    pub fn log(&self, party: usize) -> String {
        std::fs::read_to_string(self.log_path(party)).unwrap_or_default()
    }

    fn log_path(&self, party: usize) -> std::path::PathBuf {
        self.folder().join(format!("party{party}.log"))
    }

    fn command(&self, party: usize) -> Command {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log_path(party)).unwrap();
        let mut command = Command::new(isthmus_testkit::binary("aggregator"));
        command.args(["party", "--config"]).arg(&self.trial.configs[party]).stderr(Stdio::from(log)).env("RUST_LOG", "info");
        command
    }

    pub fn restart(&mut self, party: usize) {
        let (process, line) = Process::start(&mut self.command(party));
        assert!(line.as_ref().is_some_and(|l| l.starts_with("serving")), "{line:?}: {}", self.log(party));
        self.processes[party] = Some(process);
    }

    /// A replica that serves as soon as it holds the lease.
    pub fn standby(&self, party: usize) -> std::thread::JoinHandle<Process> {
        let mut command = self.command(party);
        std::thread::spawn(move || Process::spawn(&mut command).0)
    }

    /// kill -9.
    pub fn kill(&mut self, party: usize) {
        drop(self.processes[party].take());
    }

    pub async fn operator(&self) -> Operator {
        let (ca, token) = (self.certificate(), std::fs::read_to_string(&self.trial.token).unwrap());
        for _ in 0..50 {
            if let Ok(operator) = Operator::connect(&self.trial.url, Some(&ca), token.trim(), LIMIT).await {
                return operator;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("party 0 does not answer: {}", self.log(0));
    }

    pub fn certificate(&self) -> String {
        std::fs::read_to_string(&self.trial.certificate).unwrap()
    }

    pub async fn participant(&self) -> Participant {
        Participant::connect(&self.trial.url, Some(&self.certificate()), LIMIT).await.unwrap()
    }

    pub fn identity(&self, client: usize) -> Identity {
        let file = |kind: &str| self.trial.clients.join(format!("{client}.{kind}"));
        open_identity(&file("key"), &file("credential")).unwrap()
    }

    pub fn peer_address(&self, party: usize) -> SocketAddr {
        aggregator::Config::open(&self.trial.configs[party]).unwrap().peer_listen
    }

    /// The open round, as client number `client` sees it.
    pub async fn open_round(&self, participant: &Participant, client: usize) -> RoundPlan {
        let key = self.identity(client).key.public();
        for _ in 0..100 {
            match participant.round(&key).await.unwrap() {
                Found::Round(plan) => return *plan,
                Found::Nothing(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
        panic!("no round is open: {}", self.log(0));
    }

    /// A round, uploads of clients 0 to n - 1, and its result; counts must be those of the plaintext.
    pub async fn whole_round(
        &self,
        request: CreateRoundRequest,
        seed: u64,
    ) -> (RoundPlan, Vec<Bits>, isthmus_federate::operator::RoundResult) {
        let n = request.target_clients as usize;
        let mut operator = self.operator().await;
        let round = operator.create(request).await.unwrap().round;
        let participant = self.participant().await;
        let plan = self.open_round(&participant, 0).await;
        assert_eq!(plan.round(), round);
        let bits: Vec<Bits> = (0..n).map(|c| random_bits(plan.bits(), seed + c as u64)).collect();
        for (c, bits) in bits.iter().enumerate() {
            let report = self.report(&plan, c, bits);
            participant.upload_until_stored(&report, LIMIT).await.unwrap();
        }
        operator.wait(round, LIMIT, |_| ()).await.unwrap_or_else(|e| panic!("{e}\n{}\n{}\n{}", self.log(0), self.log(1), self.log(2)));
        let result = operator.result(round).await.unwrap();
        (plan, bits, result)
    }

    pub fn report(&self, plan: &RoundPlan, client: usize, bits: &Bits) -> Report {
        make(plan, bits, &self.identity(client), &mut rand::rng()).unwrap()
    }
}

pub fn request(n: u32, dim: u32) -> CreateRoundRequest {
    CreateRoundRequest {
        mode: Mode::Boolean3.into(),
        dim,
        transform: Transform::Hadamard.into(),
        norm: 1.0,
        min_clients: 2,
        max_clients: n.max(2),
        target_clients: n,
        upload_ms: 60_000,
        compute_ms: 60_000,
        ..CreateRoundRequest::default()
    }
}

pub fn random_bits(len: usize, seed: u64) -> Bits {
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    Bits::fill(len, |_| rng.next_u64())
}

pub fn sums(bits: &[Bits], len: usize) -> Vec<u32> {
    (0..len).map(|j| bits.iter().map(|b| u32::from(b.get(j))).sum()).collect()
}

pub fn state(round: &Round) -> &'static str {
    round.state().as_str_name()
}
