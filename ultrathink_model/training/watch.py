"""A rank that hangs: found by what the others see, and named with its stack."""

import logging
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType

from pydantic import BaseModel, ValidationError

from ultrathink_model.config import Config
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.distributed.rank import leave_word
from ultrathink_model.errors import DistributedError
from ultrathink_model.tracking.run_folder import RunFolder, write_atomically

FOLDER = ".ranks"
# The part that each step has once.
OPTIMIZER = "the optimizer's step"
# A part of a step may take this many times the longest one so far.
SLACK = 10.0
# Kernels are chosen and buffers made in the first steps, which prove nothing about the others.
UNWATCHED_STEPS = 2
COMPILER_SECONDS = 300.0
# Ranks come to the limit at moments that differ by less than this.
LAST_WORDS_SECONDS = 3.0
POLL_SECONDS = 0.5

logger = logging.getLogger(__name__)


class Sighting(BaseModel):
    """What a rank says of itself when somebody waits.

    Attributes:
        rank: Its number.
        is_still: Whether it stands still within a step; if not, it is well, and only slow.
        count: Parts of steps that it began.
        part: The last of them.
        is_waiting: Whether it stands in an exchange with the others.
        stack: Where it stands.
    """

    rank: int
    is_still: bool
    count: int
    part: str
    is_waiting: bool
    stack: str


class RankWatch:
    """Ends the run when a rank stands still within a step for longer than `distributed.hang_seconds`.

    The main thread notes each part of a step that it begins. A thread of each rank looks at its own notes alone.
    When they stop, the rank writes down where it stands, reads what the others wrote, and can tell from that who is
    waited for: whoever says nothing, or has begun the fewest parts and is in no exchange. Then the process ends, since
    a thread that waits in an exchange cannot be woken. In one process, and between steps, nothing is watched: a rank
    that saves or deletes for long says so, and is left to `distributed.timeout_seconds`.
    """

    def __init__(self, config: Config, context: RankContext, folder: RunFolder) -> None:
        """Begins to watch, on every rank of several.

        Args:
            config: Section `distributed` says how long is too long.
            context: This rank.
            folder: The run's, on a disk that all ranks share.
        """
        self._context, self._folder = context, folder
        self._limit = config.distributed.hang_seconds
        self._count, self._part, self._noted = 0, "", 0.0
        self._longest, self._steps = 0.0, 0
        self._is_over, self._last_words = threading.Event(), threading.Lock()
        self._main = threading.get_ident()
        if self._limit is None or context.world_size == 1:
            return
        if config.training.compile:
            self._limit = max(self._limit, COMPILER_SECONDS)
        self._own_file.unlink(missing_ok=True)
        threading.Thread(target=self._watch, name="rank-watch", daemon=True).start()

    def note(self, part: str) -> None:
        """Notes that a part of a step begins."""
        now = time.monotonic()
        if self._part and self._steps >= UNWATCHED_STEPS:
            self._longest = max(self._longest, now - self._noted)
        self._steps += part == OPTIMIZER
        self._count, self._part, self._noted = self._count + 1, part, now

    def rest(self) -> None:
        """Notes that nothing is to be watched until the next note."""
        self._part = ""

    def close(self) -> None:
        """Ends the watching, once what has been begun to be said is said.

        When the first rank that judges ends, exchanges with it break on the others: what they end of is the hang.
        """
        with self._last_words:
            self._is_over.set()

    @property
    def _own_file(self) -> Path:
        return _file_of(self._folder, self._context.rank)

    def _watch(self) -> None:
        while not self._is_over.wait(POLL_SECONDS):
            count, limit = self._count, max(self._limit or 0.0, SLACK * self._longest)
            if not self._stands_still(count, limit):
                if any(other.is_still for rank, other in self._sightings().items() if rank != self._context.rank):
                    self._speak(is_still=False)
                continue
            for rank, other in self._sightings().items():
                # A rank that is well says so again; one that has since stopped altogether does not.
                if not other.is_still:
                    _file_of(self._folder, rank).unlink(missing_ok=True)
            with self._last_words:
                if self._is_over.is_set():
                    return
                self._speak(is_still=True)
                time.sleep(LAST_WORDS_SECONDS)
                if self._stands_still(count, limit):
                    self._judge(time.monotonic() - self._noted)
                self._own_file.unlink(missing_ok=True)

    def _stands_still(self, count: int, limit: float) -> bool:
        is_within_step = bool(self._part) and self._steps >= UNWATCHED_STEPS
        return is_within_step and self._count == count and time.monotonic() - self._noted > limit

    def _speak(self, *, is_still: bool) -> None:
        frame = sys._current_frames().get(self._main)
        sighting = Sighting(
            rank=self._context.rank,
            is_still=is_still,
            count=self._count,
            part=self._part,
            is_waiting=frame is not None and _is_in_exchange(frame),
            stack="".join(traceback.format_stack(frame)) if frame else "",
        )
        self._own_file.parent.mkdir(exist_ok=True)
        write_atomically(self._own_file, sighting.model_dump_json())

    def _sightings(self) -> dict[int, Sighting]:
        """What the ranks have written, by rank."""
        found = {}
        for rank in range(self._context.world_size):
            try:
                found[rank] = Sighting.model_validate_json(_file_of(self._folder, rank).read_bytes())
            except (FileNotFoundError, ValidationError):
                continue
        return found

    def _judge(self, seconds: float) -> None:
        sightings = self._sightings()
        if not all(sighting.is_still for sighting in sightings.values()):
            return
        message = describe_hang(sightings, self._context.world_size, seconds)
        logger.error("%s", message)
        if self._context.is_main:
            self._folder.set_status("failed")
        if not leave_word(DistributedError, message) and self._context.is_main:
            print(message, file=sys.stderr, flush=True)
        os._exit(DistributedError.exit_code)


def describe_hang(sightings: dict[int, Sighting], world_size: int, seconds: float) -> str:
    """Who is waited for, in words.

    Args:
        sightings: What the ranks that stand still say, by rank.
        world_size: Number of ranks.
        seconds: How long the one that describes it has waited.
    """
    silent = [rank for rank in range(world_size) if rank not in sightings]
    fewest = min((sighting.count for sighting in sightings.values()), default=0)
    last = [sighting for sighting in sightings.values() if sighting.count == fewest]
    hanging = [sighting for sighting in last if not sighting.is_waiting] or last
    if silent:
        named = f"{_ranks(silent)} does not answer (it is stopped, or its interpreter is held)"
        stacks = ""
    else:
        named = f"{_ranks([sighting.rank for sighting in hanging])} hangs after it began {hanging[0].part}"
        stacks = "".join(f"\nrank {sighting.rank} stands at:\n{sighting.stack}" for sighting in hanging)
    return (
        f"{named}, and the others have waited {seconds:.0f} s for it. Start the same command again to go on from the "
        f"last checkpoint; where steps really take that long, raise distributed.hang_seconds.{stacks}"
    )


def _ranks(ranks: list[int]) -> str:
    return ", ".join(f"rank {rank}" for rank in ranks)


def _is_in_exchange(frame: FrameType) -> bool:
    """Whether the innermost call is one of torch.distributed's."""
    return "torch/distributed" in frame.f_code.co_filename.replace(os.sep, "/")


def _file_of(folder: RunFolder, rank: int) -> Path:
    return folder.path / FOLDER / f"rank_{rank:05d}.json"
