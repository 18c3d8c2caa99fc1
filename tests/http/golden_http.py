#!/usr/bin/env python3
"""The reference checkpoints through the HTTP server: prompt_logprobs of the whole vocabulary are the log-softmax of the
reference logits, and greedy completions are the reference continuations, on one rank and split over several.

    golden_http.py WEFT_BINARY
    golden_http.py WEFT_BINARY --mpirun MPIRUN          ranks in two processes
    golden_http.py WEFT_BINARY --two-hosts SCRIPT MPIRUN    in two processes on two hosts; status 77 where they cannot be made
"""
import json
import math
import subprocess
import sys

from golden_files import read_safetensors
from weft_server import Server, data, free_memory_flag, mpirun_launcher

LAYOUTS = {
    "llama_llama3": [[], ["--prefill-context-parallel-size", "2", "--tensor-parallel-size", "2"]],
    "llama_tied": [["-pcp", "2", "-tp", "2", "-dcp", "2", "--cp-kv-cache-interleave-size", "8"]],
    "llama_bias": [["--tensor-parallel-size", "2"]],
    "qwen2_yarn": [["--prefill-context-parallel-size", "3"]],
    "qwen3": [["-tp", "4", "-dcp", "2", "-pcp", "2", "--max-num-batched-tokens", "100", "--max-num-seqs", "16"],
              ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "2200"]],
    # One latent for all heads: every TP rank has a copy of it, and DCP up to TP divides them.
    "deepseek_v2_lite": [["-tp", "2", "-dcp", "2", "-pcp", "2", "--max-num-batched-tokens", "50", "--max-num-seqs", "8"],
                         []],
    "deepseek_v2_full": [["--prefill-context-parallel-size", "3"]],
    "deepseek_v3": [["-tp", "4", "-dcp", "4"]],
    "qwen3_moe": [["-tp", "4", "-dcp", "2", "-pcp", "2"]],
}
# Over two processes.
MPI_LAYOUTS = {
    "llama_tied": [["-pcp", "2"], ["-tp", "2", "-dcp", "2"]],
    "deepseek_v2_lite": [["-pcp", "2"], ["-tp", "2", "-dcp", "2"]],
    "qwen3_moe": [["-pcp", "2", "-tp", "2", "--enable-expert-parallel"]],
}
MIXTURES = ("deepseek_v2_lite", "deepseek_v2_full", "deepseek_v3", "qwen3_moe")


def log_softmax(row):
    top = max(row)
    lse = top + math.log(sum(math.exp(x - top) for x in row))
    return [x - lse for x in row]


def relative(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b)) / sum(y * y for y in b))


def cached_prompt(server, tokens, expected):
    """A prompt that was computed before is found in the prefix cache, says so, and is answered alike."""
    hits = server.metric("vllm:prefix_cache_hits_total")
    status, answer = server.post("/v1/completions", {"prompt": tokens, "max_tokens": 4, "temperature": 0,
                                                     "ignore_eos": True, "return_token_ids": True})
    assert status == 200, answer
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    # All but the last token, which is always computed; the end of it by copies of at least two tokens (blocks of 16).
    assert len(tokens) - 3 <= cached <= len(tokens) - 1, (len(tokens), answer["usage"])
    assert server.metric("vllm:prefix_cache_hits_total") - hits == cached
    assert not expected or answer["choices"][0]["token_ids"] == expected[:4], (answer, expected)


def check(binary, model, dtype, flags, launcher=()):
    folder = data("models", model)
    expected = read_safetensors(folder + "/expected.safetensors")
    with open(folder + "/manifest.json", encoding="utf-8") as f:
        manifest = json.load(f)
    tolerance = manifest["tolerance"]
    errors, greedy, flipped = [], 0, 0
    # In bf16 a router that is close to a tie flips an expert now and then, and that token's logits are all others'.
    flips = dtype == "bfloat16" and model in MIXTURES
    with Server(binary, folder, "--skip-tokenizer-init", "--dtype", dtype, "--max-logprobs", "-1",
                "--max-model-len", "2200" if model == "qwen3" else "1000", "--block-size", "16", "--served-model-name",
                model, *free_memory_flag(), *flags, launcher=launcher) as server:
        for k, prompt in enumerate(manifest["prompts"]):
            if prompt["length"] > 600:
                continue  # a body of a hundred megabytes; the executor's own test has it
            tokens = list(expected[f"prompt_{k}.tokens"])
            positions = list(expected[f"prompt_{k}.positions"])
            logits = expected[f"prompt_{k}.logits" if dtype == "float32" else f"prompt_{k}.logits_bf16"]
            vocab = len(logits) // len(positions)
            want_greedy = list(expected[f"prompt_{k}.greedy"])
            margins = expected[f"prompt_{k}.greedy_margin"]
            status, answer = server.post("/v1/completions", {
                "model": model, "prompt": tokens, "max_tokens": len(want_greedy), "temperature": 0,
                "ignore_eos": True, "prompt_logprobs": -1, "return_token_ids": True})
            assert status == 200, answer
            choice = answer["choices"][0]
            entries = choice["prompt_logprobs"]
            assert len(entries) == len(tokens) and entries[0] is None
            for i, position in enumerate(positions):
                if position + 1 >= len(tokens):
                    continue  # the last position's logits show in the completion only
                entry = entries[position + 1]
                assert len(entry) == vocab, len(entry)
                got = [entry[str(t)]["logprob"] for t in range(vocab)]
                row = logits[i * vocab:(i + 1) * vocab]
                want = log_softmax(row)
                # Relative to the norm of the logits, as the tolerances are: the softmax only takes off a constant.
                shift = sum(g - w for g, w in zip(got, want)) / vocab
                errors.append(math.sqrt(sum((g - w - shift) ** 2 for g, w in zip(got, want)) / sum(x * x for x in row)))
                # The row's own token is there with its rank.
                chosen = entry[str(tokens[position + 1])]
                assert chosen["rank"] == 1 + sum(g > chosen["logprob"] for g in got), chosen
            assert choice["token_ids"][:0] == [] and len(choice["token_ids"]) == len(want_greedy)
            for got_token, want_token, margin in zip(choice["token_ids"], want_greedy, margins):
                if margin < (2e-3 if dtype == "float32" else 0.4):
                    break
                greedy += 1
                if flips and got_token != want_token:
                    flipped += 1
                    break  # the texts part here
                assert got_token == want_token, (model, k, choice["token_ids"], want_greedy)
            usage = answer["usage"]
            assert usage["prompt_tokens"] == len(tokens) and usage["completion_tokens"] == len(want_greedy), usage
        cached_prompt(server, tokens, dtype == "float32" and choice["token_ids"])
    errors.sort()
    median, worst = errors[len(errors) // 2], errors[-1]
    print(f"{model} {dtype} {' '.join(flags)}: {len(errors)} positions, median {median:.1e}, worst {worst:.1e}, "
          f"{greedy} greedy tokens equal", flush=True)
    assert len(errors) > 30 and greedy > (60 if dtype == "float32" else 1 if flips else 5)
    if dtype == "float32":
        assert worst <= tolerance["f32"], worst
    else:
        assert median <= tolerance["bf16_median"] and (flips or worst <= tolerance["bf16_max"]), (median, worst)
        assert flipped * 4 <= greedy, (flipped, greedy)


def main():
    binary = sys.argv[1]
    if sys.argv[2:3] == ["--mpirun"]:
        for model, layouts in MPI_LAYOUTS.items():
            for flags in layouts:
                check(binary, model, "float32", flags, mpirun_launcher(sys.argv[3], 2))
        return
    if sys.argv[2:3] == ["--two-hosts"]:
        launcher = [sys.argv[3], "--mpirun", sys.argv[4]]
        hosts = subprocess.run([*launcher, "--here", "mpirun", "-n", "2", "hostname"], stdout=subprocess.PIPE, text=True,
                               timeout=60)
        if hosts.returncode == 77:
            sys.exit(77)  # it has said why
        assert hosts.returncode == 0 and len(set(hosts.stdout.split())) == 2, hosts
        check(binary, "llama_tied", "float32", ["-pcp", "2"], launcher)
        check(binary, "deepseek_v2_lite", "float32", ["-tp", "2", "-dcp", "2"], launcher)
        return
    for model, layouts in LAYOUTS.items():
        for flags in layouts:
            check(binary, model, "float32", flags)
        check(binary, model, "bfloat16", layouts[0])
    # Without a tokenizer, text is refused by name.
    with Server(binary, data("models", "qwen3"), "--skip-tokenizer-init", *free_memory_flag()) as server:
        status, answer = server.post("/v1/completions", {"prompt": "text"})
        assert status == 400 and answer["error"]["param"] == "prompt", (status, answer)


main()
