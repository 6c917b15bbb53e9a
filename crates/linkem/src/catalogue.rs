//! Files of named links.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::config::{DirectionConfig, LinkConfig};
use crate::error::LinkError;

/// Named links; configs/links.toml is the one that comes with the product.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalogue {
    /// By name.
    pub link: BTreeMap<String, NamedLink>,
}

/// A link and what it stands for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "Entry")]
pub struct NamedLink {
    /// One line for people.
    pub about: String,
    /// Its two directions.
    #[serde(flatten)]
    pub link: LinkConfig,
}

/// A link as written: a flattened structure would let unknown keys pass.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    about: String,
    up: DirectionConfig,
    down: DirectionConfig,
}

impl From<Entry> for NamedLink {
    fn from(Entry { about, up, down }: Entry) -> Self {
        Self { about, link: LinkConfig { up, down } }
    }
}

impl Catalogue {
    /// Reads and checks a file; trace files are looked for beside it.
    ///
    /// # Errors
    /// Names the file, the link and the key that is wrong.
    pub fn open(path: &Path) -> Result<Self, LinkError> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|e| LinkError::new(name.clone(), e.to_string()))?;
        let catalogue: Self = toml::from_str(&text).map_err(|e| LinkError::new(name.clone(), e.to_string()))?;
        let folder = path.parent().unwrap_or(Path::new("."));
        for (link, named) in &catalogue.link {
            named.link.check(folder).map_err(|e| LinkError::new(format!("{name}: link.{link}.{}", e.key), e.why))?;
        }
        Ok(catalogue)
    }

    /// The link called `name`.
    ///
    /// # Errors
    /// Lists the names that there are.
    pub fn link(&self, name: &str) -> Result<&NamedLink, LinkError> {
        let known = || self.link.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        self.link.get(name).ok_or_else(|| LinkError::new("link", format!("{name:?} is unknown; there are {}", known())))
    }
}
