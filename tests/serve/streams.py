"""Clients of a site in threads: what each was told, and whether that is all of it."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx2

LIMIT_S = 120.0


class Answer(threading.Thread):
    """One chat request, greedy and of a fixed length; `text` grows while it runs."""

    def __init__(self, url: str, text: str, tokens: int, *, stream: bool = True, **fields: Any) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._stream = stream
        asked = [{"role": "user", "content": text}]
        self.body = {"model": "demo", "messages": asked, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
        self.body |= fields
        self.headers: dict[str, str] = {}
        self.text = ""
        self.error = ""
        self.done = False
        self.start()

    def run(self) -> None:
        try:
            self._ask()
        except httpx2.HTTPError as error:
            self.error = f"{type(error).__name__}: {error}"

    def _ask(self) -> None:
        with httpx2.stream("POST", self._url + "/v1/chat/completions", json=self.body, timeout=LIMIT_S) as response:
            self.headers = dict(response.headers)
            if response.status_code != 200:
                self.error = f"HTTP {response.status_code}: {response.read()!r}"
            elif not self._stream:
                self.text = json.loads(response.read())["choices"][0]["message"]["content"]
                self.done = True
            else:
                for line in response.iter_lines():
                    self._take(line)

    def _take(self, line: str) -> None:
        if line == "data: [DONE]":
            self.done = True
        elif line.startswith("data: "):
            event = json.loads(line[6:])
            self.error = str(event["error"]) if "error" in event else self.error
            self.text += "".join(c["delta"].get("content") or "" for c in event.get("choices", ()))

    def whole(self) -> str:
        """The text of an answer that ended as it should."""
        self.join(LIMIT_S)
        assert not self.is_alive(), f"no end after {len(self.text)} characters"
        assert (self.done, self.error) == (True, ""), (self.error, self.text[-80:])
        return self.text
