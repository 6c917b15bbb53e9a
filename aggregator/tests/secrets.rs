//! Logs, stores and the memory of running parties, searched for what they must not hold.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::HashMap;
use std::io::{Read, Seek, SeekFrom};

use common::{LIMIT, Parties, random_bits, request, sums};
use isthmus_federate::report::make;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha20Rng;

const CLIENTS: usize = 5;
const WINDOW: usize = 32;
/// Mappings beyond this are files and libraries, not what a party computes with.
const LARGEST: u64 = 1 << 30;

/// Something that is looked for, by its first 32 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// Seed of parties 0 and 1.
    K1,
    /// Seed of parties 1 and 2.
    K2,
    /// A client's bits.
    Plain,
    /// Those bits masked by both seeds, as parties 0 and 2 store them: the control, it must be found.
    Masked,
}

struct Needles(HashMap<[u8; 8], Vec<([u8; WINDOW], Kind)>>);

impl Needles {
    fn new(wanted: &[([u8; WINDOW], Kind)]) -> Self {
        let mut map: HashMap<[u8; 8], Vec<_>> = HashMap::new();
        for (needle, kind) in wanted {
            map.entry(needle[..8].try_into().unwrap()).or_default().push((*needle, *kind));
        }
        Self(map)
    }

    /// What of it is in `bytes`.
    fn found(&self, bytes: &[u8], found: &mut Vec<Kind>) {
        for at in 0..bytes.len().saturating_sub(WINDOW - 1) {
            let first: [u8; 8] = bytes[at..at + 8].try_into().unwrap();
            if let Some(candidates) = self.0.get(&first) {
                found.extend(candidates.iter().filter(|(n, _)| bytes[at..at + WINDOW] == *n).map(|(_, kind)| *kind));
            }
        }
        found.sort_unstable();
        found.dedup();
    }
}

fn on_disk(parties: &Parties, party: usize, needles: &Needles) -> Vec<Kind> {
    let mut found = Vec::new();
    needles.found(&std::fs::read(aggregator::Config::open(&parties.trial.configs[party]).unwrap().data).unwrap(), &mut found);
    let log = parties.log(party);
    needles.found(log.as_bytes(), &mut found);
    // printed as digits
    for (needle, kind) in needles.0.values().flatten() {
        let hex: String = needle[..8].iter().map(|b| format!("{b:02x}")).collect();
        assert!(!log.to_lowercase().contains(&hex), "{kind:?} is in the log of party {party}");
    }
    found
}

/// What a process can write to, read through /proc.
fn in_memory(pid: u32, needles: &Needles) -> Vec<Kind> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mut memory = std::fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut found = Vec::new();
    for line in maps.lines().filter(|l| l.contains(" rw")) {
        let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let (from, to) = (u64::from_str_radix(from, 16).unwrap(), u64::from_str_radix(to, 16).unwrap());
        if to - from > LARGEST {
            continue;
        }
        let mut bytes = vec![0; (to - from) as usize];
        if memory.seek(SeekFrom::Start(from)).is_ok() && memory.read_exact(&mut bytes).is_ok() {
            needles.found(&bytes, &mut found);
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn threat_secrets_no_party_keeps_what_another_one_or_nobody_may_know() {
    let parties = Parties::start(CLIENTS);
    let mut operator = parties.operator().await;
    // one more than come: the round stays open until it is sealed
    let wanted = isthmus_proto::aggregator_v1::CreateRoundRequest { max_clients: 9, ..request(CLIENTS as u32 + 1, 20_000) };
    let round = operator.create(wanted).await.unwrap().round;
    let participant = parties.participant().await;
    let plan = parties.open_round(&participant, 0).await;
    let (mut wanted, mut all) = (Vec::new(), Vec::new());
    for c in 0..CLIENTS {
        let bits = random_bits(plan.bits(), 900 + c as u64);
        let report = make(&plan, &bits, &parties.identity(c), &mut ChaCha20Rng::seed_from_u64(c as u64)).unwrap();
        // the same generator again: name of the report, then the seeds
        let mut again = ChaCha20Rng::seed_from_u64(c as u64);
        let mut draw = |n: usize| {
            let mut bytes = vec![0; n];
            again.fill_bytes(&mut bytes);
            bytes
        };
        assert_eq!(draw(16), report.header.report);
        for kind in [Kind::K1, Kind::K2] {
            wanted.push((draw(WINDOW).try_into().unwrap(), kind));
        }
        wanted.push((bits.to_bytes()[..WINDOW].try_into().unwrap(), Kind::Plain));
        wanted.push((report.body[..WINDOW].try_into().unwrap(), Kind::Masked));
        participant.upload_until_stored(&report, LIMIT).await.unwrap();
        all.push(bits);
    }
    let needles = Needles::new(&wanted);
    let pids: Vec<u32> = parties.processes.iter().map(|p| p.as_ref().unwrap().id()).collect();
    for (party, pid) in pids.iter().enumerate() {
        // party 1 holds no body
        let expected: &[Kind] = if party == 1 { &[] } else { &[Kind::Masked] };
        assert_eq!(on_disk(&parties, party, &needles), expected, "party {party}, on disk, uploads stored");
        let found = in_memory(*pid, &needles);
        let never = [Kind::Plain, [Kind::K2, Kind::Plain, Kind::K1][party]];
        assert!(!found.iter().any(|k| never.contains(k)), "party {party} holds {found:?}");
    }
    operator.seal(round).await.unwrap();
    operator.wait(round, LIMIT, |_| ()).await.unwrap();
    let result = operator.result(round).await.unwrap();
    assert_eq!(result.counts[..], sums(&all, plan.bits())[..]);
    for (party, pid) in pids.iter().enumerate() {
        let found = in_memory(*pid, &needles);
        assert!(!found.iter().any(|k| [Kind::K1, Kind::K2, Kind::Plain].contains(k)), "party {party} still holds {found:?}");
        assert!(!on_disk(&parties, party, &needles).iter().any(|k| *k != Kind::Masked), "party {party}, on disk, done");
    }
}
