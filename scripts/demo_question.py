"""Starts `disagg up`, asks it a question through the OpenAI endpoint and shows where the answer came from. Run by scripts/demo."""

from __future__ import annotations

import argparse
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

QUESTION = "Tell a story about a fox and a lantern."
READY_LIMIT_S = 60.0
COUNTER_LIMIT_S = 5.0


def main() -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description="The whole system on this machine, and one question to it.")
    parser.add_argument("--once", action="store_true", help="exit after the answer")
    parser.add_argument("--question", default=QUESTION, help=f"what to ask (default: {QUESTION})")
    arguments = parser.parse_args()
    public, admin = free_port(8000), free_port(8001)
    command = [sys.executable, "-m", "disagg", "up", "--http", f"127.0.0.1:{public}", "--admin", f"127.0.0.1:{admin}"]
    cluster = subprocess.Popen([*command, "--log-level", "warning"])
    try:
        wait_ready(cluster, public)
        ask(arguments.question, public, admin)
        print(curl_line(arguments.question, public), flush=True)
        if not arguments.once:
            print("\nThe cluster stays up; ctrl-C stops it.", flush=True)
            return cluster.wait()
    except KeyboardInterrupt:
        pass  # the cluster got the same ctrl-C and is stopping
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    finally:
        stop(cluster)
    return 0


class DemoError(Exception):
    """The demo cannot go on; the sentence says why."""


def free_port(preferred: int) -> int:
    """The preferred port, or any other if somebody listens there."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise DemoError("no free port on 127.0.0.1")


def wait_ready(cluster: subprocess.Popen[bytes], port: int) -> None:
    """Waits until a request can be served."""
    until = time.monotonic() + READY_LIMIT_S
    while time.monotonic() < until:
        if cluster.poll() is not None:
            raise DemoError("the cluster did not start; the lines above say why")
        try:
            if get(port, "/readyz")[0] == 200:
                return
        except OSError:
            pass  # nothing listens yet
        time.sleep(0.05)
    raise DemoError(f"the cluster was not ready after {READY_LIMIT_S:g} s")


def get(port: int, path: str) -> tuple[int, str]:
    """One GET; returns status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def request_body(question: str) -> str:
    """The JSON of the question."""
    return json.dumps({"model": "demo", "stream": True, "temperature": 0, "messages": [{"role": "user", "content": question}]})


def ask(question: str, public: int, admin: int) -> None:
    """Asks, prints the answer as it comes, then what it took."""
    bytes_before = kv_bytes(admin)
    print(f"\n  \033[1m{question}\033[0m\n  ", end="", flush=True)
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", public, timeout=60)
    connection.request("POST", "/v1/chat/completions", request_body(question), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise DemoError(f"the answer is HTTP {response.status}: {response.read().decode()}")
    first, count = 0.0, 0
    for text in answer(response):
        first = first or time.monotonic()
        count += 1
        print(text, end="", flush=True)
    ended = time.monotonic()
    connection.close()
    report(dict(response.getheaders()), kv_moved(admin, bytes_before), first - began, (count - 1) / max(ended - first, 1e-9))


def answer(response: http.client.HTTPResponse) -> Iterator[str]:
    """The texts of a stream's events, as they arrive."""
    for line in response:
        event = line.decode().strip().removeprefix("data: ")
        if not event:
            continue
        if event == "[DONE]":
            return
        value = json.loads(event)
        if "error" in value:
            raise DemoError(value["error"]["message"])
        text = value["choices"][0]["delta"].get("content") if value["choices"] else None
        if text:
            yield text
    raise DemoError("the stream was cut before [DONE]")


def kv_bytes(admin: int) -> int:
    """The router's counter of KV cache bytes that decode engines received."""
    match = re.search(r"^disagg_kv_transfer_bytes_total (\S+)$", get(admin, "/metrics")[1], re.MULTILINE)
    return int(float(match.group(1))) if match else 0


def kv_moved(admin: int, before: int) -> int:
    """How far the counter moved. The router reads it from the engines once a second, so it is waited for."""
    until = time.monotonic() + COUNTER_LIMIT_S
    while time.monotonic() < until:
        if (moved := kv_bytes(admin) - before) > 0:
            return moved
        time.sleep(0.05)
    raise DemoError("no KV cache bytes moved: the answer did not come through a handoff")


def report(headers: dict[str, str], moved: int, ttft_s: float, rate: float) -> None:
    """What the answer took."""
    prefill, decode = headers["x-disagg-prefill"], headers["x-disagg-decode"]
    print(f"\n\n  question read by    {prefill}")
    print(f"  answer written by   {decode}")
    print(f"  KV cache moved      {moved:,} bytes, from {prefill} to {decode}")
    print(f"  first token         {ttft_s * 1000:.0f} ms")
    print(f"  then                {rate:.0f} tokens/s\n", flush=True)


def curl_line(question: str, port: int) -> str:
    """What a person can paste."""
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    return f"  The same with curl:\n\n  curl -N {url} -H 'content-type: application/json' -d '{request_body(question)}'"


def stop(cluster: subprocess.Popen[bytes]) -> None:
    """Ends the cluster and waits for it."""
    if cluster.poll() is None:
        cluster.send_signal(signal.SIGTERM)
        try:
            cluster.wait(10)
        except subprocess.TimeoutExpired:
            cluster.kill()
            cluster.wait()


if __name__ == "__main__":
    sys.exit(main())
