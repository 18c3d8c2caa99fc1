#include "weft/cli/multi_process.h"

#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <cstring>
#include <fstream>
#include <set>
#include <thread>

#include "weft/core/error.h"
#include "weft/core/log.h"

namespace weft::cli {
namespace {

// What a follower has after SIGTERM before the kernel ends it, whatever it is doing.
constexpr unsigned kSecondsAfterSigterm = 5;

// Of this process, for how its end has to be.
std::shared_ptr<Processes>& Joined() {
  static std::shared_ptr<Processes> joined;
  return joined;
}

// Arguments of this process, as they were given.
std::vector<std::string> OwnCommandLine() {
  std::ifstream file("/proc/self/cmdline", std::ios::binary);
  std::vector<std::string> argv;
  for (std::string argument; std::getline(file, argument, '\0');) argv.push_back(argument);
  return argv;
}

std::string ShellQuoted(const std::string& text) {
  const bool plain = !text.empty() && text.find_first_not_of(
                                          "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                          "0123456789-_=+./:,@%") == std::string::npos;
  if (plain) return text;
  std::string quoted = "'";
  for (const char c : text) {
    if (c == '\'') {
      quoted += "'\\''";
    } else {
      quoted += c;
    }
  }
  quoted += '\'';
  return quoted;
}

}  // namespace

std::string MpirunLine(const std::vector<std::string>& argv, int processes) {
  std::string hosts = "HOST0:1";
  for (int i = 1; i < processes; ++i) hosts += fmt::format(",HOST{}:1", i);
  std::string line = fmt::format("mpirun --with-ft ulfm --bind-to none -n {} --host {}", processes, hosts);
  for (size_t i = 0; i < argv.size(); ++i) {
    const std::string spelling = argv[i].substr(0, argv[i].find('='));
    const std::string name = NormalisedFlag(spelling);
    if (name == "--headless" || name == "--no-headless") continue;
    const std::array with_value = {"--nnodes", "-n", "--node-rank", "-r", "--master-addr", "--master-port"};
    if (std::find(with_value.begin(), with_value.end(), name) != with_value.end()) {
      if (spelling == argv[i]) ++i;  // the value is the next argument
      continue;
    }
    line += ' ';
    line += ShellQuoted(argv[i]);
  }
  return line;
}

std::shared_ptr<Processes> JoinProcesses(const EngineArgs& args) {
  const EngineArgs::Nodes& nodes = args.nodes;
  const int launched = LaunchedProcesses();
  if (launched == 1) {
    if (nodes.count > 1 || nodes.rank > 0 || nodes.headless) {
      throw Error(fmt::format("{}: weft's processes on several hosts are started together, by mpirun on one of the "
                              "hosts, which takes the place of --nnodes, --node-rank, --master-addr, --master-port and "
                              "--headless:\n  {}",
                              nodes.count > 1  ? fmt::format("--nnodes = {}", nodes.count)
                              : nodes.headless ? "--headless"
                                               : fmt::format("--node-rank = {}", nodes.rank),
                              MpirunLine(OwnCommandLine(), std::max(nodes.count, 2))),
                  ErrorKind::kInvalidArgument, "--nnodes");
    }
    return nullptr;
  }
  if (LaunchedProcessIndex() > 0) {
    spdlog::default_logger()->set_pattern(
        fmt::format("%Y-%m-%d %H:%M:%S.%e %^%l%$ [process {}] %v", LaunchedProcessIndex()));
  }
  // Nobody outlives mpirun (its daemon on this host), not even who has been stopped.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  auto processes = Processes::Join();
  Joined() = processes;
  const std::set<std::string> hosts(processes->hosts().begin(), processes->hosts().end());
  if (nodes.count > 1 && nodes.count != static_cast<int>(hosts.size()) && nodes.count != processes->size()) {
    throw Error(fmt::format("--nnodes = {}: mpirun has started {} processes on {} hosts ({})", nodes.count,
                            processes->size(), hosts.size(), fmt::join(hosts, ", ")),
                ErrorKind::kInvalidArgument, "--nnodes");
  }
  if (processes->rank() > 0) {
    // They come to all processes together (Ctrl-C, mpirun's end). Process 0 drains, and then lets the others go. Should
    // it not come to that, this one ends all the same: `mpirun --with-ft ulfm` would not insist.
    std::signal(SIGINT, SIG_IGN);
    std::signal(SIGTERM, [](int) { alarm(kSecondsAfterSigterm); });
  } else {
    spdlog::info("{} processes on {} hosts: {}", processes->size(), hosts.size(), fmt::join(hosts, ", "));
  }
  return processes;
}

HostShare ShareOfHost(const cp::ParallelConfig& parallel, const Processes& processes) {
  const int world = parallel.WorldSize();
  const int each = std::max(1, world / processes.size());
  HostShare share{.ranks = 0, .weights = 0};
  for (int p = 0; p < processes.size(); ++p) {
    if (processes.hosts()[static_cast<size_t>(p)] != processes.hosts()[static_cast<size_t>(processes.rank())]) continue;
    share.ranks += static_cast<double>(each) / world;
    std::set<int32_t> slices;
    for (int rank = p * each; rank < std::min(world, (p + 1) * each); ++rank) slices.insert(CoordOf(parallel, rank).tp);
    share.weights += static_cast<double>(slices.size()) / parallel.tensor_parallel;
  }
  return share;
}

KvSize SizeKvCacheOfAll(KvSizeInput input, const HostShare& share, Processes& processes) {
  try {
    // Seen from this host, a block takes what it takes here.
    const auto here = [&](int64_t bytes) { return static_cast<int64_t>(static_cast<double>(bytes) * share.ranks); };
    input.block_bytes = std::max<int64_t>(1, here(input.block_bytes));
    if (input.kv_bytes) input.kv_bytes = here(*input.kv_bytes);
    input.weight_bytes = static_cast<int64_t>(static_cast<double>(input.weight_bytes) * share.weights);
    const KvSize mine = SizeKvCache(input);
    const std::array<int64_t, 2> numbers = {mine.num_blocks, mine.max_model_len};
    KvSize least = mine;
    for (const auto& bytes : processes.AllGather(std::as_bytes(std::span(numbers)))) {
      std::array<int64_t, 2> other{};
      WEFT_CHECK(bytes.size() == sizeof(other));
      std::memcpy(other.data(), bytes.data(), sizeof(other));
      least.num_blocks = std::min(least.num_blocks, other[0]);
      least.max_model_len = std::min(least.max_model_len, other[1]);
    }
    return least;
  } catch (const std::exception& e) {
    processes.Fail(fmt::format("process {}: {}", processes.rank(), e.what()));
    throw;
  }
}

int FinishProcesses(int status, const std::string& why) {
  const std::shared_ptr<Processes> processes = std::move(Joined());
  if (processes == nullptr) return status;
  if (status == 0 && processes->Failure().empty()) {
    Processes::Finish();
    return 0;
  }
  processes->Fail(fmt::format("process {}: {}", processes->rank(), why.empty() ? "has failed" : why));
  // Process 0 tells its clients first and then ends everybody, by SIGTERM; where it is gone, this one does.
  std::signal(SIGTERM, SIG_DFL);
  if (processes->rank() > 0 && !processes->IsDead(0)) std::this_thread::sleep_for(std::chrono::seconds(10));
  // Alone, it has nobody to take along, and mpirun would count an abort of the last process as no error.
  bool others = false;
  for (int p = 0; p < processes->size(); ++p) others |= p != processes->rank() && !processes->IsDead(p);
  ExitAfterFailure(others);
}

}  // namespace weft::cli
