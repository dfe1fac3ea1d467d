//! Parameters by name: which of them decay, and which part of the model they are.

/// Whether weight decay applies to a parameter: not to vectors and scalars (norms, biases, `A_log`, `dt_bias`), nor to names that match one
/// of the patterns. A pattern matches where it is a whole dotted part of the name, or, with `*`, as a shell's glob over the whole name.
pub fn decays(name: &str, shape: &[usize], no_decay: &[String]) -> bool {
    shape.iter().filter(|&&d| d > 1).count() >= 2 && !no_decay.iter().any(|p| matches(p, name))
}

/// Whether `pattern` matches `name`: as a whole dotted part (`A_log` in `layers.0.mixer.A_log`), or, with `*`, as a glob.
pub fn matches(pattern: &str, name: &str) -> bool {
    if pattern.contains('*') { glob(pattern.as_bytes(), name.as_bytes()) } else { name == pattern || name.split('.').any(|part| part == pattern) }
}

/// How many tensors, and numbers in them, stay as they begin; an error for a pattern that is of none, or if all are.
pub fn frozen(params: &[(&str, &engine::Tensor)], freeze: &[String]) -> crate::Result<[usize; 2]> {
    if let Some(p) = freeze.iter().find(|p| !params.iter().any(|(name, _)| matches(p, name))) {
        let some: Vec<&str> = params.iter().map(|p| p.0).take(3).collect();
        return Err(crate::Error::Usage(format!("optim.freeze: `{p}` is no parameter of this model; its first ones are {}", some.join(", "))));
    }
    let still = params.iter().filter(|(name, _)| freeze.iter().any(|p| matches(p, name)));
    let [tensors, numbers] = still.fold([0, 0], |[n, m], (_, t)| [n + 1, m + t.numel()]);
    if tensors == params.len() {
        return Err(crate::Error::Usage("optim.freeze: all parameters are frozen, so that there is nothing to train; leave some".into()));
    }
    Ok([tensors, numbers])
}

/// The part of the model that a parameter belongs to, in the taps' words: `blocks.3.attn` for `model.layers.3.linear_attn.A_log`.
pub fn part(name: &str) -> String {
    let words: Vec<&str> = name.split('.').skip_while(|w| *w == "model").collect();
    match words[..] {
        ["layers", i, "self_attn" | "linear_attn" | "mamba", ..] => format!("blocks.{i}.attn"),
        ["layers", i, module, ..] => format!("blocks.{i}.{module}"),
        [first, ..] => first.to_string(),
        [] => name.to_string(),
    }
}

fn glob(p: &[u8], s: &[u8]) -> bool {
    let (mut i, mut j, mut star) = (0, 0, None);
    while j < s.len() {
        if p.get(i) == Some(&b'*') {
            star = Some((i, j));
            i += 1;
        } else if p.get(i) == Some(&s[j]) {
            (i, j) = (i + 1, j + 1);
        } else if let Some((pi, sj)) = star {
            star = Some((pi, sj + 1));
            (i, j) = (pi + 1, sj + 1);
        } else {
            return false;
        }
    }
    p[i..].iter().all(|&c| c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frozen_parameters_are_counted_and_patterns_of_none_refused() {
        let t = |n: usize| engine::Tensor::zeros(&[n], engine::DType::F32, &engine::Device::cpu()).unwrap();
        let (a, b, c) = (t(2), t(3), t(5));
        let params = [("x.table", &a), ("y.table", &b), ("x.weight", &c)];
        let of = |p: &[&str]| frozen(&params, &p.iter().map(|p| p.to_string()).collect::<Vec<_>>());
        assert_eq!(of(&[]).unwrap(), [0, 0]);
        assert_eq!(of(&["table"]).unwrap(), [2, 5]);
        assert_eq!(of(&["x.*", "x.table"]).unwrap(), [2, 7]);
        assert!(of(&["z.*"]).unwrap_err().to_string().contains("`z.*` is no parameter"));
        assert!(of(&["*"]).unwrap_err().to_string().contains("all parameters are frozen"));
    }

    #[test]
    fn names() {
        let none: Vec<String> = ["A_log", "dt_bias", "*norm*", "*.bias"].map(String::from).to_vec();
        for (name, shape, expected) in [
            ("model.layers.0.linear_attn.A_log", &[4usize][..], false),
            ("model.layers.0.linear_attn.A_log", &[4, 4], false),
            ("model.layers.0.linear_attn.in_proj_qkvz.weight", &[64, 32], true),
            ("model.norm.weight", &[64], false),
            ("model.layers.0.input_layernorm.weight", &[8, 8], false),
            ("lm_head.bias", &[9, 9], false),
            ("x.weight", &[1, 64], false),
            ("lm_head.weight", &[256, 64], true),
        ] {
            assert_eq!(decays(name, shape, &none), expected, "{name}");
        }
        for (name, expected) in [
            ("model.layers.3.linear_attn.A_log", "blocks.3.attn"),
            ("model.layers.3.mamba.in_proj.weight", "blocks.3.attn"),
            ("model.layers.11.self_attn.q_proj.weight", "blocks.11.attn"),
            ("model.layers.0.mlp.experts.gate_up_proj", "blocks.0.mlp"),
            ("model.layers.0.input_layernorm.weight", "blocks.0.input_layernorm"),
            ("model.embed_tokens.weight", "embed_tokens"),
            ("lm_head.weight", "lm_head"),
            ("model", "model"),
        ] {
            assert_eq!(part(name), expected);
        }
        assert!(glob(b"a*b*c", b"aXXbYYbc") && !glob(b"a*b*c", b"aXXbYY") && glob(b"*", b""));
    }
}
