#pragma once
// Errors. Loading and configuration throw weft::Error, whose text says what was wrong, where, and what to do.
// Request paths return Result<T>. Invariants of our own are WEFT_CHECKed and cannot be reached from user input.

#include <fmt/format.h>

#include <exception>
#include <stdexcept>
#include <string>
#include <tl/expected.hpp>
#include <utility>

namespace weft {

// What the user can do about an error decides its kind; the server maps kinds to HTTP status codes.
enum class ErrorKind {
  kInvalidArgument,  // the request or a flag is wrong (400)
  kNotFound,         // 404
  kUnavailable,      // try again later (503)
  kInternal,         // 500
};

class Error : public std::runtime_error {
 public:
  explicit Error(std::string message, ErrorKind kind = ErrorKind::kInvalidArgument, std::string param = {})
      : std::runtime_error(std::move(message)), kind_(kind), param_(std::move(param)) {}

  ErrorKind kind() const { return kind_; }
  // The request field or flag at fault, empty where there is none.
  const std::string& param() const { return param_; }

 private:
  ErrorKind kind_;
  std::string param_;
};

template <typename T>
using Result = tl::expected<T, Error>;

template <typename... Args>
[[noreturn]] void Throw(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(fmt::format(format, std::forward<Args>(args)...));
}

template <typename... Args>
tl::unexpected<Error> Fail(fmt::format_string<Args...> format, Args&&... args) {
  return tl::make_unexpected(Error(fmt::format(format, std::forward<Args>(args)...)));
}

// The message of a caught exception, whatever was thrown.
std::string DescribeException(const std::exception_ptr& exception);

// Prints file, line, condition and message to stderr and aborts.
[[noreturn]] void CheckFailed(const char* file, int line, const char* condition, const std::string& message);

}  // namespace weft

#define WEFT_CHECK(condition, ...)                                                                      \
  do {                                                                                                  \
    if (!(condition)) [[unlikely]]                                                                      \
      ::weft::CheckFailed(__FILE__, __LINE__, #condition, ::weft::internal::CheckMessage(__VA_ARGS__)); \
  } while (false)

namespace weft::internal {
inline std::string CheckMessage() { return {}; }
template <typename... Args>
std::string CheckMessage(fmt::format_string<Args...> format, Args&&... args) {
  return fmt::format(format, std::forward<Args>(args)...);
}
}  // namespace weft::internal
