"""Every kind of causal language model in transformers, made tiny: rows against a plain autograd loop.

    python -m benchmarks.models [KIND ...] [--write]

Three documents, of 12, 12 and 9 tokens, the first with a masked prompt; rows (not projected) of the parameters that are
attributed by default are compared with gradients of a float64 copy of the model itself, a document at a time, without
padding, with the model's own attention. Where float64 has no kernel the copy stays in float32. ``--write`` puts the
table into docs/models.md.
"""

import argparse
import contextlib
import copy
import re
import signal
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn

import funcattrib as fa
from benchmarks.tiny_models import KINDS, VOCABULARY, tiny_model
from funcattrib.chain.evaluation import find_way
from funcattrib.data import plan
from funcattrib.lift import TwoSided, readout

LENGTHS = (12, 12, 9)
TOLERANCE = 1e-3
SECONDS = 120
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
_WAYS = {"by_vmap": "vmap", "batched": "batched", "one_by_one": "one by one"}


class Outcome(NamedTuple):
    """Result for one kind.

    Attributes:
        rows: ok, WRONG (with the error), or why there are none.
        way: how a batch is computed.
        own: what of the model's own takes the place of ours: attention, experts, head, and equal lengths.
        leaves: parameters that are attributed, of all.
    """

    kind: str
    rows: str
    way: str = ""
    own: str = ""
    leaves: str = ""


def outcome(kind: str) -> Outcome:
    """Compare one kind; whatever fails is said in ``rows``."""
    try:
        with _at_most(SECONDS):
            model = tiny_model(kind)
    except Exception as error:
        return Outcome(kind, f"no tiny model: {_brief(error)}")
    try:
        with _at_most(SECONDS):
            return compared(kind, model)
    except Exception as error:
        return Outcome(kind, f"error: {_brief(error)}")


def compared(kind: str, model: nn.Module) -> Outcome:
    """Compare a model's rows with the loop's."""
    loss, params = fa.causal_lm_loss(model)
    documents = examples()
    found, way = rows(loss, params, documents)
    expected = loop(model, documents, list(params))
    error = max(relative_error(each, whole) for each, whole in zip(found, expected, strict=True))
    verdict = "ok" if error < TOLERANCE else "WRONG"
    return Outcome(
        kind, f"{verdict} ({error:.0e})", way, _own(model, loss), f"{len(params)} of {len(list(model.parameters()))}"
    )


def examples() -> list[dict[str, Tensor]]:
    """Return three documents, the first with a masked prompt."""
    torch.manual_seed(1)
    made = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(5, VOCABULARY, (length,))
        labels = ids.clone()
        labels[: 4 if number == 0 else 0] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def rows(loss, params, documents: Sequence[dict[str, Tensor]]) -> tuple[list[dict[str, Tensor]], str]:
    """Compute rows in padded batches, as a run does; return them and the way that was taken."""
    maps = {name: readout(name, TwoSided()) for name in params}
    found: list[dict[str, Tensor]] = [{}] * len(documents)
    way = ""
    for chosen in plan([len(each["labels"]) for each in documents], 1000, equal_lengths=loss.equal_lengths):
        batch = padded([documents[at] for at in chosen])
        first = find_way(loss, params, maps, batch)
        way = _WAYS[first.way.__name__]
        for at, number in enumerate(chosen):
            found[number] = {name: grad[at] for name, grad in first.result.grads.items()}
    return found, way


def padded(documents: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack documents, padded on the right."""
    fill = {"input_ids": 0, "labels": -100}
    return {
        name: torch.nn.utils.rnn.pad_sequence([each[name] for each in documents], True, value)
        for name, value in fill.items()
    }


def loop(model: nn.Module, documents: Sequence[dict[str, Tensor]], names: list[str]) -> list[dict[str, Tensor]]:
    """Differentiate the model itself, a document at a time, in float64 where it runs in that."""
    plain = copy.deepcopy(model).double()
    try:
        with torch.no_grad():
            plain(input_ids=documents[0]["input_ids"][None], use_cache=False)
    except Exception:  # a kernel without float64
        plain = copy.deepcopy(model)
    named = dict(plain.named_parameters())
    found = []
    for each in documents:
        logits = plain(input_ids=each["input_ids"][None], use_cache=False).logits[0]
        loss = nn.functional.cross_entropy(logits[:-1].double(), each["labels"][1:], ignore_index=-100, reduction="sum")
        grads = torch.autograd.grad(loss, [named[name] for name in names], allow_unused=True, materialize_grads=True)
        found.append(dict(zip(names, grads, strict=True)))
    return found


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Compare every parameter's gradient, in units of its norm; of one that is nearly zero, of the whole gradient's."""
    whole = float(torch.stack([grad.double().norm() for grad in expected.values()]).norm())
    return max(
        float((found[name].double() - grad.double()).norm()) / (float(grad.double().norm()) + 1e-5 * whole + 1e-30)
        for name, grad in expected.items()
    )


def _own(model: nn.Module, loss) -> str:
    copied = next(m for m in loss.model.parts.skeleton.modules() if isinstance(m, transformers.PreTrainedModel))
    told = []
    if copied._can_set_attn_implementation():
        told += [] if copied.config._attn_implementation.startswith("funcattrib") else ["attention"]
    if copied._can_set_experts_implementation():
        told += ["experts"] if copied.config._experts_implementation != "funcattrib" else []
    told += ["head"] if loss.model.prefix is None else []
    return ", ".join(told + (["equal lengths"] if loss.equal_lengths else []))


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Format the outcomes as Markdown."""
    lines = ["| kind | rows | computed by | its own | parameters |", "|---|---|---|---|---|"]
    return lines + [f"| `{o.kind}` | {o.rows} | {o.way} | {o.own} | {o.leaves} |" for o in outcomes]


def write(outcomes: Sequence[Outcome]) -> None:
    """Put the table between the page's marks."""
    begin, end = "<!-- kinds -->\n", "<!-- end of kinds -->"
    right = sum(o.rows.startswith("ok") for o in outcomes)
    said = f"transformers {transformers.__version__}: {len(outcomes)} kinds, rows of {right} right.\n\n"
    text = begin + said + "\n".join(table(outcomes)) + "\n" + end
    PAGE.write_text(re.sub(f"{begin}.*{end}", lambda _: text, PAGE.read_text(), flags=re.DOTALL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=KINDS)
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    a = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(60)
    outcomes = []
    for kind in a.kinds:
        outcomes.append(outcome(kind))
        print(*outcomes[-1], sep="\t", flush=True)
    if a.write:
        write(outcomes)


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")[:110]


if __name__ == "__main__":
    main()
