"""Imports point one way, one module imports CuPy, and what is written twice on purpose agrees."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cuconv
from cuconv import ops, reference
from cuconv.cuda import runtime
from cuconv.plan.types import ACTIVATION_CODES

PACKAGE = Path(cuconv.__file__).parent

# Every part may import itself and what stands below it; the helpers import nothing of cuconv but each other.
ORDER = ["cli", "bench", "profiling", "demo", "parity", "interop", "compat", "models", "weights", "files", "layers"]
ORDER += ["ops", "explain", "plots", "timing", "reference", "cuda", "plan", "geometry"]
HELPERS = {"activations", "constraints", "initializers", "interpolation", "regularizers", "seeding", "serialization"}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "cuconv" else {node.module}
            )
    return found


@pytest.mark.parametrize("module, path", list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_one_way(module, path):
    part = part_of(module)
    for imported in imports(path):
        if not imported.startswith("cuconv.") or part in ("cuconv", "__main__"):
            continue
        target = part_of(imported)
        if part in HELPERS:
            assert target in HELPERS, f"{module} imports {imported}"
        elif target in ORDER and part in ORDER and target != part:
            assert ORDER.index(target) > ORDER.index(part), f"{module} imports {imported}"
            assert {part, target} != {"reference", "cuda"}, f"{module} imports {imported}"


@pytest.mark.parametrize("module, path", list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_only_the_runtime_imports_cupy(module, path):
    if module != "cuconv.cuda.runtime":
        assert not {name for name in imports(path) if name.split(".")[0] in ("cupy", "cupyx")}


def test_geometry_imports_the_language_only():
    assert imports(PACKAGE / "geometry.py") <= set(sys.stdlib_module_names) | {"collections.abc", "__future__"}


def test_importing_the_package_loads_no_gpu_library():
    code = "import sys, cuconv; print([name for name in ('cupy', 'torch', 'keras', 'h5py') if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_kernels_and_plans_give_activations_the_same_codes():
    source = (runtime.kernel_directory() / "activations.cuh").read_text()
    constants = dict(re.findall(r"constexpr int ACT_(\w+) = (\d+);", source))
    assert {name.lower(): int(code) for name, code in constants.items()} == ACTIVATION_CODES
    assert set(re.findall(r"ACT == ACT_(\w+)\)", source)) | {"LINEAR"} == set(constants)


def test_every_engine_function_is_called_by_ops():
    source = inspect.getsource(ops)
    for name in reference.__all__:
        assert re.search(rf"\.{name}\b", source), name


def test_public_functions_of_ops_are_documented_and_listed():
    own = {
        name
        for name, value in vars(ops).items()
        if getattr(value, "__module__", "") in ("cuconv.ops", "cuconv.geometry")
    }
    public = {name for name in own if inspect.isfunction(getattr(ops, name)) and not name.startswith("_")}
    assert public == set(ops.__all__)
    assert all(inspect.getdoc(getattr(ops, name)) for name in public)
