//! The C functions of `include/weft_text.h`. No panic leaves them.

#![allow(clippy::missing_safety_doc)] // the header says what callers owe

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Once};

use crate::chat::{self, Chat};
use crate::stream::Stream;
use crate::template::Template;
use crate::tokenizer::Tokenizer;
use crate::vocab::Vocab;
use crate::{invalid, Invalid, Result};

#[repr(C)]
#[derive(Clone, Copy)]
pub struct WtStr {
    ptr: *const u8,
    len: usize,
}

#[repr(C)]
pub struct WtBuf {
    ptr: *mut u8,
    len: usize,
}

#[repr(C)]
pub struct WtIds {
    ptr: *mut i32,
    len: usize,
}

#[repr(C)]
pub struct WtVocab {
    model: WtStr,
    pre: WtStr,
    tokens: *const WtStr,
    types: *const i64,
    scores: *const f32,
    num_tokens: usize,
    merges: *const WtStr,
    num_merges: usize,
    bos: i64,
    eos: i64,
    unk: i64,
    add_bos: i32,
    add_eos: i32,
    add_space_prefix: i32,
}

#[repr(C)]
pub struct WtChat {
    messages: WtStr,
    tools: WtStr,
    documents: WtStr,
    kwargs: WtStr,
    special_tokens: WtStr,
    add_generation_prompt: i32,
    continue_final_message: i32,
    adapt: i32,
}

const OK: i32 = 0;
const INVALID: i32 = 1;
const INTERNAL: i32 = 2;

/// A stream after a panic holds half a state: it is dropped, and every later call refused.
pub struct StreamHandle(Option<Stream>);

fn into_raw_parts<T>(values: Vec<T>) -> (*mut T, usize) {
    if values.is_empty() {
        return (std::ptr::null_mut(), 0);
    }
    let mut values = std::mem::ManuallyDrop::new(values.into_boxed_slice());
    (values.as_mut_ptr(), values.len())
}

unsafe fn drop_raw_parts<T>(ptr: *mut T, len: usize) {
    if !ptr.is_null() {
        drop(Box::from_raw(std::ptr::slice_from_raw_parts_mut(ptr, len)));
    }
}

unsafe fn set_text(out: *mut WtBuf, text: String) {
    let (ptr, len) = into_raw_parts(text.into_bytes());
    *out = WtBuf { ptr, len };
}

unsafe fn slice<'a, T>(ptr: *const T, len: usize) -> &'a [T] {
    if ptr.is_null() {
        return &[];
    }
    std::slice::from_raw_parts(ptr, len)
}

unsafe fn bytes<'a>(text: WtStr) -> &'a [u8] {
    slice(text.ptr, text.len)
}

unsafe fn text<'a>(name: &str, value: WtStr) -> Result<&'a str> {
    std::str::from_utf8(bytes(value)).or_else(|e| invalid(format!("{name} is not UTF-8: {e}")))
}

unsafe fn optional<'a>(name: &str, value: WtStr) -> Result<Option<&'a str>> {
    if value.ptr.is_null() {
        return Ok(None);
    }
    text(name, value).map(Some)
}

/// A panic is a bug: its text belongs into the error, not on stderr behind the log's back.
fn quiet_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| std::panic::set_hook(Box::new(|_| {})));
}

fn panic_text(panic: Box<dyn std::any::Any + Send>) -> String {
    let text = match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text.to_string(),
        (_, Some(text)) => text.clone(),
        _ => "unknown panic".to_string(),
    };
    format!("the text library failed: {text}")
}

unsafe fn guarded(error: *mut WtBuf, call: impl FnOnce() -> Result<()>) -> i32 {
    quiet_panics();
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(())) => OK,
        Ok(Err(Invalid(message))) => {
            set_text(error, message);
            INVALID
        }
        Err(panic) => {
            set_text(error, panic_text(panic));
            INTERNAL
        }
    }
}

fn quietly<T>(otherwise: T, call: impl FnOnce() -> T) -> T {
    quiet_panics();
    catch_unwind(AssertUnwindSafe(call)).unwrap_or(otherwise)
}

#[no_mangle]
pub unsafe extern "C" fn wt_buf_free(buf: WtBuf) {
    drop_raw_parts(buf.ptr, buf.len);
}

#[no_mangle]
pub unsafe extern "C" fn wt_ids_free(ids: WtIds) {
    drop_raw_parts(ids.ptr, ids.len);
}

#[no_mangle]
pub unsafe extern "C" fn wt_tokenizer_from_json(
    tokenizer_json: WtStr,
    config_json: WtStr,
    out: *mut *const Tokenizer,
    error: *mut WtBuf,
) -> i32 {
    guarded(error, || {
        let config = optional("tokenizer_config.json", config_json)?;
        *out = Arc::into_raw(Arc::new(Tokenizer::from_json(bytes(tokenizer_json), config)?));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn wt_tokenizer_from_vocab(
    vocab: *const WtVocab,
    out: *mut *const Tokenizer,
    error: *mut WtBuf,
) -> i32 {
    guarded(error, || {
        let v = &*vocab;
        let texts = |name: &str, ptr, len| slice(ptr, len).iter().map(|s| text(name, *s)).collect::<Result<Vec<_>>>();
        let vocab = Vocab {
            model: text("tokenizer.ggml.model", v.model)?,
            pre: text("tokenizer.ggml.pre", v.pre)?,
            tokens: texts("tokenizer.ggml.tokens", v.tokens, v.num_tokens)?,
            types: (!v.types.is_null()).then(|| slice(v.types, v.num_tokens)),
            scores: (!v.scores.is_null()).then(|| slice(v.scores, v.num_tokens)),
            merges: texts("tokenizer.ggml.merges", v.merges, v.num_merges)?,
            bos: v.bos,
            eos: v.eos,
            unk: v.unk,
            add_bos: v.add_bos != 0,
            add_eos: v.add_eos != 0,
            add_space_prefix: v.add_space_prefix != 0,
        };
        *out = Arc::into_raw(Arc::new(vocab.build()?));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn wt_tokenizer_free(tokenizer: *const Tokenizer) {
    if !tokenizer.is_null() {
        quietly((), || drop(Arc::from_raw(tokenizer)));
    }
}

#[no_mangle]
pub unsafe extern "C" fn wt_encode(
    tokenizer: *const Tokenizer,
    input: WtStr,
    add_special_tokens: i32,
    out: *mut WtIds,
    error: *mut WtBuf,
) -> i32 {
    guarded(error, || {
        let ids = (*tokenizer).encode(text("the text", input)?, add_special_tokens != 0)?;
        let (ptr, len) = into_raw_parts(ids);
        *out = WtIds { ptr, len };
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn wt_decode(
    tokenizer: *const Tokenizer,
    ids: *const i32,
    num_ids: usize,
    skip_special_tokens: i32,
    out: *mut WtBuf,
    error: *mut WtBuf,
) -> i32 {
    guarded(error, || {
        set_text(out, (*tokenizer).decode(slice(ids, num_ids), skip_special_tokens != 0)?);
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn wt_vocab_size(tokenizer: *const Tokenizer) -> i32 {
    (*tokenizer).vocab_size()
}

#[no_mangle]
pub unsafe extern "C" fn wt_token_text(tokenizer: *const Tokenizer, id: i32, out: *mut WtBuf) -> i32 {
    match quietly(None, || (*tokenizer).token_text(id)) {
        Some(text) => {
            set_text(out, text);
            1
        }
        None => 0,
    }
}

#[no_mangle]
pub unsafe extern "C" fn wt_token_id(tokenizer: *const Tokenizer, token: WtStr) -> i32 {
    quietly(-1, || text("the token", token).ok().and_then(|t| (*tokenizer).token_id(t)).unwrap_or(-1))
}

#[no_mangle]
pub unsafe extern "C" fn wt_token_is_special(tokenizer: *const Tokenizer, id: i32) -> i32 {
    quietly(0, || (*tokenizer).is_special(id) as i32)
}

#[no_mangle]
pub unsafe extern "C" fn wt_stream_new(
    tokenizer: *const Tokenizer,
    skip_special_tokens: i32,
    out: *mut *mut StreamHandle,
    error: *mut WtBuf,
) -> i32 {
    guarded(error, || {
        Arc::increment_strong_count(tokenizer);
        let stream = Stream::new(Arc::from_raw(tokenizer), skip_special_tokens != 0);
        *out = Box::into_raw(Box::new(StreamHandle(Some(stream))));
        Ok(())
    })
}

unsafe fn with_stream(
    stream: *mut StreamHandle,
    out: *mut WtBuf,
    error: *mut WtBuf,
    call: impl FnOnce(&mut Stream) -> Result<String>,
) -> i32 {
    let status = guarded(error, || {
        let Some(inner) = (*stream).0.as_mut() else {
            return invalid("the stream failed before");
        };
        set_text(out, call(inner)?);
        Ok(())
    });
    if status == INTERNAL {
        (*stream).0 = None;
    }
    status
}

#[no_mangle]
pub unsafe extern "C" fn wt_stream_push(stream: *mut StreamHandle, id: i32, out: *mut WtBuf, error: *mut WtBuf) -> i32 {
    with_stream(stream, out, error, |stream| stream.push(id))
}

#[no_mangle]
pub unsafe extern "C" fn wt_stream_flush(stream: *mut StreamHandle, out: *mut WtBuf, error: *mut WtBuf) -> i32 {
    with_stream(stream, out, error, |stream| stream.flush())
}

#[no_mangle]
pub unsafe extern "C" fn wt_stream_free(stream: *mut StreamHandle) {
    if !stream.is_null() {
        quietly((), || drop(Box::from_raw(stream)));
    }
}

#[no_mangle]
pub unsafe extern "C" fn wt_template_compile(source: WtStr, out: *mut *mut Template, error: *mut WtBuf) -> i32 {
    guarded(error, || {
        *out = Box::into_raw(Box::new(Template::compile(text("the chat template", source)?)?));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn wt_template_render(
    template: *const Template,
    input: *const WtChat,
    out: *mut WtBuf,
    error: *mut WtBuf,
) -> i32 {
    guarded(error, || {
        let c = &*input;
        let chat = Chat {
            messages: text("messages", c.messages)?,
            tools: optional("tools", c.tools)?,
            documents: optional("documents", c.documents)?,
            kwargs: optional("chat_template_kwargs", c.kwargs)?,
            special_tokens: optional("special_tokens", c.special_tokens)?,
            add_generation_prompt: c.add_generation_prompt != 0,
            continue_final_message: c.continue_final_message != 0,
            adapt: c.adapt != 0,
        };
        set_text(out, chat::render(&*template, &chat)?);
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn wt_template_free(template: *mut Template) {
    if !template.is_null() {
        quietly((), || drop(Box::from_raw(template)));
    }
}
