"""CaseOps: text whose capital letters are spelt as operators, so that "The" and "the" share their tokens.

Every maximal run of ASCII letters becomes lower case; what was lost is said by a private-use character in front of it:

    hello  hello      Hello  <TITLE>hello      HELLO  <ALLCAPS>hello      iPhone  i<NEXT>phone

A literal operator in the text gets <ESCAPE> in front; all other characters stay. decode(encode(text)) == text for any
text. Scores are still taken per byte of the original text: byte_counts() says how many each token stands for.
Source: PR 1729 (its transform and code points; the counts are our own, see byte_counts).
"""
from __future__ import annotations

import re

import numpy as np

TITLE, ALLCAPS, NEXT, ESCAPE = OPERATORS = "\ue001\ue002\ue003\ue004"
LITERAL_BYTES = 3  # of an operator that stands for itself, in UTF-8
# The look-behind starts a match only where a run of letters starts: without it a long run would take quadratic time.
_CAPITALS = re.compile(r"(?<![A-Za-z])[a-z]*+[A-Z][A-Za-z]*+|[\ue001-\ue004]")
_SPELT = re.compile(r"\ue004([\ue001-\ue004])|\ue002([a-z]+)|[\ue001\ue003]([a-z])|[\ue001-\ue004]")
_LATER_CAPITAL = re.compile(r"(?<=.)[A-Z]")


def _spell(match: re.Match) -> str:
    run = match[0]
    if run in OPERATORS:
        return ESCAPE + run
    if len(run) > 1 and run.isupper():
        return ALLCAPS + run.lower()
    spelt = _LATER_CAPITAL.sub(lambda capital: NEXT + capital[0].lower(), run)
    return TITLE + spelt[0].lower() + spelt[1:] if spelt[0].isupper() else spelt


def _read(match: re.Match) -> str:
    literal, capitals, capital = match.groups()
    return literal or (capitals or capital or "").upper()


def encode(text: str) -> str:
    """Spell the capital ASCII letters of a text as operators."""
    return _CAPITALS.sub(_spell, text)


def decode(text: str) -> str:
    """The text that was spelt. Operators that nothing follows which they could change stand for nothing."""
    return _SPELT.sub(_read, text)


def operator_ids(tokenizer) -> list[int]:
    """Ids of TITLE, ALLCAPS, NEXT and ESCAPE; empty when the tokenizer has none of them. Raises ValueError when it has
    only some, or other pieces that contain one."""
    ids = [tokenizer.piece_to_id(operator) for operator in OPERATORS]
    known = [i for i in ids if i != tokenizer.unk_id()]
    holders = [i for i in range(tokenizer.vocab_size()) if set(OPERATORS) & set(tokenizer.id_to_piece(i))]
    if sorted(known) != holders or len(known) not in (0, len(OPERATORS)):
        raise ValueError("the tokenizer has some of the case operators, or pieces that contain one, but CaseOps needs "
                         "each of the four as a piece of its own")
    return known


def byte_counts(ids: np.ndarray, piece_bytes: np.ndarray, operators: list[int]) -> np.ndarray:
    """Bytes of the original text that each token stands for, (N,) uint16: an operator none, unless it is a literal one
    (an ESCAPE came before it); any other token as many as its piece spells, a leading space included, because lower
    case and capital letters take one byte each. `piece_bytes` (V,) are the bytes of each piece."""
    counts = piece_bytes[ids].astype(np.uint16)
    counts[np.isin(ids, operators)] = 0
    literal = -1
    for i in np.flatnonzero(ids == operators[-1]).tolist() if operators else ():
        if i != literal and i + 1 < len(ids) and ids[i + 1] in operators:
            literal = i + 1
            counts[literal] = LITERAL_BYTES
    return counts
