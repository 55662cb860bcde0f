"""Virtual environments for client libraries that do not fit into one resolution, made once and kept.

They stand in `$GPTJ_SERVE_CLIENT_ENVIRONMENTS`, by default `~/.cache/gptj_serve/clients`. A library's packages come
first there, those of the running environment behind them: so torch is not installed a second time.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent / "scripts"

REQUIREMENTS = {
    "langchain": ["langchain-openai==1.7.4"],
    "litellm": ["litellm==1.110.2"],
    "lm_eval": ["lm-eval[api,hf]==0.4.13"],
    "guidellm": ["guidellm==0.8.1"],
}

NO_NETWORK = {
    "HF_HUB_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "HTTP_PROXY": "http://127.0.0.1:9",  # nothing listens there: what is not for this machine fails
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "NO_PROXY": "127.0.0.1",
}


def run(library: str, script: str, *args: str, timeout_s: float = 300, **variables: str) -> Any:
    """What `scripts/<script>` prints as JSON on its last line, run where `library` is installed."""
    completed = subprocess.run(
        [environment(library), "-I", SCRIPTS / script, *args],
        env=os.environ | NO_NETWORK | variables,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert completed.returncode == 0, f"{script}:\n{completed.stdout[-2000:]}\n{completed.stderr[-6000:]}"
    return json.loads(completed.stdout.splitlines()[-1])


def environment(library: str) -> Path:
    """The Python of the library's environment, which is made if it is not there."""
    directory = _cache() / f"{library}-{_fingerprint(library)}"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        python = directory / "bin" / "python"
        is_complete = directory / "complete"
        if not is_complete.exists():
            venv.create(directory, with_pip=True, symlinks=True)
        own = Path(sysconfig.get_path("purelib", vars={"base": str(directory)}))
        (own / "running_environment.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        if not is_complete.exists():
            subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS[library]], check=True)
            is_complete.touch()
    return python


def _cache() -> Path:
    default = Path.home() / ".cache" / "gptj_serve" / "clients"
    return Path(os.environ.get("GPTJ_SERVE_CLIENT_ENVIRONMENTS", default))


def _fingerprint(library: str) -> str:
    """Of all that decides what pip installs: another running environment may lack what this one has."""
    installed = sorted(f"{package.name}=={package.version}" for package in importlib.metadata.distributions())
    key = json.dumps([sys.version, REQUIREMENTS[library], installed])
    return hashlib.sha256(key.encode()).hexdigest()[:12]
