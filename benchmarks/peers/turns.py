"""Contenders that take turns, in one process or each in its own, and the ratios of their times."""

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import torch
from greenlet import getcurrent, greenlet

Step = Callable[[], object]
Loop = Callable[[Callable[[], None]], None]
Clock = Callable[[], float]
DONE = "step done\n"


class LoopSteps:
    """A training loop of somebody's own as a function that does one step of it.

    The loop runs in a greenlet: in the same thread, and so with the same memory and threads as its rivals.

    Args:
        loop: Runs the whole loop; it is given a function to call after each step, which waits for the next turn.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = greenlet(lambda: loop(self._pass_on))

    def __call__(self) -> None:
        """Lets the loop go on until its next step is done."""
        self._main = getcurrent()
        self._loop.switch()

    def _pass_on(self) -> None:
        self._main.switch()


class ProcessSteps:
    """A contender in a process of its own, with an allocator of its own, that takes its steps when it is told to.

    Args:
        command: Starts a process that calls `serve`.
    """

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self) -> None:
        """Has the process take one step, and waits for it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print("step", file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line == DONE:
                return
        raise RuntimeError(f"a contender ended with exit code {self._process.wait()}")


def serve(step: Step) -> None:
    """Takes a step for each line of standard input."""
    for _ in sys.stdin:
        step()
        print(DONE, end="", flush=True)


class WholeRun:
    """A training run in a process of its own, which is stopped while others have their turn.

    Attributes:
        worked: Seconds of its own turns by which each step had ended.
        is_done: Whether it has ended.
    """

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        """Starts the process in a folder, and stops it before it does anything."""
        self.worked: dict[int, float] = {}
        self.is_done = False
        # Of the turns before, and since when this one lasts; None between turns.
        self._before: float = 0.0
        self._since: float | None = None
        self._clock = threading.Lock()
        self._lines: list[str] = []
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            # Compilers that it starts have its turns too.
            start_new_session=True,
        )
        self._signal(signal.SIGSTOP)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def take_turn(self, seconds: float) -> None:
        """Lets it run for some seconds, or to its end.

        Raises:
            SystemExit: It failed.
        """
        with self._clock:
            self._since = time.perf_counter()
        self._signal(signal.SIGCONT)
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGSTOP)
            with self._clock:
                self._before, self._since = self._seconds(), None
            return
        self._reader.join()
        self.is_done = True
        if code:
            raise SystemExit(f"a contender failed with {code}:\n{''.join(self._lines)}")

    def end(self) -> None:
        """Ends it, if it has not ended."""
        if self._process.poll() is None:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def _seconds(self) -> float:
        return self._before + (time.perf_counter() - self._since if self._since else 0.0)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)
            if step := re.search(r"step ([\d,]+)/", line):
                with self._clock:
                    self.worked[int(step[1].replace(",", ""))] = self._seconds()


def alternate(
    contenders: dict[str, Step], rounds: int, warmup: int = 2, limit: float = math.inf, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each contender's step in each round; the order turns from round to round.

    Args:
        contenders: Steps by name.
        rounds: Turns of each.
        warmup: Steps of each before the first round.
        limit: No round but the first begins once so many seconds have passed.
        clock: `time.process_time` tells what a thread worked, however busy the machine is with other things.
    """
    start = time.perf_counter()
    names = list(contenders)
    for name in names:
        for _ in range(warmup):
            contenders[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        if number and time.perf_counter() - start > limit:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            began = clock()
            contenders[name]()
            seconds[name].append(clock() - began)
    return seconds


def ratio(numerator: Iterable[float], denominator: Iterable[float]) -> float:
    """The median over rounds of the ratio within a round: what slows the machine for a while slows both."""
    return median(top / bottom for top, bottom in zip(numerator, denominator, strict=True))


def square_product(size: int = 2048) -> tuple[Step, int]:
    """A step that is one float32 product of square matrices, and its operations: the machine's peak.

    It is by the faster of the two libraries that PyTorch has for it, as a few products of each tell.
    """
    left, right, out = (torch.randn(size, size) for _ in range(3))
    products: list[Step] = [lambda: torch.mm(left, right, out=out)]
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], ""))
    seconds = alternate({str(index): product for index, product in enumerate(products)}, rounds=5)
    return min(zip(map(median, seconds.values()), products, strict=True), key=lambda pair: pair[0])[1], 2 * size**3
