#include "weft/cli/commands.h"

#include <algorithm>
#include <cstdio>
#include <iostream>

#include "weft/cli/multi_process.h"
#include "weft/core/error.h"
#include "weft/core/log.h"

namespace weft::cli {

const std::vector<NamedCommand>& Commands() {
  static const std::vector<NamedCommand> commands = {
      {"serve", "Serve a model over HTTP with OpenAI's API", MakeServe},
      {"generate", "Complete prompts and print the result", MakeGenerate},
      {"chat", "Talk to a model in the terminal", MakeChat},
      {"inspect", "Show what a model's files hold", MakeInspect},
      {"inspect layout", "Show which rank holds and computes which tokens of a prompt", MakeInspectLayout},
  };
  return commands;
}

std::string OptionsPage() {
  std::string page =
      "# Options of the commands\n\n"
      "Written by `weft --help-markdown`; do not edit by hand.\n\n"
      "Every option may be spelt with `-` or `_`, as `--name value` or `--name=value`; booleans as `--name` and\n"
      "`--no-name`. Options with a JSON value also take one member at a time: `--hf-overrides.rope_theta 10000`,\n"
      "`--hf-overrides.list+ 1` appends. `--config FILE` reads options from a YAML file, as `name: value`; the "
      "command\n"
      "line wins. Whole numbers marked so in the help may end in k, m, g, t (powers of 1000) or K, M, G, T (of 1024).\n"
      "What is refused is never ignored: the program ends with an error that names the option, its value and the "
      "rule.\n";
  for (const NamedCommand& command : Commands()) {
    page += '\n';
    page += command.make()->options().Markdown();
  }
  return page;
}

namespace {

std::string Usage() {
  std::string text = "Usage: weft COMMAND ...\n\nCommands:\n";
  for (const NamedCommand& command : Commands()) text += fmt::format("  {:16}{}\n", command.name, command.about);
  return text + "\n  weft COMMAND --help      the options of a command\n  weft --version\n";
}

int Dispatch(const std::vector<std::string>& args) {
  if (args.empty()) {
    std::cerr << Usage();
    return 2;
  }
  if (args[0] == "--version" || args[0] == "-V" || args[0] == "version") {
    std::cout << "weft " << kVersion << "\n";
    return 0;
  }
  if (args[0] == "--help" || args[0] == "-h" || args[0] == "help") {
    std::cout << Usage();
    return 0;
  }
  if (args[0] == "--help-markdown") {
    std::cout << OptionsPage();
    return 0;
  }
  // A name of two words goes before the argument of the one-word command.
  const std::string two = args.size() > 1 ? args[0] + " " + args[1] : "";
  const auto& commands = Commands();
  auto named = std::ranges::find(commands, two, &NamedCommand::name);
  const ptrdiff_t words = named == commands.end() ? 1 : 2;
  if (words == 1) named = std::ranges::find(commands, args[0], &NamedCommand::name);
  if (named != commands.end()) {
    const std::unique_ptr<Command> command = named->make();
    switch (command->options().Parse({args.begin() + words, args.end()})) {
      case OptionSet::Action::kHelp:
        std::cout << command->options().Help();
        return 0;
      case OptionSet::Action::kHelpMarkdown:
        std::cout << command->options().Markdown();
        return 0;
      case OptionSet::Action::kRun:
        return command->Run();
    }
  }
  std::vector<std::string> names;
  for (const NamedCommand& command : Commands()) names.emplace_back(command.name);
  Throw("unknown command '{}'; there are {}", args[0], fmt::join(names, ", "));
}

}  // namespace

int Main(const std::vector<std::string>& args) {
  try {
    const int status = Dispatch(args);
    std::cout.flush();
    return FinishProcesses(status);
  } catch (const std::exception& e) {
    std::cout.flush();
    const int process = LaunchedProcessIndex();
    const std::string which = process > 0 ? fmt::format(" [process {}]", process) : "";
    std::fprintf(stderr, "weft%s: error: %s\n", which.c_str(), e.what());
    return FinishProcesses(1, e.what());
  }
}

}  // namespace weft::cli
