from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import disagg.engines.embedded
from disagg.engines.embedded.tokens import Tokenizer

# A slow shared core is no bug.
hypothesis.settings.register_profile("embedded", deadline=None)
hypothesis.settings.load_profile("embedded")

DEMO_MODEL = Path(disagg.engines.embedded.__file__).parent / "demo_model"
TEXT = ["hello world, this is some text", "你好 world 👩‍👩‍👧 naïve café", "abc abd abe the then there 1234 😀😀"] * 3
TEMPLATE = (
    "{% for m in messages %}\n"
    "    {%- if m.role not in ['system', 'user', 'assistant', 'tool'] %}{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "{% if m.role == 'system' and not loop.first %}{% continue %}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n"
    "{% generation %}{{ m['content'] | trim }}{% endgeneration %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}<|im_end|>\n"
    "{% endfor %}\n"
    "{% if tools %}{{ tools | tojson }}{% endif %}\n"
    "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if thinking %}<think>{% endif %}{% endif %}"
)


def import_reference(name: str) -> Any:
    """PyTorch or transformers. Missing, they fail the test: a comparison that is left out silently proves nothing."""
    if os.environ.get("DISAGG_SKIP_REFERENCE") == "1":
        pytest.skip("DISAGG_SKIP_REFERENCE=1")
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.fail(f"{name} is missing: install disagg[reference], or set DISAGG_SKIP_REFERENCE=1")


def write_byte_level(folder: Path, *, template: str = TEMPLATE) -> None:
    """A byte-level BPE tokenizer with chat tokens, as Llama 3 and Qwen have, and a template that uses most of jinja2."""
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=special))
    core.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    core.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<|begin|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "chat_template": template,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_sentencepiece(folder: Path) -> None:
    """A tokenizer as Llama 2's: ▁ for spaces, bytes as <0xAB> for what is not in the vocabulary."""
    special = ["<unk>", "<s>", "</s>"]
    core = Core(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.train_from_iterator(TEXT[:1], trainers.BpeTrainer(vocab_size=60, special_tokens=special))
    fields = json.loads(core.to_str())
    vocab = fields["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    core = Core.from_str(json.dumps(fields))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte-level")
    write_byte_level(folder)
    return folder


@pytest.fixture(scope="session")
def byte_level(byte_level_folder: Path) -> Tokenizer:
    return Tokenizer.load(byte_level_folder)


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("sentencepiece")
    write_sentencepiece(folder)
    return Tokenizer.load(folder)
