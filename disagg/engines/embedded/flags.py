"""The command line of an embedded engine: SGLang's flag names, and a few of our own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from disagg.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

ROLES = ("null", "prefill", "decode")
LOG_LEVELS = ("debug", "info", "warning", "error")


class Flags(NamedTuple):
    """What was given; the names are the flags'."""

    model_path: Path
    served_model_name: str
    host: str
    port: int
    disaggregation_mode: str
    disaggregation_bootstrap_port: int
    enable_pd_role_switch: bool
    disaggregation_decode_enable_radix_cache: bool
    page_size: int
    max_total_tokens: int
    max_running_requests: int
    chunked_prefill_size: int
    context_length: int
    api_key: str
    log_level: str
    ready_file: Path | None
    exit_with_parent: bool
    paced: str
    paced_compute: str
    faults: str | None
    bootstrap_timeout: float
    transfer_stall_timeout: float
    incremental_streaming_output: bool


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m disagg.engines.embedded",
        description="A small engine on the CPU that speaks SGLang's HTTP surface and hands KV caches over TCP.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model-path", type=Path, required=True, help="Hugging Face folder of a Llama, Qwen2 or Qwen3 model")
    add("--served-model-name", default="", help="name in /v1/models (default: the folder's)")
    add("--host", default="127.0.0.1", help="address of HTTP and of the bootstrap port")
    add("--port", type=int, default=30000, help="HTTP port; 0 takes a free one")
    add("--disaggregation-mode", choices=ROLES, default="null", help="null serves alone")
    add("--disaggregation-bootstrap-port", type=int, default=8998, help="where prefill waits for decode; 0: a free one")
    add("--enable-pd-role-switch", action="store_true", help="POST /pd_role_switch works; decode listens on its bootstrap port too")
    radix = "a decode engine has a prefix cache too, and has one after it became prefill"
    add("--disaggregation-decode-enable-radix-cache", action="store_true", help=radix)
    add("--page-size", type=int, default=16, help="tokens of a KV page; equal on both sides of a pair")
    add("--max-total-tokens", type=int, default=16384, help="size of the KV pool")
    add("--max-running-requests", type=int, default=64, help="requests that hold KV pages at a time")
    add("--chunked-prefill-size", type=int, default=512, help="prompt tokens of one step")
    add("--context-length", type=int, default=0, help="prompt and answer together (default: the model's)")
    add("--api-key", default="", help="demanded as a bearer token; DISAGG_ENGINE_API_KEY keeps it out of ps")
    add("--log-level", choices=LOG_LEVELS, default="info", help="what goes to stderr")
    add("--ready-file", type=Path, default=None, help="written once requests can come: JSON with url and ports")
    add("--exit-with-parent", action="store_true", help="die when the starting process dies (Linux)")
    add("--paced", default="", metavar="A,B[;C,D]", help="steps last A + B*prompt_tokens, C + D*requests milliseconds")
    add("--paced-compute", choices=("on", "off"), default="on", help="off: no arithmetic, tokens from a hash")
    add("--faults", default=None, metavar="SPEC[,SPEC]", help="break on purpose (see faults.py); also opens POST /faults")
    add("--bootstrap-timeout", type=float, default=30.0, help="seconds that one leg waits for the other")
    add("--transfer-stall-timeout", type=float, default=10.0, help="seconds without a sign of life in a transfer")
    add("--incremental-streaming-output", action="store_true", help="/generate streams carry only what is new")
    return parser


def parse_flags(argv: Sequence[str], *, api_key: str = "") -> Flags:
    """Read the command line; ``api_key`` is the environment's, the flag wins.

    Raises:
        ConfigError: a value is out of its range.
        SystemExit: what argparse does with unknown flags and --help.
    """
    flags = Flags(**vars(_parser().parse_args(argv)))
    for name in ("page_size", "max_total_tokens", "max_running_requests", "chunked_prefill_size"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(flags, name)}")
    for name in ("port", "disaggregation_bootstrap_port"):
        if not 0 <= getattr(flags, name) < 1 << 16:
            raise ConfigError(f"--{name.replace('_', '-')} must be 0 to 65535, not {getattr(flags, name)}")
    for name in ("bootstrap_timeout", "transfer_stall_timeout"):
        if not 0 < getattr(flags, name) < 1e6:
            raise ConfigError(f"--{name.replace('_', '-')} must be a positive number of seconds")
    if flags.paced_compute == "off" and not flags.paced:
        raise ConfigError("--paced-compute off needs --paced: without either, a step would last no time at all")
    named = flags.served_model_name or flags.model_path.name
    return flags._replace(served_model_name=named, api_key=flags.api_key or api_key)
