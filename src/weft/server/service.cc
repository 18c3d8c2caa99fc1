#include "weft/server/service.h"

#include <algorithm>
#include <ctime>
#include <random>

#include "weft/core/log.h"
#include "weft/server/metrics.h"

namespace weft {
namespace {

RequestLimits LimitsOf(const ServerOptions& options, const Engine& engine) {
  RequestLimits limits;
  limits.max_model_len = engine.max_model_len();
  limits.vocab_size = engine.vocab_size();
  limits.max_logprobs = options.max_logprobs;
  limits.max_n = options.max_n;
  limits.defaults = options.default_sampling;
  return limits;
}

tl::unexpected<Error> Refuse(std::string message, std::string param, ErrorKind kind = ErrorKind::kInvalidArgument) {
  return tl::make_unexpected(Error(std::move(message), kind, std::move(param)));
}

std::string RandomHex() {
  thread_local std::mt19937_64 random{(static_cast<uint64_t>(std::random_device{}()) << 32) ^ std::random_device{}()};
  return fmt::format("{:016x}{:016x}", random(), random());
}

}  // namespace

Generation::~Generation() {
  mailbox->Close();
  Abort();
}

void Generation::Abort() {
  for (size_t i = 0; i < engine_ids.size(); ++i) {
    if (!mailbox->Ended(static_cast<int>(i))) engine_.Abort(engine_ids[i]);
  }
}

Service::Service(const ServerOptions& options, Engine& engine, std::shared_ptr<const Tokenizer> tokenizer)
    : options_(options),
      engine_(engine),
      tokenizer_(std::move(tokenizer)),
      limits_(LimitsOf(options, engine)),
      started_(std::time(nullptr)) {}

void Service::WarnUnknown(const std::vector<std::string>& fields) {
  constexpr size_t kMaxWarned = 256;  // names come from clients: remember a bounded number
  for (const std::string& field : fields) {
    const std::lock_guard lock(warned_mutex_);
    if (warned_.size() >= kMaxWarned || field.size() > 128 || !warned_.insert(field).second) continue;
    spdlog::warn("Requests have a field that is not known and is ignored: {} (said once)", Json(field).dump());
  }
}

std::string Service::NewId(const char* prefix, const std::string& body_id, std::string_view header_id) const {
  if (!header_id.empty() && header_id.size() <= 256) return fmt::format("{}-{}", prefix, header_id);
  if (!body_id.empty()) return fmt::format("{}-{}", prefix, body_id);
  return fmt::format("{}-{}", prefix, RandomHex());
}

Result<std::string> Service::CheckModel(const std::string& model) const {
  const std::vector<std::string>& names = options_.served_model_names;
  if (model.empty()) return names.front();
  if (std::find(names.begin(), names.end(), model) != names.end()) return model;
  return Refuse(fmt::format("The model `{}` does not exist.", model), "model", ErrorKind::kNotFound);
}

Result<void> Service::NeedTokenizer(const char* param) const {
  if (tokenizer_) return {};
  return Refuse(
      fmt::format("`{}` is text, but this server runs without a tokenizer (--skip-tokenizer-init): give prompts "
                  "as token ids to /v1/completions.",
                  param),
      param);
}

std::vector<std::vector<int32_t>> Service::EncodeBadWords(const std::vector<std::string>& words) const {
  // A word is written differently at the beginning of a line and after a blank. As vLLM does: both forms, the second
  // one only where it is the same number of tokens with a different beginning.
  std::vector<std::vector<int32_t>> encoded;
  for (const std::string& word : words) {
    const std::string stripped = word.substr(std::min(word.find_first_not_of(' '), word.size()));
    std::vector<int32_t> plain = tokenizer_->Encode(stripped, /*add_special_tokens=*/false);
    std::vector<int32_t> after_blank = tokenizer_->Encode(" " + stripped, /*add_special_tokens=*/false);
    const bool both = !plain.empty() && after_blank.size() == plain.size() && after_blank.front() != plain.front();
    if (!plain.empty()) encoded.push_back(std::move(plain));
    if (both) encoded.push_back(std::move(after_blank));
  }
  return encoded;
}

std::vector<int32_t> Service::Truncate(const GenerationRequest& request, std::vector<int32_t> tokens) const {
  if (!request.truncate_prompt_tokens) return tokens;
  int64_t keep = *request.truncate_prompt_tokens;
  if (keep < 0) keep = std::max<int64_t>(1, limits_.max_model_len - request.max_tokens.value_or(1));
  const int64_t size = static_cast<int64_t>(tokens.size());
  if (size <= keep) return tokens;
  if (request.truncation_side == TruncationSide::kLeft) {
    tokens.erase(tokens.begin(), tokens.begin() + (size - keep));
  } else {
    tokens.resize(keep);
  }
  return tokens;
}

Result<std::shared_ptr<Generation>> Service::StartCompletion(std::string_view body, std::string_view header_request_id,
                                                             const std::function<void()>& notify) {
  Result<CompletionRequest> request = ParseCompletionRequest(body, limits_);
  if (!request) return tl::make_unexpected(request.error());
  WarnUnknown(request->unknown_fields);
  const Result<std::string> model = CheckModel(request->model);
  if (!model) return tl::make_unexpected(model.error());

  Call call;
  call.id = NewId("cmpl", request->request_id, header_request_id);
  call.model = *model;
  call.prompt_only = request->prompt_only;
  for (Prompt& prompt : request->prompts) {
    const bool is_text = std::holds_alternative<std::string>(prompt);
    std::vector<int32_t> tokens;
    if (is_text) {
      if (const Result<void> can = NeedTokenizer("prompt"); !can) return tl::make_unexpected(can.error());
      tokens = tokenizer_->Encode(std::get<std::string>(prompt), request->add_special_tokens);
      if (tokens.empty()) return Refuse("`prompt` has no tokens", "prompt");
    } else {
      tokens = std::move(std::get<std::vector<int32_t>>(prompt));
    }
    tokens = Truncate(*request, std::move(tokens));
    if (request->echo) {
      // With token ids in the answer the text would be there twice (vLLM leaves it out then).
      std::string text;
      if (!request->return_token_ids) {
        if (is_text && !request->truncate_prompt_tokens) {
          text = std::move(std::get<std::string>(prompt));
        } else if (tokenizer_) {
          text = tokenizer_->Decode(tokens, request->params.skip_special_tokens);
        }
      }
      call.echo_texts.push_back(std::move(text));
    }
    call.prompts.push_back(std::move(tokens));
  }
  call.request = std::move(*request);
  return Start(std::move(call), notify);
}

Result<std::vector<int32_t>> Service::RenderChat(const ChatPrompt& chat, bool add_special_tokens) const {
  if (const Result<void> can = NeedTokenizer("messages"); !can) return tl::make_unexpected(can.error());
  ChatTemplateInput input;
  input.messages_json = chat.messages_json;
  input.tools_json = chat.tools_json;
  input.kwargs_json = chat.kwargs_json;
  input.documents_json = chat.documents_json;
  input.add_generation_prompt = chat.add_generation_prompt;
  input.continue_final_message = chat.continue_final_message;
  input.template_override = chat.chat_template ? chat.chat_template : options_.chat_template;
  if (!input.template_override && !tokenizer_->has_chat_template()) {
    return Refuse(
        "This model has no chat template: give one in `chat_template` or start the server with --chat-template.",
        "chat_template");
  }
  const Result<std::string> text = tokenizer_->ApplyChatTemplate(input);
  if (!text) {
    const std::string& param = text.error().param();
    return Refuse(text.error().what(), param.empty() ? "messages" : param, text.error().kind());
  }
  std::vector<int32_t> tokens = tokenizer_->Encode(*text, add_special_tokens);
  if (tokens.empty()) return Refuse("The chat template made an empty prompt of `messages`.", "messages");
  return tokens;
}

Result<std::shared_ptr<Generation>> Service::StartChat(std::string_view body, std::string_view header_request_id,
                                                       const std::function<void()>& notify) {
  Result<ChatCompletionRequest> request = ParseChatCompletionRequest(body, limits_);
  if (!request) return tl::make_unexpected(request.error());
  WarnUnknown(request->unknown_fields);
  const Result<std::string> model = CheckModel(request->model);
  if (!model) return tl::make_unexpected(model.error());
  Result<std::vector<int32_t>> tokens = RenderChat(request->chat, request->add_special_tokens);
  if (!tokens) return tl::make_unexpected(tokens.error());

  Call call;
  call.id = NewId("chatcmpl", request->request_id, header_request_id);
  call.model = *model;
  call.chat = true;
  call.prompts.push_back(Truncate(*request, std::move(*tokens)));
  call.role = request->chat.add_generation_prompt ? options_.response_role : request->chat.last_role;
  if (request->echo) call.echo_texts.push_back(request->chat.last_role == call.role ? request->chat.last_content : "");
  call.request = std::move(*request);
  return Start(std::move(call), notify);
}

Result<std::shared_ptr<Generation>> Service::Start(Call call, const std::function<void()>& notify) {
  GenerationRequest& request = call.request;
  if (!tokenizer_) {
    const char* param = !request.params.stop.empty() ? "stop" : !request.bad_words.empty() ? "bad_words" : nullptr;
    if (param != nullptr) return tl::make_unexpected(NeedTokenizer(param).error());
    request.params.detokenize = false;
  } else {
    request.params.bad_words = EncodeBadWords(request.bad_words);
  }
  std::vector<int32_t> max_tokens;
  for (const std::vector<int32_t>& prompt : call.prompts) {
    const Result<int32_t> fitting = FitMaxTokens(request, static_cast<int64_t>(prompt.size()), limits_);
    if (!fitting) return tl::make_unexpected(fitting.error());
    max_tokens.push_back(*fitting);
  }
  call.created = std::time(nullptr);

  auto mailbox = std::make_shared<Mailbox>(call.choices(), request.stream, notify);
  auto generation = std::make_shared<Generation>(engine_, std::move(call), mailbox);
  const Call& made = generation->call;
  generation->writer =
      made.chat ? MakeChatWriter(made, tokenizer_.get()) : MakeCompletionWriter(made, tokenizer_.get());
  const int n = made.request.n;
  for (int choice = 0; choice < made.choices(); ++choice) {
    EngineRequest engine_request;
    // The number keeps ids apart that clients chose themselves.
    engine_request.id = fmt::format("{}-{}", made.id, next_request_.fetch_add(1));
    engine_request.prompt_token_ids = made.prompts[choice / n];
    engine_request.params = made.request.params;
    engine_request.params.max_tokens = max_tokens[choice / n];
    // The choices of a prompt differ by their seeds.
    if (engine_request.params.seed) *engine_request.params.seed += static_cast<uint64_t>(choice % n);
    engine_request.priority = made.request.priority;
    engine_request.cache_salt = made.request.cache_salt;
    std::string id = engine_request.id;
    const Result<void> added = engine_.Add(std::move(engine_request), [mailbox, choice](RequestOutput&& output) {
      mailbox->Put(choice, std::move(output));
    });
    if (!added) return tl::make_unexpected(added.error());  // the choices before it are aborted
    generation->engine_ids.push_back(std::move(id));
  }
  return generation;
}

Result<std::string> Service::Tokenize(std::string_view body) {
  const Result<TokenizeRequest> request = ParseTokenizeRequest(body);
  if (!request) return tl::make_unexpected(request.error());
  WarnUnknown(request->unknown_fields);
  if (const Result<std::string> model = CheckModel(request->model); !model) return model;
  Result<std::vector<int32_t>> tokens;
  if (const auto* chat = std::get_if<ChatPrompt>(&request->input)) {
    tokens = RenderChat(*chat, request->add_special_tokens);
    if (!tokens) return tl::make_unexpected(tokens.error());
  } else {
    if (const Result<void> can = NeedTokenizer("prompt"); !can) return tl::make_unexpected(can.error());
    tokens = tokenizer_->Encode(std::get<std::string>(request->input), request->add_special_tokens);
  }
  Json answer;
  answer["count"] = tokens->size();
  answer["max_model_len"] = limits_.max_model_len;
  answer["tokens"] = *tokens;
  answer["token_strs"] = nullptr;
  if (request->return_token_strs) {
    Json strings = Json::array();
    for (const int32_t token : *tokens) strings.push_back(tokenizer_->TokenString(token));
    answer["token_strs"] = std::move(strings);
  }
  return DumpJson(answer);
}

Result<std::string> Service::Detokenize(std::string_view body) {
  const Result<DetokenizeRequest> request = ParseDetokenizeRequest(body, limits_);
  if (!request) return tl::make_unexpected(request.error());
  WarnUnknown(request->unknown_fields);
  if (const Result<std::string> model = CheckModel(request->model); !model) return model;
  if (!tokenizer_) {
    return Refuse("This server runs without a tokenizer (--skip-tokenizer-init) and has no text for token ids.",
                  "tokens");
  }
  Json answer;
  answer["prompt"] = tokenizer_->Decode(request->tokens, /*skip_special_tokens=*/false);
  return DumpJson(answer);
}

Json Service::ModelCard(const std::string& name) const {
  Json permission;
  permission["id"] = "modelperm-" + RandomHex();
  permission["object"] = "model_permission";
  permission["created"] = started_;
  permission["allow_create_engine"] = false;
  permission["allow_sampling"] = true;
  permission["allow_logprobs"] = true;
  permission["allow_search_indices"] = false;
  permission["allow_view"] = true;
  permission["allow_fine_tuning"] = false;
  permission["organization"] = "*";
  permission["group"] = nullptr;
  permission["is_blocking"] = false;
  Json card;
  card["id"] = name;
  card["object"] = "model";
  card["created"] = started_;
  card["owned_by"] = "weft";
  card["root"] = options_.model_root.empty() ? name : options_.model_root;
  card["parent"] = nullptr;
  card["max_model_len"] = limits_.max_model_len;
  card["permission"] = Json::array({permission});
  return card;
}

std::string Service::Models() const {
  Json list;
  list["object"] = "list";
  list["data"] = Json::array();
  for (const std::string& name : options_.served_model_names) list["data"].push_back(ModelCard(name));
  return DumpJson(list);
}

Result<std::string> Service::Model(const std::string& name) const {
  const Result<std::string> model = CheckModel(name);
  if (!model) return model;
  return DumpJson(ModelCard(name));
}

std::string Service::Metrics() const {
  return MetricsText(engine_.StatsByReplica(), options_.served_model_names.front());
}

}  // namespace weft
