#include "weft/server/server.h"

#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ip/v6_only.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <chrono>
#include <thread>

#include "weft/core/log.h"
#include "weft/server/connection.h"
#include "weft/server/http.h"

namespace weft {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;
using local = asio::local::stream_protocol;

constexpr auto kTuple = asio::as_tuple(asio::use_awaitable);

int TextThreads(const ServerOptions& options) {
  if (options.text_threads > 0) return options.text_threads;
  // Two at least, so that one long prompt does not hold up all the others.
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()) / 4, 2, 8);
}

std::string UrlHost(const asio::ip::address& address) {
  return address.is_v6() ? "[" + address.to_string() + "]" : address.to_string();
}

}  // namespace

class Server::Impl {
 public:
  Impl(ServerOptions options, Engine& engine, std::shared_ptr<const Tokenizer> tokenizer)
      : options_(Checked(std::move(options))),
        io_(options_.io_threads),
        state_(std::make_shared<ServerState>(options_, engine, std::move(tokenizer), TextThreads(options_))) {}

  ~Impl() { Stop(); }

  void Start() {
    if (started_) throw Error("The server has been started already.");
    started_ = true;
    if (options_.uds.empty()) {
      ListenTcp();
    } else {
      ListenLocal();
    }
    for (int i = 0; i < options_.io_threads; ++i) {
      threads_.emplace_back([this] { io_.run(); });
    }
  }

  void Run() {
    asio::signal_set signals(io_, SIGINT, SIGTERM);
    WaitForSignal(signals);
    Start();
    {
      std::unique_lock lock(stop_mutex_);
      stop_wanted_changed_.wait(lock, [this] { return stop_wanted_; });
    }
    Stop();
  }

  void Stop() {
    {
      const std::lock_guard lock(stop_mutex_);
      stop_wanted_ = true;
      if (stopped_) return;
      stopped_ = true;
    }
    stop_wanted_changed_.notify_all();
    if (started_) Drain();
    work_.reset();
    io_.stop();
    for (std::thread& thread : threads_) thread.join();
    // Jobs of the pool may still post to io_, which lives until the end of this object.
    state_->text_pool.join();
    // Connections that even closing could not end within its time: their coroutines go with io_.
    const std::lock_guard lock(state_->mutex);
    state_->connections.clear();
    if (!options_.uds.empty() && started_) ::unlink(options_.uds.c_str());
  }

  uint16_t port() const { return port_; }

 private:
  static ServerOptions Checked(ServerOptions options) {
    if (options.served_model_names.empty()) Throw("served_model_names is empty: a server needs at least one name");
    for (const std::string& key : options.api_keys) {
      if (key.empty()) Throw("--api-key must not be empty");
    }
    if (options.io_threads < 1) Throw("io_threads must be at least 1, got {}", options.io_threads);
    if (options.max_connections < 1) Throw("max_connections must be at least 1, got {}", options.max_connections);
    return options;
  }

  void ListenTcp() {
    error_code ec;
    tcp::resolver resolver(io_);
    const auto found = resolver.resolve(options_.host, std::to_string(options_.port), tcp::resolver::passive, ec);
    if (ec) Throw("--host {}: {}", options_.host, ec.message());
    bool loopback = true;
    std::vector<tcp::endpoint> endpoints;
    for (const auto& entry : found) {
      if (std::find(endpoints.begin(), endpoints.end(), entry.endpoint()) == endpoints.end()) {
        endpoints.push_back(entry.endpoint());
      }
    }
    std::string first_error;
    std::vector<tcp::acceptor> acceptors;
    for (tcp::endpoint endpoint : endpoints) {
      if (port_ != 0) endpoint.port(port_);  // all addresses of a name get the port that the first one got
      tcp::acceptor acceptor(io_);
      acceptor.open(endpoint.protocol(), ec);
      if (!ec) acceptor.set_option(tcp::acceptor::reuse_address(true), ec);
      if (!ec && endpoint.address().is_v6()) acceptor.set_option(asio::ip::v6_only(true), ec);
      if (!ec) acceptor.bind(endpoint, ec);
      if (!ec) acceptor.listen(asio::socket_base::max_listen_connections, ec);
      if (ec) {
        if (first_error.empty()) {
          first_error = fmt::format("{}:{}: {}", UrlHost(endpoint.address()), endpoint.port(), ec.message());
        }
        continue;
      }
      port_ = acceptor.local_endpoint().port();
      loopback &= endpoint.address().is_loopback();
      // Read by scripts that start a server on any free port.
      spdlog::info("Listening on http://{}:{}", UrlHost(endpoint.address()), port_);
      acceptors.push_back(std::move(acceptor));
    }
    if (acceptors.empty()) Throw("Cannot listen on {}", first_error);
    if (!loopback && options_.api_keys.empty()) {
      spdlog::warn("The server is open to the network at {} without --api-key: everybody who reaches it can use it",
                   options_.host);
    }
    for (tcp::acceptor& acceptor : acceptors) Spawn(std::move(acceptor));
  }

  void ListenLocal() {
    struct stat info {};
    // A socket that a killed server left behind is in the way of bind; anything else there is not ours to remove.
    if (::stat(options_.uds.c_str(), &info) == 0 && S_ISSOCK(info.st_mode)) ::unlink(options_.uds.c_str());
    error_code ec;
    local::acceptor acceptor(io_);
    if (options_.uds.size() >= sizeof(sockaddr_un{}.sun_path)) Throw("--uds {}: the path is too long", options_.uds);
    const local::endpoint endpoint(options_.uds);
    acceptor.open(endpoint.protocol(), ec);
    if (!ec) acceptor.bind(endpoint, ec);
    if (!ec) acceptor.listen(asio::socket_base::max_listen_connections, ec);
    if (ec) Throw("--uds {}: {}", options_.uds, ec.message());
    spdlog::info("Listening on unix:{}", options_.uds);
    Spawn(std::move(acceptor));
  }

  template <typename Acceptor>
  void Spawn(Acceptor acceptor) {
    auto shared = std::make_shared<Acceptor>(std::move(acceptor));
    close_acceptors_.push_back([this, shared] {
      asio::post(io_, [shared] {
        error_code ignored;
        shared->close(ignored);
      });
    });
    asio::co_spawn(
        io_, [this, shared] { return Accept(shared); }, [](std::exception_ptr) {});
  }

  template <typename Acceptor>
  asio::awaitable<void> Accept(std::shared_ptr<Acceptor> acceptor) {
    using Socket = typename Acceptor::protocol_type::socket;
    while (acceptor->is_open()) {
      asio::any_io_executor strand = asio::make_strand(io_);
      Socket socket(strand);
      auto [ec] = co_await acceptor->async_accept(socket, kTuple);
      if (ec) {
        if (!acceptor->is_open() || ec == asio::error::operation_aborted) co_return;
        // Out of file descriptors, most likely: wait for some to come free instead of spinning.
        spdlog::warn("accept: {}", ec.message());
        asio::steady_timer pause(io_, std::chrono::milliseconds(100));
        auto waited = co_await pause.async_wait(kTuple);
        (void)waited;
        continue;
      }
      if constexpr (std::is_same_v<Socket, tcp::socket>) {
        error_code ignored;
        socket.set_option(tcp::no_delay(true), ignored);
      }
      if (ConnectionCount() >= options_.max_connections) {
        TurnAway(socket);
        continue;
      }
      StreamSocket stream(std::move(socket));
      StartConnection(std::move(stream), strand, state_);
    }
  }

  int ConnectionCount() {
    const std::lock_guard lock(state_->mutex);
    return static_cast<int>(state_->connections.size());
  }

  // Says so in one go and closes: no state is kept for clients above the limit.
  template <typename Socket>
  void TurnAway(Socket& socket) {
    const HttpReply reply = ErrorReply(503, "Too many connections: try again later.");
    ReplyContext context;
    context.keep_alive = false;
    context.retry_after_s = options_.retry_after_s;
    const std::string bytes = ResponseHead(reply, static_cast<int64_t>(reply.body.size()), context) + reply.body;
    error_code ignored;
    socket.non_blocking(true, ignored);
    socket.write_some(asio::buffer(bytes), ignored);
    socket.shutdown(Socket::shutdown_send, ignored);
    // Closing with unread bytes resets the connection before the client has read the answer.
    std::array<char, 4096> scratch;
    socket.read_some(asio::buffer(scratch), ignored);
    socket.close(ignored);
  }

  void PokeAll() {
    const std::lock_guard lock(state_->mutex);
    for (const auto& connection : state_->connections) connection->Poke();
  }

  // Waits until all connections have ended, at most so long. A second signal ends the wait.
  bool WaitEmpty(double seconds) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    std::unique_lock lock(state_->mutex);
    while (!state_->connections.empty()) {
      const auto now = std::chrono::steady_clock::now();
      if (now >= end || (hurry_ && state_->phase == Phase::kDraining)) return false;
      state_->emptied.wait_for(lock,
                               std::min<std::chrono::duration<double>>(end - now, std::chrono::milliseconds(200)));
    }
    return true;
  }

  void Drain() {
    state_->phase = Phase::kDraining;
    for (const auto& close : close_acceptors_) close();
    PokeAll();
    const int running = state_->running_requests;
    if (running > 0) {
      spdlog::info("Stopping: {} requests are still running, waiting for up to {} s", running,
                   options_.shutdown_timeout_s);
    }
    if (WaitEmpty(options_.shutdown_timeout_s)) return;
    spdlog::warn("Stopping: aborting {} requests", state_->running_requests.load());
    state_->phase = Phase::kAborting;
    PokeAll();
    if (WaitEmpty(2)) return;
    state_->phase = Phase::kClosing;
    PokeAll();
    WaitEmpty(2);
  }

  void WaitForSignal(asio::signal_set& signals) {
    signals.async_wait([this, &signals](error_code ec, int signal) {
      if (ec) return;
      {
        const std::lock_guard lock(stop_mutex_);
        if (stop_wanted_) hurry_ = true;
        stop_wanted_ = true;
      }
      spdlog::info("Signal {}: stopping", signal);
      stop_wanted_changed_.notify_all();
      WaitForSignal(signals);
    });
  }

  const ServerOptions options_;
  asio::io_context io_;
  asio::executor_work_guard<asio::io_context::executor_type> work_{io_.get_executor()};
  std::shared_ptr<ServerState> state_;
  std::vector<std::function<void()>> close_acceptors_;
  std::vector<std::thread> threads_;
  uint16_t port_ = 0;
  bool started_ = false;

  std::mutex stop_mutex_;
  std::condition_variable stop_wanted_changed_;
  bool stop_wanted_ = false;
  bool stopped_ = false;
  std::atomic<bool> hurry_{false};
};

Server::Server(ServerOptions options, Engine& engine, std::shared_ptr<const Tokenizer> tokenizer)
    : impl_(std::make_unique<Impl>(std::move(options), engine, std::move(tokenizer))) {}
Server::~Server() = default;
void Server::Start() { impl_->Start(); }
void Server::Run() { impl_->Run(); }
void Server::Stop() { impl_->Stop(); }
uint16_t Server::port() const { return impl_->port(); }

}  // namespace weft
