//! A loaded tokenizer: Hugging Face's `tokenizers` with what is needed around it.

use std::collections::HashSet;

use serde_json::Value as Json;
use tokenizers::{AddedToken, Tokenizer as HfTokenizer};

use crate::{invalid, Invalid, Result};

pub struct Tokenizer {
    pub(crate) hf: HfTokenizer,
    special: HashSet<u32>,
    vocab_size: u32,
}

impl Tokenizer {
    /// `json` is tokenizer.json, `config` tokenizer_config.json.
    pub fn from_json(json: &[u8], config: Option<&str>) -> Result<Self> {
        let mut hf = HfTokenizer::from_bytes(json).map_err(|e| Invalid(format!("tokenizer.json: {e}")))?;
        if let Some(config) = config {
            let config: Json =
                serde_json::from_str(config).map_err(|e| Invalid(format!("tokenizer_config.json: {e}")))?;
            add_configured_tokens(&mut hf, &config)?;
        }
        Self::new(hf)
    }

    pub fn new(mut hf: HfTokenizer) -> Result<Self> {
        // A file may carry the truncation and padding of its training: prompts are never cut or padded.
        hf.with_truncation(None).map_err(|e| Invalid(e.to_string()))?;
        hf.with_padding(None);
        let special =
            hf.get_added_tokens_decoder().iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        let vocab_size = hf.get_vocab(true).values().max().map_or(0, |id| id + 1);
        if vocab_size > i32::MAX as u32 {
            return invalid(format!("token id {} is beyond 2^31 - 1", vocab_size - 1));
        }
        Ok(Self { hf, special, vocab_size })
    }

    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<i32>> {
        let encoding = self.hf.encode_fast(text, add_special_tokens).map_err(|e| Invalid(e.to_string()))?;
        Ok(encoding.get_ids().iter().map(|&id| id as i32).collect())
    }

    pub fn decode(&self, ids: &[i32], skip_special_tokens: bool) -> Result<String> {
        let ids: Vec<u32> = ids.iter().filter(|&&id| id >= 0).map(|&id| id as u32).collect();
        self.decode_ids(&ids, skip_special_tokens)
    }

    pub(crate) fn decode_ids(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.hf.decode(ids, skip_special_tokens).map_err(|e| Invalid(e.to_string()))
    }

    pub fn vocab_size(&self) -> i32 {
        self.vocab_size as i32
    }

    pub fn token_text(&self, id: i32) -> Option<String> {
        u32::try_from(id).ok().and_then(|id| self.hf.id_to_token(id))
    }

    pub fn token_id(&self, token: &str) -> Option<i32> {
        self.hf.token_to_id(token).map(|id| id as i32)
    }

    pub fn is_special(&self, id: i32) -> bool {
        u32::try_from(id).is_ok_and(|id| self.special.contains(&id))
    }

    /// Whether the id can give text at all.
    pub(crate) fn is_silent(&self, id: i32, skip_special_tokens: bool) -> bool {
        (skip_special_tokens && self.is_special(id)) || self.token_text(id).is_none()
    }
}

/// tokenizer_config.json's `added_tokens_decoder` may name tokens that tokenizer.json lacks, or make some special.
fn add_configured_tokens(hf: &mut HfTokenizer, config: &Json) -> Result<()> {
    let Some(Json::Object(entries)) = config.get("added_tokens_decoder") else {
        return Ok(());
    };
    let mut tokens = Vec::new();
    for (id, entry) in entries {
        let flag = |name: &str| entry.get(name).and_then(Json::as_bool).unwrap_or(false);
        let (Ok(id), Some(content)) = (id.parse::<u32>(), entry.get("content").and_then(Json::as_str)) else {
            return invalid(format!("tokenizer_config.json: added_tokens_decoder[\"{id}\"] is no token"));
        };
        let token = AddedToken::from(content, flag("special"))
            .single_word(flag("single_word"))
            .lstrip(flag("lstrip"))
            .rstrip(flag("rstrip"))
            .normalized(flag("normalized"));
        tokens.push((id, token));
    }
    tokens.sort_by_key(|(id, _)| *id);
    let known = hf.get_added_tokens_decoder();
    let (mut plain, mut special) = (Vec::new(), Vec::new());
    let mut next = hf.get_vocab_size(true) as u32;
    for (id, token) in tokens {
        match hf.token_to_id(&token.content) {
            Some(have) if have != id => {
                return invalid(format!(
                    "tokenizer_config.json gives token \"{}\" the id {id}, tokenizer.json {have}",
                    token.content
                ))
            }
            Some(_) if known.get(&id).is_some_and(|t| t.special || !token.special) => continue,
            Some(_) => {}
            None if id != next => {
                return invalid(format!(
                    "tokenizer_config.json adds token \"{}\" with id {id}, the next free one is {next}",
                    token.content
                ))
            }
            None => next += 1,
        }
        if token.special { &mut special } else { &mut plain }.push((id, token));
    }
    // Ids are given in the order of adding.
    let mut all: Vec<_> = plain.into_iter().chain(special).collect();
    all.sort_by_key(|(id, _)| *id);
    for (_, token) in all {
        let added = if token.special { hf.add_special_tokens([token]) } else { hf.add_tokens([token]) };
        added.map_err(|e| Invalid(format!("tokenizer_config.json: {e}")))?;
    }
    Ok(())
}
