"""The `weft` program from outside: generate and serve on tiny models, against the reference's greedy tokens.

usage: program_test.py WEFT MODELS
"""
import http.client
import json
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
import threading
import time

WEFT, MODELS = sys.argv[1], pathlib.Path(sys.argv[2])
# Seconds until something counts as hung; sanitizers are slow.
PATIENCE = 120


def read_safetensors(path):
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    formats = {"I64": "q", "F32": "f"}
    out = {}
    for name, info in header.items():
        if name == "__metadata__" or info["dtype"] not in formats:
            continue
        begin, end = info["data_offsets"]
        code = formats[info["dtype"]]
        values = data[8 + size + begin : 8 + size + end]
        out[name] = list(struct.unpack(f"<{len(values) // struct.calcsize(code)}{code}", values))
    return out


def check(condition, message):
    if not condition:
        sys.exit(f"FAILED: {message}")


def weft(*args, stdin="", status=0):
    done = subprocess.run([WEFT, *map(str, args)], input=stdin, capture_output=True, text=True, timeout=PATIENCE)
    check(done.returncode == status, f"weft {args}: status {done.returncode}, not {status}\n{done.stderr}")
    return done


def comparable(margins):
    """How many greedy tokens can be compared: up to the first near tie."""
    for i, margin in enumerate(margins):
        if margin < 1e-3:
            return i
    return len(margins)


def test_generate(name, layout):
    model = MODELS / name
    expected = read_safetensors(model / "expected.safetensors")
    prompts = sorted({key.split(".")[0] for key in expected if key.endswith(".greedy")})
    prompts = [p for p in prompts if len(expected[p + ".tokens"]) <= 200]
    ids = [",".join(map(str, expected[p + ".tokens"])) for p in prompts]
    done = weft("generate", model, "--skip-tokenizer-init", "--dtype", "float32", "--temperature", 0, "--ignore-eos",
                "--max-tokens", 24, "--json", "--prompt-token-ids", *ids, *layout)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    check(len(lines) == len(prompts) > 0, f"{len(lines)} answers to {len(prompts)} prompts")
    compared = 0
    for prompt, line in zip(prompts, lines):
        count = comparable(expected[prompt + ".greedy_margin"])
        check(line["token_ids"][:count] == expected[prompt + ".greedy"][:count],
              f"{name} {layout} {prompt}: {line['token_ids']} instead of {expected[prompt + '.greedy']}")
        check(line["finish_reason"] == "length" and line["completion_tokens"] == 24, f"{line}")
        compared += count
    check(compared >= 24, f"{name}: only {compared} tokens could be compared")


class Server:
    def __init__(self, model, *flags):
        self.process = subprocess.Popen([WEFT, "serve", str(model), "--port", "0", *map(str, flags)],
                                        stderr=subprocess.PIPE, text=True)
        self.log = ""
        self.ready = threading.Event()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        check(self.ready.wait(PATIENCE), f"the server did not start\n{self.log}")
        found = re.search(r"Listening on http://127\.0\.0\.1:(\d+)", self.log)
        check(found, f"no port in the log\n{self.log}")
        self.port = int(found.group(1))

    def read(self):
        for line in self.process.stderr:
            self.log += line
            if "Listening on" in line:
                self.ready.set()
        self.ready.set()

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def post(self, path, body):
        connection = self.connect()
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def end(self):
        status = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return status


def test_serve():
    model = MODELS / "llama_tied"
    expected = read_safetensors(model / "expected.safetensors")
    server = Server(model, "--skip-tokenizer-init", "--dtype", "float32", "--prefill-context-parallel-size", 2)
    try:
        prompt = "prompt_2"
        body = {"prompt": expected[prompt + ".tokens"], "max_tokens": 24, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True}
        status, answer = server.post("/v1/completions", body)
        check(status == 200, f"{status}: {answer}")
        count = comparable(expected[prompt + ".greedy_margin"])
        check(answer["choices"][0]["token_ids"][:count] == expected[prompt + ".greedy"][:count], f"{answer}")
        check(answer["model"] == str(model), f"{answer}")
        status, answer = server.post("/v1/completions", {"prompt": [1] * 5000, "max_tokens": 1})
        check(status == 400 and "4096" in answer["error"]["message"], f"{status}: {answer}")
        for needle in ("TP 1 PCP 2 DCP 1", "kernels ", "KV cache (float32)"):
            check(needle in server.log, f"'{needle}' is not in the log\n{server.log}")

        # SIGTERM lets a running request end: its whole stream arrives.
        connection = server.connect()
        body = {"prompt": [1, 2, 3], "max_tokens": 300, "temperature": 0, "ignore_eos": True, "stream": True,
                "return_token_ids": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.readline().decode()
        server.process.send_signal(signal.SIGTERM)
        text += response.read().decode()
        tokens = 0
        for line in text.splitlines():
            if line.startswith("data: {"):
                tokens += len(json.loads(line[6:])["choices"][0].get("token_ids") or [])
        check(tokens == 300 and "data: [DONE]" in text, f"{tokens} tokens came during the drain\n{text[-500:]}")
        check(server.end() == 0, f"status {server.process.returncode} after SIGTERM\n{server.log}")
    finally:
        server.process.kill()


def test_second_signal():
    server = Server(MODELS / "llama_tied", "--skip-tokenizer-init", "--shutdown-timeout", 600, "--kernels", "ref")
    try:
        connection = server.connect()
        body = {"prompt": [1, 2, 3], "max_tokens": 4000, "ignore_eos": True, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        connection.getresponse().readline()
        server.process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + PATIENCE
        while "stopping" not in server.log.lower() and time.monotonic() < deadline:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGINT)
        check(server.end() in (0, -signal.SIGINT), f"status {server.process.returncode}\n{server.log}")
    finally:
        server.process.kill()


def test_errors():
    model = MODELS / "llama_tied"
    for args, needle in [
        (("serve", model, "--skip-tokenizer-init", "-tp", 3), "--tensor-parallel-size = 3"),
        (("serve", model, "--skip-tokenizer-init", "-dp", 2, "-ep"), "--enable-expert-parallel: must not be set"),
        (("serve", model, "--skip-tokenizer-init", "-dp", 1024, "-pcp", 65), "--data-parallel-size = 1024"),
        (("serve", model, "--skip-tokenizer-init", "-dp", 0), "-dp = 0"),
        # There is room for one longest request, but not for one on each replica.
        (("serve", model, "--skip-tokenizer-init", "-dp", 3, "--kv-cache-memory", 900000), "--data-parallel-size = 3"),
        (("serve", model, "--skip-tokenizer-init", "--max-model-len", 5000), "--max-model-len = 5000"),
        (("serve", model, "--skip-tokenizer-init", "--num-gpu-blocks-override", 1), "--num-gpu-blocks-override = 1"),
        (("serve", model, "--skip-tokenizer-init", "--no-enable-chunked-prefill", "--max-num-batched-tokens", 512),
         "--max-num-batched-tokens = 512"),
        (("serve", model), "tokenizer"),
        (("generate", model, "--prompt", "x", "--prompt-token-ids", "1"), "exclude"),
        (("generate", model, "--skip-tokenizer-init", "--prompt-token-ids", "1,x"), "--prompt-token-ids"),
        (("generate", model, "--skip-tokenizer-init", "--prompt-token-ids", "1,512"), "512"),
        # One of two prompts is wrong: the other one is running when the program ends.
        (("generate", model, "--skip-tokenizer-init", "--max-tokens", 4000, "--prompt-token-ids", "1,2", "-1"), "-1"),
        (("chat", model), "tokenizer"),
    ]:
        done = weft(*args, status=1)
        lines = done.stderr.splitlines()
        check(lines and lines[-1].startswith("weft: error: ") and needle in lines[-1], f"{args}: {done.stderr}")
        check(sum("error" in line for line in lines) == 1, f"{args}: more than one line\n{done.stderr}")


def test_inspect():
    done = weft("inspect", MODELS / "llama_tied", "--tensors")
    check("224736" in done.stdout and "model.layers.1.mlp.down_proj.weight" in done.stdout, done.stdout)


def test_version():
    check(re.fullmatch(r"weft \d+\.\d+\.\d+\n", weft("--version").stdout), "--version")


if __name__ == "__main__":
    os.environ.pop("HF_HOME", None)
    test_version()
    test_inspect()
    test_errors()
    test_generate("llama_tied", ())
    test_generate("llama_tied", ("-pcp", 2, "--threads-per-rank", 1, "--max-num-batched-tokens", 16, "--max-num-seqs", 4))
    test_generate("qwen3", ("-tp", 2, "--threads-per-rank", 1))
    test_generate("qwen3", ("-dp", 3, "--threads-per-rank", 1))
    test_generate("qwen3_moe", ("-dp", 2, "--enable-expert-parallel", "-pcp", 2, "--threads-per-rank", 1))
    test_serve()
    test_second_signal()
    print("all passed")
