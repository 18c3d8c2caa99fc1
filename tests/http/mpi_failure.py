#!/usr/bin/env python3
"""Several processes end together. A killed process: /health is 503 within 5 s; a stuck one: within the step's time limit.
Requests in flight end with an error within 10 s of either, then all processes end, mpirun with a status that is not 0.
And the end asked of process 0, an orderly one, or of mpirun, a quick one, leaves nothing behind either.

    mpi_failure.py WEFT_BINARY MPIRUN [CASE...]
"""
import http.client
import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

from weft_server import Server, data, free_memory_flag, has_ulfm, mpirun_launcher

STEP_TIMEOUT = 2.0
KILLED_LIMIT = 5.0     # to /health 503
STUCK_LIMIT = STEP_TIMEOUT + 2 + KILLED_LIMIT  # an idle instance asks its processes every 2 s
REQUEST_LIMIT = 10.0   # to the end of a request in flight
END_LIMIT = 25.0       # to the end of all processes


class Stream:
    """A request that would go on for minutes, read by a thread. `end` is when it ended, `error` what it ended with."""

    def __init__(self, server):
        url = urllib.parse.urlparse(server.url)
        self.connection = http.client.HTTPConnection(url.hostname, url.port, timeout=120)
        self.connection.request("POST", "/v1/completions", json.dumps({
            "prompt": [5, 6, 7, 8] * 100, "max_tokens": 30000, "temperature": 0, "ignore_eos": True, "stream": True,
            "return_token_ids": True}), {"Content-Type": "application/json"})
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200, self.answer.status
        self.events = 0
        self.end = self.error = None
        self.done = False  # by [DONE], as if all were well
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()
        while self.events < 5:
            assert self.thread.is_alive(), "the stream ended at once"
            time.sleep(0.01)

    def read(self):
        try:
            for line in self.answer:
                if line.startswith(b"data: [DONE]"):
                    self.done = True
                elif line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        self.error = event["error"]
                    self.events += 1
        except (OSError, http.client.HTTPException, ValueError) as e:
            self.error = self.error or repr(e)
        self.end = time.monotonic()


def health(server):
    """Its status, or None where nobody answers any more."""
    try:
        return urllib.request.urlopen(server.url + "/health", timeout=2).status
    except urllib.error.HTTPError as e:
        return e.code
    except OSError:
        return None


def wait_until(done, limit, what, server):
    start = time.monotonic()
    while not done():
        assert time.monotonic() - start < limit, f"{what}: not within {limit} s\n{server.text()}"
        time.sleep(0.02)
    return time.monotonic() - start


def start(binary, mpirun, *flags, processes=2):
    return Server(binary, data("models", "qwen3"), "--skip-tokenizer-init", "--dtype", "float32", "--max-model-len",
                  "32768", "-pcp", "2", "--threads-per-rank", "1", "--step-timeout", str(STEP_TIMEOUT),
                  *free_memory_flag(), *flags, launcher=mpirun_launcher(mpirun, processes))


def all_ended(server):
    return not server.alive() and server.process.poll() is not None


def fails(binary, mpirun, name, hurt, limit, stream=True, told=True, flags=(), processes=2):
    """`hurt` harms the server. `told`: process 0 lives on for a while and says so."""
    with start(binary, mpirun, *flags, processes=processes) as server:
        running = Stream(server) if stream else None
        if not stream:
            time.sleep(1)
        begin = time.monotonic()
        hurt(server)
        seconds = []
        if told:
            seconds.append(("503", wait_until(lambda: health(server) == 503, limit, f"{name}: /health 503", server)))
            # And a new request gets an error, not a wait.
            status, answer = server.post("/v1/completions", {"prompt": [1, 2], "max_tokens": 2})
            assert status == 503, (status, answer)
        if running:
            wait_until(lambda: running.end is not None, REQUEST_LIMIT + 5, f"{name}: end of the request", server)
            seconds.append(("request", running.end - begin))
            assert running.end - begin < REQUEST_LIMIT, (name, running.end - begin)
            # An error event where there is somebody left to send it, else the connection breaks off.
            assert running.error or not (told or running.done), f"{name}: ended as if all were well\n{server.text()}"
        wait_until(lambda: all_ended(server), END_LIMIT, f"{name}: end of all processes", server)
        seconds.append(("all", time.monotonic() - begin))
        assert server.process.returncode != 0, f"{name}: exit status 0\n{server.text()}"
        print(f"{name}: " + ", ".join(f"{what} after {s:.1f} s" for what, s in seconds), flush=True)
        server.process.returncode = 0  # the way out of the block asks for it


def ends(binary, mpirun, name, ask, expect_zero):
    with start(binary, mpirun) as server:
        status, answer = server.post("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True})
        assert status == 200, answer
        ask(server)
        took = wait_until(lambda: all_ended(server), END_LIMIT, f"{name}: end of all processes", server)
        if expect_zero:
            assert "Stopped" in server.text(), f"{name}: no orderly end\n{server.text()}"
            assert server.process.returncode == 0, (name, server.process.returncode, server.text())
        print(f"{name}: all ended after {took:.1f} s, status {server.process.returncode}", flush=True)
        server.process.returncode = 0  # the way out of the block asks for it


def refuses(binary, mpirun):
    """What cannot start ends all processes, with one clear message."""
    import subprocess
    for flags, words in [
            (["-pcp", "3"], "processes"),
            (["--max-model-len", "99999999"], "--max-model-len"),
            (["--nnodes", "3", "-pcp", "2"], "--nnodes")]:
        out = subprocess.run([*mpirun_launcher(mpirun, 2), binary, "serve", data("models", "qwen3"),
                              "--skip-tokenizer-init", "--port", "0", *free_memory_flag(), *flags],
                             capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        text = out.stdout + out.stderr
        assert out.returncode != 0 and words in text, (flags, out.returncode, text)
    # Without mpirun vLLM's flags for several hosts are answered by mpirun's line, without them in it.
    out = subprocess.run([binary, "serve", data("models", "qwen3"), "--nnodes", "2", "--node-rank=1", "--master-addr",
                          "10.0.0.1", "--headless", "-pcp", "2"], capture_output=True, text=True, timeout=60)
    assert out.returncode == 1 and "mpirun --with-ft ulfm" in out.stderr, out
    line = out.stderr.splitlines()[1]
    assert line.split()[-3:] == [data("models", "qwen3"), "-pcp", "2"] and "--n" not in line and "10.0" not in line, line
    print("refusals: as they should be", flush=True)


def main():
    binary, mpirun = sys.argv[1:3]
    only = sys.argv[3:]
    # Without ULFM mpirun ends everybody as soon as one process dies.
    told = has_ulfm(mpirun)

    def send(rank, number):
        return lambda server: os.kill(server.pids[rank], number)

    cases = {
        "killed-streaming": lambda n: fails(binary, mpirun, n, send(1, signal.SIGKILL), KILLED_LIMIT, told=told),
        "killed-idle": lambda n: fails(binary, mpirun, n, send(1, signal.SIGKILL), KILLED_LIMIT, False, told),
        # Two ranks in each of four processes, the last of which dies; and one process a replica.
        "killed-of-four": lambda n: fails(binary, mpirun, n, send(3, signal.SIGKILL), KILLED_LIMIT, told=told,
                                          flags=["-tp", "2", "-dp", "2"], processes=4),
        "killed-replica": lambda n: fails(binary, mpirun, n, send(1, signal.SIGKILL), KILLED_LIMIT, told=told,
                                          flags=["-dp", "2"]),
        "stuck-streaming": lambda n: fails(binary, mpirun, n, send(1, signal.SIGSTOP), STUCK_LIMIT),
        "stuck-idle": lambda n: fails(binary, mpirun, n, send(1, signal.SIGSTOP), STUCK_LIMIT, False),
        "killed-first": lambda n: fails(binary, mpirun, n, send(0, signal.SIGKILL), KILLED_LIMIT, told=False),
        "mpirun-killed": lambda n: fails(binary, mpirun, n, lambda s: s.process.kill(), KILLED_LIMIT, told=False),
        "term-first": lambda n: ends(binary, mpirun, n, send(0, signal.SIGTERM), True),
        "term-mpirun": lambda n: ends(binary, mpirun, n, lambda s: s.process.terminate(), False),
        "refused": lambda n: refuses(binary, mpirun),
    }
    for name, case in cases.items():
        if not only or name in only:
            case(name)


main()
