#include "weft/api/error_object.h"

#include "weft/api/json_fields.h"

namespace weft {
namespace {

const char* TypeOf(int status) {
  switch (status) {
    case 400:
    case 408:
    case 413:
    case 431:
      return "BadRequestError";
    case 401:
      return "AuthenticationError";
    case 404:
      return "NotFoundError";
    case 405:
      return "MethodNotAllowedError";
    case 503:
      return "ServiceUnavailableError";
    default:
      return "InternalServerError";
  }
}

}  // namespace

int HttpStatusOf(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kInvalidArgument:
      return 400;
    case ErrorKind::kNotFound:
      return 404;
    case ErrorKind::kUnavailable:
      return 503;
    case ErrorKind::kInternal:
      return 500;
  }
  return 500;
}

std::string ErrorJson(int status, const std::string& message, const std::string& param) {
  Json error;
  error["message"] = message;
  error["type"] = TypeOf(status);
  error["param"] = param.empty() ? Json(nullptr) : Json(param);
  error["code"] = status;
  Json body;
  body["error"] = std::move(error);
  // Messages may quote what the client sent.
  return body.dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string ErrorJson(const Error& error) { return ErrorJson(HttpStatusOf(error.kind()), error.what(), error.param()); }

}  // namespace weft
