#include "weft/engine/stop_matcher.h"

#include "weft/core/error.h"

namespace weft {

StopMatcher::StopMatcher(const std::vector<std::string>& stops) : nodes_(1) {
  struct Edge {
    int32_t parent, child;
    unsigned char byte;
  };
  std::vector<std::vector<Edge>> levels;
  for (size_t i = 0; i < stops.size(); ++i) {
    WEFT_CHECK(!stops[i].empty());
    int32_t node = 0;
    if (levels.size() < stops[i].size()) levels.resize(stops[i].size());
    for (size_t depth = 0; depth < stops[i].size(); ++depth) {
      const auto byte = static_cast<unsigned char>(stops[i][depth]);
      int32_t child = Child(node, byte);
      if (child < 0) {
        child = static_cast<int32_t>(nodes_.size());
        nodes_.emplace_back().depth = static_cast<uint32_t>(depth + 1);
        nodes_[static_cast<size_t>(node)].inner = true;
        children_[static_cast<uint64_t>(node) << 8 | byte] = child;
        levels[depth].push_back({node, child, byte});
      }
      node = child;
    }
    if (Node& last = nodes_[static_cast<size_t>(node)]; last.stop < 0) last.stop = static_cast<int32_t>(i);
  }
  // Breadth first: a node's fail link is its longest proper suffix in the tree, which lies on a level above.
  for (const auto& level : levels) {
    for (const Edge& edge : level) {
      Node& node = nodes_[static_cast<size_t>(edge.child)];
      if (edge.parent != 0) {
        int32_t at = nodes_[static_cast<size_t>(edge.parent)].fail;
        while (at != 0 && Child(at, edge.byte) < 0) at = nodes_[static_cast<size_t>(at)].fail;
        node.fail = std::max(Child(at, edge.byte), 0);
      }
      const Node& fail = nodes_[static_cast<size_t>(node.fail)];
      if (node.stop < 0) node.stop = fail.stop;
      node.held = node.inner ? node.depth : fail.held;
    }
  }
}

int32_t StopMatcher::Child(int32_t node, unsigned char byte) const {
  const auto found = children_.find(static_cast<uint64_t>(node) << 8 | byte);
  return found == children_.end() ? -1 : found->second;
}

std::optional<StopMatcher::Match> StopMatcher::Push(std::string_view piece, bool report) {
  for (size_t i = 0; i < piece.size(); ++i) {
    const auto byte = static_cast<unsigned char>(piece[i]);
    int32_t next = Child(state_, byte);
    while (next < 0 && state_ != 0) {
      state_ = nodes_[static_cast<size_t>(state_)].fail;
      next = Child(state_, byte);
    }
    state_ = std::max(next, 0);
    if (const int32_t stop = nodes_[static_cast<size_t>(state_)].stop; stop >= 0 && report) {
      return Match{static_cast<size_t>(stop), i + 1};
    }
  }
  return std::nullopt;
}

}  // namespace weft
