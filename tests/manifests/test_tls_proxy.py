"""cluster/nginx: TLS in front of the service, by a real nginx with a certificate of its own."""

import json
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from tests.manifests.deployed import PORT
from tests.serving.service import ROOT, ServeRun

pytestmark = [pytest.mark.manifests, pytest.mark.timeout(240)]

HTTP_PORT, TLS_PORT, UPSTREAM_PORT = 18080, 18443, 18000
URL = f"https://localhost:{TLS_PORT}"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Certificate and key, for localhost."""
    directory = tmp_path_factory.mktemp("certificate")
    certificate, key = directory / "service.pem", directory / "service.key"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", key, "-out", certificate]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *files]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return certificate, key


@contextmanager
def nginx(directory: Path, certificate: tuple[Path, Path], upstream_port: int) -> Iterator[httpx.Client]:
    """The file as it is, but for its ports and where the certificate lies; a client that trusts that."""
    site = (ROOT / "cluster" / "nginx" / "gptj-serve.conf").read_text()
    for written, meant in {
        "server 127.0.0.1:8000;": f"server 127.0.0.1:{upstream_port};",
        "listen 80;": f"listen 127.0.0.1:{HTTP_PORT};",
        "listen 443 ssl": f"listen 127.0.0.1:{TLS_PORT} ssl",
        "/etc/ssl/service.pem": str(certificate[0]),
        "/etc/ssl/service.key": str(certificate[1]),
    }.items():
        assert site.count(written) == 1, written
        site = site.replace(written, meant)
    (directory / "site.conf").write_text(site)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    main = [
        *["user root;"] * (os.geteuid() == 0),  # else it becomes nobody, who may not write here
        f"pid {directory}/nginx.pid;",
        "events {}",
        "http {",
        *(f"{kind}_temp_path {directory}/{kind};" for kind in kinds),
        f"access_log off; include {directory}/site.conf;",
        "}",
    ]
    (directory / "nginx.conf").write_text("\n".join(main))
    log = directory / "error.log"
    command = ["nginx", "-p", directory, "-c", directory / "nginx.conf", "-e", log]
    check = subprocess.run([*command, "-t"], capture_output=True, text=True, timeout=30)
    assert check.returncode == 0, check.stderr
    assert "warn" not in check.stderr
    process = subprocess.Popen([*command, "-g", "daemon off;"])
    try:
        await_listener(TLS_PORT)
        with httpx.Client(base_url=URL, verify=ssl.create_default_context(cafile=certificate[0]), timeout=60) as client:
            yield client
    finally:
        process.terminate()
        process.wait(30)


def await_listener(port: int) -> None:
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on port {port}")


class Echo(BaseHTTPRequestHandler):
    """Answers with the headers that it got; `/stream` in two pieces, the second when it is told so."""

    protocol_version = "HTTP/1.1"
    may_go_on = threading.Event()

    def do_GET(self) -> None:
        if self.path == "/stream":
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"8\r\ndata: 1\n\r\n")
            self.wfile.flush()
            assert self.may_go_on.wait(30)
            self.wfile.write(b"8\r\ndata: 2\n\r\n0\r\n\r\n")
            return
        body = json.dumps({name.lower(): value for name, value in self.headers.items()}).encode()
        self.send_response(307 if self.path == "/demo" else 200)
        if self.path == "/demo":
            self.send_header("Location", f"http://{self.headers['Host']}/demo/")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def echo() -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", UPSTREAM_PORT), Echo)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def proxy(tmp_path: Path, certificate: tuple[Path, Path], echo: None) -> Iterator[httpx.Client]:
    with nginx(tmp_path, certificate, UPSTREAM_PORT) as client:
        yield client


def test_a_stream_goes_out_piece_by_piece(proxy: httpx.Client) -> None:
    """The second piece is not made before the first has arrived: a proxy that buffers would wait for ever."""
    Echo.may_go_on.clear()
    with proxy.stream("GET", "/stream") as response:
        pieces = response.iter_raw()
        assert next(pieces) == b"data: 1\n"
        Echo.may_go_on.set()
        assert b"".join(pieces) == b"data: 2\n"


def test_what_clients_may_not_say_is_left_out(proxy: httpx.Client) -> None:
    told = {"X-Priority": "-1000", "X-Request-Disconnect-Disabled": "1", "X-Request-Timeout-Seconds": "9"}
    kept = {"X-Request-Timeout": "5", "Authorization": "Bearer key", "Last-Event-ID": "7", "X-Request-ID": "find-me"}
    got = proxy.get("/", headers=told | kept | {"X-Forwarded-For": "1.2.3.4"}).json()
    assert {name: got.get(name.lower()) for name in kept} == kept
    assert set(got) & {name.lower() for name in told} == set()
    assert got["host"] == f"localhost:{TLS_PORT}"
    assert (got["x-forwarded-proto"], got["x-forwarded-for"]) == ("https", "1.2.3.4, 127.0.0.1")


def test_each_request_has_an_id_that_is_a_plain_word(proxy: httpx.Client) -> None:
    assert len(proxy.get("/").json()["x-request-id"]) == 32
    assert len(proxy.get("/", headers={"X-Request-ID": "two words"}).json()["x-request-id"]) == 32


def test_plain_http_and_redirects_lead_to_tls(proxy: httpx.Client) -> None:
    plain = httpx.get(f"http://localhost:{HTTP_PORT}/docs?x=1")
    assert (plain.status_code, plain.headers["location"]) == (301, "https://localhost/docs?x=1")
    assert proxy.get("/demo").headers["location"] == f"{URL}/demo/"


def test_serves_own_routes_are_not_for_everybody(proxy: httpx.Client) -> None:
    assert proxy.get("/-/routes").status_code == 404


def test_a_service_that_is_not_there_is_an_error_to_try_again(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    with nginx(tmp_path, certificate, upstream_port=1) as client:
        answer = client.post("/generate", json={"inputs": "x"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert answer.json()["error_type"] == "overloaded"
        for path in ("/v1/completions", "/demo/v1/completions"):
            answer = client.post(path, json={"prompt": "x"})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert answer.headers["content-type"] == "application/json"
            assert answer.json()["error"]["type"] == "overloaded_error"


@pytest.mark.serve
def test_the_service_behind_tls(highly_available: ServeRun, tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    with nginx(tmp_path, certificate, PORT) as client:
        assert "<title>gptj_serve" in client.get("/").text
        assert client.get("/ready").json()["is_ready"]
        body = {"inputs": "The President said", "parameters": {"max_new_tokens": 40}}
        with client.stream("POST", "/generate_stream", json=body) as response:
            pieces = list(response.iter_raw())
        assert len(pieces) > 10, "the events came one by one, or a few at a time"
        assert b"".join(pieces).count(b"data:") == 40
        answer = client.post("/generate", json=body, headers={"X-Request-ID": "through-tls"})
        assert answer.headers["x-request-id"] == "through-tls"
        too_large = client.post("/generate", content=b"x" * 1_500_000, headers={"Content-Type": "application/json"})
        assert (too_large.status_code, too_large.json()["error_type"]) == (413, "validation")
