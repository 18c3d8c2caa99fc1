//! From an OpenAI conversation to a template's variables and back to the prompt, as transformers' apply_chat_template
//! does it; and, where `adapt` is set, with the conversation brought into the form that the template can take:
//! * `tool_calls[].function.arguments` is JSON text in OpenAI's API; some templates need the object, others the text;
//! * `content` may be a list of text parts, or null or absent next to tool calls; many templates take strings only.
//!
//! What a template can take is found out by rendering small conversations. Where it shows both forms well, the
//! conversation is left as it is.

use serde_json::{json, Map, Value as Json};

use crate::pyjson;
use crate::template::Template;
use crate::{invalid, Invalid, Result};

#[derive(Default)]
pub struct Chat<'a> {
    pub messages: &'a str,
    pub tools: Option<&'a str>,
    pub documents: Option<&'a str>,
    pub kwargs: Option<&'a str>,
    pub special_tokens: Option<&'a str>,
    pub add_generation_prompt: bool,
    pub continue_final_message: bool,
    pub adapt: bool,
}

/// What a template takes, as far as it needs to be known.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Habits {
    /// Lists of text parts have to be joined.
    join_parts: bool,
    /// null content has to become "", in messages without and with tool calls.
    no_null: bool,
    no_null_with_calls: bool,
    arguments: Arguments,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Arguments {
    #[default]
    AsGiven,
    Object,
    Text,
}

const TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

pub fn render(template: &Template, chat: &Chat) -> Result<String> {
    if chat.continue_final_message && chat.add_generation_prompt {
        return invalid("continue_final_message and add_generation_prompt cannot both be true");
    }
    let messages = parse_messages(chat.messages)?;
    let input_bytes = [Some(chat.messages), chat.tools, chat.documents, chat.kwargs]
        .iter()
        .map(|text| text.map_or(0, str::len))
        .sum();
    let variables = variables(chat)?;
    let run = |messages: &[Map<String, Json>]| {
        render_messages(template, messages, &variables, chat.continue_final_message, input_bytes)
    };
    if !chat.adapt {
        return run(&messages);
    }
    let habits = template.habits.get_or_init(|| Habits::of(template));
    let adapted = messages.iter().map(|m| habits.adapt(m)).collect::<Result<Vec<_>>>()?;
    run(&adapted).or_else(|error| {
        let plain = adapted.iter().map(plain_content).collect::<Vec<_>>();
        if plain == adapted {
            return Err(error);
        }
        run(&plain).map_err(|_| error)
    })
}

fn parse_messages(text: &str) -> Result<Vec<Map<String, Json>>> {
    let messages: Json = serde_json::from_str(text).map_err(|e| Invalid(format!("messages: {e}")))?;
    let Json::Array(messages) = messages else {
        return invalid("messages must be an array");
    };
    messages
        .into_iter()
        .enumerate()
        .map(|(i, message)| match message {
            Json::Object(message) => Ok(message),
            _ => invalid(format!("messages[{i}] must be an object")),
        })
        .collect()
}

/// All variables but the messages. kwargs are above the special tokens.
fn variables(chat: &Chat) -> Result<Map<String, Json>> {
    let mut variables = Map::new();
    for (name, text) in [("special_tokens", chat.special_tokens), ("chat_template_kwargs", chat.kwargs)] {
        let Some(text) = text else { continue };
        match serde_json::from_str(text).map_err(|e| Invalid(format!("{name}: {e}")))? {
            Json::Object(object) => variables.extend(object),
            Json::Null => {}
            _ => return invalid(format!("{name} must be an object")),
        }
    }
    for name in ["messages", "tools", "documents", "add_generation_prompt"] {
        if variables.contains_key(name) {
            return invalid(format!("chat_template_kwargs must not set {name}"));
        }
    }
    for (name, text) in [("tools", chat.tools), ("documents", chat.documents)] {
        let value = match text {
            None => Json::Null,
            Some(text) => serde_json::from_str(text).map_err(|e| Invalid(format!("{name}: {e}")))?,
        };
        match &value {
            Json::Null => {}
            Json::Array(items) if items.iter().all(Json::is_object) => {}
            _ => return invalid(format!("{name} must be an array of objects")),
        }
        variables.insert(name.to_string(), value);
    }
    variables.insert("add_generation_prompt".to_string(), Json::Bool(chat.add_generation_prompt));
    Ok(variables)
}

/// transformers copies the reasoning to the names under which templates look for it.
fn with_reasoning_aliases(message: &Map<String, Json>) -> Map<String, Json> {
    let reasoning = ["reasoning_content", "thinking", "reasoning"]
        .iter()
        .find_map(|key| message.get(*key).filter(|value| !value.is_null()));
    let Some(reasoning) = reasoning else {
        return message.clone();
    };
    let mut out = Map::new();
    out.insert("thinking".to_string(), reasoning.clone());
    out.extend(message.iter().map(|(k, v)| (k.clone(), v.clone())));
    out.insert("reasoning_content".to_string(), reasoning.clone());
    out
}

/// What Python's str.strip() takes for whitespace.
fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn render_messages(
    template: &Template,
    messages: &[Map<String, Json>],
    variables: &Map<String, Json>,
    continue_final_message: bool,
    input_bytes: usize,
) -> Result<String> {
    let mut messages: Vec<_> = messages.iter().map(with_reasoning_aliases).collect();
    // The final message is followed by a mark, and what comes from the mark on is cut off.
    let final_text = match continue_final_message {
        true => Some(mark_final_message(template, &mut messages)?),
        false => None,
    };
    let mut all = Map::new();
    all.insert("messages".to_string(), Json::Array(messages.into_iter().map(Json::Object).collect()));
    all.extend(variables.iter().map(|(k, v)| (k.clone(), v.clone())));
    let mut prompt = template.render(&all, input_bytes)?;
    if let Some(text) = final_text {
        let at = prompt.rfind(TAG.trim_end()).filter(|_| prompt.contains(text.trim_matches(is_python_space)));
        let Some(at) = at else {
            return invalid("continue_final_message: the chat template does not show the final message as it is");
        };
        let spacing_kept = prompt[at..].starts_with(TAG);
        prompt.truncate(at);
        if !spacing_kept {
            prompt.truncate(prompt.trim_end_matches(is_python_space).len());
        }
    }
    Ok(prompt)
}

/// Appends the mark to the final message; returns the text without it.
fn mark_final_message(template: &Template, messages: &mut [Map<String, Json>]) -> Result<String> {
    let Some(content) = messages.last_mut().map(|message| message.get_mut("content")) else {
        return invalid("continue_final_message is set, but messages is empty");
    };
    if !template.source().contains("content") {
        return invalid("continue_final_message: the chat template does not use the content of messages");
    }
    let text = match content {
        Some(Json::String(text)) => Some(text),
        Some(Json::Array(parts)) => parts.iter_mut().rev().find_map(|part| match part.get_mut("text") {
            Some(Json::String(text)) => Some(text),
            _ => None,
        }),
        _ => None,
    };
    let Some(text) = text else {
        return invalid("continue_final_message is set, but the final message has no text to continue");
    };
    let original = text.clone();
    text.push_str(TAG);
    Ok(original)
}

/// The text of a content made of text parts only, joined by newlines.
fn joined_parts(content: &Json) -> Option<String> {
    let Json::Array(parts) = content else { return None };
    let mut texts = Vec::with_capacity(parts.len());
    for part in parts {
        texts.push(match part {
            Json::String(text) => text.as_str(),
            Json::Object(part) => match part.get("type").and_then(Json::as_str) {
                Some("text" | "input_text" | "output_text") => part.get("text")?.as_str()?,
                Some("refusal") => part.get("refusal")?.as_str()?,
                _ => return None,
            },
            _ => return None,
        });
    }
    Some(texts.join("\n"))
}

/// The form that every template takes.
fn plain_content(message: &Map<String, Json>) -> Map<String, Json> {
    let mut message = message.clone();
    let content = message.get("content").unwrap_or(&Json::Null);
    if content.is_null() {
        message.insert("content".to_string(), json!(""));
    } else if let Some(text) = joined_parts(content) {
        message.insert("content".to_string(), Json::String(text));
    }
    message
}

fn has_tool_calls(message: &Map<String, Json>) -> bool {
    matches!(message.get("tool_calls"), Some(Json::Array(calls)) if !calls.is_empty())
}

impl Habits {
    pub(crate) fn of(template: &Template) -> Self {
        Self {
            join_parts: !takes_parts(template),
            no_null: !takes_null(template, false),
            no_null_with_calls: !takes_null(template, true),
            arguments: arguments_wanted(template),
        }
    }

    fn adapt(&self, message: &Map<String, Json>) -> Result<Map<String, Json>> {
        let mut message = message.clone();
        let no_null = if has_tool_calls(&message) { self.no_null_with_calls } else { self.no_null };
        let content = message.get("content").unwrap_or(&Json::Null);
        if content.is_null() {
            message.insert("content".to_string(), if no_null { json!("") } else { Json::Null });
        } else if content.is_array() && self.join_parts {
            let Some(text) = joined_parts(content) else {
                return invalid("the model's chat template takes text only, a message has content of another type");
            };
            message.insert("content".to_string(), Json::String(text));
        }
        if self.arguments != Arguments::AsGiven {
            if let Some(Json::Array(calls)) = message.get_mut("tool_calls") {
                for call in calls {
                    let arguments = match call {
                        Json::Object(call) if call.contains_key("function") => call["function"].get_mut("arguments"),
                        _ => call.get_mut("arguments"),
                    };
                    if let Some(arguments) = arguments {
                        self.adapt_arguments(arguments);
                    }
                }
            }
        }
        Ok(message)
    }

    fn adapt_arguments(&self, arguments: &mut Json) {
        match (&self.arguments, &*arguments) {
            (Arguments::Object, Json::String(text)) if text.trim().is_empty() => *arguments = json!({}),
            (Arguments::Object, Json::String(text)) => {
                // What is no JSON object stays as it is: the template says what it makes of it.
                if let Ok(object @ Json::Object(_)) = serde_json::from_str(text) {
                    *arguments = object;
                }
            }
            (Arguments::Text, Json::Object(_)) => {
                let value = minijinja::Value::from(minijinja::value::Serde(&*arguments));
                if let Ok(text) = pyjson::dumps(&value, &pyjson::Options::default()) {
                    *arguments = Json::String(text);
                }
            }
            _ => {}
        }
    }
}

const PROBE: &str = "weft_probe";

fn probe(template: &Template, messages: Json) -> Option<String> {
    let mut variables = Map::new();
    for token in ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"] {
        variables.insert(token.to_string(), json!(""));
    }
    variables.insert(
        "tools".to_string(),
        json!([{"type": "function", "function": {"name": "f", "description": "d",
                "parameters": {"type": "object", "properties": {"p": {"type": "string", "description": "d"}}}}}]),
    );
    variables.insert("documents".to_string(), Json::Null);
    variables.insert("add_generation_prompt".to_string(), json!(false));
    let messages: Vec<Map<String, Json>> = serde_json::from_value(messages).ok()?;
    render_messages(template, &messages, &variables, false, 0).ok()
}

fn takes_parts(template: &Template) -> bool {
    let parts = json!([{"type": "text", "text": PROBE}]);
    [
        json!([{"role": "user", "content": parts}]),
        json!([{"role": "user", "content": "u"}, {"role": "assistant", "content": parts}]),
    ]
    .into_iter()
    .all(|messages| {
        // The list itself, as Python or JSON, is no text for the model.
        probe(template, messages)
            .is_some_and(|out| out.contains(PROBE) && !out.contains("'text'") && !out.contains("\"text\""))
    })
}

fn tool_call(arguments: Json) -> Json {
    json!([{"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}])
}

fn takes_null(template: &Template, with_calls: bool) -> bool {
    let conversation = |content: Json, arguments: Json| {
        let mut message = json!({"role": "assistant", "content": content});
        if with_calls {
            message["tool_calls"] = tool_call(arguments);
        }
        json!([{"role": "user", "content": "u"}, message])
    };
    let nones = |out: &str| out.matches("None").count();
    [json!({}), json!("{}")].into_iter().any(|arguments| {
        let null = probe(template, conversation(Json::Null, arguments.clone()));
        let empty = probe(template, conversation(json!(""), arguments));
        match (null, empty) {
            (Some(null), Some(empty)) => nones(&null) <= nones(&empty),
            (Some(_), None) => true, // it wants null
            (None, _) => false,
        }
    })
}

fn arguments_wanted(template: &Template) -> Arguments {
    let shows = |arguments: Json| {
        ["", "c"].into_iter().map(|c| json!(c)).chain([Json::Null]).any(|content| {
            let messages = json!([
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": content, "tool_calls": tool_call(arguments.clone())},
                {"role": "tool", "tool_call_id": "call00001", "name": "f", "content": "r"},
            ]);
            // JSON within JSON text, or Python's notation, is not what the model was trained on.
            probe(template, messages).is_some_and(|out| {
                out.contains(PROBE)
                    && !out.contains(&format!("\\\"{PROBE}\\\""))
                    && !out.contains(&format!("'{PROBE}'"))
            })
        })
    };
    match (shows(json!({PROBE: "v"})), shows(json!(format!("{{\"{PROBE}\": \"v\"}}")))) {
        (true, false) => Arguments::Object,
        (false, true) => Arguments::Text,
        _ => Arguments::AsGiven,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(messages: &str) -> Chat<'_> {
        Chat { messages, adapt: true, ..Chat::default() }
    }

    #[test]
    fn string_templates_get_strings() {
        let template =
            Template::compile("{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}").unwrap();
        let out = render(
            &template,
            &chat(
                r#"[{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},{"role":"assistant","content":null},{"role":"assistant"}]"#,
            ),
        );
        assert_eq!(out.unwrap(), "user:a\nb;assistant:;assistant:;");
        let image = r#"[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}]"#;
        assert!(render(&template, &chat(image)).unwrap_err().0.contains("text only"));
        assert!(render(&template, &Chat { adapt: false, ..chat(image) }).is_err());
    }

    #[test]
    fn arguments_in_the_form_wanted() {
        let conversation = |arguments: &str| {
            format!(r#"[{{"role":"assistant","tool_calls":[{{"function":{{"name":"f","arguments":{arguments}}}}}]}}]"#)
        };
        let loops = "{% for m in messages %}{% for c in m.tool_calls or [] %}";
        let ends = "{% endfor %}{% endfor %}";
        let json = Template::compile(&format!("{loops}{{{{ c.function.arguments|tojson }}}}{ends}")).unwrap();
        let text = Template::compile(&format!("{loops}{{{{ '' + c.function.arguments }}}}{ends}")).unwrap();
        for arguments in [r#""{\"x\": [1, 2.0]}""#, r#"{"x": [1, 2.0]}"#] {
            for template in [&json, &text] {
                assert_eq!(render(template, &chat(&conversation(arguments))).unwrap(), r#"{"x": [1, 2.0]}"#);
            }
        }
        assert_eq!(render(&json, &chat(&conversation("\"\""))).unwrap(), "{}");
    }

    #[test]
    fn final_message_is_continued() {
        let keeps = Template::compile("{% for m in messages %}<{{ m.content }}>{% endfor %}").unwrap();
        let trims = Template::compile("{% for m in messages %}<{{ m.content | trim }}>{% endfor %}").unwrap();
        let drops = Template::compile("{% for m in messages[:1] %}<{{ m.content }}>{% endfor %}").unwrap();
        let messages = r#"[{"role":"user","content":"q"},{"role":"assistant","content":" one, two "}]"#;
        let chat = Chat { continue_final_message: true, ..chat(messages) };
        assert_eq!(render(&keeps, &chat).unwrap(), "<q>< one, two ");
        assert_eq!(render(&trims, &chat).unwrap(), "<q><one, two");
        assert!(render(&drops, &chat).is_err());
        assert!(render(&keeps, &Chat { add_generation_prompt: true, ..chat }).is_err());
    }

    #[test]
    fn reasoning_is_found_under_every_name() {
        let template = Template::compile("{{ messages[0].thinking }} {{ messages[0].reasoning_content }}").unwrap();
        for key in ["reasoning_content", "thinking", "reasoning"] {
            let messages = format!(r#"[{{"role":"assistant","content":"c","{key}":"why"}}]"#);
            assert_eq!(render(&template, &chat(&messages)).unwrap(), "why why");
        }
    }

    #[test]
    fn wrong_input_is_named() {
        let template = Template::compile("x").unwrap();
        for (chat, part) in [
            (chat("{}"), "messages must be an array"),
            (chat("[1]"), "messages[0] must be an object"),
            (chat("[{]"), "messages: "),
            (Chat { tools: Some("{}"), ..chat("[]") }, "tools must be an array"),
            (Chat { kwargs: Some("[]"), ..chat("[]") }, "chat_template_kwargs must be an object"),
            (Chat { kwargs: Some(r#"{"messages": 1}"#), ..chat("[]") }, "must not set messages"),
        ] {
            let error = render(&template, &chat).unwrap_err().0;
            assert!(error.contains(part), "{error}");
        }
    }
}
