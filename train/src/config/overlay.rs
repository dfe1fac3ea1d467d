//! Layers of configuration: a preset, a TOML file, `--set`s; each value remembers which layer it came from.

use super::RunConfig;
use crate::{Error, Result};
use nn::nearest;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

/// The layer of the command line.
const SET: &str = "--set";
const BUDGET: [&str; 3] = ["train.minutes", "train.tokens", "train.steps"];

/// Where a configuration's values came from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Origins {
    /// The preset or file that it started from.
    pub base: String,
    /// The layer that set a value last, by key.
    pub source: BTreeMap<String, String>,
}

/// A configuration under construction.
#[derive(Clone, Debug)]
pub struct Layers {
    tree: Value,
    origins: Origins,
}

/// A checked configuration, with each value's origin.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The typed configuration.
    pub config: RunConfig,
    tree: Value,
    origins: Origins,
}

/// A value that a resumed run does not have from its beginning.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Which.
    pub key: String,
    /// Before.
    pub old: Value,
    /// From here on.
    pub new: Value,
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} -> {}", self.key, self.old, self.new)
    }
}

impl Layers {
    /// Starts from a typed preset.
    pub fn preset(config: &RunConfig) -> Result<Layers> {
        Layers::of(config, Origins { base: config.name.clone(), source: BTreeMap::new() })
    }
    /// Starts from the configuration of a run that is to go on.
    pub fn of(config: &RunConfig, origins: Origins) -> Result<Layers> {
        let tree = serde_json::to_value(config).map_err(|e| Error::Usage(format!("configuration {}: {e}", config.name)))?;
        Ok(Layers { tree, origins })
    }

    /// Puts a model in place of the preset's; `source` says where it is from.
    pub fn model(&mut self, model: &nn::ModelConfig, source: &str) -> Result<()> {
        self.tree["model"] = serde_json::to_value(model).map_err(|e| Error::Usage(format!("{source}: {e}")))?;
        let mut all = vec![];
        keys(&self.tree["model"], "model", &mut all);
        self.origins.source.extend(all.into_iter().map(|key| (key, source.to_string())));
        Ok(())
    }

    /// Lays a TOML file on top. Its top-level key `preset`, if any, was read by [`base_of`](Self::base_of) before.
    pub fn file(&mut self, path: &Path) -> Result<()> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::Usage(format!("configuration {}: {e}", path.display())))?;
        self.toml(&text, &path.display().to_string())
    }

    /// The preset that a TOML file names, if it does.
    pub fn base_of(path: &Path) -> Result<Option<String>> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::Usage(format!("configuration {}: {e}", path.display())))?;
        let table: toml::Table = toml::from_str(&text).map_err(|e| Error::Usage(format!("configuration {}: {e}", path.display())))?;
        match table.get("preset") {
            None => Ok(None),
            Some(toml::Value::String(s)) => Ok(Some(s.clone())),
            Some(v) => Err(Error::Usage(format!("configuration {}: preset: expected a preset's name, found {v}", path.display()))),
        }
    }

    /// Lays TOML text on top, under what `--set` gave before; `source` names it in messages.
    pub fn toml(&mut self, text: &str, source: &str) -> Result<()> {
        let table: toml::Table = toml::from_str(text).map_err(|e| Error::Usage(format!("configuration {source}: {e}")))?;
        let mut pairs = Vec::new();
        for (key, value) in table.into_iter().filter(|(k, _)| k != "preset") {
            self.flatten(key, value, source, &mut pairs)?;
        }
        pairs.retain(|(key, _)| self.origins.source.get(key).is_none_or(|s| s != SET));
        self.apply(pairs, source)
    }

    /// Lays `a.b=c` on top. Where text stands now, `c` is text as it is, or a TOML string; elsewhere it is a TOML value.
    pub fn set(&mut self, assignments: &[String]) -> Result<()> {
        let mut pairs = Vec::new();
        for a in assignments {
            let Some((key, text)) = a.split_once('=') else {
                return Err(Error::Usage(format!("--set {a}: expected key=value, as in --set train.minutes=0.5")));
            };
            // `key = value` is meant as TOML writes it; in `key=value`, a blank belongs to the value
            let text = if key.ends_with(' ') { text.strip_prefix(' ').unwrap_or(text) } else { text };
            let key = key.trim();
            let value = toml::from_str::<toml::Table>(&format!("v = {text}")).ok().and_then(|mut t| if t.len() == 1 { t.remove("v") } else { None });
            let value = value.filter(|v| v.is_str() || !self.at(key).is_some_and(Value::is_string));
            self.flatten(key.to_string(), value.unwrap_or_else(|| toml::Value::String(text.to_string())), SET, &mut pairs)?;
        }
        self.apply(pairs, SET)
    }

    /// Tables become dotted keys as far as the configuration itself has tables there.
    fn flatten(&self, key: String, value: toml::Value, source: &str, out: &mut Vec<(String, Value)>) -> Result<()> {
        match value {
            toml::Value::Table(t) if self.at(&key).is_none_or(Value::is_object) => {
                if self.at(&key).is_none() {
                    return Err(self.unknown(&key, source));
                }
                for (k, v) in t {
                    self.flatten(format!("{key}.{k}"), v, source, out)?;
                }
            }
            // JSON, in which runs are kept, has no such numbers, and no key has a use for them
            toml::Value::Float(x) if !x.is_finite() => {
                return Err(Error::Usage(format!("{key} = {x} ({source}): expected a finite number")));
            }
            v => {
                let v = serde_json::to_value(v).map_err(|e| Error::Usage(format!("{key}: {e}")))?;
                out.push((key, v));
            }
        }
        Ok(())
    }

    fn at(&self, key: &str) -> Option<&Value> {
        key.split('.').try_fold(&self.tree, |v, part| v.as_object()?.get(part))
    }

    /// The text that stands at a key, if one does.
    pub fn text(&self, key: &str) -> String {
        self.at(key).and_then(Value::as_str).unwrap_or_default().to_string()
    }

    fn unknown(&self, key: &str, source: &str) -> Error {
        let mut all = Vec::new();
        keys(&self.tree, "", &mut all);
        let tables: BTreeSet<String> = all.iter().filter_map(|k| k.rsplit_once('.')).map(|(table, _)| table.to_string()).collect();
        match nearest(key, all.iter().chain(&tables).map(String::as_str)) {
            Some(n) => Error::Usage(format!("{source}: unknown key `{key}`; did you mean `{n}`? (--print-config lists them all)")),
            None => Error::Usage(format!("{source}: unknown key `{key}`; --print-config lists the keys there are")),
        }
    }

    fn apply(&mut self, pairs: Vec<(String, Value)>, source: &str) -> Result<()> {
        let budgets: Vec<&str> = pairs.iter().map(|(k, _)| k.as_str()).filter(|k| BUDGET.contains(k)).collect();
        if budgets.windows(2).any(|w| w[0] != w[1]) {
            return Err(Error::Usage(format!("{source} sets {}: a run has one budget, set one of them", budgets.join(" and "))));
        }
        if !budgets.is_empty() {
            for other in BUDGET.iter().filter(|b| !budgets.contains(b)) {
                self.origins.source.insert(other.to_string(), source.into());
                self.put(other, Value::Null);
            }
        }
        for (key, value) in pairs {
            match self.at(&key) {
                None => return Err(self.unknown(&key, source)),
                Some(Value::Object(_)) => {
                    return Err(Error::Usage(format!("`{key}` is a table of keys, as `{key}.{}`; found {value}", first_key(self.at(&key)))));
                }
                Some(_) => {}
            }
            let old = self.put(&key, value.clone());
            if let Err(e) = serde_json::from_value::<RunConfig>(self.tree.clone()) {
                self.put(&key, old.clone());
                let now = if old.is_null() { "not set".into() } else { old.to_string() };
                return Err(Error::Usage(format!("{key} = {value} ({source}): {}; it is now {now}", plain(&e.to_string()))));
            }
            self.origins.source.insert(key, source.into());
        }
        Ok(())
    }

    fn put(&mut self, key: &str, value: Value) -> Value {
        let slot = key.split('.').try_fold(&mut self.tree, |v, part| v.as_object_mut()?.get_mut(part));
        slot.map_or(Value::Null, |slot| std::mem::replace(slot, value))
    }

    /// Checks the whole and gives the typed configuration.
    pub fn resolve(self) -> Result<Resolved> {
        let config: RunConfig = serde_json::from_value(self.tree.clone()).map_err(|e| Error::Usage(format!("configuration: {e}")))?;
        config.validate()?;
        Ok(Resolved { config, tree: self.tree, origins: self.origins })
    }
}

fn first_key(v: Option<&Value>) -> String {
    v.and_then(Value::as_object).and_then(|o| o.keys().next()).cloned().unwrap_or_default()
}

impl Resolved {
    /// Where the values came from.
    pub fn origins(&self) -> &Origins {
        &self.origins
    }
    /// What differs from the configuration `old`.
    pub fn changes(&self, old: &RunConfig) -> Result<Vec<Change>> {
        let tree = |c: &RunConfig| serde_json::to_value(c).map_err(|e| Error::Usage(format!("configuration {}: {e}", c.name)));
        let (old, new) = (tree(old)?, tree(&self.config)?);
        let mut all = Vec::new();
        keys(&new, "", &mut all);
        let at = |tree: &Value, key: &str| tree.pointer(&format!("/{}", key.replace('.', "/"))).cloned().unwrap_or_default();
        let change = |key: String| Change { old: at(&old, &key), new: at(&new, &key), key };
        Ok(all.into_iter().map(change).filter(|c| c.old != c.new).collect())
    }

    /// The whole configuration as TOML of dotted keys, each with its origin: what `--print-config` shows and a run folder keeps. It is a
    /// valid overlay file itself.
    pub fn to_toml(&self) -> String {
        let mut out = String::new();
        let mut all = Vec::new();
        keys(&self.tree, "", &mut all);
        let mut section = String::new();
        for key in all {
            let Some(value) = key.split('.').try_fold(&self.tree, |v, p| v.as_object()?.get(p)) else { continue };
            let head = key.split('.').next().unwrap_or_default().to_string();
            if head != section && key.contains('.') {
                out.push('\n');
            }
            section = head;
            let base = format!("preset {}", self.origins.base);
            let source = self.origins.source.get(&key).unwrap_or(&base);
            match toml::Value::try_from(value) {
                Ok(v) if !value.is_null() => {
                    let line = format!("{key} = {v}");
                    let _ = writeln!(out, "{line:<50} # {source}");
                }
                _ => {
                    let line = format!("# {key} is not set");
                    let _ = writeln!(out, "{line:<50} # {source}");
                }
            }
        }
        out
    }
}

fn keys(v: &Value, prefix: &str, out: &mut Vec<String>) {
    if let Value::Object(o) = v {
        // Plain values before tables, so that the listing reads well.
        for (k, v) in o.iter().filter(|(_, v)| !v.is_object()).chain(o.iter().filter(|(_, v)| v.is_object())) {
            keys(v, &if prefix.is_empty() { k.clone() } else { format!("{prefix}.{k}") }, out);
        }
    } else {
        out.push(prefix.to_string());
    }
}

/// What a type is called where a configuration is written.
pub(crate) fn plain(message: &str) -> String {
    let mut m = message.to_string();
    for (rust, words) in [("usize", "a whole number, not negative"), ("u64", "a whole number, not negative"), ("u32", "a whole number, not negative")]
    {
        m = m.replace(&format!("expected {rust}"), &format!("expected {words}"));
    }
    m.replace("expected f64", "expected a number").replace("expected a sequence", "expected a list, as [1, 2]")
}
