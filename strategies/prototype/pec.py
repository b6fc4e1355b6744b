"""PEC: a small student for each class imitates a frozen random teacher; the class whose student errs least is it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fedcl.cards import Card, option
from fedcl.errors import UsageError
from fedcl.strategy import Arrays, ClientContext, Phase, Predictor, Server, Step, Strategy

if TYPE_CHECKING:
    from fedcl.models.model import FedModel

STUDENT = "extra.pec.student"
"""Where the model has the student from which all students start; only copies of it are trained."""


def prediction_error(student: Tensor, teacher: Tensor) -> Tensor:
    """``1/p ||g_c(x) - h(x)||^2`` of each image: (..., B, p) outputs of student and teacher to (..., B).

    >>> prediction_error(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]])).tolist()
    [2.0]
    """
    return (student - teacher).square().mean(dim=-1)


def network(arch: str, shape: tuple[int, ...], width: int, outputs: int, side: int) -> nn.Sequential:
    """A student, or with a large ``width`` a teacher.

    Args:
        arch: ``mlp``, one hidden layer with LayerNorm and GELU, or ``cnn``, one 3x3 convolution with InstanceNorm and
            ReLU, averaged to ``side`` x ``side``, and a linear layer.
        shape: of one input.
        width: hidden units or channels.
        outputs: p.
    """
    if arch == "mlp":
        hidden = nn.Linear(prod(shape), width)
        return nn.Sequential(nn.Flatten(), hidden, nn.LayerNorm(width), nn.GELU(), nn.Linear(width, outputs))
    normed = nn.InstanceNorm2d(width, affine=True)
    pool, last = nn.AdaptiveAvgPool2d(side), nn.Linear(width * side**2, outputs)
    return nn.Sequential(nn.Conv2d(shape[0], width, 3), normed, nn.ReLU(), pool, nn.Flatten(), last)


class PEC(Strategy):
    """One student a class, trained on its images alone and averaged by the counts of the class; no forgetting."""

    name = "pec"
    family = "prototype"
    reductions = {"held": "sum", "images": "sum", "students/": "sum"}
    card = Card(
        title="Prediction Error-based Classification for Class-Incremental Learning",
        authors="Zając, Tuytelaars, van de Ven",
        venue="ICLR",
        year=2024,
        bibtex="""@inproceedings{zajac2024pec,
  title = {Prediction Error-based Classification for Class-Incremental Learning},
  author = {Zaj{\\k{a}}c, Micha{\\l} and Tuytelaars, Tinne and van de Ven, Gido M.},
  booktitle = {ICLR},
  year = {2024}
}""",
        certainty="Objective, networks and training read in the released code; where LayerNorm stands in the "
        "perceptron and that the convolution is not padded is ours, as is the federated form: every student is "
        "averaged over the clients that hold its class, weighed by their images of it. Students of all classes start "
        "alike, so that their average means something.",
        leaves_client=(
            ("held", "classes", "sum", "round"),
            ("images", "classes of the round", "sum", "round"),
            ("students/", "a student for each class of the round, times its images", "sum", "round"),
        ),
        server_state="one student a class",
        cost="Clients train one after the other, never as one stacked model, and each client its classes one after the "
        "other. Sent are the students of the classes that the clients of a round hold, to all of these; 0 comes back "
        "for classes that a client lacks. The teacher is sent with the model; its seed would do.",
        notes="Optimiser, schedule, epochs and batch size are the run's settings; as published: federation.rounds=1 "
        "federation.epochs=1 federation.batch_size=1 optimiser.name=adam optimiser.schedule=linear optimiser.per=step "
        "(down to 0 within each class), no augmentation, and optimiser.lr=0.01 for MNIST, 0.001 for CIFAR-100. "
        "CIFAR-10 and SVHN: arch=cnn width=60 wider=100 outputs=743 side=5; CIFAR-100: width=40 outputs=172 side=4. "
        "Errors of classes compare only where their students took similar numbers of steps. Each round starts the "
        "schedule anew. The model's encoder and head are not trained; on=features lets students see the features of a "
        "pre-trained encoder (init=) in place of pixels. Counts of images a class leave the client.",
    )

    @dataclass(frozen=True)
    class Options:
        arch: Literal["mlp", "cnn"] = option("mlp", "students and teacher: one hidden layer, or one convolution")
        width: int = option(10, "hidden units or channels of a student")
        wider: int = option(500, "how many times wider the teacher is; the paper's convolutions: 100")
        outputs: int = option(99, "p, outputs of students and teacher")
        side: int = option(5, "arch=cnn: height and width after pooling", unit="pixels")
        on: Literal["pixels", "features"] = option("pixels", "what students see: images, or features of the encoder")

        def __post_init__(self) -> None:
            for name in ("width", "wider", "outputs", "side"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
            if self.on == "features" and self.arch == "cnn":
                raise ValueError("arch must be mlp with on=features: features are vectors")

    def modules(self, model: FedModel) -> Mapping[str, nn.Module]:
        o = self.options
        shape: tuple[int, ...] = (model.feature_dim,) if o.on == "features" else model.image_shape
        if o.arch == "cnn" and min(shape[1:]) < 4:
            size = "x".join(str(side) for side in shape[1:])
            allowed = f"mlp: InstanceNorm after a 3x3 convolution needs images from 4x4, not {size}"
            raise UsageError(f"options.{self.name}.arch", "cnn", allowed)
        return {
            "student": network(o.arch, shape, o.width, o.outputs, o.side),
            "teacher": network(o.arch, shape, o.width * o.wider, o.outputs, o.side),
        }

    # client

    def task_loss(self, step: Step) -> Tensor:
        x = step.forward(step.x, "received").features if self.options.on == "features" else step.x
        return prediction_error(step.apply("student", x), step.apply("teacher", x, which="received").detach()).mean()

    def held(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """How many images of each class the client has."""
        return {"held": ctx.counts}, ctx.state

    def fit(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """Trains the students of the client's classes, each on the images of its class."""
        classes = ctx.down["classes"]
        images = ctx.counts[classes]
        found = {n: torch.zeros_like(a) for n, a in ctx.down.items() if n.startswith("students/")}
        for place in torch.nonzero(images).flatten().tolist():
            student = {f"{STUDENT}.{n.removeprefix('students/')}": ctx.down[n][place] for n in found}
            rows = ctx.ids[ctx.labels == classes[place]]
            phase = Phase("student", trains=of_student, start={**ctx.received, **student}, ids=rows)
            trained = ctx.train(phase)
            for n in found:
                found[n][place] = images[place] * trained[f"{STUDENT}.{n.removeprefix('students/')}"]
        return {"images": images, **found}, ctx.state

    # server

    def round(self, server: Server) -> tuple[Arrays, Arrays]:
        classes = torch.nonzero(server.exchange(self.held, server.cohort).get("held", server.known[:0])).flatten()
        if not len(classes):
            return server.arrays, server.state
        before = self.students(server)
        down = {"classes": classes, **{n: a[classes] for n, a in before.items()}}
        found = server.exchange(self.fit, server.cohort, down)
        students = {n: a.index_copy(0, classes, mean_by_class(found[n], found["images"])) for n, a in before.items()}
        trained = torch.zeros_like(server.known).index_fill(0, classes, True)
        if "trained" in server.state:
            trained[: len(server.state["trained"])] |= server.state["trained"]
        return server.arrays, {**students, "trained": trained}

    def students(self, server: Server) -> Arrays:
        """All students, (C, ...) by name; those of classes never trained are as they all start."""
        found: Arrays = {}
        for name, start in server.arrays.items():
            if of_student(name):
                short = f"students/{name.removeprefix(STUDENT + '.')}"
                rows = start.expand(len(server.known), *start.shape)
                kept = server.state.get(short, rows[:0])
                found[short] = torch.cat([kept, rows[len(kept) :]])
        return found

    def predict(self, predictor: Predictor, x: Tensor) -> Tensor:
        output = predictor.forward(x)
        if "trained" not in predictor.state or not len(x):  # InstanceNorm does not take a batch of no image
            return output.logits
        x = output.features if self.options.on == "features" else x
        teacher = predictor.apply("teacher", x)
        scores = torch.full_like(output.logits, -torch.inf)
        students = {n: a for n, a in predictor.state.items() if n.startswith("students/")}
        for c in torch.nonzero(predictor.state["trained"]).flatten().tolist():
            own = {f"{STUDENT}.{n.removeprefix('students/')}": a[c] for n, a in students.items()}
            answer = predictor.models.apply(STUDENT, {**predictor.arrays, **own}, (x,), "eval")
            scores[:, c] = -prediction_error(answer, teacher)
        return scores


def of_student(name: str) -> bool:
    """Whether an array of the model is the student's."""
    return name.startswith(f"{STUDENT}.")


def mean_by_class(sums: Tensor, counts: Tensor) -> Tensor:
    """(R, ...) sums of students times their images over (R,) numbers of images."""
    return sums / counts.view(-1, *[1] * (sums.dim() - 1))
