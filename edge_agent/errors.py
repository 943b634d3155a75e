"""The named ways in which things go wrong; everything else is a bug and may crash.

Each class has a stable `code` that appears in MQTT replies, in logs and in exit statuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

SourceReason = Literal[
    "auth_failed",  # user or password is wrong or missing
    "not_found",  # no such host, path or file
    "timeout",  # it does not answer, or does not open in time
    "tls",  # no trusted encrypted connection
    "unsupported",  # cannot be played here: a library, a format or a setting
    "unsupported_codec",  # the stream's codec cannot be decoded
    "refused",  # nothing listens there
    "device_not_found",
    "device_busy",  # another program has it
    "disconnected",  # the connection or the device went away
    "stalled",  # it sends nothing, or nothing that is fresh
    "frozen",  # it sends the same picture again and again
    "end_of_stream",
    "error",
]
ModelCode = Literal[
    "model_not_found",
    "model_rejected",  # it does not fit together; the sentence says what
    "model_exists",  # another file has this name and version
    "model_in_use",  # it is the active one, or the fallback
    "model_truncated",  # the file ends too early
    "model_damaged",  # the stored file is not what was stored
    "model_shapes",  # its input is not of the pictures' shape
    "model_not_finite",  # its weights or outputs are not numbers
    "model_too_slow",
    "model_failed",  # it failed in use, while it was on probation
    "external_data",  # its weights lie in files that may not be read
    "build_failed",  # no engine could be built from it
    "no_memory",
    "disk_full",
    "registry_damaged",
    "fetch_forbidden",
    "fetch_failed",
    "too_large",
    "checksum_mismatch",
    "signature_missing",
    "signature_invalid",
    "cancelled",
]
CommandCode = Literal[
    "unknown_command",
    "bad_arguments",
    "busy",
    "expired",
    "retained",
    "timeout",
    "not_found",
    "forbidden",  # switched off in the configuration
    "unsigned",  # only signed commands are carried out here, and this one is not, or by somebody else
    "interrupted",  # the agent ended while it did this
    "cancelled",
]


class EdgeAgentError(Exception):
    """Root of the errors that the agent knows by name. The text says what to do about it."""

    code: str = "error"


class ConfigError(EdgeAgentError):
    """The configuration cannot be used; `problems` holds one sentence for each thing wrong, `usable` the
    part of it that could be read, if any."""

    code = "config"

    def __init__(self, *problems: str, usable: Any = None) -> None:
        super().__init__("\n".join(problems))
        self.problems: Sequence[str] = problems
        self.usable = usable


class SourceError(EdgeAgentError):
    """A camera cannot deliver; the agent backs off and tries again."""

    code = "source"

    def __init__(self, message: str, *, reason: SourceReason = "error") -> None:
        super().__init__(message)
        self.reason = reason


class EndOfStream(SourceError):
    """A source that ends (a file that does not loop) has ended; there is nothing to retry."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason="end_of_stream")


class ModelError(EdgeAgentError):
    """A model cannot be used; the one that runs goes on running."""

    code: ModelCode

    def __init__(self, message: str, *, code: ModelCode = "model_rejected") -> None:
        super().__init__(message)
        self.code = code


class EngineError(EdgeAgentError):
    """An engine that worked has failed in use."""

    code = "engine"


class NotFinite(EngineError):
    """A model's outputs hold NaN."""

    code = "model_not_finite"


class CudaError(EngineError):
    """A CUDA call failed: `number` and `name` are CUDA's own, such as 2, CUDA_ERROR_OUT_OF_MEMORY."""

    code = "cuda"

    def __init__(self, call: str, number: int, name: str, text: str) -> None:
        super().__init__(f"{call}: {name} ({number}): {text}")
        self.number = number
        self.name = name


class GpuOutOfMemory(CudaError):
    """The GPU has no memory left for this; what it holds already goes on working."""

    code = "gpu_out_of_memory"


class GpuLost(CudaError):
    """A fault after which nothing in this process can use the GPU any more: its context is dead, and only a new
    process gets another."""

    code = "gpu_lost"


class GpuUnavailable(EdgeAgentError):
    """There is no GPU here that can be used; the text says why, and what to do."""

    code = "gpu_unavailable"


class CommandError(EdgeAgentError):
    """A command cannot be carried out; the sentence goes into its reply."""

    def __init__(self, message: str, *, code: CommandCode) -> None:
        super().__init__(message)
        self.code = code
