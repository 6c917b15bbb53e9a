//! A bundle: a manifest, the files it names, and the hash by which client and server recognise it.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use crate::container::{self, Container, HASH_PREFIX};
use crate::manifest::{FORMAT, Manifest};
use crate::progressive::{self, Progressive};
use crate::quality::Quality;
use crate::refinement::Refinements;
use crate::signature::{SIGNATURE, Trust};
use crate::tables::Tables;
use crate::{CodecError, golden};

/// Name of the manifest in a bundle folder.
pub const MANIFEST: &str = "manifest.toml";
/// Larger files than this do not belong into a bundle.
const MAX_FILE: usize = 64 << 20;

/// SHA-256 of the manifest, which holds the SHA-256 of every file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BundleHash(pub [u8; 32]);

impl BundleHash {
    /// The part that travels in every container.
    pub fn prefix(&self) -> [u8; HASH_PREFIX] {
        let mut prefix = [0; HASH_PREFIX];
        prefix.copy_from_slice(&self.0[..HASH_PREFIX]);
        prefix
    }
}

impl std::fmt::Display for BundleHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Hexadecimal SHA-256.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// A checked bundle with the content of its files.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// The manifest.
    pub manifest: Manifest,
    /// Hash of the manifest.
    pub hash: BundleHash,
    /// Entropy tables of every level.
    pub tables: Tables,
    /// What refines level 1, if the bundle has that.
    pub refinements: Option<Refinements>,
    files: BTreeMap<String, Vec<u8>>,
}

impl Bundle {
    /// Reads a bundle through `read` (file name to content) and checks every hash, the tables against
    /// the manifest, and the golden container. `wanted` tells which files to read; the tables and the
    /// golden container always are.
    ///
    /// # Errors
    /// [`CodecError::BadBundle`] names the file and what is wrong.
    pub fn load(read: impl FnMut(&str) -> std::io::Result<Vec<u8>>, wanted: impl Fn(&str) -> bool) -> Result<Self, CodecError> {
        Self::load_trusted(read, wanted, &Trust::all())
    }

    /// As [`Bundle::load`], of those that are trusted.
    ///
    /// # Errors
    /// [`CodecError::BadBundle`] names the file and what is wrong, the signature included.
    pub fn load_trusted(
        mut read: impl FnMut(&str) -> std::io::Result<Vec<u8>>,
        wanted: impl Fn(&str) -> bool,
        trust: &Trust,
    ) -> Result<Self, CodecError> {
        let text = read(MANIFEST).map_err(|e| CodecError::bundle(format!("{MANIFEST}: {e}")))?;
        trust.check(&text, || read(SIGNATURE))?;
        let mut get = |name: &str| read(name).map_err(|e| CodecError::bundle(format!("{name}: {e}")));
        let hash = BundleHash(Sha256::digest(&text).into());
        let text = String::from_utf8(text).map_err(|_| CodecError::bundle(format!("{MANIFEST} is not UTF-8")))?;
        let manifest: Manifest = toml::from_str(&text).map_err(|e| CodecError::bundle(format!("{MANIFEST}: {e}")))?;
        check_manifest(&manifest)?;
        let mut files = BTreeMap::new();
        for (name, expected) in &manifest.files {
            let used = [Some(&manifest.tables), Some(&manifest.golden.container), manifest.refinements.as_ref()];
            let needed = used.contains(&Some(name)) || wanted(name);
            if !needed {
                continue;
            }
            if name.contains(['/', '\\']) || name.starts_with('.') {
                return Err(CodecError::bundle(format!("file name {name:?} leaves the folder")));
            }
            let content = get(name)?;
            if content.len() > MAX_FILE {
                return Err(CodecError::bundle(format!("{name} is larger than {} MiB", MAX_FILE >> 20)));
            }
            let found = sha256(&content);
            if found != *expected {
                return Err(CodecError::bundle(format!("{name}: SHA-256 is {found}, the manifest says {expected}")));
            }
            files.insert(name.clone(), content);
        }
        let listed = |name: &str| files.get(name).ok_or_else(|| CodecError::bundle(format!("{name} is not listed under [files]")));
        let tables = Tables::from_bytes(listed(&manifest.tables)?)?;
        let fits = tables.levels.iter().all(|l| l.channels.len() == usize::from(manifest.latent.channels));
        if !fits || tables.levels.len() != manifest.quality.len() {
            return Err(CodecError::bundle("tables and manifest differ in channels or quality levels"));
        }
        let refinements = manifest.refinements.as_ref().map(|name| Refinements::from_bytes(listed(name)?)).transpose()?;
        if refinements.as_ref().is_some_and(|r| r.channels() != usize::from(manifest.latent.channels)) {
            return Err(CodecError::bundle("refinements and manifest differ in channels"));
        }
        if let Some(refinements) = &refinements {
            tables.levels.first().map_or(Ok(()), |base| refinements.check(base))?;
        }
        let bundle = Self { manifest, hash, tables, refinements, files };
        bundle.check_golden()?;
        Ok(bundle)
    }

    /// Content of a file read at load.
    ///
    /// # Errors
    /// [`CodecError::BadBundle`] if it is not there.
    pub fn file(&self, name: &str) -> Result<&[u8], CodecError> {
        let content = self.files.get(name).ok_or_else(|| CodecError::bundle(format!("{name} is not in the bundle")))?;
        Ok(content)
    }

    /// What refines level 1.
    ///
    /// # Errors
    /// [`CodecError::NoRefinements`] if the bundle has none.
    pub fn refinements(&self) -> Result<&Refinements, CodecError> {
        let Manifest { name, version, .. } = &self.manifest;
        self.refinements.as_ref().ok_or_else(|| CodecError::NoRefinements(format!("{name} {version}")))
    }

    /// Number of quality levels.
    pub fn levels(&self) -> u8 {
        self.tables.levels.len() as u8
    }

    /// Rounds and codes a latent (channel-major) into a container.
    ///
    /// # Errors
    /// As [`container::encode`].
    pub fn encode(&self, latent: &[f32], quality: impl Into<Quality>) -> Result<Vec<u8>, CodecError> {
        let quality = quality.into();
        let symbols = self.tables.level(quality)?.quantise(latent, self.manifest.latent)?;
        container::encode(&symbols, quality, &self.hash, self.manifest.latent, &self.tables)
    }

    /// Rounds and codes a latent (channel-major) into a container of level 1 and its refinements, which belong together in this order; see [`progressive`].
    ///
    /// # Errors
    /// As [`progressive::encode`] and [`Self::refinements`].
    pub fn encode_progressive(&self, latent: &[f32]) -> Result<Vec<Vec<u8>>, CodecError> {
        progressive::encode(latent, &self.hash, self.manifest.latent, (&self.tables, self.refinements()?))
    }

    /// Decodes a container, and what refines it, into the decoder's input (channel-major), appended to `out`.
    ///
    /// # Errors
    /// As [`Progressive::parse`] and [`Progressive::decode_into`].
    pub fn decode_into(&self, bytes: &[u8], out: &mut Vec<f32>) -> Result<Header, CodecError> {
        let parsed = Progressive::parse(bytes)?;
        self.decode_parsed_into(&parsed, out)?;
        Ok(parsed.container.header)
    }

    /// As [`Self::decode_into`].
    ///
    /// # Errors
    /// As [`Progressive::decode_into`].
    pub fn decode_parsed_into(&self, parsed: &Progressive<'_>, out: &mut Vec<f32>) -> Result<(), CodecError> {
        parsed.decode_into(&self.hash, self.manifest.latent, (&self.tables, self.refinements.as_ref()), out)
    }

    /// Decodes the golden container and compares symbols and latent with the manifest.
    fn check_golden(&self) -> Result<(), CodecError> {
        let g = &self.manifest.golden;
        let wrong = |what: &str| CodecError::bundle(format!("golden test: {what} differs from the manifest"));
        if sha256(&golden::pixels(self.manifest.input.size)) != g.input_sha256 {
            return Err(wrong("the input"));
        }
        // the container was made before the manifest had a hash, so its own prefix is used
        let (header, symbols) = self.golden_symbols()?;
        if golden::symbols_sha256(&symbols) != g.symbols_sha256 {
            return Err(wrong("the decoded symbols"));
        }
        let mut latent = Vec::new();
        self.tables.level(header.quality)?.dequantise_into(&symbols, self.manifest.latent, &mut latent)?;
        if golden::latent_sha256(&latent) != g.latent_sha256 {
            return Err(wrong("the latent"));
        }
        Ok(())
    }

    /// Header and symbols of the golden container.
    ///
    /// # Errors
    /// If the bundle's golden file does not decode.
    pub fn golden_symbols(&self) -> Result<(Header, Vec<i32>), CodecError> {
        let container = Container::parse(self.file(&self.manifest.golden.container)?)?;
        let level = self.tables.level(container.header.quality)?;
        if container.header.stated.as_ref().is_some_and(|stated| stated.shape != self.manifest.latent) {
            return Err(CodecError::bundle("golden test: the container has another shape"));
        }
        let symbols = crate::coder::decode(container.payload, &level, self.manifest.latent)?;
        Ok((container.header, symbols))
    }
}

pub use crate::container::Header;

fn check_manifest(m: &Manifest) -> Result<(), CodecError> {
    let bad = |why: &str| Err(CodecError::bundle(format!("{MANIFEST}: {why}")));
    if m.format != FORMAT {
        return bad(&format!("format {} is not supported (this software reads {FORMAT})", m.format));
    }
    if m.input.size == 0 || m.input.size > 4096 || (m.input.mean, m.input.scale) != (127.0, 128.0) {
        return bad("input: size 1 to 4096, mean 127 and scale 128 are supported");
    }
    if m.latent.symbols() == 0 || m.latent.symbols() > 1 << 22 {
        return bad("latent: empty or larger than 4 Mi symbols");
    }
    if m.decoders.is_empty() || m.quality.is_empty() || m.quality.len() > 255 {
        return bad("at least one decoder and 1 to 255 quality levels are needed");
    }
    Ok(())
}
