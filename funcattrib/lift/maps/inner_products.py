"""Inner products of a gradient with K fixed queries, read in its place; optionally its squared norm beside them.

    C(G) = (⟨Q_1, G⟩, …, ⟨Q_K, G⟩)[, ‖G‖²]        C*(θ) = Σ_k θ_k Q_k

From the factors of G = Σ_n rows_n colsᵀ_n there are two ways, chosen by what they cost an example:

    form       G, then one product with all queries        N·O·I + K·O·I multiplications, and O·I numbers held
    contract   Σ_n rows_nᵀ Q_k cols_n, query by query      K·N·O·I, and no gradient at all

and for the norm of what is not formed, ‖G‖² = Σ_nm ⟨rows_n, rows_m⟩⟨cols_n, cols_m⟩, N²·(O + I): where that is more
than 2·N·O·I, G is formed.

Shapes: E examples, N tokens, O/I weight rows/columns, K queries.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from funcattrib.kernels.safe_norm import as_rows, float32_at_least
from funcattrib.lift.factors import Factor, OneHot, dense_along, outer
from funcattrib.lift.maps.base import GradientMap, like

_FORMING = 16
"""Cost of writing and reading a formed gradient beside its multiplications, in tokens: small matrices are bound by
memory, not arithmetic.
"""


@dataclass(frozen=True)
class InnerProducts(GradientMap):
    """Products with ``queries`` (K, *shape), (K,); with ``norm`` the squared norm of G follows them, (K + 1,).

    With the norm this is a statistic: its weight must be used once (``lift.single_use``).
    """

    queries: Tensor
    norm: bool = False

    @property
    def linear(self) -> bool:
        return not self.norm

    @property
    def wide(self) -> bool:
        return True

    def rescale(self, value: Tensor, scale: Tensor) -> Tensor:
        factor = like(scale, value)
        return torch.cat([value[:, :-1] * factor, value[:, -1:] * factor**2], 1) if self.norm else value * factor

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the products: the same for every weight, so that weights can share a probe."""
        return (self.queries.shape[0] + self.norm,)

    def from_factors(self, rows: Factor, cols: Tensor | None) -> Tensor:
        """Compute the products from kept factors."""
        if cols is None or self.queries.ndim != 3 or not self.contracts(cols.shape[1]):
            return self.from_gradient(outer(rows, cols))
        products = _contract(self.queries, rows, cols)
        return torch.cat([products, _squared_norm(rows, cols)], 1) if self.norm else products

    def contracts(self, tokens: int) -> bool:
        """Return whether an example of ``tokens`` tokens is scored without forming its gradient.

        Example:
            >>> one, eight = (InnerProducts(torch.zeros(queries, 64, 64)) for queries in (1, 8))
            >>> one.contracts(512), eight.contracts(512)
            (True, False)
        """
        count, height, width = self.queries.shape
        if self.norm and tokens * (height + width) > 2 * height * width:
            return False  # the norm needs it formed
        return count * tokens <= tokens + count + _FORMING

    def from_gradient(self, gradient: Tensor) -> Tensor:
        """Compute the products of formed gradients."""
        flat = float32_at_least(as_rows(gradient))
        products = flat @ as_rows(self.queries).to(flat).T
        if not self.norm:
            return products
        return torch.cat([products, torch.linalg.vector_norm(flat, dim=1, keepdim=True).square()], 1)

    def adjoint(self, theta: Tensor) -> Tensor:
        """Compute Σ_k θ_k Q_k; with the norm there is no adjoint."""
        assert not self.norm, "a norm has no adjoint; single_use must have excluded this weight"
        return torch.tensordot(theta, self.queries.to(theta.dtype), 1)

    def to(self, dtype: torch.dtype) -> "InnerProducts":
        """Convert the queries to ``dtype``, or to float32 where that is wider."""
        return replace(self, queries=self.queries.to(torch.promote_types(dtype, torch.float32)))


def _contract(queries: Tensor, rows: Factor, cols: Tensor) -> Tensor:
    """Compute Σ_n rows_nᵀ Q_k cols_n, (E, K)."""
    if not len(queries):
        return cols.new_zeros(cols.shape[0], 0)
    cols = float32_at_least(cols)
    if isinstance(rows, OneHot):
        scaled = cols if rows.weight is None else cols * rows.weight[..., None]
        return torch.stack([(query[rows.ids] * scaled).flatten(1).sum(1) for query in queries], 1)
    return torch.stack([(dense_along(query, cols) * rows).flatten(1).sum(1) for query in queries], 1)


def _squared_norm(rows: Factor, cols: Tensor) -> Tensor:
    """Compute the squared norm of Σ_n rows_n colsᵀ_n, (E, 1), from the tokens' inner products."""
    cols = float32_at_least(cols)
    if isinstance(rows, OneHot):
        of_rows = (rows.ids[..., :, None] == rows.ids[..., None, :]).to(cols.dtype)
        if rows.weight is not None:
            of_rows = of_rows * rows.weight[..., :, None] * rows.weight[..., None, :]
    else:
        of_rows = float32_at_least(rows) @ float32_at_least(rows).mT
    return (of_rows * (cols @ cols.mT)).flatten(1).sum(1, keepdim=True).clamp(min=0)
