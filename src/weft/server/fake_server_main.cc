// weft_fake_server: the HTTP server in front of an engine without a model, for tests of clients. It takes the flags of
// `weft serve` that those tests use: MODEL --host --port --api-key --served-model-name.
#include <cstdlib>
#include <cstring>
#include <string>

#include "weft/core/log.h"
#include "weft/server/fakes.h"
#include "weft/server/server.h"

int main(int argc, char** argv) {
  using namespace weft;
  InitLogging();
  ServerOptions options;
  options.served_model_names = {"fake"};
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 >= argc) {
        spdlog::error("{} needs a value", flag);
        std::exit(2);
      }
      return argv[++i];
    };
    if (flag == "serve" || !flag.starts_with("--")) continue;  // the command and MODEL
    if (flag == "--host") {
      options.host = value();
    } else if (flag == "--port") {
      options.port = static_cast<uint16_t>(std::stoi(value()));
    } else if (flag == "--api-key") {
      options.api_keys.push_back(value());
    } else if (flag == "--served-model-name") {
      options.served_model_names = {value()};
    } else {
      spdlog::error("unknown flag {}", flag);
      return 2;
    }
  }
  try {
    auto tokenizer = std::make_shared<ByteTokenizer>();
    FakeEngine engine(tokenizer, 4096);
    engine.script = [](const EngineRequest&) {
      // Never at an end by itself, so that max_tokens decides; slow enough to be interrupted.
      return Script{
          .text = "The quick brown fox jumps over the lazy dog. ", .repeat = true, .seconds_per_token = 0.002};
    };
    Server server(options, engine, tokenizer);
    server.Run();
    engine.Shutdown(5);
  } catch (const std::exception& e) {
    spdlog::error("{}", e.what());
    return 1;
  }
  return 0;
}
