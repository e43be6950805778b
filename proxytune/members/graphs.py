"""Decode steps recorded once and replayed: CUDA graphs.

Python launches the kernels of a step one by one, some thousand for a 7B model, and for a small
batch the launches take longer than the kernels. A recording launches all of them at once. It
repeats the same kernels on the same memory, so everything that changes from step to step is kept
in buffers: the tokens, their positions, and the cache, of which a recording reads a fixed number
of positions under a mask.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from weakref import WeakSet

import torch
from transformers import PreTrainedModel

from proxytune.members.cache import RowCache, Write
from proxytune.members.facts import tolerance

log = logging.getLogger(__name__)

WARM = 3  # steps of a shape before one is recorded; during them, libraries choose their kernels
STRIDE = 256  # a recording reads a multiple of so many cache positions
KEPT = 8  # recordings at a time

Run = Callable[[], torch.Tensor]


class FixedWrite(Write):
    """A `Write` whose positions are a buffer: a replay repeats the pass with new numbers in it."""

    @property
    def uniform(self) -> bool:
        """False: the positions are not known when the pass is recorded."""
        return False

    @classmethod
    def make(cls, rows: int, width: int, length: int, device: torch.device) -> "FixedWrite":
        """A write of `width` tokens to each of the first `rows` rows; reads `length` positions."""
        row_ids = torch.arange(rows, device=device).unsqueeze(1)
        positions = torch.zeros(rows, width, dtype=torch.long, device=device)
        starts = [length - width] * rows
        return cls(list(range(rows)), slice(0, rows), starts, width, {device: (row_ids, positions)})


class RecordedSteps:
    """The passes over a block of tokens for every row, with a recording for each shape.

    A shape first runs unrecorded a few times. It is then recorded, and the first replay is compared
    with the pass itself. If recording fails or the logits differ, no pass is replayed any more, and
    a warning says why.

    Args:
        forward: token ids [rows, width] -> logits [rows, width, vocab]; writes to `cache.write`.
        cache: the model's cache.
        device: of the model and the cache.
        record: turns a pass into its replay; tests give their own. None records CUDA graphs.

    Attributes:
        usable: False after a failure.
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
        """Reads a block of tokens [rows, width]; logits after each, [rows, width, vocab]."""
        cache = self._cache
        rows, width = tokens.shape
        step = self._step(rows, width)
        # Padding rows write to position 0 of unused slots.
        starts = torch.tensor([*cache.lengths, *[0] * (len(step.write.rows) - rows)])
        _, positions = step.write.indices(self._device)
        positions.copy_(starts.unsqueeze(1) + torch.arange(width), non_blocking=True)
        step.ids[:rows].copy_(tokens, non_blocking=True)
        if step.checked and step.replay is not None:
            logits = step.replay().clone()  # the next replay writes to the same memory
        else:
            logits = self._run(step)
        cache.lengths[:] = [length + width for length in cache.lengths]
        return logits[:rows]

    def _step(self, rows: int, width: int) -> "_Step":
        """The `_Step` of this shape; all are new after the cache has moved in memory."""
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

    def _run(self, step: "_Step") -> torch.Tensor:
        """Runs the pass itself; then, when it is time, records it or checks its recording."""
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
        """Drops all recordings and makes no more."""
        log.warning("decodes without CUDA graphs: %s", reason)
        self.usable = False
        self._steps.clear()


class _Step:
    """One shape of a pass: its buffers and its recording.

    Attributes:
        ids: the buffer of the tokens, [rows, width].
        write: the buffer of the positions.
        seen: how often the shape has run unrecorded.
        replay: the recording; None before it is made.
        checked: whether the recording gives the logits of the pass itself.
    """

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
        # A stream of its own: cuBLAS has one workspace per stream, and members run at once.
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, run: Run) -> Run:
        """Records a pass.

        Returns:
            Its replay. The next replay of any pass overwrites the result.
        """
        if not self._graphs:  # torch frees a pool with its last graph, and takes it no more
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
        ):
            result = run()
        self._graphs.add(graph)

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


def may_record(model: PreTrainedModel) -> bool:
    """Whether all of a model is on one CUDA device; only then can its passes be recorded."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return len(devices) == 1 and devices.pop().type == "cuda"


def _round(rows: int) -> int:
    """The rows of the recording for so many rows: a power of two up to 8, then a multiple of 8."""
    return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8


def _difference(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """The largest difference of two tensors, and the largest value of the second."""
    return float((got - want).abs().max()), float(want.abs().max())
