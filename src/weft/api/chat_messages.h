#pragma once
// Chat messages and tools as clients send them, brought into the form that chat templates expect.

#include <string>

#include "weft/api/json_fields.h"

namespace weft {

struct NormalizedMessages {
  Json json;  // an array of objects
  std::string last_role;
  std::string last_content;
};

// Every message needs a role. As vLLM does: content given as a list of parts becomes one string (text parts joined by a
// newline), content null or absent becomes "", and the arguments of tool calls, which clients send as JSON text, become
// objects. Parts that are no text are refused: the models served here read text only.
Result<NormalizedMessages> NormalizeMessages(const Json& messages);

// An array, not empty, of {"type": "function", "function": {"name": ...}}.
Result<void> CheckTools(const Json& tools);

}  // namespace weft
