"""API keys: who gets in, how keys are changed while the service runs, and that no key is ever shown."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import FakeEngine
from fastapi import FastAPI

from gptj_serve.api.door.api_keys import ApiKey, KeyFile, keys_of_environment, read_keys
from gptj_serve.api.door.key_ring import KeyRing, matching
from gptj_serve.errors import ConfigError

WEB, BATCH, OTHER = "web-secret-0001", "batch-secret-0002", "other-secret-0003"
GENERATE = {"inputs": "The fox", "parameters": {"max_new_tokens": 2}}
COMPLETE = {"model": "tiny", "prompt": "The fox", "max_tokens": 2}
VARIABLE = "GPTJ_SERVE_API_KEYS"

CLOSED = [
    ("POST", "/generate", GENERATE),
    ("POST", "/generate_stream", GENERATE),
    ("POST", "/classify", {"inputs": "a"}),
    ("POST", "/v1/completions", COMPLETE),
    ("GET", "/v1/models", None),
    ("GET", "/status", None),
    ("GET", "/nowhere", None),
    ("GET", "/health/", None),
]


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys:\n  - name: web\n    key: {WEB}\n  - {{name: batch, sha256: {_sha256(BATCH)}}}\n")
    return path


@pytest.fixture
def client(
    key_file: Path, app_with: Callable[..., FastAPI], client_of: Callable[[FastAPI], httpx.AsyncClient]
) -> httpx.AsyncClient:
    return client_of(app_with(api_keys_file=str(key_file)))


@pytest.mark.parametrize(("method", "path", "body"), CLOSED)
@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "an API key is needed: Authorization: Bearer <key>, or X-API-Key: <key>"),
        ({"Authorization": f"Basic {WEB}"}, "an API key is needed: Authorization: Bearer <key>, or X-API-Key: <key>"),
        ({"Authorization": WEB}, "an API key is needed: Authorization: Bearer <key>, or X-API-Key: <key>"),
        ({"Authorization": "Bearer "}, "an API key is needed: Authorization: Bearer <key>, or X-API-Key: <key>"),
        ({"Authorization": f"Bearer {OTHER}"}, "the API key is not valid"),
        ({"Authorization": f"Bearer {WEB}x"}, "the API key is not valid"),
        ({"Authorization": f"Bearer {WEB.upper()}"}, "the API key is not valid"),
        ({"Authorization": f"Bearer {_sha256(BATCH)}"}, "the API key is not valid"),
        ({"X-API-Key": OTHER}, "the API key is not valid"),
        ({"X-API-Key": OTHER, "Authorization": f"Bearer {WEB}"}, "the API key is not valid"),
    ],
)
async def test_without_a_valid_key_nothing_is_done(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    method: str,
    path: str,
    body: Any,
    headers: dict[str, str],
    message: str,
) -> None:
    response = await client.request(method, path, json=body, headers=headers)
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    openai = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
    hugging_face = {"error": message, "error_type": "authentication"}
    assert response.json() == ({"error": openai} if path.startswith("/v1/") else hugging_face)
    assert engine.requests == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {WEB}"},
        {"authorization": f"bearer   {BATCH}"},
        {"X-API-Key": BATCH},
        {"X-API-Key": WEB, "Authorization": "Basic dXNlcjpwYXNz"},
    ],
)
async def test_a_valid_key_opens_all_routes(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    for method, path, body in CLOSED:
        expected = {"/nowhere": 404, "/health/": 307}.get(path, 200)
        assert (await client.request(method, path, json=body, headers=headers)).status_code == expected


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/docs", "/openapi.json"])
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
async def test_probes_and_documentation_need_no_key(
    client: httpx.AsyncClient, path: str, headers: dict[str, str]
) -> None:
    assert (await client.get(path, headers=headers)).status_code == 200


async def test_the_page_needs_no_key(client: httpx.AsyncClient) -> None:
    assert (await client.get("/")).status_code != 401


async def test_a_prefix_that_the_service_is_mounted_at(key_file: Path, app_with: Callable[..., FastAPI]) -> None:
    transport = httpx.ASGITransport(app_with(api_keys_file=str(key_file)), root_path="/gptj")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/gptj/health")).status_code == 200
        assert (await client.get("/gptj/status")).status_code == 401
        assert (await client.get("/gptjx/health")).status_code == 401


async def test_without_keys_the_service_is_open_whatever_a_client_sends(
    app_with: Callable[..., FastAPI], client_of: Callable[[FastAPI], httpx.AsyncClient]
) -> None:
    client = client_of(app_with())
    for headers in ({}, {"Authorization": "Bearer none"}, {"X-API-Key": ""}):
        assert (await client.post("/generate", json=GENERATE, headers=headers)).status_code == 200


async def test_keys_of_file_and_environment_are_both_valid(
    key_file: Path,
    app_with: Callable[..., FastAPI],
    client_of: Callable[[FastAPI], httpx.AsyncClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, f"ops={OTHER}, plain-secret-4")
    client = client_of(app_with(api_keys_file=str(key_file)))
    for key, status in ((WEB, 200), (OTHER, 200), ("plain-secret-4", 200), ("plain-secret-5", 401)):
        assert (await client.get("/status", headers={"X-API-Key": key})).status_code == status


# ── comparing ────────────────────────────────────────────────────────────────────────────────────────────


class _WatchedKey:
    def __init__(self, key: str, looked_at: list[str]) -> None:
        self._key = key
        self._looked_at = looked_at

    @property
    def digest(self) -> bytes:
        self._looked_at.append(self._key)
        return hashlib.sha256(self._key.encode()).digest()


@pytest.mark.parametrize("presented", [WEB, BATCH, OTHER, "none of them"])
def test_every_key_is_compared_whichever_it_is(presented: str) -> None:
    looked_at: list[str] = []
    keys: Any = [_WatchedKey(key, looked_at) for key in (WEB, BATCH, OTHER)]
    found = matching(presented.encode(), keys)
    assert looked_at == [WEB, BATCH, OTHER]
    assert (None if found is None else found._key) == (presented if presented in looked_at else None)


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_in_yaml_and_in_json(tmp_path: Path) -> None:
    entries = [
        {"name": "web", "key": WEB, "max_concurrent_requests": 4, "max_tokens_per_minute": 6000},
        {"name": "batch", "sha256": _sha256(BATCH).upper()},
    ]
    expected = [
        ApiKey("web", hashlib.sha256(WEB.encode()).digest(), 4, 6000),
        ApiKey("batch", hashlib.sha256(BATCH.encode()).digest(), None, None),
    ]
    for name in ("keys.json", "keys.yaml", "keys"):
        (tmp_path / name).write_text(json.dumps({"keys": entries}, indent=1))
        assert read_keys(tmp_path / name) == expected
    (tmp_path / "tabs.json").write_text(json.dumps({"keys": entries}, indent="\t"))
    assert read_keys(tmp_path / "tabs.json") == expected


SECRET = "do-not-show-this-0000"
NOT_A_KEY = "a key is 8 to 512 printable ASCII characters without blanks"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file: Input should be"),
        (SECRET, "the file: Input should be"),
        (f"- {SECRET}", "the file: Input should be"),
        ("keys: []", "keys: List should have at least 1 item"),
        ("keys:", "keys: Input should be a valid list"),
        (f"keys: {{web: {SECRET}}}", "keys: Input should be a valid list"),
        (f"keys: [{SECRET}]", "keys.0: Input should be"),
        (f"keys: [{{name: web, key: {SECRET}}}]\n{SECRET}: 1", "the file: a field that is none of keys"),
        (
            f"keys: [{{name: web, key: {SECRET}, {SECRET}: 1}}]",
            "keys.0: a field that is none of name, key, sha256, max",
        ),
        ("keys: [{name: web}]", "keys.0: needs either key or sha256"),
        (f"keys: [{{name: web, key: {SECRET}, sha256: {'a' * 64}}}]", "keys.0: needs either key or sha256"),
        (f"keys: [{{key: {SECRET}}}]", "keys.0.name: Field required"),
        (f"keys: [{{name: 'a b', key: {SECRET}}}]", "keys.0.name: String should match pattern"),
        (f"keys: [{{name: web, key: '{SECRET} x'}}]", f"keys.0: key: {NOT_A_KEY}"),
        (f"keys: [{{name: web, key: '{SECRET}é'}}]", f"keys.0: key: {NOT_A_KEY}"),
        ("keys: [{name: web, key: short}]", f"keys.0: key: {NOT_A_KEY}"),
        ("keys: [{name: web, key: 1234567890}]", "keys.0.key: Input should be a valid string"),
        (f"keys: [{{name: web, sha256: {SECRET}}}]", "keys.0.sha256: String should match pattern"),
        (
            f"keys: [{{name: web, key: {SECRET}, max_concurrent_requests: 0}}]",
            "keys.0.max_concurrent_requests: Input should be greater than 0",
        ),
        (
            f"keys: [{{name: web, key: {SECRET}, max_tokens_per_minute: '5'}}]",
            "keys.0.max_tokens_per_minute: Input should be a valid integer",
        ),
        (f"keys:\n  - *{SECRET}", "line 2: not valid YAML"),
        (f"keys: [{SECRET}", "line "),
        (f"keys: !!python/name:{SECRET} a", "line "),
        ("keys: [2024-99-99]", "not valid YAML"),
        (f"keys: [{{name: web, key: {SECRET}}}, {{name: web, key: {SECRET}1}}]", "two API keys have the name 'web'"),
        (f"keys: [{{name: a, key: {SECRET}}}, {{name: b, key: {SECRET}}}]", "'a' and 'b' are the same key"),
    ],
)
def test_an_invalid_file_refuses_to_start_and_shows_no_key(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        KeyRing(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_invalid_json_and_what_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(f'{{"keys":\n {SECRET}')
    with pytest.raises(ConfigError, match=r"keys\.json: line 2: not valid JSON$"):
        read_keys(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"is not UTF-8$"):
        read_keys(path)
    with pytest.raises(ConfigError, match=r"can't be read: No such file or directory$"):
        read_keys(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"can't be read: Is a directory$"):
        read_keys(tmp_path)


def test_the_application_does_not_start_with_an_invalid_file(tmp_path: Path, app_with: Callable[..., FastAPI]) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        app_with(api_keys_file=str(tmp_path / "nowhere"))


def test_no_repr_shows_a_key(key_file: Path) -> None:
    parsed = KeyFile.model_validate({"keys": [{"name": "a", "key": WEB}, {"name": "b", "sha256": _sha256(BATCH)}]})
    shown = f"{parsed!r} {parsed} {read_keys(key_file)!r} {vars(KeyRing(key_file))!r}"
    digest = hashlib.sha256(WEB.encode()).digest()
    for secret in (WEB, BATCH, _sha256(BATCH), digest.hex(), repr(digest)):
        assert secret not in shown
    assert "'batch'" in shown


# ── the environment ──────────────────────────────────────────────────────────────────────────────────────


def test_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert keys_of_environment() == []
    monkeypatch.setenv(VARIABLE, f" web={WEB} ,{BATCH},ops=with=equals=signs==")
    assert keys_of_environment() == [
        ApiKey("web", hashlib.sha256(WEB.encode()).digest()),
        ApiKey("key-2", hashlib.sha256(BATCH.encode()).digest()),
        ApiKey("ops", hashlib.sha256(b"with=equals=signs==").digest()),
    ]


@pytest.mark.parametrize(
    ("value", "number"),
    [("", 1), (f"{WEB},", 2), ("short", 1), (f"a b={WEB}", 1), (f"{WEB},web=", 2), (f"{WEB}==", 1), (f"{WEB} x", 1)],
)
def test_an_invalid_variable_refuses_to_start(monkeypatch: pytest.MonkeyPatch, value: str, number: int) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ConfigError, match=rf"^GPTJ_SERVE_API_KEYS: entry {number} is not usable") as caught:
        KeyRing(None)
    assert WEB not in str(caught.value)


def test_a_name_in_both_places_is_refused(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"web={OTHER}")
    with pytest.raises(ConfigError, match=r"keys\.yaml: two API keys have the name 'web'"):
        KeyRing(key_file)


# ── rotation ─────────────────────────────────────────────────────────────────────────────────────────────


class _Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def _file_of(*keys: str) -> str:
    return json.dumps({"keys": [{"name": key, "key": key} for key in keys]})


def _names(ring: KeyRing) -> list[str]:
    return [key.name for key in ring.current()]


def test_a_changed_file_is_seen_within_a_second(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gptj_serve")
    path, clock = tmp_path / "keys", _Clock()
    path.write_text(_file_of(WEB))
    ring = KeyRing(path, clock=clock)
    path.write_text(_file_of(WEB, BATCH))
    clock.now_s += 0.99
    assert _names(ring) == [WEB]
    clock.now_s += 0.01
    assert _names(ring) == [WEB, BATCH]
    (tmp_path / "new").write_text(_file_of(OTHER, BATCH))  # replaced, as `mv` does, by one of the same size
    os.utime(tmp_path / "new", ns=(0, path.stat().st_mtime_ns))
    (tmp_path / "new").rename(path)
    clock.now_s += 1
    assert _names(ring) == [OTHER, BATCH]
    assert [record.getMessage() for record in caplog.records] == [f"2 API keys from {path}"] * 2


def test_a_file_that_is_not_changed_is_not_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gptj_serve")
    path, clock = tmp_path / "keys", _Clock()
    path.write_text(_file_of(WEB))
    ring = KeyRing(path, clock=clock)
    keys = ring.current()
    clock.now_s += 5
    assert ring.current() is keys
    assert caplog.records == []


def test_the_symlinks_of_a_kubernetes_secret(tmp_path: Path) -> None:
    """keys → ..data/keys, ..data → a directory per version, swapped by a rename."""
    clock = _Clock()
    for version, key in (("..v1", WEB), ("..v2", OTHER)):
        (tmp_path / version).mkdir()
        (tmp_path / version / "keys").write_text(_file_of(key))
        os.utime(tmp_path / version / "keys", (0, 0))
    (tmp_path / "..data").symlink_to("..v1")
    (tmp_path / "keys").symlink_to("..data/keys")
    ring = KeyRing(tmp_path / "keys", clock=clock)
    assert _names(ring) == [WEB]
    (tmp_path / "..data_tmp").symlink_to("..v2")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    clock.now_s += 1
    assert _names(ring) == [OTHER]


def test_a_file_that_becomes_invalid_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gptj_serve")
    path, clock = tmp_path / "keys", _Clock()
    path.write_text(_file_of(WEB))
    ring = KeyRing(path, clock=clock)
    path.write_text(f"keys: [{SECRET}")
    for _ in range(3):
        clock.now_s += 1
        assert _names(ring) == [WEB]
    path.unlink()
    for _ in range(3):
        clock.now_s += 1
        assert _names(ring) == [WEB]
    path.write_text(_file_of(BATCH))
    clock.now_s += 1
    assert _names(ring) == [BATCH]
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", f"the API keys stay as they were: {path}: line 2: not valid YAML"),
        ("ERROR", f"the API keys stay as they were: {path}: can't be read: No such file or directory"),
        ("INFO", f"1 API keys from {path}"),
    ]
    assert SECRET not in caplog.text
    assert all(record.exc_info is None for record in caplog.records)


async def test_keys_change_while_the_service_runs(
    key_file: Path, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptj_serve.api.door.key_ring.REREAD_PERIOD_S", 0.0)
    assert (await client.get("/status", headers={"X-API-Key": WEB})).status_code == 200
    key_file.write_text(_file_of(OTHER))
    assert (await client.get("/status", headers={"X-API-Key": WEB})).status_code == 401
    assert (await client.get("/status", headers={"X-API-Key": OTHER})).status_code == 200


async def test_no_log_line_has_a_key(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for key in (WEB, OTHER):
        await client.post("/generate", json=GENERATE, headers={"Authorization": f"Bearer {key}"})
        assert key not in "".join(record.getMessage() for record in caplog.records if "httpx" not in record.name)
