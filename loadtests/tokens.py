"""Words that are one token each to a model, so that a prompt of N tokens can be made without asking anyone while a load runs.

Words with a space before them are tokenised apart from one another by the tokenizers in use (byte-level BPE, SentencePiece,
WordPiece), so tokens add up; that is measured before it is relied upon. Counts come from the server's `/tokenize`, from a
`tokenizer.json` on this machine, or from the `usage` of one-token requests; no hub is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

ANCHOR = "Read"
"""Every prompt begins with it: the first word of a text may be tokenised otherwise than one after a space."""

_COMMON = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father power "
    "hour game line end member law car city name team minute idea body back parent face level office door health person "
    "art war history party result change morning reason research girl guy moment air teacher force order price paper"
)
CANDIDATES = tuple(_COMMON.split())
FEWEST_WORDS = 16
MOST_QUESTIONS = 40

Count = Callable[[str], int]
"""How many tokens a whole prompt with this text is, template and special tokens included."""


@dataclass(frozen=True, slots=True)
class Lexicon:
    """What prompts are made of for one model and task. `overhead_tokens` come on top of the words of every prompt.

    `tokens_per_word` is 1 where every word is exactly one token; else lengths are approximate, and `exact` is False.
    """

    words: tuple[str, ...]
    overhead_tokens: int
    tokens_per_word: float
    source: str

    @property
    def exact(self) -> bool:
        """Whether prompts have exactly the length that was asked for."""
        return self.tokens_per_word == 1

    def words_for(self, tokens: int) -> int:
        """Words of a prompt of so many tokens in all; at least one."""
        return max(1, round((tokens - self.overhead_tokens) / self.tokens_per_word))

    def text(self, words: int, random: Random) -> str:
        """`words` random words."""
        return " ".join(random.choices(self.words, k=words))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for another process; `Lexicon(**data)` reads it back."""
        return {
            "words": list(self.words),
            "overhead_tokens": self.overhead_tokens,
            "tokens_per_word": self.tokens_per_word,
            "source": self.source,
        }


def calibrate(count: Count, source: str, candidates: Sequence[str] = CANDIDATES) -> Lexicon:
    """Find words that are one token each by asking `count` as rarely as possible, and check that they add up.

    Where too few words are, all candidates are used and their mean length is measured.
    """
    overhead = count(ANCHOR)
    asked = _Asked(lambda words: count(" ".join((ANCHOR, *words))) - overhead)
    words = tuple(_single(tuple(candidates), asked))
    if len(words) >= FEWEST_WORDS:
        sample = Random(1).choices(words, k=3 * FEWEST_WORDS)
        if asked.tokens(sample) == len(sample):
            return Lexicon(words, overhead, 1, source)
    sample = Random(2).choices(candidates, k=len(candidates))
    return Lexicon(tuple(candidates), overhead, asked.tokens(sample) / len(sample), source)


@dataclass(slots=True)
class _Asked:
    tokens_of: Callable[[Sequence[str]], int]
    times: int = 0

    def tokens(self, words: Sequence[str]) -> int:
        self.times += 1
        return self.tokens_of(words)


def _single(words: tuple[str, ...], asked: _Asked) -> list[str]:
    """Those of `words` that are one token: halves are asked about until a half is, or the questions run out."""
    if not words or asked.times >= MOST_QUESTIONS:
        return []
    if asked.tokens(words) == len(words):
        return list(words)
    if len(words) == 1:
        return []
    middle = len(words) // 2
    return _single(words[:middle], asked) + _single(words[middle:], asked)
