#include "weft/api/chat_messages.h"

#include <string_view>

namespace weft {
namespace {

tl::unexpected<Error> Bad(std::string field, std::string message) {
  return tl::make_unexpected(Error(std::move(message), ErrorKind::kInvalidArgument, std::move(field)));
}

Result<std::string> TextOfParts(const Json& parts, const std::string& where) {
  std::string text;
  bool first = true;
  for (const Json& part : parts) {
    const Json* piece = nullptr;
    if (part.is_string()) {
      piece = &part;
    } else if (part.is_object()) {
      const std::string type =
          part.contains("type") && part["type"].is_string() ? part["type"].get<std::string>() : "text";
      const char* key = type == "refusal" ? "refusal" : "text";
      if (type != "text" && type != "refusal" && type != "input_text" && type != "output_text" && type != "thinking") {
        return Bad("messages",
                   fmt::format("`{}` has a part of type \"{}\", but this model reads text only", where, type));
      }
      if (type == "thinking") continue;
      if (part.contains(key)) piece = &part[key];
    }
    if (piece == nullptr || !piece->is_string()) {
      return Bad("messages", fmt::format("`{}` must hold parts like {{\"type\": \"text\", \"text\": \"...\"}}, got {}",
                                         where, ShortDump(part)));
    }
    if (!first) text += '\n';
    first = false;
    text += piece->get_ref<const std::string&>();
  }
  return text;
}

Result<void> NormalizeToolCalls(Json& calls, const std::string& where) {
  if (!calls.is_array()) return Bad("messages", fmt::format("`{}` must be an array, got {}", where, ShortDump(calls)));
  for (Json& call : calls) {
    if (!call.is_object() || !call.contains("function") || !call["function"].is_object() ||
        !call["function"].contains("name") || !call["function"]["name"].is_string()) {
      return Bad("messages",
                 fmt::format("`{}` must hold objects with a function and its name, got {}", where, ShortDump(call)));
    }
    Json& function = call["function"];
    if (!function.contains("arguments") || function["arguments"].is_null()) {
      function["arguments"] = Json::object();
    } else if (function["arguments"].is_string()) {
      const std::string text = function["arguments"].get<std::string>();
      Result<Json> arguments = text.empty() ? Result<Json>(Json::object()) : ParseJsonObject(text);
      if (!arguments) {
        return Bad("messages", fmt::format("`{}` has function arguments that are not a JSON object: {}", where,
                                           ShortDump(Json(text))));
      }
      function["arguments"] = std::move(*arguments);
    } else if (!function["arguments"].is_object()) {
      return Bad("messages", fmt::format("`{}` has function arguments that are neither text nor an object", where));
    }
  }
  return {};
}

}  // namespace

Result<NormalizedMessages> NormalizeMessages(const Json& messages) {
  if (messages.empty()) return Bad("messages", "`messages` must not be empty");
  NormalizedMessages out;
  out.json = messages;
  for (size_t i = 0; i < out.json.size(); ++i) {
    Json& message = out.json[i];
    const std::string where = fmt::format("messages[{}]", i);
    if (!message.is_object())
      return Bad("messages", fmt::format("`{}` must be an object, got {}", where, ShortDump(message)));
    if (!message.contains("role") || !message["role"].is_string() ||
        message["role"].get_ref<const std::string&>().empty()) {
      return Bad("messages", fmt::format("`{}.role` must be a string", where));
    }
    const auto content = message.find("content");
    if (content == message.end() || content->is_null()) {
      message["content"] = "";
    } else if (content->is_array()) {
      Result<std::string> text = TextOfParts(*content, where + ".content");
      if (!text) return tl::make_unexpected(text.error());
      message["content"] = std::move(*text);
    } else if (!content->is_string()) {
      return Bad("messages",
                 fmt::format("`{}.content` must be a string or an array of parts, got {}", where, ShortDump(*content)));
    }
    if (const auto calls = message.find("tool_calls"); calls != message.end()) {
      if (calls->is_null()) {
        message.erase("tool_calls");
      } else if (const Result<void> valid = NormalizeToolCalls(*calls, where + ".tool_calls"); !valid) {
        return tl::make_unexpected(valid.error());
      }
    }
  }
  const Json& last = out.json.back();
  out.last_role = last["role"].get<std::string>();
  out.last_content = last["content"].get<std::string>();
  return out;
}

Result<void> CheckTools(const Json& tools) {
  if (tools.empty()) return Bad("tools", "`tools` must not be empty: leave it out instead");
  for (const Json& tool : tools) {
    if (!tool.is_object() || tool.value("type", Json("function")) != "function" || !tool.contains("function") ||
        !tool["function"].is_object() || !tool["function"].contains("name") || !tool["function"]["name"].is_string()) {
      return Bad("tools",
                 "`tools` must hold objects like {\"type\": \"function\", \"function\": {\"name\": \"...\"}}, got " +
                     ShortDump(tool));
    }
  }
  return {};
}

}  // namespace weft
