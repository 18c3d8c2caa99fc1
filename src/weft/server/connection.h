#pragma once
// One client connection.

#include <atomic>
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/generic/stream_protocol.hpp>
#include <boost/asio/thread_pool.hpp>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <set>

#include "weft/server/service.h"

namespace weft {

// How far Stop() has come. Connections look at it between steps and are poked when it changes.
enum class Phase : int {
  kServing,
  kDraining,  // no new requests; connections between two requests are closed
  kAborting,  // the engine is told to end what still runs
  kClosing,   // sockets are closed
};

class ConnectionHandle {
 public:
  virtual ~ConnectionHandle() = default;
  // Makes the connection look at the phase. Thread-safe.
  virtual void Poke() = 0;
};

// What all connections share.
struct ServerState {
  ServerState(const ServerOptions& server_options, Engine& server_engine, std::shared_ptr<const Tokenizer> tokenizer,
              int text_threads)
      : options(server_options),
        engine(server_engine),
        service(options, engine, std::move(tokenizer)),
        text_pool(text_threads) {}

  const ServerOptions& options;
  Engine& engine;
  Service service;
  boost::asio::thread_pool text_pool;  // parsing, tokenizing, large answers

  std::atomic<Phase> phase{Phase::kServing};
  std::atomic<int> running_requests{0};  // for /load
  std::atomic<int64_t> buffered_body_bytes{0};

  // The live connections; `emptied` is signalled when there are none.
  std::mutex mutex;
  std::condition_variable emptied;
  std::set<std::shared_ptr<ConnectionHandle>> connections;
};

using StreamSocket = boost::asio::generic::stream_protocol::socket;

// Serves the connection until it ends. `socket` must run on a strand of its own, `strand`.
void StartConnection(StreamSocket socket, boost::asio::any_io_executor strand, std::shared_ptr<ServerState> state);

}  // namespace weft
