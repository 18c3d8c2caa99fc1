#!/usr/bin/env bash
# The clients against a model of random weights in some shape, with another model's tokenizer: run.sh, which see.
#   tests/clients/run_random.sh WEFT WEFT_MAKE_CHECKPOINT CONFIG TOKENIZER [flags of `weft serve`]
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
weft=$1 make_checkpoint=$2 config=$3 tokenizer=$4
shift 4
model=$(mktemp -d)
trap 'rm -rf "$model"' EXIT
"$make_checkpoint" --config "$config" --out "$model/model" >/dev/null
"$here/run.sh" "$weft" "$model/model" --tokenizer "$tokenizer" --max-model-len 2048 "$@"
