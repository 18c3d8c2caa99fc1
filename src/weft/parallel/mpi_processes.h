#pragma once
// Processes over MPI, as the groups of mpi_group.cc see it. Not for other folders: it brings MPI's header with it.

// The C++ bindings that Open MPI 4 can still have are not wanted.
#define OMPI_SKIP_MPICXX 1
#include <mpi.h>

#include <condition_variable>
#include <mutex>
#include <thread>

#include "weft/core/error.h"
#include "weft/core/wait.h"
#include "weft/parallel/processes.h"

namespace weft {

class MpiProcesses final : public Processes, public std::enable_shared_from_this<MpiProcesses> {
 public:
  explicit MpiProcesses(MPI_Comm comm);
  ~MpiProcesses() override;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  const std::vector<std::string>& hosts() const override { return hosts_; }
  bool reports_deaths() const override;
  void SetDeadline(std::optional<Clock::time_point> deadline, double limit_s) override;
  std::string Failure() override;
  bool IsDead(int process) const override { return dead_[static_cast<size_t>(process)]; }
  void Fail(const std::string& why) override;
  void Send(int to, std::span<const std::byte> bytes) override;
  std::vector<std::byte> Receive(int from, FunctionRef<void()> idle) override;
  std::vector<std::unique_ptr<Communicator>> MakeGroup(std::span<const int> process_of) override;

  struct Request {
    MPI_Request request = MPI_REQUEST_NULL;
    int peer = 0;
  };
  // What groups are made of. A message of any size may go in several pieces; both sides know its size.
  void PostSend(int to, int tag, std::span<const std::byte> bytes, std::vector<Request>& requests);
  void PostReceive(int from, int tag, std::span<std::byte> bytes, std::vector<Request>& requests);
  // Takes the completed ones out; true when none is left. May do nothing while another thread is inside MPI.
  bool TestAll(std::vector<Request>& requests);
  // Moves all messages that are under way and looks for bad news. Does nothing while another thread is inside MPI.
  void Poll();
  // From StartCarrying to StopCarrying (which may be nested, of any threads) a thread of this process moves messages
  // while the others compute: MPI by itself does so only inside its calls.
  void StartCarrying();
  void StopCarrying();
  void ThrowIfFailed() const {
    if (failed_.load(std::memory_order_acquire)) [[unlikely]]
      ThrowFailure();
  }

  // Polls `done` until it holds. Throws when the processes have failed or the deadline is over; `waits_for` says for
  // whom, in the message.
  template <typename Done, typename WaitsFor>
  void Await(Done done, WaitsFor waits_for) {
    // A look into MPI takes a good part of a microsecond, so these are some 20 us.
    Backoff backoff(oversubscribed_ ? 0 : 40);
    for (uint32_t i = 0; !done(); ++i) {
      ThrowIfFailed();
      if (i % 16 == 15 || backoff.sleeps()) {
        Poll();
        ThrowIfLate(waits_for);
      }
      backoff.Pause();
    }
  }

  // The member's requests are not waited for any more: the group has failed.
  void Abandon(std::vector<Request>& requests);

 private:
  [[noreturn]] void ThrowFailure() const;
  template <typename WaitsFor>
  void ThrowIfLate(WaitsFor waits_for) {
    const int64_t deadline = deadline_.load(std::memory_order_relaxed);
    if (deadline == 0 || Clock::now().time_since_epoch().count() < deadline) return;
    Late(waits_for());
  }
  [[noreturn]] void Late(const std::string& waits_for);
  // With the library's lock held: `code` is what a call of MPI returned about `peer`.
  void Note(int code, int peer);
  void SetFailure(std::string why);
  void PollLocked();
  void Carry();
  // A thread other than the carrier is about to look into MPI.
  void SayBusy() {
    if (!busy_.load(std::memory_order_relaxed)) busy_.store(true, std::memory_order_relaxed);
  }

  MPI_Comm comm_;
  int rank_ = 0;
  int size_ = 0;
  int next_tag_;
  bool oversubscribed_ = false;
  std::vector<std::string> hosts_;  // by process
  std::vector<std::atomic<bool>> dead_;

  std::atomic<bool> failed_{false};
  std::atomic<bool> told_{false};  // the others know it, or find out by themselves
  mutable std::mutex failure_mutex_;
  std::string failure_;

  std::atomic<int64_t> deadline_{0};  // of Clock; 0: none
  std::atomic<double> limit_s_{0};

  // One receive from every peer stands open all the time: bad news come in by it, and its error is the bad news when
  // the peer dies.
  struct Notice {
    int peer = 0;
    std::vector<char> text;
  };
  std::vector<Notice> notices_;
  std::vector<MPI_Request> notice_requests_;  // by notice; under the library's lock

  std::atomic<bool> busy_{false};  // SayBusy; taken back by the carrier
  std::mutex carry_mutex_;         // guards what follows
  std::condition_variable carry_wake_;
  int carried_ = 0;
  bool stopping_ = false;
  std::thread carrier_;
};

// The lock around every call into MPI.
std::mutex& MpiLock();

std::vector<std::unique_ptr<Communicator>> MakeMpiGroup(std::shared_ptr<MpiProcesses> processes,
                                                        std::span<const int> process_of, int first_tag);

}  // namespace weft
