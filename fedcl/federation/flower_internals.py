"""The one module that touches Flower's internals: arrays by reference, an in-process grid, messages.

Everything else of fedcl imports Flower's names from here or from Flower's public ``flwr.app``, after this
module. Importing it switches off Flower's telemetry and update check, and takes Flower's handler off the
screen: its lines reach ``logging.getLogger("flwr")`` only.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from typing import ClassVar, Final

# Flower reads both when it is first imported.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import (
    DEFAULT_TTL,
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.app.error import Error
from flwr.app.exception import AppExitException as FlowerFailure
from flwr.app.message import make_message as _message_of
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SType
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.logger import FLOWER_LOGGER, ConsoleHandler
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fedcl.errors import RunFailed

__all__ = [
    "Array",
    "ArrayRecord",
    "ClientApp",
    "ConfigRecord",
    "Context",
    "FlowerFailure",
    "Grid",
    "LocalGrid",
    "Message",
    "MetricRecord",
    "RecordDict",
    "ServerApp",
    "TensorArray",
    "WideTensorArray",
    "failure_text",
    "make_context",
    "make_error",
    "make_message",
    "make_reply",
    "number_message",
    "pack",
    "pack_wide",
    "reply",
    "run_server_app",
    "unpack",
]

BFLOAT16_STYPE: Final = "fedcl.bfloat16-as-uint16"
_LOCAL_RUN: Final = 1
_FIRST_NODE: Final = SUPERLINK_NODE_ID + 1
_message_numbers = itertools.count(1)


def _off_screen() -> None:
    """Moves Flower's log lines from its own console handler to plain logging."""
    for handler in list(FLOWER_LOGGER.handlers):
        if isinstance(handler, ConsoleHandler):
            FLOWER_LOGGER.removeHandler(handler)
    if not FLOWER_LOGGER.handlers:
        FLOWER_LOGGER.addHandler(logging.NullHandler())


_off_screen()


class TensorArray(Array):  # type: ignore[misc]  # flwr is not followed by the type checker
    """A Flower array that holds a tensor by reference and serialises it only when ``.data`` is read.

    On the wire it is a plain :class:`flwr.app.Array` in ``np.save`` format. NumPy has no bfloat16: such a
    tensor travels as its uint16 bits, with ``dtype="bfloat16"`` and a ``stype`` of our own, so that
    :func:`unpack` restores it bit for bit and Flower's own ``numpy()`` refuses it instead of averaging bits.

    The tensor must not be written to while the array is in use: Flower caches chunks of its bytes.

    Args:
        tensor: any shape, 0-d and empty included, on any device; kept detached.
    """

    serialisations: ClassVar[int] = 0

    def __init__(self, tensor: Tensor) -> None:
        self.__dict__["tensor"] = tensor.detach()
        brain = tensor.dtype == torch.bfloat16
        self.dtype = str(tensor.dtype).removeprefix("torch.")
        self.shape = tuple(tensor.shape)
        self.stype = BFLOAT16_STYPE if brain else SType.NUMPY

    @property
    def tensor(self) -> Tensor:
        """The tensor itself, not a copy."""
        held: Tensor = self.__dict__["tensor"]
        return held

    @property
    def data(self) -> bytes:
        """The tensor in ``np.save`` format, made anew at every read."""
        TensorArray.serialisations += 1
        tensor = self.tensor.cpu()
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.contiguous().view(torch.uint16)
        buffer = BytesIO()
        np.save(buffer, tensor.numpy(), allow_pickle=False)
        return buffer.getvalue()

    def numpy(self) -> npt.NDArray[np.generic]:
        """A copy as a NumPy array, without a detour over bytes.

        Raises:
            TypeError: for bfloat16, as a plain array of an unknown serialisation type does.
        """
        if self.stype != SType.NUMPY:
            raise TypeError(f"an array of {self.dtype} has no NumPy form; use unpack()")
        return np.array(self.tensor.cpu().numpy())

    def deflate(self) -> bytes:
        """The header and body of the plain array that stands for this one on the wire."""
        plain = Array(self.dtype, self.shape, self.stype, b"")
        plain.__dict__["_chunks"] = self.slice_array()
        deflated: bytes = plain.deflate()
        return deflated

    def __reduce__(self) -> tuple[type[Array], tuple[str, tuple[int, ...], str, bytes]]:
        return Array, (self.dtype, self.shape, self.stype, self.data)

    def __repr__(self) -> str:
        return f"TensorArray(dtype={self.dtype!r}, shape={self.shape})"


class WideTensorArray(TensorArray):
    """A tensor that Flower's NumPy strategies read as float64, whatever its own floating type.

    Sums of float32 lose digits (Krum's distances cancel), and bfloat16 cannot be read at all. The copy is
    made when it is read, one client at a time.
    """

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor)
        self.dtype, self.stype = "float64", SType.NUMPY

    @property
    def data(self) -> bytes:
        """The float64 values in ``np.save`` format."""
        return TensorArray(self.tensor.double()).data

    def numpy(self) -> npt.NDArray[np.generic]:
        """A float64 copy."""
        return np.array(self.tensor.double().cpu().numpy())


def pack(arrays: Mapping[str, Tensor]) -> ArrayRecord:
    """A Flower record of ``arrays`` by reference, in their order.

    >>> unpack(pack({"w": torch.ones(2)}), "cpu")
    {'w': tensor([1., 1.])}
    """
    record = ArrayRecord()
    for name, tensor in arrays.items():
        record[name] = TensorArray(tensor)  # ArrayRecord(dict) would serialise
    return record


class _WideRecord(ArrayRecord):  # type: ignore[misc]  # flwr is not followed by the type checker
    """A record that never leaves the process; Flower's own collects garbage after each record it empties."""

    def to_numpy_ndarrays(self, *, keep_input: bool = True) -> list[npt.NDArray[np.generic]]:
        """The arrays in order; the record is emptied unless ``keep_input``."""
        arrays = [array.numpy() for array in self.values()]
        if not keep_input:
            self.clear()
        return arrays


def pack_wide(arrays: Mapping[str, Tensor]) -> ArrayRecord:
    """As :func:`pack`, for a Flower strategy in this process that reads the arrays as float64."""
    record = _WideRecord()
    for name, tensor in arrays.items():
        record[name] = WideTensorArray(tensor)
    return record


def unpack(record: ArrayRecord, device: torch.device | str) -> dict[str, Tensor]:
    """The tensors of a Flower record on ``device``.

    A :class:`TensorArray` on that device is handed over by reference: read it, do not write to it.

    Raises:
        RunFailed: an array came in a serialisation that is neither NumPy's nor ours.
    """
    return {name: _tensor(name, array).to(device) for name, array in record.items()}


def _tensor(name: str, array: Array) -> Tensor:
    if isinstance(array, TensorArray):
        return array.tensor
    if array.stype not in (SType.NUMPY, BFLOAT16_STYPE):
        raise RunFailed(f"array {name!r} came serialised as {array.stype!r}; NumPy's format is needed")
    tensor: Tensor = torch.from_numpy(np.load(BytesIO(array.data), allow_pickle=False))
    return tensor.view(torch.bfloat16) if array.stype == BFLOAT16_STYPE else tensor


def _identify() -> None:
    """Gives this process the identity that a Flower message needs, where no Flower runtime gave it one."""
    if TaskIdentity._run_id is None:
        TaskIdentity.run_id = _LOCAL_RUN
    if TaskIdentity._node_id is None:
        TaskIdentity.node_id = SUPERLINK_NODE_ID
    if TaskIdentity._task_id is None:
        TaskIdentity.task_id = 0


def number_message(message: Message) -> str:
    """Sets a message id that is unique in this process, as a SuperLink does for its messages."""
    message_id = f"local-{next(_message_numbers)}"
    message.metadata.__dict__["_message_id"] = message_id
    return message_id


def make_context(
    node_id: int,
    node_config: Mapping[str, str | int | float | bool] | None = None,
    run_config: Mapping[str, str | int | float | bool] | None = None,
) -> Context:
    """A Flower context with an empty state, for a node or for the server."""
    return Context(
        run_id=_LOCAL_RUN,
        node_id=node_id,
        node_config=dict(node_config or {}),
        state=RecordDict(),
        run_config=dict(run_config or {}),
    )


def make_message(content: RecordDict, node_id: int, action: str) -> Message:
    """A message to a node.

    Args:
        action: ``train``, ``evaluate`` or ``query``, or ``category.name`` such as ``query.hello``.

    Raises:
        ValueError: the action is none of these.
    """
    _identify()
    return Message(content, node_id, action)


def reply(content: RecordDict, to: Message) -> Message:
    """The answer to a message that came from a grid."""
    return Message(content, reply_to=to)


def make_reply(content: RecordDict, node_id: int) -> Message:
    """A train reply of a node to a message that was never sent, to drive a server strategy by hand."""
    metadata = Metadata(
        run_id=_LOCAL_RUN,
        message_id="",
        src_node_id=node_id,
        dst_node_id=SUPERLINK_NODE_ID,
        reply_to_message_id="",
        group_id="",
        created_at=0.0,
        ttl=DEFAULT_TTL,
        message_type="train",
    )
    message = _message_of(metadata=metadata, content=content)
    number_message(message)
    return message


def make_error(code: int, reason: str, to: Message) -> Message:
    """The answer of a grid to a message that its node could not answer."""
    _identify()
    message = Message(Error(code=code, reason=reason), reply_to=to)
    number_message(message)
    return message


def failure_text(message: Message) -> str:
    """What an error reply says happened to its node, in a few words."""
    code, reason = message.error.code, " ".join(str(message.error.reason).split())
    if code == ErrorCode.NODE_UNAVAILABLE:
        return "is gone: it gave no sign of life for too long, and is lost"
    if code == ErrorCode.CLIENT_APP_CRASHED:
        return f"is gone: its process died ({reason}), and is lost"
    return f"failed ({reason})"


def _own(message: Message) -> Message:
    """The message with records of its own; arrays stay shared.

    Flower strategies put one record into the messages of all nodes and pop arrays from replies. A wire
    separates the two sides; here copies of the containers do.
    """
    if message.has_error():
        return message
    content = RecordDict({name: record.copy() for name, record in message.content.items()})
    return _message_of(metadata=message.metadata, content=content)


class LocalGrid(Grid):  # type: ignore[misc]  # flwr is not followed by the type checker
    """A Flower grid whose nodes live in this process and answer when they are asked.

    Unmodified Flower strategies run on it: ``FedAvg().start(grid, ...)``. Arrays made by :func:`pack` pass
    by reference; what receives them must not write to them. Each node keeps its ``Context`` in memory for the
    life of the grid, with ``partition-id`` and ``num-partitions`` in its ``node_config``.

    An exception in the ClientApp reaches the caller as it is, with its own traceback, and is not turned into
    an error reply: in one process nothing is gained by going on without that node.

    Args:
        client_app: the app that every node runs.
        nodes: how many nodes, at least 1.
        run_config: the ``run_config`` of every node's context.

    Raises:
        ValueError: ``nodes`` is below 1.
    """

    pause = 0.0  # seconds between two pulls: replies are there when the push returns

    def __init__(
        self,
        client_app: ClientApp,
        nodes: int = 1,
        run_config: Mapping[str, str | int | float | bool] | None = None,
    ) -> None:
        if nodes < 1:
            raise ValueError(f"a grid needs at least one node, not {nodes}")
        _identify()
        self._app = client_app
        self._run = Run.create_empty(_LOCAL_RUN)
        self._replies: dict[str, Message] = {}
        self.contexts: dict[int, Context] = {
            _FIRST_NODE + index: make_context(
                _FIRST_NODE + index, {"partition-id": index, "num-partitions": nodes}, run_config
            )
            for index in range(nodes)
        }

    def set_run(self, run: Run) -> None:
        """Sets the run information that strategies can ask for."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run information."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to a node; Flower prefers the constructor of ``Message``."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """The ids of the nodes, the same on every run."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Runs the ClientApp on each message and keeps the replies for :meth:`pull_messages`."""
        pushed = []
        for message in messages:
            answer = self._deliver(message)
            self._replies[message.metadata.message_id] = answer
            pushed.append(message.metadata.message_id)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to these messages, each handed out once."""
        return [self._replies.pop(name) for name in dict.fromkeys(message_ids) if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The replies, in the order of the messages.

        Args:
            timeout: seconds; a message whose turn comes later is not delivered and gets no reply, as on
                Flower's other grids. A call that runs is not cut short.
        """
        return list(self._answers(messages, timeout))

    def _answers(self, messages: Iterable[Message], timeout: float | None) -> Iterator[Message]:
        end = None if timeout is None else time.monotonic() + timeout
        for message in messages:
            if end is not None and time.monotonic() >= end:
                FLOWER_LOGGER.warning("no reply from node %d in %g s", message.metadata.dst_node_id, timeout)
                continue
            yield self._deliver(message)

    def _deliver(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node not in self.contexts:
            raise RunFailed(f"no node {node} to send to; the nodes are {list(self.contexts)}")
        message_id = number_message(message)
        answer = self._app(_own(message), self.contexts[node])
        if not isinstance(answer, Message):
            raise RunFailed(f"the ClientApp answered {message.metadata.message_type!r} with {answer!r}, not a Message")
        if answer.metadata.reply_to_message_id != message_id:
            raise RunFailed(f"the ClientApp answered {message.metadata.message_type!r} with a reply to another message")
        number_message(answer)
        return _own(answer)


def run_server_app(server_app: ServerApp, grid: Grid, context: Context) -> None:
    """Runs a Flower ServerApp to its end on a grid; its exceptions reach the caller."""
    _identify()
    server_app(grid, context)
