//! Tables of text: the first column to the left, numbers to the right.

/// Rows below a head, each cell as wide as its column.
pub(super) fn table(head: &[&str], rows: &[Vec<String>], left: usize) -> String {
    let width = |i: usize| rows.iter().filter_map(|r| r.get(i)).map(|c| c.chars().count()).chain([head[i].chars().count()]).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: &[String]| {
        let cells = cells.iter().zip(&widths).enumerate().map(|(i, (c, w))| if i < left { format!("{c:<w$}") } else { format!("{c:>w$}") });
        cells.collect::<Vec<String>>().join("  ").trim_end().to_string()
    };
    let head: Vec<String> = head.iter().map(|h| h.to_string()).collect();
    [line(&head)].into_iter().chain(rows.iter().map(|r| line(r))).collect::<Vec<String>>().join("\n")
}

/// Three significant digits: `0.0123`, `1.23`, `123`, `12345`.
pub(super) fn digits(x: f64) -> String {
    let places = if x > 0.0 && x.is_finite() { (2.0 - x.log10().floor()).clamp(0.0, 6.0) as usize } else { 0 };
    format!("{x:.places$}")
}

/// Bytes as MiB or GiB.
pub(super) fn memory(bytes: usize) -> String {
    let mib = bytes as f64 / (1 << 20) as f64;
    if mib < 1024.0 { format!("{} MiB", digits(mib)) } else { format!("{} GiB", digits(mib / 1024.0)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_line_up() {
        let rows = vec![vec!["a".to_string(), "1".into()], vec!["long".into(), "22.5".into()]];
        assert_eq!(table(&["op", "ms"], &rows, 1), "op      ms\na        1\nlong  22.5");
        for (x, s) in [(0.0, "0"), (0.01234, "0.0123"), (1.0, "1.00"), (12.34, "12.3"), (999.4, "999"), (12345.6, "12346")] {
            assert_eq!(digits(x), s);
        }
        assert_eq!(memory(3 << 20), "3.00 MiB");
        assert_eq!(memory(5 << 29), "2.50 GiB");
    }
}
