#include <unistd.h>

#include <atomic>
#include <csignal>
#include <iostream>
#include <nlohmann/json.hpp>

#include "weft/cli/build_engine.h"
#include "weft/cli/commands.h"
#include "weft/cli/output_queue.h"
#include "weft/cli/sampling_args.h"
#include "weft/core/log.h"
#include "weft/core/utf8.h"

namespace weft::cli {
namespace {

using nlohmann::json;

volatile std::sig_atomic_t interrupted = 0;
void OnInterrupt(int) { interrupted = 1; }

class Chat : public Command {
 public:
  Chat()
      : options_("weft chat",
                 "Talks to a model in the terminal, or answers the lines of standard input one after another. /quit "
                 "ends, /reset forgets the conversation; Ctrl-C stops an answer, or ends at the prompt.",
                 "MODEL", &args_.model) {
    args_.log_level = "warning";
    sampling_.max_tokens = 1024;
    options_.Group("Conversation");
    options_.Add("system-prompt", &system_prompt_, "Text of a system message.");
    options_.Add("chat-template-kwargs", &template_kwargs_, "Variables of the chat template.");
    DeclareSamplingOptions(options_, sampling_);
    DeclareEngineOptions(options_, args_);
  }

  OptionSet& options() override { return options_; }

  int Run() override {
    InitLogging(args_.log_level);
    if (args_.skip_tokenizer_init) Throw("--skip-tokenizer-init: a chat needs a tokenizer");
    built_ = BuildEngine(args_, {.progress = isatty(STDERR_FILENO) != 0});
    if (built_.engine == nullptr) return 0;
    if (!built_.tokenizer->has_chat_template()) {
      Throw("{}: has no chat template, so it is no chat model; see weft generate", args_.model);
    }
    Reset();
    // Without SA_RESTART, so that a Ctrl-C at the prompt ends the reading.
    struct sigaction action {};
    action.sa_handler = OnInterrupt;
    sigaction(SIGINT, &action, nullptr);

    const bool terminal = isatty(STDIN_FILENO) != 0;
    std::string line;
    while (true) {
      if (terminal) std::cout << "> " << std::flush;
      if (!std::getline(std::cin, line)) break;
      if (line == "/quit" || line == "/exit") break;
      if (line == "/reset") {
        Reset();
        continue;
      }
      if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
      if (line[0] == '/') {
        std::cerr << "There are /quit and /reset.\n";
        continue;
      }
      if (!IsValidUtf8(line)) {
        std::cerr << "weft: this line is not UTF-8\n";
        continue;
      }
      Answer(line);
      if (!built_.engine->Failure().empty()) Throw("{}", built_.engine->Failure());
    }
    if (terminal) std::cout << "\n";
    built_.engine->Shutdown(0);
    return 0;
  }

 private:
  void Reset() {
    messages_ = json::array();
    if (system_prompt_) messages_.push_back({{"role", "system"}, {"content", *system_prompt_}});
  }

  // What goes wrong with one message is said, and the conversation is as before it.
  void Answer(const std::string& line) {
    messages_.push_back({{"role", "user"}, {"content", line}});
    const auto fail = [&](const std::string& message) {
      std::cerr << "weft: " << message << "\n";
      messages_.erase(messages_.size() - 1);
    };
    ChatTemplateInput input;
    input.messages_json = messages_.dump();
    if (!template_kwargs_.empty()) input.kwargs_json = template_kwargs_.dump();
    const auto text = built_.tokenizer->ApplyChatTemplate(input);
    if (!text) return fail(text.error().what());

    EngineRequest request;
    request.id = "chat-" + std::to_string(next_id_++);
    request.prompt_token_ids = built_.tokenizer->Encode(*text, false);
    request.params = MakeSamplingParams(sampling_, built_.sampling);
    const std::string id = request.id;
    interrupted = 0;
    OutputQueue queue;
    if (const auto added = built_.engine->Add(std::move(request), queue.Sink()); !added) {
      return fail(std::string(added.error().what()) + " /reset forgets the conversation.");
    }
    std::string answer;
    bool aborted = false;
    while (true) {
      const auto output = queue.Take(std::chrono::milliseconds(100));
      if (interrupted && !aborted) {
        aborted = true;
        built_.engine->Abort(id);
      }
      if (!output) continue;
      std::cout << output->text << std::flush;
      answer += output->text;
      if (!output->finish_reason) continue;
      std::cout << "\n" << std::flush;
      if (*output->finish_reason == FinishReason::kError) return fail(output->error);
      break;
    }
    messages_.push_back({{"role", "assistant"}, {"content", answer}});
  }

  EngineArgs args_;
  SamplingArgs sampling_;
  std::optional<std::string> system_prompt_;
  json template_kwargs_ = json::object();
  OptionSet options_;
  BuiltEngine built_;
  json messages_;
  int next_id_ = 0;
};

}  // namespace

std::unique_ptr<Command> MakeChat() { return std::make_unique<Chat>(); }

}  // namespace weft::cli
