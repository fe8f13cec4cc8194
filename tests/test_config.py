"""disagg.toml and the flags: every wrong setting is one line that helps."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from disagg.config import (
    Config,
    RouterSection,
    default_toml,
    engine_addresses,
    is_repeatable,
    parse_config,
    parse_listen,
    settings,
)
from disagg.errors import ConfigError
from disagg.model import Role

FILE = Path(__file__).parent.parent / "disagg.toml"
EVERY = settings("cluster", "router", "engine", "security", "observe")


def wrong(text: str, **flags: dict[str, Any]) -> str:
    """The sentence that a wrong config gets."""
    with pytest.raises(ConfigError) as caught:
        parse_config(text, file="disagg.toml", flags=flags)
    sentence = str(caught.value)
    assert sentence.isprintable(), f"not one line: {sentence!r}"
    assert len(sentence) < 600
    return sentence


# --- the file in the repository


def test_the_file_in_the_repository_is_current() -> None:
    assert FILE.read_text(encoding="utf-8").rstrip() == default_toml().rstrip(), "run: disagg check --default > disagg.toml"


def test_the_file_in_the_repository_says_the_defaults() -> None:
    assert parse_config(FILE.read_text(encoding="utf-8"), file=str(FILE)) == Config() == parse_config("", file="x")


def test_every_setting_stands_in_it_once_under_its_sentence() -> None:
    lines = FILE.read_text(encoding="utf-8").splitlines()
    for setting in EVERY:
        at = [i for i, line in enumerate(lines) if line.startswith(f"{setting.key} = ")]
        assert len(at) == 1
        assert lines[at[0] - 1] == f"# {setting.text}"
        assert setting.text.endswith(".")


def test_units_are_in_the_names() -> None:
    for setting in EVERY:
        if isinstance(setting.default, float):
            assert setting.key.endswith(("_s", "_fraction"))


def test_flags_are_unique() -> None:
    flags = [s.flag for s in EVERY]
    assert len(set(flags)) == len(flags)
    assert {s.flag for s in EVERY if is_repeatable(s)} == {"--prefill", "--decode", "--unified", "--engine-arg"}


# --- any edit of it


def delete_line(chance: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True)
    del lines[chance.randrange(len(lines))]
    return "".join(lines)


def repeat_line(chance: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True)
    lines.insert(chance.randrange(len(lines)), chance.choice(lines))
    return "".join(lines)


def uncomment(chance: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True)
    at = chance.choice([i for i, line in enumerate(lines) if line.startswith("#")])
    lines[at] = lines[at][2:]
    return "".join(lines)


def flip_character(chance: random.Random, text: str) -> str:
    at = chance.randrange(len(text))
    return text[:at] + chance.choice(string.printable + "éß²\u2028\U0001f600\x00\x7f") + text[at + 1 :]


def insert_character(chance: random.Random, text: str) -> str:
    at = chance.randrange(len(text))
    return text[:at] + chance.choice(string.printable + "é²\ufeff\x1b") + text[at:]


def delete_character(chance: random.Random, text: str) -> str:
    at = chance.randrange(len(text))
    return text[:at] + text[at + 1 :]


VALUES = (
    *(
        "true",
        "false",
        "0",
        "-1",
        "1e3",
        "1e400",
        "nan",
        "-inf",
        "inf",
        "0x7f",
        "1979-05-27",
        "07:32:00",
        '""',
        '" "',
        "''",
        "[]",
        "{}",
        "[[]]",
    ),
    *(
        '"a:1"',
        '"[::1]:0"',
        '"127.0.0.1:65536"',
        '"h:²"',
        '"h:-1"',
        '"a\\nb:1"',
        '"é:1"',
        '"a..b:1"',
        '"\\u0000:1"',
        '["x"]',
        "[1]",
        '[["a"]]',
    ),
    *(
        '["http://a:1,2"]',
        '["http://a:1"]',
        '["http://a:99999,1"]',
        '["http://a:1,99999"]',
        '["https://a:1"]',
        '["http://a:1,²"]',
        '["http://[::1]:1"]',
    ),
    *(
        '"""\n"""',
        "9" * 25,
        "9" * 5000,
        "0x" + "f" * 6000,
        "[" * 600,
        "[" * 600 + "]" * 600,
        "{a = 1}",
        '"debug"',
        '"info\\n"',
        '"embedded\\n"',
    ),
)


def other_value(chance: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True)
    at = chance.choice([i for i, line in enumerate(lines) if " = " in line and not line.startswith("#")])
    lines[at] = f"{lines[at].partition(' = ')[0]} = {chance.choice(VALUES)}\n"
    return "".join(lines)


KEYS = ("htp", "Router", '"a\\nb"', "router.http", "'\\'", '""', "http", "é", "prefil", "a.b.c")


def other_key(chance: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True)
    at = chance.choice([i for i, line in enumerate(lines) if " = " in line and not line.startswith("#")])
    lines[at] = f"{chance.choice(KEYS)} = {lines[at].partition(' = ')[2]}"
    return "".join(lines)


def other_section(chance: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True)
    at = chance.choice([i for i, line in enumerate(lines) if line.startswith("[")])
    lines[at] = chance.choice(["[ruter]", "[[router]]", "[router.http]", '["a\\nb"]', "[engines]", "[", "[]", "[slo]", "[observe"]) + "\n"
    return "".join(lines)


EDITS: tuple[Callable[[random.Random, str], str], ...] = (
    *(delete_line, repeat_line, uncomment, flip_character, insert_character, delete_character),
    *(other_value, other_value, other_value, other_key, other_section),
)


def keys_of(text: str, mutant: str) -> set[str]:
    """Words that a sentence about this edit may name: what stands on the changed lines, and the sections around them."""
    before, after = text.splitlines(), mutant.splitlines()
    changed = [line for line in [*before, *after] if (line in before) is not (line in after) or after.count(line) != before.count(line)]
    return {w for line in changed for w in (line.partition("=")[0].strip("[]# \"'"),) if w}


def test_a_thousand_single_edits_give_a_valid_config_or_one_line_that_names_file_and_key() -> None:
    text = FILE.read_text(encoding="utf-8")
    chance = random.Random(20)
    valid = syntax = 0
    for _ in range(1000):
        mutant = chance.choice(EDITS)(chance, text)
        try:
            config = parse_config(mutant, file="some/disagg.toml")
        except ConfigError as error:
            sentence = str(error)
            assert sentence.startswith("some/disagg.toml"), sentence
            assert sentence.isprintable(), sentence
            assert len(sentence) < 600, sentence
            if "not valid TOML" in sentence:
                syntax += 1
            else:
                named = [s.key for s in EVERY if f".{s.key} = " in sentence] + [
                    k for k in keys_of(text, mutant) if repr(k)[1:-1] in sentence
                ]
                assert named, (sentence, keys_of(text, mutant))
        else:
            valid += 1
            usable(config)
    assert valid > 100
    assert syntax > 100
    assert 1000 - valid - syntax > 200


def usable(config: Config) -> None:
    """What passed the check can be used: no later step may find that an address is none."""
    for name in ("http", "admin"):
        host, port = parse_listen(name, getattr(config.router, name))
        assert 0 <= port <= 65535
        host.encode("idna")
    for address in engine_addresses(config.router):
        assert 0 < address.port <= 65535
        assert (0 < address.bootstrap_port <= 65535) is (address.role is Role.PREFILL)
    assert config.observe.log_level in {"debug", "info", "warning", "error"}
    msgspec.json.encode(config)


@given(st.text(max_size=60), st.sampled_from(["", "[router]\n", "[engine]\n", "[observe]\nlog_level = "]))
@hypothesis_settings(deadline=None, max_examples=150)
def test_any_text_is_a_config_or_a_config_error(text: str, before: str) -> None:
    sentence = ""
    try:
        usable(parse_config(before + text, file="f"))
    except ConfigError as error:
        sentence = str(error)
    assert sentence.isprintable() or not sentence


# --- sentences


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[router]\nhtp = 1", "disagg.toml:2: router.htp = 1 is not a setting; did you mean http?"),
        ("[router]\nconect_timeout_s = 1", "disagg.toml:2: router.conect_timeout_s = 1 is not a setting; did you mean connect_timeout_s?"),
        ("[observe]\nzzz = 1", "disagg.toml:2: observe.zzz = 1 is not a setting; there is log_level, log_format"),
        ("\n[ruter]\n", "disagg.toml:2: there is no section [ruter]; did you mean router?"),
        ("[zzz]", "disagg.toml:1: there is no section [zzz]; there is cluster, router, engine, engines, slo, policy, security, observe"),
        ("router = 3", "disagg.toml:1: router = 3 stands outside a section; router is a section, write [router]"),
        ('[router]\n\n"body_limit_mib" = true', "disagg.toml:3: router.body_limit_mib = True is not allowed: expected int, got bool"),
        ("[router]\nbody_limit_mib = 0", "disagg.toml:2: router.body_limit_mib = 0 is not allowed: expected int >= 1"),
        ("[router]\nprobe_interval_s = nan", "disagg.toml:2: router.probe_interval_s = nan is not allowed: expected float > 0.0"),
        ('[observe]\nlog_level = "loud"', "disagg.toml:2: observe.log_level = 'loud' is not allowed: expected str matching regex"),
        ('[router]\nhttp = "8000"', "disagg.toml:2: router.http = '8000' is not allowed: write HOST:PORT, for example 127.0.0.1:8000"),
        (
            '[router]\nprefill = ["http://a:1"]',
            "disagg.toml:2: router.prefill = 'http://a:1' is not allowed: write http://10.0.0.1:30000,8998",
        ),
        (
            '[router]\ndecode = ["http://a:1,2"]',
            "disagg.toml:2: router.decode = 'http://a:1,2' is not allowed: write http://10.0.0.1:30000",
        ),
        ('["a\\nb"]', "disagg.toml: there is no section ['a\\nb'];"),
        ('[router]\n"a\\nb" = 1', "disagg.toml: router.'a\\nb' = 1 is not a setting;"),
        ("[router", "disagg.toml is not valid TOML: "),
        ("a = " + "[" * 5000, "disagg.toml is not valid TOML: "),
        ("[engine]\nkv_pool_tokens = " + "9" * 5000, "disagg.toml is not valid TOML: "),
        ("[engine]\nkv_pool_tokens = 0x" + "f" * 6000, "disagg.toml:2: engine.kv_pool_tokens = an endless number is not allowed"),
        (f'[engine]\nengine = "{"x" * 5000}"', "disagg.toml:2: engine.engine = 'xxxxx"),
    ],
)
def test_a_sentence_names_file_line_key_value_and_what_is_allowed(text: str, sentence: str) -> None:
    assert wrong(text).startswith(sentence)


def test_the_line_is_that_of_the_right_section() -> None:
    assert wrong("[observe]\nhttp = 1\n[router]\nhttp = 1").startswith("disagg.toml:4: router.http = 1 ")
    assert wrong('# http = 1\n[engine]\n[observe]\nlog_format = "text"\n[router]\nhttp = 1').startswith("disagg.toml:6: router.http = 1 ")


# --- flags


def test_flags_win_and_what_they_do_not_say_comes_from_the_file() -> None:
    text = '[router]\nhttp = "0.0.0.0:1"\nadmin = "0.0.0.0:2"\nprefill = ["http://a:1,2"]'
    config = parse_config(
        text, file="f", flags={"router": {"http": "0.0.0.0:3", "prefill": ["http://b:1,2"]}, "observe": {"log_level": "debug"}}
    )
    assert (config.router.http, config.router.admin) == ("0.0.0.0:3", "0.0.0.0:2")
    assert config.router.prefill == ("http://b:1,2",)
    assert config.observe.log_level == "debug"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"router": {"http": "x"}}, "--http = 'x' is not allowed"),
        ({"router": {"body_limit_mib": 0}}, "--body-limit-mib = 0 is not allowed"),
        ({"router": {"decode": ["x"]}}, "--decode = 'x' is not allowed"),
        ({"observe": {"log_level": "a\nb"}}, "--log-level = 'a\\nb' is not allowed"),
    ],
)
def test_a_wrong_flag_is_named_as_a_flag(flags: dict[str, dict[str, Any]], sentence: str) -> None:
    assert wrong('[router]\nhttp = "127.0.0.1:1"\n', **flags).startswith(sentence)


# --- addresses


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("127.0.0.1:8000", ("127.0.0.1", 8000)),
        ("[::1]:0", ("::1", 0)),
        ("::1:80", ("::1", 80)),
        ("[fe80::1%eth0]:80", ("fe80::1%eth0", 80)),
        ("node-3.cluster.local:65535", ("node-3.cluster.local", 65535)),
    ],
)
def test_listen_addresses(text: str, found: tuple[str, int]) -> None:
    assert parse_listen("x", text) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        ":1",
        "h",
        "h:",
        "h:x",
        "h:65536",
        "h:-1",
        "h:+1",
        "h: 1",
        "h:1_0",
        "h:²",
        "h:" + "1" * 5000,
        "a b:1",
        "a\n:1",
        "a..b:1",
        "é:1",
        "h/:1",
        "u@h:1",
    ],
)
def test_what_is_not_an_address_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match="write HOST:PORT"):
        parse_listen("x", text)


def test_engines_by_url() -> None:
    section = RouterSection(
        prefill=("http://10.0.0.1:30000,8998", "http://[fd00::1]:1,2/".removesuffix("/")),
        decode=("http://10.0.0.2:30000/",),
        unified=("http://h:3",),
    )
    found = engine_addresses(section)
    assert [(a.id, a.role, a.host, a.port, a.bootstrap_port) for a in found] == [
        ("prefill-0", Role.PREFILL, "10.0.0.1", 30000, 8998),
        ("prefill-1", Role.PREFILL, "fd00::1", 1, 2),
        ("decode-0", Role.DECODE, "10.0.0.2", 30000, 0),
        ("unified-0", Role.UNIFIED, "h", 3, 0),
    ]
    assert [a.url for a in found][:2] == ["http://10.0.0.1:30000", "http://[fd00::1]:1"]


@pytest.mark.parametrize(
    "url",
    [
        *("", "h:1", "https://h:1", "http://h", "http://:1", "http://h:0", "http://h:65536", "http://h:1/path", "http://u:p@h:1"),
        *(
            "http://h:1,",
            "http://h:1,0",
            "http://h:1,99999",
            "http://h:1,8,9",
            "http://h:1,-8",
            "http://h:1, 8",
            "http://h:1,²",
            "http://a b:1",
        ),
    ],
)
@pytest.mark.parametrize("role", list(Role))
def test_what_is_not_an_engines_url_is_a_config_error(role: Role, url: str) -> None:
    with pytest.raises(ConfigError, match=rf"router.{role} = .* write http://"):
        engine_addresses(RouterSection(**{role.value: (url,)}))  # type: ignore[arg-type]
