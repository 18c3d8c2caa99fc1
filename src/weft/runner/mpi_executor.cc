#include "weft/runner/mpi_executor.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <iterator>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "weft/core/error.h"
#include "weft/core/log.h"
#include "weft/core/thread_pool.h"
#include "weft/runner/joint_steps.h"
#include "weft/runner/plan_codec.h"
#include "weft/runner/rank_host.h"

namespace weft {
namespace {

using Clock = Processes::Clock;

// What a message of process 0 begins with.
enum class Kind : unsigned char { kStep, kPing, kStop };

// While there are no steps, process 0 asks the others so often whether they are there.
constexpr auto kPingInterval = std::chrono::seconds(2);
// And so often it looks for bad news, which come without asking where MPI reports deaths.
constexpr auto kLookInterval = std::chrono::milliseconds(100);

std::vector<std::byte> Message(Kind kind, std::span<const std::byte> content = {}) {
  std::vector<std::byte> message(1 + content.size());
  message[0] = static_cast<std::byte>(kind);
  if (!content.empty()) std::memcpy(message.data() + 1, content.data(), content.size());
  return message;
}

// What must be the same in all processes, in words.
std::string Fingerprint(const ExecutorOptions& o, const ModelConfig& c) {
  const cp::ParallelConfig& p = o.parallel;
  return fmt::format(
      "ranks: DP {} TP {} PCP {} DCP {} EP {}; block of {} tokens, interleave {}, PCP KV layout {}; {} blocks of {}; "
      "weights "
      "{}, kernels {}; exchange {}, cut from {}, segment {}; longest {}; seed {}; step limit {} s; model {} with {} "
      "layers, hidden {}, heads {}/{}, vocabulary {}",
      p.data_parallel, p.tensor_parallel, p.prefill_context_parallel, p.decode_context_parallel, p.expert_parallel,
      p.block_tokens, p.kv_interleave, static_cast<int>(p.pcp_kv_layout), o.num_blocks, NameOf(o.kv_dtype),
      NameOf(o.dtype), o.kernels, static_cast<int>(o.exchange), o.pcp_min_tokens, o.context_segment_tokens,
      o.max_model_len, o.seed, o.step_timeout_s, c.architecture, c.num_layers, c.hidden_size, c.num_heads,
      c.num_kv_heads, c.vocab_size);
}

std::vector<std::string> AllGatherText(Processes& processes, const std::string& mine) {
  std::vector<std::string> all;
  for (const auto& bytes : processes.AllGather(std::as_bytes(std::span(mine)))) {
    all.emplace_back(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }
  return all;
}

// This process' ranks, made together with those of the others.
std::unique_ptr<RankHost> MakeHost(const ExecutorOptions& given, std::shared_ptr<const Checkpoint> checkpoint,
                                   Processes& processes) {
  try {
    WEFT_CHECK(given.num_blocks > 0, "the processes have to agree on a number of blocks");
    ExecutorOptions options = given;
    options.progress = given.progress && processes.rank() == 0;
    ValidateLayout(options.parallel, checkpoint->config());
    const std::string mine = Fingerprint(options, checkpoint->config());
    const std::vector<std::string> all = AllGatherText(processes, mine);
    for (int p = 1; p < processes.size(); ++p) {
      if (all[static_cast<size_t>(p)] == all[0]) continue;
      Throw(
          "process {} ({}) was started with other options or another model than process 0:\n  process 0: {}\n  "
          "process {}: {}",
          p, processes.hosts()[static_cast<size_t>(p)], all[0], p, all[static_cast<size_t>(p)]);
    }
    const std::vector<int> cpus = OwnCpus(processes);
    auto host = std::make_unique<RankHost>(
        options, std::move(checkpoint), MakeProcessGroups(options.parallel, processes), cpus,
        [&processes](const std::string& why) { processes.Fail(fmt::format("process {}: {}", processes.rank(), why)); });
    processes.AllGather({});  // all are ready
    return host;
  } catch (...) {
    processes.Fail(fmt::format("process {}: {}", processes.rank(), DescribeException(std::current_exception())));
    throw;
  }
}

// Pending and later waits end at the time limit of a step that begins now; without one again when it goes.
class StepDeadline {
 public:
  StepDeadline(Processes& processes, double limit_s) : processes_(processes) {
    const auto limit = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(limit_s));
    processes.SetDeadline(Clock::now() + limit, limit_s);
  }
  ~StepDeadline() { processes_.SetDeadline(std::nullopt, 0); }

 private:
  Processes& processes_;
};

class MpiExecutor : public JointExecutor {
 public:
  MpiExecutor(const ExecutorOptions& options, std::shared_ptr<const Checkpoint> checkpoint,
              std::shared_ptr<Processes> processes)
      : processes_(std::move(processes)),
        limit_s_(options.step_timeout_s),
        host_(MakeHost(options, std::move(checkpoint), *processes_)),
        expert_loads_(static_cast<size_t>(processes_->size())),
        last_heard_(Clock::now()) {
    if (!processes_->reports_deaths()) {
      spdlog::warn(
          "MPI does not report deaths: when a process dies, mpirun ends all others at once (start it as "
          "`mpirun --with-ft ulfm` to have requests end with an error instead)");
    }
    watch_ = std::thread([this] { Watch(); });
  }

  ~MpiExecutor() override {
    {
      const std::lock_guard lock(watch_mutex_);
      stopping_ = true;
      wake_.notify_one();
    }
    watch_.join();
    if (!processes_->Failure().empty()) return;
    try {
      const StepDeadline deadline(*processes_, limit_s_);
      for (int p = 1; p < processes_->size(); ++p) processes_->Send(p, Message(Kind::kStop));
    } catch (const std::exception& e) {
      spdlog::error("the other processes could not be told to stop: {}", e.what());
    }
  }

  std::vector<StepOutput> Execute(std::span<const StepPlan* const> plans) override {
    const std::lock_guard lock(mutex_);
    step_began_ = Clock::now().time_since_epoch().count();
    try {
      const StepDeadline deadline(*processes_, limit_s_);
      const std::vector<std::byte> message = Message(Kind::kStep, EncodePlans(plans));
      for (int p = 1; p < processes_->size(); ++p) processes_->Send(p, message);
      RankHost::Outputs found = host_->Step(plans);
      for (int p = 1; p < processes_->size(); ++p) {
        ProcessOutputs theirs = DecodeOutputs(processes_->Receive(p));
        WEFT_CHECK(theirs.ranks.size() == found.size());
        for (size_t i = 0; i < found.size(); ++i) std::ranges::move(theirs.ranks[i], std::back_inserter(found[i]));
        const std::lock_guard load_lock(load_mutex_);
        expert_loads_[static_cast<size_t>(p)] = std::move(theirs.expert_loads);
      }
      std::vector<StepOutput> outputs(plans.size());
      for (size_t i = 0; i < plans.size(); ++i) {
        if (plans[i] != nullptr) outputs[i] = MergeOutputs(*plans[i], std::move(found[i]));
      }
      last_heard_ = Clock::now();
      step_began_ = 0;
      return outputs;
    } catch (...) {
      step_began_ = 0;
      processes_->Fail(fmt::format("process 0: {}", DescribeException(std::current_exception())));
      throw Error(processes_->Failure(), ErrorKind::kInternal);  // the first reason, which may be another
    }
  }

  int64_t num_blocks() const override { return host_->num_blocks(); }

  // Its bytes are those of this process's ranks.
  ContextCounts Context(size_t replica) const override { return host_->Context(replica); }

  std::vector<int64_t> ExpertLoad(size_t replica) const override {
    std::vector<int64_t> sum = host_->ExpertLoad(replica);
    const std::lock_guard lock(load_mutex_);
    for (const auto& process : expert_loads_) {
      if (process.empty()) continue;  // this one, or nothing has been heard yet
      for (size_t e = 0; e < sum.size(); ++e) sum[e] += process[replica].at(e);
    }
    return sum;
  }

  void SetFailureListener(std::function<void(const std::string&)> listener) override {
    const std::lock_guard lock(watch_mutex_);
    listener_ = std::move(listener);
  }

 private:
  // Between the steps: looks for bad news, asks whether all are there.
  void Watch() {
    while (true) {
      {
        std::unique_lock lock(watch_mutex_);
        if (wake_.wait_for(lock, kLookInterval, [&] { return stopping_; })) return;
      }
      std::string failure;
      if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
        failure = processes_->Failure();
        if (failure.empty() && Clock::now() - last_heard_ > kPingInterval) failure = Ping();
      } else if (const int64_t began = step_began_; began != 0) {
        // A step finds out by itself when others do not answer. When a rank of this process hangs nobody asks.
        const auto running = Clock::now() - Clock::time_point(Clock::duration(began));
        if (running > std::chrono::duration<double>(limit_s_) + kPingInterval) {
          failure = fmt::format("process 0 has not ended a step within {} s (--step-timeout)", limit_s_);
          processes_->Fail(failure);
        }
      }
      if (failure.empty()) continue;
      const std::lock_guard lock(watch_mutex_);
      if (listener_) listener_(failure);
      return;
    }
  }

  std::string Ping() {
    try {
      const StepDeadline deadline(*processes_, limit_s_);
      for (int p = 1; p < processes_->size(); ++p) processes_->Send(p, Message(Kind::kPing));
      for (int p = 1; p < processes_->size(); ++p) processes_->Receive(p);
      last_heard_ = Clock::now();
      return {};
    } catch (const std::exception& e) {
      processes_->Fail(fmt::format("process 0: {}", e.what()));
      return processes_->Failure();
    }
  }

  std::shared_ptr<Processes> processes_;
  const double limit_s_;
  std::unique_ptr<RankHost> host_;

  mutable std::mutex load_mutex_;
  std::vector<std::vector<std::vector<int64_t>>> expert_loads_;  // by process, then replica; under load_mutex_

  std::mutex mutex_;  // held by who talks with the followers: a step, or a ping
  Clock::time_point last_heard_;
  std::atomic<int64_t> step_began_{0};  // of Clock; 0: none is running

  std::mutex watch_mutex_;
  std::condition_variable wake_;
  bool stopping_ = false;
  std::function<void(const std::string&)> listener_;
  std::thread watch_;
};

}  // namespace

std::vector<int> OwnCpus(Processes& processes) {
  const std::vector<int> mine = AllowedCpus();
  const std::string text =
      fmt::format("{} {}", processes.hosts()[static_cast<size_t>(processes.rank())], fmt::join(mine, ","));
  const std::vector<std::string> all = AllGatherText(processes, text);
  const auto sharing = static_cast<size_t>(std::count(all.begin(), all.end(), text));
  const auto before = static_cast<size_t>(std::count(all.begin(), all.begin() + processes.rank(), text));
  const size_t share = mine.size() / sharing;
  if (share == 0) return {mine[before % mine.size()]};
  const auto first = mine.begin() + static_cast<ptrdiff_t>(before * share);
  return {first, first + static_cast<ptrdiff_t>(share)};
}

std::vector<std::unique_ptr<StepExecutor>> MakeMpiExecutors(const ExecutorOptions& options,
                                                            std::shared_ptr<const Checkpoint> checkpoint,
                                                            std::shared_ptr<Processes> processes) {
  WEFT_CHECK(processes->rank() == 0);
  return ShareSteps(std::make_unique<MpiExecutor>(options, std::move(checkpoint), std::move(processes)),
                    static_cast<size_t>(options.parallel.data_parallel));
}

void FollowSteps(const ExecutorOptions& options, std::shared_ptr<const Checkpoint> checkpoint,
                 std::shared_ptr<Processes> processes) {
  WEFT_CHECK(processes->rank() != 0);
  const std::unique_ptr<RankHost> host = MakeHost(options, std::move(checkpoint), *processes);
  try {
    auto last_step = Clock::now();
    while (true) {
      // Process 0 says something every few seconds, or it is gone, or cut off.
      const auto since = Clock::now();
      const auto limit = std::chrono::duration<double>(options.step_timeout_s) + 2 * kPingInterval;
      const std::vector<std::byte> message = processes->Receive(0, [&] {
        // In an idle instance nobody is in a hurry.
        const auto now = Clock::now();
        if (now - last_step < std::chrono::seconds(1)) return;
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
        const auto waited = now - since;
        if (waited > limit) {
          throw Error(fmt::format("process {} has not heard from process 0 for {:.0f} s", processes->rank(),
                                  std::chrono::duration<double>(waited).count()),
                      ErrorKind::kInternal);
        }
      });
      const StepDeadline deadline(*processes, options.step_timeout_s);
      const std::span<const std::byte> content = std::span(message).subspan(1);
      switch (static_cast<Kind>(message.at(0))) {
        case Kind::kStep: {
          const std::vector<std::optional<StepPlan>> plans = DecodePlans(content);
          std::vector<const StepPlan*> given;
          for (const auto& plan : plans) given.push_back(plan ? &*plan : nullptr);
          ProcessOutputs outputs{.ranks = host->Step(given), .expert_loads = {}};
          for (size_t i = 0; i < given.size(); ++i) outputs.expert_loads.push_back(host->ExpertLoad(i));
          processes->Send(0, EncodeOutputs(outputs));
          last_step = Clock::now();
          break;
        }
        case Kind::kPing:
          processes->Send(0, {});
          break;
        case Kind::kStop:
          return;
      }
    }
  } catch (...) {
    processes->Fail(fmt::format("process {}: {}", processes->rank(), DescribeException(std::current_exception())));
    throw Error(processes->Failure(), ErrorKind::kInternal);  // the first reason, which may be another's
  }
}

}  // namespace weft
