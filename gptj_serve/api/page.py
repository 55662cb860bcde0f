"""The page at `/`: one HTML file, sent with a policy that lets it run what is written in it and nothing else."""

import base64
import functools
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter, Response

router = APIRouter()


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """Needs no key: it asks for one itself when the service answers 401."""
    html = _html()
    headers = {
        "Content-Security-Policy": _policy(html),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(html, media_type="text/html", headers=headers)


@functools.cache
def _html() -> bytes:
    return (files("gptj_serve.api") / "page.html").read_bytes()


@functools.cache
def _policy(html: bytes) -> str:
    """Hashes stand for the inline script and style; the icon is a data URL; all calls go to this service."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hashes(html, b'script')}",
            f"style-src {_hashes(html, b'style')}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _hashes(html: bytes, tag: bytes) -> str:
    contents = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), html, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in contents)
