from __future__ import annotations

from tests.router.conftest import CHAT, Rig


async def test_a_whole_answer_is_decodes_answer_byte_for_byte(rig: Rig) -> None:
    async with await rig.post(CHAT) as response:
        assert response.status == 200
        assert (await response.json())["choices"][0]["message"]["content"] == "alpha beta gamma"
        assert response.headers["x-disagg-prefill"] == "prefill-0"
        assert response.headers["x-disagg-decode"] == "decode-0"
        assert len(response.headers["x-request-id"]) == 32


async def test_a_stream_is_relayed_to_its_end(rig: Rig) -> None:
    async with await rig.post({**CHAT, "stream": True}) as response:
        assert response.status == 200
        text = (await response.read()).decode()
    assert text.endswith("data: [DONE]\n\n")
    assert [w in text for w in ("alpha", " beta", " gamma")] == [True] * 3
