"""Building blocks that strategies share: pure functions and small classes with the names of the field.

Losses: :mod:`~fedcl.blocks.losses` (distillation, penalties, masks), :mod:`~fedcl.blocks.class_counts` (margins for a
long tail), :mod:`~fedcl.blocks.contrastive_losses` (labels and pairs), :mod:`~fedcl.blocks.view_losses` (two views),
:mod:`~fedcl.blocks.prototype_losses`. Statistics that clients send and the server adds up:
:mod:`~fedcl.blocks.statistics`, heads that follow from them: :mod:`~fedcl.blocks.closed_form`, how they move:
:mod:`~fedcl.blocks.feature_drift`. Gradients: :mod:`~fedcl.blocks.subspaces`, :mod:`~fedcl.blocks.updates`. Images:
:mod:`~fedcl.blocks.memory` (exemplars), :mod:`~fedcl.blocks.mixup`, :mod:`~fedcl.blocks.generators` and
:mod:`~fedcl.blocks.inversion` (data-free).
"""
