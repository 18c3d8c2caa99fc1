#pragma once
// Data parallelism: several replicas of a model behind one engine, each with its own scheduler and KV cache.

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "weft/engine/engine.h"
#include "weft/engine/llm_engine.h"

namespace weft {

// The replica that a request should go to, an index into `prospects` (at least one).
//
// The replica with the longest cached prefix, unless it is overloaded; the least loaded one where prefixes are equal,
// and where loads are, too, the first one from `turn` on. What a replica has to do before and besides a new request is
// counted in tokens: those that its requests, waiting or running, have not computed yet, and kRequestTokens for each
// request, since its decoding takes a share of every later step. A replica is overloaded for a request if another one
// has less of it by more than the prefix spares here: it would be quicker there to compute the prefix anew.
// A replica where the request had to wait for others to end (no place, no free blocks) is overloaded, too, while there
// is one where it had not.
size_t ChooseReplica(std::span<const SchedulerProspect> prospects, size_t turn);

// A running request costs the others what so many tokens of prompt do. A few hundred tokens of common prefix (a system
// prompt) must not gather all requests on one replica, while a conversation of thousands stays where its KV is.
inline constexpr int64_t kRequestTokens = 256;

// A failed replica is a failure of the whole: what runs on the others goes on, nothing new is taken.
class DataParallelEngine : public Engine {
 public:
  // At least one replica; all alike.
  explicit DataParallelEngine(std::vector<std::unique_ptr<LLMEngine>> replicas);
  // Aborts what still runs. Not from a sink.
  ~DataParallelEngine() override;

  // May be called from sinks, too; so may Abort.
  Result<void> Add(EngineRequest request, OutputSink sink) override;
  void Abort(const std::string& id) override;
  // Sums; the KV cache's usage is the replicas' mean, kv_tokens_per_shard has the shards of all, replica by replica.
  EngineStats Stats() const override;
  std::vector<EngineStats> StatsByReplica() const override;
  std::string Failure() const override;
  void Shutdown(double timeout_s) override;

  int64_t max_model_len() const override { return replicas_.front()->max_model_len(); }
  int64_t vocab_size() const override { return replicas_.front()->vocab_size(); }

 private:
  std::vector<std::unique_ptr<LLMEngine>> replicas_;
  // Requests are added one at a time, so that each one's choice knows of the one before.
  std::mutex routing_;
  size_t turn_ = 0;  // under routing_
};

// `from` added to `to`, histograms bucket by bucket. kv_cache_usage is left as it is, shards are appended.
void AddStats(const EngineStats& from, EngineStats& to);

}  // namespace weft
