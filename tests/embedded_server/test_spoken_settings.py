"""Faults, paces and flags: what is accepted, and what the refusal says."""

from __future__ import annotations

import numpy as np
import pytest

from disagg.engines.embedded.faults import Faults, Point, parse_faults
from disagg.engines.embedded.flags import parse_flags
from disagg.engines.embedded.pace import Pace, parse_pace, stand_in_token
from disagg.errors import ConfigError


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("none", Faults()),
        ("", Faults()),
        ("die@accept", Faults(die=Point("accept"))),
        ("die@prefill:50%", Faults(die=Point("prefill", 50))),
        ("hang@token:5, slow:x2.5", Faults(hang=Point("token", 5), slow=2.5)),
        ("stall@transfer:65536,corrupt@transfer:0", Faults(stall=Point("transfer", 65536), corrupt=Point("transfer"))),
        ("early-end@token:3,garbage@token:4", Faults(early_end=Point("token", 3), garbage=Point("token", 4))),
        ("refuse:503,late-write,ignore-abort,lie-health", Faults(None, None, None, None, None, None, 1.0, 503, *[True] * 3)),
        ("ignore-gone", Faults(ignore_gone=True)),
        ("refuse-switch", Faults(refuse_switch=True)),
        ("stall@head,leak", Faults(stall=Point("head"), leak=True)),
        ("stall@token:3", Faults(stall=Point("token", 3))),
    ],
)
def test_faults_are_read(spec: str, expected: Faults) -> None:
    assert parse_faults(spec) == expected


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("dye@token:3", "'dye@token:3' is not known"),
        ("stall@prefill:3%", "'stall@prefill:3%' is not known"),
        ("stall@head:3", "head takes no number"),
        ("stall@head,stall@token:3", "stall is given twice"),
        ("die@token", "needs a number, as in token:12"),
        ("die@accept:3", "accept takes no number"),
        ("die@prefill:50", "prefill takes 0% to 100%"),
        ("die@prefill:101%", "prefill takes 0% to 100%"),
        ("die@token:5%", "the other places a plain number"),
        ("refuse-switch:decode", "'refuse-switch:decode' is not known"),
        ("slow:x0.5", "at least 1"),
        ("refuse:200", "400 to 599"),
        ("late-write,late-write", "late-write is given twice"),
        ("none,slow:x2", "'none' is not known"),
    ],
)
def test_unknown_faults_are_refused_with_a_sentence(spec: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match="--faults") as caught:
        parse_faults(spec)
    assert sentence in str(caught.value)


def test_a_fault_strikes_from_its_point_on() -> None:
    faults = parse_faults("die@token:3")
    assert [faults.strikes("die", "token", count) for count in (2, 3, 4)] == [False, True, True]
    assert not faults.strikes("die", "transfer", 9)
    assert not faults.strikes("hang", "token", 9)
    assert parse_faults("die@accept").strikes("die", "accept")


def test_a_pace_is_the_sum_of_its_parts() -> None:
    pace = parse_pace("10,0.5;4,1")
    assert pace == Pace(10, 0.5, 4, 1)
    assert pace.step_s(100, 0) == pytest.approx(0.060)
    assert pace.step_s(0, 8) == pytest.approx(0.012)
    assert pace.step_s(100, 8) == pytest.approx(0.072)
    assert parse_pace("1,2") == Pace(1, 2, 1, 2)


@pytest.mark.parametrize("spec", ["", "1", "1,2,3", "1,2;3,4;5,6", "a,b", "-1,2", "nan,1", "inf,1"])
def test_a_wrong_pace_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="--paced"):
        parse_pace(spec)


def test_a_stand_in_token_is_a_function_of_what_came_before() -> None:
    vocabulary = list(range(10, 90))
    prompt = np.array([1, 2, 3], np.int32)
    first = stand_in_token(prompt, vocabulary)
    longer = np.append(prompt, np.int32(first))
    assert stand_in_token(prompt, vocabulary) == first
    made = {stand_in_token(np.append(longer, np.int32(i)), vocabulary) for i in range(200)}
    assert made <= set(vocabulary)
    assert len(made) > 40


def test_flags_have_sglangs_names_and_ranges() -> None:
    flags = parse_flags(["--model-path", "/m/demo", "--disaggregation-mode", "decode"], api_key="from the environment")
    assert (flags.served_model_name, flags.page_size, flags.api_key) == ("demo", 16, "from the environment")
    assert not flags.enable_pd_role_switch
    assert not flags.disaggregation_decode_enable_radix_cache
    assert parse_flags(["--model-path", "/m", "--enable-pd-role-switch"]).enable_pd_role_switch
    for wrong in (["--page-size", "0"], ["--port", "70000"], ["--transfer-stall-timeout", "0"], ["--paced-compute", "off"]):
        with pytest.raises(ConfigError, match=wrong[0]):
            parse_flags(["--model-path", "/m", *wrong])
