//! Numbers as people read them.

/// Four significant digits; large and small ones with a power of ten.
pub fn plain(x: f64) -> String {
    let size = x.abs();
    match size {
        _ if !x.is_finite() => "not finite".into(),
        0.0 => "0".into(),
        _ if !(1e-4..1e7).contains(&size) => format!("{x:.2e}"),
        _ if x == x.trunc() => format!("{x:.0}"),
        _ => {
            let digits = format!("{x:.*}", (3 - size.log10().floor() as i32).clamp(0, 7) as usize);
            if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.').into() } else { digits }
        }
    }
}

/// A count: 1.19 M.
pub fn count(n: f64) -> String {
    match n {
        _ if n < 1e4 => format!("{n:.0}"),
        _ if n < 1e6 => format!("{:.3}", n / 1e3).chars().take(5).collect::<String>().trim_end_matches('.').to_string() + " k",
        _ if n < 1e9 => format!("{:.2} M", n / 1e6),
        _ => format!("{:.2} G", n / 1e9),
    }
}

/// A time: 5 min 3 s.
pub fn duration(seconds: f64) -> String {
    let s = seconds.round() as u64;
    match s {
        _ if seconds < 10.0 => format!("{seconds:.1} s"),
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        _ => format!("{} h {} min", s / 3600, s % 3600 / 60),
    }
}

/// A mean with its standard error: the error in two digits, the mean to the same place. Without an error, as [`plain`].
pub fn with_error(mean: f64, stderr: Option<f64>, signed: bool) -> String {
    let minus = |s: String| s.replace('-', "−");
    let sign = if signed && mean > 0.0 { "+" } else { "" };
    match stderr.filter(|e| e.is_finite() && *e > 0.0) {
        Some(e) if mean.is_finite() && mean.abs().max(e) < 1e7 && e >= 1e-7 => {
            let places = (1 - e.log10().floor() as i32).clamp(0, 8) as usize;
            minus(format!("{sign}{mean:.places$} ± {e:.places$}"))
        }
        Some(e) => minus(format!("{sign}{} ± {}", plain(mean), plain(e))),
        None => minus(format!("{sign}{}", plain(mean))),
    }
}

/// Rounds to so many significant digits: what a drawing needs, in a third of the bytes.
pub fn rounded(x: f64, digits: usize) -> f64 {
    format!("{x:.*e}", digits.saturating_sub(1)).parse().unwrap_or(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_people_read_them() {
        for (x, s) in [
            (0.0, "0"),
            (1.23456, "1.235"),
            (0.04, "0.04"),
            (2.00001, "2"),
            (-0.048123, "-0.04812"),
            (1053.4, "1053"),
            (3.0, "3"),
            (2e-9, "2.00e-9"),
            (1e12, "1.00e12"),
        ] {
            assert_eq!(plain(x), s);
        }
        for (n, s) in [(30.0, "30"), (209_832.0, "209.8 k"), (10_240.0, "10.24 k"), (1_191_736.0, "1.19 M"), (2e9, "2.00 G")] {
            assert_eq!(count(n), s);
        }
        for (t, s) in [(0.52, "0.5 s"), (59.0, "59 s"), (303.0, "5 min 3 s"), (7300.0, "2 h 1 min")] {
            assert_eq!(duration(t), s);
        }
    }

    #[test]
    fn errors_say_how_many_digits() {
        for (m, e, signed, s) in [
            (1.92345, Some(0.0123), false, "1.923 ± 0.012"),
            (-0.02111, Some(0.0042), true, "−0.0211 ± 0.0042"),
            (0.5, Some(0.2), true, "+0.50 ± 0.20"),
            (1053.0, Some(31.4), false, "1053 ± 31"),
            (1.92345, None, false, "1.923"),
            (0.25, Some(0.0), true, "+0.25"),
        ] {
            assert_eq!(with_error(m, e, signed), s);
        }
        assert_eq!(rounded(1.234567, 5), 1.2346);
        assert_eq!(rounded(-123_456.0, 3), -123_000.0);
    }
}
