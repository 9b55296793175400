"""How checkpoints of a family name and store weights, as data. names.py applies it to a model."""

from __future__ import annotations

from dataclasses import dataclass

Renames = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Layout:
    """How a checkpoint tensor holds the weights that are stacked in it, for each expert alone.

    `transposed`: the stack is stored as [columns, rows]. `interleaved`: the weights take turns row
    by row: gate 0, up 0, gate 1, up 1. `by_head`: they take turns head by head: the rows of the
    first head of every weight, then those of the second head. The heads of a GatedDelta are its
    key heads, each with all its value heads. `as_row`: a vector is stored as a matrix of one row.
    """

    transposed: bool = False
    interleaved: bool = False
    by_head: bool = False
    as_row: bool = False


@dataclass(frozen=True)
class Variant:
    """Further renames, which a checkpoint has or not, whatever its config says.

    It has them if the pattern `mark` is in the name of one of its tensors.
    """

    mark: str
    renames: Renames
    applies: bool = False  # before the tensors are known: to checkpoints that transformers writes


@dataclass(frozen=True)
class Names:
    """The names and layouts of a family's checkpoint tensors; by default, the canonical ones.

    `renames` are replacements in a canonical name, applied in order; * is the number of an expert.
    Weights that get the same name are stored as one tensor, stacked along dimension 0 in canonical
    order (q, k, v; gate, up). Weights of all experts of a layer are so stacked too: [experts, rows,
    columns].
    """

    renames: Renames = ()
    variants: tuple[Variant, ...] = ()
    # (pattern in a tensor's name, its layout); the first one counts. All others are plain stacks.
    layouts: tuple[tuple[str, Layout], ...] = ()
    # Pattern of the names that no model needs: causal masks of old checkpoints, modules for
    # multi-token prediction that are not layers. It stands for the beginning of names, and for what
    # follows a prefix that names of the family have, such as "model.".
    unused: str | None = None
    # As `unused`, of the weights of a vision tower, which a model without one does not need.
    tower: str | None = None
