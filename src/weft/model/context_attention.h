#pragma once
// Attention of one rank under context parallelism: storing the step's new keys on the shards that own them, and every
// query row over its whole context, wherever its keys lie. All of it is local attention, an exchange, and a merge
// (docs/context_parallel.md).

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "weft/core/buffer.h"
#include "weft/core/thread_pool.h"
#include "weft/cp/grid.h"
#include "weft/cp/layout.h"
#include "weft/kernels/table.h"
#include "weft/model/attend_list.h"
#include "weft/model/forward_batch.h"
#include "weft/model/kv_cache.h"
#include "weft/parallel/communicator.h"

namespace weft {

// The groups that one rank exchanges with; index in each as cp::RankCoord says.
struct ForwardGroups {
  Communicator* tp = nullptr;
  Communicator* pcp = nullptr;
  Communicator* dcp = nullptr;
  Communicator* cp = nullptr;     // all KV shards of this rank's KV heads
  Communicator* world = nullptr;  // all ranks that share out the experts; may be null where nobody does
};

// Where the cache holds something smaller than the keys and values that gather-KV rows attend to (MLA's latents): how
// to make these. Every query head has a KV head of its own then.
class KvExpansion {
 public:
  virtual ~KvExpansion() = default;
  // An expanded row is keys [heads, k_dim] and then values [heads, v_dim].
  virtual int64_t k_dim() const = 0;
  virtual int64_t v_dim() const = 0;
  // Expanded rows [n, heads * (k_dim + v_dim)] of the cache rows `latents` [n, the cache's k_dim], all f32.
  virtual void Expand(int64_t layer, const float* latents, int64_t n, float* expanded, ThreadPool& pool) = 0;
};

class ContextAttention {
 public:
  struct Options {
    KvCache* cache = nullptr;
    cp::ParallelConfig parallel;
    cp::RankCoord coord;
    ForwardGroups groups;
    const KernelTable* kernels = nullptr;
    int64_t heads = 0;  // query heads of this rank
    // Values of the cached form: those of the cache, or, where it has none (MLA), the first v_dim elements of the keys.
    int64_t v_dim = 0;
    float scale = 1.0f;
    KvExpansion* expansion = nullptr;
    // Keys from earlier steps that gather-KV rows read from other processes, or expand, at a time, over all shards: the
    // bound on the memory that they need.
    int64_t segment_tokens = 8192;
    // Exchange keys in messages even where the caches of all ranks are in reach (tests).
    bool stream = false;
  };
  // Collective over the groups.
  explicit ContextAttention(Options options);

  // What a step has in common for all its layers; `batch` must live until the last of them.
  void Begin(const ForwardBatch& batch, ThreadPool& pool);

  struct Rows {
    // New keys and values of all rows of the batch in cached form, [rows, kv_heads, k_dim] and [rows, kv_heads, v_dim]
    // (null where the cache has none), both with `kv_stride` between rows.
    const float* k = nullptr;
    const float* v = nullptr;
    int64_t kv_stride = 0;
    // Queries of the gather-KV rows [gather_kv_rows, heads, k_dim] and their outputs [gather_kv_rows, heads, v_dim]
    // (contiguous), in expanded form if there is one.
    const float* gather_kv_q = nullptr;
    int64_t gather_kv_q_stride = 0;
    float* gather_kv_out = nullptr;
    // The same of the gather-Q rows [rows - gather_kv_rows], in cached form.
    const float* gather_q_q = nullptr;
    int64_t gather_q_q_stride = 0;
    float* gather_q_out = nullptr;
  };
  // Collective over the ranks that run the step. When it returns, all of `rows` may be written to again.
  void Run(int64_t layer, const Rows& rows);

  // Bytes that this rank has given to exchanges that do not read memory in place, since it was made.
  int64_t exchanged_bytes() const { return exchanged_bytes_; }

 private:
  // Local keys [begin, end) of every shard that has so many, of one request.
  struct Range {
    size_t context = 0;  // index into contexts_
    int64_t begin = 0;
    int64_t end = 0;
  };
  using Segment = std::vector<Range>;
  using Views = std::vector<std::span<const std::byte>>;

  Communicator& exchange() const { return solo_ ? *o_.groups.dcp : *o_.groups.cp; }
  bool ExchangesPcp() const { return !solo_ && o_.groups.pcp->size() > 1; }
  // The PCP ranks deal the expansion of keys among them and read each other's results.
  bool DealsExpansion() const { return ExchangesPcp() && !streams_new_ && !streams_context_; }

  KvPages CachePages(std::span<const int32_t> block_table, const int32_t* visible) const;
  void PointTo(KvPages& pages, const KvCache& cache, int64_t layer) const;
  KvPages PackedPages(const std::byte* packed, int64_t rows, int64_t row0) const;
  KvPages ExpandedPages(const float* row) const;
  AttentionArgs Arguments(int64_t heads) const;

  void PrepareInPlace();
  void PrepareGatherQ();
  void PrepareSegments();

  void StoreFromRows(int64_t layer, const Rows& rows);
  void PackNewRows(const Rows& rows);
  void StorePacked(int64_t layer, const Views& packed);

  void BeginAttend(const Rows& rows);
  void AttendNew(int64_t layer, const Views& packed, bool own);
  void GatherKvInPlace(int64_t layer, const Rows& rows);
  void GatherKvSegments(int64_t layer);
  void ExpandNewDealt(int64_t layer);
  void ExpandSegmentDealt(int64_t layer, const Segment& segment);

  int64_t KeysOn(const Range& range, int32_t shard) const;
  size_t SegmentBytes(const Segment& segment, int32_t shard) const;
  void StartSegment(int64_t layer, const Segment& segment);
  void AttendSegment(int64_t layer, const Segment& segment, const Views& packed);
  // For every own segment of rows of the request of `range`.
  void AddToRows(const Range& range, const KvPages& pages, int64_t keys);

  void GatherQ(int64_t layer, const Rows& rows);
  void AttendOwnShard(int64_t layer, const float* q, int64_t q_stride, float* out, float* lse);

  Options o_;
  const KernelTable& k_;
  const cp::KvLayout layout_;
  const int32_t shards_;
  const int32_t dcp_;
  const int64_t kv_heads_;
  const int64_t k_dim_;      // of the cached form
  const int64_t row_bytes_;  // of a token in the cache of one layer, all KV heads of this rank
  const int64_t expanded_dim_;
  bool streams_new_;      // new keys come in messages
  bool streams_context_;  // and those of earlier steps
  // Views of the peers' memory: of the CP group by shard, of the PCP group by PCP rank. Empty where not in reach.
  std::vector<const KvCache*> shard_caches_, pcp_caches_;

  // Of the current step.
  const ForwardBatch* batch_ = nullptr;
  ThreadPool* pool_ = nullptr;
  bool solo_ = false;
  std::vector<int64_t> rows_of_;  // rows of each PCP rank that runs the step
  std::vector<KvPages> in_place_pages_, gather_q_pages_;
  std::vector<AttentionTask> in_place_tasks_, gather_q_tasks_;
  std::vector<ForwardBatch::Context> contexts_;
  std::vector<Segment> segments_;
  AttendList attend_;
  int64_t exchanged_bytes_ = 0;

  // What peers read lies in buffers taken by turns, so that every peer is done with one when its turn comes again
  // (communicator.h has the rule).
  struct Ring {
    std::array<Buffer, 3> buffers;
    size_t turn = 0;
    Buffer& Next(int64_t bytes) {
      turn = (turn + 1) % buffers.size();
      buffers[turn].Reserve(static_cast<size_t>(bytes));
      return buffers[turn];
    }
    Buffer& current() { return buffers[turn]; }
  };
  Ring packed_, segment_, expanded_ring_, gather_q_part_;
  Buffer gathered_q_, packed_q_, latents_, expanded_;
  std::vector<int64_t> pack_slots_;
};

}  // namespace weft
