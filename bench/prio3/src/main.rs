//! What Prio3SumVec (two aggregators, one bit a coordinate, 128-bit field, its own optimal chunk length) costs: bytes of an upload, CPU seconds of
//! a client and of both aggregators. `cargo run --release --manifest-path bench/prio3/Cargo.toml -- REPORTS COORDINATES`; JSON on standard output.
//!
//! One thread; messages stay in memory. The sums are checked against the plaintext.

use std::error::Error;
use std::time::{Duration, Instant};

use prio::codec::Encode;
use prio::vdaf::prio3::{Prio3, optimal_chunk_length};
use prio::vdaf::{Aggregator, Client, Collector, VerifyTransition};

const CONTEXT: &[u8] = b"cost";

fn timed<T>(total: &mut Duration, f: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let done = f();
    *total += began.elapsed();
    done
}

fn main() -> Result<(), Box<dyn Error>> {
    let number = |place: usize, default: usize| std::env::args().nth(place).map_or(Ok(default), |text| text.parse());
    let (reports, dim) = (number(1, 5)?, number(2, 100_000)?);
    let vdaf = Prio3::new_sum_vec(2, 1, dim, optimal_chunk_length(dim))?;
    let (verify_key, mut client, mut leader, mut helper) = ([7; 32], Duration::ZERO, Duration::ZERO, Duration::ZERO);
    let (mut upload, mut peer) = (0, 0);
    let mut sums = [vdaf.aggregate_init(&()), vdaf.aggregate_init(&())];
    let mut expected = vec![0u128; dim];
    for r in 0..reports {
        let bits: Vec<u128> = (0..dim).map(|j| ((j.wrapping_mul(2_654_435_761) >> 13) + r) as u128 & 1).collect();
        expected.iter_mut().zip(&bits).for_each(|(e, b)| *e += b);
        let mut nonce = [0; 16];
        nonce[..8].copy_from_slice(&(r as u64).to_le_bytes());
        let (public, inputs) = timed(&mut client, || vdaf.shard(CONTEXT, &bits, &nonce))?;
        upload = public.get_encoded()?.len() + inputs[0].get_encoded()?.len() + inputs[1].get_encoded()?.len();
        let (state0, share0) = timed(&mut leader, || vdaf.verify_init(&verify_key, CONTEXT, 0, &(), &nonce, &public, &inputs[0]))?;
        let (state1, share1) = timed(&mut helper, || vdaf.verify_init(&verify_key, CONTEXT, 1, &(), &nonce, &public, &inputs[1]))?;
        peer = share1.get_encoded()?.len();
        let message = timed(&mut leader, || vdaf.verifier_shares_to_message(CONTEXT, &(), [share0, share1]))?;
        for (i, state) in [state0, state1].into_iter().enumerate() {
            let total = if i == 0 { &mut leader } else { &mut helper };
            let done = timed(total, || vdaf.verify_next(CONTEXT, state, message.clone()))?;
            let VerifyTransition::Finish(output) = done else { return Err("one round is enough".into()) };
            timed(total, || prio::vdaf::Aggregatable::accumulate(&mut sums[i], &output))?;
        }
    }
    if vdaf.unshard(&(), sums, reports)? != expected {
        return Err("the sums are wrong".into());
    }
    let each = |total: Duration| total.as_secs_f64() / reports as f64;
    println!(
        "{{\"reports\": {reports}, \"coordinates\": {dim}, \"upload_bytes\": {upload}, \"peer_bytes_per_report\": {peer}, \"client_s\": {:.4}, \
         \"leader_s_per_report\": {:.4}, \"helper_s_per_report\": {:.4}}}",
        each(client),
        each(leader),
        each(helper)
    );
    Ok(())
}
