"""What is shipped: the wheel and the sdist, and what the package needs in order to work without its checkout."""

import ast
import email
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import cuconv

ROOT = Path(__file__).parents[1]
WHEEL = f"cuconv-{cuconv.__version__}-py3-none-any.whl"
DIST_INFO = f"cuconv-{cuconv.__version__}.dist-info"


def built(target, folder):
    """The archive that hatchling makes of this checkout."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (archive,) = Path(folder).iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return built("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel's files, as an installation has them."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def shipped(*folders):
    """Files of the checkout that belong in an archive."""
    for folder in folders:
        for path in (ROOT / folder).rglob("*"):
            place = path.relative_to(ROOT)
            if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in place.parts):
                yield place.as_posix()


def test_the_wheel_holds_the_package_and_the_kernels_and_nothing_else(wheel):
    assert wheel.name == WHEEL
    names = zipfile.ZipFile(wheel).namelist()
    expected = {*shipped("cuconv"), *(f"cuconv/{name}" for name in shipped("kernels"))}
    assert {name for name in names if not name.startswith(DIST_INFO)} == expected
    assert len(names) == len(set(names))
    for needed in ("cuconv/kernels/common.cuh", "cuconv/demo/shoulder.npz", "cuconv/demo/LICENSE.seglearn"):
        assert needed in expected
    assert {"cuconv/py.typed", "cuconv/cli/__init__.py", "cuconv/page.html", "cuconv/__main__.py"} <= expected


def test_the_metadata_of_the_wheel(installed):
    metadata = email.message_from_string((installed / DIST_INFO / "METADATA").read_text())
    assert (metadata["Name"], metadata["Version"]) == ("cuconv", cuconv.__version__)
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT AND BSD-3-Clause"
    assert (installed / DIST_INFO / "licenses/LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert "David M. Burns" in (installed / DIST_INFO / "licenses/cuconv/demo/LICENSE.seglearn").read_text()
    requires = metadata.get_all("Requires-Dist")
    always = {re.match(r"[\w-]+", each).group().replace("-", "_") for each in requires if "extra ==" not in each}
    assert always == {"ml_dtypes", "numpy", "rich"}
    for extra in ("cuda12x", "cuda13x"):
        (cupy,) = [each for each in requires if extra in each]
        assert set(re.split("[,;]", cupy.split("]")[1])[:2]) == {">=14.0.1", "!=14.1.0"}
        assert cupy.startswith(f"cupy-{extra}[ctk]")
    assert {"cuda12x", "cuda13x", "plot", "test", "dev"} <= set(metadata.get_all("Provides-Extra"))
    assert "cuconv = cuconv.cli:main" in (installed / DIST_INFO / "entry_points.txt").read_text()


def test_kernels_are_found_without_the_checkout(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "cuconv", "doctor", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    kernels = json.loads(done.stdout)["kernels"]
    assert Path(kernels["path"]) == installed / "cuconv" / "kernels"
    assert kernels["files"] == sorted(path.name for path in (ROOT / "kernels").iterdir())


def test_the_sdist_can_be_built_and_tested(tmp_path):
    with tarfile.open(built("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", ".ci/run"} <= names
    assert set(shipped("cuconv", "kernels", "tests", "benchmarks")) <= names
    assert not {name for name in names if "__pycache__" in name or name.startswith(".venv")}


def test_import_needs_only_what_is_required():
    code = "import sys, cuconv.cli, cuconv.models; print(*{name.partition('.')[0] for name in sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"cuconv", "ml_dtypes", "numpy", "rich"} <= loaded
    absent = {"cupy", "h5py", "hypothesis", "keras", "matplotlib", "pytest", "scipy", "seglearn", "sklearn", "torch"}
    assert not loaded & absent


@pytest.mark.parametrize("path", sorted(shipped("cuconv", "tests", "benchmarks")))
def test_sources_are_text_of_the_oldest_python(path):
    if path.endswith(".py"):
        tree = ast.parse((ROOT / path).read_text(), path, feature_version=(3, 10))
        starred = [node for node in ast.walk(tree) if isinstance(node, ast.Subscript) and is_starred(node.slice)]
        assert not starred, f"x[*y] needs Python 3.11: line {starred[0].lineno}"


def is_starred(index):
    # `x[(*y, z)]` is fine and `x[*y, z]` is not. Only the place of the tuple tells: it starts at its parenthesis.
    parts = index.elts if isinstance(index, ast.Tuple) else []
    return any(isinstance(part, ast.Starred) for part in parts) and parts[0].col_offset == index.col_offset


def test_the_changelog_knows_this_version():
    assert re.search(rf"^## {re.escape(cuconv.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_nothing_else_is_at_the_top():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    top = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    files = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", ".gitignore"}
    assert top <= files | {"cuconv", "kernels", "tests", "benchmarks", ".ci"}


def test_every_target_of_the_makefile_is_described():
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    listed = set(re.findall(r"^  make ([a-z-]+) ", done.stdout, re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    tests = {"test", "test-exhaustive", "test-gpu", "test-keras", "test-bridges", "sanitize"}
    assert listed == set(phony.split()) == {"help", "demo", "lint", "bench-cpu", "bench-gpu", "clean", *tests}
