"""The page at `/` as it is sent: one file that needs nothing else, under a policy that allows nothing else."""

import base64
import hashlib
import re

import httpx
from fastapi import FastAPI


async def test_the_page_is_sent_as_it_is(client: httpx.AsyncClient) -> None:
    response = await client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.text.startswith("<!doctype html>")


async def test_the_policy_allows_the_inline_script_and_style_alone(client: httpx.AsyncClient) -> None:
    response = await client.get("/")
    directives = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert directives.pop("script-src") == hash_of(response.content, b"script")
    assert directives.pop("style-src") == hash_of(response.content, b"style")
    assert directives == {
        "default-src": "'none'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


def hash_of(html: bytes, tag: bytes) -> str:
    """Of the only element of its kind: its text as a browser hashes it."""
    (start,) = re.finditer(rb"<%b[^>]*>" % tag, html)
    text = html[start.end() : html.index(b"</%b>" % tag)]
    assert b"\r" not in text
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"


async def test_the_page_refers_to_nothing_outside(client: httpx.AsyncClient) -> None:
    html = (await client.get("/")).text
    addresses = set(re.findall(r"https?://[^\s'\"<>]+", html))
    assert addresses == {"http://www.w3.org/2000/svg"}, "that one is a name, not a place"
    assert set(re.findall(r"<link[^>]*>", html)) == set(re.findall(r'<link rel="icon" href="data:[^>]*>', html))
    assert re.findall(r'\s(?:style|on\w+)="', html) == [], "the policy forbids them"


def test_the_page_is_no_part_of_the_documented_interface(app: FastAPI) -> None:
    assert "/" not in app.openapi()["paths"]
