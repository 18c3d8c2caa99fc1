//! Tokenizers and chat templates behind the C ABI of `include/weft_text.h`.

mod abi;
pub mod chat;
pub mod pyjson;
pub mod stream;
pub mod template;
pub mod tokenizer;
pub mod vocab;

/// What is wrong with the input, in words for the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invalid(pub String);

impl std::fmt::Display for Invalid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Invalid {}

pub type Result<T> = std::result::Result<T, Invalid>;

pub(crate) fn invalid<T>(message: impl Into<String>) -> Result<T> {
    Err(Invalid(message.into()))
}
