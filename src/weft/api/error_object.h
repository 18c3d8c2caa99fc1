#pragma once
// Errors as HTTP answers, in the shape of OpenAI's and vLLM's error object.

#include <string>

#include "weft/core/error.h"

namespace weft {

// 400, 404, 503 or 500.
int HttpStatusOf(ErrorKind kind);

// {"error": {"message": ..., "type": ..., "param": ... or null, "code": status}}
std::string ErrorJson(int status, const std::string& message, const std::string& param = {});
std::string ErrorJson(const Error& error);

}  // namespace weft
