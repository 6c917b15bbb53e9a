//! Every target over its corpus, and over thousands of seeded mutations of it.

use std::path::PathBuf;

use isthmus_fuzz_targets::TARGETS;

const MUTATIONS: usize = 400;

struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % below.max(1)
    }
}

fn mutate(seed: &[u8], random: &mut Random) -> Vec<u8> {
    let mut out = seed.to_vec();
    for _ in 0..=random.next(6) {
        let at = random.next(out.len());
        match random.next(5) {
            0 if !out.is_empty() => out[at] ^= 1 << random.next(8),
            1 if !out.is_empty() => out[at] = [0, 1, 0x7f, 0x80, 0xff][random.next(5)],
            2 => out.truncate(at),
            3 if out.len() >= at + 4 => out[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes()),
            _ => {
                let from = random.next(out.len());
                let piece = out[from..(from + random.next(64)).min(out.len())].to_vec();
                out.splice(at..at, piece);
            }
        }
    }
    out
}

#[test]
fn every_target_survives_its_corpus_and_mutations_of_it() {
    let corpus = isthmus_testkit::root().join("fuzz/corpus");
    for (name, target) in TARGETS {
        let folder = corpus.join(name);
        let mut files: Vec<PathBuf> = std::fs::read_dir(&folder).expect("a corpus folder").map(|e| e.expect("entry").path()).collect();
        files.sort();
        assert!(!files.is_empty(), "fuzz/corpus/{name} is empty");
        let mut random = Random(0x1234_5678_9abc_def1);
        for file in files {
            let seed = std::fs::read(file).expect("corpus file");
            target(&seed);
            for _ in 0..MUTATIONS {
                target(&mutate(&seed, &mut random));
            }
        }
    }
}

/// A mutation of what is refused outright explores nothing.
#[test]
fn the_corpus_of_tables_holds_files_that_are_read() {
    let folder = isthmus_testkit::root().join("fuzz/corpus/tables");
    for name in ["static", "contexts", "networks", "silent", "silent-static"] {
        let bytes = std::fs::read(folder.join(name)).expect("corpus file");
        isthmus_codec::Tables::from_bytes(&bytes).expect(name);
    }
}
