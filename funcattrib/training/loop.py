"""Per-example gradients in a plain PyTorch loop.

    loss = s Σ_b ℓ_b        row b = C(∂ℓ_b/∂W) = (∂loss/∂θ_b) / s

``s`` is what the loop makes of the examples' losses: 1 where it adds them up, 1/n where it averages over n tokens. The
forward and backward pass, the weights' own gradients and every bit of them are what they are without collecting; to
rounding in a mixture whose experts are collected (by default they are), which takes a forward of its experts' own.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from funcattrib.chain.chain import Chain, compose
from funcattrib.chain.transform import State
from funcattrib.lift import unpack
from funcattrib.models.selection import choose
from funcattrib.training.capture import Collected, Reader, collecting, lifted, reader
from funcattrib.transforms import project
from funcattrib.transforms.leaf_shapes import is_stack
from funcattrib.types import Grads

Globs = Iterable[str]


@contextmanager
def capture_gradients(
    model: nn.Module,
    chain: Chain | None = None,
    *,
    state: State = None,
    modules: Globs | None = None,
    exclude: Globs = (),
    loss_scale: float | Tensor = 1.0,
) -> Iterator[Grads]:
    """Collect per-example gradients of the forward and backward passes inside the block, there once it is over.

    Args:
        chain: transforms, ``compose(project(16), …)``; ``project(16)`` by default.
        state: of a chain with fitted stages.
        modules, exclude: globs over parameter names. By default the weight matrices of the model's blocks that are
            trained.
        loss_scale: s, what the loss is of the sum of the examples' losses; ``token_mean(labels)`` for the loss that a
            language model of transformers returns.

    Yields:
        A dict that is filled at the end of the block: name → (B, *shape).

    Raises:
        FuncattribError: no forward or backward pass inside the block, or a chain that does not fit.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> with capture_gradients(model, compose(project(2))) as grads:
        ...     model(torch.ones(5, 4)).sum().backward()
        >>> grads["0.weight"].shape, model[0].weight.grad.shape
        (torch.Size([5, 2, 2]), torch.Size([3, 4]))
    """
    grads: Grads = {}
    with collecting(model, trained(model, modules, exclude), chain or compose(project()), state) as collected:
        yield grads
    grads.update(collected.grads(loss_scale))


class GradientCollector:
    """A collector over many steps; a context manager.

    Args:
        closure: called with a leaf's name and a batch's gradients (B, *shape) as soon as backward has them, which are
            then freed. With a chain that is not linear, when the batch is complete: before the next forward pass, or
            on leaving. Without a closure all rows are kept.
        model, chain, state, modules, exclude, loss_scale: as ``capture_gradients``; the last may be set for
            every batch.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> with GradientCollector(model, compose(project(2))) as collector:
        ...     for batch in torch.ones(3, 5, 4):
        ...         model(batch).sum().backward()
        >>> collector.grads["0.weight"].shape
        torch.Size([15, 2, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        chain: Chain | None = None,
        closure: Callable[[str, Tensor], object] | None = None,
        *,
        state: State = None,
        modules: Globs | None = None,
        exclude: Globs = (),
        loss_scale: float | Tensor = 1.0,
    ) -> None:
        self.model, self.closure, self.loss_scale = model, closure, loss_scale
        self._read: Reader = reader(model, trained(model, modules, exclude), chain or compose(project()), state)
        self._rows: dict[str, list[Tensor]] = {}
        self._inside = ExitStack()
        self._collected: Collected | None = None

    @property
    def grads(self) -> Grads:
        """Return name → (examples, *shape) of every batch so far, in order; empty with a closure."""
        return {name: torch.cat(rows) for name, rows in self._rows.items()}

    def __enter__(self) -> Self:
        self._collected = self._inside.enter_context(lifted(self.model, self._read, begun=self._begun))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside.close()
        assert self._collected is not None
        if error is None:
            self._finish(self._collected)
        self._collected.passes.clear()

    def _begun(self, collected: Collected) -> None:
        begun = collected.passes.pop()
        self._finish(collected)
        if self.closure is None or self._read.rest.stages:
            collected.passes.append(begun)
            return
        for name, probe in begun.probes.items():
            probe.register_post_accumulate_grad_hook(partial(self._arrived, name))

    def _arrived(self, name: str, probe: Tensor) -> None:
        assert self.closure is not None
        assert probe.grad is not None
        only = {n: each for n, each in self._read.readouts.items() if each.probe == name}
        for leaf, rows in unpack(only, {name: probe.grad / self.loss_scale}).items():
            self.closure(leaf, rows)
        probe.grad = None

    def _finish(self, collected: Collected) -> None:
        for grads in collected.take(self.loss_scale):
            for name, rows in grads.items():
                if self.closure is not None:
                    self.closure(name, rows)
                else:
                    self._rows.setdefault(name, []).append(rows)


def token_mean(labels: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Compute 1/n over the batch's n labelled tokens that have a token before them: the loss of transformers' language
    models.

    Example:
        >>> token_mean(torch.tensor([[5, 6, 7], [5, 6, -100]]))
        tensor(0.3333)
    """
    return 1.0 / (labels[..., 1:] != -100).sum()


def trained(model: nn.Module, modules: Globs | None, exclude: Globs) -> set[str]:
    """Return names of the parameters that the globs select; without globs, of the blocks' matrices that are trained.

    Stacks of experts must be named: reading them takes another forward, which differs in rounding from the one
    that the model was given, and training shall not change.
    """
    names = choose(model, modules, exclude)
    if modules is not None:
        return names
    wanted = {name: parameter for name, parameter in model.named_parameters() if name in names}
    return {n for n, p in wanted.items() if p.requires_grad and not is_stack(n, tuple(p.shape))} or names
