"""Those of Avalanche's plugins whose state is saved, each with its own options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from fedcl.cards import Card, option

from .avalanche import COST, LEAVES, NOTES, PLUGINS, Avalanche


class Named(Avalanche):
    """Base: one plugin with an adapter, whose arguments are the options."""

    plugin: ClassVar[str] = ""
    tried_with = {}
    exemplars: ClassVar[tuple[str, ...]] = ()

    def wanted(self) -> tuple[str, Mapping[str, Any]]:
        return PLUGINS + self.plugin, asdict(self.options)


def plugin_card(
    title: str, authors: str, venue: str, year: int, key: str, state: str, notes: str = "", kind: str = "inproceedings"
) -> Card:
    """The card of a plugin of Avalanche's: the paper, what a client keeps, and what to know."""
    place = "booktitle" if kind == "inproceedings" else "journal"
    return Card(
        title=title,
        authors=authors,
        venue=venue,
        year=year,
        bibtex=f"@{kind}{{{key},\n  title = {{{title}}},\n  author = {{{authors.replace(', ', ' and ')}}},\n"
        f"  {place} = {{{venue}}},\n  year = {{{year}}}\n}}",
        certainty="Avalanche's plugin (avalanche-lib 0.6) as it is; checked against Avalanche alone.",
        leaves_client=LEAVES,
        client_state=f"{state}; tasks ended, and the one begun",
        cost=COST,
        notes=f"{notes} {NOTES}".strip(),
    )


class AvalancheEWC(Named):
    """Avalanche's EWCPlugin: a penalty around each earlier task's model, weighed by squared gradients of batches."""

    name = "avalanche_ewc"
    plugin = "EWCPlugin"
    neutral = {"ewc_lambda": 0.0}
    card = plugin_card(
        "Overcoming catastrophic forgetting in neural networks",
        "Kirkpatrick, Pascanu, Rabinowitz and others",
        "PNAS",
        2017,
        "kirkpatrick2017ewc",
        "anchor and importance, two models for each task that is remembered",
        "Each client measures on its own images. The plugin squares the gradients of batch means, not of images, and "
        "has no factor 1/2.",
        "article",
    )

    @dataclass(frozen=True)
    class Options:
        ewc_lambda: float = option(1.0, "weight of the penalty")
        mode: Literal["separate", "online"] = option("separate", "a penalty for each task, or one with decay")
        decay_factor: float = option(0.0, "share of the importance that stays with a task, only for mode=online")
        keep_importance_data: bool = option(False, "mode=online keeps the importance of all tasks")

        def __post_init__(self) -> None:
            if not self.ewc_lambda >= 0:
                raise ValueError(f"ewc_lambda must be at least 0, not {self.ewc_lambda}")
            if not 0 <= self.decay_factor <= 1:
                raise ValueError(f"decay_factor must be in [0, 1], not {self.decay_factor}")
            if self.mode == "separate" and (self.decay_factor or self.keep_importance_data):
                raise ValueError("decay_factor and keep_importance_data are for mode=online")

    def wanted(self) -> tuple[str, Mapping[str, Any]]:
        arguments = asdict(self.options)
        if self.options.mode == "separate":
            arguments["decay_factor"] = None
        return PLUGINS + self.plugin, arguments


class AvalancheSI(Named):
    """Avalanche's SynapticIntelligencePlugin: a penalty weighed by how much a parameter's way lowered the loss."""

    name = "avalanche_si"
    plugin = "SynapticIntelligencePlugin"
    neutral = {"si_lambda": 0.0}
    card = plugin_card(
        "Continual Learning Through Synaptic Intelligence",
        "Zenke, Poole, Ganguli",
        "ICML",
        2017,
        "zenke2017si",
        "anchor, importance and two path integrals, four models",
        "On a CPU Avalanche's plugin keeps views of the parameters, which follow every step, so that all importances "
        "are 0; here the parameters move to fresh memory before each step, which makes it do what it does on a GPU. "
        "The plugin leaves BatchNorm out, cuts an importance at 0.001 and lets it be negative.",
    )

    @dataclass(frozen=True)
    class Options:
        si_lambda: float = option(1.0, "weight of the penalty; the plugin halves it")
        eps: float = option(1e-7, "damping of the path integral's denominator")

        def __post_init__(self) -> None:
            if not (self.si_lambda >= 0 and self.eps > 0):
                raise ValueError(f"si_lambda must be at least 0 and eps above 0, not {self.si_lambda}, {self.eps}")


class AvalancheMAS(Named):
    """Avalanche's MASPlugin: a penalty weighed by the slopes of the squared outputs."""

    name = "avalanche_mas"
    plugin = "MASPlugin"
    neutral = {"lambda_reg": 0.0}
    card = plugin_card(
        "Memory Aware Synapses: Learning What (not) to Forget",
        "Aljundi, Babiloni, Elhoseiny, Rohrbach, Tuytelaars",
        "ECCV",
        2018,
        "aljundi2018mas",
        "anchor and importance, two models",
        "The plugin takes the slopes of batch means, not of images, with the model in training mode; where that leaves "
        "a batch of one image, BatchNorm uses its running statistics for it. The plugin fails at a step whose loss is "
        "exactly 0.",
    )

    @dataclass(frozen=True)
    class Options:
        lambda_reg: float = option(1.0, "weight of the penalty")
        alpha: float = option(0.5, "share of the importance before the present task")

        def __post_init__(self) -> None:
            if not (self.lambda_reg >= 0 and 0 <= self.alpha <= 1):
                raise ValueError(f"lambda_reg >= 0 and alpha in [0, 1], not {self.lambda_reg}, {self.alpha}")


class AvalancheLwF(Named):
    """Avalanche's LwFPlugin: distillation from the model at the end of the previous task, on the classes it knew."""

    name = "avalanche_lwf"
    plugin = "LwFPlugin"
    neutral = {"alpha": 0.0}
    card = plugin_card(
        "Learning without Forgetting",
        "Li, Hoiem",
        "ECCV",
        2016,
        "li2016lwf",
        "the previous model and the classes the client had seen",
        "Only classes that the client itself has seen are distilled. The plugin leaves the previous model in training "
        "mode: its BatchNorm uses the batch and its statistics move on; the loss has no factor of the squared "
        "temperature.",
    )

    @dataclass(frozen=True)
    class Options:
        alpha: float = option(1.0, "weight of the distillation")
        temperature: float = option(2.0, "temperature of both softmaxes")

        def __post_init__(self) -> None:
            if not (self.alpha >= 0 and self.temperature > 0):
                raise ValueError(f"alpha >= 0 and temperature > 0, not {self.alpha} and {self.temperature}")


class AvalancheAGEM(Named):
    """Avalanche's AGEMPlugin: a gradient that would raise the loss on the memory is projected."""

    name = "avalanche_agem"
    plugin = "AGEMPlugin"
    exemplars = ("ids",)
    card = plugin_card(
        "Efficient Lifelong Learning with A-GEM",
        "Chaudhry, Ranzato, Rohrbach, Elhoseiny",
        "ICLR",
        2019,
        "chaudhry2019agem",
        "image ids, patterns_per_experience for each task, at most (the images are the client's own)",
        "The memory grows with the tasks, and the plugin fails once there are more tasks than sample_size. Its images "
        "are not augmented; the order in which they are drawn begins anew in each round.",
    )

    @dataclass(frozen=True)
    class Options:
        patterns_per_experience: int = option(100, "images that stay of each task", unit="images")
        sample_size: int = option(64, "images of a reference gradient, shared by the tasks", unit="images")

        def __post_init__(self) -> None:
            if self.patterns_per_experience < 1 or self.sample_size < 1:
                raise ValueError("patterns_per_experience and sample_size must be at least 1")


class AvalancheReplay(Named):
    """Avalanche's ReplayPlugin: each step sees a batch of the task and one of a memory shared by the earlier tasks."""

    name = "avalanche_replay"
    plugin = "ReplayPlugin"
    exemplars = ("ids",)
    neutral = {"mem_size": 0}
    card = plugin_card(
        "On Tiny Episodic Memories in Continual Learning",
        "Chaudhry, Rohrbach, Elhoseiny, Ajanthan, Dokania, Torr, Ranzato",
        "arXiv:1902.10486",
        2019,
        "chaudhry2019tiny",
        "image ids, mem_size at most (the images are the client's own), and their random weights",
        "With a memory the plugin makes the batches itself: federation.batch_min is not asked for, the order is "
        "another one than the engine's. Where the memory is smaller than batch_size_mem, all of it is in each step.",
        "article",
    )

    @dataclass(frozen=True)
    class Options:
        mem_size: int = option(200, "images in a client's memory, equally many of each task", unit="images")
        batch_size: int = option(0, "images of the task a step; 0 takes federation.batch_size", unit="images")
        batch_size_mem: int = option(0, "memory images a step; 0 takes federation.batch_size", unit="images")

        def __post_init__(self) -> None:
            if min(self.mem_size, self.batch_size, self.batch_size_mem) < 0:
                raise ValueError("mem_size, batch_size and batch_size_mem must be at least 0")

    def wanted(self) -> tuple[str, Mapping[str, Any]]:
        return PLUGINS + self.plugin, {n: v if n == "mem_size" else v or None for n, v in asdict(self.options).items()}
