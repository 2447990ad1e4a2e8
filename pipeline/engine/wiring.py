"""Who is given what: makes the shared memory, doorbells and internal endpoints, and every worker's bootstrap.

Starts nothing (`pipeline/engine/supervisor.py` does) and knows nothing of what the workers do with their parts.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

import msgspec

from ipc.block_hash import SEED_BYTES
from ipc.doorbell import Doorbell
from ipc.errors import EngineUnavailable
from ipc.record_layout import Layout
from ipc.records import PROMPT_RECORD_TOKENS, StepShape, prompt_layout, result_layout, step_layout
from ipc.ring import Ring, RingHandle
from ipc.stats_page import StatsHandle, StatsPage
from ipc.trace import TraceHandle, TraceRing
from pipeline.client.endpoint import own_folder, runtime_folder
from pipeline.engine.config import Config
from pipeline.engine.model_files import ServedModel
from workers.detokenizer.config import DetokenizerBootstrap
from workers.gateway.config import GatewayBootstrap
from workers.gpu.config import GpuBootstrap
from workers.process import WorkerBootstrap
from workers.queueing.policies import PolicyConfig
from workers.scheduler.config import SchedulerBootstrap
from workers.tokenizer.config import TokenizerBootstrap

# Prompts under way to one tokenizer: enough to keep it busy, and at most about 40 ms of work, because the policy cannot
# reorder them any more. A longer prompt goes alone.
TOKENIZER_WINDOW: Final = 8
TOKENIZER_WINDOW_BYTES: Final = 64 << 10
CLIENT_WINDOW: Final = 64  # at 4 ms a step, a quarter of a second of a client's absence before its deltas coalesce
MIN_PROMPT_RECORDS: Final = 64
GATEWAY, DETOKENIZER, SCHEDULER, GPU = "gateway", "detokenizer", "scheduler", "gpu"
COMPLETION: Final = "gpu.completion"  # the GPU process's second thread
_SOCKETS: Final = ("control", "tokenize", "schedule", "detokenize", "deliver")


class WorkerPlan(msgspec.Struct, frozen=True):
    """One process to start: `python -m workers.MODULE`, with its bootstrap and the descriptors that this names."""

    role: str
    module: str
    bootstrap: Any
    fds: tuple[int, ...]


class Wiring:
    """Everything that the workers of one incarnation share.

    The launcher's own descriptors and mappings are given up by `close()`, once all workers are spawned: the memory then
    lives as long as its last worker. The run folder, with the internal sockets, is removed by `remove_run_folder()`.
    With `traced`, `traces` has the reader's side of every thread's trace ring, which stays valid until its last holder.
    """

    def __init__(
        self,
        config: Config,
        model: ServedModel,
        endpoint: str,
        claim_fd: int | None,
        log_level: str,
        epoch: int = 1,
        *,
        traced: bool = False,
    ) -> None:
        self._closers = contextlib.ExitStack()
        self._log_level = log_level
        self.shape = StepShape(
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            max_model_len=model.max_model_len,
            block_size=config.cache.block_size,
        )
        self.traces: list[TraceRing] = []
        self.tokenizer_roles = [f"tokenizer.{i}" for i in range(config.tokenizer.num_workers)]
        self.run_folder = _make_run_folder(runtime_folder())
        self._endpoints = {name: f"ipc://{self.run_folder / name}.sock" for name in _SOCKETS}
        try:
            self.plans = self._plan(config, model, endpoint, claim_fd, epoch, traced)
        except BaseException:
            self.close()
            self.remove_run_folder()
            raise

    @property
    def control_endpoint(self) -> str:
        return self._endpoints["control"]

    def close(self) -> None:
        """Give up the launcher's share of rings, doorbells and pages."""
        self._closers.close()

    def remove_run_folder(self) -> None:
        """Remove the internal sockets from the file system; connections that stand are not affected."""
        shutil.rmtree(self.run_folder, ignore_errors=True)

    def num_connections(self) -> dict[Path, int]:
        """How many connections each internal socket has once everybody has found everybody."""
        num_tokenizers = len(self.tokenizer_roles)
        counts = {
            "control": num_tokenizers + 4,
            "tokenize": num_tokenizers,
            "schedule": num_tokenizers + 2,  # and gateway, detokenizer
            "detokenize": 2,  # scheduler, gateway
            "deliver": 1,  # detokenizer
        }
        return {self.run_folder / f"{name}.sock": count for name, count in counts.items()}

    def _plan(
        self, config: Config, model: ServedModel, endpoint: str, claim_fd: int | None, epoch: int, traced: bool
    ) -> list[WorkerPlan]:
        # The scheduler before the GPU process: a timeline that has read of a step's end finds its launch.
        roles = [SCHEDULER, GPU, DETOKENIZER, *self.tokenizer_roles, GATEWAY]
        bells = {role: self._doorbell() for role in roles}
        pages = {role: self._stats_page(role) for role in roles}
        traces = {track: self._trace(track) for track in (*roles, COMPLETION)} if traced else {}
        workers = {
            role: WorkerBootstrap(
                role=role,
                control_endpoint=self.control_endpoint,
                doorbell_fd=bells[role],
                stats=pages[role],
                launcher_pid=os.getpid(),
                log_level=self._log_level,
                trace=traces.get(role),
            )
            for role in roles
        }
        depth = config.ring.depth
        step_ring = self._ring("step", step_layout(self.shape), 2 * depth, epoch)
        result_ring = self._ring("result", result_layout(self.shape), 2 * depth, epoch)
        longest_prompt = -(-model.max_model_len // PROMPT_RECORD_TOKENS)
        prompt_rings = [
            self._ring(f"prompt.{i}", prompt_layout(), max(MIN_PROMPT_RECORDS, 2 * longest_prompt), epoch)
            for i in range(len(self.tokenizer_roles) + 1)
        ]
        shared_fds = tuple(ring.fd for ring in (step_ring, result_ring, *prompt_rings))
        tokenizer_bells = [bells[role] for role in self.tokenizer_roles]
        own_fds = {role: [bells[role], pages[role].fd] for role in roles}
        for track, trace in traces.items():
            own_fds[GPU if track == COMPLETION else track].append(trace.fd)

        def endpoints(*names: str) -> dict[str, str]:
            return {f"{name}_endpoint": self._endpoints[name] for name in names}

        gpu = GpuBootstrap(
            worker=workers[GPU],
            model=msgspec.structs.replace(config.model, path=model.folder),
            cache=config.cache,
            shape=self.shape,
            depth=depth,
            step_ring=step_ring,
            result_ring=result_ring,
            prompt_rings=prompt_rings,
            scheduler_doorbell_fd=bells[SCHEDULER],
            completion_trace=traces.get(COMPLETION),
        )
        scheduler = SchedulerBootstrap(
            worker=workers[SCHEDULER],
            scheduler=msgspec.structs.replace(config.scheduler, max_model_len=model.max_model_len),
            shape=self.shape,
            depth=depth,
            eos_token_ids=model.eos_token_ids,
            step_ring=step_ring,
            result_ring=result_ring,
            prompt_rings=prompt_rings,
            gateway_identity=GATEWAY.encode(),
            gpu_doorbell_fd=bells[GPU],
            tokenizer_doorbell_fds=tokenizer_bells,
            **endpoints("schedule", "detokenize"),
        )
        detokenizer = DetokenizerBootstrap(
            worker=workers[DETOKENIZER],
            model_path=model.folder,
            client_window=CLIENT_WINDOW,
            **endpoints("detokenize", "schedule", "deliver"),
        )
        cache_seed = secrets.token_bytes(SEED_BYTES) if config.cache.prefix_caching else None
        tokenizers = [
            TokenizerBootstrap(
                worker=workers[role],
                model_path=model.folder,
                vocab_size=model.vocab_size,
                max_model_len=model.max_model_len,
                prompt_ring=prompt_rings[i],
                ring_index=i,
                block_size=config.cache.block_size,
                cache_seed=cache_seed,
                **endpoints("tokenize", "schedule"),
            )
            for i, role in enumerate(self.tokenizer_roles, start=1)
        ]
        endpoint_folder = own_folder(endpoint)
        gateway = GatewayBootstrap(
            worker=workers[GATEWAY],
            frontend=config.frontend,
            endpoint=endpoint,
            endpoint_folder=None if endpoint_folder is None else str(endpoint_folder),
            run_dir=str(self.run_folder),
            model_name=model.name,
            max_model_len=model.max_model_len,
            policy=PolicyConfig(**{name: getattr(config.scheduler, name) for name in PolicyConfig.__struct_fields__}),
            tokenizer_window=TOKENIZER_WINDOW,
            tokenizer_window_bytes=TOKENIZER_WINDOW_BYTES,
            client_window=CLIENT_WINDOW,
            identity=GATEWAY.encode(),
            stats=list(pages.values()),
            **endpoints("tokenize", "deliver", "schedule", "detokenize"),
        )
        # The gateway holds the endpoint's claim as well: it outlives a killed launcher by a moment.
        other_pages = (page.fd for role, page in pages.items() if role != GATEWAY)
        gateway_fds = (*other_pages, *(() if claim_fd is None else (claim_fd,)))
        return [
            # First: should the launcher be killed while it spawns, somebody is there to remove the run folder.
            WorkerPlan(GATEWAY, "gateway", gateway, (*own_fds[GATEWAY], *gateway_fds)),
            WorkerPlan(GPU, "gpu", gpu, (*own_fds[GPU], *shared_fds, bells[SCHEDULER])),
            WorkerPlan(
                SCHEDULER, "scheduler", scheduler, (*own_fds[SCHEDULER], *shared_fds, bells[GPU], *tokenizer_bells)
            ),
            WorkerPlan(DETOKENIZER, "detokenizer", detokenizer, (*own_fds[DETOKENIZER],)),
            *(
                WorkerPlan(role, "tokenizer", bootstrap, (*own_fds[role], bootstrap.prompt_ring.fd))
                for role, bootstrap in zip(self.tokenizer_roles, tokenizers, strict=True)
            ),
        ]

    def _doorbell(self) -> int:
        bell = Doorbell.create()
        self._closers.callback(bell.close)
        return bell.fd

    def _stats_page(self, role: str) -> StatsHandle:
        handle = StatsPage.create(role)
        self._closers.callback(os.close, handle.fd)
        return handle

    def _trace(self, track: str) -> TraceHandle:
        handle = TraceRing.create(track)
        self._closers.callback(os.close, handle.fd)
        self.traces.append(TraceRing(handle))
        return handle

    def _ring(self, name: str, layout: Layout[Any], num_slots: int, epoch: int) -> RingHandle:
        ring = Ring.create(name, layout, num_slots, epoch)
        ring.close()  # the launcher reads and writes none
        self._closers.callback(os.close, ring.handle.fd)
        return ring.handle


def _make_run_folder(parent: Path) -> Path:
    """A new folder, private to this user."""
    try:
        return Path(tempfile.mkdtemp(prefix="ringfeed-run-", dir=parent))
    except OSError as error:
        raise EngineUnavailable(
            f"no folder for the engine's internal sockets can be made in {parent}: {error.strerror}: set "
            "XDG_RUNTIME_DIR to a folder that can be written to"
        ) from None
