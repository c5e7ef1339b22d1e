"""The end of a decode step, on the device: from the logits to the next token with no word from the host.

Greedy decoding is two kernels (``kernels/_greedy.py``). Sampling, scores to be kept and processors of transformers go
through those processors themselves, on memory that stays where it is: all tokens so far lie in one buffer, whose rest
repeats a token that is there already, for the processors allowed here take the tokens as a set.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as processors

from tinyfuse.kernels import _greedy

LEAST = (processors.MinLengthLogitsProcessor, processors.MinNewTokensLengthLogitsProcessor)
# Exact types that neither wait for the device nor look at more than the set of the tokens.
ALLOWED = (
    processors.RepetitionPenaltyLogitsProcessor,
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
    processors.MinPLogitsWarper,
    processors.TypicalLogitsWarper,
    processors.EpsilonLogitsWarper,
    processors.InfNanRemoveLogitsProcessor,
    processors.LogitNormalization,
    *LEAST,
)


@dataclass(frozen=True)
class Choice:
    """How a call of ``generate`` chooses its tokens. ``key`` tells apart choices that need different code;
    ``banned`` are the ids that no token may be, and ``processors`` None where that is all there is to greedy decoding.
    """

    key: Any
    banned: Tensor
    processors: tuple[Any, ...] | None
    sampled: bool


def choice(given: LogitsProcessorList, ids: Tensor, limit: int, sampled: bool, recorded: bool) -> Choice | None:
    """The choice of ``limit`` tokens after ``ids`` [batch, length]; None if it needs the host."""
    banned = None if sampled or recorded else _always_banned(given, ids, limit)
    if banned is not None:
        return Choice(("greedy", len(banned)), banned, None, False)
    if not all(type(processor) in ALLOWED and _as_a_set(processor, ids) for processor in given):
        return None
    own = tuple(_own(processor, ids.device) for processor in given)
    key = tuple((type(processor), _settings(processor)) for processor in own)
    return Choice((key, sampled), ids.new_zeros(0), own, sampled)


def _as_a_set(processor: Any, ids: Tensor) -> bool:
    """Whether what the processor leaves out of the tokens, if anything, ends within ``ids``."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if isinstance(ignored, Tensor):
        return ignored.shape == ids.shape[:1] and int(ignored.max()) < ids.shape[1]
    return ignored is None or ignored < ids.shape[1]


class Least:
    """Forbids the ids ``eos`` while there are fewer than ``least`` tokens, the prompt among them."""

    def __init__(self, eos: Tensor, least: int):
        self.eos, self.least = eos, torch.tensor([least], device=eos.device)

    def __call__(self, written: Tensor, scores: Tensor) -> Tensor:
        ids = torch.arange(scores.shape[1], device=scores.device)
        end = (ids[:, None] == self.eos).any(1)  # torch.isin waits for the host
        return scores.masked_fill(end & (written < self.least), -torch.inf)


def _own(processor: Any, device: torch.device) -> Any:
    """A copy of the processor that shares no tensor with it."""
    if type(processor) in LEAST:
        return Least(processor.eos_token_id.to(device, copy=True), _least(processor))
    own = copy.copy(processor)
    for name, value in vars(processor).items():
        if isinstance(value, Tensor):
            setattr(own, name, value.to(device, copy=True))
    return own


def _settings(processor: Any) -> tuple[Any, ...]:
    """Names and values of a processor's attributes, of tensors the shape: their values can be replaced."""
    held = sorted(vars(processor).items())
    return tuple((name, value.shape if isinstance(value, Tensor) else repr(value)) for name, value in held)


def _always_banned(given: LogitsProcessorList, ids: Tensor, limit: int) -> Tensor | None:
    """The ids that the processors forbid at each of ``limit`` tokens, or None if they do anything more.

    A minimum length at the limit or above (``min_new_tokens`` sets two processors) forbids the end of the sequence and
    nothing else.
    """
    prompt, banned = ids.shape[1], [ids.new_zeros(0)]
    for processor in given:
        if type(processor) not in LEAST or _least(processor) < prompt + limit:
            return None
        banned.append(processor.eos_token_id.to(ids.device).flatten())
    return torch.cat(banned).unique()


def _least(processor: Any) -> int:
    """Tokens, with the prompt, below which the processor forbids the end."""
    if type(processor) is processors.MinLengthLogitsProcessor:
        return processor.min_length
    return processor.prompt_length_to_skip + processor.min_new_tokens


class Tail:
    """Picks the token, pads finished sequences, writes the token down.

    ``ids`` [batch, length] holds ``written`` [1] columns of tokens, of which the last is in ``token`` [batch, 1] too.
    ``raw`` and ``scores`` [batch, vocabulary], in fp32, are those of the token picked last, where the choice keeps any.
    """

    def __init__(self, choice: Choice, token: Tensor, length: int, eos: int):
        batch, device = token.shape[0], token.device
        self.choice, self.token = choice, token
        self.eos = torch.zeros(eos, dtype=torch.long, device=device)
        self.banned = torch.zeros_like(choice.banned)
        self.pad = torch.zeros((), dtype=torch.long, device=device)
        self.unfinished = torch.ones(batch, dtype=torch.long, device=device)
        self.written = torch.zeros(1, dtype=torch.long, device=device)
        self.ids = torch.zeros((batch, length), dtype=torch.long, device=device)
        self.invalid = torch.zeros((), dtype=torch.bool, device=device)
        self.state = [self.unfinished, self.written, self.ids, self.invalid]
        self.raw: Tensor | None = None
        self.scores: Tensor | None = None

    def begin(self, choice: Choice, ids: Tensor, eos: Tensor, pad: Tensor | None, unfinished: Tensor) -> None:
        """``ids`` [batch, n] are all tokens so far, the last of them to be fed next; ``unfinished`` [batch] is 1 for
        rows that go on after it; ``choice`` is one of the same key."""
        count = ids.shape[1]
        self.eos.copy_(eos)
        self.banned.copy_(choice.banned)
        for mine, given in zip(self.choice.processors or (), choice.processors or (), strict=True):
            for name, value in vars(given).items():
                if isinstance(value, Tensor):
                    getattr(mine, name).copy_(value)
        if pad is not None:
            self.pad.copy_(pad)
        self.token.copy_(ids[:, -1:])
        self.unfinished.copy_(unfinished)
        self.ids[:, :count] = ids
        self.ids[:, count:] = ids[:, -1:]
        self.written.fill_(count)
        self.invalid.zero_()

    def pick(self, logits: Tensor) -> None:
        """``logits`` [batch, vocabulary] in any float dtype: rounding to fp32 first would not change the maximum."""
        if self.choice.processors is not None:
            logits = self._processed(logits)
        _greedy.OP(logits, self.banned, self.eos, self.pad, self.unfinished, self.written, self.token, self.ids)

    def _processed(self, logits: Tensor) -> Tensor:
        """What the token is the largest of."""
        self.raw = scores = logits.to(copy=True, dtype=torch.float32)
        for processor in self.choice.processors:
            scores = processor(self.written if isinstance(processor, Least) else self.ids, scores)
        self.scores = scores
        return self._drawn(scores.softmax(-1)) if self.choice.sampled else scores

    def _drawn(self, probabilities: Tensor) -> Tensor:
        """``torch.multinomial`` draws the largest of these; it waits for the host to see that no row is NaN."""
        self.invalid.logical_or_(probabilities[:, 0].isnan().any())
        return probabilities / torch.empty_like(probabilities).exponential_(1)

    def check(self) -> None:
        """Raises RuntimeError, with the words of ``torch.multinomial``, if there was nothing to draw from."""
        if self.choice.sampled and self.invalid.item():
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
