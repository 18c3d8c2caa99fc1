// In place of mpi_processes.cc where no MPI was found when weft was configured.
#include <cstdlib>

#include "weft/core/error.h"
#include "weft/parallel/processes.h"

namespace weft {

bool BuiltWithMpi() { return false; }

std::shared_ptr<Processes> Processes::Join() {
  Throw(
      "this weft was built without MPI and runs in one process only: run scripts/setup, which installs Open MPI, or "
      "install libopenmpi-dev, then configure and build again");
}

void Processes::Finish() {}

void ExitAfterFailure(bool) { std::_Exit(1); }

}  // namespace weft
