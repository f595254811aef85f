"""Compiled kernels: what their key depends on, and the folder they are kept in, damaged, shared, full or contended."""

import errno
import logging
import multiprocessing
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cuconv.cuda import cubins
from cuconv.cuda.cubins import Cubins, Recipe, definitions, expanded
from cuconv.plan.types import ELEMENTS, PlanError

posix = pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")


def recipe(**changes):
    fields = {"kernel": "conv", "source": "text", "options": ("-arch=sm_90", "-DN=1"), "compiler": "NVRTC 13.0"}
    return Recipe(**{**fields, "suffix": ".cubin", **changes})


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def cache(folder):
    return Cubins(folder)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def never():
    raise AssertionError("compiled although there is a file")


# --- Sources -----------------------------------------------------------------------------------------------------


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_cuh", ".cuh").replace("_cu", ".cu")).write_text(text)
    return folder


def test_headers_are_put_in_their_place_once(folder):
    write(
        folder,
        a_cu='// a\n#include "b.cuh"\n#include "c.cuh"  // why\nint a;\n',
        b_cuh='#pragma once\n#include "c.cuh"\nint b;\n',
        c_cuh="#pragma once\nint c;\n",
    )
    assert expanded(folder, "a.cu").splitlines() == [
        '#line 1 "a.cu"',
        "// a",
        '#line 1 "b.cuh"',
        "",
        '#line 1 "c.cuh"',
        "",
        "int c;",
        '#line 3 "b.cuh"',
        "int b;",
        '#line 3 "a.cu"',
        '#line 4 "a.cu"',
        "int a;",
    ]


def test_a_header_without_pragma_once_is_put_in_every_time(folder):
    write(folder, a_cu='#include "b.cuh"\n#include "b.cuh"\n', b_cuh="B\n")
    assert expanded(folder, "a.cu").count("B\n") == 2


@pytest.mark.parametrize(
    "text",
    [
        "#include <cuda_fp16.h>",
        '#include "../secret.cuh"',
        '#include "/etc/passwd"',
        '#include "sub/b.cuh"',
        "#include FILE",
        '#include "b.h"',
        '#include "a.cu"',
        "#  include <x>",
    ],
)
def test_nothing_else_is_included(folder, text):
    write(folder, a_cu=f"int a;\n{text}\n")
    with pytest.raises(PlanError, match="kernels include"):
        expanded(folder, "a.cu")


def test_a_header_that_is_not_there(folder):
    write(folder, a_cu='#include "b.cuh"\n')
    with pytest.raises(FileNotFoundError):
        expanded(folder, "a.cu")


def test_every_type_of_the_plans_is_a_constant():
    constants = tuple((f"T{i}", element.c_type) for i, element in enumerate(ELEMENTS.values()))
    assert definitions((*constants, ("INDEX", "long long"), ("N", -3), ("FLAG", True))) == (
        "-DT0=float",
        "-DT1=double",
        "-DT2=half_t",
        "-DT3=bfloat_t",
        "-DT4=complex_t<float>",
        "-DT5=complex_t<double>",
        "-DINDEX=long long",
        "-DN=-3",
        "-DFLAG=1",
    )


@pytest.mark.parametrize(
    "constant",
    [
        ("N", "4"),
        ("N", 1.5),
        ("N", None),
        ("N", "float; evil()"),
        ("n", 1),
        ("N=1 -DM", 1),
        ("", 1),
        ("N\n", 1),
    ],
    ids=repr,
)
def test_no_other_constant_is_passed_on(constant):
    with pytest.raises(PlanError, match="a constant is"):
        definitions((constant,))


def test_the_key_depends_on_everything_and_on_nothing_else():
    different = [
        recipe(),
        recipe(kernel="conw"),
        recipe(source="text "),
        recipe(options=("-arch=sm_80", "-DN=1")),
        recipe(options=("-arch=sm_90", "-DN=2")),
        recipe(options=("-arch=sm_90 -DN=1",)),
        recipe(options=("-arch=sm_90-", "DN=1")),
        recipe(compiler="NVRTC 13.1"),
        recipe(suffix=".ptx"),
    ]
    assert len({each.key for each in different}) == len(different)
    assert recipe().key == recipe().key
    elsewhere = "from cuconv.cuda.cubins import Recipe as R; print(R({!r}, {!r}, {!r}, {!r}, {!r}).key)"
    fields = ("conv", "text", ("-arch=sm_90", "-DN=1"), "NVRTC 13.0", ".cubin")
    printed = subprocess.run(
        [sys.executable, "-c", elsewhere.format(*fields)], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == recipe().key, "the same in every process"


# --- The folder --------------------------------------------------------------------------------------------------


def test_a_kernel_is_compiled_once_and_found_by_the_next_process(cache, folder, caplog):
    path = cache.obtain(recipe(), lambda: b"code")
    assert path.read_bytes() == b"code" and path.parent == folder and path.suffix == ".cubin"
    assert cache.obtain(recipe(), never) == path
    assert Cubins(folder).obtain(recipe(), never) == path
    other = cache.obtain(recipe(source="other"), lambda: b"more")
    assert other != path and cache.obtain(recipe(), never).read_bytes() == b"code"
    assert os.listdir(folder) and not list(folder.glob("*.unfinished")) and not warnings_of(caplog)


@posix
def test_folder_and_files_are_private(cache, folder):
    path = cache.obtain(recipe(), lambda: b"code")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: b"", lambda data: b"X" + data[1:], lambda data: data + b"\0"],
    ids=["cut", "empty", "changed", "longer"],
)
def test_a_damaged_file_is_compiled_again_with_a_warning(cache, folder, damage, caplog):
    path = cache.obtain(recipe(), lambda: b"code")
    path.write_bytes(damage(b"code"))
    fresh = Cubins(folder).obtain(recipe(), lambda: b"code")
    assert fresh.read_bytes() == b"code"
    (warning,) = warnings_of(caplog)
    assert str(path) in warning and "damaged" in warning
    caplog.clear()
    assert Cubins(folder).obtain(recipe(), never).read_bytes() == b"code" and not warnings_of(caplog)


def test_a_file_under_another_name_is_not_taken(cache, folder):
    path = cache.obtain(recipe(), lambda: b"code")
    wrong = Recipe("conv", "other", (), "NVRTC 13.0", ".cubin")
    os.rename(path, folder / path.name.replace(recipe().key, wrong.key))
    assert Cubins(folder).obtain(recipe(), lambda: b"new").read_bytes() == b"new"


def test_a_file_that_vanishes_is_compiled_again(cache, caplog):
    cache.obtain(recipe(), lambda: b"code").unlink()
    assert cache.obtain(recipe(), lambda: b"again").read_bytes() == b"again"
    assert not warnings_of(caplog)


def test_a_build_that_fails_leaves_nothing_and_can_be_repeated(cache, folder):
    def fails():
        raise PlanError("no")

    for _ in range(2):
        with pytest.raises(PlanError, match="no"):
            cache.obtain(recipe(), fails)
    assert os.listdir(folder) == []
    assert cache.obtain(recipe(), lambda: b"code").read_bytes() == b"code"


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_costs_one_warning(cache, folder, step, monkeypatch, caplog):
    cache.obtain(recipe(source="before"), lambda: b"before")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place, real = (cubins.tempfile, cubins.tempfile.mkstemp) if step == "write" else (os, getattr(os, step))

    def only_there(*args, **kwargs):
        here = kwargs.get("dir") == folder if step == "write" else fails[0]
        fails[0] = False
        return full() if here else real(*args, **kwargs)

    fails = [True]
    monkeypatch.setattr(place, "mkstemp" if step == "write" else step, only_there)
    path = cache.obtain(recipe(), lambda: b"code")
    assert path.read_bytes() == b"code" and path.parent != folder
    second = cache.obtain(recipe(source="second"), lambda: b"second")
    assert second.parent == path.parent and second.read_bytes() == b"second"
    (warning,) = warnings_of(caplog)
    assert "No space left" in warning and cubins.FOLDER_VARIABLE in warning
    assert [each.read_bytes() for each in folder.iterdir()] == [b"before"], "nothing half done is left"
    assert cache.obtain(recipe(source="before"), never).read_bytes() == b"before"


def test_threads_that_find_the_disk_full_at_once_say_it_once(cache, folder, monkeypatch, caplog):
    barrier, real = threading.Barrier(3), cubins.tempfile.mkstemp

    def full(**keywords):
        if keywords["dir"] != folder:
            return real(**keywords)
        barrier.wait(5)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cubins.tempfile, "mkstemp", full)
    made = [recipe(source=str(i)) for i in range(3)]
    threads = [threading.Thread(target=cache.obtain, args=(each, lambda: b"code")) for each in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(cache.obtain(each, never).read_bytes() == b"code" for each in made)
    assert len(warnings_of(caplog)) == 1


@posix
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_write_to_is_not_used(folder, mode, caplog):
    folder.mkdir()
    folder.chmod(mode)
    planted = folder / f"conv-{recipe().key}-{cubins._digest(b'evil')}.cubin"
    planted.write_bytes(b"evil")
    path = Cubins(folder).obtain(recipe(), lambda: b"code")
    assert path.read_bytes() == b"code" and path.parent != folder
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    (warning,) = warnings_of(caplog)
    assert "others may write" in warning and str(folder) in warning


@posix
def test_a_folder_of_another_user_is_not_used(folder, monkeypatch, caplog):
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    assert Cubins(folder).obtain(recipe(), lambda: b"code").parent != folder
    assert "another user" in warnings_of(caplog)[0]


def test_a_file_where_the_folder_should_be(folder, caplog):
    folder.write_text("")
    assert Cubins(folder).obtain(recipe(), lambda: b"code").read_bytes() == b"code"
    assert len(warnings_of(caplog)) == 1


def test_a_user_without_a_home(monkeypatch, caplog):
    monkeypatch.delenv(cubins.FOLDER_VARIABLE, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cubins, "default_folder", homeless)
    cache = Cubins()
    assert cache.summary()["problem"] == "Could not determine home directory."
    assert cache.obtain(recipe(), lambda: b"code").read_bytes() == b"code"
    assert "home" in warnings_of(caplog)[0]


def test_the_folder_of_a_process_vanishes_with_it(tmp_path):
    (tmp_path / "blocked").write_text("")
    code = (
        "import sys; from pathlib import Path; from cuconv.cuda.cubins import Cubins, Recipe;"
        "print(Cubins(Path(sys.argv[1])).obtain(Recipe('k', '', (), '', '.cubin'), lambda: b'x'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "blocked")], capture_output=True, text=True, check=True
    )
    path = Path(done.stdout.strip())
    assert path.suffix == ".cubin" and not path.parent.exists()


def test_the_limit_removes_what_was_not_used_for_longest(folder):
    cache = Cubins(folder, limit_bytes=350)
    paths = [cache.obtain(recipe(source=str(i)), lambda: bytes(100)) for i in range(3)]
    for age, path in zip((30, 10, 20), paths):
        os.utime(path, (time.time() - age, time.time() - age))
    Cubins(folder).obtain(recipe(source="0"), never)  # now the one used last
    newest = cache.obtain(recipe(source="3"), lambda: bytes(100))
    assert set(folder.iterdir()) == {paths[0], paths[1], newest}
    huge = cache.obtain(recipe(source="huge"), lambda: bytes(1000))
    assert list(folder.iterdir()) == [huge] and huge.exists(), "what was just written stays"


def test_unfinished_files_of_dead_processes_are_removed(cache, folder):
    cache.obtain(recipe(), lambda: b"code")
    old, young = folder / "a.unfinished", folder / "b.unfinished"
    for path in (old, young):
        path.write_bytes(b"")
    os.utime(old, (time.time() - 2 * cubins.ABANDONED_SECONDS,) * 2)
    cache.obtain(recipe(source="more"), lambda: b"more")
    assert young.exists() and not old.exists()


def test_a_refused_file_is_replaced_in_another_place(cache, folder, caplog):
    path = cache.obtain(recipe(), lambda: b"code")
    fresh = cache.rebuild(recipe(), path, lambda: b"code")
    assert fresh.read_bytes() == b"code" and fresh.parent != folder and not path.exists()
    assert cache.rebuild(recipe(), path, never) == fresh, "another thread had it refused too"
    assert cache.obtain(recipe(), never) == fresh
    assert len(warnings_of(caplog)) == 1


def test_one_thread_compiles_and_all_get_the_file(cache):
    built, paths, barrier = [], [], threading.Barrier(8)

    def build():
        built.append(threading.get_ident())
        time.sleep(0.05)
        return b"code"

    def ask():
        barrier.wait()
        paths.append(cache.obtain(recipe(), build))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and len(paths) == 8 and len(set(paths)) == 1


def test_different_kernels_do_not_wait_for_each_other(cache):
    inside = threading.Event()

    def slow():
        inside.set()
        assert done.wait(5), "the other kernel waits"
        return b"slow"

    done = threading.Event()
    thread = threading.Thread(target=cache.obtain, args=(recipe(source="slow"), slow))
    thread.start()
    assert inside.wait(5)
    cache.obtain(recipe(source="quick"), lambda: b"quick")
    done.set()
    thread.join()


def _hammer(folder, seed, failed):
    cache = Cubins(Path(folder), limit_bytes=3000)
    for i in range(60):
        content = str((i * seed) % 7).encode() * 1000
        made = recipe(source=content.decode())
        path = cache.obtain(made, lambda content=content: content)
        try:
            data = path.read_bytes()
        except FileNotFoundError:  # swept by another process: what `rebuild` is for
            data = cache.rebuild(made, path, lambda content=content: content).read_bytes()
        if data != content:
            failed.value += 1


def test_processes_share_a_folder(folder):
    context = multiprocessing.get_context("spawn")
    failed = context.Value("i", 0)
    processes = [context.Process(target=_hammer, args=(str(folder), seed, failed)) for seed in (1, 2, 3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0] and failed.value == 0
    assert not list(folder.glob("*.unfinished"))


def test_where_the_folder_is(monkeypatch, tmp_path):
    monkeypatch.setenv(cubins.FOLDER_VARIABLE, str(tmp_path / "mine"))
    assert cubins.default_folder() == tmp_path / "mine"
    monkeypatch.delenv(cubins.FOLDER_VARIABLE)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cubins.default_folder() == tmp_path / "xdg" / "cuconv" / "cubins"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cubins.default_folder() == tmp_path / ".cache" / "cuconv" / "cubins"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cubins.default_folder() == tmp_path / "local" / "cuconv" / "cubins"


def test_the_summary_counts_kernels_and_creates_nothing(folder):
    cache = Cubins(folder)
    assert cache.summary() == {
        "path": str(folder),
        "files": 0,
        "bytes": 0,
        "limit_bytes": cubins.LIMIT_BYTES,
        "problem": None,
    }
    assert not folder.exists()
    cache.obtain(recipe(), lambda: b"12345")
    (folder / "notes.txt").write_text("not a kernel")
    assert (cache.summary()["files"], cache.summary()["bytes"]) == (1, 5)
    if sys.platform != "win32":
        folder.chmod(0o777)
        assert "others may write" in cache.summary()["problem"]
