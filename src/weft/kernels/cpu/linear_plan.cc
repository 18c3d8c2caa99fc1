#include "weft/kernels/cpu/linear_plan.h"

#include <algorithm>

#include "weft/kernels/cpu/pack.h"

namespace weft::cpu {
namespace {

// Every piece packs its rows of x, which costs as much as the arithmetic of some 5 columns.
constexpr int64_t kLeastPanels = 8;

int64_t PanelsOf(const LinearArgs& args) { return (args.w->n + kPanel - 1) / kPanel; }

bool SameRows(const LinearArgs& a, const LinearArgs& b) {
  return a.x == b.x && a.x_stride == b.x_stride && a.m == b.m && a.w->k == b.w->k;
}

// Multiply-adds, where rows are few the time it takes to read the weights: a core reads a bf16 weight in the time of 8.
double CostOf(const LinearGroup& group) {
  const LinearArgs& args = group.args.front();
  const int64_t rows = std::max<int64_t>(args.m, 4 * static_cast<int64_t>(SizeOf(args.w->dtype)));
  return static_cast<double>(rows) * static_cast<double>(args.w->k) * static_cast<double>(group.panels * kPanel);
}

}  // namespace

void PlanLinear(std::span<const LinearArgs> args, int threads, FunctionRef<int64_t(const LinearArgs&)> most_rows,
                LinearPlan& plan) {
  plan.groups.clear();
  plan.pieces.clear();
  plan.products = 0;
  for (size_t i = 0; i < args.size(); ++i) {
    if (args[i].m == 0 || args[i].w->n == 0) continue;
    plan.products += args[i].m * args[i].w->n * args[i].w->k;
    const bool joins = i > 0 && !plan.groups.empty() && &plan.groups.back().args.back() == &args[i - 1] &&
                       SameRows(args[i - 1], args[i]);
    if (!joins) plan.groups.push_back({.args = args.subspan(i, 0)});
    LinearGroup& group = plan.groups.back();
    group.args = {group.args.data(), group.args.size() + 1};
    group.panels += PanelsOf(args[i]);
  }
  double total = 0;
  for (const LinearGroup& group : plan.groups) total += CostOf(group);
  const double most = total / static_cast<double>(threads * kPiecesOfThread);

  for (size_t g = 0; g < plan.groups.size(); ++g) {
    const LinearGroup& group = plan.groups[g];
    const int64_t m = group.args.front().m;
    const int64_t rows = most_rows(group.args.front());
    const int64_t row_pieces = (m + rows - 1) / rows;
    const int64_t rows_each = (m + row_pieces - 1) / row_pieces;
    int64_t col_pieces = 1;
    if (threads > 1) {
      const double cost = CostOf(group) / static_cast<double>(row_pieces);
      col_pieces = std::clamp<int64_t>(static_cast<int64_t>(cost / most + 0.99), 1,
                                       std::max<int64_t>(1, group.panels / kLeastPanels));
    }
    const int64_t panels_each = ((group.panels + col_pieces - 1) / col_pieces + 1) / 2 * 2;
    for (int64_t row0 = 0; row0 < m; row0 += rows_each) {
      for (int64_t panel0 = 0; panel0 < group.panels; panel0 += panels_each) {
        LinearPiece piece = {.group = static_cast<int64_t>(g),
                             .row0 = row0,
                             .row1 = std::min(row0 + rows_each, m),
                             .panel0 = panel0,
                             .panel1 = std::min(panel0 + panels_each, group.panels)};
        piece.cost = CostOf(group) * static_cast<double>(piece.row1 - piece.row0) / static_cast<double>(m) *
                     static_cast<double>(piece.panel1 - piece.panel0) / static_cast<double>(group.panels);
        plan.pieces.push_back(piece);
      }
    }
  }
  std::stable_sort(plan.pieces.begin(), plan.pieces.end(),
                   [](const LinearPiece& a, const LinearPiece& b) { return a.cost > b.cost; });
}

}  // namespace weft::cpu
