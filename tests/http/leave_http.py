#!/usr/bin/env python3
"""A client that leaves in mid-stream frees its request: nothing runs and no KV block is in use soon after, and another
request goes on undisturbed.

    leave_http.py WEFT_BINARY
"""
import http.client
import json
import sys
import threading
import time
import urllib.parse

from weft_server import Server, data, free_memory_flag


def open_stream(server, tokens):
    url = urllib.parse.urlparse(server.url)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps({
        "prompt": [5, 6, 7, 8], "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}),
        {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.status
    for _ in range(3):
        assert answer.readline()
    return connection


def wait_for(what, value, server, seconds=5):
    end = time.monotonic() + seconds
    while server.metric(what) != value:
        assert time.monotonic() < end, (what, server.metric(what), value)
        time.sleep(0.02)


def main():
    with Server(sys.argv[1], data("models", "qwen3"), "--skip-tokenizer-init", "--dtype", "float32", "--max-model-len", "32768",
                "-pcp", "2",
                *free_memory_flag()) as server:
        long_one = {}
        body = {"prompt": [1, 2, 3], "max_tokens": 400, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        thread = threading.Thread(target=lambda: long_one.update(answer=server.post("/v1/completions", body)))
        thread.start()
        leavers = [open_stream(server, 30000) for _ in range(4)]
        for connection in leavers:
            connection.close()
        thread.join()
        status, answer = long_one["answer"]
        assert status == 200 and len(answer["choices"][0]["token_ids"]) == 400, answer
        wait_for("vllm:num_requests_running", 0, server)
        wait_for("vllm:kv_cache_usage_perc", 0, server)
        # The same request alone gives the same tokens.
        assert server.post("/v1/completions", body)[1]["choices"][0]["token_ids"] == answer["choices"][0]["token_ids"]


main()
