"""How processes of the service log: one JSON object a line on stderr, UTC, structlog. What to log is each caller's choice.

Never log row text, prompts, answers or anything else that a dataset holds.
"""

from __future__ import annotations

import logging
import sys

import structlog


def configure_logs() -> None:
    """Set up structlog for this process, and the lines of libraries in its form; on a terminal they are for people."""
    # Tracebacks without the values of variables: those may be rows.
    if sys.stderr.isatty():
        render: list[structlog.types.Processor] = [
            structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        ]
    else:
        transform = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        render = [structlog.processors.ExceptionRenderer(transform), structlog.processors.JSONRenderer()]
    common: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*common, *render],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    strip = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processors=[strip, *render], foreign_pre_chain=common))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # It writes bytes of the body that it cannot parse, and the answer says what is wrong.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
