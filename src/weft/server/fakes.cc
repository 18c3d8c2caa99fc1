#include "weft/server/fakes.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "weft/api/json_fields.h"
#include "weft/core/utf8.h"

namespace weft {
namespace {

// The length of the longest proper beginning of `stop` that `text` ends with.
size_t HeldBack(const std::string& text, const std::string& stop) {
  for (size_t n = std::min(text.size(), stop.size() - 1); n > 0; --n) {
    if (text.compare(text.size() - n, n, stop, 0, n) == 0) return n;
  }
  return 0;
}

// The bytes at the end of `text` that begin a UTF-8 character which is not complete.
size_t IncompleteTail(const std::string& text) {
  for (size_t back = 1; back <= std::min<size_t>(3, text.size()); ++back) {
    const unsigned char c = text[text.size() - back];
    if ((c & 0xc0) == 0x80) continue;
    const size_t length = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : c >= 0xc0 ? 2 : 1;
    return length > back ? back : 0;
  }
  return 0;
}

PositionLogprobs MadeUp(int32_t token, int32_t top) {
  const int32_t vocab = ByteTokenizer::kVocabSize;
  PositionLogprobs position;
  position.chosen = {token, -0.25f, 1};
  const int32_t count = top < 0 ? vocab : std::min(top, vocab);
  for (int32_t i = 0; i < count; ++i) {
    position.top.push_back({(token + i) % vocab, -0.25f - static_cast<float>(i), i + 1});
  }
  return position;
}

class ByteStream : public TokenStream {
 public:
  explicit ByteStream(bool skip) : skip_(skip) {}
  std::string Push(int32_t token) override {
    if (token >= 256) return skip_ ? "" : (token == ByteTokenizer::kBos ? "<bos>" : "<eos>");
    held_ += static_cast<char>(token);
    const size_t tail = IncompleteTail(held_);
    std::string out = held_.substr(0, held_.size() - tail);
    held_.erase(0, out.size());
    return IsValidUtf8(out) ? out : "\xef\xbf\xbd";
  }
  std::string Flush() override { return held_.empty() ? "" : (held_.clear(), "\xef\xbf\xbd"); }

 private:
  const bool skip_;
  std::string held_;
};

}  // namespace

std::vector<int32_t> ByteTokenizer::Encode(std::string_view text, bool add_special_tokens) const {
  if (on_encode) on_encode(text);
  std::vector<int32_t> tokens;
  if (add_special_tokens) tokens.push_back(kBos);
  for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
  return tokens;
}

std::string ByteTokenizer::Decode(std::span<const int32_t> tokens, bool skip_special_tokens) const {
  ByteStream stream(skip_special_tokens);
  std::string text;
  for (const int32_t token : tokens) text += stream.Push(token);
  // Half characters come out as U+FFFD, as everywhere in this interface.
  return text + stream.Flush();
}

std::unique_ptr<TokenStream> ByteTokenizer::MakeStream(bool skip_special_tokens) const {
  return std::make_unique<ByteStream>(skip_special_tokens);
}

Result<std::string> ByteTokenizer::ApplyChatTemplate(const ChatTemplateInput& input) const {
  const Json messages = Json::parse(input.messages_json);
  std::string text;
  if (input.template_override) text += "[" + *input.template_override + "]";
  if (input.tools_json) text += "[tools " + *input.tools_json + "]";
  if (input.kwargs_json) text += "[kwargs " + *input.kwargs_json + "]";
  if (input.documents_json) text += "[documents " + *input.documents_json + "]";
  for (size_t i = 0; i < messages.size(); ++i) {
    const std::string role = messages[i]["role"];
    if (role == "forbidden") return Fail("the template does not know the role \"forbidden\"");
    text += "<" + role + ">" + messages[i]["content"].get<std::string>();
    if (messages[i].contains("tool_calls")) text += messages[i]["tool_calls"].dump();
    if (i + 1 < messages.size() || !input.continue_final_message) text += "</" + role + ">";
  }
  if (input.add_generation_prompt) text += "<assistant>";
  return text;
}

std::string ByteTokenizer::TokenString(int32_t token) const {
  if (token < 0 || token >= kVocabSize) return {};
  if (token == kBos) return "<bos>";
  if (token == kEos) return "<eos>";
  return token < 128 ? std::string(1, static_cast<char>(token)) : fmt::format("<0x{:02X}>", token);
}

std::optional<int32_t> ByteTokenizer::TokenId(std::string_view token) const {
  for (int32_t id = 0; id < kVocabSize; ++id) {
    if (TokenString(id) == token) return id;
  }
  return std::nullopt;
}

FakeEngine::FakeEngine(std::shared_ptr<const Tokenizer> tokenizer, int64_t max_model_len)
    : tokenizer_(std::move(tokenizer)), max_model_len_(max_model_len) {
  for (Histogram* histogram : {&stats_.time_to_first_token_seconds, &stats_.inter_token_latency_seconds,
                               &stats_.e2e_request_latency_seconds, &stats_.request_queue_time_seconds,
                               &stats_.request_prefill_time_seconds, &stats_.request_decode_time_seconds}) {
    histogram->bounds = {0.1, 1, 10};
    histogram->counts = {1, 2, 0, 3};
    histogram->sum = 42.5;
  }
  stats_.kv_tokens_per_shard = {7, 8};
  stats_.expert_tokens = {0, 1234, 5};
  stats_.context.steps = 77;
  stats_.context.gather_kv_tokens = 4321;
}

FakeEngine::~FakeEngine() {
  Shutdown(0);
  for (std::thread& thread : threads_) thread.join();
}

Result<void> FakeEngine::Add(EngineRequest request, OutputSink sink) {
  if (on_add) {
    if (Result<void> result = on_add(request); !result) return result;
  }
  const std::lock_guard lock(mutex_);
  if (!failure_.empty()) return tl::make_unexpected(Error("The engine is dead: " + failure_, ErrorKind::kUnavailable));
  if (stopping_) return tl::make_unexpected(Error("The engine is stopping.", ErrorKind::kUnavailable));
  if (live_.contains(request.id)) return tl::make_unexpected(Error("id in use", ErrorKind::kInternal));
  auto live = std::make_shared<Live>();
  live_[request.id] = live;
  requests_.push_back(request);
  stats_.prompt_tokens += request.prompt_token_ids.size();
  Script what = script ? script(request) : Script{.text = "Hello, world!"};
  threads_.emplace_back([this, request = std::move(request), sink = std::move(sink), what = std::move(what),
                         live]() mutable { Work(std::move(request), std::move(sink), std::move(what), live); });
  return {};
}

void FakeEngine::Work(EngineRequest request, OutputSink sink, Script what, std::shared_ptr<Live> live) {
  const SamplingParams& params = request.params;
  const std::unique_ptr<TokenStream> stream =
      tokenizer_ && params.detokenize ? tokenizer_->MakeStream(params.skip_special_tokens) : nullptr;
  std::string held;  // text that could become a stop string
  RequestOutput totals;
  totals.id = request.id;
  totals.prompt_tokens = static_cast<int32_t>(request.prompt_token_ids.size());
  totals.cached_tokens = what.cached_tokens;
  for (bool first = true;; first = false) {
    {
      std::unique_lock lock(mutex_);
      const auto until = std::chrono::steady_clock::now() +
                         std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                             std::chrono::duration<double>(what.hang ? 1e6 : what.seconds_per_token));
      if (what.hang || what.seconds_per_token > 0) changed_.wait_until(lock, until, [&] { return live->abort; });
      if (live->abort) totals.finish_reason = FinishReason::kAbort;
    }
    RequestOutput output = totals;
    if (first && params.prompt_logprobs) {
      output.prompt_logprobs.emplace();
      for (size_t i = 0; i < request.prompt_token_ids.size(); ++i) {
        if (i == 0) {
          output.prompt_logprobs->emplace_back(std::nullopt);
        } else {
          output.prompt_logprobs->emplace_back(MadeUp(request.prompt_token_ids[i], *params.prompt_logprobs));
        }
      }
    }
    if (!output.finish_reason && totals.completion_tokens == what.fail_after) {
      output.finish_reason = FinishReason::kError;
      output.error = "the fake engine was told to fail";
    }
    if (!output.finish_reason) {
      const size_t at = static_cast<size_t>(totals.completion_tokens);
      const bool over = what.text.empty() || (!what.repeat && at >= what.text.size());
      const int32_t token = over ? ByteTokenizer::kEos
                                 : static_cast<int32_t>(static_cast<unsigned char>(what.text[at % what.text.size()]));
      output.completion_tokens = ++totals.completion_tokens;
      output.token_ids = {token};
      if (params.logprobs) output.logprobs = {MadeUp(token, *params.logprobs)};
      const bool eos = token == ByteTokenizer::kEos && !params.ignore_eos;
      if (stream) held += stream->Push(token);
      if (eos) output.finish_reason = FinishReason::kStop;
      if (std::find(params.stop_token_ids.begin(), params.stop_token_ids.end(), token) != params.stop_token_ids.end()) {
        output.finish_reason = FinishReason::kStop;
        output.stop_reason = token;
      }
      size_t keep = 0;
      for (const std::string& stop : params.stop) {
        if (const size_t found = held.find(stop); found != std::string::npos) {
          held.resize(found + (params.include_stop_str_in_output ? stop.size() : 0));
          output.finish_reason = FinishReason::kStop;
          output.stop_reason = stop;
          break;
        }
        keep = std::max(keep, HeldBack(held, stop));
      }
      if (!output.finish_reason && totals.completion_tokens >= params.max_tokens) {
        output.finish_reason = FinishReason::kLength;
      }
      if (output.finish_reason) {
        if (stream) held += stream->Flush();
        keep = 0;
      }
      output.text = held.substr(0, held.size() - keep);
      held.erase(0, output.text.size());
    }
    const bool last = output.finish_reason.has_value();
    if (last) {
      const std::lock_guard lock(mutex_);
      if (output.finish_reason == FinishReason::kAbort) aborted_.push_back(request.id);
      ++stats_.request_success[NameOf(*output.finish_reason)];
      stats_.generation_tokens += totals.completion_tokens;
      live_.erase(request.id);
      changed_.notify_all();
    }
    sink(std::move(output));
    if (last) return;
  }
}

void FakeEngine::Abort(const std::string& id) {
  const std::lock_guard lock(mutex_);
  if (const auto it = live_.find(id); it != live_.end()) it->second->abort = true;
  changed_.notify_all();
}

EngineStats FakeEngine::Stats() const {
  const std::lock_guard lock(mutex_);
  EngineStats stats = stats_;
  stats.num_requests_running = static_cast<int64_t>(live_.size());
  return stats;
}

std::string FakeEngine::Failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

void FakeEngine::SetFailure(std::string failure) {
  const std::lock_guard lock(mutex_);
  failure_ = std::move(failure);
}

void FakeEngine::Shutdown(double timeout_s) {
  std::unique_lock lock(mutex_);
  stopping_ = true;
  changed_.wait_for(lock, std::chrono::duration<double>(timeout_s), [this] { return live_.empty(); });
  for (const auto& [id, live] : live_) live->abort = true;
  changed_.notify_all();
}

std::vector<EngineRequest> FakeEngine::requests() const {
  const std::lock_guard lock(mutex_);
  return requests_;
}

std::vector<std::string> FakeEngine::aborted() const {
  const std::lock_guard lock(mutex_);
  return aborted_;
}

int FakeEngine::running() const {
  const std::lock_guard lock(mutex_);
  return static_cast<int>(live_.size());
}

bool FakeEngine::WaitAborted(size_t count, double seconds) const {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return aborted_.size() >= count; });
}

}  // namespace weft
