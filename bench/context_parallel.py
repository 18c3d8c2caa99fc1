#!/usr/bin/env python3
"""What context parallelism gains and costs a user, through the server: time to first token against the prompt's length
for ranks that are threads, processes, and processes on two hosts; time per output token; KV tokens held; peak memory.

    context_parallel.py WEFT MODEL [--parts ttft,tpot,kv,memory] [--lengths 128,512,2048,8192] [--processes] [--hosts]
                        [--rate 1gbit] [--mpirun MPIRUN]

MODEL may be a folder of random weights (weft-make-checkpoint). Every rank has one thread. --hosts needs root: the two
hosts are network namespaces (scripts/two_hosts).
"""
import argparse
import http.client
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "tests", "http"))
from weft_server import descendants  # noqa: E402
COMMON = ["--skip-tokenizer-init", "--port", "0", "--threads-per-rank", "1", "--max-num-seqs", "16"]


class Server:
    """`weft serve` behind a launcher; its processes all run on this machine."""

    def __init__(self, launcher, weft, model, *flags, timeout_s=600):
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        self.process = subprocess.Popen([*launcher, weft, "serve", model, *COMMON, *flags], stdout=self.log,
                                        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + timeout_s
        while True:
            found = re.search(r"http://([0-9.]+):(\d+)", self.text())
            if found:
                break
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("weft serve did not come up:\n" + self.text())
            time.sleep(0.05)
        self.port = int(found.group(2))

    def text(self):
        with open(self.log.name, encoding="utf-8", errors="replace") as f:
            return f.read()

    def time_request(self, tokens, max_tokens):
        """(seconds to the first token, median seconds between tokens)"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=3000)
        body = json.dumps({"prompt": tokens, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
                           "stream": True, "return_token_ids": True})
        start = time.monotonic()
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        times = []
        for line in answer:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if event["choices"] and event["choices"][0].get("token_ids"):
                    times.append(time.monotonic())
        assert len(times) == max_tokens, (len(times), max_tokens)
        gaps = [b - a for a, b in zip(times, times[1:])]
        return times[0] - start, statistics.median(gaps) if gaps else 0.0

    def metrics(self):
        return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60).read().decode()

    def peak_bytes(self):
        """Of all processes of the server: the most that each has had in memory, added up."""
        total = 0
        for pid in descendants(self.process.pid):
            try:
                with open(f"/proc/{pid}/status", encoding="ascii") as f:
                    status = f.read()
            except OSError:
                continue
            if status.startswith("Name:\tweft"):
                total += int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024
        return total

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            self.process.wait()
        self.log.close()


def prompt(length, vocab):
    return [random.randrange(vocab) for _ in range(length)]


def table(head, rows):
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
    print()


def launchers(args):
    """name -> (launcher, flags) with two PCP ranks of one thread each; and one rank to compare with."""
    found = {"1 rank": ([], []), "PCP 2, threads": ([], ["-pcp", "2"])}
    mpi = [args.mpirun, "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    if args.processes:
        found["PCP 2, processes"] = (mpi, ["-pcp", "2"])
    if args.hosts:
        wire = ["--rate", args.rate] if args.rate else []
        found[" ".join(["PCP 2, two hosts", *wire[1:]])] = (
            [os.path.join(ROOT, "scripts", "two_hosts"), *wire, "--mpirun", args.mpirun], ["-pcp", "2"])
    return found


def by_turns(args, starts, lengths, vocab, max_tokens, repeats):
    """{(name, length): (TTFT, TPOT)}, medians, and {name: why it was refused}. The servers take turns, a round each: what
    the machine does to one, it does to all, as nearly as can be; and no idle one looks for messages beside another."""
    results, refused = {}, {}
    for turn in range(max(map(repeats, lengths))):
        for name, (launcher, flags) in starts.items():
            if name in refused:
                continue
            try:
                server = Server(launcher, args.weft, args.model, *flags)
            except RuntimeError as error:
                refused[name] = str(error).strip().splitlines()[-1][:90]
                continue
            with server:
                for n in (64, min(512, max(lengths))):  # memory is touched for the first time
                    server.time_request(prompt(n, vocab), 4)
                for n in lengths:
                    if turn < repeats(n):
                        results.setdefault((name, n), []).append(server.time_request(prompt(n, vocab), max_tokens))
    times = {key: tuple(statistics.median(r[i] for r in found) for i in range(2)) for key, found in results.items()}
    return times, refused


def kv_memory(model, tokens):
    """--kv-cache-memory for one request of so many tokens, with some room for whole blocks."""
    return ["--kv-cache-memory", str(kv_bytes(model) * (tokens + 4096))]


def measure_ttft(args, vocab):
    kinds = launchers(args)
    longest = max(args.lengths) + 64
    print("TTFT and TPOT (medians, by turns) and what PCP 2 gains")
    common = ["--max-model-len", str(longest), "--no-enable-prefix-caching", *kv_memory(args.model, longest)]
    times, _ = by_turns(args, {kind: (launcher, [*common, *flags]) for kind, (launcher, flags) in kinds.items()},
                        args.lengths, vocab, 16, lambda n: args.repeats or (3 if n <= 4096 else 1))
    rows = []
    for n in args.lengths:
        base = times["1 rank", n]
        row = [str(n)]
        for kind in kinds:
            ttft, tpot = times[kind, n]
            row.append(f"{ttft:.3f} s" + (f" ({base[0] / ttft:.2f}x)" if kind != "1 rank" else "") +
                       f", {1e3 * tpot:.1f} ms")
        rows.append(row)
    table(["tokens", *(f"{kind}: TTFT, TPOT" for kind in kinds)], rows)


def measure_tpot(args, vocab):
    """TP 2 is one KV head for two ranks only where the model has one KV head or latents: there DCP has what to split."""
    print("TPOT ms on the same cores, at two depths, and over that of the first layout of as many ranks")
    layouts = {"1 rank, 2 threads": ["--threads-per-rank", "2"], "PCP 2": ["-pcp", "2"], "TP 2": ["-tp", "2"],
               "TP 2, DCP 2": ["-tp", "2", "-dcp", "2"]}
    base_of = {"PCP 2": "1 rank, 2 threads", "TP 2, DCP 2": "TP 2"}
    depths = (512, 4096)
    # Without DCP both TP ranks have a copy of what one KV head or latent holds.
    common = ["--max-model-len", "4400", *kv_memory(args.model, 2 * 4400)]
    times, refused = by_turns(args, {name: ([], [*common, *flags]) for name, flags in layouts.items()}, depths, vocab, 48,
                              lambda _: args.repeats or 3)
    rows = []
    for name in layouts:
        row = [name]
        for n in depths:
            if name in refused:
                row.append(refused[name])
                continue
            tpot = times[name, n][1]
            base = base_of.get(name)
            over = f" ({100 * (tpot / times[base, n][1] - 1):+.0f} %)" if (base, n) in times else ""
            row.append(f"{1e3 * tpot:.1f}{over}")
        rows.append(row)
    table(["layout", *(str(n) for n in depths)], rows)


def measure_kv(args, _):
    print("KV tokens held in 1 GiB of cache")
    rows, base = [], None
    for degree in (1, 2, 4):
        flags = ["-tp", "4", "-dcp", str(degree), "--cp-kv-cache-interleave-size", "1"]
        try:
            with Server([], args.weft, args.model, "--kv-cache-memory", str(1 << 30), "--max-model-len", "1024",
                        *flags) as server:
                tokens = int(re.search(r"KV cache \(\w+\): (\d+) tokens", server.text()).group(1))
        except RuntimeError as error:
            rows.append([str(degree), str(error).strip().splitlines()[-1][:120], ""])
            continue
        base = base or tokens
        rows.append([str(degree), str(tokens), f"{tokens / base:.3f}"])
    table(["DCP (TP 4)", "tokens", "of DCP 1"], rows)


def measure_memory(args, vocab):
    print("Peak memory of the server's processes beyond weights and KV cache, GiB, while a prompt is computed")
    rows = []
    for kind, (launcher, flags) in launchers(args).items():
        row = [kind]
        for n in args.memory_lengths:
            with Server(launcher, args.weft, args.model, "--max-model-len", str(n + 64), "--kv-cache-memory",
                        str(args.memory_kv_bytes), *flags) as server:
                server.time_request(prompt(16, vocab), 1)
                before = server.peak_bytes()
                server.time_request(prompt(n, vocab), 1)
                grown = server.peak_bytes() - before
                held = kv_bytes(args.model) * n
                row.append(f"{(grown - held) / 2**30:.2f}")
        rows.append(row)
    table(["ranks", *(f"{n} tokens" for n in args.memory_lengths)], rows)


def kv_bytes(model):
    """Of a token, all layers, bf16."""
    with open(os.path.join(model, "config.json"), encoding="utf-8") as f:
        c = json.load(f)
    if "kv_lora_rank" in c:
        row = c["kv_lora_rank"] + c["qk_rope_head_dim"]
    else:
        row = 2 * c["num_key_value_heads"] * (c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"])
    return 2 * row * c["num_hidden_layers"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(n) for n in text.split(",")]
    parser.add_argument("weft")
    parser.add_argument("model")
    parser.add_argument("--parts", default="ttft,tpot,kv,memory")
    parser.add_argument("--lengths", type=numbers, default=[128, 512, 2048, 8192])
    parser.add_argument("--memory-lengths", type=numbers, default=[8192, 32768, 131072])
    parser.add_argument("--memory-kv-bytes", type=int, default=6 << 30)
    parser.add_argument("--processes", action="store_true", help="also two processes under mpirun")
    parser.add_argument("--hosts", action="store_true", help="also two hosts")
    parser.add_argument("--rate", help="of the wire between them, as tc has it: 1gbit")
    parser.add_argument("--repeats", type=int, default=0, help="0: more for short prompts")
    parser.add_argument("--mpirun", default=os.path.join(ROOT, "build", "venv", "bin", "mpirun"))
    args = parser.parse_args()
    os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
    os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    with open(os.path.join(args.model, "config.json"), encoding="utf-8") as f:
        vocab = json.load(f)["vocab_size"]
    random.seed(1)
    parts = {"ttft": measure_ttft, "tpot": measure_tpot, "kv": measure_kv, "memory": measure_memory}
    for part in args.parts.split(","):
        if part not in parts:
            sys.exit(f"--parts {part}: must be some of {', '.join(parts)}")
        parts[part](args, vocab)


if __name__ == "__main__":
    main()
