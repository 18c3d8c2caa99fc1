//! A compiled chat template: minijinja with what Hugging Face's jinja2 environment has and minijinja has not.

use std::sync::OnceLock;

use minijinja::value::{Kwargs, Serde, Value, ValueKind};
use minijinja::{syntax::SyntaxConfig, AutoEscape, Environment, Error, ErrorKind, State};
use serde_json::{Map, Value as Json};

use crate::chat::Habits;
use crate::pyjson;
use crate::{Invalid, Result};

/// What a render may cost: one unit is an instruction or 64 bytes of text handled. A large template takes some thousand
/// units a message; this many take a fraction of a second.
const BASE_FUEL: u64 = 4_000_000;
/// Further units for each byte of the conversation.
const FUEL_PER_BYTE: u64 = 2;

const NAME: &str = "chat_template";

pub struct Template {
    env: Environment<'static>,
    source: String,
    pub(crate) habits: OnceLock<Habits>,
}

/// What a template said through raise_exception, to be found in an error's chain.
#[derive(Debug)]
struct Raised(String);

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

impl Template {
    pub fn compile(source: &str) -> Result<Self> {
        let mut env = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        let syntax = syntax.trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.map_err(|e| Invalid(e.to_string()))?);
        env.set_auto_escape_callback(|_| AutoEscape::None);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.set_formatter(|out, state, value| match pyjson::as_float(value) {
            Some(x) => out.write_str(&pyjson::float_repr(x)).map_err(Error::from),
            None => minijinja::escape_formatter(out, state, value),
        });
        env.add_filter("tojson", tojson);
        env.add_filter("string", string);
        env.add_test("iterable", |v: &Value| v.is_undefined() || (!v.is_none() && v.try_iter().is_ok()));
        env.add_test("sequence", |v: &Value| {
            matches!(v.kind(), ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map)
        });
        env.add_function("raise_exception", |message: String| -> std::result::Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
        });
        env.add_function("strftime_now", strftime_now);
        env.add_template_owned(NAME, without_generation_tags(source)).map_err(|e| describe(&e))?;
        Ok(Self { env, source: source.to_string(), habits: OnceLock::new() })
    }

    /// As given to `compile`.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// `input_bytes`: the size of the variables, for the limit on the work.
    pub(crate) fn render(&self, variables: &Map<String, Json>, input_bytes: usize) -> Result<String> {
        let fuel = BASE_FUEL + FUEL_PER_BYTE * input_bytes as u64;
        // The limit is the environment's: a copy shares everything else.
        let mut env = self.env.clone();
        env.set_fuel(Some(fuel));
        let template = env.get_template(NAME).map_err(|e| describe(&e))?;
        template.render(Value::from(Serde(variables))).map_err(|e| describe(&e))
    }
}

fn describe(error: &Error) -> Invalid {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(raised) = current.downcast_ref::<Raised>() {
            return Invalid(raised.0.clone());
        }
        cause = current.source();
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return Invalid("the chat template takes too many steps".to_string());
    }
    Invalid(format!("the chat template failed: {error}"))
}

/// `json.dumps` with its options and Hugging Face's default of ensure_ascii=False; nothing is escaped for HTML.
fn tojson(state: &State, value: &Value, kwargs: Kwargs) -> std::result::Result<Value, Error> {
    let mut options = pyjson::Options::default();
    if let Some(ascii) = kwargs.get::<Option<bool>>("ensure_ascii")? {
        options.ensure_ascii = ascii;
    }
    options.sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    if let Some(indent) = kwargs.get::<Option<Value>>("indent")?.filter(|indent| !indent.is_none()) {
        options.indent = Some(match indent.as_str() {
            Some(text) => text.to_string(),
            None => " ".repeat(indent.as_i64().unwrap_or(0).clamp(0, 16) as usize),
        });
        options.item_separator = ",".to_string();
    }
    if let Some(separators) = kwargs.get::<Option<Value>>("separators")?.filter(|s| !s.is_none()) {
        let texts: Vec<String> = separators.try_iter()?.filter_map(|s| s.as_str().map(str::to_string)).collect();
        let [item, key] = texts.as_slice() else {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators must be two strings"));
        };
        (options.item_separator, options.key_separator) = (item.clone(), key.clone());
    }
    kwargs.assert_all_used()?;
    let text = pyjson::dumps(value, &options)?;
    state.consume_fuel(text.len() as u64 / 16)?;
    Ok(Value::from(text))
}

fn string(state: &State, value: &Value) -> std::result::Result<Value, Error> {
    if value.kind() == ValueKind::String {
        return Ok(value.clone());
    }
    let text = pyjson::as_float(value).map_or_else(|| value.to_string(), pyjson::float_repr);
    state.consume_fuel(text.len() as u64 / 16)?;
    Ok(Value::from(text))
}

/// Python's datetime.now().strftime(format), in the machine's time zone.
fn strftime_now(format: String) -> std::result::Result<String, Error> {
    jiff::fmt::strtime::format(&format, &jiff::Zoned::now())
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("strftime_now(\"{format}\"): {e}")))
}

/// `{% generation %}` ... `{% endgeneration %}` mark what training learns from; here they mark nothing. They become an
/// `if true`, which treats the whitespace around as they do.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let inner = &tag[2..end];
        let word = inner.trim_matches(|c: char| matches!(c, '-' | '+') || c.is_whitespace());
        match word {
            "generation" => out.push_str(&format!("{{%{}%}}", inner.replace("generation", "if true"))),
            "endgeneration" => out.push_str(&format!("{{%{}%}}", inner.replace("endgeneration", "endif"))),
            _ => {
                // Strings in a tag may hold "%}": only the opening is passed over, the rest is looked at again.
                out.push_str("{%");
                rest = &tag[2..];
                continue;
            }
        }
        rest = &tag[end + 2..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, variables: Json) -> Result<String> {
        Template::compile(source)?.render(variables.as_object().unwrap(), 0)
    }

    #[test]
    fn generation_tags_are_dropped() {
        let source = "a\n  {%- generation -%}\n b {% endgeneration %}\nc{{ '{% generation %}' }}";
        assert_eq!(render(source, serde_json::json!({})).unwrap(), "ab c{% if true %}");
    }

    #[test]
    fn raised_text_is_the_error() {
        let source = "{% macro m() %}{{ raise_exception('no ' ~ x) }}{% endmacro %}{{ m() }}";
        assert_eq!(render(source, serde_json::json!({"x": "tools"})), Err(Invalid("no tools".to_string())));
    }

    #[test]
    fn endless_templates_end() {
        for source in [
            "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x{% endfor %}{% endfor %}{% endfor %}",
            "{% set ns = namespace(s='x') %}{% for a in range(9999) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        ] {
            assert!(render(source, serde_json::json!({})).is_err(), "{source}");
        }
    }

    #[test]
    fn tests_and_filters_as_jinja2() {
        let source =
            "{{ none is iterable }} {{ 'a' is sequence }} {{ {} is sequence }} {{ 1e-5|string }} {{ x }} {{ none }} \
                      {{ [1, 2]|tojson }} {{ {'b': 1}|tojson(indent=1) }} {{ 'a.b'.split('.')[1] }}";
        let wanted = "False True True 1e-05 1e+16 None [1, 2] {\n \"b\": 1\n} b";
        assert_eq!(render(source, serde_json::json!({"x": 1e16})).unwrap(), wanted);
    }
}
