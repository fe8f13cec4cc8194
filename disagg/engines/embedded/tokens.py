"""Text to token ids and back: the tokenizer, chat templates, streaming decode, stop strings."""

from __future__ import annotations

import codecs
import json
import re
from collections import deque
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec
import tokenizers

from disagg.errors import RequestError, StartError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

REPLACEMENT = "\ufffd"


class Tokenizer:
    """A Hugging Face tokenizer.json with its chat template."""

    def __init__(self, core: tokenizers.Tokenizer, settings: _Settings, decoder: str) -> None:
        self._core = core
        self._settings = settings
        self._special_ids = {i for i, token in core.get_added_tokens_decoder().items() if token.special}
        self.byte_level = decoder == "ByteLevel"
        self.eos_id: int | None = core.token_to_id(settings.special_tokens.get("eos_token", ""))
        self._bytes: dict[int, bytes] = {}
        self._longest_text: int | None = None

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja (the last two may be missing).

        Raises:
            StartError: tokenizer.json is missing, or one of the files is damaged.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise StartError(f"{path} is missing; the embedded engine reads no other tokenizer format")
        try:
            core = tokenizers.Tokenizer.from_file(str(path))
            decoder = msgspec.json.decode(path.read_bytes(), type=_TokenizerFile).decoder
        except Exception as error:  # tokenizers raises bare Exception
            raise StartError(f"{path} cannot be read as a tokenizer: {error}") from error
        return cls(core, _Settings(folder), decoder.type if decoder else "")

    def __repr__(self) -> str:
        return f"<Tokenizer vocab={self.vocab_size} byte_level={self.byte_level}>"

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; a model's output may be padded to more."""
        return int(self._core.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        """Whether ``render_chat`` can work."""
        return bool(self._settings.templates)

    def refuse_beyond(self, tokens: int) -> None:
        """From now on refuse text that cannot fit into so many tokens, by its length alone: 16 MB of text cost gigabytes to tokenize."""
        longest = max(map(len, self._core.get_vocab(with_added_tokens=True)))
        self._longest_text = tokens * longest

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens written out in the text become their ids, as in transformers.

        Args:
            text: any.
            add_special_tokens: add what the tokenizer adds by itself, such as a beginning-of-text token. False for
                text that a chat template has rendered.

        Raises:
            RequestError: the text holds half of a surrogate pair and is no Unicode text, or it is too long (see `refuse_beyond`).
        """
        if self._longest_text is not None and len(text) > self._longest_text:
            raise RequestError(
                f"the prompt is too long: of {len(text)} characters at most {self._longest_text} could fit into the context",
                code="context_length_exceeded",
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError("the text holds half of a surrogate pair and is not valid Unicode") from error
        ids: list[int] = self._core.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids; invalid bytes become U+FFFD, ids outside of the vocabulary nothing."""
        return str(self._core.decode(list(ids), skip_special_tokens=skip_special))

    def is_special(self, token: int) -> bool:
        """Whether the id is a special token, which ``decode`` skips by default."""
        return token in self._special_ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for, which need not be whole characters; b"" for an id without a token."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._find_bytes(token)
        return found

    def token_text(self, token: int) -> str:
        """One id as text, as in the ``token`` field of OpenAI's logprobs; broken characters as U+FFFD."""
        return self.token_bytes(token).decode(errors="replace")

    def _find_bytes(self, token: int) -> bytes:
        piece: str | None = self._core.id_to_token(token)
        if piece is None:
            return b""
        if self.byte_level:
            # As the library decodes: a token with a character outside of the byte alphabet stands for itself.
            values = [BYTE_OF_CHAR.get(char) for char in piece]
            return piece.encode() if None in values else bytes(value for value in values if value is not None)
        byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
        if byte:
            return bytes.fromhex(byte[1])
        return piece.replace("▁", " ").encode()

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> str:
        """The prompt text of a conversation; encode it with ``add_special_tokens=False``.

        Args:
            messages: OpenAI's: role, and content as a string, a list of text parts, or null.
            tools: OpenAI's tool definitions, passed to the template as they are.
            add_generation_prompt: end with the beginning of the assistant's answer.
            chat_template_kwargs: further variables for the template; they cannot replace those above.
            now: what ``strftime_now`` shows; without it templates fall back to a fixed date, so that two engines
                render the same prompt around midnight.

        Raises:
            RequestError: the messages are malformed or the template refuses them, or the model has no template.
        """
        template = self._settings.template("tool_use" if tools else "default")
        variables = {
            **self._settings.special_tokens,
            "documents": None,
            **(chat_template_kwargs or {}),
            "messages": [_plain_message(message, index) for index, message in enumerate(messages)],
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        if not messages:
            raise RequestError("messages is empty; at least one message is needed", param="messages")
        if now is not None:
            variables["strftime_now"] = now.strftime
        try:
            return template.render(variables)
        except _RefusedError as error:
            raise RequestError(f"the chat template refuses the messages: {error}", param="messages") from error
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise RequestError(
                f"the chat template cannot render these messages ({type(error).__name__}); check their fields",
                param="messages",
            ) from error


class _Kind(msgspec.Struct):
    type: str


class _TokenizerFile(msgspec.Struct):
    decoder: _Kind | None = None


# --- bytes of byte-level BPE ----------------------------------------------------------------------------------------


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: visible Latin-1 characters are themselves, the others count up from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(b): b for b in visible} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


BYTE_OF_CHAR = _byte_alphabet()


# --- chat templates -------------------------------------------------------------------------------------------------


class _SettingsFile(msgspec.Struct):
    chat_template: str | list[dict[str, str]] | None = None


class _Settings:
    """tokenizer_config.json and chat_template.jinja: special tokens by role, templates by name."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        raw = path.read_bytes() if path.is_file() else b"{}"
        try:
            fields = msgspec.json.decode(raw, type=dict[str, Any])
            sources = _template_sources(msgspec.json.decode(raw, type=_SettingsFile).chat_template)
        except msgspec.MsgspecError as error:
            raise StartError(f"{path} is not what a model folder holds: {error}") from error
        self.special_tokens = {
            name: token if isinstance(token, str) else str(token["content"])
            for name, token in fields.items()
            if name.endswith("_token") and (isinstance(token, str) or (isinstance(token, dict) and "content" in token))
        }
        own_file = folder / "chat_template.jinja"
        if own_file.is_file():
            path, sources["default"] = own_file, own_file.read_text(encoding="utf-8")
        environment = _environment()
        try:
            self.templates = {name: environment.from_string(source) for name, source in sources.items()}
        except jinja2.TemplateError as error:
            raise StartError(f"{path} holds a chat template that jinja2 cannot read: {error}") from error

    def template(self, name: str) -> jinja2.Template:
        found = self.templates.get(name) or self.templates.get("default")
        if found is None:
            raise RequestError("this model has no chat template; use /v1/completions with a rendered prompt")
        return found


def _template_sources(field: str | list[dict[str, str]] | None) -> dict[str, str]:
    if isinstance(field, str):
        return {"default": field}
    return {entry.get("name", "default"): entry.get("template", "") for entry in field or ()}


class _RefusedError(Exception):
    """A template called ``raise_exception``: its author says what is wrong with the messages."""


def _raise_exception(sentence: str) -> None:
    raise _RefusedError(sentence)


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's text for training; for serving it means nothing."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it as a class attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """Not jinja2's own: that one escapes for HTML, and prompts are not HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """As transformers sets it up. Sandboxed, for a model folder is data from a stranger."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _plain_message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message with its content as one string, which every template understands.

    Text parts are joined with a space and null becomes "", as SGLang does for templates that want strings.
    """
    param = f"messages[{index}]"
    if not isinstance(message, dict):
        raise RequestError(f"{param} must be an object", param=param)
    if not isinstance(message.get("role"), str):
        raise RequestError(f"{param} has no role; every message needs one", param=f"{param}.role")
    content = message.get("content")
    if isinstance(content, list):
        content = " ".join(_part_text(part, f"{param}.content[{at}]") for at, part in enumerate(content))
    if not isinstance(content, str | None):
        raise RequestError(f"{param}.content must be a string, a list of text parts or null", param=f"{param}.content")
    plain = {**message, "content": content or ""}
    if message.get("tool_calls"):
        plain["tool_calls"] = _parsed_calls(message["tool_calls"], f"{param}.tool_calls")
    return plain


def _part_text(part: Any, param: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise RequestError(f"{param} is of type {kind!r}; this model reads only text parts", param=param)
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{param}.text must be a string", param=f"{param}.text")
    return str(part["text"])


def _parsed_calls(calls: Any, param: str) -> list[dict[str, Any]]:
    """Earlier tool calls with their arguments as objects: clients send JSON in a string, templates want the object."""
    try:
        parsed = []
        for call in calls:
            function = dict(call["function"])
            if isinstance(function.get("arguments"), str):
                function["arguments"] = msgspec.json.decode(function["arguments"] or "{}")
            parsed.append({**call, "function": function})
    except (msgspec.DecodeError, LookupError, TypeError, ValueError) as error:
        raise RequestError(f"{param} must be a list of calls whose arguments are JSON", param=param) from error
    return parsed


# --- streaming ------------------------------------------------------------------------------------------------------


class IncrementalDecoder:
    """Token ids in, text out, piece by piece: the pieces joined are the text of all ids.

    Byte-level tokenizers are followed byte by byte, which is exact. For the others (sentencepiece style) a token's
    text depends on its left neighbour; there the known method of two offsets is used: decode from a little before, and
    emit what came on top, unless that ends in an unfinished character.

    A prompt may end inside a character: when an answer was cut there and is asked for again. The text then begins with
    the whole character, which these ids complete. (SGLang leaves that character out: what it decodes of the prompt
    alone holds one U+FFFD in its place, and it counts characters.)

    Args:
        tokenizer: what made the ids.
        skip_special: leave special tokens out.
        prompt_tail: the last few ids of the prompt, so that the first word keeps its leading space in sentencepiece
            tokenizers, and that a character which begins in the prompt is known.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, prompt_tail: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids = list(prompt_tail)
        self._shown = len(self._ids)  # ids whose text is out; those before serve as the left neighbour
        self._dangling = b""
        self._broken = ""
        if tokenizer.byte_level:
            self._utf8.decode(b"".join(map(self._bytes_of, prompt_tail)))
            self._dangling = self._utf8.getstate()[0]
            self._utf8.reset()
        else:
            self._step_back()

    def feed(self, ids: Iterable[int]) -> str:
        """Text that these ids complete; "" while a character is unfinished."""
        if self._tokenizer.byte_level:
            return "".join(self._utf8.decode(self._begun(self._bytes_of(token))) for token in ids)
        self._ids.extend(ids)
        text = self._pending()
        if not text or text.endswith(REPLACEMENT):
            return ""  # unfinished; or special tokens left out, which are no left neighbour
        self._advance()
        return self._own(text)

    def flush(self) -> str:
        """What is left at the end; bytes that never became a character as U+FFFD."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        text = self._pending()
        self._advance()
        return self._own(text)

    def _begun(self, content: bytes) -> bytes:
        """An answer's first bytes with those of the prompt before them, if both are of one character."""
        if not content or not self._dangling:
            return content
        before, self._dangling = self._dangling, b""
        try:
            codecs.getincrementaldecoder("utf-8")().decode(before + content[:1])
        except UnicodeDecodeError:
            return content  # the prompt's character stays broken, and belongs to the prompt
        return before + content

    def _step_back(self) -> None:
        """Count the bytes of an unfinished character at the prompt's end as not shown; ``_broken`` is what they look like until then."""
        whole = self._shown
        while whole and self._tokenizer.decode(self._ids[:whole], skip_special=self._skip_special).endswith(REPLACEMENT):
            whole -= 1
        if whole:  # else there is nothing but broken bytes, and no way to tell whose they are
            self._shown = whole
            self._broken = self._pending()

    def _own(self, text: str) -> str:
        """The text without the prompt's broken bytes, where no character came of them."""
        broken, self._broken = self._broken, ""
        return text.removeprefix(broken)

    def _bytes_of(self, token: int) -> bytes:
        if self._skip_special and self._tokenizer.is_special(token):
            return b""
        return self._tokenizer.token_bytes(token)

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown], skip_special=self._skip_special)
        return self._tokenizer.decode(self._ids, skip_special=self._skip_special)[len(before) :]

    def _advance(self) -> None:
        """Forgets everything but what was just shown, the next piece's left neighbour."""
        if self._shown < len(self._ids):
            del self._ids[: self._shown]
            self._shown = len(self._ids)


class StopFinder:
    """Finds stop strings in a text that comes in pieces, and holds back what may be the beginning of one.

    An Aho-Corasick automaton: one step per character, whatever the number and the length of the stop strings. The
    state's depth is the length of the longest suffix that begins a stop string, which is exactly what must wait.

    Of several matches the one that ends first counts, and of those the longest.

    Args:
        stops: not empty strings.
        include: keep the stop string in the text (``no_stop_trim``).
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._include = include
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self._depth = [0]
        self._match: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self._link()
        self._state = 0
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> tuple[str, str | None]:
        """Takes the next piece; gives the text that is safe to emit, and the stop string if one was found.

        Nothing may be fed after a match.
        """
        for at, char in enumerate(text):
            self._step(char)
            stop = self._match[self._state]
            if stop is not None:
                self.matched = stop
                found = self._held + text[: at + 1]
                self._held = ""
                return (found if self._include else found[: len(found) - len(stop)]), stop
        seen = self._held + text
        safe = len(seen) - self._depth[self._state]
        self._held = seen[safe:]
        return seen[:safe], None

    def flush(self) -> str:
        """The text held back, when no more comes."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _step(self, char: str) -> None:
        while self._state and char not in self._next[self._state]:
            self._state = self._fail[self._state]
        self._state = self._next[self._state].get(char, 0)

    def _insert(self, stop: str) -> None:
        node = 0
        for char in stop:
            if char not in self._next[node]:
                self._next[node][char] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self._depth.append(self._depth[node] + 1)
                self._match.append(None)
            node = self._next[node][char]
        self._match[node] = stop

    def _link(self) -> None:
        """Failure links, breadth first: a node's link is always shallower, so it is done already."""
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            for char, child in self._next[node].items():
                queue.append(child)
                fallback = self._fail[node]
                while fallback and char not in self._next[fallback]:
                    fallback = self._fail[fallback]
                self._fail[child] = self._next[fallback].get(char, 0)
                self._match[child] = self._match[child] or self._match[self._fail[child]]
