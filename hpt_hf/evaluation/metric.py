"""A metric for the `evaluate` library: clean and robust accuracy with intervals. The evaluator counts with it.

metric = evaluate.load("hpt_hf/evaluation/metric.py")  # or hpt_hf.evaluation.metric.RobustAccuracy()
metric.add_batch(predictions=clean, adv_predictions=attacked, references=labels)
metric.compute()
"""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import numpy as np

from hpt_hf.evaluation.statistics import wilson

search_path = sys.path
try:  # the library, and no script of that name beside the one that runs, such as recipes/evaluate.py
    sys.path = [folder for folder in search_path if not Path(folder, "evaluate.py").is_file()]
    import evaluate
finally:
    sys.path = search_path


class RobustAccuracy(evaluate.Metric):
    """Images that are right, clean and under attack: robust if both answers are, since an attack may do nothing.

    With `num_process`, `process_id` and one `experiment_id`, rank 0 gets the result over all, the others None.
    """

    def _info(self) -> evaluate.MetricInfo:
        feature = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Clean and robust accuracy in percent, with Wilson's 95% intervals, and the counts of images.",
            citation="Wilson 1927, Journal of the American Statistical Association 22",
            inputs_description="predictions on clean images, adv_predictions on attacked ones, references: labels",
            features=datasets.Features({"predictions": feature, "adv_predictions": feature, "references": feature}),
        )

    def _compute(self, predictions, adv_predictions, references) -> dict:
        predictions, attacked, labels = (np.asarray(v) for v in (predictions, adv_predictions, references))
        if not len(labels):
            raise ValueError("no images were added: call add_batch before compute")
        clean = predictions == labels
        robust = clean & (attacked == labels)
        per_class = {}  # label -> counts of images, clean and robust
        for label in np.unique(labels):
            own = labels == label
            per_class[int(label)] = tuple(int(part.sum()) for part in (own, own & clean, own & robust))
        n, n_clean, n_robust = len(labels), int(clean.sum()), int(robust.sum())
        found = {"n": n, "n_clean": n_clean, "n_robust": n_robust, "per_class": per_class}
        found |= {"clean": 100 * n_clean / n, "clean_interval": wilson(n_clean, n)}
        return found | {"robust": 100 * n_robust / n, "interval": wilson(n_robust, n)}
