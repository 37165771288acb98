"""What a guesser scores that sees only part of the input: the numbers to print beside the results."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence


def majority_accuracy(
    train_keys: Sequence[Hashable],
    train_labels: Sequence[Hashable],
    test_keys: Sequence[Hashable],
    test_labels: Sequence[Hashable],
) -> float:
    """Accuracy on test of the guesser that sees only a key and answers what train answered most often for that key.

    With the same items as train and as test it is an upper bound: no guesser that sees only the key does better on
    these items, and a key that tells more apart never scores less.

    Args:
        train_keys: what the guesser sees of each training item, N of them.
        train_labels: the answers, N of them.
        test_keys: the same of the test items, M of them; a key that train lacks gets the commonest answer of all.
        test_labels: the answers, M of them.

    Returns:
        The share of test items that it answers right, in [0, 1].

    Raises:
        ValueError: there are no items, or as many keys as labels are not given.
    """
    for name, keys, labels in (("train", train_keys, train_labels), ("test", test_keys, test_labels)):
        if not len(keys) or len(keys) != len(labels):
            raise ValueError(
                f"majority_accuracy: {name}_keys and {name}_labels must be as many, at least one, "
                f"got {len(keys)} and {len(labels)}"
            )
    counts: defaultdict[Hashable, Counter[Hashable]] = defaultdict(Counter)
    for key, label in zip(train_keys, train_labels, strict=True):
        counts[key][label] += 1
    fallback = Counter(train_labels).most_common(1)[0][0]
    answers = {key: count.most_common(1)[0][0] for key, count in counts.items()}
    right = sum(answers.get(key, fallback) == label for key, label in zip(test_keys, test_labels, strict=True))
    return right / len(test_labels)


def expected_recall(groups: np.ndarray[Any, Any], ks: Iterable[int] = (1, 5, 10)) -> dict[int, float]:
    """Recall@k of a retriever that tells the groups of a gallery apart and nothing within a group.

    Every query has one right item, which ties with the rest of its group; ties are broken at random, so a group of g
    items gives each of its queries min(k, g) / g. One group for all is chance; a group for each pair of objects is the
    retriever that knows what is in the picture but not where.

    Args:
        groups: the group of each item of the gallery, (N,), any integer dtype.
        ks: the cut-offs.

    Returns:
        Recall in [0, 1] by cut-off.

    Raises:
        ValueError: `groups` is not one-dimensional or is empty.
    """
    if groups.ndim != 1 or groups.size == 0:
        raise ValueError(f"expected_recall: groups must be one-dimensional and not empty, got shape {groups.shape}")
    _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    size = sizes[group_of]
    return {k: float(np.mean(np.minimum(k, size) / size)) for k in ks}
