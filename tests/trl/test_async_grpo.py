"""AsyncGRPOTrainer sends adapters to an HTTP server that loads them as our plugin of vLLM does."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests
import torch
import torch.nn.functional as F
from chat_models import PLAIN, QUESTIONS, adapter, load_base, log_probs, tokenizer, twin
from datasets import Dataset
from peft import HiraConfig
from serving.served import save_model
from torch import Tensor, nn
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from smoa_kernels.peft import SMoATrainerMixin
from smoa_kernels.peft.folder import sending
from smoa_kernels.peft.folder.sending import save_adapter
from smoa_kernels.serving.factors import read_served

PYTHON = Path(os.environ.get("VLLM", ".venv-vllm"), "bin", "python").absolute()
SEQUENCE = torch.tensor([1, *range(40, 64)])


@torch.no_grad()
def scored(model: nn.Module) -> Tensor:
    """The log-probabilities of `SEQUENCE`."""
    return log_probs(model, SEQUENCE, torch.ones(len(SEQUENCE), dtype=bool))


class Server(ThreadingHTTPServer):
    """Has vLLM's addresses. A policy is the base with `W0 ∘ (1 + BA)`, of the factors that the plugin reads."""

    def __init__(self, base: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.base, self.paused = base, False
        self.spoil: Callable[[Path], None] = lambda folder: None
        self.policies: dict[str, nn.Module] = {}
        parallel = {"data_parallel_size": 1}
        lora = {"max_lora_rank": 8, "max_loras": 8}
        self.info = {"vllm_config": {"lora_config": lora, "parallel_config": parallel}}

    def load(self, name: str, folder: Path) -> None:
        self.spoil(folder)
        served, model = read_served(folder), load_base(self.base)
        assert served is not None
        for path, factors in served.layers.items():
            weight = model.get_submodule(path).weight
            weight.data = weight.data * (1 + factors.B @ factors.A)
        self.policies[name] = model

    def scores(self, version: int) -> Tensor:
        """The log-probabilities of `SEQUENCE` by one version of the policy."""
        return scored(self.policies[f"trl-policy-v{version}"])


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.answer({"data": [{"max_model_len": 64}], **self.server.info})

    def do_POST(self) -> None:
        given = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        action = self.path.partition("?")[0].rpartition("/")[2]
        try:
            if action == "load_lora_adapter":
                self.server.load(given["lora_name"], Path(given["lora_path"]))
            elif action == "unload_lora_adapter":
                del self.server.policies[given["lora_name"]]
            else:
                self.server.paused = action == "pause"
        except ValueError as error:
            self.answer({"error": str(error)}, 400)
        else:
            self.answer({})

    def answer(self, body: dict[str, Any], status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: Any) -> None:
        pass


class Rollouts:
    """A worker that samples from no policy: each sync brings the same sequence, with the server's scores."""

    def __init__(self, server: Server) -> None:
        self.server, self.rollout_buffer, self.metrics_queue = server, queue.Queue(), queue.Queue()
        self.trainer: Any = None
        self.differences: list[float] = []
        self.scores: list[Tensor] = []

    def update_model_version(self, version: int) -> None:
        assert not self.server.paused
        scores = self.server.scores(version)
        model = twin(self.trainer, load_base(self.server.base), self.trainer.model.peft_config["default"])
        self.differences.append((scores - scored(model)).abs().max().item())
        self.scores.append(scores)
        for advantage in (1.0, -0.5, 0.2) * 3:  # the data loader reads ahead
            tokens = SEQUENCE.numpy()
            self.rollout_buffer.put(
                RolloutSample(
                    prompt=[], completion=[], input_ids=tokens, completion_mask=np.arange(len(tokens)) > 4,
                    old_log_probs=np.concatenate([[0], scores.numpy()]).astype(np.float32),
                    advantage=advantage, model_version=version, group_id=version, metrics={},
                )
            )  # fmt: skip

    def check(self) -> None:
        """Each step trained another policy, and the server answered with it."""
        assert len(self.differences) == PLAIN["max_steps"] + 1
        assert max(self.differences) < 1e-4
        assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(self.scores))

    def start(self) -> None: ...
    def stop(self) -> None: ...

    def check_health(self, stale_after_s: float) -> None:
        raise AssertionError("the trainer waits for more samples than a sync brings")


class Trainer(SMoATrainerMixin, AsyncGRPOTrainer): ...


def attention(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, *_: Any, **given: Any
) -> Tensor:
    """FlashAttention 3's `flash_attn_varlen_func`, which has no build for CPUs."""
    found = []
    for (a, b), (c, d) in zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist()), strict=True):
        own = (side.transpose(0, 1) for side in (q[a:b], k[c:d], v[c:d]))
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        scaled = {"scale": given["softmax_scale"], "enable_gqa": True}
        found.append(F.scaled_dot_product_attention(*own, seen, **scaled))
    return torch.cat(found, 1).transpose(0, 1)


@pytest.fixture
def server(base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    # It asks for a GPU's name.
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: 1.0)
    monkeypatch.setattr(packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=attention))
    made = Server(base)
    thread = Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def made(server: Any, folder: Path, config: Any, **settings: Any) -> Any:
    worker = Rollouts(server)
    worker.trainer = Trainer(
        model=str(server.base),
        args=AsyncGRPOConfig(
            output_dir=str(folder), vllm_server_base_url=f"http://127.0.0.1:{server.server_port}",
            dtype="float32", max_staleness=2, **{**PLAIN, "learning_rate": 5e-2, **settings},
        ),
        train_dataset=Dataset.from_list([{"prompt": q} for q in QUESTIONS]),
        processing_class=tokenizer(),
        peft_config=config,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        rollout_worker=worker,
    )  # fmt: skip
    return worker.trainer


CONFIGS = {
    "smoa": lambda: adapter(init_weights=False, smoa_alpha=2, rank_pattern={"v_proj": 6}),
    "hira": lambda: HiraConfig(r=4, target_modules=["q_proj", "up_proj"], init_weights=False),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_the_policy_that_answers_is_the_one_that_was_trained(
    method: str, server: Server, tmp_path: Path
) -> None:
    trainer = made(server, tmp_path, CONFIGS[method]())
    trainer.train()
    trainer.rollout_worker.check()
    assert len(server.policies) < len(trainer.rollout_worker.scores)  # old ones are unloaded


def test_a_sync_that_fails_stops_with_a_sentence_and_the_old_adapter_serves_on(
    server: Server, tmp_path: Path
) -> None:
    trainer, loads = made(server, tmp_path, CONFIGS["smoa"]()), []

    def spoil(folder: Path) -> None:
        loads.append(folder)
        if len(loads) == 3:
            path = folder / "adapter_model.safetensors"
            path.write_bytes(path.read_bytes()[:-100])

    server.spoil = spoil
    with pytest.raises(RuntimeError, match=r"did not reach vLLM, which goes on with the last .*truncated"):
        trainer.train()
    assert not server.paused
    assert torch.equal(server.scores(2), trainer.rollout_worker.scores[-1])


def test_a_server_with_too_few_ranks_is_named_before_training(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"The adapter has rank 12, .* `--max-lora-rank 16`"):
        made(server, tmp_path, adapter(rank_pattern={"v_proj": 12}))


class VLLM:
    """vLLM's own server with our plugin, which is installed in another environment."""

    port, paused = 8766, False

    def __init__(self, base: Path, python: Path) -> None:
        self.base, self.url = base, f"http://127.0.0.1:{self.port}"
        options = f"--port {self.port} --enable-lora --max-lora-rank 8 --max-loras 6 --max-model-len 64"
        options += " --dtype float32 --enforce-eager"
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", base]
        self.process = subprocess.Popen(
            [*command, *options.split()],
            env={
                **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "LD_PRELOAD": str(python.parents[1] / "lib" / "libiomp5.so"),
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1",
            },
        )  # fmt: skip

    @property
    def server_port(self) -> int:
        """Of a server that answers: the first call waits until it does."""
        while self.process.poll() is None:
            with contextlib.suppress(OSError):
                requests.get(f"{self.url}/health", timeout=5)
                return self.port
            time.sleep(0.5)
        raise RuntimeError(f"vLLM ended with exit code {self.process.returncode}")

    def scores(self, version: int) -> Tensor:
        tokens = SEQUENCE.tolist()
        asked = {"model": f"trl-policy-v{version}", "prompt": tokens, "max_tokens": 1, "prompt_logprobs": 1}
        given = requests.post(f"{self.url}/v1/completions", json=asked, timeout=120).json()
        scores = given["choices"][0]["prompt_logprobs"][1:]
        return torch.tensor([one[str(t)]["logprob"] for one, t in zip(scores, tokens[1:], strict=True)])


@pytest.mark.slow
@pytest.mark.usefixtures("server")  # for what it replaces in TRL
@pytest.mark.skipif(not PYTHON.exists(), reason="needs vLLM in an environment of its own: make test-vllm")
def test_vllm_answers_with_the_policy_that_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's trainer here, vLLM there. A sync that fails leaves the last policy, and does not leave vLLM paused."""
    vllm = VLLM(save_model(tmp_path / "base"), PYTHON)
    try:
        config = adapter(init_weights=False, target_modules="all-linear")
        trainer = made(vllm, tmp_path / "run", config)
        trainer.train()
        trainer.rollout_worker.check()

        def torn(*given: Any) -> None:
            save_adapter(*given)
            path = Path(given[-1], "adapter_model.safetensors")
            path.write_bytes(path.read_bytes()[:-100])

        monkeypatch.setattr(sending, "save_adapter", torn)
        with pytest.raises(RuntimeError, match=r"vLLM, which goes on with the last .*truncated"):
            trainer._sync_weight()
        assert torch.equal(vllm.scores(5), trainer.rollout_worker.scores[-1])
    finally:
        vllm.process.terminate()
        vllm.process.wait(60)


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["lm_head"]}, {"bias": "smoa_only"}, {"target_modules": "all-linear"}]
)
def test_an_adapter_that_no_engine_holds_is_merged(
    settings: dict[str, Any], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TRL merges such adapters of LoRA's; naming all linear layers is no reason to."""
    monkeypatch.setattr(async_grpo_trainer, "WeightTransferClient", lambda **_: None)  # needs vLLM
    assert made(server, tmp_path, adapter(**settings))._lora_sync is ("target_modules" in settings)
