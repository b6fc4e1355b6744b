"""Category discovery: a labelled base session, then unlabelled sessions that mix old classes with new ones."""

from __future__ import annotations

from fractions import Fraction

from fedcl import config as settings
from fedcl.cards import Card

from .open_world import SESSIONS, OpenWorld


class CategoryDiscovery(OpenWorld):
    """A labelled base session, then sessions without any label, of old and of new classes."""

    name = "category_discovery"
    aliases = ("c_gcd", "gcd")
    summary = "labelled base, then unlabelled mixes of old and new classes (scenario.base, increment, mixed)"
    probes = ("clustering",)
    card = Card(
        title="MetaGCD: Learning to Continually Learn in Generalized Category Discovery",
        authors="Wu et al.",
        venue="ICCV",
        year=2023,
        certainty="The sessions are the paper's: a labelled base (7 classes of CIFAR-10, 80 of CIFAR-100), then "
        "unlabelled mixes of known and new classes. Its exact numbers of images a class and session are not; "
        "scenario.mixed stands for them.",
        notes=f"{SESSIONS} The probe clustering runs k-means on the frozen features of the test images of all classes "
        "shown so far, with their number known, and gives the accuracy under the best assignment: all, old (base) and "
        "new classes.",
    )
    reads = ("base", "increment", "mixed")

    def labelled(self, config: settings.Scenario) -> Fraction:
        """None of them."""
        return Fraction(0)
