"""Logging of the cloud's processes: one line for each event, to standard error."""

import logging
import sys

import structlog


def configure(level: str) -> None:
    """Makes every logger write "time level logger event key=value"; call once, when a process starts."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "logger", "event"]),
            ],
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    for library in ("alembic", "tuf", "urllib3"):  # their notices are about their insides
        logging.getLogger(library).setLevel(logging.WARNING)
