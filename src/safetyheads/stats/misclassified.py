"""Corrects a rate for the errors of the judge that counted it.

The judge's errors are known from answers that people labelled. Where labels are of other answers, its sensitivity and
specificity are carried over (Rogan and Gladen); where a random part of the very answers is labelled, these labels
correct the rate of the rest (prediction-powered inference).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # its modules load on first use

from safetyheads.errors import InputError
from safetyheads.stats.intervals import CONFIDENCE, FloatArray, Interval, Rate, counted, independent_count

N_DRAWS = 20_000
"""Draws of :func:`prediction_powered`; the bounds move by less than .005 from seed to seed."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How often a judge is right about one label."""

    sensitivity: Rate
    """Of the answers that people give the label, those that the judge does."""
    specificity: Rate
    """Of the answers that people do not give it, those that the judge does not either."""
    worth: tuple[float, float] | None = None
    """Independent answers that each share is worth: fewer than it has where several are to one prompt or to
    near-duplicates; None takes them all for independent."""

    @property
    def n(self) -> int:
        """Labelled answers that the judge scored."""
        return self.sensitivity.n + self.specificity.n


@dataclass(frozen=True, slots=True)
class Corrected:
    """A rate after correction, with the uncertainty of the answers and of the labels."""

    rate: float | None
    """From 0 to 1; None where the labels allow none."""
    interval: Interval | None
    """95 %."""
    n_labelled: int
    """Labelled answers that it rests on."""
    how: str
    """``Rogan-Gladen``, ``prediction-powered``, or why there is none."""


def accuracy_of(judged: FloatArray, truth: FloatArray, clusters: Sequence[int] | None = None) -> Accuracy:
    """Sensitivity and specificity of verdicts against labels, both 0 or 1; a verdict that is NaN is unscored.

    ``clusters`` [n_labels] says which answers are to one prompt or to near-duplicates; None where each stands alone.
    """
    if judged.shape != truth.shape:
        raise InputError(f"{len(judged)} verdicts for {len(truth)} labels")
    right = np.where(np.isnan(judged), np.nan, judged == truth)
    shares, worth = [], []
    for label in (1, 0):
        of = truth == label
        together = None if clusters is None else np.asarray(clusters)[of].tolist()
        shares.append(counted(right[of], together if together and len(set(together)) < len(together) else None))
        worth.append(independent_count(right[of], together)[1] if of.any() else 0.0)
    return Accuracy(shares[0], shares[1], (worth[0], worth[1]))


def rogan_gladen(judged: FloatArray, accuracy: Accuracy, clusters: Sequence[int] | None = None) -> Corrected:
    """The rate that a judge with these errors would have had to see.

    (rate + specificity - 1) / (sensitivity + specificity - 1), cut to 0 and 1 (Rogan and Gladen, American Journal of
    Epidemiology 107, 1978). The interval is that of Lang and Reiczigel (Preventive Veterinary Medicine 113, 2014):
    every share is drawn to 1/2, and the errors of all three add up. It needs a judge that is better than chance.

    ``judged`` are the judge's verdicts [n_prompts, n_answers]: 0, 1, or NaN where it gave none. Several answers to a
    prompt, or to ``clusters`` of near-duplicates [n_prompts], count as many as their variance leaves.
    """
    labels = (accuracy.sensitivity, accuracy.specificity)
    count, size = independent_count(judged, clusters)
    if not size or any(share.rate is None for share in labels):
        return Corrected(None, None, accuracy.n, "labels of one kind only" if size else "nothing scored")
    sensitivity, specificity = (float(share.rate or 0.0) for share in labels)
    if sensitivity + specificity <= 1:
        return Corrected(None, None, accuracy.n, "the judge is no better than chance")
    z = float(scipy.stats.norm.ppf((1 + CONFIDENCE) / 2))
    n = size + z * z
    p = (count + z * z / 2) / n
    worth = accuracy.worth or (labels[0].n, labels[1].n)
    n_se, n_sp = worth[0] + 2, worth[1] + 2
    se, sp = (sensitivity * worth[0] + 1) / n_se, (specificity * worth[1] + 1) / n_sp
    gain = se + sp - 1
    interval: Interval = (0.0, 1.0)
    if gain > 0:
        centre = (p + sp - 1) / gain
        of_se, of_sp = se * (1 - se) / n_se, sp * (1 - sp) / n_sp
        shift = 2 * z * z * (centre * of_se - (1 - centre) * of_sp)
        half = z * math.sqrt(p * (1 - p) / n + centre**2 * of_se + (1 - centre) ** 2 * of_sp) / gain
        low, high = np.clip([centre + shift - half, centre + shift + half], 0.0, 1.0).tolist()
        interval = low, high
    point = float(np.clip((count / size + specificity - 1) / (sensitivity + specificity - 1), 0.0, 1.0))
    return Corrected(point, (min(interval[0], point), max(interval[1], point)), accuracy.n, "Rogan-Gladen")


def prediction_powered(
    judged: FloatArray, truth: FloatArray, seed: int = 0, clusters: Sequence[int] | None = None
) -> Corrected:
    """The rate of answers of which a random part is labelled.

    Answers are split by the judge's verdict; each part has the rate of its labelled answers, and counts as often as the
    judge gave that verdict. For two verdicts this is the prediction-powered estimate of least variance (Angelopoulos et
    al., Science 382, 2023, and PPI++). Labelled answers that the judge left unscored are left out, as in the raw rate.

    ``judged`` and ``clusters`` are as in :func:`rogan_gladen`, ``truth`` people's labels [n_prompts, n_answers], NaN
    where there is none; which ones are labelled is chance. Behind the interval each share is drawn from its posterior
    under Jeffreys' prior, of as many answers as several to a prompt, or to near-duplicates, are worth.
    """
    truth = np.where(np.isnan(judged), np.nan, truth)
    n_labelled = int((~np.isnan(truth)).sum())
    if not n_labelled:
        return Corrected(None, None, n_labelled, "no labelled answers")
    draws, (yes, size) = np.random.default_rng(seed), independent_count(judged, clusters)
    share = draws.beta(yes + 0.5, size - yes + 0.5, N_DRAWS)
    point, total = 0.0, np.zeros(N_DRAWS)
    for verdict, weight, weights in ((1, yes / size, share), (0, 1 - yes / size, 1 - share)):
        part = np.where(judged == verdict, truth, np.nan)
        count, n = independent_count(part, clusters)
        # A verdict that nobody checked is taken to be right, as far as the point goes; its interval is wide.
        point += weight * (count / n if n else float(verdict))
        total += weights * draws.beta(count + 0.5, n - count + 0.5, N_DRAWS)
    low, high = np.quantile(total, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
    return Corrected(point, (min(low, point), max(high, point)), n_labelled, "prediction-powered")
