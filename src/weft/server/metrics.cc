#include "weft/server/metrics.h"

#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <limits>
#include <map>
#include <sstream>
#include <utility>
#include <vector>

#include "weft/core/function_ref.h"

namespace weft {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;
using Labels = std::vector<ClientMetric::Label>;

// Every family has the lines of all replicas, one after another.
class Families {
 public:
  Families(std::span<const EngineStats> replicas, const std::string& model_name)
      : replicas_(replicas), model_name_(model_name) {}

  void Gauge(const char* name, const char* help, FunctionRef<double(const EngineStats&)> value) {
    Begin(name, help, MetricType::Gauge);
    for (size_t i = 0; i < replicas_.size(); ++i) Line(i).gauge.value = value(replicas_[i]);
  }
  void Counter(const char* name, const char* help, uint64_t EngineStats::*value) {
    Begin(name, help, MetricType::Counter);
    for (size_t i = 0; i < replicas_.size(); ++i) Line(i).counter.value = static_cast<double>(replicas_[i].*value);
  }
  void Distribution(const char* name, const char* help, Histogram EngineStats::*histogram) {
    Begin(name, help, MetricType::Histogram);
    for (size_t i = 0; i < replicas_.size(); ++i) Fill(replicas_[i].*histogram, Line(i).histogram);
  }
  void FinishedRequests(const char* name, const char* help) {
    Begin(name, help, MetricType::Counter);
    for (size_t i = 0; i < replicas_.size(); ++i) {
      // All reasons from the start, so that rates have a zero to begin with.
      std::map<std::string, uint64_t> finished = {{"stop", 0}, {"length", 0}, {"abort", 0}, {"error", 0}};
      for (const auto& [reason, count] : replicas_[i].request_success) finished[reason] = count;
      for (const auto& [reason, count] : finished) {
        Line(i, {{"finished_reason", reason}}).counter.value = static_cast<double>(count);
      }
    }
  }
  void KvTokens(const char* name, const char* help) {
    Begin(name, help, MetricType::Gauge);
    for (size_t i = 0; i < replicas_.size(); ++i) {
      const std::vector<int64_t>& tokens = replicas_[i].kv_tokens_per_shard;
      for (size_t shard = 0; shard < tokens.size(); ++shard) {
        Line(i, {{"shard", std::to_string(shard)}}).gauge.value = static_cast<double>(tokens[shard]);
      }
    }
  }

  // No lines for a model without experts.
  void ExpertTokens(const char* name, const char* help) {
    if (std::ranges::all_of(replicas_, [](const EngineStats& s) { return s.expert_tokens.empty(); })) return;
    Begin(name, help, MetricType::Counter);
    for (size_t i = 0; i < replicas_.size(); ++i) {
      const std::vector<int64_t>& tokens = replicas_[i].expert_tokens;
      for (size_t expert = 0; expert < tokens.size(); ++expert) {
        Line(i, {{"expert", std::to_string(expert)}}).counter.value = static_cast<double>(tokens[expert]);
      }
    }
  }

  // One line for each value of a label.
  void ContextCounters(const char* name, const char* help, const char* label,
                       const std::vector<std::pair<const char*, uint64_t ContextCounts::*>>& values) {
    Begin(name, help, MetricType::Counter);
    for (size_t i = 0; i < replicas_.size(); ++i) {
      for (const auto& [value, member] : values) {
        Line(i, {{label, value}}).counter.value = static_cast<double>(replicas_[i].context.*member);
      }
    }
  }

  std::string Text() const {
    std::ostringstream out;
    prometheus::TextSerializer().Serialize(out, families_);
    return std::move(out).str();
  }

 private:
  void Begin(const char* name, const char* help, MetricType type) {
    MetricFamily& family = families_.emplace_back();
    family.name = name;
    family.help = help;
    family.type = type;
  }
  // Another line of the family begun last.
  ClientMetric& Line(size_t replica, Labels labels = {}) {
    ClientMetric& metric = families_.back().metric.emplace_back();
    metric.label = {{"model_name", model_name_}, {"engine", std::to_string(replica)}};
    metric.label.insert(metric.label.end(), labels.begin(), labels.end());
    return metric;
  }
  static void Fill(const Histogram& histogram, ClientMetric::Histogram& out) {
    uint64_t cumulative = 0;
    for (size_t i = 0; i < histogram.bounds.size(); ++i) {
      cumulative += i < histogram.counts.size() ? histogram.counts[i] : 0;
      out.bucket.push_back({cumulative, histogram.bounds[i]});
    }
    if (histogram.counts.size() > histogram.bounds.size()) cumulative += histogram.counts[histogram.bounds.size()];
    out.bucket.push_back({cumulative, std::numeric_limits<double>::infinity()});
    out.sample_count = cumulative;
    out.sample_sum = histogram.sum;
  }

  const std::span<const EngineStats> replicas_;
  const std::string& model_name_;
  std::vector<MetricFamily> families_;
};

}  // namespace

std::string MetricsText(std::span<const EngineStats> replicas, const std::string& model_name) {
  Families out(replicas, model_name);
  out.Gauge("vllm:num_requests_running", "Number of requests in model execution batches.",
            [](const EngineStats& s) { return static_cast<double>(s.num_requests_running); });
  out.Gauge("vllm:num_requests_waiting", "Number of requests waiting to be processed.",
            [](const EngineStats& s) { return static_cast<double>(s.num_requests_waiting); });
  out.Gauge("vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.",
            [](const EngineStats& s) { return s.kv_cache_usage; });
  out.Counter("vllm:prefix_cache_queries_total", "Prefix cache queries, in number of queried tokens.",
              &EngineStats::prefix_cache_queries);
  out.Counter("vllm:prefix_cache_hits_total", "Prefix cache hits, in number of cached tokens.",
              &EngineStats::prefix_cache_hits);
  out.Counter("vllm:num_preemptions_total", "Cumulative number of preemptions.", &EngineStats::num_preemptions);
  out.Counter("vllm:prompt_tokens_total", "Number of prefill tokens processed.", &EngineStats::prompt_tokens);
  out.Counter("vllm:generation_tokens_total", "Number of generation tokens processed.",
              &EngineStats::generation_tokens);
  out.FinishedRequests("vllm:request_success_total", "Count of successfully processed requests.");
  out.Distribution("vllm:time_to_first_token_seconds", "Histogram of time to first token in seconds.",
                   &EngineStats::time_to_first_token_seconds);
  out.Distribution("vllm:inter_token_latency_seconds", "Histogram of inter-token latency in seconds.",
                   &EngineStats::inter_token_latency_seconds);
  out.Distribution("vllm:e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.",
                   &EngineStats::e2e_request_latency_seconds);
  out.Distribution("vllm:request_queue_time_seconds", "Histogram of time spent in WAITING phase for request.",
                   &EngineStats::request_queue_time_seconds);
  out.Distribution("vllm:request_prefill_time_seconds", "Histogram of time spent in PREFILL phase for request.",
                   &EngineStats::request_prefill_time_seconds);
  out.Distribution("vllm:request_decode_time_seconds", "Histogram of time spent in DECODE phase for request.",
                   &EngineStats::request_decode_time_seconds);
  out.KvTokens("weft:cp_kv_tokens", "KV tokens that a shard of the context holds.");
  out.ContextCounters("weft:cp_steps_total",
                      "Steps, and those of them that PCP rank 0 ran alone with the threads of all.", "by",
                      {{"all", &ContextCounts::steps}, {"rank_0", &ContextCounts::solo_steps}});
  out.ContextCounters("weft:cp_prefill_chunks_total",
                      "Chunks of prompts: cut over the PCP ranks, or run whole on one of them.", "dealt",
                      {{"cut", &ContextCounts::cut_prefills}, {"whole", &ContextCounts::whole_prefills}});
  out.ContextCounters("weft:cp_query_tokens_total",
                      "Query tokens, by how they met the keys of other shards (see --cp-context-exchange).", "exchange",
                      {{"gather_q", &ContextCounts::gather_q_tokens}, {"gather_kv", &ContextCounts::gather_kv_tokens}});
  out.ContextCounters("weft:cp_exchanged_bytes_total",
                      "Bytes that attention gave to other ranks in messages; nothing where memory is shared.", "part",
                      {{"attention", &ContextCounts::exchanged_bytes}});
  out.ExpertTokens("weft:expert_tokens_total",
                   "Tokens that the ranks of this engine have run through an expert, once for each layer.");
  return out.Text();
}

}  // namespace weft
