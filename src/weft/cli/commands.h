#pragma once
// The commands of the `weft` program. Each declares its options, and runs with what was parsed into them.

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "weft/core/options.h"

namespace weft::cli {

inline constexpr const char kVersion[] = "0.1.0";

class Command {
 public:
  virtual ~Command() = default;
  virtual OptionSet& options() = 0;
  // The exit status. Throws weft::Error.
  virtual int Run() = 0;
};

std::unique_ptr<Command> MakeServe();
std::unique_ptr<Command> MakeGenerate();
std::unique_ptr<Command> MakeChat();
std::unique_ptr<Command> MakeInspect();
std::unique_ptr<Command> MakeInspectLayout();

struct NamedCommand {
  std::string name;  // of one word or two: "inspect layout"
  std::string about;
  std::unique_ptr<Command> (*make)();
};
const std::vector<NamedCommand>& Commands();

// docs/options.md.
std::string OptionsPage();

// The program: arguments without argv[0]. Errors go to stderr as one line; returns the exit status.
int Main(const std::vector<std::string>& args);

}  // namespace weft::cli
