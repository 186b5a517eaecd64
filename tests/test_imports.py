"""Who may import what: the serving half and the verifying half meet over HTTP alone."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = "vllm_deterministic"
KERNELS, ENGINE, MODEL = f"{OWN}.triton_kernels", f"{OWN}.engine", f"{OWN}.tiny_model"
CERTIFY, ATEN, LAB, SERVICE = f"{OWN}.certify", f"{OWN}.aten", f"{OWN}.lab", f"{OWN}.service"

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BASE_INSTALL = {re.split(r"[^\w-]", dependency)[0].replace("-", "_") for dependency in PROJECT["dependencies"]}
SERVICE_INSTALL = {"aiosqlite", "fastapi", "prometheus_client", "pydantic_settings", "starlette", "uvicorn", "yaml"}


@dataclass(frozen=True)
class Rule:
    """What the modules under `scope` may import, beside the standard library and what `OWN` itself defines.

    `others` None: any other project. `ours` None: any part of ours but the serving half.
    """

    scope: str
    others: set[str] | None
    ours: tuple[str, ...] | None

    def allows(self, target: str) -> bool:
        root = target.partition(".")[0]
        if root != OWN:
            return root in sys.stdlib_module_names or self.others is None or root in self.others
        if self.ours is None:
            return not is_under(target, KERNELS, ENGINE)
        return is_under(target, *self.ours) or target == f"{OWN}.__version__"


# The first rule that fits a module holds for it.
RULES = (
    Rule(KERNELS, {"torch", "triton"}, (KERNELS,)),
    Rule(ENGINE, None, (ENGINE, KERNELS, CERTIFY)),
    Rule(f"{CERTIFY}.command", BASE_INSTALL | {"torch"}, (CERTIFY, f"{OWN}.verify")),
    Rule(CERTIFY, {"torch", "triton", "rich"}, (CERTIFY, KERNELS)),
    Rule(ATEN, {"torch", "triton"}, (ATEN, KERNELS)),
    Rule(f"{LAB}.command", BASE_INSTALL | {"torch"}, (LAB, f"{OWN}.verify")),
    Rule(LAB, BASE_INSTALL | {"torch", "matplotlib"}, (LAB, ATEN, KERNELS, f"{OWN}.verify")),
    Rule(f"{SERVICE}.command", BASE_INSTALL, (SERVICE,)),
    Rule(
        SERVICE,
        BASE_INSTALL | SERVICE_INSTALL,
        (SERVICE, f"{OWN}.report", f"{OWN}.verify"),
    ),
    Rule(MODEL, BASE_INSTALL | {"numpy", "tokenizers"}, (MODEL,)),
    Rule(OWN, BASE_INSTALL, None),
)


def is_under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def violations(root: Path) -> list[str]:
    """Every import under `root` that a rule forbids, wherever in a module it stands, and the kernels' reads of the
    environment."""
    found = []
    for folder, package in (("triton_kernels", KERNELS), (OWN, OWN)):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            module = ".".join((package, *parts)).removesuffix(".__init__")
            rule = next(rule for rule in RULES if is_under(module, rule.scope))
            tree = ast.parse(path.read_text())
            parent = module if path.name == "__init__.py" else module.rpartition(".")[0]
            found += [f"{module} imports {name}" for name in imported(tree, parent) if not rule.allows(name)]
            if rule.scope == KERNELS and reads_environment(tree):
                found.append(f"{module} reads the environment")
    return found


def imported(tree: ast.AST, parent: str) -> Iterator[str]:
    """The full name of everything imported: `from a import b` gives a.b, which may be a module or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = parent.split(".")[: len(parent.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def reads_environment(tree: ast.AST) -> bool:
    names = {"environ", "environb", "getenv"}
    return any(
        (isinstance(node, ast.Attribute) and node.attr in names) or (isinstance(node, ast.alias) and node.name in names)
        for node in ast.walk(tree)
    )


def test_imports_keep_their_direction() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source", "violation"),
    [
        ("triton_kernels/a.py", "import vllm", f"{KERNELS}.a imports vllm"),
        ("triton_kernels/a.py", "import numpy as np", f"{KERNELS}.a imports numpy"),
        ("triton_kernels/a.py", "from ..engine import cpu", f"{KERNELS}.a imports {ENGINE}.cpu"),
        ("triton_kernels/b/__init__.py", "from ... import verify", f"{KERNELS}.b imports {OWN}.verify"),
        ("triton_kernels/a.py", "import os\nX = os.environ['X']", f"{KERNELS}.a reads the environment"),
        ("triton_kernels/a.py", "from os import getenv", f"{KERNELS}.a reads the environment"),
        (f"{OWN}/engine/a.py", f"from {OWN}.verify import run", f"{ENGINE}.a imports {OWN}.verify.run"),
        (f"{OWN}/engine/a.py", f"from {OWN} import report", f"{ENGINE}.a imports {OWN}.report"),
        (f"{OWN}/verify/a.py", "def f():\n    import torch", f"{OWN}.verify.a imports torch"),
        (f"{OWN}/report/a.py", f"import {ENGINE}.plugin", f"{OWN}.report.a imports {ENGINE}.plugin"),
        (f"{OWN}/verify/a.py", "from ..triton_kernels import x", f"{OWN}.verify.a imports {KERNELS}.x"),
        (f"{OWN}/cli.py", "from vllm.version import x", f"{OWN}.cli imports vllm.version.x"),
        (f"{OWN}/demo.py", "import numpy", f"{OWN}.demo imports numpy"),
        (f"{OWN}/tiny_model/a.py", "import transformers", f"{MODEL}.a imports transformers"),
        (f"{OWN}/certify/a.py", "import vllm", f"{CERTIFY}.a imports vllm"),
        (f"{OWN}/certify/command.py", f"from {KERNELS} import x", f"{CERTIFY}.command imports {KERNELS}.x"),
        (f"{OWN}/aten/a.py", f"from {ENGINE} import x", f"{ATEN}.a imports {ENGINE}.x"),
        (f"{OWN}/lab/a.py", f"from {ENGINE} import x", f"{LAB}.a imports {ENGINE}.x"),
        (f"{OWN}/lab/command.py", f"from {KERNELS} import x", f"{LAB}.command imports {KERNELS}.x"),
        (f"{OWN}/service/a.py", "import torch", f"{SERVICE}.a imports torch"),
        (f"{OWN}/service/command.py", "import fastapi", f"{SERVICE}.command imports fastapi"),
        (f"{OWN}/verify/a.py", "import fastapi", f"{OWN}.verify.a imports fastapi"),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, path: str, source: str, violation: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source)
    assert violations(tmp_path) == [violation]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("triton_kernels/a.py", "import math\nimport triton.language as tl\nfrom .tiles import x\nfrom . import y"),
        (f"{OWN}/engine/a.py", f"import vllm, os\nfrom {KERNELS} import x\nfrom {OWN} import __version__"),
        (f"{OWN}/verify/a.py", f"import httpx, pydantic\nfrom {OWN}.report import json"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, path: str, source: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source)
    assert violations(tmp_path) == []
