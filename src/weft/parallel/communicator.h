#pragma once
// Collectives of a group of ranks. Ranks are threads of one process (InProcessGroup) or, later, MPI processes; the code
// above cannot tell them apart. Every member calls the same collectives in the same order.

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
  // The views stay valid until the next collective *of this group* that the owner of the memory enters; nobody may
  // write to what it gave before then. Where memory is shared they are the peers' own memory.
  virtual void AllGather(std::span<const std::byte> mine, std::vector<std::span<const std::byte>>& views) = 0;

  template <typename T>
  void AllGather(std::span<const T> mine, std::vector<std::span<const T>>& views) {
    std::vector<std::span<const std::byte>> bytes;
    AllGather(std::as_bytes(mine), bytes);
    views.clear();
    for (const auto& b : bytes) views.emplace_back(reinterpret_cast<const T*>(b.data()), b.size() / sizeof(T));
  }

  // Marks the end of a group's use of shared state: the next collective cannot begin in any member until all are here.
  // (For a shared-memory group a Barrier; a no-op where AllGather copies.)
  virtual void Release() = 0;

  // The group can no longer work (a member failed): every member's pending and later collective throws weft::Error.
  virtual void Abort() = 0;
};

// The communicators of one group of `size` threads, element i for member i. They share state and may be destroyed in
// any order.
std::vector<std::unique_ptr<Communicator>> MakeInProcessGroup(int size);

}  // namespace weft
