"""A run of guidellm's command, and what its report says: `guidellm_run.py URL CHECKPOINT REQUEST_FORMAT`."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    url, checkpoint, request_format = sys.argv[1:]
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        command = [
            *(sys.executable, "-I", "-m", "guidellm", "run", "--disable-console"),
            *("--backend", f"kind=openai_http,target={url},model=gptj-demo,request_format={request_format}"),
            *("--profile", "kind=concurrent,streams=4"),
            *("--constraint", "kind=max_requests,count=24"),
            *("--tokenizer", f"kind=hf_auto,model={checkpoint}"),
            *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"),
            *("--output", f"kind=json,path={report}"),
        ]
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=directory)
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
    print(json.dumps({"requests": benchmark["requests"], "metrics": benchmark["metrics"]}))


main()
