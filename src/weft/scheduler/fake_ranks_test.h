#pragma once
// An executor for tests that trusts no plan: it keeps what ranks would keep, told by plans alone, writes every token
// into the slot that the block table gives it, and reads whole contexts back from there. What it writes stands for the
// KV of a token: it says which salt and which tokens up to this one it was computed from, so that a slot of another
// history is never taken for the right one, however it came into the table (shared, copied, left over). `Problem()`
// says what was wrong. Its model: the next token is a hash of all tokens before it, as they were read back.

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
    bool prefix_caching = true;
  };
  struct Live {
    NewRequest request;
    std::vector<int32_t> tokens;  // as told
    std::vector<int32_t> blocks;
    std::vector<uint64_t> history;  // of each token: it and all before it, and the salt
    uint64_t salt = 0;
    int64_t computed = 0;        // in this life: since the table last began anew
    int64_t first_computed = 0;  // where this life began: behind what was found in the cache
    int64_t prefill_until = 0;   // tokens known when this life began
    int32_t lives = 0;
    bool decoding() const { return lives > 0 && computed >= prefill_until; }
  };

  explicit FakeRanks(const Limits& limits);

  // Not a part of plans: ranks know nothing of salts. Before the request's first step.
  void SetSalt(RequestHandle handle, const std::string& salt) { salts_[handle] = std::hash<std::string>{}(salt); }

  StepOutput Execute(const StepPlan& plan) override;
  int64_t num_blocks() const override { return limits_.num_blocks; }

  static int32_t NextToken(const std::vector<int32_t>& tokens);

  // The first thing that was wrong with a plan, empty if nothing.
  const std::string& Problem() const { return problem_; }
  const std::map<RequestHandle, Live>& live() const { return live_; }
  // Tokens that were in the cache already when a life of a request began, and those of them that were copied.
  int64_t reused_tokens() const { return reused_tokens_; }
  int64_t copied_tokens() const { return copied_tokens_; }

 private:
  struct Slot {
    uint64_t history = 0;
    int64_t position = -1;
    int32_t token = 0;
  };
  using Users = std::map<int32_t, std::set<RequestHandle>>;  // of blocks, in this step

  void Wrong(const StepPlan& plan, RequestHandle handle, const std::string& what);
  void Begin(const StepPlan& plan);
  void Apply(const StepPlan& plan, const RequestStep& step, Users& users);
  void Copy(const StepPlan& plan, const RequestStep& step, const Users& users);
  RowOutput Run(const StepPlan& plan, const RequestStep& step, const Users& users);
  // A slot of the step's table may be written: nobody else uses its block, and nobody copies from it.
  bool Mine(const StepPlan& plan, RequestHandle handle, int32_t block, int64_t offset, const Users& users);
  Slot* SlotsOf(int32_t block) { return memory_.data() + block * limits_.virtual_block_tokens; }
  Slot& SlotOf(const Live& live, int64_t position);

  Limits limits_;
  std::map<RequestHandle, Live> live_;
  std::vector<Slot> memory_;
  std::map<RequestHandle, uint64_t> salts_;
  int64_t reused_tokens_ = 0;
  int64_t copied_tokens_ = 0;
  uint64_t next_step_ = 0;
  std::string problem_;
};

// The whole plan as text, for comparing two.
std::string Dump(const StepPlan& plan);

}  // namespace weft
