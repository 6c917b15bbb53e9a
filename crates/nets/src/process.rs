//! Environment that libtorch and the C library read when they are loaded.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;

/// libtorch's OpenMP threads spin while they wait for each other; where other processes want the same cores, one
/// call then takes seconds instead of milliseconds. A bounded spin keeps the idle machine's speed (passive waits
/// halve it): 2000 is as fast as 20,000 there, and five times as fast where two servers share two cores.
pub const BOUNDED_SPINNING: (&str, &str) = ("GOMP_SPINCOUNT", "2000");

/// Keeps large tensors on the heap: by default every one of them is mapped anew and its pages are zeroed one fault at
/// a time, which took half of a training step's time (13 against 26 crops per second on 2 cores). Costs memory
/// that is kept for reuse, so it is for training alone.
pub const KEPT_HEAP: [(&str, &str); 3] =
    [("MALLOC_MMAP_THRESHOLD_", "1073741824"), ("MALLOC_TRIM_THRESHOLD_", "8589934592"), ("MALLOC_TOP_PAD_", "268435456")];

/// What a server tells its allocator (jemalloc): large tensors are reused as small ones are, so that their pages are not mapped anew for
/// every batch (25 against 65 photos per second, 16 under way on 2 cores); two arenas, so that what one thread frees another finds; what
/// was not used for ten seconds goes back to the system, whoever runs then.
pub const REUSED_HEAP: (&str, &str) =
    ("MALLOC_CONF", "oversize_threshold:0,narenas:2,background_thread:true,dirty_decay_ms:10000,muzzy_decay_ms:0");

/// Starts the process once more with those of `wanted` that are not set; returns if all are. What the user
/// sets wins, as does `OMP_WAIT_POLICY` over the spin count. Nothing is done where threads are bound to cores: the
/// second process would inherit the first one's core for all of its threads.
///
/// # Errors
/// If the program cannot be started again.
pub fn with_environment(wanted: &[(&str, &str)]) -> std::io::Result<()> {
    let set = |name: &str| std::env::var_os(name).is_some();
    let missing: Vec<(&OsStr, &OsStr)> = wanted
        .iter()
        .filter(|(name, _)| !(set(name) || *name == BOUNDED_SPINNING.0 && set("OMP_WAIT_POLICY")))
        .map(|(name, value)| (OsStr::new(name), OsStr::new(value)))
        .collect();
    if missing.is_empty() || ["OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY"].into_iter().any(set) {
        return Ok(());
    }
    let mut args = std::env::args_os();
    let name = args.next().unwrap_or_default();
    Err(std::process::Command::new(std::env::current_exe()?).arg0(name).args(args).envs(missing).exec())
}
