"""Choice by measurement: on a GPU that the kernels' own rules were not measured on, time the candidates once.

The rules and tiles in ``kernels/`` come from H100 and H200 and hold there. On any other GPU a pure op that a kernel
supports runs both ways, kernel and stock, the first time that its shape is met, and keeps what is faster. Results
lie in a file per GPU, torch, Triton and source version, written after each measurement: a process that is killed loses
nothing that is finished, and two that measure at once lose at most time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("tinyfuse")
RULED = ("H100", "H200")
STOCK = "reference"


def cache_folder() -> Path:
    """Where tinyfuse keeps what it need not do twice: ``$TINYFUSE_CACHE`` or ``~/.cache/tinyfuse``."""
    return Path(os.environ.get("TINYFUSE_CACHE") or Path.home() / ".cache" / "tinyfuse")


@cache
def measures(device: torch.device) -> bool:
    """Whether kernels on ``device`` are chosen by time."""
    return device.type == "cuda" and not any(name in torch.cuda.get_device_name(device) for name in RULED)


def describe(name: str, args: Sequence[Any], moving: Sequence[int]) -> str:
    """The name of a measurement. Sizes of the arguments ``moving``, which change with the prompt, stand for all up to
    the next power of two."""

    def text(arg: Any, moves: bool) -> str:
        if isinstance(arg, (list, tuple)):
            return "[" + ",".join(text(item, moves) for item in arg) + "]"
        if not isinstance(arg, Tensor):
            return repr(arg)
        sizes = [1 << (n - 1).bit_length() if moves and n else n for n in arg.shape]
        order = sorted(range(arg.dim()), key=lambda i: -arg.stride(i))
        return f"{str(arg.dtype)[6:]}{sizes}{'' if order == list(range(arg.dim())) else order}"

    return f"{name}(" + ",".join(text(arg, i in moving) for i, arg in enumerate(args)) + ")"


class Choices:
    """The measurements of one device: a name to the candidate that was fastest."""

    def __init__(self, path: Path, timer: Callable[[Callable[[], Any]], float]):
        """``timer`` gives the milliseconds of a call."""
        self.path, self.timer = path, timer
        self.known: dict[str, str] = {}
        self.told: set[str] = set()
        self._merge()

    def fastest(self, name: str, candidates: dict[str, Callable[[], Any]]) -> str:
        """The name of the fastest of ``candidates``, of which the first wins a tie; measured if it is not known."""
        if self.known.get(name) not in candidates:
            self._tell("progress", f"timing kernels for this GPU, once per shape; kept in {self.path}", logging.INFO)
            times = {kind: self.timer(call) for kind, call in candidates.items()}
            self.known[name] = min(times, key=times.__getitem__)
            log.info("%s: %s", name, ", ".join(f"{kind} {1e3 * ms:.1f} us" for kind, ms in times.items()))
            self._save()
        return self.known[name]

    def _tell(self, what: str, message: str, level: int = logging.WARNING) -> None:
        if what not in self.told:
            self.told.add(what)
            log.log(level, message)

    def _merge(self) -> None:
        """Add what the file holds to what is known; a file that is not ours counts for nothing."""
        try:
            held = json.loads(self.path.read_text())
            if not all(isinstance(text, str) for pair in held.items() for text in pair):
                raise ValueError("it does not map names to names")
        except FileNotFoundError:
            return
        except (OSError, ValueError, AttributeError) as error:
            self._tell("damaged", f"the measured choices in {self.path} are ignored: {error}")
            return
        self.known = held | self.known

    def _save(self) -> None:
        self._merge()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
                whole = Path(folder) / self.path.name
                whole.write_text(json.dumps(self.known, indent=1, sort_keys=True))
                os.replace(whole, self.path)
        except OSError as error:
            advice = "set TINYFUSE_CACHE to a folder that you can write to; until then every process measures anew"
            self._tell("read-only", f"the measured choices are not kept: {error}; {advice}")


@cache
def of(device: torch.device) -> Choices:
    """The measurements of ``device``."""
    parts = [torch.cuda.get_device_name(device), torch.__version__, _triton_version(), _source()]
    name = "-".join("".join(c if c.isalnum() or c == "." else "_" for c in part) for part in parts)
    return Choices(cache_folder() / f"choices-{name}.json", milliseconds)


def milliseconds(call: Callable[[], Any]) -> float:
    """The median time of ``call`` on the GPU, weights and inputs colder than its L2 cache."""
    from triton.testing import do_bench

    with torch.no_grad():
        times = do_bench(call, warmup=2, rep=10, return_mode="all")
    return statistics.median(times)


def _triton_version() -> str:
    import triton

    return triton.__version__


def _source() -> str:
    """A digest of the kernels."""
    import tinyfuse.kernels as kernels

    digest = hashlib.sha256()
    for file in sorted(file for folder in kernels.__path__ for file in Path(folder).glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
