"""Several packs as one: trained on together, each with identifiers of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, cast

import numpy as np

from hrm.data.identity import PackIdentity, identifiers_hash
from hrm.data.pack import IntArray, Pack, PackSet
from hrm.errors import UserError

_MUST_AGREE = ("seq_len", "vocab_size", "pad_id", "ignore_label_id")


@dataclass(frozen=True)
class JoinedPack(Pack):
    """One split of several packs; `path` is that of the first."""

    parts: tuple[Pack, ...] = ()
    firsts: tuple[int, ...] = ()  # what identifier 0 of each part becomes
    is_mixed: bool = False  # all sets are one

    def __reduce__(self) -> tuple[Callable[..., Pack], tuple[Any, ...]]:
        return _join, (self.parts, self.firsts, self.metadata.num_puzzle_identifiers, self.is_mixed)


def first_identifiers(packs: Sequence[Pack]) -> list[int]:
    """What identifier 0 of each pack becomes: those of a pack follow those of the packs before it."""
    counts = [pack.metadata.num_puzzle_identifiers for pack in packs]
    return [sum(counts[:index]) for index in range(len(packs))]


def join_train(packs: Sequence[Pack]) -> Pack:
    """The training splits of packs as one set, `all`, whose groups an epoch visits in one random order.

    A single pack is returned as it is.

    Raises:
        UserError: they are not of one vocabulary and length.
    """
    if len(packs) == 1:
        return packs[0]
    total = sum(pack.metadata.num_puzzle_identifiers for pack in packs)
    return _join(tuple(packs), tuple(first_identifiers(packs)), total, is_mixed=True)


def join_test(packs: Sequence[Pack], trained: Sequence[Pack]) -> Pack:
    """The test splits of packs, each set by itself, with the identifiers that they have among the packs trained on.

    Sets keep their names where there is one pack, and are `<folder>/<set>` where there are several.

    Raises:
        UserError: they are not of the vocabulary and length of those trained on, or a pack has other identifiers.
    """
    firsts = [_first_in(pack, trained) for pack in packs]
    total = sum(pack.metadata.num_puzzle_identifiers for pack in trained)
    if len(packs) == 1 and firsts == [0] and packs[0].metadata.num_puzzle_identifiers == total:
        _check_agree([trained[0], *packs])
        return packs[0]
    _check_agree([trained[0], *packs])
    return _join(tuple(packs), tuple(firsts), total, is_mixed=False)


def joined_identity(identities: Sequence[PackIdentity]) -> PackIdentity:
    """What several packs are together; of a single one its own."""
    if len(identities) == 1:
        return identities[0]
    return PackIdentity(*(_sha256("\n".join(hashes)) for hashes in zip(*map(astuple, identities), strict=True)))


def folder_names(packs: Sequence[Pack]) -> list[str]:
    """Names of packs that tell them apart: their folders', with a number where two are the same."""
    names = [pack.path.resolve().name for pack in packs]
    return [name if names.count(name) == 1 else f"{name}-{index + 1}" for index, name in enumerate(names)]


class _Stacked:
    """Arrays [N_i, S] as one [N, S] of which rows are read, not held in memory."""

    def __init__(self, parts: Sequence[IntArray]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape = (int(self._ends[-1]), parts[0].shape[1])
        self.dtype = np.result_type(*parts)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | IntArray) -> IntArray:
        wanted = np.arange(len(self))[rows]
        part_of = np.searchsorted(self._ends, wanted, side="right")
        found = np.empty((len(wanted), self.shape[1]), self.dtype)
        for number, part in enumerate(self._parts):
            here = part_of == number
            if here.any():
                found[here] = part[wanted[here] - (self._ends[number] - len(part))]
        return found


def _join(parts: tuple[Pack, ...], firsts: tuple[int, ...], num_identifiers: int, is_mixed: bool) -> Pack:
    _check_agree(parts)
    sets = {"all": _mixed(parts, firsts)} if is_mixed else dict(_renamed(parts, firsts))
    examples = sum(len(data.inputs) for part in parts for data in part.sets.values())
    puzzles = sum(len(data.puzzle_identifiers) for part in parts for data in part.sets.values())
    metadata = replace(
        parts[0].metadata,
        num_puzzle_identifiers=num_identifiers,
        total_groups=sum(part.metadata.total_groups for part in parts),
        mean_puzzle_examples=examples / puzzles,
        sets=tuple(sets),
    )
    return JoinedPack(parts[0].path, parts[0].split, metadata, sets, parts, firsts, is_mixed)


def _mixed(parts: Sequence[Pack], firsts: Sequence[int]) -> PackSet:
    found = [(data, first) for part, first in zip(parts, firsts, strict=True) for data in part.sets.values()]
    sets = [data for data, _ in found]
    return PackSet(
        cast(IntArray, _Stacked([data.inputs for data in sets])),
        cast(IntArray, _Stacked([data.labels for data in sets])),
        np.concatenate([data.puzzle_identifiers + first for data, first in found]),
        _concatenated([data.puzzle_indices for data in sets]),
        _concatenated([data.group_indices for data in sets]),
    )


def _concatenated(offsets: Sequence[IntArray]) -> IntArray:
    """Offsets into what lies one behind the other."""
    sizes = np.concatenate([np.diff(part) for part in offsets])
    return np.concatenate([[0], np.cumsum(sizes)])


def _renamed(parts: Sequence[Pack], firsts: Sequence[int]) -> Iterator[tuple[str, PackSet]]:
    for part, first, name in zip(parts, firsts, folder_names(parts), strict=True):
        for set_name, data in part.sets.items():
            moved = replace(data, puzzle_identifiers=data.puzzle_identifiers + first)
            yield (set_name if len(parts) == 1 else f"{name}/{set_name}"), moved


def _first_in(pack: Pack, trained: Sequence[Pack]) -> int:
    """What identifier 0 of a test split becomes."""
    identifiers, rows = identifiers_hash(pack.path), list(zip(trained, first_identifiers(trained), strict=True))
    same = [first for other, first in rows if other.path.resolve() == pack.path.resolve()]
    if identifiers:  # after the pack itself, for others may have equal ones
        same += [first for other, first in rows if identifiers == identifiers_hash(other.path)]
    if same:
        return same[0]
    blank = pack.metadata.blank_identifier_id
    if all((data.puzzle_identifiers == blank).all() for data in pack.sets.values()):
        return 0
    raise UserError(
        f"{pack.path} has puzzle identifiers that no pack trained on has (their identifiers.json differ), so that no "
        "row of the puzzle table is theirs: leave it out of data_paths_test, and score it by evaluate.py with "
        "puzzle_emb=mean."
    )


def _check_agree(packs: Sequence[Pack]) -> None:
    for name in _MUST_AGREE:
        for pack in packs:
            ours, theirs = getattr(packs[0].metadata, name), getattr(pack.metadata, name)
            if ours != theirs:
                raise UserError(
                    f"{packs[0].path} has {name} {ours}, but {pack.path} has {theirs}: one run takes packs of one "
                    "vocabulary and length."
                )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
