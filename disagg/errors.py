"""Every error that disagg raises on purpose.

DisaggError                  exit 1, HTTP 500
├── ConfigError              exit 78             the file or a flag is wrong; names file, key, value, what is allowed
├── InstallError             exit 1              the units could not be installed: not root, a file or a command failed
├── StartError               exit 1              this host cannot start: port in use, model folder missing, engine died
├── TraceError               exit 1              a recorded load cannot be read; names file, line and what is wrong
├── RequestError             HTTP 400            the client's fault; never counts against an engine
│   ├── UnknownModelError    HTTP 404
│   ├── BodyTooLargeError    HTTP 413
│   ├── SlowRequestError     HTTP 408            its body came too slowly
│   ├── OrderError           HTTP 409            what a person ordered cannot be done, or not to this engine
│   ├── NameTakenError       HTTP 409            a host's name or key is registered to another host
│   └── ClientGoneError      HTTP 499            nobody is left to read the answer (logs and metrics only)
├── NoCapacityError          HTTP 503            no engine can take it now; carries Retry-After
│   └── ShareError           HTTP 429            the same, and this user holds more than a fair share of the engines
├── DeadlineError            HTTP 504            the request's own deadline passed; nobody's fault
└── EngineError              HTTP 502            an engine broke its promise: refused, closed, garbage
    ├── CrashedError         HTTP 500            engines died under this very request: nobody gets it any more
    ├── EngineRefusedError   its own status      the engine answered with an error of its own
    └── EngineTimeoutError   HTTP 504            it was silent for longer than this phase allows

One sentence each: what, where, what to do. The sentence is shown to people, so it never holds a prompt or a secret.
"""

from __future__ import annotations


class DisaggError(Exception):
    """Root of the tree.

    Attributes:
        status: the HTTP status that a client gets when the error ends its request.
        kind: the ``type`` of the OpenAI error object.
        exit_code: what the command exits with when the error ends it.
    """

    status: int = 500
    kind: str = "internal_error"
    exit_code: int = 1


class ConfigError(DisaggError):
    """A setting is wrong. The sentence names file, key, value and what is allowed."""

    kind = "configuration_error"
    exit_code = 78  # EX_CONFIG of sysexits.h: systemd shows it as "configuration error"


class InstallError(DisaggError):
    """The units could not be installed on this machine."""


class StartError(DisaggError):
    """This process cannot start."""


class TraceError(DisaggError):
    """A recorded load cannot be read or has nothing in it. The sentence names file and line."""


class RequestError(DisaggError):
    """The client sent something that cannot be served.

    Attributes:
        param: the field at fault, as a client would write it, or None.
        code: a machine-readable word, or None.
    """

    status = 400
    kind = "invalid_request_error"

    def __init__(self, sentence: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(sentence)
        self.param = param
        self.code = code


class UnknownModelError(RequestError):
    """No engine of the cluster serves the model that was asked for."""

    status = 404


class BodyTooLargeError(RequestError):
    """The body is over the limit; it was not read to the end."""

    status = 413


class SlowRequestError(RequestError):
    """The body came more slowly than any client must be waited for."""

    status = 408


class OrderError(RequestError):
    """An order that cannot be carried out, with the reason.

    Attributes:
        status: 404 for an engine or host that is not there, else 409.
    """

    def __init__(self, sentence: str, status: int = 409) -> None:
        super().__init__(sentence)
        self.status = status


class NameTakenError(RequestError):
    """A host wants a name that belongs to another key, or brings a key that belongs to another name."""

    status = 409


class ClientGoneError(RequestError):
    """The client closed its connection. Nobody sees this status; it stands in logs and metrics."""

    status = 499


class NoCapacityError(DisaggError):
    """No engine can take the request at the moment.

    Attributes:
        retry_after_s: when to come again, whole seconds, at least 1.
        reason: one word for counters.
    """

    status = 503
    kind = "service_unavailable"

    def __init__(self, sentence: str, *, retry_after_s: int = 1, reason: str = "no_engine") -> None:
        super().__init__(sentence)
        self.retry_after_s = max(1, retry_after_s)
        self.reason = reason


class ShareError(NoCapacityError):
    """No engine can take the request at the moment, and its user holds more than a fair share of them."""

    status = 429
    kind = "rate_limit_error"


class DeadlineError(DisaggError):
    """The time that the client gave (``x-disagg-deadline-ms``) is over. Never counts against an engine."""

    status = 504
    kind = "deadline_exceeded"


class EngineError(DisaggError):
    """An engine broke its promise: it refused the connection, closed it early or sent garbage."""

    status = 502
    kind = "engine_error"


class CrashedError(EngineError):
    """Several engines died while they worked on this request: it is not tried on another.

    Attributes:
        code: what programs may look for.
    """

    status = 500
    code = "request_crashed_engine"


class EngineRefusedError(EngineError):
    """An engine answered with an HTTP error. Its status and its sentence are passed on.

    Attributes:
        status: the engine's HTTP status.
        body: the engine's answer, bytes as received.
    """

    def __init__(self, sentence: str, *, status: int, body: bytes = b"") -> None:
        super().__init__(sentence)
        self.status = status
        self.kind = "invalid_request_error" if 400 <= status < 500 else "engine_error"
        self.body = body


class EngineTimeoutError(EngineError):
    """An engine was silent for longer than the phase allows."""

    status = 504
