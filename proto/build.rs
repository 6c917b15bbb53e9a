//! Compiles the .proto files without a system protoc and keeps the descriptor set for reflection.

use std::path::PathBuf;

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["proto/offload/v1/offload.proto", "proto/aggregator/v1/aggregator.proto", "proto/inference/grpc_service.proto"];
    let descriptors = protox::compile(files, ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?).join("isthmus.desc");
    std::fs::write(out, descriptors.encode_to_vec())?;
    tonic_prost_build::configure().codec_path("crate::bounded::Bounded").bytes(".").compile_fds(descriptors)?;
    println!("cargo:rerun-if-changed=proto");
    Ok(())
}
