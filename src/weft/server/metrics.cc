#include "weft/server/metrics.h"

#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>

#include <limits>
#include <sstream>
#include <utility>
#include <vector>

namespace weft {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;
using Labels = std::vector<ClientMetric::Label>;

class Families {
 public:
  explicit Families(const std::string& model_name) : base_{{"model_name", model_name}, {"engine", "0"}} {}

  void Gauge(const char* name, const char* help, double value) {
    Add(name, help, MetricType::Gauge).gauge.value = value;
  }
  void Counter(const char* name, const char* help, uint64_t value) {
    Add(name, help, MetricType::Counter).counter.value = static_cast<double>(value);
  }
  // Another line of the family, with one more label.
  ClientMetric& Labelled(const char* name, const char* help, MetricType type, const char* label,
                         const std::string& value) {
    ClientMetric& metric = Add(name, help, type);
    metric.label.push_back({label, value});
    return metric;
  }
  void Distribution(const char* name, const char* help, const Histogram& histogram) {
    ClientMetric::Histogram& out = Add(name, help, MetricType::Histogram).histogram;
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

  std::string Text() const {
    std::ostringstream out;
    prometheus::TextSerializer().Serialize(out, families_);
    return std::move(out).str();
  }

 private:
  ClientMetric& Add(const char* name, const char* help, MetricType type) {
    if (families_.empty() || families_.back().name != name) {
      MetricFamily family;
      family.name = name;
      family.help = help;
      family.type = type;
      families_.push_back(std::move(family));
    }
    ClientMetric metric;
    metric.label = base_;
    families_.back().metric.push_back(std::move(metric));
    return families_.back().metric.back();
  }

  const Labels base_;
  std::vector<MetricFamily> families_;
};

}  // namespace

std::string MetricsText(const EngineStats& stats, const std::string& model_name) {
  Families out(model_name);
  out.Gauge("vllm:num_requests_running", "Number of requests in model execution batches.",
            static_cast<double>(stats.num_requests_running));
  out.Gauge("vllm:num_requests_waiting", "Number of requests waiting to be processed.",
            static_cast<double>(stats.num_requests_waiting));
  out.Gauge("vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", stats.kv_cache_usage);
  out.Counter("vllm:prefix_cache_queries_total", "Prefix cache queries, in number of queried tokens.",
              stats.prefix_cache_queries);
  out.Counter("vllm:prefix_cache_hits_total", "Prefix cache hits, in number of cached tokens.",
              stats.prefix_cache_hits);
  out.Counter("vllm:num_preemptions_total", "Cumulative number of preemptions.", stats.num_preemptions);
  out.Counter("vllm:prompt_tokens_total", "Number of prefill tokens processed.", stats.prompt_tokens);
  out.Counter("vllm:generation_tokens_total", "Number of generation tokens processed.", stats.generation_tokens);
  // All reasons from the start, so that rates have a zero to begin with.
  std::map<std::string, uint64_t> finished = {{"stop", 0}, {"length", 0}, {"abort", 0}, {"error", 0}};
  for (const auto& [reason, count] : stats.request_success) finished[reason] = count;
  for (const auto& [reason, count] : finished) {
    out.Labelled("vllm:request_success_total", "Count of successfully processed requests.", MetricType::Counter,
                 "finished_reason", reason)
        .counter.value = static_cast<double>(count);
  }
  out.Distribution("vllm:time_to_first_token_seconds", "Histogram of time to first token in seconds.",
                   stats.time_to_first_token_seconds);
  out.Distribution("vllm:inter_token_latency_seconds", "Histogram of inter-token latency in seconds.",
                   stats.inter_token_latency_seconds);
  out.Distribution("vllm:e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.",
                   stats.e2e_request_latency_seconds);
  out.Distribution("vllm:request_queue_time_seconds", "Histogram of time spent in WAITING phase for request.",
                   stats.request_queue_time_seconds);
  out.Distribution("vllm:request_prefill_time_seconds", "Histogram of time spent in PREFILL phase for request.",
                   stats.request_prefill_time_seconds);
  out.Distribution("vllm:request_decode_time_seconds", "Histogram of time spent in DECODE phase for request.",
                   stats.request_decode_time_seconds);
  for (size_t shard = 0; shard < stats.kv_tokens_per_shard.size(); ++shard) {
    out.Labelled("weft:cp_kv_tokens", "KV tokens that a shard of the context holds.", MetricType::Gauge, "shard",
                 std::to_string(shard))
        .gauge.value = static_cast<double>(stats.kv_tokens_per_shard[shard]);
  }
  return out.Text();
}

}  // namespace weft
