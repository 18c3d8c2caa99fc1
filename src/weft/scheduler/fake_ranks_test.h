#pragma once
// An executor for tests that trusts no plan: it keeps what ranks would keep, told by plans alone, writes every token
// into the slot that the block table gives it, and reads whole contexts back from there. `Problem()` says what was
// wrong. Its model: the next token is a hash of all tokens before it, as they were read back from the slots.

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "weft/runner/step_plan.h"

namespace weft {

class FakeRanks final : public StepExecutor {
 public:
  struct Limits {
    int64_t virtual_block_tokens = 1;
    int64_t num_blocks = 0;
    int64_t max_num_batched_tokens = 0;
    int64_t max_num_seqs = 0;
    bool chunked_prefill = true;
  };
  struct Live {
    NewRequest request;
    std::vector<int32_t> tokens;  // as told
    std::vector<int32_t> blocks;
    int64_t computed = 0;       // in this life: since the table last began anew
    int64_t prefill_until = 0;  // tokens known when this life began
    int32_t lives = 0;
    bool decoding() const { return lives > 0 && computed >= prefill_until; }
  };

  explicit FakeRanks(const Limits& limits);

  StepOutput Execute(const StepPlan& plan) override;
  int64_t num_blocks() const override { return limits_.num_blocks; }

  static int32_t NextToken(const std::vector<int32_t>& tokens);

  // The first thing that was wrong with a plan, empty if nothing.
  const std::string& Problem() const { return problem_; }
  const std::map<RequestHandle, Live>& live() const { return live_; }

 private:
  struct Slot {
    RequestHandle handle = 0;
    int64_t position = -1;
    int32_t token = 0;
  };

  void Wrong(const StepPlan& plan, RequestHandle handle, const std::string& what);
  void Begin(const StepPlan& plan);
  void Apply(const StepPlan& plan, const RequestStep& step, std::set<int32_t>& used);
  RowOutput Run(const StepPlan& plan, const RequestStep& step);
  Slot& SlotOf(const Live& live, int64_t position);

  Limits limits_;
  std::map<RequestHandle, Live> live_;
  std::vector<Slot> memory_;
  uint64_t next_step_ = 0;
  std::string problem_;
};

// The whole plan as text, for comparing two.
std::string Dump(const StepPlan& plan);

}  // namespace weft
