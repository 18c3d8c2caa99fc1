#include "weft/parallel/processes.h"

#include <charconv>
#include <cstdlib>
#include <cstring>

namespace weft {
namespace {

// The first of these variables that is set to a number. Open MPI's own, PMIx' (srun --mpi=pmix, prun), PMI's (Hydra).
int FromEnvironment(std::initializer_list<const char*> names, int otherwise) {
  for (const char* name : names) {
    const char* text = std::getenv(name);
    if (text == nullptr) continue;
    int value = 0;
    const char* end = text + std::strlen(text);
    if (std::from_chars(text, end, value).ptr == end && end != text) return value;
  }
  return otherwise;
}

}  // namespace

int LaunchedProcesses() { return FromEnvironment({"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"}, 1); }
int LaunchedProcessIndex() { return FromEnvironment({"OMPI_COMM_WORLD_RANK", "PMI_RANK"}, 0); }

std::vector<std::vector<std::byte>> Processes::AllGather(std::span<const std::byte> mine) {
  std::vector<std::vector<std::byte>> all(static_cast<size_t>(size()));
  all[static_cast<size_t>(rank())].assign(mine.begin(), mine.end());
  // By turns: these are rare and small, and nobody waits inside Send for a receiver that is sending, too.
  for (int from = 0; from < size(); ++from) {
    for (int to = 0; to < size(); ++to) {
      if (from == to) continue;
      if (from == rank()) Send(to, mine);
      if (to == rank()) all[static_cast<size_t>(from)] = Receive(from);
    }
  }
  return all;
}

}  // namespace weft
