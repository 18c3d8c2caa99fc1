#pragma once
// Collectives of a group of ranks. Ranks are threads, of one process or of several; the code above cannot tell them
// apart. Every member calls the same collectives in the same order.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace weft {

class Communicator {
 public:
  virtual ~Communicator() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;

  // True where peers' memory can be read in place: then AllGather copies nothing.
  virtual bool shares_memory() const = 0;

  // Returns when every member has called it. All that a member wrote before is then visible to every member.
  virtual void Barrier() = 0;

  // Element i of `views` becomes what member i gave as `mine` (sizes may differ; a null pointer with size 0 is fine).
  // A member may read the views until it enters its next collective of this group. The owner of the memory must neither
  // write to it nor free it until its own next collective of this group (any: Release, Barrier, AllGather, ...) has
  // returned, for then all readers have entered that one too. Where memory is shared the views are the peers' own
  // memory.
  virtual void AllGather(std::span<const std::byte> mine, std::vector<std::span<const std::byte>>& views) = 0;

  template <typename T>
  void AllGather(std::span<const T> mine, std::vector<std::span<const T>>& views) {
    std::vector<std::span<const std::byte>> bytes;
    AllGather(std::as_bytes(mine), bytes);
    views.clear();
    for (const auto& b : bytes) views.emplace_back(reinterpret_cast<const T*>(b.data()), b.size() / sizeof(T));
  }

  // AllGather in two halves, so that compute runs in between. `sizes[i]` is how many bytes member i gives: known to all
  // beforehand, the same on all, sizes[rank()] = mine.size(). No other collective of this group may come between the
  // two; those of other groups may. `sizes` is not kept. StartAllGather does not wait for
  // anybody, FinishAllGather for all that give anything. So that a member can work on what one collective brought while
  // the next one is under way, views that were valid before StartAllGather stay so until FinishAllGather is entered;
  // and the owner of `mine` must leave it alone until its collective after the next has returned (a ring of three
  // buffers does).
  virtual void StartAllGather(std::span<const std::byte> mine, std::span<const size_t> sizes) = 0;
  virtual void FinishAllGather(std::vector<std::span<const std::byte>>& views) = 0;

  template <typename T>
  void FinishAllGather(std::vector<std::span<const T>>& views) {
    std::vector<std::span<const std::byte>> bytes;
    FinishAllGather(bytes);
    views.clear();
    for (const auto& b : bytes) views.emplace_back(reinterpret_cast<const T*>(b.data()), b.size() / sizeof(T));
  }

  // parts[i] goes to member i (parts.size() = size(); sizes differ freely and may be 0): views[i] becomes what member i
  // gave as its parts[rank()]. The same rules of lifetime as AllGather's, for the bytes; `parts` itself is not kept.
  virtual void AllToAll(std::span<const std::span<const std::byte>> parts,
                        std::vector<std::span<const std::byte>>& views) = 0;

  // Returns when this member may write again to what it gave to the last collective: every member has called Release
  // (or entered another collective) and so is done reading. A Barrier where memory is shared; where data is copied it
  // does not wait for the copies' readers. A collective like the others: every member calls it, in the same order.
  virtual void Release() = 0;

  // The group can no longer work (a member failed): every member's pending and later collective throws weft::Error
  // (kInternal), also where a member waits inside one now. For good. May be called from any thread.
  virtual void Abort() = 0;
};

// The communicators of one group of `size` threads, element i for member i (used by one thread at a time, save Abort).
// They share state and may be destroyed in any order. A collective costs one cache line from each peer. A waiting
// member spins for some microseconds and then yields its core; with more members than cores it yields at once.
std::vector<std::unique_ptr<Communicator>> MakeInProcessGroup(int size);

}  // namespace weft
