#pragma once
// Replicas that can only step together: each has an engine with a thread of its own, which plans when it likes.

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "weft/runner/step_plan.h"

namespace weft {

// Steps of all replicas at once.
class JointExecutor {
 public:
  virtual ~JointExecutor() = default;
  // One step, start to end. plans[i]: what replica i does; null where it has nothing to do (its ranks may be needed all
  // the same), for at least one it is not. Element i of the result is replica i's. Throws weft::Error (kInternal) when
  // a rank failed: the executor is dead then. Not for concurrent callers.
  virtual std::vector<StepOutput> Execute(std::span<const StepPlan* const> plans) = 0;
  virtual int64_t num_blocks() const = 0;
  // StepExecutor::ExpertLoad of a replica.
  virtual std::vector<int64_t> ExpertLoad(size_t /*replica*/) const { return {}; }
  // StepExecutor::Context of a replica.
  virtual ContextCounts Context(size_t /*replica*/) const { return {}; }
  // StepExecutor::SetFailureListener.
  virtual void SetFailureListener(std::function<void(const std::string& why)>) {}
};

// One StepExecutor for each of `replicas` replicas; they may be used by different threads, and destroyed in any order.
//
// A step begins when a plan is there, and takes along all that are; those that come while it runs are of the next one.
// A replica that took part in the last step is likely to be back soon (its engine hands out the tokens and plans), and
// the others wait for it a little, a quarter of what the last step took and 20 ms at most: weights are read once for
// all of them then. For one that has become idle they do so once.
//
// When a step throws, every later or waiting Execute of every replica throws the same, and the failure listeners of
// replicas that were idle are told; those of all, where the executor itself has told of a failure.
std::vector<std::unique_ptr<StepExecutor>> ShareSteps(std::unique_ptr<JointExecutor> executor, size_t replicas);

}  // namespace weft
