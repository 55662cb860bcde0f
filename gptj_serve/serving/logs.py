"""Our log lines in Serve's log."""

import logging


def use_serve_logging() -> None:
    """Send what this package logs, from INFO up, through the handlers that Serve gives a replica."""
    ours = logging.getLogger("gptj_serve")
    ours.parent = logging.getLogger("ray.serve")
    ours.setLevel(logging.INFO)
