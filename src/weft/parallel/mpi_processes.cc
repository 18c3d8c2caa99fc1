#include "weft/parallel/mpi_processes.h"

#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <thread>

#include "weft/core/log.h"
#include "weft/core/thread_pool.h"
#if defined(OPEN_MPI) && __has_include(<mpi-ext.h>)
#include <mpi-ext.h>
#endif

namespace weft {
namespace {

constexpr int kNoticeTag = 0;
constexpr int kMessageTag = 1;
constexpr int kFirstGroupTag = 2;
constexpr size_t kNoticeBytes = 1024;
// While data is on its way beside compute: how long the thread that moves it sleeps when there was nothing to move. A
// socket's buffer holds a few MB, so this keeps up with several GB/s; what it costs was lost in noise (a TTFT of 19 s).
constexpr auto kCarryInterval = std::chrono::microseconds(200);
// A poll that takes longer than this, and than some of the shortest ones, has moved something.
constexpr auto kEmptyPoll = std::chrono::microseconds(8);
constexpr int kShortestPolls = 3;
// Below the 2^31 that a count can say, and whole pages.
constexpr size_t kPieceBytes = size_t{1} << 30;

std::string ErrorText(int code) {
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) return fmt::format("MPI error {}", code);
  return {text, static_cast<size_t>(length)};
}

bool IsDeath([[maybe_unused]] int code) {
#if defined(MPIX_ERR_PROC_FAILED)
  int error_class = MPI_SUCCESS;
  MPI_Error_class(code, &error_class);
  return error_class == MPIX_ERR_PROC_FAILED || error_class == MPIX_ERR_PROC_FAILED_PENDING;
#else
  return false;
#endif
}

void StartMpi() {
  int started = 0;
  MPI_Initialized(&started);
  if (started != 0) return;
  // Open MPI would yield the core inside each look that finds nothing, with the library's lock held (by itself where
  // there are more processes than cores). Those who wait know better when: see Await.
  setenv("OMPI_MCA_mpi_yield_when_idle", "0", 0);
  TakeShortTurns();  // what waits inside MPI, where processes meet, only spins
  int level = MPI_THREAD_SINGLE;
  if (const int code = MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &level); code != MPI_SUCCESS) {
    throw Error("MPI cannot start: " + ErrorText(code), ErrorKind::kInternal);
  }
  if (level < MPI_THREAD_SERIALIZED) Throw("this MPI cannot be called from several threads (MPI_THREAD_SERIALIZED)");
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  MPI_Comm_set_errhandler(MPI_COMM_SELF, MPI_ERRORS_RETURN);
}

}  // namespace

bool BuiltWithMpi() { return true; }

std::mutex& MpiLock() {
  static std::mutex* const mutex = new std::mutex;  // used up to the end of the process
  return *mutex;
}

std::shared_ptr<Processes> Processes::Join() {
  MPI_Comm comm = MPI_COMM_NULL;
  {
    const std::lock_guard lock(MpiLock());
    StartMpi();
    if (const int code = MPI_Comm_dup(MPI_COMM_WORLD, &comm); code != MPI_SUCCESS) {
      throw Error("the processes cannot meet: " + ErrorText(code), ErrorKind::kInternal);
    }
    MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN);
  }
  return std::make_shared<MpiProcesses>(comm);
}

void Processes::Finish() {
  int started = 0;
  int finished = 0;
  MPI_Initialized(&started);
  MPI_Finalized(&finished);
  if (started != 0 && finished == 0) MPI_Finalize();
}

void ExitAfterFailure(bool all) {
  spdlog::default_logger()->flush();
  std::fflush(nullptr);
  int started = 0;
  MPI_Initialized(&started);
  if (all && started != 0) {
    // Whatever happens below, this process ends.
    std::thread([] {
      std::this_thread::sleep_for(std::chrono::seconds(6));
      _exit(1);
    }).detach();
    // mpirun, or its daemon on this host, takes SIGTERM as the order to end the job: it kills stopped processes, too,
    // and its own status is not 0. MPI_Abort alone leaves the stopped ones behind, and ends with status 0 after a death
    // that was reported (Open MPI 5.0.11 with ULFM).
    std::ifstream parent(fmt::format("/proc/{}/comm", getppid()));
    std::string name;
    std::getline(parent, name);
    for (const char* launcher : {"mpirun", "prterun", "prted", "prte", "orterun", "orted"}) {
      if (name != launcher) continue;
      std::signal(SIGTERM, SIG_IGN);  // which comes back from there, before SIGKILL does
      kill(getppid(), SIGTERM);
      std::this_thread::sleep_for(std::chrono::seconds(3));
    }
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
  _exit(1);
}

MpiProcesses::MpiProcesses(MPI_Comm comm) : comm_(comm), next_tag_(kFirstGroupTag) {
  MPI_Comm_rank(comm, &rank_);
  MPI_Comm_size(comm, &size_);
  dead_ = std::vector<std::atomic<bool>>(static_cast<size_t>(size_));

  {
    const std::lock_guard lock(MpiLock());
    char name[MPI_MAX_PROCESSOR_NAME] = {};
    int length = 0;
    MPI_Get_processor_name(name, &length);
    std::vector<char> all(static_cast<size_t>(size_) * MPI_MAX_PROCESSOR_NAME);
    if (const int code =
            MPI_Allgather(name, MPI_MAX_PROCESSOR_NAME, MPI_CHAR, all.data(), MPI_MAX_PROCESSOR_NAME, MPI_CHAR, comm_);
        code != MPI_SUCCESS) {
      throw Error("the processes cannot meet: " + ErrorText(code), ErrorKind::kInternal);
    }
    for (int p = 0; p < size_; ++p) {
      hosts_.emplace_back(all.data() + static_cast<ptrdiff_t>(p) * MPI_MAX_PROCESSOR_NAME);
    }
    for (int p = 0; p < size_; ++p) {
      if (p == rank_) continue;
      Notice& notice = notices_.emplace_back(Notice{p, std::vector<char>(kNoticeBytes)});
      MPI_Request& request = notice_requests_.emplace_back(MPI_REQUEST_NULL);
      Note(MPI_Irecv(notice.text.data(), kNoticeBytes, MPI_CHAR, p, kNoticeTag, comm_, &request), p);
    }
  }
  const auto here = std::count(hosts_.begin(), hosts_.end(), hosts_[static_cast<size_t>(rank_)]);
  oversubscribed_ = static_cast<size_t>(here) > std::max(AllowedCpus().size(), size_t{1}) ||
                    std::thread::hardware_concurrency() < static_cast<unsigned>(here);
  carrier_ = std::thread([this] { Carry(); });
}

MpiProcesses::~MpiProcesses() {
  {
    const std::lock_guard lock(carry_mutex_);
    stopping_ = true;
    carry_wake_.notify_one();
  }
  carrier_.join();
  const std::lock_guard lock(MpiLock());
  int finished = 0;
  MPI_Finalized(&finished);
  if (finished != 0) return;
  if (failed_) {
    // MPI must not be moved on (see PollLocked), so that the open receives stay, with their memory, to the end.
    static auto* const left_behind = new std::vector<std::vector<Notice>>;
    left_behind->push_back(std::move(notices_));
    return;
  }
  for (MPI_Request& request : notice_requests_) {
    if (request == MPI_REQUEST_NULL) continue;
    MPI_Cancel(&request);
    // The buffer goes with this object, so the cancelled receive must be over. It is at once, save for dead peers.
    int done = 0;
    for (int i = 0; i < 1000 && done == 0; ++i) {
      if (MPI_Test(&request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS) break;
    }
  }
  MPI_Comm_free(&comm_);
}

bool MpiProcesses::reports_deaths() const {
#if defined(MPIX_ERR_PROC_FAILED)
  // What `mpirun --with-ft ulfm` sets.
  for (const char* name : {"OMPI_MCA_mpi_ft_enable", "PRTE_MCA_prte_enable_ft"}) {
    const char* value = std::getenv(name);
    if (value != nullptr && std::strcmp(value, "0") != 0 && std::strcmp(value, "false") != 0) return true;
  }
#endif
  return false;
}

void MpiProcesses::SetDeadline(std::optional<Clock::time_point> deadline, double limit_s) {
  limit_s_ = limit_s;
  deadline_ = deadline ? deadline->time_since_epoch().count() : 0;
}

void MpiProcesses::SetFailure(std::string why) {
  const std::lock_guard lock(failure_mutex_);
  if (failed_) return;
  failure_ = std::move(why);
  failed_.store(true, std::memory_order_release);
}

void MpiProcesses::ThrowFailure() const {
  const std::lock_guard lock(failure_mutex_);
  throw Error(failure_, ErrorKind::kInternal);
}

void MpiProcesses::Late(const std::string& waits_for) {
  const std::string why = fmt::format("process {} ({}) has had no answer from {} within {} s (--step-timeout)", rank_,
                                      hosts_[static_cast<size_t>(rank_)], waits_for, limit_s_.load());
  Fail(why);
  ThrowFailure();
}

std::string MpiProcesses::Failure() {
  Poll();
  const std::lock_guard lock(failure_mutex_);
  return failure_;
}

void MpiProcesses::Note(int code, int peer) {
  if (code == MPI_SUCCESS) return;
  const std::string who = fmt::format("process {} ({})", peer, hosts_[static_cast<size_t>(peer)]);
  if (IsDeath(code)) {
    dead_[static_cast<size_t>(peer)] = true;
    told_ = true;  // MPI tells everybody
  }
  SetFailure(IsDeath(code) ? who + " has died" : fmt::format("{}: {}", who, ErrorText(code)));
}

void MpiProcesses::Fail(const std::string& why) {
  if (told_.exchange(true)) {  // or somebody is about to tell, or has been told
    Backoff backoff(0);
    while (!failed_.load(std::memory_order_acquire)) backoff.Pause();
    return;
  }
  const std::string first = failed_ ? Failure() : why;  // an error of MPI, which nobody else sees, may come before it
  std::vector<MPI_Request> requests;
  {
    const std::lock_guard lock(MpiLock());
    // Never freed: a peer that does not take it must not find other things in it.
    auto* text = new std::string(first.substr(0, kNoticeBytes));
    for (const Notice& notice : notices_) {
      MPI_Request request = MPI_REQUEST_NULL;
      if (MPI_Isend(text->data(), static_cast<int>(text->size()), MPI_CHAR, notice.peer, kNoticeTag, comm_, &request) ==
          MPI_SUCCESS) {
        requests.push_back(request);
      }
    }
  }
  // Out of the door before anything else is done, exiting above all; the dead and the stuck get some moments only. The
  // other threads wait on till then: what they receive, and this moves on, must not come after their memory has gone.
  const auto until = Clock::now() + std::chrono::milliseconds(500);
  Backoff backoff(0);
  while (!requests.empty() && Clock::now() < until) {
    {
      const std::lock_guard lock(MpiLock());
      if (failed_) break;
      std::erase_if(requests, [](MPI_Request& request) {
        int done = 0;
        return MPI_Test(&request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS || done != 0;
      });
    }
    backoff.Pause();
  }
  SetFailure(why);
}

void MpiProcesses::PollLocked() {
  // After a failure messages of a broken-off exchange may still be under way, from or into memory that has gone.
  if (notice_requests_.empty() || failed_) return;
  int index = MPI_UNDEFINED;
  int done = 0;
  MPI_Status status;
  const int code =
      MPI_Testany(static_cast<int>(notice_requests_.size()), notice_requests_.data(), &index, &done, &status);
  if (code != MPI_SUCCESS) {
    Note(code, index == MPI_UNDEFINED ? rank_ : notices_[static_cast<size_t>(index)].peer);
  } else if (done != 0 && index != MPI_UNDEFINED) {
    const Notice& notice = notices_[static_cast<size_t>(index)];
    int length = 0;
    MPI_Get_count(&status, MPI_CHAR, &length);
    told_ = true;
    SetFailure(std::string(notice.text.data(), static_cast<size_t>(std::max(length, 0))));
  }
}

void MpiProcesses::Poll() {
  SayBusy();
  const std::unique_lock lock(MpiLock(), std::try_to_lock);
  if (lock) PollLocked();
}

void MpiProcesses::StartCarrying() {
  const std::lock_guard lock(carry_mutex_);
  ++carried_;
  carry_wake_.notify_one();
}

void MpiProcesses::StopCarrying() {
  const std::lock_guard lock(carry_mutex_);
  --carried_;
}

void MpiProcesses::Carry() {
  Clock::duration shortest = Clock::duration::max() / kShortestPolls;
  std::unique_lock lock(carry_mutex_);
  while (true) {
    carry_wake_.wait(lock, [&] { return stopping_ || carried_ > 0; });
    if (stopping_) return;
    lock.unlock();
    // Who waits for messages moves them, and must find the library's lock free: most only try it.
    bool moved = false;
    if (!busy_.exchange(false, std::memory_order_relaxed)) {
      const std::unique_lock library(MpiLock(), std::try_to_lock);
      if (library) {
        const auto began = Clock::now();
        PollLocked();
        const Clock::duration took = Clock::now() - began;
        // One that has moved something is followed by the next at once, for a socket is emptied piece by piece. One
        // that has not takes a microsecond on some machines and ten on others.
        shortest = std::min(shortest, took);
        moved = took > std::max<Clock::duration>(kEmptyPoll, kShortestPolls * shortest);
      }
    }
    if (!moved) std::this_thread::sleep_for(kCarryInterval);
    lock.lock();
  }
}

void MpiProcesses::PostSend(int to, int tag, std::span<const std::byte> bytes, std::vector<Request>& requests) {
  SayBusy();
  const std::lock_guard lock(MpiLock());
  size_t first = 0;
  do {
    const size_t n = std::min(kPieceBytes, bytes.size() - first);
    Request& request = requests.emplace_back(Request{MPI_REQUEST_NULL, to});
    Note(MPI_Isend(bytes.data() + first, static_cast<int>(n), MPI_BYTE, to, tag, comm_, &request.request), to);
    first += n;
  } while (first < bytes.size());
}

void MpiProcesses::PostReceive(int from, int tag, std::span<std::byte> bytes, std::vector<Request>& requests) {
  SayBusy();
  const std::lock_guard lock(MpiLock());
  size_t first = 0;
  do {
    const size_t n = std::min(kPieceBytes, bytes.size() - first);
    Request& request = requests.emplace_back(Request{MPI_REQUEST_NULL, from});
    Note(MPI_Irecv(bytes.data() + first, static_cast<int>(n), MPI_BYTE, from, tag, comm_, &request.request), from);
    first += n;
  } while (first < bytes.size());
}

bool MpiProcesses::TestAll(std::vector<Request>& requests) {
  if (requests.empty()) return true;
  SayBusy();
  const std::unique_lock lock(MpiLock(), std::try_to_lock);
  if (!lock) return false;
  // Each test is a look at the network, so the first that is not done is enough for now.
  while (!requests.empty()) {
    int done = 0;
    const int code = MPI_Test(&requests.back().request, &done, MPI_STATUS_IGNORE);
    if (code != MPI_SUCCESS) {
      Note(code, requests.back().peer);  // so that nobody asks for this request again
      return false;
    }
    if (done == 0) return false;
    requests.pop_back();
  }
  return true;
}

void MpiProcesses::Abandon(std::vector<Request>& requests) {
  const std::lock_guard lock(MpiLock());
  for (auto& [request, peer] : requests) {
    if (request == MPI_REQUEST_NULL) continue;
    MPI_Cancel(&request);
    int done = 0;
    if (MPI_Test(&request, &done, MPI_STATUS_IGNORE) == MPI_SUCCESS && done == 0) MPI_Request_free(&request);
  }
  requests.clear();
}

void MpiProcesses::Send(int to, std::span<const std::byte> bytes) {
  ThrowIfFailed();
  std::vector<Request> requests;
  uint64_t size = bytes.size();
  PostSend(to, kMessageTag, std::as_bytes(std::span(&size, 1)), requests);
  if (size > 0) PostSend(to, kMessageTag, bytes, requests);
  try {
    Await([&] { return TestAll(requests); }, [&] { return fmt::format("process {}", to); });
  } catch (...) {
    Abandon(requests);
    throw;
  }
}

std::vector<std::byte> MpiProcesses::Receive(int from, FunctionRef<void()> idle) {
  ThrowIfFailed();
  std::vector<Request> requests;
  uint64_t size = 0;
  std::vector<std::byte> bytes;
  const auto who = [&] { return fmt::format("process {} ({})", from, hosts_[static_cast<size_t>(from)]); };
  const auto arrived = [&] {
    if (TestAll(requests)) return true;
    idle();
    return false;
  };
  try {
    PostReceive(from, kMessageTag, std::as_writable_bytes(std::span(&size, 1)), requests);
    Await(arrived, who);
    bytes.resize(size);
    if (size > 0) {
      PostReceive(from, kMessageTag, bytes, requests);
      Await(arrived, who);
    }
  } catch (const std::exception& e) {
    Fail(e.what());  // while there is memory for what may still come
    Abandon(requests);
    throw;
  }
  return bytes;
}

std::vector<std::unique_ptr<Communicator>> MpiProcesses::MakeGroup(std::span<const int> process_of) {
  WEFT_CHECK(!process_of.empty());
  const int first_tag = next_tag_;
  next_tag_ += static_cast<int>(process_of.size()) + 1;  // one a member, and the barrier's
  for (const int p : process_of) WEFT_CHECK(p >= 0 && p < size_, "process {} of {}", p, size_);
  if (std::all_of(process_of.begin(), process_of.end(), [&](int p) { return p == process_of[0]; })) {
    if (process_of[0] == rank_) return MakeInProcessGroup(static_cast<int>(process_of.size()));
    return std::vector<std::unique_ptr<Communicator>>(process_of.size());
  }
  return MakeMpiGroup(shared_from_this(), process_of, first_tag);
}

}  // namespace weft
