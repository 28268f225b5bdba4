"""An attack of one's own: hpt-hf evaluate --attack examples/own_attack.py:lower_gap --model … --dataset …

PGD that lowers the gap between the right class and the runner-up; the loop, the ball and the noise are the package's.
"""

from functools import partial

from hpt_hf.attacks.pgd import PGD
from hpt_hf.attacks.suite import OwnAttack, plain


def gap(logits, labels):
    right = logits.gather(1, labels[:, None])[:, 0]
    return logits.scatter(1, labels[:, None], -float("inf")).amax(1) - right


lower_gap = OwnAttack(partial(plain, gap, PGD), steps=10)
