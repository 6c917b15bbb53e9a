//! One function per parser that reads bytes from outside. None may panic, hang, or allocate without bound.

use std::sync::OnceLock;

use isthmus_codec::{
    BundleHash, ChannelTable, Container, Contexts, Distribution, LatentShape, LevelTables, Predictor, Tables, Tap, coder, pmf,
};

use offload_server::features::FeatureMap;

/// A target: any bytes must be survived.
pub type Target = fn(&[u8]);

/// Name and function of every target.
pub const TARGETS: [(&str, Target); 9] = [
    ("container", container),
    ("payload", payload),
    ("tables", tables),
    ("manifest", manifest),
    ("image", image),
    ("avif", avif),
    ("features", features),
    ("pth", pth),
    ("rcc", rcc),
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
        let level = |channels| LevelTables::new(channels).expect("a level");
        Tables { levels: vec![level((0..4).map(|_| channel()).collect()), level((0..4).map(dependent).collect())] }
    })
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

/// Entropy-table files.
pub fn tables(data: &[u8]) {
    if let Ok(t) = Tables::from_bytes(data) {
        assert_eq!(t.to_bytes(), data);
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
