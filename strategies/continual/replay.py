"""Experience replay: each client keeps exemplars of its own past, within a byte budget, for every step."""

from __future__ import annotations

from fedcl.blocks.memory import Rehearsal
from fedcl.cards import Card


class Replay(Rehearsal):
    """Each step sees a batch of the stream and a batch of the client's own memory, with one cross entropy over both."""

    name = "replay"
    aliases = ("er",)
    family = "continual"
    stackable = True
    neutral = {"budget": 0}
    card = Card(
        title="On Tiny Episodic Memories in Continual Learning",
        authors="Chaudhry, Rohrbach, Elhoseiny, Ajanthan, Dokania, Torr, Ranzato",
        venue="arXiv:1902.10486",
        year=2019,
        bibtex="""@article{chaudhry2019tiny,
  title = {On Tiny Episodic Memories in Continual Learning},
  author = {Chaudhry, Arslan and Rohrbach, Marcus and Elhoseiny, Mohamed and Ajanthan, Thalaiyasingam and
            Dokania, Puneet K. and Torr, Philip H. S. and Ranzato, Marc'Aurelio},
  journal = {arXiv:1902.10486},
  year = {2019}
}""",
        certainty="Certain: a batch of the stream and a batch of the memory, cross entropy over both; "
        "reservoir sampling. "
        "The federated form, one memory a client that never leaves it, is ours and the usual one.",
        leaves_client=(("stored", "1", "sum", "end of a task"),),
        client_state="image ids within the byte budget (the images are the client's own) and their priorities",
        cost="Twice the images a step once the memory is filled. Only the number of stored images leaves a client.",
        notes="A client fills its memory at the end of a task, from its images of that task; where images are seen "
        "once (federation.passes=once), after each round from those of the round, and then the number of stored images "
        "does not leave it. An image costs "
        "one byte a pixel "
        "and channel. `policy=class_balanced` is GDumb's greedy rule. A client without images of the task "
        "does not train, "
        "whatever it remembers.",
    )
