// A group of ranks that live in several processes, some of them maybe together in one. Data goes from the member that
// has it to every other process once; there it is received once, into memory that all members of that process read.
// Members of one process read each other's memory in place.
//
// Every member sends its own data, tagged with its index in the group. One member of each process, the leader, receives
// everything that comes from other processes. Collectives of a group are numbered (epochs), and as in the in-process
// group a member is never more than one ahead of those that share its process: what is kept for one collective lies in
// one of two places by turns, and what views show in one of three.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <utility>

#include "weft/core/buffer.h"
#include "weft/parallel/mpi_processes.h"

namespace weft {
namespace {

using Bytes = std::span<const std::byte>;

// Data of up to so many bytes travels in the message that says how many they are, where the receiver does not know.
constexpr size_t kInlineBytes = 4096;
// From so many bytes on those of StartAllGather are moved on while the ranks compute. Fewer lie in MPI's buffers as
// soon as they are sent, and waking a thread for them would cost more than it brings.
constexpr size_t kCarriedBytes = size_t{64} << 10;
// Views begin at multiples of this in the memory that they are received into.
constexpr size_t kAlignment = 64;

constexpr size_t RoundUp(size_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

// The first message of a member to a process in a collective whose sizes are not known: the sizes of its `items`, then,
// where all of them together are short, the items themselves, each at a multiple of kAlignment.
constexpr size_t HeaderBytes(size_t items) { return RoundUp(items * sizeof(uint64_t)); }

struct alignas(64) Slot {
  std::atomic<uint64_t> epoch{0};  // collectives are numbered from 1
  const std::byte* data = nullptr;
  size_t size = 0;
};

// What the members in one process share.
struct Shared {
  std::shared_ptr<MpiProcesses> processes;
  std::vector<int> process_of;  // by member
  int first_tag = 0;
  std::vector<int> local;                                // members of this process, ascending
  std::vector<int> remote;                               // all others
  std::vector<std::pair<int, std::vector<int>>> others;  // other processes and their members
  std::vector<int> all_processes;                        // of the group, ascending

  std::array<std::vector<Slot>, 2> slots;                // by local index
  std::array<std::vector<std::vector<Bytes>>, 2> parts;  // AllToAll: what each local member gives, by local index
  // What the leader has received in a collective: by member (and, in AllToAll, by local index of whom it is for).
  std::array<std::vector<std::vector<Bytes>>, 2> received;
  // Received bytes stay for the views of the collective before, which are valid up to FinishAllGather: three by turns.
  std::array<Buffer, 3> headers, data;
  alignas(64) std::atomic<uint64_t> received_epoch{0};  // of the last collective that the leader has received all of
};

class MpiGroup final : public Communicator {
 public:
  MpiGroup(std::shared_ptr<Shared> shared, int rank, size_t local_index)
      : s_(std::move(shared)), p_(*s_->processes), rank_(rank), local_index_(local_index) {
    headers_.resize(s_->others.size());
  }
  ~MpiGroup() override { SetCarried(false); }

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(s_->process_of.size()); }
  bool shares_memory() const override { return false; }

  void Barrier() override {
    Guard([&] {
      Enter({});
      AwaitLocal();
      if (leads()) {
        BarrierOfProcesses();
        s_->received_epoch.store(epoch_, std::memory_order_release);
      } else {
        AwaitLeader();
      }
    });
  }

  void Release() override {
    Guard([&] {
      Enter({});
      AwaitLocal();
      if (leads()) s_->received_epoch.store(epoch_, std::memory_order_release);
    });
  }

  void AllGather(Bytes mine, std::vector<Bytes>& views) override {
    Guard([&] {
      Enter(mine);
      std::vector<Incoming> incoming;
      if (leads()) incoming = ReceiveHeaders(1);
      for (size_t i = 0; i < s_->others.size(); ++i) SendWithHeader(i, std::span(&mine, 1));
      if (leads()) ReceiveAll(incoming, 1);
      Complete();
      ViewGathered(views);
    });
  }

  void StartAllGather(Bytes mine, std::span<const size_t> sizes) override {
    Guard([&] {
      WEFT_CHECK(sizes.size() == s_->process_of.size() && sizes[static_cast<size_t>(rank_)] == mine.size());
      Enter(mine);
      started_ = true;
      if (leads()) {
        auto& received = s_->received[epoch_ % 2];
        size_t total = 0;
        for (const int member : s_->remote) total += RoundUp(sizes[static_cast<size_t>(member)]);
        Buffer& data = s_->data[epoch_ % 3];
        data.Reserve(total);
        std::byte* to = data.as<std::byte>();
        for (const int member : s_->remote) {
          const auto m = static_cast<size_t>(member);
          received[m].assign(1, Bytes(to, sizes[m]));
          if (sizes[m] > 0) p_.PostReceive(s_->process_of[m], TagOf(member), {to, sizes[m]}, receives_);
          to += RoundUp(sizes[m]);
        }
      }
      size_t bytes = mine.size() * s_->others.size();
      if (leads()) {
        for (const int member : s_->remote) bytes += sizes[static_cast<size_t>(member)];
      }
      if (!mine.empty()) {
        for (const auto& [process, members] : s_->others) p_.PostSend(process, TagOf(rank_), mine, sends_);
      }
      if (bytes > kCarriedBytes) SetCarried(true);
    });
  }

  void FinishAllGather(std::vector<Bytes>& views) override {
    Guard([&] {
      WEFT_CHECK(std::exchange(started_, false), "FinishAllGather without StartAllGather");
      SetCarried(false);
      p_.ThrowIfFailed();
      if (leads()) {
        Await(receives_);
        s_->received_epoch.store(epoch_, std::memory_order_release);
      }
      Complete();
      ViewGathered(views);
    });
  }

  void AllToAll(std::span<const Bytes> parts, std::vector<Bytes>& views) override {
    Guard([&] {
      WEFT_CHECK(parts.size() == s_->process_of.size());
      p_.ThrowIfFailed();  // a member that left the last collective early may still be read in the one before it
      auto& kept = s_->parts[(epoch_ + 1) % 2][local_index_];
      kept.assign(parts.begin(), parts.end());
      Enter({});
      std::vector<Incoming> incoming;
      if (leads()) incoming = ReceiveHeaders(s_->local.size());
      for (size_t i = 0; i < s_->others.size(); ++i) {
        std::vector<Bytes> items;
        for (const int member : s_->others[i].second) items.push_back(parts[static_cast<size_t>(member)]);
        SendWithHeader(i, items);
      }
      if (leads()) ReceiveAll(incoming, s_->local.size());
      Complete();
      views.resize(s_->process_of.size());
      for (size_t i = 0; i < s_->local.size(); ++i) {
        views[static_cast<size_t>(s_->local[i])] = s_->parts[epoch_ % 2][i][static_cast<size_t>(rank_)];
      }
      for (const int member : s_->remote) {
        const auto m = static_cast<size_t>(member);
        views[m] = s_->received[epoch_ % 2][m][local_index_];
      }
    });
  }

  void Abort() override { p_.Fail(fmt::format("a rank of process {} has failed", p_.rank())); }

 private:
  // A member's data on the way to the leader.
  struct Incoming {
    int member = 0;
    std::byte* header = nullptr;
    std::vector<MpiProcesses::Request> requests;
  };

  void SetCarried(bool carried) {
    if (carried == carried_) return;
    carried_ = carried;
    carried ? p_.StartCarrying() : p_.StopCarrying();
  }

  bool leads() const { return local_index_ == 0; }
  int TagOf(int member) const { return s_->first_tag + member; }

  // Nothing stays open in MPI when a collective throws.
  template <typename F>
  void Guard(F f) {
    try {
      f();
    } catch (...) {
      SetCarried(false);
      p_.Abandon(sends_);
      p_.Abandon(receives_);
      throw;
    }
  }

  template <typename Done>
  void AwaitTrue(Done done) {
    p_.Await(done, [&] {
      std::string who;
      for (const auto& [process, members] : s_->others) {
        who += fmt::format("{}{} ({})", who.empty() ? "process " : ", ", process,
                           p_.hosts()[static_cast<size_t>(process)]);
      }
      return who + (s_->others.size() > 1 ? " (one or more of them)" : "");
    });
  }
  void Await(std::vector<MpiProcesses::Request>& requests) {
    AwaitTrue([&] { return p_.TestAll(requests); });
  }

  void Enter(Bytes mine) {
    p_.ThrowIfFailed();
    WEFT_CHECK(!started_, "a collective between StartAllGather and FinishAllGather");
    ++epoch_;
    Slot& own = s_->slots[epoch_ % 2][local_index_];
    own.data = mine.data();
    own.size = mine.size();
    own.epoch.store(epoch_, std::memory_order_release);
  }

  // Until every member of this process is in this collective.
  void AwaitLocal() {
    for (const Slot& slot : s_->slots[epoch_ % 2]) {
      AwaitTrue([&] { return slot.epoch.load(std::memory_order_acquire) == epoch_; });
    }
  }

  void AwaitLeader() {
    AwaitTrue([&] { return s_->received_epoch.load(std::memory_order_acquire) >= epoch_; });
  }

  // Own data has left, that of all others is here.
  void Complete() {
    Await(sends_);
    AwaitLocal();
    if (!leads()) AwaitLeader();
  }

  void ViewGathered(std::vector<Bytes>& views) const {
    views.resize(s_->process_of.size());
    for (size_t i = 0; i < s_->local.size(); ++i) {
      const Slot& slot = s_->slots[epoch_ % 2][i];
      views[static_cast<size_t>(s_->local[i])] = {slot.data, slot.size};
    }
    for (const int member : s_->remote) {
      const auto m = static_cast<size_t>(member);
      views[m] = s_->received[epoch_ % 2][m][0];
    }
  }

  // To process others[index].
  void SendWithHeader(size_t index, std::span<const Bytes> items) {
    const int process = s_->others[index].first;
    std::vector<std::byte>& header = headers_[index];
    size_t inlined = 0;
    for (const Bytes& item : items) inlined += RoundUp(item.size());
    const bool fits = inlined <= kInlineBytes;
    header.resize(HeaderBytes(items.size()) + (fits ? inlined : 0));
    size_t at = HeaderBytes(items.size());
    for (size_t i = 0; i < items.size(); ++i) {
      const uint64_t size = items[i].size();
      std::memcpy(header.data() + i * sizeof(size), &size, sizeof(size));
      if (!fits || size == 0) continue;
      std::memcpy(header.data() + at, items[i].data(), size);
      at += RoundUp(size);
    }
    p_.PostSend(process, TagOf(rank_), header, sends_);
    if (fits) return;
    for (const Bytes& item : items) {
      if (!item.empty()) p_.PostSend(process, TagOf(rank_), item, sends_);
    }
  }

  // `items` of every member elsewhere.
  std::vector<Incoming> ReceiveHeaders(size_t items) {
    const size_t bytes = HeaderBytes(items) + kInlineBytes;
    Buffer& headers = s_->headers[epoch_ % 3];
    headers.Reserve(s_->remote.size() * bytes);
    std::vector<Incoming> incoming;
    for (const int member : s_->remote) {
      std::byte* header = headers.as<std::byte>() + incoming.size() * bytes;
      incoming.push_back({member, header, {}});
      p_.PostReceive(s_->process_of[static_cast<size_t>(member)], TagOf(member), {header, bytes}, receives_);
    }
    return incoming;
  }

  void ReceiveAll(const std::vector<Incoming>& incoming, size_t items) {
    Await(receives_);
    auto& received = s_->received[epoch_ % 2];
    size_t total = 0;
    const auto sizes = [&](const Incoming& from) {
      std::vector<uint64_t> all(items);
      std::memcpy(all.data(), from.header, items * sizeof(uint64_t));
      return all;
    };
    const auto inlined = [](const std::vector<uint64_t>& all) {
      size_t sum = 0;
      for (const uint64_t size : all) sum += RoundUp(size);
      return sum;
    };
    for (const Incoming& from : incoming) {
      const size_t sum = inlined(sizes(from));
      if (sum > kInlineBytes) total += sum;
    }
    Buffer& data = s_->data[epoch_ % 3];
    data.Reserve(total);
    std::byte* next = data.as<std::byte>();
    for (const Incoming& from : incoming) {
      const std::vector<uint64_t> all = sizes(from);
      const bool fits = inlined(all) <= kInlineBytes;
      std::byte* header = from.header + HeaderBytes(items);
      std::byte*& to = fits ? header : next;
      auto& views = received[static_cast<size_t>(from.member)];
      views.clear();
      for (const uint64_t size : all) {
        views.emplace_back(to, size);
        if (!fits && size > 0) {
          p_.PostReceive(s_->process_of[static_cast<size_t>(from.member)], TagOf(from.member), {to, size}, receives_);
        }
        to += RoundUp(size);
      }
    }
    Await(receives_);
    s_->received_epoch.store(epoch_, std::memory_order_release);
  }

  // Dissemination: in round k each process hears from the one 2^k before it, and so from 2^(k+1) - 1 of them.
  void BarrierOfProcesses() {
    const auto& all = s_->all_processes;
    const size_t n = all.size();
    const auto me = static_cast<size_t>(std::find(all.begin(), all.end(), p_.rank()) - all.begin());
    const int tag = s_->first_tag + size();
    for (size_t step = 1; step < n; step *= 2) {
      p_.PostReceive(all[(me + n - step) % n], tag, {}, receives_);
      p_.PostSend(all[(me + step) % n], tag, {}, sends_);
      Await(receives_);
    }
    Await(sends_);
  }

  std::shared_ptr<Shared> s_;
  MpiProcesses& p_;
  int rank_;
  size_t local_index_;
  uint64_t epoch_ = 0;
  bool started_ = false;  // between StartAllGather and FinishAllGather
  bool carried_ = false;  // a thread moves the messages meanwhile
  std::vector<MpiProcesses::Request> sends_, receives_;
  std::vector<std::vector<std::byte>> headers_;  // being sent, by other process
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> MakeMpiGroup(std::shared_ptr<MpiProcesses> processes,
                                                        std::span<const int> process_of, int first_tag) {
  std::vector<std::unique_ptr<Communicator>> group(process_of.size());
  auto shared = std::make_shared<Shared>();
  shared->first_tag = first_tag;
  shared->process_of.assign(process_of.begin(), process_of.end());
  for (size_t i = 0; i < process_of.size(); ++i) {
    const int member = static_cast<int>(i);
    const int process = process_of[i];
    if (process == processes->rank()) {
      shared->local.push_back(member);
    } else {
      shared->remote.push_back(member);
      auto& others = shared->others;
      auto found = std::find_if(others.begin(), others.end(), [&](const auto& o) { return o.first == process; });
      if (found == others.end()) found = others.insert(others.end(), {process, {}});
      found->second.push_back(member);
    }
  }
  if (shared->local.empty()) return group;
  shared->all_processes.push_back(processes->rank());
  for (const auto& [process, members] : shared->others) shared->all_processes.push_back(process);
  std::sort(shared->all_processes.begin(), shared->all_processes.end());
  for (int half = 0; half < 2; ++half) {
    const auto h = static_cast<size_t>(half);
    shared->slots[h] = std::vector<Slot>(shared->local.size());
    shared->parts[h].resize(shared->local.size());
    shared->received[h].resize(process_of.size());
  }
  shared->processes = std::move(processes);
  for (size_t i = 0; i < shared->local.size(); ++i) {
    const auto member = static_cast<size_t>(shared->local[i]);
    group[member] = std::make_unique<MpiGroup>(shared, shared->local[i], i);
  }
  return group;
}

}  // namespace weft
