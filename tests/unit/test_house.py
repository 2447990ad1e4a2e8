"""The rules of the house: which packages import which, how large functions and modules may be, how frames are sent."""

from __future__ import annotations

import ast
import graphlib
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("ipc", "workers", "pipeline")
MAY_IMPORT = {"ipc": {"ipc"}, "workers": {"ipc", "workers"}, "pipeline": {"ipc", "workers", "pipeline"}}
SHARED_BY_WORKERS = {"process", "queueing", "model_tokenizer"}

MAX_FUNCTION_LINES = 80
P95_FUNCTION_LINES = 31
MAX_MODULE_LINES = 300
LONG_FUNCTIONS = {  # "path name" -> the reason why it may be longer
    "pipeline/engine/wiring.py _plan": "lists every worker's rings and sockets; ends with the table of roles",
}
LONG_MODULES = {  # path -> the reason why it may be longer
    "ipc/messages.py": "all messages between processes on one page",
    "pipeline/client/session.py": "one state machine of a connection; its parts share all their state",
    "pipeline/engine/config.py": "all keys of the configuration on one page",
    "pipeline/engine/supervisor.py": "the life of all processes in one loop",
    "workers/gateway/core.py": "one state machine of all requests",
    "workers/gpu/execution/executor.py": "the order of a step's copies, launches and events, drawn once",
    "workers/scheduler/scheduler.py": "the facade of the scheduler: every event from outside enters here",
}


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


def import_graph() -> dict[str, set[str]]:
    """The modules of the engine and the modules that each imports, anywhere in its code."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in modules(package)
    }
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                parts = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= {part if part in paths else str(node.module) for part in parts}
        graph[name] = (graph[name] & set(paths)) - {name}
    return graph


def test_no_modules_import_each_other_in_a_circle_not_even_inside_functions() -> None:
    try:
        graphlib.TopologicalSorter(import_graph()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def is_triton_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def function_sizes() -> list[tuple[str, str, int]]:
    """(path, name, lines) of each function except Triton kernels, whose long argument lists are no complexity."""
    return [
        (str(path.relative_to(ROOT)), node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
        for package in PACKAGES
        for path in modules(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_triton_kernel(node)
    ]


def test_functions_are_short() -> None:
    sizes = function_sizes()
    too_long = [f"{where} {name}: {n}" for where, name, n in sizes if n > MAX_FUNCTION_LINES]
    assert [each for each in too_long if each.rpartition(":")[0] not in LONG_FUNCTIONS] == []
    assert statistics.quantiles([n for *_, n in sizes], n=20)[-1] <= P95_FUNCTION_LINES, "too many functions are long"


def test_modules_are_short_or_have_a_reason() -> None:
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for package in PACKAGES
        for path in modules(package)
    }
    assert {name: n for name, n in sizes.items() if n > MAX_MODULE_LINES and name not in LONG_MODULES} == {}


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
