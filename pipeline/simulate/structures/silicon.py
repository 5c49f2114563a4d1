"""Groups of silicon in graphene: one atom with three or four bonds, two or three around a missing carbon."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from pipeline.simulate.structures.specimen import Move, Sites, Specimen
from schemas.errors import SettingsError

GROUPS = ("3-fold", "4-fold", "dimer", "trimer")
BOND = 1.42  # Å
PATCH = 4.6  # Å around a mobile atom within which it may be anywhere
APART = 12.0  # Å between the middles of groups
PUSH, PUSH_REACH = 0.25, 7.0  # Å: how far a silicon atom on a carbon site moves its neighbours, and how far that goes


class _Graphene:
    """A sheet being edited: atoms are added or marked absent; each is a column and a unit of its own."""

    def __init__(self, made: Specimen) -> None:
        self.made = made
        self.place = list(made.positions)
        self.number = made.numbers.tolist()
        self.site = made.site.tolist()
        self.absent = made.absent.tolist()
        self.pushing = [False] * len(self.place)
        self.movable = made.movable.copy()
        self.extra_sites: list[np.ndarray] = []
        self.moves: list[Move] = []
        self.tree = cKDTree(made.positions[:, :2])

    def carbons_near(self, atom: int, radius: float) -> list[int]:
        """Carbon atoms around an atom, itself excepted."""
        near = sorted(self.tree.query_ball_point(self.made.positions[atom, :2], radius))
        return [i for i in near if i != atom and self.number[i] == 6]

    def add(self, place: np.ndarray, site: int, *, pushing: bool) -> int:
        """A silicon atom that is absent until `put` says otherwise."""
        self.place.append(place)
        self.number.append(14)
        self.site.append(site)
        self.absent.append(True)
        self.pushing.append(pushing)
        return len(self.place) - 1

    def put(self, silicon: int, *instead_of: int) -> None:
        """Let a silicon atom be there from the start, and atoms of the sheet not."""
        self.absent[silicon] = False
        for atom in instead_of:
            self.absent[atom] = True

    def between(self, one: int, other: int) -> int:
        """A silicon atom in the middle of a bond, bound to the four atoms around it; it has a site of its own."""
        middle = (self.made.positions[one] + self.made.positions[other]) / 2
        self.extra_sites.append(middle[:2])
        return self.add(middle, len(self._sites.host) + len(self.extra_sites) - 1, pushing=False)

    @property
    def _sites(self) -> Sites:
        if self.made.sites is None:
            raise ValueError("groups of silicon need a sheet with sites")
        return self.made.sites

    def finish(self, *, keep_absent: bool) -> Specimen:
        """The edited sheet; atoms that never come are left out."""
        extra, sites = len(self.extra_sites), self._sites
        sites = Sites(
            np.concatenate([sites.place, np.reshape(self.extra_sites, (-1, 2))]),
            np.concatenate([sites.host, np.zeros(extra, int)]),
            np.concatenate([sites.capacity, np.ones(extra, int)]),
        )
        absent = np.array(self.absent)
        keep = np.ones(len(absent), bool) if keep_absent else ~absent
        movable = np.concatenate([self.movable, np.zeros(len(absent) - len(self.movable), bool)])
        index = np.arange(keep.sum())
        return Specimen(
            np.array(self.place)[keep], np.array(self.number)[keep], index, movable[keep], index, absent[keep],
            np.full(len(index), -1), np.array(self.site)[keep], sites=sites, moves=tuple(self.moves),
            pushing=np.array(self.pushing)[keep],
        )  # fmt: skip


def with_groups(rng: np.random.Generator, made: Specimen, groups: tuple[str, ...], *, mobile: bool) -> Specimen:
    """Graphene with groups of silicon near the middle, each at a random place; single ones may move if mobile.

    3-fold: instead of one carbon; 4-fold: instead of two neighbours; dimer, trimer: instead of two or three neighbours
    of a carbon that is missing. Raises SettingsError for other names and where there is no room.
    """
    if unknown := [name for name in groups if name not in GROUPS]:
        raise SettingsError(f"groups holds {unknown}; expected some of {', '.join(GROUPS)}")
    if not groups:
        return made
    sheet = _Graphene(made)
    for name, centre in zip(groups, _centres(rng, sheet, len(groups)), strict=True):
        beside = [sheet.carbons_near(centre, 1.2 * BOND)[i] for i in rng.permutation(3)]
        if name in ("dimer", "trimer"):
            sheet.absent[centre] = True
            for atom in beside[: 2 if name == "dimer" else 3]:
                sheet.put(sheet.add(made.positions[atom], int(made.site[atom]), pushing=False), atom)
            sheet.movable[[centre, *beside]] = False
        else:
            _single(sheet, centre, beside[0] if name == "4-fold" else None, PATCH if mobile else 1.2 * BOND)
    return sheet.finish(keep_absent=mobile)


def _centres(rng: np.random.Generator, sheet: _Graphene, count: int) -> list[int]:
    """Carbon atoms whose surroundings are whole, apart from each other, as near to the middle as there is room."""
    flat = sheet.made.positions[:, :2]
    reach = float(np.abs(flat).max())
    for share in (0.35, 0.5, 0.65):
        chosen: list[int] = []
        for atom in rng.permutation(np.flatnonzero(np.abs(flat).max(1) < share * reach)).tolist():
            free = all(np.linalg.norm(flat[atom] - flat[other]) > APART for other in chosen)
            whole = sheet.number[atom] == 6 and len(sheet.carbons_near(atom, 3.0 * BOND)) >= 18
            if len(chosen) < count and free and whole:
                chosen.append(atom)
        if len(chosen) == count:
            return chosen
    raise SettingsError(
        f"groups holds {count} groups, for which a sheet of {2 * reach:.0f} Å with these defects has no room at "
        f"{APART:g} Å from each other; expected fewer groups or a larger view"
    )


def _single(sheet: _Graphene, centre: int, partner: int | None, reach: float) -> None:
    """One silicon atom at a site, or between it and a partner, and all the places where it may get to."""
    made = sheet.made
    patch = [centre, *sheet.carbons_near(centre, reach)]
    silicon = {atom: sheet.add(made.positions[atom], int(made.site[atom]), pushing=True) for atom in patch}
    sheet.movable[patch] = False
    middle = {}
    for one in patch:
        for other in sheet.carbons_near(one, 1.2 * BOND):
            if other not in silicon or (other, one) in middle:
                continue
            between = middle[one, other] = sheet.between(one, other)
            si_one, si_other = silicon[one], silicon[other]
            sheet.moves += [
                Move("hop", (si_one, other), (si_other, one), si_one, si_other),
                Move("coordination", (si_one, other), (between,), si_one, between),
                Move("coordination", (si_other, one), (between,), si_other, between),
            ]
    if partner is None:
        sheet.put(silicon[centre], centre)
    else:
        bond = middle.get((centre, partner), middle.get((partner, centre)))
        sheet.put(int(bond if bond is not None else sheet.between(centre, partner)), centre, partner)


def pushed(points: np.ndarray, pushing: np.ndarray) -> np.ndarray:
    """Displacement (atom, 3) [Å] of atoms around silicon on carbon sites: outwards, as 1/r, ending at PUSH_REACH.

    points (atom, 3) [Å]; pushing (atom,) bool. The bond of 1.42 Å becomes 1.67 Å in projection.
    """
    out = np.zeros_like(points)
    for index in np.flatnonzero(pushing):
        away = points[:, :2] - points[index, :2]
        distance = np.linalg.norm(away, axis=1)
        near = (distance > 0.1) & (distance < PUSH_REACH)
        amount = PUSH * (BOND / distance[near]) * (1 - distance[near] / PUSH_REACH) / (1 - BOND / PUSH_REACH)
        out[near, :2] += away[near] / distance[near, None] * amount[:, None]
    return out
