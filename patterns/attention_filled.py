"""Attention whose scores are replaced where they are hidden, before the mask is added: ``softmax(where(seen, s, fill) +
bias) v``. Added to the mask there, the fill leaves nothing of a score."""

import torch

from tinyfuse.graph.pattern import call, scalar, tensor
from tinyfuse.patterns.attention import HEADS
from tinyfuse.patterns.attention_softmax import between_matmuls, bias

seen, fill = tensor("seen"), scalar("fill")


def replaced(scores):
    return call(torch.where, seen, scores, fill) + bias


def filled(m):
    return call(torch.where, m.seen, m.bias, call(torch.add, m.bias, m.fill))


FORM = (replaced, lambda m: 1.0, filled)
FILLED = [between_matmuls("filled", FORM, heads, seen=torch.ones(1, 1, 5, 7).tril().bool()) for heads in HEADS]
