"""Reports: Scores as JSON files, and the tables and pictures made of them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hpt_hf.scores import Score, mean


def write_json(path: str | Path, value: object) -> Path:
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> Path:
    """Write whole or not at all: a reader, or a full disk, never leaves half a file under the final name.

    Raises:
        OSError: it could not be written; the message says what and why, and nothing half-written is left.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"{path} could not be written ({error.strerror}); what stood there before still does"
        ) from error
    return path


def progress(message: str) -> None:
    """One line for the person watching, apart from what the program prints as its result."""
    print(message, file=sys.stderr, flush=True)


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers are right-aligned and shown with one decimal."""
    rows = [[f"{cell:.1f}" if isinstance(cell, float) else str(cell).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(str(h)), *(len(r[i]) for r in rows), 3) for i, h in enumerate(header)]
    lines = ["| " + " | ".join(str(h).ljust(w) for h, w in zip(header, widths, strict=True)) + " |"]
    lines += ["|" + "|".join(("-" * (w + 1) + ":") if i else "-" * (w + 2) for i, w in enumerate(widths)) + "|"]
    lines += [
        "| " + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))) + " |"
        for r in rows
    ]
    return "\n".join(lines)


def score_table(scores: Sequence[Score]) -> str:
    """One row a Score, with intervals and verdict; the last rows are each model's unweighted mean over the sets.

    Raises:
        ValueError: no Scores, or Scores of different protocols, attacks or threats: their numbers may not stand in one table.
    """
    if not scores:
        raise ValueError("no Scores: there is nothing to make a table of")
    kinds = {s.question for s in scores}
    if len(kinds) > 1:
        raise ValueError(
            f"one table holds one protocol, attack and threat, these Scores have {sorted(kinds)}: make a table of each"
        )
    models = list(dict.fromkeys((s.model, s.fingerprint) for s in scores))
    rows = [
        (
            s.dataset,
            s.model,
            s.n,
            s.classes,
            s.clean,
            "{:.1f}–{:.1f}".format(*s.clean_interval),
            s.robust,
            "{:.1f}–{:.1f}".format(*s.interval),
            s.verdict,
        )
        for s in scores
    ]
    for model in models:
        part = [s for s in scores if (s.model, s.fingerprint) == model]
        doubted = sum(s.verdict == "suspicious" for s in part)
        means = mean(part)
        rows.append(
            (
                "mean",
                model[0],
                sum(s.n for s in part),
                "",
                means["clean"],
                "",
                means["robust"],
                "",
                f"{doubted} suspicious" if doubted else "",
            )
        )
    header = ("data set", "model", "n", "classes", "clean %", "95%", "robust %", "95%", "verdict")
    if len(models) == 1:  # its name stands in the heading
        header, *rows = ((row[0], *row[2:]) for row in (header, *rows))
    return markdown(header, rows)


def story(summary: Mapping, examples: Sequence, path: str | Path) -> Path:
    """The quickstart's picture: the phenomenon, clean against robust accuracy of every model, and attacked pictures with their predictions.

    Args:
        summary: what summary.json holds.
        examples: (clean, adversarial, truth, {model: prediction on the adversarial picture}); images are (height, width, 3) arrays in [0, 1].
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {"vanilla": "vanilla student", "proxy": "vanilla proxy", "hpt": "HPT", "hpt_gpd": "HPT-GPD", "tecoa": "TeCoA"}
    colours = {"vanilla": "#7f7f7f", "proxy": "#bcbd22", "hpt": "#d62728", "hpt_gpd": "#1f77b4", "tecoa": "#2ca02c"}
    figure = plt.figure(figsize=(13, 7.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    left, right = top.subplots(1, 2, width_ratios=(1, 1.4))
    phenomenon = summary["proxy_on_student_adversarial"]
    vanilla = summary["models"]["vanilla"]
    bars = [
        ("student,\nclean", vanilla["clean"]),
        ("student,\nattacked", vanilla["robust"]),
        ("proxy,\nclean", phenomenon["clean"]),
        ("proxy, on the\nstudent's attack", phenomenon["adversarial"]),
    ]
    drawn = left.bar([b[0] for b in bars], [b[1] for b in bars], color=["#7f7f7f", "#c7c7c7", "#bcbd22", "#dbdb8d"])
    left.bar_label(drawn, fmt="%.0f")
    left.set(ylim=(0, 109), ylabel="accuracy, %", title="Nobody is robust, but the proxy survives the student's attack")
    for key, model in summary["models"].items():
        right.scatter(model["clean"], model["robust"], s=110, color=colours[key], zorder=3)
        # To the left, where there is always room: the best models stand at the right edge.
        place = {"textcoords": "offset points", "xytext": (-9, 0), "ha": "right", "va": "center", "zorder": 4}
        right.annotate(names[key], (model["clean"], model["robust"]), color=colours[key], weight="bold", **place)
    clean, robust = ([m[k] for m in summary["models"].values()] for k in ("clean", "robust"))
    right.set(xlim=(min(clean) - 18, max(clean) + 4), ylim=(-4, max(robust) * 1.15 + 4))
    right.set(xlabel="clean accuracy, %", ylabel="robust accuracy, %")
    right.set_title(f"Mean of {len(summary['tasks'])} zero-shot tasks, {summary['threat']}")
    right.grid(alpha=0.3)
    axes = bottom.subplots(2, len(examples), squeeze=False)
    bottom.suptitle("The same picture, clean and attacked for each model: what each then says", fontsize=11)
    for column, (clean, adversarial, truth, said) in enumerate(examples):
        for axis, image in zip(axes[:, column], (clean, adversarial), strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set_xticks([]), axis.set_yticks([])
        axes[0, column].set_title(truth, fontsize=8)
        for line, (key, prediction) in enumerate(said.items()):
            right_answer = prediction == truth
            axes[1, column].text(
                0.5,
                -0.08 - 0.13 * line,
                f"{names[key]}: {'✓' if right_answer else prediction}",
                transform=axes[1, column].transAxes,
                ha="center",
                va="top",
                fontsize=7,
                color=colours[key] if right_answer else "#444444",
            )
    axes[0, 0].set_ylabel("clean"), axes[1, 0].set_ylabel("attacked")
    path = Path(path)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def front(points: Sequence[tuple], path: str | Path, *, titles: Sequence[str], attack: str) -> Path:
    """Clean against robust accuracy along the dial, one panel for each kind of data that was measured; the chosen point is marked in all.

    Args:
        points: (weight, summary on the first kind, summary on the second or None, chosen); a summary holds clean, robust and their intervals or None.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [i for i in range(len(titles)) if points[0][1 + i]]
    figure, axes = plt.subplots(1, len(shown), figsize=(5.6 * len(shown), 4.6), layout="constrained", squeeze=False)
    for axis, which in zip(axes[0], shown, strict=True):
        parts = [p[1 + which] for p in points]
        x, y = [p["clean"] for p in parts], [p["robust"] for p in parts]
        axis.plot(x, y, color="#7f9fbf", zorder=1)
        if parts[0]["clean_interval"]:
            bars = {}
            for key, centre, name in (("xerr", x, "clean_interval"), ("yerr", y, "robust_interval")):
                bars[key] = [
                    [max(0, c - p[name][0]) for c, p in zip(centre, parts, strict=True)],
                    [max(0, p[name][1] - c) for c, p in zip(centre, parts, strict=True)],
                ]
            axis.errorbar(x, y, **bars, fmt="none", ecolor="#c9d3dd", elinewidth=1, zorder=0)
        for (weight, *_, chosen), a, b in zip(points, x, y, strict=True):
            axis.scatter(a, b, s=110 if chosen else 36, color="#d62728" if chosen else "#1f77b4", zorder=3)
            label = f"{weight:g}" + " chosen" * chosen
            axis.annotate(
                label, (a, b), xytext=(6, 6), textcoords="offset points", color="#d62728" if chosen else "#444444", fontsize=8
            )
        axis.set(xlabel="clean accuracy, %", ylabel="robust accuracy, %")
        axis.set_title(titles[which], fontsize=10)
        axis.grid(alpha=0.3)
    figure.suptitle(f"share of the robust weights; {attack}", fontsize=10)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path
