#include <unistd.h>

#include <charconv>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>

#include "weft/cli/build_engine.h"
#include "weft/cli/commands.h"
#include "weft/cli/output_queue.h"
#include "weft/cli/sampling_args.h"
#include "weft/core/log.h"
#include "weft/parallel/processes.h"

namespace weft::cli {
namespace {

using nlohmann::json;

std::string ReadAll(std::istream& in) { return {std::istreambuf_iterator<char>(in), {}}; }

// "1,2,3" or "1 2 3".
std::vector<int32_t> ParseTokenIds(const std::string& text) {
  std::vector<int32_t> ids;
  const char* at = text.data();
  const char* const end = at + text.size();
  while (at != end) {
    int32_t id = 0;
    const auto [next, error] = std::from_chars(at, end, id);
    if (error != std::errc()) Throw("--prompt-token-ids = {}: must be numbers with commas between them", text);
    ids.push_back(id);
    at = next;
    while (at != end && (*at == ',' || *at == ' ')) ++at;
  }
  return ids;
}

class Generate : public Command {
 public:
  Generate()
      : options_("weft generate",
                 "Completes prompts and prints the result. Without --prompt, --prompt-file and --prompt-token-ids the "
                 "prompt is read from standard input (less a newline at its end).",
                 "MODEL", &args_.model) {
    args_.log_level = "warning";
    options_.Group("Input and output");
    options_.Add("prompt", &prompts_, "Prompts; several ones run together.");
    options_.Add("prompt-file", &prompt_file_, "File whose whole content is the prompt; -: standard input.");
    options_.Add("prompt-token-ids", &token_ids_, "Prompts as token ids: 1,2,3. They work without a tokenizer.");
    options_.Add("chat", &chat_, "Take each prompt as a user's message, in the model's chat template.");
    options_.Add("add-special-tokens", &add_special_tokens_, "Put the tokenizer's begin token before a plain prompt.");
    options_.Add("json", &json_, "Print one JSON object a prompt instead of its text.");
    options_.Add("stream", &stream_, "Print the text of a single prompt as it comes.");
    DeclareSamplingOptions(options_, sampling_);
    DeclareEngineOptions(options_, args_);
  }

  OptionSet& options() override { return options_; }

  int Run() override {
    InitLogging(args_.log_level);
    const int sources = !prompts_.empty() + prompt_file_.has_value() + !token_ids_.empty();
    if (sources > 1) Throw("--prompt, --prompt-file and --prompt-token-ids exclude each other");
    // Of several processes the first one alone has the standard input, and needs the prompts.
    if (LaunchedProcessIndex() == 0 && (sources == 0 || (prompt_file_ && *prompt_file_ == "-"))) {
      std::string text = ReadAll(std::cin);
      if (text.ends_with('\n')) text.pop_back();
      prompts_ = {std::move(text)};
    } else if (prompt_file_ && LaunchedProcessIndex() == 0) {
      std::ifstream file(*prompt_file_, std::ios::binary);
      if (!file) Throw("--prompt-file = {}: cannot read this file", *prompt_file_);
      prompts_ = {ReadAll(file)};
    }
    if (args_.skip_tokenizer_init && token_ids_.empty()) {
      Throw("--skip-tokenizer-init: prompts must be given as --prompt-token-ids then");
    }
    std::vector<std::vector<int32_t>> tokens;
    for (const std::string& ids : token_ids_) tokens.push_back(ParseTokenIds(ids));

    std::vector<std::unique_ptr<OutputQueue>> queues;  // outlive the engine, also when an error is thrown
    BuiltEngine built = BuildEngine(args_, {.progress = isatty(STDERR_FILENO) != 0});
    if (built.engine == nullptr) return 0;
    for (const std::string& prompt : prompts_) tokens.push_back(Encode(built, prompt));
    const SamplingParams params = MakeSamplingParams(sampling_, built.sampling);

    for (size_t i = 0; i < tokens.size(); ++i) {
      queues.push_back(std::make_unique<OutputQueue>());
      EngineRequest request;
      request.id = fmt::format("prompt-{}", i);
      request.prompt_token_ids = std::move(tokens[i]);
      request.params = params;
      const auto added = built.engine->Add(std::move(request), queues.back()->Sink());
      if (!added) throw added.error();
    }
    int status = 0;
    for (const auto& queue : queues) status = std::max(status, Print(*queue, queues.size() == 1));
    built.engine->Shutdown(0);
    return status;
  }

 private:
  std::vector<int32_t> Encode(const BuiltEngine& built, const std::string& prompt) const {
    if (!chat_) return built.tokenizer->Encode(prompt, add_special_tokens_);
    ChatTemplateInput input;
    input.messages_json = json::array({{{"role", "user"}, {"content", prompt}}}).dump();
    auto text = built.tokenizer->ApplyChatTemplate(input);
    if (!text) throw text.error();
    return built.tokenizer->Encode(*text, false);
  }

  int Print(OutputQueue& queue, bool single) const {
    std::string text;
    std::vector<int32_t> ids;
    while (true) {
      const RequestOutput output = queue.Take();
      text += output.text;
      ids.insert(ids.end(), output.token_ids.begin(), output.token_ids.end());
      if (single && stream_ && !json_) std::cout << output.text << std::flush;
      if (!output.finish_reason) continue;
      if (*output.finish_reason == FinishReason::kError) throw Error(output.error, output.error_kind);
      if (json_) {
        json line = {{"text", text},
                     {"token_ids", ids},
                     {"finish_reason", NameOf(*output.finish_reason)},
                     {"prompt_tokens", output.prompt_tokens},
                     {"completion_tokens", output.completion_tokens}};
        if (const auto* stop = std::get_if<std::string>(&output.stop_reason)) line["stop_reason"] = *stop;
        if (const auto* stop = std::get_if<int32_t>(&output.stop_reason)) line["stop_reason"] = *stop;
        std::cout << line.dump() << "\n";
      } else if (args_.skip_tokenizer_init) {
        std::cout << fmt::format("{}\n", fmt::join(ids, ","));
      } else {
        if (!single || !stream_) std::cout << text;
        std::cout << "\n";
      }
      std::cout.flush();
      return 0;
    }
  }

  EngineArgs args_;
  SamplingArgs sampling_;
  std::vector<std::string> prompts_;
  std::optional<std::string> prompt_file_;
  std::vector<std::string> token_ids_;
  bool chat_ = false;
  bool add_special_tokens_ = true;
  bool json_ = false;
  bool stream_ = true;
  OptionSet options_;
};

}  // namespace

std::unique_ptr<Command> MakeGenerate() { return std::make_unique<Generate>(); }

}  // namespace weft::cli
