"""Starts `weft serve` for a test and stops it. Standard library only."""
import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request


class Server:
    """with Server(binary, model, "--flag", ...) as server: server.post("/v1/completions", {...})"""

    def __init__(self, binary, model, *flags, timeout_s=120):
        self.log = tempfile.NamedTemporaryFile("w+", prefix="weft-serve-", suffix=".log")
        self.process = subprocess.Popen([binary, "serve", model, "--port", "0", *flags],
                                        stdout=self.log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        self.url = None
        deadline = time.monotonic() + timeout_s
        while self.url is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop(expect_clean=False)
                raise RuntimeError("weft serve did not come up:\n" + self.text())
            for word in self.text().split():
                if word.startswith("http://"):
                    self.url = word.rstrip(".,/")
            time.sleep(0.02)
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(self.url + "/health", timeout=5).read()
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
        raise RuntimeError("no /health:\n" + self.text())

    def text(self):
        with open(self.log.name, encoding="utf-8", errors="replace") as f:
            return f.read()

    def get(self, path, timeout_s=60):
        return urllib.request.urlopen(self.url + path, timeout=timeout_s).read().decode()

    def post(self, path, body, timeout_s=300):
        """(status, parsed answer)"""
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def metric(self, name):
        """Sum over the labels of a Prometheus metric."""
        return sum(float(line.rsplit(" ", 1)[1]) for line in self.get("/metrics").splitlines()
                   if line.startswith(name + "{") or line.startswith(name + " "))

    def stop(self, expect_clean=True):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise RuntimeError("SIGTERM did not end the server:\n" + self.text())
        if expect_clean and self.process.returncode != 0:
            raise RuntimeError(f"exit status {self.process.returncode}:\n" + self.text())

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        self.stop(expect_clean=kind is None)
        self.log.close()


def free_memory_flag():
    """A KV cache small enough for any test machine."""
    return ["--kv-cache-memory", str(256 << 20)]


def data(*parts):
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "data", *parts)
