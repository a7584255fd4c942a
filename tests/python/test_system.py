"""Import cost, threads, fork, interruption, and the stubs of the compiled module."""

from __future__ import annotations

import ast
import inspect
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import abjure
from abjure import ArgumentError, _native


def run_python(code: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, check=True
    )
    return result.stdout.strip()


def test_import_is_quick_and_leaves_torch_alone():
    code = (
        "import sys, time, numpy; t = time.thread_time(); import abjure, abjure.forget, abjure.refuse, abjure.protect;"
        "print(time.thread_time() - t, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    seconds, torch_loaded, transformers_loaded = min(run_python(code).split() for _ in range(3))
    assert (torch_loaded, transformers_loaded) == ("False", "False")
    # Time of this thread: other processes stretch the clock, and NumPy's idle threads spin while it starts.
    assert float(seconds) < 0.5


def test_threads_from_the_environment_and_the_call():
    code = "import abjure; print(abjure.get_num_threads())"
    assert run_python(code, ABJURE_NUM_THREADS="3") == "3"
    before = abjure.get_num_threads()
    try:
        abjure.set_num_threads(5)
        assert abjure.get_num_threads() == 5
    finally:
        abjure.set_num_threads(before)
    for bad in (0, -1):
        with pytest.raises(ArgumentError, match="n:"):
            abjure.set_num_threads(bad)


def test_instruction_set_from_the_environment():
    code = "from abjure import _native; print(_native.simd_level()[0])"
    assert run_python(code, ABJURE_SIMD="baseline") == "baseline"
    with pytest.raises(ArgumentError, match="avx2"):
        _native.set_simd_level("sse9")


def _triad(n: int = 1 << 20) -> float:
    a, b, c = (np.full(n, v, np.float32) for v in (1.0, 2.0, 0.0))
    _native._triad(a, b, c)
    return float(c.sum())


def _child(queue) -> None:
    queue.put(_triad())


def test_kernels_run_after_fork():
    assert _triad() == 7 * (1 << 20)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    with pytest.warns(DeprecationWarning, match="fork") if sys.version_info >= (3, 12) else _nothing():
        child.start()
    assert queue.get(timeout=30) == 7 * (1 << 20)
    child.join(30)
    assert child.exitcode == 0


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def test_kernels_run_from_several_threads_while_the_pool_changes_size():
    before = abjure.get_num_threads()
    results: list[float] = []

    def work(k: int) -> None:
        for i in range(10):
            abjure.set_num_threads(1 + (i + k) % 4)
            results.append(_triad(1 << 18))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    abjure.set_num_threads(before)
    assert results == [7 * (1 << 18)] * 40


def test_kernels_run_from_several_threads_beside_torch():
    """Each thread gets what it would get alone, while torch's own pool multiplies matrices."""
    import torch

    from abjure import forget, protect, refuse

    rng = np.random.default_rng(0)
    x, q, y = rng.normal(size=(400, 300)).astype(np.float32), rng.normal(size=(2, 300)), np.arange(400) % 4
    a = torch.randn(300, 300)

    def everything() -> list[np.ndarray]:
        weights = x.copy()
        forget.dampen_array_(weights, x**2, x[::-1] ** 2, 1.5)
        gradient = protect.bayes_error_gradient(x, y, bandwidth=9.0)
        return [weights, refuse.ablate_(x.copy(), q), refuse.row_lse(x), gradient.centres, (a @ a).numpy()]

    expected = everything()
    found: list[list[np.ndarray]] = []
    threads = [threading.Thread(target=lambda: found.extend(everything() for _ in range(5))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert len(found) == 20
    for got in found:
        for mine, alone in zip(got[:-1], expected, strict=False):
            np.testing.assert_array_equal(mine, alone)
        np.testing.assert_allclose(got[-1], expected[-1], rtol=1e-4, atol=1e-4)


def test_a_kernel_lets_other_python_threads_run():
    ticks = 0
    stop = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    _native._spin(0.3)
    stop.set()
    thread.join()
    assert ticks > 20


def test_ctrl_c_stops_a_long_kernel_within_a_second():
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        _native._spin(20.0)
    assert time.perf_counter() - start < 1.2


def test_ctrl_c_stops_an_ascent_within_a_second_and_leaves_the_data():
    from abjure.protect import maximize_bayes_error

    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=(2000, 200)).astype(np.float32), np.arange(2000) % 3
    before = x.copy()
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        maximize_bayes_error(x, y, steps=100_000, bandwidth=3.0)
    assert time.perf_counter() - start < 1.7
    assert np.array_equal(x, before)


def test_an_error_in_the_progress_callback_stops_the_kernel():
    def progress(done: int) -> None:
        raise RuntimeError(f"seen {done}")

    with pytest.raises(RuntimeError, match="seen"):
        _native._spin(20.0, progress)


def test_the_native_stub_matches_the_module():
    """Every name, its parameters, their order, kinds and defaults, in both directions."""
    path = Path(abjure.__file__).with_name("_native.pyi")
    stub: dict[str, dict] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            stub[node.name] = _stub_parameters(node)
        elif isinstance(node, ast.AnnAssign):
            stub[node.target.id] = {}
        elif isinstance(node, ast.ClassDef):
            members = {m.name: _stub_parameters(m) for m in node.body if isinstance(m, ast.FunctionDef)}
            stub[node.name] = {"members": members}
    public = {n for n in dir(_native) if not (n.startswith("__") and n != "__version__")}
    assert set(stub) == public
    for name in sorted(public):
        found = getattr(_native, name)
        if inspect.isclass(found):
            for member, parameters in stub[name]["members"].items():
                if member != "__init__":
                    _same_parameters(f"{name}.{member}", inspect.getattr_static(found, member), parameters)
            own = {m for m in vars(found) if not m.startswith("__")}
            assert own <= set(stub[name]["members"]), name
        elif callable(found):
            _same_parameters(name, found, stub[name])


def _stub_parameters(node: ast.FunctionDef) -> dict[str, str | None]:
    a = node.args
    positional = a.posonlyargs + a.args
    defaults = [None] * (len(positional) - len(a.defaults)) + [ast.unparse(d) for d in a.defaults]
    found = {p.arg: d for p, d in zip(positional, defaults, strict=True)}
    found |= {p.arg: d and ast.unparse(d) for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)}
    found.pop("self", None)
    found.pop("cls", None)
    return found


def _same_parameters(name: str, function: object, stub: dict[str, str | None]) -> None:
    if isinstance(function, property) or type(function).__name__ == "getset_descriptor":
        assert stub == {}, name
        return
    signature = inspect.signature(function)  # type: ignore[arg-type]
    real = {
        p.name: None
        if p.default is p.empty
        else json.dumps(p.default)
        if isinstance(p.default, str)
        else repr(p.default)
        for p in signature.parameters.values()
        if p.name not in ("self", "cls")
    }
    normal = {k: None if v is None else v.replace("'", '"') for k, v in stub.items()}
    assert {k: v and v.replace("'", '"') for k, v in real.items()} == normal, name
