//! What a run says at its start of gates and norms that are no part of the attention's kernel.

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
    format!("{names} {are} composed of elementwise operations: attention takes {times:.2} times as long as without {them}")
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
        assert!(said.starts_with("attention_gate and value_gate are composed of elementwise operations: attention takes "), "{said}");
        assert_eq!(
            sentence(&["value_gate"], 1.0812),
            "value_gate is composed of elementwise operations: attention takes 1.08 times as long as without it"
        );
    }
}
