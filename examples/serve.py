"""Serve a fine-tuned adapter beside its base model with vLLM, unmerged, and ask both over HTTP.

    make serve                                   # the adapter of examples/minimal.py, in vLLM's own environment
    python examples/serve.py BASE ADAPTER        # in an environment with vLLM and smoa-kernels

BASE is a model's folder or its name on the hub, ADAPTER the folder that `save_pretrained` wrote: SMoA, HiRA or LoRA.
"""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

URL = "http://127.0.0.1:8765"
QUESTIONS = [
    ("colours", "Q: Which colour has snow?\nA:"),
    ("colours", "Q: Which colour has coal?\nA:"),
    ("base", "Q: Which colour has snow?\nA:"),
]


def on_a_cpu() -> dict[str, str]:
    """Variables for vLLM's CPU build: its OpenMP is loaded first; memory for the KV cache in GiB."""
    openmp = Path(sys.prefix, "lib", "libiomp5.so")
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {**variables, "LD_PRELOAD": str(openmp)} if openmp.exists() else {}


@contextmanager
def server(base: str, adapters: dict[str, str], options: str = "--max-lora-rank 16") -> Iterator[None]:
    """Run the server of `vllm serve` (vllm-cpu lacks that command), wait until it answers, and stop it in the end.

    Raises:
        RuntimeError: it ended before it answered; its output is on stderr.
    """
    options += " --served-model-name base --enable-lora --max-model-len 512 --dtype float32 --enforce-eager"
    options += f" --port {URL.rpartition(':')[2]} --lora-modules"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base, *options.split()]
    command += [f"{name}={folder}" for name, folder in adapters.items()]
    process = subprocess.Popen(command, env={**on_a_cpu(), **os.environ})
    try:
        while not answers():
            if process.poll() is not None:
                raise RuntimeError(f"vllm serve ended with exit code {process.returncode}")
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


def answers() -> bool:
    """Whether the server is ready for requests."""
    try:
        with urllib.request.urlopen(f"{URL}/health", timeout=5):
            return True
    except OSError:
        return False


def post(path: str, **body: object) -> str:
    """The server's answer to one request."""
    request = urllib.request.Request(
        f"{URL}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return str(response.read(), "utf-8")


def ask(model: str, prompt: str) -> str:
    """Three tokens of the base, or of an adapter by its name."""
    text = post("/v1/completions", model=model, prompt=prompt, max_tokens=3, temperature=0, stop="\n")
    return str(json.loads(text)["choices"][0]["text"]).strip()


def main(base: str, adapter: str) -> None:
    """Ask all questions at once, so that one step of the model answers them together."""
    with server(base, {"colours": adapter}), ThreadPoolExecutor(len(QUESTIONS)) as pool:
        for (model, prompt), text in zip(
            QUESTIONS, pool.map(lambda each: ask(*each), QUESTIONS), strict=True
        ):
            print(f"{model:8} {prompt.splitlines()[0]:32} {text}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
