"""Which coordinates are trained in a round.

Rounds are numbered from 1 over both phases. Importance that clients released during pretraining is added up with public
weights and ranked; from then on the mask of a round is the head of a ranking, longer every round. If it is wanted, the
ranking is made anew every few rounds of training, from whatever has been released by then; masks are then not nested.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from adadpigu_core import masking
from adadpigu_core.accounting import PRETRAINING, TRAINING
from adadpigu_core.configuration import NOT_RELEASED, ORACLE, PUBLIC, Configuration
from adadpigu_core.grouping import means
from adadpigu_core.importance import rank

log = logging.getLogger("adadpigu.server")

EVERYONE = ""


@dataclass(frozen=True)
class Schedule:
    """The plan of a run's rounds."""

    configuration: Configuration

    def phase(self, round_number: int) -> str:
        """Phase of a round."""
        return PRETRAINING if round_number <= self._pretraining else TRAINING

    def ratio(self, round_number: int) -> float:
        """Share of coordinates retained in a round; 1 until something ranks them.

        Without pretraining, and with a ranking that is made of releases, training starts unranked and retains
        everything; the schedule begins with the first round that is ranked, at its initial ratio, or never.
        """
        settings, first = self.configuration.retention, self._first_ranked()
        if first is None or round_number < first:
            return 1.0
        span = settings.period * (self.configuration.federation.num_rounds - first)
        progress = (round_number - first) / span if span > 0 else 1.0
        final = max(settings.initial_ratio, settings.final_ratio)  # a constant schedule ignores it
        return masking.retention_ratio(settings.schedule, settings.initial_ratio, final, progress)

    def reranks(self, round_number: int) -> bool:
        """Whether coordinates are ranked anew before a round: after every so many rounds of training."""
        every, trained = self.configuration.retention.rerank_every, round_number - self._pretraining - 1
        return every > 0 and trained > 0 and trained % every == 0

    def _first_ranked(self) -> int | None:
        """The first round in which a ranking is there to choose by; None = there never is one."""
        if self._pretraining > 0 or self.configuration.pretraining.ranking in NOT_RELEASED:
            return self._pretraining + 1
        every = self.configuration.retention.rerank_every
        return every + 1 if every else None

    @property
    def _pretraining(self) -> int:
        return self.configuration.pretraining_rounds


class Importance:
    """Importance as it comes in, and the rankings made of it.

    Args:
        ranking: ``consensus`` (one ranking for everyone), ``local`` (one for each data set), ``random``, or ``public``
            and ``oracle``: by scores that were revealed and not released.
        num_parameters: Number of coordinates d.
        seed: Of the random ranking.
        group: Coordinates that are ranked and retained as one, by their mean score: int64 [d]; None = each by itself.
        signed: Whether what comes in are updates, whose sum is to be squared, and not scores.

    ``settled`` says whether the scores are what to rank by, to which nothing is added.
    """

    def __init__(
        self, ranking: str, num_parameters: int, seed: int, group: Tensor | None = None, *, signed: bool = False
    ) -> None:
        self._kind = ranking
        self._d = num_parameters
        self._seed = seed
        self.group = group
        self._signed = signed
        self.settled = ranking in (PUBLIC, ORACLE)  # before they are, too, releases are not for ranking
        self.scores: dict[str, Tensor] = {}
        self._rankings: dict[str, Tensor] = {}
        self._masks: dict[str, tuple[float, Tensor]] = {}

    def add(self, data_set: str, scores: Tensor, weight: float) -> None:
        """Take in what one client released, with its public weight."""
        if self.settled:
            return
        key = data_set if self._kind == "local" else EVERYONE
        known = self.scores.get(key, torch.zeros(self._d, dtype=torch.float64))
        self.scores[key] = known + weight * scores.double()

    def reveal(self, scores: Tensor) -> None:
        """Rank by scores [d] that no client has released, and by nothing that is released later."""
        self.rerank(scores)

    def rerank(self, scores: Tensor) -> None:
        """Rank everyone's coordinates anew, by scores [d] to which nothing is to be added."""
        self.settled = True
        self.scores = {EVERYONE: scores.double()}
        self._rankings.clear()
        self._masks.clear()

    def mask(self, data_set: str, ratio: float) -> Tensor | None:
        """Mask for a data set at a retention ratio, bool [d]; None = everything is retained.

        Data sets that share a ranking share one tensor.
        """
        if ratio >= 1:
            return None
        key = data_set if data_set in self.scores else EVERYONE
        if key not in self._rankings:
            self._rankings[key] = self._rank(key)
        known = self._masks.get(key)
        if known is None or known[0] != ratio:
            self._masks[key] = (ratio, masking.mask_of(self._rankings[key], ratio, self.group))
        return self._masks[key][1]

    def _rank(self, key: str) -> Tensor:
        if self._kind != "random" and not self.scores:
            log.warning("no client has released any importance: coordinates are ranked at random")
        if self._kind == "random" or not self.scores:
            count = self._d if self.group is None else int(self.group.max()) + 1
            return torch.randperm(count, generator=torch.Generator().manual_seed(self._seed))
        # a newcomer without a ranking of its own takes everyone's
        scores = self.scores.get(key)
        if scores is None:
            scores = sum(self.scores.values(), torch.zeros(self._d, dtype=torch.float64))
        scores = scores.square() if self._signed and not self.settled else scores
        return rank(scores if self.group is None else means(scores, self.group))
