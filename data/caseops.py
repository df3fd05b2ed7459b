"""CaseOps: text whose capital letters are spelt as operators, so that "The" and "the" share their
tokens.

Every maximal run of ASCII letters becomes lower case; what was lost is said by a private-use
character in front of it:

    hello  hello      Hello  <TITLE>hello      HELLO  <ALLCAPS>hello      iPhone  i<NEXT>phone

A literal operator in the text gets <ESCAPE> in front; all other characters stay.
decode(encode(text)) == text for any text. Scores are still taken per byte of the original text:
byte_counts() says how many each token stands for. Source: PR 1729 (its transform and code points;
the counts are our own, see byte_counts).
"""

from __future__ import annotations

import functools
import re

import numpy as np

TITLE, ALLCAPS, NEXT, ESCAPE = OPERATORS = "\ue001\ue002\ue003\ue004"
LITERAL_BYTES = 3  # of an operator that stands for itself, in UTF-8
# Both begin with a set of characters, which the search for a match skips to fast.
_CAPITALS = re.compile("[A-Z\ue001-\ue004][A-Za-z]*+")
_SPELT = re.compile("[\ue001-\ue003][a-z]*+|\ue004[\ue001-\ue004]?")


@functools.lru_cache(1 << 16)
def _spell(run: str, inside: bool) -> str:
    """Letters from a capital to the end of their run, which may have begun before (inside); or an
    operator and letters after it."""
    if run[0] in OPERATORS:
        return ESCAPE + run[0] + (_CAPITALS.sub(_spell_match, run[1:]))
    if len(run) > 1 and run.isupper() and not inside:
        return ALLCAPS + run.lower()
    later = "".join(NEXT + c.lower() if c.isupper() else c for c in run[1:])
    return (NEXT if inside else TITLE) + run[0].lower() + later


def _spell_match(match: re.Match) -> str:
    start = match.start()
    return _spell(match[0], start > 0 and "a" <= match.string[start - 1] <= "z")


@functools.lru_cache(1 << 16)
def _read(spelt: str) -> str:
    """What an operator and the letters after it stand for."""
    operator, letters = spelt[0], spelt[1:]
    if operator in (ESCAPE, ALLCAPS):
        return letters.upper()  # upper case of a literal operator is itself
    return letters[:1].upper() + letters[1:]


def encode(text: str) -> str:
    """Spell the capital ASCII letters of a text as operators."""
    return _CAPITALS.sub(_spell_match, text)


def decode(text: str) -> str:
    """The text that was spelt. Operators that nothing follows which they could change stand for
    nothing."""
    return _SPELT.sub(lambda match: _read(match[0]), text)


def operator_ids(tokenizer) -> list[int]:
    """Ids of TITLE, ALLCAPS, NEXT and ESCAPE; empty when the tokenizer has none of them. Raises
    ValueError when it has only some, or other pieces that contain one."""
    ids = [tokenizer.piece_to_id(operator) for operator in OPERATORS]
    known = [i for i in ids if i != tokenizer.unk_id()]
    holders = [
        i for i in range(tokenizer.vocab_size()) if set(OPERATORS) & set(tokenizer.id_to_piece(i))
    ]
    if sorted(known) != holders or len(known) not in (0, len(OPERATORS)):
        raise ValueError(
            "the tokenizer has some of the case operators, or pieces that contain one, but "
            "CaseOps needs each of the four as a piece of its own"
        )
    return known


def byte_counts(ids: np.ndarray, piece_bytes: np.ndarray, operators: list[int]) -> np.ndarray:
    """Bytes of the original text that each token stands for, (N,) uint16: an operator none, unless
    it is a literal one (an ESCAPE came before it); any other token as many as its piece spells, a
    leading space included, because lower case and capital letters take one byte each. `piece_bytes`
    (V,) are the bytes of each piece."""
    counts = piece_bytes[ids].astype(np.uint16)
    counts[np.isin(ids, operators)] = 0
    literal = -1
    for i in np.flatnonzero(ids == operators[-1]).tolist() if operators else ():
        if i != literal and i + 1 < len(ids) and ids[i + 1] in operators:
            literal = i + 1
            counts[literal] = LITERAL_BYTES
    return counts
