"""A reward from VADER's lexicon (MIT): the sentiment of the response, -1 to 1."""

import functools
from typing import Any


@functools.cache
def _analyser() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # noqa: PLC0415 - not a dependency of ours

    return SentimentIntensityAnalyzer()


def compound(prompts: list[str], responses: list[str]) -> list[float]:
    """The compound score of each response."""
    return [_analyser().polarity_scores(response)["compound"] for response in responses]
