//! Conversations.

use super::super::{out, put};
use super::prompts::conversation;
use super::write::{Text, Writer, bar, encode, show};
use crate::learner::go_on;
use crate::text::chat::{Message, Template};
use crate::{Error, Result};
use std::io::{BufRead, IsTerminal};
use std::path::Path;

/// A conversation with what comes from stdin, a line at a time.
pub(super) fn talk(w: &Writer, template: &Template, system: Option<&str>) -> Result<()> {
    let asks = std::io::stdin().is_terminal();
    let mut messages: Vec<Message> = vec![];
    let mut context = nn::Generator::new(w.model.model());
    let mut read: Vec<u32> = vec![];
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if asks && !put("> ")? {
            return Ok(());
        }
        let Some(line) = lines.next() else { break };
        let line = line.map_err(Error::io("reading", Path::new("stdin")))?;
        if line.trim().is_empty() {
            continue;
        }
        match messages.is_empty() {
            true => messages = conversation(system, &line),
            false => messages.push(Message { role: "user", content: line }),
        }
        let ids = encode(w, &template.render(&messages)?, true)?;
        // a template may leave out what was said before, such as thoughts; a state can't be taken back to there
        if !(ids.len() > read.len() && ids.starts_with(&read)) {
            context = nn::Generator::new(w.model.model());
            read.clear();
        }
        w.warn(ids.len());
        let (new, bar) = (&ids[read.len()..], bar(ids.len() - read.len()));
        let mut logits = vec![];
        for piece in new.chunks(nn::CHUNK) {
            logits = context.feed(piece)?;
            bar.inc(piece.len() as u64);
        }
        bar.finish_and_clear();
        let (mut text, _) = Text::after(w, &ids);
        let mut drawn = vec![];
        let done = go_on(&mut context, vec![logits], &w.how, |_, token| {
            drawn.push(token);
            let (more, on) = text.push(w, token);
            Ok(show(&more)? && on)
        });
        let goes_on = show(&(text.finish() + "\n"))?;
        done?;
        if !goes_on {
            return Ok(());
        }
        read = ids;
        read.extend(&drawn[..drawn.len().saturating_sub(1)]);
        messages.push(Message { role: "assistant", content: std::mem::take(&mut text.text) });
    }
    if asks { out("") } else { Ok(()) }
}
