#include "weft/runner/joint_steps.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "weft/core/error.h"

namespace weft {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kLongestWait = std::chrono::milliseconds(20);

// There is no thread that runs the steps: of the replicas that wait with a plan, one runs the step for all.
class JointSteps {
 public:
  JointSteps(std::unique_ptr<JointExecutor> executor, size_t replicas)
      : executor_(std::move(executor)), slots_(replicas), listeners_(replicas) {
    executor_->SetFailureListener([this](const std::string& why) {
      std::unique_lock lock(mutex_);
      if (!failure_) failure_ = std::make_exception_ptr(Error(why, ErrorKind::kInternal));
      changed_.notify_all();
      // Those in a step, too: it may never end.
      Tell(lock, why, true);
    });
  }
  ~JointSteps() { executor_->SetFailureListener({}); }

  StepOutput Execute(size_t replica, const StepPlan& plan) {
    std::unique_lock lock(mutex_);
    Slot& slot = slots_[replica];
    WEFT_CHECK(slot.plan == nullptr, "replica {} has a step under way", replica);
    slot.plan = &plan;
    slot.output.reset();
    changed_.notify_all();  // somebody may wait for this plan
    // A plan that a step is working on is left alone until that has come back.
    while (!slot.output && (!failure_ || (running_ && slot.in_step))) {
      if (running_) {
        changed_.wait(lock);
      } else {
        running_ = true;
        Run(lock);
      }
    }
    slot.plan = nullptr;
    if (!slot.output) std::rethrow_exception(failure_);
    return std::move(*slot.output);
  }

  int64_t num_blocks() const { return executor_->num_blocks(); }
  std::vector<int64_t> ExpertLoad(size_t replica) const { return executor_->ExpertLoad(replica); }
  ContextCounts Context(size_t replica) const { return executor_->Context(replica); }

  void SetFailureListener(size_t replica, std::function<void(const std::string&)> listener) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return telling_ == 0; });
    listeners_[replica] = std::move(listener);
  }

 private:
  struct Slot {
    const StepPlan* plan = nullptr;  // from its Execute's beginning to its end
    std::optional<StepOutput> output;
    bool in_step = false;  // of the step that runs or ran last
  };

  // With running_ set by the caller, whose plan is among the slots'; resets it.
  void Run(std::unique_lock<std::mutex>& lock) {
    // Those of the last step are waited for.
    const auto all_back = [&] {
      return failure_ || std::ranges::all_of(slots_, [](const Slot& slot) { return !slot.in_step || Waits(slot); });
    };
    changed_.wait_for(lock, std::min<Clock::duration>(last_step_ / 4, kLongestWait), all_back);
    std::exception_ptr error = failure_;
    std::vector<const StepPlan*> plans;
    std::vector<StepOutput> outputs;
    for (Slot& slot : slots_) {
      slot.in_step = Waits(slot);
      plans.push_back(slot.in_step ? slot.plan : nullptr);
    }
    if (!error) {
      lock.unlock();
      const auto began = Clock::now();
      try {
        outputs = executor_->Execute(plans);
        WEFT_CHECK(outputs.size() == plans.size());
      } catch (...) {
        error = std::current_exception();
      }
      const auto took = Clock::now() - began;
      lock.lock();
      last_step_ = took;
    }
    if (error) {
      if (!failure_) failure_ = error;
    } else {
      for (size_t i = 0; i < slots_.size(); ++i) {
        if (plans[i] != nullptr) slots_[i].output = std::move(outputs[i]);
      }
    }
    running_ = false;
    changed_.notify_all();
    if (error) Tell(lock, DescribeException(error), false);
  }

  // Listeners of replicas that do not find out by themselves, or of all. Each is called once.
  void Tell(std::unique_lock<std::mutex>& lock, const std::string& why, bool all) {
    std::vector<std::function<void(const std::string&)>> listeners;
    for (size_t i = 0; i < slots_.size(); ++i) {
      const bool told = all || slots_[i].plan == nullptr;
      if (told && listeners_[i]) listeners.push_back(std::exchange(listeners_[i], nullptr));
    }
    if (listeners.empty()) return;
    ++telling_;
    lock.unlock();
    for (const auto& listener : listeners) listener(why);
    lock.lock();
    --telling_;
    changed_.notify_all();
  }

  // A plan is there that no step has taken.
  static bool Waits(const Slot& slot) { return slot.plan != nullptr && !slot.output; }

  const std::unique_ptr<JointExecutor> executor_;
  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  std::vector<Slot> slots_;  // by replica
  std::vector<std::function<void(const std::string&)>> listeners_;
  std::exception_ptr failure_;
  Clock::duration last_step_{0};
  bool running_ = false;  // a step runs, or is about to
  int telling_ = 0;       // threads that call listeners now
};

class Replica : public StepExecutor {
 public:
  Replica(std::shared_ptr<JointSteps> steps, size_t index) : steps_(std::move(steps)), index_(index) {}
  ~Replica() override { steps_->SetFailureListener(index_, {}); }

  StepOutput Execute(const StepPlan& plan) override { return steps_->Execute(index_, plan); }
  int64_t num_blocks() const override { return steps_->num_blocks(); }
  std::vector<int64_t> ExpertLoad() const override { return steps_->ExpertLoad(index_); }
  ContextCounts Context() const override { return steps_->Context(index_); }
  void SetFailureListener(std::function<void(const std::string& why)> listener) override {
    steps_->SetFailureListener(index_, std::move(listener));
  }

 private:
  const std::shared_ptr<JointSteps> steps_;
  const size_t index_;
};

}  // namespace

std::vector<std::unique_ptr<StepExecutor>> ShareSteps(std::unique_ptr<JointExecutor> executor, size_t replicas) {
  WEFT_CHECK(replicas >= 1);
  const auto steps = std::make_shared<JointSteps>(std::move(executor), replicas);
  std::vector<std::unique_ptr<StepExecutor>> executors;
  for (size_t i = 0; i < replicas; ++i) executors.push_back(std::make_unique<Replica>(steps, i));
  return executors;
}

}  // namespace weft
