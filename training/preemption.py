"""Pre-emption: signals that ask for a stop, and ranks that agree on what to do after a step.

A cluster that takes its machine back sends a signal, perhaps to one rank only. `StopSignal` notes it, and `AnyRank`
lets all ranks save and stop after the same step.
"""
import datetime
import math
import os
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

REQUEUE = 75  # exit code of a run that a signal stopped after saving (EX_TEMPFAIL: try again)


class AnyRank:
    """Ranks agree, once a step, whether any of them asks for something, without waiting for a GPU.

    The votes of a step travel while the next is computed. So with several ranks the answer is a step late, and the
    same on all.

    Args:
        minutes: how long a rank waits for the votes of the others.
    """

    def __init__(self, minutes: float = 10):
        wait = datetime.timedelta(minutes=minutes)
        # gloo and tensors on the host: a vote by NCCL would stand in line behind the step's work on the GPU
        self.group = dist.new_group(backend='gloo', timeout=wait) if dist.is_initialized() else None
        self.work = None

    def __call__(self, *requests: bool) -> list[bool]:
        """Which requests any rank made in its last call; with one process, in this one."""
        votes = torch.tensor(requests, dtype=torch.int32)
        if self.group is None:
            return votes.bool().tolist()
        answer = [False] * len(requests)
        if self.work:
            pending, sums = self.work
            pending.wait()
            answer = sums.bool().tolist()
        self.work = dist.all_reduce(votes, dist.ReduceOp.MAX, self.group, async_op=True), votes
        return answer


class StopSignal:
    """SIGTERM, SIGUSR1 (what SLURM and torchrun send) and SIGHUP (a closed terminal) ask for a stop at the next step.

    A second signal, a second or more later, stops at once. A signal that is ignored, as nohup has it, stays ignored.
    Use as a context: the handlers before are put back.

    Attributes:
        received: whether a signal came.
    """
    SIGNALS = signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP

    def __init__(self):
        self.received = False
        self.since = math.inf
        self.handlers = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # launchers may pass one request on twice at the same moment, which shall not count as the second signal
        if self.received and time.monotonic() - self.since > 1:
            os._exit(128 + number)
        if not self.received:
            self.received = True
            self.since = time.monotonic()

    def __enter__(self) -> 'StopSignal':
        for number in self.SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
