"""CCVR: the head is trained again on features drawn from class Gaussians that all clients' features pool to."""

from __future__ import annotations

from dataclasses import dataclass

from fedcl.blocks.statistics import Form, class_means
from fedcl.cards import Card, option
from fedcl.strategy import Arrays, Server

from ._post_hoc import GaussianHead, Sgd, Use


class CCVR(GaussianHead):
    """Classifier calibration with virtual representations, at the end of each task."""

    name = "ccvr"
    neutral = {"use": "evaluation"}
    card = Card(
        title="No Fear of Heterogeneity: Classifier Calibration for Federated Learning with Non-IID Data",
        authors="Luo, Chen, Hu, Zhang, Liang, Feng",
        venue="NeurIPS",
        year=2021,
        bibtex="""@inproceedings{luo2021ccvr,
  title = {No Fear of Heterogeneity: Classifier Calibration for Federated Learning with Non-{IID} Data},
  author = {Luo, Mi and Chen, Fei and Hu, Dapeng and Zhang, Yifan and Liang, Jian and Feng, Jiashi},
  booktitle = {NeurIPS},
  year = {2021}
}""",
        certainty="Pooled means and covariances certain (they are those of the union); Gaussian features and a head "
        "trained on them with cross entropy certain. The optimiser of that training is not in the specification: rate, "
        "epochs and batch size are those of a released simplification, 100 features a class the low end of 100 to "
        "2000.",
        leaves_client=(
            ("counts", "classes", "sum", "end of a task"),
            ("sums", "classes x features, float64", "sum", "end of a task"),
            ("outer", "classes x features x features, float64", "sum", "end of a task (covariance=full)"),
            ("squares", "classes x features, float64", "sum", "end of a task (covariance=diagonal)"),
            ("scatter", "features x features, float64", "sum", "end of a task (covariance=shared)"),
        ),
        server_state="counts, sums and second moments of all classes so far; the task of each class",
        cost="One forward pass over the task's images and one upload at the end of a task; a head trained at the "
        "server.",
        deviations="Clients send sums, not means and covariances: the server's pooled ones are the same, and a secure "
        "sum can add them up. The released simplification with diagonal standard deviations used as variances is not "
        "offered; `covariance=diagonal` draws from the pooled variances.",
        notes="Counts of images a class leave the client. The paper calibrates once, after the last round: here at the "
        "end of each task, for evaluation alone (`use=evaluation`). Old classes keep the Gaussian of their own task, "
        "from which a trained encoder drifts away. Classes without an image keep their row of the head; a class of one "
        "image is drawn around it with the jitter alone. Where images are seen once (federation.passes=once), those of "
        "a round are counted at its end, by the model of that round.",
    )

    @dataclass(frozen=True)
    class Options:
        draws: int = option(100, "features drawn a class")
        epochs: int = option(100, "passes over the drawn features")
        lr: float = option(0.01, "learning rate of the head")
        momentum: float = option(0.9, "momentum of the head's training")
        weight_decay: float = option(0.0, "weight decay of the head's training")
        batch_size: int = option(128, "drawn features a step")
        jitter: float = option(1e-4, "added to each variance of a feature")
        covariance: Form = option("full", "a matrix a class, its diagonal alone, or one matrix for all classes")
        use: Use = option("evaluation", "what the new head is for: evaluation alone, or the next task starts from it")

        def __post_init__(self) -> None:
            if self.draws < 1:
                raise ValueError(f"draws must be at least 1, not {self.draws}")
            if not self.jitter >= 0:
                raise ValueError(f"jitter must be at least 0, not {self.jitter}")
            self.recipe()

        def recipe(self) -> Sgd:
            """How the head is trained."""
            return Sgd(self.epochs, self.lr, self.momentum, self.weight_decay, self.batch_size, cosine=False)

    # server

    def calibrated(self, server: Server, moments: Arrays) -> Arrays:
        features, labels = self.draw(server, moments, class_means(moments), self.options.draws, self.options.jitter)
        return self.fit_head(server, features, labels, self.options.recipe())
