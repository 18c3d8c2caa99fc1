//! Incremental decoding: text comes out as soon as its characters are whole.
//!
//! Where nothing is wrong the pieces are those of Hugging Face's `DecodeStream`: the tokens since the last piece are
//! decoded together with those of that piece (decoders may look at what stands before), and a text that ends in U+FFFD
//! waits for more. Unlike there, the wait is bounded, what is left comes out at the end, and a decoder that changes its
//! mind about what was given out already (byte fallback does on invalid bytes) is no error.

use std::sync::Arc;

use crate::tokenizer::Tokenizer;
use crate::Result;

/// A character is 4 bytes, so 4 tokens, at most: text that waits for longer than this holds invalid bytes.
const MAX_HELD_TOKENS: usize = 16;
/// The held tokens of a long run of invalid bytes are let go as soon as possible, at this number whatever they are.
const MAX_TOKENS: usize = 64;
const REPLACEMENT: char = '\u{fffd}';

pub struct Stream {
    tokenizer: Arc<Tokenizer>,
    skip_special_tokens: bool,
    /// Context tokens, whose text is `prefix` and was given out, then the held ones.
    ids: Vec<u32>,
    context: usize,
    prefix: String,
    /// Bytes of the held tokens' text that were given out already.
    sent: usize,
}

impl Stream {
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special_tokens: bool) -> Self {
        Self { tokenizer, skip_special_tokens, ids: Vec::new(), context: 0, prefix: String::new(), sent: 0 }
    }

    pub fn push(&mut self, id: i32) -> Result<String> {
        // Without this a run of such tokens would be kept, and decoded again, for ever.
        if self.tokenizer.is_silent(id, self.skip_special_tokens) {
            return Ok(String::new());
        }
        self.ids.push(id as u32);
        let text = self.decode(&self.ids)?;
        let given = self.prefix.len() + self.sent;
        let overdue = self.ids.len() - self.context > MAX_HELD_TOKENS || self.sent > 0;
        if text.ends_with(REPLACEMENT) || text.len() <= given {
            return if overdue { self.release(text) } else { Ok(String::new()) };
        }
        if !text.starts_with(&self.prefix) || !text.is_char_boundary(given) {
            return self.restart();
        }
        let piece = text[given..].to_string();
        self.ids.drain(..self.context);
        self.context = self.ids.len();
        self.prefix = self.decode(&self.ids)?;
        self.sent = 0;
        Ok(piece)
    }

    pub fn flush(&mut self) -> Result<String> {
        let text = self.decode(&self.ids)?;
        let given = self.prefix.len() + self.sent;
        let piece = if text.starts_with(&self.prefix) && text.is_char_boundary(given) {
            text[given.min(text.len())..].to_string()
        } else {
            self.decode(&self.ids[self.context..])?
        };
        self.clear();
        Ok(piece)
    }

    fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode_ids(ids, self.skip_special_tokens)
    }

    fn clear(&mut self) {
        self.ids.clear();
        self.context = 0;
        self.prefix.clear();
        self.sent = 0;
    }

    /// Gives out the held text but for a last U+FFFD, which may be the beginning of a character: bytes that come later
    /// cannot change what stands before it.
    fn release(&mut self, text: String) -> Result<String> {
        let given = self.prefix.len() + self.sent;
        if !text.starts_with(&self.prefix) || !text.is_char_boundary(given) {
            return self.restart();
        }
        let settled = text.strip_suffix(REPLACEMENT).unwrap_or(&text).len();
        let piece = text.get(given..settled).unwrap_or("").to_string();
        let given = given.max(settled);
        self.sent = given - self.prefix.len();
        // Let go of tokens whose text is out: the rest must decode to the rest by itself.
        for cut in (self.context.max(1)..self.ids.len()).rev() {
            let (front, back) = (self.decode(&self.ids[..cut])?, self.decode(&self.ids[cut..])?);
            if front.len() <= given
                && front.len() + back.len() == text.len()
                && text.starts_with(&front)
                && text.ends_with(&back)
            {
                self.sent = given - front.len();
                self.ids.drain(..cut);
                self.context = 0;
                self.prefix.clear();
                return Ok(piece);
            }
        }
        if self.ids.len() > MAX_TOKENS {
            let rest = text[given..].to_string();
            self.clear();
            return Ok(piece + &rest);
        }
        Ok(piece)
    }

    /// The context's text has changed: goes on without it.
    fn restart(&mut self) -> Result<String> {
        self.ids.drain(..self.context);
        self.context = 0;
        self.prefix.clear();
        let text = self.decode(&self.ids)?;
        let piece = text.get(self.sent..).unwrap_or("").to_string();
        self.sent = 0;
        self.ids.clear();
        Ok(piece)
    }
}
