#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <sstream>
#include <thread>

#include "weft/cli/build_engine.h"
#include "weft/cli/commands.h"
#include "weft/core/log.h"
#include "weft/parallel/processes.h"
#include "weft/server/server.h"

namespace weft::cli {
namespace {

// A file's content, or the text itself where it can be no file name.
std::string ReadTemplate(const std::string& given) {
  if (given.find_first_of("{}\n") != std::string::npos) return given;
  std::ifstream file(given);
  if (!file || std::filesystem::is_directory(given)) {
    throw Error(fmt::format("--chat-template = {}: cannot read this file", given), ErrorKind::kInvalidArgument,
                "--chat-template");
  }
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// Clients get their errors, and whoever asks /health gets a 503, before the processes end.
constexpr auto kTimeToTell = std::chrono::seconds(5);
// Then the server has so long to close its connections.
constexpr auto kTimeToStop = std::chrono::seconds(3);

// Stops the server a while after the engine has failed: true; false when it is stopped before that.
bool EndAfterFailure(const std::stop_token& stop, const Engine& engine, Server& server) {
  std::mutex mutex;
  std::condition_variable_any wake;
  std::unique_lock lock(mutex);
  const auto never = [] { return false; };
  while (engine.Failure().empty()) {
    wake.wait_for(lock, stop, std::chrono::milliseconds(100), never);
    if (stop.stop_requested()) return false;
  }
  spdlog::critical("All processes will end in {} s", kTimeToTell.count());
  wake.wait_for(lock, stop, kTimeToTell, never);
  std::thread([] {
    std::this_thread::sleep_for(kTimeToStop);
    ExitAfterFailure(true);
  }).detach();
  server.Stop();
  return true;
}

class Serve : public Command {
 public:
  Serve()
      : options_("weft serve", "Serves a model over HTTP with OpenAI's API in vLLM's dialect.", "MODEL", &args_.model) {
    DeclareEngineOptions(options_, args_);
    options_.Group("Server");
    options_.Add("host", &server_.host,
                 "Name or address to listen on. Unlike vLLM's default it is this machine alone.");
    options_.Add("port", &port_, "TCP port; 0: any free one.").Range(0, 65535);
    options_.Add("uds", &server_.uds, "Path of a Unix domain socket to listen on instead.").DefaultText("none");
    options_.Add("api-key", &server_.api_keys, "Keys of which a client has to give one as bearer token.");
    options_.Add("served-model-name", &server_.served_model_names, "Names of the model in the API.")
        .DefaultText("MODEL");
    options_.Add("chat-template", &chat_template_, "File of a Jinja chat template, or the template itself.")
        .DefaultText("the model's");
    options_.Add("response-role", &server_.response_role, "Role of generated chat messages.");
    options_.Add("allowed-origins", &server_.allowed_origins, "Origins that browsers may call from (CORS).");
    options_.Add("max-num-queued-reqs", &max_queued_, "Requests that may wait; more get a 503. 0: no limit.").Range(0);
    options_
        .Add("shutdown-timeout", &server_.shutdown_timeout_s,
             "Seconds that running requests get after SIGTERM or SIGINT; a second signal ends them at once.")
        .Range(0);
    options_.Add("enable-log-requests", &log_requests_, "One line for the begin and the end of each request.");
    options_.Add("disable-log-requests", &disable_log_requests_, "The opposite.").Unused("requests are not logged");
    options_.Add("disable-log-stats", &disable_log_stats_, "No line of throughput every ten seconds.");
    options_.Add("disable-uvicorn-access-log", &disable_access_log_, "No line for each HTTP request.")
        .Unused("there is none");
    options_.Add("reasoning-parser", &reasoning_parser_, "Splits reasoning from answers.")
        .Refused("reasoning parsers are not available");
    options_.Add("tool-call-parser", &tool_call_parser_, "Finds tool calls in answers.")
        .Refused("tool call parsers are not available");
    options_.Add("enable-auto-tool-choice", &auto_tools_, "Lets the model call tools.")
        .Refused("tool call parsers are not available");
    options_.Add("ssl-keyfile", &ssl_key_, "TLS key.").Refused("TLS is not available: put a reverse proxy in front");
    options_.Add("ssl-certfile", &ssl_cert_, "TLS certificate.")
        .Refused("TLS is not available: put a reverse proxy in front");
  }

  OptionSet& options() override { return options_; }

  int Run() override {
    InitLogging(args_.log_level);
    // A reader of our output that goes away must not take the server with it.
    std::signal(SIGPIPE, SIG_IGN);
    server_.port = static_cast<uint16_t>(port_);
    if (server_.served_model_names.empty()) server_.served_model_names = {args_.model};
    if (chat_template_) server_.chat_template = ReadTemplate(*chat_template_);
    server_.max_logprobs = args_.max_logprobs;
    server_.version = kVersion;

    BuiltEngine built = BuildEngine(args_, {.log_requests = log_requests_,
                                            .log_stats_interval_s = disable_log_stats_ ? 0.0 : 10.0,
                                            .max_num_queued_reqs = max_queued_});
    if (built.engine == nullptr) return 0;
    server_.model_root = built.path;
    server_.default_sampling = built.sampling;
    std::atomic<bool> failed = false;
    {
      Server server(server_, *built.engine, built.tokenizer);
      // A single process stays, with its /health at 503, for whoever looks after it to restart. Of several some may be
      // gone already: they end together.
      std::jthread end;
      if (built.several_processes) {
        end = std::jthread([&](std::stop_token stop) { failed = EndAfterFailure(stop, *built.engine, server); });
      }
      server.Run();
    }
    if (failed) return 1;
    // Requests have had their time by now. From here on a further signal ends the process as it is.
    built.engine->Shutdown(0);
    spdlog::info("Stopped");
    return 0;
  }

 private:
  EngineArgs args_;
  ServerOptions server_;
  int32_t port_ = 8000;
  std::optional<std::string> chat_template_;
  int64_t max_queued_ = 0;
  bool log_requests_ = false;
  bool disable_log_requests_ = false;
  bool disable_log_stats_ = false;
  bool disable_access_log_ = false;
  std::optional<std::string> reasoning_parser_;
  std::optional<std::string> tool_call_parser_;
  bool auto_tools_ = false;
  std::optional<std::string> ssl_key_;
  std::optional<std::string> ssl_cert_;
  OptionSet options_;
};

}  // namespace

std::unique_ptr<Command> MakeServe() { return std::make_unique<Serve>(); }

}  // namespace weft::cli
