#include "weft/cli/commands.h"

int main(int argc, char** argv) { return weft::cli::Main({argv + 1, argv + argc}); }
