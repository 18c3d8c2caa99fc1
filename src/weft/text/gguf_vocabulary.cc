#include "weft/core/gguf_metadata.h"
#include "weft/text/vocabulary.h"

namespace weft {
namespace {

constexpr int64_t kControl = 3;

}  // namespace

Vocabulary ReadGgufVocabulary(const std::string& path) {
  const GgufFile file = GgufFile::Open(path);
  const auto model = file.GetString("tokenizer.ggml.model");
  if (!model) {
    Throw("{}: has no vocabulary (key tokenizer.ggml.model); --skip-tokenizer-init serves the model by token ids",
          path);
  }
  const auto tokens = file.GetStringArray("tokenizer.ggml.tokens");
  if (!tokens) Throw("{}: key \"tokenizer.ggml.tokens\" is missing", path);
  const auto types = file.GetI64Array("tokenizer.ggml.token_type");
  const auto scores = file.GetF32Array("tokenizer.ggml.scores");
  const auto merges = file.GetStringArray("tokenizer.ggml.merges");
  const auto same_length = [&](const char* key, const auto& values) {
    if (values && values->size() != tokens->size()) {
      Throw("{}: key \"{}\" has {} elements for {} tokens", path, key, values->size(), tokens->size());
    }
  };
  same_length("tokenizer.ggml.token_type", types);
  same_length("tokenizer.ggml.scores", scores);
  const auto strings = [](const auto& texts) {
    std::vector<wt_str> out;
    if (texts) {
      out.reserve(texts->size());
      for (const std::string_view text : *texts) out.push_back(rust::Str(text));
    }
    return out;
  };
  const auto token = [&](const char* name) -> std::optional<int32_t> {
    const std::string key = fmt::format("tokenizer.ggml.{}_token_id", name);
    const auto id = file.GetI64(key);
    if (!id || *id == -1) return std::nullopt;
    if (*id < 0 || static_cast<uint64_t>(*id) >= tokens->size()) {
      // Written as 2^32 - 1 by some tools where there is none.
      if (*id == 0xffffffff) return std::nullopt;
      Throw("{}: key \"{}\": {} is no token id, there are {} tokens", path, key, *id, tokens->size());
    }
    return static_cast<int32_t>(*id);
  };

  const bool sentence_piece = *model == "llama";
  const auto bos = token("bos"), eos = token("eos");
  const auto unknown = token("unknown");
  const std::vector<wt_str> token_views = strings(tokens), merge_views = strings(merges);
  wt_vocab vocab = {};
  vocab.model = rust::Str(*model);
  vocab.pre = rust::Str(file.GetString("tokenizer.ggml.pre").value_or("default"));
  vocab.tokens = token_views.data();
  vocab.types = types ? types->data() : nullptr;
  vocab.scores = scores ? scores->data() : nullptr;
  vocab.num_tokens = token_views.size();
  vocab.merges = merge_views.data();
  vocab.num_merges = merge_views.size();
  vocab.bos = bos.value_or(-1);
  vocab.eos = eos.value_or(-1);
  vocab.unk = unknown.value_or(-1);
  vocab.add_bos = file.GetBool("tokenizer.ggml.add_bos_token").value_or(sentence_piece);
  vocab.add_eos = file.GetBool("tokenizer.ggml.add_eos_token").value_or(false);
  vocab.add_space_prefix = file.GetBool("tokenizer.ggml.add_space_prefix").value_or(true);

  Vocabulary out;
  wt_tokenizer* tokenizer = nullptr;
  rust::Buf error;
  const wt_status status = wt_tokenizer_from_vocab(&vocab, &tokenizer, error.out());
  if (status != WT_OK) throw rust::MakeError(status, error, path);
  out.tokenizer.reset(tokenizer);

  const auto name_of = [&](const char* key, std::optional<int32_t> id) {
    if (id) out.special_tokens[key] = std::string((*tokens)[static_cast<size_t>(*id)]);
  };
  name_of("bos_token", bos);
  name_of("eos_token", eos);
  name_of("unk_token", unknown);
  name_of("pad_token", token("padding"));
  name_of("sep_token", token("seperator"));  // so spelled in the format
  out.bos = bos;
  AddEos(out, eos);
  AddEos(out, token("eot"));
  AddEos(out, token("eom"));
  // Many files name the end of a text only, and not that of a turn.
  for (const char* text : {"<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>"}) {
    const auto id = FindToken(tokenizer, text);
    if (id && types && (*types)[static_cast<size_t>(*id)] == kControl) AddEos(out, id);
  }

  if (const auto text = file.GetString("tokenizer.chat_template")) out.chat_templates["default"] = std::string(*text);
  if (const auto names = file.GetStringArray("tokenizer.chat_templates")) {
    for (const std::string_view name : *names) {
      const auto text = file.GetString(fmt::format("tokenizer.chat_template.{}", name));
      if (text) out.chat_templates[std::string(name)] = std::string(*text);
    }
  }
  return out;
}

}  // namespace weft
