from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from disagg.engines.embedded.tokens import IncrementalDecoder, StopFinder, Tokenizer
from disagg.errors import RequestError, StartError
from tests.embedded.conftest import DEMO_MODEL, import_reference, write_byte_level

# Text that breaks naive decoders: emoji with joiners and skin tones, CJK, combining marks, all lengths of UTF-8.
TEXTS = st.text(
    alphabet=st.one_of(
        st.sampled_from("abc the 123 \n你好é\u0301ﬀ\u200d👩👧😀\U0001f3fd\U00010348\ufffd▁"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=40,
)
USER: dict[str, Any] = {"role": "user", "content": "hello"}


# --- encode and decode ----------------------------------------------------------------------------------------------


@given(text=TEXTS)
def test_encode_and_back(byte_level: Tokenizer, text: str) -> None:
    assert byte_level.decode(byte_level.encode(text)) == text


def test_text_that_cannot_fit_is_refused_by_its_length_and_text_that_can_is_not(byte_level_folder: Path) -> None:
    tokenizer = Tokenizer.load(byte_level_folder)
    tokenizer.refuse_beyond(100)
    longest = max(map(len, tokenizer._core.get_vocab()))
    assert tokenizer.encode("a" * 100 * longest)
    with pytest.raises(RequestError, match="too long"):
        tokenizer.encode("a" * (100 * longest + 1))


def test_special_tokens_are_added_only_when_wanted(byte_level: Tokenizer) -> None:
    bare = byte_level.encode("hello", add_special_tokens=False)
    assert byte_level.encode("hello") == [0, *bare]
    assert byte_level.decode([0, *bare]) == "hello"
    assert byte_level.decode([0, *bare], skip_special=False) == "<|begin|>hello"
    assert byte_level.encode("<|im_end|>", add_special_tokens=False) == [byte_level.eos_id] == [2]


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc00\ud800"])
def test_half_a_surrogate_pair_is_the_clients_fault(byte_level: Tokenizer, text: str) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        byte_level.encode(text)


@given(text=TEXTS)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text, add_special_tokens=False)
    assert b"".join(byte_level.token_bytes(i) for i in ids) == text.encode()


def test_the_bytes_of_odd_tokens(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert byte_level.token_bytes(1) == b"<|im_start|>"
    assert byte_level.token_bytes(10**6) == b""
    assert byte_level.is_special(1)
    assert not byte_level.is_special(50)
    half = byte_level.encode("𐍈", add_special_tokens=False)[0]
    assert byte_level.token_text(half) == "\ufffd"
    (byte,) = sentencepiece.encode("\x07", add_special_tokens=False)[-1:]
    assert sentencepiece.token_bytes(byte) == b"\x07"
    assert sentencepiece.token_text(sentencepiece.encode("hello")[0]).startswith(" ")


# --- incremental decoding -------------------------------------------------------------------------------------------


@given(text=TEXTS, data=st.data())
def test_pieces_joined_are_the_whole(byte_level: Tokenizer, text: str, data: st.DataObject) -> None:
    """However the ids are cut, and never a replacement character that is not in the text."""
    ids = byte_level.encode(text)
    decoder = IncrementalDecoder(byte_level)
    pieces = []
    at = 0
    while at < len(ids):
        size = data.draw(st.integers(1, 4))
        pieces.append(decoder.feed(ids[at : at + size]))
        at += size
        assert text.startswith("".join(pieces))
    assert "".join(pieces) == text
    assert decoder.flush() == ""


@given(ids=st.lists(st.integers(0, 430), max_size=30))
def test_any_ids_decode_as_a_whole_does(byte_level: Tokenizer, ids: list[int]) -> None:
    """Models also emit broken UTF-8."""
    for skip in (True, False):
        decoder = IncrementalDecoder(byte_level, skip_special=skip)
        pieces = [decoder.feed([i]) for i in ids]
        assert "".join(pieces) + decoder.flush() == byte_level.decode(ids, skip_special=skip)


def test_an_unfinished_character_waits_and_ends_as_a_replacement(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a𐍈", add_special_tokens=False)
    decoder = IncrementalDecoder(byte_level)
    assert [decoder.feed([i]) for i in ids] == ["a", "", "", "", "𐍈"]
    for broken in range(2, 5):
        decoder = IncrementalDecoder(byte_level)
        assert decoder.feed(ids[:broken]) == "a"
        assert decoder.flush() == "\ufffd"


@given(text=TEXTS.map(lambda text: text.replace("\ufffd", "").replace("▁", "")))
def test_pieces_joined_are_the_whole_for_sentencepiece(sentencepiece: Tokenizer, text: str) -> None:
    ids = sentencepiece.encode(text)
    decoder = IncrementalDecoder(sentencepiece)
    pieces = [decoder.feed([i]) for i in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + decoder.flush() == sentencepiece.decode(ids) == text


def test_the_first_word_keeps_its_space_behind_a_prompt(sentencepiece: Tokenizer) -> None:
    prompt, answer = sentencepiece.encode("hello"), sentencepiece.encode("world")
    assert IncrementalDecoder(sentencepiece).feed(answer) == "world"
    assert IncrementalDecoder(sentencepiece, prompt_tail=prompt).feed(answer) == " world"


def test_a_special_token_in_between_does_not_eat_a_space(sentencepiece: Tokenizer) -> None:
    decoder = IncrementalDecoder(sentencepiece)
    ids = [*sentencepiece.encode("hello"), 2, *sentencepiece.encode("world")]
    assert "".join(decoder.feed([i]) for i in ids) + decoder.flush() == sentencepiece.decode(ids) == "hello world"


@given(text=TEXTS, data=st.data())
def test_a_character_that_begins_in_the_prompt_comes_whole(byte_level: Tokenizer, text: str, data: st.DataObject) -> None:
    """Wherever a text is cut, the prompt's whole characters and what its continuation shows are the text."""
    ids = byte_level.encode(text + "😀")
    cut = data.draw(st.integers(0, len(ids)))
    decoder = IncrementalDecoder(byte_level, prompt_tail=ids[max(0, cut - 5) : cut])
    rest = "".join(decoder.feed([i]) for i in ids[cut:]) + decoder.flush()
    before = b"".join(byte_level.token_bytes(i) for i in ids[1:cut]).decode(errors="ignore")
    assert before + rest == text + "😀"


@given(ids=st.lists(st.integers(3, 430), max_size=30), data=st.data())
def test_a_prompts_broken_character_is_not_shown_twice(byte_level: Tokenizer, ids: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(ids)))
    decoder = IncrementalDecoder(byte_level, prompt_tail=ids[max(0, cut - 5) : cut])
    rest = "".join(decoder.feed([i]) for i in ids[cut:]) + decoder.flush()
    before, whole = byte_level.decode(ids[:cut]), byte_level.decode(ids)
    completed = before.endswith("\ufffd") and before[:-1] + rest == whole
    assert completed or before + rest == whole


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        (b"\xf0\x9f", b"\x98\x80!", "😀!"),
        (b"\xf0\x9f", b"!", "!"),
        (b"\xf0\x9f", b"\x98!", "\ufffd!"),
        (b"\xf0", b"\x80!", "\ufffd!"),
        (b"\xf0\x9f", b"\xf0\x9f\x98\x80", "😀"),
        (b"\xf0\x9f", b"\x98", "\ufffd"),
        (b"\xf0\x9f", b"", ""),
        (b"\x9f", b"\x98!", "\ufffd!"),
    ],
)
def test_what_is_shown_of_bytes_behind_a_prompt(byte_level: Tokenizer, before: bytes, after: bytes, shown: str) -> None:
    """Bytes of the prompt that never became a character are the prompt's, and not shown again."""
    of_byte = {byte_level.token_bytes(i): i for i in range(byte_level.vocab_size)}
    decoder = IncrementalDecoder(byte_level, prompt_tail=[of_byte[bytes([byte])] for byte in before])
    assert "".join(decoder.feed([of_byte[bytes([byte])]]) for byte in after) + decoder.flush() == shown


def test_a_character_cut_by_the_prompt_in_a_tokenizer_of_bytes_and_words(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("hello 😀 you")
    bytes_at = next(at for at, token in enumerate(ids) if sentencepiece.token_bytes(token) == b"\xf0")
    for cut in range(bytes_at, bytes_at + 4):
        decoder = IncrementalDecoder(sentencepiece, prompt_tail=ids[max(0, cut - 5) : cut])
        assert "".join(decoder.feed([i]) for i in ids[cut:]) + decoder.flush() == "😀 you"
        decoder = IncrementalDecoder(sentencepiece, prompt_tail=ids[max(0, cut - 5) : cut])
        assert decoder.feed(sentencepiece.encode("you")) + decoder.flush() == " you"


# --- stop strings ---------------------------------------------------------------------------------------------------


def naive_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The stop string that ends first, the longest of those that end there; and the text before it."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


STOPS = st.lists(st.text(alphabet="ab😀", min_size=1, max_size=6), min_size=1, max_size=5)


@given(pieces=st.lists(st.text(alphabet="ab😀", max_size=7), max_size=12), stops=STOPS, include=st.booleans())
@example(pieces=["xa", "ac"], stops=["xaacd", "aab", "ac"], include=False)  # two steps back in the automaton
def test_stops_are_found_as_a_naive_search_finds_them(pieces: list[str], stops: list[str], include: bool) -> None:
    text = "".join(pieces)
    before, expected = naive_stop(text, stops)
    finder = StopFinder(stops, include=include)
    emitted = ""
    for piece in pieces:
        out, found = finder.feed(piece)
        emitted += out
        if found:
            break
        fed = text[: len(emitted) + len(finder._held)]
        assert not any(stop.startswith(fed[at:]) for stop in stops for at in range(len(emitted)))  # nothing too early
        assert not finder._held or any(stop.startswith(finder._held) for stop in stops)  # nothing held back in vain
    else:
        emitted += finder.flush()
    assert finder.matched == expected
    assert emitted == before + (expected if include and expected else "")


def test_a_stop_over_tokens_and_characters(byte_level: Tokenizer) -> None:
    """The emoji alone is four tokens, and the stop begins in the middle of a word."""
    decoder, finder = IncrementalDecoder(byte_level), StopFinder(["lo 😀!"])
    shown = []
    for token in byte_level.encode("hello 😀! more"):
        text, found = finder.feed(decoder.feed([token]))
        shown.append(text)
        if found:
            break
    assert finder.matched == "lo 😀!"
    assert "".join(shown) == "hel"


def test_what_was_held_back_comes_out_when_it_was_no_stop() -> None:
    finder = StopFinder(["STOP"])
    assert finder.feed("a ST") == ("a ", None)
    assert finder.feed("ART") == ("START", None)
    assert finder.feed(" STO") == (" ", None)
    assert finder.flush() == "STO"


# --- chat templates -------------------------------------------------------------------------------------------------


def test_a_conversation(byte_level: Tokenizer) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": " short "},
        USER,
        {"role": "assistant", "content": None},
        {"role": "system", "content": "x"},
    ]
    assert byte_level.render_chat(messages) == (
        "<|im_start|>system\nshort<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert byte_level.render_chat([USER], add_generation_prompt=False) == "<|im_start|>user\nhello<|im_end|>\n"


def test_text_parts_are_joined(byte_level: Tokenizer) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert "user\nhel lo<|im_end|>" in byte_level.render_chat([{"role": "user", "content": parts}])


def test_tools_and_tool_calls(byte_level: Tokenizer) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "description": "<é>"}}]
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    text = byte_level.render_chat([USER, {"role": "assistant", "content": None, "tool_calls": [call]}], tools=tools)
    assert json.dumps(tools, ensure_ascii=False) in text
    assert "assistant\nBern<|im_end|>" in text


def test_further_variables_and_the_time(byte_level: Tokenizer) -> None:
    assert byte_level.render_chat([USER], chat_template_kwargs={"thinking": True}).endswith("<think>")
    assert "hello" in byte_level.render_chat([USER], chat_template_kwargs={"messages": []})
    assert "1999" in byte_level.render_chat([USER], now=dt.datetime(1999, 1, 1, tzinfo=dt.UTC))


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (["x"], "messages[0]"),
        ([USER, {"content": "x"}], "messages[1].role"),
        ([{"role": 3, "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "assistant", "tool_calls": 3}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls"),
        ([{"role": "alien", "content": "x"}], "messages"),  # the template raises
    ],
)
def test_malformed_messages(byte_level: Tokenizer, messages: list[Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        byte_level.render_chat(messages)
    assert caught.value.param == param


@pytest.mark.parametrize("template", ["{{ messages[0].content + 1 }}", "{{ missing.field }}", "{{ 1 // 0 }}", "{{ [][7] + 1 }}"])
def test_a_template_that_stumbles_over_the_messages(tmp_path: Path, template: str) -> None:
    write_byte_level(tmp_path, template=template)
    with pytest.raises(RequestError, match="template"):
        Tokenizer.load(tmp_path).render_chat([USER])


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}"])
def test_templates_are_sandboxed(tmp_path: Path, template: str) -> None:
    write_byte_level(tmp_path, template=template)
    with pytest.raises(RequestError, match="SecurityError"):
        Tokenizer.load(tmp_path).render_chat([USER])


def test_templates_by_name_and_from_their_own_file(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    settings = {"chat_template": [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.render_chat([USER]) == "plain"
    assert tokenizer.render_chat([USER], tools=[{}]) == "tools"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.load(tmp_path).render_chat([USER]) == "file"


def test_a_model_without_a_template(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.load(tmp_path)
    assert not tokenizer.has_chat_template
    assert tokenizer.eos_id is None
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.render_chat([USER])


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", "{}"), ("tokenizer_config.json", "["), ("chat_template.jinja", "{% if %}"), ("tokenizer.json", None)],
)
def test_a_damaged_folder(tmp_path: Path, name: str, content: str | None) -> None:
    write_byte_level(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(StartError, match=name):
        Tokenizer.load(tmp_path)


@pytest.mark.reference
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("folder", ["made here", DEMO_MODEL], ids=["made-here", "demo"])
def test_the_prompt_is_what_transformers_renders(byte_level_folder: Path, folder: Any) -> None:
    folder = byte_level_folder if folder == "made here" else folder
    transformers = import_reference("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = Tokenizer.load(folder)
    conversations: list[list[dict[str, Any]]] = [
        [USER],
        [{"role": "system", "content": "Be brief. "}, USER, {"role": "assistant", "content": "你好 👩‍👧"}, USER],
    ]
    for messages in conversations:
        for prompt in (True, False):
            text = ours.render_chat(messages, add_generation_prompt=prompt, now=dt.datetime.now(tz=dt.UTC))
            assert text == theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
            ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True, return_dict=False)
            assert ours.encode(text, add_special_tokens=False) == ids
    assert ours.encode("hello 你好") == theirs("hello 你好")["input_ids"]
