//! What a run went through before its first step: the runs that it was started from, one after the other.

use std::path::Path;

use isthmus_codec::bundle::MANIFEST;
use serde::{Deserialize, Serialize};

use crate::curves;
use crate::error::TrainError;
use crate::recipe::Recipe;

/// Earlier runs, the first one first; kept in the run folder and in the bundle.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct History {
    /// One entry per run.
    #[serde(default)]
    pub stage: Vec<Stage>,
}

/// A run that another was started from.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Copy of its recipe, beside this file.
    pub recipe: String,
    /// Copy of its learning curve, beside this file.
    pub curve: String,
    /// Steps done.
    pub steps: u64,
    /// Crops seen.
    pub crops: u64,
    /// Further runs, where what was started from this one has the mean of several runs' weights: as `runs/N` if they are among the stages before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub with: Vec<String>,
}

impl History {
    const FILE: &str = "history.toml";
    /// What a run leaves beside its checkpoint.
    const OWN: [&str; 3] = ["recipe.toml", "curve.jsonl", "log.jsonl"];

    /// What a run folder says; empty if the run started from fresh weights.
    ///
    /// # Errors
    /// If the file is malformed.
    pub fn open(folder: &Path) -> Result<Self, TrainError> {
        Self::of(folder, "")
    }

    /// The history in `folder` whose files' names begin with `prefix`: that of a blueprint in a bundle ([`Self::prefix`]).
    fn of(folder: &Path, prefix: &str) -> Result<Self, TrainError> {
        let path = folder.join(format!("{prefix}{}", Self::FILE));
        match std::fs::read_to_string(&path) {
            Ok(text) => {
                let malformed = |why: String| TrainError::data(path.display().to_string(), why);
                let history: Self = toml::from_str(&text).map_err(|e| malformed(e.to_string()))?;
                let elsewhere = history.files().find(|name| Path::new(name).file_name().is_none_or(|plain| plain != *name));
                if let Some(name) = elsewhere {
                    return Err(malformed(format!("{name:?} is no file beside it")));
                }
                Ok(history)
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(TrainError::io(&path, e)),
        }
    }

    /// Crops seen before the run's first step.
    pub fn crops(&self) -> u64 {
        self.stage.iter().map(|s| s.crops).sum()
    }

    /// What the names of files begin with that tell how a bundle's decoder for another `backbone` came about.
    pub fn prefix(backbone: &str) -> String {
        format!("{backbone}-")
    }

    /// Adds the run in `from` as the last stage, and copies its recipe and curve, and those before, to `to`.
    ///
    /// # Errors
    /// If a file cannot be copied.
    pub fn inherit(from: &Path, to: &Path, steps: u64, crops: u64) -> Result<(), TrainError> {
        Self::inherit_from((from, ""), to, steps, crops)
    }

    fn inherit_from((from, prefix): (&Path, &str), to: &Path, steps: u64, crops: u64) -> Result<(), TrainError> {
        let mut history = Self::of(from, prefix)?;
        history.copy((from, prefix), (to, ""))?;
        let n = history.stage.len() + 1;
        let (recipe, curve) = (format!("stage{n}-recipe.toml"), format!("stage{n}-curve.jsonl"));
        let stage = Stage { recipe, curve, steps, crops, with: Vec::new() };
        for (name, copy) in [("recipe.toml", &stage.recipe), ("curve.jsonl", &stage.curve)] {
            copy_if_there(&from.join(format!("{prefix}{name}")), &to.join(copy))?;
        }
        history.stage.push(stage);
        history.write(to)
    }

    fn write(&self, folder: &Path) -> Result<(), TrainError> {
        let text = toml::to_string(self).map_err(|e| TrainError::data(Self::FILE, e.to_string()))?;
        let path = folder.join(Self::FILE);
        std::fs::write(&path, text).map_err(|e| TrainError::io(&path, e))
    }

    /// Notes that the run in `to` has the mean of its last stage's weights and of those of the run in `other`, after so many steps.
    ///
    /// # Errors
    /// If a history is malformed or cannot be written.
    pub fn mean_with(other: &Path, steps: u64, to: &Path) -> Result<(), TrainError> {
        let (mut history, before) = (Self::open(to)?, Self::open(other)?.stage.len());
        let read = |path: &Path| std::fs::read_to_string(path).ok();
        let known =
            history.stage.get(before).is_some_and(|s| s.steps == steps && read(&to.join(&s.recipe)) == read(&other.join("recipe.toml")));
        let name = if known { format!("runs/{}", before + 1) } else { other.display().to_string() };
        if let Some(last) = history.stage.last_mut() {
            last.with.push(name);
        }
        history.write(to)
    }

    /// The same for the run that made the bundle in `from`, or its decoder with this [`Self::prefix`]; nothing for a bundle that does not tell.
    ///
    /// # Errors
    /// If a file is malformed or cannot be copied.
    pub fn inherit_bundle(from: &Path, prefix: &str, to: &Path) -> Result<(), TrainError> {
        let path = from.join(format!("{prefix}recipe.toml"));
        if !path.is_file() {
            return Ok(());
        }
        let crops = curves::scored(&from.join(format!("{prefix}curve.jsonl")))?;
        Self::inherit_from((from, prefix), to, crops / (Recipe::open(&path)?.batch as u64).max(1), crops)
    }

    /// Copies recipe, curve and log of the run in `from`, and all files of its history, into the bundle in `to`, for its decoder with this [`Self::prefix`], in place of
    /// those of the decoder that was there.
    ///
    /// # Errors
    /// If a file is malformed or cannot be copied.
    pub fn keep(from: &Path, to: &Path, prefix: &str) -> Result<(), TrainError> {
        if !same(from, to) {
            let earlier = Self::of(to, prefix)?;
            for name in earlier.files() {
                remove_if_there(&to.join(format!("{prefix}{name}")))?;
            }
        }
        for name in Self::OWN {
            copy_if_there(&from.join(name), &to.join(format!("{prefix}{name}")))?;
        }
        Self::open(from)?.copy((from, ""), (to, prefix))
    }

    /// Copies what lies in the folder of a bundle and tells how it came about: recipes, curves and logs of all its runs, and plots. Nothing that the manifest names is among them.
    ///
    /// # Errors
    /// If a file cannot be copied.
    pub fn carry(from: &Path, to: &Path) -> Result<(), TrainError> {
        let entries = std::fs::read_dir(from).and_then(Iterator::collect::<Result<Vec<_>, _>>).map_err(|e| TrainError::io(from, e))?;
        for path in entries.into_iter().map(|e| e.path()) {
            let tells = path.extension().is_some_and(|e| ["toml", "jsonl", "svg"].iter().any(|t| e == *t));
            if let Some(name) = path.file_name().filter(|name| tells && *name != MANIFEST) {
                copy_if_there(&path, &to.join(name))?;
            }
        }
        Ok(())
    }

    /// Names of all files of the history, its own included.
    fn files(&self) -> impl Iterator<Item = &str> {
        self.stage.iter().flat_map(|s| [s.recipe.as_str(), s.curve.as_str()]).chain([Self::FILE])
    }

    /// Copies all files of the history, whose names begin with one prefix, to names that begin with another.
    fn copy(&self, from: (&Path, &str), to: (&Path, &str)) -> Result<(), TrainError> {
        for name in self.files() {
            copy_if_there(&from.0.join(format!("{}{name}", from.1)), &to.0.join(format!("{}{name}", to.1)))?;
        }
        Ok(())
    }

    /// The commands that make a run with this history, given the files beside it, and `steps` of its own.
    pub fn commands(&self, steps: u64) -> String {
        let stages = self.stage.iter().map(|s| (s.recipe.as_str(), s.steps)).chain([("recipe.toml", steps)]);
        let command = |(i, (recipe, steps)): (usize, (&str, u64))| {
            let started = i.checked_sub(1).and_then(|before| self.stage.get(before));
            let runs = started.into_iter().flat_map(|s| std::iter::once(format!("runs/{i}")).chain(s.with.iter().cloned()));
            let start: String = runs.map(|run| format!(" --warm-start {run}")).collect();
            format!("trainer distill --recipe {recipe} --run runs/{}{start} --until {steps}", i + 1)
        };
        stages.enumerate().map(command).collect::<Vec<_>>().join("; ")
    }
}

/// Both are there and the same.
fn same(a: &Path, b: &Path) -> bool {
    a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b))
}

fn remove_if_there(path: &Path) -> Result<(), TrainError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(TrainError::io(path, e)),
        _ => Ok(()),
    }
}

fn copy_if_there(from: &Path, to: &Path) -> Result<(), TrainError> {
    // a bundle may be written over itself: copying a file onto itself would empty it
    if same(from, to) {
        return Ok(());
    }
    match std::fs::copy(from, to) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(TrainError::io(from, e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_started_from_runs_remember_all_of_them() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for (name, text) in [("a", "first"), ("b", "second"), ("c", "third")] {
            std::fs::create_dir(at(name)).unwrap();
            std::fs::write(at(name).join("recipe.toml"), text).unwrap();
        }
        History::inherit(&at("a"), &at("b"), 10, 180).unwrap();
        History::inherit(&at("b"), &at("c"), 20, 360).unwrap();
        let history = History::open(&at("c")).unwrap();
        assert_eq!(history.crops(), 540);
        assert_eq!(std::fs::read_to_string(at("c").join("stage1-recipe.toml")).unwrap(), "first");
        assert_eq!(std::fs::read_to_string(at("c").join("stage2-recipe.toml")).unwrap(), "second");
        let commands: Vec<String> = history.commands(5).split("; ").map(String::from).collect();
        assert_eq!(commands[0], "trainer distill --recipe stage1-recipe.toml --run runs/1 --until 10");
        assert_eq!(commands[2], "trainer distill --recipe recipe.toml --run runs/3 --warm-start runs/2 --until 5");
        assert_eq!(History::open(&at("a")).unwrap().crops(), 0);
        // a mean of several runs, of which one is among the stages and one is not
        History::mean_with(&at("a"), 10, &at("c")).unwrap();
        History::mean_with(&at("b"), 7, &at("c")).unwrap();
        let commands = History::open(&at("c")).unwrap().commands(0);
        let other = at("b").display().to_string();
        assert!(
            commands.ends_with(&format!("--run runs/3 --warm-start runs/2 --warm-start runs/1 --warm-start {other} --until 0")),
            "{commands}"
        );
    }

    #[test]
    fn a_bundle_tells_how_each_of_its_decoders_came_about() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let recipe = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/recipes/patch-stem-lite2.toml")).unwrap();
        for name in ["first", "run", "bundle", "other", "next"] {
            std::fs::create_dir(at(name)).unwrap();
            std::fs::write(at(name).join("recipe.toml"), &recipe).unwrap();
        }
        std::fs::write(at("bundle").join(MANIFEST), "").unwrap();
        std::fs::write(at("bundle").join("weights.safetensors"), "").unwrap();
        History::inherit(&at("first"), &at("run"), 2, 36).unwrap();
        std::fs::write(at("run").join("curve.jsonl"), r#"{"crops":90,"photos":1,"levels":[]}"#).unwrap();
        let prefix = History::prefix("lite2");
        History::keep(&at("run"), &at("bundle"), &prefix).unwrap();
        assert!(at("bundle").join("lite2-stage1-recipe.toml").exists());
        History::carry(&at("bundle"), &at("other")).unwrap();
        assert!(!at("other").join(MANIFEST).exists() && !at("other").join("weights.safetensors").exists());
        History::inherit_bundle(&at("other"), &prefix, &at("next")).unwrap();
        let stages: Vec<(u64, u64)> = History::open(&at("next")).unwrap().stage.iter().map(|s| (s.steps, s.crops)).collect();
        assert_eq!(stages, [(2, 36), (5, 90)]);
        assert!(at("next").join("stage2-curve.jsonl").exists());
        History::carry(&at("next"), &at("next")).unwrap();
        assert_eq!(std::fs::read_to_string(at("next").join("recipe.toml")).unwrap(), recipe, "copied onto itself");
        let elsewhere = "[[stage]]\nrecipe = \"../recipe.toml\"\ncurve = \"c\"\nsteps = 1\ncrops = 1\n";
        std::fs::write(at("other").join("history.toml"), elsewhere).unwrap();
        assert!(History::open(&at("other")).unwrap_err().to_string().contains("no file beside it"));
        // a decoder with a shorter history takes the place of one with a longer
        History::keep(&at("first"), &at("bundle"), &prefix).unwrap();
        let left: Vec<bool> =
            ["stage1-recipe.toml", "history.toml"].iter().map(|n| at("bundle").join(format!("{prefix}{n}")).exists()).collect();
        assert_eq!(left, [false, false]);
        assert!(at("bundle").join(format!("{prefix}recipe.toml")).exists());
    }
}
