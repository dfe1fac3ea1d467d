//! What is known of cards by their names.

/// Peak operations a second in dense bf16 with f32 sums, where NVIDIA's data sheets leave no doubt which card it is.
pub fn peak_bf16(name: &str) -> Option<f64> {
    // PCIe and NVL cards of the same names are slower
    let sxm = |card: &str| name.contains(card) && !name.contains("PCIe") && !name.contains("NVL");
    match name {
        _ if sxm("H100") || sxm("H200") => Some(989.4e12),
        _ if name.contains("A100") => Some(312e12),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_of_cards_that_are_known() {
        for (name, peak) in [
            ("NVIDIA H100 80GB HBM3", Some(989.4e12)),
            ("NVIDIA H200", Some(989.4e12)),
            ("NVIDIA A100-SXM4-80GB", Some(312e12)),
            ("NVIDIA H100 PCIe", None),
            ("NVIDIA H100 NVL", None),
            ("NVIDIA GeForce RTX 4090", None),
        ] {
            assert_eq!(peak_bf16(name), peak, "{name}");
        }
    }
}
