#!/usr/bin/env python3
"""Asks a running `weft serve` one question about a long text, over the OpenAI API, and prints the answer as it streams.

The answer's token ids go to --save; with --expect they have to be those of an earlier --save (exit status 3 if not).
Needs nothing but Python's standard library.
"""

import argparse
import http.client
import json
import pathlib
import sys
import time


class Failure(Exception):
    pass


def stream_events(response):
    """The JSON objects of an SSE stream, up to its `[DONE]`; Failure if it ends earlier."""
    data = []
    for raw in response:
        line = raw.decode("utf-8").rstrip("\r\n")
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif line == "" and data:
            event = "\n".join(data)
            data = []
            if event == "[DONE]":
                return
            yield json.loads(event)
    raise Failure("the stream ended without [DONE]")


def ask(host, port, prompt, max_tokens, timeout_s, show):
    """Sends one greedy chat request; returns what was measured and said."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    connection.request("GET", "/v1/models")
    response = connection.getresponse()
    models = json.loads(response.read())
    if response.status != 200:
        raise Failure(f"/v1/models answered {response.status}: {models}")
    body = {
        "model": models["data"][0]["id"],
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    start = time.monotonic()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise Failure(f"/v1/chat/completions answered {response.status}: {response.read().decode('utf-8', 'replace')}")
    first = last = None
    token_ids, text, finish_reason, usage = [], [], None, None
    for event in stream_events(response):
        if "error" in event:
            raise Failure(f"the stream broke off: {event['error']}")
        usage = event.get("usage") or usage
        for choice in event.get("choices", []):
            ids = choice.get("token_ids") or []
            piece = choice.get("delta", {}).get("content") or ""
            if ids or piece:
                last = time.monotonic()
                first = first or last
            token_ids += ids
            text.append(piece)
            finish_reason = choice.get("finish_reason") or finish_reason
            if show and piece:
                print(piece, end="", flush=True)
    if show:
        print()
    if usage is None:
        raise Failure("the stream ended without usage")
    if finish_reason not in ("stop", "length"):
        raise Failure(f"the answer ended with finish_reason {finish_reason}")
    if len(token_ids) != usage["completion_tokens"] or not token_ids:
        raise Failure(f"{len(token_ids)} token ids came, usage counts {usage['completion_tokens']}")
    return {
        "prompt_tokens": usage["prompt_tokens"],
        "token_ids": token_ids,
        "text": "".join(text),
        "finish_reason": finish_reason,
        "ttft_s": first - start,
        "decode_tokens_per_s": (len(token_ids) - 1) / (last - first) if last > first else None,
    }


def compare(answer, expected):
    for field in ("prompt_tokens", "token_ids", "text", "finish_reason"):
        if answer[field] == expected[field]:
            continue
        if field == "token_ids":
            pairs = enumerate(zip(answer[field], expected[field]))
            at = next((i for i, (a, b) in pairs if a != b), min(len(answer[field]), len(expected[field])))
            return f"the answers differ from token {at} on: {answer[field][at:at+5]} here, {expected[field][at:at+5]} before"
        return f"{field} is {answer[field]!r}, and was {expected[field]!r}"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--text", required=True, help="file with the long text")
    parser.add_argument("--question", required=True)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--timeout", type=float, default=600, help="longest wait for the next bytes, in seconds")
    parser.add_argument("--save", help="file for the answer, as JSON")
    parser.add_argument("--expect", help="file of --save that the answer has to equal, token for token")
    args = parser.parse_args()

    prompt = pathlib.Path(args.text).read_text(encoding="utf-8") + "\n\n" + args.question
    expected = json.loads(pathlib.Path(args.expect).read_text()) if args.expect else None
    try:
        answer = ask(args.host, args.port, prompt, args.max_tokens, args.timeout, show=expected is None)
    except (OSError, http.client.HTTPException, ValueError, KeyError, Failure) as error:
        print(f"\ndemo: the request failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if args.save:
        pathlib.Path(args.save).write_text(json.dumps(answer))
    rate = answer["decode_tokens_per_s"]
    print(
        f"[{answer['prompt_tokens']} prompt tokens, {len(answer['token_ids'])} answered; TTFT {answer['ttft_s']:.2f} s = "
        f"{answer['prompt_tokens'] / answer['ttft_s']:.0f} prompt tokens/s; "
        f"then {f'{rate:.1f} tokens/s' if rate else 'no more tokens'}]"
    )
    if expected is not None:
        difference = compare(answer, expected)
        if difference:
            print(f"demo: {difference}", file=sys.stderr)
            return 3
        print(f"TTFT ratio: {answer['ttft_s'] / expected['ttft_s']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
