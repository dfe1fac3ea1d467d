//! The page: one HTML file with style, script and data inside, which needs no network.

use super::numbers::rounded;
use serde_json::Value;

/// The mark by which a file is known as a report, so that it may be overwritten.
pub const MARK: &str = "<meta name=\"generator\" content=\"tidegate report\">";

const TEMPLATE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPTS: [&str; 7] = [
    include_str!("js/base.js"),
    include_str!("js/chart.js"),
    include_str!("js/plots.js"),
    include_str!("js/training.js"),
    include_str!("js/measures.js"),
    include_str!("js/needle.js"),
    include_str!("js/page.js"),
];

/// Digits of a number in the data: more than can be seen in a drawing.
const DIGITS: usize = 5;

fn shorten(v: &mut Value) {
    match v {
        Value::Number(n) if n.is_f64() => {
            if let Some(x) = n.as_f64() {
                let short = rounded(x, DIGITS);
                // 3 instead of 3.0
                *v = if short == short.trunc() && short.abs() < 1e9 { (short as i64).into() } else { short.into() };
            }
        }
        Value::Array(a) => a.iter_mut().for_each(shorten),
        Value::Object(o) => o.values_mut().for_each(shorten),
        _ => {}
    }
}

/// JSON that can stand in a `script` element: no `<` begins an end tag or a comment there.
fn embedded(v: &Value) -> String {
    v.to_string().replace('<', "\\u003c")
}

/// Text in HTML.
fn escaped(text: &str) -> String {
    text.chars().fold(String::new(), |mut out, c| {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
        out
    })
}

/// The page with `data`.
pub fn html(title: &str, mut data: Value) -> String {
    shorten(&mut data);
    let mut out = String::new();
    let mut rest = TEMPLATE;
    // one pass, so that what is put in isn't looked through
    while let Some((before, after)) = rest.split_once("{{") {
        out.push_str(before);
        let (name, after) = after.split_once("}}").unwrap_or((after, ""));
        match name {
            "mark" => out.push_str(MARK),
            "title" => out.push_str(&escaped(title)),
            "style" => out.push_str(STYLE),
            "data" => out.push_str(&embedded(&data)),
            "script" => SCRIPTS.iter().for_each(|s| out.push_str(s)),
            _ => {}
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn text_of_files_stays_text() {
        let evil = "</script><img src=x onerror=alert(1)>{{script}}<!--";
        let page = html(evil, json!({ "token": evil }));
        assert!(page.contains("&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;{{script}}&lt;!--"));
        assert!(page.contains(r#"{"token":"\u003c/script>\u003cimg src=x onerror=alert(1)>{{script}}\u003c!--"}"#));
        assert!(!page.contains("<img"));
        let data = page.split_once("id=\"data\">").unwrap().1.split_once("</script>").unwrap().0;
        assert_eq!(serde_json::from_str::<Value>(data).unwrap(), json!({ "token": evil }));
    }

    #[test]
    fn nothing_is_fetched() {
        let page = html("a run", json!({}));
        assert!(page.contains(MARK) && page.contains("default-src 'none'"));
        assert!(page.match_indices("url(").all(|(i, _)| page[i..].starts_with("url(#")), "a clip path of the page itself");
        for word in ["http://", "https://", "@import", "src=", "innerHTML", "insertAdjacentHTML", "document.write"] {
            let found = page.match_indices(word).find(|(i, _)| !page[*i..].starts_with("http://www.w3.org/2000/svg"));
            assert_eq!(found, None, "{word}");
        }
    }

    #[test]
    fn numbers_are_short() {
        let mut v = json!([1.23456789, 3.0, [-0.00012345678], 12345678, "1.23456789", null]);
        shorten(&mut v);
        assert_eq!(v.to_string(), "[1.2346,3,[-0.00012346],12345678,\"1.23456789\",null]");
    }
}
