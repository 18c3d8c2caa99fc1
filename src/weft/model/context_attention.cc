#include "weft/model/context_attention.h"

#include <algorithm>
#include <cstring>

#include "weft/core/error.h"
#include "weft/core/function_ref.h"

namespace weft {
namespace {

constexpr auto kFloat = static_cast<int64_t>(sizeof(float));

std::span<const std::byte> BytesOf(const Buffer& buffer, int64_t bytes) {
  return {buffer.as<const std::byte>(), static_cast<size_t>(bytes)};
}

// Of copies by all threads: bytes that are worth a piece of their own.
constexpr int64_t kCopyBytes = 64 << 10;

// copy(row) for rows [0, n) of `row_bytes` each.
void CopyRows(ThreadPool& pool, int64_t n, int64_t row_bytes, FunctionRef<void(int64_t row)> copy) {
  pool.ParallelFor(n, std::max<int64_t>(1, kCopyBytes / std::max<int64_t>(1, row_bytes)),
                   [&](int64_t begin, int64_t end, int) {
                     for (int64_t row = begin; row < end; ++row) copy(row);
                   });
}

// f32 values of n elements of a cache.
void ToFloats(ThreadPool& pool, DType dtype, const void* from, int64_t n, float* to) {
  pool.ParallelFor(n, kCopyBytes / kFloat, [&](int64_t begin, int64_t end, int) {
    if (dtype == DType::kF32) {
      std::memcpy(to + begin, static_cast<const float*>(from) + begin,
                  static_cast<size_t>(end - begin) * sizeof(float));
    } else {
      const auto* values = static_cast<const bf16*>(from);
      for (int64_t i = begin; i < end; ++i) to[i] = ToFloat(values[i]);
    }
  });
}

}  // namespace

ContextAttention::ContextAttention(Options options)
    : o_(std::move(options)),
      k_(*o_.kernels),
      layout_(LayoutOf(o_.parallel)),
      shards_(layout_.shards),
      dcp_(o_.parallel.decode_context_parallel),
      kv_heads_(o_.cache->shape().kv_heads),
      k_dim_(o_.cache->shape().k_dim),
      row_bytes_(kv_heads_ * (k_dim_ + o_.cache->shape().v_dim) *
                 static_cast<int64_t>(SizeOf(o_.cache->shape().dtype))),
      expanded_dim_(o_.expansion == nullptr ? 0 : o_.heads * (o_.expansion->k_dim() + o_.expansion->v_dim())) {
  Communicator& cp = *o_.groups.cp;
  Communicator& pcp = *o_.groups.pcp;
  WEFT_CHECK(cp.size() == shards_ && cp.rank() == o_.coord.kv_shard);
  WEFT_CHECK(o_.expansion == nullptr || kv_heads_ == 1);
  WEFT_CHECK(o_.segment_tokens >= 1);
  streams_new_ = pcp.size() > 1 && (o_.stream || !pcp.shares_memory());
  streams_context_ = cp.size() > 1 && (o_.stream || !cp.shares_memory());
  auto gather = [&](Communicator& group, std::vector<const KvCache*>& caches) {
    const KvCache* mine = o_.cache;
    std::vector<std::span<const KvCache* const>> views;
    group.AllGather(std::span<const KvCache* const>(&mine, 1), views);
    for (const auto& view : views) caches.push_back(view[0]);
    group.Release();  // `mine` is about to go
  };
  if (cp.shares_memory()) gather(cp, shard_caches_);
  if (pcp.shares_memory()) gather(pcp, pcp_caches_);
}

void ContextAttention::Begin(const ForwardBatch& batch, ThreadPool& pool) {
  batch_ = &batch;
  pool_ = &pool;
  solo_ = batch.solo;
  WEFT_CHECK(!solo_ || (!streams_new_ && !streams_context_));
  rows_of_.clear();
  for (const ForwardBatch::Store& store : batch.stores) {
    rows_of_.resize(static_cast<size_t>(store.source) + 1);
    rows_of_.back() = static_cast<int64_t>(store.slots.size());
  }
  segments_.clear();
  contexts_.clear();
  if (o_.expansion == nullptr && !streams_context_) {
    PrepareInPlace();
  } else {
    PrepareSegments();
  }
  PrepareGatherQ();
}

void ContextAttention::Run(int64_t layer, const Rows& rows) {
  const bool gather_kv = batch_->any_gather_kv;
  const bool packs = streams_new_ || (gather_kv && (streams_context_ || o_.expansion != nullptr));
  if (packs) PackNewRows(rows);
  Communicator& pcp = *o_.groups.pcp;

  if (streams_new_ || streams_context_) {
    Views packed(static_cast<size_t>(pcp.size()));
    packed[static_cast<size_t>(pcp.rank())] = BytesOf(packed_.current(), packs ? batch_->rows * row_bytes_ : 0);
    // Own keys first, while those of the others are on their way.
    const bool sends = packs && pcp.size() > 1;
    if (sends) {
      std::vector<size_t> sizes;
      for (const int64_t n : rows_of_) sizes.push_back(static_cast<size_t>(n * row_bytes_));
      pcp.StartAllGather(packed[static_cast<size_t>(pcp.rank())], sizes);
      exchanged_bytes_ += batch_->rows * row_bytes_;
    }
    const bool attends = gather_kv && (streams_context_ || o_.expansion != nullptr);
    if (attends) {
      // The keys of earlier steps wait for nothing of this one.
      if (streams_context_ && !segments_.empty()) StartSegment(layer, segments_.front());
      BeginAttend(rows);
      AttendNew(layer, packed, true);
    }
    if (sends) pcp.FinishAllGather(packed);
    if (packs) {
      StorePacked(layer, packed);
    } else {
      StoreFromRows(layer, rows);
    }
    if (attends) {
      AttendNew(layer, packed, false);
      GatherKvSegments(layer);
    } else if (gather_kv) {
      if (exchange().size() > 1) exchange().Barrier();  // the shards' new keys must be there
      GatherKvInPlace(layer, rows);
    }
  } else {
    StoreFromRows(layer, rows);
    // Rows that gather KV read all shards: their new keys must be there.
    if (gather_kv && exchange().size() > 1) exchange().Barrier();
    if (o_.expansion == nullptr) {
      GatherKvInPlace(layer, rows);
    } else if (gather_kv) {
      BeginAttend(rows);
      ExpandNewDealt(layer);
      GatherKvSegments(layer);
    }
  }
  if (batch_->any_gather_q) GatherQ(layer, rows);
}

// ---- Pages ---------------------------------------------------------------------------------------------------------

KvPages ContextAttention::CachePages(std::span<const int32_t> block_table, const int32_t* visible) const {
  const KvCacheShape& shape = o_.cache->shape();
  KvPages pages{.dtype = shape.dtype,
                .block_table = block_table.data(),
                .block_tokens = shape.block_tokens,
                .k_block_stride = shape.k_block_elements(),
                .k_head_stride = shape.block_tokens * shape.k_dim,
                .v_block_stride = shape.v_block_elements(),
                .v_head_stride = shape.block_tokens * shape.v_dim,
                .visible = visible};
  if (shape.v_dim == 0) {  // the values are the first elements of the keys
    pages.v_block_stride = pages.k_block_stride;
    pages.v_head_stride = pages.k_head_stride;
    pages.v_row_stride = shape.k_dim;
  }
  return pages;
}

void ContextAttention::PointTo(KvPages& pages, const KvCache& cache, int64_t layer) const {
  pages.k = cache.k(layer);
  pages.v = cache.shape().v_dim == 0 ? pages.k : cache.v(layer);
}

// Packed rows: keys [kv_heads, rows, k_dim], then values [kv_heads, rows, v_dim], in the cache's type.
KvPages ContextAttention::PackedPages(const std::byte* packed, int64_t rows, int64_t row0) const {
  const KvCacheShape& shape = o_.cache->shape();
  const auto element = static_cast<int64_t>(SizeOf(shape.dtype));
  KvPages pages{.k = packed + row0 * k_dim_ * element, .dtype = shape.dtype, .k_head_stride = rows * k_dim_};
  if (shape.v_dim == 0) {
    pages.v = pages.k;
    pages.v_head_stride = pages.k_head_stride;
    pages.v_row_stride = k_dim_;
  } else {
    pages.v = packed + (kv_heads_ * rows * k_dim_ + row0 * shape.v_dim) * element;
    pages.v_head_stride = rows * shape.v_dim;
  }
  return pages;
}

KvPages ContextAttention::ExpandedPages(const float* row) const {
  return {.k = row,
          .v = row + o_.heads * o_.expansion->k_dim(),
          .dtype = DType::kF32,
          .k_head_stride = o_.expansion->k_dim(),
          .v_head_stride = o_.expansion->v_dim(),
          .k_row_stride = expanded_dim_,
          .v_row_stride = expanded_dim_};
}

AttentionArgs ContextAttention::Arguments(int64_t heads) const {
  return {.tasks = {},
          .q_heads = static_cast<int>(heads),
          .kv_heads = static_cast<int>(kv_heads_),
          .k_dim = static_cast<int>(k_dim_),
          .v_dim = static_cast<int>(o_.v_dim),
          .scale = o_.scale};
}

// ---- New keys ------------------------------------------------------------------------------------------------------

void ContextAttention::StoreFromRows(int64_t layer, const Rows& rows) {
  const KvCacheShape& shape = o_.cache->shape();
  // From the first key on: a row's values lie behind its keys.
  const int64_t v_offset = rows.v == nullptr ? 0 : rows.v - rows.k;
  const int64_t columns = rows.v == nullptr ? kv_heads_ * k_dim_ : v_offset + kv_heads_ * shape.v_dim;
  const int64_t n = batch_->rows;
  const std::span<const float> own(rows.k, static_cast<size_t>(n == 0 ? 0 : (n - 1) * rows.kv_stride + columns));
  std::vector<std::span<const float>> sources = {own};
  if (ExchangesPcp()) o_.groups.pcp->AllGather(own, sources);
  for (const ForwardBatch::Store& store : batch_->stores) {
    if (store.slots.empty()) continue;
    const float* from = sources[static_cast<size_t>(store.source)].data();
    const KvCache& cache = *pcp_caches_[static_cast<size_t>(store.target)];
    k_.kv_write({.k = from,
                 .k_stride = rows.kv_stride,
                 .v = rows.v == nullptr ? nullptr : from + v_offset,
                 .v_stride = rows.kv_stride,
                 .slots = store.slots.data(),
                 .rows = static_cast<int64_t>(store.slots.size()),
                 .kv_heads = static_cast<int>(kv_heads_),
                 .k_dim = static_cast<int>(k_dim_),
                 .v_dim = static_cast<int>(shape.v_dim),
                 .block_tokens = shape.block_tokens,
                 .k_cache = cache.k(layer),
                 .v_cache = cache.v(layer),
                 .dtype = shape.dtype},
                *pool_);
  }
  // The next layer overwrites `rows`: the PCP peers must have read them. Where they are among the KV shards, the
  // exchange of the keys or of the gather-Q rows sees to it.
  if (ExchangesPcp() && o_.parallel.pcp_kv_layout == cp::PcpKvLayout::kReplicated) o_.groups.pcp->Release();
}

// In the cache's type, so that what others get is what a later step reads.
void ContextAttention::PackNewRows(const Rows& rows) {
  const KvCacheShape& shape = o_.cache->shape();
  const int64_t n = batch_->rows;
  Buffer& packed = packed_.Next(n * row_bytes_);
  while (static_cast<int64_t>(pack_slots_.size()) < n) pack_slots_.push_back(static_cast<int64_t>(pack_slots_.size()));
  if (n == 0) return;
  auto* bytes = packed.as<std::byte>();
  k_.kv_write({.k = rows.k,
               .k_stride = rows.kv_stride,
               .v = rows.v,
               .v_stride = rows.kv_stride,
               .slots = pack_slots_.data(),
               .rows = n,
               .kv_heads = static_cast<int>(kv_heads_),
               .k_dim = static_cast<int>(k_dim_),
               .v_dim = static_cast<int>(shape.v_dim),
               .block_tokens = static_cast<int32_t>(n),
               .k_cache = bytes,
               .v_cache = bytes + n * kv_heads_ * k_dim_ * static_cast<int64_t>(SizeOf(shape.dtype)),
               .dtype = shape.dtype},
              *pool_);
}

void ContextAttention::StorePacked(int64_t layer, const Views& packed) {
  const KvCacheShape& shape = o_.cache->shape();
  const auto element = static_cast<int64_t>(SizeOf(shape.dtype));
  for (const ForwardBatch::Store& store : batch_->stores) {
    WEFT_CHECK(store.target == o_.coord.pcp);
    const auto n = static_cast<int64_t>(store.slots.size());
    const std::byte* from = packed[static_cast<size_t>(store.source)].data();
    const auto copy = [&](void* cache, const std::byte* values, int64_t row, int64_t dim) {
      const int64_t slot = store.slots[static_cast<size_t>(row)];
      auto* to = static_cast<std::byte*>(cache);
      for (int64_t head = 0; head < kv_heads_; ++head) {
        const int64_t block_row = (slot / shape.block_tokens * kv_heads_ + head) * shape.block_tokens;
        std::memcpy(to + (block_row + slot % shape.block_tokens) * dim * element,
                    values + (head * n + row) * dim * element, static_cast<size_t>(dim * element));
      }
    };
    pool_->ParallelFor(n, 64, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) {
        if (store.slots[static_cast<size_t>(row)] < 0) continue;
        copy(o_.cache->k(layer), from, row, k_dim_);
        if (shape.v_dim > 0) copy(o_.cache->v(layer), from + n * kv_heads_ * k_dim_ * element, row, shape.v_dim);
      }
    });
  }
}

// ---- Gather-KV -----------------------------------------------------------------------------------------------------

void ContextAttention::PrepareInPlace() {
  in_place_pages_.clear();
  in_place_tasks_.clear();
  // All pages first: the tasks hold views of them.
  for (const QuerySegment& segment : batch_->gather_kv) {
    for (int32_t shard = 0; shard < shards_; ++shard) {
      in_place_pages_.push_back(CachePages(
          segment.block_table, batch_->gather_kv_visible.data() + shard * batch_->gather_kv_rows + segment.row0));
    }
  }
  const auto shards = static_cast<size_t>(shards_);
  for (size_t i = 0; i < batch_->gather_kv.size(); ++i) {
    in_place_tasks_.push_back({.rows = batch_->gather_kv[i].rows,
                               .kv = std::span<const KvPages>(in_place_pages_).subspan(i * shards, shards)});
  }
}

// Every rank reads the keys of all shards where they lie.
void ContextAttention::GatherKvInPlace(int64_t layer, const Rows& rows) {
  if (in_place_tasks_.empty()) return;
  const int64_t out_dim = o_.heads * o_.v_dim;
  for (size_t i = 0; i < in_place_pages_.size(); ++i) {
    PointTo(in_place_pages_[i], *shard_caches_[i % static_cast<size_t>(shards_)], layer);
  }
  for (size_t i = 0; i < in_place_tasks_.size(); ++i) {
    const int64_t row0 = batch_->gather_kv[i].row0;
    AttentionTask& task = in_place_tasks_[i];
    task.q = rows.gather_kv_q + row0 * rows.gather_kv_q_stride;
    task.q_stride = rows.gather_kv_q_stride;
    task.out = rows.gather_kv_out + row0 * out_dim;
    task.out_stride = out_dim;
  }
  AttentionArgs args = Arguments(o_.heads);
  args.tasks = in_place_tasks_;
  k_.attention(args, *pool_);
}

int64_t ContextAttention::KeysOn(const Range& range, int32_t shard) const {
  const int64_t keys = layout_.LocalLen(contexts_[range.context].tokens, shard);
  return std::max<int64_t>(0, std::min(range.end, keys) - range.begin);
}

// Cuts the contexts into segments of at most segment_tokens keys over all shards. The same on every rank that takes
// part: on all of the CP group, or, where each PCP rank holds everything and works by itself, on its DCP group.
void ContextAttention::PrepareSegments() {
  const bool with_peers = o_.parallel.pcp_kv_layout == cp::PcpKvLayout::kSharded || DealsExpansion();
  for (const ForwardBatch::Context& context : batch_->contexts) {
    const bool own = std::any_of(batch_->gather_kv.begin(), batch_->gather_kv.end(),
                                 [&](const QuerySegment& segment) { return segment.request == context.request; });
    if (own || with_peers) contexts_.push_back(context);
  }
  const int64_t most = std::max<int64_t>(1, o_.segment_tokens / shards_);
  int64_t room = 0;
  for (size_t i = 0; i < contexts_.size(); ++i) {
    const int64_t keys = layout_.LocalLen(contexts_[i].tokens, 0);  // shard 0 has the most
    for (int64_t begin = 0; begin < keys;) {
      if (room == 0) {
        segments_.emplace_back();
        room = most;
      }
      const int64_t n = std::min(room, keys - begin);
      segments_.back().push_back({i, begin, begin + n});
      begin += n;
      room -= n;
    }
  }
}

void ContextAttention::BeginAttend(const Rows& rows) {
  AttentionArgs args = Arguments(o_.heads);
  if (o_.expansion != nullptr) {
    args.kv_heads = args.q_heads;
    args.k_dim = static_cast<int>(o_.expansion->k_dim());
    args.v_dim = static_cast<int>(o_.expansion->v_dim());
  }
  attend_.Begin(batch_->gather_kv, rows.gather_kv_q, rows.gather_kv_q_stride, rows.gather_kv_out, args);
}

void ContextAttention::AddToRows(const Range& range, const KvPages& pages, int64_t keys) {
  for (size_t i = 0; i < batch_->gather_kv.size(); ++i) {
    if (batch_->gather_kv[i].request == contexts_[range.context].request) attend_.AddVisible(i, pages, keys);
  }
}

// Attends to the new keys of this PCP rank, or to those of all others.
void ContextAttention::AttendNew(int64_t layer, const Views& packed, bool own) {
  const KvCacheShape& shape = o_.cache->shape();
  std::vector<const ForwardBatch::NewKeys*> pieces;
  int64_t keys = 0;
  for (const ForwardBatch::NewKeys& piece : batch_->new_keys) {
    if ((piece.pcp == o_.coord.pcp || rows_of_.size() == 1) != own) continue;
    // Nobody here may see them: another request's, or behind all own rows.
    const bool seen = std::any_of(batch_->gather_kv.begin(), batch_->gather_kv.end(), [&](const QuerySegment& s) {
      return s.request == piece.segment.request && s.first_position + s.rows > piece.segment.first_position;
    });
    if (!seen) continue;
    pieces.push_back(&piece);
    keys += piece.segment.rows;
  }
  if (pieces.empty()) return;
  if (o_.expansion != nullptr) {
    latents_.Reserve(static_cast<size_t>(keys * k_dim_ * kFloat));
    expanded_.Reserve(static_cast<size_t>(keys * expanded_dim_ * kFloat));
  }
  int64_t done = 0;
  std::vector<KvPages> pages;
  for (const ForwardBatch::NewKeys* piece : pieces) {
    const int64_t rows = rows_of_[static_cast<size_t>(piece->pcp)];
    pages.push_back(PackedPages(packed[static_cast<size_t>(piece->pcp)].data(), rows, piece->segment.row0));
    if (o_.expansion != nullptr) {
      ToFloats(*pool_, shape.dtype, pages.back().k, piece->segment.rows * k_dim_, latents_.as<float>() + done * k_dim_);
      pages.back() = ExpandedPages(expanded_.as<float>() + done * expanded_dim_);
    }
    done += piece->segment.rows;
  }
  if (o_.expansion != nullptr) o_.expansion->Expand(layer, latents_.as<float>(), keys, expanded_.as<float>(), *pool_);
  for (size_t p = 0; p < pieces.size(); ++p) {
    const QuerySegment& from = pieces[p]->segment;
    for (size_t i = 0; i < batch_->gather_kv.size(); ++i) {
      if (batch_->gather_kv[i].request == from.request) {
        attend_.AddCausal(i, pages[p], from.rows, from.first_position);
      }
    }
  }
  attend_.Run(k_, *pool_);
}

// Every PCP rank expands its own new keys; all read all of them.
void ContextAttention::ExpandNewDealt(int64_t layer) {
  const int64_t own = batch_->gather_kv_rows;
  latents_.Reserve(static_cast<size_t>(own * k_dim_ * kFloat));
  Buffer& expanded = expanded_ring_.Next(own * expanded_dim_ * kFloat);
  if (own > 0) {
    // Gather-KV rows are the first ones.
    ToFloats(*pool_, o_.cache->shape().dtype, packed_.current().data(), own * k_dim_, latents_.as<float>());
    o_.expansion->Expand(layer, latents_.as<float>(), own, expanded.as<float>(), *pool_);
  }
  std::vector<std::span<const float>> views = {{expanded.as<float>(), static_cast<size_t>(own * expanded_dim_)}};
  if (ExchangesPcp()) o_.groups.pcp->AllGather(views.front(), views);
  for (const auto& [pcp, from] : batch_->new_keys) {
    const KvPages pages = ExpandedPages(views[static_cast<size_t>(pcp)].data() + from.row0 * expanded_dim_);
    for (size_t i = 0; i < batch_->gather_kv.size(); ++i) {
      if (batch_->gather_kv[i].request == from.request) attend_.AddCausal(i, pages, from.rows, from.first_position);
    }
  }
  attend_.Run(k_, *pool_);
}

void ContextAttention::GatherKvSegments(int64_t layer) {
  for (size_t i = 0; i < segments_.size(); ++i) {
    if (!streams_context_) {
      ExpandSegmentDealt(layer, segments_[i]);
      continue;
    }
    Views packed;
    exchange().FinishAllGather(packed);
    if (i + 1 < segments_.size()) StartSegment(layer, segments_[i + 1]);
    AttendSegment(layer, segments_[i], packed);
  }
}

size_t ContextAttention::SegmentBytes(const Segment& segment, int32_t shard) const {
  int64_t keys = 0;
  for (const Range& range : segment) keys += KeysOn(range, shard);
  return static_cast<size_t>(keys * row_bytes_);
}

// Gives the others this shard's part of the segment: range by range, each packed like new rows.
void ContextAttention::StartSegment(int64_t layer, const Segment& segment) {
  const KvCacheShape& shape = o_.cache->shape();
  const auto element = static_cast<int64_t>(SizeOf(shape.dtype));
  std::vector<size_t> sizes;
  for (int32_t shard = 0; shard < shards_; ++shard) sizes.push_back(SegmentBytes(segment, shard));
  const auto own_bytes = static_cast<int64_t>(sizes[static_cast<size_t>(o_.coord.kv_shard)]);
  Buffer& buffer = segment_.Next(own_bytes);
  auto* to = buffer.as<std::byte>();
  for (const Range& range : segment) {
    const int64_t keys = KeysOn(range, o_.coord.kv_shard);
    const auto table = contexts_[range.context].block_table;
    const auto copy = [&](const void* cache, int64_t dim, std::byte* out) {
      const auto* from = static_cast<const std::byte*>(cache);
      pool_->ParallelFor(kv_heads_ * keys, 256, [&](int64_t begin, int64_t end, int) {
        while (begin < end) {  // runs within one head's rows of one block
          const int64_t head = begin / keys;
          const int64_t key = range.begin + begin % keys;
          const int64_t offset = key % shape.block_tokens;
          const int64_t n = std::min({end - begin, keys - begin % keys, shape.block_tokens - offset});
          const int64_t block = table[static_cast<size_t>(key / shape.block_tokens)];
          std::memcpy(out + begin * dim * element,
                      from + ((block * kv_heads_ + head) * shape.block_tokens + offset) * dim * element,
                      static_cast<size_t>(n * dim * element));
          begin += n;
        }
      });
    };
    if (keys == 0) continue;
    copy(o_.cache->k(layer), k_dim_, to);
    if (shape.v_dim > 0) copy(o_.cache->v(layer), shape.v_dim, to + kv_heads_ * keys * k_dim_ * element);
    to += keys * row_bytes_;
  }
  exchange().StartAllGather(BytesOf(buffer, own_bytes), sizes);
  exchanged_bytes_ += own_bytes;
}

void ContextAttention::AttendSegment(int64_t layer, const Segment& segment, const Views& packed) {
  const KvCacheShape& shape = o_.cache->shape();
  int64_t keys = 0;
  for (int32_t shard = 0; shard < shards_; ++shard) {
    for (const Range& range : segment) keys += KeysOn(range, shard);
  }
  const bool expands = o_.expansion != nullptr && !batch_->gather_kv.empty();
  if (expands) {
    latents_.Reserve(static_cast<size_t>(keys * k_dim_ * kFloat));
    expanded_.Reserve(static_cast<size_t>(keys * expanded_dim_ * kFloat));
  }
  int64_t done = 0;
  for (int32_t shard = 0; shard < shards_; ++shard) {
    const std::byte* from = packed[static_cast<size_t>(shard)].data();
    for (const Range& range : segment) {
      const int64_t n = KeysOn(range, shard);
      KvPages pages = PackedPages(from, n, 0);
      from += n * row_bytes_;
      if (expands) {
        ToFloats(*pool_, shape.dtype, pages.k, n * k_dim_, latents_.as<float>() + done * k_dim_);
        pages = ExpandedPages(expanded_.as<float>() + done * expanded_dim_);
      }
      done += n;
      AddToRows(range, pages, n);
    }
  }
  if (expands) o_.expansion->Expand(layer, latents_.as<float>(), keys, expanded_.as<float>(), *pool_);
  attend_.Run(k_, *pool_);
}

// Caches are in reach. Each PCP rank that reads the others' results expands an equal part of every range; else all.
void ContextAttention::ExpandSegmentDealt(int64_t layer, const Segment& segment) {
  const KvCacheShape& shape = o_.cache->shape();
  const auto element = static_cast<int64_t>(SizeOf(shape.dtype));
  const bool deals = DealsExpansion();
  const int64_t parts = deals ? o_.groups.pcp->size() : 1;
  // Part `part` of the keys [0, n) of a range on a shard.
  const auto begin_of = [&](int64_t n, int64_t part) { return n * part / parts; };
  const int64_t own_part = deals ? o_.coord.pcp : 0;
  int64_t own = 0;
  for (const Range& range : segment) {
    for (int32_t shard = 0; shard < shards_; ++shard) {
      const int64_t n = KeysOn(range, shard);
      own += begin_of(n, own_part + 1) - begin_of(n, own_part);
    }
  }
  latents_.Reserve(static_cast<size_t>(own * k_dim_ * kFloat));
  Buffer& expanded = expanded_ring_.Next(own * expanded_dim_ * kFloat);
  float* latents = latents_.as<float>();
  for (const Range& range : segment) {
    const auto table = contexts_[range.context].block_table;
    for (int32_t shard = 0; shard < shards_; ++shard) {
      const int64_t n = KeysOn(range, shard);
      const auto* cache = static_cast<const std::byte*>(shard_caches_[static_cast<size_t>(shard)]->k(layer));
      const int64_t end = range.begin + begin_of(n, own_part + 1);
      for (int64_t key = range.begin + begin_of(n, own_part); key < end;) {
        const int64_t offset = key % shape.block_tokens;
        const int64_t run = std::min(end - key, shape.block_tokens - offset);
        const int64_t block = table[static_cast<size_t>(key / shape.block_tokens)];
        ToFloats(*pool_, shape.dtype, cache + (block * shape.block_tokens + offset) * k_dim_ * element, run * k_dim_,
                 latents);
        latents += run * k_dim_;
        key += run;
      }
    }
  }
  if (own > 0) o_.expansion->Expand(layer, latents_.as<float>(), own, expanded.as<float>(), *pool_);
  std::vector<std::span<const float>> views = {{expanded.as<float>(), static_cast<size_t>(own * expanded_dim_)}};
  if (deals) o_.groups.pcp->AllGather(views.front(), views);
  for (int64_t part = 0; part < parts; ++part) {
    const float* row = views[static_cast<size_t>(part)].data();
    for (const Range& range : segment) {
      for (int32_t shard = 0; shard < shards_; ++shard) {
        const int64_t n = KeysOn(range, shard);
        const int64_t keys = begin_of(n, part + 1) - begin_of(n, part);
        AddToRows(range, ExpandedPages(row), keys);
        row += keys * expanded_dim_;
      }
    }
  }
  attend_.Run(k_, *pool_);
}

// ---- Gather-Q ------------------------------------------------------------------------------------------------------

void ContextAttention::PrepareGatherQ() {
  gather_q_pages_.clear();
  gather_q_tasks_.clear();
  const size_t local = batch_->local_shards.size();
  for (const QuerySegment& segment : batch_->gather_q) {
    for (size_t i = 0; i < local; ++i) {
      gather_q_pages_.push_back(
          CachePages(segment.block_table,
                     batch_->gather_q_visible.data() + static_cast<int64_t>(i) * batch_->gathered_rows + segment.row0));
    }
  }
  for (size_t i = 0; i < batch_->gather_q.size(); ++i) {
    gather_q_tasks_.push_back(
        {.rows = batch_->gather_q[i].rows, .kv = std::span<const KvPages>(gather_q_pages_).subspan(i * local, local)});
  }
}

// All gathered rows, with the heads of the whole DCP group, over the keys of the local shards.
void ContextAttention::AttendOwnShard(int64_t layer, const float* q, int64_t q_stride, float* out, float* lse) {
  if (gather_q_tasks_.empty()) return;
  const int64_t heads = exchange().size() > 1 ? dcp_ * o_.heads : o_.heads;
  const size_t local = batch_->local_shards.size();
  for (size_t i = 0; i < gather_q_pages_.size(); ++i) {
    const auto shard = static_cast<size_t>(batch_->local_shards[i % local]);
    const bool own = static_cast<int32_t>(shard) == o_.coord.kv_shard;
    PointTo(gather_q_pages_[i], own ? *o_.cache : *shard_caches_[shard], layer);
  }
  for (size_t i = 0; i < gather_q_tasks_.size(); ++i) {
    const int64_t row = batch_->gather_q[i].row0;
    AttentionTask& task = gather_q_tasks_[i];
    task.q = q + row * q_stride;
    task.q_stride = q_stride;
    task.out = out + row * heads * o_.v_dim;
    task.out_stride = heads * o_.v_dim;
    task.lse = lse == nullptr ? nullptr : lse + row * heads;
    task.lse_stride = heads;
  }
  AttentionArgs args = Arguments(heads);
  args.tasks = gather_q_tasks_;
  k_.attention(args, *pool_);
}

// Each rank attends with the gathered queries, all heads of its DCP group, to its own shard; the partial results go
// back to the ranks of the rows and heads, which merge those of all shards.
void ContextAttention::GatherQ(int64_t layer, const Rows& rows) {
  Communicator& group = exchange();
  if (group.size() == 1) {
    AttendOwnShard(layer, rows.gather_q_q, rows.gather_q_q_stride, rows.gather_q_out, nullptr);
    return;
  }
  const bool streams = o_.stream || !group.shares_memory();
  const int64_t own_rows = batch_->rows - batch_->gather_kv_rows;
  const int64_t q_dim = o_.heads * k_dim_;
  const int64_t out_dim = o_.heads * o_.v_dim;
  const int64_t group_heads = dcp_ * o_.heads;
  const int64_t all_rows = batch_->gathered_rows;
  gathered_q_.Reserve(static_cast<size_t>(all_rows * dcp_ * q_dim * kFloat));
  float* q = gathered_q_.as<float>();

  std::span<const float> own_q(
      rows.gather_q_q, static_cast<size_t>(std::max<int64_t>(0, (own_rows - 1) * rows.gather_q_q_stride + q_dim)));
  int64_t from_stride = rows.gather_q_q_stride;
  if (own_rows == 0) own_q = {};
  if (streams) {
    packed_q_.Reserve(static_cast<size_t>(own_rows * q_dim * kFloat));
    CopyRows(*pool_, own_rows, q_dim * kFloat, [&](int64_t row) {
      std::memcpy(packed_q_.as<float>() + row * q_dim, rows.gather_q_q + row * rows.gather_q_q_stride,
                  static_cast<size_t>(q_dim * kFloat));
    });
    own_q = {packed_q_.as<float>(), static_cast<size_t>(own_rows * q_dim)};
    from_stride = q_dim;
  }
  std::vector<std::span<const float>> queries;
  if (streams) {
    std::vector<size_t> sizes;
    for (int64_t member = 0; member < group.size(); ++member) {
      sizes.push_back(static_cast<size_t>(batch_->gather_q_rows[static_cast<size_t>(member / dcp_)] * q_dim * kFloat));
    }
    group.StartAllGather(std::as_bytes(own_q), sizes);
    group.FinishAllGather(queries);
    exchanged_bytes_ += own_rows * q_dim * kFloat;
  } else {
    group.AllGather(own_q, queries);
  }
  std::vector<int64_t> first(batch_->gather_q_rows.size() + 1, 0);  // of a PCP rank's rows among the gathered ones
  for (size_t pcp = 0; pcp < batch_->gather_q_rows.size(); ++pcp) {
    const int64_t n = batch_->gather_q_rows[pcp];
    first[pcp + 1] = first[pcp] + n;
    for (int64_t dcp = 0; dcp < dcp_; ++dcp) {
      const float* from = queries[pcp * static_cast<size_t>(dcp_) + static_cast<size_t>(dcp)].data();
      CopyRows(*pool_, n, q_dim * kFloat, [&](int64_t row) {
        std::memcpy(q + ((first[pcp] + row) * dcp_ + dcp) * q_dim, from + row * from_stride,
                    static_cast<size_t>(q_dim * kFloat));
      });
    }
  }

  // [gathered rows, group heads, v_dim], then [gathered rows, group heads].
  Buffer& part = gather_q_part_.Next(all_rows * (dcp_ * out_dim + group_heads) * kFloat);
  float* out = part.as<float>();
  float* lse = out + all_rows * dcp_ * out_dim;
  AttendOwnShard(layer, q, dcp_ * q_dim, out, lse);

  MergeArgs merge{.out = {},
                  .lse = {},
                  .rows = own_rows,
                  .heads = o_.heads,
                  .dim = o_.v_dim,
                  .merged = rows.gather_q_out,
                  .merged_row_stride = out_dim};
  std::vector<const float*> outs, lses;
  if (streams) {
    // For each member its rows and heads alone: outputs, then LSE.
    Buffer& sent = expanded_ring_.Next(all_rows * (dcp_ * out_dim + group_heads) * kFloat);
    std::vector<std::span<const std::byte>> parts;
    float* to = sent.as<float>();
    for (int64_t member = 0; member < group.size(); ++member) {
      const auto pcp = static_cast<size_t>(member / dcp_);
      const int64_t dcp = member % dcp_;
      const int64_t n = batch_->gather_q_rows[pcp];
      float* to_lse = to + n * out_dim;
      CopyRows(*pool_, n, out_dim * kFloat, [&](int64_t row) {
        const int64_t at = (first[pcp] + row) * dcp_ + dcp;
        std::memcpy(to + row * out_dim, out + at * out_dim, static_cast<size_t>(out_dim * kFloat));
        std::memcpy(to_lse + row * o_.heads, lse + at * o_.heads, static_cast<size_t>(o_.heads * kFloat));
      });
      const int64_t floats = n * (out_dim + o_.heads);
      parts.push_back(std::as_bytes(std::span<const float>(to, static_cast<size_t>(floats))));
      to += floats;
    }
    Views received;
    group.AllToAll(parts, received);
    exchanged_bytes_ += all_rows * (dcp_ * out_dim + group_heads) * kFloat;
    for (const auto& bytes : received) {
      outs.push_back(reinterpret_cast<const float*>(bytes.data()));
      lses.push_back(outs.back() + own_rows * out_dim);
    }
    merge.out_row_stride = out_dim;
    merge.lse_row_stride = o_.heads;
  } else {
    std::vector<std::span<const float>> parts;
    group.AllGather(std::span<const float>(out, static_cast<size_t>(all_rows * (dcp_ * out_dim + group_heads))), parts);
    const auto own = static_cast<size_t>(group.rank() / dcp_);
    const int64_t own_first = first[own];
    for (const auto& bytes : parts) {
      outs.push_back(bytes.data() + (own_first * dcp_ + o_.coord.dcp) * out_dim);
      lses.push_back(bytes.data() + all_rows * dcp_ * out_dim + own_first * group_heads + o_.coord.dcp * o_.heads);
    }
    merge.out_row_stride = dcp_ * out_dim;
    merge.lse_row_stride = group_heads;
  }
  merge.out = outs;
  merge.lse = lses;
  k_.merge(merge, *pool_);
}

}  // namespace weft
