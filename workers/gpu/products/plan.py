"""How the kernels for few rows compute a product: tile sizes, pipelining, and the choices worth a measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

MAX_ROWS: Final = 64  # of a product that streams its weights; the vendor's library computes larger ones
VECTOR_ROWS: Final = 2  # up to here without matrix units
ROW_CLASSES: Final = (VECTOR_ROWS, 16, 32, MAX_ROWS)  # one plan serves all products of more rows than the class before
MAX_SHARES: Final = 1 << 22  # float32 values that the programs of one product share, if it is split
MULTIPROCESSORS: Final = 132  # of an H100 or H200: splits give about one to five programs for each


@dataclass(frozen=True)
class Plan:
    """One way to compute y[M, N] = x[M, K] w[N, K]^T on a device.

    Args:
        kernel: "vector" and "words": multiply and add in float32, for at most VECTOR_ROWS rows; "words" reads four
            weights as one number, of 16 bits each or in fp8. "matrix": matrix units.
        tile_n: outputs of a program.
        tile_k: columns of the weight that it reads at a time: inputs, or in 4 bits an eighth of the inputs.
        warps: of a program.
        stages: reads of weights under way; 1 = one tile ahead in registers.
        split: programs that share the inputs of an output.
    """

    kernel: Literal["vector", "words", "matrix"]
    tile_n: int
    tile_k: int
    warps: int
    stages: int
    split: int = 1

    def fits(self, num_outputs: int, num_columns: int, group: int = 0, block: int = 0) -> bool:
        """Whether the tiles divide the weights: the kernels read whole tiles only. Tiles of weights in 4 bits lie in
        one of their groups of `group` inputs. In fp8 with a scale for each block of `block` outputs and inputs, tiles
        of outputs lie in one block, and on the matrix units tiles of inputs too. 0 = another format."""
        is_whole = num_outputs % self.tile_n == 0 and num_columns % (self.tile_k * self.split) == 0
        is_in_block = block % self.tile_n == 0 and (self.kernel == "words" or block % self.tile_k == 0)
        knows_blocks = block == 0 or self.kernel != "vector"
        return is_whole and group % self.tile_k == 0 and is_in_block and knows_blocks

    def can_pad(self) -> bool:
        """Whether the kernel makes zeros of a row of results without a row of x."""
        return self.kernel == "words"

    def can_share(self, num_rows: int, num_weights: int) -> bool:
        """Whether the shares of a product of `num_rows` rows and a weight of `num_weights` rows have room."""
        return self.split == 1 or self.split * num_rows * num_weights <= MAX_SHARES


# The fastest few of about forty that were measured on an H200 for the products of Llama 3.1 8B and 3.2 1B.
_VECTOR: Final = (
    Plan("vector", 4, 1024, 4, 1),
    Plan("vector", 2, 2048, 4, 1),
    Plan("vector", 4, 1024, 4, 4),
    Plan("vector", 2, 1024, 4, 1),
    Plan("words", 4, 1024, 4, 4),
    Plan("words", 8, 512, 4, 4),
)
_MATRIX: Final = (Plan("matrix", 64, 128, 4, 4), Plan("matrix", 64, 64, 4, 5), Plan("matrix", 128, 64, 4, 4))
# Weights of one byte: as many bytes under way take larger tiles. All are read through shared memory.
_NARROW_VECTOR: Final = (
    Plan("words", 4, 1024, 4, 4),
    Plan("words", 4, 2048, 4, 3),
    Plan("words", 8, 1024, 4, 4),
    Plan("words", 8, 2048, 8, 3),
    Plan("words", 16, 1024, 8, 3),
    Plan("words", 2, 2048, 4, 4),
    Plan("words", 4, 512, 4, 6),
)
_NARROW_MATRIX: Final = (*_MATRIX, Plan("matrix", 64, 256, 4, 3), Plan("matrix", 128, 128, 8, 3))
# Of weights in 4 bits, for groups of 32 inputs or more. Not measured yet. A tile has fewer columns than the program has
# threads, and on the matrix units fewer outputs: the compiler would else move x or scales between threads.
_INT4_VECTOR: Final = (
    Plan("vector", 16, 32, 4, 1),
    Plan("vector", 16, 32, 4, 4),
    Plan("vector", 16, 32, 4, 8),
    Plan("vector", 32, 32, 4, 4),
    Plan("vector", 16, 64, 8, 4),
    Plan("vector", 32, 64, 8, 1),
    Plan("vector", 8, 32, 2, 1),
    Plan("vector", 16, 16, 2, 4),
)
_INT4_MATRIX: Final = (
    Plan("matrix", 64, 64, 4, 3),
    Plan("matrix", 64, 32, 4, 4),
    Plan("matrix", 128, 32, 8, 3),
    Plan("matrix", 64, 16, 4, 4),
)
_INT4_NARROW: Final = 16  # columns of a tile that reads in short runs: only for weights that no wider one divides
_INT4_MAX_X: Final = 2048  # numbers of x for a tile of one plane; eight planes of more do not fit in shared memory
_SPLITS: Final = (1, 2, 4, 7, 8, 16)


def row_class(num_rows: int) -> int | None:
    """The rows of the plan that serves a product of `num_rows` rows; None = more than MAX_ROWS, or no rows."""
    return next((rows for rows in ROW_CLASSES if 0 < num_rows <= rows), None)


def candidates(
    rows: int,
    num_outputs: int,
    num_columns: int,
    weight_bytes: int,
    *,
    is_gated: bool = False,
    group: int = 0,
    block: int = 0,
) -> list[Plan]:
    """The plans that are worth a measurement for products of up to `rows` rows, one of ROW_CLASSES; may be empty.

    The weight is [num_outputs, num_columns], of `weight_bytes` each. With gates a program computes pairs of its
    outputs. `group` and `block`: see `Plan.fits`.
    """
    vector: Sequence[Plan] = _NARROW_VECTOR if weight_bytes == 1 else _VECTOR
    if weight_bytes > 2:
        vector = [plan for plan in vector if plan.kernel == "vector"]
    matrix: Sequence[Plan] = _NARROW_MATRIX if weight_bytes == 1 else _MATRIX
    if group:
        least = _INT4_NARROW if num_columns % (2 * _INT4_NARROW) else 2 * _INT4_NARROW
        vector = [plan for plan in _INT4_VECTOR if plan.tile_k >= least]
        matrix = [plan for plan in _INT4_MATRIX if plan.tile_k >= least and plan.tile_k * rows <= _INT4_MAX_X]
    num_results = num_outputs // 2 if is_gated else num_outputs

    def fits(plan: Plan) -> bool:
        return plan.fits(num_results, num_columns, group, block) and plan.can_share(rows, num_outputs)

    found = [plan for plan in vector if fits(plan)] if rows <= VECTOR_ROWS else []
    if rows <= VECTOR_ROWS and not group:  # the matrix units pay for one row only where numbers must be unpacked
        return found
    for base in matrix:
        plans = [Plan(base.kernel, base.tile_n, base.tile_k, base.warps, base.stages, split) for split in _SPLITS]
        fitting = [plan for plan in plans if fits(plan)]
        programs = {plan: num_results // plan.tile_n * plan.split for plan in fitting}
        enough = [plan for plan in fitting if 0.9 * MULTIPROCESSORS <= programs[plan] <= 5 * MULTIPROCESSORS]
        found += enough[:3] or sorted(fitting, key=lambda plan: abs(programs[plan] - MULTIPROCESSORS))[:1]
    return found
