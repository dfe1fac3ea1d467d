//! Conversations as text: the template that a model's folder carries, as transformers' `apply_chat_template` reads it.

use crate::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value, context};
use std::path::Path;

/// Where a template stands alone.
const TEMPLATE: &str = "chat_template.jinja";
/// Where it stands among the tokenizer's settings.
const SETTINGS: &str = "tokenizer_config.json";
/// Steps of a template that is not in an endless loop.
const MOST: u64 = 10_000_000;

/// Who says what.
#[derive(Clone, Debug)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: &'static str,
    /// The text.
    pub content: String,
}

/// A model's template.
#[derive(Debug)]
pub struct Template {
    env: Environment<'static>,
    path: std::path::PathBuf,
    bos: String,
    eos: String,
}

impl Template {
    /// The template of a folder: `chat_template.jinja`, else `chat_template` in `tokenizer_config.json` (of several, the one named `default`). An error if there
    /// is none, or if it can't be read.
    pub fn open(dir: &Path) -> Result<Template> {
        let read = |name: &str| {
            let path = dir.join(name);
            if path.is_file() { std::fs::read_to_string(&path).map(Some).map_err(Error::io("reading", &path)) } else { Ok(None) }
        };
        let settings: serde_json::Value = match read(SETTINGS)? {
            Some(text) => serde_json::from_str(&text).map_err(|e| Error::data(&dir.join(SETTINGS), format!("is no JSON: {e}")))?,
            None => serde_json::Value::Null,
        };
        let word = |key: &str| {
            let v = &settings[key];
            v.as_str().or(v["content"].as_str()).unwrap_or_default().to_string()
        };
        let all = &settings["chat_template"];
        let named = || all.as_array()?.iter().find(|t| t["name"] == "default")?["template"].as_str();
        let (text, path) = match read(TEMPLATE)? {
            Some(text) => (Some(text), dir.join(TEMPLATE)),
            None => (all.as_str().or_else(named).map(String::from), dir.join(SETTINGS)),
        };
        let Some(text) = text else {
            let d = dir.display();
            return Err(Error::Usage(format!(
                "--chat: {d} has no chat template ({TEMPLATE}, or `chat_template` in {SETTINGS}); put one there, or leave --chat out"
            )));
        };
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.map_err(|e| Error::Model(e.to_string()))?);
        env.set_fuel(Some(MOST));
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |m: String| -> std::result::Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, m))
        });
        env.add_template_owned("chat", text).map_err(|e| Error::data(&path, format!("is no template that can be read: {e:#}")))?;
        Ok(Template { env, path, bos: word("bos_token"), eos: word("eos_token") })
    }

    /// A conversation as text, up to where the assistant speaks.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let template = self.env.get_template("chat").map_err(|e| Error::data(&self.path, e.to_string()))?;
        let messages: Vec<Value> = messages.iter().map(|m| context! { role => m.role, content => m.content.as_str() }).collect();
        let given = context! { messages, add_generation_prompt => true, bos_token => self.bos.as_str(), eos_token => self.eos.as_str() };
        template.render(given).map_err(|e| Error::data(&self.path, format!("the template can't be applied: {e:#}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, text)| std::fs::write(dir.path().join(name), text).unwrap());
        dir
    }
    fn talk(dir: &tempfile::TempDir) -> Result<String> {
        let say = |role, content: &str| Message { role, content: content.into() };
        Template::open(dir.path())?.render(&[
            say("system", " Be brief. "),
            say("user", "Hi"),
            say("assistant", "<think>\nhm\n</think>\n\nHo"),
            say("user", "Bye"),
        ])
    }

    /// What templates use: blocks that leave no lines, Python's methods and slices, namespaces, loops that break, macros, JSON.
    #[test]
    fn templates_as_models_carry_them() {
        let text = "{{ bos_token }}{%- if messages[0].role == 'system' %}\n    {{- '<|s|>' + messages[0].content.strip() + '\\n' }}\n{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages[::-1] %}{%- if m.role == 'user' %}{%- set ns.last = messages|length - 1 - loop.index0 %}{%- break %}{%- endif %}{%- endfor %}
{%- macro said(m) %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{%- endmacro %}
{%- for m in messages if m.role != 'system' %}
    {%- if m.role.startswith('user') and loop.index0 + 1 == ns.last %}{{- 'last ' }}{%- endif %}
    {{- '<|' + m.role + '|>' + said(m) + eos_token }}
{%- endfor %}
{%- if tools is defined %}{{ tools | tojson }}{%- endif %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}";
        let want = "[b]<|s|>Be brief.\n<|user|>Hi[e]<|assistant|>Ho[e]last <|user|>Bye[e]<|assistant|>";
        let words = r#"{"bos_token": "[b]", "eos_token": {"content": "[e]"}}"#;
        assert_eq!(talk(&folder(&[(TEMPLATE, text), (SETTINGS, words)])).unwrap(), want);
        let several = serde_json::json!({ "bos_token": "[b]", "eos_token": "[e]",
            "chat_template": [{ "name": "tool_use", "template": "no" }, { "name": "default", "template": text }] });
        assert_eq!(talk(&folder(&[(SETTINGS, &several.to_string())])).unwrap(), want);
        let one =
            serde_json::json!({ "bos_token": null, "eos_token": "[e]", "chat_template": "{{ messages|length }}{{ bos_token }}{{ eos_token }}\n" });
        assert_eq!(talk(&folder(&[(SETTINGS, &one.to_string())])).unwrap(), "4[e]");
    }

    #[test]
    fn what_is_none_is_said() {
        for (files, words) in [
            (vec![], "has no chat template"),
            (vec![(SETTINGS, "{}")], "has no chat template"),
            (vec![(SETTINGS, "{")], "is no JSON"),
            (vec![(TEMPLATE, "{% if %}")], "no template that can be read"),
            (vec![(TEMPLATE, "{{ raise_exception('roles must alternate') }}")], "roles must alternate"),
            (vec![(TEMPLATE, "{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}")], "fuel"),
            (vec![(TEMPLATE, "{{ messages[0].content.nothing() }}")], "nothing"),
        ] {
            let e = talk(&folder(&files)).unwrap_err().to_string();
            assert!(e.contains(words), "{e}");
        }
    }
}
