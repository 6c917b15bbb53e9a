//! Writes the 8-bit network input of photos as raw RGB files.
//!
//! usage: network_inputs SIDE OUT_FOLDER PHOTO...

use std::error::Error;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let side: u32 = args.next().ok_or("usage: network_inputs SIDE OUT_FOLDER PHOTO...")?.parse()?;
    let out = args.next().ok_or("an output folder is needed")?;
    for photo in args {
        let rgb = isthmus_pixels::decode(&std::fs::read(&photo)?)?.network_input(side)?;
        let name = Path::new(&photo).file_stem().ok_or("a file name is needed")?.to_string_lossy().into_owned();
        std::fs::write(Path::new(&out).join(format!("{name}.{side}.rgb")), rgb.data())?;
    }
    Ok(())
}
