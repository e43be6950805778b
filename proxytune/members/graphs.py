"""Decode steps recorded once and replayed: CUDA graphs.

A step of a small batch is over before the GPU has been told all of it: a 7B model is some
thousand kernels, and Python launches them one by one. Recorded, they are launched together. A
recording repeats the very same kernels on the very same memory, so everything that changes from
step to step stands in buffers: the tokens, their positions, and the cache, of which it reads a
round number of positions under a mask.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel

from proxytune.members.cache import RowCache, Write
from proxytune.members.facts import tolerance

log = logging.getLogger(__name__)

WARM = 3  # steps run as they are before one is recorded: in them, libraries choose their kernels
STRIDE = 256  # cache positions that a recording reads: a multiple of this
KEPT = 8  # recordings at a time

Run = Callable[[], torch.Tensor]


class FixedWrite(Write):
    """A `Write` whose positions are a buffer: the code of a pass stays, the numbers change."""

    @property
    def uniform(self) -> bool:
        """False: where the rows start is not known when the pass is recorded."""
        return False

    @classmethod
    def make(cls, rows: int, width: int, length: int, device: torch.device) -> "FixedWrite":
        """A write of `width` tokens to the first `rows` rows, which reads `length` positions."""
        row_ids = torch.arange(rows, device=device).unsqueeze(1)
        positions = torch.zeros(rows, width, dtype=torch.long, device=device)
        starts = [length - width] * rows
        return cls(list(range(rows)), slice(0, rows), starts, width, {device: (row_ids, positions)})


class RecordedSteps:
    """The passes over a block of tokens for every row, recorded by shape.

    A shape runs as it is a few times, is then recorded, and its first replay is compared with the
    pass itself; what cannot be recorded, or comes out otherwise, switches this off with a warning.

    Args:
        forward: token ids [rows, width] to logits [rows, width, vocab], as `cache.write` says.
        cache: that of the model.
        device: of the model and the cache.
        record: makes a replay of a pass; a test may give its own.
    """

    def __init__(
        self,
        forward: Callable[[torch.Tensor], torch.Tensor],
        cache: RowCache,
        device: torch.device,
        record: Callable[[Run], Run] | None = None,
    ) -> None:
        self.usable = True
        self._forward = forward
        self._cache = cache
        self._device = device
        self._record = record or CudaRecorder(device)
        self._steps: OrderedDict[tuple[int, int, int], _Step] = OrderedDict()
        self._epoch = cache.epoch

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends a block of tokens [rows, width] to all rows; logits [rows, width, vocab]."""
        cache = self._cache
        rows, width = tokens.shape
        step = self._step(rows, width)
        # the rows that fill up the shape write to the beginning of slots that nobody uses
        starts = torch.tensor([*cache.lengths, *[0] * (len(step.write.rows) - rows)])
        _, positions = step.write.indices(self._device)
        positions.copy_(starts.unsqueeze(1) + torch.arange(width), non_blocking=True)
        step.ids[:rows].copy_(tokens, non_blocking=True)
        if step.checked and step.replay is not None:
            logits = step.replay().clone()  # the next replay writes to the same memory
        else:
            logits = self._try(step)
        cache.lengths[:] = [length + width for length in cache.lengths]
        return logits[:rows]

    def _step(self, rows: int, width: int) -> "_Step":
        """What is known of this shape; of none, once the cache has moved in memory."""
        cache = self._cache
        needed = max(cache.lengths) + width
        cache.reserve(rows, needed)
        if self._epoch != cache.epoch:
            self._epoch = cache.epoch
            self._steps.clear()
        padded = min(_round(rows), cache.slots)
        length = min(-(-needed // STRIDE) * STRIDE, cache.capacity)
        shape = (padded, width, length)
        if shape not in self._steps:
            self._steps[shape] = _Step(*shape, self._device)
            if len(self._steps) > KEPT:
                self._steps.popitem(last=False)
        self._steps.move_to_end(shape)
        return self._steps[shape]

    def _try(self, step: "_Step") -> torch.Tensor:
        """The pass itself; then, when it is time, its recording or the check of that."""
        self._cache.write = step.write
        run = partial(self._forward, step.ids)
        logits = run()
        step.seen += 1
        try:
            if step.replay is not None:
                worst, scale = _difference(step.replay(), logits)
                step.checked = worst <= tolerance(logits.dtype) * scale
                if not step.checked:
                    self._give_up(f"the logits come out otherwise, by {worst:.2g} of {scale:.2g}")
            elif step.seen > WARM:
                step.replay = self._record(run)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._give_up(str(error).partition("\n")[0])
        return logits

    def _give_up(self, reason: str) -> None:
        log.warning("decodes without CUDA graphs: %s", reason)
        self.usable = False
        self._steps.clear()


class _Step:
    """One shape: its buffers, and its recording once there is one."""

    def __init__(self, rows: int, width: int, length: int, device: torch.device) -> None:
        self.ids = torch.zeros(rows, width, dtype=torch.long, device=device)
        self.write = FixedWrite.make(rows, width, length, device)
        self.seen = 0
        self.replay: Run | None = None
        self.checked = False


class CudaRecorder:
    """Records passes as CUDA graphs that share their memory.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Of its own: cuBLAS keeps a workspace per stream, and the members' graphs run at once.
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """The replay of a pass; its result is overwritten by the next replay of any."""
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
        ):
            result = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


def may_record(model: PreTrainedModel) -> bool:
    """Whether a model stands on one CUDA device, as a recording must."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return len(devices) == 1 and devices.pop().type == "cuda"


def _round(rows: int) -> int:
    """Rows of a recording: a power of two up to 8, then a multiple of 8."""
    return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8


def _difference(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    return float((got - want).abs().max()), float(want.abs().max())
