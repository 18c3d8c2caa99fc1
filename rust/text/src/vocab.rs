//! A tokenizer from the vocabulary embedded in a GGUF file.
//!
//! The file names its pre-tokenizer only (`tokenizer.ggml.pre`); the rules here are those of the models' own
//! tokenizer.json files.

use ahash::AHashMap;
use serde_json::{json, Value as Json};
use tokenizers::models::bpe::BPE;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper, Tokenizer as HfTokenizer};

use crate::tokenizer::Tokenizer;
use crate::{invalid, Invalid, Result};

const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

const GPT2_SPLIT: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK_V3_SPLIT: [&str; 3] = [
    r"\p{N}{1,3}",
    "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
];

pub struct Vocab<'a> {
    pub model: &'a str,
    pub pre: &'a str,
    pub tokens: Vec<&'a str>,
    pub types: Option<&'a [i64]>,
    pub scores: Option<&'a [f32]>,
    pub merges: Vec<&'a str>,
    pub bos: i64,
    pub eos: i64,
    pub unk: i64,
    pub add_bos: bool,
    pub add_eos: bool,
    pub add_space_prefix: bool,
}

impl Vocab<'_> {
    pub fn build(&self) -> Result<Tokenizer> {
        if self.tokens.is_empty() {
            return invalid("tokenizer.ggml.tokens is empty");
        }
        let mut ids: AHashMap<String, u32> = AHashMap::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            // A few files repeat filler tokens: the first one encodes.
            ids.entry(token.to_string()).or_insert(id as u32);
        }
        let mut hf = match self.model {
            "gpt2" => self.byte_level(ids)?,
            "llama" => self.sentence_piece(ids)?,
            other => {
                return invalid(format!(
                    "tokenizer.ggml.model \"{other}\" is not supported (gpt2 and llama are); \
                     --skip-tokenizer-init serves the model by token ids"
                ))
            }
        };
        self.add_special_tokens(&mut hf)?;
        self.add_bos_and_eos(&mut hf)?;
        Tokenizer::new(hf)
    }

    fn byte_level(&self, ids: AHashMap<String, u32>) -> Result<HfTokenizer> {
        let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let digits = json!({"type": "Digits", "individual_digits": true});
        let (normalizer, steps, ignore_merges) = match self.pre {
            "gpt-2" | "phi-2" => (Json::Null, vec![split(GPT2_SPLIT)], false),
            "smollm" => (Json::Null, vec![digits, split(GPT2_SPLIT)], false),
            "qwen2" | "deepseek-r1-qwen" => (json!({"type": "NFC"}), vec![split(QWEN2_SPLIT)], false),
            "llama-bpe" | "llama3" | "llama-v3" => (Json::Null, vec![split(LLAMA3_SPLIT)], true),
            "deepseek-v3" => (Json::Null, DEEPSEEK_V3_SPLIT.map(split).to_vec(), false),
            other => {
                return invalid(format!(
                    "tokenizer.ggml.pre \"{other}\" is not supported (smollm, qwen2, deepseek-r1-qwen, llama-bpe, \
                     llama3, llama-v3, deepseek-v3, gpt-2 and phi-2 are); --skip-tokenizer-init serves the model by \
                     token ids"
                ))
            }
        };
        let mut merges = Vec::with_capacity(self.merges.len());
        for merge in &self.merges {
            match merge.split_once(' ') {
                Some((left, right)) => merges.push((left.to_string(), right.to_string())),
                None => return invalid(format!("tokenizer.ggml.merges: \"{merge}\" is no pair")),
            }
        }
        let model = BPE::builder()
            .vocab_and_merges(ids, merges)
            .ignore_merges(ignore_merges)
            .build()
            .map_err(|e| Invalid(format!("tokenizer.ggml.merges: {e}")))?;
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
        let mut hf = HfTokenizer::new(model);
        if !normalizer.is_null() {
            hf.with_normalizer(Some(part::<NormalizerWrapper>(normalizer)?)).map_err(|e| Invalid(e.to_string()))?;
        }
        let mut steps = steps;
        steps.push(byte_level.clone());
        let steps = json!({"type": "Sequence", "pretokenizers": steps});
        hf.with_pre_tokenizer(Some(part::<PreTokenizerWrapper>(steps)?));
        hf.with_decoder(Some(part::<DecoderWrapper>(byte_level)?));
        Ok(hf)
    }

    /// As Hugging Face turns a SentencePiece BPE model into its own: the merges are the pairs of tokens that make up
    /// another token, the best scored token first.
    fn sentence_piece(&self, ids: AHashMap<String, u32>) -> Result<HfTokenizer> {
        let Some(scores) = self.scores else {
            return invalid("tokenizer.ggml.scores is missing");
        };
        let is_piece = |id: u32| !matches!(self.types.map(|t| t[id as usize]), Some(UNKNOWN | CONTROL | USER_DEFINED));
        let mut merges = Vec::new();
        for (token, &id) in ids.iter().filter(|(_, &id)| is_piece(id)) {
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                    if is_piece(l) && is_piece(r) {
                        merges.push((scores[id as usize], l, r, left.to_string(), right.to_string()));
                    }
                }
            }
        }
        let length = |s: &str| s.chars().count();
        merges.sort_by(|a, b| {
            b.0.total_cmp(&a.0)
                .then_with(|| length(&b.3).cmp(&length(&a.3)))
                .then_with(|| length(&b.4).cmp(&length(&a.4)))
                .then_with(|| (a.1, a.2).cmp(&(b.1, b.2)))
        });
        let mut model = BPE::builder()
            .vocab_and_merges(ids, merges.into_iter().map(|m| (m.3, m.4)).collect())
            .fuse_unk(true)
            .byte_fallback(true);
        if let Some(unk) = usize::try_from(self.unk).ok().and_then(|id| self.tokens.get(id)) {
            model = model.unk_token(unk.to_string());
        }
        let mut hf = HfTokenizer::new(model.build().map_err(|e| Invalid(e.to_string()))?);
        let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"})];
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if self.add_space_prefix {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": "\u{2581}"}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let normalizer = part::<NormalizerWrapper>(json!({"type": "Sequence", "normalizers": normalizers}))?;
        hf.with_normalizer(Some(normalizer)).map_err(|e| Invalid(e.to_string()))?;
        hf.with_decoder(Some(part::<DecoderWrapper>(json!({"type": "Sequence", "decoders": decoders}))?));
        Ok(hf)
    }

    fn add_special_tokens(&self, hf: &mut HfTokenizer) -> Result<()> {
        let Some(types) = self.types else {
            return Ok(());
        };
        let sentence_piece = self.model == "llama";
        let (mut special, mut added) = (Vec::new(), Vec::new());
        for (token, &kind) in self.tokens.iter().zip(types) {
            if token.is_empty() {
                continue;
            }
            match kind {
                CONTROL => special.push(AddedToken::from(*token, true).normalized(false)),
                UNKNOWN if sentence_piece => special.push(AddedToken::from(*token, true).normalized(false)),
                USER_DEFINED => added.push(AddedToken::from(*token, false).normalized(false)),
                _ => {}
            }
        }
        hf.add_special_tokens(special).map_err(|e| Invalid(e.to_string()))?;
        hf.add_tokens(added).map_err(|e| Invalid(e.to_string()))?;
        Ok(())
    }

    fn add_bos_and_eos(&self, hf: &mut HfTokenizer) -> Result<()> {
        let mut single = vec!["$A:0".to_string()];
        let mut used = Vec::new();
        let mut token = |add: bool, id: i64, name: &str| -> Result<Option<String>> {
            if !add {
                return Ok(None);
            }
            match usize::try_from(id).ok().and_then(|id| self.tokens.get(id)) {
                Some(token) => {
                    used.push((token.to_string(), id as u32));
                    Ok(Some(format!("{token}:0")))
                }
                None => invalid(format!("tokenizer.ggml.add_{name}_token is set, but there is no {name} token")),
            }
        };
        if let Some(bos) = token(self.add_bos, self.bos, "bos")? {
            single.insert(0, bos);
        }
        if let Some(eos) = token(self.add_eos, self.eos, "eos")? {
            single.push(eos);
        }
        if used.is_empty() {
            return Ok(());
        }
        used.dedup();
        let pieces = single
            .iter()
            .map(|piece| {
                let name = piece.strip_suffix(":0").unwrap_or(piece);
                match name {
                    "$A" => json!({"Sequence": {"id": "A", "type_id": 0}}),
                    _ => json!({"SpecialToken": {"id": name, "type_id": 0}}),
                }
            })
            .collect::<Vec<_>>();
        let tokens: serde_json::Map<String, Json> = used
            .iter()
            .map(|(token, id)| (token.clone(), json!({"id": token, "ids": [id], "tokens": [token]})))
            .collect();
        let processor =
            json!({"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": tokens});
        hf.with_post_processor(Some(part::<TemplateProcessing>(processor)?));
        Ok(())
    }
}

/// A part of a tokenizer as tokenizer.json writes it.
fn part<T: serde::de::DeserializeOwned>(value: Json) -> Result<T> {
    serde_json::from_value(value).map_err(|e| Invalid(e.to_string()))
}
