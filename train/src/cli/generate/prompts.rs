//! What texts begin with, and what ends them.

use super::super::run_of;
use crate::text::Codec;
use crate::text::chat::{Message, Template};
use crate::{Error, Result, checkpoint};
use serde_json::Value;
use std::path::Path;

/// The prompts of a file, one a line.
pub(super) fn of_file(file: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(file).map_err(Error::io("reading", file))?;
    let jsonl = file.extension().is_some_and(|e| e == "jsonl");
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let prompts = lines.map(|(i, line)| {
        if !jsonl {
            return Ok(line.to_string());
        }
        let value: Value = serde_json::from_str(line).map_err(|e| Error::data(file, format!("line {}: is no JSON: {e}", i + 1)))?;
        let prompt = value.as_str().or(value["prompt"].as_str()).filter(|p| !p.is_empty());
        let wrong = || Error::data(file, format!("line {}: expected {{\"prompt\": \"some text\"}}, found {line}", i + 1));
        prompt.map(String::from).ok_or_else(wrong)
    });
    let prompts = prompts.collect::<Result<Vec<String>>>()?;
    if prompts.is_empty() {
        return Err(Error::data(file, "holds no prompt: expected one a line"));
    }
    Ok(prompts)
}

/// The chat template that a checkpoint or its run carries.
pub(super) fn template_of(path: &Path) -> Result<Template> {
    let found = Template::open(path);
    let run = run_of(path);
    if matches!(found, Err(Error::Usage(_))) && run != path { Template::open(&run).or(found) } else { found }
}

/// What ends a text: what the folder says, else the end of text that its run or its tokenizer names. No byte of a text is one.
pub(in crate::cli) fn ends(path: &Path, codec: &Codec) -> Result<Vec<u32>> {
    let Codec::Tokenizer(t) = codec else { return Ok(vec![]) };
    for name in ["generation_config.json", "config.json"] {
        let file = path.join(name);
        let Ok(text) = std::fs::read_to_string(&file) else { continue };
        let value: Value = serde_json::from_str(&text).map_err(|e| Error::data(&file, format!("is no JSON: {e}")))?;
        let ids = match &value["eos_token_id"] {
            Value::Null => continue,
            Value::Array(all) => all.clone(),
            one => vec![one.clone()],
        };
        let ids: Option<Vec<u32>> = ids.iter().map(|id| u32::try_from(id.as_u64()?).ok()).collect();
        return ids.ok_or_else(|| Error::data(&file, format!("`eos_token_id` must be a token or a list of them, found {}", value["eos_token_id"])));
    }
    let own = checkpoint::read_info(&run_of(path)).ok().and_then(|info| info.config.data.eot);
    Ok(own.or(t.end()).into_iter().collect())
}

/// A conversation that begins.
pub(super) fn conversation(system: Option<&str>, first: &str) -> Vec<Message> {
    let mut all: Vec<Message> = system.map(|s| Message { role: "system", content: s.into() }).into_iter().collect();
    all.push(Message { role: "user", content: first.into() });
    all
}
