"""A fault on a GPU ends the process, as CUDA requires; another process continues from saved state.

CUDA repeats the error at every later call, even at a copy of an intact tensor to the host. So nothing on the GPU can
be checked, and "the same step gives the same bits" (tests/test_faults.py) can hold only in the next process.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.version.hip is not None,
        reason="needs a CUDA device: there alone does a process outlive such a fault, and can say so",
    ),
]

PROGRAM = """
import hashlib, os, sys, torch
from smoa_kernels import FusedSMoALinear
place, breaks, device = sys.argv[1], sys.argv[2] == "breaks", sys.argv[3]
torch.manual_seed(0)
layer = FusedSMoALinear(256, 192, r=8, num_blocks=4, dropout=0.1, backend="triton", device=device)
if breaks:
    layer.smoa_B.data.normal_(0, 0.1)
    torch.save(layer.state_dict(), place)
else:
    layer.load_state_dict(torch.load(place))

def step():
    layer.zero_grad()
    torch.manual_seed(1)
    x = torch.randn(64, 256, device=device, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    found = [t.detach().cpu() for t in (y, x.grad, layer.smoa_A.grad, layer.smoa_B.grad)]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in found)).hexdigest()

print(step())
if breaks:
    sound = layer.smoa_col_index
    layer.smoa_col_index = sound.clone()
    layer.smoa_col_index[7] = 2**42  # `gather_columns` reads there, where this process has no memory
    for index in (layer.smoa_col_index, sound):
        layer.smoa_col_index = index
        try:
            step()
        except RuntimeError as error:
            print("illegal memory access" in str(error))
print("end", flush=True)
os._exit(0)  # what is torn down at the end of a process meets the error once more
"""


def run(*arguments: object) -> list[str]:
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments), "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_after_an_illegal_address_a_new_process_gives_the_same_bits(tmp_path: Path) -> None:
    digest, *lost = run(tmp_path / "state.pt", "breaks")
    assert lost == ["True", "True", "end"]  # the step with the broken index, and the intact step after it
    assert run(tmp_path / "state.pt", "goes on") == [digest, "end"]
