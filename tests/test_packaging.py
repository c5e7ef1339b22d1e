"""The same code must import from a wheel, an editable install and a plain checkout, and never as `kernels`."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers.utils import import_utils

ROOT = Path(__file__).resolve().parent.parent
SITE_PACKAGES = Path(torch.__file__).resolve().parent.parent


def run(code: str, cwd: Path, *path: Path) -> str:
    """Run ``code`` as `python -c` does (``cwd`` first on the path), then ``path``, then this environment's packages.

    ``-S`` leaves .pth files unread, so that this environment's own install of tinyfuse is out of the way.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [*path, SITE_PACKAGES])),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=cwd, env=environment, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """A wheel of ``source`` by the build backend itself, unpacked: kind is "wheel" or "editable"."""
    code = f"import setuptools.build_meta as backend; print(backend.build_{kind}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    site = out / "site"
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        archive.extractall(site)
    return site


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what the build reads, so that it leaves nothing behind in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("tinyfuse", "kernels", "patterns"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def stand_in(tmp_path) -> Path:
    """A folder with a package `kernels` that has whatever transformers asks Hugging Face's package for."""
    package = tmp_path / "stand_in" / "kernels"
    package.mkdir(parents=True)
    package.joinpath("__init__.py").write_text(
        f"""
__version__ = {import_utils.KERNELS_MIN_VERSION!r}

def use_kernel_forward_from_hub(*names):
    return lambda cls: cls

use_kernelized_func = use_kernel_func_from_hub = use_kernel_forward_from_hub

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {{}})
"""
    )
    return package.parent


def test_wheel_holds_every_source_file_and_nothing_else(wheel):
    expected = {
        f"{prefix}{path.relative_to(ROOT)}"
        for folder, prefix in (("tinyfuse", ""), ("kernels", "tinyfuse/"), ("patterns", "tinyfuse/"))
        for pattern in ("*.py", "*.cpp")
        for path in (ROOT / folder).rglob(pattern)
    }
    found = {str(path.relative_to(wheel)) for path in wheel.rglob("*") if path.is_file()}
    assert {name for name in found if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in found)


def test_wheel_imports_under_tinyfuse_only(wheel, tmp_path):
    out = run(
        """
import importlib.util, tinyfuse, tinyfuse.kernels.linear, tinyfuse.patterns.linear
print(tinyfuse.__file__, tinyfuse.kernels.linear.__file__)
assert importlib.util.find_spec("kernels") is None and importlib.util.find_spec("patterns") is None
""",
        tmp_path,
        wheel,
    )
    assert all(name.startswith(str(wheel)) for name in out.split())


def test_entry_point_is_the_backend(wheel, tmp_path):
    run(
        """
import torch._dynamo
assert "tinyfuse" in torch._dynamo.list_backends()
from tinyfuse.backend import backend
assert torch._dynamo.lookup_backend("tinyfuse") is backend
""",
        tmp_path,
        wheel,
    )


def test_editable_install_imports_under_tinyfuse_only(source, tmp_path):
    site = build("editable", source, tmp_path)
    out = run(
        f"""
import site, importlib.util
site.addsitedir({str(site)!r})
import tinyfuse, tinyfuse.kernels.linear, tinyfuse.patterns.linear
print(tinyfuse.__file__, tinyfuse.kernels.linear.__file__)
assert importlib.util.find_spec("kernels") is None and importlib.util.find_spec("patterns") is None
""",
        tmp_path,
        site,  # before this environment's packages: the finder has the same name in every editable install
    )
    assert all(name.startswith(str(source)) for name in out.split())


LLAMA = """
from transformers import LlamaConfig, LlamaForCausalLM
import tinyfuse.kernels.linear
LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=8,
                             num_attention_heads=2))
"""


def test_hugging_face_kernels_wins_in_a_checkout(stand_in):
    out = run(
        f"import kernels; print(kernels.__file__)\n{LLAMA}"
        "import transformers.utils; assert transformers.utils.is_kernels_available()",
        ROOT,
        stand_in,
    )
    assert Path(out.strip()).is_relative_to(stand_in)


def test_models_import_in_a_checkout_without_hugging_face_kernels():
    run(LLAMA, ROOT)


def test_import_is_light(tmp_path):
    run(
        """
import sys, tinyfuse
heavy = {"transformers", "triton", "torch"} & set(sys.modules)
assert not heavy, heavy
assert tinyfuse.__version__
""",
        tmp_path,
        ROOT,
    )


def test_every_module_imports_without_triton(tmp_path):
    names = sorted(
        f"tinyfuse.{folder}.{path.stem}" for folder in ("kernels", "patterns") for path in (ROOT / folder).glob("*.py")
    )
    names += [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "tinyfuse").rglob("*.py"))
        if path.stem not in ("__init__", "__main__")
    ]
    run(
        f"""
import importlib, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Block())
for name in {names!r}:
    importlib.import_module(name)
from tinyfuse.kernels._triton import missing
assert "pip install" in missing
""",
        tmp_path,
        ROOT,
    )
