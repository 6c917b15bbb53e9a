//! Tables chosen by earlier symbols: round trips, sizes, and everything a table file may not say.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use isthmus_codec::{
    BundleHash, ChannelTable, CodecError, Container, Contexts, Distribution, Input, LatentShape, LevelTables, Network, Predictor, Tables,
    Tap, coder, container, pmf,
};
use proptest::prelude::*;

const SHAPE: LatentShape = LatentShape { channels: 4, height: 6, width: 9 };
const HASH: BundleHash = BundleHash([9; 32]);

fn geometric(half: i32, decay: f64) -> Distribution {
    let raw: Vec<f64> = (-half..=half).map(|s| decay.powi(s.abs())).collect();
    let total: f64 = raw.iter().sum::<f64>() * 1.001;
    let pmf: Vec<f64> = raw.iter().map(|p| p / total).collect();
    Distribution::new(-half, pmf::quantise(&pmf, 0.001).unwrap()).unwrap()
}

fn tap(channel: u16, dy: i8, dx: i8, weight: i16) -> Tap {
    Tap { channel, dy, dx, weight }
}

/// Three magnitude bins of two signed bins each, predicted from `taps`.
fn contexts(taps: &[Tap]) -> Contexts {
    let predictor = Predictor { bias: 100, taps: taps.to_vec() };
    let distributions = [0.05, 0.1, 0.4, 0.45, 0.7, 0.75].map(|decay| geometric(8, decay)).to_vec();
    Contexts::new([predictor.clone(), predictor], vec![500, 1500], vec![vec![-5]; 3], distributions).unwrap()
}

fn channel(contexts: Contexts) -> ChannelTable {
    ChannelTable::with_contexts(1.5, 0.7, 0.25, contexts).unwrap()
}

/// Coded in the order 2, 0, 3, 1; channel 3 is static.
fn tables() -> Tables {
    let own = |c| [tap(c, 0, -1, 900), tap(c, -1, 0, 700), tap(c, -2, 2, -50)];
    let channels = vec![
        channel(contexts(&[&own(0)[..], &[tap(2, 0, 0, 300), tap(2, 1, 1, -200)]].concat())),
        channel(contexts(&[&own(1)[..], &[tap(3, 2, -2, 400), tap(0, 0, 0, 300)]].concat())),
        channel(contexts(&own(2))),
        channel(Contexts::none(geometric(5, 0.3))),
    ];
    Tables { levels: vec![LevelTables::in_order(channels, vec![2, 0, 3, 1]).unwrap()] }
}

fn symbols(seed: u64) -> Vec<i32> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..SHAPE.symbols()).map(|_| if next() % 50 == 0 { (next() % 4000) as i32 - 2000 } else { (next() % 5) as i32 - 2 }).collect()
}

fn decode(bytes: &[u8]) -> Result<Vec<i32>, CodecError> {
    Container::parse(bytes)?.decode(&HASH, SHAPE, &tables())
}

/// A network whose units read what is at these places, and thresholds that its estimates pass now and then.
fn network(places: &[(u16, i8, i8)]) -> Contexts {
    let some = |seed: usize| std::array::from_fn(|unit| ((seed * 37 + unit * 101) % 161) as i16 - 80);
    let input = |(i, &(channel, dy, dx))| Input { channel, dy, dx, signed: some(i), magnitude: some(i + 50) };
    let network = Network {
        inputs: places.iter().enumerate().map(input).collect(),
        bias: std::array::from_fn(|unit| unit as i16 * 30 - 200),
        outputs: [some(90), some(120)],
    };
    let distributions = [0.05, 0.1, 0.4, 0.45, 0.7, 0.75].map(|decay| geometric(8, decay)).to_vec();
    Contexts::new(network, vec![-10201, 24937], vec![vec![24731], vec![20775], vec![58026]], distributions).unwrap()
}

/// As [`tables`], two channels with networks.
fn networks() -> Tables {
    let mut channels = tables().levels.remove(0).channels;
    channels[0] = channel(network(&[(0, 0, -1), (0, -1, 2), (0, -2, -2), (2, 0, 0), (2, 2, -1)]));
    channels[1] = channel(network(&[(1, 0, -1), (1, 0, -2), (1, -1, 0), (3, 1, 1), (0, 0, 0), (2, -2, 0)]));
    Tables { levels: vec![LevelTables::in_order(channels, vec![2, 0, 3, 1]).unwrap()] }
}

/// The distributions that networks choose, as docs/wire-format.md says.
#[test]
fn networks_choose_as_the_format_says() {
    let tables = networks();
    let level = &tables.levels[0];
    let mut chosen = [0; 6];
    for seed in 1..20 {
        let symbols = symbols(seed);
        let bins = level.bins(&symbols, SHAPE).unwrap();
        for (c, y, x) in (0..2).flat_map(|c| (0..6i32).flat_map(move |y| (0..9i32).map(move |x| (c, y, x)))) {
            let contexts = &level.channels[c].contexts;
            let isthmus_codec::Estimator::Network(network) = contexts.estimator() else { panic!("a network") };
            let at = |i: &Input| {
                let (y, x) = (y + i32::from(i.dy), x + i32::from(i.dx));
                let inside = (0..6).contains(&y) && (0..9).contains(&x);
                if inside { i64::from(symbols[usize::from(i.channel) * SHAPE.positions() + (y * 9 + x) as usize]) } else { 0 }
            };
            let unit = |u: usize| {
                let term = |i: &Input| {
                    let s = at(i);
                    i64::from(i.signed[u]) * s.clamp(-31, 31) + i64::from(i.magnitude[u]) * s.abs().min(15)
                };
                let sum = i64::from(network.bias[u]) + network.inputs.iter().map(term).sum::<i64>();
                sum.max(0)
            };
            let [m, v] = network.outputs.map(|w| (0..16).map(|u| i64::from(w[u]) * unit(u)).sum::<i64>());
            let reached = |cuts: &[i32], value: i64| cuts.iter().filter(|c| i64::from(**c) <= value).count();
            let bin = reached(contexts.cuts(), m);
            let wanted = bin * 2 + reached(&contexts.signed_cuts()[bin], v);
            assert_eq!(bins[c * SHAPE.positions() + (y * 9 + x) as usize], wanted, "seed {seed}, channel {c}, row {y}, column {x}");
            chosen[wanted] += 1;
        }
    }
    assert!(chosen.iter().all(|n| *n > 20), "all are chosen: {chosen:?}");
}

#[test]
fn networks_round_trip_in_containers_and_files() {
    let tables = networks();
    let bytes = tables.to_bytes();
    assert_eq!(bytes[4], 4);
    let back = Tables::from_bytes(&bytes).unwrap();
    assert_eq!(back.to_bytes(), bytes);
    for seed in 1..60 {
        let container = container::encode(&symbols(seed), 1, &HASH, SHAPE, &tables).unwrap();
        assert_eq!(Container::parse(&container).unwrap().decode(&HASH, SHAPE, &back).unwrap(), symbols(seed));
        assert_ne!(container, container::encode(&symbols(seed), 1, &HASH, SHAPE, &self::tables()).unwrap());
    }
    let golden = container::encode(&symbols(1), 1, &HASH, SHAPE, &tables).unwrap();
    let digest = isthmus_codec::bundle::sha256(&golden);
    assert_eq!((golden.len(), digest.as_str()), GOLDEN_NETWORKS, "what networks choose changed: raise the version of tables");
    for len in 0..bytes.len() {
        assert!(Tables::from_bytes(&bytes[..len]).is_err(), "length {len}");
    }
    // magic, version, levels, channels, coded ones and their order; gain, inverse, median, numbers of thresholds
    let units = 18 + 14;
    assert_eq!(bytes[units], 16);
    let mut other = bytes.clone();
    other[units] = 8;
    assert!(Tables::from_bytes(&other).unwrap_err().to_string().contains("a network of 8 units"));
}

const GOLDEN_NETWORKS: (usize, &str) = (136, "279e01934315583ed45447abe1f3b702f2675f0322768a6212bb3baf395233e4");

#[test]
fn networks_out_of_bounds_are_refused() {
    let level = |places: &[(u16, i8, i8)]| LevelTables::in_order(vec![channel(network(places)), channel(contexts(&[]))], vec![0, 1]);
    assert!(level(&[(0, -1, 2), (0, 0, -1)]).is_ok());
    for future in [(0, 0, 0), (0, 0, 1), (0, 1, -1), (1, 0, 0), (7, 0, 0)] {
        assert!(matches!(level(&[future]), Err(CodecError::BadTables(_))), "{future:?}");
    }
    let new = |inputs: usize, dx, bias: i16| {
        let input = Input { channel: 0, dy: 0, dx, signed: [i16::MIN; 16], magnitude: [i16::MIN; 16] };
        let network = Network { inputs: vec![input; inputs], bias: [bias; 16], outputs: [[i16::MIN; 16]; 2] };
        Contexts::new(network, vec![0], vec![vec![0]; 2], vec![geometric(2, 0.5); 4])
    };
    assert!(new(65, -1, 0).is_err(), "too many inputs");
    assert!(new(1, -3, 0).is_err(), "too far");
    // sums that leave their range leave it on both sides
    for (bias, symbol) in [(i16::MAX, -2000), (i16::MIN, 2000), (i16::MAX, 2000)] {
        let shape = LatentShape { channels: 1, ..SHAPE };
        let level = LevelTables::new(vec![channel(new(64, -1, bias).unwrap())]).unwrap();
        let symbols = vec![symbol; shape.symbols()];
        assert_eq!(coder::decode(&coder::encode(&symbols, &level, shape).unwrap(), &level, shape).unwrap(), symbols);
    }
}

/// The bytes of this container are part of the format: they must never change.
#[test]
fn golden_bytes() {
    let bytes = container::encode(&symbols(1), 1, &HASH, SHAPE, &tables()).unwrap();
    let digest = isthmus_codec::bundle::sha256(&bytes);
    assert_eq!((bytes.len(), digest.as_str()), GOLDEN, "the container format changed: raise its version");
}

const GOLDEN: (usize, &str) = (128, "016ec45e5aeea9a441a1187a3c1b3b1a3765f5e95d5ad1b7c59e4cfe1e409e9b");

#[test]
fn threat_corruption_every_bit_flip_and_truncation_is_refused() {
    let good = container::encode(&symbols(3), 1, &HASH, SHAPE, &tables()).unwrap();
    assert_eq!(decode(&good).unwrap(), symbols(3));
    for byte in 0..good.len() {
        assert!(decode(&good[..byte]).is_err(), "length {byte}");
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[byte] ^= 1 << bit;
            assert!(decode(&bad).is_err(), "flip of bit {bit} of byte {byte} went unnoticed");
        }
    }
}

#[test]
fn contexts_that_read_the_future_are_refused() {
    let level = |taps: &[Tap], order: Vec<u16>| {
        let channels = vec![channel(contexts(taps)), channel(contexts(&[]))];
        LevelTables::in_order(channels, order)
    };
    assert!(level(&[tap(0, -1, 2, 1), tap(0, 0, -1, 1)], vec![0, 1]).is_ok());
    for future in [tap(0, 0, 0, 1), tap(0, 0, 1, 1), tap(0, 1, -1, 1), tap(1, 0, 0, 1), tap(7, 0, 0, 1)] {
        assert!(matches!(level(&[future], vec![0, 1]), Err(CodecError::BadTables(_))), "{future:?}");
    }
    assert!(level(&[tap(1, 1, 1, 1)], vec![1, 0]).is_ok(), "channel 1 comes first");
    for order in [vec![0, 0], vec![0, 2], vec![0, 1, 1]] {
        assert!(level(&[], order.clone()).is_err(), "{order:?}");
    }
    assert!(level(&[tap(1, 1, 1, 1)], vec![0]).is_err(), "channel 1 is never coded");
}

#[test]
fn contexts_out_of_bounds_are_refused() {
    let new = |taps: Vec<Tap>, bias, cuts: Vec<i32>, signed: Vec<Vec<i32>>, n: usize| {
        let predictor = Predictor { bias, taps };
        Contexts::new([predictor, Predictor::default()], cuts, signed, vec![geometric(2, 0.5); n])
    };
    assert!(new(vec![], 0, vec![1, 2], vec![vec![0]; 3], 6).is_ok());
    assert!(new(vec![], 0, vec![2, 1], vec![vec![0]; 3], 6).is_err(), "falling thresholds");
    assert!(new(vec![], 0, vec![1, 2], vec![vec![0]; 2], 6).is_err(), "a bin without signed thresholds");
    assert!(new(vec![], 0, vec![1, 2], vec![vec![0], vec![], vec![0]], 5).is_err(), "bins of different size");
    assert!(new(vec![], 0, vec![1, 2], vec![vec![0]; 3], 5).is_err(), "a distribution is missing");
    assert!(new(vec![], 0, vec![0; 32], vec![vec![]; 33], 33).is_err(), "too many thresholds");
    assert!(new(vec![tap(0, -3, 0, 1)], 0, vec![], vec![vec![]], 1).is_err(), "too far");
    assert!(new(vec![tap(0, 0, i8::MIN, 1)], 0, vec![], vec![vec![]], 1).is_err(), "too far");
    assert!(new(vec![tap(0, 0, -1, 1); 65], 0, vec![], vec![vec![]], 1).is_err(), "too many taps");
    assert!(new(vec![], i32::MIN, vec![], vec![vec![]], 1).is_err(), "huge bias");
}

#[test]
fn table_files_round_trip_and_truncations_are_refused() {
    let bytes = tables().to_bytes();
    let back = Tables::from_bytes(&bytes).unwrap();
    assert_eq!(back.to_bytes(), bytes);
    let container = container::encode(&symbols(5), 1, &HASH, SHAPE, &back).unwrap();
    assert_eq!(decode(&container).unwrap(), symbols(5));
    for len in 0..bytes.len() {
        assert!(Tables::from_bytes(&bytes[..len]).is_err(), "length {len}");
    }
    let mut old = bytes;
    old[4] = 1;
    assert!(Tables::from_bytes(&old).unwrap_err().to_string().contains("export the bundle again"));
}

/// What a level leaves out of its order costs nothing, and stands for a symbol of zero on both sides.
#[test]
fn silent_channels_are_not_coded() {
    let all = || tables().levels.remove(0);
    let without = |silent: &[u16]| Tables { levels: vec![all().silenced(silent).unwrap()] };
    let tables = without(&[1]);
    assert_eq!((tables.levels[0].order(), tables.levels[0].silent().collect::<Vec<_>>()), (&[2u16, 0, 3][..], vec![1]));
    let positions = SHAPE.positions();
    let latent: Vec<f32> = symbols(4).iter().map(|&s| (s as f32 + 0.25) / 1.5).collect();
    let level = tables.level(1).unwrap();
    let quantised = level.quantise(&latent, SHAPE).unwrap();
    assert!(quantised[positions..2 * positions].iter().all(|&s| s == 0));
    assert_ne!(quantised, all().quantise(&latent, SHAPE).unwrap());

    let bytes = container::encode(&quantised, 1, &HASH, SHAPE, &tables).unwrap();
    let container = Container::parse(&bytes).unwrap();
    assert_eq!(container.decode(&HASH, SHAPE, &tables).unwrap(), quantised);
    let (mut found, mut wanted) = (vec![7.0], vec![7.0]);
    container.decode_into(&HASH, SHAPE, &tables, &mut found).unwrap();
    level.dequantise_into(&quantised, SHAPE, &mut wanted).unwrap();
    assert_eq!(found, wanted);
    let all_coded = container::encode(&quantised, 1, &HASH, SHAPE, &Tables { levels: vec![all()] }).unwrap();
    assert!(bytes.len() < all_coded.len(), "{} of {}", bytes.len(), all_coded.len());

    let refused = container::encode(&symbols(4), 1, &HASH, SHAPE, &tables).unwrap_err().to_string();
    assert!(refused.contains("channel 1 is silent"), "{refused}");
    assert!(all().silenced(&[0]).unwrap_err().to_string().contains("channel 1 is predicted from channel 0"));

    let back = Tables::from_bytes(&tables.to_bytes()).unwrap();
    assert_eq!((back.levels[0].order(), back.to_bytes()), (tables.levels[0].order(), tables.to_bytes()));

    // nothing is left to code
    let silent = without(&[1, 0, 2, 3]);
    let zeros = vec![0; SHAPE.symbols()];
    let bytes = container::encode(&zeros, 1, &HASH, SHAPE, &silent).unwrap();
    assert_eq!(bytes.len(), container::OVERHEAD);
    assert_eq!(Container::parse(&bytes).unwrap().decode(&HASH, SHAPE, &silent).unwrap(), zeros);
}

/// Bundles whose tables say nothing of silent channels are read as before.
#[test]
fn tables_of_version_2_are_read() {
    let new = tables().to_bytes();
    // after magic, version, levels and channels comes the number of coded ones
    let mut old = [&new[..8], &new[10..]].concat();
    old[4] = 2;
    assert_eq!(Tables::from_bytes(&old).unwrap().to_bytes(), new);
    let mut more = new;
    more[8] = 5;
    assert!(Tables::from_bytes(&more).unwrap_err().to_string().contains("5 of 4 channels are coded"));
}

#[test]
fn an_empty_latent_is_refused() {
    for (height, width) in [(0, 4), (4, 0), (0, 0)] {
        let shape = LatentShape { height, width, ..SHAPE };
        assert!(coder::decode(&[], &tables().levels[0], shape).unwrap_err().to_string().contains("empty"));
        assert!(coder::encode(&[], &tables().levels[0], shape).is_err());
    }
}

/// Whatever part of a payload has come, from its end on, decodes to the first symbols in coding order and to no wrong one.
#[test]
fn every_end_of_a_payload_decodes() {
    let tables = tables();
    let level = tables.level(1).unwrap();
    for seed in 1..40 {
        let symbols = symbols(seed);
        let payload = coder::encode(&symbols, &level, SHAPE).unwrap();
        let in_order = |s: &[i32]| -> Vec<i32> {
            level.order().iter().flat_map(|&c| s[usize::from(c) * SHAPE.positions()..][..SHAPE.positions()].to_vec()).collect()
        };
        let mut before = 0;
        for words in 0..payload.len() / 4 {
            let part = coder::decode_end(&payload[payload.len() - 4 * words..], &level, SHAPE).unwrap();
            let (found, wanted) = (in_order(&part.symbols), in_order(&symbols));
            assert_eq!(found[..part.known], wanted[..part.known], "{words} words");
            assert!(found[part.known..].iter().all(|s| *s == 0));
            assert!(part.known >= before && part.known < SHAPE.symbols(), "{} after {before}", part.known);
            before = part.known;
        }
        // less than the state and one escape is missing at the end
        assert!(before + 40 > SHAPE.symbols(), "{before} of {}", SHAPE.symbols());
    }
}

proptest! {
    #[test]
    fn symbols_round_trip(raw in prop::collection::vec(-32768i32..=32768, SHAPE.symbols()), seed: u64, wild: bool, nets: bool) {
        let s = if wild { raw } else { symbols(seed) };
        let tables = if nets { networks() } else { tables() };
        let bytes = container::encode(&s, 1, &HASH, SHAPE, &tables).unwrap();
        prop_assert_eq!(Container::parse(&bytes).and_then(|c| c.decode(&HASH, SHAPE, &tables)).unwrap(), s);
    }

    #[test]
    fn payload_is_within_one_percent_and_32_bytes_of_ideal(seed: u64) {
        let (t, s) = (tables(), symbols(seed));
        let payload = coder::encode(&s, &t.levels[0], SHAPE).unwrap();
        let ideal = coder::ideal_bits(&s, &t.levels[0], SHAPE).unwrap() / 8.0;
        prop_assert!(payload.len() as f64 <= ideal * 1.01 + 32.0, "{} bytes, ideal {ideal}", payload.len());
    }

    #[test]
    fn damaged_tables_and_payloads_never_panic(at in 0usize..4000, value: u8, nets: bool, payload in prop::collection::vec(any::<u8>(), 0..400)) {
        let tables = if nets { networks } else { tables };
        let mut bytes = tables().to_bytes();
        let at = at % bytes.len();
        bytes[at] = value;
        let level = match Tables::from_bytes(&bytes) {
            Ok(t) => t.levels.into_iter().next().unwrap(),
            Err(_) => tables().levels.remove(0),
        };
        if let Ok(decoded) = coder::decode(&payload, &level, SHAPE) {
            prop_assert_eq!(decoded.len(), SHAPE.symbols());
        }
    }
}
