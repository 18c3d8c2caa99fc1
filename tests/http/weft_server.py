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
    """with Server(binary, model, "--flag", ...) as server: server.post("/v1/completions", {...})

    `launcher` is what stands before the binary, mpirun and its options: process 0 serves then."""

    def __init__(self, binary, model, *flags, timeout_s=120, launcher=()):
        self.log = tempfile.NamedTemporaryFile("w+", prefix="weft-serve-", suffix=".log")
        self.launched = bool(launcher)
        self.process = subprocess.Popen([*launcher, binary, "serve", model, "--port", "0", *flags],
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
                self.pids = self.find_processes()
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

    def find_processes(self):
        """Process ids of weft, by its rank among mpirun's processes; without a launcher the only one."""
        if not self.launched:
            return {0: self.process.pid}
        found = {}
        for pid in descendants(self.process.pid):
            try:
                with open(f"/proc/{pid}/comm", encoding="ascii", errors="replace") as f:
                    if f.read().strip() != "weft":
                        continue
                with open(f"/proc/{pid}/environ", encoding="utf-8", errors="replace") as f:
                    rank = [v for v in f.read().split("\0") if v.startswith("OMPI_COMM_WORLD_RANK=")]
            except OSError:
                continue
            if rank:
                found[int(rank[0].split("=")[1])] = pid
        return found

    def alive(self):
        """Those of its processes that have not ended."""
        return [rank for rank, pid in self.pids.items() if is_running(pid)]

    def stop(self, expect_clean=True):
        if self.process.poll() is None:
            # mpirun would not be content with an end that is asked of itself; its processes may end as they like.
            try:
                os.kill(getattr(self, "pids", {}).get(0, self.process.pid), signal.SIGTERM)
            except ProcessLookupError:
                self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.terminate()
                time.sleep(3)
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


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as f:
            return f.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def descendants(pid):
    children = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", encoding="ascii", errors="replace") as f:
                    parent = int(f.read().rsplit(")", 1)[1].split()[1])
            except (OSError, ValueError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry))
    found, left = [], [pid]
    while left:
        one = left.pop()
        found.append(one)
        left += children.get(one, [])
    return found


def mpirun_launcher(mpirun, processes):
    """mpirun and its options, with reports of dead processes where it has them (ULFM: Open MPI 5)."""
    command = [mpirun, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(processes)]
    return [*command[:1], "--with-ft", "ulfm", *command[1:]] if has_ulfm(mpirun) else command


def has_ulfm(mpirun):
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=True).stdout
    return int(version.split("\n")[0].split()[-1].split(".")[0]) >= 5


def free_memory_flag():
    """A KV cache small enough for any test machine."""
    return ["--kv-cache-memory", str(256 << 20)]


def data(*parts):
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "data", *parts)
