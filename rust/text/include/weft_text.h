// C ABI of the Rust library in rust/text: tokenizers and chat templates.
//
// Ownership: objects and buffers come from this library and go back to it by the matching *_free; a buffer that a call
// did not set is {NULL, 0}, which may be freed too. Calls return a wt_status; anything but WT_OK sets `error` (never
// NULL) to a message in UTF-8, owned by the caller, and leaves the other outputs unset. No panic crosses this boundary.
// Tokenizers and templates are immutable and may be used from many threads at once; a stream belongs to one at a time.
#ifndef WEFT_TEXT_H_
#define WEFT_TEXT_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  WT_OK = 0,
  WT_INVALID = 1,   // the input is at fault
  WT_INTERNAL = 2,  // this library is at fault
} wt_status;

// Borrowed text, UTF-8. ptr may be NULL: "not given" where the comment of a field allows it, empty elsewhere.
typedef struct {
  const char* ptr;
  size_t len;
} wt_str;

typedef struct {
  char* ptr;
  size_t len;
} wt_buf;

typedef struct {
  int32_t* ptr;
  size_t len;
} wt_ids;

void wt_buf_free(wt_buf buf);
void wt_ids_free(wt_ids ids);

typedef struct wt_tokenizer wt_tokenizer;
typedef struct wt_stream wt_stream;
typedef struct wt_template wt_template;

// tokenizer.json, and tokenizer_config.json or not given (its added_tokens_decoder may add to the former).
wt_status wt_tokenizer_from_json(wt_str tokenizer_json, wt_str config_json, wt_tokenizer** out, wt_buf* error);

// A vocabulary as GGUF files hold it (keys tokenizer.ggml.*).
typedef struct {
  wt_str model;          // "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE from scores)
  wt_str pre;            // which pre-tokenizer, for gpt2
  const wt_str* tokens;  // [num_tokens]
  const int64_t* types;  // [num_tokens] or NULL: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte
  const float* scores;   // [num_tokens], or NULL for gpt2
  size_t num_tokens;
  const wt_str* merges;  // [num_merges]: "left right"
  size_t num_merges;
  int64_t bos, eos, unk;  // ids, -1: none
  int32_t add_bos, add_eos, add_space_prefix;
} wt_vocab;
wt_status wt_tokenizer_from_vocab(const wt_vocab* vocab, wt_tokenizer** out, wt_buf* error);
void wt_tokenizer_free(wt_tokenizer* tokenizer);

wt_status wt_encode(const wt_tokenizer* tokenizer, wt_str text, int32_t add_special_tokens, wt_ids* out, wt_buf* error);
// Ids that are not in the vocabulary give no text.
wt_status wt_decode(const wt_tokenizer* tokenizer, const int32_t* ids, size_t num_ids, int32_t skip_special_tokens,
                    wt_buf* out, wt_buf* error);
// The largest id + 1.
int32_t wt_vocab_size(const wt_tokenizer* tokenizer);
// 1 when the id is in the vocabulary: *out is the token as it stands there. 0 when not.
int32_t wt_token_text(const wt_tokenizer* tokenizer, int32_t id, wt_buf* out);
// -1: no such token.
int32_t wt_token_id(const wt_tokenizer* tokenizer, wt_str token);
int32_t wt_token_is_special(const wt_tokenizer* tokenizer, int32_t id);

// Incremental decoding. Keeps the tokenizer alive by itself.
wt_status wt_stream_new(const wt_tokenizer* tokenizer, int32_t skip_special_tokens, wt_stream** out, wt_buf* error);
// The text that this token completes: whole characters. What may still become one is held back, 16 tokens at most.
wt_status wt_stream_push(wt_stream* stream, int32_t id, wt_buf* out, wt_buf* error);
// What is held back; the stream begins anew then.
wt_status wt_stream_flush(wt_stream* stream, wt_buf* out, wt_buf* error);
void wt_stream_free(wt_stream* stream);

wt_status wt_template_compile(wt_str source, wt_template** out, wt_buf* error);
typedef struct {
  wt_str messages;        // JSON array of objects
  wt_str tools;           // JSON array or not given
  wt_str documents;       // JSON array or not given
  wt_str kwargs;          // JSON object of further variables, or not given
  wt_str special_tokens;  // JSON object of variables below kwargs, or not given
  int32_t add_generation_prompt;
  int32_t continue_final_message;
  int32_t adapt;  // see rust/text/src/chat.rs
} wt_chat;
wt_status wt_template_render(const wt_template* tmpl, const wt_chat* chat, wt_buf* out, wt_buf* error);
void wt_template_free(wt_template* tmpl);

#ifdef __cplusplus
}
#endif

#endif  // WEFT_TEXT_H_
