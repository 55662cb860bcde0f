"""The environment variables that the package reads, all of them."""

import os

API_KEYS = "GPTJ_SERVE_API_KEYS"  # that a service accepts
API_KEY = "GPTJ_SERVE_API_KEY"  # that `gptj-serve status` presents; its option reads it


def api_keys() -> str | None:
    """`name=key` or plain keys, parted by commas; None if there is no such variable."""
    return os.environ.get(API_KEYS)
