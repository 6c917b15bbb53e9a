//! Generated gRPC code: messages, clients and servers.

pub mod bounded;

/// `isthmus.offload.v1`: photos and bitstreams in, labels or logits out.
pub mod offload_v1 {
    #![allow(missing_docs, clippy::all, clippy::pedantic)]
    tonic::include_proto!("isthmus.offload.v1");
}

/// `isthmus.aggregator.v1`: federated rounds with secure aggregation.
pub mod aggregator_v1 {
    #![allow(missing_docs, clippy::all, clippy::pedantic)]
    tonic::include_proto!("isthmus.aggregator.v1");
}

/// `inference`: the Open Inference Protocol, version 2.
pub mod inference {
    #![allow(missing_docs, clippy::all, clippy::pedantic)]
    tonic::include_proto!("inference");
}

/// The `k` best of `logits` as labels with their softmax probabilities, best first.
pub fn best(logits: &[f32], k: usize, names: &[String]) -> Vec<offload_v1::Label> {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|l| (l - highest).exp()).sum();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    let label = |i: usize| offload_v1::Label {
        index: i as u32,
        name: names.get(i).cloned().unwrap_or_default(),
        score: (logits[i] - highest).exp() / sum,
    };
    order.into_iter().take(k).map(label).collect()
}

/// Encoded `FileDescriptorSet` of all services, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/isthmus.desc"));

#[cfg(test)]
mod tests {
    use super::best;

    #[test]
    fn the_best_labels_come_first_and_scores_are_probabilities() {
        let names: Vec<String> = ["a", "b", "c"].map(String::from).to_vec();
        let labels = best(&[1.0, 3.0, 2.0], 2, &names);
        assert_eq!(labels.iter().map(|l| l.name.as_str()).collect::<Vec<_>>(), ["b", "c"]);
        assert!((labels[0].score - 0.665).abs() < 1e-3);
        assert_eq!(best(&[0.0; 3], 10, &names).len(), 3);
    }
}
