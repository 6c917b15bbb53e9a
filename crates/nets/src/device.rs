//! Where networks run.

use tch::Device;

/// The first GPU if libtorch sees one, else the CPU.
pub fn best_device() -> Device {
    Device::cuda_if_available()
}

/// Parses `auto`, `cpu` or `cuda:N`.
///
/// # Errors
/// Names the accepted forms when `text` is none of them or the GPU is absent.
pub fn parse_device(text: &str) -> Result<Device, String> {
    match text {
        "auto" => Ok(best_device()),
        "cpu" => Ok(Device::Cpu),
        other => {
            let index = other.strip_prefix("cuda:").and_then(|n| n.parse::<usize>().ok());
            match index {
                Some(n) if (n as i64) < tch::Cuda::device_count() => Ok(Device::Cuda(n)),
                Some(n) => Err(format!("cuda:{n} is not there: libtorch sees {} GPUs", tch::Cuda::device_count())),
                None => Err(format!("unknown device '{other}': use auto, cpu or cuda:N")),
            }
        }
    }
}
