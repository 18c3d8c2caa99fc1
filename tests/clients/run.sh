#!/usr/bin/env bash
# Starts a server on a free port, runs the tests of the official OpenAI clients against it and stops it by SIGTERM, after
# which it has to exit with 0.
#   tests/clients/run.sh BINARY MODEL_PATH [flags of `BINARY serve`]
# Needs what scripts/ensure_clients installs; without it, exits with 77, which ctest counts as skipped.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
venv=$root/build/venv
node_root=$root/build/node
export PATH="$venv/bin:$PATH"

if (($# < 2)); then
  echo "usage: ${0##*/} BINARY MODEL_PATH [flags of serve]" >&2
  exit 2
fi
binary=$1 model=$2
shift 2

if ! "$venv/bin/python" -c 'import openai' 2>/dev/null || [[ ! -d $node_root/node_modules/openai ]]; then
  echo "the OpenAI clients are not installed: run scripts/ensure_clients" >&2
  exit 77
fi

work=$(mktemp -d)
log=$work/server.log
server=
: >"$log"
: >"$work/server.out"  # so that they are there to be looked at before the server has started
finish() {
  if [[ -n $server ]]; then kill -KILL "$server" 2>/dev/null || true; fi
  rm -rf "$work"
}
trap finish EXIT

export WEFT_TEST_MODEL=test-model WEFT_TEST_API_KEY=test-key
"$binary" serve "$model" --port 0 --served-model-name "$WEFT_TEST_MODEL" --api-key "$WEFT_TEST_API_KEY" "$@" \
  2>"$log" >"$work/server.out" &
server=$!

url=
for ((i = 0; i < 1200; ++i)); do
  if ! kill -0 "$server" 2>/dev/null; then
    echo "the server ended before it listened:" >&2
    cat "$log" "$work/server.out" >&2
    server=
    exit 1
  fi
  url=$(sed -nE 's|.*Listening on (http://[^ ]+).*|\1|p' "$log" "$work/server.out" | head -n 1)
  if [[ -n $url ]] && curl -sf -o /dev/null --max-time 5 "$url/health"; then break; fi
  url=
  sleep 0.1
done
if [[ -z $url ]]; then
  echo "the server was not healthy after 120 s:" >&2
  cat "$log" "$work/server.out" >&2
  exit 1
fi
export WEFT_TEST_URL=$url

status=0
"$venv/bin/python" -m unittest discover -s "$here" -p 'test_*.py' -v || status=1
# Modules are looked for beside the importing file, so the test runs from where they are.
cp "$here"/test_*.mjs "$node_root/"
(cd "$node_root" && node --test test_openai_client.mjs) || status=1

kill -TERM "$server"
code=0
wait "$server" || code=$?
server=
: >"$log"
: >"$work/server.out"  # so that they are there to be looked at before the server has started
if ((code != 0)); then
  echo "the server exited with $code after SIGTERM" >&2
  status=1
fi
if ((status != 0)); then tail -n 30 "$log" >&2; fi
exit "$status"
