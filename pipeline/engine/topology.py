"""The table of the engine's processes, rings and sockets. Pure data: nothing here has effects.

One row declares a role, a ring or a socket. `wiring.py` derives from the rows every worker's bootstrap, descriptors and
doorbells, the connection counts, the order of starting, and which processes restart together. The rows of the roles
stand in the order of the timeline, from top to bottom.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from ipc.mask_records import mask_layout, mask_request_layout
from ipc.record_layout import Layout
from ipc.records import prompt_layout, result_layout, step_layout
from ipc.stats_page import ArrayShapes
from pipeline.engine import role_settings
from pipeline.engine.config import Config
from pipeline.engine.role_settings import EngineFacts
from pipeline.http.config import COUNTERS as HTTP_COUNTERS
from pipeline.http.config import HTTP_LISTENER
from workers.bootstrap import WorkerBootstrap
from workers.detokenizer.config import ARRAYS as DETOKENIZER_ARRAYS
from workers.detokenizer.config import COUNTERS as DETOKENIZER_COUNTERS
from workers.gateway.config import COUNTERS as GATEWAY_COUNTERS
from workers.gpu.config import COMPLETION, RECORDING
from workers.gpu.config import COUNTERS as GPU_COUNTERS
from workers.grammar.config import COUNTERS as GRAMMAR_COUNTERS
from workers.scheduler.config import ARRAYS as SCHEDULER_ARRAYS
from workers.scheduler.config import COUNTERS as SCHEDULER_COUNTERS
from workers.tokenizer.config import COUNTERS as TOKENIZER_COUNTERS

LAUNCHER: Final = "launcher"  # binds a socket, but is no row: it starts the others
CONTROL: Final = "control"
ENDPOINT_CLAIM: Final = "endpoint claim"


def _never(_: Config) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Role:
    """A kind of process: `python -m MODULE`, once or several times.

    Args:
        bootstrap: makes the role's bootstrap from the engine's facts and the worker's part in rings and sockets.
        counters: of its statistics page.
        arrays: of its statistics page.
        start_order: lower numbers are spawned first.
        count: how many; None = one, without a number in its name.
        is_numbered: the first process has a number too: "tokenizer.0". Otherwise "gpu", "gpu.1", ...
        restarts_with: roles, all of whose processes are started again if a process of this role dies; empty = this
            process alone is.
        starts_after: roles whose `Ready.info` must be known before this role is told to start. A role without any is
            ready by itself.
        is_front: answers clients. It is told Start last, says Ready once more when it serves, and is told Drain and
            Abort.
        is_traced: the timeline shows when its main thread is awake.
        threads: further threads that are traced, besides the main one.
        has_spare: whether a process waits, with everything imported, to take the place of one that dies.
        keeps: descriptors that the launcher lends (`EngineFacts.lent`), as long as the process lives.
    """

    name: str
    module: str
    bootstrap: Callable[[EngineFacts, WorkerBootstrap], Any]
    counters: tuple[str, ...]
    start_order: int
    arrays: ArrayShapes = ()
    count: Callable[[Config], int] | None = None
    is_numbered: bool = False
    restarts_with: tuple[str, ...] = ()
    starts_after: tuple[str, ...] = ()
    is_front: bool = False
    outlives_launcher: bool = False
    reads_statistics: bool = False
    is_traced: bool = True
    threads: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    has_spare: Callable[[Config], bool] = _never


@dataclass(frozen=True, kw_only=True)
class RingRow:
    """A ring, or with `one_per` a ring for each process of a role.

    Args:
        written_by: a role; its first process writes.
        read_by: roles; all their processes read.
        released_by: a role; its first process owns the read cursor.
        lives_with: roles; there is a new ring if one of their processes is started again.
        one_per: one of the roles that write, read or release; each of its processes has this part in a ring of its own.
        publish_wakes_readers: the writer rings the readers' doorbells. False: a message or another ring tells them.
        release_wakes_writer: the owner of the cursor rings the writer's doorbell.
    """

    name: str
    layout: Callable[[EngineFacts], Layout[Any]]
    num_records: Callable[[EngineFacts], int]
    written_by: str
    read_by: tuple[str, ...]
    released_by: str
    lives_with: tuple[str, ...]
    one_per: str | None = None
    publish_wakes_readers: bool = False
    release_wakes_writer: bool = False


@dataclass(frozen=True)
class SocketRow:
    """A ROUTER. The roles that connect to it do so under the names of their processes; None = every role does."""

    name: str
    bound_by: str
    connected_by: tuple[str, ...] | None


@dataclass(frozen=True)
class Table:
    roles: tuple[Role, ...]
    rings: tuple[RingRow, ...]
    sockets: tuple[SocketRow, ...]


GATEWAY, TOKENIZER, DETOKENIZER, SCHEDULER = "gateway", "tokenizer", "detokenizer", "scheduler"
GRAMMAR, GPU, HTTP = "grammar", "gpu", "http"

# The processes that share the state of requests inside the engine. They start together, so none of them meets a
# message or a record that was meant for another birth of its peers. The GPU process is not one of them: its weights
# are dear, and all its state of requests comes from the rings.
CORE: Final = (SCHEDULER, DETOKENIZER, TOKENIZER, GRAMMAR)

ENGINE: Final = Table(
    roles=(
        # Spawned first: if the launcher is killed while it spawns, the gateway removes the clients' socket. It
        # keeps the endpoint's claim, because it outlives a killed launcher by a moment.
        Role(
            name=GATEWAY, module="workers.gateway", bootstrap=role_settings.gateway, counters=GATEWAY_COUNTERS,
            start_order=0, restarts_with=(GATEWAY, *CORE), is_front=True, outlives_launcher=True, reads_statistics=True,
            keeps=(ENDPOINT_CLAIM,),
        ),
        Role(
            name=TOKENIZER, module="workers.tokenizer", bootstrap=role_settings.tokenizer, counters=TOKENIZER_COUNTERS,
            start_order=4, count=lambda config: config.tokenizer.num_workers, is_numbered=True,
        ),
        Role(
            name=DETOKENIZER, module="workers.detokenizer", bootstrap=role_settings.detokenizer,
            counters=DETOKENIZER_COUNTERS, arrays=DETOKENIZER_ARRAYS, start_order=3, restarts_with=CORE,
        ),
        # Above the GPU process: a timeline that has read of a step's end finds its launch.
        Role(
            name=SCHEDULER, module="workers.scheduler", bootstrap=role_settings.scheduler, counters=SCHEDULER_COUNTERS,
            arrays=SCHEDULER_ARRAYS, start_order=2, restarts_with=CORE, starts_after=(GPU, TOKENIZER),
        ),
        Role(
            name=GRAMMAR, module="workers.grammar", bootstrap=role_settings.grammar, counters=GRAMMAR_COUNTERS,
            start_order=5, count=lambda config: config.grammar.num_workers, is_numbered=True,
        ),
        Role(
            name=GPU, module="workers.gpu", bootstrap=role_settings.gpu, counters=GPU_COUNTERS, start_order=1,
            restarts_with=(GPU,), threads=(COMPLETION,), has_spare=lambda config: config.supervisor.spare_gpu_process,
            keeps=(RECORDING,),
        ),
        # A client of the gateway, so it starts after it. It answers "starting" from the moment when it can.
        Role(
            name=HTTP, module="pipeline.http", bootstrap=role_settings.http, counters=HTTP_COUNTERS, start_order=6,
            count=lambda config: 0 if config.http is None else config.http.num_workers, is_numbered=True,
            is_front=True, is_traced=False, keeps=(HTTP_LISTENER,),
        ),
    ),
    rings=(
        RingRow(
            name="step", layout=lambda facts: step_layout(facts.shape), num_records=lambda f: f.num_step_records,
            written_by=SCHEDULER, read_by=(GPU,), released_by=GPU, lives_with=(SCHEDULER, GPU),
            publish_wakes_readers=True,
        ),
        RingRow(
            name="result", layout=lambda facts: result_layout(facts.shape), num_records=lambda f: f.num_step_records,
            written_by=GPU, read_by=(SCHEDULER,), released_by=SCHEDULER, lives_with=(SCHEDULER, GPU),
            publish_wakes_readers=True,
        ),
        # The scheduler's upload ring is prompt ring 0. A step record names the prompt records that it needs.
        RingRow(
            name="prompt", layout=lambda _: prompt_layout(), num_records=lambda facts: facts.num_prompt_records,
            written_by=SCHEDULER, read_by=(GPU,), released_by=SCHEDULER, lives_with=(SCHEDULER,),
        ),
        # The message `Tokenized` wakes the scheduler.
        RingRow(
            name="prompt", layout=lambda _: prompt_layout(), num_records=lambda facts: facts.num_prompt_records,
            written_by=TOKENIZER, one_per=TOKENIZER, read_by=(GPU,), released_by=SCHEDULER, lives_with=(SCHEDULER,),
            release_wakes_writer=True,
        ),
        # A request carries the newest token of each sequence to its grammar process, so it outlives a GPU process. It
        # names the record of the mask ring that answers it. Masks belong to steps, and live as long as the step ring.
        RingRow(
            name="mask_request", layout=lambda facts: mask_request_layout(facts.shape),
            num_records=lambda facts: facts.num_step_records, written_by=SCHEDULER, read_by=(GRAMMAR,),
            released_by=GRAMMAR, lives_with=(SCHEDULER,), one_per=GRAMMAR, publish_wakes_readers=True,
        ),
        RingRow(
            name="mask", layout=lambda facts: mask_layout(facts.shape), num_records=lambda f: f.num_step_records,
            written_by=GRAMMAR, read_by=(GPU,), released_by=GPU, lives_with=(SCHEDULER, GPU), one_per=GRAMMAR,
            publish_wakes_readers=True,
        ),
    ),
    sockets=(
        SocketRow(CONTROL, LAUNCHER, None),
        SocketRow("tokenize", GATEWAY, (TOKENIZER,)),
        SocketRow("schedule", SCHEDULER, (GATEWAY, TOKENIZER, DETOKENIZER, GRAMMAR)),
        SocketRow("detokenize", DETOKENIZER, (GATEWAY, SCHEDULER)),
        SocketRow("deliver", GATEWAY, (DETOKENIZER,)),
    ),
)  # fmt: skip
