"""The metric `hpt_hf` for the `evaluate` library: clean and robust accuracy with intervals, offline and over several processes.

metric = evaluate.load("hpt_hf/metric.py")  # or hpt_hf.metric.RobustAccuracy()
metric.add_batch(predictions=clean, adv_predictions=attacked, references=labels)
metric.compute()
"""

from __future__ import annotations

import datasets
import evaluate
import numpy as np

from hpt_hf.evaluation.statistics import wilson


class RobustAccuracy(evaluate.Metric):
    """Share of pictures answered rightly, clean and attacked, in percent.

    A picture is robust if both answers are right: an attack may leave it as it is, so robust never exceeds clean. With `num_process` and
    `process_id` (and one `experiment_id`) rank 0 gets the result over all processes, the others None, as everywhere in `evaluate`.
    """

    def _info(self) -> evaluate.MetricInfo:
        feature = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Clean and robust accuracy in percent, with Wilson's 95% intervals.",
            citation="Wilson 1927, Journal of the American Statistical Association 22",
            inputs_description="predictions: answers on clean pictures; adv_predictions: on attacked ones; references: labels",
            features=datasets.Features({"predictions": feature, "adv_predictions": feature, "references": feature}),
        )

    def _compute(self, predictions, adv_predictions, references) -> dict:
        predictions, attacked, labels = (np.asarray(v) for v in (predictions, adv_predictions, references))
        right = predictions == labels
        robust = right & (attacked == labels)
        n = len(labels)
        if n == 0:
            raise ValueError("no pictures were added: an accuracy needs at least one; call add_batch before compute")
        return {
            "n": n,
            "clean": 100 * float(right.mean()),
            "clean_interval": wilson(int(right.sum()), n),
            "robust": 100 * float(robust.mean()),
            "interval": wilson(int(robust.sum()), n),
        }
