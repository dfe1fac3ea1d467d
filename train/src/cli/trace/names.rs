//! Which taps are meant.

use crate::{Error, Result};
use nn::{Access, ModelConfig, Tap};

/// The logits, which are always written.
pub const LOGITS: &str = "logits";

/// The taps that globs choose; of those that are formed on request only such as are spelled out at a glob's end. No globs: all others.
pub fn chosen(config: &ModelConfig, globs: &[String]) -> Result<Vec<(String, &'static Tap)>> {
    let all = config.taps();
    for glob in globs {
        if !all.iter().any(|(name, tap)| meant(glob, name, tap)) {
            return Err(unmatched(config, glob, &all));
        }
    }
    let default = |name: &str, tap: &Tap| globs.is_empty() && meant("*", name, tap);
    Ok(all.into_iter().filter(|(name, tap)| name == LOGITS || default(name, tap) || globs.iter().any(|g| meant(g, name, tap))).collect())
}

fn meant(glob: &str, name: &str, tap: &Tap) -> bool {
    let own = name.rsplit('.').next().unwrap_or(name);
    matches(glob, name) && (!matches!(tap.access, Access::OnRequest(_)) || glob.ends_with(own))
}

fn unmatched(config: &ModelConfig, glob: &str, all: &[(String, &'static Tap)]) -> Error {
    if let Some((_, tap)) = all.iter().find(|(name, _)| matches(glob, name)) {
        let own = tap.name.rsplit('.').next().unwrap_or(tap.name);
        return Error::Usage(format!("--names `{glob}`: {own} is large, and written only if it is spelled out, as in `*{own}`"));
    }
    let mut names: Vec<String> = vec![];
    for (full, tap) in all {
        let name = if full == tap.name { full.clone() } else { format!("blocks.*.{}", tap.name) };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let blocks = config.num_hidden_layers;
    Error::Usage(format!("--names `{glob}`: no tensor of this model is called so. It has {blocks} blocks, from 0, and these: {}", names.join(", ")))
}

/// Whether a name matches a glob, in which * is any number of characters and ? is one.
fn matches(glob: &str, name: &str) -> bool {
    let (g, n): (Vec<char>, Vec<char>) = (glob.chars().collect(), name.chars().collect());
    let (mut i, mut j) = (0, 0);
    // where the last * is, and how much of the name it takes up
    let mut star: Option<(usize, usize)> = None;
    while j < n.len() {
        match g.get(i) {
            Some('*') => {
                star = Some((i, j));
                i += 1;
            }
            Some(c) if *c == '?' || *c == n[j] => (i, j) = (i + 1, j + 1),
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    (i, j) = (at + 1, taken + 1);
                }
                None => return false,
            },
        }
    }
    g[i..].iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs() {
        for (glob, name, expected) in [
            ("*", "", true),
            ("", "x", false),
            ("hook_?", "hook_q", true),
            ("hook_?", "hook_", false),
            ("*hook_q", "blocks.0.attn.hook_q", true),
            ("blocks.*.hook_*t", "blocks.11.hook_resid_post", true),
            ("blocks.1.*", "blocks.11.hook_resid_post", false),
            ("*a*b*", "xxaxxbxx", true),
            ("*a*b", "xxbxxa", false),
            ("**ö?", "aöb", true),
        ] {
            assert_eq!(matches(glob, name), expected, "{glob} {name}");
        }
    }

    #[test]
    fn large_ones_are_spelled_out() {
        let config = ModelConfig { num_hidden_layers: 4, ..Default::default() };
        let names = |globs: &[&str]| {
            let globs: Vec<String> = globs.iter().map(|g| g.to_string()).collect();
            chosen(&config, &globs).map(|c| c.into_iter().map(|(n, _)| n).collect::<Vec<_>>())
        };
        let all = names(&[]).unwrap();
        assert_eq!(all, names(&["*"]).unwrap());
        assert!(
            all.iter().any(|n| n == "blocks.3.attn.hook_z")
                && !all.iter().any(|n| n.ends_with("hook_pattern") || n.ends_with("hook_effective_attention"))
        );
        assert_eq!(names(&["*hook_pattern", "blocks.?.attn.hook_pattern"]).unwrap(), [LOGITS, "blocks.3.attn.hook_pattern"]);
        assert_eq!(names(&[LOGITS]).unwrap(), [LOGITS]);
        let e = names(&["blocks.3.attn.hook_p*"]).unwrap_err().to_string();
        assert!(e.contains("*hook_pattern"), "{e}");
        let e = names(&["*hook_q", "blocks.4.*"]).unwrap_err().to_string();
        assert!(e.contains("`blocks.4.*`") && e.contains("4 blocks") && e.contains("blocks.*.attn.hook_beta"), "{e}");
    }
}
