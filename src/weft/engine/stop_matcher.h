#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace weft {

// Finds stop strings in a text that arrives in pieces, and knows how much of its end has to be held back because a stop
// string may begin there. An Aho-Corasick automaton: the work is linear in the text, whatever the number and the
// lengths of the strings.
//
// The match that *ends* first counts (of those that end together the longest one): this is the one that would be found
// if the text came byte by byte, so the result does not depend on how the text was cut into tokens.
class StopMatcher {
 public:
  // No string may be empty.
  explicit StopMatcher(const std::vector<std::string>& stops);

  struct Match {
    size_t stop = 0;  // index into the strings
    size_t end = 0;   // bytes of the piece up to the end of the match
  };
  // Takes the next piece. With `report` false (min_tokens are not reached yet) matches that end in it do not count, but
  // one that only begins in it does later on. After a match the matcher must not be used again.
  std::optional<Match> Push(std::string_view piece, bool report = true);

  // Bytes at the end of the text so far that are the beginning, but not the whole, of a stop string.
  size_t held_bytes() const { return nodes_[static_cast<size_t>(state_)].held; }

 private:
  struct Node {
    int32_t fail = 0;
    int32_t stop = -1;  // the longest stop string that ends here
    uint32_t depth = 0;
    uint32_t held = 0;
    bool inner = false;  // has children
  };
  int32_t Child(int32_t node, unsigned char byte) const;

  std::vector<Node> nodes_;
  std::unordered_map<uint64_t, int32_t> children_;  // (node << 8 | byte) -> node
  int32_t state_ = 0;
};

}  // namespace weft
