#pragma once
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <string>
#include <thread>

#include "weft/api/json_fields.h"
#include "weft/server/fakes.h"
#include "weft/server/server.h"
#include "weft/server/test_client.h"

namespace weft {

// A server on a free port with a fake engine behind it. Tests set options and scripts, then call Start().
class ServerTest : public testing::Test {
 protected:
  ServerTest() : tokenizer(std::make_shared<ByteTokenizer>()) {
    options.port = 0;
    options.served_model_names = {"model-a", "model-b"};
    options.model_root = "/models/a";
    options.shutdown_timeout_s = 5;
    engine = std::make_unique<FakeEngine>(tokenizer, 4096);
  }
  ~ServerTest() override {
    server.reset();
    // Whatever happened, nothing is left running in the engine: an abort is told to it and done by its own thread.
    WaitRunning(0);
  }

  void Start() {
    server = std::make_unique<Server>(options, *engine, with_tokenizer ? tokenizer : nullptr);
    server->Start();
  }

  void WaitRunning(int count) const {
    for (int i = 0; i < 5000 && engine->running() != count; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    EXPECT_EQ(engine->running(), count);
  }

  std::unique_ptr<TestClient> Connect() const { return std::make_unique<TestClient>(server->port()); }
  TestResponse Get(const std::string& path) const { return Connect()->Get(path); }
  TestResponse Post(const std::string& path, const std::string& body) const { return Connect()->Post(path, body); }
  Json PostJson(const std::string& path, const std::string& body) const {
    const TestResponse response = Post(path, body);
    EXPECT_EQ(response.status, 200) << response.body;
    return Json::parse(response.body, nullptr, /*allow_exceptions=*/false);
  }
  // The events of a stream, without [DONE], which has to be there.
  std::vector<Json> Stream(const std::string& path, const std::string& body) const {
    const TestResponse response = Post(path, body);
    EXPECT_EQ(response.status, 200) << response.body;
    std::vector<std::string> events = EventsOf(response.body);
    EXPECT_FALSE(events.empty());
    if (events.empty()) return {};
    EXPECT_EQ(events.back(), "[DONE]");
    events.pop_back();
    std::vector<Json> parsed;
    for (const std::string& event : events) parsed.push_back(Json::parse(event));
    return parsed;
  }
  // Expects an error object and returns it.
  Json ErrorOf(const TestResponse& response, int status) const {
    EXPECT_EQ(response.status, status) << response.body;
    const Json body = Json::parse(response.body, nullptr, false);
    if (!body.is_object() || !body.contains("error")) {
      ADD_FAILURE() << "no error object: " << response.body;
      return Json{{"message", ""}, {"type", ""}, {"param", ""}, {"code", 0}};
    }
    EXPECT_EQ(body["error"]["code"], status);
    EXPECT_TRUE(body["error"]["message"].is_string());
    EXPECT_TRUE(body["error"]["type"].is_string());
    return body["error"];
  }

  ServerOptions options;
  bool with_tokenizer = true;
  std::shared_ptr<ByteTokenizer> tokenizer;
  std::unique_ptr<FakeEngine> engine;
  std::unique_ptr<Server> server;
};

}  // namespace weft
