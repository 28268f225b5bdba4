"""An objective of one's own: hpt-hf train --method examples/own_objective.py:half_and_half --config …

The student learns the labels and its own vanilla self on clean images, half and half.
"""

from hpt_hf.method.objectives import Objective, Teachers, distil, tecoa


def loss(views, objective):
    return {name: term / 2 for name, term in (tecoa(views, objective) | distil(views, objective)).items()}


half_and_half = Objective("half_and_half", loss, Teachers(("anchor_clean",)), needs_labels=True)
