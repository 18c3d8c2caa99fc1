// text_completion objects.
#include <unordered_set>

#include "weft/server/response_writer.h"

namespace weft {
namespace {

class CompletionWriter : public ResponseWriter {
 public:
  CompletionWriter(const Call& call, const Tokenizer* tokenizer)
      : call_(call),
        text_(tokenizer, call.request.return_tokens_as_token_ids),
        usage_(call),
        started_(call.choices(), false),
        text_offset_(call.choices(), 0) {}

  std::string Whole(const std::vector<RequestOutput>& outputs) override {
    Json choices = Json::array();
    for (size_t i = 0; i < outputs.size(); ++i) {
      const int index = static_cast<int>(i);
      const RequestOutput& output = outputs[i];
      usage_.Update(index, output);
      Json choice = Choice(index, output);
      choice["prompt_logprobs"] = PromptLogprobsJson(output, text_);
      choices.push_back(std::move(choice));
    }
    Json body = Envelope(std::move(choices));
    body["service_tier"] = nullptr;
    body["system_fingerprint"] = nullptr;
    body["usage"] = usage_.Total();
    return DumpJson(body);
  }

  void Stream(int index, const RequestOutput& output, std::string& events) override {
    usage_.Update(index, output);
    // An output that says nothing yet (a prompt in the middle of its prefill) makes no chunk.
    if (output.token_ids.empty() && output.text.empty() && !output.finish_reason && !output.prompt_logprobs) return;
    Json choices = Json::array();
    choices.push_back(Choice(index, output));
    Json body = Envelope(std::move(choices));
    body["usage"] = call_.request.continuous_usage_stats ? usage_.OfChoice(index) : Json(nullptr);
    AppendEvent(body, events);
  }

  void EndStream(std::string& events) override {
    if (call_.request.include_usage) {
      Json body = Envelope(Json::array());
      body["usage"] = usage_.Total();
      AppendEvent(body, events);
    }
    events += "data: [DONE]\n\n";
  }

 private:
  Json Envelope(Json choices) const {
    Json body;
    body["id"] = call_.id;
    body["object"] = "text_completion";
    body["created"] = call_.created;
    body["model"] = call_.model;
    body["choices"] = std::move(choices);
    return body;
  }

  // The choice with what is new in `output`, and the prompt before it the first time, when it is to be echoed.
  Json Choice(int index, const RequestOutput& output) {
    const GenerationRequest& request = call_.request;
    const int prompt = index / request.n;
    const bool first = !started_[index];
    started_[index] = true;
    const bool echo = request.echo && first;

    Json choice;
    choice["index"] = index;
    std::string text = echo ? call_.echo_texts[prompt] : std::string();
    if (!call_.prompt_only) text += output.text;
    choice["text"] = std::move(text);
    choice["logprobs"] = request.params.logprobs ? Logprobs(index, output, echo) : Json(nullptr);
    choice["finish_reason"] = FinishReasonJson(output);
    choice["stop_reason"] = StopReasonJson(output);
    choice["token_ids"] = request.return_token_ids ? Json(TokensOf(output)) : Json(nullptr);
    choice["prompt_token_ids"] = request.return_token_ids && first ? Json(call_.prompts[prompt]) : Json(nullptr);
    return choice;
  }

  std::vector<int32_t> TokensOf(const RequestOutput& output) const {
    return call_.prompt_only ? std::vector<int32_t>() : output.token_ids;
  }

  Json Logprobs(int index, const RequestOutput& output, bool with_prompt) {
    Json tokens = Json::array(), token_logprobs = Json::array(), top_logprobs = Json::array(), offsets = Json::array();
    const auto add = [&](int32_t token, const PositionLogprobs* position) {
      const std::string text = text_.Of(token);
      offsets.push_back(text_offset_[index]);
      text_offset_[index] += CountCharacters(text);
      if (position == nullptr) {
        token_logprobs.push_back(nullptr);
        top_logprobs.push_back(nullptr);
      } else {
        token_logprobs.push_back(JsonLogprob(position->chosen.logprob));
        // The token itself, then the best ones: one more than asked for when it is none of them. Of two tokens with
        // the same text the likelier one stays.
        Json top = Json::object();
        std::unordered_set<std::string> seen;
        const auto add_top = [&](std::string key, float logprob) {
          if (seen.insert(key).second) AppendMember(top, std::move(key), JsonLogprob(logprob));
        };
        add_top(text, position->chosen.logprob);
        for (const TokenLogprob& other : position->top) add_top(text_.Of(other.token), other.logprob);
        top_logprobs.push_back(std::move(top));
      }
      tokens.push_back(text);
    };
    if (with_prompt) {
      const std::vector<int32_t>& prompt = call_.prompts[index / call_.request.n];
      for (size_t i = 0; i < prompt.size(); ++i) {
        const bool known = output.prompt_logprobs && i < output.prompt_logprobs->size() && (*output.prompt_logprobs)[i];
        add(prompt[i], known ? &*(*output.prompt_logprobs)[i] : nullptr);
      }
    }
    if (!call_.prompt_only) {
      for (size_t i = 0; i < output.token_ids.size(); ++i) {
        add(output.token_ids[i], i < output.logprobs.size() ? &output.logprobs[i] : nullptr);
      }
    }
    Json logprobs;
    logprobs["text_offset"] = std::move(offsets);
    logprobs["token_logprobs"] = std::move(token_logprobs);
    logprobs["tokens"] = std::move(tokens);
    logprobs["top_logprobs"] = std::move(top_logprobs);
    return logprobs;
  }

  const Call& call_;
  TokenText text_;
  UsageCounter usage_;
  std::vector<bool> started_;
  std::vector<int64_t> text_offset_;  // per choice: characters of the tokens so far
};

}  // namespace

std::unique_ptr<ResponseWriter> MakeCompletionWriter(const Call& call, const Tokenizer* tokenizer) {
  return std::make_unique<CompletionWriter>(call, tokenizer);
}

}  // namespace weft
