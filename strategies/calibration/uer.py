"""UER: new images are learned by the angle to the class weights alone, replayed ones by angle and norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcl.blocks.losses import cross_entropy
from fedcl.blocks.memory import MemoryOptions, Rehearsal, others
from fedcl.cards import Card, option
from fedcl.errors import UsageError
from fedcl.strategy import Step

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.stream import Split, Stream


def angles(features: Tensor, weights: Tensor) -> Tensor:
    """(B, C) cosines between features (B, d) and class weights (C, d).

    >>> angles(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 5.0]])).tolist()
    [[1.0, 0.0]]
    """
    return F.normalize(features, dim=-1) @ F.normalize(weights, dim=-1).mT


class UER(Rehearsal):
    """The logit is angle times norms; what prefers recent classes lies in the angle, so new images move that alone."""

    name = "uer"
    family = "calibration"
    stackable = True
    neutral = {"budget": 0, "stream": "product"}
    tried_with = {"model.head_bias": False}
    card = Card(
        title="UER: A Heuristic Bias Addressing Approach for Online Continual Learning",
        authors="Lin, Feng, Zhang, Qiao, Li, Ye",
        venue="ACM Multimedia",
        year=2023,
        bibtex="""@inproceedings{lin2023uer,
  title = {{UER}: A Heuristic Bias Addressing Approach for Online Continual Learning},
  author = {Lin, Huiwei and Feng, Shanshan and Zhang, Baoquan and Qiao, Hongliang and Li, Xutao and Ye, Yunming},
  booktitle = {ACM Multimedia},
  year = {2023}
}""",
        certainty="Low: the loss is rebuilt from the abstract (the released repository is empty): cosine "
        "logits for the stream, dot products for the memory, both without a bias. The scale, 1/0.09, is "
        "that of the same author's PCR. The federated form is ours.",
        leaves_client=(("stored", "1", "sum", "end of a task"),),
        client_state="image ids within the byte budget (the images are the client's own) and their priorities",
        cost="Twice the images a step once the memory is filled. Only the number of stored images leaves a client.",
        notes="Needs a linear head without a bias. Class weights are averaged as arrays; averaging "
        "directions and norms apart, as one could, is not done. The memory is that of er_ace. "
        "stream=product is plain replay.",
    )

    @dataclass(frozen=True)
    class Options(MemoryOptions):
        stream: Literal["angle", "product"] = option("angle", "logits of the stream's images: cosines, or dot products")
        scale: float = option(1 / 0.09, "factor on the cosines")

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 < self.scale < float("inf"):
                raise ValueError(f"scale must be above 0, not {self.scale}")

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        super().check(config, stream, split)
        if config.model.head != "linear" or config.model.head_bias:
            key, value = (
                ("model.head", config.model.head) if config.model.head != "linear" else ("model.head_bias", True)
            )
            raise UsageError(
                key, value, "a linear head without a bias (model.head=linear model.head_bias=false) for uer"
            )

    def task_loss(self, step: Step) -> Tensor:
        output, known = step.output, step.among(step.known).expand(len(step.y), -1)
        if self.options.stream == "product":
            return cross_entropy(output.logits, step.y, known)
        cosines = self.options.scale * angles(output.features, step.params["head.weight"])
        parts = [(cosines, step.batch.rows("stream")), (output.logits, others(step, "stream"))]
        terms = [cross_entropy(logits[rows], step.y[rows], known[rows]) for logits, rows in parts if len(rows)]
        return torch.stack(terms).sum()
