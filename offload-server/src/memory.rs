//! The program's allocator, libtorch's included (jemalloc stands in for the C library's), and how much memory is in use.
//!
//! `isthmus_nets::process::REUSED_HEAP` is how it is set. Of the program, not of the library: sanitisers bring their own allocator.

use std::time::Duration;

use metrics::{describe_gauge, gauge};
use tikv_jemalloc_ctl::{epoch, stats};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const PERIOD: Duration = Duration::from_secs(1);

/// Keeps gauges of the process's memory current.
pub(crate) async fn watch() {
    describe_gauge!("isthmus_memory_allocated_bytes", "Memory that the server and its networks hold");
    describe_gauge!("isthmus_memory_resident_bytes", "The same with what the allocator keeps for reuse");
    describe_gauge!("isthmus_memory_process_bytes", "Resident memory of the process, as the operating system counts it");
    let mut ticks = tokio::time::interval(PERIOD);
    loop {
        ticks.tick().await;
        if let Some(resident) = process_resident() {
            gauge!("isthmus_memory_process_bytes").set(resident as f64);
        }
        // statistics are of the last epoch
        let read = epoch::advance().and_then(|_| Ok((stats::allocated::read()?, stats::resident::read()?)));
        match read {
            Ok((allocated, resident)) => {
                gauge!("isthmus_memory_allocated_bytes").set(allocated as f64);
                gauge!("isthmus_memory_resident_bytes").set(resident as f64);
            }
            Err(error) => {
                tracing::warn!(%error, "the allocator has no statistics");
                return;
            }
        }
    }
}

/// Bytes, from the kernel's account of this process; none where there is no such account.
fn process_resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes << 10)
}
