"""The folder that a run leaves behind: ``adapter/``, ``summary.json``, ``loss.png``, and ``checkpoints/`` if asked."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError


class RunFolder:
    """The output of a fine-tuning run.

    Everything is written beside its place and then renamed: whenever the process dies, there is the old one or the
    new one, whole. The adapter of an earlier run is kept as ``adapter.previous``. No file system puts one folder in
    another's place in one step: where a kill came between two, :meth:`recover` takes the rest of them.

    Args:
        path: a folder that is new, empty, or an earlier run's.

    Raises:
        ValueError: if ``path`` holds other things, or cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / "adapter"
        self.previous_adapter = path / "adapter.previous"
        self._unfinished_adapter = path / "adapter.partial"
        self._new_adapter = path / "adapter.new"  # whole, and not yet in its place
        self.summary = path / "summary.json"
        self.picture = path / "loss.png"
        self.checkpoints = path / "checkpoints"
        self.adapter_saved = False
        existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise ValueError(f"{existing} is not a folder that can be written")
        ours = (
            self._new_adapter
            / "adapter_config.json",  # first: another process may be moving it to the next one
            self.adapter / "adapter_config.json",
            self.previous_adapter / "adapter_config.json",
            self.summary,
        )
        folders = (self.checkpoints, self._unfinished_adapter)
        is_ours = any(file.is_file() for file in ours) or any(folder.is_dir() for folder in folders)
        if path.is_dir() and any(path.iterdir()) and not is_ours:
            raise ValueError(
                f"{path} holds other files; name a folder that is new, empty or an earlier run's"
            )

    def recover(self) -> None:
        """Put an adapter in its place that a killed process had written; by one process of a run."""
        if not self._new_adapter.exists():
            return
        if self.adapter.exists():
            shutil.rmtree(self.previous_adapter, ignore_errors=True)
            self.adapter.rename(self.previous_adapter)
        self._new_adapter.rename(self.adapter)

    def save_adapter(self, model: PeftModel, state: dict[str, Any] | None = None) -> int:
        """Save the adapter, whose tensors are ``state`` where ``model`` has but parts of them; return its bytes.

        Raises:
            OSError: it cannot be written; the one before is whole.
        """
        self.recover()
        unfinished = self._unfinished_adapter
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed while saving
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            model.save_pretrained(str(unfinished), **({} if state is None else {"state_dict": state}))
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(f"cannot save the adapter in {self.adapter}: {error.__cause__ or error}") from error
        unfinished.rename(self._new_adapter)
        self.recover()
        self.adapter_saved = True
        return sum(file.stat().st_size for file in self.adapter.iterdir())

    def save_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``."""
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        _replace(self.summary, lambda path: path.write_text(text, encoding="utf-8"))

    def save_loss_curve(self, loss: Sequence[float], title: str) -> None:
        """Draw ``loss.png``: the loss of each step, and its running mean."""
        # Not pyplot, which would look for a display.
        from matplotlib.figure import Figure

        window = max(1, len(loss) // 10)
        mean = [
            sum(part) / len(part) for part in (loss[max(0, i - window + 1) : i + 1] for i in range(len(loss)))
        ]
        steps = range(1, len(loss) + 1)
        axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
        axes.plot(
            steps, loss, color="#9ecae1", marker="." if len(loss) < 200 else None, label="loss of a step"
        )
        axes.plot(steps, mean, color="#08519c", linewidth=2, label=f"mean of {window} steps")
        axes.set(
            title=title, xlabel="step", ylabel="cross-entropy of the answer's first token", ylim=(0, None)
        )
        axes.grid(alpha=0.3)
        axes.legend()
        _replace(self.picture, lambda path: figure.savefig(path, dpi=150, format="png"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    unfinished = path.with_name(path.name + ".partial")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from error
