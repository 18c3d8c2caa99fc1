#include "weft/scheduler/stop.h"

#include <gtest/gtest.h>

namespace weft {
namespace {

using Stop = std::optional<TokenStop>;
const Stop kEos = TokenStop{FinishReason::kStop, std::nullopt};
const Stop kLength = TokenStop{FinishReason::kLength, std::nullopt};
Stop By(int32_t token) { return TokenStop{FinishReason::kStop, token}; }

TEST(CheckStop, EosStopTokensAndLengths) {
  SamplingParams params;
  params.max_tokens = 10;
  params.eos_token_ids = {2, 3};
  params.stop_token_ids = {7, 3};
  EXPECT_EQ(CheckStop(params, 5, 1, 21, 100), std::nullopt);
  EXPECT_EQ(CheckStop(params, 2, 1, 21, 100), kEos);
  EXPECT_EQ(CheckStop(params, 3, 1, 21, 100), kEos);  // both: EOS
  EXPECT_EQ(CheckStop(params, 7, 1, 21, 100), By(7));
  EXPECT_EQ(CheckStop(params, 5, 9, 29, 100), std::nullopt);
  EXPECT_EQ(CheckStop(params, 5, 10, 30, 100), kLength);
  EXPECT_EQ(CheckStop(params, 7, 10, 30, 100), By(7));  // the token comes before the length
  EXPECT_EQ(CheckStop(params, 5, 1, 99, 100), std::nullopt);
  EXPECT_EQ(CheckStop(params, 5, 1, 100, 100), kLength);
}

TEST(CheckStop, IgnoreEosLeavesStopTokens) {
  SamplingParams params;
  params.ignore_eos = true;
  params.eos_token_ids = {2};
  EXPECT_EQ(CheckStop(params, 2, 1, 2, 100), std::nullopt);
  params.stop_token_ids = {2};
  EXPECT_EQ(CheckStop(params, 2, 1, 2, 100), By(2));
}

TEST(CheckStop, MinTokensHoldsBackTokensButNotLengths) {
  SamplingParams params;
  params.min_tokens = 4;
  params.max_tokens = 6;
  params.eos_token_ids = {2};
  params.stop_token_ids = {7};
  for (const int32_t token : {2, 7}) {
    EXPECT_EQ(CheckStop(params, token, 3, 13, 100), std::nullopt);
    EXPECT_NE(CheckStop(params, token, 4, 14, 100), std::nullopt);
  }
  EXPECT_EQ(CheckStop(params, 2, 3, 100, 100), kLength);
}

}  // namespace
}  // namespace weft
