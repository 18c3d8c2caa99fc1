#include "weft/runner/joint_steps.h"

#include <gtest/gtest.h>

#include <atomic>
#include <random>
#include <thread>

#include "weft/core/error.h"

namespace weft {
namespace {

// A step's token is a function of the replica and of the request's handle.
int32_t TokenOf(size_t replica, RequestHandle handle) { return static_cast<int32_t>(1000 * replica + handle % 1000); }

class FakeJoint : public JointExecutor {
 public:
  std::vector<StepOutput> Execute(std::span<const StepPlan* const> plans) override {
    EXPECT_EQ(in_step_.fetch_add(1), 0) << "two steps at once";
    {
      std::unique_lock lock(mutex_);
      ++begun_;
      changed_.notify_all();
      changed_.wait(lock, [&] { return permits_ != 0; });
      if (permits_ > 0) --permits_;
    }
    std::vector<StepOutput> outputs(plans.size());
    size_t given = 0;
    for (size_t i = 0; i < plans.size(); ++i) {
      if (plans[i] == nullptr) continue;
      ++given;
      for (const RequestStep& step : plans[i]->requests) {
        RowOutput row;
        row.handle = step.handle;
        row.token_id = TokenOf(i, step.handle);
        outputs[i].rows.push_back(std::move(row));
      }
    }
    EXPECT_GE(given, 1u);
    {
      const std::lock_guard lock(mutex_);
      sizes_.push_back(given);
    }
    in_step_ = 0;
    if (broken) throw Error("rank 3 is broken", ErrorKind::kInternal);
    return outputs;
  }
  int64_t num_blocks() const override { return 7; }
  void SetFailureListener(std::function<void(const std::string&)> told) override { listener = std::move(told); }

  void Allow(int64_t steps) {
    const std::lock_guard lock(mutex_);
    permits_ = steps;
    changed_.notify_all();
  }
  void WaitForStep(int64_t number) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return begun_ >= number; });
  }
  std::vector<size_t> sizes() {
    const std::lock_guard lock(mutex_);
    return sizes_;
  }

  std::atomic<bool> broken{false};
  std::function<void(const std::string&)> listener;

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t permits_ = -1;
  int64_t begun_ = 0;
  std::vector<size_t> sizes_;  // replicas in each step
  std::atomic<int> in_step_{0};
};

struct Rig {
  explicit Rig(size_t replicas) {
    auto made = std::make_unique<FakeJoint>();
    joint = made.get();
    executors = ShareSteps(std::move(made), replicas);
  }
  FakeJoint* joint = nullptr;
  std::vector<std::unique_ptr<StepExecutor>> executors;
};

StepPlan PlanOf(RequestHandle handle) {
  StepPlan plan;
  RequestStep& step = plan.requests.emplace_back();
  step.handle = handle;
  step.tokens = 1;
  return plan;
}

void Check(const StepOutput& output, size_t replica, RequestHandle handle) {
  ASSERT_EQ(output.rows.size(), 1u);
  EXPECT_EQ(output.rows[0].handle, handle);
  EXPECT_EQ(output.rows[0].token_id, TokenOf(replica, handle));
}

TEST(JointSteps, EveryReplicaGetsItsOwnOutputWhoeverElseIsThere) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  Rig rig(4);
  EXPECT_EQ(rig.executors[2]->num_blocks(), 7);
  std::vector<std::thread> threads;
  for (size_t r = 0; r < 4; ++r) {
    threads.emplace_back([&, r] {
      std::mt19937_64 rng(seed + r);
      for (RequestHandle handle = 0; handle < 300; ++handle) {
        Check(rig.executors[r]->Execute(PlanOf(handle)), r, handle);
        if (rng() % 4 == 0) std::this_thread::yield();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  size_t plans = 0;
  for (const size_t n : rig.joint->sizes()) plans += n;
  EXPECT_EQ(plans, 4u * 300);
}

TEST(JointSteps, PlansThatComeDuringAStepShareTheNext) {
  Rig rig(3);
  rig.joint->Allow(0);
  std::thread first([&] { Check(rig.executors[1]->Execute(PlanOf(5)), 1, 5); });
  rig.joint->WaitForStep(1);
  std::atomic<int> posting{0};
  std::vector<std::thread> others;
  for (const size_t r : {0, 2}) {
    others.emplace_back([&, r] {
      ++posting;
      Check(rig.executors[r]->Execute(PlanOf(6 + r)), r, 6 + r);
    });
  }
  while (posting < 2) std::this_thread::yield();
  rig.joint->Allow(-1);
  first.join();
  for (std::thread& thread : others) thread.join();
  const auto sizes = rig.joint->sizes();
  EXPECT_EQ(sizes.front(), 1u);
  size_t plans = 0;
  for (const size_t n : sizes) plans += n;
  EXPECT_EQ(plans, 3u);
}

TEST(JointSteps, OneReplicaAloneGoesOnWhileOthersAreIdleOrGone) {
  Rig rig(3);
  Check(rig.executors[0]->Execute(PlanOf(1)), 0, 1);
  Check(rig.executors[2]->Execute(PlanOf(1)), 2, 1);
  rig.executors[2].reset();
  for (RequestHandle handle = 2; handle < 20; ++handle) Check(rig.executors[1]->Execute(PlanOf(handle)), 1, handle);
  rig.executors[0].reset();
  Check(rig.executors[1]->Execute(PlanOf(99)), 1, 99);
}

TEST(JointSteps, AFailureIsEverybodys) {
  Rig rig(4);
  std::vector<std::string> told(4);
  for (size_t r = 0; r < 4; ++r) {
    rig.executors[r]->SetFailureListener([&told, r](const std::string& why) { told[r] = why; });
  }
  rig.executors[3]->SetFailureListener({});
  rig.joint->Allow(0);
  rig.joint->broken = true;
  const auto fails = [&](size_t r) {
    try {
      rig.executors[r]->Execute(PlanOf(1));
      ADD_FAILURE() << "replica " << r << " has an output";
    } catch (const Error& e) {
      EXPECT_STREQ(e.what(), "rank 3 is broken");
      EXPECT_EQ(e.kind(), ErrorKind::kInternal);
    }
  };
  std::thread first([&] { fails(0); });
  rig.joint->WaitForStep(1);
  std::thread second([&] { fails(1); });  // in the step, or waiting for the next, or too late: the same
  rig.joint->Allow(-1);
  first.join();
  second.join();
  EXPECT_EQ(told[2], "rank 3 is broken");  // idle
  EXPECT_EQ(told[0], "");
  EXPECT_EQ(told[3], "");
  fails(2);
  fails(3);
}

TEST(JointSteps, AFailureBetweenStepsIsToldToAll) {
  Rig rig(2);
  Check(rig.executors[1]->Execute(PlanOf(1)), 1, 1);
  std::vector<std::string> told(2);
  for (size_t r = 0; r < 2; ++r) {
    rig.executors[r]->SetFailureListener([&told, r](const std::string& why) { told[r] = why; });
  }
  rig.joint->listener("process 5 has died");
  for (size_t r = 0; r < 2; ++r) {
    EXPECT_EQ(told[r], "process 5 has died");
    EXPECT_THROW(rig.executors[r]->Execute(PlanOf(2)), Error);
  }
}

// A failure that comes from elsewhere does not take plans away from under a step that is working on them.
TEST(JointSteps, AFailureDuringAStepIsReportedWhenTheStepIsOver) {
  Rig rig(2);
  rig.joint->Allow(0);
  std::vector<std::string> told(2);
  for (size_t r = 0; r < 2; ++r) {
    rig.executors[r]->SetFailureListener([&told, r](const std::string& why) { told[r] = why; });
  }
  std::atomic<bool> back{false};
  std::thread replica([&] {
    auto plan = std::make_unique<StepPlan>(PlanOf(1));
    try {
      rig.executors[0]->Execute(*plan);
    } catch (const Error&) {
    }
    back = true;
  });
  rig.joint->WaitForStep(1);
  rig.joint->listener("process 5 has died");
  std::this_thread::yield();
  EXPECT_FALSE(back);
  for (const std::string& why : told) EXPECT_EQ(why, "process 5 has died");  // the step may never end
  rig.joint->Allow(-1);
  replica.join();
  EXPECT_THROW(rig.executors[0]->Execute(PlanOf(2)), Error);
}

}  // namespace
}  // namespace weft
