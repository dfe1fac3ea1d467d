//! What a run says at its start of its attention: of gates and norms that are no part of the kernel, and of windows that cut nothing off.

use crate::Result;
use crate::config::RunConfig;
use nn::{Placement, composed_slowdown};

/// Which of the model's gates and norms are composed of element-wise operations, and how much longer attention takes with them, measured here and now at the
/// run's own shapes; none if none are.
pub fn note(config: &RunConfig, place: &Placement) -> Result<Option<String>> {
    let names = config.model.composed();
    if names.is_empty() {
        return Ok(None);
    }
    Ok(Some(sentence(&names, composed_slowdown(&config.model, place, config.data.batch, config.data.seq_len)?)))
}

fn sentence(names: &[&str], times: f64) -> String {
    let (are, them) = if names.len() == 1 { ("is", "it") } else { ("are", "them") };
    let names = names.join(" and ");
    let cost = if times < 1.0 {
        "what that costs is too little to measure here".into()
    } else {
        format!("attention takes {times:.2} times as long as without {them}")
    };
    format!("{names} {are} composed of elementwise operations: {cost}")
}

/// What is to be said of a sliding window that is as long as a training text; none otherwise.
pub fn idle_window(config: &RunConfig) -> Option<String> {
    let (c, t) = (&config.model, config.data.seq_len);
    let slides = (0..c.num_hidden_layers).any(|i| c.layer_type(i) == nn::LayerType::SlidingAttention);
    let window = c.sliding_window;
    (slides && window >= t)
        .then(|| format!("model.sliding_window = {window} cuts nothing off from texts of data.seq_len = {t} tokens: sliding attention is full here"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::presets::smoke;
    use engine::DType;
    use nn::AttentionGate;

    #[test]
    fn only_what_is_composed_is_said() {
        let mut c = smoke();
        let place = Placement::cpu(DType::F32);
        assert_eq!(note(&c, &place).unwrap(), None);
        c.model.attention_gate.shared = true;
        c.model.value_gate = AttentionGate::default();
        let said = note(&c, &place).unwrap().unwrap();
        assert!(said.starts_with("attention_gate and value_gate are composed of elementwise operations: "), "{said}");
        assert!(sentence(&["value_gate"], 0.98).ends_with("elementwise operations: what that costs is too little to measure here"));
        assert_eq!(
            sentence(&["value_gate"], 1.0812),
            "value_gate is composed of elementwise operations: attention takes 1.08 times as long as without it"
        );
    }

    #[test]
    fn a_window_as_long_as_the_text_is_said() {
        let mut c = smoke();
        c.model.sliding_window = 64;
        assert_eq!(idle_window(&c), None);
        c.model.layer_types = vec![nn::LayerType::SlidingAttention; c.model.num_hidden_layers];
        assert!(idle_window(&c).unwrap().starts_with("model.sliding_window = 64 cuts nothing off from texts of data.seq_len = 64 tokens"));
        c.model.sliding_window = 63;
        assert_eq!(idle_window(&c), None);
    }
}
