//! One function per parser that reads bytes from outside. None may panic, hang, or allocate without bound.

use std::sync::OnceLock;

use isthmus_codec::{
    BundleHash, ChannelTable, Container, Contexts, Distribution, Input, LatentShape, LevelTables, Network, Predictor, Progressive,
    Refinement, Refinements, Tables, Tap, coder, pmf,
};

use isthmus_federate::train::Model;
use isthmus_federate::{RoundPlan, report as reports};
use isthmus_proto::aggregator_v1::{Mode, ReportHeader, RoundConfig, Transform};
use isthmus_secagg::report::EnvelopeKey;
use offload_server::features::FeatureMap;
use prost::Message;

/// A target: any bytes must be survived.
pub type Target = fn(&[u8]);

/// Name and function of every target.
pub const TARGETS: [(&str, Target); 14] = [
    ("container", container),
    ("payload", payload),
    ("progressive", progressive),
    ("tables", tables),
    ("refinements", refinements),
    ("manifest", manifest),
    ("image", image),
    ("avif", avif),
    ("features", features),
    ("pth", pth),
    ("rcc", rcc),
    ("round", round),
    ("report", report),
    ("model", model),
];

const SHAPE: LatentShape = LatentShape { channels: 4, height: 6, width: 6 };

fn small_tables() -> &'static Tables {
    static TABLES: OnceLock<Tables> = OnceLock::new();
    TABLES.get_or_init(|| {
        let widths = pmf::quantise(&[0.05, 0.1, 0.7, 0.1, 0.04], 0.01).expect("a distribution");
        let channel = || ChannelTable::new(1.0, 1.0, 0.1, -2, widths.clone()).expect("a table");
        // a second level whose channels are coded with contexts, each also predicted from the one before
        let dependent = |c: u16| {
            let own = [Tap { channel: c, dy: 0, dx: -1, weight: 900 }, Tap { channel: c, dy: -1, dx: 1, weight: 500 }];
            let other = c.checked_sub(1).map(|channel| Tap { channel, dy: 1, dx: 1, weight: 300 });
            let predictor = Predictor { bias: 10, taps: own.into_iter().chain(other).collect() };
            let distributions = vec![Distribution::new(-2, widths.clone()).expect("a table"); 6];
            let contexts = Contexts::new([predictor.clone(), predictor], vec![400, 1200], vec![vec![0]; 3], distributions);
            ChannelTable::with_contexts(1.0, 1.0, 0.1, contexts.expect("contexts")).expect("a table")
        };
        // a third one with networks
        let learned = |c: u16| {
            let weights = |seed: i16| std::array::from_fn(|unit| (unit as i16 * 977 + seed).wrapping_mul(31));
            let input = |channel, dy, dx| Input { channel, dy, dx, signed: weights(dy.into()), magnitude: weights(dx.into()) };
            let own = [input(c, 0, -1), input(c, -1, 2)];
            let inputs = own.into_iter().chain(c.checked_sub(1).map(|channel| input(channel, 2, 0))).collect();
            let network = Network { inputs, bias: [5000; 16], outputs: [weights(3), weights(4)] };
            let distributions = vec![Distribution::new(-2, widths.clone()).expect("a table"); 6];
            let contexts = Contexts::new(network, vec![0, 1 << 20], vec![vec![0]; 3], distributions);
            ChannelTable::with_contexts(1.0, 1.0, 0.1, contexts.expect("contexts")).expect("a table")
        };
        let level = |channels| LevelTables::new(channels).expect("a level");
        let levels = vec![(0..4).map(|_| channel()).collect(), (0..4).map(dependent).collect(), (0..4).map(learned).collect()];
        Tables { levels: levels.into_iter().map(level).collect() }
    })
}

/// Two refinements of the first of [`small_tables`].
fn small_refinements() -> &'static Refinements {
    static REFINEMENTS: OnceLock<Refinements> = OnceLock::new();
    REFINEMENTS.get_or_init(|| {
        let known = || small_tables().levels[0].channels.iter().cloned();
        let step = |factors: [u16; 4], order: Vec<u16>| {
            let channels = known().chain(known()).collect();
            let tables = LevelTables::with_given(channels, order, 4).expect("tables");
            Refinement::new(factors.to_vec(), tables).expect("a refinement")
        };
        Refinements::new(vec![step([3, 1, 5, 3], vec![4, 6, 7]), step([3, 3, 1, 255], vec![7, 5, 4])]).expect("refinements")
    })
}

/// A round of the aggregator whose parties' keys are known.
pub fn small_round() -> &'static RoundPlan {
    static ROUND: OnceLock<RoundPlan> = OnceLock::new();
    ROUND.get_or_init(|| {
        let key = |p: u8| EnvelopeKey::from_bytes(&[p; 32]).expect("a key").public().to_vec().into();
        let config = RoundConfig {
            version: 1,
            task: vec![1; 32].into(),
            round: 2,
            mode: Mode::Boolean3.into(),
            dim: 100,
            transform: Transform::Hadamard.into(),
            norm: 1.0,
            rotation: vec![3; 32].into(),
            min_clients: 2,
            max_clients: 10,
            envelope_keys: (1..4).map(key).collect(),
            authorities: vec![vec![4; 32].into()],
            ..RoundConfig::default()
        };
        RoundPlan::encode(&config).expect("a round")
    })
}

/// Round configurations; one that is read must allow what its sizes say.
pub fn round(data: &[u8]) {
    if let Ok(plan) = RoundPlan::decode(data) {
        assert_eq!(plan.bytes(), data);
        assert!(plan.bits() >= plan.config().dim as usize && plan.body_bytes() >= plan.bits() / 8);
    }
}

/// Reports of a round, and the envelopes in them.
pub fn report(data: &[u8]) {
    let Ok(header) = ReportHeader::decode(data) else { return };
    let plan = small_round();
    if let Ok(id) = reports::check(plan, &header, 0) {
        let _ = reports::check_body(plan, &id, data);
        for (party, envelope) in (0..).zip(&header.envelopes) {
            let key = EnvelopeKey::from_bytes(&[party + 1; 32]).expect("a key");
            let _ = key.open(&id, party, envelope, plan.seeds(party));
        }
    }
}

/// Models as clients fetch them.
pub fn model(data: &[u8]) {
    if let Ok(model) = Model::decode(data) {
        let again = Model::decode(&model.encode().expect("a model that was read")).expect("a model that was written");
        assert_eq!(again, model);
    }
}

/// Whole containers, as they come from clients.
pub fn container(data: &[u8]) {
    if let Ok(c) = Container::parse(data) {
        let hash = BundleHash([0; 32]);
        if let Ok(symbols) = c.decode(&hash, SHAPE, small_tables()) {
            assert_eq!(symbols.len(), SHAPE.symbols());
        }
    }
}

/// Payloads behind a sound header; what decodes must encode to the same bytes.
pub fn payload(data: &[u8]) {
    for level in &small_tables().levels {
        if let Ok(symbols) = coder::decode(data, level, SHAPE) {
            let again = coder::encode(&symbols, level, SHAPE).expect("decoded symbols are codable");
            assert_eq!(coder::decode(&again, level, SHAPE).as_deref(), Ok(symbols.as_slice()));
        }
    }
}

/// Progressive bitstreams, and payloads of refinements behind sound checksums.
pub fn progressive(data: &[u8]) {
    let (tables, refinements) = (small_tables(), small_refinements());
    if let Ok(parsed) = Progressive::parse(data) {
        let mut out = Vec::new();
        if parsed.decode_into(&BundleHash([0; 32]), SHAPE, (tables, Some(refinements)), &mut out).is_ok() {
            assert_eq!(out.len(), SHAPE.symbols());
        }
    }
    let mut symbols: Vec<i32> = (0..SHAPE.symbols() as i32).map(|i| i % 5 - 2).collect();
    for step in refinements.steps() {
        let Ok(finer) = step.decode(data, &symbols, SHAPE) else { return };
        let again = step.encode(&symbols, &finer, SHAPE).expect("decoded symbols are codable");
        assert_eq!(step.decode(&again, &symbols, SHAPE).as_deref(), Ok(finer.as_slice()));
        symbols = finer;
    }
}

/// Files of refinements.
pub fn refinements(data: &[u8]) {
    if let Ok(r) = Refinements::from_bytes(data) {
        assert_eq!(r.to_bytes(), data);
    }
}

/// Entropy-table files.
pub fn tables(data: &[u8]) {
    if let Ok(t) = Tables::from_bytes(data) {
        let written = t.to_bytes();
        // older versions are read, the current one alone is written
        if data[4] == written[4] {
            assert_eq!(written, data);
        }
        assert_eq!(Tables::from_bytes(&written).expect("tables that were written").to_bytes(), written);
    }
}

/// Manifests.
pub fn manifest(data: &[u8]) {
    let read = |_: &str| Ok(data.to_vec());
    let _ = isthmus_codec::Bundle::load(read, |_| false);
}

/// AVIF files.
pub fn avif(data: &[u8]) {
    if let Ok(rgb) = isthmus_avif::decode(data) {
        assert_eq!(rgb.data().len() as u64, u64::from(rgb.width()) * u64::from(rgb.height()) * 3);
    }
}

/// Raw features; the first byte says how they are written.
pub fn features(data: &[u8]) {
    const VALUES: usize = 96;
    if let Some((encoding, data)) = data.split_first()
        && let Ok(values) = (FeatureMap { block: 0, encoding: i32::from(*encoding) }).decode(data, VALUES)
    {
        assert!(values.len() == VALUES && values.iter().all(|v| v.is_finite()));
    }
}

/// JPEG, PNG and WebP files.
pub fn image(data: &[u8]) {
    if let Ok(rgb) = isthmus_pixels::decode(data) {
        assert_eq!(rgb.data().len() as u64, u64::from(rgb.width()) * u64::from(rgb.height()) * 3);
        if u64::from(rgb.width()) * u64::from(rgb.height()) < 1 << 20 {
            let _ = rgb.network_input(32).map(|r| assert_eq!((r.width(), r.height()), (32, 32)));
        }
    }
}

/// Legacy `.pth` files.
pub fn pth(data: &[u8]) {
    if let Ok(tensors) = isthmus_nets::pth::read(data) {
        for (_, t) in tensors {
            assert_eq!(t.data.len(), t.shape.iter().product::<usize>());
        }
    }
}

/// Qt resource archives.
pub fn rcc(data: &[u8]) {
    let _ = isthmus_trainer::rcc::files(data, |_| true);
}
