#include <array>
#include <atomic>
#include <utility>

#include "weft/core/error.h"
#include "weft/core/thread_pool.h"
#include "weft/core/wait.h"
#include "weft/parallel/communicator.h"

namespace weft {
namespace {

// With more ranks than cores the one waited for may need this very core, so it is given up after a look or two.
constexpr int kSpinsOversubscribed = 20;

// What a member says in one collective: "I am in number `epoch`, and here is my data". One cache line, so that a peer
// learns both with one transfer.
struct alignas(64) Slot {
  std::atomic<uint64_t> epoch{0};  // collectives are numbered from 1
  const std::byte* data = nullptr;
  size_t size = 0;
};

// Members use slots[epoch % 2]. A member can be at most one collective ahead of the slowest one: to get to epoch e + 2
// it must have seen everybody in e + 1, and a member enters e + 1 only after it has read all slots of e. So the slot of
// e is not overwritten (in e + 2) while anyone still reads it.
struct Shared {
  explicit Shared(int n) : size(n) {
    for (auto& half : slots) half = std::vector<Slot>(static_cast<size_t>(n));
    for (auto& half : parts) half.resize(static_cast<size_t>(n));
    spins = static_cast<size_t>(n) > AllowedCpus().size() ? kSpinsOversubscribed : kSpins;
  }

  int size;
  int spins;
  std::array<std::vector<Slot>, 2> slots;  // [2][size]
  // AllToAll's parts, [2][size][size]: the copies that slots[..].data points to, valid and overwritten like the slots.
  std::array<std::vector<std::vector<std::span<const std::byte>>>, 2> parts;
  alignas(64) std::atomic<bool> aborted{false};
};

class InProcess final : public Communicator {
 public:
  InProcess(std::shared_ptr<Shared> shared, int rank) : shared_(std::move(shared)), rank_(rank) {}

  int rank() const override { return rank_; }
  int size() const override { return shared_->size; }
  bool shares_memory() const override { return true; }

  void Barrier() override {
    Enter({});
    AwaitAll();
  }
  void Release() override { Barrier(); }

  void AllGather(std::span<const std::byte> mine, std::vector<std::span<const std::byte>>& views) override {
    Enter(mine);
    ViewAll(views);
  }

  void StartAllGather(std::span<const std::byte> mine, std::span<const size_t> sizes) override {
    WEFT_CHECK(sizes.size() == static_cast<size_t>(size()) && sizes[static_cast<size_t>(rank_)] == mine.size());
    Enter(mine);
    started_ = true;
  }

  void FinishAllGather(std::vector<std::span<const std::byte>>& views) override {
    WEFT_CHECK(std::exchange(started_, false), "FinishAllGather without StartAllGather");
    ThrowIfAborted();
    ViewAll(views);
  }

  void AllToAll(std::span<const std::span<const std::byte>> parts,
                std::vector<std::span<const std::byte>>& views) override {
    WEFT_CHECK(parts.size() == static_cast<size_t>(size()));
    ThrowIfAborted();  // a member that left the last collective early may still be read in the one before it
    auto& kept = shared_->parts[(epoch_ + 1) % 2][static_cast<size_t>(rank_)];
    kept.assign(parts.begin(), parts.end());
    Enter(std::as_bytes(std::span(kept)));
    const std::vector<Slot>& slots = AwaitAll();
    views.resize(slots.size());
    for (size_t i = 0; i < slots.size(); ++i) {
      views[i] = reinterpret_cast<const std::span<const std::byte>*>(slots[i].data)[rank_];
    }
  }

  void Abort() override { shared_->aborted.store(true, std::memory_order_release); }

 private:
  // Opens the next collective by publishing `mine`.
  void Enter(std::span<const std::byte> mine) {
    ThrowIfAborted();
    WEFT_CHECK(!started_, "a collective between StartAllGather and FinishAllGather");
    ++epoch_;
    Slot& own = shared_->slots[epoch_ % 2][static_cast<size_t>(rank_)];
    own.data = mine.data();
    own.size = mine.size();
    own.epoch.store(epoch_, std::memory_order_release);
  }

  // Waits until every member has published in this collective, and returns all members' slots. They hold until this
  // member enters its next collective.
  const std::vector<Slot>& AwaitAll() {
    const std::vector<Slot>& slots = shared_->slots[epoch_ % 2];
    for (const Slot& slot : slots) {
      Backoff backoff(shared_->spins);
      while (slot.epoch.load(std::memory_order_acquire) != epoch_) {
        ThrowIfAborted();
        backoff.Pause();
      }
    }
    return slots;
  }

  void ViewAll(std::vector<std::span<const std::byte>>& views) {
    const std::vector<Slot>& slots = AwaitAll();
    views.resize(slots.size());
    for (size_t i = 0; i < slots.size(); ++i) views[i] = {slots[i].data, slots[i].size};
  }

  void ThrowIfAborted() const {
    if (shared_->aborted.load(std::memory_order_acquire)) [[unlikely]] {
      throw Error(fmt::format("rank {} of {}: the group was aborted because a member failed", rank_, shared_->size),
                  ErrorKind::kInternal);
    }
  }

  std::shared_ptr<Shared> shared_;
  int rank_;
  uint64_t epoch_ = 0;
  bool started_ = false;  // between StartAllGather and FinishAllGather
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> MakeInProcessGroup(int size) {
  WEFT_CHECK(size >= 1, "size = {}", size);
  const auto shared = std::make_shared<Shared>(size);
  std::vector<std::unique_ptr<Communicator>> group;
  for (int rank = 0; rank < size; ++rank) group.push_back(std::make_unique<InProcess>(shared, rank));
  return group;
}

}  // namespace weft
