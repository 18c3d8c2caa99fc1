#include "weft/server/connection.h"

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/read.hpp>
#include <boost/beast/http/string_body.hpp>
#include <chrono>
#include <optional>

#include "weft/api/error_object.h"
#include "weft/core/log.h"
#include "weft/server/http.h"

namespace weft {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using boost::system::error_code;
using Parser = http::request_parser<http::string_body>;

constexpr auto kTuple = asio::as_tuple(asio::use_awaitable);
constexpr size_t kWriteBytes = 256 << 10;        // the write timeout starts anew after so many
constexpr size_t kMaxPipelinedBytes = 64 << 10;  // taken from a client while its request runs
constexpr double kLingerSeconds = 2;

std::string_view View(boost::core::string_view text) { return {text.data(), text.size()}; }

// A share of the memory for request bodies, given back at the end.
class BodyShare {
 public:
  explicit BodyShare(std::shared_ptr<ServerState> state) : state_(std::move(state)) {}
  ~BodyShare() { state_->buffered_body_bytes -= bytes_; }
  BodyShare(const BodyShare&) = delete;
  BodyShare& operator=(const BodyShare&) = delete;

  // False when all requests together would hold too much.
  bool Grow(int64_t bytes) {
    if (bytes <= bytes_) return true;
    const int64_t more = bytes - bytes_;
    bytes_ = bytes;
    return (state_->buffered_body_bytes += more) <= state_->options.max_buffered_body_bytes;
  }

 private:
  std::shared_ptr<ServerState> state_;
  int64_t bytes_ = 0;
};

class CountRequest {
 public:
  explicit CountRequest(std::atomic<int>& counter) : counter_(counter) { ++counter_; }
  ~CountRequest() { --counter_; }
  CountRequest(const CountRequest&) = delete;
  CountRequest& operator=(const CountRequest&) = delete;

 private:
  std::atomic<int>& counter_;
};

// A request that has been read, and what the text pool makes of it. Shared with the pool, since the connection may end
// while the pool is still at it.
struct Job {
  Route route = Route::kNone;
  std::string body;
  std::string request_id;
  std::shared_ptr<BodyShare> share;

  HttpReply reply;  // when there is no generation
  std::shared_ptr<Generation> generation;
  std::vector<RequestOutput> outputs;
};

// Outputs on their way to becoming server-sent events.
struct EventBatch {
  std::vector<std::pair<int, RequestOutput>> news;
  std::string events;
  bool last = false;

  // Too much to be turned into JSON on an I/O thread: a reader was slow, or there is a prompt to echo.
  bool Large() const {
    size_t positions = 0;
    for (const auto& [choice, output] : news) {
      positions += output.token_ids.size();
      if (output.prompt_logprobs) positions += output.prompt_logprobs->size();
    }
    return positions > 512;
  }

  void Format(const Generation& generation) {
    for (const auto& [choice, output] : news) {
      if (output.finish_reason == FinishReason::kError) {
        events += "data: " + ErrorJson(Error(output.error, output.error_kind)) + "\n\ndata: [DONE]\n\n";
        last = true;
        return;
      }
      generation.writer->Stream(choice, output, events);
    }
    if (generation.mailbox->Drained()) {
      generation.writer->EndStream(events);
      last = true;
    }
  }
};

// All members are used on the strand only, but for Poke().
class Connection : public ConnectionHandle, public std::enable_shared_from_this<Connection> {
 public:
  Connection(StreamSocket socket, asio::any_io_executor strand, std::shared_ptr<ServerState> state)
      : strand_(std::move(strand)),
        state_(std::move(state)),
        options_(state_->options),
        socket_(std::move(socket)),
        wake_(strand_, asio::steady_timer::time_point::max()),
        deadline_(strand_, asio::steady_timer::time_point::max()),
        buffer_(options_.max_header_bytes + kMaxPipelinedBytes) {}

  asio::awaitable<void> Run();

  void Poke() override {
    asio::post(strand_, [self = shared_from_this()] { self->OnPhase(); });
  }

 private:
  struct Request {
    RouteMatch match;
    std::string method;
    std::string request_id;
    std::string authorization;
    bool expects_continue = false;
    bool has_body = false;
    ReplyContext context;
  };

  void OnPhase() {
    const Phase phase = state_->phase;
    if (phase == Phase::kClosing || (phase != Phase::kServing && idle_)) Close();
    if (phase == Phase::kAborting && generation_) generation_->Abort();
  }

  void Close() {
    error_code ignored;
    socket_.close(ignored);
    Wake();
  }

  void Wake() { wake_.cancel(); }
  // Suspends until Wake(). Callers look at their condition again and again: everything that changes one runs on the
  // strand and wakes, so nothing is missed between the look and the wait.
  asio::awaitable<void> Wait() {
    auto result = co_await wake_.async_wait(kTuple);
    (void)result;
  }

  // The connection is closed `seconds` from now unless another deadline is set before.
  void SetDeadline(double seconds) {
    deadline_.expires_after(
        std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(seconds)));
    deadline_.async_wait([self = shared_from_this()](error_code ec) {
      // A wait that had ended before it could be cancelled finds a later deadline.
      if (!ec && self->deadline_.expiry() <= std::chrono::steady_clock::now()) self->Close();
    });
  }
  void ClearDeadline() { deadline_.expires_at(asio::steady_timer::time_point::max()); }

  asio::awaitable<bool> ReadHeader(Parser& parser, bool first);
  asio::awaitable<bool> ReadBody(Parser& parser, BodyShare& share, HttpReply& refusal);
  Request Describe(const Parser& parser) const;
  // Why the request is not served at all, judged by its header.
  std::optional<HttpReply> Refusal(const Request& request) const;
  asio::awaitable<bool> Serve(const Request& request, std::shared_ptr<Job> job);
  asio::awaitable<bool> Generate(const Request& request, std::shared_ptr<Job> job);
  asio::awaitable<bool> StreamEvents(const Request& request);
  HttpReply Simple(const Request& request) const;

  asio::awaitable<bool> Write(const std::string& bytes);
  asio::awaitable<bool> Reply(const HttpReply& reply, const ReplyContext& context);
  asio::awaitable<void> Linger();
  asio::awaitable<bool> OnPool(std::function<void()> work);
  asio::awaitable<void> Watch();
  void StartWatch();
  asio::awaitable<void> StopWatch();

  asio::any_io_executor strand_;
  std::shared_ptr<ServerState> state_;
  const ServerOptions& options_;
  StreamSocket socket_;
  asio::steady_timer wake_;
  asio::steady_timer deadline_;
  beast::flat_buffer buffer_;
  std::shared_ptr<Generation> generation_;
  bool idle_ = true;   // between two requests
  bool gone_ = false;  // the client has closed, or a write failed
  bool watching_ = false;
  bool stop_watch_ = false;
};

asio::awaitable<bool> Connection::ReadHeader(Parser& parser, bool first) {
  if (buffer_.size() == 0) {
    idle_ = true;
    if (state_->phase != Phase::kServing) co_return false;
    SetDeadline(first ? options_.header_timeout_s : options_.keep_alive_timeout_s);
    auto [wait_error] = co_await socket_.async_wait(StreamSocket::wait_read, kTuple);
    if (wait_error) co_return false;
  }
  idle_ = false;
  SetDeadline(options_.header_timeout_s);
  parser.header_limit(static_cast<uint32_t>(options_.max_header_bytes));
  parser.body_limit(options_.max_body_bytes);
  auto [ec, bytes] = co_await http::async_read_header(socket_, buffer_, parser, kTuple);
  (void)bytes;
  ClearDeadline();
  if (!ec) co_return true;
  HttpReply reply;
  if (ec == http::error::body_limit) {
    reply = ErrorReply(413, fmt::format("The request body is larger than {} bytes.", options_.max_body_bytes));
  } else if (ec == http::error::header_limit || ec == http::error::buffer_overflow) {
    reply = ErrorReply(431, fmt::format("The request header is larger than {} bytes.", options_.max_header_bytes));
  } else if (ec.category() == make_error_code(http::error::bad_method).category() && ec != http::error::end_of_stream &&
             ec != http::error::partial_message) {
    reply = ErrorReply(400, "Not a valid HTTP request: " + ec.message());
  } else {
    co_return false;
  }
  ReplyContext context;
  context.keep_alive = false;
  const bool sent = co_await Reply(reply, context);
  if (sent) co_await Linger();
  co_return false;
}

Connection::Request Connection::Describe(const Parser& parser) const {
  const auto& header = parser.get();
  Request request;
  request.method = std::string(View(header.method_string()));
  request.match = MatchRoute(request.method, View(header.target()));
  request.request_id = std::string(View(header["X-Request-Id"]));
  request.authorization = std::string(View(header[http::field::authorization]));
  request.expects_continue = beast::iequals(header[http::field::expect], "100-continue");
  request.has_body = !parser.is_done();
  request.context.http_1_0 = header.version() < 11;
  request.context.keep_alive = header.keep_alive() && state_->phase == Phase::kServing;
  request.context.allow_origin = AllowedOrigin(options_.allowed_origins, View(header[http::field::origin]));
  request.context.retry_after_s = options_.retry_after_s;
  return request;
}

std::optional<HttpReply> Connection::Refusal(const Request& request) const {
  if (request.match.route == Route::kNone) return ErrorReply(404, "No such path here.");
  if (!request.match.allowed) {
    HttpReply reply = ErrorReply(405, fmt::format("This path takes {} only.", request.match.allow));
    reply.allow = request.match.allow;
    return reply;
  }
  if (request.match.needs_key && !options_.api_keys.empty() && !KeyAccepted(options_.api_keys, request.authorization)) {
    return ErrorReply(401, "Missing or wrong API key: send it as `Authorization: Bearer KEY`.");
  }
  if (request.match.needs_key && state_->phase != Phase::kServing)
    return ErrorReply(503, "The server is shutting down.");
  return std::nullopt;
}

asio::awaitable<bool> Connection::ReadBody(Parser& parser, BodyShare& share, HttpReply& refusal) {
  SetDeadline(options_.body_timeout_s);
  parser.eager(true);
  const int64_t announced = static_cast<int64_t>(parser.content_length().value_or(0));
  while (!parser.is_done()) {
    if (!share.Grow(std::max<int64_t>(announced, static_cast<int64_t>(parser.get().body().size())))) {
      refusal = ErrorReply(503, "Too many large requests are being received: try again later.");
      co_return false;
    }
    auto [ec, bytes] = co_await http::async_read_some(socket_, buffer_, parser, kTuple);
    (void)bytes;
    if (!ec) continue;
    if (ec == http::error::body_limit) {
      refusal = ErrorReply(413, fmt::format("The request body is larger than {} bytes.", options_.max_body_bytes));
    } else if (ec.category() == make_error_code(http::error::bad_method).category() &&
               ec != http::error::end_of_stream && ec != http::error::partial_message) {
      refusal = ErrorReply(400, "Not a valid HTTP request: " + ec.message());
    } else {
      refusal.status = 0;  // the client is gone or too slow: nobody to answer
    }
    co_return false;
  }
  ClearDeadline();
  co_return true;
}

asio::awaitable<void> Connection::Run() {
  for (bool first = true;; first = false) {
    Parser parser;
    const bool have_header = co_await ReadHeader(parser, first);
    if (!have_header) break;
    Request request = Describe(parser);

    if (request.method == "OPTIONS" && !request.has_body) {
      const std::string answer = PreflightResponse(request.context);
      const bool sent = co_await Write(answer);
      if (!sent || !request.context.keep_alive) break;
      continue;
    }
    std::optional<HttpReply> refusal = Refusal(request);
    auto job = std::make_shared<Job>();
    job->share = std::make_shared<BodyShare>(state_);
    if (!refusal && request.has_body) {
      if (request.expects_continue) {
        const std::string go_on = "HTTP/1.1 100 Continue\r\n\r\n";
        const bool sent = co_await Write(go_on);
        if (!sent) break;
      }
      HttpReply why;
      const bool have_body = co_await ReadBody(parser, *job->share, why);
      if (!have_body) refusal = std::move(why);
    }
    if (refusal) {
      if (refusal->status == 0) break;
      // What is left of the body is not read, so nothing can follow it.
      if (!parser.is_done()) request.context.keep_alive = false;
      const bool sent = co_await Reply(*refusal, request.context);
      if (!sent) break;
      if (!request.context.keep_alive) {
        co_await Linger();
        break;
      }
      continue;
    }
    job->route = request.match.route;
    job->request_id = request.request_id;
    job->body = std::move(parser.get().body());
    const bool go_on = co_await Serve(request, job);
    generation_.reset();
    if (!go_on || !request.context.keep_alive) break;
  }
  deadline_.cancel();
  error_code ignored;
  socket_.shutdown(StreamSocket::shutdown_both, ignored);
  socket_.close(ignored);
}

// Answers that need no work.
HttpReply Connection::Simple(const Request& request) const {
  HttpReply reply;
  switch (request.match.route) {
    case Route::kHealth:
    case Route::kPing: {
      const std::string failure = state_->engine.Failure();
      if (!failure.empty()) return ErrorReply(503, "The engine has failed: " + failure);
      reply.content_type.clear();
      break;
    }
    case Route::kVersion:
      reply.body = DumpJson(Json{{"version", options_.version}});
      break;
    case Route::kLoad:
      reply.body = DumpJson(Json{{"server_load", state_->running_requests.load()}});
      break;
    case Route::kMetrics:
      reply.content_type = "text/plain; version=0.0.4; charset=utf-8";
      reply.body = state_->service.Metrics();
      break;
    case Route::kModels:
      reply.body = state_->service.Models();
      break;
    case Route::kModel: {
      const Result<std::string> model = state_->service.Model(request.match.argument);
      if (!model) return ErrorReply(model.error());
      reply.body = *model;
      break;
    }
    default:
      return ErrorReply(500, "No handler for this path.");
  }
  return reply;
}

asio::awaitable<bool> Connection::Serve(const Request& request, std::shared_ptr<Job> job) {
  switch (job->route) {
    case Route::kCompletions:
    case Route::kChatCompletions: {
      const CountRequest counted(state_->running_requests);
      StartWatch();
      const bool ok = co_await Generate(request, job);
      generation_.reset();
      co_await StopWatch();
      co_return ok && !gone_;
    }
    case Route::kTokenize:
    case Route::kDetokenize: {
      StartWatch();
      std::function<void()> work = [state = state_, job] {
        const Result<std::string> answer =
            job->route == Route::kTokenize ? state->service.Tokenize(job->body) : state->service.Detokenize(job->body);
        if (answer) {
          job->reply.body = *answer;
        } else {
          job->reply = ErrorReply(answer.error());
        }
      };
      const bool done = co_await OnPool(work);
      bool ok = done;
      if (done) ok = co_await Reply(job->reply, request.context);
      co_await StopWatch();
      co_return ok && !gone_;
    }
    default: {
      const HttpReply reply = Simple(request);
      const bool sent = co_await Reply(reply, request.context);
      co_return sent;
    }
  }
}

asio::awaitable<bool> Connection::Generate(const Request& request, std::shared_ptr<Job> job) {
  // Called from the engine's thread: only posts. The weak pointer keeps a finished connection from living on in it.
  std::function<void()> notify = [weak = weak_from_this(), strand = strand_] {
    asio::post(strand, [weak] {
      if (const auto self = weak.lock()) self->Wake();
    });
  };
  std::function<void()> start = [state = state_, job, notify] {
    Result<std::shared_ptr<Generation>> generation =
        job->route == Route::kChatCompletions ? state->service.StartChat(job->body, job->request_id, notify)
                                              : state->service.StartCompletion(job->body, job->request_id, notify);
    job->body = std::string();
    job->share.reset();
    if (generation) {
      job->generation = std::move(*generation);
    } else {
      job->reply = ErrorReply(generation.error());
    }
  };
  const bool started = co_await OnPool(start);
  if (!started) co_return false;
  if (!job->generation) {
    const bool sent = co_await Reply(job->reply, request.context);
    co_return sent;
  }
  generation_ = std::move(job->generation);
  if (state_->phase == Phase::kAborting) generation_->Abort();
  if (generation_->call.request.stream) {
    const bool sent = co_await StreamEvents(request);
    co_return sent;
  }

  while (!gone_ && !generation_->mailbox->Ready()) co_await Wait();
  if (gone_) co_return false;
  job->outputs.resize(generation_->call.choices());
  for (auto& [choice, output] : generation_->mailbox->Take()) job->outputs[choice] = std::move(output);
  for (const RequestOutput& output : job->outputs) {
    if (output.finish_reason != FinishReason::kError) continue;
    const HttpReply failed = ErrorReply(Error(output.error, output.error_kind));
    const bool sent = co_await Reply(failed, request.context);
    co_return sent;
  }
  // The log-probabilities of a long prompt can make many megabytes of JSON.
  std::function<void()> write = [job, generation = generation_] {
    job->reply.body = generation->writer->Whole(job->outputs);
  };
  const bool written = co_await OnPool(write);
  if (!written) co_return false;
  const bool sent = co_await Reply(job->reply, request.context);
  co_return sent;
}

asio::awaitable<bool> Connection::StreamEvents(const Request& request) {
  HttpReply reply;
  reply.content_type = "text/event-stream; charset=utf-8";
  ReplyContext context = request.context;
  if (context.http_1_0) context.keep_alive = false;  // its end is the end of the connection
  std::string bytes = ResponseHead(reply, -1, context);
  bool alive = co_await Write(bytes);
  const Generation& generation = *generation_;
  const auto batch = std::make_shared<EventBatch>();
  for (bool last = false; alive && !last;) {
    while (!gone_ && !generation.mailbox->Ready()) co_await Wait();
    if (gone_) co_return false;
    batch->news = generation.mailbox->Take();
    batch->events.clear();
    if (batch->Large()) {
      std::function<void()> format = [batch, job_generation = generation_] { batch->Format(*job_generation); };
      const bool done = co_await OnPool(format);
      if (!done) co_return false;
    } else {
      batch->Format(generation);
    }
    last = batch->last;
    const std::string& events = batch->events;
    if (events.empty()) continue;
    if (context.http_1_0) {
      bytes = events;
    } else {
      bytes = fmt::format("{:x}\r\n", events.size());
      bytes += events;
      bytes += last ? "\r\n0\r\n\r\n" : "\r\n";
    }
    alive = co_await Write(bytes);
  }
  co_return alive&& context.keep_alive;
}

asio::awaitable<bool> Connection::Write(const std::string& bytes) {
  for (size_t begin = 0; begin < bytes.size() && !gone_; begin += kWriteBytes) {
    SetDeadline(options_.write_timeout_s);
    const asio::const_buffer piece(bytes.data() + begin, std::min(kWriteBytes, bytes.size() - begin));
    auto [ec, written] = co_await asio::async_write(socket_, piece, kTuple);
    (void)written;
    if (ec) gone_ = true;
  }
  ClearDeadline();
  co_return !gone_;
}

asio::awaitable<bool> Connection::Reply(const HttpReply& reply, const ReplyContext& context) {
  std::string bytes = ResponseHead(reply, static_cast<int64_t>(reply.body.size()), context);
  bytes += reply.body;
  const bool sent = co_await Write(bytes);
  co_return sent;
}

// Closing a socket with unread bytes resets the connection, and the client may lose the answer. So the rest of what it
// sends is thrown away for a moment.
asio::awaitable<void> Connection::Linger() {
  error_code ignored;
  socket_.shutdown(StreamSocket::shutdown_send, ignored);
  SetDeadline(kLingerSeconds);
  std::vector<char> scratch(64 << 10);
  for (;;) {
    const asio::mutable_buffer space(scratch.data(), scratch.size());
    auto [ec, bytes] = co_await socket_.async_read_some(space, kTuple);
    (void)bytes;
    if (ec) break;
  }
  ClearDeadline();
}

// Runs `work` on the text pool; false when the client left before it was done.
asio::awaitable<bool> Connection::OnPool(std::function<void()> work) {
  auto done = std::make_shared<bool>(false);  // used on the strand only
  auto failure = std::make_shared<std::string>();
  asio::post(state_->text_pool, [self = shared_from_this(), work = std::move(work), done, failure]() mutable {
    try {
      work();
    } catch (const std::exception& e) {
      *failure = e.what();
    }
    work = nullptr;  // its captures go on this thread, whatever they are
    asio::post(self->strand_, [self, done] {
      *done = true;
      self->Wake();
    });
  });
  while (!*done && !gone_) co_await Wait();
  if (*done && !failure->empty()) {
    spdlog::error("A request failed: {}", *failure);
    const HttpReply reply = ErrorReply(500, "Internal error.");
    ReplyContext context;
    context.keep_alive = false;
    co_await Reply(reply, context);
    gone_ = true;
    co_return false;
  }
  co_return *done;
}

// Reads while a request runs: that is how a client that leaves is noticed. What it sends meanwhile (the next request)
// stays in the buffer.
asio::awaitable<void> Connection::Watch() {
  while (!stop_watch_ && buffer_.size() < kMaxPipelinedBytes) {
    const asio::mutable_buffer space = buffer_.prepare(4096);
    auto [ec, bytes] = co_await socket_.async_read_some(space, kTuple);
    buffer_.commit(bytes);
    if (!ec) continue;
    if (!stop_watch_) gone_ = true;
    break;
  }
  watching_ = false;
  Wake();
}

void Connection::StartWatch() {
  watching_ = true;
  stop_watch_ = false;
  asio::co_spawn(
      strand_, [self = shared_from_this()] { return self->Watch(); },
      [self = shared_from_this()](std::exception_ptr) {});
}

asio::awaitable<void> Connection::StopWatch() {
  stop_watch_ = true;
  error_code ignored;
  socket_.cancel(ignored);
  while (watching_) co_await Wait();
}

}  // namespace

void StartConnection(StreamSocket socket, asio::any_io_executor strand, std::shared_ptr<ServerState> state) {
  auto connection = std::make_shared<Connection>(std::move(socket), strand, state);
  {
    const std::lock_guard lock(state->mutex);
    state->connections.insert(connection);
  }
  asio::co_spawn(
      strand, [connection] { return connection->Run(); },
      [connection, state](std::exception_ptr failure) {
        try {
          if (failure) std::rethrow_exception(failure);
        } catch (const std::exception& e) {
          spdlog::error("A connection ended with an error: {}", e.what());
        }
        const std::lock_guard lock(state->mutex);
        state->connections.erase(connection);
        if (state->connections.empty()) state->emptied.notify_all();
      });
}

}  // namespace weft
