"""BiC: exemplars and distillation, then two numbers an increment that correct the scores of its new classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fedcl import random as counter
from fedcl.blocks.losses import cross_entropy, distillation
from fedcl.blocks.memory import MemoryOptions, Policy, Rehearsal
from fedcl.cards import Card, option
from fedcl.masks import by_head
from fedcl.step import extra_name
from fedcl.strategy import Arrays, ClientContext, Finished, Phase, Predictor, Server, Sharing, Source, Step

from ._correction import Correction, best_correction, class_weights, correction_sums

if TYPE_CHECKING:
    from fedcl.models.model import FedModel


class BiC(Rehearsal):
    """Bias correction: held-out images of all clients say how much too high the scores of new classes are."""

    name = "bic"
    family = "calibration"
    stackable = True
    needs_previous = True
    common_clock = "corrects the scores of the classes that are new to all clients at once"
    revisits = "to choose the exemplars and to fit the correction at the end of the task"
    neutral = {"budget": 0, "validation": 0.0, "distillation": 0.0}
    reductions = dict.fromkeys(("stored", "counts", "loss", "slope", "curvature", "fitted", "images"), "sum")
    card = Card(
        title="Large Scale Incremental Learning",
        authors="Wu, Chen, Wang, Ye, Liu, Guo, Fu",
        venue="CVPR",
        year=2019,
        bibtex="""@inproceedings{wu2019large,
  title = {Large Scale Incremental Learning},
  author = {Wu, Yue and Chen, Yinpeng and Wang, Lijuan and Ye, Yuancheng and Liu, Zicheng and Guo, Yandong and
            Fu, Yun},
  booktitle = {CVPR},
  year = {2019}
}""",
        certainty="The two stages, the loss with lambda = old / seen classes and T = 2, and one alpha and beta an "
        "increment, fitted with the cross entropy to held-out images of which the classes have equal parts, are the "
        "specification's. That the distillation is the soft cross entropy without the factor T^2 (`squared=true` has "
        "it), and that old increments stay corrected in later training, in the model and in its teacher, is from "
        "memory of the paper and of PyCIL. The federated form is ours.",
        leaves_client=(
            ("stored", "1", "sum", "end of a task"),
            ("counts", "classes", "sum", "end of a task"),
            ("loss", "1, float64", "sum", "for each point of the Newton steps (fit=federated)"),
            ("slope", "2, float64", "sum", "the same"),
            ("curvature", "2 x 2, float64", "sum", "the same"),
            ("fitted", "2, float64", "sum", "end of a task (fit=averaged)"),
            ("images", "1", "sum", "end of a task (fit=averaged)"),
        ),
        client_state="image ids within the byte budget (the images are the client's own) and their priorities",
        server_state="the global model of the previous task's end",
        cost="One more forward pass a step and twice the images; at a task's end a pass over the held-out images for "
        "each Newton step.",
        deviations="The loss of two numbers is convex: damped Newton steps find its minimum in a few exchanges, where "
        "released codes take 200 epochs of stochastic gradient descent. Their sums are those of the union of all "
        "held-out images, so that any partition gives the centralised correction. Each image is held out with the "
        "same probability, for good, and classes are made equal by weights: clients do not know how many images of a "
        "class the others hold out. A small `decay` keeps alpha and beta finite where held-out images can all be "
        "classified right, as training that ends early does there. Exemplars are drawn, not herded.",
        notes="Exemplars come as a batch of their own with each step, not mixed in by their share. Alpha and beta are "
        "arrays of the model (extra.bic.correction) that no step trains; other strategies of the stack see the scores "
        "without them. Counts of held-out images a class leave the client. Nothing is corrected in the first task, in "
        "a task without new classes, where no image of an old or none of a new class is held out (budget=0), and where "
        "tasks are known at test: classes of different tasks do not compete. `fit=averaged`: each client that holds "
        "out both kinds fits its own alpha and beta, and the server takes their mean by images. validation=0 is the "
        "first stage alone.",
    )

    @dataclass(frozen=True)
    class Options(MemoryOptions):
        policy: Policy = option("class_balanced", "which images stay: equally many of each class, or a uniform sample")
        validation: float = option(0.1, "part of exemplars and new images that is held out for the correction")
        distillation: float = option(1.0, "factor on lambda; 0 leaves the cross entropy alone")
        temperature: float = option(2.0, "temperature of the distillation")
        squared: bool = option(False, "the distillation is multiplied by T^2")
        fit: Literal["federated", "averaged"] = option(
            "federated", "one fit over all clients' held-out images, or the mean of each client's own"
        )
        decay: float = option(1e-3, "pull of alpha to 1 and of beta to 0 in the fit")
        steps: int = option(20, "most Newton steps, each one an exchange")

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.validation < 1:
                raise ValueError(f"validation must be at least 0 and below 1, not {self.validation}")
            if not 0 <= self.distillation <= 1:
                raise ValueError(f"distillation must be between 0 and 1, not {self.distillation}")
            if not 0 < self.temperature < float("inf"):
                raise ValueError(f"temperature must be above 0, not {self.temperature}")
            if not 0 <= self.decay < float("inf"):
                raise ValueError(f"decay must be at least 0, not {self.decay}")
            if self.steps < 1:
                raise ValueError(f"steps must be at least 1, not {self.steps}")

    def modules(self, model: FedModel) -> Mapping[str, nn.Module]:
        return {"correction": Correction()}

    def share(self, name: str, model: FedModel) -> Sharing:
        return "frozen" if name.startswith(extra_name(self.name, "correction")) else "shared"

    # client

    def parted(self, ctx: ClientContext, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Images to train on and those held out; whose part an image is does not change with task or round."""
        drawn = torch.from_numpy(counter.uniform(len(ctx.store), *ctx.key[:3], self.name, "validation")).to(ids.device)
        out = drawn[ids] < self.options.validation
        out = out & ~out.all()  # a client must have an image to train on
        return ids[~out], ids[out]

    def phases(self, ctx: ClientContext) -> list[Phase]:
        return [Phase(ids=self.parted(ctx, ctx.ids)[0] if self.options.validation else None)]

    def sources(self, ctx: ClientContext) -> list[Source]:
        return [Source(self.parted(ctx, source.ids)[0], source.batch_size) for source in super().sources(ctx)]

    def task_loss(self, step: Step) -> Tensor:
        logits = step.apply("correction", step.output.logits)
        loss = cross_entropy(logits, step.y, step.among(step.known))
        if step.task == 0 or not self.options.distillation:
            return loss
        old = step.known & ~step.new
        share = self.options.distillation * old.sum().to(loss.dtype) / step.known.sum()
        share = torch.where(step.new.any(), share, torch.zeros_like(share))  # nothing new: nothing to weigh against
        previous = step.forward(step.x, "stage:previous").logits
        teacher = step.apply("correction", previous, which="stage:previous")
        heads = by_head(old, step.heads, step.task)
        distilled = torch.stack([distillation(logits, teacher, h, self.options.temperature) for h in heads]).sum()
        if self.options.squared:
            distilled = distilled * self.options.temperature**2
        weighed: Tensor = (1 - share) * loss + share * distilled
        return weighed

    def held(self, ctx: ClientContext) -> Tensor:
        """Rows of the store that this client holds out: of its images of this task and of its memory, each once."""
        remembered = ctx.state.get("ids", ctx.ids[:0]).to(ctx.ids.device)
        rows: Tensor = torch.unique(torch.cat([self.parted(ctx, ids)[1] for ids in (ctx.ids, remembered)]))
        return rows

    def count(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """How many images of each class this client holds out."""
        return {"counts": self.counted(ctx)}, ctx.state

    def counted(self, ctx: ClientContext) -> Tensor:
        """(C,) int64 held-out images by class."""
        return torch.bincount(ctx.store.label_tensor[self.held(ctx)], minlength=len(ctx.known))

    def sums(self, ctx: ClientContext, weights: Tensor, point: Tensor) -> Arrays:
        """:func:`correction_sums` of the images that this client holds out."""
        total = {
            "loss": torch.zeros((), dtype=torch.float64),
            "slope": torch.zeros(2, dtype=torch.float64),
            "curvature": torch.zeros(2, 2, dtype=torch.float64),
        }
        for x, y in ctx.batches(self.held(ctx)):
            logits = ctx.apply("correction", ctx.forward(x).logits)
            device = logits.device
            found = correction_sums(logits, y, ctx.known, ctx.new, weights.to(device), point.to(device))
            total = {n: a + found[n].cpu() for n, a in total.items()}
        return total

    def measure(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """The sums at the point and with the weights that the server sent."""
        return self.sums(ctx, ctx.down["weights"], ctx.down["point"]), ctx.state

    def fit_alone(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """The client's own correction times the images it holds out, and their number; 0 without both kinds."""
        counts = self.counted(ctx)
        if not bool(counts[ctx.new].any()) or not bool(counts[ctx.known & ~ctx.new].any()):
            counts = torch.zeros_like(counts)
        images, weights = counts.sum().cpu(), class_weights(counts)
        point = torch.zeros(2, dtype=torch.float64)
        if int(images):
            point = best_correction(lambda at: self.sums(ctx, weights, at), self.options.decay, self.options.steps)
        return {"fitted": images * point, "images": images}, ctx.state

    # server

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        arrays = server.arrays
        point = self.fitted(server) if server.task and self.options.validation and not server.task_known else None
        if point is not None:
            alpha, beta = (extra_name(self.name, f"correction.{n}") for n in ("alpha", "beta"))
            arrays = {
                **arrays,
                alpha: torch.where(server.new, point[0].to(arrays[alpha]), arrays[alpha]),
                beta: torch.where(server.new, point[1].to(arrays[beta]), arrays[beta]),
            }
        return Finished(arrays), server.exchange(self.remember)

    def fitted(self, server: Server) -> Tensor | None:
        """(alpha, beta) of this increment; None where old and new classes do not both have an image held out."""
        counts = server.exchange(self.count, "all").get("counts")
        if counts is None:
            return None
        counts = counts.to(server.new.device)
        if not bool(counts[server.new].any()) or not bool(counts[server.known & ~server.new].any()):
            return None
        if self.options.fit == "averaged":
            found = server.exchange(self.fit_alone, "all")
            images = int(found["images"])
            return found["fitted"].cpu() / images if images else None
        weights = class_weights(counts)

        def measure(point: Tensor) -> Arrays:
            sums = server.exchange(self.measure, "all", down={"point": point, "weights": weights})
            return {n: a.cpu() for n, a in sums.items()}

        return best_correction(measure, self.options.decay, self.options.steps)

    # anywhere

    def predict(self, predictor: Predictor, x: Tensor) -> Tensor:
        corrected: Tensor = predictor.apply("correction", predictor.forward(x).logits)
        return corrected
