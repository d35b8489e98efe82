"""One rank of a launched group: runs the entry, and leaves word of how it ended.

Run as `python -m ultrathink_model.distributed.rank FOLDER`, where FOLDER holds what `launch` put there.
"""

import ctypes
import json
import os
import pickle
import signal
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Literal

from pydantic import BaseModel

from ultrathink_model.command_line import end_rank
from ultrathink_model.errors import TrainingStoppedError, UltrathinkError

TASK_FILE = "task.pickle"
PATH_FILE = "path.json"
RESULT_FILE = "result.pickle"

FOLDER_VARIABLE = "ULTRATHINK_RANK_FOLDER"
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


class Outcome(BaseModel):
    """How one rank ended.

    Attributes:
        kind: `done`; `stopped` by a signal after saving; `refused` with a typed error; `crashed` otherwise.
        error: The error's class, as `module:name`.
        message: Its message.
        trace: Its traceback, for a crash.
        time: Seconds since 1970, to tell the first error from those that followed.
    """

    rank: int
    kind: Literal["done", "stopped", "refused", "crashed"]
    error: str = ""
    message: str = ""
    trace: str = ""
    time: float = 0.0


def outcomes(folder: Path) -> dict[int, Outcome]:
    """What the ranks left, by rank; one that was killed left nothing."""
    found = [Outcome.model_validate_json(path.read_bytes()) for path in sorted(folder.glob("rank_*.json"))]
    return {outcome.rank: outcome for outcome in found}


def main() -> None:
    """Runs the task of the folder named on the command line."""
    folder = Path(sys.argv[-1])
    os.environ[FOLDER_VARIABLE] = str(folder)
    rank = int(os.environ["RANK"])
    die_with_parent()

    def note_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        _leave(folder, Outcome(rank=rank, kind="crashed", error=_name_of(kind), message=str(error), trace=text))

    sys.excepthook = note_crash
    known = set(sys.path)
    sys.path += [entry for entry in json.loads((folder / PATH_FILE).read_text()) if entry not in known]
    entry, args = pickle.loads((folder / TASK_FILE).read_bytes())
    try:
        result = entry(*args)
    except TrainingStoppedError as error:
        # A rank that has stopped as asked leaves with 0: the others may still be writing, and a launcher kills them
        # at the first rank that fails.
        _leave(folder, Outcome(rank=rank, kind="stopped", error=_name_of(type(error)), message=str(error)))
        end_rank(0)
    except UltrathinkError as error:
        _leave(folder, Outcome(rank=rank, kind="refused", error=_name_of(type(error)), message=str(error)))
        end_rank(error.exit_code)
    if rank == 0:
        (folder / RESULT_FILE).write_bytes(pickle.dumps(result))
    _leave(folder, Outcome(rank=rank, kind="done"))
    end_rank(0)


def leave_word(error: type[UltrathinkError], message: str) -> bool:
    """Leaves word of an error for the process that started this rank, before an end that no exception can tell of.

    Returns:
        Whether there is such a process.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None:
        return False
    outcome = Outcome(rank=int(os.environ["RANK"]), kind="refused", error=_name_of(error), message=message)
    _leave(Path(folder), outcome)
    return True


def die_with_parent() -> None:
    """Has the kernel kill this process when the one that started it dies, so that no rank trains on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _name_of(kind: type[BaseException]) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _leave(folder: Path, outcome: Outcome) -> None:
    name = f"rank_{outcome.rank:05d}.json"
    temporary = folder / f".{name}"
    temporary.write_text(outcome.model_copy(update={"time": time.time()}).model_dump_json())
    temporary.rename(folder / name)


if __name__ == "__main__":
    main()
