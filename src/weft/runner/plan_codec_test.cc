#include "weft/runner/plan_codec.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <tuple>

#include "weft/core/error.h"

namespace weft {

// Every member of every structure, by name: one that is added does not compile until it is looked at here, too.

bool operator==(const SamplingParams& a, const SamplingParams& b) {
  const auto members = [](const SamplingParams& p) {
    const auto& [m1, m2, m3, m4, m5, m6, m7, m8, m9, m10, m11, m12, m13, m14, m15, m16, m17, m18, m19, m20, m21, m22,
                 m23] = p;
    return std::tie(m1, m2, m3, m4, m5, m6, m7, m8, m9, m10, m11, m12, m13, m14, m15, m16, m17, m18, m19, m20, m21, m22,
                    m23);
  };
  return members(a) == members(b);
}
bool operator==(const NewRequest& a, const NewRequest& b) {
  const auto members = [](const NewRequest& r) {
    const auto& [m1, m2, m3] = r;
    return std::tie(m1, m2, m3);
  };
  return members(a) == members(b);
}
bool operator==(const BlockCopy& a, const BlockCopy& b) {
  const auto members = [](const BlockCopy& c) {
    const auto& [m1, m2, m3] = c;
    return std::tie(m1, m2, m3);
  };
  return members(a) == members(b);
}
bool operator==(const RequestStep& a, const RequestStep& b) {
  const auto members = [](const RequestStep& s) {
    const auto& [m1, m2, m3, m4, m5, m6, m7, m8, m9] = s;
    return std::tie(m1, m2, m3, m4, m5, m6, m7, m8, m9);
  };
  return members(a) == members(b);
}
bool operator==(const StepPlan& a, const StepPlan& b) {
  const auto members = [](const StepPlan& p) {
    const auto& [m1, m2, m3, m4, m5] = p;
    return std::tie(m1, m2, m3, m4, m5);
  };
  return members(a) == members(b);
}
bool operator==(const TokenLogprob& a, const TokenLogprob& b) {
  return std::tie(a.token, a.logprob, a.rank) == std::tie(b.token, b.logprob, b.rank);
}
bool operator==(const PositionLogprobs& a, const PositionLogprobs& b) {
  return std::tie(a.chosen, a.top) == std::tie(b.chosen, b.top);
}
bool operator==(const RowOutput& a, const RowOutput& b) {
  const auto members = [](const RowOutput& r) {
    const auto& [m1, m2, m3, m4, m5, m6, m7, m8, m9] = r;
    return std::tie(m1, m2, m3, m4, m5, m6, m7, m8, m9);
  };
  return members(a) == members(b);
}

namespace {

// Fills any member with random values.
void Fill(SamplingParams& value);
void Fill(NewRequest& value);
void Fill(BlockCopy& value);
void Fill(RequestStep& value);
void Fill(TokenLogprob& value);
void Fill(PositionLogprobs& value);
void Fill(RowOutput& value);
void Fill(StepPlan& value);
void Fill(std::map<int32_t, float>& value);
template <typename T>
void Fill(std::optional<T>& value);
template <typename T>
void Fill(std::vector<T>& value);
void Fill(float& value);
template <typename T>
void Fill(T& value) {
  value = *rc::gen::arbitrary<T>();
}
void Fill(float& value) { value = static_cast<float>(*rc::gen::inRange(-1000000, 1000000)) / 64; }
template <typename T>
void Fill(std::optional<T>& value) {
  value.reset();
  if (*rc::gen::arbitrary<bool>()) Fill(value.emplace());
}
void Fill(std::map<int32_t, float>& value) {
  for (int n = *rc::gen::inRange(0, 4); n > 0; --n) Fill(value[*rc::gen::arbitrary<int32_t>()]);
}
template <typename T>
void Fill(std::vector<T>& value) {
  value.resize(static_cast<size_t>(*rc::gen::inRange(0, 5)));
  for (T& one : value) Fill(one);
}
template <typename... T>
void FillAll(T&... values) {
  (Fill(values), ...);
}
void Fill(SamplingParams& p) {
  auto& [m1, m2, m3, m4, m5, m6, m7, m8, m9, m10, m11, m12, m13, m14, m15, m16, m17, m18, m19, m20, m21, m22, m23] = p;
  FillAll(m1, m2, m3, m4, m5, m6, m7, m8, m9, m10, m11, m12, m13, m14, m15, m16, m17, m18, m19, m20, m21, m22, m23);
}
void Fill(NewRequest& r) { FillAll(r.handle, r.prompt_token_ids, r.params); }
void Fill(BlockCopy& c) { FillAll(c.source, c.destination, c.tokens); }
void Fill(RequestStep& s) {
  auto& [m1, m2, m3, m4, m5, m6, m7, m8, m9] = s;
  FillAll(m1, m2, m3, m4, m5, m6, m7, m8, m9);
}
void Fill(TokenLogprob& l) { FillAll(l.token, l.logprob, l.rank); }
void Fill(PositionLogprobs& p) { FillAll(p.chosen, p.top); }
void Fill(RowOutput& r) {
  auto& [m1, m2, m3, m4, m5, m6, m7, m8, m9] = r;
  FillAll(m1, m2, m3, m4, m5, m6, m7, m8, m9);
}

void Fill(StepPlan& plan) {
  auto& [step, admitted, released, requests, capture_logits] = plan;
  FillAll(step, admitted, released, requests, capture_logits);
}

std::vector<std::byte> Encoded(const std::vector<std::optional<StepPlan>>& plans) {
  std::vector<const StepPlan*> pointers;
  for (const auto& plan : plans) pointers.push_back(plan ? &*plan : nullptr);
  return EncodePlans(pointers);
}

TEST(PlanCodec, PlansComeBackAsTheyWere) {
  EXPECT_TRUE(rc::check([] {
    std::vector<std::optional<StepPlan>> plans;
    Fill(plans);
    RC_ASSERT(DecodePlans(Encoded(plans)) == plans);
  }));
}

TEST(PlanCodec, OutputsComeBackAsTheyWere) {
  EXPECT_TRUE(rc::check([] {
    ProcessOutputs outputs;
    FillAll(outputs.ranks, outputs.expert_loads);
    const ProcessOutputs back = DecodeOutputs(EncodeOutputs(outputs));
    RC_ASSERT(back.ranks == outputs.ranks);
    RC_ASSERT(back.expert_loads == outputs.expert_loads);
  }));
}

// No length that a broken message could bring makes the decoder read beyond its end or take memory without bound.
TEST(PlanCodec, CutMessagesAreRefused) {
  EXPECT_TRUE(rc::check([] {
    std::vector<std::optional<StepPlan>> plans(1 + *rc::gen::inRange<size_t>(0, 3));
    for (auto& plan : plans) Fill(plan);
    std::vector<std::byte> bytes = Encoded(plans);
    bytes.resize(*rc::gen::inRange<size_t>(0, bytes.size()));
    RC_ASSERT_THROWS_AS(DecodePlans(bytes), Error);
  }));
}

TEST(PlanCodec, WhatFollowsAPlanIsRefused) {
  std::vector<std::byte> bytes = Encoded({StepPlan{}});
  bytes.emplace_back();
  EXPECT_THROW(DecodePlans(bytes), Error);
}

}  // namespace
}  // namespace weft
