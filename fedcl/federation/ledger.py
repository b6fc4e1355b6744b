"""What a call costs its node: uploads, the clients' seconds, the FLOPs of their training steps, the peak of memory.

FLOPs are counted, not estimated: one real training step of a client is done again while every operation is watched,
once a task and shape of batch, after the call's own work. Steps of the same shape cost the same. Counted are the
multiplications and additions of matrix products, convolutions and attention, forward and backward, by the formulas of
``torch.utils.flop_counter``; what works element by element is left out, as there.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..errors import FedclError
from ..local.client import Asked
from ..local.stackable import unchanged
from ..local.training import Kind, Shape, train_alone, train_client
from .bytes import nbytes, nfloats, without_gaps

if TYPE_CHECKING:
    from ..strategy import Arrays
    from .call import Call
    from .node import Node


Shapes = Mapping[Shape, int] | Mapping[Kind, int]
"""How many steps had batches of each shape."""


def key_of(task: int, own: int, kind: Kind) -> str:
    """Names what decides the FLOPs of a client's step: the server's and its own task, and the shape of its batch; after
    the first phase of a round the number of the phase too, and of training in an exchange its name.

    >>> key_of(2, 0, (32, 16)), key_of(2, 0, (1, (32, 16)))
    ('2:0:32,16', '2:0:32,16 in phase 2')
    """
    place, shape = parts(kind)
    if isinstance(place, Asked):
        late = f" in {place.name.replace(':', '.')}"
    else:
        late = f" in phase {place + 1}" if place else ""
    return f"{task}:{own}:{','.join(map(str, shape))}{late}"


def parts(kind: Kind) -> tuple[int | Asked, Shape]:
    """The number of the phase, 0 for the first one, or training in an exchange, and the shape of a batch."""
    if len(kind) == 2 and isinstance(kind[1], tuple):
        return kind
    return 0, kind


class Ledger:
    """What one call costs, written down while the node answers it.

    Attributes:
        work: [client, seconds, steps by shape] of each client that did something.
    """

    def __init__(self) -> None:
        self.bytes_up = self.floats_up = 0
        self.work: list[tuple[int, float, Shapes]] = []
        self._kinds: dict[Shape | Kind, Shape | Kind] = {}

    def sent(self, arrays: Arrays, gaps: Collection[str] = ()) -> None:
        """Adds an upload.

        Args:
            gaps: names of arrays whose NaN entries do not travel.
        """
        if gaps:
            whole = {n: a for n, a in arrays.items() if n not in gaps}
            arrays = whole | without_gaps({n: arrays[n] for n in gaps})
        self.bytes_up += nbytes(arrays)
        self.floats_up += nfloats(arrays)

    @contextmanager
    def at(self, client: int, seconds: float = 0.0, shapes: Shapes | None = None) -> Iterator[None]:
        """Times what a client does beside its steps, for which ``seconds`` and their shapes are known already."""
        begun = perf_counter()
        yield
        seconds += perf_counter() - begun
        # Equal kinds as one object, so that of all clients' phases in an exchange one is kept.
        same = {self._kinds.setdefault(kind, kind): steps for kind, steps in (shapes or {}).items()}
        self.work.append((client, seconds, same))

    def measured(self, node: Node, call: Call) -> dict[str, Any]:
        """What a reply tells; shapes that the server has no count of are counted now.

        Returns:
            ``bytes_up``, ``floats_up``; ``work``: [client, seconds, {key: steps}]; ``flops``: [key, FLOPs of a step or
            None, why it could not be counted]; ``peak``: [[bytes of this process, bytes on its CUDA device or None]].
        """
        peak = peak_memory(node.store.device)
        header, known = call.header, set(call.header.counted)
        work: list[list[Any]] = []
        found: dict[str, tuple[int, Kind]] = {}
        for client, seconds, shapes in self.work:
            keys = {key_of(header.task, header.standing(client)[0], kind): (kind, n) for kind, n in shapes.items()}
            work.append([client, seconds, {key: steps for key, (_, steps) in keys.items()}])
            for key, (kind, _) in keys.items():
                if key not in known and node.config.evaluate.flops:
                    found.setdefault(key, (client, kind))
        return {
            "bytes_up": self.bytes_up, "floats_up": self.floats_up, "peak": [peak], "work": work,
            "flops": [[key, *step_flops(node, call, *place)] for key, place in found.items()],
        }  # fmt: skip


def step_flops(node: Node, call: Call, number: int, kind: Kind) -> tuple[int | None, str]:
    """FLOPs of one training step of a client on a batch of a shape that it had in this call.

    The step starts from what the client started this call with; only the number is kept.

    Returns:
        The count and ""; None and the reason where the step cannot be run under the counter.
    """
    place, shape = parts(kind)
    if isinstance(place, Asked) and place.phase is None:
        return None, "another loop than the engine's took it"
    client = node.client(call, number)
    try:
        with unchanged(node), FlopCount() as counter:
            if isinstance(place, Asked):
                assert place.phase is not None
                train_alone(client, place.phase, limit=1, size=abs(shape[0]))
            else:
                train_client(client, limit=1, size=abs(shape[0]), only=place)
    except FedclError as error:
        if node.stop():
            raise
        return None, str(error)
    except Exception as error:  # the step itself has been done: only the counter can have failed
        return None, " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return counter.total, ""


class FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch has no types there
    """Adds up the FLOPs of all operations inside it, as PyTorch's ``FlopCounterMode`` does in twice the time.

    That one also keeps apart what each module costs, which nobody asks for here.

    Attributes:
        total: FLOPs so far.
    """

    _whole: ClassVar[set[Any]] = set()  # operations that are not made of others

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch's own switch: training is not compiled, and guarding against it is a third of the time."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func.overloadpacket)
        if formula is None and func not in self._whole:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            self._whole.add(func)
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=out))
        return out


def peak_memory(device: torch.device) -> tuple[int, int | None]:
    """(most bytes this process has ever held in memory, most bytes of tensors on its CUDA device or None)."""
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    try:
        # getrusage's own number is inherited from the process that started this one.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024, on_device
    except (OSError, IndexError, ValueError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024, on_device


def holdings(node: Node, state: Arrays) -> tuple[int, int]:
    """(bytes of a client's state, bytes of the exemplars it keeps), for its state of record ``STRATEGY/name``."""
    kept = sum(exemplar_bytes(node, s.name, state) for s in node.stack)
    return nbytes(state), kept


def exemplar_bytes(node: Node, strategy: str, state: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the images that a strategy keeps in a state with names ``STRATEGY/name``.

    Rows of the store count as the images they stand for, a byte a pixel and channel; images as they are.
    """
    names = next(s.exemplars for s in node.stack if s.name == strategy)
    held = [state[f"{strategy}/{name}"] for name in names if f"{strategy}/{name}" in state]
    return sum(len(a) * node.store.image_bytes if a.dim() == 1 else nbytes({"": a}) for a in held)
