//! Frames of videos, which a few packages have beside their photos.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::error::TrainError;

/// FFmpeg, as setup/fetch.py unpacks it: a pinned build, so that the same frames come out everywhere.
const FFMPEG: &str = "imageio-ffmpeg/imageio_ffmpeg/binaries/ffmpeg-linux64-v4.2.2";
/// Most frames that are taken from one video.
const MOST: usize = 100;
/// Longest that one video may take.
const LIMIT: Duration = Duration::from_secs(300);

/// One frame of the video at `path` for each `seconds` of it, as PNG files.
///
/// # Errors
/// If FFmpeg is not under `third_party`, cannot be started, or does not know the video.
pub fn of(path: &Path, seconds: f64, third_party: &Path) -> Result<Vec<Vec<u8>>, TrainError> {
    let ffmpeg = third_party.join(FFMPEG);
    if !ffmpeg.is_file() {
        let why = "not there; run `python3 setup/fetch.py training-photos` (x86-64 only)";
        return Err(TrainError::data(ffmpeg.display().to_string(), why));
    }
    let folder = tempfile::tempdir().map_err(|e| TrainError::io(&std::env::temp_dir(), e))?;
    // plain C code, exactly rounded: what the processor can do must not change a frame
    let errors = tempfile::NamedTempFile::new().map_err(|e| TrainError::io(&std::env::temp_dir(), e))?;
    let failed = |e| TrainError::io(&ffmpeg, e);
    let mut running = Command::new(&ffmpeg)
        .args(["-v", "error", "-nostdin", "-cpuflags", "0", "-threads", "1", "-i"])
        .arg(path)
        .args(["-vf", &format!("fps=1/{seconds}"), "-sws_flags", "accurate_rnd+bitexact", "-pix_fmt", "rgb24"])
        .args(["-frames:v", &MOST.to_string()])
        .arg(folder.path().join("%03d.png"))
        .stdin(Stdio::null())
        .stderr(errors.reopen().map_err(failed)?)
        .spawn()
        .map_err(failed)?;
    let began = Instant::now();
    let status = loop {
        match running.try_wait().map_err(failed)? {
            Some(status) => break status,
            None if began.elapsed() > LIMIT => {
                running.kill().and_then(|()| running.wait()).map_err(failed)?;
                let why = format!("FFmpeg was not done with it after {} s", LIMIT.as_secs());
                return Err(TrainError::data(path.display().to_string(), why));
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    if !status.success() {
        let why = std::fs::read_to_string(errors.path()).map_err(failed)?;
        return Err(TrainError::data(path.display().to_string(), why.trim()));
    }
    let mut files: Vec<_> = walkdir::WalkDir::new(folder.path()).min_depth(1).into_iter().filter_map(Result::ok).collect();
    files.sort_by(|a, b| a.file_name().cmp(b.file_name()));
    files.iter().map(|f| std::fs::read(f.path()).map_err(|e| TrainError::io(f.path(), e))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_told() {
        let error = of(Path::new("a.mp4"), 2.0, Path::new("nowhere")).unwrap_err();
        assert!(error.to_string().contains("setup/fetch.py training-photos"), "{error}");
    }
}
