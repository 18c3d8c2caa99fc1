#include "weft/core/log.h"

#include <spdlog/sinks/stdout_color_sinks.h>

#include "weft/core/error.h"

namespace weft {

void InitLogging(const std::string& level) {
  const auto parsed = spdlog::level::from_str(level);
  if (parsed == spdlog::level::off && level != "off") {
    Throw("unknown log level '{}': use trace, debug, info, warning, error, critical or off", level);
  }
  auto logger = std::make_shared<spdlog::logger>("weft", std::make_shared<spdlog::sinks::stderr_color_sink_mt>());
  logger->set_level(parsed);
  logger->set_pattern("%Y-%m-%d %H:%M:%S.%e %^%l%$ %v");
  spdlog::set_default_logger(std::move(logger));
}

}  // namespace weft
