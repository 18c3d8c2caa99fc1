#pragma once
// The processes of one weft instance, started together by mpirun, on one host or on several.

#include <atomic>
#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "weft/core/function_ref.h"
#include "weft/parallel/communicator.h"

namespace weft {

// How many processes mpirun has started together with this one, as the environment tells; 1 without mpirun. Asks
// nothing of MPI.
int LaunchedProcesses();
// This one's number among them, 0 without mpirun.
int LaunchedProcessIndex();

// Whether this program was built with MPI.
bool BuiltWithMpi();

// All processes as one party that works or fails as a whole: once one of them has failed, died, or not answered in
// time, every pending and later call of every process throws weft::Error (kInternal) with the first reason known here.
// There is no way back: the processes are to end (see ExitAfterFailure). All methods may be called from any thread,
// except that Send and Receive with one peer are for one thread at a time.
//
// What it is made of: MPI point-to-point messages between processes and nothing else of MPI. The groups of ranks are
// small and their data goes to all anyway, so that a library's collectives would send the very same messages; but these
// can be addressed per rank (several ranks of a process take part in one group), are received where they are read, are
// not limited to 2^31 bytes in all, and leave no schedule inside MPI that has to be unwound when a peer dies. Calls
// into MPI are made one at a time (MPI_THREAD_SERIALIZED) under a lock that waiting threads only try for: progress in
// MPI is one thread's work at a time anyway, and whoever polls moves everybody's messages.
class Processes {
 public:
  using Clock = std::chrono::steady_clock;

  // Collective over all processes: each call is one more party of its own, with its own failure. The first one starts
  // MPI. Throws weft::Error where the program was built without MPI or MPI cannot start.
  static std::shared_ptr<Processes> Join();
  virtual ~Processes() = default;
  // The last thing that a process does with its peers when all went well. Collective.
  static void Finish();

  virtual int rank() const = 0;
  virtual int size() const = 0;
  // The host's name, by process.
  virtual const std::vector<std::string>& hosts() const = 0;
  // Whether a process that dies is reported by MPI (ULFM, `mpirun --with-ft ulfm`). Else mpirun ends all others.
  virtual bool reports_deaths() const = 0;

  // Until then, and not longer, a call waits for its peers. nullopt: for ever. `limit` stands in the message, seconds.
  virtual void SetDeadline(std::optional<Clock::time_point> deadline, double limit_s) = 0;

  // Empty while all is well. Looks at the network: a dead peer is noticed by whoever calls this from time to time.
  virtual std::string Failure() = 0;
  // Whether this process was told by MPI that another one has died.
  virtual bool IsDead(int process) const = 0;
  // Tells all processes.
  virtual void Fail(const std::string& why) = 0;

  // A message to another process; returns when `bytes` may be written to again.
  virtual void Send(int to, std::span<const std::byte> bytes) = 0;
  // The next message of `from`. `idle` is called over and over while there is none; to wait for long without taking a
  // core it sleeps. When it throws, the processes have failed, for its reason.
  virtual std::vector<std::byte> Receive(int from, FunctionRef<void()> idle) = 0;
  std::vector<std::byte> Receive(int from) {
    return Receive(from, [] {});
  }

  // What every process gave, by process. Collective over all processes, by one thread of each.
  std::vector<std::vector<std::byte>> AllGather(std::span<const std::byte> mine);

  // The communicators of those of the group's members that are ranks of this process: `process_of[i]` is the process
  // of member i, `member[i]` is null where that is another one. Where all are here it is an in-process group.
  // Collective: every process makes the same groups in the same order, also those that it has no member in. They keep
  // this object alive. Abort of one is Fail.
  virtual std::vector<std::unique_ptr<Communicator>> MakeGroup(std::span<const int> process_of) = 0;
};

// Ends the process at once, status 1, past MPI_Finalize, which could wait for the dead for ever. With `all` it takes
// every other process of the job along, also those that are stuck.
[[noreturn]] void ExitAfterFailure(bool all);

}  // namespace weft
