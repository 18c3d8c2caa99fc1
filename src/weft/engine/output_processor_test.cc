#include "weft/engine/output_processor.h"

#include <gtest/gtest.h>

#include <random>

#include "weft/core/utf8.h"
#include "weft/engine/test_tokenizer.h"

namespace weft {
namespace {

constexpr int32_t kEos = 1000000;

struct Stream {
  std::string text;
  std::vector<int32_t> tokens;
  RequestOutput last;
  std::vector<std::string> after;  // the text given out after each token
};

// Pushes tokens until the request ends (or the tokens do).
Stream Feed(OutputProcessor& processor, const std::vector<int32_t>& tokens) {
  Stream run;
  for (const int32_t token : tokens) {
    RowOutput row;
    row.token_id = token;
    auto output = processor.Process(std::move(row));
    EXPECT_TRUE(output.has_value());
    EXPECT_TRUE(IsValidUtf8(output->text));
    run.text += output->text;
    run.after.push_back(run.text);
    run.tokens.insert(run.tokens.end(), output->token_ids.begin(), output->token_ids.end());
    run.last = *output;
    if (output->finish_reason) break;
  }
  return run;
}

SamplingParams Params(std::vector<std::string> stop, int32_t max_tokens = 1000) {
  SamplingParams params;
  params.stop = std::move(stop);
  params.max_tokens = max_tokens;
  params.eos_token_ids = {kEos};
  return params;
}

Stream FeedPieces(const std::vector<std::string>& pieces, SamplingParams params, bool then_eos = true) {
  PieceVocabulary vocabulary;
  std::vector<int32_t> tokens;
  for (const auto& piece : pieces) tokens.push_back(vocabulary.Id(piece));
  if (then_eos) tokens.push_back(kEos);
  OutputProcessor processor("r", std::move(params), 3, 10000, std::make_unique<PieceStream>(&vocabulary));
  return Feed(processor, tokens);
}

TEST(OutputProcessor, StopStringOverTokenEdges) {
  Stream run = FeedPieces({"Hello ST", "OP wor", "ld"}, Params({"STOP"}));
  EXPECT_EQ(run.text, "Hello ");
  EXPECT_EQ(run.after[0], "Hello ");  // "ST" is held back
  EXPECT_EQ(run.last.finish_reason, FinishReason::kStop);
  EXPECT_EQ(std::get<std::string>(run.last.stop_reason), "STOP");
  EXPECT_EQ(run.tokens.size(), 2u);
  EXPECT_EQ(run.last.completion_tokens, 2);
  EXPECT_EQ(run.last.prompt_tokens, 3);

  SamplingParams params = Params({"STOP"});
  params.include_stop_str_in_output = true;
  EXPECT_EQ(FeedPieces({"Hello ST", "OP wor", "ld"}, params).text, "Hello STOP");
}

TEST(OutputProcessor, HeldTextComesWhenTheStopStringDoesNot) {
  Stream run = FeedPieces({"a ST", "ART ST"}, Params({"STOP"}));
  EXPECT_EQ(run.after[0], "a ");
  EXPECT_EQ(run.after[1], "a START ");
  EXPECT_EQ(run.text, "a START ST");  // at the end nothing is held back
  EXPECT_EQ(run.last.finish_reason, FinishReason::kStop);
  EXPECT_TRUE(std::holds_alternative<std::monostate>(run.last.stop_reason));  // EOS
  EXPECT_EQ(run.last.completion_tokens, 3);
}

TEST(OutputProcessor, FirstToEndWinsAndTheLongerOfTwoThatEndTogether) {
  EXPECT_EQ(std::get<std::string>(FeedPieces({"xabcd"}, Params({"abcd", "bc"})).last.stop_reason), "bc");
  EXPECT_EQ(FeedPieces({"xabc"}, Params({"c", "abc", "bc"})).text, "x");
}

TEST(OutputProcessor, EndTokens) {
  SamplingParams params = Params({});
  PieceVocabulary vocabulary;
  const int32_t a = vocabulary.Id("a"), b = vocabulary.Id("b");
  const auto feed = [&](SamplingParams p, std::vector<int32_t> tokens, int64_t max_total = 10000) {
    OutputProcessor processor("r", std::move(p), 3, max_total, std::make_unique<PieceStream>(&vocabulary));
    return Feed(processor, tokens);
  };
  params.stop_token_ids = {b};
  Stream run = feed(params, {a, b, a});
  EXPECT_EQ(run.text, "a");  // the text of the stop token is not shown, its id is
  EXPECT_EQ(run.tokens, (std::vector<int32_t>{a, b}));
  EXPECT_EQ(std::get<int32_t>(run.last.stop_reason), b);

  params.include_stop_str_in_output = true;
  EXPECT_EQ(feed(params, {a, b, a}).text, "ab");
  params.include_stop_str_in_output = false;

  params.min_tokens = 3;  // b does not count as token 1 and 2, but as token 3
  EXPECT_EQ(feed(params, {b, b, b, a}).tokens.size(), 3u);
  params.min_tokens = 0;

  params.max_tokens = 2;  // b as the last token: it stopped, and was not cut off
  EXPECT_EQ(feed(params, {a, b}).last.finish_reason, FinishReason::kStop);
  EXPECT_EQ(feed(params, {a, a, a}).last.finish_reason, FinishReason::kLength);
  EXPECT_EQ(feed(params, {a, a, a}).tokens.size(), 2u);
  params.max_tokens = 100;

  params.ignore_eos = true;
  EXPECT_EQ(feed(params, {a, kEos, a, b}).tokens.size(), 4u);
  params.ignore_eos = false;
  params.stop_token_ids = {kEos};  // EOS is EOS even when it is also named
  run = feed(params, {a, kEos});
  EXPECT_TRUE(std::holds_alternative<std::monostate>(run.last.stop_reason));

  run = feed(Params({}), {a, a, a, a, a}, 7);  // max_model_len: 3 + 4
  EXPECT_EQ(run.last.finish_reason, FinishReason::kLength);
  EXPECT_EQ(run.last.completion_tokens, 4);

  // A stop string that the last allowed token completes: it stopped.
  run = FeedPieces({"a", "b"}, Params({"ab"}, 2));
  EXPECT_EQ(run.last.finish_reason, FinishReason::kStop);
  EXPECT_EQ(run.text, "");
}

TEST(OutputProcessor, WithoutTokenizerThereAreTokensAlone) {
  OutputProcessor processor("r", Params({}, 2), 1, 100, nullptr);
  Stream run = Feed(processor, {5, 6, 7});
  EXPECT_EQ(run.text, "");
  EXPECT_EQ(run.tokens, (std::vector<int32_t>{5, 6}));
}

TEST(OutputProcessor, AbortGivesTheHeldText) {
  PieceVocabulary vocabulary;
  OutputProcessor processor("r", Params({"STOP"}), 1, 100, std::make_unique<PieceStream>(&vocabulary));
  Feed(processor, {vocabulary.Id("a ST")});
  const RequestOutput output = processor.End(FinishReason::kAbort);
  EXPECT_EQ(output.text, "ST");
  EXPECT_EQ(output.finish_reason, FinishReason::kAbort);
  EXPECT_EQ(output.completion_tokens, 1);
}

PositionLogprobs Logprob(int32_t token) { return {{token, -0.5f * static_cast<float>(token), 1}, {}}; }

TEST(OutputProcessor, LogprobsPassThrough) {
  SamplingParams params = Params({});
  OutputProcessor without("r", params, 1, 100, nullptr);
  params.logprobs = 0;
  OutputProcessor with("r", params, 1, 100, nullptr);
  for (OutputProcessor* processor : {&without, &with}) {
    RowOutput row;
    row.token_id = 7;
    row.logprobs = Logprob(7);
    const auto output = processor->Process(std::move(row));
    EXPECT_EQ(output->logprobs.size(), processor == &with ? 1u : 0u);
    if (processor == &with) {
      EXPECT_EQ(output->logprobs[0].chosen.logprob, -3.5f);
    }
  }
}

TEST(OutputProcessor, PromptLogprobsOfAllChunksComeWithTheFirstOutput) {
  SamplingParams params = Params({});
  params.prompt_logprobs = 0;
  constexpr int64_t kPrompt = 6;
  OutputProcessor processor("r", params, kPrompt, 100, nullptr);
  const auto row = [](int64_t first, std::vector<int32_t> tokens, std::optional<int32_t> sampled = {}) {
    RowOutput r;
    r.first_prompt_position = first;
    for (const int32_t token : tokens) r.prompt_logprobs.push_back(Logprob(token));
    r.token_id = sampled;
    return r;
  };
  EXPECT_FALSE(processor.Process(row(1, {91, 92})).has_value());
  EXPECT_FALSE(processor.Process(row(1, {11, 12})).has_value());  // preempted and computed again
  EXPECT_FALSE(processor.Process(row(3, {13})).has_value());
  const auto first = processor.Process(row(4, {14, 15, 99}, 7));  // 99: past the prompt, dropped
  ASSERT_TRUE(first && first->prompt_logprobs);
  ASSERT_EQ(first->prompt_logprobs->size(), static_cast<size_t>(kPrompt));
  EXPECT_FALSE((*first->prompt_logprobs)[0].has_value());
  for (int32_t i = 1; i < kPrompt; ++i)
    EXPECT_EQ((*first->prompt_logprobs)[static_cast<size_t>(i)]->chosen.token, 10 + i);
  const auto second = processor.Process(row(1, {1, 2, 3, 4, 5}, 8));
  ASSERT_TRUE(second.has_value());
  EXPECT_FALSE(second->prompt_logprobs.has_value());
}

TEST(OutputProcessor, RowErrorEndsTheRequest) {
  OutputProcessor processor("r", Params({}), 1, 100, nullptr);
  RowOutput row;
  row.error = "NaN in the logits";
  const auto output = processor.Process(std::move(row));
  EXPECT_EQ(output->finish_reason, FinishReason::kError);
  EXPECT_EQ(output->error, "NaN in the logits");
}

// Random text, random stop strings, random cuts into tokens (also inside characters), against a search in the full
// text.
TEST(OutputProcessor, StopStringsAgainstSearchInTheFullText) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 rng(seed);
  const auto below = [&](size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(rng); };
  const std::vector<std::string> alphabet = {"a", "b", "\n", "\u00e9", "\u00e8", "\u6f22", "\U0001f600"};
  int found = 0, split = 0;
  for (int round = 0; round < 20000; ++round) {
    const size_t letters = 2 + below(alphabet.size() - 1);
    const auto random_text = [&](size_t length) {
      std::string text;
      for (size_t i = 0; i < length; ++i) text += alphabet[below(letters)];
      return text;
    };
    const std::string full = random_text(below(30));
    std::vector<std::string> stops;
    for (size_t i = 0, n = 1 + below(3); i < n; ++i) stops.push_back(random_text(1 + below(5)));
    std::vector<std::string> pieces;
    for (size_t begin = 0; begin < full.size();) {
      const size_t length = std::min(1 + below(6), full.size() - begin);
      pieces.push_back(full.substr(begin, length));
      begin += length;
    }
    SamplingParams params = Params(stops);
    params.include_stop_str_in_output = below(2) == 0;
    params.min_tokens = below(3) == 0 ? static_cast<int32_t>(std::min(below(4), pieces.size())) : 0;

    // What the first n tokens say: whole characters only.
    std::vector<std::string> prefixes;
    for (size_t n = 0, bytes = 0; n < pieces.size(); ++n) {
      bytes += pieces[n].size();
      size_t end = bytes;
      while (end < full.size() && (static_cast<unsigned char>(full[end]) & 0xc0) == 0x80) --end;
      prefixes.push_back(full.substr(0, end));
    }
    const size_t silent = params.min_tokens == 0 ? 0 : prefixes[static_cast<size_t>(params.min_tokens) - 1].size();
    size_t best_end = std::string::npos, best_begin = 0;
    for (const std::string& stop : stops) {
      for (size_t at = full.find(stop); at != std::string::npos; at = full.find(stop, at + 1)) {
        const size_t end = at + stop.size();
        if (end <= silent) continue;
        if (end < best_end || (end == best_end && at < best_begin)) best_end = end, best_begin = at;
      }
    }
    const bool stopped = best_end != std::string::npos;
    const Stream run = FeedPieces(pieces, params);
    const std::string expected =
        !stopped ? full : full.substr(0, params.include_stop_str_in_output ? best_end : best_begin);
    ASSERT_EQ(run.text, expected) << "full text: " << full;
    ASSERT_EQ(run.last.finish_reason, FinishReason::kStop);
    if (stopped) {
      ++found;
      ASSERT_EQ(std::get<std::string>(run.last.stop_reason), full.substr(best_begin, best_end - best_begin));
      size_t tokens = 0;
      while (prefixes[tokens].size() < best_end) ++tokens;
      ASSERT_EQ(run.tokens.size(), tokens + 1);
      if (tokens > 0 && prefixes[tokens - 1].size() > best_begin) ++split;
    } else {
      ASSERT_TRUE(std::holds_alternative<std::monostate>(run.last.stop_reason));
      ASSERT_EQ(run.tokens.size(), pieces.size() + 1);
    }
    // While it runs, all but the longest end that may become a stop string has been given out.
    for (size_t n = 0; n + 1 < run.after.size(); ++n) {
      size_t held = 0;
      for (const std::string& stop : stops) {
        for (size_t length = 1; length < stop.size(); ++length) {
          if (prefixes[n].ends_with(stop.substr(0, length))) held = std::max(held, length);
        }
      }
      ASSERT_EQ(run.after[n], prefixes[n].substr(0, prefixes[n].size() - held))
          << "after token " << n << " of " << full;
    }
  }
  EXPECT_GT(found, 1000);
  EXPECT_GT(split, 100);
}

}  // namespace
}  // namespace weft
