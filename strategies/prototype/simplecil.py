"""SimpleCIL: a frozen encoder, and the mean feature of each class as the weights of a cosine classifier."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedcl.cards import Card, option
from fedcl.strategy import Predictor

from ._pooled import ADAPT, STATISTICS, Adapt, FrozenAfter, by_cosine

CARD = Card(
    title="Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity are All "
    "You Need",
    authors="Zhou, Cai, Ye, Zhan, Liu",
    venue="IJCV",
    year=2024,
    bibtex="""@article{zhou2024revisiting,
  title = {Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity are All
           You Need},
  author = {Zhou, Da-Wei and Cai, Zi-Wen and Ye, Han-Jia and Zhan, De-Chuan and Liu, Ziwei},
  journal = {International Journal of Computer Vision},
  year = {2024}
}""",
    certainty="Rule read in the released code: the weights of the cosine classifier are the means of the features, "
    "which are not normalised first. The federated form is exact: sums and counts add up. The scale of the "
    "cosine changes no prediction and is left out.",
    leaves_client=STATISTICS,
    server_state="sums and counts of all classes so far",
    cost="One forward pass over the task's images and one small upload at the end of a task.",
    notes="The encoder should be a pre-trained one: init=FILE or init=RUN@task0, or model.checkpoint. Rounds train "
    "the head alone, which predicts until the first task's end and never after it: federation.rounds=1 "
    "federation.epochs=1 is enough. adapt=first trains the encoder in the first task, adapt=all in all of them "
    "(means of old classes then drift away from the features). Counts of images a class leave the client.",
)


class SimpleCIL(FrozenAfter):
    """Predicts the class whose mean feature has the largest cosine with the image's; the encoder is never trained."""

    name = "simplecil"
    family = "prototype"
    card = CARD

    @dataclass(frozen=True)
    class Options:
        adapt: Adapt = option("none", ADAPT)

    def scores(self, predictor: Predictor, features: Tensor) -> Tensor:
        return by_cosine(predictor, features)
