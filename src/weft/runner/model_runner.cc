#include "weft/runner/model_runner.h"

#include <algorithm>
#include <cmath>
#include <unordered_map>

#include "weft/core/error.h"
#include "weft/runner/block_copy.h"
#include "weft/runner/sampler.h"

namespace weft {
namespace {

// Rows whose logits are held at a time: a vocabulary of 152k makes 0.6 MB of one row.
constexpr int64_t kLogitsTile = 64;

}  // namespace

ModelRunner::ModelRunner(Transformer::Options options) : o_(options), transformer_(std::move(options)) {}

std::vector<RowOutput> ModelRunner::Step(const StepPlan& plan, const StepDeal& deal, const RequestTable& table,
                                         int64_t most_rows) {
  RankBatch batch = MakeRankBatch(plan, deal, table, o_.parallel, o_.coord);
  batch.forward.most_rows = std::max(batch.forward.most_rows, most_rows);
  batch.forward.router_margins = plan.capture_logits;
  CopyBlocks(plan);
  transformer_.Forward(batch.forward);

  const bool looks = o_.coord.tp == 0;
  const int64_t vocab = o_.config->vocab_size;
  const auto rows = static_cast<int64_t>(batch.logits.size());
  if (looks) logits_.Reserve(static_cast<size_t>(std::min(rows, kLogitsTile) * vocab) * sizeof(float));
  std::vector<RowOutput> found(static_cast<size_t>(looks ? rows : 0));
  for (int64_t first = 0; first < rows; first += kLogitsTile) {
    const int64_t n = std::min(kLogitsTile, rows - first);
    std::vector<int64_t> tile;
    for (int64_t i = 0; i < n; ++i) tile.push_back(batch.logits[static_cast<size_t>(first + i)].row);
    transformer_.Logits(tile, logits_.as<float>());
    if (!looks) continue;
    (batch.forward.solo ? o_.joint_pool : o_.pool)->ParallelFor(n, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const LogitsRow& row = batch.logits[static_cast<size_t>(first + i)];
        RowOutput& out = found[static_cast<size_t>(first + i)];
        out.handle = plan.requests[row.request].handle;
        const std::span<float> logits(logits_.as<float>() + i * vocab, static_cast<size_t>(vocab));
        LookAt(row, table.Get(out.handle), plan, logits, out);
      }
    });
  }
  return found;
}

// Before the forward pass, and without a barrier of its own. A rank copies what is on its own shard, which nobody else
// writes. Of the rows that come after the copy, gather-Q rows read this rank's shard alone; gather-KV rows of other
// ranks read it, too, but only behind the barrier that follows the storing of the first layer's new keys, which every
// rank enters when any of them has such rows. Earlier steps are over on all ranks before this one begins.
void ModelRunner::CopyBlocks(const StepPlan& plan) {
  const cp::KvLayout layout = LayoutOf(o_.parallel);
  for (const RequestStep& step : plan.requests) {
    for (const BlockCopy& copy : step.copies) CopyBlock(copy, layout, o_.coord.kv_shard, *o_.cache, *o_.pool);
  }
}

void ModelRunner::LookAt(const LogitsRow& row, const RequestState& state, const StepPlan& plan, std::span<float> logits,
                         RowOutput& out) const {
  const KernelTable& kernels = *o_.kernels;
  if (plan.capture_logits) {
    out.logit_positions.push_back(row.position);
    out.logits.assign(logits.begin(), logits.end());
    const std::span<const float> margins = transformer_.router_margins();
    if (!margins.empty()) out.router_margins.push_back(margins[static_cast<size_t>(row.row)]);
  }
  if (!std::isfinite(kernels.log_sum_exp(logits.data(), static_cast<int64_t>(logits.size())))) {
    out.error = fmt::format("the model's output at position {} is not a number", row.position);
    return;
  }
  if (row.prompt_logprob) {
    out.first_prompt_position = row.position + 1;
    out.prompt_logprobs.push_back(LogprobsOf(logits, state.tokens[static_cast<size_t>(row.position + 1)],
                                             *state.params.prompt_logprobs, kernels));
  }
  if (!row.sample) return;
  const std::span<const int32_t> tokens(state.tokens);
  const auto prompt = tokens.first(static_cast<size_t>(state.prompt_tokens));
  const auto output = tokens.subspan(static_cast<size_t>(state.prompt_tokens));
  // Log-probabilities are the model's own, before penalties and temperature.
  std::vector<float> raw;
  if (state.params.logprobs) raw.assign(logits.begin(), logits.end());
  const int32_t token = SampleToken(state.params, state.seed, prompt, output, logits, kernels);
  if (token < 0) {
    out.error = "no token is left to choose from: the request's constraints forbid all of them";
    return;
  }
  out.token_id = token;
  if (state.params.logprobs) out.logprobs = LogprobsOf(raw, token, *state.params.logprobs, kernels);
}

StepOutput MergeOutputs(const StepPlan& plan, std::vector<std::vector<RowOutput>> ranks) {
  StepOutput output;
  std::unordered_map<RequestHandle, size_t> index;
  for (const RequestStep& step : plan.requests) {
    index.emplace(step.handle, output.rows.size());
    output.rows.emplace_back().handle = step.handle;
  }
  std::vector<std::vector<RowOutput*>> of_request(plan.requests.size());
  for (auto& rows : ranks) {
    for (RowOutput& row : rows) of_request[index.at(row.handle)].push_back(&row);
  }
  for (size_t i = 0; i < of_request.size(); ++i) {
    RowOutput& merged = output.rows[i];
    auto& parts = of_request[i];
    auto position = [](const RowOutput* row) {
      return row->logit_positions.empty() ? row->first_prompt_position : row->logit_positions.front();
    };
    std::stable_sort(parts.begin(), parts.end(),
                     [&](const RowOutput* a, const RowOutput* b) { return position(a) < position(b); });
    for (RowOutput* part : parts) {
      if (part->error && !merged.error) merged.error = std::move(part->error);
      if (part->token_id) merged.token_id = part->token_id;
      if (part->logprobs) merged.logprobs = std::move(part->logprobs);
      if (!part->prompt_logprobs.empty()) {
        if (merged.prompt_logprobs.empty()) merged.first_prompt_position = part->first_prompt_position;
        std::move(part->prompt_logprobs.begin(), part->prompt_logprobs.end(),
                  std::back_inserter(merged.prompt_logprobs));
      }
      merged.logit_positions.insert(merged.logit_positions.end(), part->logit_positions.begin(),
                                    part->logit_positions.end());
      merged.logits.insert(merged.logits.end(), part->logits.begin(), part->logits.end());
      merged.router_margins.insert(merged.router_margins.end(), part->router_margins.begin(),
                                   part->router_margins.end());
    }
  }
  return output;
}

}  // namespace weft
