// Streaming, clients that leave, limits, and the end of the server.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <random>
#include <thread>

#include "weft/server/mailbox.h"
#include "weft/server/server_test_fixture.h"

namespace weft {
namespace {

using Clock = std::chrono::steady_clock;

double Since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

class StreamTest : public ServerTest {
 protected:
  // An engine that never ends by itself, a token every 2 ms.
  void Endless() {
    engine->script = [](const EngineRequest&) {
      return Script{.text = "0123456789", .repeat = true, .seconds_per_token = 0.002};
    };
  }
};

const char* const kEndless = R"({"prompt": "hi", "max_tokens": 4000, "stream": true})";

TEST_F(StreamTest, Completion) {
  Start();
  const TestResponse response = Post("/v1/completions", R"({"prompt": "hi", "stream": true, "max_tokens": 20})");
  EXPECT_EQ(response.headers.at("content-type"), "text/event-stream; charset=utf-8");
  const std::vector<std::string> events = EventsOf(response.body);
  ASSERT_GE(events.size(), 2u);
  EXPECT_EQ(events.back(), "[DONE]");
  std::string text;
  for (size_t i = 0; i + 1 < events.size(); ++i) {
    const Json event = Json::parse(events[i]);
    EXPECT_EQ(event["object"], "text_completion");
    EXPECT_EQ(event["id"], Json::parse(events[0])["id"]);
    EXPECT_EQ(event["model"], "model-a");
    EXPECT_TRUE(event["usage"].is_null());
    ASSERT_EQ(event["choices"].size(), 1u);
    text += event["choices"][0]["text"].get<std::string>();
    const bool last = i + 2 == events.size();
    EXPECT_EQ(event["choices"][0]["finish_reason"], last ? Json("stop") : Json(nullptr));
  }
  EXPECT_EQ(text, "Hello, world!");
}

TEST_F(StreamTest, ChatBeginsWithTheRole) {
  Start();
  const std::vector<Json> events =
      Stream("/v1/chat/completions", R"({"messages": [{"role": "user", "content": "hi"}], "stream": true, "n": 2,
          "return_token_ids": true, "stream_options": {"include_usage": true, "continuous_usage_stats": true}})");
  ASSERT_GE(events.size(), 4u);
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(events[i]["choices"][0]["index"], i);
    EXPECT_EQ(events[i]["choices"][0]["delta"], Json::parse(R"({"role": "assistant", "content": ""})"));
    EXPECT_EQ(events[i]["prompt_token_ids"].size(), 26u);
  }
  std::string text[2], reason[2];
  std::vector<int> tokens[2];
  for (size_t i = 2; i + 1 < events.size(); ++i) {
    EXPECT_EQ(events[i]["object"], "chat.completion.chunk");
    const Json& choice = events[i]["choices"][0];
    const int index = choice["index"];
    EXPECT_FALSE(choice["delta"].contains("role"));
    EXPECT_FALSE(events[i].contains("prompt_token_ids"));
    text[index] += choice["delta"]["content"].get<std::string>();
    for (const Json& token : choice["token_ids"]) tokens[index].push_back(token);
    EXPECT_EQ(events[i]["usage"]["completion_tokens"], tokens[index].size());
    if (!choice["finish_reason"].is_null()) reason[index] = choice["finish_reason"];
  }
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(text[i], "Hello, world!");
    EXPECT_EQ(reason[i], "stop");
    EXPECT_EQ(tokens[i].size(), 14u);
  }
  EXPECT_EQ(events.back()["choices"], Json::array());
  EXPECT_EQ(events.back()["usage"], Json::parse(R"({"prompt_tokens": 26, "total_tokens": 54, "completion_tokens": 28,
                                                    "prompt_tokens_details": {"cached_tokens": 0}})"));
}

TEST_F(StreamTest, TheSameAsPlain) {
  engine->script = [](const EngineRequest&) {
    return Script{.text = "añ😀 stop and more", .seconds_per_token = 0.0005};
  };
  Start();
  const std::string fields =
      R"("prompt": ["é", "b"], "n": 2, "max_tokens": 60, "logprobs": 2, "echo": true, "stop": ["ore"],
                                "return_token_ids": false)";
  const Json plain = PostJson("/v1/completions", "{" + fields + "}");
  std::map<int, Json> streamed;
  for (const Json& event : Stream("/v1/completions", "{" + fields + R"(, "stream": true})")) {
    const Json& choice = event["choices"][0];
    const int index = choice["index"];
    if (!streamed.contains(index)) {
      streamed[index] = choice;
      continue;
    }
    Json& sum = streamed[index];
    sum["text"] = sum["text"].get<std::string>() + choice["text"].get<std::string>();
    sum["finish_reason"] = choice["finish_reason"];
    sum["stop_reason"] = choice["stop_reason"];
    for (const auto& item : choice["logprobs"].items()) {
      for (const Json& entry : item.value()) sum["logprobs"][item.key()].push_back(entry);
    }
  }
  ASSERT_EQ(streamed.size(), 4u);
  for (int i = 0; i < 4; ++i) {
    Json expected = plain["choices"][i];
    expected.erase("prompt_logprobs");
    EXPECT_EQ(streamed[i], expected);
  }
  EXPECT_EQ(plain["choices"][0]["text"], "éañ😀 stop and m");
}

TEST_F(StreamTest, ErrorInMidStream) {
  engine->script = [](const EngineRequest& request) {
    return Script{
        .text = "abcdef", .fail_after = request.params.seed == 6u ? 3 : -1, .hang = request.params.seed == 7u};
  };
  Start();
  const TestResponse response = Post("/v1/completions", R"({"prompt": "hi", "stream": true, "n": 3, "seed": 5})");
  EXPECT_EQ(response.status, 200);
  const std::vector<std::string> events = EventsOf(response.body);
  ASSERT_GE(events.size(), 2u);
  EXPECT_EQ(events.back(), "[DONE]");
  const Json error = Json::parse(events[events.size() - 2])["error"];
  EXPECT_EQ(error["code"], 500);
  EXPECT_EQ(error["message"], "the fake engine was told to fail");
  EXPECT_TRUE(engine->WaitAborted(1, 10));  // the choice that still ran
}

TEST_F(StreamTest, RefusalsBeforeTheStreamAreOrdinaryErrors) {
  Start();
  EXPECT_EQ(ErrorOf(Post("/v1/completions", R"({"prompt": "hi", "stream": true, "top_p": 2})"), 400)["param"], "top_p");
}

TEST_F(StreamTest, LeavingInMidStreamAborts) {
  Endless();
  Start();
  const auto client = Connect();
  client->Send(TestClient::PostText("/v1/completions", kEndless));
  ASSERT_TRUE(client->ReadUntil("\"text\":\"5\""));
  EXPECT_EQ(engine->running(), 1);
  client->Close();
  EXPECT_TRUE(engine->WaitAborted(1, 5));
}

TEST_F(StreamTest, LeavingWhileAPlainAnswerIsComputedAborts) {
  engine->script = [](const EngineRequest&) { return Script{.hang = true}; };
  Start();
  const auto client = Connect();
  client->Send(
      TestClient::PostText("/v1/chat/completions", R"({"messages": [{"role": "user", "content": "hi"}], "n": 3})"));
  WaitRunning(3);
  client->Close();
  EXPECT_TRUE(engine->WaitAborted(3, 5));
}

TEST_F(StreamTest, LeavingWithAPipelinedRequestBehindAborts) {
  engine->script = [](const EngineRequest&) { return Script{.hang = true}; };
  Start();
  const auto client = Connect();
  client->Send(TestClient::PostText("/v1/completions", R"({"prompt": "hi"})") +
               "GET /health HTTP/1.1\r\nHost: t\r\n\r\n");
  WaitRunning(1);
  client->Close();
  EXPECT_TRUE(engine->WaitAborted(1, 5));
}

TEST_F(StreamTest, LeavingDuringTokenizationAborts) {
  std::mutex mutex;
  std::condition_variable changed;
  bool inside = false, go_on = false;
  tokenizer->on_encode = [&](std::string_view text) {
    if (text != "slow") return;
    std::unique_lock lock(mutex);
    inside = true;
    changed.notify_all();
    changed.wait(lock, [&] { return go_on; });
  };
  engine->script = [](const EngineRequest&) { return Script{.hang = true}; };
  Start();
  {
    const auto client = Connect();
    client->Send(TestClient::PostText("/v1/completions", R"({"prompt": "slow"})"));
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return inside; });
  }
  // Meanwhile others are served.
  EXPECT_EQ(Get("/health").status, 200);
  PostJson("/tokenize", R"({"prompt": "quick"})");
  {
    const std::lock_guard lock(mutex);
    go_on = true;
  }
  changed.notify_all();
  EXPECT_TRUE(engine->WaitAborted(1, 10));
}

TEST_F(StreamTest, ALongPromptDoesNotHoldUpOthers) {
  std::atomic<bool> release{false};
  tokenizer->on_encode = [&](std::string_view text) {
    while (text.size() > 1000 && !release) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  };
  options.text_threads = 2;
  options.io_threads = 1;
  Start();
  const auto busy = Connect();
  busy->Send(TestClient::PostText("/tokenize", R"({"prompt": ")" + std::string(1 << 20, 'x') + R"("})"));
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(Get("/health").status, 200);
    EXPECT_EQ(Post("/v1/completions", R"({"prompt": "hi"})").status, 200);
  }
  release = true;
  EXPECT_EQ(Json::parse(busy->Read().body)["count"], (1 << 20) + 1);
}

TEST_F(StreamTest, ASlowReaderDoesNotHoldUpTheEngine) {
  // As many tokens as the engine can make, to a client that reads nothing.
  engine = std::make_unique<FakeEngine>(tokenizer, 400000);
  engine->script = [](const EngineRequest&) { return Script{.text = "x", .repeat = true}; };
  Start();
  const auto client = Connect();
  client->Send(TestClient::PostText("/v1/completions",
                                    R"({"prompt": "hi", "max_tokens": 100000, "stream": true, "logprobs": 2})"));
  WaitRunning(1);
  WaitRunning(0);  // the engine is done long before the client begins to read
  const TestResponse response = client->Read();
  const std::vector<std::string> events = EventsOf(response.body);
  size_t tokens = 0;
  for (size_t i = 0; i + 1 < events.size(); ++i) {
    tokens += Json::parse(events[i])["choices"][0]["logprobs"]["tokens"].size();
  }
  EXPECT_EQ(tokens, 100000u);
  EXPECT_LT(events.size(), 100000u);  // outputs were put together
}

TEST_F(StreamTest, AClientThatReadsNothingIsDropped) {
  engine = std::make_unique<FakeEngine>(tokenizer, 100000000);
  engine->script = [](const EngineRequest&) { return Script{.text = std::string(1000, 'x'), .repeat = true}; };
  options.write_timeout_s = 0.3;
  Start();
  const auto client = Connect();
  client->Send(TestClient::PostText("/v1/completions",
                                    R"({"prompt": "hi", "max_tokens": 90000000, "stream": true, "logprobs": 5})"));
  EXPECT_TRUE(engine->WaitAborted(1, 30));
}

TEST_F(StreamTest, KeepAliveAndPipelining) {
  Start();
  const auto client = Connect();
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(client->Get("/health").status, 200);
    EXPECT_EQ(client->Post("/v1/completions", R"({"prompt": "hi"})").status, 200);
    EXPECT_EQ(client->Post("/v1/completions", R"({"prompt": "hi", "stream": true})").status, 200);
    EXPECT_EQ(client->Post("/v1/completions", R"({"prompt": 1})").status, 400);
    EXPECT_EQ(client->Get("/nope").status, 404);
  }
  // Five requests in one go, answered in order.
  std::string many;
  for (int i = 0; i < 5; ++i) {
    many += TestClient::PostText("/v1/completions", R"({"prompt": "hi", "request_id": ")" + std::to_string(i) +
                                                        R"(", "stream": )" + (i % 2 ? "true" : "false") + "}");
  }
  client->Send(many);
  for (int i = 0; i < 5; ++i) {
    const TestResponse response = client->Read();
    EXPECT_EQ(response.status, 200);
    EXPECT_NE(response.body.find("\"id\":\"cmpl-" + std::to_string(i) + "\""), std::string::npos) << response.body;
  }
  EXPECT_EQ(client->Get("/health", "Connection: close\r\n").status, 200);
  EXPECT_TRUE(client->WaitClosed());
}

TEST_F(StreamTest, Http10) {
  Start();
  {
    const auto client = Connect();
    client->Send("GET /version HTTP/1.0\r\n\r\n");
    EXPECT_EQ(client->Read().status, 200);
    EXPECT_TRUE(client->WaitClosed());
  }
  const auto client = Connect();
  const std::string body = R"({"prompt": "hi", "stream": true})";
  client->Send("POST /v1/completions HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: " +
               std::to_string(body.size()) + "\r\n\r\n" + body);
  const TestResponse response = client->Read();
  EXPECT_FALSE(response.headers.contains("transfer-encoding"));
  EXPECT_TRUE(response.closed);
  EXPECT_EQ(EventsOf(response.body).back(), "[DONE]");
}

TEST_F(StreamTest, ChunkedBodiesAndContinue) {
  Start();
  const auto client = Connect();
  client->Send(
      "POST /tokenize HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"pro\r\n9\r\nmpt\":\"hi\"\r\n");
  client->Send("1\r\n}\r\n0\r\n\r\n");
  EXPECT_EQ(Json::parse(client->Read().body)["count"], 3);
  const std::string body = R"({"prompt": "a"})";
  client->Send("POST /tokenize HTTP/1.1\r\nHost: t\r\nExpect: 100-continue\r\nContent-Length: " +
               std::to_string(body.size()) + "\r\n\r\n");
  ASSERT_TRUE(client->ReadUntil("HTTP/1.1 100 Continue\r\n\r\n"));
  EXPECT_EQ(client->Read().status, 100);
  client->Send(body);
  EXPECT_EQ(Json::parse(client->Read().body)["count"], 2);
}

TEST_F(StreamTest, WhatIsNotHttp) {
  Start();
  for (const std::string& nonsense :
       {std::string("\x16\x03\x01\x00\x01", 5) + "a TLS hello\r\n\r\n", std::string("GET\r\n\r\n"),
        std::string("GET / HTTP/9.9\r\n\r\n"), std::string("POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n"),
        std::string("POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n"),
        std::string("POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n"),
        std::string("POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
        std::string("GET / HTTP/1.1\r\nbad header line\r\n\r\n")}) {
    const auto client = Connect();
    client->TrySend(nonsense);
    const TestResponse response = client->Read();
    ErrorOf(response, 400);
    EXPECT_TRUE(client->WaitClosed()) << nonsense;
  }
  EXPECT_EQ(Get("/health").status, 200);
}

TEST_F(StreamTest, RandomBytesDoNoHarm) {
  Start();
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  const std::string good = TestClient::PostText("/v1/completions", R"({"prompt": [1, 2], "stream": true, "n": 2})");
  for (int i = 0; i < 60; ++i) {
    std::string bytes = good;
    for (int flips = 1 + static_cast<int>(random() % 4); flips > 0; --flips) {
      bytes[random() % bytes.size()] = static_cast<char>(random());
    }
    const auto client = Connect();
    client->TrySend(bytes);
    client->HalfClose();  // whatever it was, it is over now
    EXPECT_TRUE(client->WaitClosed());
  }
  EXPECT_EQ(Post("/v1/completions", R"({"prompt": "hi"})").status, 200);
}

TEST_F(StreamTest, LargeBodiesAndHeaders) {
  options.max_body_bytes = 100000;
  options.max_header_bytes = 4096;
  Start();
  {
    const auto client = Connect();
    client->TrySend(TestClient::PostText("/tokenize", std::string(100001, ' ')));
    const TestResponse response = client->Read();
    ErrorOf(response, 413);
    EXPECT_TRUE(response.closed);
  }
  {  // without an announced length
    const auto client = Connect();
    client->TrySend("POST /tokenize HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n");
    for (int i = 0; i < 20; ++i) client->TrySend("2000\r\n" + std::string(0x2000, ' ') + "\r\n");
    ErrorOf(client->Read(), 413);
  }
  {
    const auto client = Connect();
    client->TrySend("GET /health HTTP/1.1\r\nX-Large: " + std::string(5000, 'x') + "\r\n\r\n");
    ErrorOf(client->Read(), 431);
  }
  {  // refused by its header: the body is not waited for
    const auto client = Connect();
    client->TrySend("POST /nope HTTP/1.1\r\nHost: t\r\nContent-Length: 90000\r\n\r\n");
    const TestResponse response = client->Read();
    ErrorOf(response, 404);
    EXPECT_TRUE(response.closed);
  }
  EXPECT_EQ(PostJson("/tokenize", R"({"prompt": ")" + std::string(90000, 'x') + R"("})")["count"], 90001);
}

TEST_F(StreamTest, MemoryForBodiesIsShared) {
  options.max_buffered_body_bytes = 50000;
  Start();
  const auto holder = Connect();
  holder->Send("POST /tokenize HTTP/1.1\r\nHost: t\r\nContent-Length: 40000\r\n\r\n {");
  // Until the first one is being read, the second may still fit.
  TestResponse response;
  for (int i = 0; i < 200; ++i) {
    response = Post("/tokenize", R"({"prompt": ")" + std::string(20000, 'x') + R"("})");
    if (response.status == 503) break;
  }
  ErrorOf(response, 503);
  EXPECT_TRUE(response.headers.contains("retry-after"));
  holder->Close();
  for (int i = 0; i < 200; ++i) {
    response = Post("/tokenize", R"({"prompt": ")" + std::string(20000, 'x') + R"("})");
    if (response.status == 200) break;
  }
  EXPECT_EQ(response.status, 200);  // given back
}

TEST_F(StreamTest, SlowClientsAreCutOff) {
  options.header_timeout_s = 0.3;
  options.body_timeout_s = 0.3;
  options.keep_alive_timeout_s = 0.3;
  Start();
  const auto silent = Connect();
  const auto header = Connect();
  const auto body = Connect();
  const auto idle = Connect();
  header->Send("GET /health HT");
  body->Send("POST /tokenize HTTP/1.1\r\nHost: t\r\nContent-Length: 100\r\n\r\n{");
  EXPECT_EQ(idle->Get("/health").status, 200);
  for (const auto* client : {&silent, &header, &body, &idle}) EXPECT_TRUE((*client)->WaitClosed(10));
  // A byte now and then does not help: the time is for the whole header.
  const auto drip = Connect();
  const Clock::time_point start = Clock::now();
  bool closed = false;
  while (!closed && Since(start) < 10) {
    closed = !drip->TrySend("G") || drip->WaitClosed(0.02);
  }
  EXPECT_TRUE(closed);
}

TEST_F(StreamTest, TooManyConnections) {
  options.max_connections = 2;
  Start();
  const auto first = Connect();
  auto second = Connect();
  EXPECT_EQ(first->Get("/health").status, 200);
  EXPECT_EQ(second->Get("/health").status, 200);
  const auto third = Connect();
  const TestResponse response = third->Read();
  ErrorOf(response, 503);
  EXPECT_TRUE(response.headers.contains("retry-after"));
  second->Close();
  int status = 0;
  for (int i = 0; i < 500 && status != 200; ++i) {
    const auto again = Connect();
    if (again->TrySend("GET /health HTTP/1.1\r\nHost: t\r\n\r\n")) status = again->Read().status;
  }
  EXPECT_EQ(status, 200);
}

TEST_F(StreamTest, ManyClientsAtOnce) {
  engine->script = [](const EngineRequest& request) {
    return Script{.text = std::string(request.prompt_token_ids.begin() + 1, request.prompt_token_ids.end()),
                  .seconds_per_token = 0.0005};
  };
  Start();
  std::atomic<int> right{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 16; ++t) {
    threads.emplace_back([&, t] {
      TestClient client(server->port());
      for (int i = 0; i < 8; ++i) {
        const std::string text = "client " + std::to_string(t) + " request " + std::to_string(i);
        const bool stream = (t + i) % 2 == 0;
        const TestResponse response =
            client.Post("/v1/completions", Json{{"prompt", text}, {"max_tokens", 100}, {"stream", stream}}.dump());
        std::string got;
        if (stream) {
          for (const std::string& event : EventsOf(response.body)) {
            if (event != "[DONE]") got += Json::parse(event)["choices"][0]["text"].get<std::string>();
          }
        } else {
          got = Json::parse(response.body)["choices"][0]["text"];
        }
        right += got == text;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(right, 16 * 8);
}

TEST_F(StreamTest, LoadCountsRunningRequests) {
  engine->script = [](const EngineRequest&) { return Script{.hang = true}; };
  Start();
  const auto client = Connect();
  client->Send(TestClient::PostText("/v1/completions", R"({"prompt": "hi"})"));
  WaitRunning(1);
  EXPECT_EQ(Get("/load").body, R"({"server_load":1})");
}

TEST_F(StreamTest, StopDrains) {
  engine->script = [](const EngineRequest&) { return Script{.text = "abcdefgh", .seconds_per_token = 0.05}; };
  Start();
  const uint16_t port = server->port();
  const auto idle = Connect();
  EXPECT_EQ(idle->Get("/health").status, 200);
  const auto plain = Connect();
  const auto stream = Connect();
  plain->Send(TestClient::PostText("/v1/completions", R"({"prompt": "hi"})"));
  stream->Send(TestClient::PostText("/v1/completions", R"({"prompt": "hi", "stream": true})"));
  WaitRunning(2);
  std::thread stopping([this] { server->Stop(); });
  EXPECT_TRUE(idle->WaitClosed());
  // The running ones end as if nothing were the matter.
  EXPECT_EQ(Json::parse(plain->Read().body)["choices"][0]["text"], "abcdefgh");
  const std::vector<std::string> events = EventsOf(stream->Read().body);
  ASSERT_FALSE(events.empty());
  EXPECT_EQ(events.back(), "[DONE]");
  EXPECT_TRUE(plain->WaitClosed());
  stopping.join();
  EXPECT_THROW(TestClient{port}, std::runtime_error);
  EXPECT_TRUE(engine->aborted().empty());
}

TEST_F(StreamTest, StopAbortsWhatDoesNotEnd) {
  Endless();
  options.shutdown_timeout_s = 0.1;
  Start();
  const auto client = Connect();
  client->Send(TestClient::PostText("/v1/completions", kEndless));
  ASSERT_TRUE(client->ReadUntil("\"text\":\"1\""));
  server->Stop();
  EXPECT_EQ(engine->aborted().size(), 1u);
  // The client is told.
  const std::vector<std::string> events = EventsOf(client->Read().body);
  ASSERT_GE(events.size(), 2u);
  EXPECT_EQ(Json::parse(events[events.size() - 2])["choices"][0]["finish_reason"], "abort");
}

TEST_F(StreamTest, StopDoesNotWaitForHalfARequest) {
  options.shutdown_timeout_s = 0.1;
  Start();
  const auto client = Connect();
  client->Send("POST /tokenize HTTP/1.1\r\nHost: t\r\nExpect: 100-continue\r\nContent-Length: 100\r\n\r\n");
  ASSERT_TRUE(client->ReadUntil("100 Continue"));
  client->Send("{");
  const Clock::time_point start = Clock::now();
  server->Stop();
  EXPECT_LT(Since(start), 60);  // body_timeout_s is 120
  EXPECT_TRUE(client->WaitClosed());
}

TEST(MailboxTest, OutputsAreMerged) {
  int notified = 0;
  Mailbox mailbox(2, /*every_output=*/true, [&] { ++notified; });
  RequestOutput a;
  a.text = "a";
  a.token_ids = {1};
  a.logprobs.resize(1);
  a.prompt_logprobs.emplace(3);
  RequestOutput b;
  b.text = "b";
  b.token_ids = {2, 3};
  b.logprobs.resize(2);
  b.completion_tokens = 3;
  b.finish_reason = FinishReason::kLength;
  mailbox.Put(1, std::move(a));
  mailbox.Put(1, std::move(b));
  EXPECT_EQ(notified, 1);  // once until it is looked at
  EXPECT_TRUE(mailbox.Ready());
  auto taken = mailbox.Take();
  ASSERT_EQ(taken.size(), 1u);
  EXPECT_EQ(taken[0].first, 1);
  EXPECT_EQ(taken[0].second.text, "ab");
  EXPECT_EQ(taken[0].second.token_ids, (std::vector<int32_t>{1, 2, 3}));
  EXPECT_EQ(taken[0].second.logprobs.size(), 3u);
  EXPECT_EQ(taken[0].second.prompt_logprobs->size(), 3u);
  EXPECT_EQ(taken[0].second.completion_tokens, 3);
  EXPECT_EQ(taken[0].second.finish_reason, FinishReason::kLength);
  EXPECT_TRUE(mailbox.Ended(1));
  EXPECT_FALSE(mailbox.Ended(0));
  EXPECT_FALSE(mailbox.Ready());
  EXPECT_FALSE(mailbox.Drained());
  RequestOutput late;
  late.text = "late";
  mailbox.Put(1, std::move(late));  // after its end: nothing
  EXPECT_TRUE(mailbox.Take().empty());
}

TEST(MailboxTest, AReaderOfTheWholeIsNotifiedAtTheEnd) {
  int notified = 0;
  Mailbox mailbox(2, /*every_output=*/false, [&] { ++notified; });
  RequestOutput part;
  mailbox.Put(0, RequestOutput(part));
  part.finish_reason = FinishReason::kStop;
  mailbox.Put(0, RequestOutput(part));
  EXPECT_EQ(notified, 0);
  EXPECT_FALSE(mailbox.Ready());
  mailbox.Put(1, RequestOutput(part));
  EXPECT_EQ(notified, 1);
  EXPECT_TRUE(mailbox.Ready());
}

}  // namespace
}  // namespace weft
