//! Values written as Python writes them: `json.dumps` and the text of a float.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

pub struct Options {
    pub ensure_ascii: bool,
    pub indent: Option<String>,
    pub item_separator: String,
    pub key_separator: String,
    pub sort_keys: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ensure_ascii: false,
            indent: None,
            item_separator: ", ".to_string(),
            key_separator: ": ".to_string(),
            sort_keys: false,
        }
    }
}

const MAX_DEPTH: usize = 256;

/// `repr(x)` of a Python float.
pub fn float_repr(x: f64) -> String {
    if x.is_nan() {
        return "nan".to_string();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf" } else { "-inf" }.to_string();
    }
    // The shortest text that reads back, with an exponent outside of [1e-4, 1e16), in Rust's Debug as in Python's repr;
    // only the exponent is spelled differently.
    let text = format!("{x:?}");
    match text.split_once('e') {
        Some((mantissa, exponent)) => {
            let (sign, digits) = match exponent.strip_prefix('-') {
                Some(digits) => ('-', digits),
                None => ('+', exponent),
            };
            format!("{mantissa}e{sign}{digits:0>2}")
        }
        None => text,
    }
}

/// The float in `value`, if it is one.
pub fn as_float(value: &Value) -> Option<f64> {
    (value.kind() == ValueKind::Number && !value.is_integer()).then(|| f64::try_from(value.clone()).ok()).flatten()
}

pub fn dumps(value: &Value, options: &Options) -> Result<String, Error> {
    let mut out = String::new();
    write_value(&mut out, value, options, 0)?;
    Ok(out)
}

fn fail<T>(message: impl Into<String>) -> Result<T, Error> {
    Err(Error::new(ErrorKind::BadSerialization, message.into()))
}

fn json_float(x: f64) -> String {
    if x.is_nan() {
        "NaN".to_string()
    } else if x.is_infinite() {
        if x > 0.0 { "Infinity" } else { "-Infinity" }.to_string()
    } else {
        float_repr(x)
    }
}

fn write_value(out: &mut String, value: &Value, options: &Options, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return fail("tojson: nested too deeply");
    }
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => match as_float(value) {
            Some(x) => out.push_str(&json_float(x)),
            None => out.push_str(&value.to_string()),
        },
        ValueKind::String => write_string(out, value.as_str().unwrap_or_default(), options.ensure_ascii),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            let mut empty = true;
            for item in value.try_iter()? {
                separate(out, &mut empty, options, depth + 1);
                write_value(out, &item, options, depth + 1)?;
            }
            close(out, ']', empty, options, depth);
        }
        ValueKind::Map => {
            out.push('{');
            let mut entries = Vec::new();
            for key in value.try_iter()? {
                entries.push((key_text(&key)?, value.get_item(&key)?));
            }
            if options.sort_keys {
                entries.sort_by(|a, b| a.0.cmp(&b.0));
            }
            let mut empty = true;
            for (key, item) in entries {
                separate(out, &mut empty, options, depth + 1);
                write_string(out, &key, options.ensure_ascii);
                out.push_str(&options.key_separator);
                write_value(out, &item, options, depth + 1)?;
            }
            close(out, '}', empty, options, depth);
        }
        ValueKind::Undefined => return fail("tojson: an undefined value is not JSON serializable"),
        kind => return fail(format!("tojson: a {kind} is not JSON serializable")),
    }
    Ok(())
}

fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_string()),
        ValueKind::None => Ok("null".to_string()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_string()),
        ValueKind::Number => Ok(as_float(key).map_or_else(|| key.to_string(), json_float)),
        kind => fail(format!("tojson: a {kind} cannot be a key")),
    }
}

fn separate(out: &mut String, empty: &mut bool, options: &Options, depth: usize) {
    if !std::mem::replace(empty, false) {
        out.push_str(&options.item_separator);
    }
    new_line(out, options, depth);
}

fn close(out: &mut String, bracket: char, empty: bool, options: &Options, depth: usize) {
    if !empty {
        new_line(out, options, depth);
    }
    out.push(bracket);
}

fn new_line(out: &mut String, options: &Options, depth: usize) {
    if let Some(indent) = &options.indent {
        out.push('\n');
        for _ in 0..depth {
            out.push_str(indent);
        }
    }
}

fn write_string(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (ensure_ascii && c > '~') => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_as_python() {
        for (x, text) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e-5, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (0.0001, "0.0001"),
            (1e16, "1e+16"),
            (9007199254740993.0, "9007199254740992.0"),
            (1.2345e22, "1.2345e+22"),
            (1e100, "1e+100"),
            (-0.0, "-0.0"),
        ] {
            assert_eq!(float_repr(x), text);
        }
    }

    #[test]
    fn dumps_as_python() {
        let json: serde_json::Value =
            serde_json::from_str(r#"{"b":[1,2.0,{"x":null}],"a":"é\u0001\"</p>","e":[],"f":{}}"#).unwrap();
        let value = Value::from(minijinja::value::Serde(&json));
        let plain = dumps(&value, &Options::default()).unwrap();
        assert_eq!(plain, r#"{"b": [1, 2.0, {"x": null}], "a": "é\u0001\"</p>", "e": [], "f": {}}"#);
        let options = Options {
            ensure_ascii: true,
            indent: Some("  ".to_string()),
            item_separator: ",".to_string(),
            sort_keys: true,
            ..Options::default()
        };
        assert_eq!(
            dumps(&value, &options).unwrap(),
            "{\n  \"a\": \"\\u00e9\\u0001\\\"</p>\",\n  \"b\": [\n    1,\n    2.0,\n    {\n      \"x\": null\n    }\n  ],\n  \"e\": [],\n  \"f\": {}\n}"
        );
        assert_eq!(dumps(&Value::from("😀"), &options).unwrap(), "\"\\ud83d\\ude00\"");
        assert!(dumps(&Value::UNDEFINED, &Options::default()).is_err());
    }
}
