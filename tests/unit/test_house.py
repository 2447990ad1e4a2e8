"""The rules of the house: who may import whom, and what a client must not pull in."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("ipc", "workers", "pipeline")
MAY_IMPORT = {"ipc": {"ipc"}, "workers": {"ipc", "workers"}, "pipeline": {"ipc", "workers", "pipeline"}}
SHARED_BY_WORKERS = {"bootstrap", "process", "queueing", "model_tokenizer"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_lies_below_them(package: str) -> None:
    for path in modules(package):
        for name in imported_names(path):
            top = name.split(".")[0]
            assert top not in PACKAGES or top in MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {name}"


def test_workers_do_not_import_each_other() -> None:
    for path in modules("workers"):
        role = path.relative_to(ROOT / "workers").parts[0]
        for name in imported_names(path):
            if name.startswith("workers.") and name.split(".")[1] not in SHARED_BY_WORKERS:
                assert name.split(".")[1] == role, f"{path.relative_to(ROOT)} imports {name}"


def test_only_the_gpu_process_imports_torch() -> None:
    for package in PACKAGES:
        for path in modules(package):
            if (ROOT / "workers" / "gpu") not in path.parents:
                heavy = {n for n in imported_names(path) if n.split(".")[0] in ("torch", "triton")}
                assert not heavy, f"{path.relative_to(ROOT)} imports {heavy}"


def is_zero_copy_send(call: ast.Call) -> bool:
    """Whether a call sends over ZeroMQ without a copy, which is pyzmq's default for a Frame and not for the others."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("send", "send_multipart"):
        copies = [keyword.value for keyword in call.keywords if keyword.arg in ("copy", None)] + call.args[2:3]
        return any(not (isinstance(value, ast.Constant) and value.value is True) for value in copies)
    return name == "Frame"


def test_no_message_is_sent_from_memory_that_may_be_written_again_before_it_has_left() -> None:
    for package in PACKAGES:
        for path in modules(package):
            for node in ast.walk(ast.parse(path.read_text())):
                assert not (isinstance(node, ast.Call) and is_zero_copy_send(node)), (
                    f"{path.relative_to(ROOT)}:{node.lineno}: ZeroMQ would read the buffer after send has returned"
                )


@pytest.mark.parametrize(
    ("source", "is_forbidden"),
    [
        ("socket.send(frame, copy=False)", True),
        ("socket.send(frame, 0, False)", True),
        ("socket.send_multipart(frames, flags=zmq.DONTWAIT, copy=zero)", True),
        ("socket.send(frame, **options)", True),
        ("zmq.Frame(ids)", True),
        ("socket.send(frame)", False),
        ("socket.send_multipart(frames, zmq.DONTWAIT, copy=True)", False),
        ("ids.astype(int, copy=False)", False),
    ],
)
def test_a_send_counts_as_zero_copy_unless_it_plainly_copies(source: str, is_forbidden: bool) -> None:
    call = ast.parse(source, mode="eval").body
    assert isinstance(call, ast.Call)
    assert is_zero_copy_send(call) == is_forbidden


@pytest.mark.parametrize("module", ["pipeline", "workers.scheduler.worker", "workers.gateway.worker"])
def test_importing_the_client_or_a_host_role_does_not_load_torch(module: str) -> None:
    script = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)


def test_every_module_says_what_it_owns() -> None:
    for package in PACKAGES:
        for path in modules(package):
            assert path.name == "__main__.py" or ast.get_docstring(ast.parse(path.read_text())), path
