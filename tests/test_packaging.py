"""The base install is the verifying half alone; the folder triton_kernels is never a top-level module of ours."""

import importlib
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what makes the package, so that building leaves nothing in the working tree."""
    checkout = tmp_path_factory.mktemp("checkout")
    for folder in ("vllm_deterministic", "triton_kernels"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, checkout)
    return checkout


@pytest.fixture(scope="module", params=["wheel", "editable"])
def base_install(request: pytest.FixtureRequest, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of a fresh environment that holds the base install and its dependencies."""
    environment = tmp_path_factory.mktemp(request.param)
    venv.create(environment, with_pip=True)
    editable = ["--editable"] if request.param == "editable" else []
    run(environment / "bin" / "python", "-m", "pip", "install", "--quiet", *editable, checkout)
    return environment / "bin"


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


def imports(base_install: Path, module: str, cwd: Path) -> bool:
    command = [base_install / "python", "-c", f"import {module}"]
    return subprocess.run(command, cwd=cwd, capture_output=True).returncode == 0


def test_base_install_verifies_without_torch_and_vllm(base_install: Path, checkout: Path, tmp_path: Path) -> None:
    for command in ((), ("verify",), ("certify",), ("lab",), ("service",), ("tiny-model",), ("demo",)):
        assert "Usage: vllm-deterministic" in run(base_install / "vllm-deterministic", *command, "--help").stdout
    for cwd in (tmp_path, checkout):
        assert not imports(base_install, "torch", cwd)
        assert not imports(base_install, "vllm", cwd)
        assert not imports(base_install, "triton_kernels", cwd)
        assert imports(base_install, "vllm_deterministic.cli", cwd)


def test_base_install_carries_every_module_and_data_file(base_install: Path, checkout: Path, tmp_path: Path) -> None:
    program = "from importlib.util import find_spec as f; print(*(f(name).origin for name in {names!r}))"
    names = ("vllm_deterministic.triton_kernels", "vllm_deterministic")
    origins = run(base_install / "python", "-c", program.format(names=names), cwd=tmp_path).stdout.split()
    kernels, package = (Path(origin).parent for origin in origins)
    assert files(kernels) >= files(checkout / "triton_kernels")
    assert files(package) >= files(checkout / "vllm_deterministic")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_kernels_are_imported_under_their_mapped_name() -> None:
    pytest.importorskip("torch")
    kernels = importlib.import_module("vllm_deterministic.triton_kernels")
    assert kernels.__file__ == str(ROOT / "triton_kernels" / "__init__.py")
    with pytest.raises(ImportError):
        importlib.import_module("triton_kernels")
