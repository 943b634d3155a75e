"""Logs are events: a dotted name and its facts, coloured on a terminal, JSON lines elsewhere."""

from __future__ import annotations

import logging
import sys
from typing import Literal, TextIO

import structlog

Level = Literal["debug", "info", "warning", "error"]


def configure(
    *, level: Level = "info", format: Literal["auto", "console", "json"] = "auto", stream: TextIO | None = None
) -> None:
    """Send structlog's events, and the warnings of libraries that use `logging`, to `stream`, else to stdout."""
    stream = stream or sys.stdout
    number = getattr(logging, level.upper())
    console = format == "console" or (format == "auto" and stream.isatty())
    final: structlog.typing.Processor
    if console:
        stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False)
        final = structlog.dev.ConsoleRenderer(
            colors=stream.isatty(),
            pad_event_to=28,
            exception_formatter=structlog.dev.plain_traceback,  # the rich one shows local variables: passwords
        )
    else:
        stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
        final = structlog.processors.JSONRenderer()
    shared: list[structlog.typing.Processor] = [structlog.processors.add_log_level, stamp]
    if not console:
        shared.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*shared, final],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    foreign = logging.StreamHandler(stream)
    foreign.setFormatter(structlog.stdlib.ProcessorFormatter(processor=final, foreign_pre_chain=shared))
    logging.basicConfig(handlers=[foreign], level=logging.WARNING, force=True)
    for noisy in ("amqtt", "transitions", "mqtt"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
