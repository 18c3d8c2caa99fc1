#pragma once
// Routing and other things about HTTP that need no HTTP library.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "weft/server/server.h"

namespace weft {

enum class Route {
  kNone,  // no such path
  kCompletions,
  kChatCompletions,
  kModels,
  kModel,
  kHealth,
  kPing,
  kVersion,
  kMetrics,
  kLoad,
  kTokenize,
  kDetokenize,
};

struct RouteMatch {
  Route route = Route::kNone;
  const char* allow = "";  // the methods of the path
  bool allowed = false;    // the method is one of them
  bool needs_key = true;
  std::string argument;  // what follows /v1/models/, percent-decoded
};

// `target`: as in the request line, with or without a query.
RouteMatch MatchRoute(std::string_view method, std::string_view target);

struct HttpReply {
  int status = 200;
  std::string content_type = "application/json";
  std::string body;
  std::string allow;  // with 405
};

HttpReply ErrorReply(int status, const std::string& message, const std::string& param = {});
HttpReply ErrorReply(const Error& error);

// What of a request decides how the answer's header looks.
struct ReplyContext {
  bool keep_alive = true;
  bool http_1_0 = false;
  std::string allow_origin;  // Access-Control-Allow-Origin, empty: none
  int retry_after_s = 1;
};

// Status line and header fields up to the empty line. A body length of -1 is one that is not known: chunked, or until
// the connection closes with HTTP/1.0.
std::string ResponseHead(const HttpReply& reply, int64_t body_bytes, const ReplyContext& context);

// The answer to a CORS preflight.
std::string PreflightResponse(const ReplyContext& context);

// Whether the Authorization header carries one of the keys. The time it takes does not depend on where it differs.
bool KeyAccepted(const std::vector<std::string>& keys, std::string_view authorization);

// What Access-Control-Allow-Origin is to say to `origin`.
std::string AllowedOrigin(const std::vector<std::string>& allowed, std::string_view origin);

}  // namespace weft
