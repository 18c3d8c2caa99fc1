#pragma once
// Where the engine's thread leaves outputs and a connection picks them up.

#include <functional>
#include <mutex>
#include <utility>
#include <vector>

#include "weft/api/request.h"

namespace weft {

// Appends `more` to `into`, so that a reader who is slower than the engine finds one larger output, not a queue.
void MergeOutput(RequestOutput& into, RequestOutput&& more);

// The outputs of the engine requests (choices) that make up one API request. Holds at most one merged output per
// choice, so a client that reads slowly costs memory for its tokens only. Put() never blocks on a reader.
class Mailbox {
 public:
  // `every_output`: notify for each batch of news; else once all choices have ended (or one with an error).
  // `notify` is called with the mailbox locked, from the engine's thread: it must only post.
  Mailbox(int choices, bool every_output, std::function<void()> notify);

  void Put(int choice, RequestOutput&& output);
  // What is new, in the order of the choices.
  std::vector<std::pair<int, RequestOutput>> Take();
  // True once there is what the reader was to be notified of.
  bool Ready() const;
  // All choices have ended and nothing is left to take.
  bool Drained() const;
  // No notification from here on.
  void Close();

  // Whether the engine has said its last word about this choice.
  bool Ended(int choice) const;

 private:
  mutable std::mutex mutex_;
  std::function<void()> notify_;
  const bool every_output_;
  std::vector<RequestOutput> pending_;
  std::vector<bool> has_news_;
  std::vector<bool> ended_;
  int news_ = 0;  // choices with news
  int open_;      // choices that have not ended
  bool failed_ = false;
  bool notified_ = false;
};

}  // namespace weft
