#pragma once
// What every Communicator has to do, whatever it is made of. A test program instantiates the suite with its factories:
//   INSTANTIATE_TEST_SUITE_P(InProcess, CommunicatorConformance, testing::Values(...));

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <ostream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "weft/core/error.h"
#include "weft/parallel/communicator.h"

namespace weft {

struct CommunicatorFactory {
  std::string name;
  int size = 1;
  // The same on all members; a fresh one on every run of the program.
  uint64_t seed = 0;
  // Makes a group of `size` members and runs `member` on each member that lives in this process, at the same time, each
  // on a thread of its own. Returns when they have returned. An exception of a member aborts the group, and the first
  // one is thrown here.
  std::function<void(const std::function<void(Communicator&)>& member)> run;

  friend std::ostream& operator<<(std::ostream& out, const CommunicatorFactory& f) { return out << f.name; }
};

class CommunicatorConformance : public testing::TestWithParam<CommunicatorFactory> {
 protected:
  // The bytes that `rank` gives in `round`: every member can compute everybody's.
  static std::vector<std::byte> Payload(int round, int rank) {
    std::mt19937_64 random(GetParam().seed + static_cast<uint64_t>(round) * 1000003 + static_cast<uint64_t>(rank));
    const size_t sizes[] = {0, random() % 9, random() % 5000};
    std::vector<std::byte> bytes(sizes[random() % 3]);
    for (std::byte& b : bytes) b = static_cast<std::byte>(random());
    return bytes;
  }

  static bool Equal(std::span<const std::byte> a, std::span<const std::byte> b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size()) == 0);
  }

  void SetUp() override { RecordProperty("seed", std::to_string(GetParam().seed)); }
  void TearDown() override {
    if (HasFailure()) std::cerr << "seed = " << GetParam().seed << "\n";
  }
};

TEST_P(CommunicatorConformance, KnowsItsPlace) {
  std::atomic<int> members{0};
  GetParam().run([&](Communicator& comm) {
    EXPECT_EQ(comm.size(), GetParam().size);
    EXPECT_GE(comm.rank(), 0);
    EXPECT_LT(comm.rank(), comm.size());
    ++members;
  });
  EXPECT_GE(members.load(), 1);
}

// Fresh buffers each round, of any size and none; the views are checked by every member, some of them late.
TEST_P(CommunicatorConformance, AllGatherGivesEveryMembersBytes) {
  GetParam().run([&](Communicator& comm) {
    std::mt19937_64 mine(GetParam().seed ^ static_cast<uint64_t>(comm.rank() + 1));
    std::vector<std::span<const std::byte>> views;
    std::vector<std::byte> kept;  // the memory given in the last round: free to go only after the next collective
    for (int round = 0; round < 200; ++round) {
      std::vector<std::byte> bytes = Payload(round, comm.rank());
      comm.AllGather(bytes, views);
      kept = std::move(bytes);
      if (mine() % 16 == 0) std::this_thread::yield();
      ASSERT_EQ(views.size(), static_cast<size_t>(comm.size()));
      for (int i = 0; i < comm.size(); ++i) {
        ASSERT_TRUE(Equal(views[static_cast<size_t>(i)], Payload(round, i))) << "round " << round << ", member " << i;
      }
    }
    comm.Release();
  });
}

// One buffer, written again as soon as the rules allow: after Release, Barrier or the next AllGather has returned.
TEST_P(CommunicatorConformance, MemoryIsTheOwnersAgainAfterTheNextCollective) {
  GetParam().run([&](Communicator& comm) {
    std::mt19937_64 shared(GetParam().seed);  // all members draw the same
    std::vector<std::vector<int64_t>> buffers(2, std::vector<int64_t>(64));
    std::vector<std::span<const int64_t>> views;
    for (int64_t round = 0; round < 500; ++round) {
      std::vector<int64_t>& buffer = buffers[static_cast<size_t>(round % 2)];
      for (size_t i = 0; i < buffer.size(); ++i) {
        buffer[i] = round * 1000 + comm.rank() * 100 + static_cast<int64_t>(i);
      }
      comm.AllGather(std::span<const int64_t>(buffer), views);
      for (int r = 0; r < comm.size(); ++r) {
        for (size_t i = 0; i < buffer.size(); ++i) {
          ASSERT_EQ(views[static_cast<size_t>(r)][i], round * 1000 + r * 100 + static_cast<int64_t>(i));
        }
      }
      // Either the other buffer is used next and the following AllGather frees this one, or this one is freed now.
      switch (shared() % 3) {
        case 0:
          comm.Release();
          break;
        case 1:
          comm.Barrier();
          break;
        default:
          break;
      }
    }
    comm.Release();
  });
}

// The two halves, with other work, pokes and differing delays in between; mixed with the other collectives.
TEST_P(CommunicatorConformance, AllGatherInTwoHalves) {
  GetParam().run([&](Communicator& comm) {
    std::mt19937_64 mine(GetParam().seed ^ static_cast<uint64_t>(comm.rank() + 17));
    std::mt19937_64 shared(GetParam().seed);
    std::vector<std::span<const std::byte>> views;
    std::vector<std::byte> kept;
    for (int round = 0; round < 300; ++round) {
      std::vector<std::byte> bytes = Payload(round, comm.rank());
      std::vector<size_t> sizes;
      for (int i = 0; i < comm.size(); ++i) sizes.push_back(Payload(round, i).size());
      comm.StartAllGather(bytes, sizes);
      for (auto n = mine() % 3; n > 0; --n) std::this_thread::yield();
      comm.FinishAllGather(views);
      kept = std::move(bytes);
      ASSERT_EQ(views.size(), static_cast<size_t>(comm.size()));
      for (int i = 0; i < comm.size(); ++i) {
        ASSERT_TRUE(Equal(views[static_cast<size_t>(i)], Payload(round, i))) << "round " << round << ", member " << i;
      }
      switch (shared() % 4) {
        case 0:
          comm.Release();
          break;
        case 1:
          comm.Barrier();
          break;
        case 2:
          comm.AllGather({}, views);
          break;
        default:
          break;
      }
    }
    comm.Release();
  });
}

// What the collective before brought may be read between the two halves; a ring of three buffers serves the owner.
TEST_P(CommunicatorConformance, ViewsStayWhileTheNextAllGatherIsUnderWay) {
  GetParam().run([&](Communicator& comm) {
    std::mt19937_64 mine(GetParam().seed ^ static_cast<uint64_t>(comm.rank() + 29));
    // Below and above what may travel inside a first message.
    const size_t n = 100 + GetParam().seed % 2 * 3000;
    std::vector<std::vector<int64_t>> ring(3, std::vector<int64_t>(n));
    const std::vector<size_t> sizes(static_cast<size_t>(comm.size()), n * sizeof(int64_t));
    std::vector<std::span<const int64_t>> views;
    const auto value = [](int64_t round, int r, size_t i) { return round * 100000 + r * 10000 + static_cast<int>(i); };
    const auto check = [&](int64_t round) {
      for (int r = 0; r < comm.size(); ++r) {
        for (size_t i = 0; i < n; i += 1 + i / 4) {
          ASSERT_EQ(views[static_cast<size_t>(r)][i], value(round, r, i)) << "member " << r;
        }
      }
    };
    for (int64_t round = 0; round < 200; ++round) {
      std::vector<int64_t>& own = ring[static_cast<size_t>(round % 3)];
      for (size_t i = 0; i < n; ++i) own[i] = value(round, comm.rank(), i);
      comm.StartAllGather(std::as_bytes(std::span(own)), sizes);
      for (auto k = mine() % 4; k > 0; --k) std::this_thread::yield();
      if (round > 0) check(round - 1);
      comm.FinishAllGather(views);
    }
    check(199);
    comm.Barrier();
    comm.Barrier();
  });
}

// Every pair's bytes, of any size and none, and none at all in some rounds.
TEST_P(CommunicatorConformance, AllToAllGivesEachMemberItsPart) {
  GetParam().run([&](Communicator& comm) {
    std::mt19937_64 shared(GetParam().seed);
    const auto payload = [&](int round, int from, int to) { return Payload(round * 64 + to, from * 64 + 7); };
    std::vector<std::span<const std::byte>> views;
    std::vector<std::vector<std::byte>> kept;
    for (int round = 0; round < 200; ++round) {
      const bool empty = shared() % 8 == 0;
      std::vector<std::vector<std::byte>> bytes;
      std::vector<std::span<const std::byte>> parts;
      for (int to = 0; to < comm.size(); ++to) {
        bytes.push_back(empty ? std::vector<std::byte>{} : payload(round, comm.rank(), to));
      }
      for (const auto& part : bytes) parts.emplace_back(part);
      comm.AllToAll(parts, views);
      parts.assign(parts.size(), {});  // not the group's any longer
      kept = std::move(bytes);
      ASSERT_EQ(views.size(), static_cast<size_t>(comm.size()));
      for (int from = 0; from < comm.size(); ++from) {
        const auto want = empty ? std::vector<std::byte>{} : payload(round, from, comm.rank());
        ASSERT_TRUE(Equal(views[static_cast<size_t>(from)], want)) << "round " << round << ", member " << from;
      }
      if (shared() % 3 == 0) comm.Release();
    }
    comm.Release();
  });
}

// More than any eager or inline limit of a transport.
TEST_P(CommunicatorConformance, LargeData) {
  GetParam().run([&](Communicator& comm) {
    const auto size_of = [&](int round, int r) { return size_t{100'000} * static_cast<size_t>((r * 7 + round) % 11); };
    const auto value = [&](int round, int r, size_t i) {
      return static_cast<std::byte>((i * 31 + i / 4096 + static_cast<size_t>(r * 5 + round)) & 255);
    };
    std::vector<std::span<const std::byte>> views;
    for (int round = 0; round < 6; ++round) {
      std::vector<std::byte> mine(size_of(round, comm.rank()));
      for (size_t i = 0; i < mine.size(); ++i) mine[i] = value(round, comm.rank(), i);
      std::vector<size_t> sizes;
      for (int r = 0; r < comm.size(); ++r) sizes.push_back(size_of(round, r));
      switch (round % 3) {
        case 0:
          comm.AllGather(mine, views);
          break;
        case 1:
          comm.StartAllGather(mine, sizes);
          // Compute, as it were, beside which the data is moved.
          std::this_thread::sleep_for(std::chrono::milliseconds(comm.rank() * 2));
          comm.FinishAllGather(views);
          break;
        default: {
          const std::vector<std::span<const std::byte>> parts(static_cast<size_t>(comm.size()), mine);
          comm.AllToAll(parts, views);
          break;
        }
      }
      for (int r = 0; r < comm.size(); ++r) {
        const auto& view = views[static_cast<size_t>(r)];
        ASSERT_EQ(view.size(), sizes[static_cast<size_t>(r)]);
        for (size_t i = 0; i < view.size(); i += 997) ASSERT_EQ(view[i], value(round, r, i)) << "member " << r;
        if (view.empty()) continue;
        ASSERT_EQ(view.back(), value(round, r, view.size() - 1));
      }
      comm.Release();
    }
  });
}

// Where memory is shared, what members wrote before a barrier is seen by all after it, and nobody passes early.
TEST_P(CommunicatorConformance, BarrierHoldsEverybody) {
  std::atomic<int> entered{0};
  GetParam().run([&](Communicator& comm) {
    for (int round = 1; round <= 300; ++round) {
      entered.fetch_add(1, std::memory_order_relaxed);
      comm.Barrier();
      if (comm.shares_memory()) {
        EXPECT_GE(entered.load(std::memory_order_relaxed), round * comm.size());
        EXPECT_LT(entered.load(std::memory_order_relaxed), (round + 1) * comm.size() + 1);
      }
    }
  });
}

// A member leaves by an exception, at any point and in any collective: all others throw too, in theirs and in later
// ones.
TEST_P(CommunicatorConformance, AbortFreesWhoeverWaits) {
  for (int trial = 0; trial < 10; ++trial) {
    std::mt19937_64 shared(GetParam().seed + static_cast<uint64_t>(trial));
    const int culprit = static_cast<int>(shared() % static_cast<uint64_t>(GetParam().size));
    const int at = static_cast<int>(shared() % 20);
    std::atomic<int> threw{0};
    std::atomic<int> members{0};
    EXPECT_THROW(GetParam().run([&](Communicator& comm) {
      ++members;
      std::vector<std::span<const std::byte>> views;
      const std::vector<std::span<const std::byte>> nothing(static_cast<size_t>(comm.size()));
      const std::byte byte{};
      const std::vector<size_t> ones(static_cast<size_t>(comm.size()), 1);
      const auto collective = [&](int i) {
        // Every one of these waits for all members; Release need not, nor the halves for one that gives nothing.
        if (i % 4 == 0) comm.Barrier();
        if (i % 4 == 1) comm.AllGather({}, views);
        if (i % 4 == 2) comm.AllToAll(nothing, views);
        if (i % 4 == 3) {
          comm.StartAllGather(std::span(&byte, 1), ones);
          comm.FinishAllGather(views);
        }
      };
      try {
        for (int i = 0; i < 1000000; ++i) {
          if (comm.rank() == culprit && i == at) comm.Abort();
          collective(i);
          ASSERT_LE(i, at);  // a collective that the culprit never entered cannot complete
        }
      } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::kInternal);
        ++threw;
        EXPECT_THROW(comm.Barrier(), Error);
        EXPECT_THROW(comm.AllGather({}, views), Error);
        EXPECT_THROW(comm.Release(), Error);
        EXPECT_THROW(comm.AllToAll(nothing, views), Error);
        EXPECT_THROW(comm.StartAllGather(std::span(&byte, 1), ones), Error);
        throw;
      }
    }),
                 Error);
    EXPECT_EQ(threw.load(), members.load());
  }
}

}  // namespace weft
