#include "weft/text/rust.h"

namespace weft::rust {

Error MakeError(wt_status status, const Buf& error, std::string_view context, std::string param) {
  std::string message(context);
  if (!message.empty()) message += ": ";
  message += error.view();
  return Error(std::move(message), status == WT_INVALID ? ErrorKind::kInvalidArgument : ErrorKind::kInternal,
               std::move(param));
}

}  // namespace weft::rust
