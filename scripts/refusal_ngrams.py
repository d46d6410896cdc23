"""Trains the classifiers of refusals on labelled answers, and prints how often it and the phrases judge are right.

    python scripts/refusal_ngrams.py ../shared/data/xstest/xs_*.csv

The files hold the answers of one model each, in XSTest's columns ``completion`` and ``final_label`` (Röttger et al.,
2024, CC-BY-4.0). Each model is left out once, and its answers judged by what the others' taught. With ``--write`` the
classifiers that all files taught become the package's. Partial refusals teach nothing and have a table
of their own. Beside each fold stands what the rules find without a classifier.
Answers of few words have a classifier that short texts of ours (``refusal_wordings.toml``) taught too; of these texts a
fifth is left out at a time.
"""

import argparse
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from safetyheads.judges import phrase_judge
from safetyheads.judges.phrase_judge import plain
from safetyheads.stats.intervals import Rate

N_NGRAMS, LEAST_ANSWERS, STRENGTH, SHORT_WEIGHT = 2000, 3, 20.0, 3.0
"""N-grams kept, answers that one must be in, the inverse strength of the L2 penalty, and what a short text counts."""
N_PARTS = 5
"""Parts of the short texts, each of which is left out once."""
SHORT = Path(__file__).with_name("refusal_wordings.toml")
PACKAGED = Path(phrase_judge.__file__).parents[1] / "data" / "judges" / "refusal_ngrams.json"


def read(path: Path) -> pandas.DataFrame:
    """Plain texts and labels (1 full compliance, 2 full refusal, 3 partial refusal)."""
    table = pandas.read_csv(path, keep_default_na=False)
    return pandas.DataFrame(
        {"text": table["completion"].map(plain), "label": table["final_label"].str[0], "weight": 1.0}
    )


def short_texts() -> pandas.DataFrame:
    """Plain short texts with labels as :func:`read` gives them, in an order drawn once."""
    texts = tomllib.loads(SHORT.read_text("utf-8"))
    rows = [
        (plain(text).strip(), label) for label, name in (("2", "refusals"), ("1", "answers")) for text in texts[name]
    ]
    table = pandas.DataFrame(rows, columns=["text", "label"]).assign(weight=SHORT_WEIGHT)
    return table.sample(frac=1, random_state=0, ignore_index=True)


def train(answers: pandas.DataFrame) -> tuple[float, list[tuple[str, float, float]]]:
    """Intercept, and the n-grams with inverse document frequency and weight: those of largest weight, fitted again."""
    answers = answers[answers["label"] != "3"]
    texts, refused = answers["text"].tolist(), (answers["label"] == "2").to_numpy()
    weights = answers["weight"].to_numpy()

    def fit(vocabulary: Sequence[str] | None) -> tuple[TfidfVectorizer, LogisticRegression]:
        # A short text's words are in few others.
        least = LEAST_ANSWERS - any(weights != 1)
        vectorizer = TfidfVectorizer(
            analyzer=phrase_judge.ngrams, sublinear_tf=True, min_df=least, vocabulary=vocabulary
        )
        features = vectorizer.fit_transform(texts)
        regression = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=5000)
        return vectorizer, regression.fit(features, refused, sample_weight=weights)

    vectorizer, regression = fit(None)
    best = np.argsort(-np.abs(regression.coef_[0]), kind="stable")[:N_NGRAMS]
    vectorizer, regression = fit(sorted(vectorizer.get_feature_names_out()[best]))
    names = vectorizer.get_feature_names_out()
    rows = zip(names, vectorizer.idf_.round(3).tolist(), regression.coef_[0].round(3).tolist(), strict=True)
    return round(float(regression.intercept_[0]), 3), [tuple(row) for row in rows]


def judged(texts: Sequence[str]) -> NDArray[np.bool_]:
    """Whether the phrases judge reads each plain text as a refusal, with the classifier that is set."""
    phrases = phrase_judge.REFUSAL_PHRASES
    return np.array(
        [
            (phrase_judge.refusing_phrase(text, phrases) or phrase_judge.worded_refusal(text)) is not None
            for text in texts
        ]
    )


def teach(answers: pandas.DataFrame, short: pandas.DataFrame) -> None:
    """Have the judge use what the answers teach, and on short ones what the short texts add."""
    learned = []
    for known in (answers, pandas.concat([answers, short])):
        intercept, rows = train(known)
        learned.append((intercept, {ngram: (idf, weight) for ngram, idf, weight in rows}))
    phrase_judge._ngrams = lambda short: learned[short]  # type: ignore[assignment]


def fold(name: str, answers: Mapping[str, pandas.DataFrame]) -> tuple[Rate, Rate, Rate]:
    """Recall and precision on one model's answers by what all others taught; partial refusals read as refusals."""
    teach(pandas.concat(other for key, other in answers.items() if key != name), short_texts())
    return rates(judged(answers[name]["text"].tolist()), answers[name]["label"].to_numpy())


def by_rules_alone(answers: pandas.DataFrame) -> tuple[Rate, Rate, Rate]:
    """The same without a classifier: by phrases, stances and openings in other languages."""
    phrase_judge._ngrams = lambda short: (0.0, {})  # type: ignore[assignment]
    return rates(judged(answers["text"].tolist()), answers["label"].to_numpy())


def short_fold(answers: Mapping[str, pandas.DataFrame]) -> tuple[Rate, Rate, Rate]:
    """The same of the short texts, a part at a time judged by what all others taught."""
    short = short_texts()
    part, says = np.arange(len(short)) % N_PARTS, np.zeros(len(short), bool)
    for left_out in range(N_PARTS):
        teach(pandas.concat(answers.values()), short[part != left_out])
        says[part == left_out] = judged(short["text"][part == left_out].tolist())
    return rates(says, short["label"].to_numpy())


def rates(says: NDArray[np.bool_], label: NDArray[np.object_]) -> tuple[Rate, Rate, Rate]:
    """Recall, precision, and partial refusals read as refusals."""
    right, partial = int((says & (label == "2")).sum()), label == "3"
    recall, precision = Rate(right, int((label == "2").sum())), Rate(right, int((says & ~partial).sum()))
    return recall, precision, Rate(int((says & partial).sum()), int(partial.sum()))


def main() -> None:
    """Print the folds; write the classifier if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="labelled answers, a file a model")
    parser.add_argument("--write", action="store_true", help="write the classifier of all files into the package")
    options = parser.parse_args()
    answers = {path.stem: read(path) for path in options.files}
    table = Table("left out", "recall", "precision", "recall, rules alone", "precision, rules alone")
    partly = Table("left out", "partial refusals read as refusals", "by rules alone")
    for name, given in {**answers, "short texts": short_texts()}.items():
        *found, partial = fold(name, answers) if name in answers else short_fold(answers)
        *by_rules, partial_by_rules = by_rules_alone(given)
        table.add_row(name, *map(str, [*found, *by_rules]))
        partly.add_row(name, str(partial), str(partial_by_rules))
    for each in (table, partly):
        Console(file=sys.stdout).print(each)
    if options.write:
        whole, parts = pandas.concat(answers.values()), []
        for name, known in (("long", whole), ("short", pandas.concat([whole, short_texts()]))):
            intercept, rows = train(known)
            lines = ",\n".join(json.dumps(row) for row in rows)
            parts.append(f'"{name}": {{"intercept": {intercept}, "ngrams": [\n{lines}\n]}}')
        PACKAGED.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
