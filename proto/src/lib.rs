//! Generated gRPC code: messages, clients and servers.

/// `isthmus.offload.v1`: photos and bitstreams in, labels or logits out.
pub mod offload_v1 {
    #![allow(missing_docs, clippy::all, clippy::pedantic)]
    tonic::include_proto!("isthmus.offload.v1");
}

/// Encoded `FileDescriptorSet` of all services, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/isthmus.desc"));
