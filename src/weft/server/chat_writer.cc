// chat.completion and chat.completion.chunk objects.
#include "weft/server/response_writer.h"

namespace weft {
namespace {

Json BytesOf(const std::string& text) {
  Json bytes = Json::array();
  for (const char c : text) bytes.push_back(static_cast<int>(static_cast<unsigned char>(c)));
  return bytes;
}

class ChatWriter : public ResponseWriter {
 public:
  ChatWriter(const Call& call, const Tokenizer* tokenizer)
      : call_(call),
        text_(tokenizer, call.request.return_tokens_as_token_ids),
        usage_(call),
        finished_(call.choices(), false) {}

  std::string Whole(const std::vector<RequestOutput>& outputs) override {
    Json choices = Json::array();
    for (size_t i = 0; i < outputs.size(); ++i) {
      const RequestOutput& output = outputs[i];
      usage_.Update(static_cast<int>(i), output);
      Json message;
      message["role"] = call_.role;
      message["content"] = EchoText() + output.text;
      message["refusal"] = nullptr;
      Json choice;
      choice["index"] = i;
      choice["message"] = std::move(message);
      AddResult(choice, output);
      choices.push_back(std::move(choice));
    }
    Json body = Envelope("chat.completion", std::move(choices));
    body["service_tier"] = nullptr;
    body["system_fingerprint"] = nullptr;
    body["usage"] = usage_.Total();
    body["prompt_logprobs"] = outputs.empty() ? Json(nullptr) : PromptLogprobsJson(outputs.front(), text_);
    body["prompt_token_ids"] = call_.request.return_token_ids ? Json(call_.prompts.front()) : Json(nullptr);
    return DumpJson(body);
  }

  void Stream(int index, const RequestOutput& output, std::string& events) override {
    usage_.Update(index, output);
    if (!opened_) {
      opened_ = true;
      Open(events);
    }
    if (finished_[index]) return;
    if (output.token_ids.empty() && output.text.empty() && !output.finish_reason) return;
    finished_[index] = output.finish_reason.has_value();
    Json choice;
    choice["index"] = index;
    Json delta = Json::object();
    delta["content"] = output.text;
    choice["delta"] = std::move(delta);
    AddResult(choice, output);
    Chunk(index, std::move(choice), /*with_prompt_ids=*/false, events);
  }

  void EndStream(std::string& events) override {
    if (call_.request.include_usage) {
      Json body = Envelope("chat.completion.chunk", Json::array());
      body["usage"] = usage_.Total();
      AppendEvent(body, events);
    }
    events += "data: [DONE]\n\n";
  }

 private:
  Json Envelope(const char* object, Json choices) const {
    Json body;
    body["id"] = call_.id;
    body["object"] = object;
    body["created"] = call_.created;
    body["model"] = call_.model;
    body["choices"] = std::move(choices);
    return body;
  }

  std::string EchoText() const { return call_.request.echo ? call_.echo_texts.front() : std::string(); }

  // First a chunk with the role for every choice, then the echoed text.
  void Open(std::string& events) {
    for (int i = 0; i < call_.choices(); ++i) {
      Json choice;
      choice["index"] = i;
      choice["delta"]["role"] = call_.role;
      choice["delta"]["content"] = "";
      choice["logprobs"] = nullptr;
      choice["finish_reason"] = nullptr;
      Chunk(i, std::move(choice), /*with_prompt_ids=*/true, events);
    }
    if (EchoText().empty()) return;
    for (int i = 0; i < call_.choices(); ++i) {
      Json choice;
      choice["index"] = i;
      choice["delta"]["content"] = EchoText();
      choice["logprobs"] = nullptr;
      choice["finish_reason"] = nullptr;
      Chunk(i, std::move(choice), /*with_prompt_ids=*/false, events);
    }
  }

  void Chunk(int index, Json choice, bool with_prompt_ids, std::string& events) const {
    Json choices = Json::array();
    choices.push_back(std::move(choice));
    Json body = Envelope("chat.completion.chunk", std::move(choices));
    if (with_prompt_ids && call_.request.return_token_ids) body["prompt_token_ids"] = call_.prompts.front();
    if (call_.request.continuous_usage_stats) body["usage"] = usage_.OfChoice(index);
    AppendEvent(body, events);
  }

  void AddResult(Json& choice, const RequestOutput& output) const {
    choice["logprobs"] = call_.request.params.logprobs ? Logprobs(output) : Json(nullptr);
    choice["finish_reason"] = FinishReasonJson(output);
    choice["stop_reason"] = StopReasonJson(output);
    choice["token_ids"] = call_.request.return_token_ids ? Json(output.token_ids) : Json(nullptr);
  }

  Json Token(const TokenLogprob& token) const {
    const std::string text = text_.Of(token.token);
    Json json;
    json["token"] = text;
    json["logprob"] = JsonLogprob(token.logprob);
    json["bytes"] = BytesOf(text);
    return json;
  }

  Json Logprobs(const RequestOutput& output) const {
    Json content = Json::array();
    const int32_t wanted = *call_.request.params.logprobs;
    for (const PositionLogprobs& position : output.logprobs) {
      Json entry = Token(position.chosen);
      Json top = Json::array();
      for (const TokenLogprob& other : position.top) {
        if (wanted >= 0 && static_cast<int32_t>(top.size()) >= wanted) break;
        top.push_back(Token(other));
      }
      entry["top_logprobs"] = std::move(top);
      content.push_back(std::move(entry));
    }
    Json logprobs;
    logprobs["content"] = std::move(content);
    return logprobs;
  }

  const Call& call_;
  TokenText text_;
  UsageCounter usage_;
  std::vector<bool> finished_;
  bool opened_ = false;
};

}  // namespace

std::unique_ptr<ResponseWriter> MakeChatWriter(const Call& call, const Tokenizer* tokenizer) {
  return std::make_unique<ChatWriter>(call, tokenizer);
}

}  // namespace weft
