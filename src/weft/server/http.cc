#include "weft/server/http.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <ctime>

#include "weft/api/error_object.h"

namespace weft {
namespace {

struct Entry {
  std::string_view path;
  Route route;
  const char* allow;
  bool needs_key;
};

// vLLM asks for the key under /v1 only; here everything that costs time or shows data wants it.
constexpr Entry kEntries[] = {
    {"/v1/completions", Route::kCompletions, "POST", true},
    {"/v1/chat/completions", Route::kChatCompletions, "POST", true},
    {"/v1/models", Route::kModels, "GET", true},
    {"/health", Route::kHealth, "GET", false},
    {"/ping", Route::kPing, "GET, POST", false},
    {"/version", Route::kVersion, "GET", false},
    {"/metrics", Route::kMetrics, "GET", false},
    {"/load", Route::kLoad, "GET", false},
    {"/tokenize", Route::kTokenize, "POST", true},
    {"/detokenize", Route::kDetokenize, "POST", true},
};

bool Allows(std::string_view allow, std::string_view method) {
  for (size_t begin = 0; begin <= allow.size();) {
    const size_t end = std::min(allow.find(", ", begin), allow.size());
    if (allow.substr(begin, end - begin) == method) return true;
    begin = end + 2;
  }
  return false;
}

int HexDigit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

std::string PercentDecode(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '%' && i + 2 < text.size() && HexDigit(text[i + 1]) >= 0 && HexDigit(text[i + 2]) >= 0) {
      out += static_cast<char>(HexDigit(text[i + 1]) * 16 + HexDigit(text[i + 2]));
      i += 2;
    } else {
      out += text[i];
    }
  }
  return out;
}

const char* Reason(int status) {
  switch (status) {
    case 200:
      return "OK";
    case 204:
      return "No Content";
    case 400:
      return "Bad Request";
    case 401:
      return "Unauthorized";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 408:
      return "Request Timeout";
    case 413:
      return "Payload Too Large";
    case 431:
      return "Request Header Fields Too Large";
    case 500:
      return "Internal Server Error";
    case 503:
      return "Service Unavailable";
    default:
      return "Unknown";
  }
}

// RFC 9110's preferred date format, in the C locale.
std::string HttpDate() {
  static constexpr const char* kDays[] = {"Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"};
  static constexpr const char* kMonths[] = {"Jan", "Feb", "Mar", "Apr", "May", "Jun",
                                            "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"};
  const std::time_t now = std::time(nullptr);
  std::tm tm{};
  gmtime_r(&now, &tm);
  return fmt::format("{}, {:02} {} {} {:02}:{:02}:{:02} GMT", kDays[tm.tm_wday], tm.tm_mday, kMonths[tm.tm_mon],
                     tm.tm_year + 1900, tm.tm_hour, tm.tm_min, tm.tm_sec);
}

void AppendCors(const ReplyContext& context, std::string& head) {
  if (context.allow_origin.empty()) return;
  head += "Access-Control-Allow-Origin: " + context.allow_origin + "\r\n";
  if (context.allow_origin != "*") head += "Vary: Origin\r\n";
}

bool ConstantTimeEqual(std::string_view given, std::string_view key) {
  unsigned difference = given.size() == key.size() ? 0 : 1;
  for (size_t i = 0; i < given.size(); ++i) {
    const char expected = key.empty() ? '\0' : key[i % key.size()];
    difference |= static_cast<unsigned char>(given[i]) ^ static_cast<unsigned char>(expected);
  }
  // Keeps the compiler from leaving the loop early.
  return *const_cast<volatile unsigned*>(&difference) == 0;
}

}  // namespace

RouteMatch MatchRoute(std::string_view method, std::string_view target) {
  std::string_view path = target.substr(0, target.find_first_of("?#"));
  if (path.starts_with("http://")) {  // the absolute form, as sent to proxies
    path.remove_prefix(7);
    path.remove_prefix(std::min(path.find('/'), path.size()));
  }
  RouteMatch match;
  for (const Entry& entry : kEntries) {
    if (entry.path != path) continue;
    match.route = entry.route;
    match.allow = entry.allow;
    match.needs_key = entry.needs_key;
    match.allowed = Allows(entry.allow, method);
    return match;
  }
  constexpr std::string_view kModelPrefix = "/v1/models/";
  if (path.size() > kModelPrefix.size() && path.starts_with(kModelPrefix)) {
    match.route = Route::kModel;
    match.allow = "GET";
    match.allowed = method == "GET";
    match.argument = PercentDecode(path.substr(kModelPrefix.size()));
  }
  return match;
}

HttpReply ErrorReply(int status, const std::string& message, const std::string& param) {
  HttpReply reply;
  reply.status = status;
  reply.body = ErrorJson(status, message, param);
  return reply;
}

HttpReply ErrorReply(const Error& error) { return ErrorReply(HttpStatusOf(error.kind()), error.what(), error.param()); }

std::string ResponseHead(const HttpReply& reply, int64_t body_bytes, const ReplyContext& context) {
  std::string head = fmt::format("HTTP/1.{} {} {}\r\nServer: weft\r\nDate: {}\r\n", context.http_1_0 ? 0 : 1,
                                 reply.status, Reason(reply.status), HttpDate());
  if (!reply.content_type.empty()) head += "Content-Type: " + reply.content_type + "\r\n";
  if (body_bytes >= 0) {
    head += fmt::format("Content-Length: {}\r\n", body_bytes);
  } else {
    head += "Cache-Control: no-cache\r\nX-Accel-Buffering: no\r\n";
    if (!context.http_1_0) head += "Transfer-Encoding: chunked\r\n";
  }
  if (!reply.allow.empty()) head += "Allow: " + reply.allow + "\r\n";
  if (reply.status == 401) head += "WWW-Authenticate: Bearer\r\n";
  if (reply.status == 503) head += fmt::format("Retry-After: {}\r\n", context.retry_after_s);
  AppendCors(context, head);
  if (!context.keep_alive) {
    head += "Connection: close\r\n";
  } else if (context.http_1_0) {
    head += "Connection: keep-alive\r\n";
  }
  head += "\r\n";
  return head;
}

std::string PreflightResponse(const ReplyContext& context) {
  std::string head = fmt::format("HTTP/1.1 204 No Content\r\nServer: weft\r\nDate: {}\r\n", HttpDate());
  AppendCors(context, head);
  head +=
      "Access-Control-Allow-Methods: GET, POST, OPTIONS\r\n"
      "Access-Control-Allow-Headers: authorization, content-type, x-request-id, x-stainless-arch, x-stainless-lang, "
      "x-stainless-os, x-stainless-package-version, x-stainless-retry-count, x-stainless-runtime, "
      "x-stainless-runtime-version, x-stainless-timeout\r\n"
      "Access-Control-Max-Age: 600\r\n";
  if (!context.keep_alive) head += "Connection: close\r\n";
  head += "\r\n";
  return head;
}

bool KeyAccepted(const std::vector<std::string>& keys, std::string_view authorization) {
  constexpr std::string_view kScheme = "bearer ";
  if (authorization.size() < kScheme.size()) return false;
  for (size_t i = 0; i < kScheme.size(); ++i) {
    if (std::tolower(static_cast<unsigned char>(authorization[i])) != kScheme[i]) return false;
  }
  const std::string_view given = authorization.substr(kScheme.size());
  bool accepted = false;
  for (const std::string& key : keys) accepted |= ConstantTimeEqual(given, key);
  return accepted;
}

std::string AllowedOrigin(const std::vector<std::string>& allowed, std::string_view origin) {
  if (origin.empty()) return {};
  for (const std::string& entry : allowed) {
    if (entry == "*") return "*";
    if (entry == origin) return entry;
  }
  return {};
}

}  // namespace weft
