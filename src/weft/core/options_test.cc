#include "weft/core/options.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <random>

namespace weft {
namespace {

struct Values {
  std::string model;
  bool chunked = true;
  bool eager = false;
  int32_t port = 8000;
  std::optional<int64_t> length;
  int32_t tp = 1;
  double fraction = 0.5;
  std::string dtype = "auto";
  std::optional<std::string> uds;
  std::vector<std::string> keys;
  nlohmann::json overrides = nlohmann::json::object();
  bool expert = false;
  int32_t replicas = 1;
};

struct Fixture {
  Values v;
  OptionSet set{"weft serve", "Serves a model.", "MODEL", &v.model};
  Fixture() {
    set.Group("Model");
    set.Add("dtype", &v.dtype, "Type of the weights.").Choices({"auto", "bfloat16", "float32"});
    set.Add("max-model-len", &v.length, "Longest sequence.").HumanReadable().Range(1).DefaultText("the model's");
    set.Add("hf-overrides", &v.overrides, "Merged into config.json.");
    set.Group("Parallel");
    set.Add("tensor-parallel-size", &v.tp, "TP.").Alias("-tp").Range(1, 64);
    set.Add("enable-expert-parallel", &v.expert, "EP.").Refused("MoE models are not supported");
    set.Add("data-parallel-size", &v.replicas, "DP.").Alias("-dp").Range(1).Refused("one engine only");
    set.Group("Server");
    set.Add("port", &v.port, "TCP port.").Range(1, 65535);
    set.Add("uds", &v.uds, "Unix socket.");
    set.Add("api-key", &v.keys, "Keys.");
    set.Add("gpu-memory-utilization", &v.fraction, "Share.").Range(0, 1).Check([this] {
      return v.fraction == 0 ? "must be above 0" : "";
    });
    set.Add("enable-chunked-prefill", &v.chunked, "Cut prompts.");
    set.Add("enforce-eager", &v.eager, "No graphs.").Unused("there are no graphs on CPU");
  }
};

std::string ErrorOf(const std::vector<std::string>& args) {
  Fixture f;
  try {
    f.set.Parse(args);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

std::string WriteTemp(const std::string& text) {
  static std::mt19937_64 rng{std::random_device{}()};
  const auto path = std::filesystem::temp_directory_path() / fmt::format("weft_options_{:x}.yaml", rng());
  std::ofstream(path) << text;
  return path.string();
}

TEST(Options, TakesVllmSpellings) {
  Fixture f;
  EXPECT_EQ(f.set.Parse({"some/model", "--max_model_len", "32k", "-tp", "4", "--port=9000",
                         "--no-enable-chunked-prefill", "--api-key", "a", "b", "--gpu_memory-utilization", "0.9",
                         "--dtype=float32", "--enforce_eager", "--uds", "/tmp/s"}),
            OptionSet::Action::kRun);
  EXPECT_EQ(f.v.model, "some/model");
  EXPECT_EQ(f.v.length, 32000);
  EXPECT_EQ(f.v.tp, 4);
  EXPECT_EQ(f.v.port, 9000);
  EXPECT_FALSE(f.v.chunked);
  EXPECT_TRUE(f.v.eager);
  EXPECT_EQ(f.v.keys, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(f.v.fraction, 0.9);
  EXPECT_EQ(f.v.dtype, "float32");
  EXPECT_EQ(f.v.uds, "/tmp/s");
  EXPECT_TRUE(f.set.IsSet("port"));
  EXPECT_FALSE(f.set.IsSet("hf-overrides"));
}

TEST(Options, LastOneWinsAndBooleansTakeAValue) {
  Fixture f;
  f.set.Parse(
      {"--port", "1", "m", "--port", "2", "--enforce-eager", "--no_enforce_eager", "--enable-chunked-prefill=false"});
  EXPECT_EQ(f.v.port, 2);
  EXPECT_FALSE(f.v.eager);
  EXPECT_FALSE(f.v.chunked);
}

TEST(Options, JsonAndDottedKeys) {
  Fixture f;
  f.set.Parse({"m", "--hf-overrides", R"({"rope_theta": 5, "keep": [1]})", "--hf_overrides.rope_scaling.rope_type",
               "yarn", "--hf-overrides.rope_scaling.factor=4.0", "--hf-overrides.rope_theta", "10000",
               "--hf-overrides.keep+", "2", "--hf-overrides.rope_scaling.max_position", "-1"});
  EXPECT_EQ(f.v.overrides, nlohmann::json::parse(R"({"rope_theta": 10000, "keep": [1, 2],
      "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "max_position": -1}})"));
  EXPECT_EQ(ErrorOf({"m", "--hf-overrides", "{oops"}), "--hf-overrides = {oops: must be a JSON object");
  EXPECT_EQ(ErrorOf({"m", "--hf-overrides", "[1]"}), "--hf-overrides = [1]: must be a JSON object");
  EXPECT_EQ(ErrorOf({"m", "--port.x", "1"}),
            "--port.x: --port takes no dotted keys, only options with a JSON value do");
}

TEST(Options, ErrorsNameFlagValueAndRule) {
  EXPECT_EQ(ErrorOf({"m", "--port", "70000"}), "--port = 70000: must be from 1 to 65535");
  EXPECT_EQ(ErrorOf({"m", "--port", "80x"}), "--port = 80x: must be a whole number");
  EXPECT_EQ(ErrorOf({"m", "--port", "99999999999"}), "--port = 99999999999: must be a whole number");
  EXPECT_EQ(ErrorOf({"m", "--port"}), "--port: needs a value");
  EXPECT_EQ(ErrorOf({"m", "--port", "--uds"}),
            "--port: needs a value (one that begins with '-' is written --port=--uds)");
  EXPECT_EQ(ErrorOf({"m", "--max-model-len", "0"}), "--max-model-len = 0: must be 1 or more");
  EXPECT_EQ(ErrorOf({"m", "--dtype", "int3"}), "--dtype = int3: must be one of: auto, bfloat16, float32");
  EXPECT_EQ(ErrorOf({"m", "--gpu-memory-utilization", "0"}), "--gpu-memory-utilization = 0: must be above 0");
  EXPECT_EQ(ErrorOf({"m", "--gpu-memory-utilization", "nan"}), "--gpu-memory-utilization = nan: must be a number");
  EXPECT_EQ(ErrorOf({"m", "n"}), "unexpected argument 'n'");
  EXPECT_EQ(ErrorOf({"--port", "1"}), "weft serve: MODEL is missing");
  EXPECT_EQ(ErrorOf({"--api-key", "k", "m"}),
            "weft serve: MODEL is missing (--api-key takes all words up to the next option: write MODEL first)");
  EXPECT_EQ(ErrorOf({"m", "--no-enforce-eager=true"}), "--no-enforce-eager=true: takes no value");
  EXPECT_EQ(ErrorOf({"m", "--enforce-eager=maybe"}), "--enforce-eager = maybe: must be true or false");
}

TEST(Options, UnknownOnesGetASuggestion) {
  EXPECT_EQ(ErrorOf({"m", "--prot", "1"}), "unknown option --prot; did you mean --port?");
  EXPECT_EQ(ErrorOf({"m", "--max_modle_len=4"}), "unknown option --max_modle_len; did you mean --max-model-len?");
  EXPECT_EQ(ErrorOf({"m", "-pt", "1"}), "unknown option -pt; did you mean -tp?");
  EXPECT_EQ(ErrorOf({"m", "--no-port"}), "unknown option --no-port; did you mean --port?");
  EXPECT_EQ(ErrorOf({"m", "--xyzzyxyzzy-is-nothing-here"}),
            "unknown option --xyzzyxyzzy-is-nothing-here ('weft serve --help' lists all)");
}

TEST(Options, RefusesWhatItCannotDoAndTakesItsDefault) {
  EXPECT_EQ(ErrorOf({"m", "--enable-expert-parallel"}), "--enable-expert-parallel: MoE models are not supported");
  EXPECT_EQ(ErrorOf({"m", "-dp", "2"}), "-dp = 2: one engine only");
  EXPECT_EQ(ErrorOf({"m", "-dp", "1", "--no-enable-expert-parallel"}), "");
}

TEST(Options, FileThenCommandLine) {
  const std::string path = WriteTemp(
      "model: from/file\nport: 7000\nmax_model_len: 4K\napi-key: [x, y]\nenable-chunked-prefill: false\n"
      "hf-overrides:\n  rope_theta: 7\n  name: '7'\n  deep: {a: [1, true, x]}\ntensor-parallel-size: 2\n");
  Fixture f;
  f.set.Parse({"--config", path, "--port", "7001", "--hf-overrides.rope_theta", "8"});
  EXPECT_EQ(f.v.model, "from/file");
  EXPECT_EQ(f.v.port, 7001);
  EXPECT_EQ(f.v.length, 4096);
  EXPECT_EQ(f.v.keys, (std::vector<std::string>{"x", "y"}));
  EXPECT_FALSE(f.v.chunked);
  EXPECT_EQ(f.v.tp, 2);
  EXPECT_EQ(f.v.overrides, nlohmann::json::parse(R"({"rope_theta": 8, "name": "7", "deep": {"a": [1, true, "x"]}})"));
  Fixture g;
  g.set.Parse({"from/cli", "--config=" + path, "--api-key", "z"});
  EXPECT_EQ(g.v.model, "from/cli");
  EXPECT_EQ(g.v.keys, std::vector<std::string>{"z"});
  std::filesystem::remove(path);
}

TEST(Options, FileErrorsNameTheLine) {
  const auto error = [](const std::string& text) {
    const std::string path = WriteTemp(text);
    std::string message = ErrorOf({"m", "--config", path});
    std::filesystem::remove(path);
    for (size_t at; (at = message.find(path)) != std::string::npos;)
      message = message.substr(0, at) + std::string("F") + message.substr(at + path.size());
    return message;
  };
  EXPECT_EQ(error("dtype: auto\nport: 0\n"), "F:2: port = 0: must be from 1 to 65535");
  EXPECT_EQ(error("prot: 1\n"), "unknown option 'prot' (F:1); did you mean --port?");
  EXPECT_EQ(error("port: [1]\n"), "F:1: port: must be a single value, not a list");
  EXPECT_EQ(error("port: 1\nport: 2\n"), "F:2: port: stands twice in this file");
  EXPECT_EQ(error("port:\n"), "F:1: port: has no value");
  EXPECT_EQ(error("- port\n"), "--config F: must be a YAML mapping of option names to values");
  EXPECT_EQ(error("\ndata-parallel-size: 2\n"), "F:2: data-parallel-size = 2: one engine only");
  EXPECT_EQ(error("hf-overrides: 3\n"), "F:1: hf-overrides = 3: must be a JSON object");
  EXPECT_NE(error("port: [1\n").find("--config F:"), std::string::npos);
  EXPECT_EQ(ErrorOf({"m", "--config", "/nonexistent/x.yaml"}), "--config /nonexistent/x.yaml: cannot read this file");
}

TEST(Options, TextsThatBeginWithADash) {
  Fixture f;
  f.set.Parse({"m", "--uds", "- a list item", "--max-model-len", "5"});
  EXPECT_EQ(f.v.uds, "- a list item");
  Fixture g;
  g.set.Parse({"--", "-model"});
  EXPECT_EQ(g.v.model, "-model");
}

TEST(Options, HelpShowsEveryOption) {
  Fixture f;
  EXPECT_EQ(f.set.Parse({"--help"}), OptionSet::Action::kHelp);
  EXPECT_EQ(f.set.Parse({"m", "--help-markdown"}), OptionSet::Action::kHelpMarkdown);
  const std::string help = f.set.Help(), markdown = f.set.Markdown();
  for (const char* name :
       {"--dtype {auto,bfloat16,float32}", "--max-model-len N", "--enforce-eager, --no-enforce-eager",
        "--tensor-parallel-size, -tp N", "Default: the model's.", "Default: 8000."}) {
    EXPECT_NE(help.find(name), std::string::npos) << name << "\n" << help;
  }
  EXPECT_NE(markdown.find("| `--port N` | `8000` | TCP port. (must be from 1 to 65535) |"), std::string::npos)
      << markdown;
}

TEST(Options, HumanReadableIntegers) {
  EXPECT_EQ(ParseHumanInt("1k"), 1000);
  EXPECT_EQ(ParseHumanInt("1K"), 1024);
  EXPECT_EQ(ParseHumanInt("25.6k"), 25600);
  EXPECT_EQ(ParseHumanInt("2G"), int64_t{2} << 30);
  EXPECT_EQ(ParseHumanInt("1.5g"), 1500000000);
  EXPECT_EQ(ParseHumanInt("-1"), -1);
  for (const char* bad : {"", "k", "1kk", "1 k", "ten", "1e30g", "0x10"}) EXPECT_FALSE(ParseHumanInt(bad)) << bad;
}

}  // namespace
}  // namespace weft
