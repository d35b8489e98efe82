"""What the ranks of test_launch.py run. It imports no torch where none is needed: ranks then start at once."""

import os
import signal
import sys
import time
from pathlib import Path

from ultrathink_model.errors import CheckpointError, TrainingStoppedError


def rank_number():
    return int(os.environ["RANK"])


def exchange(config, value):
    from ultrathink_model.distributed import context

    own = context.init_distributed(config)
    assert context.init_distributed(config) == own
    import torch

    total = context.all_reduce_sum(torch.tensor([own.rank + 1.0]))
    context.barrier()
    print(f"output of rank {own.rank}")
    print(f"errors of rank {own.rank}", file=sys.stderr)
    main_value = context.broadcast_object(f"from {own.rank}")
    return {
        "value": value,
        "total": total.item(),
        "broadcast": main_value,
        "world_size": own.world_size,
        "is_main": own.is_main,
        "threads": torch.get_num_threads(),
    }


class Aborting:
    """Ends the process, as a thread of gloo's may, when the interpreter is torn down."""

    def __del__(self):
        os.abort()


def leave_what_aborts_a_teardown():
    Aborting.left = Aborting()
    return "done"


def refuse_on_rank_1():
    if rank_number() == 1:
        raise CheckpointError("rank 1 cannot read the checkpoint")
    time.sleep(60)


def crash_on_rank_1():
    if rank_number() == 1:
        raise ZeroDivisionError("a bug on rank 1")
    time.sleep(60)


def be_killed_on_rank_1():
    if rank_number() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def stop_when_asked(folder, seconds_to_save):
    """Waits for a signal as the trainer does, saves for a while, and stops."""
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.append(True))
    Path(folder, f"ready_{rank_number()}").write_text(str(os.getpid()))
    while not asked:
        time.sleep(0.01)
    time.sleep(seconds_to_save * rank_number())
    Path(folder, f"saved_{rank_number()}").write_text("saved")
    raise TrainingStoppedError("stopped at step 7, saved")


def stop_by_itself():
    if rank_number() == 0:
        time.sleep(1.0)  # the other rank has left by then, and must not be taken for one that failed
    raise TrainingStoppedError("stopped at step 7, saved")


def wait_for_ever(folder):
    Path(folder, f"ready_{rank_number()}").write_text(str(os.getpid()))
    time.sleep(600)
