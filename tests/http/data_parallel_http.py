#!/usr/bin/env python3
"""Replicas behind one server (--data-parallel-size): concurrent requests get the reference's greedy continuations, with
and without expert parallelism, and all replicas have their share of them.

    data_parallel_http.py WEFT_BINARY
    data_parallel_http.py WEFT_BINARY --mpirun MPIRUN   ranks in two processes
"""
import json
import re
import sys
import threading
import urllib.request

from golden_files import read_safetensors
from weft_server import Server, data, free_memory_flag, mpirun_launcher

ROUNDS = 3


class Reference:
    def __init__(self, model):
        folder = data("models", model)
        expected = read_safetensors(folder + "/expected.safetensors")
        with open(folder + "/manifest.json", encoding="utf-8") as f:
            prompts = json.load(f)["prompts"]
        self.cases = []
        for k, prompt in enumerate(prompts):
            if prompt["length"] > 600:
                continue
            greedy = list(expected[f"prompt_{k}.greedy"])
            # Up to the first token that a rounding decides.
            sure = next((i for i, m in enumerate(expected[f"prompt_{k}.greedy_margin"]) if m < 2e-3), len(greedy))
            self.cases.append((list(expected[f"prompt_{k}.tokens"]), greedy, sure))


def by_engine(server, name):
    """Sums over a metric's lines of each replica."""
    found = {}
    for line in server.get("/metrics").splitlines():
        if line.startswith(name + "{"):
            engine = int(re.search(r'engine="(\d+)"', line).group(1))
            found[engine] = found.get(engine, 0) + float(line.rsplit(" ", 1)[1])
    return found


def complete(server, tokens, greedy, stream):
    body = {"prompt": tokens, "max_tokens": len(greedy), "temperature": 0, "ignore_eos": True, "return_token_ids": True,
            "stream": stream}
    if not stream:
        status, answer = server.post("/v1/completions", body)
        assert status == 200, answer
        return answer["choices"][0]["token_ids"]
    request = urllib.request.Request(server.url + "/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    got = []
    with urllib.request.urlopen(request, timeout=300) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            for choice in json.loads(line[len("data: "):])["choices"]:
                got += choice.get("token_ids") or []
    return got


def check_expert_load(server, model):
    with open(data("models", model, "config.json"), encoding="utf-8") as f:
        config = json.load(f)
    experts = config.get("num_experts", config.get("n_routed_experts"))
    load = by_engine(server, "weft:expert_tokens_total")
    if experts is None:
        assert not load, load
        return
    dense = config.get("first_k_dense_replace", 0) + len(config.get("mlp_only_layers", []))
    layers = config["num_hidden_layers"] - dense
    # Each token of prompts and outputs but an output's last one, less what the prefix caches had.
    computed = (server.metric("vllm:prompt_tokens_total") - server.metric("vllm:prefix_cache_hits_total") +
                server.metric("vllm:generation_tokens_total") - server.metric("vllm:request_success_total"))
    assert sum(load.values()) == computed * layers * config["num_experts_per_tok"], (load, computed)
    assert len([line for line in server.get("/metrics").splitlines() if line.startswith("weft:expert_tokens_total{")]) \
        == experts * len(load)
    assert min(load.values()) > 0, load


def check(binary, model, replicas, *flags, launcher=()):
    reference = Reference(model)
    failures, compared = [], [0]

    def client(server, index):
        try:
            # Every client begins with another prompt.
            for i in range(len(reference.cases)):
                tokens, greedy, sure = reference.cases[(i + index) % len(reference.cases)]
                got = complete(server, tokens, greedy, stream=i % 2 == 1)
                assert got[:sure] == greedy[:sure] and len(got) == len(greedy), (len(tokens), got, greedy)
                compared[0] += sure
        except Exception as error:  # a thread's own would only be printed
            failures.append(f"client {index}: {error!r}")

    with Server(binary, data("models", model), "--skip-tokenizer-init", "--dtype", "float32", "--max-model-len", "1000",
                "--block-size", "16", "-dp", str(replicas), "--threads-per-rank", "1", *flags,
                *free_memory_flag(), launcher=launcher) as server:
        # One alone: the other replicas have nothing to do.
        tokens, greedy, sure = reference.cases[0]
        assert complete(server, tokens, greedy, False)[:sure] == greedy[:sure]
        clients = [threading.Thread(target=client, args=(server, i)) for i in range(2 * replicas + 1)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        assert not failures, (failures, server.text())
        done = by_engine(server, "vllm:request_success_total")
        assert len(done) == replicas and sum(done.values()) == len(clients) * len(reference.cases) + 1, done
        assert all(count > 0 for count in done.values()), done
        check_expert_load(server, model)
    assert compared[0] > 200, compared
    print(f"{model} -dp {replicas} {' '.join(flags)}{' in two processes' if launcher else ''}: {compared[0]} tokens equal, requests {done}", flush=True)


def main():
    binary = sys.argv[1]
    if sys.argv[2:3] == ["--mpirun"]:
        launcher = mpirun_launcher(sys.argv[3], 2)
        check(binary, "qwen3_moe", 2, "--enable-expert-parallel", launcher=launcher)
        check(binary, "deepseek_v2_lite", 3, "--enable-expert-parallel", "-pcp", "2", launcher=launcher)
        check(binary, "qwen3", 2, launcher=launcher)
        return
    check(binary, "qwen3_moe", 2, "--enable-expert-parallel")
    check(binary, "qwen3_moe", 3, "-pcp", "2")
    check(binary, "deepseek_v2_lite", 2, "--enable-expert-parallel", "-tp", "2", "-dcp", "2", "-pcp", "2")
    check(binary, "qwen3", 2, "--max-num-batched-tokens", "64", "--max-num-seqs", "4")


main()
