#include <gtest/gtest.h>

#include <fstream>
#include <sstream>

#include "weft/cli/build_engine.h"
#include "weft/cli/commands.h"
#include "weft/cli/kv_size.h"
#include "weft/cli/multi_process.h"
#include "weft/cli/sampling_args.h"

namespace weft::cli {
namespace {

TEST(Cli, OptionsPageIsCurrent) {
  std::ifstream file(WEFT_OPTIONS_PAGE);
  std::ostringstream committed;
  committed << file.rdbuf();
  EXPECT_TRUE(committed.str() == OptionsPage()) << "run: weft --help-markdown > docs/options.md";
}

// What mpirun says in its own way goes, however it is spelt; the rest stays as it was.
TEST(Cli, MpirunLineLeavesOutWhatMpirunReplaces) {
  const auto line = [](std::vector<std::string> flags) {
    std::vector<std::string> argv = {"weft", "serve", "org/model"};
    argv.insert(argv.end(), flags.begin(), flags.end());
    return MpirunLine(argv, 2);
  };
  const std::string plain = "mpirun --with-ft ulfm --bind-to none -n 2 --host HOST0:1,HOST1:1 weft serve org/model";
  EXPECT_EQ(line({}), plain);
  EXPECT_EQ(line({"--headless"}), plain);
  EXPECT_EQ(line({"--node-rank", "1", "--master-addr", "10.0.0.1", "--master-port", "29500"}), plain);
  EXPECT_EQ(line({"--node_rank", "1", "--master_addr=10.0.0.1", "--nnodes=2"}), plain);
  EXPECT_EQ(line({"-n", "2", "-r", "1", "-pcp", "2"}), plain + " -pcp 2");
  EXPECT_EQ(line({"--seed", "1", "--served-model-name", "it's"}), plain + " --seed 1 --served-model-name 'it'\\''s'");
}

std::string ServeError(std::vector<std::string> args) {
  const auto serve = MakeServe();
  try {
    serve->options().Parse(args);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST(Cli, TakesCommandLinesWrittenForVllm) {
  EXPECT_EQ(ServeError({"org/model",
                        "--host",
                        "0.0.0.0",
                        "--port",
                        "8001",
                        "--served-model-name",
                        "a",
                        "b",
                        "--tensor-parallel-size",
                        "2",
                        "-dcp",
                        "2",
                        "-pcp",
                        "2",
                        "--cp-kv-cache-interleave-size",
                        "8",
                        "--max-model-len",
                        "128K",
                        "--max_num_seqs",
                        "16",
                        "--max-num-batched-tokens=8192",
                        "--dtype",
                        "bfloat16",
                        "--enforce-eager",
                        "--trust-remote-code",
                        "--enable-prefix-caching",
                        "--enable-chunked-prefill",
                        "--gpu-memory-utilization",
                        "0.85",
                        "--seed",
                        "7",
                        "--disable-log-requests",
                        "--hf-overrides",
                        R"({"rope_theta": 1})",
                        "--block-size",
                        "64"}),
            "");
}

TEST(Cli, WhatDoesNotExistIsRefusedAndNeverIgnored) {
  const std::vector<std::vector<std::string>> refused = {
      {"--speculative-config", R"({"method": "ngram"})"},
      {"--speculative-config.method", "ngram"},
      {"--kv-transfer-config", R"({"kv_role": "kv_both"})"},
      {"--quantization", "fp8"},
      {"-q", "fp8"},
      {"--pipeline-parallel-size", "2"},
      {"--compilation-config", "3"},
      {"--additional-config", R"({"a": 1})"},
      {"--reasoning-parser", "qwen3"},
      {"--tool-call-parser", "hermes"},
      {"--enable-auto-tool-choice"},
      {"--cpu-offload-gb", "4"},
      {"--async-scheduling"},
      {"--ssl-keyfile", "k"},
      {"--ssl-certfile", "c"},
  };
  for (const auto& flags : refused) {
    std::vector<std::string> args = {"m"};
    args.insert(args.end(), flags.begin(), flags.end());
    const std::string error = ServeError(args);
    EXPECT_TRUE(error.starts_with(flags[0])) << flags[0] << ": " << error;
    EXPECT_NE(error.find(": "), std::string::npos);
  }
  for (const auto& flags : std::vector<std::vector<std::string>>{{"--max-model-len", "1"},
                                                                 {"--max-model-len", "-2"},
                                                                 {"--gpu-memory-utilization", "1.5"},
                                                                 {"--gpu-memory-utilization", "0"},
                                                                 {"--kv-cache-dtype", "fp8"},
                                                                 {"--dtype", "float16"},
                                                                 {"--port", "65536"},
                                                                 {"--kernels", "cuda"}}) {
    EXPECT_TRUE(ServeError({"m", flags[0], flags[1]}).starts_with(flags[0])) << flags[0];
  }
}

constexpr int64_t kMiB = 1 << 20;

KvSizeInput Input() {
  KvSizeInput in;
  in.block_bytes = kMiB;
  in.block_tokens = 128;
  in.weight_bytes = 1000 * kMiB;
  in.available_bytes = 21000 * kMiB;
  in.max_model_len = 12800;  // 100 blocks
  in.model_max_len = 12800;
  in.max_num_seqs = 256;
  return in;
}

TEST(KvSize, Default) {
  EXPECT_EQ(SizeKvCache(Input()).num_blocks, 4096);  // 4 GiB
  KvSizeInput few = Input();
  few.max_num_seqs = 3;
  EXPECT_EQ(SizeKvCache(few).num_blocks, 300);
  KvSizeInput longer = Input();
  longer.max_model_len = longer.model_max_len = 128 * 5000;
  EXPECT_EQ(SizeKvCache(longer).num_blocks, 5000);  // one such request
  KvSizeInput small = Input();
  small.available_bytes = 2000 * kMiB;
  EXPECT_EQ(SizeKvCache(small).num_blocks, 700);  // 70 % of what the weights leave
}

TEST(KvSize, AsAskedFor) {
  KvSizeInput in = Input();
  in.utilization = 0.5;
  EXPECT_EQ(SizeKvCache(in).num_blocks, 10500 - 1000);
  in.kv_bytes = 201 * kMiB + 5;
  EXPECT_EQ(SizeKvCache(in).num_blocks, 201);
  in.num_blocks = 150;
  EXPECT_EQ(SizeKvCache(in).num_blocks, 150);
}

TEST(KvSize, RefusesWhatCannotHoldOneRequestAndSaysTheNumbers) {
  KvSizeInput in = Input();
  in.num_blocks = 99;
  try {
    SizeKvCache(in);
    FAIL();
  } catch (const Error& e) {
    const std::string message = e.what();
    EXPECT_EQ(e.param(), "--max-model-len");
    for (const char* part : {"--max-model-len = 12800", "--num-gpu-blocks-override = 99", "12672 tokens"}) {
      EXPECT_NE(message.find(part), std::string::npos) << message;
    }
  }
  in.num_blocks = 100;
  EXPECT_EQ(SizeKvCache(in).max_model_len, 12800);
  in.num_blocks.reset();
  in.available_bytes = 900 * kMiB;  // not even the weights
  EXPECT_THROW(SizeKvCache(in), Error);
  in.utilization = 1;
  EXPECT_THROW(SizeKvCache(in), Error);
}

TEST(KvSize, ReplicasShareTheMemory) {
  KvSizeInput in = Input();
  in.replicas = 3;
  EXPECT_EQ(SizeKvCache(in).num_blocks, 4096 / 3);
  in.max_num_seqs = 2;
  EXPECT_EQ(SizeKvCache(in).num_blocks, 200);  // of each
  in.utilization = 0.5;
  EXPECT_EQ(SizeKvCache(in).num_blocks, (10500 - 1000) / 3);
  in.kv_bytes = 602 * kMiB;
  EXPECT_EQ(SizeKvCache(in).num_blocks, 200);
  in.num_blocks = 150;
  EXPECT_EQ(SizeKvCache(in).num_blocks, 150);
  in.num_blocks.reset();
  in.kv_bytes = 299 * kMiB;
  try {
    SizeKvCache(in);
    FAIL();
  } catch (const Error& e) {
    const std::string message = e.what();
    EXPECT_NE(message.find("--data-parallel-size = 3"), std::string::npos) << message;
    EXPECT_NE(message.find("12672 tokens"), std::string::npos) << message;
  }
}

TEST(KvSize, AsLongAsFits) {
  KvSizeInput in = Input();
  in.max_model_len = -1;
  in.num_blocks = 10;
  EXPECT_EQ(SizeKvCache(in).max_model_len, 1280);
  in.num_blocks = 1000;
  EXPECT_EQ(SizeKvCache(in).max_model_len, 12800);
}

TEST(KvSize, MemoryOfThisMachine) {
  EXPECT_GT(AvailableMemoryBytes(), 16 * kMiB);
  EXPECT_LT(AvailableMemoryBytes(), int64_t{1} << 50);
}

TEST(BuildEngine, LongestSequenceOfAModel) {
  ModelConfig config;
  config.max_position_embeddings = 32768;
  EXPECT_EQ(ModelMaxLen(config), 32768);
  config.rope.type = RopeConfig::Type::kLlama3;
  config.rope.factor = 8;
  EXPECT_EQ(ModelMaxLen(config), 32768);  // its max_position_embeddings are those after scaling
  config.rope.type = RopeConfig::Type::kLinear;
  config.rope.factor = 4;
  EXPECT_EQ(ModelMaxLen(config), 131072);
  config.rope.type = RopeConfig::Type::kYarn;
  config.rope.original_max_position = 32768;
  EXPECT_EQ(ModelMaxLen(config), 131072);
  config.max_position_embeddings = 163840;
  config.rope.original_max_position = 4096;
  config.rope.factor = 40;
  EXPECT_EQ(ModelMaxLen(config), 163840);
}

TEST(BuildEngine, GenerationConfigGivesDefaultsThatOptionsReplace) {
  const SamplingDefaults defaults = ParseGenerationConfig(nlohmann::json::parse(
      R"({"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": null})"));
  EXPECT_FLOAT_EQ(defaults.temperature.value(), 0.6f);
  EXPECT_EQ(defaults.top_k, 20);
  EXPECT_FALSE(defaults.max_tokens.has_value());
  EXPECT_FALSE(defaults.repetition_penalty.has_value());
  SamplingArgs args;
  args.top_k = 0;
  const SamplingParams params = MakeSamplingParams(args, defaults);
  EXPECT_FLOAT_EQ(params.temperature, 0.6f);
  EXPECT_FLOAT_EQ(params.top_p, 0.95f);
  EXPECT_EQ(params.top_k, 0);
  EXPECT_FLOAT_EQ(params.min_p, 0.0f);
  for (const char* wrong : {R"({"temperature": "hot"})", R"({"top_k": 1.5})"}) {
    EXPECT_THROW(ParseGenerationConfig(nlohmann::json::parse(wrong)), Error) << wrong;
  }
}

TEST(Main, ErrorsAreOneLineAndExitStatusOne) {
  for (const std::vector<std::string>& args : std::vector<std::vector<std::string>>{
           {"frobnicate"}, {"serve"}, {"serve", "/nonexistent/model"}, {"generate", "m", "--no-such-thing"}}) {
    testing::internal::CaptureStderr();
    EXPECT_EQ(Main(args), 1);
    const std::string error = testing::internal::GetCapturedStderr();
    EXPECT_TRUE(error.starts_with("weft: error: ")) << error;
    EXPECT_EQ(std::count(error.begin(), error.end(), '\n'), 1) << error;
  }
}

}  // namespace
}  // namespace weft::cli
